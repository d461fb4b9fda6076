"""Progress bars on stderr, only on a terminal and only for what takes a while."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

PATIENCE_SECONDS = 0.3


class Bar:
    """A progress bar that appears once the work has taken a while, at 0% if nothing is known to be done by then.

    A thread draws it, also while a call of libllama's computes.
    """

    def __init__(self, label: str, is_quiet: bool):
        self._label = label
        self._lock = threading.Lock()
        self._done, self._total = 0.0, 1.0
        self._progress: Progress | None = None
        self._is_closed = is_quiet or not sys.stderr.isatty()
        self._timer = threading.Timer(PATIENCE_SECONDS, self._show)
        self._timer.daemon = True
        if not self._is_closed:
            self._timer.start()

    def _show(self) -> None:
        progress = _progress(auto_refresh=True)  # which imports rich: `close` does not wait for that
        with self._lock:
            if not self._is_closed:
                self._task = progress.add_task(self._label)
                progress.update(self._task, completed=self._done, total=self._total)
                progress.start()
                self._progress = progress

    def update(self, done: float, total: float) -> None:
        """Show how much is done."""
        with self._lock:
            self._done, self._total = done, total
            if self._progress is not None:
                self._progress.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """Remove the bar from the screen."""
        self._timer.cancel()
        with self._lock:
            self._is_closed = True
            if self._progress is not None:
                self._progress.stop()


def _progress(auto_refresh: bool) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    # The seconds show that something happens while nothing is known to be done.
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, auto_refresh=auto_refresh, refresh_per_second=5)


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
    """The progress of a benchmark: a bar on a terminal, otherwise a line per test, for a log.

    The bar changes only between repetitions: a thread that draws would be measured too.
    """

    def __init__(self, n_tests: int, is_quiet: bool):
        self._n_tests, self._number, self._is_quiet = n_tests, 0, is_quiet
        self._progress: Progress | None = None

    def update(self, name: str, done: int, total: int) -> None:
        """Note that `done` of `total` repetitions of a test are done."""
        if not done:
            self.pause()
            self._number += 1
            label = f"{name}, test {self._number} of {self._n_tests}"
            if self._is_quiet:
                return
            if not sys.stderr.isatty():
                print(f"minerva: {label}", file=sys.stderr, flush=True)
                return
            self._progress = _progress(auto_refresh=False)
            self._task = self._progress.add_task(label, total=total)
            self._progress.start()
        if self._progress is not None:
            self._progress.update(self._task, completed=done, refresh=True)

    def pause(self) -> None:
        """Remove the bar, because something else is about to be printed."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = None


@contextmanager
def measuring(n_tests: int, is_quiet: bool) -> Iterator[Measuring]:
    """Show the progress of a benchmark of `n_tests` tests."""
    progress = Measuring(n_tests, is_quiet)
    try:
        yield progress
    finally:
        progress.pause()
