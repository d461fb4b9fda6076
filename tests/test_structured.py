"""Structured output: what is allowed, forced, refused and parsed, and a matcher in step with its sequence."""

import dataclasses
import datetime
import enum
import gc
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, Optional, TypedDict

import jsonschema
import numpy as np
import numpy.typing as npt
import pydantic
import pytest

import minerva_native as mn
from minerva_native import structured
from minerva_native._stack import with_stack
from minerva_native.grammars import check_ends
from minerva_native.reasoning import AfterReasoning, ReasoningDecoder
from minerva_native.schemas import prepare
from minerva_native.typed import build, schema_of
from random_schemas import random_schema
from tiny_models import TinyModel, write_gguf

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
}
REAL_MODEL = os.environ.get("MINERVA_REAL_MODEL", "")
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def context(demo: mn.Model) -> Iterator[mn.Context]:
    with demo.context(n_ctx=1024, n_seq=4, n_threads=1, kv_type="f32", flash_attention="off") as context:
        yield context


@pytest.fixture
def sequence(context: mn.Context) -> Iterator[mn.Sequence]:
    with context.sequence() as sequence:
        sequence.extend(context.model.tokenizer.encode("Once upon a time"))
        yield sequence


@pytest.fixture
def llm(demo: mn.Model) -> Iterator[mn.LLM]:
    with mn.LLM(demo, n_ctx=1024, n_threads=1, kv_type="f32", flash_attention="off") as llm:
        yield llm


def written(sequence: mn.Sequence, constraint: Any, seed: int = 1, max_tokens: int = 500, **options: Any) -> str:
    sampler = mn.Sampler(mn.SamplingParams(temperature=1.0, seed=seed))
    steps = list(mn.generate(sequence, sampler, max_tokens=max_tokens, constraint=constraint, **options))
    assert steps[-1].finish_reason == "end"
    return "".join(step.text for step in steps)


def allowed(matcher: mn.Matcher, n_vocab: int) -> set[int]:
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[:n_vocab]
    return set(np.flatnonzero(bits).tolist())


# What is written


@pytest.mark.parametrize("seed", range(3))
def test_every_kind_of_constraint_is_kept(sequence: mn.Sequence, seed: int) -> None:
    n = len(sequence)

    def text(constraint: mn.Constraint) -> str:
        sequence.truncate(n)
        return written(sequence, constraint, seed)

    assert jsonschema.Draft202012Validator(RECORD).is_valid(json.loads(text(mn.Constraint.json_schema(RECORD))))
    letters = text(mn.Constraint.regex("[a-f]{4,8}"))
    assert 4 <= len(letters) <= 8
    assert set(letters) <= set("abcdef")
    choices = ["yes", "no", 'a "quoted" one\n', "ชื่อ"]
    assert text(mn.Constraint.choice(choices)) in choices
    many = [f"number {at}" for at in range(5_000)]
    assert text(mn.Constraint.choice(many)) in many
    assert text(mn.Constraint.lark('start: "a" b\nb: "b" | "c" "d"')) in ("ab", "acd")
    assert text(mn.Constraint.gbnf('root ::= "a" [0-9] other\nother ::= "x" | "yz"'))[2:] in ("x", "yz")


def check_random_schemas(model: mn.Model, n: int) -> None:
    """Check that every value is valid. What has no end (a list, a number, a text) may be cut off, and says so."""
    n_complete = 0
    with model.context(n_ctx=1024) as context, context.sequence() as sequence:
        prompt = model.tokenizer.encode("A value as JSON:")
        for seed in range(n):
            schema = random_schema(random.Random(seed))
            constraint = mn.Constraint.json_schema(schema)
            sequence.assign(prompt)
            sampler = mn.Sampler(mn.SamplingParams(temperature=1.0, seed=seed))
            steps = list(mn.generate(sequence, sampler, max_tokens=400, constraint=constraint))
            if steps[-1].finish_reason == "length":
                continue
            text = "".join(step.text for step in steps)
            jsonschema.Draft202012Validator(schema).validate(constraint.parse(text))
            n_complete += 1
    print(f"{n} schemas: {n_complete} complete and valid values, {n - n_complete} cut off at 400 tokens")
    assert n_complete > 0.8 * n


def test_many_random_schemas_give_values_that_validate(demo: mn.Model) -> None:
    """MINERVA_RANDOM_SCHEMAS=1000 for the long form."""
    check_random_schemas(demo, int(os.environ.get("MINERVA_RANDOM_SCHEMAS", "120")))


@pytest.mark.real_model
@pytest.mark.skipif(not REAL_MODEL, reason="MINERVA_REAL_MODEL names no file: see CONTRIBUTING.md")
def test_a_real_model_keeps_to_random_schemas() -> None:
    with mn.Model.load(REAL_MODEL) as model:
        check_random_schemas(model, int(os.environ.get("MINERVA_RANDOM_SCHEMAS", "80")))


