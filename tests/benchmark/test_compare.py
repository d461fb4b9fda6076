"""Comparisons: ratios of pairs and their intervals, results from files, and llama-bench run in turns."""

import itertools
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

import minerva_native as mn
from minerva_native.benchmark import Source, bench, compare, measure

ROW: dict[str, Any] = {
    "n_prompt": 0,
    "n_gen": 128,
    "n_depth": 0,
    "model_size": 5,
    "model_n_params": 7,
    "n_threads": 2,
    "type_k": "f16",
    "samples_ts": [1.0, 2.0],
}


def test_a_ratio_is_the_median_of_pairs() -> None:
    ratio = compare.Ratio.of([10.0, 22.0, 30.0], [10.0, 20.0, 40.0])
    assert (ratio.median, ratio.low, ratio.high) == (1.0, 0.75, 1.1)


@pytest.mark.parametrize(
    ("n", "low", "high", "confidence"),
    # The sign test: with n pairs, the true median is outside (k-th smallest, k-th largest) with probability 2 P(X < k),
    # X ~ Binomial(n, 1/2). These are the values in tables of confidence intervals for a median.
    [(1, 1, 1, 0.0), (5, 1, 5, 0.9375), (6, 1, 6, 0.96875), (9, 2, 8, 0.9609375), (20, 6, 15, 0.9586)],
)
def test_an_interval_states_its_confidence(n: int, low: int, high: int, confidence: float) -> None:
    ratio = compare.Ratio.of([float(value) for value in range(1, n + 1)], [1.0] * n)
    assert (ratio.low, ratio.high) == (low, high)
    assert ratio.confidence == pytest.approx(confidence, abs=1e-4)


def test_an_interval_contains_the_median_as_often_as_it_states() -> None:
    # All 2^9 ways in which 9 ratios can be below or above a true median of 1.
    inside = 0
    for sides in itertools.product((0.5, 2.0), repeat=9):
        ratio = compare.Ratio.of(sides, [1.0] * 9)
        inside += ratio.low <= 1.0 <= ratio.high
    assert inside / 2**9 == pytest.approx(ratio.confidence)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([ROW, ROW]),
        json.dumps({"results": [ROW, ROW]}),
        f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n",
    ],
    ids=["list", "object", "lines"],
)
def test_results_are_read_back(tmp_path: Path, content: str) -> None:
    (tmp_path / "baseline").write_text(content)
    assert compare.load(tmp_path / "baseline") == [ROW, ROW]


def test_one_line_is_one_result(tmp_path: Path) -> None:
    (tmp_path / "baseline").write_text(json.dumps(ROW))
    assert compare.load(tmp_path / "baseline") == [ROW]


@pytest.mark.parametrize(
    "content",
    [
        *("", "text", "[]", "[1]", '{"results": 3}', '[{"n_gen": 3}]', "3", "null"),
        *(
            json.dumps([ROW | {"samples_ts": rates}])
            for rates in ([], [0.0], [-1], ["1"], [True], [1.0, float("nan")], 3, [10**400])
        ),
        "[" * 100_000,
        "\N{LATIN SMALL LETTER A WITH DIAERESIS}",
        json.dumps([ROW | {"n_gen": "128"}]),
    ],
)
def test_a_file_without_results(tmp_path: Path, content: str) -> None:
    (tmp_path / "baseline").write_text(content)
    with pytest.raises(ValueError, match="-o json"):
        compare.load(tmp_path / "baseline")


def test_the_same_test_is_found_by_its_lengths_and_its_model() -> None:
    others = [ROW | {"n_gen": 64}, ROW | {"model_size": 6}, ROW | {"n_depth": 1}]
    assert compare.find(ROW, [*others, ROW]) == (ROW, [])
    assert compare.find(ROW, others) is None


def test_the_most_similar_of_several_results_is_found_with_its_differences() -> None:
    near, far = ROW | {"n_threads": 4}, ROW | {"n_threads": 4, "type_k": "q8_0"}
    assert compare.find(ROW, [far, near]) == (near, ["n_threads"])
    assert compare.find(ROW, [far]) == (far, ["n_threads", "type_k"])


def test_gpu_layers_are_no_difference_without_a_gpu() -> None:
    other = ROW | {"n_gpu_layers": -1}
    assert compare.find(ROW | {"n_gpu_layers": 0}, [other]) == (other, [])
    assert compare.find(ROW | {"n_gpu_layers": 0, "gpu_info": "a card"}, [other]) == (other, ["n_gpu_layers"])


