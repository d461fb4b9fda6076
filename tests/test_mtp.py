"""Guesses of a model's own MTP head: the same text, and the head knows what the decoder knows."""

import json
import math
import re
import select
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

import minerva_native as mn
from echo_models import Echo
from engine_room import open_up
from minerva_native._binding import ffi, lib
from minerva_native.cli import main
from minerva_native.model import MTP_ARCHITECTURES
from minerva_native.speculative import OwnHead
from tiny_models import END, END_OF_TURN, TOKENS, VOCABULARY, TinyModel, write_gguf

Load = Callable[[TinyModel], mn.Model]

OPTIONS: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "kv_type": "f32", "flash_attention": "off"}
WITHOUT_END = dict.fromkeys((END, END_OF_TURN), -math.inf)
GREEDY = mn.SamplingParams(temperature=0, logit_bias=WITHOUT_END)
DRAWN = mn.SamplingParams(temperature=0.4, seed=7, logit_bias=WITHOUT_END)
PROMPT = list(range(60, 90))


class Kind(NamedTuple):
    """A model with heads, and how its context is made."""

    model: TinyModel
    options: Mapping[str, Any] = MappingProxyType({})


KINDS = {
    "attention, experts": Kind(TinyModel("glm4moe", n_mtp=1)),
    "cells of its own": Kind(TinyModel("glm4moe", n_mtp=1), {"kv_unified": False}),
    "a chain of heads": Kind(TinyModel("mimo2", n_mtp=3)),
    "a chain of heads, small window": Kind(TinyModel("mimo2", n_mtp=3), {"swa_full": False}),
    "hybrid with checkpoints": Kind(TinyModel("qwen35", n_mtp=1)),
    "hybrid with snapshots": Kind(TinyModel("qwen35", n_mtp=1), {"n_rs_seq": 6}),
    "compressed keys": Kind(TinyModel("deepseek2", n_mtp=1)),
    "small window": Kind(TinyModel("cohere2moe", n_mtp=1), {"swa_full": False}),
    "hybrid with experts": Kind(TinyModel("qwen35moe", n_mtp=1), {"n_rs_seq": 6}),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def written(sequence: mn.Sequence, params: mn.SamplingParams, n: int = 100, **options: Any) -> list[int]:
    return [step.token for step in mn.generate(sequence, params, max_tokens=n, **options)]


def plainly(model: mn.Model, params: mn.SamplingParams, n: int = 100, prompt: list[int] = PROMPT) -> list[int]:
    with model.context(**OPTIONS) as context, context.sequence() as sequence:
        sequence.extend(prompt)
        return written(sequence, params, n)


def drafts(sequence: mn.Sequence, n: int = 4) -> list[int]:
    """Return what the head guesses after the last token, which then waits again."""
    return OwnHead(sequence).draft(sequence.tokens, n)


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_the_text_is_the_same(load_tiny: Load, kind: Kind, params: mn.SamplingParams) -> None:
    model = load_tiny(kind.model)
    plain = plainly(model, params)
    with model.context(mtp=True, **OPTIONS, **kind.options) as context, context.sequence() as sequence:
        sequence.extend(PROMPT)
        speculation = mn.Speculation("mtp", max_loss=math.inf)
        assert written(sequence, params, speculate=speculation) == plain
        assert speculation.drafted > len(plain) / 4
        assert sequence[len(PROMPT) :] == plain


RIGHT = {
    "attention, experts": Kind(Echo("glm4moe", n_mtp=1)),
    "a chain of heads": Kind(Echo("mimo2", n_mtp=3)),
    "hybrid with snapshots": Kind(Echo("qwen35", n_mtp=1), {"n_rs_seq": 6}),
    "hybrid with checkpoints": Kind(Echo("qwen35", n_mtp=1)),
    "cohere2moe": Kind(Echo("cohere2moe", n_mtp=1)),
    "deepseek2": Kind(Echo("deepseek2", n_mtp=1)),
    "hy_v3": Kind(Echo("hy_v3", n_mtp=2)),
    "qwen35moe": Kind(Echo("qwen35moe", n_mtp=1), {"n_rs_seq": 6}),
    "qwen3next": Kind(Echo("qwen3next", n_mtp=1)),
    "step35": Kind(Echo("step35", n_mtp=3)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_head_that_is_always_right_saves_passes(load_tiny: Load, name: str) -> None:
    made, n = RIGHT[name].model, 100
    model = load_tiny(made)
    plain = plainly(model, GREEDY)
    with model.context(mtp=True, **OPTIONS, **RIGHT[name].options) as context, context.sequence() as sequence:
        sequence.extend(PROMPT)
        speculation = mn.Speculation("mtp", max_loss=math.inf)
        assert written(sequence, GREEDY, n, speculate=speculation) == plain
        most = made.n_mtp if made.n_mtp > 1 else context.options.n_rs_seq or lib.MINERVA_MOST_DRAFTED
        assert speculation.accepted == speculation.drafted
        n_passes = context.stats.decode_calls - 1
        # Each pass gives what was guessed, and one token more.
        assert n_passes + speculation.accepted in (n - 1, n)
        assert (n - 1) / (most + 1) <= n_passes < n / 2
        assert context.stats.tokens_evaluated in (len(PROMPT) + n - 1, len(PROMPT) + n)
        assert context.stats.tokens_reevaluated == 0


def test_a_head_that_is_right_in_part_saves_some(load_tiny: Load) -> None:
    model = load_tiny(Echo("glm4moe", n_mtp=1, share=0.1))
    plain = plainly(model, GREEDY)
    with model.context(mtp=True, **OPTIONS) as context, context.sequence() as sequence:
        sequence.extend(PROMPT)
        speculation = mn.Speculation("mtp", max_loss=math.inf)
        assert written(sequence, GREEDY, speculate=speculation) == plain
        assert 0.2 * speculation.drafted < speculation.accepted < 0.9 * speculation.drafted
        assert context.stats.decode_calls - 1 + speculation.accepted in (99, 100)


@pytest.fixture
def context(load_tiny: Load) -> Iterator[mn.Context]:
    with load_tiny(TinyModel("glm4moe", n_mtp=1)).context(mtp=True, n_seq=4, **OPTIONS) as context:
        yield context


def fresh(context: mn.Context, tokens: list[int]) -> list[int]:
    """Return what the head guesses in a context that has evaluated these tokens, but for the last, and no others."""
    with context.model.context(mtp=True, **OPTIONS) as other, other.sequence() as sequence:
        sequence.extend(tokens[:-1])
        sequence.append(tokens[-1])
        found = drafts(sequence)
        assert len(found) in (3, 4)
        return found


def agree(sequence: mn.Sequence, token: int) -> None:
    """Assert that with one more token the head guesses what it would if nothing had been done to the text."""
    _ = sequence.logits
    sequence.append(token)
    assert drafts(sequence) == fresh(sequence.context, list(sequence))
    assert drafts(sequence) == fresh(sequence.context, list(sequence))  # what it drafted is gone again


FOLLOWED = [name for name in KINDS if name != "cells of its own"]  # where prefixes are copied: see below


@pytest.mark.parametrize("name", FOLLOWED)
def test_drafts_follow_the_text_through_all_that_is_done_to_it(load_tiny: Load, name: str) -> None:
    made = KINDS[name]
    with load_tiny(made.model).context(mtp=True, n_seq=4, **OPTIONS, **made.options) as context:
        sequence = context.sequence()
        sequence.extend(PROMPT)
        agree(sequence, 40)
        sequence.extend([41, 42])
        agree(sequence, 43)
        sequence.logits_after([7, 8, 9, 10, 11])
        sequence.rewind(3)
        agree(sequence, 44)
        fork = sequence.fork(len(sequence) - 2)
        agree(fork, 45)
        agree(sequence, 46)
        context.extend({sequence: [50, 51], fork: [52]})
        for one in sequence, fork:
            one.append(47)
        context.evaluate([sequence, fork])
        agree(fork, 48)
        agree(sequence, 49)
        context.logits_after({sequence: [70, 71], fork: [72, 73, 74]})
        sequence.rewind(1)
        fork.rewind(2)
        agree(fork, 53)
        agree(sequence, 54)
        tokens = list(sequence)
        sequence.close()
        again = context.sequence()
        again.extend(tokens)  # from what the closed one has left
        assert context.stats.tokens_reused > 0
        agree(again, 55)


def test_forks_in_cells_of_their_own_have_what_the_head_knows(context: mn.Context) -> None:
    with context.model.context(mtp=True, n_seq=2, kv_unified=False, **OPTIONS) as other:
        sequence = other.sequence()
        sequence.extend(PROMPT)
        fork = sequence.fork()
        for one, token in (sequence, 41), (fork, 42):
            agree(one, token)


def test_threads_of_both_contexts_take_turns(load_tiny: Load) -> None:
    model = load_tiny(Echo("glm4moe", n_mtp=1, share=0.1))
    plain = plainly(model, GREEDY)
    with model.context(mtp=True, **{**OPTIONS, "n_threads": 3}) as context, context.sequence() as sequence:
        sequence.extend(PROMPT)
        for n_threads in (3, 1, 5, 2):  # more threads than before are others
            context.set_threads(n_threads)
            assert written(sequence, GREEDY, speculate=mn.Speculation("mtp", math.inf)) == plain
            sequence.truncate(len(PROMPT))


def test_a_head_that_lacks_the_beginning_drafts_from_what_it_has(context: mn.Context, tmp_path: Path) -> None:
    sequence = context.sequence()
    sequence.extend(PROMPT)
    sequence.save(tmp_path / "saved")
    restored = context.restore(tmp_path / "saved")
    restored.append(40)
    assert drafts(restored) == []  # no hidden state was saved
    _ = restored.logits
    restored.append(41)
    assert len(drafts(restored)) == 4
    sequence.shift(2, 5)
    sequence.append(40)
    assert drafts(sequence) == []
    _ = sequence.logits
    sequence.append(41)
    assert len(drafts(sequence)) == 4
    sequence.truncate(3)  # what the states before were is no longer known
    sequence.append(9)
    assert drafts(sequence) == []
    with context.raw():
        pass
    assert drafts(restored) == []
    empty = context.sequence()
    assert drafts(empty) == []
    empty.append(5)
    assert drafts(empty) == []
    _ = empty.logits
    empty.append(6)
    assert drafts(empty) == fresh(context, [5, 6])


def test_a_full_context_ends_at_the_same_token(load_tiny: Load) -> None:
    model = load_tiny(Echo("glm4moe", n_mtp=1))
    options = {**OPTIONS, "n_ctx": 256}
    with model.context(**options) as context, context.sequence() as sequence:
        sequence.extend(PROMPT)
        plain = written(sequence, DRAWN, 999)
    with model.context(mtp=True, **options) as context, context.sequence() as sequence:
        sequence.extend(PROMPT)
        assert written(sequence, DRAWN, 999, speculate=mn.Speculation("mtp", math.inf)) == plain
        assert len(plain) == 256 - len(PROMPT)


def test_a_head_without_room_does_not_draft(context: mn.Context) -> None:
    first, second = context.sequence(), context.sequence()
    first.extend([40] * 300)
    second.extend([41] * 211)  # one cell is left
    second.append(42)
    assert len(drafts(second, 8)) == 1
    assert second.logits.argmax() >= 0


def test_a_head_that_fails_ends_the_guesses_and_not_the_text(load_tiny: Load, caplog: pytest.LogCaptureFixture) -> None:
    model = load_tiny(Echo("glm4moe", n_mtp=1))
    plain = plainly(model, GREEDY)
    context, cache = open_up(model, mtp=True, n_seq=2, **{**OPTIONS, "n_threads": 2})
    with context, context.sequence() as sequence:
        sequence.extend(PROMPT)
        speculation = mn.Speculation("mtp", max_loss=math.inf)
        steps = mn.generate(sequence, GREEDY, max_tokens=100, speculate=speculation)
        tokens = [next(steps).token for _ in range(50)]
        drafted = speculation.drafted
        assert drafted > 0
        lib.minerva_head_copy(cache.runner.decoder, 0, 9999)  # libllama asserts that it knows the sequence
        assert lib.minerva_thrown_cause() == lib.MINERVA_ASSERTION
        tokens += [step.token for step in steps]
        assert tokens == plain
        assert speculation.drafted <= drafted + 32
        assert [record.getMessage()[:30] for record in caplog.records] == ["the model's MTP head has faile"]
        sequence.truncate(3)
        sequence.fork().extend([40])

        for n_threads in (1, 3):  # what failed there does not concern these
            context.set_threads(n_threads)
            sequence.extend([41])


def test_calls_of_libllama_itself_find_the_threads_awake(load_tiny: Load) -> None:
    model = load_tiny(Echo("glm4moe", n_mtp=1))
    with model.context(mtp=True, **{**OPTIONS, "n_threads": 2}) as context, context.sequence() as sequence:
        sequence.extend(PROMPT)  # after which the head has read, while the threads rested
        before = sequence.logits
        with context.raw() as pointer:
            lib.llama_memory_clear(lib.llama_get_memory(pointer), True)
            tokens = ffi.new("llama_token[]", PROMPT)
            assert lib.llama_decode(pointer, lib.llama_batch_get_one(tokens, len(PROMPT))) == 0
        assert np.allclose(sequence.logits, before, atol=1e-4)


def test_a_cancel_while_the_head_drafts_is_not_lost(load_tiny: Load) -> None:
    context, cache = open_up(load_tiny(Echo("glm4moe", n_mtp=1)), mtp=True, **OPTIONS)
    with context, context.sequence() as sequence:
        sequence.extend(PROMPT)
        _ = sequence.logits
        context.cancel()
        with pytest.raises(mn.Cancelled):
            cache.runner.draft(40, len(PROMPT), 0, 4)
        sequence.append(40)
        assert len(drafts(sequence)) == 4  # it concerned that alone


@pytest.mark.parametrize("name", ["attention, experts", "hybrid with checkpoints", "hybrid with snapshots"])
def test_an_llm_drafts_for_several_requests_at_once(load_tiny: Load, name: str) -> None:
    made, prompts = RIGHT[name], [[*PROMPT[:20], 70 + at] for at in range(8)]
    model = load_tiny(made.model)
    plain = [plainly(model, GREEDY, 40, prompt) for prompt in prompts]
    with mn.LLM(
        model, speculate="mtp", n_parallel=4, template="{{ messages[0].content }}", **OPTIONS, **made.options
    ) as llm:
        for _ in range(2):  # the second time most of it is cached
            answers = llm.map(prompts, max_tokens=40, temperature=0, logit_bias=WITHOUT_END, progress=False)
            assert [answer.tokens for answer in answers] == plain
        answer = llm.complete(prompts[0], n=3, max_tokens=40, temperature=0.4, seed=5)
        assert [len(choice.tokens) <= 40 for choice in answer.choices] == [True] * 3
    with mn.LLM(model, template="{{ messages[0].content }}", **OPTIONS, **made.options) as llm:
        expected = llm.complete(prompts[0], n=3, max_tokens=40, temperature=0.4, seed=5)
        assert [choice.tokens for choice in answer.choices] == [choice.tokens for choice in expected.choices]


def test_a_server_full_of_requests_parks_some_and_gives_the_same_texts(load_tiny: Load) -> None:
    model = load_tiny(Echo("glm4moe", n_mtp=1, share=0.1))
    prompts = [[*PROMPT[:20], 70 + at] for at in range(6)]
    plain = [plainly(model, GREEDY, 60, prompt) for prompt in prompts]
    with mn.LLM(model, speculate="mtp", n_parallel=6, template="", **{**OPTIONS, "n_ctx": 256}) as llm:
        answers = llm.map(prompts, max_tokens=60, temperature=0, logit_bias=WITHOUT_END, progress=False)
        assert [answer.tokens for answer in answers] == plain


def test_requests_are_the_same_alone_and_together_if_deterministic(load_tiny: Load) -> None:
    model = load_tiny(Echo("glm4moe", n_mtp=1, share=0.1))
    options = {**OPTIONS, "n_ctx": 1280, "n_parallel": 4, "deterministic": True, "template": ""}
    with mn.LLM(model, speculate="mtp", **options) as llm:
        prompts = [[*PROMPT[:20], 70 + at] for at in range(4)]
        together = llm.map(prompts, max_tokens=40, seed=1, temperature=0.3, progress=False)
        alone = [llm.complete(prompt, max_tokens=40, seed=1, temperature=0.3) for prompt in prompts]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert sum(answer.usage.accepted for answer in alone) > 0


def test_a_prompt_from_the_disk_is_continued_alike(load_tiny: Load, tmp_path: Path) -> None:
    model = load_tiny(Echo("glm4moe", n_mtp=1, share=0.1))
    prompt = [int(token) for token in np.random.default_rng(1).integers(40, 200, 300)]
    plain = plainly(model, GREEDY, 60, prompt)
    for process in range(2):
        with mn.LLM(model, speculate="mtp", cache_dir=tmp_path, template="", **OPTIONS) as llm:
            answer = llm.complete(prompt, max_tokens=60, temperature=0, logit_bias=WITHOUT_END)
            assert answer.tokens == plain
            assert (answer.usage.cached_tokens > 250) == (process > 0)


def test_a_model_is_loaded_with_its_head_if_it_is_asked_for(
    tmp_path: Path, demo: mn.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    path = TinyModel("glm4moe", n_mtp=1).write(tmp_path / "headed.gguf")
    with mn.LLM(path, speculate="mtp", template="", gpu_layers=0, **OPTIONS) as llm:
        assert llm.model.load_mtp
        assert llm.context.options.mtp
        with_head = sum(part.size_bytes for part in llm.model.placement)
    with mn.Model.load(path, gpu_layers=0) as model:
        assert (model.n_mtp_layers, model.load_mtp, demo.n_mtp_layers) == (1, False, 0)
        assert sum(part.size_bytes for part in model.placement) < with_head
        with pytest.raises(
            mn.OptionError, match=r"headed.gguf \(glm4moe\) was loaded without its MTP head: give load_mtp"
        ):
            model.context(mtp=True)
        with pytest.raises(mn.OptionError, match="was loaded without"):
            mn.LLM(model, speculate="mtp")
    with mn.Model.load(path, vocab_only=True) as model:
        assert (model.n_layer, model.n_blocks, model.n_mtp_layers) == (3, 4, 1)
    assert main(["info", "-m", str(path)]) == 0
    assert "3, and 1 that can draft (MTP)" in capsys.readouterr().out


def test_what_has_no_head_says_so(tmp_path: Path, demo: mn.Model, load_tiny: Load) -> None:
    no_head = r"minerva-demo.gguf \(llama\) has no MTP head"
    for attempt in (
        lambda: mn.LLM(demo, speculate="mtp"),
        lambda: mn.LLM(mn.DEMO_PATH, speculate="mtp"),
        lambda: mn.Model.load(mn.DEMO_PATH, load_mtp=True),
        lambda: demo.context(mtp=True),
    ):
        with pytest.raises(mn.OptionError, match=no_head):
            attempt()
    model = TinyModel("glm4moe", n_mtp=1)
    weights = {name: weight for name, weight in model.weights.items() if not name.startswith("blk.3.")}
    model.__dict__["weights"] = weights  # as files have it whose heads are in another file
    with pytest.raises(mn.OptionError, match="has no MTP head"):
        mn.Model.load(model.write(tmp_path / "trunk.gguf"), load_mtp=True)
    path = TinyModel("glm4moe", n_mtp=1).write(tmp_path / "wide.gguf")
    with pytest.raises(mn.OptionError, match="has no MTP head"):  # libllama would read more than there is
        mn.Model.load(path, load_mtp=True, kv_overrides={"glm4moe.embedding_length_out": 1 << 24})
    two = TinyModel("qwen35", n_mtp=2).write(tmp_path / "two.gguf")
    with mn.Model.load(two, load_mtp=True, gpu_layers=0) as loaded, pytest.raises(mn.ContextError, match="MTP head"):
        loaded.context(mtp=True)
    with load_tiny(TinyModel("glm4moe", n_mtp=1)).context(**OPTIONS) as context, context.sequence() as sequence:
        sequence.extend([5])
        with pytest.raises(mn.OptionError, match="needs a context with mtp=True"):
            next(mn.generate(sequence, speculate=mn.Speculation("mtp")))


def test_the_architectures_are_those_of_the_pinned_source(llama_cpp_source: Path) -> None:
    files = (llama_cpp_source / "src" / "models").glob("*.cpp")
    with_graph = {path.stem.replace("-", "") for path in files if "graph_mtp::graph_mtp(" in path.read_text()}
    assert with_graph == {re.sub("[-_]", "", name) for name in MTP_ARCHITECTURES}


@pytest.mark.parametrize("architecture", ["dflash", "eagle3", "gemma4-assistant"])
def test_heads_that_are_files_of_their_own_are_refused(tmp_path: Path, demo: mn.Model, architecture: str) -> None:
    sizes = {"context_length": 64, "embedding_length": 64, "block_count": 1, "vocab_size": len(TOKENS)}
    keys = {f"{architecture}.{key}": size for key, size in sizes.items()}
    path = write_gguf(tmp_path / "drafter.gguf", architecture, {**keys, **VOCABULARY})
    with mn.Model.load(path, vocab_only=True) as drafter:
        with pytest.raises(
            mn.OptionError, match=rf"drafter.gguf \({architecture}\) drafts from another model's hidden"
        ):
            mn.DraftModel(drafter)
        with pytest.raises(mn.OptionError, match="drafts from another"):
            mn.LLM(demo, speculate=drafter, n_ctx=64)


def test_a_server_drafts_with_the_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("starlette")
    path = Echo("glm4moe", n_mtp=1).write(tmp_path / "headed.gguf")
    command = [sys.executable, "-m", "minerva_native", "serve", "--port", "0", "--json", "--speculate", "mtp"]
    command += ["-m", str(path), "-ngl", "0", "-c", "2048", "-t", "1", "--deterministic"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        assert select.select([server.stdout], [], [], 60)[0], "the server does not start"
        started = json.loads(server.stdout.readline())

        def asked(path: str, body: dict[str, Any] | None = None) -> str:
            headers = {"Authorization": f"Bearer {started['token']}", "Content-Type": "application/json"}
            data = None if body is None else json.dumps(body).encode()
            with urllib.request.urlopen(
                urllib.request.Request(started["url"] + path, data, headers), timeout=60
            ) as reply:
                return str(reply.read().decode())

        asked("/completion", {"prompt": PROMPT, "n_predict": 60, "temperature": 0, "ignore_eos": True})
        drafted, accepted = (
            re.findall(rf"^minerva_{name}_tokens_total\{{.*\}} (.+)$", asked("/metrics"), re.M)
            for name in ("drafted", "accepted")
        )
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
        server.stdout.close()
    assert drafted == accepted
    assert sum(map(float, drafted)) > 0
    assert main(["serve", "--port", "0", "-q", "--speculate", "mtp", "-ngl", "0"]) == 1
    assert capsys.readouterr().err == (
        "minerva: error: minerva-demo.gguf (llama) has no MTP head that libllama can draft with\n"
    )
