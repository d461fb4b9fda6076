"""The pictures: what is in them, and that nothing of it is cut off or covers something else."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from minerva_native.benchmark import machine, measure, plot, report

LONG_NAME = f"{'a-model-with-$a_very$-long-name-' * 8}Q4_K_M.gguf"


def row(n_gen: int, repetitions: int, name: str = "model.gguf", **others: Any) -> dict[str, Any]:
    """Return a result of made-up times of about 5 ms, the first ones and a few others longer."""
    times = 5e6 + np.random.default_rng(1).gamma(2, 3e5, (repetitions, n_gen))
    times[:, :4] *= 2
    times[:, 20:21] *= 30
    runs = [measure.Repetition(int(run.sum()), run.astype(np.int64), None) for run in times]
    test = measure.Test(n_gen=n_gen)
    about = {"model_filename": f"/models/{name}", "test": test.name, "n_threads": 2}
    return {**machine.facts(), **report.figures(test, runs), **about, **others}


def drawn(*rows: dict[str, Any]) -> Figure:
    """Return the picture after everything has its place."""
    figure = plot.picture(rows)
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    return figure


def texts(figure: Figure) -> str:
    return "\n".join(part.get_text() for part in figure.findobj(Text) if isinstance(part, Text))


CASES = {
    "one token": [row(1, 1)],
    "few tokens": [row(3, 1)],
    "one repetition": [row(30, 1)],
    "several repetitions": [row(128, 5)],
    "several models": [row(128, 5, LONG_NAME, test="pp512+tg128 @ d4096"), row(16, 2, gpu_info="A GPU " * 40)],
}


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES.keys())
def test_titles_and_legends_fit_and_cover_nothing(rows: list[dict[str, Any]]) -> None:
    figure = drawn(*rows)
    boxes: list[Bbox] = []
    for part in (figure, *figure.subfigs):
        boxes += [text.get_window_extent() for text in part.texts if text.get_text()]
        heading = part.get_suptitle()
        assert heading
    for axes in figure.axes:
        legend = axes.get_legend()
        assert legend is not None
        boxes += [axes.bbox, axes.title.get_window_extent(), legend.get_window_extent()]
        boxes.append(axes.xaxis.label.get_window_extent())
    assert len(boxes) >= 8
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1
    for index, box in enumerate(boxes):
        assert not [other for other in boxes[index + 1 :] if box.overlaps(other)]


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES.keys())
def test_both_panels_have_one_scale_of_latency(rows: list[dict[str, Any]]) -> None:
    figure = drawn(*rows)
    assert len(figure.axes) == 2 * len(rows)
    for part in figure.subfigs:
        course, histogram = part.axes
        assert course.get_ylim() == histogram.get_ylim()
        assert course.bbox.y0 == pytest.approx(histogram.bbox.y0)
        assert course.bbox.y1 == pytest.approx(histogram.bbox.y1)


@pytest.mark.parametrize("n_gen", [1, 2, 3, 6, 8, 20, 30, 128])
def test_there_are_fewer_bars_than_tokens(n_gen: int) -> None:
    histogram = drawn(row(n_gen, 1)).axes[1]
    assert len(histogram.patches) < (n_gen - 4 if n_gen > 4 else n_gen)


def test_only_percentiles_that_the_tokens_give_have_a_line() -> None:
    for n_gen, names in (
        (1, ["the only token"]),
        (34, ["median", "p90", "p95"]),
        (128, ["median", "p90", "p95", "p99"]),
    ):
        histogram = drawn(row(n_gen, 1)).axes[1]
        values = [float(np.asarray(line.get_ydata())[0]) for line in histogram.lines]
        assert [str(line.get_label()).partition(":")[0] for line in histogram.lines] == names
        assert all(low < high for low, high in pairwise(values))


def test_the_machine_the_build_and_what_is_left_out_are_named() -> None:
    facts = machine.facts()
    shown = texts(drawn(row(30, 1), row(3, 1, "another.gguf")))
    assert facts["build_commit"] in shown
    assert facts["cpu_info"].split()[0] in shown
    assert shown.count("build:") == 1, "the same for both"
    assert "model.gguf: tg30, 2 threads" in shown
    assert "another.gguf: tg3, 2 threads" in shown
    assert "distribution: first 4 tokens left out" in shown
    assert "distribution of all tokens" in shown
    assert "5 of 30 tokens lie above the frame" in shown, "the first four and an outlier"
    assert "every token" in shown


def test_a_file_is_written(tmp_path: Path) -> None:
    plot.draw([row(30, 2), {"token_ns": None}], tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
