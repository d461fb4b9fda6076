"""A short, deterministic run of the fuzzer: every mutant ends in a typed error or in a model that generates."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import bases, mutate

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer forks, and limits what a process may take")

COUNT, SEED = 2000, 1
TESTS = Path(__file__).parents[1]


def fuzz(*options: str) -> list[dict[str, object]]:
    """Run the fuzzer in a process of its own; return its findings."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "fuzz.run", *options]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=1800, check=False
    )
    assert ended.returncode in (0, 1), ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def told(findings: list[dict[str, object]]) -> str:
    lines = [f"{each['outcome']}\n    {each['mutations']}\n    {each['reproduce']}" for each in findings]
    return "\n".join([f"{len(findings)} findings", *lines])


@pytest.fixture(scope="module")
def every_base() -> list[bases.Base]:
    return bases.bases()


def test_there_are_bases_of_every_kind(every_base: list[bases.Base]) -> None:
    assert len(every_base) >= 20


def test_a_file_that_is_parsed_and_written_is_the_same(every_base: list[bases.Base]) -> None:
    for part in (part for base in every_base for part in base.parts):
        assert mutate.write(mutate.parse(part)) == part


def test_a_mutant_is_a_function_of_its_name(every_base: list[bases.Base]) -> None:
    for base in every_base:
        made = set()
        for _ in range(2):
            file = mutate.parse(base.parts[0])
            mutate.mutate(random.Random(base.name), file)
            made.add(mutate.write(file))
        assert len(made) == 1


def test_every_base_generates() -> None:
    assert not fuzz("--unchanged")


def test_no_mutant_ends_or_hangs_the_process(tmp_path: Path) -> None:
    findings = fuzz("--count", str(COUNT), "--seed", str(SEED), "--out", str(tmp_path / "findings"))
    assert not findings, told(findings)
