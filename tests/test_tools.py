"""Tools: schemas of functions, calls in every format however their text is cut, and grammars for them."""

import dataclasses
import enum
import json
import random
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minerva_native.tools import FORMATS, CallError, ParsedPiece, Tool, ToolCall, ToolFormat, read_tools

FORMAT = {each.name: each for each in FORMATS}


class Unit(enum.Enum):
    CELSIUS = "celsius"
    FAHRENHEIT = "fahrenheit"


@dataclass
class Place:
    """A place.

    Attributes:
        name: what it is called.
        floors: which of its floors.
    """

    name: str
    floors: list[int] = dataclasses.field(default_factory=list)


class Person(TypedDict):
    name: str
    age: NotRequired[int]


def get_weather(city: str, unit: Literal["c", "f"] = "c", days: int | None = None) -> str:
    """Return the weather of a city.

    It is not very good at it.

    Args:
        city: the name of the city,
            in English.
        unit: of the temperature.

    Returns:
        A sentence.
    """
    return f"{city}: 20 {unit}, {days}"


def add(x: float, y: float) -> float:
    """Add two numbers."""
    return x + y


def now() -> str:
    """Return the time."""
    return "12:00"


def book(where: Place, tags: list[str], confirmed: bool = False) -> dict[str, object]:
    """Book a place."""
    return {"where": where, "tags": tags, "confirmed": confirmed}


TOOLS = read_tools([get_weather, add, now, book])
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("get_weather", {"city": 'Zürich "0" </x> 🌸', "unit": "c", "days": 3}),
    ("add", {"x": 1.5, "y": -2}),
    ("now", {}),
    ("book", {"where": {"name": "a\\b", "floors": [1, 2]}, "tags": ["x", "y, z"], "confirmed": True}),
]
LISTS = [each.name for each in FORMATS if each.name != "gpt-oss" and each.syntax.is_list]
all_formats = pytest.mark.parametrize("name", FORMAT)


class Result:
    """What a parser gave back in total."""

    def __init__(self, pieces: Iterable[ParsedPiece]):
        self.content = self.reasoning = ""
        self.calls: list[ToolCall] = []
        self.errors: list[CallError] = []
        self.streamed: dict[int, tuple[str, str, str]] = {}
        for piece in pieces:
            self.content += piece.content
            self.reasoning += piece.reasoning
            self.calls += piece.calls
            self.errors += piece.errors
            for delta in piece.deltas:
                call_id, name, arguments = self.streamed.get(delta.index, (delta.id or "", delta.name or "", ""))
                self.streamed[delta.index] = (call_id, name, arguments + delta.arguments)

    @property
    def names(self) -> list[tuple[str, dict[str, Any]]]:
        return [(call.name, call.arguments) for call in self.calls]

    @property
    def everything(self) -> object:
        """All but the ids of calls, which are made up."""
        calls = [(call.index, call.name, call.arguments, call.text) for call in self.calls]
        streamed = {index: parts[1:] for index, parts in self.streamed.items()}
        return self.content, self.reasoning, calls, self.errors, streamed


def parse(name: str, pieces: Iterable[str], *, prompt: str = "", tools: tuple[Tool, ...] | None = TOOLS) -> Result:
    parser = FORMAT[name].parser(tools, prompt=prompt)
    return Result([*map(parser.feed, pieces), parser.flush()])


# Schemas


def test_a_function_becomes_a_schema() -> None:
    assert TOOLS[0].to_dict() == {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Return the weather of a city.\n\nIt is not very good at it.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "the name of the city, in English."},
                    "unit": {"enum": ["c", "f"], "default": "c", "description": "of the temperature."},
                    "days": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
                },
                "required": ["city"],
            },
        },
    }


def test_the_types_of_python_have_schemas() -> None:
    def tool(
        unit: Unit,
        place: Place,
        person: Person,
        pair: tuple[int, str],
        many: tuple[float, ...],
        names: set[str],
        table: dict[str, list[int]],
        either: int | str,
        any: Any,
        noted: Annotated[int, "how many"],
        plain: list,  # type: ignore[type-arg]
    ) -> None: ...

    schema = read_tools([tool])[0].parameters
    assert schema["properties"] == {
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "place": {"$ref": "#/$defs/Place"},
        "person": {"$ref": "#/$defs/Person"},
        "pair": {
            "type": "array",
            "prefixItems": [{"type": "integer"}, {"type": "string"}],
            "items": False,
            "minItems": 2,
        },
        "many": {"type": "array", "items": {"type": "number"}},
        "names": {"type": "array", "items": {"type": "string"}},
        "table": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "integer"}}},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "any": {},
        "noted": {"type": "integer", "description": "how many"},
        "plain": {"type": "array"},
    }
    assert schema["$defs"] == {
        "Place": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "description": "what it is called."},
                "floors": {"type": "array", "items": {"type": "integer"}, "description": "which of its floors."},
            },
            "required": ["name"],
            "additionalProperties": False,
        },
        "Person": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name"],
            "additionalProperties": False,
        },
    }


