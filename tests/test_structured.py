"""Constraints: what the model writes satisfies them, whatever is done to its sequence; what cannot be satisfied is said."""

import dataclasses
import enum
import json
import math
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NotRequired, TypedDict

import jsonschema
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minerva_native as mn
from minerva_native.generation import Guide
from random_schemas import random_schema

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WILD = mn.SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
N_SCHEMAS = int(os.environ.get("MINERVA_RANDOM_SCHEMAS", "40"))


@pytest.fixture(scope="module")
def context(demo: mn.Model) -> Iterator[mn.Context]:
    with demo.context(n_ctx=4096, n_seq=4, n_threads=1) as context:
        yield context


@pytest.fixture
def sequence(context: mn.Context) -> Iterator[mn.Sequence]:
    with context.sequence() as sequence:
        sequence.extend(context.model.tokenizer.encode("Once upon a time"))
        yield sequence


@pytest.fixture(scope="module")
def llm(demo: mn.Model) -> Iterator[mn.LLM]:
    with mn.LLM(demo, n_ctx=2048, n_threads=1, template=TEMPLATE) as llm:
        yield llm


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def text_of(steps: list[mn.Step]) -> str:
    return "".join(step.text for step in steps)


def write(sequence: mn.Sequence, constraint: Any, seed: int = 1, **options: Any) -> list[mn.Step]:
    params = options.pop("params", WILD).replace(seed=seed)
    return list(mn.generate(sequence, params, constraint=constraint, **{"max_tokens": 400, **options}))


def allowed_ids(guide: Guide, n_vocab: int) -> set[int]:
    bits = np.unpackbits(np.asarray(guide.allowed()).view(np.uint8), bitorder="little")[:n_vocab]
    return set(np.flatnonzero(bits).tolist())


def accepts(constraint: mn.Constraint, text: str, tokenizer: mn.Tokenizer) -> bool:
    """Whether a constraint takes a text as a whole, token by token."""
    guide = constraint.guide(tokenizer)
    for token in tokenizer.encode(text, add_special=False):
        try:
            if guide.accept(token):
                return guide_text(guide) == text
        except mn.ConstraintError:
            return False
    return tokenizer.eos in allowed_ids(guide, tokenizer.n_vocab)


def guide_text(guide: Guide) -> str:
    return str(getattr(guide, "text"))  # noqa: B009


# Each kind


@pytest.mark.parametrize("seed", range(4))
def test_a_choice_is_one_of_its_texts(sequence: mn.Sequence, seed: int) -> None:
    texts = ["yes", "no", "nobody", "größer 😀", 'with "quotes"\n']
    steps = write(sequence, mn.Constraint.choice(texts), seed)
    assert text_of(steps) in texts
    assert steps[-1].finish_reason == "end"


def test_a_choice_may_end_where_a_longer_one_goes_on(demo: mn.Model) -> None:
    constraint = mn.Constraint.choice(["no", "nobody"])
    assert accepts(constraint, "no", demo.tokenizer)
    assert accepts(constraint, "nobody", demo.tokenizer)
    assert not accepts(constraint, "nob", demo.tokenizer)


@pytest.mark.parametrize("seed", range(4))
def test_a_regular_expression_matches_the_whole_text(sequence: mn.Sequence, seed: int) -> None:
    steps = write(sequence, mn.Constraint.regex("[0-9]{3}-[a-f]{2,6}(x|é)"), seed)
    number, rest = text_of(steps).split("-")
    assert number.isdecimal()
    assert 3 <= len(rest) <= 7
    assert rest[-1] in "xé"


def test_a_lark_grammar_is_followed(sequence: mn.Sequence) -> None:
    constraint = mn.Constraint.lark('start: "(" start ")" | WORD\nWORD: /[a-c]{3}/\n')
    text = text_of(write(sequence, constraint, seed=2))
    inner = text.strip("()")
    assert len(inner) == 3
    assert text == "(" * text.count("(") + inner + ")" * text.count("(")


