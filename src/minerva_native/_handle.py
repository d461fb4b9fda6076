"""Ownership of C objects: each is freed once, and after everything that was made from it."""

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import ClosedError

if TYPE_CHECKING:
    from ._binding._llama import CData


class NoCopy:
    """Refuses to be copied or pickled, because it stands for memory outside Python."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"a {name} cannot be copied or pickled: it stands for memory outside Python")


class Handle(NoCopy):
    """A C pointer with its destructor.

    `close` forbids further use. The object is freed once no thread is in a `with handle` block and all child handles
    are freed, so neither a call in another thread nor a context of a closed model ever sees freed memory.

    A child process never frees what it has inherited: it has none of the threads, and a GPU's driver does not survive a
    fork.
    """

    __slots__ = ("_free", "_name", "_parent", "_process", "_users", "closed", "pointer")

    # One lock for all counts, which rarely change. Re-entrant, because a garbage collection may close another handle.
    # On the class, because a module's globals are gone when the last handles are collected at exit.
    _lock = threading.RLock()

    def __init__(self, name: str, pointer: "CData", free: "Callable[[CData], object]", parent: "Handle | None" = None):
        self._name, self.pointer, self._free = name, pointer, free
        self._parent: Handle | None = None
        self._process = os.getpid()
        self._users = 0
        self.closed = False
        if parent is not None:
            parent.__enter__()  # raises if the parent is closed; then `__del__` frees the pointer
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
        """Forbid further use, and free the object as soon as it is not in use."""
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
        """Free the pointer, outside the lock: libllama logs while it frees, and log handlers have their own locks."""
        if pointer is not None and self._process == os.getpid():
            self._free(pointer)
            if self._parent is not None:
                self._parent.__exit__()

    def __del__(self) -> None:
        self.close()

    @classmethod
    def _after_fork(cls) -> None:
        cls._lock = threading.RLock()  # another thread may have held it


os.register_at_fork(after_in_child=Handle._after_fork)
