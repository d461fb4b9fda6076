"""Several requests over one context: the same texts as alone, in fewer batches, in a fair order, whatever happens."""

import asyncio
import collections
import contextlib
import functools
import gc
import itertools
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import numpy as np
import pytest

import minerva_native as mn
from minerva_native.requests import RequestQueue, Signal
from minerva_native.scheduler import Scheduler
from test_llm import CHATML, evaluated, no_end
from tiny_models import TinyModel

STORY = "Once upon a time, there was a little"
EXACT: dict[str, Any] = {"n_threads": 1, "kv_type": "f32", "flash_attention": "off"}
"""With these options and F32 weights, what is computed for a token hardly depends on what else is in its batch."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mn.Model]:
    """The built-in model with F32 weights: quantised ones make much of a rounding."""
    path = tmp_path_factory.mktemp("model") / "demo-f32.gguf"
    reader = gguf.GGUFReader(mn.DEMO_PATH)
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with mn.Model.load(path, gpu_layers=0) as model:
        yield model


@pytest.fixture
def eight(demo: mn.Model) -> Iterator[mn.LLM]:
    with mn.LLM(demo, n_ctx=2048, n_parallel=8, **EXACT) as llm:
        yield llm


def alone(model: mn.Model, requests: list[dict[str, Any]], **options: Any) -> list[list[int]]:
    """Return the tokens of each request, served by itself in a new context."""
    found = []
    for request in requests:
        with mn.LLM(model, **{"n_ctx": 2048, **EXACT, **options}) as llm:
            found.append(llm.complete(**request).tokens)
    return found


def side_by_side(llm: mn.LLM, requests: list[dict[str, Any]]) -> list[mn.Completion]:
    async def main() -> list[mn.Completion]:
        return await asyncio.gather(*(llm.acomplete(**request) for request in requests))

    return asyncio.run(main())


def record_batches(llm: mn.LLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that grows by (sequences, tokens evaluated) with each evaluation of several requests."""
    batches: list[tuple[int, int]] = []
    evaluate = llm.context.evaluate

    def recorded(sequences: Any, *arguments: Any, **options: Any) -> int:
        before = llm.context.stats.tokens_evaluated
        left = evaluate(sequences, *arguments, **options)
        batches.append((len(sequences), llm.context.stats.tokens_evaluated - before))
        return left

    monkeypatch.setattr(llm.context, "evaluate", recorded)
    return batches


def assert_nothing_is_held(llm: mn.LLM) -> None:
    """Wait until the requests that were left have ended."""
    deadline = time.monotonic() + 30
    while llm.context.cells_used and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert llm.context.cells_used == 0


class Hold:
    """Keeps the queue's thread busy, so that what is submitted meanwhile begins together."""

    def __init__(self, llm: mn.LLM):
        self._go = threading.Event()
        started = threading.Event()

        def work(request: Any) -> Iterator[int]:
            started.set()
            self._go.wait(60)
            yield 0

        self._stream = llm.queue.stream(work)
        assert started.wait(60)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._go.set()
        list(self._stream)


# The same texts


def test_texts_are_those_of_requests_that_are_alone(demo: mn.Model, eight: mn.LLM) -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": STORY + " boy" * (11 * at), "max_tokens": 20 + at, "seed": at, "temperature": 0.0 if at % 2 else 0.9}
        for at in range(12)
    ]
    requests[3] |= {"stop": ["the", "a"]}
    requests[4] |= {"logprobs": True, "top_logprobs": 3}
    requests[5] |= {"repeat_penalty": 1.3}
    requests[6] |= {"max_tokens": 0}
    assert [answer.tokens for answer in side_by_side(eight, requests)] == alone(demo, requests)
    assert eight.context.cells_used == 0


def test_constraints_and_forced_tokens(demo: mn.Model, eight: mn.LLM) -> None:
    schema = {"type": "object", "properties": {"a_long_name": {"type": "boolean"}, "another": {"type": "integer"}}}
    schema["required"] = ["a_long_name", "another"]
    requests: list[dict[str, Any]] = [
        {"prompt": STORY, "response_format": schema, "max_tokens": 60, "seed": at} for at in range(4)
    ]
    answers = side_by_side(eight, [*requests, {"prompt": STORY, "max_tokens": 30, "seed": 9}])
    with mn.LLM(demo, n_ctx=2048, **EXACT) as llm:
        expected = [llm.complete(**request) for request in requests]
    for one, other in zip(answers, expected, strict=False):
        assert (one.tokens, one.usage.forced_tokens) == (other.tokens, other.usage.forced_tokens)
        assert one.usage.forced_tokens > 3


def test_one_batch_a_token(eight: mn.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": f"{STORY} {name}", "max_tokens": 30, "logit_bias": no_end(eight), "seed": at}
        for at, name in enumerate(["boy", "girl", "dog", "cat", "bird", "fish", "bear", "frog"])
    ]
    batches = record_batches(eight, monkeypatch)
    with Hold(eight):
        streams = [eight.stream(**request) for request in requests]
    for stream in streams:
        assert len(list(stream)) == 30
    full = [n for n, tokens in batches if n == tokens == 8]
    assert len(full) >= 28
    assert len(batches) <= 29 + 8


def test_what_is_drawn_together_is_what_each_would_draw(demo: mn.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": f"{STORY} {name}", "max_tokens": 30, "seed": at, "temperature": 0.0 if at > 4 else 1.5}
        for at, name in enumerate(["boy", "girl", "dog", "cat", "bird", "fish", "bear", "frog"])
    ]
    n_drawn, draw = 0, mn.Sampler.draw

    def counted(sampler: mn.Sampler, survivors: Any) -> int:
        nonlocal n_drawn
        n_drawn += 1
        return draw(sampler, survivors)

    monkeypatch.setattr(mn.Sampler, "draw", counted)
    found = []
    for _ in range(2):
        with mn.LLM(demo, n_ctx=2048, n_parallel=8, **EXACT) as llm:
            bias = no_end(llm)
            with Hold(llm):
                streams = [llm.stream(**request, logit_bias=bias) for request in requests]
            found.append([[chunk.token for chunk in stream] for stream in streams])
        monkeypatch.setattr("minerva_native.scheduler.look_ahead", lambda drawing: None)
    assert found[0] == found[1]
    assert 8 * 25 <= n_drawn < 8 * 30


