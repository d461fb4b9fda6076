"""`minerva bench` as a person or a script uses it."""

import argparse
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import minerva_native as mn
from minerva_native.benchmark import roofline
from minerva_native.cli import bench, main

MINERVA = [sys.executable, "-m", "minerva_native", "bench"]
QUICK = ("-t", "1", "-r", "2")

LLAMA_BENCH_FIELDS = {
    *("build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename", "model_type"),
    *("model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "n_gpu_layers"),
    *("flash_attn", "devices", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts"),
    *("stddev_ts", "samples_ns", "samples_ts"),
}


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "READ_SECONDS", 0.001)


class Output:
    """What a command in this process printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str):
        lengths = () if {"-p", "-n"} & {*arguments} else ("-p", "8", "-n", "8")
        self.status = main(["bench", *QUICK, *lengths, *arguments])
        self.out, self.err = capsys.readouterr()

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.out)["results"]
        return rows


def test_json_has_the_fields_of_llama_bench_and_more(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(capsys, "-o", "json", "-pg", "8,8", "-d", "4")
    assert output.status == 0
    assert [row["test"] for row in output.rows] == ["pp8 @ d4", "tg8 @ d4", "pp8+tg8 @ d4"]
    for row in output.rows:
        assert row.keys() >= LLAMA_BENCH_FIELDS
        assert row.keys() == output.rows[0].keys()
        assert len(row["samples_ns"]) == len(row["samples_ts"]) == 2
        assert (row["time_to_first_token_ns"] is not None) == (row["n_prompt"] > 0)
        assert (row["token_p99_ns"] is not None) == (row["parts_whole_ns"] is not None) == (row["n_gen"] > 0)
        assert (row["roofline_share"] is not None) == (row["n_gen"] > 0)


@pytest.mark.parametrize("option", [("--json",), ("-o", "json")])
def test_json_is_one_object_with_all_results(capsys: pytest.CaptureFixture[str], option: tuple[str, ...]) -> None:
    out = Output(capsys, *option).out
    assert [row["test"] for row in json.loads(out)["results"]] == ["pp8", "tg8"]
    first, *rows, last = out.splitlines()
    assert (first, last) == ('{"results": [', "]}")
    assert [json.loads(row.removesuffix(","))["test"] for row in rows] == ["pp8", "tg8"], "one on a line"


def test_every_format_has_every_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert [json.loads(line)["test"] for line in Output(capsys, "-o", "jsonl").out.splitlines()] == ["pp8", "tg8"]
    rows = list(csv.DictReader(io.StringIO(Output(capsys, "-o", "csv").out)))
    assert [row["test"] for row in rows] == ["pp8", "tg8"]
    names, rule, *lines, empty, about = Output(capsys, "-o", "md").out.splitlines()
    assert [name.strip() for name in names.strip("|").split("|")][:7] == [
        *("model", "size", "params", "backend", "threads", "test", "t/s")
    ]
    assert len({len(line) for line in (names, rule, *lines)}) == 1
    assert len(lines) == 2
    assert not empty
    assert mn.build_info()["llama_cpp"] in about
    assert "threads" not in about, "it has a column"
    assert "type_k f16" in about
    assert "fa auto" in about
    table = Output(capsys).out
    assert "pp8" in table
    assert "a token of generate(): decode" in table
    assert "the limit" in table


def on_a_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, *arguments: str
) -> list[str]:
    """Return the lines of a table on a terminal."""
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        patch.setattr(sys.stdout, "isatty", lambda: True)
        return re.sub(r"\x1b\[[0-9;]*m", "", Output(capsys, *arguments).out).splitlines()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_what_is_around_the_table_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    lines = on_a_screen(capsys, monkeypatch, width)
    around = [line for line in lines if not re.match(r" *(test|pp8|tg8) ", line)]
    assert len(around) > 5
    assert max(map(len, around)) <= width
    assert not [line for line in around if re.search(r"(loop|text)$", line)], "a name is apart from its figure"


@pytest.mark.parametrize("kind", ["table", "md"])
def test_nothing_sits_between_the_rows_of_a_table(kind: str) -> None:
    # A text longer than the model was trained on is warned about, once the second half of the tests begins.
    command = [*MINERVA, "-t", "1", "-r", "3", "-p", "8,16", "-n", "8,24", "-d", "0,2000", "-o", kind]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    lines = result.stdout.splitlines()
    is_row = [bool(re.match(r"[| ]+(llama|pp|tg)\S* ", line)) for line in lines]
    assert sum(is_row) == 8
    first = is_row.index(True)
    assert all(is_row[first : first + 8]), result.stdout
    assert "training context" in result.stdout, "there is something to warn about"


def test_percentiles_that_the_samples_cannot_tell_apart_have_no_column(capsys: pytest.CaptureFixture[str]) -> None:
    def names(*arguments: str) -> list[str]:
        out = Output(capsys, "-p", "0", "--no-parts", *arguments).out
        return re.findall(r"\bp\d+\b", next(line for line in out.splitlines() if line.startswith(" test")))

    assert names("-n", "34", "-r", "1") == ["p50", "p90", "p95"], "30 samples"
    assert names("-n", "5", "-r", "2") == ["p50"]
    assert names("-n", "1", "-r", "1") == []
    assert names("-n", "8,54", "-r", "2") == ["p50", "p90", "p95", "p99"]


def test_a_percentile_that_one_test_has_is_missing_in_another(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(capsys, "-p", "0", "--no-parts", "-n", "8,54", "-r", "2").out
    (short,), (long,) = (
        [line for line in out.splitlines() if line.startswith(f" {test} ")] for test in ("tg8", "tg54")
    )
    assert short.split().count("-") == 4, "p90, p95 and p99, and the limit of what fits into the cache"
    assert long.split().count("-") == 1


def test_a_terminal_of_unknown_width_is_not_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output = Output(capsys)
    assert output.status == 0
    assert "tg8" in output.out


def test_every_combination_of_lists_is_tested(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(
        capsys, "-o", "jsonl", "-ctk", "f16,q8_0", "-fa", "on", "-d", "0", "-d", "2,4", "-p", "8", "-n", "0"
    )
    rows = [json.loads(line) for line in output.out.splitlines()]
    assert [(row["type_k"], row["n_depth"]) for row in rows] == [
        (kind, depth) for kind in ("f16", "q8_0") for depth in (0, 2, 4)
    ]
    assert {row["flash_attn"] for row in rows} == {1}
    assert {row["test"].partition(" ")[0] for row in rows} == {"pp8"}


def test_a_busy_machine_is_warned_about(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    assert "minerva: warning: the load was 3.0" in Output(capsys, "-o", "json").err


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(capsys, "-o", "json")
    assert "minerva: tg8, test 2 of 2" in output.err
    assert len(output.rows) == 2


@pytest.mark.parametrize(("factor", "status"), [(1e-3, 0), (1e3, 1)])
def test_a_baseline_gives_ratios_and_a_verdict(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, factor: float, status: int
) -> None:
    rows = Output(capsys, "-o", "json").rows
    for row in rows:
        row["samples_ts"] = [factor * rate for rate in row["samples_ts"]]
    (tmp_path / "baseline.json").write_text(json.dumps(rows))
    output = Output(capsys, "-o", "json", "--baseline", str(tmp_path / "baseline.json"), "--fail-below", "0.97")
    assert output.status == status
    assert ("less than 0.97" in output.err) == bool(status)
    for row in output.rows:
        assert (row["ratio"] < 0.97) == bool(status)
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["baseline_differs"] == []


def test_without_fail_below_a_slower_run_is_not_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = Output(capsys, "-o", "json").rows
    for row in rows:
        row["samples_ts"] = [1e12] * 2
    (tmp_path / "baseline.json").write_text(json.dumps(rows))
    output = Output(capsys, "--baseline", str(tmp_path / "baseline.json"))
    assert output.status == 0
    assert "ratio" in output.out


def test_a_number_too_wide_for_its_column_is_not_truncated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = {"n_prompt": 0, "n_gen": 8, "n_depth": 0, "samples_ts": [1e-8, 1e-8]}
    (tmp_path / "baseline.json").write_text(json.dumps([row]))
    output = Output(capsys, "-p", "0", "-n", "8", "--baseline", str(tmp_path / "baseline.json"))
    assert re.search(r" \d{10,}\.\d{3} \[\d{10,}\.\d{3}, \d{10,}\.\d{3}\] ", output.out)


def test_a_baseline_of_other_tests_compares_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = {"n_prompt": 3, "n_gen": 0, "n_depth": 0, "samples_ts": [1.0]}
    (tmp_path / "baseline.json").write_text(json.dumps([row]))
    output = Output(capsys, "--baseline", str(tmp_path / "baseline.json"), "--fail-below", "0.5")
    assert output.status == 1
    assert "there is nothing to compare with" in output.err
    assert "tg8" not in output.err, "this is known before anything is measured"


def test_a_test_that_the_baseline_lacks_cannot_pass(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = {"n_prompt": 0, "n_gen": 8, "n_depth": 0, "samples_ts": [1e-3]}
    (tmp_path / "baseline.json").write_text(json.dumps([row]))
    output = Output(capsys, "--baseline", str(tmp_path / "baseline.json"), "--fail-below", "0.5")
    assert output.status == 1
    assert "has no pp8: --fail-below could not judge all tests" in output.err
    assert "tg8, test" not in output.err, "this is known before anything is measured"
    assert Output(capsys, "--baseline", str(tmp_path / "baseline.json")).status == 0


@pytest.mark.parametrize("kind", ["table", "md", "jsonl"])
def test_a_closed_pipe_is_an_error_only_with_fail_below(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    (tmp_path / "baseline.json").write_text(json.dumps(Output(capsys, "-o", "json").rows))
    command = [*MINERVA, "-t", "1", "-p", "8", "-n", "8", "-r", "1", "--no-parts", "-o", kind]
    verdict = ["--baseline", str(tmp_path / "baseline.json"), "--fail-below", "0.001"]
    for arguments, status in (([], 0), (verdict, 1)):
        with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.close()
            assert process.stderr is not None
            err = process.stderr.read()
        assert process.returncode == status
        assert (b"closed before all tests were compared" in err) == bool(status)
        assert b"Traceback" not in err


def test_a_baseline_of_another_model_compares_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = {"n_prompt": 0, "n_gen": 8, "n_depth": 0, "model_size": 1, "samples_ts": [1.0]}
    (tmp_path / "baseline.json").write_text(json.dumps([row]))
    output = Output(capsys, "-p", "0", "-n", "8", "--baseline", str(tmp_path / "baseline.json"), "--fail-below", "0.5")
    assert output.status == 1
    assert "the baseline has no tg8 of this model" in output.err
    assert "nothing was compared" in output.err


def test_differences_from_the_baseline_are_reported_in_every_format(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = Output(capsys, "-o", "json", "-n", "8").rows
    for row in rows:
        row |= {"cpu_info": "another", "n_threads": 64, "samples_ts": [1.0]}
    (tmp_path / "baseline.json").write_text(json.dumps(rows))
    for kind in ("md", "table", "jsonl"):
        output = Output(capsys, "-n", "8", "-p", "0", "-o", kind, "--baseline", str(tmp_path / "baseline.json"))
        assert "tg8 differs from the baseline in n_threads, cpu_info" in output.err
        assert "tg8 has 1 repetitions in the baseline" in output.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--baseline", "missing.json"), "missing.json"),
        (("--compare-llama-bench", "missing"), "missing is not an executable"),
        (("-m", "missing.gguf"), "missing.gguf does not exist"),
        (("--plot", "out.xyz"), "must be one of"),
        (("--plot", "missing/out.png"), "missing/out.png: No such file"),
    ],
)
def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str) -> None:
    output = Output(capsys, *arguments)
    assert output.status == 1
    errors = [line for line in output.err.splitlines() if "warning" not in line]
    assert len(errors) == 1
    assert words in errors[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("-p x", "'x' is not a number"),
        ("-p 1-100000", "more than"),
        ("-p 8-4", "is empty"),
        ("-t 1,0", "1 or more"),
        ("-b 0", "1 or more"),
        ("--fail-below 97% --baseline x", "is not a ratio"),
        ("-p -1", "-p"),
        ("-pg 8", "two numbers"),
        ("-ctk f17", "'f17' is none of"),
        ("-fa maybe", "'maybe' is none of"),
        ("-o sql", "invalid choice"),
        ("-ngl x", "'x' is not a list of numbers"),
        ("-r 0", "1 or more"),
        ("-p 0 -n 0", "nothing to test"),
        ("--fail-below 0.9", "something to compare with"),
        ("-n 0 --plot out.png", "nothing to plot"),
        ("--baseline x --compare-llama-bench y", "not allowed with"),
        ("--baseline=", "an empty name"),
        ("-lm copy", "'copy' is none of 0, 1, none, mmap"),
    ],
)
def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str], arguments: str, words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments.split()])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", [5]),
        ("1,2", [1, 2]),
        ("1-3", [1, 2, 3]),
        ("0-8+4", [0, 4, 8]),
        ("128-1024*2", [128, 256, 512, 1024]),
        ("2-2", [2]),
    ],
)
def test_numbers_can_be_lists_and_ranges(text: str, expected: list[int]) -> None:
    assert bench.numbers(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1,", "3-1", "1-8*1", "0-8*2", "1-8+0", "1.5", "-3"])
def test_a_wrong_list_of_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        bench.numbers(text)


def test_pictures_are_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert Output(capsys, "--plot", str(tmp_path / "out.png")).status == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "md", "table"])
def test_a_killed_run_has_printed_what_it_finished(kind: str) -> None:
    # The second test would take for ever.
    command = [*MINERVA, "-t", "1", "-n", "4,100000", "-p", "0", "-r", "1", "--no-parts", "-o", kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        seen = ""
        while "tg4" not in seen:
            line = process.stdout.readline()
            assert line, "it ended before the test was printed"
            seen += line
        process.kill()


def test_ctrl_c_closes_the_list() -> None:
    command = [*MINERVA, "-t", "1", "-n", "4,100000", "-p", "0", "-r", "1", "--no-parts", "-o", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "test 2 of 2" not in (line := process.stderr.readline()):
            assert line, "it ended before the second test"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [row["test"] for row in json.loads(out)["results"]] == ["tg4"]
    assert "interrupted: 1 of 2 tests are finished" in err
    assert "Traceback" not in err


def test_a_character_that_a_terminal_cannot_show_is_not_an_error() -> None:
    command = [*MINERVA, "-t", "1", "-p", "8", "-n", "0", "-r", "2"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert done.returncode == 0
    assert b"pp8" in done.stdout


def test_a_file_name_is_printed_unchanged(capsys: pytest.CaptureFixture[str], tiny: mn.Model, tmp_path: Path) -> None:
    shutil.copy(tiny.path, tmp_path / "m[red]:cat:.gguf")
    assert " m[red]:cat:.gguf," in Output(capsys, "-m", str(tmp_path / "m[red]:cat:.gguf")).out


@pytest.mark.parametrize("kind", ["table", "md", "json", "jsonl", "csv"])
def test_a_file_name_is_printed_without_its_control_characters(
    capsys: pytest.CaptureFixture[str], tiny: mn.Model, tmp_path: Path, kind: str
) -> None:
    shutil.copy(tiny.path, tmp_path / "m\x1b[2J\x7f.gguf")
    lengths = ("-p", "4", "-n", "0")
    out = Output(capsys, "-m", str(tmp_path / "m\x1b[2J\x7f.gguf"), *lengths, "-o", kind).out
    assert not re.search("[\x00-\x09\x0b-\x1a\x7f]|\x1b\\[2J", out)
    assert kind == "md" or "[2J" in out


def test_several_models(capsys: pytest.CaptureFixture[str], tiny: mn.Model) -> None:
    output = Output(capsys, "-m", str(tiny.path), "-m", str(mn.DEMO_PATH), "-o", "json", "-n", "4", "-p", "0")
    assert [row["model_filename"] for row in output.rows] == [str(tiny.path), str(mn.DEMO_PATH)]
