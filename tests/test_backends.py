"""Backends: one request, an LLM or a server, and whatever servers of OpenAI's API make of it.

Each behaviour is seen by `for` and by `async for`, which are one piece of code. `stub_server` says what vLLM, Ollama,
LM Studio and llama-server say.
"""

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minerva_native as mn
from minerva_native import wire
from stub_server import (
    STORY,
    USAGE,
    Connection,
    StubServer,
    cut,
    events,
    hang_up,
    piece,
    raw,
    status,
    stub_server,
)

HELLO = [{"role": "user", "content": "Hello"}]

Read = Callable[..., tuple[list[mn.Chunk], Exception | None]]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubServer]:
    monkeypatch.setattr("minerva_native.backends._FIRST_PAUSE", 0.01)
    monkeypatch.setattr("minerva_native.backends._USAGE_SECONDS", 0.2)
    with stub_server() as server:
        yield server


def backend(stub: StubServer, **options: Any) -> mn.OpenAIBackend:
    return mn.OpenAIBackend(stub.url, **{"model": "stub", "timeout": 10, **options})


def ask(**options: Any) -> mn.BackendRequest:
    return mn.BackendRequest(HELLO, **options)


def nothing() -> None:
    """What is done after a chunk, if nothing else is."""


def with_for(stream: mn.ChunkStream, then: Callable[[], None] = nothing) -> tuple[list[mn.Chunk], Exception | None]:
    chunks: list[mn.Chunk] = []
    try:
        for chunk in stream:
            chunks.append(chunk)
            then()
    except Exception as error:
        return chunks, error
    return chunks, None


def with_async_for(
    stream: mn.ChunkStream, then: Callable[[], None] = nothing
) -> tuple[list[mn.Chunk], Exception | None]:
    async def run() -> tuple[list[mn.Chunk], Exception | None]:
        chunks: list[mn.Chunk] = []
        try:
            async for chunk in stream:
                chunks.append(chunk)
                then()
        except Exception as error:
            return chunks, error
        return chunks, None

    return asyncio.run(run())


@pytest.fixture(params=[with_for, with_async_for], ids=["for", "async for"])
def read(request: pytest.FixtureRequest) -> Read:
    function: Read = request.param
    return function


def text_of(chunks: list[mn.Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def failed(read: Read, stream: mn.ChunkStream) -> tuple[str, mn.BackendError]:
    """Return the text before an error, and the error."""
    chunks, error = read(stream)
    assert isinstance(error, mn.BackendError), error
    return text_of(chunks), error


# An answer


def test_an_answer_is_its_pieces_and_an_end(stub: StubServer, read: Read) -> None:
    stub.answers = [events(*STORY)]
    chunks, error = read(backend(stub).stream(ask()))
    assert error is None
    assert [chunk.text for chunk in chunks] == ["Once", " upon", ""]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "end"]
    assert chunks[-1].usage == mn.Usage(prompt_tokens=7, cached_tokens=4, completion_tokens=3)
    timings = chunks[-1].timings
    assert timings is not None
    assert 0 < timings.first_token <= timings.total


def test_a_stream_gives_the_whole_completion(stub: StubServer) -> None:
    stub.answers = [events(*STORY)]
    done = backend(stub).stream(ask()).complete()
    assert (done.text, done.finish_reason, done.model, done.is_chat) == ("Once upon", "end", "stub", True)
    assert done.usage.prompt_tokens == 7
    again = asyncio.run(backend(stub).stream(ask()).acomplete())
    assert dataclasses.replace(again, timings=done.timings, created=done.created) == done


@pytest.mark.parametrize(
    ("reason", "more", "ours"),
    [
        ("stop", {}, "end"),
        ("stop", {"stop_reason": "x"}, "stop"),  # vLLM
        ("stop", {"stop_reason": None}, "end"),
        ("length", {}, "length"),
        ("tool_calls", {}, "end"),
        ("function_call", {}, "end"),
        ("content_filter", {}, "cancelled"),
        ("abort", {}, "cancelled"),
        ([1], {}, "cancelled"),
    ],
)
def test_the_reason_of_an_end_is_one_of_ours(stub: StubServer, reason: Any, more: dict[str, Any], ours: str) -> None:
    last = piece("", reason)
    last["choices"][0] |= more
    stub.answers = [events(piece("a"), last, "[DONE]")]
    assert backend(stub).stream(ask()).complete().finish_reason == ours


def test_an_answer_that_ended_before_max_tokens_met_a_full_context(stub: StubServer) -> None:
    stub.answers = [events(piece("a"), piece("", "length"), USAGE, "[DONE]")]
    assert backend(stub).stream(ask(max_tokens=10)).complete().context_full
    assert not backend(stub).stream(ask(max_tokens=3)).complete().context_full


def test_a_server_without_usage_gives_none(stub: StubServer, read: Read) -> None:
    stub.answers = [events(piece("a"), piece("", "stop"), "[DONE]")]
    chunks, error = read(backend(stub).stream(ask()))
    assert error is None
    assert chunks[-1].usage is None


def test_usage_may_come_with_every_piece(stub: StubServer) -> None:
    first, last = (
        piece("a") | {"usage": {"completion_tokens": 1}},
        piece("", "stop") | {"usage": {"completion_tokens": 2}},
    )
    stub.answers = [events(first, last, "[DONE]")]
    assert backend(stub).stream(ask()).complete().usage == mn.Usage(completion_tokens=2)


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning_content": "Hmm"},  # llama-server, LM Studio
        {"reasoning": "Hmm"},  # Ollama
        {"reasoning": "Hmm", "reasoning_content": "Hmm"},  # vLLM, for those who know only one of them
        {"reasoning": "Hmm", "reasoning_content": None, "content": ""},
    ],
)
def test_reasoning_comes_under_two_names(stub: StubServer, delta: dict[str, Any]) -> None:
    stub.answers = [events(piece(**delta), piece("Yes"), piece("", "stop"), "[DONE]")]
    done = backend(stub).stream(ask()).complete()
    assert (done.reasoning, done.text) == ("Hmm", "Yes")


