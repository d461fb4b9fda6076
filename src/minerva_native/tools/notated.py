"""Calls that have their arguments in another notation than JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .grammar import Grammar
from .notation import Notation
from .parser import CallParser, NotACall
from .reader import Reading
from .schema import NAME, Tool
from .syntax import Syntax


@dataclass(frozen=True, kw_only=True)
class NotatedCall(Syntax):
    """A name, and its arguments in brackets.

    Attributes:
        before: what is between the marker and the name.
        bracket: opens the arguments.
        notation: how values are written.
    """

    before: str = ""
    bracket: str
    notation: Notation

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
        """Return a call as the model spells it, without `opens[0]` and `close`."""
        members = self.notation.members(arguments, self.notation.pair, is_call=True)
        return f"{self.before}{name}{self.bracket}{members}{self.notation.end}"

    def rule(self, grammar: Grammar, tool: Tool) -> str:
        """Return what a grammar accepts between `opens[0]` and `close`."""
        members = self.notation.members_rule(grammar, tool.parameters, tool.parameters, self.notation.pair)
        head = grammar.literal(f"{self.before}{tool.name}{self.bracket}")
        return f"{head} {members} {grammar.literal(self.notation.end)}"
