"""Tells content, reasoning and calls apart while an answer is written."""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .calls import CallDelta, CallError, ParsedPiece, ToolCall, new_call_id
from .reader import CutOff, Malformed, Markers, Reader, Reading

if TYPE_CHECKING:
    from .formats import ToolFormat
    from .schema import Tool
    from .syntax import Syntax


class NotACall(Malformed):
    """What began like a call is ordinary text."""


class Passage:
    """Content or reasoning: white space at its end waits until it is known what comes next.

    Attributes:
        is_blank: whether there was nothing but white space since the beginning, the last tag or the last call.
    """

    def __init__(self) -> None:
        self._ready: list[str] = []
        self._held: list[str] = []
        self._at_tag = False
        self.is_blank = True

    def add(self, text: str) -> None:
        """Add text."""
        if self._at_tag:
            text = text.lstrip()
            self._at_tag = not text
        body = text.rstrip()
        if body:
            self._ready += [*self._held, body]
            self._held = []
            self.is_blank = False
        if len(body) < len(text):
            self._held.append(text[len(body) :])

    def begin(self) -> None:
        """Come after a tag, to which white space after it belongs."""
        self._held, self._at_tag, self.is_blank = [], True, True

    def close(self, spaces: str | None = None) -> None:
        """Come before a tag or a call: drop the white space that is held, or those characters of it."""
        if not self.is_blank:
            self._ready.append("" if spaces is None else "".join(self._held).rstrip(spaces))
        self._held, self._at_tag, self.is_blank = [], False, True

    def release(self) -> None:
        """Let go of the white space, because the text has ended."""
        self._ready += self._held
        self._held = []

    def take(self) -> str:
        """Return what has come since the last time."""
        text = "".join(self._ready)
        self._ready = []
        return text


class OpenCall:
    """A call that is being read; its arguments are written as JSON."""

    def __init__(self, parser: "CallParser"):
        self._parser = parser
        self._parts: list[str] = []
        self._id = self.name = ""
        self.index: int | None = None

    @property
    def tool(self) -> "Tool | None":
        """The tool that is called, if the tools are known."""
        return None if self._parser.tools is None else self._parser.tools.get(self.name)

    def named(self, name: str, call_id: str = "") -> None:
        """Say which tool is called; raise `Malformed` if there is none of that name."""
        tools = self._parser.tools
        if not name or (tools is not None and name not in tools):
            raise Malformed(f"there is no tool {name!r}")
        self.name, self._id = name, call_id or self._parser.new_id()
        self.index = self._parser.next_index()
        self._parser.piece.deltas.append(CallDelta(self.index, self._id, name, "".join(self._parts)))

    def write(self, text: str) -> None:
        """Add to the JSON text of the arguments."""
        self._parts.append(text)
        if self.index is not None and text:
            self._parser.piece.deltas.append(CallDelta(self.index, arguments=text))

    def finish(self) -> None:
        """Hand the call to the parser, which gives it out once the whole of what it is in was read."""
        text = "".join(self._parts)
        try:
            arguments = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"the arguments of {self.name} are no JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise Malformed(f"the arguments of {self.name} are no JSON object")
        assert self.index is not None
        self._parser.staged.append(ToolCall(self._id, self.name, arguments, text, self.index))


class CallParser:
    """Parses one answer; made by `ToolFormat.parser`.

    What it gives back in total depends on the text alone, not on the pieces it came in.
    """

    def __init__(
        self,
        tool_format: "ToolFormat",
        tools: "Mapping[str, Tool] | None",
        reasoning: tuple[str, str] | None,
        prompt: str,
        new_id: Callable[[], str] = new_call_id,
    ):
        self.format, self.prompt = tool_format, prompt
        self.tools, self.reasoning_tags, self.new_id = tools, reasoning, new_id
        self.reader = Reader()
        self.content, self.reasoning = Passage(), Passage()
        self.piece = ParsedPiece()
        self.staged: list[ToolCall] = []
        self._opened: list[OpenCall] = []
        self._n_calls = 0
        self._is_over = False
        self._steps = tool_format.read(self)

    def feed(self, text: str) -> ParsedPiece:
        """Return what a piece of text adds; control tokens are in it by their names."""
        if self._is_over:
            raise ValueError("the parser was flushed: a new answer needs a new parser")
        self.reader.push(text)
        return self._advance()

    def flush(self) -> ParsedPiece:
        """Return what is left when the text has ended. A call that is not complete is an error, and not content."""
        if self._is_over:
            return ParsedPiece()
        self.reader.end()
        return self._advance()

    def _advance(self) -> ParsedPiece:
        try:
            next(self._steps)
        except StopIteration:
            self._is_over = True
            self.reasoning.release()
            if self._n_calls == 0 or not self.content.is_blank:
                self.content.release()
        piece, self.piece = self.piece, ParsedPiece()
        piece.content, piece.reasoning = self.content.take(), self.reasoning.take()
        return piece

    def next_index(self) -> int:
        """Return the index of a new call."""
        self._n_calls += 1
        return self._n_calls - 1

    def open(self) -> OpenCall:
        """Begin a call."""
        call = OpenCall(self)
        self._opened.append(call)
        return call

    def attempt(self, reading: Reading[None], begun: str) -> Reading[bool]:
        """Read one call, or several that are one value; if they prove wrong, what was read is content.

        Args:
            reading: reads them.
            begun: what was read of them already.
        """
        self.reader.record(begun)
        self._opened = []
        try:
            yield from reading
        except (Malformed, CutOff) as error:
            self.staged = []
            text = self.reader.recorded()
            if isinstance(error, CutOff):
                self.fail("the call is cut off", text)
            else:
                self.content.add(text)
                if not isinstance(error, NotACall) or any(call.name for call in self._opened):
                    self.fail(str(error), text)
            return False
        self.reader.recorded()
        self.content.close("\n")
        self.piece.calls += self.staged
        self.staged = []
        return True

    def fail(self, message: str, text: str) -> None:
        """Report what is wrong with a text, and with every call that has begun in it."""
        started: list[int | None] = [call.index for call in self._opened if call.index is not None]
        self.piece.errors += [CallError(message, text, index) for index in started or [None]]
        self._opened = []

    def think(self) -> Reading[tuple[str, str]]:
        """Read reasoning up to its end; return the marker that ended it if that is more than the closing tag."""
        assert self.reasoning_tags is not None
        self.reasoning.begin()
        self.content.close()
        enders = Markers({self.reasoning_tags[1]: ()} | dict(self.format.ends_reasoning))
        marker, space = yield from self.reader.until(enders, self.reasoning.add)
        if marker:
            self.reasoning.close()
            self.content.begin()
        return ("", "") if marker == self.reasoning_tags[1] else (marker, space)


