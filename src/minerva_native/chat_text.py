"""A string that knows which of its characters a chat template wrote."""

from collections.abc import Iterable, Iterator
from typing import Any, Self, SupportsIndex

from markupsafe import Markup, escape

from .errors import TemplateError

MAX_CHARACTERS = 1 << 24
"""How long a rendered text, and everything a template makes on the way, may be."""

ITEM_WEIGHT = 64
"""For how many characters an item of a list counts."""


class Text(str):
    """A string that knows, for each character, whether the template wrote it (1) or not (0).

    A character counts as written only if it is one of a literal of the template and every operation that carried it
    here is defined below. All other operations are those of `str`: their results are plain strings, of which nothing
    is written. So an operation that is missing here costs the template a control token, but never forges one.
    """

    __slots__ = ("_written",)
    _written: bytes

    def __new__(cls, value: object = "", mask: bytes | None = None) -> Self:
        """Make a text; without a mask, what is written of it is what is written of the value."""
        self = super().__new__(cls, value)
        if mask is None:
            mask = written(value) if isinstance(value, str) else bytes(len(self))
        self._written = mask if len(mask) == len(self) else bytes(len(self))
        return self

    @classmethod
    def literal(cls, value: str) -> "Text":
        """Return a text that the template wrote."""
        return cls(value, b"\1" * len(value))

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Markup):
            return EscapedText(Text().join((self._escaped(), str(other))))
        return Text().join((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> "Text":
        return Text().join((other, self)) if isinstance(other, str) else NotImplemented

    def _escaped(self) -> str:
        text: str = self
        for character in "&<>\"'":
            text = text.replace(character, plain(escape(character)))
        return text

    def __mul__(self, count: SupportsIndex) -> "Text":
        check_length(len(self) * count.__index__())
        return Text(super().__mul__(count), self._written * count.__index__())

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> "Text":
        part = super().__getitem__(key)
        mask = self._written[key]
        return Text(part, mask if isinstance(mask, bytes) else bytes((mask,)))

    def __iter__(self) -> Iterator[str]:
        for index in range(len(self)):
            check_length(index * ITEM_WEIGHT)
            yield self[index]

    def join(self, parts: Iterable[str]) -> "Text":
        """As `str.join`."""
        pieces, length = [], 0
        for piece in parts:
            length += len(piece) + len(self)
            check_length(length)
            pieces.append(piece)
        return Text(super().join(pieces), self._written.join(map(written, pieces)))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        """As `str.replace`."""
        masks = self._written + written(new)
        is_mixed = 0 in masks and 1 in masks
        if is_mixed and old:
            return Text(new).join(self.split(old, count))
        check_length(len(self) + super().count(old) * len(new))
        result = super().replace(old, new, count)
        return result if is_mixed else Text(result, masks[:1] * len(result))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As `str.split`."""
        return self._pieces(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As `str.rsplit`."""
        return self._pieces(super().rsplit(sep, maxsplit), sep)

    def _pieces(self, pieces: list[str], sep: str | None) -> list[str]:
        """Return pieces of this text, in order, with what is written of them."""
        check_length(len(pieces) * ITEM_WEIGHT)
        found: list[str] = []
        position = 0
        for piece in pieces:
            if sep is None:  # between pieces is only white space, and none begins with it but one at the start
                position = self.find(piece, position)
            found.append(self[position : position + len(piece)])
            position += len(piece) + len(sep or "")
        return found

    def splitlines(self, keepends: bool = False) -> list[str]:
        """As `str.splitlines`."""
        lines = super().splitlines(keepends)
        check_length(len(lines) * ITEM_WEIGHT)
        found: list[str] = []
        position = 0
        for line, whole in zip(lines, super().splitlines(True), strict=True):
            found.append(self[position : position + len(line)])
            position += len(whole)
        return found

    def partition(self, sep: str) -> tuple[str, str, str]:
        """As `str.partition`."""
        return self._around(super().find(sep), super().partition(sep))

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        """As `str.rpartition`."""
        return self._around(super().rfind(sep), super().rpartition(sep))

    def _around(self, position: int, parts: tuple[str, str, str]) -> tuple[str, str, str]:
        if position < 0:
            return tuple(self if part else Text() for part in parts)  # type: ignore[return-value]
        end = position + len(parts[1])
        return self[:position], self[position:end], self[end:]

    def strip(self, chars: str | None = None) -> "Text":
        """As `str.strip`."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> "Text":
        """As `str.lstrip`."""
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None) -> "Text":
        """As `str.rstrip`."""
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str) -> "Text":
        """As `str.removeprefix`."""
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> "Text":
        """As `str.removesuffix`."""
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    # A change of case never shortens a text, so one of equal length changed each character in its place.

    def upper(self) -> "Text":
        """As `str.upper`."""
        return Text(super().upper(), self._written)

    def lower(self) -> "Text":
        """As `str.lower`."""
        return Text(super().lower(), self._written)

    def capitalize(self) -> "Text":
        """As `str.capitalize`."""
        return Text(super().capitalize(), self._written)

    def title(self) -> "Text":
        """As `str.title`."""
        return Text(super().title(), self._written)


class EscapedText(Markup):
    """A text to which one that is safe for HTML was added: jinja then escapes the first, though a prompt is no HTML."""

    __slots__ = ("_text",)
    _text: Text

    def __new__(cls, text: object = "", *args: Any) -> Self:
        """Make one; what is written of it is what is written of the text."""
        self = super().__new__(cls, text, *args)
        self._text = Text(text) if isinstance(text, Text) else Text(str.__str__(self))
        return self

    def __str__(self) -> str:
        return self._text


def written(text: str) -> bytes:
    """Return 1 for each character that the template wrote, and 0 for each other."""
    return text._written if isinstance(text, Text) else bytes(len(text))


def plain(text: str) -> str:
    """Return a text as a `str`, which knows nothing."""
    return str.__str__(text)


def check_length(length: int) -> None:
    """Raise `TemplateError` if a text would be too long."""
    if length > MAX_CHARACTERS:
        items = MAX_CHARACTERS // ITEM_WEIGHT
        raise TemplateError(f"it makes more than {MAX_CHARACTERS:,} characters, or {items:,} items")
