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
FUZZ = "import sys; from fuzz import exercise, run; sys.argv[0] = 'fuzz.run'; {before}; sys.exit(run.main())"


def fuzz(*options: str, before: str = "pass") -> list[dict[str, object]]:
    """Run the fuzzer in a process of its own, after a statement; return its findings."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", FUZZ.format(before=before), *options]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=1800, check=False
    )
    assert ended.returncode in (0, 1), ended.stderr
    findings = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == bool(findings)
    return findings


def told(findings: list[dict[str, object]]) -> str:
    lines = [f"{each['outcome']}\n    {each['mutations']}\n    {each['reproduce']}" for each in findings]
    return "\n".join([f"{len(findings)} findings", *lines])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[bases.Base]:
    return bases.models(tmp_path_factory.mktemp("bases"))


def test_there_are_at_least_twenty_models(models: list[bases.Base]) -> None:
    assert len({base.name for base in models}) >= 20


def test_a_file_that_is_parsed_and_written_is_the_same(models: list[bases.Base]) -> None:
    for part in (part for base in models for part in base.parts):
        assert mutate.write(mutate.parse(part)) == part


def test_a_mutant_is_a_function_of_its_name(models: list[bases.Base]) -> None:
    for base in models:
        made = set()
        for _ in range(2):
            file = mutate.parse(base.parts[0])
            mutate.mutate(random.Random(base.name), file)
            made.add(mutate.write(file))
        assert len(made) == 1


@pytest.mark.parametrize(
    ("sabotage", "outcome"),
    [
        ("os.abort()", "death: SIGABRT: "),
        ("ctypes.string_at(0)", "death: SIGSEGV: load; "),
        ("os._exit(3)", "death: exit 3: "),
        ("exec('while True: pass')", "hang: load"),
        ("bytearray(5 << 28).count(1)", "memory: load"),
        ("bytearray(1 << 40)", "untyped:MemoryError at "),
        ("{}['key']", "untyped:KeyError at "),
    ],
)
def test_what_becomes_of_a_process_is_seen(sabotage: str, outcome: str, tmp_path: Path) -> None:
    before = f"import ctypes, os; exercise.use_model = lambda path, how, at: (at('load'), {sabotage})"
    seconds = "1" if outcome.startswith("hang") else "30"  # the others end by themselves
    (finding,) = fuzz("--one", "llama:1:2", "--seconds", seconds, "--out", str(tmp_path), before=before)
    assert str(finding["outcome"]).startswith(outcome)
    assert {path.name for path in tmp_path.iterdir()} == {"SUMMARY.md", "llama-1-2.gguf", "llama-1-2.json"}


def test_one_mutant_is_made_again_and_kept(tmp_path: Path) -> None:
    fuzz("--one", "llama:1:2", "--out", str(tmp_path / "first"))
    fuzz("--one", "llama:1:2", "--out", str(tmp_path / "second"))
    first, second = (tmp_path / name / "llama-1-2.gguf" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_every_base_generates() -> None:
    findings = fuzz("--unchanged")
    assert not findings, told(findings)


def test_no_mutant_ends_or_hangs_the_process(tmp_path: Path) -> None:
    findings = fuzz("--count", str(COUNT), "--seed", str(SEED), "--out", str(tmp_path / "findings"))
    assert not findings, told(findings)