def test_a_gbnf_grammar_is_followed(sequence: mn.Sequence) -> None:
    constraint = mn.Constraint.gbnf('root ::= item ("," item)?\nitem ::= "yes" | "no" [0-9]{2}\n')
    for item in text_of(write(sequence, constraint)).split(","):
        assert item == "yes" or (item[:2] == "no" and item[2:].isdecimal())


def test_json_is_written_on_one_line_in_the_order_of_the_schema(sequence: mn.Sequence) -> None:
    text = text_of(write(sequence, mn.Constraint.json_schema(PERSON)))
    value = json.loads(text)
    assert list(value) == ["name", "age"]
    assert text == json.dumps(value, ensure_ascii=False)


def test_a_schema_may_ask_for_another_layout(sequence: mn.Sequence) -> None:
    schema = {**PERSON, "x-guidance": {"item_separator": ",", "key_separator": ":", "whitespace_flexible": False}}
    text = text_of(write(sequence, mn.Constraint.json_schema(schema)))
    assert text == json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))


def test_any_object_is_an_object(sequence: mn.Sequence) -> None:
    for seed in range(5):
        with sequence.fork() as fork:
            steps = write(fork, mn.Constraint.json_object(), seed)
        if steps[-1].finish_reason == "end":
            assert isinstance(json.loads(text_of(steps)), dict)


@pytest.mark.parametrize("seed", range(N_SCHEMAS))
def test_what_a_random_schema_makes_parses_and_validates(sequence: mn.Sequence, seed: int) -> None:
    schema = random_schema(seed)
    constraint = mn.Constraint.json_schema(schema)
    steps = write(sequence, constraint, seed, max_tokens=1500)
    if steps[-1].finish_reason == "length":  # a text or list without a limit, which this model does not end
        assert len(steps) == 1500
        return
    assert steps[-1].finish_reason == "end"
    jsonschema.Draft202012Validator(schema).validate(constraint.parse(text_of(steps)))


def test_most_random_schemas_come_to_an_end(context: mn.Context, sequence: mn.Sequence) -> None:
    finished = 0
    for seed in range(20):
        with sequence.fork() as fork:
            steps = write(fork, mn.Constraint.json_schema(random_schema(seed)), seed, max_tokens=500)
            finished += steps[-1].finish_reason == "end"
    assert finished >= 15


# Values


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "large"


@dataclasses.dataclass
class Pet:
    name: Literal["Rex", "Tom"]
    size: Size
    weight: float
    friends: "list[Pet]" = dataclasses.field(default_factory=list)
    place: tuple[int, bool] | None = None


class Point(TypedDict):
    x: int
    y: NotRequired[bool]


class Person(pydantic.BaseModel):
    name: Literal["Ann", "Bob"]
    age: int = pydantic.Field(ge=0, le=99)
    points: list[Point] = pydantic.Field(max_length=2)


@dataclasses.dataclass
class Group:
    people: list[Person]
    by_name: dict[str, int]


@pytest.mark.parametrize("seed", range(3))
def test_a_dataclass_comes_back_as_one(llm: mn.LLM, seed: int) -> None:
    pet = llm.complete("Once", response_format=Pet, seed=seed, max_tokens=900).parsed
    assert isinstance(pet, Pet)
    assert isinstance(pet.size, Size)
    assert type(pet.weight) is float
    assert all(isinstance(friend, Pet) for friend in pet.friends)
    assert pet.place is None or (isinstance(pet.place, tuple) and len(pet.place) == 2)


def test_a_pydantic_model_comes_back_as_one(llm: mn.LLM) -> None:
    person = llm.complete("Once", response_format=Person, seed=1, max_tokens=900).parsed
    assert isinstance(person, Person)
    assert 0 <= person.age <= 99


def test_a_typed_dict_and_a_list_come_back_as_dicts(llm: mn.LLM) -> None:
    point = llm.complete("Once", response_format=Point, seed=1).parsed
    assert isinstance(point["x"], int)
    constraint = mn.Constraint.json_schema(list[Literal[1, 2]])
    assert constraint.parse("[1, 2]") == [1, 2]


