"""Plots of the latency of each token by its index, and of the distribution of latencies. Needs matplotlib."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import minerva_native as mn

from .measure import FIRST_TOKENS
from .report import PERCENTILES, steady

SHOWN = 1.25  # the top of the axes, as a multiple of the highest percentile


def check(path: str | os.PathLike[str]) -> None:
    """Raise `MinervaError`, `ValueError` or `OSError` if no plot could be written to this path.

    To be called before anything is measured.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise mn.MinervaError("drawing needs matplotlib: pip install 'minerva-native[plot]'") from error
    kinds = Figure().canvas.get_supported_filetypes()
    kind = Path(path).suffix.lstrip(".").lower()
    if kind not in kinds:
        raise ValueError(f"{path}: the file extension must be one of {', '.join(sorted(kinds))}")
    is_new = not Path(path).exists()
    with open(path, "ab"):  # raises OSError if it cannot be written
        pass
    if is_new:
        Path(path).unlink()


def draw(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw two graphs for each result with generated tokens, of which there must be at least one."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["token_ns"]]
    figure = Figure(figsize=(12, 3.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(3, 2))
    for row, (course, histogram) in zip(rows, axes, strict=True):
        times = np.array(row["token_ns"]) / 1e6
        title = (
            f"{Path(row['model_filename']).name}: {row['test']}, {row['n_threads']} threads, {row['avg_ts']:.1f} t/s"
        )
        index = np.arange(1, times.shape[1] + 1)
        marker = "." if len(index) == 1 else ""  # a line needs two points
        for repetition in times:
            course.plot(index, repetition, color="tab:blue", alpha=0.25, linewidth=0.8, marker=marker)
        course.plot(index, np.median(times, axis=0), color="tab:blue", linewidth=1.6, label="median of the repetitions")
        course.set_title(title, loc="left", fontsize="medium")
        course.set(xlabel="generated token", ylabel="latency (ms)")
        course.legend(loc="upper right")
        later = steady(times).ravel()
        top = SHOWN * float(np.percentile(later, PERCENTILES[-1]))
        histogram.hist(later[later <= top], bins=60, color="tab:blue", alpha=0.6)
        for percentile, style in zip(PERCENTILES, ("-", "--", "-.", ":"), strict=True):
            value = float(np.percentile(later, percentile))
            histogram.axvline(value, color="tab:red", linestyle=style, label=f"p{percentile}: {value:.3g} ms")
        title = f"without the first {FIRST_TOKENS}" if len(index) > FIRST_TOKENS else "all"
        histogram.set(title=title, xlabel="latency (ms)", ylabel="tokens")
        histogram.legend(loc="upper right")
        # A few tokens that took ten times as long would squash all the others.
        above = int((times > top).sum())
        course.set_ylim(0, top)
        histogram.set_xlim(0.95 * later.min(), top)
        if above:
            course.set_title(f"{above} of {times.size} tokens lie above the frame", loc="right", fontsize="small")
        for axis in (course, histogram):
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
