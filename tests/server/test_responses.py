"""`/v1/responses` as OpenAI's own client uses it."""

import json
from typing import Any, Literal

import openai
import pydantic
import pytest

import minerva_native as mn
from minerva_native.server.bodies import ResponseBody
from minerva_native.server.responses import ResponseEvents, response_of

MODEL = "minerva-demo"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 40}
NO_THOUGHT: dict[str, Any] = {"reasoning": {"effort": "none"}}


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    degrees: Literal[7, 21]


TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Look.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def test_a_response_is_the_answer_of_a_chat(client: openai.OpenAI) -> None:
    said: list[Any] = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(model=MODEL, messages=said, temperature=0, max_completion_tokens=40)
    response = client.responses.create(instructions="Be terse.", input="Hello", **GREEDY)
    assert response.output_text == chat.choices[0].message.content
    assert (response.object, response.status, response.model) == ("response", "completed", MODEL)
    assert response.id.startswith("resp_")
    (item,) = response.output
    assert item.type == "message"
    assert item.id.startswith("msg_")
    assert (response.temperature, response.instructions, response.error) == (0, "Be terse.", None)
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    items: list[Any] = [
        {"role": "developer", "content": "Be terse."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
    ]
    assert client.responses.create(input=items, **GREEDY).output_text == response.output_text


def test_the_output_can_be_sent_back_as_input(client: openai.OpenAI) -> None:
    first = client.responses.create(input="Hello", **GREEDY)
    items: list[Any] = [{"role": "user", "content": "Hello"}, *first.output, {"role": "user", "content": "And then?"}]
    second = client.responses.create(input=items, **GREEDY)
    messages: list[Any] = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And then?"},
    ]
    chat = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_completion_tokens=40)
    assert second.output_text == chat.choices[0].message.content
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens


def test_the_events_of_a_stream_come_in_order(client: openai.OpenAI) -> None:
    whole = client.responses.create(input="Hello", **GREEDY)
    events: list[Any] = list(client.responses.create(input="Hello", stream=True, **GREEDY))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    n_deltas = kinds.count("response.output_text.delta")
    assert n_deltas > 4
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * n_deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final = events[-1].response
    assert text == events[-4].text == events[-3].part.text == final.output_text == whole.output_text
    ids = {event.item_id for event in events if hasattr(event, "item_id")}
    assert ids == {events[2].item.id, events[-2].item.id} == {final.output[0].id}
    assert {event.response.id for event in events if hasattr(event, "response")} == {final.id}
    assert events[0].response.status == "in_progress"
    assert final.usage.output_tokens == whole.usage.output_tokens if whole.usage else False


def test_the_helper_for_streams_makes_the_response(client: openai.OpenAI) -> None:
    with client.responses.stream(input="Hello", **GREEDY) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(texts) == final.output_text
    with client.responses.stream(input="Hello", text_format=Weather, model=MODEL, max_output_tokens=60) as parsing:
        parsing.until_done()
        assert isinstance(parsing.get_final_response().output_parsed, Weather)


def test_an_answer_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {**GREEDY, "max_output_tokens": 2}
    response = client.responses.create(input="Hello", **options)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    *_, last = client.responses.create(input="Hello", stream=True, **options)
    assert last.type == "response.incomplete"
    assert last.response.status == "incomplete"


def test_an_answer_is_json_of_a_schema(client: openai.OpenAI) -> None:
    schema = Weather.model_json_schema()
    response = client.responses.create(
        model=MODEL,
        input="Hello",
        text={"format": {"type": "json_schema", "name": "weather", "schema": schema, "strict": True}},
    )
    Weather.model_validate_json(response.output_text)
    parsed = client.responses.parse(model=MODEL, input="Hello", text_format=Weather)
    assert isinstance(parsed.output_parsed, Weather)


def test_log_probabilities_are_those_of_a_chat(exact_client: openai.OpenAI) -> None:
    options: dict[str, Any] = {**GREEDY, "max_output_tokens": 4}
    include: Any = ["message.output_text.logprobs"]
    response: Any = exact_client.responses.create(input="Hello", include=include, top_logprobs=2, **options)
    shown = response.output[0].content[0].logprobs
    messages: list[Any] = [{"role": "user", "content": "Hello"}]
    chat: Any = exact_client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_completion_tokens=4, logprobs=True, top_logprobs=2
    )
    wanted = chat.choices[0].logprobs.content
    assert [one.token for one in shown] == [one.token for one in wanted]
    assert [one.logprob for one in shown] == [one.logprob for one in wanted]
    assert all(len(one.top_logprobs) == 2 for one in shown)
    stream = exact_client.responses.create(input="Hello", include=include, top_logprobs=2, stream=True, **options)
    events: list[Any] = [event for event in stream if event.type == "response.output_text.delta"]
    assert [one.token for event in events for one in event.logprobs] == [one.token for one in wanted]