def test_an_object_has_the_properties_that_are_named_and_no_others(sequence: mn.Sequence) -> None:
    optional = {"type": "object", "properties": {"a": {"type": "null"}}}
    assert written(sequence, mn.Constraint.json_schema(optional)) in ("{}", '{"a": null}')
    assert prepare({**optional, "additionalProperties": True}) == {**optional, "additionalProperties": True}
    merged = {"allOf": [optional, {"properties": {"b": {"type": "null"}}}]}
    assert prepare(merged) == merged


def test_the_flags_of_a_compiled_pattern_count(demo: mn.Model) -> None:
    tokens = demo.tokenizer.encode("AB", add_special=False)
    matcher = mn.Constraint.regex(re.compile("ab", re.IGNORECASE)).matcher(demo.tokenizer)
    matcher.follow(tokens)
    assert matcher.can_end
    with pytest.raises(mn.ConstraintError, match="does not allow"):
        mn.Constraint.regex(re.compile("ab")).matcher(demo.tokenizer).follow(tokens)
    with pytest.raises(mn.ConstraintError, match="of the flags only"):
        mn.Constraint.regex(re.compile("a b", re.VERBOSE))
    assert len(repr(mn.Constraint.regex("a" * 1000))) < 100


def test_references_may_lead_anywhere_in_the_schema(sequence: mn.Sequence) -> None:
    animal = {"type": "object", "properties": {"legs": {"$ref": "#/parts/legs"}}, "required": ["legs"]}
    schema = {"$ref": "#/components/animal", "components": {"animal": animal}, "parts": {"legs": {"enum": [2, 4]}}}
    assert json.loads(written(sequence, mn.Constraint.json_schema(schema)))["legs"] in (2, 4)
    animal["properties"] = {"legs": {"$ref": "#/components/animal"}}
    with pytest.raises(mn.ConstraintError, match="nothing finite"):
        mn.Constraint.json_schema(schema)


def test_the_text_ends_when_the_value_is_complete(sequence: mn.Sequence) -> None:
    step = list(mn.generate(sequence, constraint=mn.Constraint.choice(["yes"])))[-1]
    assert step.finish_reason == "end"
    assert not sequence.context.model.tokenizer.is_end(step.token)


