"""What C calls back into: the log, the progress of a load, and the question whether to go on computing.

These may come on any thread. No exception crosses C: it ends the call, or waits, and is raised when C has returned.
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
    lib.GGML_LOG_LEVEL_INFO: logging.DEBUG,  # what libllama calls information is a developer's detail here
    lib.GGML_LOG_LEVEL_WARN: logging.WARNING,
    lib.GGML_LOG_LEVEL_ERROR: logging.ERROR,
}


_LAST_ERRORS = 8


class _Watch(Protocol):
    """What a context hands to its computations as `minerva_abort_state.data`."""

    def is_cancelled(self) -> bool:
        """Say whether to stop."""


class _Thread(threading.local):
    """What the callbacks of one thread's current call have to remember."""

    errors: list[str] | None = None
    line = ""
    level = logging.DEBUG
    last_errors: tuple[tuple[float, str], ...] = ()  # when they came, by `time.perf_counter`, and what they said


_thread = _Thread()

kept: dict[int, BaseException] = {}
"""What exceptions in callbacks have left behind, by thread; nearly always empty, so that looking costs nothing."""


def _keep(kind: object, exception: BaseException, traceback: object) -> None:
    kept[threading.get_ident()] = exception


def _keep_interrupt(kind: object, exception: BaseException, traceback: object) -> None:
    # Ctrl-C may strike anywhere, also here; a log handler that fails is its owner's affair.
    if not isinstance(exception, Exception):
        kept[threading.get_ident()] = exception


def raise_kept() -> None:
    """Raise what an exception in a callback of this thread has left behind, if any."""
    exception = kept.pop(threading.get_ident(), None)
    if exception is not None:
        raise exception


@ffi.def_extern(name="minerva_on_poll", error=True, onerror=_keep)
def _on_poll(handle: object) -> bool:
    """Say whether to stop a computation: the object behind the handle, if there is one, knows by `is_cancelled()`.

    Entering Python also lets pending signal handlers run: an exception that one raises stops the computation too.
    """
    if handle == ffi.NULL:
        return False
    watch: _Watch = ffi.from_handle(handle)
    return watch.is_cancelled()


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
    logger.log(state.level, "%s", line)


@contextmanager
def captured_errors() -> Iterator[list[str]]:
    """Collect the error lines that libllama logs on this thread."""
    outer, _thread.errors = _thread.errors, []
    try:
        yield _thread.errors
    finally:
        _thread.errors = outer


def reason(errors: list[str], otherwise: str) -> str:
    """Say why a call failed, in libllama's words: the first line is the cause, later ones its echoes."""
    return errors[0].partition(": ")[2] or errors[0] if errors else otherwise


def logged_since(when: float) -> str:
    """Return what libllama has logged as an error on this thread since then, as the end of a sentence."""
    errors = [line for then, line in _thread.last_errors if then >= when]
    return f": {' '.join(reason(errors, '').split())}" if errors else ""


lib.llama_log_set(lib.minerva_log, ffi.NULL)
# A library thread that logs while the interpreter is torn down must not enter it.
atexit.register(lib.minerva_mute)
