"""The queue in front of a context: requests, the thread that serves them, and how callers get the results.

One thread computes, so that a caller waits for a result and for nothing else: Ctrl-C, a cancelled task or a closed
iterator is a flag that the computation looks at after each token.
"""

import asyncio
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from enum import Enum
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from ._arguments import cancel_token, what
from .engine.gate import CancelToken
from .errors import BrokenContextError, Cancelled, ClosedError, ReentryError
from .observer import Observer, RequestRecord
from .sampling import Sampler
from .sequence import Sequence as TokenSequence

T = TypeVar("T")

_LONG_TEXT = 10_000  # characters; encoding so many takes some milliseconds
_PAUSE_SECONDS = 0.0005  # how long a round waits for such a text

_LOOK_SECONDS = 0.01  # how often a caller whose request waits in the queue looks at its cancel token and its timeout


class _End(NamedTuple):
    """What comes after the last item."""

    error: BaseException | None = None


def _put(items: "SimpleQueue[Any]", at: int, item: Any) -> None:
    items.put((at, item))


_LONGEST_TIMEOUT = 10**9  # seconds


def check_timeout(timeout: object) -> None:
    """Raise `TypeError` or `ValueError` for what is no number of seconds."""
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout must be a number of seconds, not {what(timeout)}")
    if not 0 <= timeout <= _LONGEST_TIMEOUT:
        raise ValueError(f"timeout must be from 0 to {_LONGEST_TIMEOUT:,} seconds, not {timeout}")


class Signal(Enum):
    """What a request's work yields besides results."""

    STEP = "a step is done: others may have theirs"
    EVALUATE = "evaluate what the writers have waiting before the next step"
    BLOCKED = "there is no room: go on when another request has ended"


class Ahead(Protocol):
    """Guesses the next tokens of a sequence; `speculative.Lookahead` is one."""

    def propose(self, n_texts: int, n_most: int) -> list[int]:
        """Return a guess to evaluate with the last token, of at most `n_most` tokens; `n_texts` share the pass."""

    def verify(self, draft: list[int], rows: npt.NDArray[np.float32]) -> None:
        """Take the logits after the last token and after each of a guess."""

    def settle(self) -> None:
        """Take back what was guessed and not drawn."""


class Writer(Protocol):
    """What writes into a sequence."""

    @property
    def sequence(self) -> TokenSequence:
        """The sequence."""

    @property
    def needs_logits(self) -> bool:
        """Whether the next step reads logits that are not there yet."""

    @property
    def ahead(self) -> Ahead | None:
        """What guesses its tokens."""

    @property
    def sampler(self) -> Sampler | None:
        """What draws the next token, if the step reads the logits for nothing else and leaves them as they are."""


class Prompt(NamedTuple):
    """A sequence that waits to be evaluated."""

    sequence: TokenSequence
    needs_logits: bool = True
    ahead: Ahead | None = None
    sampler: None = None


class Request:
    """A piece of work, and the cancel token of everything that it calls.

    Attributes:
        key: requests of one key, if it is not None, are served one after another.
        submitted: when it was made, by `time.perf_counter`.
        started: when its turn came, or None.
        writers: what writes now, so that several requests can be evaluated together. Whoever does the work sets them.
        n_evaluated: how many tokens of its prompt were evaluated.
        may_wait: says whether there are others, for whose end it can wait if there is no room.
        deliver: hands a result to the caller, who sees it once the bell that is returned was rung.
        is_dropped: whether it was stopped when its sequences had been taken away: it ends with what it has.
        record: what observers see of it; None if there are none.
    """

    def __init__(
        self,
        work: "Callable[[Request], Iterator[Any]]",
        deliver: "Callable[[Any], Doorbell | None]",
        cancel: CancelToken | None = None,
        timeout: float | None = None,
        key: object = None,
        record: RequestRecord | None = None,
    ):
        cancel_token(cancel)
        check_timeout(timeout)
        self.key, self.record = key, record
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.writers: Sequence[Writer] = ()
        self.n_evaluated = 0
        self.may_wait: Callable[[], bool] = lambda: False
        self.is_dropped = False
        self.deliver = deliver
        self._work, self._cancel, self._timeout = work, cancel, timeout
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

    def evaluate(self, sequence: TokenSequence) -> Iterator[Signal]:
        """Have what waits in a sequence evaluated; `n_evaluated` says how much that was. For `yield from`."""
        self.writers, self.n_evaluated = (Prompt(sequence),), 0
        yield Signal.EVALUATE

    def elsewhere(self, work: Callable[[], T], size: int) -> Generator[Signal, None, T]:
        """Return what some work on a text of `size` characters returns; if that is long, others go on meanwhile.

        For `yield from`. The work is done in a thread then, which goes on if the request is stopped.
        """
        if size < _LONG_TEXT:
            return work()
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # the request's to handle
                done.set_exception(error)

        try:
            threading.Thread(target=run, name="minerva_native long text", daemon=True).start()
        except RuntimeError:  # the system allows no more
            return work()
        while not wait([done], _PAUSE_SECONDS).done:
            if self.is_set():
                raise self.cancelled()
            yield Signal.STEP
        return done.result()

    def start(self) -> Generator[Any, None, None]:
        """Begin: what is returned does a step each time that it is asked, and yields a result or a signal."""
        self.started = time.perf_counter()
        if self.is_set():
            raise self.cancelled()
        yield from self._work(self)

    def end(self, error: BaseException | None = None) -> None:
        """Deliver the end: of the results, or by an error."""
        self.writers = ()
        try:
            if isinstance(error, Cancelled) and self.is_set():
                error = self.cancelled()
        except BaseException as failed:  # of the caller's token
            error = failed
        try:
            if self.record is not None:
                self.record.end(self.started, error)
        finally:
            if (bell := self.deliver(_End(error))) is not None:
                bell.ring()


