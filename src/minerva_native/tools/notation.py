"""Values that are not written as JSON: Gemma's way, and Python."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .calls import to_json
from .grammar import Grammar
from .json_types import ANY, accepted_types, choices, resolved
from .reader import MAX_DEPTH, CutOff, Malformed, Markers, Reader, Reading, Write, is_scalar

_BARE = re.compile(r"[^,:=\[\]{}()<\"']+")
_PLAIN = re.compile(r"[^'\"\\]+")
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_ESCAPES = "\n'\"\\abfnrtv0123xuUN"  # all others stand for themselves, and the backslash too


@dataclass(frozen=True)
class Notation:
    """A way to write values.

    Attributes:
        quote: what is around strings, which have no escapes; "" for Python's strings.
        pair: what is between a name and a value in the arguments of a call.
        end: what ends the arguments.
    """

    quote: str
    pair: str
    end: str

    def read(self, reader: Reader, write: Write) -> Reading[None]:
        """Read arguments whose opening bracket was read, and write them as a JSON object."""
        write("{")
        yield from self._read(reader, write, [(self.end, "}", self.pair)], "first key")

    def read_value(self, reader: Reader, write: Write) -> Reading[None]:
        """Read a value and write it as JSON."""
        yield from self._read(reader, write, [], "value")

    def _read(self, reader: Reader, write: Write, stack: list[tuple[str, str, str]], expected: str) -> Reading[None]:
        """Read up to the end of all that is open: what closes it, how JSON does, and what comes after a key."""
        while stack or expected != "comma":
            yield from reader.spaces()
            char = yield from reader.peek()
            if char == "":
                raise CutOff
            closer, json_closer, pair = stack[-1] if stack else ("", "", "")
            if char == closer and expected not in ("pair", "value"):
                yield from reader.literal(char)
                write(json_closer)
                stack.pop()
                expected = "comma"
            elif expected == "comma":
                yield from reader.expect(",")
                expected = "key" if pair else "item"  # the comma is written if there is one
            elif expected in ("key", "item"):
                write(", ")
                expected = "first key" if pair else "first item"
            elif expected == "pair":
                yield from reader.expect(pair)
                write(": ")
                expected = "value"
            elif expected == "first key":
                yield from self._key(reader, write, char)
                expected = "pair"
            elif char in _BRACKETS and not (char == "(" and self.quote):
                yield from reader.literal(char)
                stack.append(_BRACKETS[char])
                write("{" if char == "{" else "[")
                expected = "first key" if char == "{" else "first item"
                if len(stack) > MAX_DEPTH:
                    raise Malformed(f"the arguments are nested more than {MAX_DEPTH} deep")
            else:
                yield from self._scalar(reader, write, char)
                expected = "comma"

    def _key(self, reader: Reader, write: Write, char: str) -> Reading[None]:
        if char in "'\"" or (self.quote and char == self.quote[0]):
            yield from self._string(reader, write, char)
            return
        key = (yield from reader.run(_BARE)).strip()
        if not key:
            yield from reader.refuse("a name expected")
        write(to_json(key))

    def _scalar(self, reader: Reader, write: Write, char: str) -> Reading[None]:
        if char in "'\"" or (self.quote and char == self.quote[0]):
            yield from self._string(reader, write, char)
            return
        word = (yield from reader.run(_BARE)).strip()
        literal = PYTHON_WORDS.get(word, word)
        if is_scalar(literal):
            write(literal)
        elif word and self.quote:
            write(to_json(word))
        else:
            yield from reader.refuse(f"a value expected, not {word!r}" if word else "a value expected")

    def _string(self, reader: Reader, write: Write, char: str) -> Reading[None]:
        if self.quote and char == self.quote[0]:
            yield from reader.expect(self.quote)
            write('"')
            marker, _ = yield from reader.until(Markers({self.quote: ()}), lambda text: write(to_json(text)[1:-1]))
            if not marker:
                raise CutOff
            write('"')
            return
        quote = yield from reader.literal("'", '"')
        parts = [quote]
        while True:
            parts.append((yield from reader.run(_PLAIN)))
            char = yield from reader.literal("'", '"', "\\")
            if not char:
                raise CutOff
            parts.append(char)
            if char == quote:
                break
            if char == "\\":
                escaped = yield from _one(reader)
                parts.append(escaped if escaped in _ESCAPES else "\\" + escaped)
        text = "".join(parts).replace("\r", "\\r").replace("\n", "\\n").replace("\0", "\\0")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise Malformed(f"{text[:40]} is no string of Python") from None
        write(to_json(value))

    def write(self, value: object) -> str:
        """Return a value as it is spelled."""
        if isinstance(value, str):
            return f"{self.quote}{value}{self.quote}" if self.quote else repr(value)
        if isinstance(value, Mapping):
            return "{" + self.members(value, ":" if self.quote else ": ") + "}"
        if isinstance(value, list):
            return "[" + self.joint.join(map(self.write, value)) + "]"
        return to_json(value) if self.quote else repr(value)

    def members(self, values: Mapping[str, Any], pair: str, is_call: bool = False) -> str:
        """Return names with their values."""
        is_bare = is_call or bool(self.quote)
        return self.joint.join(
            f"{name if is_bare else repr(name)}{pair}{self.write(value)}" for name, value in values.items()
        )

    @property
    def joint(self) -> str:
        """What is between two items."""
        return "," if self.quote else ", "

    def rule(self, grammar: Grammar, schema: object, root: Mapping[str, Any]) -> str:
        """Return what a grammar accepts for a value that follows a schema."""
        if isinstance(schema, Mapping) and isinstance(reference := schema.get("$ref"), str):
            name = f"of_{reference.encode().hex()}"
            if grammar.reserve(name):
                grammar.define(name, self.rule(grammar, resolved(schema, root), root))
            return name
        if not isinstance(schema, Mapping):
            return self._any(grammar)
        if (values := choices(schema)) is not None:
            return grammar.one_of([grammar.literal(self.write(value)) for value in values])
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and schema[key]:
                return grammar.one_of([self.rule(grammar, each, root) for each in schema[key]])
        types = accepted_types(schema, root)
        if types == ANY:
            return self._any(grammar)
        options = [self._plain(grammar, kind) for kind in sorted(types - {"array", "object"})]
        if "array" in types:
            item = self.rule(grammar, schema.get("items", {}), root)
            options.append(f'"[" ({item} ({grammar.literal(self.joint)} {item})*)? "]"')
        if "object" in types:
            pair = ":" if self.quote else ": "
            members = self.members_rule(grammar, schema, root, pair) if schema.get("properties") else None
            options.append(f'"{{" {members or self._any_members(grammar)} "}}"')
        return grammar.one_of(options)

    def members_rule(self, grammar: Grammar, schema: Mapping[str, Any], root: Mapping[str, Any], pair: str) -> str:
        """Return what a grammar accepts for the members of an object, in the order of the schema."""
        is_bare = bool(self.quote) or pair == "="
        required, joint = schema.get("required", []), grammar.literal(self.joint)
        items = []
        for name, inner in schema.get("properties", {}).items():
            head = grammar.literal((name if is_bare else repr(name)) + pair)
            items.append((f"{head} {self.rule(grammar, inner, root)}", name in required))
        rests = [f"{joint} {item}" if must else f"({joint} {item})?" for item, must in items]
        options = []
        for position, (item, must) in enumerate(items):
            options.append(" ".join([item, *rests[position + 1 :]]))
            if must:
                return grammar.one_of(options)
        return f"({grammar.one_of(options)})?" if options else ""

    def _plain(self, grammar: Grammar, kind: str) -> str:
        if kind == "string" and self.quote:
            return f"{grammar.literal(self.quote)} {grammar.until(self.quote)}"
        if kind in ("boolean", "null"):
            words = (["true", "false"] if kind == "boolean" else ["null"]) if self.quote else _LITERALS[kind]
            return grammar.one_of([grammar.literal(word) for word in words])
        return grammar.pattern(_PATTERNS[kind])

    def _any(self, grammar: Grammar) -> str:
        name = "any_value"
        if grammar.reserve(name):
            kinds = ("string", "number", "boolean", "null")
            items = f'"[" ({name} ({grammar.literal(self.joint)} {name})*)? "]"'
            members = f'"{{" {self._any_members(grammar)} "}}"'
            grammar.define(name, " | ".join([*(self._plain(grammar, kind) for kind in kinds), items, members]))
        return name

    def _any_members(self, grammar: Grammar) -> str:
        key = grammar.pattern(r"[^,:=\[\]{}()<\"'\s]+" if self.quote else _PATTERNS["string"])
        member = f"{key} {grammar.literal(':' if self.quote else ': ')} {self._any(grammar)}"
        return f"({member} ({grammar.literal(self.joint)} {member})*)?"


_LITERALS = {"boolean": ["True", "False"], "null": ["None"]}
_PATTERNS = {
    "string": r"""("([^"\\\n]|\\[^\n])*"|'([^'\\\n]|\\[^\n])*')""",
    "integer": r"-?(0|[1-9][0-9]*)",
    "number": r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?",
}


_BRACKETS = {"{": ("}", "}", ":"), "[": ("]", "]", ""), "(": (")", "]", "")}


def _one(reader: Reader) -> Reading[str]:
    char = yield from reader.peek()
    if not char:
        raise CutOff
    return (yield from reader.literal(char))


GEMMA = Notation(quote='<|"|>', pair=":", end="}")
PYTHON = Notation(quote="", pair="=", end=")")
