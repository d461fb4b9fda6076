"""How a call is spelled: what all formats consist of.

A syntax reads a call whose opening marker was read, spells one, and says what a grammar may let through.
"""

import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .calls import to_json
from .grammar import Grammar
from .parser import CallParser, NotACall, OpenCall
from .reader import END, CutOff, Malformed, Markers, Reading
from .schema import Tool
from .values import accepted_types, bare_to_json

NAME = re.compile(r"[^\s<>\[\]{}()\"'=｜|,;]+")
_CALL_ID = re.compile(r"[^\s<\[{]+")


@dataclass(frozen=True, kw_only=True)
class Syntax:
    """How a call is spelled.

    Attributes:
        open: the marker that opens it, "" if none does.
        close: what ends it, "" if nothing does.
        first: characters one of which a call begins with, after the marker; "" for any.
    """

    open: str = ""
    close: str = ""
    first: str = ""

    @property
    def opens(self) -> tuple[str, ...]:
        """The markers that open a call, the usual one first."""
        return (self.open,)

    def read(self, parser: CallParser, marker: str) -> Reading[None]:
        """Read a call after its marker."""
        raise NotImplementedError

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return a call as the model spells it."""
        raise NotImplementedError

    def rule(self, grammar: Grammar, tool: Tool) -> str:
        """Return what a grammar accepts after the marker."""
        raise NotImplementedError

    def join(self, calls: list[str], joint: str) -> str:
        """Return several calls, each as `write` returned it."""
        return joint.join(calls)


@dataclass(frozen=True, kw_only=True)
class JsonCall(Syntax):
    """{"name": ..., "arguments": {...}}.

    Attributes:
        keys: the names that the arguments go by, the usual one first.
        pad: white space between the JSON and the markers.
        is_list: whether the JSON is a list of such objects. It is one value: no call in it counts until it is closed.
    """

    keys: tuple[str, ...] = ("arguments", "parameters")
    pad: str = ""
    is_list: bool = False

    def read(self, parser: CallParser, marker: str) -> Reading[None]:
        """Read a call after its marker."""
        reader = parser.reader
        yield from reader.spaces()
        if self.is_list and (yield from reader.literal("[")):
            while True:
                yield from self._object(parser, marker)
                yield from reader.spaces()
                mark = yield from reader.literal(",", "]")
                if not mark:
                    yield from reader.refuse("',' or ']' expected")
                if mark == "]":
                    break
                yield from reader.spaces()
        else:
            yield from self._object(parser, marker)
        if self.close:
            yield from reader.spaces()
            yield from reader.expect(self.close)

    def _object(self, parser: CallParser, marker: str) -> Reading[None]:
        """Read one object; without a marker before it, it is no call unless its keys and its name say so."""
        reader, call = parser.reader, parser.open()
        has_arguments = False
        try:
            yield from reader.expect("{")
            yield from reader.spaces()
            end = yield from reader.literal("}")
            while not end:
                key = yield from _string(parser)
                yield from reader.spaces()
                yield from reader.expect(":")
                yield from reader.spaces()
                if key == "name":
                    call.named((yield from self._name(parser)))
                elif key in self.keys and not has_arguments:
                    has_arguments = True
                    yield from self._arguments(parser, call)
                elif key in ("type", "id", "function") or marker:
                    yield from reader.json(_ignore)
                else:
                    raise NotACall(key)
                yield from reader.spaces()
                end = yield from reader.literal("}", ",")
                if not end:
                    yield from reader.refuse("',' or '}' expected")
                if end == ",":
                    end = ""
                    yield from reader.spaces()
        except (Malformed, CutOff) as error:
            if not marker and not call.name:
                raise NotACall(str(error)) from None
            raise
        if not call.name or (not marker and not has_arguments):
            raise Malformed("a name is missing") if marker else NotACall
        if not has_arguments:
            call.write("{}")
        call.finish()

    def _name(self, parser: CallParser) -> Reading[str]:
        char = yield from parser.reader.peek()
        if char and char != '"':
            raise Malformed("the name is no string")
        return (yield from _string(parser))

    def _arguments(self, parser: CallParser, call: OpenCall) -> Reading[None]:
        """Read the arguments: an object, or a string that has one in it."""
        if (yield from parser.reader.peek()) == '"':
            call.write((yield from _string(parser)) or "{}")
        else:
            yield from parser.reader.json(call.write)

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return a call as the model spells it."""
        body = to_json({"name": name, self.keys[0]: dict(arguments)})
        return f"{self.open}{self.pad}{body}{self.pad}{self.close}"

    def join(self, calls: list[str], joint: str) -> str:
        """Return several calls, each as `write` returned it."""
        if not self.is_list:
            return joint.join(calls)
        return f"{self.open}[{', '.join(call.removeprefix(self.open) for call in calls)}]"

    def rule(self, grammar: Grammar, tool: Tool) -> str:
        """Return what a grammar accepts after the marker."""
        head = f'{self.pad}{{"name": {to_json(tool.name)}, "{self.keys[0]}": '
        tail = f"}}{self.pad}{self.close}"
        return f"{grammar.literal(head)} {grammar.json(tool.parameters)} {grammar.literal(tail)}"


