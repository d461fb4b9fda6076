"""The `minerva` command before its imports: until they are done, Ctrl-C ends the process, with status 130.

It stands outside `minerva_native` because importing a module of a package imports the package first, which takes most
of the time.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def leave_on_ctrl_c() -> None:
    """End the process on Ctrl-C, without a traceback, unless the parent process had it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(130)


def main() -> int:
    """Run the command line; return the exit status, as `minerva_native.cli.main` does."""
    leave_on_ctrl_c()
    try:
        from minerva_native.cli import main as run
    except Exception as error:
        if type(error).__name__ != "BuildError":  # which cannot be imported either
            raise
        print(f"minerva: error: {error}", file=sys.stderr)
        return 1
    try:
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return run()
    except KeyboardInterrupt:
        return 130


def is_run_as_a_module(name: str) -> bool:
    """Return whether the interpreter is looking for this module in order to run it (`python -m`)."""
    return sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m") == name
