"""Reports: a result as a row of named figures, and rows as tables for people and files for programs.

A figure that llama-bench has too has the same name. Times are in nanoseconds, rates in tokens per second. Every writer
writes a row as soon as it gets it, so that an interrupted run has shown what it finished.
"""

import csv
import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO

import numpy as np
import numpy.typing as npt

from .._json import as_json
from .compare import CONFIDENCE, Ratio
from .measure import FIRST_TOKENS, Parts, Repetition, Test

if TYPE_CHECKING:
    from rich.console import Console

PERCENTILES = (50, 90, 95, 99)
FLASH_ATTENTION = {-1: "auto", 0: "off", 1: "on"}  # llama-bench's numbers
PARTS = ("decode", "logits", "sampler", "text", "loop")

Row = dict[str, Any]


def figures(test: Test, repetitions: Sequence[Repetition]) -> Row:
    """Return what was timed: the rate, like llama-bench's, and the distribution of the times of single tokens.

    Percentiles, maximum and mean leave out the first `FIRST_TOKENS` tokens of each repetition, unless there are no
    others. Jitter is the mean absolute difference of successive times. `first_tokens_ns` are the medians over the
    repetitions of the times left out.
    """
    samples_ns = np.array([repetition.ns for repetition in repetitions], np.float64)
    samples_ts = 1e9 * test.n_tokens / samples_ns
    ddof = 1 if len(samples_ns) > 1 else 0
    row: Row = {
        "avg_ns": int(samples_ns.mean()),
        "stddev_ns": int(samples_ns.std(ddof=ddof)),
        "avg_ts": float(samples_ts.mean()),
        "stddev_ts": float(samples_ts.std(ddof=ddof)),
        "samples_ns": [repetition.ns for repetition in repetitions],
        "samples_ts": samples_ts.tolist(),
    }
    first = [repetition.first_token_ns for repetition in repetitions if repetition.first_token_ns is not None]
    row["time_to_first_token_ns"] = float(np.median(first)) if first else None
    return row | _token_figures(np.array([repetition.token_ns for repetition in repetitions]))


def n_steady(n_gen: int, repetitions: int) -> int:
    """Return how many times of tokens the percentiles are computed from."""
    return repetitions * (n_gen - FIRST_TOKENS if n_gen > FIRST_TOKENS else n_gen)


def distinct_percentiles(n: int) -> list[int]:
    """Return the percentiles that `n` samples can tell from their maximum: those beyond which at least one lies.

    p99 takes 100 samples, p95 20, p90 10, the median 2. With 30 samples, p99 would be the maximum under another name.
    """
    return [percentile for percentile in PERCENTILES if n * (100 - percentile) >= 100]