def test_openai_dicts_and_tools_are_taken_as_they_are() -> None:
    tool = TOOLS[1].to_dict()
    assert read_tools([tool])[0].to_dict() == tool
    assert read_tools([tool["function"]])[0].to_dict() == tool
    assert read_tools(TOOLS) == TOOLS
    assert read_tools([{"name": "f"}])[0].parameters == {"type": "object", "properties": {}}


def bad_star(*cities: str) -> None: ...


def bad_stars(**cities: str) -> None: ...


def bad_position(city: str, /) -> None: ...


def bad_bare(city) -> None:  # type: ignore[no-untyped-def]
    ...


def bad_hint(city: types.ModuleType) -> None: ...


def bad_name(city: "Nowhere") -> None:  # type: ignore[name-defined]  # noqa: F821
    ...


def bad_generator(city: str) -> Iterator[str]:
    yield city


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([lambda: 1], "a tool must have a name"),
        ([Place], "tools must be functions or dicts, not a type"),
        ([5], "tools must be functions or dicts, not a int"),
        ([bad_star], "'bad_star' has the parameter \\*cities"),
        ([bad_stars], "'bad_stars' has the parameter \\*\\*cities"),
        ([bad_position], "'bad_position' has the parameter city"),
        ([bad_bare], "'city' of the tool 'bad_bare' needs a type hint"),
        ([bad_hint], "'city' of the tool 'bad_hint': there is no JSON schema for module"),
        ([bad_name], "'bad_name' cannot be read: name 'Nowhere'"),
        ([bad_generator], "'bad_generator' is a generator"),
        ([now, now], "two tools are called 'now'"),
        ([{"type": "web_search"}], "a tool's type must be 'function'"),
        ([{"name": "a b"}], "a tool cannot be called 'a b'"),
        ([{"name": ""}], "a tool must have a name"),
        ([{"name": "f", "parameters": {"type": "string"}}], "must be a JSON schema of type 'object'"),
        ([{"name": "f", "parameters": {"properties": []}}], "the properties of the tool 'f' must be a dict"),
        ([{"name": "f", "parameters": {"required": "x"}}], "required by the tool 'f' must be a list, not a str"),
        ([{"function": 1}], "a tool's 'function' must be a dict"),
        ({"name": "f"}, "tools must be a list"),
        (5, "tools must be a list"),
    ],
)
def test_what_is_no_tool_is_refused_in_one_line(tools: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        read_tools(tools)
    assert "\n" not in str(caught.value)


def test_a_tool_is_called_with_what_its_hints_say() -> None:
    def tool(unit: Unit, place: Place, pair: tuple[int, float], size: float | None = None) -> Any:
        return [unit, place, pair, size]

    arguments = {"unit": "celsius", "place": {"name": "x", "floors": [1]}, "pair": [1, 2], "size": 3}
    assert json.loads(read_tools([tool])[0].call(arguments)) == ["celsius", {"name": "x", "floors": [1]}, [1, 2.0], 3.0]


def test_what_a_tool_returns_goes_back_as_text() -> None:
    assert TOOLS[0].call({"city": "Oslo"}) == "Oslo: 20 c, None"
    assert TOOLS[1].call({"x": 1, "y": 2}) == "3.0"
    assert json.loads(TOOLS[3].call(CALLS[3][1])) == CALLS[3][1]
    assert read_tools([types.FunctionType(now.__code__, {}, "clock")])[0].call({}) == "12:00"


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (0, {}, "'get_weather' needs the parameter 'city'"),
        (0, {"city": "x", "country": "y"}, "'get_weather' has no parameter 'country'"),
        (0, {"city": 5}, "city must be string, not 5"),
        (0, {"city": "x", "unit": "k"}, "unit must be one of 'c', 'f', not 'k'"),
        (0, {"city": "x", "days": 1.5}, "days must be integer or null, not 1.5"),
        (1, {"x": True, "y": 1}, "x must be number, not True"),
        (3, {"where": "x", "tags": []}, "where must be Place, not 'x'"),
        (3, {"where": {"name": 1}, "tags": []}, "where.name must be string, not 1"),
        (3, {"where": {}, "tags": []}, "where does not fit Place"),
        (3, {"where": {"name": "x"}, "tags": "y"}, "tags must be an array, not 'y'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tool: int, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        TOOLS[tool].call(arguments)


def test_a_tool_without_a_function_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="'f' has no function"):
        read_tools([{"name": "f"}])[0].call({})


# Formats


@all_formats
@pytest.mark.parametrize("cut", ["whole", "characters"])
def test_every_format_reads_the_calls_that_it_writes(name: str, cut: str) -> None:
    text = FORMAT[name].write(CALLS)
    result = parse(name, [text] if cut == "whole" else text, prompt="<|start|>assistant")
    assert result.names == CALLS
    assert (result.content, result.reasoning, result.errors) == ("", "", [])


@all_formats
def test_a_call_is_none_until_it_is_complete(name: str) -> None:
    for call in CALLS:
        text = FORMAT[name].write([call])
        _, end = FORMAT[name].section or ("", "")
        for size in range(len(text.removesuffix(end).rstrip())):
            result = parse(name, [text[:size]])
            assert result.calls == [], text[:size]
        assert parse(name, [text]).names == [call]


def spaced(name: str) -> list[str]:
    """Answers with reasoning, text and calls."""
    tool_format = FORMAT[name]
    calls, tags = tool_format.write(CALLS[:2]), tool_format.reasoning or ("", "")
    if name == "gpt-oss":
        head = "<|channel|>analysis<|message|>Hm.\nHm.<|end|><|start|>assistant"
        return [head + calls, head + "<|channel|>final<|message|>Hello", f"{head}{calls}<|call|><|start|>assistant"]
    bare = "" if tool_format.bare else "Let me see.\n\n"
    return [f"{tags[0]}Hm.\n Hm. {tags[1]}\n\n{bare}{calls}\n", calls, "Hello\n\n <x> [a] {b}", f"{calls} Done."]


@all_formats
def test_an_answer_is_read_alike_wherever_it_is_cut_in_two(name: str) -> None:
    for text in spaced(name):
        whole = parse(name, [text]).everything
        assert parse(name, text).everything == whole
        for at in range(len(text)):
            assert parse(name, [text[:at], text[at:]]).everything == whole, text[:at]


def fragments(name: str) -> list[str]:
    tool_format = FORMAT[name]
    text = tool_format.write(CALLS)
    found = re.findall(r"<[^<>]*>|\[[A-Z_]+\]|\w+|\s+|.", text, re.DOTALL)
    extra = [*(tool_format.reasoning or ()), *tool_format.silent, *" \n<>[]{}()\"'\\,:;", "Hello", "null", "<|end|>"]
    return [*found, *extra, *spaced(name)]


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(FORMAT)), data=st.data())
def test_no_text_however_wrong_is_read_otherwise_in_pieces(name: str, data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.sampled_from(fragments(name)) | st.text(max_size=3), max_size=25))
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    prompt = data.draw(st.sampled_from(["", "<|start|>assistant", (FORMAT[name].reasoning or ("",))[0]]))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(name, [text], prompt=prompt)
    assert parse(name, pieces, prompt=prompt).everything == whole.everything
    assert parse(name, text, prompt=prompt).everything == whole.everything
    check_streamed(whole)


