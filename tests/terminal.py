"""A program on a pseudo-terminal, with a screen that shows what a person would see."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import pyte

_PATIENCE_SECONDS = 60


def screen_after(output: str, rows: int, columns: int) -> list[str]:
    """Return the lines of a screen after some output; lines that have scrolled away are not there."""
    screen = pyte.Screen(columns, rows)
    pyte.Stream(screen).feed(output.replace("\n", "\r\n"))
    return [line.rstrip() for line in screen.display]


class Terminal:
    """A running program. A context manager, which ends it.

    Attributes:
        process: the program.
    """

    def __init__(self, command: list[str], env: Mapping[str, str] | None = None, rows: int = 40, columns: int = 100):
        self._controller, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._size = rows, columns
        self._data = b""
        self._text = ""
        defaults = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, **defaults, **(env or {})},
            preexec_fn=_take_terminal,
        )
        os.close(terminal)

    def press(self, text: str) -> None:
        """Type some text, or keys."""
        os.write(self._controller, text.encode())

    def enter(self, line: str) -> None:
        """Type a line, and wait until it is shown and sent."""
        self.press(f"{line}\r")
        self.expect(f"{re.escape(line.rstrip())} *\n")

    def expect(self, pattern: str) -> str:
        """Wait for text, escape sequences left out, and return what came up to its end since the last call."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not (found := re.search(pattern, self._text, re.MULTILINE)):
            assert time.monotonic() < deadline, f"{pattern!r} did not come, but {self._text!r}"
            if not self._read():
                raise AssertionError(f"the program ended without {pattern!r}: {self._text!r}")
        seen, self._text = self._text[: found.end()], self._text[found.end() :]
        return seen

    def wait(self) -> int:
        """Wait for the program's end, and return its exit status."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self._read():
            assert time.monotonic() < deadline, f"the program goes on: {self._text!r}"
        return self.process.wait(timeout=_PATIENCE_SECONDS)

    @property
    def lines(self) -> list[str]:
        """The lines on the screen."""
        return screen_after(self._data.decode(errors="replace").replace("\r\n", "\n"), *self._size)

    def _read(self) -> bool:
        if not select.select([self._controller], [], [], 1)[0]:
            return True
        try:
            data = os.read(self._controller, 1 << 16)
        except OSError:  # how the end of a terminal is read
            return False
        self._data += data
        self._text += re.sub(r"\x1b(\[[\d;?]*[a-zA-Z]|\][^\x07]*\x07|[=>])|[\r\b]", "", data.decode(errors="replace"))
        return bool(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._controller)


def _take_terminal() -> None:
    """Make the terminal that of a new session, so that Ctrl-C is a signal."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