def test_classes_within_classes_come_back(demo: mn.Model) -> None:
    constraint = mn.Constraint.json_schema(Group)
    group = constraint.parse('{"people": [{"name": "Ann", "age": 3, "points": []}], "by_name": {"a": 1}}')
    assert group == Group([Person(name="Ann", age=3, points=[])], {"a": 1})
    assert accepts(constraint, '{"people": [], "by_name": {"x": 12}}', demo.tokenizer)
    assert not accepts(constraint, '{"people": [], "by_name": {"x": "y"}}', demo.tokenizer)


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}},
        {"type": "json_schema", "schema": PERSON},
        {"type": "json_object", "schema": PERSON},
        PERSON,
    ],
)
def test_a_response_format_may_have_the_forms_of_others(llm: mn.LLM, response_format: Any) -> None:
    answer = llm.chat_completion([{"role": "user", "content": "Who?"}], response_format=response_format, seed=1)
    jsonschema.validate(answer.parsed, PERSON)
    assert answer.to_dict()["choices"][0]["finish_reason"] == "stop"


def test_a_response_format_of_text_limits_nothing(llm: mn.LLM) -> None:
    completion = llm.complete("Once", response_format={"type": "text"}, max_tokens=3)
    assert completion.constraint is None
    assert completion.parsed is None


@pytest.mark.parametrize("wrong", [{"type": "json_schema"}, {"type": "json_schema", "json_schema": 3}, 3, "json", int | object])
def test_what_is_no_response_format_is_a_type_error(llm: mn.LLM, wrong: Any) -> None:
    with pytest.raises(TypeError):
        llm.complete("Once", response_format=wrong)


def test_a_response_format_beside_a_constraint_is_refused(llm: mn.LLM) -> None:
    with pytest.raises(TypeError, match="one or the other"):
        llm.complete("Once", response_format=PERSON, constraint=mn.Constraint.json_object())


def test_a_value_that_was_cut_off_says_so_with_its_text(llm: mn.LLM) -> None:
    completion = llm.complete("Once", response_format=PERSON, max_tokens=4, seed=1)
    assert completion.finish_reason == "length"
    with pytest.raises(mn.ConstraintError, match="not complete") as caught:
        _ = completion.parsed
    assert caught.value.text == completion.text != ""


def test_a_value_that_fills_the_context_says_so(demo: mn.Model) -> None:
    with mn.LLM(demo, n_ctx=64, n_threads=1) as small:
        completion = small.complete("Once", constraint=mn.Constraint.regex("[a-z ]{1000}"), seed=1)
    assert completion.context_full
    with pytest.raises(mn.ConstraintError, match="context was full") as caught:
        _ = completion.parsed
    assert caught.value.text == completion.text != ""


def test_a_value_that_completes_with_the_last_token_is_complete(llm: mn.LLM) -> None:
    whole = llm.complete("Once", response_format=PERSON, seed=1)
    again = llm.complete("Once", response_format=PERSON, seed=1, max_tokens=len(whole.tokens))
    assert again.finish_reason == "end"
    assert again.parsed == whole.parsed


def test_a_number_too_long_for_python_is_an_error(demo: mn.Model) -> None:
    with pytest.raises(mn.ConstraintError, match="no such value"):
        mn.Constraint.json_schema({"type": "integer"}).parse("1" * 5000)
    with pytest.raises(mn.ConstraintError, match="too deep"):
        mn.Constraint.json_schema(True).parse("[" * 100_000)


def test_a_value_that_the_class_refuses_is_an_error() -> None:
    class Odd(pydantic.BaseModel):
        number: int

        @pydantic.field_validator("number")
        @classmethod
        def check(cls, value: int) -> int:
            if value % 2 == 0:
                raise ValueError("even")
            return value

    constraint = mn.Constraint.json_schema(Odd)
    assert constraint.parse('{"number": 3}') == Odd(number=3)
    with pytest.raises(mn.ConstraintError, match="even") as caught:
        constraint.parse('{"number": 2}')
    assert caught.value.text == '{"number": 2}'


