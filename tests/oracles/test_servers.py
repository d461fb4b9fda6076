"""Real servers behind `OpenAIBackend`: `minerva serve`, upstream's llama-server, and any that runs somewhere.

`MINERVA_TOOLS` names the folder of llama-server (see CONTRIBUTING.md), which answers with the built-in model.
`MINERVA_SERVER_URL` names a server that runs, such as `http://127.0.0.1:8000/v1` (vLLM) or `http://127.0.0.1:11434/v1`
(Ollama), `MINERVA_SERVER_MODEL` its model if not the first, `MINERVA_SERVER_KEY` its key.
"""

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import pytest

import minerva_native as mn
from serve import minerva_serve
from upstream import llama_server

HELLO = [{"role": "user", "content": "Tell me a story about a dragon."}]
OPENING = "Once upon a time, a little"

LLAMA_SERVER = Path(os.environ.get("MINERVA_TOOLS", "")) / "llama-server"
URL = os.environ.get("MINERVA_SERVER_URL")

needs_llama_server = pytest.mark.skipif(
    "MINERVA_TOOLS" not in os.environ or not LLAMA_SERVER.exists(), reason="MINERVA_TOOLS has no llama-server"
)


@pytest.fixture(scope="module")
def upstreams() -> Iterator[mn.OpenAIBackend]:
    options = ("-c", "2048", "-np", "2", "--jinja", "-fa", "off", "--no-cache-prompt")
    with llama_server(str(LLAMA_SERVER), str(mn.DEMO_PATH), 1, *options) as address:
        yield mn.OpenAIBackend(f"http://{address}/v1", accepts=["top_k", "min_p"], timeout=60)


@pytest.fixture(scope="module")
def minervas() -> Iterator[mn.OpenAIBackend]:
    options = ("-c", "2048", "-t", "1", "-fa", "off")
    with minerva_serve(*options) as said:
        yield mn.OpenAIBackend(f"{said['url']}/v1", api_key=said["token"], accepts=["top_k", "min_p"], timeout=60)


@pytest.fixture(scope="module")
def native() -> Iterator[mn.NativeBackend]:
    with mn.NativeBackend(mn.DEMO_PATH, n_ctx=1024, n_threads=1, flash_attention="off", prefix_cache=False) as backend:
        yield backend


@pytest.fixture(
    params=[
        "minerva",
        pytest.param("llama-server", marks=needs_llama_server),
        pytest.param("any", marks=pytest.mark.skipif(URL is None, reason="MINERVA_SERVER_URL is not set")),
    ]
)
def server(request: pytest.FixtureRequest) -> mn.OpenAIBackend:
    if request.param == "any":
        assert URL is not None
        model, key = os.environ.get("MINERVA_SERVER_MODEL"), os.environ.get("MINERVA_SERVER_KEY")
        return mn.OpenAIBackend(URL, model, key, timeout=120)
    backend: mn.OpenAIBackend = request.getfixturevalue("minervas" if request.param == "minerva" else "upstreams")
    return backend


# Any server


def test_a_chat_is_streamed(server: mn.OpenAIBackend) -> None:
    chunks = list(server.stream(mn.BackendRequest(HELLO, max_tokens=12, temperature=0)))
    assert sum(bool(chunk.text or chunk.reasoning) for chunk in chunks) > 3
    last = chunks[-1]
    assert last.finish_reason == "length"
    assert not last.context_full
    assert last.usage is not None
    assert last.usage.prompt_tokens > 0
    assert last.usage.completion_tokens == 12
    assert last.timings is not None
    assert 0 < last.timings.first_token < last.timings.total


def test_greedy_text_is_the_same_by_for_and_by_async_for(server: mn.OpenAIBackend) -> None:
    request = mn.BackendRequest(HELLO, max_tokens=12, temperature=0)
    done = server.stream(request).complete()
    assert done.text or done.reasoning
    assert server.model is not None
    assert done.model == server.model
    again = asyncio.run(server.stream(request).acomplete())
    assert (again.text, again.reasoning) == (done.text, done.reasoning)


def test_several_requests_at_once(server: mn.OpenAIBackend) -> None:
    async def run() -> list[mn.Completion]:
        request = mn.BackendRequest(HELLO, max_tokens=8, temperature=0)
        return await asyncio.gather(*(server.stream(request).acomplete() for _ in range(6)))

    done = asyncio.run(run())
    assert [one.usage.completion_tokens for one in done] == [8] * 6


def test_log_probabilities(server: mn.OpenAIBackend) -> None:
    done = server.stream(mn.BackendRequest(HELLO, max_tokens=5, temperature=0, top_logprobs=3)).complete()
    if not done.logprobs:
        pytest.skip("the server gives no log-probabilities")
    assert len(done.logprobs) == 5
    for entry in done.logprobs:
        assert entry.logprob is not None
        assert entry.logprob <= 0
        assert len(entry.top) == 3
        assert entry.top[0].piece == entry.piece  # greedy


