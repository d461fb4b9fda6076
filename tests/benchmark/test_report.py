"""Figures from made-up times, and the output of each writer."""

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minerva_native.benchmark import machine, measure, report

Row = dict[str, Any]


def repetition(token_us: list[int], prompt_us: int = 0) -> measure.Repetition:
    token_ns = 1000 * np.array(token_us, np.int64)
    first = 1000 * prompt_us + 500 if prompt_us else None
    return measure.Repetition(1000 * prompt_us + int(token_ns.sum()), token_ns, first)


def test_rates_are_those_of_the_repetitions() -> None:
    row = report.figures(measure.Test(n_gen=2), [repetition([100, 100]), repetition([150, 250])])
    assert row["samples_ns"] == [200_000, 400_000]
    assert row["samples_ts"] == [10_000, 5_000]
    assert (row["avg_ns"], row["avg_ts"]) == (300_000, 7_500)
    assert row["stddev_ns"] == 141_421
    assert row["stddev_ts"] == pytest.approx(3535.53, abs=0.01)


def test_one_repetition_has_no_deviation() -> None:
    row = report.figures(measure.Test(n_gen=2), [repetition([100, 100])])
    assert (row["stddev_ns"], row["stddev_ts"]) == (0, 0)


def test_first_tokens_are_reported_separately() -> None:
    times = [9000, 5000, 3000, 2000, *range(1, 102)]
    row = report.figures(measure.Test(n_gen=105), [repetition(times), repetition(times)])
    assert row["first_tokens_ns"] == [9e6, 5e6, 3e6, 2e6]
    assert [row[f"token_p{p}_ns"] for p in (50, 90, 95, 99)] == [51_000, 91_000, 96_000, 100_000]
    assert (row["token_max_ns"], row["token_mean_ns"]) == (101_000, 51_000)
    assert row["token_jitter_ns"] == 1000
    assert np.array(row["token_ns"]).shape == (2, 105)


def test_no_token_is_left_out_if_there_are_few() -> None:
    row = report.figures(measure.Test(n_gen=2), [repetition([100, 300])])
    assert (row["token_p50_ns"], row["token_jitter_ns"]) == (200_000, 200_000)


def test_a_prompt_has_a_time_to_the_first_token_and_no_latencies() -> None:
    row = report.figures(measure.Test(n_prompt=64), [repetition([], 700), repetition([], 900)])
    assert row["time_to_first_token_ns"] == 800_500
    assert row["avg_ns"] == 800_000
    assert {name for name, value in row.items() if value is None} == {
        *(f"token_p{p}_ns" for p in (50, 90, 95, 99)),
        *("token_max_ns", "token_mean_ns", "token_jitter_ns", "first_tokens_ns", "token_ns"),
    }


def test_parts_are_means_over_runs() -> None:
    row = report.taken_apart([measure.Parts(10, 2, 3, 4, 5, 26), measure.Parts(20, 2, 3, 4, 5, 36)])
    assert (row["part_decode_ns"], row["part_loop_ns"]) == (15, 5)
    assert (row["parts_sum_ns"], row["parts_whole_ns"]) == (29, 31)
    assert set(report.taken_apart([]).values()) == {None}
    assert report.taken_apart([]).keys() == row.keys()


def test_a_row_without_a_comparison_has_the_same_fields() -> None:
    row = {"samples_ts": [2.0, 2.0]}
    compared = report.compared(row, "baseline", [1.0, 1.0])
    assert (compared["ratio"], compared["compared_avg_ts"]) == (2.0, 1.0)
    assert report.compared(row, "baseline", []).keys() == compared.keys()


def test_only_as_many_repetitions_are_compared_as_both_have() -> None:
    compared = report.compared({"samples_ts": [2.0, 2.0]}, "baseline", [1.0, 1.0, 7.0])
    assert (compared["ratio"], compared["compared_avg_ts"], compared["compared_samples_ts"]) == (2.0, 1.0, [1.0, 1.0])


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (None, "-"),
        (12, "12.0 ns"),
        (999, "999 ns"),
        (1500, "1.50 us"),
        (23.4e6, "23.4 ms"),
        (456e6, "456 ms"),
        (2e9, "2.00 s"),
    ],
)
def test_times_have_a_suitable_unit(nanoseconds: float | None, text: str) -> None:
    assert report.duration(nanoseconds) == text


ROWS: list[Row] = [
    {"test": "pp8", "avg_ts": 1.5, "list": [1, 2], "none": None},
    {"test": "tg8", "avg_ts": 2.0, "list": [], "none": 'a,"b'},
]