def opens_reasoning(prompt: str, tags: tuple[str, str]) -> bool:
    """Return whether a prompt ends with the opening tag."""
    return prompt.rstrip().endswith(tags[0].rstrip())


def by_marker(syntaxes: "tuple[Syntax, ...]") -> "dict[str, list[Syntax]]":
    """Return the syntaxes by the markers that open them."""
    found: dict[str, list[Syntax]] = {}
    for syntax in syntaxes:
        for marker in syntax.opens:
            found.setdefault(marker, []).append(syntax)
    return found


def read_answer(parser: CallParser) -> Reading[None]:
    """Read an answer of the usual form: reasoning between tags, text, and calls that markers open."""
    tool_format, reader, tags = parser.format, parser.reader, parser.reasoning_tags
    syntaxes = by_marker(tool_format.calls)
    opening = (tool_format.section[0],) if tool_format.section else tuple(syntaxes)
    always: dict[str, tuple[str, ...]] = dict.fromkeys((*tool_format.silent, *opening), ())
    markers = Markers(always | ({tags[0]: ()} if tags else {}))
    marker, space = "", ""
    may_be_bare = tool_format.bare is not None
    if tags and opens_reasoning(parser.prompt, tags):
        marker, space = yield from parser.think()
    while True:
        if may_be_bare and not marker and parser.content.is_blank:
            yield from _read_bare(parser)
        if not marker:
            marker, space = yield from reader.until(markers, parser.content.add)
        may_be_bare = False
        if not marker:
            return
        if tags and marker == tags[0]:
            if not parser.content.is_blank:  # the text is about tags
                parser.content.add(marker)
                marker = ""
                continue
            marker, space = yield from parser.think()
            may_be_bare = tool_format.bare is not None
            continue
        if tool_format.section and marker == tool_format.section[0]:
            yield from _read_section(parser, syntaxes, tool_format.section[1])
        elif marker in syntaxes:
            yield from _read_call(parser, syntaxes[marker], marker, space)
        else:
            may_be_bare = tool_format.bare is not None
        marker, space = "", ""


def _read_call(parser: CallParser, syntaxes: "list[Syntax]", marker: str, space: str) -> Reading[bool]:
    """Read a call whose marker was read."""

    def reading() -> Reading[None]:
        syntax = syntaxes[0]
        if len(syntaxes) > 1:
            yield from parser.reader.spaces()
            char = yield from parser.reader.peek()
            fitting = [other for other in syntaxes if char and char in other.first]
            syntax = (fitting or [other for other in syntaxes if not other.first])[0]
        yield from syntax.read(parser, marker)

    return (yield from parser.attempt(reading(), marker + space))


def _read_section(parser: CallParser, syntaxes: "dict[str, list[Syntax]]", end: str) -> Reading[None]:
    """Read calls up to the end of their section; other text between them is no content."""
    markers = Markers(dict.fromkeys((*syntaxes, end), ()))
    is_well_formed = True
    while True:
        between: list[str] = []
        marker, space = yield from parser.reader.until(markers, between.append)
        if text := "".join(between).strip():
            if is_well_formed:
                parser.fail("there is text between the calls", text)
            else:
                parser.content.add("".join(between))
        if marker in ("", end):
            return
        is_well_formed = yield from _read_call(parser, syntaxes[marker], marker, space)


def _read_bare(parser: CallParser) -> Reading[None]:
    """Read calls that no marker opens, where the answer begins."""
    bare, reader = parser.format.bare, parser.reader
    assert bare is not None
    space = yield from reader.spaces()
    while True:
        char = yield from reader.peek()
        if not char or char not in bare.first:
            parser.content.add(space)
            return
        if not (yield from parser.attempt(bare.read(parser, ""), space)):
            return
        space = yield from reader.spaces()
        if not (yield from reader.literal(";")):  # between the calls of small Llamas
            parser.content.add(space)
            return
        space += ";" + (yield from reader.spaces())


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is given twice")
        found[name] = value
    return found
