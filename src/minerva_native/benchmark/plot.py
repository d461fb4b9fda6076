"""Plots of the latency of each token by its index, and of the distribution of latencies. Needs matplotlib."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import minerva_native as mn

from .measure import FIRST_TOKENS
from .report import build, distinct_percentiles, steady

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 1.25  # the top of the axes, as a multiple of the highest percentile, or of the highest of few latencies
WIDTH, HEIGHT = 12.0, 4.2  # inches of the picture, and of each result in it
MAX_BINS = 60

_LINE = 105  # characters that fit across the picture in the size of its title
_LONGEST_NAME = 60


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
    """Draw each result with generated tokens, of which there must be at least one, into a file."""
    picture(rows).savefig(path, dpi=120)


def picture(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Return a picture of each result with generated tokens: two graphs with one axis of latency.

    On the left are the tokens in their order, on the right is their distribution. Percentiles that the number of tokens
    does not give (see `distinct_percentiles`) are left out, and so are bars if there are fewer than two tokens.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["token_ns"]]
    figure = Figure(figsize=(WIDTH, HEIGHT * len(rows) + 0.6), layout="constrained")
    about = "\n".join(textwrap.fill(text, _LINE) for text in dict.fromkeys(build(dict(row)) for row in rows))
    figure.suptitle(about, fontsize="small", parse_math=False)
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for row, part in zip(rows, parts, strict=True):
        part.suptitle(_title(row), fontsize="medium", parse_math=False)
        course, histogram = part.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        times = np.array(row["token_ns"]) / 1e6
        later = steady(times).ravel()
        percentiles = {p: float(np.percentile(later, p)) for p in distinct_percentiles(later.size)}
        # A few tokens that took ten times as long would squash all the others.
        top = SHOWN * (max(percentiles.values()) if len(percentiles) > 1 else float(later.max()))
        _draw_course(course, times, top)
        _draw_histogram(histogram, later, percentiles, top, times.shape[1] > FIRST_TOKENS)
        course.set_ylim(0, top)
    return figure


def _title(row: Mapping[str, Any]) -> str:
    name = Path(row["model_filename"]).name
    if len(name) > _LONGEST_NAME:  # the end says which quantisation it is
        half = _LONGEST_NAME // 2
        name = f"{name[:half]}...{name[-half:]}"
    return f"{name}: {row['test']}, {row['n_threads']} threads, {row['avg_ts']:.1f} t/s"


def _draw_course(axes: "Axes", times: npt.NDArray[np.float64], top: float) -> None:
    """Draw the latencies of an array of shape (repetitions, tokens) in milliseconds."""
    index = np.arange(1, times.shape[1] + 1)
    marker = "." if len(index) == 1 else ""  # a line needs two points
    if len(times) > 1:
        for number, repetition in enumerate(times):
            label = f"each of {len(times)} repetitions" if number == 0 else None
            axes.plot(index, repetition, color="tab:blue", alpha=0.3, linewidth=0.8, marker=marker, label=label)
    label = "median of the repetitions" if len(times) > 1 else "one repetition"
    axes.plot(index, np.median(times, axis=0), color="tab:blue", linewidth=1.6, marker=marker, label=label)
    above = int((times > top).sum())
    title = f"{above} of {times.size:,} tokens lie above the frame" if above else "every token"
    axes.set(title=title, xlabel="generated token", ylabel="latency (ms)", xlim=(0.5, len(index) + 0.5))
    axes.locator_params(axis="x", integer=True)
    _finish(axes)


def _draw_histogram(
    axes: "Axes", times: npt.NDArray[np.float64], percentiles: Mapping[int, float], top: float, is_part: bool
) -> None:
    """Draw the distribution of latencies in milliseconds, along the axis of latency."""
    shown = times[times <= top]
    if bins := min(MAX_BINS, int(np.sqrt(len(shown)))) if len(shown) > 1 else 0:
        axes.hist(shown, bins=bins, orientation="horizontal", color="tab:blue", alpha=0.6)
    for (percentile, value), style in zip(percentiles.items(), ("-", "--", "-.", ":"), strict=False):
        name = "median" if percentile == 50 else f"p{percentile}"
        axes.axhline(value, color="tab:red", linestyle=style, label=f"{name}: {value:.3g} ms")
    if not percentiles:
        axes.axhline(float(times[0]), color="tab:red", label=f"the only token: {times[0]:.3g} ms")
    left_out = f"distribution: first {FIRST_TOKENS} tokens left out" if is_part else "distribution of all tokens"
    axes.set(title=left_out, xlabel="tokens")
    axes.locator_params(axis="x", integer=True)
    axes.tick_params(labelleft=False)
    _finish(axes)


def _finish(axes: "Axes") -> None:
    """Set the title's size, and the legend below the graph, where it covers nothing."""
    axes.title.set_fontsize("small")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize="small", frameon=False)