@dataclass(frozen=True, kw_only=True)
class NamedCall(Syntax):
    """The name, then the arguments as JSON.

    Attributes:
        before: what is between the marker and the name.
        after: what is between the name and the arguments.
        fence: what is between the arguments and `close`.
        id_mark: what is between the name and an id, which may come before `after`.
        is_id: whether the name is inside of an id, as in "functions.get_weather:0".
    """

    before: str = ""
    after: str = ""
    fence: str = ""
    id_mark: str = ""
    is_id: bool = False

    def read(self, parser: CallParser, marker: str) -> Reading[None]:
        """Read a call after its marker."""
        reader, call, call_id = parser.reader, parser.open(), ""
        yield from reader.spaces()
        if self.before:
            yield from reader.expect(self.before)
        name = yield from reader.run(NAME)
        if not self.after[:1].isspace():
            yield from reader.spaces()
        if self.is_id:
            call_id, name = name, name.removeprefix("functions.").rpartition(":")[0] or name
        if self.id_mark and (yield from reader.literal(self.id_mark)):
            call_id = yield from reader.run(_CALL_ID)
        yield from reader.expect(self.after)
        call.named(name, call_id)
        yield from reader.json(call.write)
        if self.close:
            yield from reader.spaces()
            yield from reader.expect(self.fence.lstrip() + self.close)
        call.finish()

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return a call as the model spells it."""
        spelled = f"functions.{name}:0" if self.is_id else name
        return f"{self.open}{self.before}{spelled}{self.after}{to_json(dict(arguments))}{self.fence}{self.close}"

    def rule(self, grammar: Grammar, tool: Tool) -> str:
        """Return what a grammar accepts after the marker."""
        head = grammar.literal(self.before + (f"functions.{tool.name}:" if self.is_id else tool.name))
        number = grammar.pattern("[0-9]{1,4}") if self.is_id else ""
        arguments, tail = grammar.json(tool.parameters), grammar.literal(self.fence + self.close)
        return " ".join(part for part in (head, number, grammar.literal(self.after), arguments, tail) if part)


class Attributes(NamedTuple):
    """Names of attributes in tags: `<call tool="..."><argument key="..." type="string">`."""

    tool: str
    key: str
    type: str
    text: str
    """The value of `type` for text; all others are JSON."""


_ATTRIBUTE = re.compile(r'([\w-]+)="([^"]*)"')


@dataclass(frozen=True, kw_only=True)
class TaggedCall(Syntax):
    """Parameters one by one between tags, with strings as they are, and all else as JSON.

    A closing tag counts only if what comes after it may come there, so that values may have such tags in them. One
    that is missing does no harm if what comes instead is clear.

    Attributes:
        open: opens the call; what follows up to `name_end` has the tool's name.
        name_end: "" if the name ends where the first parameter or the end of the call begins.
        key_open: opens a parameter; what follows up to `key_end` has its name.
        key_end: comes after the parameter's name.
        value_open: comes before the value, if that is not the same.
        numbered: what comes after the tool's name, with a number in place of its "#".
        value_end: comes after it.
        end: ends the call.
        after: what may come after the end of a call, apart from `wrapper`.
        wrapper: markers around the call, which models forget at times.
        attributes: how tags name things; None if the names are bare.
        pad: one white space on each side of a value which belongs to the tags.
        gap: white space between the tags, for writing.
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
        while not tag:
            yield from reader.spaces()
            tag = yield from reader.literal(self.key_open, self.end)
            if not tag:
                yield from reader.refuse(f"{self.key_open!r} or {self.end!r} expected")
        while tag == self.key_open:
            tag = yield from self._parameter(parser, call, seen)
            if not tag:
                yield from reader.spaces()
                tag = yield from reader.literal(self.key_open, self.end)
                if not tag:
                    yield from reader.refuse(f"{self.key_open!r} or {self.end!r} expected")
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

    def _parameter(self, parser: CallParser, call: OpenCall, seen: list[str]) -> Reading[str]:
        """Read a parameter; return the tag after it if that was read too."""
        reader = parser.reader
        head, _ = yield from reader.text_until(self.key_end)
        key, is_text = head.strip(), None
        if self.attributes:
            found = _attributes(head)
            key = found.get(self.attributes.key, "")
            if self.attributes.type in found:
                is_text = found[self.attributes.type] == self.attributes.text
        parameters = call.tool.parameters if call.tool else {}
        properties = parameters.get("properties", {})
        types = accepted_types(properties.get(key), parameters)
        if is_text is None:
            is_text = types == {"string"}
        if self.value_open:
            yield from reader.spaces()
            yield from reader.expect(self.value_open)
        if self.pad:
            yield from reader.literal(self.pad)
        call.write(f"{', ' if seen else ''}{to_json(key)}: ")
        seen.append(key)
        markers = self._ends([each for each in properties if each not in seen])
        if is_text:
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
        if heads := tuple(self._head(key) for key in keys):
            ends[self.pad + self.key_open] = heads
        ends[self.pad + self.end] = (self.wrapper[1],) if self.wrapper[1] else self.after
        return Markers(ends)

    def _head(self, key: str) -> str:
        if self.attributes:
            return f' {self.attributes.key}="{_escape(key)}"'
        return key + self.key_end

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return a call as the model spells it."""
        opened, closed = self._wrapped()
        head = f' {self.attributes.tool}="{_escape(name)}"' if self.attributes else name
        text = opened + self.open + head
        text += self.numbered.replace("#", "1") + self.name_end + self.gap
        for key, value in arguments.items():
            text += self._tag(key, isinstance(value, str), _type_name(value))
            text += self.pad + (value if isinstance(value, str) else to_json(value)) + self.pad
            text += self.value_end + self.gap
        return text + self.end + closed

    def _wrapped(self) -> tuple[str, str]:
        opening, closing = self.wrapper
        return (opening + self.gap, self.gap + closing) if opening else ("", "")

    def _tag(self, key: str, is_text: bool, kind: str) -> str:
        if not self.attributes:
            return self.key_open + key + self.key_end + (self.gap + self.value_open if self.value_open else "")
        kind = self.attributes.text if is_text else "false" if self.attributes.text == "true" else kind
        return f'{self.key_open}{self._head(key)} {self.attributes.type}="{kind}"{self.key_end}'

    def rule(self, grammar: Grammar, tool: Tool) -> str:
        """Return what a grammar accepts after the marker."""
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
    return sorted(types - {"integer"} if "number" in types else types)


def choices(schema: object) -> list[Any] | None:
    """Return the values that a schema lists, if it does."""
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return list(values) if isinstance(values, list) else None


def _is(value: object, kind: str) -> bool:
    name = _type_name(value)
    return name == kind or (kind == "integer" and isinstance(value, int) and name == "number")


def _type_name(value: object) -> str:
    if value is None:
        return "null"
    names = {str: "string", bool: "boolean", int: "number", float: "number", dict: "object"}
    return names.get(type(value), "array")


def _attributes(head: str) -> dict[str, str]:
    return {name: html.unescape(value) for name, value in _ATTRIBUTE.findall(head)}


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;")


def _string(parser: CallParser) -> Reading[str]:
    """Read a JSON string; return what it stands for."""
    parts: list[str] = []
    yield from parser.reader.json_string(parts.append)
    try:
        return str(json.loads("".join(parts)))
    except ValueError as error:
        raise Malformed(f"no JSON: {error}") from None


def _ignore(text: str) -> None:
    pass
