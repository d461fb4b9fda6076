"""Outputs of nine families of models with the parse that is right for each: the fixtures of canitoolcall.

`pip install canitoolcall jsonschema`. Its own checks judge; here are only the adapter and the bars. As a script this
file prints the figures: `PYTHONPATH=src python tests/oracles/test_canitoolcall.py`.

The text is cut into words and markers in place of each model's tokens, whose vocabularies are not here, and into
single characters too.
"""

import collections
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from minerva_native.tools import FORMATS, ToolFormat, read_tools

pytest.importorskip("jsonschema")
checks = pytest.importorskip("canitoolcall.checks")
chunking = pytest.importorskip("canitoolcall.chunking")
fixtures = pytest.importorskip("canitoolcall.fixtures")
results = pytest.importorskip("canitoolcall.results")

FORMAT = {each.name: each for each in FORMATS}

# By the variant of a family's reference model; the families have no chat templates with them.
VARIANTS = {
    "deepseek-v31": "deepseek-v3.1",
    "deepseek-v32": "deepseek-v3.2",
    "deepseek-v41": "deepseek-v4.1",
    "glm45-newline": "glm",
    "glm47-compact": "glm",
    "glm53-compact": "glm",
    "kimi-k2-thinking": "kimi-k2",
    "kimi-k2-instruct": "kimi-k2",
    "kimi-k3-xtml": "kimi-k3",
    "llama3-json": "llama",
    "llama4-pythonic": "llama4",
    "v3": "mistral-list",
    "v11-think-text": "mistral",
}
FAMILIES = {"mistral": "mistral", "qwen3-hermes": "hermes", "qwen3-xml": "qwen-xml"}
TAGS = {"v11-think-text": ("<think>", "</think>")}

STRATEGIES = (*chunking.DEFAULT_STRATEGIES, *map(chunking.ChunkStrategy.parse, ("char:0", "char:1", "char:2")))

PASSES = ("pass", "soft_pass")


def variant(fixture: Any, family: Any) -> str:
    return str(family.reference_for(fixture.reference_model).variant)


def format_of(fixture: Any, family: Any) -> ToolFormat:
    name = variant(fixture, family)
    return FORMAT[VARIANTS.get(name) or FAMILIES.get(fixture.family) or name]


def units(text: str, markers: tuple[str, ...]) -> tuple[list[str], set[str]]:
    """Return a text in pieces like tokens, and which of them are control tokens."""
    special = sorted(markers, key=len, reverse=True)
    found = re.findall(f"{'|'.join(map(re.escape, special))}|\\s?\\w{{1,7}}|\\s+|.", text, re.DOTALL)
    return found, set(special)


def parse(fixture: Any, family: Any, pieces: list[str]) -> Any:
    reference = family.reference_for(fixture.reference_model)
    prompt = fixture.generation_prompt if fixture.generation_prompt is not None else reference.default_generation_prompt
    tags = {"reasoning": TAGS[reference.variant]} if reference.variant in TAGS else {}
    parser = format_of(fixture, family).parser(read_tools(fixture.tools), prompt=prompt or "", **tags)
    total = results.StreamAccumulator()
    for piece in [*map(parser.feed, pieces), parser.flush()]:
        total.add_content(piece.content)
        total.add_reasoning(piece.reasoning)
        for call in piece.calls:
            total.append_tool_call(call.name, call.to_dict()["function"]["arguments"])
    return total.result()


def judge(fixture: Any, family: Any) -> tuple[str, list[Any]]:
    text, streams = fixture.raw_output, {}
    for strategy in STRATEGIES:
        pieces, special = (list(text), set()) if strategy.kind == "char" else units(text, tuple(family.markers))
        streams[strategy.id] = ["".join(group) for group in chunking.split(pieces, strategy, special)]
    observation = results.Observation(
        nonstream=parse(fixture, family, [text]),
        streams={name: parse(fixture, family, pieces) for name, pieces in streams.items()},
    )
    rows = checks.run_checks(fixture, family, observation)
    return checks.case_status(rows).value, rows


def all_cases() -> Iterator[tuple[Any, Any]]:
    families = fixtures.load_families()
    for fixture in fixtures.load_fixtures():
        yield fixture, families[fixture.family]


@pytest.fixture(scope="module")
def judged() -> dict[str, tuple[str, list[Any]]]:
    return {fixture.id: judge(fixture, family) for fixture, family in all_cases()}


def test_the_fixtures_are_parsed_as_they_should_be(judged: dict[str, tuple[str, list[Any]]]) -> None:
    wrong = [name for name, (status, _) in judged.items() if status not in PASSES]
    assert len(judged) >= 469
    assert len(wrong) <= len(judged) // 50, wrong


def test_the_cuts_of_a_stream_never_change_the_result(judged: dict[str, tuple[str, list[Any]]]) -> None:
    compared = [
        (name, row)
        for name, (_, rows) in judged.items()
        for row in rows
        if row.check in ("split_invariance", "stream_equals_nonstream")
    ]
    assert len(compared) > len(STRATEGIES) * len(judged)
    assert not [(name, row.detail) for name, row in compared if row.status.value != "pass"]


def main() -> None:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for fixture, family in all_cases():
        status, rows = judge(fixture, family)
        counts[fixture.family][status] += 1
        if status not in PASSES:
            worst = [row for row in rows if row.status.value == status and not row.strategy.startswith("char")]
            print(f"{status} {fixture.id}: {worst[0].check}: {worst[0].detail}", file=sys.stderr)
    for name, count in sorted(counts.items()):
        print(f"{name:14} {count['pass']:4} pass {count['soft_pass']:4} soft pass of {count.total():4}")
    total = sum(counts.values(), collections.Counter[str]())
    print(f"{'all':14} {total['pass']:4} pass {total['soft_pass']:4} soft pass of {total.total():4}")


if __name__ == "__main__":
    main()