def steady(times: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the times without those of the first tokens, along the last axis; all of them if there are no others."""
    return times[..., FIRST_TOKENS:] if times.shape[-1] > FIRST_TOKENS else times


def _token_figures(token_ns: npt.NDArray[np.int64]) -> Row:
    """Return the distribution of the times of tokens, given as an array of shape (repetitions, n_gen)."""
    times = steady(token_ns)
    some, several = bool(times.size), times.shape[1] > 1
    return {
        **{f"token_p{p}_ns": float(np.percentile(times, p)) if some else None for p in PERCENTILES},
        "token_max_ns": int(times.max()) if some else None,
        "token_mean_ns": float(times.mean()) if some else None,
        "token_jitter_ns": float(np.abs(np.diff(times)).mean()) if several else None,
        "first_tokens_ns": np.median(token_ns[:, :FIRST_TOKENS], axis=0).tolist() if some else None,
        "token_ns": token_ns.tolist() if some else None,
    }


def taken_apart(parts: Sequence[Parts]) -> Row:
    """Return where the time of a token goes: means over the runs of the decode loop, and their sum."""
    mean = Parts(*np.mean(parts, axis=0).tolist()) if parts else None
    return {
        **{f"part_{name}_ns": getattr(mean, name, None) for name in PARTS},
        "parts_sum_ns": mean.total if mean else None,
        "parts_whole_ns": mean.whole if mean else None,
    }


def compared(row: Row, name: str, samples_ts: Sequence[float]) -> Row:
    """Return how a result compares with the rates of another, pair by pair.

    As many repetitions are compared as both have. If `samples_ts` is empty, the ratios are None.
    """
    samples_ts = samples_ts[: len(row["samples_ts"])]
    ratio = Ratio.of(row["samples_ts"], samples_ts) if samples_ts else None
    return {
        "compared_with": name,
        "compared_avg_ts": float(np.mean(samples_ts)) if samples_ts else None,
        "compared_samples_ts": list(samples_ts),
        "ratio": ratio and ratio.median,
        "ratio_low": ratio and ratio.low,
        "ratio_high": ratio and ratio.high,
        "ratio_confidence": ratio and ratio.confidence,
    }


class Writer(Protocol):
    """Writes results, each as soon as it is measured."""

    def row(self, row: Row) -> None:
        """Write one result."""

    def end(self) -> None:
        """Write what closes the output; called even if the run was interrupted."""


class Json:
    """One JSON object, whose `results` are a list of objects, one on a line."""

    def __init__(self, file: TextIO):
        self._file, self._before = file, '{"results": ['

    def row(self, row: Row) -> None:
        """Write one result."""
        print(f"{self._before}\n{as_json(row)}", end="", file=self._file, flush=True)
        self._before = ","

    def end(self) -> None:
        """Close the list and the object."""
        print("\n]}" if self._before == "," else f"{self._before}]}}", file=self._file, flush=True)


class JsonLines:
    """JSONL: one object per line."""

    def __init__(self, file: TextIO):
        self._file = file

    def row(self, row: Row) -> None:
        """Write one result."""
        print(as_json(row), file=self._file, flush=True)

    def end(self) -> None:
        """Do nothing: the output needs no end."""


class Csv:
    """CSV: a line of names, then a line per result; lists and objects are JSON in their cell."""

    def __init__(self, file: TextIO):
        self._file, self._names = file, list[str]()

    def row(self, row: Row) -> None:
        """Write one result."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self._names:
            self._names = list(row)  # the same in every row
            writer.writerow(self._names)
        values = (row[name] for name in self._names)
        writer.writerow(as_json(value) if isinstance(value, list | dict) else value for value in values)
        print(text.getvalue(), end="", file=self._file, flush=True)

    def end(self) -> None:
        """Do nothing: the output needs no end."""


class Markdown:
    """A table in Markdown, like llama-bench's."""

    def __init__(self, file: TextIO, columns: Mapping[str, int]):
        self._file, self._widths, self._about = file, columns, ""

    def row(self, row: Row) -> None:
        """Write one result."""
        if not self._about:
            self._line(self._widths)
            self._line("-" * width if name in LEFT else "-" * (width - 1) + ":" for name, width in self._widths.items())
            self._about = f"{build(row)}; {settings(row, self._widths)}"
        self._line(cells(row, self._widths))

    def _line(self, texts: Iterable[str]) -> None:
        padded = (
            text.ljust(width) if name in LEFT else text.rjust(width)
            for text, (name, width) in zip(texts, self._widths.items(), strict=True)
        )
        print(f"| {' | '.join(padded)} |", file=self._file, flush=True)

    def end(self) -> None:
        """Write below the table what was measured and how."""
        if self._about:
            print(f"\n{self._about}", file=self._file, flush=True)


class Screen:
    """A table for people; what else there is to say about its rows follows it."""

    def __init__(self, file: TextIO, columns: Mapping[str, int]):
        self._fold_at = _console(file).width if file.isatty() else None
        widths = dict(columns)
        for name in SPARE:
            if self._fold_at and _total(widths) > self._fold_at:
                widths.pop(name, None)
        self._console = _console(file)
        self._widths, self._about = widths, ""
        self._spared = [name for name in columns if name not in widths]
        self._lines: list[list[str]] = []
        self._notes: list[tuple[str, list[str]]] = []

    def row(self, row: Row) -> None:
        """Write one result."""
        from rich.table import Table

        about = f"{header(row)}\n{settings(row, self._widths)}"
        is_new = about != self._about
        if is_new:
            if self._about:
                self.end()
                self._console.print()
            for line in about.splitlines():
                self._print(line)
            self._console.print()
            self._about = about
        texts = dict(zip(self._widths, cells(row, self._widths), strict=True))
        self._widths = {name: max(width, len(texts[name])) for name, width in self._widths.items()}
        lines = split(self._widths, self._fold_at)
        is_new, self._lines = is_new or lines != self._lines, lines
        for names in lines:
            table = Table(box=None, show_header=is_new, header_style="bold", padding=(0, 1))
            for name in names:
                justify: Literal["left", "right"] = "left" if name in LEFT else "right"
                table.add_column(name, width=self._widths[name], no_wrap=True, justify=justify)
            table.add_row(*(texts[name] for name in names))
            self._console.width = max(self._fold_at or 0, _total({name: self._widths[name] for name in names}))
            self._console.print(table)
        more = ", ".join(f"{name} {text}" for name in self._spared if (text := _cell(row, name)) != "-")
        if notes := ([more] if more else []) + details(row):
            differs = [f"{name} {_cell(row, name)}" for name in SETTINGS if name in self._widths]
            self._notes.append((", ".join([row["test"], *differs]), notes))

    def _print(self, line: str, indent: str = "", style: str | None = None) -> None:
        for part in folded(line, self._fold_at, indent):
            self._console.print(part, style=style)

    def end(self) -> None:
        """Write what else there is to say about the rows of the table."""
        for title, notes in self._notes:
            self._console.print()
            self._print(title)
            for line in notes:
                self._print(line, indent="   ", style="dim")
        self._notes = []


def split(widths: Mapping[str, int], room: int | None) -> list[list[str]]:
    """Return the columns of each line of a row: one line, unless they take more than `room`."""
    lines: list[list[str]] = [[]]
    for name, width in widths.items():
        if room and lines[-1] and _total({column: widths[column] for column in lines[-1]}) + width + 2 > room:
            lines.append([])
        lines[-1].append(name)
    return lines


def folded(line: str, width: int | None, indent: str = "") -> list[str]:
    """Fold a line into `width` columns, at the commas and semicolons between its figures.

    Every part is indented, those after the first by two more. A figure that is too long for a line is folded between
    words, and a word that is too long runs over the edge. If the width is None or 0, the line is not folded.
    """
    if not width:
        return [indent + line]
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent=f"{indent}  ", break_long_words=False, break_on_hyphens=False
    )
    parts = [indent]
    for figure in re.split(r"(?<=[,;]) ", line):
        wrapper.initial_indent = f"{parts[-1]} " if parts[-1].strip() else parts[-1]
        if parts[-1].strip() and len(wrapper.initial_indent) + len(figure) > width:
            parts.append("")
            wrapper.initial_indent = wrapper.subsequent_indent
        parts[-1:] = wrapper.wrap(figure) or parts[-1:]
    return parts


