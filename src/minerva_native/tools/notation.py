"""Calls whose arguments are neither JSON nor between tags: Gemma's objects, and Python."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .calls import to_json
from .grammar import Grammar
from .parser import CallParser, NotACall
from .reader import CutOff, Malformed, Markers, Reader, Reading, Write, is_scalar
from .schema import Tool
from .syntax import NAME, Syntax, choices
from .values import accepted_types, resolved

_BARE = re.compile(r"[^,:=\[\]{}()<\"']+")
_PLAIN = re.compile(r"[^'\"\\]+")
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_MAX_DEPTH = 100


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
        stack = [(self.end, "}", self.pair)]  # what closes it, how JSON does, what comes after a key
        expected = "first key"
        write("{")
        while stack:
            yield from reader.spaces()
            char = yield from reader.peek()
            if char == "":
                raise CutOff
            closer, json_closer, pair = stack[-1]
            if char == closer and expected not in ("pair", "value"):
                yield from reader.literal(char)
                write(json_closer)
                stack.pop()
                expected = "comma"
            elif expected == "comma":
                yield from reader.expect(",")
                expected = "key" if pair else "item"
                write(", ")
            elif expected == "pair":
                yield from reader.expect(pair)
                write(": ")
                expected = "value"
            elif expected in ("first key", "key"):
                yield from self._key(reader, write, char)
                expected = "pair"
            elif char in _BRACKETS and not (char == "(" and self.quote):
                yield from reader.literal(char)
                stack.append(_BRACKETS[char])
                write("{" if char == "{" else "[")
                expected = "first key" if char == "{" else "first item"
                if len(stack) > _MAX_DEPTH:
                    raise Malformed(f"the arguments are nested more than {_MAX_DEPTH} deep")
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
        literal = _PYTHON.get(word, word)
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
                parts.append((yield from _one(reader)))
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

    def rule(self, grammar: Grammar, schema: object, root: Mapping[str, Any], depth: int = 0) -> str:
        """Return what a grammar accepts for a value that follows a schema; very deep down it is any value."""
        if depth > _MAX_RULES:
            return self._any(grammar)
        schema = resolved(schema, root)
        if (values := choices(schema)) is not None:
            return grammar.one_of([grammar.literal(self.write(value)) for value in values])
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and schema[key]:
                return grammar.one_of([self.rule(grammar, each, root, depth + 1) for each in schema[key]])
        types = accepted_types(schema, root)
        if types == accepted_types({}, {}):
            return self._any(grammar)
        options = [self._plain(grammar, kind) for kind in sorted(types - {"array", "object"})]
        if "array" in types:
            item = self.rule(grammar, schema.get("items", {}), root, depth + 1)
            options.append(f'"[" ({item} ({grammar.literal(self.joint)} {item})*)? "]"')
        if "object" in types:
            pair = ":" if self.quote else ": "
            options.append(f'"{{" {self.members_rule(grammar, schema, root, pair, depth)} "}}"')
        return grammar.one_of(options)

    def members_rule(
        self, grammar: Grammar, schema: Mapping[str, Any], root: Mapping[str, Any], pair: str, depth: int = 0
    ) -> str:
        """Return what a grammar accepts for the members of an object, in the order of the schema."""
        is_bare = bool(self.quote) or pair == "="
        required, joint = schema.get("required", []), grammar.literal(self.joint)
        if not schema.get("properties") and depth:
            member = f"{self._key_rule(grammar)} {grammar.literal(pair)} {self._any(grammar)}"
            return f"({member} ({joint} {member})*)?"
        items = []
        for name, inner in schema.get("properties", {}).items():
            head = grammar.literal((name if is_bare else repr(name)) + pair)
            items.append((f"{head} {self.rule(grammar, inner, root, depth + 1)}", name in required))
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

    def _key_rule(self, grammar: Grammar) -> str:
        return grammar.pattern(r"[^,:=\[\]{}()<\"'\s]+") if self.quote else grammar.pattern(_PATTERNS["string"])

    def _any(self, grammar: Grammar) -> str:
        name = grammar.reserve("any_value")
        if name is None:
            return "any_value"
        options = [self._plain(grammar, kind) for kind in ("string", "number", "boolean", "null")]
        joint, pair = grammar.literal(self.joint), grammar.literal(":" if self.quote else ": ")
        options.append(f'"[" ({name} ({joint} {name})*)? "]"')
        member = f"{self._key_rule(grammar)} {pair} {name}"
        options.append(f'"{{" ({member} ({joint} {member})*)? "}}"')
        return grammar.define(name, " | ".join(options))


_LITERALS = {"boolean": ["True", "False"], "null": ["None"]}
_PATTERNS = {
    "string": r"""("([^"\\\n]|\\[^\n])*"|'([^'\\\n]|\\[^\n])*')""",
    "integer": r"-?(0|[1-9][0-9]*)",
    "number": r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?",
}
_MAX_RULES = 12


@dataclass(frozen=True, kw_only=True)
class NotatedCall(Syntax):
    """A name, and its arguments in brackets.

    Attributes:
        before: what is between the marker and the name.
        bracket: opens the arguments.
        notation: how values are written.
        is_list: whether calls are in a list. It is one value: no call in it counts until it is closed.
    """

    before: str = ""
    bracket: str
    notation: Notation
    is_list: bool = False

    def read(self, parser: CallParser, marker: str) -> Reading[None]:
        """Read a call after its marker."""
        reader = parser.reader
        yield from reader.spaces()
        if self.is_list:
            yield from reader.expect("[")
        while True:
            yield from reader.spaces()
            if self.before:
                yield from reader.expect(self.before)
            name = yield from reader.run(NAME)
            call = parser.open()
            if (yield from reader.literal(self.bracket)) != self.bracket:
                yield from self._refuse(parser, marker, f"{self.bracket!r} expected after {name!r}")
            if not marker and parser.tools is not None and name not in parser.tools and not parser.staged:
                raise NotACall
            call.named(name)
            yield from self.notation.read(reader, call.write)
            call.finish()
            if not self.is_list:
                break
            yield from reader.spaces()
            mark = yield from reader.literal(",", "]")
            if not mark:
                yield from reader.refuse("',' or ']' expected")
            if mark == "]":
                break
        if self.close:
            yield from reader.spaces()
            yield from reader.expect(self.close)

    def _refuse(self, parser: CallParser, marker: str, message: str) -> Reading[None]:
        if not marker and not parser.staged:
            raise NotACall
        yield from parser.reader.refuse(message)

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return a call as the model spells it."""
        members = self.notation.members(arguments, self.notation.pair, is_call=True)
        return f"{self.open}{self.before}{name}{self.bracket}{members}{self.notation.end}{self.close}"

    def join(self, calls: list[str], joint: str) -> str:
        """Return several calls, each as `write` returned it."""
        return f"[{', '.join(calls)}]" if self.is_list else joint.join(calls)

    def rule(self, grammar: Grammar, tool: Tool) -> str:
        """Return what a grammar accepts after the marker."""
        members = self.notation.members_rule(grammar, tool.parameters, tool.parameters, self.notation.pair)
        head = grammar.literal(f"{self.before}{tool.name}{self.bracket}")
        return f"{head} {members} {grammar.literal(self.notation.end + self.close)}"


_BRACKETS = {"{": ("}", "}", ":"), "[": ("]", "]", ""), "(": (")", "]", "")}


def _one(reader: Reader) -> Reading[str]:
    char = yield from reader.peek()
    if not char:
        raise CutOff
    return (yield from reader.literal(char))