def test_calls_with_mistakes_in_them_are_read_alike_in_pieces() -> None:
    chance = random.Random(5)
    for _ in range(3000):
        name = chance.choice(sorted(FORMAT))
        parts = re.findall(r"<[^<>]*>|\w+|\s+|.", FORMAT[name].write(chance.sample(CALLS, 2)), re.DOTALL)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(parts))
            parts[at : at + chance.randint(0, 1)] = chance.choices(fragments(name), k=chance.randint(0, 1))
        text = "".join(parts)
        whole = parse(name, [text])
        assert parse(name, text).everything == whole.everything, (name, text)
        check_streamed(whole)


def check_streamed(result: Result) -> None:
    """The pieces of every call add up to it, and those of no call to an error."""
    for call in result.calls:
        assert result.streamed[call.index] == (call.id, call.name, call.text)
        assert json.loads(call.text) == call.arguments
    failed = {error.index for error in result.errors} - {None}
    assert set(result.streamed) == {call.index for call in result.calls} | failed


@all_formats
def test_calls_are_streamed_while_they_are_made(name: str) -> None:
    call = CALLS[0]
    parser = FORMAT[name].parser(TOOLS)
    pieces = [*map(parser.feed, FORMAT[name].write([call])), parser.flush()]
    deltas = [(n, delta) for n, piece in enumerate(pieces) for delta in piece.deltas]
    done = next(n for n, piece in enumerate(pieces) if piece.calls)
    first, last = deltas[0], deltas[-1]
    assert first[1].name == "get_weather"
    assert first[1].to_dict() == {
        "index": 0,
        "id": first[1].id,
        "type": "function",
        "function": {"name": "get_weather", "arguments": ""},
    }
    assert last[1].to_dict()["function"] == {"arguments": last[1].arguments}
    assert first[0] + 20 < last[0] <= done
    assert len(deltas) > 5  # the city comes in pieces, too
    check_streamed(Result(pieces))