def test_results_of_llama_bench_are_results_too() -> None:
    theirs = {name: ROW[name] for name in ("n_prompt", "n_gen", "n_depth", "samples_ts")}
    assert compare.find(ROW, [theirs]) == (theirs, [])


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A program that answers like llama-bench and records how it was called."""
    path = tmp_path / "llama-bench"
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "with (pathlib.Path(sys.argv[0]).parent / 'calls').open('a') as file:\n"
        "    print(json.dumps(sys.argv[1:]), file=file)\n"
        "print(json.dumps([{'avg_ns': 1000000, 'samples_ns': [1000000]}]))\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def calls(stand_in: Path) -> list[list[str]]:
    return [json.loads(line) for line in (stand_in.parent / "calls").read_text().splitlines()]


def test_llama_bench_and_this_take_turns(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    repeat = measure.Run.repeat

    def noted(run: measure.Run) -> measure.Repetition:
        turns.append(len(calls(stand_in)))
        return repeat(run)

    monkeypatch.setattr(measure.Run, "repeat", noted)
    test = measure.Test(n_gen=4, n_threads=1)
    (row,) = bench(Source(), [test], repetitions=3, take_apart=False, llama_bench=compare.LlamaBench(stand_in))
    assert turns == [1, 2, 3]
    assert row["compared_with"] == "llama-bench"
    assert row["compared_samples_ts"] == [4000.0] * 3
    assert row["ratio"] == pytest.approx(sorted(row["samples_ts"])[1] / 4000.0)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((64, 0, 0), {"-p": "64", "-n": "0"}),
        ((0, 16, 32), {"-p": "0", "-n": "16", "-d": "32"}),
        ((64, 16, 0), {"-p": "0", "-n": "0", "-pg": "64,16"}),
    ],
)
def test_llama_bench_is_asked_for_the_same_test(
    stand_in: Path, lengths: tuple[int, int, int], expected: dict[str, str]
) -> None:
    test = measure.Test(*lengths, 256, 128, 3, "q8_0", "f32", "on")
    assert compare.LlamaBench(stand_in).repeat("model.gguf", 5, test, mmap=False, warm_up=False) == 1e6
    (words,) = calls(stand_in)
    assert words.pop() == "--no-warmup"
    asked = dict(zip(words[::2], words[1::2], strict=True))
    settings = {"-m": "model.gguf", "-b": "256", "-ub": "128", "-t": "3", "-ctk": "q8_0", "-ctv": "f32", "-fa": "on"}
    assert asked | settings | expected | {"-ngl": "5", "-lm": "none", "-r": "1", "-o": "json"} == asked


def test_a_program_of_the_same_name_in_path_is_not_run(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stand_in.parent)
    monkeypatch.setenv("PATH", "/nowhere")
    assert compare.LlamaBench("./llama-bench").repeat("m", 0, measure.Test(n_gen=1), mmap=True, warm_up=True) == 1e6


def test_a_name_that_llama_bench_would_read_as_several(stand_in: Path) -> None:
    with pytest.raises(mn.MinervaError, match="because of the comma"):
        compare.LlamaBench(stand_in).repeat("a,b.gguf", 0, measure.Test(n_gen=1), mmap=True, warm_up=True)


def test_a_failing_llama_bench_is_an_error_with_its_reason(stand_in: Path) -> None:
    stand_in.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such model')\n")
    with pytest.raises(mn.MinervaError, match=r"exit status 1\): no such model"):
        compare.LlamaBench(stand_in).repeat("model.gguf", 0, measure.Test(n_gen=1), mmap=True, warm_up=True)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "[]",
        "[" * 10_000,
        '[{"avg_ns": 0}]',
        '[{"avg_ns": -5}]',
        '[{"avg_ns": NaN}]',
        '[{"avg_ns": 1e-320}]',
        "\xff",
    ],
)
def test_a_llama_bench_that_answers_nonsense_fails(stand_in: Path, answer: str) -> None:
    stand_in.write_text(f"#!{sys.executable}\nimport sys\nsys.stdout.buffer.write({answer.encode('latin-1')!r})\n")
    with pytest.raises(mn.MinervaError, match="no result"):
        compare.LlamaBench(stand_in).repeat("model.gguf", 0, measure.Test(n_gen=1), mmap=True, warm_up=True)


def test_a_llama_bench_of_another_machine(stand_in: Path) -> None:
    stand_in.write_bytes(b"\x7fELF of something else")
    with pytest.raises(mn.MinervaError, match="could not be run"):
        compare.LlamaBench(stand_in).repeat("model.gguf", 0, measure.Test(n_gen=1), mmap=True, warm_up=True)


def test_a_missing_llama_bench(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CONTRIBUTING"):
        compare.LlamaBench(tmp_path / "llama-bench")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"results": ' * 50_000,
        b'[{"n_prompt": 1' + b"0" * 5000 + b', "n_gen": 0, "n_depth": 0, "samples_ts": [1.0]}]',
        b'[{"n_prompt": 1, "n_gen": 0, "n_depth": 0, "samples_ts": [NaN]}]',
        b'[{"n_prompt": 1, "n_gen": 0, "n_depth": 0, "samples_ts": [1e400]}]',
        b'[{"n_prompt": 1.5, "n_gen": 0, "n_depth": 0, "samples_ts": [1.0]}]',
        b'[{"n_prompt": 1, "n_gen": 0, "n_depth": 0, "samples_ts": "1.0"}]',
        b'{"results": 3}',
        b"null",
        b"\xff\xfe\x00",
        b"",
    ],
    ids=lambda content: content[:20],
)
def test_a_hostile_baseline_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "baseline.json").write_bytes(content)
    with pytest.raises(ValueError, match="write a baseline with -o json"):
        compare.load(tmp_path / "baseline.json")


@pytest.mark.parametrize("kind", ["folder", "FIFO", "device", "far too large"])
def test_a_baseline_is_a_file_of_some_size(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "baseline.json"
    match kind:
        case "folder":
            path.mkdir()
        case "FIFO":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "far too large":
            with path.open("wb") as file:
                file.truncate(1 << 40)
    with pytest.raises(ValueError, match="is not a file of at most"):
        compare.load(path)
