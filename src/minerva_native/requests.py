"""The queue in front of a context: requests, the thread that serves them in order, and how callers get the results.

One thread computes, so that a caller waits for a result and for nothing else: Ctrl-C, a cancelled task or a closed
iterator is a flag that the computation looks at after each token.
"""

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from ._arguments import cancel_token, what
from .engine.gate import CancelToken
from .errors import BrokenContextError, Cancelled, ClosedError, ReentryError

T = TypeVar("T")

_LOOK_SECONDS = 0.01  # how often a caller whose request waits in the queue looks at its cancel token and its timeout


class _End(NamedTuple):
    """What comes after the last item."""

    error: BaseException | None = None


_LONGEST_TIMEOUT = 10**9  # seconds


def check_timeout(timeout: object) -> None:
    """Raise `TypeError` or `ValueError` for what is no number of seconds."""
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout must be a number of seconds, not {what(timeout)}")
    if not 0 <= timeout <= _LONGEST_TIMEOUT:
        raise ValueError(f"timeout must be from 0 to {_LONGEST_TIMEOUT:,} seconds, not {timeout}")


class Request:
    """A piece of work, and the cancel token of everything that it calls.

    Attributes:
        submitted: when it was made, by `time.perf_counter`.
        started: when its turn came, or None.
    """

    def __init__(
        self,
        work: "Callable[[Request], Iterator[Any]]",
        deliver: Callable[[Any], object],
        cancel: CancelToken | None = None,
        timeout: float | None = None,
    ):
        cancel_token(cancel)
        check_timeout(timeout)
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self._work, self._deliver, self._cancel, self._timeout = work, deliver, cancel, timeout
        self._deadline = None if timeout is None else self.submitted + timeout
        self._is_stopped = False

    @property
    def may_stop_itself(self) -> bool:
        """Whether it has a cancel token or a timeout."""
        return self._cancel is not None or self._deadline is not None

    def stop(self) -> None:
        """End it within a token, or before it starts."""
        self._is_stopped = True

    def is_set(self) -> bool:
        """Say whether to stop."""
        return (
            self._is_stopped
            or (self._deadline is not None and time.perf_counter() >= self._deadline)
            or (self._cancel is not None and self._cancel.is_set())
        )

    def cancelled(self) -> Cancelled:
        """Return the error of a request that was stopped before it had a result."""
        if self._deadline is not None and time.perf_counter() >= self._deadline:
            return Cancelled(f"the request was stopped by its timeout of {self._timeout:g} s before the first token")
        return Cancelled("the request was cancelled before the first token")

    def run(self) -> None:
        """Do the work, and deliver its results one by one."""
        self.started = time.perf_counter()
        deliver = self._deliver
        try:
            if self.is_set():
                raise self.cancelled()
            for item in self._work(self):
                deliver(item)
            deliver(_End())
        except Cancelled as error:
            deliver(_End(self.cancelled() if self.is_set() else error))
        except BaseException as error:  # the caller's to handle, whatever it is
            deliver(_End(error))

    def fail(self, error: BaseException) -> None:
        """Deliver an error instead of results."""
        self._deliver(_End(error))