def test_pieces_of_characters_have_their_log_probabilities(client: openai.OpenAI) -> None:
    shape: Any = {"format": {"type": "json_schema", "name": "word", "schema": {"enum": ["日本"]}}}
    options: dict[str, Any] = {**GREEDY, "input": "Hello", "text": shape, "top_logprobs": 1}
    shown: Any = client.responses.create(**options).output[0]
    wanted = [one.bytes for one in shown.content[0].logprobs]
    assert b"".join(map(bytes, wanted)).decode() == '"日本"'
    events: list[Any] = list(client.responses.create(stream=True, **options))
    for kind in ("response.output_text.delta", "response.output_text.done"):
        assert [one.bytes for event in events if event.type == kind for one in event.logprobs] == wanted


PIECES: list[tuple[bytes, str, str]] = [  # a token, and what it adds to the reasoning and to the text
    (b"<think>", "", ""),
    (b"Hm", "Hm", ""),
    (b".", ".", ""),
    (b"</think>", "", ""),
    (b"\n\n", "", ""),
    (b"\xc3", "", ""),
    (b"\xa9t", "", "ét"),
    (b"\xc3", "", ""),
    (b"\xa9.", "", "é."),
    (b"<|im_end|>", "", ""),
]


def test_log_probabilities_are_those_of_the_text_whole_and_in_pieces() -> None:
    body = ResponseBody(input="Hello", top_logprobs=0, include=["message.output_text.logprobs"])
    entries = [mn.TokenLogprob(at, piece, -1.0) for at, (piece, _, _) in enumerate(PIECES)]
    completion = mn.Completion(text="été.", reasoning="Hm.", logprobs=entries, is_chat=True, finish_reason="end")
    item = response_of(body, MODEL, completion, {})["output"][-1]
    writer = ResponseEvents(body, MODEL, {})
    streamed: list[Any] = []
    for entry, (_, reasoning, text) in zip(entries, PIECES, strict=True):
        events = writer.of(mn.Chunk(text, entry.token, -1.0, token_logprob=entry, reasoning=reasoning))
        pieces = [json.loads(line.removeprefix("data: ")) for line in events.decode().split("\n") if "data: " in line]
        streamed += [
            one for piece in pieces if piece["type"].endswith("text.delta") for one in piece.get("logprobs", ())
        ]
    assert item["content"][0]["logprobs"] == streamed
    assert [bytes(one["bytes"]) for one in streamed] == [piece for piece, _, _ in PIECES[5:9]]


def test_a_tool_is_called_and_its_result_taken(thinker: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "tools": [TOOL], "max_output_tokens": 60, **NO_THOUGHT}
    options |= {"parallel_tool_calls": False, "temperature": 0}
    response = thinker.responses.create(input="Hello", tool_choice="required", **options)
    (call,) = response.output
    assert call.type == "function_call"
    assert (call.name, call.status) == ("get_weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")

    named: Any = {"type": "function", "name": "get_weather"}
    events: list[Any] = list(thinker.responses.create(input="Hello", tool_choice=named, stream=True, **options))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert "".join(deltas) == done.arguments == events[-1].response.output[0].arguments == call.arguments
    added = next(event for event in events if event.type == "response.output_item.added")
    assert (added.item.type, added.item.name, added.item.arguments) == ("function_call", "get_weather", "")

    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"degrees": 21}'}
    items: list[Any] = [{"role": "user", "content": "Hello"}, *response.output, result]
    answer = thinker.responses.create(input=items, tool_choice="none", **options)
    assert [item.type for item in answer.output] == ["message"]
    assert response.usage is not None
    assert answer.usage is not None
    assert answer.usage.input_tokens > response.usage.output_tokens


@pytest.mark.parametrize("limit", [8, 60])
def test_reasoning_is_an_item(thinker: openai.OpenAI, limit: int) -> None:
    options: dict[str, Any] = {"model": MODEL, "input": "Hello", "temperature": 0, "max_output_tokens": limit}
    response: Any = thinker.responses.create(**options)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    reasoning = response.output[0]
    assert reasoning.content[0].text
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    events: list[Any] = list(thinker.responses.create(stream=True, **options))
    streamed = events[-1].response
    assert [item.type for item in streamed.output] == ["reasoning", "message"]
    assert streamed.output[0].content[0].text == reasoning.content[0].text
    assert streamed.output_text == response.output_text
    assert streamed.status == response.status
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == reasoning.content[0].text
    items: list[Any] = [{"role": "user", "content": "Hello"}, *response.output, {"role": "user", "content": "Why?"}]
    assert thinker.responses.create(model=MODEL, input=items, max_output_tokens=1).usage is not None


def test_tokens_of_an_input_are_counted(client: openai.OpenAI) -> None:
    counted = client.responses.input_tokens.count(model=MODEL, input="Hello", instructions="Be terse.")
    response = client.responses.create(instructions="Be terse.", input="Hello", **GREEDY)
    assert response.usage is not None
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", response.usage.input_tokens)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"content": "Hello"}]}, "input"),
        ({"input": [{"type": "reasoning", "content": []}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"text": {"format": {"type": "sound"}}}, "text"),
    ],
)
def test_a_wrong_field_is_named(client: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": MODEL, "input": "Hello", "max_output_tokens": 1, **change})
    assert caught.value.param == param
    assert param in caught.value.message


def test_what_is_stored_nowhere_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