@pytest.mark.parametrize("kind", ["number", "integer"])
def test_a_number_comes_to_an_end(sequence: mn.Sequence, kind: str) -> None:
    tokenizer = sequence.context.model.tokenizer
    schema = {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": kind}]}}
    matcher = mn.Constraint.json_schema(schema).matcher(tokenizer)
    seven = tokenizer.encode("7", add_special=False)[0]
    matcher.follow(tokenizer.encode('["' + "7" * 50 + '\\"7', add_special=False))
    assert seven in allowed(matcher, tokenizer.n_vocab)  # a text may have as many as it likes
    digits = tokenizer.encode('", -' + "7" * 21, add_special=False)
    for token in digits:
        matcher.consume(token)
    branch = matcher.fork()
    assert seven not in allowed(matcher, tokenizer.n_vocab) | allowed(branch, tokenizer.n_vocab)
    matcher.rollback(9)
    assert seven in allowed(matcher, tokenizer.n_vocab)

    def sevens(logits: npt.NDArray[np.float32], tokens: Sequence[int]) -> int:
        return seven if logits[seven] > -np.inf else int(logits.argmax())

    steps = list(mn.generate(sequence, sevens, max_tokens=99, constraint=mn.Constraint.json_schema({"type": kind})))
    assert steps[-1].finish_reason == "end"
    assert isinstance(json.loads("".join(step.text for step in steps)), int | float)


# Forced tokens


def test_forced_tokens_are_evaluated_together(sequence: mn.Sequence) -> None:
    n_before, text = len(sequence), "The quick brown fox jumps over the lazy dog"
    stats = sequence.context.stats
    before = (stats.tokens_evaluated, stats.decode_calls)
    steps = list(mn.generate(sequence, constraint=mn.Constraint.regex(f"{text} [ab]{{1}}!")))
    assert "".join(step.text for step in steps) in (f"{text} a!", f"{text} b!")
    forced = [step.is_forced for step in steps]
    assert sum(forced) >= len(steps) - 3
    _ = sequence.logits
    stats = sequence.context.stats
    assert stats.tokens_evaluated - before[0] == len(sequence) - n_before
    assert stats.decode_calls - before[1] <= 4


def test_forced_tokens_change_nothing_but_the_work(sequence: mn.Sequence) -> None:
    class Unforced(structured.Matcher):
        def forced(self) -> int | None:
            return None

    # What is forced can be spelled in one way only, token by token, so that the model sees the same either way.
    texts = []
    constraint = mn.Constraint.regex("0 ([1-3]) 0 ([4-6]) 0 ([7-9])")
    for kind in (structured.Matcher, Unforced):
        matcher = constraint.matcher(sequence.context.model.tokenizer)
        matcher.__class__ = kind
        with sequence.fork() as fork:
            steps = list(mn.generate(fork, mn.SamplingParams.greedy(), constraint=matcher))
        assert any(step.is_forced for step in steps) == (kind is structured.Matcher)
        texts.append("".join(step.text for step in steps))
    assert texts[0] == texts[1]


def test_forced_tokens_count_and_stop_at_the_limit(llm: mn.LLM) -> None:
    answer = llm.complete("Once", constraint=["The quick brown fox jumps over the lazy dog"], max_tokens=5)
    assert answer.finish_reason == "length"
    assert answer.usage.completion_tokens == 5
    assert answer.usage.forced_tokens == 5
    assert "The quick brown fox".startswith(answer.text.rstrip()) or answer.text.startswith("The quick")


def test_forced_tokens_have_log_probabilities_if_they_are_asked_for(llm: mn.LLM) -> None:
    answer = llm.complete("Once", constraint=["upon a time there was"], logprobs=True)
    assert answer.usage.forced_tokens > 0
    assert answer.logprobs is not None
    scored = llm.score(llm.tokenizer.encode("Once") + answer.tokens).logprobs[-len(answer.tokens) :]
    assert [one.logprob for one in answer.logprobs] == pytest.approx(scored, abs=1e-3)
    assert all(one.top == () for one in answer.logprobs)


# The mask


@pytest.mark.parametrize("in_thread", [False, True])
def test_the_mask_allows_what_leads_to_one_of_the_choices(demo: mn.Model, in_thread: bool) -> None:
    choices = ["apple", "apple pie", "apricot", "banana", "añejo"]
    tokenizer = demo.tokenizer
    matcher = mn.Constraint.choice(choices).matcher(tokenizer, in_thread=in_thread)
    generator = random.Random(7)
    for _ in range(20):
        matcher.rollback(len(matcher.tokens))
        prefix = b""
        while not matcher.is_complete:
            matcher.prepare()
            is_forced = matcher.forced() is not None  # then only the usual spelling is allowed
            for token in range(tokenizer.n_vocab):
                piece = b"" if tokenizer.is_control(token) else tokenizer.piece(token)
                leads = piece and any(choice.encode().startswith(prefix + piece) for choice in choices)
                ends = tokenizer.is_end(token) and prefix.decode(errors="replace") in choices
                is_allowed = token in allowed(matcher, tokenizer.n_vocab)
                assert is_allowed == bool(leads or ends) or (is_forced and not is_allowed), (prefix, piece)
            possible = [t for t in allowed(matcher, tokenizer.n_vocab) if not tokenizer.is_end(t)]
            token = generator.choice(possible)
            matcher.consume(token)
            prefix += tokenizer.piece(token)
        assert prefix.decode() in choices


def test_functions_that_choose_see_masked_logits(sequence: mn.Sequence) -> None:
    seen: list[npt.NDArray[np.float32]] = []

    def chooser(logits: npt.NDArray[np.float32], tokens: Sequence[int]) -> int:
        seen.append(logits)
        return int(logits.argmax())

    steps = list(mn.generate(sequence, chooser, constraint=mn.Constraint.regex("[xyz]{3}")))
    assert len("".join(step.text for step in steps)) == 3
    assert all(np.isneginf(logits).sum() > logits.size / 2 for logits in seen)
    assert all(step.logprob < 0 for step in steps if not step.is_forced)


# In step with the sequence


def test_the_matcher_follows_a_sequence_that_goes_back(sequence: mn.Sequence) -> None:
    constraint = mn.Constraint.regex("[a-z]{20}")
    n, reasons = len(sequence), []
    for step in mn.generate(sequence, mn.SamplingParams(temperature=1.0, seed=3), constraint=constraint):
        reasons.append(step.finish_reason)
        if len(reasons) in (4, 9):
            sequence.rewind(2)
    assert len(sequence.context.model.tokenizer.decode(sequence[n:]).strip()) == 20
    assert reasons[-1] == "end"


def test_tokens_that_the_caller_adds_count(sequence: mn.Sequence) -> None:
    tokenizer = sequence.context.model.tokenizer
    n, constraint = len(sequence), mn.Constraint.regex("[ab]+c[xyz]{2}")
    for at, _ in enumerate(mn.generate(sequence, mn.SamplingParams(temperature=1.0, seed=3), constraint=constraint)):
        if at == 0:
            sequence.truncate(n)
            sequence.extend(tokenizer.encode("abc", add_special=False))
    assert tokenizer.decode(sequence[n:]).strip()[:3] == "abc"
    assert len(tokenizer.decode(sequence[n:]).strip()) == 5


def test_tokens_that_the_caller_adds_against_the_constraint_are_an_error(sequence: mn.Sequence) -> None:
    steps = mn.generate(sequence, constraint=mn.Constraint.regex("[a-z]{20}"))
    next(steps)
    sequence.extend(sequence.context.model.tokenizer.encode("7", add_special=False))
    with pytest.raises(mn.ConstraintError, match="does not allow token"):
        next(steps)


def test_forks_go_their_own_ways(sequence: mn.Sequence) -> None:
    matcher = mn.Constraint.json_schema(RECORD).matcher(sequence.context.model.tokenizer)
    n = len(sequence)
    steps = mn.generate(sequence, mn.SamplingParams(temperature=1.0, seed=5), constraint=matcher)
    while len(matcher.tokens) < 5:
        next(steps)
    texts = set()
    for seed in range(6):
        with sequence.fork() as fork:
            written(fork, matcher.fork(), seed)
            text = sequence.context.model.tokenizer.decode(fork[n:])
            jsonschema.validate(json.loads(text), RECORD)
            texts.add(text)
    assert len(texts) > 3
    assert len(matcher.tokens) == 5
    for _ in steps:
        pass
    jsonschema.validate(json.loads(sequence.context.model.tokenizer.decode(sequence[n:])), RECORD)


def test_a_token_that_is_refused_changes_nothing(demo: mn.Model) -> None:
    tokenizer = demo.tokenizer
    matcher = mn.Constraint.choice(["yes"]).matcher(tokenizer)
    with pytest.raises(mn.ConstraintError, match=r"does not allow token .* here"):
        matcher.follow(tokenizer.encode("no", add_special=False))
    for token in tokenizer.encode("yes", add_special=False):
        assert not matcher.is_complete
        matcher.consume(token)
    assert matcher.is_complete
    with pytest.raises(mn.ConstraintError, match="does not allow token"):
        matcher.consume(5)
    matcher.rollback(1)
    assert not matcher.is_complete


def test_a_matcher_goes_back_from_the_end(demo: mn.Model) -> None:
    matcher = mn.Constraint.choice(["yes", "yesterday"]).matcher(demo.tokenizer)
    ids = demo.tokenizer.encode("yesterday", add_special=False)
    for token in ids:
        matcher.consume(token)
    assert matcher.is_complete
    matcher.rollback(len(ids))
    assert not matcher.is_complete
    assert not matcher.can_end
    assert list(matcher.tokens) == []
    with pytest.raises(ValueError, match="cannot go back by 1"):
        matcher.rollback(1)
    matcher.follow(ids)
    assert matcher.is_complete


# After the reasoning


class Script:
    """A chooser of the tokens of a text; it fails if one of them is masked."""

    def __init__(self, ids: list[int]):
        self._ids = iter(ids)

    def __call__(self, logits: npt.NDArray[np.float32], tokens: Sequence[int]) -> int:
        token = next(self._ids)
        assert logits[token] > -np.inf, token
        return token


@pytest.mark.parametrize("opens", [True, False])
def test_the_constraint_begins_after_the_reasoning(sequence: mn.Sequence, opens: bool) -> None:
    tokenizer, tags = sequence.context.model.tokenizer, ("<think>", "</think>")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False)

    guide = mn.Constraint.choice(["yes", "no"]).matcher(tokenizer)
    reasoning = ReasoningDecoder(tokenizer, tags, after=sequence[-1], inside=opens)
    after = AfterReasoning(guide, reasoning, may_begin=not opens, tokenizer=tokenizer)
    opening = [] if opens else encode("<think>")[:1]  # the rest is forced
    script = [*opening, *encode("Is it 7? Perhaps."), *encode("</think>"), *encode("no")]
    steps = list(mn.generate(sequence, Script(script), decoder=reasoning, constraint=after))
    assert "".join(step.text for step in steps) == "no"
    assert reasoning.take() == "Is it 7? Perhaps."
    assert steps[-1].finish_reason == "end"