def test_a_call_has_the_shape_of_openai() -> None:
    call = parse("hermes", [FORMAT["hermes"].write([CALLS[1]])]).calls[0]
    function = {"name": "add", "arguments": '{"x": 1.5, "y": -2}'}
    assert call.to_dict() == {"id": call.id, "type": "function", "function": function}
    assert re.fullmatch("[a-zA-Z0-9]{9}", call.id)


def test_an_id_that_the_model_gave_is_kept() -> None:
    text = '[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{"x": 1, "y": 2}'
    assert parse("mistral", [text]).calls[0].id == "123456789"
    assert parse("kimi-k2", [FORMAT["kimi-k2"].write([CALLS[1]])]).calls[0].id == "functions.add:0"


# What is wrong


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("hermes", "<tool_call>not json</tool_call>", "'{' expected, not 'n'"),
        ("hermes", '<tool_call>{"name": "fly", "arguments": {}}</tool_call>', "there is no tool 'fly'"),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"x": 01}}</tool_call>', "a JSON value expected, not '01'"),
        ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "the arguments of add are no JSON obj"),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>', "the name is no string"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "a name is missing"),
        ("hermes", '<tool_call>{"name": "add", "name": "now"}</tool_call>', "'name' is given twice"),
        ("hermes", '<tool_call>{"arguments": {}, "parameters": {}}</tool_call>', "'parameters' is given twice"),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"x": 1, "x": 2}}</tool_call>', "'x' is given twice"),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"x": 1e999}}</tool_call>', "1e999 is too large"),
        ("hermes", '<tool_call>{"name": "add", "arguments": ' + '{"x":' * 200, "nested more than 100 deep"),
        ("qwen-xml", "<tool_call>\n<function=fly>\n</function>\n</tool_call>", "there is no tool 'fly'"),
        ("qwen-xml", "<tool_call>\n<function=add>\n1</function>\n</tool_call>", "'<parameter=' or '</function>' exp"),
        ("glm", "<tool_call>add<x>1</x></tool_call>", "'<arg_key>' or '</tool_call>' expected after 'add'"),
        ("mistral", "[TOOL_CALLS] not json at all", "'[ARGS]' expected, not 'j'"),
        ("mistral-list", "[TOOL_CALLS] not json at all", "'{' expected, not 'n'"),
        ("gemma4", "<|tool_call>call:bad_func no brace<tool_call|>", "'{' expected after 'bad_func'"),
        ("deepseek-v3.1", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{,}", "a key or '}' expected"),
        ("llama", '<|python_tag|>print("hello")', "'{' expected, not 'p'"),
        ("llama4", "[add(x=print(1))]", "a value expected, not 'print'"),
        ("gpt-oss", "<|channel|>commentary to=functions.fly<|message|>{}", "there is no tool 'fly'"),
    ],
)
def test_a_wrong_call_is_text_and_an_error(name: str, text: str, error: str) -> None:
    result = parse(name, [text])
    assert result.calls == []
    assert error in result.errors[0].message
    assert result.content in (text, text.removeprefix("<｜tool▁calls▁begin｜>"), text.partition("<|message|>")[0])
    assert result.errors[0].text in text


@all_formats
def test_a_call_that_is_cut_off_is_an_error_and_no_text(name: str) -> None:
    text = FORMAT[name].write([CALLS[0]])
    at = text.index("rich")
    result = parse(name, [text[:at]])
    assert (result.content, result.calls) == ("", [])
    assert [(error.message, error.index) for error in result.errors] == [("the call is cut off", 0)]
    assert text[:at].endswith(result.errors[0].text)


def test_of_a_list_that_is_cut_off_no_call_counts() -> None:
    for name in LISTS:
        text = FORMAT[name].write(CALLS[:2])
        result = parse(name, [text[:-2]])
        assert result.calls == []
        assert [error.index for error in result.errors] == [0, 1]


def test_calls_before_one_that_is_cut_off_count() -> None:
    for name in sorted(set(FORMAT) - set(LISTS)):
        both = FORMAT[name].write(CALLS[:2])
        assert parse(name, [both[: both.index("-2")]]).names == CALLS[:1], name


def test_what_only_looks_like_a_call_is_text_without_an_error() -> None:
    for name, text in [
        ("llama", '{"capital": "Paris"}'),
        ("llama", '{"name": "Ana", "age": 5}'),
        ("llama", '{"name": "Ana", "parameters": {}}'),
        ("llama", "{}"),
        ("llama", '{"na'),
        ("llama4", "[1, 2, 3]"),
        ("llama4", "[link](http://example.com)"),
        ("hermes", "a < b <tool> <tool_cal"),
        ("glm", "</tool_call> </think>"),
    ]:
        result = parse(name, [text])
        assert (result.content, result.calls, result.errors) == (text, [], []), text


