"""What people and programs read: text without control characters, JSON in ASCII, and the log as lines on stderr."""

import logging
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import minerva_native as mn

from .._json import as_json as as_json

_LOGGER = logging.getLogger("minerva_native")

# What moves the cursor, changes colours or reverses the direction of what follows, and what is invisible. The joiners
# and marks that scripts need (U+200C to U+200F) are left. Surrogates are bytes that were not UTF-8.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)

_ON_INTERRUPTION = "removing memory module entries"  # libllama's warning whenever a computation is interrupted


def printable(text: str, keep: str = "") -> str:
    r"""Return a text with its control characters escaped, such as \x1b, except those in `keep`."""
    return _UNSAFE.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # Python's sign for a byte that could not be decoded
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def write(text: str) -> None:
    """Write generated text: to a terminal without control characters, to a file or a pipe as it is."""
    sys.stdout.write(printable(text, "\n\t") if sys.stdout.isatty() else text)


def room() -> int | None:
    """Return how many columns a line of output may have: those of the terminal; None if it goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def folded(text: str, width: int | None, indent: int = 0) -> str:
    """Fold a line between words, so that it has at most `width` columns; later lines are indented.

    A word that is longer than a line runs over the edge. If the width is None, the line stays as it is.
    """
    if width is None or len(text) <= width:
        return text
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def size(n_bytes: int) -> str:
    """Return a number of bytes for people, such as "98.4 MB"."""
    return _scaled(n_bytes, ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1, " bytes")))


def count(number: int) -> str:
    """Return a large number for people, such as "134.5 M"."""
    return _scaled(number, ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1, "")))


def _scaled(number: int, units: tuple[tuple[float, str], ...]) -> str:
    scale, unit = next((pair for pair in units if number >= pair[0]), units[-1])
    return f"{number / scale:.1f}{unit}" if scale > 1 else f"{number:,}{unit}"


def placed(context: mn.Context) -> str | None:
    """Return where a model, its cache and its buffers are, or None if all are in this machine's memory."""
    parts = context.placement
    if len(parts) == 1:
        return None
    texts = []
    for part in parts:
        output = " and the output" if part.has_output else ""
        where = part.device if part.device == "CPU" else f"{part.device} ({part.description})"
        sizes = f"{size(part.size_bytes)} weights, {size(part.cache_bytes)} cache, {size(part.buffer_bytes)} buffers"
        layers = f"{part.layers} layer{'s' * (part.layers != 1)}"
        texts.append(f"{layers}{output} on {where}: {sizes}")
    return "; ".join(texts)


def say(kind: str, sentence: object) -> None:
    """Print a line on stderr."""
    print(f"minerva: {kind}: {printable(str(sentence))}", file=sys.stderr, flush=True)


def warn(sentence: str) -> None:
    """Print a warning, unless `-q` was given."""
    _LOGGER.warning("%s", sentence)


class Log(logging.Handler):
    """Shows the log of this package, which has libllama's, on stderr: each line once.

    Attributes:
        errors: error lines that were not shown, because the exception that ends a command says the same.
        held: lines that are shown later, as (kind, line); None if they are shown at once.
    """

    def __init__(self, is_verbose: bool):
        super().__init__(logging.DEBUG if is_verbose else logging.WARNING)
        self._is_verbose = is_verbose
        self._seen: set[str] = set()
        self.errors: list[str] = []
        self.held: list[tuple[str, str]] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Show a line."""
        line = record.getMessage().strip()
        if record.funcName == "_on_log" and record.levelno >= logging.WARNING:
            line = re.sub(r"^[^\s:]+: *", "", line)  # the name of the function in C++
        if line in self._seen or not re.search(r"\w", line):  # a frame of asterisks
            return
        self._seen.add(line)
        if line.startswith(_ON_INTERRUPTION) and not self._is_verbose:
            return
        if record.levelno >= logging.ERROR and not self._is_verbose:
            self.errors.append(line)
        elif self.held is not None:
            self.held.append((record.levelname.lower(), line))
        else:
            say(record.levelname.lower(), line)

    def show_held(self) -> None:
        """Show what was held back."""
        held, self.held = self.held or [], None
        for kind, line in held:
            say(kind, line)

    def show_errors(self) -> None:
        """Show the error lines after all: the command has not failed because of them."""
        for line in self.errors:
            say("warning", line)


@contextmanager
def shown_log(is_verbose: bool, is_quiet: bool) -> Iterator[Log]:
    """Show the log: warnings, all of it, or nothing."""
    log, before = Log(is_verbose), _LOGGER.level
    if not is_quiet:
        _LOGGER.addHandler(log)
    if is_verbose:
        _LOGGER.setLevel(logging.DEBUG)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _LOGGER.warning("%s", message)
            yield log
    finally:
        _LOGGER.removeHandler(log)
        _LOGGER.setLevel(before)


@contextmanager
def warnings_after(is_wanted: bool) -> Iterator[None]:
    """Show what is logged in the block after it, if that is wanted, so that it does not sit in a table."""
    logs = [handler for handler in _LOGGER.handlers if isinstance(handler, Log)] if is_wanted else []
    for log in logs:
        log.held = []
    try:
        yield
    finally:
        for log in logs:
            log.show_held()
