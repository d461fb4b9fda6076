"""Reads text that comes in pieces, so that the result never depends on where it was cut.

What reads is a generator that stops with a bare `yield` when it needs more text. So a format is read by code that
goes from left to right as if the text were all there. Every method decides by the text alone: if the next piece could
change the decision, it waits for it. Each character is looked at a bounded number of times.
"""

import re
from collections.abc import Callable, Generator, Mapping
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Reading: TypeAlias = Generator[None, None, T]
Write: TypeAlias = Callable[[str], object]

END = ""
"""Stands for the end of the text among what may follow a marker."""

MAX_DEPTH = 100
"""Brackets in brackets, in the arguments of a call."""

_SPACES = re.compile(r"\s+")
_SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null", re.ASCII)
_SCALAR_CHARACTERS = re.compile(r"[-+.\w]+")
_PLAIN = re.compile(r'[^"\\]+')
_CONTROL = {code: f"\\u{code:04x}" for code in range(0x20)}


class Malformed(Exception):
    """The text is not what the format wants."""


class CutOff(Exception):
    """The text ends in the middle of a call."""


class Markers:
    """Strings to look for.

    Args:
        follow: for each string, one of which must come after it (and after white space) for it to count; none if it
            always counts.
    """

    def __init__(self, follow: Mapping[str, tuple[str, ...]]):
        self.follow = dict(follow)
        ordered = sorted(self.follow, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        beginnings = [_beginnings(marker[:-1]) for marker in ordered if len(marker) > 1]
        self._begun = re.compile(f"(?:{'|'.join(beginnings) or '(?!)'})\\Z")
        self._longest = max(map(len, ordered), default=0)

    def find(self, text: str, start: int, is_all: bool) -> re.Match[str] | None:
        """Return the first marker, unless more text could make one that begins earlier, or there and is longer."""
        found = self.pattern.search(text, start)
        if found and not is_all and len(text) - self.begun(text, start) <= found.start():
            return None
        return found

    def begun(self, text: str, start: int) -> int:
        """Return how many characters at the end of a text begin a marker."""
        found = self._begun.search(text, max(start, len(text) - self._longest))
        return len(text) - found.start() if found else 0


def _beginnings(text: str) -> str:
    return "(?:".join(map(re.escape, text)) + ")?" * (len(text) - 1)


class Reader:
    """The text that has come so far."""

    def __init__(self) -> None:
        self._text, self._at = "", 0
        self._ended = False
        self._recorded: list[str] = []
        self._is_recording = False

    def push(self, text: str) -> None:
        """Add a piece of text."""
        self._text = self._text[self._at :] + text
        self._at = 0

    @property
    def n_kept(self) -> int:
        """How many characters are kept: those that wait for others, and the last piece."""
        return len(self._text)

    @property
    def n_waiting(self) -> int:
        """How many characters are not read."""
        return len(self._text) - self._at

    def end(self) -> None:
        """Say that no more text comes."""
        self._ended = True

    def record(self, text: str) -> None:
        """Begin to keep what is read, after a text that was read already."""
        self._recorded, self._is_recording = [text], True

    def recorded(self) -> str:
        """Return what was read since `record`, and keep no more."""
        text = "".join(self._recorded)
        self._recorded, self._is_recording = [], False
        return text

    def peek(self) -> Reading[str]:
        """Return the next character; "" at the end."""
        while self._at == len(self._text) and not self._ended:
            yield
        return self._text[self._at : self._at + 1]

    def sees(self, *options: str) -> Reading[str | None]:
        """Return which of some strings comes next, the longest of several; `END` is one that may be asked for."""
        ordered = sorted((option for option in options if option), key=len, reverse=True)
        while True:
            rest = self._text[self._at : self._at + len(ordered[0])] if ordered else ""
            for option in ordered:
                if rest.startswith(option):
                    return option
                if not self._ended and option.startswith(rest):
                    break
            else:
                if END in options and not rest and (yield from self.peek()) == "":
                    return END
                return None
            yield

    def literal(self, *options: str) -> Reading[str]:
        """Read one of some strings; return "" if none comes."""
        found = yield from self.sees(*options)
        return self._take(len(found or ""))

    def expect(self, literal: str) -> Reading[None]:
        """Read a string, which must come."""
        if (yield from self.literal(literal)) != literal:
            yield from self.refuse(f"{literal.strip()!r} expected")

    def refuse(self, message: str) -> Reading[None]:
        """Raise `Malformed`, or `CutOff` if the text has ended."""
        found = yield from self.peek()
        if found == "":
            raise CutOff
        raise Malformed(f"{message}, not {found!r}")

    def spaces(self) -> Reading[str]:
        """Read white space."""
        return (yield from self.run(_SPACES))

    def run(self, pattern: re.Pattern[str]) -> Reading[str]:
        """Read as many characters as a pattern of single characters takes."""
        parts = []
        while True:
            found = pattern.match(self._text, self._at)
            if found:
                parts.append(self._take(found.end() - self._at))
            if self._at < len(self._text) or self._ended:
                return "".join(parts)
            yield

    def until(self, markers: Markers, write: Write) -> Reading[tuple[str, str]]:
        """Read up to the first marker.

        Returns:
            The marker, and the white space after it if what follows it was looked at; two empty strings at the end.
        """
        while True:
            found = markers.find(self._text, self._at, self._ended)
            if found:
                if found.start() > self._at:
                    write(self._take(found.start() - self._at))
                marker = self._take(len(found[0]))
                follow = markers.follow[marker]
                if not follow:
                    return marker, ""
                space = yield from self.spaces()
                if (yield from self.sees(*follow)) is not None:
                    return marker, space
                write(marker + space)
                continue
            held = 0 if self._ended else markers.begun(self._text, self._at)
            if size := len(self._text) - held - self._at:
                write(self._take(size))
            if self._ended:
                return "", ""
            yield

    def text_until(self, *markers: str) -> Reading[tuple[str, str]]:
        """Read up to the first of some markers, one of which must come; return the text and the marker."""
        parts: list[str] = []
        marker, _ = yield from self.until(Markers(dict.fromkeys(markers, ())), parts.append)
        if not marker:
            raise CutOff
        return "".join(parts), marker

    def json(self, write: Write) -> Reading[None]:
        """Read a JSON value and write its text; what JSON does not allow in strings is escaped."""
        closers: list[str] = []
        expected = "a value"
        while True:
            space = yield from self.spaces()
            if space and closers:
                write(space)
            char = yield from self.peek()
            if char == "":
                raise CutOff
            closes = bool(closers) and char == closers[-1] and expected in _CAN_CLOSE
            if closes:
                closers.pop()
                expected = "','"
                write(self._take(1))
            elif expected == repr(char):  # a colon or a comma
                expected = "a value" if char == ":" or closers[-1] == "]" else "a key"
                write(self._take(1))
            elif char == '"' and expected not in ("':'", "','"):
                yield from self.json_string(write)
                expected = "':'" if "key" in expected else "','"
            elif expected in ("a value", "a value or ']'"):
                if char in "{[":
                    closers.append("}" if char == "{" else "]")
                    if len(closers) > MAX_DEPTH:
                        raise Malformed(f"the arguments are nested more than {MAX_DEPTH} deep")
                    expected = "a key or '}'" if char == "{" else "a value or ']'"
                    write(self._take(1))
                else:
                    word = yield from self.run(_SCALAR_CHARACTERS)
                    if not _SCALAR.fullmatch(word):
                        yield from self.refuse(f"a JSON value expected, not {word!r}" if word else "a value expected")
                    write(word)
                    expected = "','"
            else:
                raise Malformed(f"{expected} expected, not {char!r}")
            if not closers and expected == "','":
                return

    def json_string(self, write: Write) -> Reading[None]:
        """Read a JSON string and write it; a backslash before what JSON does not escape stands for itself."""
        yield from self.expect('"')
        write('"')
        while True:
            found = _PLAIN.match(self._text, self._at)
            if found:
                write(self._take(found.end() - self._at).translate(_CONTROL))
            char = yield from self.peek()
            if char == "":
                raise CutOff
            if char == '"':
                write(self._take(1))
                return
            if char == "\\":
                while len(self._text) - self._at < 2 and not self._ended:
                    yield
                pair = self._take(2)
                if pair == "\\'":
                    pair = "'"
                write(pair if pair[1:] in '"\\/bfnrtu' else "\\" + pair.translate(_CONTROL))

    def _take(self, size: int) -> str:
        piece = self._text[self._at : self._at + size]
        self._at += size
        if self._is_recording:
            self._recorded.append(piece)
        return piece


_CAN_CLOSE = ("a key or '}'", "a value or ']'", "','")


def is_scalar(text: str) -> bool:
    """Return whether a text is a number, true, false or null in JSON."""
    return _SCALAR.fullmatch(text) is not None
