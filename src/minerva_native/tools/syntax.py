"""How a call is spelled: what all formats consist of.

A syntax reads a call whose opening marker was read, spells one, and says what a grammar may let through.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .calls import to_json
from .grammar import Grammar
from .parser import CallParser, NotACall, OpenCall
from .reader import CutOff, Malformed, Reading
from .schema import NAME, Tool

_CALL_ID = re.compile(r"[^\s<\[{]+")


@dataclass(frozen=True, kw_only=True)
class Syntax(ABC):
    """How a call is spelled.

    Attributes:
        open: the marker that opens it, "" if none does.
        close: what ends it, "" if nothing does.
        first: characters one of which a call begins with, after the marker; "" for any.
        is_list: whether calls are in a list. It is one value: no call in it counts until it is closed.
    """

    open: str = ""
    close: str = ""
    first: str = ""
    is_list: bool = False

    @property
    def opens(self) -> tuple[str, ...]:
        """The markers that open a call, the usual one first."""
        return (self.open,)

    @abstractmethod
    def read(self, parser: CallParser, marker: str) -> Reading[None]:
        """Read a call after its marker."""

    @abstractmethod
    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return a call as the model spells it, without `opens[0]` and `close`."""

    @abstractmethod
    def rule(self, grammar: Grammar, tool: Tool) -> str:
        """Return what a grammar accepts between `opens[0]` and `close`."""

    def join(self, calls: list[str], joint: str) -> str:
        """Return several calls, each as `write` returned it, with what opens and closes them."""
        if self.is_list:
            return f"{self.opens[0]}[{', '.join(calls)}]{self.close}"
        return joint.join(f"{self.opens[0]}{call}{self.close}" for call in calls)


@dataclass(frozen=True, kw_only=True)
class JsonCall(Syntax):
    """{"name": ..., "arguments": {...}}.

    Attributes:
        keys: the names that the arguments go by, the usual one first.
        pad: white space between the JSON and the markers.
    """

    keys: tuple[str, ...] = ("arguments", "parameters")
    pad: str = ""

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
                if (key == "name" and call.name) or (key in self.keys and has_arguments):
                    raise Malformed(f"{key!r} is given twice")
                if key == "name":
                    call.named((yield from self._name(parser)))
                elif key in self.keys:
                    has_arguments = True
                    yield from self._arguments(parser, call)
                elif key in ("type", "id", "function") or marker:
                    yield from reader.json(_ignore)
                else:
                    raise NotACall(f"{key!r} is no part of a call")
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
        """Return a call as the model spells it, without `opens[0]` and `close`."""
        body = to_json({"name": name, self.keys[0]: dict(arguments)})
        return f"{self.pad}{body}{self.pad}"

    def rule(self, grammar: Grammar, tool: Tool) -> str:
        """Return what a grammar accepts between `opens[0]` and `close`."""
        head = f'{self.pad}{{"name": {to_json(tool.name)}, "{self.keys[0]}": '
        tail = f"}}{self.pad}"
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
        """Return a call as the model spells it, without `opens[0]` and `close`."""
        spelled = f"functions.{name}:0" if self.is_id else name
        return f"{self.before}{spelled}{self.after}{to_json(dict(arguments))}{self.fence}"

    def rule(self, grammar: Grammar, tool: Tool) -> str:
        """Return what a grammar accepts between `opens[0]` and `close`."""
        head = grammar.literal(self.before + (f"functions.{tool.name}:" if self.is_id else tool.name))
        number = grammar.pattern("[0-9]{1,4}") if self.is_id else ""
        arguments, tail = grammar.json(tool.parameters), grammar.literal(self.fence)
        return " ".join(part for part in (head, number, grammar.literal(self.after), arguments, tail) if part)


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