def n_characters(prompt: object) -> int:
    """Return about how many characters a text or messages have; 0 for token ids."""
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, list | tuple):
        return sum(len(str(message.get("content"))) for message in prompt if isinstance(message, Mapping))
    return 0


class Server(Protocol):
    """Serves requests; `scheduler.Scheduler` is one. Only the queue's thread uses it."""

    def serve(self, queue: "RequestQueue") -> None:
        """Serve requests until the queue is closed."""


class RequestQueue:
    """Requests in the order they came, and the thread that serves them. Safe to use from any thread.

    Attributes:
        observers: see requests come and end.
        closed: whether `close` was called.
    """

    def __init__(self, server: Server) -> None:
        self.observers: list[Observer] = []
        self._server = server
        self._waiting: deque[Request] = deque()
        self._served: list[Request] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self.closed = False

    def __len__(self) -> int:
        """Return how many requests wait, without those that are served."""
        return len(self._waiting)

    @property
    def n_served(self) -> int:
        """How many requests are served."""
        return len(self._served)

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
        if request.record is not None:
            request.record.begin(self.observers, request.submitted)
        try:
            self._add(request)
        except BaseException as error:
            request.end(error)
            raise

    def _add(self, request: Request) -> None:
        with self._changed:
            if self.closed:
                raise ClosedError("this LLM is closed")
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._server.serve, args=(self,), name="minerva_native LLM", daemon=True
                )
                try:
                    self._thread.start()
                except RuntimeError:  # the system allows no more
                    self._thread = None
                    raise
            self._waiting.append(request)
            self._changed.notify()

    def withdraw(self, request: Request) -> None:
        """Take a request out of the queue, and end it as one that was cancelled; do nothing if it is not there."""
        with self._changed:
            if request not in self._waiting:
                return
            self._waiting.remove(request)
        request.end(request.cancelled())

    def take(self, wait: bool) -> Request | None:
        """Return the first request whose turn may come, as served; None if there is none, or the queue is closed.

        `wait`: until there is one.
        """
        with self._changed:
            while True:
                keys = [request.key for request in self._served if request.key is not None]
                for request in self._waiting:
                    if request.key is None or not any(request.key is key for key in keys):
                        self._waiting.remove(request)
                        self._served.append(request)
                        return request
                if not wait or self.closed:
                    return None
                self._changed.wait()

    def done(self, request: Request) -> None:
        """Note that a request is not served any more."""
        with self._changed:
            self._served.remove(request)

    def close(self) -> None:
        """Stop the requests that are served, refuse those that wait, and end the thread."""
        if self._process != os.getpid():
            return
        with self._changed:
            self.closed = True
            refused = list(self._waiting)
            self._waiting.clear()
            for request in self._served:
                request.stop()
            self._changed.notify()
        for request in refused:
            request.end(ClosedError("this LLM was closed before the request's turn came"))
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # How a caller gets results

    def stream(self, work: Callable[[Request], Iterator[T | Signal]], **limits: Any) -> "Stream[T]":
        """Return an iterator over what `work` yields; `limits` are arguments of `Request`."""
        items: SimpleQueue[Any] = SimpleQueue()
        request = Request(work, items.put, **limits)
        self.submit(request)
        return Stream(self, request, items)

    def call(self, work: Callable[[Request], Iterator[T | Signal]], **limits: Any) -> T:
        """Return the one thing that `work` yields."""
        with self.stream(work, **limits) as results:
            result = next(results)
            for _ in results:  # until it has cleaned up
                pass
            return result

    def gather(
        self,
        works: Sequence[Callable[[Request], Iterator[Any]]],
        records: Sequence[RequestRecord | None],
        n_at_once: int,
        return_exceptions: bool,
        on_done: Callable[[int], object],
        **limits: Any,
    ) -> list[Any]:
        """Return the one thing that each of several works yields, in their order.

        Args:
            works: the works.
            records: what observers see of each.
            n_at_once: how many requests to have in the queue, or served, at one time.
            return_exceptions: return errors in the place of results; else the first one stops the others.
            on_done: called with the number of those that have ended.
            limits: of each request.
        """
        arrived: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        results: list[Any] = [None] * len(works)
        waiting: dict[int, Request] = {}
        n_begun = 0
        try:
            while n_begun < len(works) or waiting:
                while n_begun < len(works) and len(waiting) < n_at_once:
                    at = n_begun
                    waiting[at] = Request(works[at], partial(_put, arrived, at), record=records[at], **limits)
                    self.submit(waiting[at])
                    n_begun += 1
                for request in list(waiting.values()):
                    if request.started is None and request.may_stop_itself and request.is_set():
                        self.withdraw(request)
                try:
                    at, item = arrived.get(timeout=_LOOK_SECONDS)
                except Empty:
                    continue
                if not isinstance(item, _End):
                    results[at] = item
                    continue
                del waiting[at]
                if item.error is not None:
                    if not (return_exceptions and isinstance(item.error, Exception)):
                        raise item.error
                    results[at] = item.error
                on_done(n_begun - len(waiting))
        finally:
            for request in waiting.values():
                request.stop()
                self.withdraw(request)
        return results

    def astream(self, work: Callable[[Request], Iterator[T | Signal]], **limits: Any) -> "AsyncStream[T]":
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

    async def acall(self, work: Callable[[Request], Iterator[T | Signal]], **limits: Any) -> T:
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
        else:
            self.withdraw(request)


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
                if request.is_set():
                    self._queue.withdraw(request)  # which puts its end there
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


