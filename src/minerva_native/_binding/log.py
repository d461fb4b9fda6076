"""libllama's log, routed to the `logging` logger `minerva_native`, and kept for the error messages of a failed call."""

import atexit
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ._llama import ffi, lib

logger = logging.getLogger("minerva_native")
logger.addHandler(logging.NullHandler())

LEVELS = {
    lib.GGML_LOG_LEVEL_DEBUG: logging.DEBUG,
    lib.GGML_LOG_LEVEL_INFO: logging.DEBUG,  # what libllama calls information is a developer's detail here
    lib.GGML_LOG_LEVEL_WARN: logging.WARNING,
    lib.GGML_LOG_LEVEL_ERROR: logging.ERROR,
}


class _Thread(threading.local):
    """What one thread's current call has logged so far."""

    errors: list[str] | None = None
    line = ""
    level = logging.DEBUG


_thread = _Thread()


def ignore(*exception: object) -> None:
    """Let an exception end at the border: none may cross C."""


@ffi.def_extern(name="minerva_on_log", onerror=ignore)
def _on_log(level: int, text: object) -> None:
    state = _thread
    if level != lib.GGML_LOG_LEVEL_CONT:
        state.level = LEVELS.get(level, logging.DEBUG)
    state.line += ffi.string(text).decode(errors="replace")
    if not state.line.endswith("\n"):
        return
    line, state.line = state.line.strip(), ""
    if state.errors is not None and state.level >= logging.ERROR:
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


lib.llama_log_set(lib.minerva_log, ffi.NULL)
# A library thread that logs while the interpreter is torn down must not enter it.
atexit.register(lib.minerva_mute)