def test_text_between_the_calls_of_a_section_is_reported() -> None:
    text = FORMAT["kimi-k2"].write(CALLS[:1]).replace("<|tool_call_begin|>", " noise <|tool_call_begin|>")
    result = parse("kimi-k2", [text])
    assert (result.content, result.names) == ("", CALLS[:1])
    assert result.errors == [CallError("there is text between the calls", "noise")]


def test_a_list_with_a_wrong_call_in_it_gives_none() -> None:
    good = FORMAT["mistral-list"].write(CALLS[:1])
    bad = FORMAT["mistral-list"].write([CALLS[1], ("fly", {})])
    result = parse("mistral-list", [bad + good])
    assert result.names == CALLS[:1]
    assert [error.index for error in result.errors] == [0]
    assert result.content.startswith('[TOOL_CALLS][{"name": "add"')


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("Hello \n\n{}", "Hello "),
        ("{}", ""),
        (" \n {}", ""),
        ("Hello{} world", "Hello world"),
        ("Hello {}\n{}\nworld\n", "Hello \nworld\n"),
        ("{}\n{}\n", ""),
        ("<think>\nHm.\n</think>\n\n Hello\n", "Hello\n"),
        (" Hello\n", " Hello\n"),
    ],
)
def test_newlines_before_a_call_and_between_calls_are_no_content(text: str, content: str) -> None:
    text = text.format(*[FORMAT["hermes"].write(CALLS[:1])] * 2)
    assert parse("hermes", [text]).content == content


def test_a_parameter_whose_end_was_forgotten_is_read() -> None:
    for name, forgotten in [("qwen-xml", "</parameter>\n"), ("glm", "</arg_value>")]:
        call: tuple[str, dict[str, Any]] = ("get_weather", {"city": "x", "unit": "c"})
        first, second, rest = FORMAT[name].write([call]).split(forgotten)
        for text in (first + second + forgotten + rest, first + forgotten + second + rest):
            assert parse(name, [text]).names == [call], text


def test_without_tools_any_name_is_taken() -> None:
    text = (
        "<tool_call>\n<function=fly>\n<parameter=to>\nParis\n</parameter>\n<parameter=n>\n2\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    assert parse("qwen-xml", [text], tools=None).names == [("fly", {"to": "Paris", "n": 2})]
    assert parse("qwen-xml", [text]).names == []


def test_a_parser_is_for_one_answer() -> None:
    parser = FORMAT["hermes"].parser(TOOLS)
    assert parser.feed("Hello").content == "Hello"
    assert parser.flush() == parser.flush() == ParsedPiece()
    with pytest.raises(ValueError, match="a new answer needs a new parser"):
        parser.feed("x")


# Values


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, " -5\n", -5),
        ({"type": "integer"}, "five", "five"),
        ({"type": "integer"}, "5.0", 5.0),
        ({"type": "integer"}, "9" * 30, int("9" * 30)),
        ({"type": "number"}, "1e20", 1e20),
        ({"type": "number"}, "5", 5),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": ["boolean", "string"]}, "5", "5"),
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, "  x\n", "  x\n"),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "None", None),
        ({"type": ["string", "integer"]}, "0042", "0042"),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, '["a"]', ["a"]),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "[a]", "[a]"),
        ({"type": "object"}, "{'a': None}", {"a": None}),
        ({"type": "object"}, '{"a": 1}', {"a": 1}),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"$ref": "#/$defs/n"}, "1", 1),
        ({"$ref": "#/$defs/loop"}, "1", 1),
        ({"$ref": "#/$defs/tree"}, "1", 1),
        ({"$ref": "#/$defs/tree"}, "true", "true"),
        ({}, "1", 1),
        ({}, "one", "one"),
        (None, "true", True),
    ],
)
def test_bare_text_gets_the_type_that_its_schema_says(schema: object, text: str, value: object) -> None:
    tree = {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/tree"}]}
    definitions = {"n": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}, "tree": tree}
    parameters = {"type": "object", "properties": {} if schema is None else {"x": schema}, "$defs": definitions}
    tools = read_tools([{"name": "f", "parameters": parameters}])
    call = f"<tool_call>f<arg_key>x</arg_key><arg_value>{text}</arg_value></tool_call>"
    (found,) = parse("glm", [call], tools=tools).calls
    assert found.arguments == {"x": value}
    assert type(found.arguments["x"]) is type(value)


def test_what_models_get_wrong_in_json_is_put_right() -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "a\nb\\d\\\'"}}</tool_call>'
    (call,) = parse("hermes", [text]).calls
    assert call.arguments == {"city": "a\nb\\d'"}
    assert json.loads(call.text) == call.arguments
    assert parse("hermes", ['<tool_call>{"name": "now"}</tool_call>']).names == [("now", {})]
    text = '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"x\\"}"}</tool_call>'
    assert parse("hermes", [text]).names == [("get_weather", {"city": "x"})]