@pytest.mark.parametrize(
    "values",
    [
        (piece("a"), piece("", "stop")),  # no [DONE]
        (piece("a"), piece("", "stop"), USAGE),
        (piece("a"), "[DONE]"),  # no finish_reason
        (piece("a"), piece(""), "[DONE]"),
    ],
)
def test_one_of_two_ends_is_enough(stub: StubServer, read: Read, values: tuple[Any, ...]) -> None:
    stub.answers = [events(*values)]
    chunks, error = read(backend(stub).stream(ask()))
    assert error is None
    assert (text_of(chunks), chunks[-1].finish_reason) == ("a", "end")


def test_a_finished_answer_does_not_wait_for_a_server_that_leaves_the_stream_open(stub: StubServer, read: Read) -> None:
    def answer(connection: Connection) -> None:
        connection.head()
        connection.event(piece("a", "stop"))
        stub.stall(connection)

    stub.answers = [answer]
    chunks, error = read(backend(stub).stream(ask()))
    assert error is None
    assert chunks[-1].finish_reason == "end"
    assert stub.vanished.acquire(timeout=10)


def test_a_finished_answer_is_whole_even_if_the_connection_is_cut(stub: StubServer, read: Read) -> None:
    stub.answers = [cut(piece("a", "stop"))]
    chunks, error = read(backend(stub).stream(ask()))
    assert error is None
    assert (text_of(chunks), chunks[-1].finish_reason) == ("a", "end")


SEPARATORS = json.dumps(piece(" \u2028\x85 b"), ensure_ascii=False)  # which end lines in Python, and none here
SEVERAL_LINES = "".join(f"data: {line}\n" for line in json.dumps(piece("", "stop"), indent=1).splitlines())
EVENTS = (
    ": keep-alive\n\n"
    f"event: message\r\nid: 1\r\ndata: {json.dumps(piece('a é'), ensure_ascii=False)}\r\n\r\n"
    ":\n\n: OPENROUTER PROCESSING\n\n"
    f"data:{SEPARATORS}\n\n"
    f"{SEVERAL_LINES}\n"
    "data: [DONE]"
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, None])
def test_events_are_read_however_they_are_cut(stub: StubServer, size: int | None) -> None:
    stub.answers = [raw(EVENTS.encode(), size)]
    done = backend(stub).stream(ask()).complete()
    assert (done.text, done.finish_reason) == ("a é \u2028\x85 b", "end")


def test_an_event_that_never_ends_is_refused() -> None:
    found = wire.Events()
    with pytest.raises(mn.BackendError, match="more than"):
        for _ in range(40):
            list(found.feed(b"data: " + b"x" * (1 << 19)))


# Calls of tools


def roll(sides: int) -> int:
    """Roll a die."""
    return sides


def call(index: int | None, call_id: str | None, name: str | None, arguments: Any) -> dict[str, Any]:
    function = ({} if name is None else {"name": name}) | ({} if arguments is None else {"arguments": arguments})
    given = {"index": index, "id": call_id, "function": function, "type": "function"}
    return {key: value for key, value in given.items() if value is not None}


IN_PIECES = [  # OpenAI, vLLM, llama-server
    [call(0, "id1", "roll", "")],
    [call(0, None, None, '{"si')],
    [call(0, None, None, 'des": 6}')],
    [call(1, "id2", "roll", '{"sides":')],
    [call(1, "", None, " 20}")],
]


@pytest.mark.parametrize(
    "pieces",
    [
        IN_PIECES,
        [IN_PIECES[0] + IN_PIECES[3], IN_PIECES[1] + IN_PIECES[4], IN_PIECES[2]],
        [[call(0, "id1", "roll", '{"sides": 6}')], [call(1, "id2", "roll", '{"sides": 20}')]],
        [
            [call(0, "id1", "roll", '{"sides": 6}'), call(0, "id2", "roll", '{"sides": 20}')]
        ],  # Ollama: each is the first
        [[call(None, "id1", "roll", '{"sides": 6}'), call(None, "id2", "roll", '{"sides": 20}')]],  # no index
        [
            [
                call(None, "id1", "roll", '{"sides"'),
                call(None, "id1", "roll", ": 6}"),
                call(None, "id2", "roll", {"sides": 20}),
            ]
        ],
        [
            [call(None, "id1", "roll", '{"sides": ')],
            [call(None, None, None, "6}")],
            [call(None, "id2", "roll", {"sides": 20})],
        ],
    ],
)
def test_calls_come_in_pieces_or_whole_and_with_an_index_or_none(stub: StubServer, pieces: list[Any]) -> None:
    stub.answers = [events(*(piece(tool_calls=one) for one in pieces), piece(finish_reason="tool_calls"), "[DONE]")]
    chunks = list(backend(stub).stream(ask(tools=[roll])))
    assert [(one.id, one.name, one.arguments, one.index) for one in chunks[-1].tool_calls] == [
        ("id1", "roll", {"sides": 6}, 0),
        ("id2", "roll", {"sides": 20}, 1),
    ]
    assert chunks[-1].finish_reason == "end"
    deltas = [delta for chunk in chunks for delta in chunk.tool_call_deltas]
    for one in chunks[-1].tool_calls:
        own = [delta for delta in deltas if delta.index == one.index]
        assert [delta.id for delta in own] == [one.id, *[None] * (len(own) - 1)]
        assert [delta.name for delta in own] == [one.name, *[None] * (len(own) - 1)]
        assert json.loads("".join(delta.arguments for delta in own)) == one.arguments


