"""Work on texts, in threads."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class LongTexts:
    """Does work on texts without blocking the event loop, one long text at a time.

    Nothing can interrupt the work on a text, so clients that ask and leave would have it pile up. Those who wait here
    leave the queue when they go, and short texts do not wait.

    Args:
        least: which texts are long, in characters or tokens.

    Attributes:
        ending: set by `close`, for work that can be left.
    """

    def __init__(self, least: int) -> None:
        self._least = least
        self._executor = ThreadPoolExecutor(1, "minerva_native long texts")
        self.ending = threading.Event()

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Return what some work returns on a text of so many characters or tokens."""
        executor = self._executor if size >= self._least else None
        return await asyncio.get_running_loop().run_in_executor(executor, work)

    def close(self) -> None:
        """Refuse what waits."""
        self.ending.set()
        self._executor.shutdown(wait=False, cancel_futures=True)
