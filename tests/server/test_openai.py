"""`/v1/chat/completions`, `/v1/completions` and `/v1/models` as OpenAI's own client uses them."""

import asyncio
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import openai
import pydantic
import pytest
import uvicorn

import minerva_native as mn
from minerva_native.server import run as running
from minerva_native.server.app import create_app
from minerva_native.server.bodies import ChatBody, of_chat
from minerva_native.server.connection import connection_class
from minerva_native.server.guard import Access
from minerva_native.server.models import Models
from minerva_native.server.settings import Settings, Source
from serving import Served, serve

MODEL = "minerva-demo"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def asking(content: str) -> list[Any]:
    return [{"role": "user", "content": content}]


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    degrees: Literal[7, 21]


class GetWeather(pydantic.BaseModel):
    """Return the weather of a city."""

    city: Literal["Paris", "Rome"]


def tool(name: str) -> Any:
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": "Look.", "parameters": parameters}}


TOOLS: list[Any] = [tool("get_weather"), tool("get_time")]
NO_THOUGHT: dict[str, Any] = {"reasoning_effort": "none", "max_tokens": 60, "parallel_tool_calls": False}


# Models


def test_models_are_listed_and_described(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    model = client.models.retrieve(MODEL)
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "minerva")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_several_models_are_told_apart_by_name(
    start: Callable[..., AbstractContextManager[Served]],
) -> None:
    demo = str(mn.DEMO_PATH)
    with start("-m", demo, "-m", demo) as server, server.client() as client:
        assert [model.id for model in client.models.list()] == [MODEL, f"{MODEL}-2"]
        answer = client.chat.completions.create(model=f"{MODEL}-2", messages=HELLO, max_tokens=1)
        assert answer.model == f"{MODEL}-2"
        listed = {model.id: model.to_dict()["status"] for model in client.models.list()}
        assert listed == {MODEL: "unloaded", f"{MODEL}-2": "loaded"}
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="gpt-9", messages=HELLO, max_tokens=1)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


# Chat completions


def test_a_greedy_answer_is_that_of_the_engine(exact_client: openai.OpenAI, llm: mn.LLM) -> None:
    answer = exact_client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_completion_tokens=40)
    own = llm.chat_completion(HELLO, temperature=0, max_tokens=40)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", own.text, "stop")
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.system_fingerprint is not None
    assert abs(answer.created - time.time()) < 3600
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == own.usage.prompt_tokens
    assert answer.usage.completion_tokens == len(own.tokens)
    assert answer.usage.total_tokens == own.usage.prompt_tokens + len(own.tokens)


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_completion_tokens": 8}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    *pieces, last = chunks
    assert (last.choices, last.usage) == ([], whole.usage and last.usage)
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 8
    assert [chunk.choices[0].delta.role for chunk in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    texts = [chunk.choices[0].delta.content or "" for chunk in pieces]
    assert "".join(texts) == whole.choices[0].message.content
    assert len([text for text in texts if text]) > 4
    without = list(client.chat.completions.create(stream=True, **options))
    assert [chunk.usage for chunk in without] == [None] * len(without)
    assert all(chunk.choices for chunk in without)


def test_the_helper_for_streams_makes_its_events(exact_client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "seed": 3, "max_completion_tokens": 60}
    options |= {"logprobs": True, "top_logprobs": 2}
    with exact_client.chat.completions.stream(**options) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    kinds = [event.type for event in events]
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta", "logprobs.content.done"} == {*kinds}
    done = next(event for event in events if event.type == "content.done")
    assert done.content == final.choices[0].message.content
    assert "".join(event.delta for event in events if event.type == "content.delta") == done.content
    whole = exact_client.chat.completions.create(**options)
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].logprobs is not None
    assert whole.choices[0].logprobs is not None
    assert final.choices[0].logprobs.content == whole.choices[0].logprobs.content


def test_requests_of_an_event_loop_are_served_side_by_side(served: Served) -> None:
    async def ask() -> list[str]:
        async with served.async_client() as client:
            options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_completion_tokens": 12}

            async def streamed() -> str:
                stream = await client.chat.completions.create(stream=True, **options)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            async def whole() -> str:
                return (await client.chat.completions.create(**options)).choices[0].message.content or ""

            return [*await asyncio.gather(streamed(), whole(), streamed(), whole(), streamed(), whole())]

    texts = asyncio.run(ask())
    assert len({*texts}) == 1
    assert texts[0]