def test_calls_without_ids_get_some(stub: StubServer) -> None:
    whole = [call(None, None, "roll", '{"sides": 6}'), call(None, None, "roll", "")]
    stub.answers = [events(piece(tool_calls=whole), piece("", "stop"), "[DONE]")]
    calls = backend(stub).stream(ask(tools=[roll])).complete().tool_calls
    assert [one.arguments for one in calls] == [{"sides": 6}, {}]
    assert len({one.id for one in calls}) == 2
    assert all(len(one.id) == 9 and one.id.isalnum() for one in calls)


@pytest.mark.parametrize("arguments", ['{"sides": ', "[6]", "6", "x", "[" * 100_000])
def test_a_call_that_is_none_is_an_error_of_the_answer(stub: StubServer, arguments: str) -> None:
    right = call(0, "id1", "roll", '{"sides": 6}')
    stub.answers = [events(piece(tool_calls=[right, call(1, "id2", "roll", arguments)]), piece("", "length"), "[DONE]")]
    done = backend(stub).stream(ask(tools=[roll])).complete()
    assert [one.id for one in done.tool_calls] == ["id1"]
    assert "'roll'" in done.tool_error
    assert len(done.tool_error) < 500


# Log-probabilities


def test_log_probabilities_come_with_each_token(stub: StubServer) -> None:
    def entry(token: str, logprob: float, **more: Any) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode()), **more}

    top = [entry("On", -0.1, id=5), entry("A", -2.5, id=6), entry("B", -3.0, id=7)]
    both = piece("On")
    both["choices"][0]["logprobs"] = {"content": [entry("O", -0.5), entry("n", -0.25, id=5, top_logprobs=top)]}
    stub.answers = [events(both, piece("", "stop"), "[DONE]")]
    chunks = list(backend(stub).stream(ask(top_logprobs=2)))
    assert [(chunk.text, chunk.token, chunk.logprob) for chunk in chunks[:2]] == [("", None, -0.5), ("On", 5, -0.25)]
    assert chunks[1].top_logprobs == [(5, -0.1), (6, -2.5)]
    entries = backend(stub).stream(ask(top_logprobs=2)).complete().logprobs
    assert entries is not None
    assert [(one.token, one.text, len(one.top)) for one in entries] == [(-1, "O", 0), (5, "n", 2)]
    assert stub.seen[0].body["logprobs"] is True
    assert stub.seen[0].body["top_logprobs"] == 2
    assert backend(stub).stream(ask()).complete().logprobs is None


def test_completions_of_a_prompt_have_the_older_form(stub: StubServer) -> None:
    choice = {"index": 0, "text": " upon", "finish_reason": None}
    choice["logprobs"] = {"tokens": [" upon"], "token_logprobs": [-0.5], "top_logprobs": [{" a": -2.0, " upon": -0.5}]}
    stub.answers = [events({"choices": [choice]}, {"choices": [{"text": "", "finish_reason": "length"}]}, "[DONE]")]
    request = mn.BackendRequest(prompt="Once", max_tokens=1, top_logprobs=2)
    done = backend(stub).stream(request).complete()
    assert (done.text, done.is_chat, done.finish_reason) == (" upon", False, "length")
    assert done.logprobs is not None
    assert [(one.text, one.logprob, [other.text for other in one.top]) for one in done.logprobs] == [
        (" upon", -0.5, [" upon", " a"])
    ]
    assert stub.seen[0].path == "/v1/completions"
    assert stub.seen[0].body["logprobs"] == 2
    assert "top_logprobs" not in stub.seen[0].body


# Errors


@pytest.mark.parametrize(
    ("event", "code", "words"),
    [
        ({"error": {"code": 500, "message": "it broke", "type": "server_error"}}, 500, "it broke"),  # llama-server
        ({"error": {"code": 400, "message": "too long", "type": "BadRequestError"}}, 400, "too long"),  # vLLM
        ({"object": "error", "message": "too long", "code": 400}, 400, "too long"),  # vLLM, older
        ({"error": "model runner has stopped"}, 200, "model runner has stopped"),  # Ollama, LM Studio
        ({"error": {"message": "no code", "code": None}}, 200, "no code"),
        ({"error": {"message": "a word", "code": "invalid"}}, 200, "a word"),
        ("{not JSON", 200, "not JSON"),
        ("[1]", 200, "[1]"),
        ("[" * 100_000, 200, "no event"),
    ],
)
def test_an_error_in_the_middle_of_a_stream(stub: StubServer, read: Read, event: Any, code: int, words: str) -> None:
    stub.answers = [events(piece("Once"), event, piece(" upon"), "[DONE]")]
    text, error = failed(read, backend(stub).stream(ask()))
    assert (text, error.status) == ("Once", code)
    assert words in str(error)
    assert len(str(error)) < 500
    assert len(stub.seen) == 1  # what was streamed is not made again


