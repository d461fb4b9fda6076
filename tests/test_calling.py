"""Calls of tools in chats: what is allowed, parsed while it streams, run, and given back to the model.

Where a test needs a certain answer, a sampler dictates its tokens. Everything else is real.
"""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest

import minerva_native as mn
from minerva_native import draft
from minerva_native.sequence import Tokens
from minerva_native.tools import ToolFormat

QWEN = "Qwen-Qwen2.5-7B-Instruct.jinja"


def get_weather(city: Literal["Paris", "Rome"], unit: Literal["C", "F"] = "C") -> dict[str, object]:
    """Return the weather of a city.

    Args:
        city: where.
        unit: of the temperature.
    """
    return {"city": city, "degrees": 21, "unit": unit}


def add(a: int, b: int) -> int:
    """Return the sum of two numbers."""
    if a == 13:
        raise ValueError("13 brings bad luck")
    return a + b


TOOLS = [get_weather, add]


@pytest.fixture
def llm(demo: mn.Model, llama_cpp_source: Path) -> Iterator[mn.LLM]:
    template = (llama_cpp_source / "models" / "templates" / QWEN).read_text(encoding="utf-8")
    with mn.LLM(demo, n_ctx=4096, n_threads=1, template=template) as llm:
        yield llm


@pytest.fixture
def dictate(llm: mn.LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that dictates the next answers."""

    def start(*texts: str) -> None:
        answers, end = iter(texts), llm.tokenizer.eot

        class Dictate:
            def __init__(self, *_: object, **__: object):
                self._ids = iter([*llm.tokenizer.encode(next(answers), add_special=False, parse_special=True), end])

            def __call__(self, logits: npt.NDArray[np.float32], tokens: Tokens) -> int:
                token = next(self._ids)
                assert token is not None
                assert logits[token] > -np.inf, llm.tokenizer.piece(token)
                return token

        monkeypatch.setattr(draft, "Sampler", Dictate)
        # What is dictated may be what a grammar would force or forbid.
        monkeypatch.setattr(draft.Draft, "_guided", lambda *_: None)

    return start


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


# What is allowed


def choose(answer: Literal["yes", "no"]) -> str:
    """Answer a question."""
    return answer


@pytest.mark.parametrize("seed", range(4))
def test_a_call_that_is_required_is_one_of_a_tool_with_valid_arguments(llm: mn.LLM, seed: int) -> None:
    with llm.chat(tools=[get_weather, choose], temperature=1.0, seed=seed, max_tokens=600) as chat:
        answer = chat.send("Hello", tool_choice="required", parallel_tool_calls=False)
        assert answer.finish_reason == "end"
        assert (answer.text, answer.tool_error) == ("", "")
        (made,) = answer.tool_calls
        parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in chat.tools}
        jsonschema.validate(made.arguments, parameters[made.name])
        assert answer.usage.forced_tokens > 3
    named = llm.chat_completion(
        [{"role": "user", "content": "Hello"}],
        tools=[get_weather, choose],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        parallel_tool_calls=False,
        temperature=1.0,
        seed=seed,
        max_tokens=600,
    )
    assert {made.name for made in named.tool_calls} == {"get_weather"}
    assert named.to_dict()["choices"][0]["finish_reason"] == "tool_calls"


def test_arguments_are_an_object_whatever_the_schema_leaves_open(llm: mn.LLM) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    with llm.chat(tools=[tool], temperature=1.0, parallel_tool_calls=False, max_tokens=300) as chat:
        answers = [chat.send("Hello", tool_choice="required", seed=seed) for seed in range(3)]
    assert all(isinstance(made.arguments, dict) for answer in answers for made in answer.tool_calls)
    assert not any("no JSON object" in answer.tool_error for answer in answers)


def test_without_a_choice_of_tools_the_model_does_not_see_them(llm: mn.LLM, dictate: Callable[..., None]) -> None:
    dictate("Hello.", call("add", a=1, b=2))
    shown = llm.chat(tools=TOOLS).send("Hello")
    hidden = llm.chat(tools=TOOLS).send("Hello", tool_choice="none")
    assert hidden.usage.prompt_tokens < shown.usage.prompt_tokens - 200
    assert hidden.tool_calls == ()
    assert "add" in hidden.text


def test_a_template_that_shows_no_tools_is_warned_of_once(demo: mn.Model, caplog: pytest.LogCaptureFixture) -> None:
    with mn.LLM(demo, n_ctx=512, n_threads=1) as llm:
        for _ in range(2):
            llm.chat(tools=TOOLS).send("Hello", max_tokens=1)
    assert [record.message for record in caplog.records].count(
        "the chat template does not show tools to the model"
    ) == 1


def test_wrong_arguments_are_named(llm: mn.LLM) -> None:
    chat = llm.chat(tools=TOOLS)
    with pytest.raises(ValueError, match="no tool of that name"):
        chat.send("Hello", tool_choice="subtract")
    with pytest.raises(TypeError, match="tool_choice must be"):
        chat.send("Hello", tool_choice=7)
    with pytest.raises(TypeError, match="parallel_tool_calls must be True or False"):
        chat.send("Hello", parallel_tool_calls="no")
    with pytest.raises(TypeError, match="response_format or a constraint and call tools"):
        chat.send("Hello", response_format={"type": "object"})
    with pytest.raises(ValueError, match="two tools are called 'add'"):
        llm.chat(tools=[add, add])
    with pytest.raises(ValueError, match="no tool of that name"):
        llm.chat().send("Hello", tool_choice="add")
    with pytest.raises(ValueError, match="there are no tools"):
        llm.chat().send("Hello", tool_choice="required")
    assert isinstance(
        chat.send("Hello", response_format={"type": "object"}, tool_choice="none", max_tokens=3).text, str
    )


# What is parsed


def test_calls_are_parsed_while_they_stream(llm: mn.LLM, dictate: Callable[..., None]) -> None:
    text = f"Let me see.\n{call('add', a=2, b=3)}\n{call('get_weather', city='Rome')}"
    dictate(text)
    chat = llm.chat(tools=TOOLS)
    chunks = list(chat.stream("Hello"))
    assert "".join(chunk.text for chunk in chunks) == "Let me see."
    made = [one for chunk in chunks for one in chunk.tool_calls]
    assert [(one.name, one.arguments) for one in made] == [("add", {"a": 2, "b": 3}), ("get_weather", {"city": "Rome"})]
    pieces = [delta for chunk in chunks for delta in chunk.tool_call_deltas]
    for index, one in enumerate(made):
        own = [delta for delta in pieces if delta.index == index]
        assert (own[0].id, own[0].name) == (one.id, one.name)
        assert "".join(delta.arguments for delta in own) == one.text
    first = next(at for at, chunk in enumerate(chunks) if chunk.tool_call_deltas)
    assert not any(chunk.tool_calls for chunk in chunks[: first + 3])  # pieces come long before the call is complete
    assert chat.messages[-1]["tool_calls"] == [one.to_dict() for one in made]
    assert chat.messages[-1]["content"] == "Let me see."


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1,, "b": 2}}\n</tool_call>', "expected"),
        (call("subtract", a=1), "there is no tool 'subtract'"),
        ("<tool_call>nonsense</tool_call>", "expected"),
    ],
)
def test_a_malformed_call_is_text_with_an_error(
    llm: mn.LLM, dictate: Callable[..., None], text: str, error: str
) -> None:
    dictate(text, text)
    answer = llm.chat(tools=TOOLS).send("Hello")
    assert (answer.tool_calls, answer.finish_reason) == ((), "end")
    assert answer.text == text
    assert error in answer.tool_error
    chunks = list(llm.chat(tools=TOOLS).stream("Hello"))
    assert any(error in chunk.tool_error for chunk in chunks)


def test_a_call_that_is_cut_off_is_none(llm: mn.LLM, dictate: Callable[..., None]) -> None:
    dictate(call("add", a=2, b=3))
    answer = llm.chat(tools=TOOLS).send("Hello", max_tokens=20)
    assert (answer.finish_reason, answer.tool_calls, answer.text) == ("length", (), "")
    assert "cut off" in answer.tool_error


def test_calls_come_after_the_reasoning(llm: mn.LLM, dictate: Callable[..., None]) -> None:
    dictate(f"<think>I need {call('add', a=1, b=1)}.</think>{call('add', a=2, b=2)}")
    answer = llm.chat(tools=TOOLS, thinking_tags=("<think>", "</think>")).send("Hello")
    assert "I need <tool_call>" in answer.reasoning
    assert [one.arguments for one in answer.tool_calls] == [{"a": 2, "b": 2}]
    assert answer.usage.reasoning_tokens > 10


# What goes back


def test_the_model_goes_on_when_every_call_has_its_result(llm: mn.LLM, dictate: Callable[..., None]) -> None:
    dictate(call("add", a=2, b=3) + call("get_weather", city="Rome"), "It is warm.")
    chat = llm.chat(tools=TOOLS)
    first, second = chat.send("Hello").tool_calls
    with pytest.raises(ValueError, match="no call 'other'"):
        chat.send_tool_result("other", 1)
    assert chat.send_tool_result(second, {"degrees": 21}) is None
    with pytest.raises(ValueError, match="has its result already"):
        chat.send_tool_result(second, 1)
    answer = chat.send_tool_result(first.id, 5)
    assert answer is not None
    assert answer.text == "It is warm."
    roles = [message["role"] for message in chat.messages]
    assert roles == ["user", "assistant", "tool", "tool", "assistant"]
    assert [message["content"] for message in chat.messages[2:4]] == ['{"degrees": 21}', "5"]
    assert [message["tool_call_id"] for message in chat.messages[2:4]] == [second.id, first.id]
    assert len(chat.undo()) == 5
    assert chat.messages == []


def test_a_result_whose_turn_fails_can_be_given_again(llm: mn.LLM, dictate: Callable[..., None]) -> None:
    dictate(call("add", a=2, b=3), "Five.")
    chat = llm.chat(tools=TOOLS)
    (made,) = chat.send("Hello").tool_calls
    with pytest.raises(TypeError, match="no argument"):
        chat.send_tool_result(made, 5, max_tokns=3)
    assert chat.send_tool_result(made, 5).text == "Five."  # type: ignore[union-attr]


def test_run_calls_functions_until_there_is_an_answer(llm: mn.LLM, dictate: Callable[..., None]) -> None:
    dictate(call("add", a=2, b=3), call("add", a=13, b=1) + call("add", a="x", b=1), "Done.")
    chat = llm.chat(tools=TOOLS)
    answer = chat.run("Hello")
    assert answer.text == "Done."
    results = [message["content"] for message in chat.messages if message["role"] == "tool"]
    assert results[:2] == ["5", "error: ValueError: 13 brings bad luck"]
    assert results[2].startswith("error: ValueError: a must be integer")


def test_run_has_a_bound(llm: mn.LLM, dictate: Callable[..., None]) -> None:
    dictate(*[call("add", a=1, b=1)] * 3, "Enough.")
    chat = llm.chat()
    answer = chat.run("Hello", tools=TOOLS, max_rounds=3)
    assert answer.text == "Enough."
    assert sum(message["role"] == "tool" for message in chat.messages) == 3
    with pytest.raises(ValueError, match="max_rounds"):
        chat.run("Hello", max_rounds=0)


def test_a_tool_without_a_function_cannot_be_run(llm: mn.LLM, dictate: Callable[..., None]) -> None:
    dictate(call("add", a=1, b=1))
    chat = llm.chat(tools=[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}])
    with pytest.raises(TypeError, match="'add' has no function"):
        chat.run("Hello")
    assert len(chat.messages) == 2  # the call stands; send_tool_result can answer it


def test_arun_awaits_coroutines_and_runs_other_functions_in_threads(llm: mn.LLM, dictate: Callable[..., None]) -> None:
    threads = []

    async def slow(x: int) -> str:
        """Wait."""
        await asyncio.sleep(0)
        return f"slow {x}"

    def quick(x: int) -> int:
        """Do not wait."""
        threads.append(threading.current_thread())
        return x

    dictate(call("slow", x=1) + call("quick", x=2), "Done.", call("slow", x=1))
    chat = llm.chat(tools=[slow, quick])
    assert asyncio.run(chat.arun("Hello")).text == "Done."
    assert [message["content"] for message in chat.messages if message["role"] == "tool"] == ["slow 1", "2"]
    assert threads[0] is not threading.main_thread()
    with pytest.raises(TypeError, match="use arun"):
        chat.run("Hello")


def test_a_chat_with_calls_is_saved_and_forked(llm: mn.LLM, dictate: Callable[..., None], tmp_path: Path) -> None:
    dictate(call("add", a=2, b=3), "Five.", "Five!")
    chat = llm.chat(tools=TOOLS)
    (made,) = chat.send("Hello").tool_calls
    fork = chat.fork()
    assert chat.send_tool_result(made, 5).text == "Five."  # type: ignore[union-attr]
    assert fork.send_tool_result(made, 5).text == "Five!"  # type: ignore[union-attr]
    chat.save(tmp_path / "chat.json")
    loaded = llm.load_chat(tmp_path / "chat.json")
    assert (loaded.messages, loaded.tools) == (chat.messages, chat.tools)


# Templates


def test_a_required_call_comes_in_the_format_of_every_upstream_template(demo: mn.Model, llama_cpp_source: Path) -> None:
    formats = set()
    with mn.LLM(demo, n_ctx=8192, n_threads=1) as llm:
        for path in sorted((llama_cpp_source / "models" / "templates").glob("*.jinja")):
            template = mn.ChatTemplate(path.read_text(encoding="utf-8"))
            tool_format = ToolFormat.of(template.text).name
            if tool_format in ("gpt-oss", "kimi-k3"):
                continue  # nothing makes the built-in model end its reasoning, which the template does not name
            budget = {"reasoning_budget": 8} if template.thinking_tags else {}
            options: dict[str, Any] = {"temperature": 1.0, "seed": 0, "max_tokens": 400, "parallel_tool_calls": False}
            options["chat_template_kwargs"] = {"functions": "", "datetime": "now"}
            with llm.chat(template=template, tools=[get_weather, choose], **options) as chat:
                try:
                    answer = chat.send("Hello", tool_choice="required", **budget)
                except mn.TemplateError:
                    continue  # it wants other tools
            assert [made.name in ("get_weather", "choose") for made in answer.tool_calls] == [True], path.name
            assert (answer.text, answer.tool_error, answer.finish_reason) == ("", "", "end"), path.name
            formats.add(tool_format)
    assert len(formats) >= 12


def test_every_upstream_template_gets_arguments_as_it_wants_them(llama_cpp_source: Path) -> None:
    """No template writes the arguments of a call as a string in quotes, or as Python would."""
    function = {"name": "add", "arguments": '{"number": 2, "text": "say \\"hi\\""}'}
    tool = {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "123456789", "type": "function", "function": function}],
        },
    ]
    seen = []
    for path in sorted((llama_cpp_source / "models" / "templates").glob("*.jinja")):
        template = mn.ChatTemplate(path.read_text(encoding="utf-8"))
        try:
            said = template.with_arguments(messages)
            text = template.render(said, [{"type": "function", "function": tool}], functions="", datetime="now")
        except mn.TemplateError:
            continue  # it has no calls, or wants other messages
        if "number" not in text:
            continue
        assert '\\"number' not in text, path.name
        assert "'number'" not in text, path.name
        assert list(said[1]) == list(messages[1])
        seen.append(path.name)
    assert len(seen) > 35
