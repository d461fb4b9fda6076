"""Observers: each sees every request once as it comes and once as it ends, and nothing that it does ends the queue."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

import minerva_native as mn
from minerva_native.completion import Usage

STORY = "Once upon a time, there was a little"
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


class Watching:
    """Keeps the records of requests, those that have ended apart."""

    def __init__(self) -> None:
        self.begun: list[mn.RequestRecord] = []
        self.ended: list[mn.RequestRecord] = []

    def request(self, record: mn.RequestRecord) -> Callable[[], object]:
        assert record.ended is None
        self.begun.append(record)
        return lambda: self.ended.append(record)

    def tool_call(self, tool: mn.Tool, call: mn.ToolCall) -> AbstractContextManager[object]:
        return nullcontext()

    def wait(self, n: int = 1) -> list[mn.RequestRecord]:
        """Return the records of `n` requests, once they have ended."""
        for _ in range(6000):
            if len(self.ended) >= n:
                break
            threading.Event().wait(0.01)
        assert len(self.begun) == len(self.ended) == n
        return self.ended


@pytest.fixture
def llm(demo: mn.Model) -> Iterator[mn.LLM]:
    with mn.LLM(demo, n_ctx=512, n_threads=1, template=TEMPLATE) as llm:
        yield llm


@pytest.fixture
def watching(llm: mn.LLM) -> Watching:
    watching = Watching()
    llm.observers.append(watching)
    return watching


def close_early(stream: Any) -> None:
    next(stream)
    stream.close()


async def close_early_async(llm: mn.LLM) -> None:
    stream = llm.astream(STORY)
    await anext(stream)
    await stream.aclose()


def failing(action: Callable[[], object]) -> None:
    with contextlib.suppress(mn.MinervaError):
        action()


class Fails:
    def is_set(self) -> bool:
        raise ZeroDivisionError


def with_a_token_that_fails(llm: mn.LLM) -> None:
    with pytest.raises(ZeroDivisionError):
        llm.complete(STORY, cancel=Fails())


def use_a_chat(llm: mn.LLM) -> None:
    with llm.chat(max_tokens=3) as chat:
        chat.send("Hello")
        assert chat.sequence
        chat.park()
        assert chat.sequence


WAYS: dict[str, tuple[Callable[[mn.LLM], object], list[tuple[str, str]]]] = {
    "complete": (lambda llm: llm.complete(STORY, max_tokens=3), [("text_completion", "length")]),
    "a stop string": (lambda llm: llm.complete(STORY, stop=[" "], seed=1), [("text_completion", "stop")]),
    "acomplete": (lambda llm: asyncio.run(llm.acomplete(STORY, max_tokens=3)), [("text_completion", "length")]),
    "stream": (lambda llm: list(llm.stream(STORY, max_tokens=3)), [("text_completion", "length")]),
    "a stream closed early": (lambda llm: close_early(llm.stream(STORY)), [("text_completion", "cancelled")]),
    "an async one": (lambda llm: asyncio.run(close_early_async(llm)), [("text_completion", "cancelled")]),
    "beams": (lambda llm: llm.complete(STORY, beam_width=2, max_tokens=3), [("text_completion", "length")]),
    "map": (lambda llm: llm.map([STORY] * 3, max_tokens=2), [("text_completion", "length")] * 3),
    "chat_completion": (
        lambda llm: llm.chat_completion([{"role": "user", "content": "Hello"}], max_tokens=3),
        [("chat", "length")],
    ),
    "a chat": (use_a_chat, [("chat", "length"), ("prefill", "end")]),
    "score": (lambda llm: llm.score(STORY), [("score", "end")]),
    "choose": (lambda llm: llm.choose(STORY, [" cat", " dog"]), [("choose", "end")]),
    "too long": (lambda llm: failing(lambda: llm.complete([5] * 600)), [("text_completion", "error")]),
    "no time": (lambda llm: failing(lambda: llm.complete(STORY, timeout=0)), [("text_completion", "cancelled")]),
    "a token that fails": (with_a_token_that_fails, [("text_completion", "error")]),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_request_is_seen_to_come_and_to_end_once(llm: mn.LLM, watching: Watching, way: str) -> None:
    action, expected = WAYS[way]
    action(llm)
    records = watching.wait(len(expected))
    assert sorted((record.operation, record.outcome) for record in records) == sorted(expected)
    for record in records:
        assert record.model == "minerva-demo.gguf"
        times = (record.submitted, record.started, record.prefilled, record.first_token, record.ended)
        known = [time for time in times if time is not None]
        assert known == sorted(known)
        assert (record.error is None) == (record.outcome not in ("error", "cancelled") or bool(record.answers))


class Holding:
    """A cancel token that holds its request up, on the thread that serves it, between `begin` and `end`."""

    def __init__(self) -> None:
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self.begin, self.end = self._may_go_on.clear, self._may_go_on.set

    def is_set(self) -> bool:
        if threading.current_thread() is not threading.main_thread():
            assert self._may_go_on.wait(60)
        return False


def test_requests_that_leave_the_queue_are_seen_to_end(llm: mn.LLM, watching: Watching) -> None:
    holding = Holding()
    running = llm.stream(STORY, logit_bias={llm.tokenizer.eos or 0: -100.0}, cancel=holding)
    next(running)
    holding.begin()
    stop = threading.Event()
    closed = llm.stream("closed while it waits")
    with llm.stream("its time is up", timeout=0.02) as late, pytest.raises(mn.Cancelled, match="timeout"):
        next(late)
    stopped = llm.stream("stopped by its token", cancel=stop)
    stop.set()
    with pytest.raises(mn.Cancelled):
        next(stopped)
    closed.close()

    async def leave() -> None:
        waiting = llm.astream("closed on an event loop")
        await waiting.aclose()
        with pytest.raises(mn.Cancelled):
            await llm.acomplete("late on an event loop", timeout=0.02)

    asyncio.run(leave())
    assert len(llm.queue) == 0
    left = watching.ended[:]
    assert [record.prompt for record in left] == [
        "its time is up",
        "stopped by its token",
        "closed while it waits",
        "closed on an event loop",
        "late on an event loop",
    ]
    assert {(record.outcome, record.started, record.usage) for record in left} == {("cancelled", None, Usage())}
    running.close()
    holding.end()
    assert watching.wait(6)[-1].answers[0].finish_reason == "cancelled"


def test_closing_ends_all(demo: mn.Model) -> None:
    watching = Watching()
    llm = mn.LLM(demo, n_ctx=512, n_threads=1)
    llm.observers.append(watching)
    running, waiting = llm.stream(STORY), llm.stream("waits")
    next(running)
    llm.close()
    records = {record.prompt: record for record in watching.wait(2)}
    assert isinstance(records["waits"].error, mn.ClosedError)
    assert records[STORY].outcome == "cancelled"
    with pytest.raises(mn.ClosedError):
        llm.complete("too late")
    assert isinstance(watching.wait(3)[-1].error, mn.ClosedError)
    del waiting


def test_usage_is_that_of_all_answers_and_what_the_context_has_done(llm: mn.LLM, watching: Watching) -> None:
    before = llm.context.stats.tokens_evaluated
    answer = llm.complete(STORY, n=2, best_of=3, max_tokens=4)
    record = watching.wait()[0]
    assert len(answer.choices) == 2
    assert len(record.answers) == 3
    assert record.usage == Usage(prompt_tokens=len(llm.tokenizer.encode(STORY)), completion_tokens=12)
    # The last token of each answer is not evaluated.
    evaluated = record.usage.prompt_tokens - record.usage.cached_tokens + record.usage.completion_tokens - 3
    assert llm.context.stats.tokens_evaluated - before == evaluated
    llm.complete(STORY + " girl", max_tokens=1)
    assert watching.wait(2)[1].usage.cached_tokens > 0


class FailsLater:
    """A cancel token that fails once some tokens are written."""

    def __init__(self) -> None:
        self._n_left = 10

    def is_set(self) -> bool:
        if threading.current_thread() is not threading.main_thread():
            self._n_left -= 1
        if not self._n_left:
            raise ZeroDivisionError
        return False


def test_what_was_written_before_an_error_counts(llm: mn.LLM, watching: Watching) -> None:
    with pytest.raises(ZeroDivisionError):
        llm.complete(STORY, cancel=FailsLater())
    record = watching.wait()[0]
    assert isinstance(record.error, ZeroDivisionError)
    assert record.usage.completion_tokens == len(record.answers[0].tokens) > 0


def test_a_chat_shows_all_its_messages_once_they_are_read(llm: mn.LLM, watching: Watching) -> None:
    chat = llm.chat(system="Be kind.", max_tokens=2)
    chat.send("Hello")
    chat.send("Again")
    assert [message["role"] for message in watching.wait(2)[1].prompt] == ["system", "user", "assistant", "user"]


def test_whoever_comes_or_goes_amid_a_request_sees_none_or_all_of_it(llm: mn.LLM, watching: Watching) -> None:
    stream = llm.stream(STORY, max_tokens=5)
    late = Watching()
    llm.observers.append(late)
    llm.observers.remove(watching)
    list(stream)
    assert watching.wait()[0].outcome == "length"
    assert not late.begun
    assert not late.ended


def test_a_record_shows_nobodys_text_in_a_log(llm: mn.LLM, watching: Watching) -> None:
    answer = llm.complete(STORY, max_tokens=5, stop=["xyzzy"])
    shown = repr(watching.wait()[0])
    assert "Once" not in shown
    assert "xyzzy" not in shown
    assert answer.text not in shown


class Failing:
    """Fails wherever it can, in one of two ways."""

    def __init__(self, error: type[BaseException], at_once: bool):
        self._error, self._at_once = error, at_once

    def request(self, record: mn.RequestRecord) -> Callable[[], object]:
        if self._at_once:
            raise self._error("an observer's own")
        return self._end

    def _end(self) -> None:
        raise self._error("an observer's own")

    def tool_call(self, tool: mn.Tool, call: mn.ToolCall) -> AbstractContextManager[object]:
        raise self._error("an observer's own")


@pytest.mark.parametrize("at_once", [True, False])
def test_an_observer_that_fails_changes_nothing_and_is_logged(
    llm: mn.LLM, caplog: pytest.LogCaptureFixture, at_once: bool
) -> None:
    expected = llm.complete(STORY, max_tokens=5, seed=1).tokens
    watching = Watching()
    llm.observers.extend([Failing(ValueError, at_once), watching])
    with caplog.at_level(logging.ERROR, "minerva_native"):
        assert llm.complete(STORY, max_tokens=5, seed=1).tokens == expected
    assert "an observer of requests has failed" in caplog.text
    assert "an observer's own" in caplog.text
    assert watching.wait()[0].outcome == "length"


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_no_observer_ends_the_queue_or_keeps_a_caller_waiting(demo: mn.Model, error: type[BaseException]) -> None:
    with mn.LLM(demo, n_ctx=512, n_threads=1, n_parallel=2) as llm:
        llm.observers.append(Failing(error, at_once=False))
        for _ in range(2):
            assert len(llm.complete(STORY, max_tokens=3).tokens) == 3
            with pytest.raises(mn.ContextFullError):
                llm.complete([5] * 600)
        with llm.stream(STORY, logit_bias={llm.tokenizer.eos or 0: -100.0}) as running:
            next(running)
            with pytest.raises(mn.EmptySequenceError):  # its first step, as it joins the other
                llm.complete([])
            assert len(llm.complete(STORY, max_tokens=3).tokens) == 3


def test_the_load_is_read_without_waiting(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=512, n_seq=4, n_threads=1) as llm:
        assert llm.load == (0, 0, 0, 4, 0, 512)
        bias = {llm.tokenizer.eos or 0: -100.0}
        running, waiting = llm.stream(STORY, logit_bias=bias), llm.stream("waits", max_tokens=1)
        next(running)
        loads: list[mn.Load] = []
        with llm.context.raw():  # as a long prompt would, it keeps others out
            thread = threading.Thread(target=lambda: loads.append(llm.load))
            thread.start()
            thread.join(60)
        assert loads[0]._replace(cells_used=0) == (1, 1, 1, 4, 0, 512)
        assert loads[0].cells_used >= len(llm.tokenizer.encode(STORY))
        running.close()
        list(waiting)
        with llm.chat(template=TEMPLATE, max_tokens=1) as chat:
            chat.send("Hello")
            assert llm.load.sequences == 1
    assert llm.load == (0, 0, 0, 4, 0, 512)
