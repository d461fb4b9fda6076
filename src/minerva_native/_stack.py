"""Calls on a thread with a stack of a given size, for code that recurses."""

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from .errors import Cancelled

T = TypeVar("T")

_LOOK_SECONDS = 0.01  # how often a caller looks at its cancel token
_stack_size_lock = threading.RLock()  # re-entrant, because a signal handler may call too


class StackError(RuntimeError):
    """The system grants no thread with such a stack."""


def with_stack(function: Callable[[], T], stack_bytes: int, cancel: threading.Event | None = None) -> T:
    """Call a function on a thread with a stack of that size; `cancel` and Ctrl-C leave it to finish on its own.

    Raises:
        StackError: the system grants no such thread.
        Cancelled: `cancel` was set.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()  # `Thread.join` forgets a thread that runs when Ctrl-C interrupts it

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    with _stack_size_lock:
        before = threading.stack_size()
        try:
            threading.stack_size(stack_bytes)
            threading.Thread(target=work, name="minerva_native deep stack", daemon=True).start()
        except RuntimeError:
            raise StackError(
                f"the system grants no thread with a stack of {stack_bytes >> 10:,} KB: its limits of address space or "
                "of threads are too low"
            ) from None
        finally:
            threading.stack_size(before)
    while not done.wait(_LOOK_SECONDS):
        if cancel is not None and cancel.is_set():
            raise Cancelled("the call was cancelled")
    if errors:
        raise errors.pop()
    return results[0]


# A child of a fork during `with_stack` would find the lock taken, and the wrong size.
os.register_at_fork(
    before=_stack_size_lock.acquire,
    after_in_parent=_stack_size_lock.release,
    after_in_child=_stack_size_lock.release,
)