def test_a_connection_that_is_cut_in_the_middle(stub: StubServer, read: Read) -> None:
    stub.answers = [cut(piece("Once"))]
    text, error = failed(read, backend(stub).stream(ask()))
    assert (text, error.status, len(stub.seen)) == ("Once", 200, 1)


def test_a_stream_that_ends_in_the_middle(stub: StubServer, read: Read) -> None:
    stub.answers = [events(piece("Once"))]
    text, error = failed(read, backend(stub).stream(ask()))
    assert (text, error.status, len(stub.seen)) == ("Once", 200, 1)
    assert "middle" in str(error)


@pytest.mark.parametrize(
    "first",
    [
        hang_up,
        cut(),
        cut(piece("", role="assistant")),
        events(piece("", role="assistant")),
        events({"error": {"code": 503, "message": "loading"}}),
        status(429, '{"error": {"message": "slow down"}}', Retry_After="0"),
        status(503, "", kind="text/plain"),
        status(500, "x"),
    ],
)
def test_what_fails_before_the_first_piece_is_tried_again(stub: StubServer, read: Read, first: Any) -> None:
    stub.answers = [first, first, events(*STORY)]
    chunks, error = read(backend(stub, retries=2).stream(ask()))
    assert error is None
    assert (text_of(chunks), len(stub.seen)) == ("Once upon", 3)


def test_what_fails_too_often_is_an_error(stub: StubServer, read: Read) -> None:
    stub.answers = [status(503, '{"error": {"message": "Loading model", "code": 503}}')]
    _, error = failed(read, backend(stub, retries=1).stream(ask()))
    assert (error.status, len(stub.seen)) == (503, 2)
    assert "Loading model" in str(error)


@pytest.mark.parametrize("code", [429, 503])
def test_a_server_says_when_to_try_again(stub: StubServer, code: int) -> None:
    stub.answers = [status(code, "{}", Retry_After="0.3"), events(*STORY)]
    assert backend(stub).stream(ask()).complete().text == "Once upon"
    assert stub.seen[1].at - stub.seen[0].at >= 0.3


def test_a_server_that_wants_to_be_left_alone_for_long_gets_no_retry(stub: StubServer, read: Read) -> None:
    stub.answers = [status(429, '{"error": {"message": "quota"}}', Retry_After="3600")]
    _, error = failed(read, backend(stub).stream(ask()))
    assert (error.status, len(stub.seen)) == (429, 1)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2", 2.0),
        ("-1", 0.0),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("Mon, 01 Jan 2001 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float | None) -> None:
    assert wire.retry_after({"retry-after": value}) == seconds
    assert wire.retry_after({}) is None


@pytest.mark.parametrize(
    ("code", "body", "words"),
    [
        (401, '{"error": {"message": "Incorrect API key", "type": "invalid_request_error"}}', "Incorrect API key"),
        (401, '{"error": "Unauthorized"}', "Unauthorized"),
        (400, '{"detail": [{"msg": "field required"}]}', "field required"),
        (404, '{"error": {"message": "model \\"x\\" not found, try pulling it first"}}', "try pulling it first"),
        (
            403,
            "<!DOCTYPE html><html><style>b {}</style><body><b>Access</b> &amp; denied</body></html>",
            "a web page: Access & denied",
        ),
        (400, "", "no message"),
        (501, "not here", "not here"),
        (307, "", "307"),
    ],
)
def test_an_error_that_a_retry_does_not_help(stub: StubServer, read: Read, code: int, body: str, words: str) -> None:
    stub.answers = [status(code, body, Location="http://127.0.0.1:9/v1/chat/completions")]
    _, error = failed(read, backend(stub).stream(ask()))
    assert (error.status, len(stub.seen)) == (code, 1)
    assert words in str(error)


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ("<html><title>Sign in</title></html>", "text/html; charset=utf-8", "a web page: Sign in"),
        (
            '{"error": "Unexpected endpoint or method. (POST /v1/x)"}',
            "application/json",
            "Unexpected endpoint",
        ),  # LM Studio
        ('{"choices": []}', "application/json", "choices"),
        ("x" * 1_000_000, "text/plain", "xxx"),
    ],
)
def test_what_is_no_stream_is_an_error(stub: StubServer, body: str, kind: str, words: str) -> None:
    stub.answers = [status(200, body, kind)]
    with pytest.raises(mn.BackendError, match="status 200") as caught:
        backend(stub).stream(ask()).complete()
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_missing_v1_is_guessed(stub: StubServer) -> None:
    stub.answers = [status(404, "404 page not found", "text/plain")]
    with pytest.raises(mn.BackendError, match="usually ends with /v1"):
        mn.OpenAIBackend(stub.url.removesuffix("/v1"), "stub").stream(ask()).complete()