def test_a_model_that_does_not_think_answers_within_the_constraint(llm: mn.LLM) -> None:
    answer = llm.chat_completion(HELLO, thinking_tags=("<think>", "</think>"), constraint=["yes", "no"], seed=1)
    assert answer.text in ("yes", "no")
    answer = llm.complete("<think>", thinking_tags=("<think>", "</think>"), constraint=["yes"], reasoning_budget=4)
    assert answer.reasoning
    assert answer.parsed == "yes"


# `LLM`


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=10)
    age: int = pydantic.Field(ge=0, le=120)


OPENAI = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": RECORD}}


def test_a_response_format_gives_a_parsed_value(llm: mn.LLM) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 1}
    person = llm.chat_completion(HELLO, response_format=Person, **options).parsed
    assert isinstance(person, Person)
    for form in (OPENAI, RECORD, {"type": "json_object", "schema": RECORD}):
        answer = llm.chat_completion(HELLO, response_format=form, **options)
        assert answer.finish_reason == "end"
        jsonschema.validate(answer.parsed, RECORD)
    assert llm.complete("a", response_format={"type": "text"}, max_tokens=3).parsed is None
    with llm.chat(response_format=Person) as chat:
        assert isinstance(chat.send("Hello", **options).parsed, Person)
        assert chat.send("Hello", constraint=["yes"]).parsed == "yes"
        assert isinstance(chat.send("Hello", **options).parsed, Person)
    chunks = list(llm.stream("a", constraint=["yes", "no"]))
    assert "".join(chunk.text for chunk in chunks) in ("yes", "no")


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


@dataclasses.dataclass
class Tree:
    """It contains itself."""

    colour: Colour
    height: Annotated[float, "in metres"]
    planted: datetime.date
    branches: "list[Tree]" = dataclasses.field(default_factory=list)