def test_values_may_have_the_tags_of_their_format_in_them() -> None:
    for name in ("qwen-xml", "glm", "kimi-k3", "deepseek-v3.2", "gemma4", "hermes", "gpt-oss"):
        inside = " and ".join(re.findall(r"<[^<>]*>", FORMAT[name].write([("get_weather", {"city": "x", "days": 1})])))
        if name == "gemma4":
            inside = inside.replace('<|"|>', "")
        call: tuple[str, dict[str, Any]] = ("get_weather", {"city": f"Tags: {inside} are text."})
        assert parse(name, [FORMAT[name].write([call])]).names == [call], name


# Reasoning


def test_reasoning_is_told_from_the_answer() -> None:
    result = parse("hermes", ["<think>\nHm. <tool_call>\n</think>\n\nHello"])
    assert (result.reasoning, result.content, result.errors) == ("Hm. <tool_call>", "Hello", [])
    assert parse("hermes", ["Hm.</think>Hello"], prompt="<|im_start|>assistant\n<think>\n").reasoning == "Hm."
    assert parse("hermes", ["Hello"], prompt="<think>\n\n</think>\n\n").content == "Hello"
    assert parse("hermes", ["Use <think> tags."]).content == "Use <think> tags."


def test_reasoning_tags_are_what_the_caller_says() -> None:
    tools = FORMAT["hermes"].parser(TOOLS, reasoning=("<a>", "</a>"))
    assert tools.feed("<a>x</a>y<think>").reasoning == "x"
    none = FORMAT["hermes"].parser(TOOLS, reasoning=None)
    assert none.feed("<think>x").content == "<think>x"


def test_tags_that_begin_like_markers_are_told_apart_wherever_the_text_is_cut() -> None:
    for text in ("<tool>Hm.</tool>Hello", FORMAT["hermes"].write(CALLS[:1]), "<tool", "<tool_", "<tool_x"):
        results = []
        for pieces in ([text], list(text), [text[:5], text[5:]]):
            parser = FORMAT["hermes"].parser(TOOLS, reasoning=("<tool", "</tool"))
            results.append(Result([*map(parser.feed, pieces), parser.flush()]).everything)
        assert results[0] == results[1] == results[2]


def test_a_call_ends_reasoning_where_models_forget_to() -> None:
    text = FORMAT["qwen-xml"].write(CALLS[:1])
    result = parse("qwen-xml", ["Hm, <tool_call> it is.\n" + text], prompt="<think>")
    assert (result.reasoning, result.content, result.names) == ("Hm, <tool_call> it is.", "", CALLS[:1])


def test_a_message_of_gpt_oss_may_have_markers_in_it() -> None:
    text = "<|channel|>analysis<|message|>It ends with <|end|>, you know.<|end|><|start|>assistant"
    result = parse("gpt-oss", [text + "<|channel|>final<|message|>Say <|call|>."])
    assert (result.reasoning, result.content) == ("It ends with <|end|>, you know.", "Say <|call|>.")


def test_the_prompt_of_gpt_oss_may_have_begun_a_message() -> None:
    prompt = "<|start|>assistant<|channel|>final<|message|>"
    assert parse("gpt-oss", ["Hello<|return|>"], prompt=prompt).content == "Hello"
    assert parse("gpt-oss", ["Hello"], prompt="<|start|>assistant").content == "Hello"


# Work


def count_calls(run: Callable[[], object]) -> int:
    n_calls = 0

    def count(frame: types.FrameType, event: str, argument: object) -> None:
        nonlocal n_calls
        n_calls += 1

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return n_calls


