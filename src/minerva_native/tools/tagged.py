"""Calls that have their parameters one by one, between tags."""

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .calls import to_json
from .grammar import Grammar
from .json_types import ANY, TEXT, accepted_types, choices, type_of
from .parser import CallParser, OpenCall
from .reader import END, CutOff, Markers, Reading
from .schema import NAME, Tool
from .syntax import Syntax
from .values import bare_to_json


class Attributes(NamedTuple):
    """Names of attributes in tags: `<call tool="..."><argument key="..." type="string">`."""

    tool: str
    key: str
    type: str = ""
    """"" if the tags say nothing about types."""
    text: str = ""
    """The value of `type` for text; all others are JSON."""


_ATTRIBUTE = re.compile(r'([\w-]+)="([^"]*)"')


@dataclass(frozen=True, kw_only=True)
class TaggedCall(Syntax):
    """Parameters one by one between tags, with strings as they are, and all else as JSON.

    A closing tag counts only if what comes after it may come there, so that values may have such tags in them. One
    that models forget does no harm if what comes instead is clear.

    Attributes:
        open: opens the call; what follows up to `name_end` has the tool's name.
        name_end: "" if the name ends where the first parameter or the end of the call begins.
        key_open: opens a parameter; what follows up to `key_end` has its name.
        key_end: comes after the parameter's name.
        value_end: comes after the value.
        end: ends the call.
        after: what may come after the end of a call, apart from `wrapper`.
        wrapper: markers around the call, which models forget at times.
        attributes: how tags name things; None if the names are bare.
        pad: one white space on each side of a value which belongs to the tags.
        gap: white space between the tags, for writing.
        value_open: comes before the value, if `key_end` does not.
        numbered: what comes after the tool's name, with a number in place of its "#".
    """

    name_end: str
    key_open: str
    key_end: str
    value_end: str
    end: str
    after: tuple[str, ...] = (END,)
    wrapper: tuple[str, str] = ("", "")
    attributes: Attributes | None = None
    pad: str = ""
    gap: str = ""
    value_open: str = ""
    numbered: str = ""

    @property
    def opens(self) -> tuple[str, ...]:
        """The markers that open a call, the usual one first."""
        return (self.wrapper[0], self.open) if self.wrapper[0] else (self.open,)

    def read(self, parser: CallParser, marker: str) -> Reading[None]:
        """Read a call after its marker."""
        reader, call = parser.reader, parser.open()
        if self.wrapper[0] and marker == self.wrapper[0]:
            yield from reader.spaces()
            yield from reader.expect(self.open)
        tag = yield from self._name(parser, call)
        call.write("{")
        seen: list[str] = []
        tag = tag or (yield from self._tag_after(parser))
        while tag == self.key_open:
            tag = (yield from self._parameter(parser, call, seen)) or (yield from self._tag_after(parser))
        call.write("}")
        if self.wrapper[1]:
            yield from reader.spaces()
            yield from reader.expect(self.wrapper[1])
        call.finish()

    def _name(self, parser: CallParser, call: OpenCall) -> Reading[str]:
        """Read the name; return the end of the call if there are no parameters and no tag for it."""
        reader = parser.reader
        if self.attributes:
            head, _ = yield from reader.text_until(self.name_end)
            call.named(_attributes(head).get(self.attributes.tool, ""))
            return self.end if head.endswith("/") else ""
        yield from reader.spaces()
        name = yield from reader.run(NAME)
        yield from reader.spaces()
        if self.name_end:
            yield from reader.expect(self.name_end)
        elif (yield from reader.sees(self.key_open, self.end)) is None:
            yield from reader.refuse(f"{self.key_open!r} or {self.end!r} expected after {name!r}")
        call.named(name)
        return ""

    def _tag_after(self, parser: CallParser) -> Reading[str]:
        """Read the tag that opens a parameter, or ends the call."""
        yield from parser.reader.spaces()
        tag = yield from parser.reader.literal(self.key_open, self.end)
        if not tag:
            yield from parser.reader.refuse(f"{self.key_open!r} or {self.end!r} expected")
        return tag

    def _parameter(self, parser: CallParser, call: OpenCall, seen: list[str]) -> Reading[str]:
        """Read a parameter; return the tag after it if that was read too."""
        reader = parser.reader
        head, _ = yield from reader.text_until(self.key_end)
        found, key = _attributes(head), head.strip()
        if self.attributes:
            key = found.get(self.attributes.key, "")
        parameters = call.tool.parameters if call.tool else {}
        properties = parameters.get("properties", {})
        types = accepted_types(properties.get(key), parameters)
        if self.attributes and self.attributes.type in found:  # the tag says more than the schema
            types = TEXT if found[self.attributes.type] == self.attributes.text else ANY
        if self.value_open:
            yield from reader.spaces()
            yield from reader.expect(self.value_open)
        if self.pad:
            yield from reader.literal(self.pad)
        call.write(f"{', ' if seen else ''}{to_json(key)}: ")
        seen.append(key)
        markers = self._ends([each for each in properties if each not in seen])
        if types == TEXT:
            call.write('"')
            marker, _ = yield from reader.until(markers, lambda text: call.write(to_json(text)[1:-1]))
            call.write('"')
        else:
            parts: list[str] = []
            marker, _ = yield from reader.until(markers, parts.append)
            call.write(bare_to_json("".join(parts), types))
        if not marker:
            raise CutOff
        tag = marker.removeprefix(self.pad) if self.pad else marker
        return "" if tag == self.value_end else tag

    def _ends(self, keys: list[str]) -> Markers:
        """Return what ends a value: its tag, or the next one if it was forgotten."""
        ends: dict[str, tuple[str, ...]] = {self.value_end: (self.key_open, self.end)}
        if self.pad:
            ends[self.pad + self.value_end] = (self.key_open, self.end)
        if keys and not self.attributes:
            ends[self.pad + self.key_open] = tuple(key + self.key_end for key in keys)
        ends[self.pad + self.end] = (self.wrapper[1],) if self.wrapper[1] else self.after
        return Markers(ends)

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return a call as the model spells it, without `opens[0]` and `close`."""
        opened, closed = self._wrapped()
        head = f' {self.attributes.tool}="{_escape(name)}"' if self.attributes else name
        text = (opened + self.open).removeprefix(self.opens[0]) + head
        text += self.numbered.replace("#", "1") + self.name_end + self.gap
        for key, value in arguments.items():
            text += self._tag(key, isinstance(value, str), type_of(value))
            text += self.pad + (value if isinstance(value, str) else to_json(value)) + self.pad
            text += self.value_end + self.gap
        return text + self.end + closed

    def _wrapped(self) -> tuple[str, str]:
        opening, closing = self.wrapper
        return (opening + self.gap, self.gap + closing) if opening else ("", "")

    def _tag(self, key: str, is_text: bool, kind: str) -> str:
        if not self.attributes:
            return self.key_open + key + self.key_end + (self.gap + self.value_open if self.value_open else "")
        if is_text:
            kind = self.attributes.text
        elif self.attributes.text == "true":  # it says whether the value is a string, and not what else it is
            kind = "false"
        elif kind == "integer":
            kind = "number"
        kind = f' {self.attributes.type}="{kind}"' if self.attributes.type else ""
        return f'{self.key_open} {self.attributes.key}="{_escape(key)}"{kind}{self.key_end}'

    def rule(self, grammar: Grammar, tool: Tool) -> str:
        """Return what a grammar accepts between `opens[0]` and `close`."""
        opened, closed = self._wrapped()
        head = f' {self.attributes.tool}="{_escape(tool.name)}"' if self.attributes else tool.name
        parts = [grammar.literal((opened + self.open).removeprefix(self.opens[0]) + head)]
        if self.numbered:
            before, after = self.numbered.split("#")
            parts += [grammar.literal(before), grammar.pattern("[0-9]{1,4}"), grammar.literal(after)]
        parts.append(grammar.literal(self.name_end + self.gap))
        required = tool.parameters.get("required", [])
        for key, schema in tool.parameters.get("properties", {}).items():
            each = self._value_rule(grammar, key, schema, tool.parameters)
            parts.append(f"({each})" + ("" if key in required else "?"))
        parts.append(grammar.literal(self.end + closed))
        return " ".join(parts)

    def _value_rule(self, grammar: Grammar, key: str, schema: object, root: Mapping[str, Any]) -> str:
        types = accepted_types(schema, root)
        values = choices(schema)
        tail = self.pad + self.value_end
        options = []
        for kind in _kinds(types):
            head = grammar.literal(self._tag(key, kind == "string", kind) + self.pad)
            if values is not None:
                some = [value if isinstance(value, str) else to_json(value) for value in values if _is(value, kind)]
                options += [f"{head} {grammar.literal(value + tail + self.gap)}" for value in some]
            elif kind == "string":
                gap = f" {grammar.literal(self.gap)}" if self.gap else ""
                options.append(f"{head} {grammar.until(tail)}{gap}")
            else:
                narrowed = {"allOf": [schema, {"type": kind}]} if len(_kinds(types)) > 1 else schema
                options.append(f"{head} {grammar.json(narrowed, root)} {grammar.literal(tail + self.gap)}")
        return grammar.one_of(options)


def _kinds(types: frozenset[str]) -> list[str]:
    """Return types without the integer that is a number, too."""
    return sorted(types - {"integer"} if "number" in types else types)


def _is(value: object, kind: str) -> bool:
    return type_of(value) == kind or (kind == "number" and type_of(value) == "integer")


def _attributes(head: str) -> dict[str, str]:
    return {name: html.unescape(value) for name, value in _ATTRIBUTE.findall(head)}


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;")
