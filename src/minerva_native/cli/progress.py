"""Progress bars on stderr, only on a terminal and only for what takes a while."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

PATIENCE_SECONDS = 0.3


class Bar:
    """A progress bar that appears if the work takes a while, unless it has to be quiet."""

    def __init__(self, label: str, is_quiet: bool):
        self._label, self._is_quiet = label, is_quiet
        self._start = time.perf_counter()
        self._progress: Progress | None = None

    def update(self, done: float, total: float) -> None:
        """Show how much is done."""
        if self._progress is None:
            if (
                self._is_quiet
                or not sys.stderr.isatty()
                or done >= total
                or time.perf_counter() - self._start < PATIENCE_SECONDS
            ):
                return
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(stderr=True), transient=True)
            self._progress.start()
            self._task = self._progress.add_task(self._label, total=total)
        self._progress.update(self._task, completed=done)

    def close(self) -> None:
        """Remove the bar from the screen."""
        if self._progress is not None:
            self._progress.stop()


@contextmanager
def loading(is_quiet: bool) -> Iterator[Callable[[float], None]]:
    """Give an `on_progress` for `Model.load`."""
    bar = Bar("Loading the model", is_quiet)
    try:
        yield lambda fraction: bar.update(fraction, 1.0)
    finally:
        bar.close()


@contextmanager
def prefilling(is_quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Give an `on_progress` for `Sequence.extend`."""
    bar = Bar("Evaluating the prompt", is_quiet)
    try:
        yield bar.update
    finally:
        bar.close()


class Measuring:
    """The progress of a benchmark: a bar on a terminal, otherwise a line per test, for a log."""

    def __init__(self, n_tests: int, is_quiet: bool):
        self._n_tests, self._number, self._is_quiet = n_tests, 0, is_quiet
        self._bar: Bar | None = None

    def update(self, name: str, done: int, total: int) -> None:
        """Note that `done` of `total` repetitions of a test are done."""
        if not done:
            self.pause()
            self._number += 1
            label = f"{name}, test {self._number} of {self._n_tests}"
            self._bar = Bar(label, self._is_quiet)
            if not (self._is_quiet or sys.stderr.isatty()):
                print(f"minerva: {label}", file=sys.stderr, flush=True)
        if self._bar is not None:
            self._bar.update(done, total)

    def pause(self) -> None:
        """Remove the bar, because something else is about to be printed."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


@contextmanager
def measuring(n_tests: int, is_quiet: bool) -> Iterator[Measuring]:
    """Show the progress of a benchmark of `n_tests` tests."""
    progress = Measuring(n_tests, is_quiet)
    try:
        yield progress
    finally:
        progress.pause()