def test_a_stop_string(server: mn.OpenAIBackend) -> None:
    text = server.stream(mn.BackendRequest(HELLO, max_tokens=12, temperature=0)).complete().text
    words = text.split()
    if len(words) < 3:
        pytest.skip("the answer is too short")
    done = server.stream(mn.BackendRequest(HELLO, max_tokens=12, temperature=0, stop=[words[2]])).complete()
    assert done.text == text[: text.index(words[2])]
    assert done.finish_reason in ("end", "stop")


def test_a_request_is_cancelled(server: mn.OpenAIBackend) -> None:
    cancel = threading.Event()
    n_chunks = 0
    reason = None
    for chunk in server.stream(mn.BackendRequest(HELLO, max_tokens=400, temperature=1.5, cancel=cancel)):
        n_chunks, reason = n_chunks + 1, chunk.finish_reason
        cancel.set()
    assert reason in ("cancelled", "end")
    assert n_chunks < 400
    assert server.stream(mn.BackendRequest(HELLO, max_tokens=3)).complete().usage.completion_tokens > 0


def test_a_request_that_a_server_refuses(server: mn.OpenAIBackend) -> None:
    with pytest.raises(mn.BackendError) as caught:
        server.stream(mn.BackendRequest([{"role": "user", "content": 5}], max_tokens=3)).complete()
    assert caught.value.status is not None
    assert 400 <= caught.value.status < 600


def get_weather(city: str) -> str:
    """Return the weather in a city."""
    return city


def test_a_tool_is_called(server: mn.OpenAIBackend) -> None:
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    request = mn.BackendRequest(question, [get_weather], max_tokens=200, temperature=0, tool_choice="required")
    chunks = list(server.stream(request))
    deltas = [delta for chunk in chunks for delta in chunk.tool_call_deltas]
    if not deltas:
        pytest.skip("the model calls no tool, as the built-in one on llama-server")
    assert deltas[0].name == "get_weather"
    for call in chunks[-1].tool_calls:
        assert call.arguments.keys() == {"city"}
        assert call.text == "".join(delta.arguments for delta in deltas if delta.index == call.index)
    assert chunks[-1].tool_calls or chunks[-1].tool_error


# Those with the built-in model


@pytest.fixture(params=["minerva", pytest.param("llama-server", marks=needs_llama_server)])
def demo_server(request: pytest.FixtureRequest) -> mn.OpenAIBackend:
    backend: mn.OpenAIBackend = request.getfixturevalue("minervas" if request.param == "minerva" else "upstreams")
    return backend


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": OPENING, "max_tokens": 60},
        {"prompt": "The cat", "max_tokens": 40, "stop": ["."]},
        {"messages": HELLO, "max_tokens": 80},
        {
            "messages": [*HELLO, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Hello"}],
            "max_tokens": 40,
        },
    ],
)
def test_greedy_text_is_that_of_this_process(
    demo_server: mn.OpenAIBackend, native: mn.NativeBackend, asked: dict[str, Any]
) -> None:
    request = mn.BackendRequest(**asked, temperature=0)
    theirs, ours = demo_server.stream(request).complete(), native.stream(request).complete()
    assert theirs.text == ours.text
    assert len(ours.text) > 10
    assert theirs.usage.prompt_tokens == ours.usage.prompt_tokens
    assert theirs.usage.completion_tokens == ours.usage.completion_tokens
    assert theirs.finish_reason == ("end" if ours.finish_reason == "stop" else ours.finish_reason)


def test_the_log_probabilities_are_those_of_this_process(
    demo_server: mn.OpenAIBackend, native: mn.NativeBackend
) -> None:
    request = mn.BackendRequest(HELLO, max_tokens=10, temperature=0, top_logprobs=3)
    theirs, ours = demo_server.stream(request).complete(), native.stream(request).complete()
    assert theirs.logprobs is not None
    assert ours.logprobs is not None
    for one, other in zip(theirs.logprobs, ours.logprobs, strict=True):
        assert one.piece == other.piece
        assert one.logprob == pytest.approx(other.logprob, abs=0.01)
        assert [token.piece for token in one.top] == [token.piece for token in other.top]


def test_options_that_it_is_said_to_take_are_taken(demo_server: mn.OpenAIBackend) -> None:
    texts = {
        demo_server.stream(mn.BackendRequest(HELLO, max_tokens=20, temperature=2.0, top_k=1, min_p=0, seed=seed))
        .complete()
        .text
        for seed in range(3)
    }
    assert len(texts) == 1  # of one token there is no choice, however hot


class City(TypedDict):
    name: str
    big: bool


def test_an_answer_is_an_instance_of_a_class(demo_server: mn.OpenAIBackend) -> None:
    done = demo_server.stream(mn.BackendRequest(HELLO, max_tokens=200, temperature=0, response_format=City)).complete()
    if done.finish_reason == "length":  # a story within the string
        assert done.text.startswith("{")
    else:
        assert done.parsed.keys() == {"name", "big"}
