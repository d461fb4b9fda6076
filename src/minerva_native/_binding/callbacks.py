"""Callbacks from C: the log, the progress of a load, and the check whether to stop a computation.

They may run on any thread. No exception crosses C: it ends the C call if it can, and is raised after that call has
returned.
"""

import atexit
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from ._llama import ffi, lib

logger = logging.getLogger("minerva_native")
logger.addHandler(logging.NullHandler())

LEVELS = {
    lib.GGML_LOG_LEVEL_DEBUG: logging.DEBUG,
    lib.GGML_LOG_LEVEL_INFO: logging.DEBUG,  # libllama's information is too detailed for this package's users
    lib.GGML_LOG_LEVEL_WARN: logging.WARNING,
    lib.GGML_LOG_LEVEL_ERROR: logging.ERROR,
}


_LAST_ERRORS = 8

_END_US = 1_000_000  # how long the end of the process waits for calls that do not stop


class _Watch(Protocol):
    """What the handle in `minerva_abort_state.data` refers to."""

    def is_cancelled(self) -> bool:
        """Return whether the computation should stop."""


class _Thread(threading.local):
    """What the log callback remembers for one thread.

    Attributes:
        errors: the list that `captured_errors` fills, if it is in use.
        is_rehearsing: whether what is logged will be logged again.
        is_stopping: whether a computation was told to stop, which libllama logs as an error.
        line: the log line so far, if it is incomplete.
        level: the level of that line.
        last_errors: the last error lines, each with its time by `time.perf_counter`.
    """

    errors: list[str] | None = None
    is_rehearsing = False
    is_stopping = False
    line = ""
    level = logging.DEBUG
    last_errors: tuple[tuple[float, str], ...] = ()


_thread = _Thread()

kept: dict[int, BaseException] = {}
"""Exceptions from callbacks that are still to be raised, by thread. Nearly always empty, so a check costs nothing."""


def _keep(kind: object, exception: BaseException, traceback: object) -> None:
    kept[threading.get_ident()] = exception


def _keep_and_stop(kind: object, exception: BaseException, traceback: object) -> None:
    _thread.is_stopping = True
    _keep(kind, exception, traceback)


def _keep_interrupt(kind: object, exception: BaseException, traceback: object) -> None:
    # A KeyboardInterrupt may be raised anywhere, also here. An error in a log handler is its owner's problem.
    if not isinstance(exception, Exception):
        kept[threading.get_ident()] = exception


def end_at_exit() -> None:
    """End this thread, silently, if a call failed because the interpreter is shutting down."""
    if lib.minerva_is_ending():
        raise SystemExit


def forget_stop() -> None:
    """Take errors that libllama logs on this thread from now on for what they are: nothing was told to stop."""
    _thread.is_stopping = False


def raise_kept() -> None:
    """Raise the exception that a callback on this thread has left, if there is one."""
    end_at_exit()
    forget_stop()
    exception = kept.pop(threading.get_ident(), None)
    if exception is not None:
        raise exception


@ffi.def_extern(name="minerva_on_poll", error=True, onerror=_keep_and_stop)
def _on_poll(handle: object) -> bool:
    """Return whether to stop a computation: `is_cancelled()` of the object behind the handle, if there is one.

    Entering Python also runs pending signal handlers. If one raises an exception, that stops the computation too.
    """
    if handle == ffi.NULL:
        return False
    watch: _Watch = ffi.from_handle(handle)
    _thread.is_stopping = watch.is_cancelled()
    return _thread.is_stopping


@ffi.def_extern(name="minerva_on_progress", error=False, onerror=_keep)
def _on_progress(progress: float, handle: object) -> bool:
    on_progress: Callable[[float], object] = ffi.from_handle(handle)
    return on_progress(progress) is not False


@ffi.def_extern(name="minerva_on_log", onerror=_keep_interrupt)
def _on_log(level: int, text: object) -> None:
    state = _thread
    if level != lib.GGML_LOG_LEVEL_CONT:
        state.level = LEVELS.get(level, logging.DEBUG)
    state.line += ffi.string(text).decode(errors="replace")
    if not state.line.endswith("\n"):
        return
    line, state.line = state.line.strip(), ""
    if state.level >= logging.ERROR:
        state.last_errors = (*state.last_errors[-_LAST_ERRORS:], (time.perf_counter(), line))
        if state.errors is not None:
            state.errors.append(line)
    logger.log(logging.DEBUG if state.is_rehearsing or state.is_stopping else state.level, "%s", line)


@contextmanager
def rehearsal() -> Iterator[None]:
    """Do not warn, on this thread, of what will be warned of when it is done in earnest."""
    outer, _thread.is_rehearsing = _thread.is_rehearsing, True
    try:
        yield
    finally:
        _thread.is_rehearsing = outer


@contextmanager
def captured_errors() -> Iterator[list[str]]:
    """Collect the error lines that libllama logs on this thread."""
    outer, _thread.errors = _thread.errors, []
    try:
        yield _thread.errors
    finally:
        _thread.errors = outer


def reason(errors: list[str], otherwise: str) -> str:
    """Return why a call failed, in libllama's words: the first line is the cause, later ones only follow from it."""
    return errors[0].partition(": ")[2] or errors[0] if errors else otherwise


def logged_since(when: float) -> str:
    """Return the errors that libllama has logged on this thread since `when`, as the end of a sentence."""
    errors = [line for then, line in _thread.last_errors if then >= when]
    return f": {' '.join(reason(errors, '').split())}" if errors else ""


lib.llama_log_set(lib.minerva_log, ffi.NULL)
# A daemon thread that computes while the interpreter shuts down must not enter it: Python would end the thread there,
# which C++ does not survive.
atexit.register(lib.minerva_end, _END_US)