class RequestQueue:
    """Serves requests one after another in the order they came, on a thread of its own. Safe to use from any thread."""

    def __init__(self) -> None:
        self._waiting: deque[Request] = deque()
        self._running: Request | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self.closed = False

    def __len__(self) -> int:
        """Return how many requests wait, without the one that is served."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Put a request at the end of the queue.

        Raises:
            ClosedError: the queue is closed.
            ReentryError: the caller is a callback of a request, which would wait for itself.
            BrokenContextError: the queue was inherited by a fork, whose parent has the thread.
        """
        if self._process != os.getpid():
            raise BrokenContextError("this LLM belongs to the parent process: make one in this process")
        if threading.current_thread() is self._thread:
            raise ReentryError("a function that an LLM calls during a request cannot make another request of it")
        with self._changed:
            if self.closed:
                raise ClosedError("this LLM is closed")
            self._waiting.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="minerva_native LLM", daemon=True)
                self._thread.start()
            self._changed.notify()

    def withdraw(self, request: Request) -> bool:
        """Take a request out of the queue; return False if it is not there."""
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(request)
            return True
        return False

    def close(self) -> None:
        """Stop the request that is served, refuse those that wait, and end the thread."""
        if self._process != os.getpid():
            return
        with self._changed:
            self.closed = True
            refused = list(self._waiting)
            self._waiting.clear()
            if self._running is not None:
                self._running.stop()
            self._changed.notify()
        for request in refused:
            request.fail(ClosedError("this LLM was closed before the request's turn came"))
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._running = None
                while not self._waiting and not self.closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                self._running = request = self._waiting.popleft()
            request.run()
            del request

    # How a caller gets results

    def stream(self, work: Callable[[Request], Iterator[T]], **limits: Any) -> "Stream[T]":
        """Return an iterator over what `work` yields; `limits` are `cancel` and `timeout`."""
        items: SimpleQueue[Any] = SimpleQueue()
        request = Request(work, items.put, **limits)
        self.submit(request)
        return Stream(self, request, items)

    def call(self, work: Callable[[Request], Iterator[T]], **limits: Any) -> T:
        """Return the one thing that `work` yields."""
        with self.stream(work, **limits) as results:
            result = next(results)
            for _ in results:  # until it has cleaned up
                pass
            return result

    def astream(self, work: Callable[[Request], Iterator[T]], **limits: Any) -> "AsyncStream[T]":
        """Return what `stream` does, for the running event loop, which is never blocked."""
        try:
            inbox = _Inbox(asyncio.get_running_loop())
        except RuntimeError:
            raise RuntimeError(
                "no asyncio event loop is running: await this inside asyncio.run, or anyio.run with its asyncio backend"
            ) from None
        request = Request(work, inbox.put_from_thread, **limits)
        self.submit(request)
        if request.may_stop_itself:
            inbox.loop.call_later(_LOOK_SECONDS, self._look, request, inbox.loop)
        return AsyncStream(self, request, inbox)

    async def acall(self, work: Callable[[Request], Iterator[T]], **limits: Any) -> T:
        """Return the one thing that `work` yields, without blocking the event loop."""
        results = self.astream(work, **limits)
        result = await anext(results)
        async for _ in results:  # until it has cleaned up
            pass
        return result

    def _look(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        """Withdraw a request that its token or timeout has stopped, again and again until its turn comes."""
        if request.started is not None:
            return
        if not request.is_set():
            loop.call_later(_LOOK_SECONDS, self._look, request, loop)
        elif self.withdraw(request):
            request.fail(request.cancelled())


class Stream(Generic[T]):
    """An iterator over the results of a request. Closing it, or dropping it, stops the request."""

    def __init__(self, queue: RequestQueue, request: Request, items: "SimpleQueue[Any]"):
        self._queue, self._request, self._items = queue, request, items
        self._is_done = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._is_done:
            raise StopIteration
        try:
            item = self._next_item()
        except BaseException:  # Ctrl-C, or a cancel token that fails
            self.close()
            raise
        if isinstance(item, _End):
            self._is_done = True
            if item.error is not None:
                raise item.error
            raise StopIteration
        result: T = item
        return result

    def _next_item(self) -> Any:
        request = self._request
        while request.started is None and request.may_stop_itself:
            try:
                return self._items.get(timeout=_LOOK_SECONDS)
            except Empty:
                if request.is_set() and self._queue.withdraw(request):
                    return _End(request.cancelled())
        return self._items.get()

    def close(self) -> None:
        """Stop the request: it leaves the queue, or ends within a token."""
        if not self._is_done:
            self._is_done = True
            self._request.stop()
            self._queue.withdraw(self._request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self._request.stop()  # takes no lock, as a finaliser may strike anywhere


class _Inbox:
    """Results that have come to an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.items: deque[Any] = deque()
        self._arrival: asyncio.Future[None] | None = None

    def put_from_thread(self, item: Any) -> None:
        """Hand an item to the event loop. If the loop is closed, nobody waits for it."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._put, item)

    def _put(self, item: Any) -> None:
        self.items.append(item)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    async def get(self) -> Any:
        """Return the next item."""
        while not self.items:
            self._arrival = self.loop.create_future()
            await self._arrival
        return self.items.popleft()


class AsyncStream(AsyncIterator[T]):
    """An asynchronous iterator over the results of a request. Closing, dropping or cancelling it stops the request."""

    def __init__(self, queue: RequestQueue, request: Request, inbox: _Inbox):
        self._queue, self._request, self._inbox = queue, request, inbox
        self._is_done = False

    async def __anext__(self) -> T:
        if self._is_done:
            raise StopAsyncIteration
        try:
            item = await self._inbox.get()
        except BaseException:  # the task is cancelled
            await self.aclose()
            raise
        if isinstance(item, _End):
            self._is_done = True
            if item.error is not None:
                raise item.error
            raise StopAsyncIteration
        result: T = item
        return result

    async def aclose(self) -> None:
        """Stop the request: it leaves the queue, or ends within a token."""
        if not self._is_done:
            self._is_done = True
            self._request.stop()
            self._queue.withdraw(self._request)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._request.stop()
