"""What people and programs read: text without control characters, JSON in ASCII, and the log as lines on stderr."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def as_json(value: Any) -> str:
    """Return JSON in printable ASCII. A number that JSON does not have, such as NaN, becomes a string."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        text = json.dumps(json.loads(json.dumps(value), parse_constant=str))
    return text.replace("\x7f", "\\u007f")


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
    """

    def __init__(self, is_verbose: bool):
        super().__init__(logging.DEBUG if is_verbose else logging.WARNING)
        self._is_verbose = is_verbose
        self._seen: set[str] = set()
        self.errors: list[str] = []

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
        else:
            say(record.levelname.lower(), line)

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
        yield log
    finally:
        _LOGGER.removeHandler(log)
        _LOGGER.setLevel(before)