class Place(TypedDict):
    at: tuple[int, int]
    trees: NotRequired[dict[str, Tree]]


class Pair(NamedTuple):
    first: Literal["a", 1, None]
    second: bool | None = None


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (
            Tree,
            {"colour": "red", "height": 2, "planted": "2024-02-29"},
            Tree(Colour.RED, 2.0, datetime.date(2024, 2, 29)),
        ),
        (
            Place,
            {"at": [1, 2], "trees": {"a": {"colour": "green", "height": 1.5, "planted": "1999-01-01", "branches": []}}},
            {"at": (1, 2), "trees": {"a": Tree(Colour.GREEN, 1.5, datetime.date(1999, 1, 1), [])}},
        ),
        (Pair, {"first": 1}, Pair(1)),
        (list[Pair], [{"first": None, "second": True}], [Pair(None, True)]),
        (set[int], [1, 2, 2], {1, 2}),
        (int | str | list[float], [1, 2.5], [1.0, 2.5]),
        (Optional[Person], {"name": "Ann", "age": 3}, Person(name="Ann", age=3)),  # noqa: UP045
        (dict[str, uuid.UUID], {"a": "0" * 32}, {"a": uuid.UUID(int=0)}),
        (tuple[bool, ...], [True], (True,)),
    ],
)
def test_types_have_schemas_and_values_become_their_instances(kind: Any, value: Any, expected: Any) -> None:
    schema = schema_of(kind)
    jsonschema.Draft202012Validator(schema).validate(value)
    built = mn.Constraint.json_schema(kind).parse(json.dumps(value))
    assert built == expected
    assert type(built) is type(expected)
    others: list[Any] = [[[]], "wrong", {"other": 1}, -0.5, [1, 2]]
    wrong = [other for other in others if not jsonschema.Draft202012Validator(schema).is_valid(other)]
    assert len(wrong) > 2
    for other in wrong:
        with pytest.raises(mn.ConstraintError):
            build(kind, other)


def test_a_type_without_a_schema_is_an_error() -> None:
    for kind in (dict[int, str], complex, list[threading.Lock], int.__add__):
        with pytest.raises(TypeError, match=r"schema|keys"):
            mn.Constraint.json_schema(kind)


def test_descriptions_are_in_the_schema() -> None:
    assert schema_of(Tree)["$defs"]["Tree"]["properties"]["height"] == {"type": "number", "description": "in metres"}


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_is_an_instance_of_the_class_that_was_asked_for(llm: mn.LLM, seed: int) -> None:
    pair = llm.complete("a", response_format=Pair, temperature=1.0, seed=seed).parsed
    assert isinstance(pair, Pair)
    assert pair.first in ("a", 1, None)


def test_a_value_that_is_cut_off_raises_with_the_text(llm: mn.LLM) -> None:
    answer = llm.complete("a", response_format=RECORD, max_tokens=4)
    assert answer.finish_reason == "length"
    with pytest.raises(mn.ConstraintError, match="cut off before it was complete") as caught:
        _ = answer.parsed
    assert caught.value.text == answer.text
    with pytest.raises(mn.ConstraintError, match="cut off"):
        _ = llm.complete("a", constraint={"regex": "[a-z]{99}"}, max_tokens=2).parsed
    with mn.LLM(llm.model, n_ctx=64, n_threads=1) as small:
        long = {"type": "array", "items": {"type": "string"}, "minItems": 99}
        full = small.complete("Once upon", response_format=long)
        assert full.finish_reason == "length"
        assert full.context_full
        with pytest.raises(mn.ConstraintError):
            _ = full.parsed


def test_a_text_without_its_stop_string_or_before_its_beginning_is_not_complete(llm: mn.LLM) -> None:
    done = llm.complete("a", constraint=["one", "two"], stop=["one", "two"])
    assert (done.finish_reason, done.text) == ("stop", "")
    tags = ("<think>", "</think>")
    thinking = llm.complete("a<think>", constraint=re.compile("b*"), thinking_tags=tags, max_tokens=3)
    assert (thinking.finish_reason, thinking.text) == ("length", "")
    for cut in (done, thinking):
        with pytest.raises(mn.ConstraintError, match="cut off"):
            _ = cut.parsed


def test_undo_in_the_middle_of_a_value_leaves_a_sound_chat(llm: mn.LLM) -> None:
    with llm.chat(response_format=RECORD, temperature=1.0, seed=3) as chat:
        first = chat.send("Hello")
        stream = chat.stream("again")
        for _ in range(4):
            next(stream)
        chat.undo()
        stream.close()
        assert [message["content"] for message in chat.messages] == ["Hello", first.text]
        again = chat.send("again")
        jsonschema.validate(again.parsed, RECORD)
    messages = [*HELLO, first.message, {"role": "user", "content": "again"}]
    alone = llm.chat_completion(messages, response_format=RECORD, temperature=1.0, seed=3)
    assert alone.text == again.text