def test_a_prompt_in_common_is_evaluated_once(eight: mn.LLM) -> None:
    prompt = eight.tokenizer.encode(STORY + " boy" * 300)
    options: dict[str, Any] = {"max_tokens": 1, "temperature": 0}
    n = len(prompt)
    answers: list[mn.Completion] = []

    def ask() -> None:
        with Hold(eight):
            threads = [
                threading.Thread(target=lambda: answers.append(eight.complete(prompt, **options))) for _ in range(8)
            ]
            for thread in threads:
                thread.start()
            while len(eight.queue) < 8:
                time.sleep(0.001)
        for thread in threads:
            thread.join()

    count = evaluated(eight, ask)
    assert n <= count <= n + 8 * 16  # each may evaluate a few at the end that are not worth waiting for
    assert sorted(answer.usage.cached_tokens for answer in answers)[0] == 0
    again = eight.context.stats.tokens_reevaluated  # the last token, where its logits were gone
    assert sum(n - answer.usage.cached_tokens for answer in answers) == count - again
    assert again < 8
    assert len({tuple(answer.tokens) for answer in answers}) == 1


@pytest.mark.parametrize("architecture", ["mamba", "lfm2", "gemma2"])
@pytest.mark.parametrize("kv_unified", [True, False])
def test_every_kind_of_memory(load_tiny: Callable[[TinyModel], mn.Model], architecture: str, kv_unified: bool) -> None:
    model = load_tiny(TinyModel(architecture, tied=architecture == "gemma2"))
    options: dict[str, Any] = {"kv_unified": kv_unified, "n_ctx": 1024, "n_seq": 8, "n_ubatch": 32, "n_batch": 64}
    requests: list[dict[str, Any]] = [
        {"prompt": [5 + at % 2] * (20 + 17 * at), "max_tokens": 20, "seed": at} for at in range(6)
    ]
    with mn.LLM(model, n_parallel=4, **{**EXACT, **options}) as llm:
        more = {"logprobs": True, "logit_bias": no_end(llm)}
        answers = side_by_side(llm, [request | more for request in requests])
        if kv_unified:
            assert llm.context.cells_used == 0
    with model.context(n_ctx=512, **EXACT) as context:
        for request, answer in zip(requests, answers, strict=True):
            with context.sequence() as sequence:
                sequence.extend(request["prompt"])
                scores = sequence.score(answer.tokens)
            context.clear_cache()
            assert len(answer.tokens) == 20
            assert [entry.logprob for entry in answer.logprobs or []] == pytest.approx(scores.tolist(), abs=1e-3)


# Fairness