def test_no_server_is_no_status(stub: StubServer, read: Read) -> None:
    with stub_server() as gone:
        url = gone.url
    _, error = failed(read, mn.OpenAIBackend(url, "stub").stream(ask()))
    assert error.status is None
    assert url in str(error)


def test_a_first_byte_that_does_not_come(stub: StubServer, read: Read) -> None:
    stub.answers = [stub.stall]
    _, error = failed(read, backend(stub, timeout=0.5).stream(ask()))
    assert (error.status, len(stub.seen)) == (None, 1)  # the server may be at work on it
    assert "0.5 s" in str(error)
    assert stub.vanished.acquire(timeout=10)


def pieces_then_stall(stub: StubServer) -> Callable[[Connection], None]:
    def answer(connection: Connection) -> None:
        connection.head()
        connection.event(piece("Once"))
        stub.stall(connection)

    return answer


def test_a_stream_that_stalls(stub: StubServer, read: Read) -> None:
    stub.answers = [pieces_then_stall(stub)]
    text, error = failed(read, backend(stub, timeout=0.5).stream(ask()))
    assert (text, error.status) == ("Once", 200)
    assert stub.vanished.acquire(timeout=10)


def test_comments_keep_a_slow_stream_alive(stub: StubServer, read: Read) -> None:
    def answer(connection: Connection) -> None:
        connection.head()
        for _ in range(12):
            connection.send(": keep-alive\n\n")
            time.sleep(0.1)
        for value in STORY:
            connection.event(value)
        connection.end()

    stub.answers = [answer]
    chunks, error = read(backend(stub, timeout=0.9).stream(ask()))
    assert error is None
    assert text_of(chunks) == "Once upon"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
CHOICE = st.fixed_dictionaries(
    {},
    optional={
        "finish_reason": JSON,
        "stop_reason": JSON,
        "text": JSON,
        "delta": JSON
        | st.fixed_dictionaries(
            {},
            optional={
                "content": JSON | st.lists(st.fixed_dictionaries({"text": JSON}), max_size=2),
                "reasoning": JSON,
                "tool_calls": JSON
                | st.lists(
                    st.fixed_dictionaries(
                        {},
                        optional={
                            "index": JSON,
                            "id": JSON,
                            "function": JSON | st.fixed_dictionaries({"name": JSON, "arguments": JSON}),
                        },
                    ),
                    max_size=2,
                ),
            },
        ),
        "logprobs": JSON
        | st.fixed_dictionaries(
            {
                "content": st.lists(
                    st.fixed_dictionaries({"token": JSON, "logprob": JSON, "bytes": JSON, "top_logprobs": JSON}),
                    max_size=2,
                )
            }
        )
        | st.fixed_dictionaries({"tokens": JSON, "token_logprobs": JSON, "top_logprobs": JSON}),
    },
)


@given(
    st.lists(
        JSON
        | st.fixed_dictionaries(
            {}, optional={"choices": st.lists(CHOICE, max_size=1) | JSON, "usage": JSON, "error": JSON}
        ),
        max_size=6,
    )
)
def test_whatever_a_server_sends_is_an_answer_or_an_error(values: list[Any]) -> None:
    answer = wire.Answer(ask(top_logprobs=2).checked, 0.0)
    with contextlib.suppress(mn.BackendError):
        for value in values:
            for chunk in answer.add(json.dumps(value)):
                assert isinstance(chunk.text, str)
        assert answer.end().finish_reason in ("end", "stop", "length", "cancelled")


# Stopping


def test_closing_a_stream_closes_the_connection(stub: StubServer) -> None:
    stub.answers = [pieces_then_stall(stub)]
    stream = backend(stub).stream(ask())
    assert next(stream).text == "Once"
    stream.close()
    assert stub.vanished.acquire(timeout=10)
    assert list(stream) == []
    stream.close()

    async def run() -> None:
        stream = backend(stub).stream(ask())
        assert (await anext(stream)).text == "Once"
        await stream.aclose()
        assert [chunk async for chunk in stream] == []

    asyncio.run(run())
    assert stub.vanished.acquire(timeout=10)


def test_dropping_a_stream_closes_the_connection(stub: StubServer) -> None:
    stub.answers = [pieces_then_stall(stub)]
    for chunk in backend(stub).stream(ask()):
        assert chunk.text == "Once"
        break
    assert stub.vanished.acquire(timeout=10)

    async def run() -> bool:
        async for _ in backend(stub).stream(ask()):
            break
        return await asyncio.to_thread(stub.vanished.acquire, timeout=10)

    gc.disable()  # it takes no collector
    try:
        assert asyncio.run(run())
    finally:
        gc.enable()


@pytest.mark.parametrize("is_begun", [False, True])
def test_cancelling_the_task_closes_the_connection(stub: StubServer, is_begun: bool) -> None:
    stub.answers = [pieces_then_stall(stub) if is_begun else stub.stall]

    async def run() -> None:
        task = asyncio.create_task(backend(stub).stream(ask()).acomplete())
        while not stub.seen:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert stub.vanished.acquire(timeout=10)