class Doorbell:
    """Wakes an event loop once for all that has come since it last looked: waking it costs as much as a token."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._arrived: deque[_Inbox] = deque()
        self._has_rung = False
        self.put = self._arrived.append  # has the event loop look into an inbox once it is woken

    def ring(self) -> None:
        """Wake the event loop. If it is closed, nobody waits."""
        loop = self._loop()
        if not self._has_rung and loop is not None:
            self._has_rung = True
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._has_rung = False  # before it looks: what comes from now on rings again
        while self._arrived:
            self._arrived.popleft().look()


_doorbells: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Doorbell]" = weakref.WeakKeyDictionary()


class _Inbox:
    """Results that have come to an event loop. Made on it.

    Attributes:
        loop: the event loop.
        items: what has come.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.items: deque[Any] = deque()
        self._doorbell = _doorbells.setdefault(loop, Doorbell(loop))
        self._arrival: asyncio.Future[None] | None = None

    def put_from_thread(self, item: Any) -> Doorbell:
        """Hand an item to the event loop, which finds it once the bell is rung."""
        self.items.append(item)
        self._doorbell.put(self)
        return self._doorbell

    def look(self) -> None:
        """Wake whoever waits for an item."""
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def arrival(self) -> "asyncio.Future[None]":
        """Return what is done when the next item comes."""
        self._arrival = self.loop.create_future()
        return self._arrival


class AsyncStream(AsyncIterator[T]):
    """An asynchronous iterator over the results of a request. Closing, dropping or cancelling it stops the request."""

    def __init__(self, queue: RequestQueue, request: Request, inbox: _Inbox):
        self._queue, self._request, self._inbox = queue, request, inbox
        self._is_done = False

    async def __anext__(self) -> T:
        if self._is_done:
            raise StopAsyncIteration
        inbox = self._inbox
        while not inbox.items:
            try:
                await inbox.arrival()
            except BaseException:  # the task is cancelled
                await self.aclose()
                raise
        item = inbox.items.popleft()
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
