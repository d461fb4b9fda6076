"""Editing a line: with prompt_toolkit if it is installed, else with readline."""

import importlib.util
import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .messages import say

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyPressEvent

Read = Callable[[str], str]
"""Shows a prompt and returns what was typed. Ctrl-D is an `EOFError`, Ctrl-C a `KeyboardInterrupt`."""

Complete = Callable[[str], list[str]]
"""Takes the beginning of a line, and returns what its last word may become."""


class History:
    """What was typed, the oldest entry first: kept for the session, and in a file that only its owner can read.

    Args:
        path: the file, a JSON string a line; None for none. It is made if there is none.

    Raises:
        OSError: the file cannot be opened, or made private.
        ValueError: it is no such file.
    """

    def __init__(self, path: Path | None):
        self.entries: list[str] = []
        self._file: int | None = None
        if path is None:
            return
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise ValueError(f"{path} is not a regular file: --history needs one")
        with open(self._file, encoding="utf-8", closefd=False) as file:
            try:
                self.entries = [json.loads(line) for line in file]
            except ValueError:
                self.entries = [None]  # type: ignore[list-item]
        if not all(isinstance(entry, str) for entry in self.entries):
            raise ValueError(f"{path} is no history that minerva chat wrote: name another file with --history")
        os.fchmod(self._file, 0o600)

    def add(self, entry: str) -> None:
        """Write an entry to the file."""
        if self._file is not None:
            os.write(self._file, (json.dumps(entry) + "\n").encode())


def line_editor(history: History, complete: Complete, is_quiet: bool) -> Read:
    """Return a function that reads what is typed: several lines with Alt-Enter or a paste, completion with Tab."""
    if importlib.util.find_spec("prompt_toolkit") is not None:
        return _with_prompt_toolkit(history.entries, complete)
    if not is_quiet:
        say("note", "pip install 'minerva-native[chat]' for better editing")
    return _with_readline(history.entries, complete)


def _with_prompt_toolkit(entries: Iterable[str], complete: Complete) -> Read:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    class Words(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            text = document.text_before_cursor
            for word in complete(text):
                yield Completion(word, start_position=-len(text.rpartition(" ")[2]))

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: "KeyPressEvent") -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        multiline=True,  # what is pasted may have several lines
        history=InMemoryHistory(list(entries)),
        completer=Words(),
        complete_while_typing=False,
        reserve_space_for_menu=4,
        key_bindings=keys,
        prompt_continuation=lambda width, line_number, wrap_count: " " * width,
    )
    return lambda prompt: session.prompt(prompt)


def _with_readline(entries: Iterable[str], complete: Complete) -> Read:
    with suppress(ImportError):
        import readline

        for entry in entries:
            readline.add_history(entry)

        def nth(word: str, n: int) -> str | None:
            words = complete(readline.get_line_buffer()[: readline.get_endidx()])
            return words[n] if n < len(words) else None

        readline.set_completer(nth)
        readline.set_completer_delims(" ")
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')  # Alt-Enter: a new line, literally

    def read(prompt: str) -> str:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return input(prompt)
        finally:
            signal.signal(signal.SIGINT, before)

    return read


@contextmanager
def without_echo() -> Iterator[None]:
    """Do not show what is typed, which would get between the lines of an answer; the next prompt gets it."""
    import termios

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent: list[Any] = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