def test_threads_get_what_one_thread_gets(llm: mn.LLM) -> None:
    constraints = [{"json_schema": RECORD}, ["yes", "no"], {"regex": "[a-z]{3,9}"}, {"gbnf": 'root ::= "a" | "b"'}]

    def ask(at: int) -> str:
        constraint = constraints[at % len(constraints)]
        return llm.complete(f"Once {at}", constraint=constraint, temperature=0, max_tokens=60).text

    alone = list(map(ask, range(12)))
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(12))) == alone


def test_a_request_can_be_cancelled_inside_a_value(llm: mn.LLM) -> None:
    stop = threading.Event()
    stream = llm.stream("a", response_format={"type": "array", "items": {"type": "string"}}, cancel=stop)
    reasons = []
    for at, chunk in enumerate(stream):
        reasons.append(chunk.finish_reason)
        if at == 3:
            stop.set()
    assert reasons[-1] == "cancelled"
    assert llm.complete("a", constraint=["yes"]).parsed == "yes"


# What is refused


@pytest.mark.parametrize(
    ("schema", "path", "message"),
    [
        ({"properties": {"a": {"type": "array", "items": {"not": {}}}}}, "#/properties/a/items", "not"),
        ({"anyOf": [{"type": "null"}, {"type": "array", "uniqueItems": True}]}, "#/anyOf/1", "uniqueItems"),
        ({"$defs": {"a/b": {"type": "strin"}}, "$ref": "#/$defs/a~1b"}, "#/$defs/a~1b", "Invalid type"),
        ({"properties": {"a": {"$ref": "https://example.com/a"}}}, "#/properties/a", "nothing is fetched"),
        ({"properties": {"a": {"$ref": "#/$defs/gone"}}}, "#/properties/a", "has no #/\\$defs/gone"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "#", "minimum"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "#", "nothing finite"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "#/", "finite"),
        ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "#", "nothing finite"),
        ({"enum": []}, "#", "empty"),
        (False, "#", "empty"),
        ({"type": "string", "pattern": "(?=a)b"}, "#", "look-around"),
        ({"enum": [float("nan")]}, "", "not made of JSON values"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_with_its_path(schema: Any, path: str, message: str) -> None:
    with pytest.raises(mn.ConstraintError, match=message) as caught:
        mn.Constraint.json_schema(schema)
    assert caught.value.path.startswith(path)


def test_a_schema_whose_parts_are_of_wrong_types_is_refused_or_taken_and_never_fails_otherwise() -> None:
    parts: list[Any] = [None, 1, "x", [], {}, [1], {"a": 1}, True, 1.5, "\ud800", [{}], [[]]]
    keys = "type properties required items prefixItems minItems anyOf oneOf allOf enum const $ref $defs pattern format"
    n_refused = 0
    for key in f"{keys} additionalProperties patternProperties minLength minimum multipleOf x-guidance title".split():
        for part in parts:
            for schema in ({key: part}, {"type": "object", "properties": {"p": {key: part}, "q": {"$ref": "#"}}}):
                try:
                    mn.Constraint.json_schema(schema)
                except mn.ConstraintError:
                    n_refused += 1
    assert n_refused > 200


def test_large_texts_are_read_quickly() -> None:
    before = time.monotonic()
    mn.Constraint.lark("\n" * 400_000 + " " * 400_000 + 'start: "a"')
    for grammar in ("a" * 900_000, "a b" * 300_000, "(" * 400_000):
        with pytest.raises(mn.ConstraintError):
            mn.Constraint.lark(grammar)
    assert time.monotonic() - before < 30  # a second or so; hours if it grew with the square


def test_what_is_optional_and_infinite_is_left_out(sequence: mn.Sequence) -> None:
    endless = {"type": "object", "properties": {"again": {"$ref": "#/$defs/endless"}}, "required": ["again"]}
    schema = {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"$ref": "#/$defs/endless"}},
        "required": ["a"],
        "$defs": {"endless": endless},
    }
    assert written(sequence, mn.Constraint.json_schema(schema)) == '{"a": null}'


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mn.Constraint.lark('start: "a" start'), "never ends"),
        (lambda: mn.Constraint.lark('start: a\na: ("x" | b)  b\nb: "c" a'), "never ends"),
        (lambda: mn.Constraint.gbnf('root ::= "a" other\nother ::= "b" other'), "never ends"),
        (lambda: mn.Constraint.lark("start: missing"), 'unknown name: "missing"'),
        (lambda: mn.Constraint.gbnf("root = a"), "not GBNF"),
        (lambda: mn.Constraint.gbnf("root ::= " + "(" * 100_000), "nested too deeply"),
        (lambda: mn.Constraint.regex("(a"), "unclosed group"),
        (lambda: mn.Constraint.regex("(" * 50_000 + "a" + ")" * 50_000), "regex"),
        (lambda: mn.Constraint.choice([]), "a choice"),
        (lambda: mn.Constraint.lark('start: "' + "a" * 1_100_000 + '"'), "characters"),
        (lambda: mn.Constraint.lark("".join(f'r{at}: "a"\n' for at in range(6_000)) + "start: r0"), "6,001 rules"),
        (lambda: mn.Constraint.json_schema({"enum": ["a" * 1_100_000]}), "characters"),
        (lambda: mn.Constraint.choice([f"word {at} of many" for at in range(40_000)]), "too big"),
        (lambda: mn.Constraint.lark("start: " + " | ".join(f'"{at}"' for at in range(40_000))), r"symbols\) too big"),
        (
            lambda: mn.Constraint.gbnf("root ::= " + " | ".join(f'[^{at:04d}]* "x{at}"' for at in range(8_000))),
            "too big",
        ),
        (lambda: mn.Constraint.json_schema({"properties": {f"k{at}": {} for at in range(9_000)}}), "too big"),
    ],
)
def test_a_grammar_that_cannot_be_kept_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(mn.ConstraintError, match=message):
        make()