def written(make: Callable[[io.StringIO], report.Writer], rows: list[Row]) -> str:
    file = io.StringIO()
    writer = make(file)
    for row in rows:
        writer.row(row)
    writer.end()
    return file.getvalue()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_json_is_one_object(count: int) -> None:
    assert json.loads(written(report.Json, ROWS[:count])) == {"results": ROWS[:count]}


def test_json_lines_are_an_object_each() -> None:
    assert [json.loads(line) for line in written(report.JsonLines, ROWS).splitlines()] == ROWS


@pytest.mark.parametrize("make", [report.Json, report.JsonLines])
def test_json_is_printable(make: Callable[[io.StringIO], report.Writer]) -> None:
    name = "a\x1b\x7f\x9b\u202e"
    text = written(make, [{"test": name}])
    assert text.replace("\n", "").isprintable()
    assert text.isascii()
    assert r"a\x1b\x7f\x9b\u202e" in repr(json.loads(text))


def test_csv_names_its_columns_and_keeps_lists_in_cells() -> None:
    first, second = csv.DictReader(io.StringIO(written(report.Csv, ROWS)))
    assert first == {"test": "pp8", "avg_ts": "1.5", "list": "[1, 2]", "none": ""}
    assert (second["list"], second["none"]) == ("[]", 'a,"b')


@pytest.mark.parametrize("make", [report.Json, report.JsonLines, report.Csv])
def test_a_result_is_written_before_the_next_is_measured(make: Callable[[io.StringIO], report.Writer]) -> None:
    file = io.StringIO()
    make(file).row(ROWS[0])
    assert "pp8" in file.getvalue()


TESTS: list[Row] = [
    {"test": "pp512", "n_prompt": 512, "n_gen": 0, "n_threads": 1, **dict.fromkeys(("n_batch", "n_ubatch"), 64)},
    {
        "test": "tg128 @ d4096",
        "n_prompt": 0,
        "n_gen": 128,
        "n_threads": 2,
        **dict.fromkeys(("n_batch", "n_ubatch"), 64),
    },
]
for test in TESTS:
    test |= dict.fromkeys(("type_k", "type_v", "flash_attn", "n_gpu_layers", "mmap"), "x")


def test_a_setting_has_a_column_if_it_varies() -> None:
    names = report.columns(TESTS, 1, is_compared=False, with_model=False)
    assert list(names)[:4] == ["threads", "test", "t/s", "first token"]
    assert names["test"] == len("tg128 @ d4096")
    assert "p99" in names
    assert "p99" not in report.columns(TESTS[:1], 1, is_compared=False, with_model=False)
    assert "threads" not in report.columns(TESTS[:1], 1, is_compared=False, with_model=False)
    assert "ratio" in report.columns(TESTS, 1, is_compared=True, with_model=True)


@pytest.mark.parametrize(
    ("n", "percentiles"),
    [(0, []), (1, []), (2, [50]), (9, [50]), (10, [50, 90]), (30, [50, 90, 95]), (99, [50, 90, 95])],
)
def test_a_percentile_takes_samples_beyond_it(n: int, percentiles: list[int]) -> None:
    assert report.distinct_percentiles(n) == percentiles


@pytest.mark.parametrize("n", range(2, 300))
def test_distinct_percentiles_are_different_order_statistics(n: int) -> None:
    ranks = [math.ceil(n * percentile / 100) for percentile in report.distinct_percentiles(n)]
    assert len({*ranks, n}) == len(ranks) + 1, "and none is the maximum"


def test_the_first_tokens_are_no_samples() -> None:
    assert [report.n_steady(*shape) for shape in ((0, 5), (4, 2), (5, 2), (128, 5))] == [0, 8, 2, 620]


def test_columns_are_split_into_lines_only_if_they_have_to_be() -> None:
    widths = {"a": 10, "b": 10, "c": 30}
    assert report.split(widths, None) == report.split(widths, 56) == [["a", "b", "c"]]
    assert report.split(widths, 55) == [["a", "b"], ["c"]]
    assert report.split(widths, 5) == [["a"], ["b"], ["c"]]


def test_a_line_is_folded_between_figures() -> None:
    line = "a token: decode 158 us, logits 2.90 us, loop 43.8 us; together 99.0% of 256 us"
    assert report.folded(line, 42, "  ") == [
        "  a token: decode 158 us, logits 2.90 us,",
        "    loop 43.8 us; together 99.0% of 256 us",
    ]
    assert report.folded(line, 200, "  ") == [f"  {line}"]
    assert report.folded(line, None) == report.folded(line, 0) == [line]


def test_a_word_longer_than_a_line_is_not_broken() -> None:
    assert report.folded("llama: a-file-with-a-very-long-name.gguf, 1 MiB", 20) == [
        "llama:",
        "  a-file-with-a-very-long-name.gguf,",
        "  1 MiB",
    ]