def test_a_long_prompt_costs_others_a_piece_a_token(demo: mn.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with mn.LLM(demo, n_ctx=2048, n_parallel=2, n_ubatch=64, n_batch=512, **EXACT) as llm:
        batches = record_batches(llm, monkeypatch)
        first = llm.stream(STORY, max_tokens=60, logit_bias=no_end(llm))
        next(first)
        long = llm.stream(STORY + " boy" * 900, max_tokens=1)
        assert len(list(first)) == 59
        assert len(list(long)) == 1
        mixed = [tokens for n, tokens in batches if n == 2]
        assert mixed
        assert max(tokens for _, tokens in batches) <= 64
        assert sum(mixed) > 500  # the prompt was read beside the text


def test_a_short_prompt_does_not_wait_for_a_long_one(demo: mn.Model) -> None:
    ended: list[str] = []
    with mn.LLM(demo, n_ctx=2048, n_parallel=3, n_ubatch=32, n_batch=512, **EXACT) as llm:

        def ask(name: str, prompt: str) -> None:
            llm.complete(prompt, max_tokens=1)
            ended.append(name)

        with Hold(llm):
            threads = []
            for name, prompt in [("long", "x" + " boy" * 1000), ("other", "y" + " girl" * 900), ("short", STORY)]:
                threads.append(threading.Thread(target=ask, args=(name, prompt)))
                threads[-1].start()
                while len(llm.queue) < len(threads):
                    time.sleep(0.001)
        for thread in threads:
            thread.join()
    assert ended[0] == "short"


def test_texts_that_do_not_fit_into_one_batch_take_turns(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=512, n_parallel=3, n_ubatch=1, n_batch=8, **EXACT) as llm:
        options: dict[str, Any] = {"max_tokens": 60, "logit_bias": no_end(llm)}
        ended: list[int] = []
        n_of_first: list[int] = []
        with Hold(llm):
            streams = [llm.stream([5 + at] * 3, **options) for at in range(3)]

        def read(at: int) -> None:
            for count, _ in enumerate(streams[at], 1):
                if at == 0:
                    n_of_first[:] = [count]
                elif count == 30:
                    ended.append(n_of_first[0])

        threads = [threading.Thread(target=read, args=(at,)) for at in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(ended) < 60


def test_others_go_on_while_a_long_text_is_encoded(eight: mn.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, others_went_on = mn.Tokenizer.encode, threading.Event()
    held = list[bool]()

    def slow(tokenizer: mn.Tokenizer, text: str, *arguments: Any, **options: Any) -> list[int]:
        if "boy boy" in text:
            held.append(others_went_on.wait(60))
            text = STORY
        return encode(tokenizer, text, *arguments, **options)

    monkeypatch.setattr(mn.Tokenizer, "encode", slow)
    bias = no_end(eight)
    short = eight.stream(STORY, max_tokens=200, logit_bias=bias)
    next(short)
    long = eight.stream(STORY + " boy" * 3000, max_tokens=3, logit_bias=bias)
    stopped = eight.stream(STORY + " boy" * 3001, max_tokens=3, logit_bias=bias)
    for _ in range(20):
        next(short)
    stopped.close()
    while len(eight.queue) + eight.queue.n_served > 2:
        next(short)
    others_went_on.set()
    assert len(list(long)) == 3
    short.close()
    assert set(held) == {True}


def test_a_chat_encodes_long_messages_while_others_go_on(demo: mn.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = list[str]()
    encode = mn.ChatTemplate.encode

    def noted(template: mn.ChatTemplate, *arguments: Any, **options: Any) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(template, *arguments, **options)

    monkeypatch.setattr(mn.ChatTemplate, "encode", noted)
    with mn.LLM(demo, template=CHATML, n_ctx=8192, n_parallel=2, **EXACT) as llm:
        for words in (10, 2600):
            message = {"role": "user", "content": " boy" * words}
            llm.chat().send(message, max_tokens=1)
            llm.chat_completion([message], max_tokens=1)
    assert [name == "minerva_native LLM" for name in threads] == [True, True, False, False]


def test_first_come_first_served(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=512, n_parallel=2, **EXACT) as llm:
        started = []
        with Hold(llm):
            streams = []
            for at in range(6):
                streams.append(llm.stream(STORY, max_tokens=3, seed=at))
        for stream in streams:
            started.append([chunk.timings for chunk in stream][-1])
        queued = [timings.queue for timings in started if timings is not None]
        assert queued == sorted(queued)
        assert len(queued) == 6


# Room


def test_what_does_not_fit_beside_others_waits(demo: mn.Model) -> None:
    requests: list[dict[str, Any]] = [{"prompt": [5 + at] * 100, "max_tokens": 40, "seed": at} for at in range(6)]
    expected = alone(demo, requests, n_ctx=256)
    with mn.LLM(demo, n_ctx=256, n_parallel=4, **EXACT) as llm:
        assert [answer.tokens for answer in side_by_side(llm, requests)] == expected
        with pytest.raises(mn.ContextFullError):
            side_by_side(llm, [*requests[:2], {"prompt": [5] * 257, "max_tokens": 4}])
        assert llm.context.cells_used == 0


def test_who_came_last_gives_way_when_the_context_is_full(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=256, n_parallel=4, **EXACT) as llm:
        requests: list[dict[str, Any]] = [
            {"prompt": [5 + at] * 30, "max_tokens": 150, "seed": at, "logit_bias": no_end(llm)} for at in range(4)
        ]
        answers = side_by_side(llm, requests)
        assert [len(answer.tokens) for answer in answers] == [150] * 4
        assert not any(answer.context_full for answer in answers)
        assert [answer.tokens for answer in answers] == alone(demo, requests, n_ctx=256)
        assert llm.context.cells_used == 0


def test_a_request_that_gave_way_can_be_stopped(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=200, n_parallel=2, **EXACT) as llm:
        stop = threading.Event()
        first = llm.stream([5] * 20, max_tokens=150, logit_bias=no_end(llm))
        second = llm.stream([6] * 20, max_tokens=150, logit_bias=no_end(llm), cancel=stop)
        of_first = []
        for chunk in first:
            of_first.append(chunk)
            if len(of_first) == 140:  # by now both cannot fit
                stop.set()
        assert of_first[-1].finish_reason == "length"
        chunks = list(second)
        assert chunks[-1].finish_reason == "cancelled"
        assert 0 < len(chunks) < 150
        assert llm.complete([5] * 20, max_tokens=5).usage.completion_tokens > 0
        assert llm.context.cells_used == 0


def test_several_answers_that_gave_way_come_back(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=256, n_parallel=2, **EXACT) as llm:
        request: dict[str, Any] = {"prompt": [6] * 100, "n": 4, "max_tokens": 30, "seed": 3}
        request["logit_bias"] = no_end(llm)
        expected = [answer.tokens for answer in llm.complete(**request).choices]
        llm.context.clear_cache()
        first = llm.stream([5] * 20, max_tokens=220, logit_bias=no_end(llm))
        next(first)
        assert [answer.tokens for answer in llm.complete(**request).choices] == expected
        assert len(list(first)) == 219
        assert llm.context.cells_used == 0


def test_a_beam_search_that_gave_way_can_be_stopped(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=256, n_parallel=2, **EXACT) as llm:
        stop = threading.Event()
        first = llm.stream([5] * 20, max_tokens=220, logit_bias=no_end(llm))
        next(first)
        answers: list[mn.Completion] = []
        other = threading.Thread(
            target=lambda: answers.append(llm.complete(STORY, beam_width=3, max_tokens=120, cancel=stop))
        )
        other.start()
        for at, _ in enumerate(first):
            if at == 210:  # by now both cannot fit
                stop.set()
        other.join()
        assert answers[0].finish_reason == "cancelled"
        assert answers[0].tokens
        assert llm.context.cells_used == 0


@pytest.mark.parametrize("n_words", [60, 150])  # beside the text there is room for the first, but not to its end
def test_a_chat_leaves_room_to_a_text_that_came_before(demo: mn.Model, n_words: int) -> None:
    class Slow:
        def is_set(self) -> bool:
            time.sleep(0.002)
            return False

    with mn.LLM(demo, n_ctx=256, n_parallel=2, template=CHATML, **EXACT) as llm:
        chat = llm.chat(max_tokens=10, temperature=0)
        first = llm.stream([5] * 20, logit_bias=no_end(llm), cancel=Slow())
        next(first)
        chat.send(" boy" * 60)
        second = chat.stream(" girl" * n_words)
        assert len(list(first)) == 235  # as many as if it were alone
        assert list(second)[-1].finish_reason is not None
        assert len(chat.messages) == 4


def test_the_sequence_of_a_chat_is_not_closed_while_it_is_read(demo: mn.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with mn.LLM(demo, n_ctx=256, n_parallel=3, n_ubatch=8, n_batch=8, template=CHATML, **EXACT) as llm:
        chat = llm.chat(max_tokens=10, temperature=0)
        chat.send(" boy" * 80)
        chat.park()
        llm.context.clear_cache()
        waiting: list[int] = []
        close = mn.Sequence.close

        def recorded(sequence: mn.Sequence) -> None:
            if not sequence.closed and len(sequence) and sequence[0] not in (6, 7):
                waiting.append(sequence.n_waiting)
            close(sequence)

        monkeypatch.setattr(mn.Sequence, "close", recorded)
        with Hold(llm):
            thread = threading.Thread(target=lambda: chat.sequence)
            thread.start()
            while not len(llm.queue):
                time.sleep(0.001)
            other = llm.stream([6] * 100, max_tokens=120, logit_bias=no_end(llm))
            stopped = llm.stream([7] * 20, max_tokens=100, logit_bias=no_end(llm))
        thread.join()
        assert not any(waiting)
        monkeypatch.undo()
        other.close()
        stopped.close()


@pytest.mark.parametrize("n_asked", range(40, 48))
def test_several_answers_that_are_stopped_keep_what_they_have(eight: mn.LLM, n_asked: int) -> None:
    class Later:
        count = 0

        def is_set(self) -> bool:
            self.count += 1
            return self.count > n_asked

    answers = eight.complete(STORY, n=2, max_tokens=100, logit_bias=no_end(eight), cancel=Later()).choices
    assert [answer.finish_reason for answer in answers] == ["cancelled"] * 2
    assert all(answer.tokens for answer in answers)


def test_chats_that_are_idle_make_room(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=256, n_parallel=4, template=CHATML, **EXACT) as llm:
        chats = [llm.chat(temperature=0, max_tokens=8) for _ in range(4)]
        for at, chat in enumerate(chats):
            chat.send("Hello " * (10 + at))
        requests: list[dict[str, Any]] = [{"prompt": [5 + at] * 50, "max_tokens": 10} for at in range(4)]
        assert len(side_by_side(llm, requests)) == 4
        assert (
            chats[0].send("And?").text == llm.chat_completion(chats[0].messages[:-1], temperature=0, max_tokens=8).text
        )


def test_a_prompt_takes_no_cells_that_others_are_about_to_need(demo: mn.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    take = RequestQueue.take
    lengths = [(11, 13), (26, 21), (12, 44), (15, 34)]  # 64 tokens of prompts

    def take_late(queue: RequestQueue, wait: bool) -> Any:
        while wait and len(queue) < len(lengths) and not queue.closed:
            time.sleep(0.001)
        return take(queue, wait)

    monkeypatch.setattr(RequestQueue, "take", take_late)
    with mn.LLM(demo, n_ctx=64, n_parallel=4, **EXACT) as llm:
        options: dict[str, Any] = {"temperature": 0.0, "logit_bias": no_end(llm)}
        requests = [{"prompt": [300 + n] * n, "max_tokens": max_tokens, **options} for n, max_tokens in lengths]
        streams = [llm.stream(**request) for request in requests]
        found = [[chunk.token for chunk in stream] for stream in streams]
    monkeypatch.undo()
    assert found == alone(demo, requests, n_ctx=64)


def test_guesses_take_no_cells_that_others_are_about_to_need(demo: mn.Model) -> None:
    expected, guessed = list[list[int]](), list[int]()

    def guess(tokens: Any, n: int) -> list[int]:
        text = [300] * 8 + expected[0]
        found = text[len(tokens) : len(tokens) + n] if list(tokens) == text[: len(tokens)] else []
        guessed.extend(found)
        return found

    with mn.LLM(demo, n_ctx=64, n_parallel=2, speculate=guess, **EXACT) as llm:
        llm.speculation = lambda: mn.Speculation(guess, float("inf"))  # type: ignore[method-assign]
        options: dict[str, Any] = {"max_tokens": 50, "temperature": 0.0, "logit_bias": no_end(llm)}
        requests = [{"prompt": [300 + at] * 8, **options} for at in range(2)]
        expected += alone(demo, requests, n_ctx=64)
        one = llm.stream(**requests[0])
        tokens = [next(one).token for _ in range(4)]
        other = llm.stream(**requests[1])
        assert [*tokens, *(chunk.token for chunk in one)] == expected[0]
        assert [chunk.token for chunk in other] == expected[1]
    assert len(guessed) > 20


# Guesses


class Known:
    """Guesses how known texts go on, with a wrong token now and then."""

    def __init__(self, texts: list[list[int]], wrong_every: int = 0):
        self._texts, self._wrong_every = texts, wrong_every

    def draft(self, tokens: Any, n: int) -> list[int]:
        at, so_far = len(tokens), list(tokens)
        found = next((text[at : at + n] for text in self._texts if text[:at] == so_far), [])
        if self._wrong_every:
            found = [5 if (at + k) % self._wrong_every == 0 else token for k, token in enumerate(found)]
        return found


def guess(llm: mn.LLM, drafter: Any, every: int = 1) -> None:
    """Have every request, or every other, guess whether it pays or not."""
    count = itertools.count()
    llm.speculation = (  # type: ignore[method-assign]
        lambda: mn.Speculation(drafter, math.inf) if next(count) % every == 0 else None
    )


def record_guesses(llm: mn.LLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Return a list that grows by (guesses, sequences besides, tokens of guesses) with each evaluation of guesses."""
    batches: list[tuple[int, int, int]] = []
    logits_after = llm.context.logits_after

    def recorded(guesses: Any, others: Any, *arguments: Any, **options: Any) -> Any:
        batches.append((len(guesses), len(set(others) - set(guesses)), sum(map(len, guesses.values()))))
        return logits_after(guesses, others, *arguments, **options)

    monkeypatch.setattr(llm.context, "logits_after", recorded)
    return batches


NAMES = ["boy", "girl", "dog", "cat"]


@pytest.mark.parametrize("wrong_every", [0, 5])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_guesses_of_several_requests_share_batches(
    demo: mn.Model, monkeypatch: pytest.MonkeyPatch, wrong_every: int, every: int, temperature: float
) -> None:
    with mn.LLM(demo, n_ctx=2048, n_parallel=4, speculate="lookup", **EXACT) as llm:
        requests: list[dict[str, Any]] = [
            {"prompt": llm.tokenizer.encode(f"{STORY} {name}"), "max_tokens": 60, "logit_bias": no_end(llm), "seed": at}
            for at, name in enumerate(NAMES)
        ]
        requests = [request | {"temperature": temperature} for request in requests]
        expected = alone(demo, requests)
        texts = [request["prompt"] + tokens for request, tokens in zip(requests, expected, strict=True)]
        guess(llm, Known(texts, wrong_every), every)
        batches = record_guesses(llm, monkeypatch)
        before = llm.context.stats.decode_calls
        with Hold(llm):
            threads, answers = [], dict[int, mn.Completion]()
            for at, request in enumerate(requests):
                work = functools.partial(lambda at, request: answers.update({at: llm.complete(**request)}), at, request)
                threads.append(threading.Thread(target=work))
                threads[-1].start()
                while len(llm.queue) < len(threads):
                    time.sleep(0.001)
        for thread in threads:
            thread.join()
        passes = llm.context.stats.decode_calls - before
        assert [answers[at].tokens for at in range(4)] == expected
        assert max(n_guesses for n_guesses, _, _ in batches) == 4 // every
        if every == 2:
            assert any(n_others for _, n_others, _ in batches)
        elif not wrong_every:  # of 60, and the prompts
            assert passes < 20
        else:
            assert passes < 40
        for at, answer in answers.items():
            usage = answer.usage
            if at % every:
                assert usage.drafted == 0
            else:
                assert usage.accepted > (50 if not wrong_every else 20)
                assert usage.accepted == usage.drafted or wrong_every
        drafted = sum(answer.usage.drafted for answer in answers.values())
        assert sum(n for _, _, n in batches) <= drafted  # and those of a request that was left alone
        assert llm.context.cells_used == 0


@pytest.mark.parametrize("n_parallel", [1, 4])
def test_several_answers_guess_together(demo: mn.Model, monkeypatch: pytest.MonkeyPatch, n_parallel: int) -> None:
    with mn.LLM(demo, n_ctx=1024, n_parallel=n_parallel, speculate="lookup", **EXACT) as llm:
        prompt = llm.tokenizer.encode(STORY)
        request: dict[str, Any] = {"prompt": prompt, "max_tokens": 50, "logit_bias": no_end(llm), "seed": 3, "n": 3}
        with mn.LLM(demo, n_ctx=1024, **EXACT) as plain:
            expected = [answer.tokens for answer in plain.complete(**request).choices]
        guess(llm, Known([prompt + tokens for tokens in expected], wrong_every=9))
        batches = record_guesses(llm, monkeypatch)
        before = llm.context.stats.decode_calls
        choices = llm.complete(**request).choices
        assert [answer.tokens for answer in choices] == expected
        assert llm.context.stats.decode_calls - before < 40 < 50
        assert max(n for n, _, _ in batches) > 1
        assert all(answer.usage.drafted > answer.usage.accepted > 20 for answer in choices)
        assert llm.context.cells_used == 0


@pytest.mark.parametrize("architecture", ["mamba", "lfm2", "gemma2"])
@pytest.mark.parametrize("options", [{}, {"kv_unified": False}, {"n_rs_seq": 6}], ids=["one", "own", "snapshots"])
def test_guesses_share_batches_on_every_kind_of_memory(
    load_tiny: Callable[[TinyModel], mn.Model],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    options: dict[str, Any],
) -> None:
    model = load_tiny(TinyModel(architecture, tied=architecture == "gemma2"))
    with mn.LLM(model, n_ctx=1024, n_seq=4, n_parallel=4, speculate="lookup", **EXACT, **options) as llm:
        requests: list[dict[str, Any]] = [
            {"prompt": [5 + at] * (20 + 7 * at), "max_tokens": 40, "seed": at, "logit_bias": no_end(llm)}
            for at in range(4)
        ]
        expected = alone(model, requests, n_ctx=1024)
        texts = [request["prompt"] + tokens for request, tokens in zip(requests, expected, strict=True)]
        guess(llm, Known(texts, wrong_every=7))
        batches = record_guesses(llm, monkeypatch)
        answers = side_by_side(llm, requests)
        assert [answer.tokens for answer in answers] == expected
        assert max(n for n, _, _ in batches) > 1
        assert all(answer.usage.drafted > answer.usage.accepted > 10 for answer in answers)


def test_guesses_are_taken_back_from_requests_that_are_left(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=1024, n_parallel=3, speculate="lookup", template=CHATML, **EXACT) as llm:
        prompt = llm.tokenizer.encode(STORY)
        request: dict[str, Any] = {"prompt": prompt, "max_tokens": 100, "logit_bias": no_end(llm), "temperature": 0.0}
        expected = alone(demo, [request], n_ctx=1024)[0]
        guess(llm, Known([prompt + expected]))
        chat = llm.chat(max_tokens=20, temperature=0)
        other = llm.stream([7] * 9, max_tokens=200, logit_bias=no_end(llm))
        next(other)
        for n in (1, 2, 5, 20):
            with llm.stream(**request) as stream:
                assert [next(stream).token for _ in range(n)] == expected[:n]
            said = chat.send("Hello")
            assert llm.complete(**(request | {"max_tokens": n})).tokens == expected[:n]
            chat.undo()
            assert chat.send("Hello").text == said.text
            chat.undo()
        other.close()
        chat.close()
        assert_nothing_is_held(llm)


def test_wrong_guesses_of_several_requests_come_to_an_end(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=2048, n_parallel=4, speculate=lambda tokens, n: [5] * n, **EXACT) as llm:
        requests: list[dict[str, Any]] = [
            {"prompt": [7 + at] * 9, "max_tokens": 200, "seed": at, "logit_bias": {**no_end(llm), 5: -math.inf}}
            for at in range(4)
        ]
        for answer in side_by_side(llm, requests):
            assert answer.usage.accepted == 0
            assert 0 < answer.usage.drafted < 50


def test_a_guess_that_fails_fails_its_own_request(demo: mn.Model) -> None:
    class Failing:
        def draft(self, tokens: Any, n: int) -> list[int]:
            if tokens[0] == 6:
                raise KeyError("no guess")
            return [5]

    with mn.LLM(demo, n_ctx=512, n_parallel=3, speculate="lookup", **EXACT) as llm:
        guess(llm, Failing())
        options: dict[str, Any] = {"max_tokens": 20, "logit_bias": no_end(llm), "temperature": 0.0}
        with Hold(llm):
            streams = [llm.stream([5 + at] * 9, **options) for at in range(3)]
        with pytest.raises(KeyError):
            list(streams[1])
        expected = alone(demo, [{"prompt": [5 + at] * 9, **options} for at in (0, 2)], n_ctx=512)
        assert [[chunk.token for chunk in stream] for stream in streams[::2]] == expected


def test_guesses_in_shared_batches_are_drawn_as_often_as_the_model_says(
    demo: mn.Model, demo_draft: mn.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_draws, params = 600, mn.SamplingParams(temperature=1.5, top_k=4, top_p=1.0, min_p=0.0)
    drawn = collections.Counter[tuple[int, ...]]()
    n_accepted = 0
    with (
        mn.DraftModel(demo_draft, n_seq=8, **EXACT) as drafter,
        mn.LLM(demo, n_ctx=2048, n_parallel=8, speculate=drafter, **EXACT) as llm,
    ):
        guess(llm, drafter)
        batches = record_guesses(llm, monkeypatch)
        for start in range(0, n_draws, 40):
            options: list[dict[str, Any]] = [{"sampling": params.replace(seed=start + at)} for at in range(40)]
            for answer in side_by_side(llm, [{"prompt": STORY, "max_tokens": 3, **one} for one in options]):
                drawn[tuple(answer.tokens)] += 1
                n_accepted += answer.usage.accepted
        assert sum(n_guesses > 1 for n_guesses, _, _ in batches) > 30
        sampler, expected = mn.Sampler(params), dict[tuple[int, ...], float]()

        def visit(sequence: mn.Sequence, tokens: tuple[int, ...], chance: float) -> None:
            if len(tokens) == 3 or (tokens and llm.tokenizer.is_end(tokens[-1])):
                expected[tokens] = n_draws * chance
                return
            for token, share in zip(*sampler.distribution(sequence.logits, sequence.tokens), strict=True):
                with sequence.fork() as longer:
                    longer.append(int(token))
                    visit(longer, (*tokens, int(token)), chance * float(share))

        with llm.context.sequence() as sequence:
            sequence.extend(llm.tokenizer.encode(STORY))
            visit(sequence, (), 1.0)
    assert n_accepted > n_draws / 4
    assert set(drawn) <= set(expected)
    often = {tokens: n for tokens, n in expected.items() if n >= 5}
    rare = n_draws - sum(often.values())
    chi2 = sum((drawn[tokens] - n) ** 2 / n for tokens, n in often.items())
    chi2 += (n_draws - sum(drawn[tokens] for tokens in often) - rare) ** 2 / rare
    assert len(often) > 10
    assert chi2 < len(often) + 3.1 * math.sqrt(2 * len(often)) + 4  # above it in one of a thousand


def test_a_draft_model_keeps_the_texts_of_several_requests(demo: mn.Model, demo_draft: mn.Model) -> None:
    with (
        mn.DraftModel(demo_draft, n_seq=4, **EXACT) as drafter,
        mn.LLM(demo, n_ctx=1024, n_parallel=4, speculate=drafter, **EXACT) as llm,
    ):
        guess(llm, drafter)
        requests: list[dict[str, Any]] = [
            {"prompt": f"{STORY} {name}" + " and" * 40, "max_tokens": 30, "temperature": 0.0, "logit_bias": no_end(llm)}
            for name in NAMES
        ]
        answers = side_by_side(llm, requests)
        assert [answer.tokens for answer in answers] == alone(demo, requests)
        assert all(answer.usage.accepted > 0 for answer in answers)
        stats = drafter.context.stats  # each prompt once, and each text with its guesses
        drafted = sum(answer.usage.drafted for answer in answers)
        assert stats.tokens_evaluated < 4 * (60 + 30) + 2 * drafted


# Chats


def test_turns_of_one_chat_come_one_after_another(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=1024, n_parallel=4, template=CHATML, **EXACT) as llm:
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 6}

        async def main() -> None:
            one, other = llm.chat(**options), llm.chat(**options)
            await asyncio.gather(*(chat.asend(f"Say {n}") for n in range(3) for chat in (one, other)))
            assert one.messages == other.messages
            assert [message["content"] for message in one.messages[::2]] == ["Say 0", "Say 1", "Say 2"]
            serial = llm.chat(**options)
            for n in range(3):
                await serial.asend(f"Say {n}")
            assert serial.messages == one.messages

        asyncio.run(main())


# The end


def test_closing_ends_all(demo: mn.Model) -> None:
    llm = mn.LLM(demo, n_ctx=1024, n_parallel=2, **EXACT)
    streams = [llm.stream(STORY, max_tokens=200, logit_bias=no_end(llm)) for _ in range(4)]
    next(streams[0])
    llm.close()
    for stream in streams:
        with pytest.raises((mn.ClosedError, mn.Cancelled)) as caught:
            if list(stream)[-1].finish_reason == "cancelled":
                raise mn.Cancelled("as it should")
        assert caught.value


def test_an_error_ends_one_request_only(eight: mn.LLM) -> None:
    class Failing:
        def is_set(self) -> bool:
            raise OSError("a token that fails")

    with Hold(eight):
        good = eight.stream(STORY, max_tokens=10, temperature=0)
        bad = eight.stream(STORY, max_tokens=10, cancel=Failing())
    with pytest.raises(OSError, match="a token that fails"):
        list(bad)
    assert list(good)[-1].finish_reason in ("length", "end")


def test_what_others_close_ends_its_request_only(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=300, n_parallel=3, template=CHATML, **EXACT) as llm:
        options: dict[str, Any] = {"max_tokens": 120, "logit_bias": no_end(llm)}
        chats = [llm.chat(**options) for _ in range(3)]
        with Hold(llm):
            streams = [chat.stream("Hello") for chat in chats]
        next(streams[2])
        chats[2].close()
        with pytest.raises(mn.ClosedError):
            list(streams[2])
        assert [len(list(stream)) for stream in streams[:2]] == [120, 120]
        assert llm.complete(STORY, max_tokens=3).tokens


def test_a_fault_of_the_scheduler_leaves_nobody_waiting(eight: mn.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_in_order", None)
    streams = [eight.stream(STORY, max_tokens=900, logit_bias=no_end(eight)) for _ in range(2)]
    for stream in streams:
        with pytest.raises(TypeError):
            list(stream)
    monkeypatch.undo()
    assert eight.complete(STORY, max_tokens=3).tokens
    assert_nothing_is_held(eight)


def test_a_chat_that_gave_way_can_be_closed(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=200, n_parallel=2, template=CHATML, **EXACT) as llm:
        bias = no_end(llm)
        chat = llm.chat(max_tokens=150, logit_bias=bias)
        first = llm.stream([5] * 20, max_tokens=150, logit_bias=bias)
        second = chat.stream("Hello")
        for at, _ in enumerate(first):
            if at == 140:  # by now both cannot fit
                chat.close()
        with pytest.raises(mn.ClosedError, match="closed"):
            list(second)
        assert llm.complete(STORY, max_tokens=3).tokens
        assert llm.context.cells_used == 0


def test_a_token_that_fails_at_the_end(eight: mn.LLM) -> None:
    class Failing:
        has_said = False

        def is_set(self) -> bool:
            if self.has_said:
                raise OSError("a token that fails")
            self.has_said = True
            return True

    with pytest.raises((mn.Cancelled, OSError)):
        eight.queue.call(lambda request: iter([1]), cancel=Failing())
    assert eight.complete(STORY, max_tokens=3).tokens


def test_an_error_between_the_steps_does_not_end_the_queue(eight: mn.LLM) -> None:
    class Broken:
        @property
        def sequence(self) -> Any:
            raise KeyError("a writer without a sequence")

        needs_logits = True

    def work(request: Any) -> Iterator[Any]:
        request.writers = [Broken()]
        yield Signal.EVALUATE

    with contextlib.suppress(KeyError), Hold(eight):  # which is served beside them
        streams = [eight.queue.stream(work) for _ in range(2)]
    for stream in streams:
        with pytest.raises(KeyError):
            list(stream)
    assert eight.complete(STORY, max_tokens=3).tokens


def test_context_cancel_stops_what_computes(eight: mn.LLM) -> None:
    with Hold(eight):
        streams = [eight.stream("x" + " boy" * 400, max_tokens=10 + at) for at in range(2)]
    deadline = time.monotonic() + 60
    while not eight.context.stats.decode_calls and time.monotonic() < deadline:
        time.sleep(0.0005)
    eight.context.cancel()
    for stream in streams:
        with contextlib.suppress(mn.Cancelled):  # unless it was between two batches
            assert list(stream)
    assert eight.complete(STORY, max_tokens=3).tokens


# Deterministic


def test_deterministic_is_equal_to_the_last_bit(demo: mn.Model) -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": STORY + " boy" * (40 * at), "max_tokens": 20, "seed": at, "logprobs": True} for at in range(5)
    ]
    options: dict[str, Any] = {"n_ctx": 2560, "deterministic": True, "n_threads": 2, "n_ubatch": 64}

    def exact(answer: mn.Completion) -> list[tuple[int, float | None]]:
        return [(entry.token, entry.logprob) for entry in answer.logprobs or []]

    with mn.LLM(demo, n_parallel=4, **options) as llm:
        first = [exact(answer) for answer in side_by_side(llm, requests)]
        again = [exact(answer) for answer in side_by_side(llm, requests[::-1])]
        single = [exact(llm.complete(**request)) for request in requests]
    assert first == again[::-1] == single
    with mn.LLM(demo, n_parallel=1, n_seq=5, **options) as llm:
        assert [exact(llm.complete(**request)) for request in requests] == first


@pytest.mark.parametrize("speculate", ["lookup", "function"])
def test_deterministic_is_equal_to_the_last_bit_with_guesses(demo: mn.Model, speculate: str) -> None:
    options: dict[str, Any] = {"n_ctx": 2560, "deterministic": True, "n_threads": 2, "n_ubatch": 64}
    with mn.LLM(demo, n_parallel=4, **options) as llm:
        requests: list[dict[str, Any]] = [
            {"prompt": llm.tokenizer.encode(f"{STORY} {name} and"), "max_tokens": 40, "logprobs": True}
            | {"temperature": 0.0, "logit_bias": no_end(llm)}
            for name in NAMES
        ]
        for request in requests:  # what comes has been there
            request["prompt"] += llm.complete(**request).tokens + request["prompt"]
        texts = [request["prompt"] + llm.complete(**request).tokens for request in requests]
    drafter: Any = "lookup" if speculate == "lookup" else Known(texts, wrong_every=6)

    def exact(answer: mn.Completion) -> list[tuple[int, float | None]]:
        return [(entry.token, entry.logprob) for entry in answer.logprobs or []]

    with mn.LLM(demo, n_parallel=4, speculate=drafter, **options) as llm:
        together = side_by_side(llm, requests)
        again = side_by_side(llm, requests[::-1])[::-1]
        single = [llm.complete(**request) for request in requests]
    assert [exact(answer) for answer in together] == [exact(answer) for answer in again]
    assert [exact(answer) for answer in together] == [exact(answer) for answer in single]
    assert [answer.usage.drafted for answer in together] == [answer.usage.drafted for answer in single]
    assert sum(answer.usage.drafted for answer in together) > 10


def test_a_draft_model_is_not_deterministic(demo: mn.Model, demo_draft: mn.Model) -> None:
    with pytest.raises(ValueError, match="a draft model has no place beside deterministic=True"):
        mn.LLM(demo, n_ctx=512, deterministic=True, speculate=demo_draft)


# Several answers


def test_best_of_returns_the_most_likely(eight: mn.LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "seed": 3}
    every = eight.complete(STORY, n=6, logprobs=True, **options).choices
    mean = {tuple(one.tokens): np.mean([entry.logprob for entry in one.logprobs or []]) for one in every}
    best = eight.complete(STORY, n=2, best_of=6, **options).choices
    assert [tuple(one.tokens) for one in best] == sorted(mean, key=lambda tokens: -mean[tokens])[:2]
    assert best[0].logprobs is None
    with pytest.raises(ValueError, match="best_of"):
        eight.complete(STORY, n=3, best_of=2)


def test_more_answers_than_places(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=512, n_seq=3, **EXACT) as llm:
        answers = llm.complete(STORY, n=7, seed=1, max_tokens=5).choices
        assert [one.tokens for one in answers] == [
            llm.complete(STORY, seed=1 + at, max_tokens=5).tokens for at in range(7)
        ]


@pytest.mark.parametrize("n_ctx", [64, 65, 66])
def test_several_answers_end_where_the_context_does(demo: mn.Model, n_ctx: int) -> None:
    with mn.LLM(demo, n_ctx=n_ctx, **EXACT) as llm:
        answers = llm.complete([5] * 20, n=3, logit_bias=no_end(llm)).choices
        assert all(answer.finish_reason == "length" and answer.context_full for answer in answers)
        assert sum(len(answer.tokens) for answer in answers) >= n_ctx - 20 - 6
        beams = llm.complete([5] * 20, n=4, beam_width=4).choices
        assert len(beams) == 4
        assert all(beam.tokens and beam.finish_reason in ("end", "length") for beam in beams)
        assert all(beam.context_full == (beam.finish_reason == "length") for beam in beams)
        assert llm.context.cells_used == 0


def searched(model: mn.Model, prompt: str, width: int, n: int) -> list[list[int]]:
    """Beam search as in the books, with a fresh evaluation of every text."""
    tokenizer = model.tokenizer
    with model.context(n_ctx=256, **EXACT) as context:

        def logprobs(tokens: list[int]) -> Any:
            with context.sequence() as sequence:
                sequence.extend(tokens)
                logits = sequence.logits.astype(np.float64)
                return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())

        start = tokenizer.encode(prompt)
        beams: list[tuple[float, list[int]]] = [(0.0, [])]
        done: list[tuple[float, list[int]]] = []
        for _ in range(n):
            found = []
            for total, tokens in beams:
                row = logprobs(start + tokens)
                found += [(total + row[token], [*tokens, token]) for token in range(len(row))]
            found.sort(key=lambda one: -one[0])
            done += [one for one in found[:width] if tokenizer.is_end(one[1][-1])]
            beams = [one for one in found[: 2 * width] if not tokenizer.is_end(one[1][-1])][:width]
            best = sorted((total / len(tokens) for total, tokens in done), reverse=True)[:width]
            if len(best) == width and best[-1] >= max(total / len(tokens) for total, tokens in beams):
                break
        return [tokens for _, tokens in sorted(done + beams, key=lambda one: -one[0] / len(one[1]))[:width]]


@pytest.mark.parametrize(("width", "n"), [(1, 10), (2, 12), (4, 16)])
def test_beam_search_finds_what_the_books_say(eight: mn.LLM, demo: mn.Model, width: int, n: int) -> None:
    answer = eight.complete("The end. He was", beam_width=width, n=width, max_tokens=n)
    assert [one.tokens for one in answer.choices] == searched(demo, "The end. He was", width, n)
    assert eight.context.cells_used == 0
    with pytest.raises(ValueError, match="stop has no place beside beam_width"):
        eight.complete(STORY, beam_width=2, stop="x")


# map


@pytest.mark.parametrize("n_parallel", [1, 4])
def test_map_keeps_the_order_and_the_errors(demo: mn.Model, n_parallel: int) -> None:
    done: list[tuple[int, int]] = []
    with mn.LLM(demo, n_ctx=512, n_parallel=n_parallel, **EXACT) as llm:
        prompts: list[Any] = [STORY + " boy" * at for at in range(9)]
        expected = [llm.complete(prompt, max_tokens=6, temperature=0).tokens for prompt in prompts]
        answers = llm.map(prompts, on_progress=lambda *counts: done.append(counts), max_tokens=6, temperature=0)
        assert [answer.tokens for answer in answers] == expected
        assert done == [(at + 1, 9) for at in range(9)]
        prompts[4] = [5] * 600
        both = llm.map(prompts, return_exceptions=True, max_tokens=6, temperature=0)
        assert isinstance(both[4], mn.ContextFullError)
        assert [answer.tokens for answer in both if isinstance(answer, mn.Completion)] == expected[:4] + expected[5:]
        with pytest.raises(mn.ContextFullError):
            llm.map(prompts, max_tokens=6)
        assert llm.map([]) == []
        assert len(llm.queue) == 0


# Everything at once


@pytest.mark.parametrize("seed", range(int(os.environ.get("MINERVA_WALKS", "3"))))
@pytest.mark.parametrize("speculate", [None, "lookup", "eager", "known"])
def test_a_walk_of_requests_that_come_and_go(demo: mn.Model, seed: int, speculate: str | None) -> None:
    choice = random.Random(seed)
    prompts = [STORY + " and" * choice.randrange(60) + word for word in (" boy", " girl", " dog") for _ in range(3)]
    options: dict[str, Any] = {"template": CHATML, "n_ctx": 512}
    expected: dict[tuple[str, int, int], list[int]] = {}
    with mn.LLM(demo, **options, **EXACT) as llm:
        for prompt, length, number in itertools.product(prompts, (5, 60), (0, 1)):
            expected[prompt, length, number] = llm.complete(prompt, max_tokens=length, seed=number).tokens
        chat = llm.chat(max_tokens=10, temperature=0)
        said = [chat.send(f"Say {n}").text for n in range(3)]
    with mn.LLM(demo, n_parallel=4, speculate=speculate and "lookup", **options, **EXACT) as llm:
        if speculate == "eager":
            guess(llm, "lookup")
        elif speculate == "known":
            texts = [llm.tokenizer.encode(key[0]) + tokens for key, tokens in expected.items()]
            guess(llm, Known(texts, wrong_every=11))

        async def one(number: int) -> None:
            own = random.Random(1000 * seed + number)
            for _ in range(6):
                key = own.choice(list(expected))
                request: dict[str, Any] = {"prompt": key[0], "max_tokens": key[1], "seed": key[2]}
                way = own.choice(["whole", "whole", "left", "late", "chat", "several"])
                if way == "whole":
                    assert (await llm.acomplete(**request)).tokens == expected[key]
                elif way == "left":
                    async with llm.astream(**request) as chunks:
                        for at in range(own.randrange(4)):
                            if at < len(expected[key]):
                                assert (await anext(chunks)).token == expected[key][at]
                elif way == "late":
                    cut: list[int] = []
                    with contextlib.suppress(mn.Cancelled):
                        cut = (await llm.acomplete(**request, timeout=own.random() / 50)).tokens
                    assert cut == expected[key][: len(cut)]
                elif way == "several":
                    several = await llm.acomplete(**(request | {"n": 2, "seed": 0}))
                    assert [other.tokens for other in several.choices] == [
                        expected[key[0], key[1], number] for number in (0, 1)
                    ]
                else:
                    chat = llm.chat(max_tokens=10, temperature=0)
                    for n, text in enumerate(said):
                        if own.random() < 0.2:
                            chat = chat.fork()
                        if own.random() < 0.3:
                            await chat.asend(f"Say {n}")
                            chat.undo()
                        assert (await chat.asend(f"Say {n}")).text == text
                    chat.close()

        async def main() -> None:
            await asyncio.gather(*(one(number) for number in range(12)))

        asyncio.run(main())
        assert len(llm.queue) == 0
        assert_nothing_is_held(llm)