# What the engine accepts is valid


SELECTION: dict[str, tuple[Any, list[Any], list[Any]]] = {
    # a schema, values that it allows, values that it does not
    "type": ({"type": "integer"}, [0, -7, 123], [1.5, "1", None, True, [], {}]),
    "types": ({"type": ["string", "null"]}, ["", "é", None], [0, False, []]),
    "true": (True, [1, "x", None, {"a": []}], []),
    "enum": ({"enum": [1, "1", None, {"a": [1]}]}, [1, "1", None, {"a": [1]}], [2, "2", {}, {"a": []}]),
    "const": ({"const": {"a": ["x\u0001", 2]}}, [{"a": ["x\u0001", 2]}], [{"a": []}, 1]),
    "minimum": ({"type": "integer", "minimum": -3, "maximum": 12}, [-3, 0, 12], [-4, 13, 100]),
    "exclusive": ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, [0.5, 0.001, 0.999], [0, 1, -0.1, 1.01]),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, [0, 7, 49, 700], [1, 8, 50]),
    "lengths": ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "äöü", "😀😀"], ["a", "abcd", "😀"]),
    "pattern": ({"type": "string", "pattern": "^[a-c]+[0-9]?$"}, ["abc", "a1"], ["", "d", "a12"]),
    "pattern within": ({"type": "string", "pattern": "b+"}, ["abc", "b"], ["ac", ""]),
    "date": ({"type": "string", "format": "date"}, ["2024-02-28"], ["2024-2-28", "2024-13-01", "x"]),
    "ipv4": ({"type": "string", "format": "ipv4"}, ["127.0.0.1"], ["127.0.0", "256.0.0.1"]),
    "uuid": ({"type": "string", "format": "uuid"}, ["2eb8aa08-aa98-11ea-b4aa-73b441d16380"], ["2eb8aa08", ""]),
    "items": ({"type": "array", "items": {"type": "integer"}}, [[], [1], [1, 2]], [["x"], [1, None], 1]),
    "prefixItems": (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 1},
        [[1], [1, "x"]],
        [[], ["x"], [1, "x", 2]],
    ),
    "minItems": ({"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2}, [[None], [None, None]], [[]]),
    "required": (
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["b"]},
        [{"b": True}, {"a": 1, "b": False}, {"a": 1, "b": True, "c": []}],
        [{}, {"a": 1}, {"a": "x", "b": True}],
    ),
    "additionalProperties": (
        {"type": "object", "properties": {"a": True}, "additionalProperties": {"type": "integer"}},
        [{}, {"a": "x"}, {"a": "x", "b": 1}, {"c": 2}],
        [{"b": "x"}, {"a": 1, "b": None}],
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": False},
        [{}, {"x_": 1}, {"x_a": 2, "x_b": 3}],
        [{"y": 1}, {"x_": "1"}],
    ),
    "properties": ({"type": "object", "minProperties": 1, "maxProperties": 2}, [{"a": 1}, {"a": 1, "b": 2}], [{}, {"a": 1, "b": 2, "c": 3}]),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "array", "maxItems": 0}]}, [1, []], ["x", [1]]),
    "oneOf": (
        {
            "oneOf": [
                {"type": "object", "properties": {"kind": {"const": kind}, kind: {"type": "integer"}}, "required": ["kind"], "additionalProperties": False}
                for kind in ("one", "two")
            ]
        },
        [{"kind": "one", "one": 1}, {"kind": "two"}],
        [{"kind": "one", "two": 1}, {"kind": "three"}],
    ),
    "allOf": ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, [3, 5], [2, 6]),
    "$ref": (
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "array", "items": {"$ref": "#/$defs/a~1b"}}}},
        [[], [[]], [[], [[]]]],
        [1, [1], {}],
    ),
    "unicode keys": (
        {"type": "object", "properties": {"größe": {"type": "integer"}, "名前 😀": {"type": "string"}}, "required": ["名前 😀"], "additionalProperties": False},
        [{"größe": 1, "名前 😀": "x"}, {"名前 😀": ""}],
        [{"größe": 1}, {"grösse": 1, "名前 😀": "x"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SELECTION)
def test_a_schema_allows_what_is_valid_and_nothing_else(demo: mn.Model, name: str) -> None:
    schema, valid, invalid = SELECTION[name]
    constraint = mn.Constraint.json_schema(schema)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for value in valid:
        assert validator.is_valid(value)
        assert accepts(constraint, json.dumps(value, ensure_ascii=False), demo.tokenizer), value
    for value in invalid:
        assert not accepts(constraint, json.dumps(value, ensure_ascii=False), demo.tokenizer), value


REFUSED: dict[str, tuple[Any, str]] = {
    "not": ({"type": "object", "properties": {"a": {"not": {"type": "null"}}}}, "#/properties/a"),
    "uniqueItems": ({"type": "array", "items": {"type": "array", "uniqueItems": True}}, "#/items"),
    "contains": ({"anyOf": [{"type": "null"}, {"type": "array", "contains": {"const": 1}}]}, "#/anyOf/1"),
    "propertyNames": ({"type": "object", "propertyNames": {"maxLength": 3}}, "#"),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "#"),
    "dependentSchemas": ({"type": "object", "dependentSchemas": {"a": {}}}, "#"),
    "if": ({"if": {"type": "string"}, "then": {"minLength": 2}}, "#"),
    "unevaluatedProperties": ({"type": "object", "unevaluatedProperties": False}, "#"),
    "a format": ({"$ref": "#/$defs/x~1y", "$defs": {"x/y": {"type": "string", "format": "iban"}}}, "#/$defs/x~1y"),
    "a look-ahead": ({"type": "object", "properties": {"a/b": {"type": "string", "pattern": "(?=a)b"}}}, "#/properties/a~1b"),
    "an unknown type": ({"type": "object", "properties": {"größe": {"type": "int"}}}, "#/properties/größe"),
    "a oneOf that may overlap": ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "#"),
    "another document": ({"type": "array", "items": {"$ref": "https://example.org/x.json"}}, "#/items/$ref"),
    "another file": ({"items": {"$ref": "other.json#/x"}}, "#/items/$ref"),
    "nowhere": ({"type": "array", "items": {"$ref": "#/$defs/nowhere"}}, "#/items"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_schema_cannot_have_is_refused_with_its_place(name: str) -> None:
    schema, path = REFUSED[name]
    with pytest.raises(mn.ConstraintError) as caught:
        mn.Constraint.json_schema(schema)
    assert caught.value.path == path
    assert "\n" not in str(caught.value)


@pytest.mark.skipif("JSON_SCHEMA_TEST_SUITE" not in os.environ, reason="JSON_SCHEMA_TEST_SUITE names no folder")
def test_what_is_accepted_of_the_test_suite_is_valid(demo: mn.Model) -> None:
    """In the long form: the folder `json` of the source distribution of `jsonschema`, or a copy of the suite."""
    from pathlib import Path

    folder = Path(os.environ["JSON_SCHEMA_TEST_SUITE"]) / "tests" / "draft2020-12"
    n_cases = 0
    refused: dict[str, str] = {}
    wrong = []
    for file in sorted(folder.glob("*.json")):
        for group in json.loads(file.read_text(encoding="utf-8")):
            try:
                constraint = mn.Constraint.json_schema(group["schema"])
            except mn.ConstraintError as error:
                refused[f"{file.stem}: {group['description']}"] = str(error)
                continue
            for case in group["tests"]:
                n_cases += 1
                if not case["valid"] and accepts(constraint, json.dumps(case["data"], ensure_ascii=False), demo.tokenizer):
                    wrong.append((file.stem, group["description"], case["description"]))
    print(f"{n_cases} cases; refused: {json.dumps(refused, indent=1, ensure_ascii=False)}")
    assert n_cases > 300
    assert not wrong