LONG: dict[str, Callable[[int], str]] = {
    "text": lambda n: "x" * n,
    "spaces": lambda n: " " * n,
    "begun markers": lambda n: "<" * n,
    "markers": lambda n: "<tool_call>" * (n // 11),
    "call": lambda n: f'<tool_call>{{"name": "get_weather", "arguments": {{"city": "{"x" * n}"}}}}</tool_call>',
    "escapes": lambda n: '<tool_call>{"name": "get_weather", "arguments": {"city": "' + "\\n" * (n // 2),
    "spaces in a call": lambda n: "<tool_call>" + " " * n,
    "value": lambda n: f"<tool_call><function=get_weather><parameter=city>{'</parameter>' * (n // 12)}",
    "closed value": lambda n: f"<tool_call><function=get_weather><parameter=city>{'</parameter> ' * (n // 13)}",
    "spaces in a value": lambda n: "<tool_call><function=get_weather><parameter=city></parameter>" + " " * n,
}


@pytest.mark.parametrize("kind", LONG)
def test_the_work_grows_no_faster_than_the_text(kind: str) -> None:
    for name in ("hermes", "qwen-xml"):
        counts = []
        for size in (2000, 4000):
            text = LONG[kind](size)
            parser = FORMAT[name].parser(TOOLS)

            def run(text: str = text, parser: Any = parser) -> None:
                for char in text:
                    parser.feed(char)
                    assert parser.reader.n_kept < 50  # what is copied, and looked at again
                parser.flush()

            counts.append(count_calls(run))
        assert counts[1] < 2.2 * counts[0]


# Choosing a format

SIGNS = {
    "openai-gpt-oss-120b": "gpt-oss",
    "google-gemma-4-31B-it": "gemma4",
    "Kimi-K2-Instruct": "kimi-k2",
    "Kimi-K3": "kimi-k3",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "deepseek-v3",
    "deepseek-ai-DeepSeek-V3.1": "deepseek-v3.1",
    "deepseek-ai-DeepSeek-V3.2": "deepseek-v3.2",
    "deepseek-ai-DeepSeek-V4": "deepseek-v4",
    "GLM-4.6": "glm",
    "GLM-4.7-Flash": "glm",
    "ByteDance-Seed-OSS": "seed",
    "Qwen3-Coder": "qwen-xml",
    "Qwen3.5-4B": "qwen-xml",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "qwen-xml",
    "Mistral-Small-3.2-24B-Instruct-2506": "mistral",
    "mistralai-Ministral-3-14B-Reasoning-2512": "mistral",
    "unsloth-mistral-Devstral-Small-2507": "mistral",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral-list",
    "meta-llama-Llama-3.1-8B-Instruct": "llama",
    "meta-llama-Llama-3.3-70B-Instruct": "llama",
    "LFM2-8B-A1B": "lfm2",
    "LFM2.5-8B-A1B": "lfm2",
    "NVIDIA-Nemotron-Nano-v2": "nemotron",
    "unsloth-Apriel-1.5": "apriel",
    "ibm-granite-granite-3.3-2B-Instruct": "granite3",
    "ibm-granite-granite-4.0": "hermes",
    "MiniMax-M2": "minimax",
    "Qwen-Qwen3-0.6B": "hermes",
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "microsoft-Phi-3.5-mini-instruct": "hermes",
}


def test_the_template_tells_the_format(llama_cpp_source: Path) -> None:
    folder = llama_cpp_source / "models" / "templates"
    assert {name: ToolFormat.of((folder / f"{name}.jinja").read_text()).name for name in SIGNS} == SIGNS


def test_a_template_must_be_text() -> None:
    with pytest.raises(TypeError, match="must be a str, not NoneType"):
        ToolFormat.of(None)  # type: ignore[arg-type]
    assert ToolFormat.of("").name == "hermes"


# Grammars


class Judge:
    """llguidance over a vocabulary of bytes; its first ids may stand for control tokens."""

    def __init__(self, tokens: Mapping[str, int] | None = None):
        self.llguidance = pytest.importorskip("llguidance")
        self.tokenizer = self.llguidance.LLTokenizer("byte")
        self.tokens = dict(tokens or {})

    def accepts(self, grammar: str | None, text: str) -> bool:
        assert grammar is not None
        matcher = self.llguidance.LLMatcher(self.tokenizer, grammar)
        assert not matcher.is_error(), matcher.get_error()
        parts = re.split(f"({'|'.join(map(re.escape, self.tokens))})", text) if self.tokens else [text]
        ids = [
            each
            for part in parts
            if part
            for each in ([self.tokens[part]] if part in self.tokens else self.tokenizer.tokenize_str(part))
        ]
        if matcher.validate_tokens(ids) < len(ids):
            return False
        matcher.consume_tokens(ids)
        return bool(matcher.is_accepting())


@all_formats
@pytest.mark.parametrize("required", [True, False])
def test_a_grammar_accepts_the_calls_of_its_format_and_no_others(name: str, required: bool) -> None:
    judge, tool_format = Judge(), FORMAT[name]
    grammar = tool_format.grammar(TOOLS, required=required)
    for call in CALLS:
        assert judge.accepts(grammar, tool_format.write([call])), call
    others: list[tuple[str, dict[str, Any]]] = [
        ("get_wether", {"city": "x"}),
        ("add", {"x": "one", "y": 2}),
        ("add", {"x": 1}),
        ("get_weather", {"city": "x", "unit": "kelvin"}),
        ("now", {"zone": 1}),
    ]
    for other in others:
        assert not judge.accepts(grammar, tool_format.write([other])), other
    assert judge.accepts(grammar, "<|channel|>final<|message|>Hello" if name == "gpt-oss" else "Hello") != required


@all_formats
def test_a_grammar_allows_several_calls_or_one(name: str) -> None:
    judge, tool_format = Judge(), FORMAT[name]
    several = tool_format.write(CALLS[:3])
    if name != "gpt-oss":
        assert judge.accepts(tool_format.grammar(TOOLS, required=True, parallel=True), several)
    assert not judge.accepts(tool_format.grammar(TOOLS, required=True, parallel=False), several)
    only = tool_format.grammar(TOOLS, required=True, name="add")
    assert judge.accepts(only, tool_format.write([CALLS[1]]))
    assert not judge.accepts(only, tool_format.write([CALLS[2]]))


@all_formats
def test_a_grammar_lets_reasoning_come_first(name: str) -> None:
    judge, tool_format = Judge(), FORMAT[name]
    for text in spaced(name)[:2]:
        if name != "gpt-oss":
            assert judge.accepts(tool_format.grammar(TOOLS, required=False), text.strip())
    tags = tool_format.reasoning
    if tags:
        calls, grammar = tool_format.write(CALLS[:1]), tool_format.grammar(TOOLS, required=True, prompt=tags[0])
        assert judge.accepts(grammar, f"Hm.{tags[1]}\n\n{calls}")
        assert not judge.accepts(grammar, calls)


@all_formats
def test_markers_that_are_control_tokens_are_matched_by_their_ids(name: str) -> None:
    tool_format = FORMAT[name]
    text = tool_format.write(CALLS[1:2])
    markers = {"deepseek-v3.2": ["｜DSML｜"], "deepseek-v4": ["｜DSML｜"], "deepseek-v4.1": ["｜DSML｜"]}
    found = markers.get(name) or re.findall(r"<[^<>=\s]+>|\[[A-Z_]+\]", text)
    tokens = {marker: number for number, marker in enumerate(dict.fromkeys(found), start=1)}
    with_ids, with_text = Judge(tokens), Judge()
    for required in (True, False):
        grammar = tool_format.grammar(TOOLS, required=required, tokens=tokens)
        assert with_ids.accepts(grammar, text)
        if required and tokens:
            assert not with_text.accepts(grammar, text)
    if tool_format.silent:
        assert with_ids.accepts(grammar, tool_format.silent[0] + "Hello" + tool_format.silent[1])
    if tool_format.silent and not tool_format.bare:
        assert with_ids.accepts(grammar, "Hello" + tool_format.silent[1] + text)
    if name not in ("gpt-oss", "llama", "llama4"):
        assert with_ids.accepts(grammar, "If a < b </b> [c]: " + text)


class Tree(TypedDict):
    value: int
    left: NotRequired["Tree | None"]
    right: NotRequired["Tree | None"]


def plant(tree: Tree, notes: dict[str, Any], label: Any = None) -> None: ...


@all_formats
def test_schemas_may_refer_to_themselves(name: str) -> None:
    tools, judge = read_tools([plant]), Judge()
    tree = {"value": 1, "left": {"value": 2, "right": {"value": 3}}, "right": None}
    call = ("plant", {"tree": tree, "notes": {"a": [1, "b", {"c": False}]}, "label": 'x, "y"'})
    text = FORMAT[name].write([call])
    assert parse(name, [text], tools=tools).names == [call]
    assert judge.accepts(FORMAT[name].grammar(tools, required=True), text)
    wrong = ("plant", {"tree": {"value": 1, "left": {"value": "2"}}, "notes": {}})
    assert not judge.accepts(FORMAT[name].grammar(tools, required=True), FORMAT[name].write([wrong]))


def test_python_may_have_commas_at_the_end() -> None:
    text = "[get_weather(city='x', days=1,), book(where={'name': 'y', 'floors': (1,),}, tags=[])]"
    assert parse("llama4", text).names == [
        ("get_weather", {"city": "x", "days": 1}),
        ("book", {"where": {"name": "y", "floors": [1]}, "tags": []}),
    ]


def test_a_grammar_needs_a_tool() -> None:
    for tools, name in ([(), None], [TOOLS, "fly"]):
        with pytest.raises(ValueError, match="there is no tool"):
            FORMAT["hermes"].grammar(tools, required=True, name=name)  # type: ignore[arg-type]


# Imports


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, minerva_native.tools; print(*sorted({'pydantic', 'llguidance', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_models_of_pydantic_are_types_too() -> None:
    pydantic = pytest.importorskip("pydantic")
    stop = pydantic.create_model("Stop", name=(str, ...), minutes=(int, 5))

    def travel(to: Any) -> object:
        return to

    travel.__annotations__["to"] = stop
    (tool,) = read_tools([travel])
    assert tool.parameters["properties"]["to"]["required"] == ["name"]
    assert json.loads(tool.call({"to": {"name": "Oslo"}})) == {"name": "Oslo", "minutes": 5}
    with pytest.raises(ValueError, match="name"):
        tool.call({"to": {}})