def test_a_constraint_is_compiled_once_for_all_answers(llm: mn.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = list[object]()

    def counted(function: Callable[[], Any], stack_bytes: int) -> Any:
        compiled.append(function)
        return with_stack(function, stack_bytes)

    def answer(city: str) -> None:
        """Say where it is."""

    constraint = mn.Constraint.choice(["yes", "no"])
    monkeypatch.setattr(structured, "with_stack", counted)
    llm.compile(llm.options("complete", {"constraint": constraint}))
    assert len(compiled) == 1
    answers = llm.complete("a", 3, constraint=constraint)
    assert all(one.parsed in ("yes", "no") for one in answers.choices)
    assert len(compiled) == 1
    llm.compile(llm.options("chat", {"tool_choice": "required"}), [answer])
    n_compiled = len(compiled)
    assert n_compiled > 1
    assert llm.chat_completion(HELLO, [answer], tool_choice="required", max_tokens=60).tool_calls is not None
    assert len(compiled) == n_compiled


def test_deep_and_long_schemas_are_refused_or_compiled_on_a_stack_that_holds_them(demo: mn.Model) -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(101):
        deep = {"type": "array", "items": deep}
    with pytest.raises(mn.ConstraintError, match="100 levels"):
        mn.Constraint.json_schema(deep)
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(mn.ConstraintError, match="100 levels"):
        mn.Constraint.json_schema(deep)
    del deep
    chain = "start: r0\n" + "".join(f"r{at}: r{at + 1}\n" for at in range(4_900)) + 'r4900: "a"'
    definitions = {f"r{at}": {"$ref": f"#/$defs/r{at + 1}"} for at in range(1_900)}
    schema = {"$ref": "#/$defs/r0", "$defs": {**definitions, "r1900": {"type": "null"}}}
    for constraint in (mn.Constraint.lark(chain), mn.Constraint.json_schema(schema)):
        assert len(allowed(constraint.matcher(demo.tokenizer), demo.tokenizer.n_vocab)) > 0
    with pytest.raises(mn.ConstraintError, match="references"):
        mn.Constraint.json_schema({"$defs": {f"r{at}": {"$ref": "#"} for at in range(2_100)}})


@pytest.mark.parametrize(
    "constraint",
    [
        {"regex": "(a{1000}){1000}"},
        {"json_schema": {"type": "object", "properties": {f"k{at}": {"type": "null"} for at in range(3_000)}}},
    ],
)
def test_a_constraint_that_is_too_complex_ends_with_an_error_that_says_so(
    llm: mn.LLM, constraint: Any, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = mn.Metrics()
    metrics.watch(llm)
    with pytest.raises(mn.ConstraintError, match=r"too many|max is"):
        llm.complete("a", constraint=constraint, max_tokens=20)
    metrics.unwatch(llm)
    assert 'outcome="error"} 1' in metrics.prometheus()
    assert not caplog.records  # nor has an observer failed
    assert llm.complete("a", constraint=["yes"]).parsed == "yes"


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "a" | start "b"',
        'start: "a" x?\nx: "b" x',
        'start: x*\nx: "b" x',
        "start: [x]\nx: x",
        'start: /a(b|c)/ x ~ 0..3 "\\"" // x: "a"\nx: x',
        'start: x{0,3} <|end|> %json {"a": "}"}\nx: x',
        "start: (/[^/]/ | x)+ | ()\nx: x",
        'start[capture]: part\npart.2: "x"i\n%ignore /\\s+/',
        "something else !!",
    ],
)
def test_grammars_that_end_are_not_suspected(grammar: str) -> None:
    check_ends(grammar)