def _console(file: TextIO, width: int | None = None) -> "Console":
    """Return a console that prints text unchanged and, like `print`, raises `BrokenPipeError` if nobody reads it."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Plain(file=file, width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _total(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + 2 * len(widths)


LEFT = ("model", "backend", "test")
# Columns that a narrow terminal has no room for, the first to go first.
SPARE = ("max", "jitter", "p95", "p90", "against", "p99", "first token", "of limit", "p50")


def columns(rows: Sequence[Row], repetitions: int, is_compared: bool, with_model: bool) -> dict[str, int]:
    """Return the columns of a table for these tests, with their widths.

    As in llama-bench, a setting has a column if it differs between tests. A percentile has one if some test has enough
    tokens for it (see `distinct_percentiles`).
    """
    names = {"model": 30, "size": 10, "params": 10, "backend": 10, "threads": 7} if with_model else {}
    for name, (field, width) in SETTINGS.items():
        if len({row[field] for row in rows}) > 1:
            names[name] = width
    names |= {"test": max(5, *(len(row["test"]) for row in rows)), "t/s": 18}
    if is_compared:
        names |= {"against": 10, "ratio": 22}
    if any(row["n_prompt"] for row in rows):
        names["first token"] = 11
    if any(row["n_gen"] for row in rows):
        percentiles = distinct_percentiles(max(n_steady(row["n_gen"], repetitions) for row in rows))
        names |= dict.fromkeys((*(f"p{p}" for p in percentiles), "max", "jitter"), 7)
        names["of limit"] = 8
    return names


SETTINGS = {
    "threads": ("n_threads", 7),
    "n_batch": ("n_batch", 7),
    "n_ubatch": ("n_ubatch", 8),
    "type_k": ("type_k", 6),
    "type_v": ("type_v", 6),
    "fa": ("flash_attn", 4),
    "ngl": ("n_gpu_layers", 3),
    "mmap": ("mmap", 5),
}


def cells(row: Row, names: Iterable[str]) -> list[str]:
    """Return the text of each column of a row."""
    return [_cell(row, name) for name in names]


def _cell(row: Row, name: str) -> str:
    if name == "fa":
        return FLASH_ATTENTION[row["flash_attn"]]
    if name in SETTINGS:
        return str(row[SETTINGS[name][0]])
    match name:
        case "model":
            return str(row["model_type"])
        case "size":
            return f"{row['model_size'] / 2**20:.2f} MiB"
        case "params":
            return f"{row['model_n_params'] / 1e6:.2f} M"
        case "backend":
            return str(row["backends"])
        case "test":
            return str(row["test"])
        case "t/s":
            spread = f" ± {row['stddev_ts']:.2f}" if len(row["samples_ts"]) > 1 else ""
            return f"{row['avg_ts']:.2f}{spread}"
        case "against":
            return f"{row['compared_avg_ts']:.2f}" if row["ratio"] else "-"
        case "ratio":
            if not row["ratio"]:
                return "-"
            interval = f" [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]" if row["ratio_confidence"] else ""
            return f"{row['ratio']:.3f}{interval}"
        case "first token":
            return duration(row["time_to_first_token_ns"])
        case "of limit":
            return f"{row['roofline_share']:.0%}" if row["roofline_share"] and not row["fits_cache"] else "-"
    n = n_steady(row["n_gen"], len(row["samples_ns"]))
    if name.startswith("p") and int(name[1:]) not in distinct_percentiles(n):
        return "-"
    return duration(row[f"token_{name}_ns"])


def duration(nanoseconds: float | None) -> str:
    """Return a time with three digits, in a suitable unit."""
    if nanoseconds is None:
        return "-"
    size, unit = next(((size, unit) for size, unit in _UNITS if nanoseconds >= size), (1.0, "ns"))
    value = nanoseconds / size
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


_UNITS = ((1e9, "s"), (1e6, "ms"), (1e3, "us"))


def header(row: Row) -> str:
    """Return what was measured: the model, the build and the machine."""
    return (
        f"{row['model_type']}: {Path(row['model_filename']).name}, {row['model_size'] / 2**20:,.1f} MiB, "
        f"{row['model_n_params'] / 1e6:,.1f} M weights\n{build(row)}"
    )


def build(row: Row) -> str:
    """Return the build and the machine."""
    return (
        f"build: {row['build_commit']} ({row['build']['llama_cpp_source']}), minerva-native {row['minerva_version']}, "
        f"{row['backends']}; {row['gpu_info'] or row['cpu_info']}, {len(row['cpus'])} CPUs"
    )


def settings(row: Row, names: Iterable[str]) -> str:
    """Return the settings that have no column, and how the test was run."""
    texts = [f"{name} {_cell(row, name)}" for name in SETTINGS if name not in names]
    texts.append(f"repetitions {len(row['samples_ts'])}" + ("" if row["warm_up"] else " without a warm-up"))
    texts.append(f"clock {row['clock_ns']:.0f} ns")
    return ", ".join(texts)


def details(row: Row) -> list[str]:
    """Return what else people want to know about a result, as lines."""
    lines = []
    if row["parts_whole_ns"]:
        parts = ", ".join(f"{name} {duration(row[f'part_{name}_ns'])}" for name in PARTS)
        lines.append(
            f"a token of generate(): {parts}; together {row['parts_sum_ns'] / row['parts_whole_ns']:.1%} of "
            f"{duration(row['parts_whole_ns'])}"
        )
    if row["roofline_share"]:
        lines.append(
            f"the limit: {row['roofline_ts']:,.1f} t/s at {row['memory_bandwidth'] / 1e9:,.1f} GB/s, "
            f"with {row['weight_bytes_per_token'] / 1e6:,.1f} MB of weights and "
            f"{row['kv_bytes_per_token'] / 1e6:,.1f} MB of keys and values per token"
            + ("; not binding, because they fit into the CPU's cache" if row["fits_cache"] else "")
        )
    if row["first_tokens_ns"]:
        lines.append(f"the first tokens: {', '.join(map(duration, row['first_tokens_ns']))}")
    if row.get("ratio_confidence"):
        n, confidence = len(row["compared_samples_ts"]), row["ratio_confidence"]
        few = " (95% takes 6 pairs or more)" if confidence < CONFIDENCE else ""
        lines.append(f"the ratio's interval: {n} pairs of repetitions, {confidence:.0%} confidence{few}")
    return lines
