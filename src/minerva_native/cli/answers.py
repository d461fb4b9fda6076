"""How an answer appears: plain text while it is made and, on a terminal, Markdown once it is complete."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import unicodedata
from typing import TYPE_CHECKING, Protocol

from .messages import printable, write

if TYPE_CHECKING:
    from minerva_native import Chunk

_DIM, _NOT_DIM = "\x1b[2m", "\x1b[22m"

# Flags and skin tones of emoji, whose width terminals do not agree about. So it is with marks and joiners.
_ODD_WIDTH = re.compile("[\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff]")
_ODD_CATEGORIES = frozenset({"Mn", "Me", "Cf"})

_STYLE = re.compile(r"(\x1b\[[\d;]*m)")


class Log(logging.Filter):
    """Counts the lines of the log, and hides the one of a turn that was dropped: the chat says that itself.

    Attributes:
        n_lines: how many lines there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.n_lines = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether to show a line."""
        if record.getMessage().startswith("the context is full: a chat goes on"):
            return False
        self.n_lines += 1
        return True


class Answer(Protocol):
    """Where the pieces of an answer go."""

    def add(self, chunk: Chunk) -> None:
        """Show a piece."""

    def end(self) -> None:
        """End the line: there is no more, and perhaps it is not the whole answer."""

    def finish(self) -> None:
        """Show the whole answer as it is to stay."""


class InAFile:
    """An answer that is written as it is, without its reasoning."""

    def add(self, chunk: Chunk) -> None:
        """Write a piece."""
        write(chunk.text)
        sys.stdout.flush()

    def end(self) -> None:
        """End the line."""
        print(flush=True)

    finish = end


class OnATerminal:
    """An answer on a terminal: the reasoning is dim, and Markdown takes the place of the plain text at the end.

    Text that may have left the screen, or whose place is not certain, stays plain.
    """

    def __init__(self, log: Log):
        self._log, self._n_lines = log, log.n_lines
        self._size = os.get_terminal_size(sys.stdout.fileno())
        self._is_dumb = os.environ.get("TERM", "") in ("", "dumb")
        self._text = ""
        self._is_reasoning = False
        self._row = self._column = 0  # of the cursor, from where the answer began

    def add(self, chunk: Chunk) -> None:
        """Show a piece."""
        if chunk.reasoning:
            if not self._is_reasoning:
                self._is_reasoning = True
                self._style(_DIM)
            self._write(chunk.reasoning)
        if chunk.text:
            self._leave_reasoning()
            self._text += chunk.text
            self._write(chunk.text)
        sys.stdout.flush()

    def end(self) -> None:
        """End the line."""
        self._leave_reasoning()
        if self._column or not self._text:
            sys.stdout.write("\n")
        sys.stdout.flush()

    def finish(self) -> None:
        """Put Markdown in the place of the text, if that is certain to be right."""
        if not self._text.strip() or not self._is_certain():
            self.end()
            return
        up = f"\x1b[{self._row}A" if self._row else ""
        sys.stdout.write(f"\r{up}\x1b[J{markdown(self._text, self._size.columns)}")
        sys.stdout.flush()

    def _is_certain(self) -> bool:
        return (
            not self._is_dumb
            and self._row < self._size.lines
            and self._size == os.get_terminal_size(sys.stdout.fileno())
            and self._log.n_lines == self._n_lines
            and not _ODD_WIDTH.search(self._text)
            and not any(unicodedata.category(character) in _ODD_CATEGORIES for character in self._text)
        )

    def _leave_reasoning(self) -> None:
        if self._is_reasoning:
            self._style(_NOT_DIM)
            sys.stdout.write("\n\n" if self._column else "\n")
            self._is_reasoning = False
            self._row = self._column = 0

    def _style(self, sequence: str) -> None:
        if not self._is_dumb:
            sys.stdout.write(sequence)

    def _write(self, text: str) -> None:
        """Write text, and note where the cursor is then."""
        from rich.cells import get_character_cell_size

        shown = printable(text, "\n\t")
        sys.stdout.write(shown)
        columns = self._size.columns
        for character in shown:
            if character == "\n":
                self._row, self._column = self._row + 1, 0
            elif character == "\t":
                self._column = min((self._column // 8 + 1) * 8, columns - 1)
            else:
                width = get_character_cell_size(character)
                if self._column + width > columns:
                    self._row, self._column = self._row + 1, 0
                self._column += width


def markdown(text: str, columns: int) -> str:
    """Render Markdown for a terminal. The only escape sequences in it are styles, whatever the text says."""
    from rich.console import Console
    from rich.markdown import Markdown

    document = Markdown(printable(text, "\n\t"), hyperlinks=False)
    for token in document.parsed:
        for child in token.children or ():
            if child.type == "softbreak":  # verse keeps its lines
                child.type = "hardbreak"
    output = io.StringIO()
    Console(file=output, force_terminal=True, width=columns).print(document)
    parts = _STYLE.split(output.getvalue())
    return "".join(part if at % 2 else printable(part, "\n\t") for at, part in enumerate(parts))
