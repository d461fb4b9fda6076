"""The programs in `examples/` do what they say, on the built-in model."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import minerva_native as mn

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(folder: Path, name: str, *arguments: str, edit: tuple[str, str] = ("", "")) -> str:
    """Return what an example prints, after a change to its text."""
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert edit[0] in text
    (folder / f"{name}.py").write_text(text.replace(*edit) if edit[0] else text, encoding="utf-8")
    command = [sys.executable, f"{name}.py", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def greedy(model: mn.Model, prompt: str, n: int, beginning: str = "") -> str:
    with model.context(n_ctx=1024) as context, context.sequence() as sequence:
        sequence.extend(model.tokenizer.encode(prompt) + model.tokenizer.encode(beginning, add_special=False))
        return "".join(step.text for step in mn.generate(sequence, mn.SamplingParams.greedy(), max_tokens=n))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_says_what_it_shows_and_is_named_in_the_readme(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 25
    assert lines[0].startswith('"""')
    assert f"examples/{path.name}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_there_are_seventeen_and_each_is_run_here() -> None:
    assert len(EXAMPLES) == 17
    text = Path(__file__).read_text(encoding="utf-8")
    assert [path.stem for path in EXAMPLES if f'"{path.stem}"' not in text] == []


def test_chat(tmp_path: Path) -> None:
    out = run(tmp_path, "chat")
    assert out.count("> ") == 2
    first, second = re.findall(r"\[(\d+) of (\d+) prompt tokens were cached\]", out)
    assert first[0] == "0"
    assert int(second[0]) > int(first[1])
    assert "cat" in out


def test_two_chats(tmp_path: Path) -> None:
    out = run(tmp_path, "two_chats")
    assert re.search(r"^cat: .*little cat", out, re.MULTILINE)
    assert re.search(r"^dog: .*little dog", out, re.MULTILINE)
    assert "tokens_reevaluated=0" in out


def test_fastapi_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module: Any = __import__("fastapi_stream")
    llm: mn.LLM = module.llm

    async def whole() -> str:
        response = await module.stream("Once upon a time", max_tokens=5)
        return "".join([piece async for piece in response.body_iterator])

    async def cut_short() -> None:
        response = await module.stream("Once upon a time", max_tokens=900)
        pieces = response.body_iterator
        assert isinstance(await anext(pieces), str)
        await pieces.aclose()  # as the server does when the client has gone

    with llm:
        assert asyncio.run(whole())
        before = llm.context.stats.tokens_evaluated
        asyncio.run(cut_short())
        assert llm.complete("x", max_tokens=0).text == ""  # the queue has gone on
        assert llm.context.stats.tokens_evaluated - before < 300
    (route,) = (route for route in module.app.routes if route.path == "/stream")
    assert route.methods == {"GET"}


def test_asyncio_timeout(tmp_path: Path) -> None:
    out = run(tmp_path, "asyncio_timeout").splitlines()
    assert re.fullmatch(r"\d+ tokens in time, then it was cancelled", out[-1])
    assert len(out) >= 3


def test_logprobs(tmp_path: Path) -> None:
    out = run(tmp_path, "logprobs").splitlines()
    assert len(out) == 13
    for line in out[:-1]:
        token, first = re.match(r"('.*?')\s+from ('.*?') \d+%", line).groups()  # type: ignore[union-attr]
        assert token == first


def test_labels(tmp_path: Path) -> None:
    assert re.fullmatch(r".*boy.*: he \(\d.*\)\n.*girl.*: she \(\d.*\)\n", run(tmp_path, "labels"))


def test_cached_prompt(tmp_path: Path) -> None:
    counts = re.findall(r"\[(\d+) of (\d+) tokens evaluated\]", run(tmp_path, "cached_prompt"))
    assert len(counts) == 2
    assert all(int(evaluated) < 20 < 100 < int(length) for evaluated, length in counts)


def test_beams(tmp_path: Path, demo: mn.Model) -> None:
    prompt = "Once upon a time, there was a little"
    lines = run(tmp_path, "beams").splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
    with demo.context(n_ctx=1024) as context, context.sequence() as sequence:
        sequence.extend(demo.tokenizer.encode(prompt))
        plain = sum(step.logprob for step in mn.generate(sequence, mn.SamplingParams.greedy(), max_tokens=12))
    assert scores[0] > plain - 0.1  # a beam is at least as good as greedy decoding, usually better


def test_contrastive(tmp_path: Path, demo: mn.Model) -> None:
    plain = greedy(demo, "Once upon a time, there was a little", 24)
    assert run(tmp_path, "contrastive").rstrip("\n") != plain
    assert run(tmp_path, "contrastive", edit=("ALPHA = 0.1", "ALPHA = 1.0")).rstrip("\n") == plain


def test_guidance(tmp_path: Path, demo: mn.Model) -> None:
    plain = " One day," + greedy(demo, "The cat was very sad.", 24, " One day,")
    assert run(tmp_path, "guidance").rstrip("\n") != plain
    assert run(tmp_path, "guidance", edit=("SCALE = 3.0", "SCALE = 1.0")).rstrip("\n") == plain


def test_speculative(tmp_path: Path, demo: mn.Model) -> None:
    off = ("model.context(n_ctx=1024)", 'model.context(n_ctx=1024, flash_attention="off", kv_type="f32")')
    out = run(tmp_path, "speculative", edit=off)
    with demo.context(n_ctx=1024, flash_attention="off", kv_type="f32") as context, context.sequence() as sequence:
        sequence.extend(demo.tokenizer.encode("Once upon a time, there was a little cat. One cold day,"))
        plain = "".join(step.text for step in mn.generate(sequence, mn.SamplingParams.greedy(), max_tokens=150))
    text, _, counts = out.rstrip("\n").rpartition("\n")
    assert text == plain
    n_tokens, n_passes = map(int, re.findall(r"\d+", counts))
    assert n_passes < n_tokens


def test_perplexity(tmp_path: Path) -> None:
    text = "Once upon a time, there was a little cat named Tom."
    (tmp_path / "text.txt").write_text(text)
    found = float(run(tmp_path, "perplexity", str(mn.DEMO_PATH), "text.txt").split()[-1])
    with mn.LLM(mn.DEMO_PATH) as llm:
        logprobs = llm.score(text).logprobs[1:]
    assert found == pytest.approx(2.718281828 ** (-sum(logprobs) / len(logprobs)), rel=1e-2)


def test_entropy(tmp_path: Path) -> None:
    run(tmp_path, "entropy")
    assert (tmp_path / "entropy.png").read_bytes().startswith(b"\x89PNG")


def test_latency(tmp_path: Path) -> None:
    lengths = [int(line.split()[0]) for line in run(tmp_path, "latency").splitlines()]
    assert lengths == [16, 32, 64, 128, 256, 512]


def test_lipogram(tmp_path: Path) -> None:
    out = run(tmp_path, "lipogram")
    assert "o" not in out.lower()
    assert len(out) > 40


def test_record(tmp_path: Path) -> None:
    out = run(tmp_path, "record")
    assert re.match(r"Hero\(animal='\w+', mood='\w+', friend='?\w+'?\)\n", out)
    forced, made = map(int, re.findall(r"(\d+) of (\d+)", out)[0])
    assert 15 < forced < made


def test_tools(tmp_path: Path) -> None:
    out = run(tmp_path, "tools")
    assert [line.split()[0] for line in out.splitlines() if line][:3] == ["user", "assistant", "tool"]
    assert "'name': 'roll'" in out
    assert 1 <= int(re.findall(r"^tool (\d+)$", out, re.MULTILINE)[0]) <= 20