@contextmanager
def served_here(
    on_access: Callable[[Access], None] = lambda access: None, **options: Any
) -> Iterator[tuple[Served, mn.LLM]]:
    """Serve a model from a thread of this process, so that a test sees the engine."""

    def load(source: Source) -> mn.LLM:
        raise AssertionError("the model is loaded")

    metrics = mn.Metrics()
    models = Models([Source(name=MODEL, path=mn.DEMO_PATH, size_bytes=1)], load, metrics, 1)
    llm = mn.LLM(mn.DEMO_PATH, n_ctx=16384, n_threads=1, gpu_layers=0)
    models.adopt(MODEL, llm)
    settings = Settings(keys=["key"], **options)
    listening = running.tcp_socket("127.0.0.1", 0)
    config = uvicorn.Config(
        create_app(models, metrics, settings, on_access),
        http=connection_class(settings),
        log_config=None,
        lifespan="on",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", "key", 0, [MODEL]), llm
    finally:
        server.should_exit = True
        thread.join(30)
        llm.close()
        assert not thread.is_alive()


@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "completion"])
def test_closing_a_stream_ends_the_request_and_frees_its_place(is_chat: bool) -> None:
    endless = {"ignore_eos": True}
    with served_here() as (server, llm), server.client() as client:
        if is_chat:
            stream: Any = client.chat.completions.create(
                model=MODEL, messages=HELLO, stream=True, max_completion_tokens=16000, extra_body=endless
            )
        else:
            stream = client.completions.create(
                model=MODEL, prompt="Once", stream=True, max_tokens=16000, extra_body=endless
            )
        for _ in range(4):
            next(stream)
        stream.close()
        # The one place is free once this has its turn.
        client.completions.create(model=MODEL, prompt="Twice", max_tokens=1)
        assert len(llm.queue) == 0
        assert llm.context.stats.tokens_evaluated < 8000


@pytest.mark.parametrize("log_content", [False, True])
def test_texts_are_logged_if_that_is_asked_for_of_streams_as_well(log_content: bool) -> None:
    seen: list[Access] = []
    with served_here(seen.append, log_content=log_content) as (served, _):
        options: dict[str, Any] = {"model": MODEL, "prompt": ["Once", "The end"], "temperature": 0, "max_tokens": 4}
        client = served.client()
        texts = [choice.text for choice in client.completions.create(**options).choices]
        for _ in client.completions.create(stream=True, **options):
            pass
    assert [access.facts.get("text") for access in seen] == [texts if log_content else None] * 2


def test_a_call_that_is_given_up_frees_its_place() -> None:
    with served_here() as (server, llm), server.client() as client:
        impatient = client.with_options(timeout=0.3)
        with pytest.raises(openai.APITimeoutError):
            impatient.completions.create(
                model=MODEL, prompt="Once", max_tokens=16000, extra_body={"ignore_eos": True, "temperature": 1.0}
            )
        client.completions.create(model=MODEL, prompt="Twice", max_tokens=1)
        assert llm.context.stats.tokens_evaluated < 16000


