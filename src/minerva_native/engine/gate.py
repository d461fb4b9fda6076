"""The lock of a context, and who may enter it again."""

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from .._arguments import cancel_token
from ..errors import Cancelled, ReentryError

_LOOK_SECONDS = 0.01  # how often a call that waits in the queue looks at its cancel token

_YIELD_SECONDS = 0.0002  # long enough for a waiting thread to wake and take the lock


class CancelToken(Protocol):
    """What stops a call: a `threading.Event`, or anything else with this method. It is asked on the calling thread."""

    def is_set(self) -> bool:
        """Say whether to stop."""


class Gate:
    """Serialises the calls on one context.

    A thread that is inside already gets in again only while one of its callbacks runs (`calling_back`). A signal
    handler or a finaliser that strikes during a call gets a `ReentryError`.
    """

    def __init__(self) -> None:
        self._open()
        _gates.add(self)

    def _open(self) -> None:
        self._lock = threading.RLock()
        # Whether this thread holds it, as `threading.Condition` asks.
        self._is_mine: Callable[[], bool] = self._lock._is_owned  # type: ignore[attr-defined]
        self._is_calling_back = False

    def enter(self, cancel: CancelToken | None = None) -> AbstractContextManager[object]:
        """Return the context manager of one call; raise `ReentryError` within another call.

        It is the lock itself, so that no signal handler can strike between taking it and the `with` block. With a
        cancel token, waiting for the lock ends with `Cancelled` as soon as the token is set.
        """
        if cancel is not None:
            cancel_token(cancel)
        if self._is_mine():
            return self._nested()
        return self._lock if cancel is None else self._queued(cancel)

    @contextmanager
    def _queued(self, cancel: CancelToken) -> Iterator[None]:
        try:
            while not self._lock.acquire(timeout=_LOOK_SECONDS):
                check(cancel)
            yield
        finally:
            if self._is_mine():  # not a variable: a signal handler may raise before it could be assigned
                self._lock.release()

    @contextmanager
    def _nested(self) -> Iterator[None]:
        if not self._is_calling_back:
            raise ReentryError("this context is computing: it cannot be used or closed from within")
        self._is_calling_back = False
        try:
            yield
        finally:
            self._is_calling_back = True

    @contextmanager
    def calling_back(self) -> Iterator[None]:
        """Let the callback that runs in this block use the context. The caller is inside."""
        before, self._is_calling_back = self._is_calling_back, True
        try:
            yield
        finally:
            self._is_calling_back = before

    def is_within(self) -> bool:
        """Return whether this thread is in the middle of a call, and not in one of its callbacks."""
        return self._is_mine() and not self._is_calling_back

    def let_others_in(self) -> None:
        """Give waiting threads the time to take the lock, which a thread that releases and retakes it does not."""
        if not self._is_mine():
            time.sleep(_YIELD_SECONDS)


_gates: weakref.WeakSet[Gate] = weakref.WeakSet()


def _after_fork() -> None:
    """Open the gates of a child process: another thread may have been inside."""
    for gate in list(_gates):
        gate._open()


os.register_at_fork(after_in_child=_after_fork)


def check(cancel: CancelToken | None) -> None:
    """Raise `Cancelled` if a cancel token is set."""
    if cancel is not None and cancel.is_set():
        raise Cancelled("the call was stopped by its cancel token")