@pytest.mark.parametrize("is_begun", [False, True])
def test_ctrl_c_closes_the_connection(stub: StubServer, is_begun: bool) -> None:
    def interrupt(connection: Connection) -> None:
        if is_begun:
            connection.head()
            connection.event(piece("Once"))
        time.sleep(0.1)  # until the main thread waits for more
        if is_reading.is_set():
            os.kill(os.getpid(), signal.SIGINT)
        stub.stall(connection)

    stub.answers = [interrupt]
    is_reading = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        is_reading.set()
        try:
            backend(stub).stream(ask()).complete()
        finally:
            is_reading.clear()
    assert stub.vanished.acquire(timeout=10)


def test_another_thread_may_close_a_stream_that_waits(stub: StubServer) -> None:
    stub.answers = [pieces_then_stall(stub)]
    stream = backend(stub).stream(ask())
    threading.Timer(0.2, stream.close).start()
    assert [chunk.text for chunk in stream] == ["Once"]
    assert stub.vanished.acquire(timeout=10)


def test_a_request_that_is_cancelled_before_its_first_token(stub: StubServer, read: Read) -> None:
    cancel = threading.Event()

    def answer(connection: Connection) -> None:
        cancel.set()
        stub.stall(connection)

    stub.answers = [answer]
    chunks, error = read(backend(stub).stream(ask(cancel=cancel)))
    assert isinstance(error, mn.Cancelled)
    assert not chunks
    assert stub.vanished.acquire(timeout=10)


def test_a_request_that_is_cancelled_later_keeps_what_it_has(stub: StubServer, read: Read) -> None:
    cancel = threading.Event()
    stub.answers = [pieces_then_stall(stub)]
    chunks, error = read(backend(stub).stream(ask(cancel=cancel)), cancel.set)
    assert error is None
    assert (text_of(chunks), chunks[-1].finish_reason) == ("Once", "cancelled")
    assert stub.vanished.acquire(timeout=10)


@pytest.mark.parametrize("is_begun", [False, True])
def test_the_time_of_a_request_is_limited(stub: StubServer, read: Read, is_begun: bool) -> None:
    stub.answers = [pieces_then_stall(stub) if is_begun else stub.stall]
    chunks, error = read(backend(stub).stream(ask(timeout=1)))
    if is_begun:
        assert error is None
        assert (text_of(chunks), chunks[-1].finish_reason) == ("Once", "cancelled")
    else:
        assert isinstance(error, mn.Cancelled)
        assert "1 s" in str(error)
    assert stub.vanished.acquire(timeout=10)


def test_an_answer_that_is_finished_is_not_cancelled(stub: StubServer, read: Read) -> None:
    def answer(connection: Connection) -> None:
        connection.head()
        connection.event(piece("Once", "stop"))
        stub.stall(connection)

    cancel = threading.Event()
    stub.answers = [answer]
    chunks, error = read(backend(stub).stream(ask(cancel=cancel)), cancel.set)
    assert error is None
    assert chunks[-1].finish_reason == "end"


def test_a_request_is_stopped_while_it_waits_to_try_again(stub: StubServer, read: Read) -> None:
    stub.answers = [status(503, "{}", Retry_After="30")]
    _, error = read(backend(stub).stream(ask(timeout=0.3)))
    assert isinstance(error, mn.Cancelled)
    assert len(stub.seen) == 1


def test_a_cancel_token_that_fails_closes_the_connection(stub: StubServer, read: Read) -> None:
    class Odd:
        def is_set(self) -> bool:
            if stub.seen:
                raise RuntimeError("it cannot")
            return False

    stub.answers = [stub.stall]
    _, error = read(backend(stub).stream(ask(cancel=Odd())))
    assert isinstance(error, RuntimeError)
    assert stub.vanished.acquire(timeout=10)


def test_a_stream_that_is_never_read_asks_nothing(stub: StubServer) -> None:
    stub.answers = [events(*STORY)]
    with backend(stub).stream(ask()):
        pass
    assert not stub.seen


def test_a_stream_is_read_in_one_way(stub: StubServer) -> None:
    stub.answers = [events(*STORY)]
    stream = backend(stub).stream(ask())
    next(stream)
    with pytest.raises(TypeError, match="read with `for`"):
        asyncio.run(stream.acomplete())