def test_n_makes_several_answers_and_a_seed_makes_them_again(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "temperature": 1.5, "max_completion_tokens": 12}
    answers = [client.chat.completions.create(n=3, seed=5, **options) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1]
    assert len({*texts[0]}) == 3
    assert [choice.index for choice in answers[0].choices] == [0, 1, 2]
    assert client.chat.completions.create(seed=6, **options).choices[0].message.content == texts[0][1]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(n=3, seed=5, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts[0]


def test_after_the_largest_seed_comes_the_first(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": asking("Tell me of a hat."), "max_completion_tokens": 12}
    answers = client.chat.completions.create(n=2, seed=2**64 - 1, **options).choices
    streamed = ["", ""]
    for chunk in client.chat.completions.create(n=2, seed=2**64 - 1, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [answer.message.content for answer in answers]
    assert client.chat.completions.create(seed=0, **options).choices[0].message.content == streamed[1]


def test_calls_without_a_text_are_shown_to_any_template(client: openai.OpenAI) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said: Any = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    said += [{"role": "tool", "tool_call_id": "a", "content": "It rains."}]
    assert client.chat.completions.create(model=MODEL, messages=said, max_tokens=2).choices[0].message.content


@pytest.mark.parametrize("stop", ["story", ["what", "story"], ["what", "xyz"], ["", "story"]])
def test_stop_strings_end_the_answer_before_them(client: openai.OpenAI, stop: str | list[str]) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_completion_tokens": 40}
    free = client.chat.completions.create(**options).choices[0].message.content or ""
    assert "a story? Just tell me what" in free
    first = min(free.index(text) for text in ([stop] if isinstance(stop, str) else stop) if text and text in free)
    stopped = client.chat.completions.create(stop=stop, **options).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (free[:first], "stop")
    chunks = list(client.chat.completions.create(stop=stop, stream=True, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == free[:first]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_log_probabilities_are_those_of_the_engine(exact_client: openai.OpenAI, llm: mn.LLM) -> None:
    messages = asking("Tell me of a red boat.")
    own = llm.chat_completion(messages, temperature=0, max_tokens=8, top_logprobs=4)
    answer = exact_client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_completion_tokens=8, logprobs=True, top_logprobs=4
    ).choices[0]
    assert answer.logprobs is not None
    assert own.logprobs is not None
    assert answer.logprobs.content is not None
    assert len(answer.logprobs.content) == len(own.logprobs) == 8
    for theirs, ours in zip(answer.logprobs.content, own.logprobs, strict=True):
        assert (theirs.token, bytes(theirs.bytes or ())) == (ours.text, ours.piece)
        assert theirs.logprob == pytest.approx(ours.logprob, abs=1e-4)
        assert [top.token for top in theirs.top_logprobs] == [top.text for top in ours.top]
        assert [top.logprob for top in theirs.top_logprobs] == pytest.approx(
            [top.logprob for top in ours.top], abs=1e-4
        )
    assert "".join(entry.token for entry in answer.logprobs.content) == answer.message.content


def test_a_bias_is_given_by_id_or_by_text(exact_client: openai.OpenAI, llm: mn.LLM) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_completion_tokens": 3}
    (token,) = llm.tokenizer.encode(" the", add_special=False)
    by_id = exact_client.chat.completions.create(logit_bias={str(token): 100}, **options)
    assert by_id.choices[0].message.content == " the the the"
    for bias in ({" the": 100}, [[token, 100]], [[" the", 100]]):
        answer = exact_client.chat.completions.create(extra_body={"logit_bias": bias}, **options)
        assert answer.choices[0].message.content == " the the the"
    banned = exact_client.chat.completions.create(extra_body={"logit_bias": {"Hello": False}}, **options)
    assert not (banned.choices[0].message.content or "").startswith("Hello")


def test_the_second_turn_is_found_in_the_cache(client: openai.OpenAI) -> None:
    messages = asking("Tell me of a grey whale.")
    first = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_completion_tokens=8)
    assert first.usage is not None
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *asking("And then?")]
    second = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_completion_tokens=1)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_an_older_limit_and_content_in_parts_are_taken(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Hello"}]
    messages: list[Any] = [{"role": "developer", "content": "Be terse."}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


def test_headers_of_a_reply_can_be_read(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_completion_tokens=1)
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].finish_reason == "length"
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=HELLO, max_completion_tokens=1
    ) as streamed:
        assert json.loads(streamed.read())["choices"][0]["finish_reason"] == "length"


# JSON


def test_an_answer_is_json_of_a_schema(client: openai.OpenAI) -> None:
    schema: Any = {"name": "weather", "strict": True, "schema": Weather.model_json_schema()}
    options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_completion_tokens": 60, "seed": 1}
    answer = client.chat.completions.create(response_format={"type": "json_schema", "json_schema": schema}, **options)
    Weather.model_validate_json(answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    parsed = client.chat.completions.parse(response_format=Weather, **options)
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    with client.chat.completions.stream(response_format=Weather, **options) as stream:
        events = list(stream)
    done = next(event for event in events if event.type == "content.done")
    assert isinstance(done.parsed, Weather)
    plain = client.chat.completions.create(response_format={"type": "text"}, **options)
    assert plain.choices[0].message.content


def test_an_answer_is_a_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        response_format={"type": "json_object"},
        seed=1,
        temperature=0.2,
        max_completion_tokens=200,
        logit_bias={"1": 0},
        extra_body={"logit_bias": {"}": 40, '"': 5}},
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_json_that_is_cut_off_is_an_error_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Weather, max_completion_tokens=3)


# Tools


def test_a_model_that_calls_no_tool_answers_in_words(thinker: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        answer = thinker.chat.completions.create(
            model=MODEL, messages=HELLO, tools=TOOLS, tool_choice=choice, temperature=0, **NO_THOUGHT
        ).choices[0]
        assert answer.message.tool_calls is None
        assert answer.message.content


@pytest.mark.parametrize("choice", ["required", "get_time"])
def test_a_tool_has_to_be_called(thinker: openai.OpenAI, choice: str) -> None:
    given: Any = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": TOOLS, "tool_choice": given, "seed": 2}
    answer = thinker.chat.completions.create(**options, **NO_THOUGHT).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert not answer.message.content
    assert answer.message.tool_calls is not None
    (call,) = answer.message.tool_calls
    assert call.type == "function"
    assert call.id
    assert call.function.name in (["get_weather", "get_time"] if choice == "required" else [choice])
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Paris", "Rome")

    with thinker.chat.completions.stream(**options, **NO_THOUGHT) as stream:
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls is not None
    assert final.message.tool_calls[0].function.name == call.function.name
    assert json.loads(final.message.tool_calls[0].function.arguments) == arguments
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(event.arguments_delta for event in deltas) == final.message.tool_calls[0].function.arguments
    assert len(deltas) > 3


def test_the_turn_with_the_result_of_a_tool_is_taken(thinker: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "tools": TOOLS, "seed": 2, **NO_THOUGHT}
    asked = thinker.chat.completions.create(messages=HELLO, tool_choice="required", **options).choices[0].message
    assert asked.tool_calls is not None
    result = {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": '{"degrees": 21}'}
    messages: list[Any] = [*HELLO, asked, result]
    answer = thinker.chat.completions.create(messages=messages, tool_choice="none", **options)
    assert answer.choices[0].finish_reason in ("stop", "length")
    prompt = thinker.post("/../apply-template", body={"messages": [*HELLO, asked.to_dict(), result]}, cast_to=object)
    assert asked.tool_calls[0].function.arguments in str(prompt).replace("\\", "")
    assert '{"degrees": 21}' in str(prompt)


def test_pydantic_describes_tools_and_reads_their_calls(thinker: openai.OpenAI) -> None:
    answer = thinker.chat.completions.parse(
        model=MODEL,
        messages=HELLO,
        tools=[openai.pydantic_function_tool(GetWeather)],
        tool_choice="required",
        seed=1,
        **NO_THOUGHT,
    ).choices[0]
    assert answer.message.tool_calls is not None
    assert isinstance(answer.message.tool_calls[0].function.parsed_arguments, GetWeather)


# Reasoning


def test_reasoning_is_apart_from_the_answer(thinker: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_completion_tokens": 40}
    options["extra_body"] = {"reasoning_budget": 3}
    answer = thinker.chat.completions.create(**options)
    message: Any = answer.choices[0].message
    assert message.reasoning_content
    assert message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 3
    chunks: list[Any] = list(thinker.chat.completions.create(stream=True, **options))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    reasoning = "".join(getattr(delta, "reasoning_content", "") or "" for delta in deltas)
    assert reasoning == message.reasoning_content
    assert "".join(delta.content or "" for delta in deltas) == message.content
    without: Any = thinker.chat.completions.create(**options, reasoning_effort="none").choices[0].message
    assert getattr(without, "reasoning_content", None) is None
    options["extra_body"] = {"reasoning_budget": -1, "reasoning_format": "none"}
    raw: Any = thinker.chat.completions.create(**options).choices[0].message
    assert getattr(raw, "reasoning_content", None) is None


def test_an_effort_turns_reasoning_on_or_off(llm: mn.LLM) -> None:
    for effort, is_on in (("none", False), ("low", True)):
        variables = of_chat(ChatBody(messages=HELLO, reasoning_effort=effort), {}, llm)["chat_template_kwargs"]
        assert variables == {"reasoning_effort": effort, "enable_thinking": is_on}


# Completions


def test_a_completion_is_that_of_the_engine(exact_client: openai.OpenAI, llm: mn.LLM) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0}
    own = llm.complete("Once upon a time", temperature=0, max_tokens=16)
    answer = exact_client.completions.create(**options)  # 16 tokens are the default
    assert (answer.object, answer.choices[0].text) == ("text_completion", own.text)
    assert answer.choices[0].finish_reason == "length"
    streamed = list(exact_client.completions.create(stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in streamed) == own.text
    assert streamed[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_an_echo_has_the_log_probabilities_of_the_prompt(
    exact_client: openai.OpenAI, llm: mn.LLM, max_tokens: int
) -> None:
    prompt = "Once upon a time, a little bear"
    own = llm.complete(prompt, temperature=0, max_tokens=max_tokens, echo=True, top_logprobs=2)
    assert own.logprobs is not None
    options: dict[str, Any] = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": max_tokens}
    answer = exact_client.completions.create(echo=True, logprobs=2, **options)
    assert answer.choices[0].text == own.text
    streamed = list(exact_client.completions.create(echo=True, logprobs=2, stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in streamed) == own.text
    parts = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs is not None]
    for shown in ([answer.choices[0].logprobs], parts):
        tokens = [token for part in shown if part is not None for token in part.tokens or ()]
        values = [value for part in shown if part is not None for value in part.token_logprobs or ()]
        offsets = [offset for part in shown if part is not None for offset in part.text_offset or ()]
        tops = [top for part in shown if part is not None for top in part.top_logprobs or ()]
        assert tokens == [entry.text for entry in own.logprobs]
        assert values[0] is None
        assert values[1:] == pytest.approx([entry.logprob for entry in own.logprobs[1:]], abs=1e-3)
        assert [list(top or ()) for top in tops] == [[one.text for one in entry.top] for entry in own.logprobs]
        for token, offset in zip(tokens[1:], offsets[1:], strict=True):  # the first one is the BOS token
            assert own.text[offset:].startswith(token)


def test_prompts_are_texts_or_ids_and_several_in_a_list(exact_client: openai.OpenAI, llm: mn.LLM) -> None:
    texts = ["Once upon a time", "The end of"]
    ids = [llm.tokenizer.encode(text) for text in texts]
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 5}
    own = [llm.complete(text, temperature=0, max_tokens=5).text for text in texts]
    assert exact_client.completions.create(prompt=ids[0], **options).choices[0].text == own[0]
    for prompts in (texts, ids):
        answer = exact_client.completions.create(prompt=prompts, n=2, **options)
        assert [choice.text for choice in answer.choices] == [own[0], own[0], own[1], own[1]]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 20
    streamed = ["", ""]
    for chunk in exact_client.completions.create(prompt=texts, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == own


def test_the_best_of_several_is_returned(exact_client: openai.OpenAI, llm: mn.LLM) -> None:
    options: dict[str, Any] = {"prompt": "Once", "temperature": 1.5, "seed": 4, "max_tokens": 6}
    best = exact_client.completions.create(model=MODEL, best_of=4, logprobs=0, **options).choices[0]
    every = exact_client.completions.create(model=MODEL, n=4, logprobs=0, **options).choices
    assert len(every) == 4

    def mean(choice: Any) -> float:
        return math.fsum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    assert best.text == max(every, key=mean).text


# Errors


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 3}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_completion_tokens": "many"}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [*HELLO, {"role": "assistant", "content": ""}]}, "continue_final_message"),
        ({"messages": [{"content": "Hello"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stop": [1]}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "sound"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"grammar": "root ::= ("}, "grammar"),
    ],
)
def test_a_wrong_field_is_named(client: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 1, **change}
    for is_streamed in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/chat/completions", body={**body, "stream": is_streamed}, cast_to=object)
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"
        assert param in caught.value.message


def test_what_cannot_be_counted_is_said(client: openai.OpenAI) -> None:
    body = {"model": MODEL, "messages": [*HELLO, {"role": "assistant", "content": ""}]}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions/input_tokens", body=body, cast_to=object)
    assert caught.value.param == "continue_final_message"


def test_what_is_not_supported_is_said(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="Once", suffix="end")
    assert caught.value.param == "suffix"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="Once", best_of=3, stream=True)
    assert caught.value.param == "best_of"


def test_a_prompt_that_does_not_fit_says_so(client: openai.OpenAI) -> None:
    for is_streamed in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=asking("a b " * 2000), stream=is_streamed)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, prompt="a b " * 2000, stream=is_streamed)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="a b " * 2000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")


def test_a_wrong_key_is_an_authentication_error(served: Served) -> None:
    with served.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_embeddings_are_refused_at_once(served: Served) -> None:
    tries: list[object] = []
    with served.client(max_retries=3) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.embeddings.create(model=MODEL, input="Hello")
        tries.append(caught.value.request.headers.get("x-stainless-retry-count"))
    assert caught.value.status_code == 501
    assert tries == ["0"]


def test_no_more_finished_requests_are_kept_than_may_be_served_at_once() -> None:
    with serve("-np", "9", "-c", "4096") as served, served.client() as client:

        def cached(number: int) -> int:
            prompt: Any = [300 + number, *range(400, 430)]
            usage = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2).usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            return usage.prompt_tokens_details.cached_tokens or 0

        assert [cached(number) for number in range(10)] == [0] * 10
        assert cached(0) == 0
        assert cached(9) > 0
