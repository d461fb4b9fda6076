"""Ownership of C objects: freed once, after everything that was made from them, whoever lets go first."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .errors import ClosedError

if TYPE_CHECKING:
    from ._binding._llama import CData


class Handle:
    """A C pointer with its destructor.

    `close` forbids further use; the object is freed when, besides, nobody is inside a `with handle` block and every
    child handle is gone: neither a call in another thread nor a context of a closed model ever sees freed memory.
    """

    __slots__ = ("_free", "_name", "_parent", "_users", "closed", "pointer")

    # One lock for all counts: they change seldom. Re-entrant, because a garbage collection may close another handle.
    # On the class, because a module's names are gone when the last handles are collected at exit.
    _lock = threading.RLock()

    def __init__(self, name: str, pointer: "CData", free: "Callable[[CData], object]", parent: "Handle | None" = None):
        self._name, self.pointer, self._free = name, pointer, free
        self._parent: Handle | None = None
        self._users = 0
        self.closed = False
        if parent is not None:
            parent.__enter__()  # if the parent is closed this raises, and our `__del__` frees the pointer
            self._parent = parent

    def __enter__(self) -> Any:
        """Borrow the pointer: it stays valid until the block ends."""
        with self._lock:
            if self.closed:
                raise ClosedError(f"this {self._name} is closed")
            self._users += 1
            return self.pointer

    def __exit__(self, *exception: object) -> None:
        """Give the pointer back."""
        with self._lock:
            self._users -= 1
            pointer = self._take_if_unused()
        self._finish(pointer)

    def close(self) -> None:
        """Forbid further use, and free the object as soon as nobody uses it."""
        with self._lock:
            self.closed = True
            pointer = self._take_if_unused()
        self._finish(pointer)

    def _take_if_unused(self) -> Any:
        pointer = None
        if self.closed and self._users == 0:
            pointer, self.pointer = self.pointer, None
        return pointer

    def _finish(self, pointer: Any) -> None:
        """Free what was taken, outside the lock: libllama logs as it frees, and log handlers have their own locks."""
        if pointer is not None:
            self._free(pointer)
            if self._parent is not None:
                self._parent.__exit__()

    def __del__(self) -> None:
        self.close()
