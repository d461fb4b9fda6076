"""Grammars in llguidance's dialect of Lark, put together from rules."""

import json
import re
from collections.abc import Mapping
from typing import Any

_ANY = r"/(?s:.*)/"

_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps writes


class Grammar:
    """A grammar that is being written. Its methods return expressions for the right side of a rule.

    Args:
        tokens: ids of the markers that are control tokens of the vocabulary: no text matches those, only the id does.
    """

    def __init__(self, tokens: Mapping[str, int] | None = None):
        self._tokens = dict(tokens or {})
        self._rules: dict[tuple[str, str], str] = {}  # the name, by what comes after it
        self._reserved: set[str] = set()
        self._defined: dict[str, str] = {}
        ordered = sorted(self._tokens, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, ordered))})") if ordered else None

    def text(self, start: str) -> str:
        """Return the grammar whose start is an expression."""
        return "\n".join(
            [
                f"start: {start}",
                *(f"{name}{options}: {body}" for (body, options), name in self._rules.items()),
                *map(": ".join, self._defined.items()),
                "",
            ]
        )

    def literal(self, text: str) -> str:
        """Match a text."""
        parts = self._split.split(text) if self._split else [text]
        return " ".join(
            f"<[{self._tokens[part]}]>" if part in self._tokens else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        )

    def until(self, marker: str, *silent: str) -> str:
        """Match any text and the marker, where it first comes.

        Before a marker that begins with a control token there may be other markers.
        """
        first, *rest = [part for part in (self._split.split(marker) if self._split else [marker]) if part]
        if first in self._tokens:
            return f"{self.anything(*silent)} {self.literal(marker)}"
        if rest:  # a control token ends the text, and not the characters before it
            return f"{self._rule(f'/(?s:.*){_escaped(first)}/')} {self.literal(''.join(rest))}"
        return self._rule(_ANY, f"[suffix={json.dumps(first, ensure_ascii=False)}]")

    def anything(self, *silent: str) -> str:
        """Match any text, in which there may be some markers."""
        own, text = self._tokens_in(silent), self._rule(_ANY)
        return f"{text} ({self.one_of(own)} {text})*" if own else text

    def pattern(self, regex: str) -> str:
        """Match a regular expression."""
        return f"/{regex}/"

    def json(self, schema: object, root: Mapping[str, Any] | None = None) -> str:
        """Match a JSON value that follows a schema, whose references lead into `root`."""
        if root is not None and isinstance(schema, Mapping):
            schema = {key: root[key] for key in ("$defs", "definitions") if key in root} | dict(schema)
        if isinstance(schema, Mapping):
            schema = dict(schema) | {"x-guidance": _SPACED}
        return self._rule(f"%json {json.dumps(schema, ensure_ascii=False)}")

    def one_of(self, options: list[str]) -> str:
        """Match one of some expressions."""
        return self._rule(" | ".join(options)) if len(options) > 1 else options[0]

    def reserve(self, name: str) -> bool:
        """Return whether a rule of this name is to be defined now: it may refer to itself."""
        is_new = name not in self._reserved
        self._reserved.add(name)
        return is_new

    def define(self, name: str, body: str) -> None:
        """Define a rule."""
        self._defined[name] = body

    def _tokens_in(self, markers: tuple[str, ...]) -> list[str]:
        """Return those of some markers that are more than text, as expressions."""
        return [self.literal(each) for each in markers if self._split and self._split.search(each)]

    def _rule(self, body: str, options: str = "") -> str:
        return self._rules.setdefault((body, options), f"r{len(self._rules)}")


def _escaped(text: str) -> str:
    return re.escape(text).replace("\\\n", "\\n").replace("/", "\\/")
