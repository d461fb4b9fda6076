"""Grammars in llguidance's dialect of Lark, put together from rules."""

import json
import re
from collections.abc import Mapping
from typing import Any

_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps writes

_ANY = r"/(?s:.*)/"


class Grammar:
    """A grammar that is being written. Its methods return expressions for the right side of a rule.

    Args:
        tokens: ids of the markers that are control tokens of the vocabulary: no text matches those, only the id does.
    """

    def __init__(self, tokens: Mapping[str, int] | None = None):
        self._tokens = dict(tokens or {})
        self._rules: dict[tuple[str, str], str] = {}  # the name, by what comes after it
        self._reserved: set[str] = set()
        ordered = sorted(self._tokens, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, ordered))})") if ordered else None

    def text(self, start: str) -> str:
        """Return the grammar whose start is an expression."""
        return "\n".join(
            [f"start: {start}", *(f"{name}{options}: {body}" for (body, options), name in self._rules.items()), ""]
        )

    def literal(self, text: str) -> str:
        """Match a text."""
        parts = self._split.split(text) if self._split else [text]
        return " ".join(
            f"<[{self._tokens[part]}]>" if part in self._tokens else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        )

    def until(self, marker: str) -> str:
        """Match any text and the marker, where it first comes."""
        parts = self._split.split(marker) if self._split else [marker]
        first, rest = next(part for part in parts if part), parts
        while not rest[0]:
            rest = rest[1:]
        ending = self.literal("".join(rest[1:]))
        if first in self._tokens:
            return f"{self._rule(_ANY)} <[{self._tokens[first]}]> {ending}".strip()
        return f"{self._rule(_ANY, f'[suffix={json.dumps(first, ensure_ascii=False)}]')} {ending}".strip()

    def anything(self) -> str:
        """Match any text up to the end."""
        return self._rule(_ANY)

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

    def reserve(self, name: str) -> str | None:
        """Return the name of a rule that is to be defined; None if it was reserved before."""
        if name in self._reserved:
            return None
        self._reserved.add(name)
        return name

    def define(self, name: str, body: str) -> str:
        """Define a rule that was reserved, and return its name."""
        self._rules[body, ""] = name
        return name

    def _rule(self, body: str, options: str = "") -> str:
        return self._rules.setdefault((body, options), f"r{len(self._rules)}")