class Terminal(io.StringIO):
    """A file that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


SETTINGS: list[Row] = [
    {"n_prompt": n_prompt, "n_gen": n_gen, "test": test, "type_k": type_k, "type_v": type_v, "n_threads": n_threads}
    for n_prompt, n_gen, test in ((512, 0, "pp512"), (512, 128, "pp512+tg128 @ d16384"))
    for type_k, type_v, n_threads in itertools.product(("f16", "q8_0"), ("f16", "bf16"), (1, 16))
]


def result(settings: Row, is_compared: bool) -> Row:
    """Return a result of made-up times, with everything that `minerva bench` reports."""
    n_gen = settings["n_gen"]
    runs = [repetition([*range(9000 + number, 9000 + number + n_gen)], 123_456) for number in range(6)]
    row = report.figures(measure.Test(n_prompt=512, n_gen=n_gen), runs)
    parts = [measure.Parts(9e6, 1e4, 2e4, 3e3, 4e4, 9.1e6)] if n_gen else []
    limit = dict.fromkeys(("memory_bandwidth", "weight_bytes_per_token", "kv_bytes_per_token", "roofline_ts"), 1e9)
    return {
        **machine.facts(),
        **dict.fromkeys(("n_batch", "n_ubatch", "n_gpu_layers"), 512),
        "flash_attn": -1,
        "mmap": True,
        "warm_up": True,
        "clock_ns": 30.0,
        "fits_cache": False,
        "model_type": "llama 1B Q4_0",
        "model_filename": "m.gguf",
        "model_size": 10**9,
        "model_n_params": 10**9,
        "roofline_share": 0.5 if n_gen else None,
        **limit,
        **settings,
        **row,
        **report.taken_apart(parts),
        **(report.compared(row, "baseline", [rate * 1.01 for rate in row["samples_ts"]]) if is_compared else {}),
    }


def screen(monkeypatch: pytest.MonkeyPatch, width: int, is_compared: bool) -> tuple[list[str], list[str]]:
    """Return the lines of a table on a terminal, from its header on, and the lines below it."""
    monkeypatch.setenv("COLUMNS", str(width))
    same: Row = {"n_batch": 1, "n_ubatch": 1, "flash_attn": 1, "n_gpu_layers": 1, "mmap": True}
    columns = report.columns([same | test for test in SETTINGS], 6, is_compared=is_compared, with_model=False)
    terminal = Terminal()
    writer = report.Screen(terminal, columns)
    for settings in SETTINGS:
        writer.row(result(settings, is_compared))
    n_before = terminal.getvalue().count("\n")
    writer.end()
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(" threads"))
    return lines[start:n_before], lines[n_before:]


@pytest.mark.parametrize("is_compared", [False, True])
@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_no_line_of_a_table_is_wider_than_the_terminal(
    monkeypatch: pytest.MonkeyPatch, width: int, is_compared: bool
) -> None:
    table, below = screen(monkeypatch, width, is_compared)
    assert max(map(len, table + below)) <= width
    shown = "\n".join(table)
    assert len(re.findall(r"\bpp512\+tg128 @ d16384\b", shown)) == 8
    assert len(re.findall(r"\bbf16\b", shown)) == 8
    assert len(re.findall(r"\d\.\d\d ± \d+\.\d\d\b", shown)) == 16
    assert len(re.findall(r"\b0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", shown)) == (16 if is_compared else 0)
    assert len(table) % 17 == 0, "a header, and all rows have as many lines"


def test_what_else_there_is_to_say_follows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table, below = screen(monkeypatch, 80, is_compared=False)
    assert not [line for line in table if "generate()" in line or "limit:" in line]
    assert [line for line in below if line.startswith("pp512+tg128 @ d16384, threads 16, type_k q8_0, type_v bf16")]
    assert sum("a token of generate():" in line for line in below) == 8
    assert [line for line in below if re.search(r"\bp99 9\.1\d ms", line)], "it has no column at 80"


@pytest.mark.parametrize("line", ["", "a, "])
def test_a_line_without_a_last_figure_is_folded(line: str) -> None:
    assert report.folded(line, 20) == [line.strip()]


@pytest.mark.parametrize("width", range(20, 90))
def test_a_folded_line_fits_and_loses_nothing(width: int) -> None:
    line = "the limit: 9.1 t/s, which is 30.0 GB/s for 3,300.0 MB of weights; loop 43.8 us, text 5 us"
    parts = report.folded(line, width, "   ")
    assert " ".join(part.strip() for part in parts) == line
    assert max(map(len, parts)) <= width