def test_wrong_arguments_are_named(llm: mn.LLM, sequence: mn.Sequence) -> None:
    with pytest.raises(TypeError, match="not both"):
        llm.complete("a", response_format=RECORD, constraint=["a"])
    with pytest.raises(ValueError, match="echo has no place"):
        llm.complete("a", echo=True, constraint=["a"])
    with pytest.raises(TypeError, match="constraint must be a Constraint"):
        llm.complete("a", constraint="[a-z]")
    with pytest.raises(ValueError, match="one of json_schema, regex"):
        llm.complete("a", constraint={"rgex": "a"})
    with pytest.raises(TypeError, match="response_format must be"):
        llm.complete("a", response_format="json")
    for wrong in ({}, {"json_schema": None}, {"json_schema": {"name": "a", "strict": True}}, {"schema": None}):
        with pytest.raises(TypeError, match="has no schema"):
            llm.complete("a", response_format={"type": "json_schema", **wrong})
    with pytest.raises(TypeError, match="must be a list of texts"):
        mn.Constraint.choice("abc")
    with pytest.raises(TypeError, match="a schema must be"):
        mn.Constraint.json_schema(7)
    with pytest.raises(mn.ConstraintError, match="#/properties/a: Unimplemented"):
        llm.complete("a", response_format={"type": "object", "properties": {"a": {"not": {}}}})
    with pytest.raises(TypeError, match="constraint must be a Constraint, or"):
        mn.generate(sequence, constraint=7)  # type: ignore[arg-type]


def test_a_constraint_on_a_closed_model_or_without_a_vocabulary_is_an_error(tmp_path: Path) -> None:
    keys: dict[str, Any] = {f"llama.{key}": value for key, value in TinyModel().hyperparameters.items()}
    keys["tokenizer.ggml.model"] = "none"
    with mn.Model.load(write_gguf(tmp_path / "none.gguf", "llama", keys), vocab_only=True) as model:
        for _ in range(2):
            with pytest.raises(mn.TokenizerError, match="no vocabulary"):
                mn.Constraint.choice(["a"]).matcher(model.tokenizer)
    with mn.Model.demo() as model:
        tokenizer = model.tokenizer
    with pytest.raises(mn.ClosedError):
        mn.Constraint.choice(["a"]).matcher(tokenizer)


def test_without_llguidance_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['llguidance'] = None; import minerva_native as mn\n"
        "try: mn.Constraint.regex('a')\n"
        "except mn.MinervaError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'minerva-native[structured]'" in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_of_a_fork_makes_its_own_matchers(demo: mn.Model) -> None:
    constraint = mn.Constraint.choice(["a"])
    constraint.prepare(demo.tokenizer)  # its thread does not exist in the child
    matcher = constraint.matcher(demo.tokenizer, in_thread=True)
    matcher.prepare()
    matcher.mask()
    child = os.fork()
    if child == 0:
        fresh = constraint.matcher(demo.tokenizer, in_thread=True)
        fresh.prepare()
        os._exit(0 if fresh.mask().any() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_model_let_go_is_freed(demo: mn.Model) -> None:
    model = mn.Model.load(mn.DEMO_PATH)
    mn.Constraint.choice(["a"]).matcher(model.tokenizer)
    ref = weakref.ref(model.tokenizer)
    model.close()
    del model
    gc.collect()
    assert ref() is None


SHAPES: list[dict[str, Any]] = [
    {"response_format": RECORD},
    {"constraint": ["yes", "no", "maybe later"]},
    {"constraint": {"regex": "[a-z]{2,12}"}, "thinking_tags": ("<think>", "</think>"), "reasoning_budget": 5},
    {},
]


def walk(llm: mn.LLM, is_disturbed: bool) -> list[list[str]]:
    """Send, undo and fork at random; if it is disturbed, others ask at the same time, and streams are closed early."""
    generator, disturbing, others = random.Random(11), random.Random(12), list[Any]()
    chats = [llm.chat(temperature=0), llm.chat(system="Be brief.", temperature=0)]  # roundings depend on batches
    with ThreadPoolExecutor(3) as pool:
        for step in range(50):
            chat, request = generator.choice(chats), {**generator.choice(SHAPES), "seed": step, "max_tokens": 30}
            if is_disturbed:
                others += [pool.submit(llm.complete, f"Once {step}", **request) for _ in range(disturbing.randrange(3))]
                n_messages = len(chat.messages)
                with chat.stream("Leave", **{**request, "max_tokens": 999}) as stream:
                    for _ in zip(range(disturbing.randrange(5)), stream, strict=False):
                        pass
                llm.complete("a", max_tokens=0)  # when this is served, the turn has ended
                if len(chat.messages) > n_messages:  # it was complete before the stream was closed
                    chat.undo()
            match generator.choice(["send", "send", "send", "undo", "fork"]):
                case "send":
                    answer = chat.send(f"Number {step}?", **request)
                    if answer.constraint is not None and answer.finish_reason == "end":
                        assert answer.parsed is not None
                case "undo":
                    chat.undo()
                case _ if len(chats) < 5:
                    chats.append(chat.fork())
        assert all(other.result().usage.completion_tokens for other in others)
    return [[message["content"] for message in chat.messages] for chat in chats]


def test_a_walk_over_chats_with_constraints_is_not_disturbed_by_others(demo: mn.Model) -> None:
    options: dict[str, Any] = {"n_ctx": 4096, "n_threads": 1, "kv_type": "f32", "flash_attention": "off"}
    with mn.LLM(demo, **options) as llm, mn.LLM(demo, **options) as alone:
        assert walk(llm, is_disturbed=True) == walk(alone, is_disturbed=False)