def test_streams_are_read_from_several_threads_at_once(stub: StubServer) -> None:
    stub.answers = [events(*STORY)]
    engine = backend(stub)
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(engine.stream(ask()).complete().text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert texts == ["Once upon"] * 8


def test_for_works_inside_a_running_event_loop(stub: StubServer) -> None:
    stub.answers = [events(*STORY)]

    async def run() -> str:
        return backend(stub).stream(ask()).complete().text  # as in a notebook

    assert asyncio.run(run()) == "Once upon"


# What is sent


def test_the_first_model_of_a_server_answers(stub: StubServer) -> None:
    names = '{"object": "list", "data": [{"id": "first", "object": "model"}, {"id": "second"}]}'
    stub.answers = [status(200, names), events(*STORY)]
    engine = backend(stub, model=None)
    assert engine.stream(ask()).complete().model == "first"
    assert engine.stream(ask()).complete().text == "Once upon"
    assert [(one.path, (one.body or {}).get("model")) for one in stub.seen] == [
        ("/v1/models", None),
        ("/v1/chat/completions", "first"),
        ("/v1/chat/completions", "first"),
    ]


@pytest.mark.parametrize(
    "body", ['{"object": "list", "data": null}', '{"data": []}', "{}", "[]", '{"data": [{}]}', "x"]
)
def test_a_server_without_models(stub: StubServer, body: str) -> None:
    stub.answers = [status(200, body)]
    with pytest.raises(mn.BackendError) as caught:
        backend(stub, model=None, retries=0).stream(ask()).complete()
    assert len(str(caught.value).split()) > 3


def test_nothing_of_the_environment_goes_to_the_server(stub: StubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: secret\nX-Own: secret")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    stub.answers = [events(*STORY)]
    assert backend(stub).stream(ask()).complete().text == "Once upon"
    assert set(stub.seen[0].headers) == {
        *("host", "accept", "accept-encoding", "connection", "content-type", "content-length", "user-agent"),
        "x-stainless-raw-response",
    }
    assert "secret" not in str(stub.seen)
    assert backend(stub, api_key="key").stream(ask()).complete().text == "Once upon"
    assert stub.seen[1].headers["authorization"] == "Bearer key"


class City(TypedDict):
    name: str


SENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options, and the fields that they are
    "none": ({}, {}),
    "max_tokens": ({"max_tokens": 5}, {"max_tokens": 5}),
    "stop": ({"stop": "x"}, {"stop": ["x"]}),
    "temperature": ({"temperature": 0}, {"temperature": 0.0}),
    "top_p": ({"top_p": 0.5}, {"top_p": 0.5}),
    "frequency_penalty": ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
    "presence_penalty": ({"presence_penalty": 0.5}, {"presence_penalty": 0.5}),
    "seed": ({"seed": 7}, {"seed": 7}),
    "no seed": ({"seed": -1}, {}),
    "logit_bias": ({"logit_bias": {5: 1.5, "6": float("-inf")}}, {"logit_bias": {"5": 1.5, "6": -100.0}}),
    "logprobs": ({"logprobs": True}, {"logprobs": True}),
    "top_logprobs": ({"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
    "tool_choice": (
        {"tools": [roll], "tool_choice": "roll", "parallel_tool_calls": False},
        {
            "tools": [tool.to_dict() for tool in mn.read_tools([roll])],
            "tool_choice": {"type": "function", "function": {"name": "roll"}},
            "parallel_tool_calls": False,
        },
    ),
    "no tools": ({"tool_choice": "none", "parallel_tool_calls": False}, {}),
    "response_format": ({"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}),
    "a text": ({"response_format": {"type": "text"}}, {"response_format": {"type": "text"}}),
    "defaults": (
        {
            "echo": False,
            "constraint": None,
            "thinking_tags": None,
            "reasoning_budget": None,
            "stop": (),
            "reasoning_message": "",
            "keep_partial": False,
            "chat_template_kwargs": {},
            "tool_choice": "auto",
        },
        {},
    ),
    "here": ({"cancel": threading.Event(), "timeout": 100}, {}),
}


@pytest.mark.parametrize("name", SENT)
def test_options_are_fields_of_the_api(stub: StubServer, name: str) -> None:
    options, fields = SENT[name]
    stub.answers = [events(*STORY)]
    backend(stub).stream(ask(**options)).complete()
    always = {"model": "stub", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    assert stub.seen[0].body == always | fields


REFUSED: dict[str, Any] = {
    "echo": True,
    "constraint": ["a", "b"],
    "thinking_tags": ("<a>", "</a>"),
    "reasoning_budget": 5,
    "reasoning_message": "x",
    "keep_partial": True,
    "chat_template_kwargs": {"enable_thinking": False},
    "continue_final_message": True,
    "sampling": mn.SamplingParams(),
}
OF_SAMPLING = {field.name: getattr(mn.SamplingParams(), field.name) for field in dataclasses.fields(mn.SamplingParams)}
API = {"temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "logit_bias"}
REFUSED |= {name: value for name, value in OF_SAMPLING.items() if name not in API}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_the_api_has_not_is_refused(name: str) -> None:
    engine = mn.OpenAIBackend("http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match=name):
        engine.stream(ask(**{name: REFUSED[name]}))


def test_every_option_is_sent_or_refused_or_kept_here() -> None:
    fields = {field.name for field in dataclasses.fields(mn.RequestOptions)}
    known = {name for options, _ in SENT.values() for name in options} | REFUSED.keys()
    assert not (fields | OF_SAMPLING.keys()) - known


def test_a_server_may_take_more(stub: StubServer) -> None:
    stub.answers = [events(*STORY)]
    engine = backend(stub, accepts=["top_k", "min_p", "chat_template_kwargs"])
    engine.stream(ask(top_k=5, min_p=0, chat_template_kwargs={"enable_thinking": False})).complete()
    body = stub.seen[0].body
    assert (body["top_k"], body["min_p"], body["chat_template_kwargs"]) == (5, 0.0, {"enable_thinking": False})
    with pytest.raises(ValueError, match="typical_p"):
        engine.stream(ask(typical_p=0.5))
    with pytest.raises(ValueError, match="cannot have 'echo'"):
        backend(stub, accepts=["echo"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "none"}, "tool_choice"),
    ],
)
def test_what_belongs_to_a_chat_is_refused_beside_a_prompt(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mn.OpenAIBackend("http://127.0.0.1:9/v1").stream(mn.BackendRequest(prompt="Once", **options))


@pytest.mark.parametrize("value", [object(), float("nan"), "\ud800", {1, 2}])
def test_what_json_has_not_is_refused_before_it_is_sent(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        mn.OpenAIBackend("http://127.0.0.1:9/v1").stream(mn.BackendRequest([{"role": "user", "content": value}]))


def test_an_answer_may_be_an_instance_of_a_class(stub: StubServer) -> None:
    stub.answers = [events(piece('{"name": "Rome"}'), piece("", "stop"), "[DONE]")]
    assert backend(stub).stream(ask(response_format=City)).complete().parsed == {"name": "Rome"}
    sent = stub.seen[0].body["response_format"]
    assert sent["type"] == "json_schema"
    assert sent["json_schema"]["strict"] is True
    assert '"name": {"type": "string"}' in json.dumps(sent["json_schema"]["schema"])
    stub.answers = [events(piece('{"name": "Ro'), piece("", "length"), "[DONE]")]
    with pytest.raises(mn.ConstraintError, match="cut off"):
        _ = backend(stub).stream(ask(response_format=City)).complete().parsed
    own = {"type": "json_schema", "json_schema": {"name": "city", "schema": {"type": "object"}}}
    backend(stub).stream(ask(response_format=own)).complete()
    assert stub.seen[2].body["response_format"] == own


# The engine of this process


@pytest.fixture(scope="module")
def llm(demo: mn.Model) -> Iterator[mn.LLM]:
    with mn.LLM(demo, n_ctx=512, n_threads=1, deterministic=True) as llm:
        yield llm


@pytest.mark.parametrize(
    "request_", [ask(), mn.BackendRequest(prompt="Once upon a time"), mn.BackendRequest(prompt=[40, 41])]
)
def test_the_native_backend_says_what_the_llm_says(llm: mn.LLM, read: Read, request_: mn.BackendRequest) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "top_logprobs": 2}
    prompt = list(request_.prompt) if isinstance(request_.prompt, tuple) else request_.prompt
    done = llm.chat_completion(HELLO, **options) if prompt is None else llm.complete(prompt, **options)
    engine = mn.NativeBackend(llm)
    request = mn.BackendRequest(request_.messages, prompt=request_.prompt, **options)
    chunks, error = read(engine.stream(request))
    assert error is None
    assert text_of(chunks) == done.text
    own = engine.stream(request).complete()
    usage = dataclasses.replace(done.usage, cached_tokens=own.usage.cached_tokens)
    assert dataclasses.replace(own, timings=done.timings, created=done.created, usage=usage) == dataclasses.replace(
        done, usage=usage
    )


def test_the_native_backend_takes_every_option(llm: mn.LLM) -> None:
    names = set(REFUSED) - {"sampling", "echo", "thinking_tags", "reasoning_budget", "reasoning_message"}
    request = ask(**{name: REFUSED[name] for name in names}, max_tokens=3, temperature=0.5)
    assert mn.NativeBackend(llm).stream(request).complete().text in ("a", "b")


def test_an_echo_of_a_model_has_the_log_probabilities_of_the_prompt(llm: mn.LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "echo": True, "logprobs": True}
    whole = llm.complete("Once upon", **options)
    read = mn.NativeBackend(llm).stream(mn.BackendRequest(prompt="Once upon", **options)).complete()
    assert whole.logprobs is not None
    assert read.logprobs is not None
    assert [one.token for one in read.logprobs] == [one.token for one in whole.logprobs]


def test_a_backend_closes_what_it_has_made(llm: mn.LLM) -> None:
    with mn.connect(mn.DEMO_PATH, n_ctx=64, n_threads=1) as own:
        assert isinstance(own, mn.NativeBackend)
        assert own.stream(mn.BackendRequest(prompt="Once", max_tokens=2)).complete().finish_reason == "length"
    assert own.llm.closed
    with mn.connect(llm) as borrowed:
        pass
    assert isinstance(borrowed, mn.NativeBackend)
    assert not llm.closed


def test_an_address_is_a_server_and_anything_else_a_model() -> None:
    engine = mn.connect("HTTP://localhost:9/v1/", model="x", retries=0)
    assert isinstance(engine, mn.OpenAIBackend)
    assert (engine.base_url, engine.model) == ("HTTP://localhost:9/v1", "x")
    with pytest.raises(mn.ModelLoadError):
        mn.connect("no/such/model.gguf")
    for address in "localhost:8080", "127.0.0.1:8080/v1":
        with pytest.raises(ValueError, match="begin it with http"):
            mn.connect(address, api_key="key")


def test_a_backend_of_ones_own_writes_one_generator() -> None:
    class Echo:
        def stream(self, request: mn.BackendRequest) -> mn.ChunkStream:
            return mn.ChunkStream(request, lambda: self._pieces(request))

        async def _pieces(self, request: mn.BackendRequest) -> Any:
            for word in str(request.prompt).split():
                yield mn.Chunk(word)
            yield mn.Chunk(finish_reason="end")

    engine: mn.Backend = Echo()
    request = mn.BackendRequest(prompt="a b")
    assert engine.stream(request).complete().text == "ab"
    assert asyncio.run(engine.stream(request).acomplete()).text == "ab"


def test_without_the_client_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(mn.MinervaError, match=r"pip install 'minerva-native\[openai\]'"):
        mn.connect("http://127.0.0.1:9/v1")
