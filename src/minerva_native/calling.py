"""Calls of tools in an answer: what a request allows, and the decoder that takes them from the text."""

import asyncio
import dataclasses
import functools
import inspect
import logging
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

from ._arguments import what
from .chat import ChatTemplate
from .errors import ConstraintError, MinervaError
from .observer import Observer, watched
from .reasoning import ReasoningDecoder
from .schemas import prepare
from .structured import Constraint
from .tokenizer import Tokenizer
from .tools import CallParser, ParsedPiece, Tool, ToolCall, ToolFormat, as_text, read_tools

ToolGiven: TypeAlias = Any  # mypy calls the items of a list of different functions "function", which is no Callable
"""A tool as callers give it: a function with type hints, a dict as in OpenAI's API, or a `Tool`."""

_logger = logging.getLogger("minerva_native")

_warned: "weakref.WeakSet[ChatTemplate]" = weakref.WeakSet()

_CHOICES = ("auto", "none", "required")


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request, and how its answer may call them.

    Attributes:
        tools: by name.
        format: how the model writes a call.
        tags: the tags around the model's reasoning, if it has any.
        constraint: what the answer has to be so that every call is one of a tool; None if that cannot be said.
    """

    tools: Mapping[str, Tool]
    format: ToolFormat
    tags: tuple[str, str] | None
    constraint: Constraint | None

    @classmethod
    def of(
        cls,
        tools: Sequence[Tool],
        choice: str,
        is_parallel: bool,
        tags: tuple[str, str] | None,
        template: ChatTemplate,
        tokenizer: Tokenizer,
    ) -> Self | None:
        """Return how an answer may call tools; None if it may not.

        Args:
            tools: what may be called.
            choice: "auto", "none", "required", or the name of the one tool to call.
            is_parallel: whether an answer may have more than one call.
            tags: those around reasoning, as the request or the template names them. The constraint leaves them out.
            template: of the chat; it shows how the model writes calls.
            tokenizer: of the model.

        Raises:
            ValueError: there is no such tool.
            ConstraintError: a call is required, and the format or a tool's schema cannot be constrained.
        """
        if choice not in _CHOICES and choice not in {tool.name for tool in tools}:
            raise ValueError(f"tool_choice is {choice!r}, but there is no tool of that name")
        if choice == "required" and not tools:
            raise ValueError("tool_choice is 'required', but there are no tools")
        if not tools or choice == "none":
            return None
        if not template.shows_tools and template not in _warned:
            _warned.add(template)
            _logger.warning("the chat template does not show tools to the model")
        tool_format = ToolFormat.of(template.text)
        is_required = choice != "auto"
        name = choice if choice not in _CHOICES else None
        own = tool_format.reasoning if tags is None and _may_think(tool_format, template) else None
        tokens = {token.text: token.id for token in tokenizer.special_tokens if not token.in_every_text}
        try:
            ready = [dataclasses.replace(tool, parameters=_prepared(tool)) for tool in tools]
            grammar = tool_format.grammar(
                ready, required=is_required, parallel=is_parallel, name=name, tokens=tokens, reasoning=own
            )
            constraint = None if grammar is None else _constraint(grammar)
        except MinervaError as error:
            if is_required:
                raise
            _logger.info("calls of tools are not constrained: %s", error)
            constraint = None
        if constraint is None and is_required:
            raise ConstraintError(
                f"the format {tool_format.name!r} cannot be made to call a tool: use tool_choice='auto'"
            )
        return cls({tool.name: tool for tool in tools}, tool_format, tags or own, constraint)

    def decoder(self, tokenizer: Tokenizer, tail: str, after: int, reasoning: ReasoningDecoder | None) -> "CallDecoder":
        """Return a decoder of an answer; `tail` is the end of its prompt."""
        parser = self.format.parser(list(self.tools.values()), reasoning=self.tags, prompt=tail)
        return CallDecoder(tokenizer, parser, after, reasoning)


class CallDecoder:
    """A decoder for `generate` whose text is the content of an answer; reasoning and calls are taken from it.

    Args:
        tokenizer: of the model.
        parser: of the answer.
        after: the last token of the prompt.
        reasoning: what watches the reasoning and its budget, if there are tags for it.
    """

    def __init__(self, tokenizer: Tokenizer, parser: CallParser, after: int, reasoning: ReasoningDecoder | None):
        self._parser, self._watching = parser, reasoning
        self._decoder = tokenizer.stream(special=True, after=after)
        self._piece = ParsedPiece()

    def feed(self, token: int) -> str:
        """Return the content that a token adds."""
        if self._watching is not None:
            self._watching.feed(token)
            self._watching.take()
        return self._add(self._parser.feed(self._decoder.feed(token)))

    def flush(self) -> str:
        """Return what is left of the content at the end."""
        rest = self._decoder.flush()
        content = self._add(self._parser.feed(rest)) if rest else ""
        return content + self._add(self._parser.flush())

    def take(self) -> ParsedPiece:
        """Return what there is beside the content since the last call."""
        piece, self._piece = self._piece, ParsedPiece()
        return piece

    def _add(self, piece: ParsedPiece) -> str:
        own = self._piece
        own.reasoning += piece.reasoning
        own.calls += piece.calls
        own.deltas += piece.deltas
        own.errors += piece.errors
        return piece.content


def read_choice(choice: object) -> str:
    """Return `tool_choice` as a word or the name of a tool; OpenAI's dict names one."""
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        choice = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(choice, str) or not choice:
        raise TypeError(f'tool_choice must be "auto", "none", "required" or the name of a tool, not {what(choice)}')
    return choice


def run_tool(tool: Tool, call: ToolCall, observers: Sequence[Observer] = ()) -> str:
    """Run a tool, which observers see, and return its result as text for the model, or what went wrong."""
    if inspect.iscoroutinefunction(tool.function):
        raise TypeError(f"the tool {tool.name!r} is a coroutine: use arun")
    try:
        with watched(observers, tool, call):
            return tool.call(call.arguments)
    except Exception as error:  # whatever a function raises, the model hears of it
        return _failure(tool, error)


async def arun_tool(tool: Tool, call: ToolCall, observers: Sequence[Observer] = ()) -> str:
    """Do what `run_tool` does, without blocking the event loop."""
    try:
        with watched(observers, tool, call):
            if inspect.iscoroutinefunction(tool.function):
                return as_text(await tool.function(**tool.bind(call.arguments)))
            return await asyncio.to_thread(tool.call, call.arguments)
    except Exception as error:
        return _failure(tool, error)


def _failure(tool: Tool, error: Exception) -> str:
    _logger.info("the tool %s failed: %r", tool.name, error)
    return f"error: {type(error).__name__}: {error}"


def described(tools: Iterable[ToolGiven]) -> tuple[tuple[Tool, ...], list[dict[str, Any]]]:
    """Return tools, and their descriptions for a chat template."""
    read = read_tools(tools)
    return read, [tool.to_dict() for tool in read]


def _may_think(tool_format: ToolFormat, template: ChatTemplate) -> bool:
    """Return whether a template that names no tags for reasoning knows those of the format, perhaps in pieces."""
    tags = tool_format.reasoning
    return tags is not None and all(word in template.text for word in re.findall(r"\w+", tags[0]))


def _prepared(tool: Tool) -> dict[str, Any]:
    try:
        schema = prepare(tool.parameters)
    except ConstraintError as error:
        raise ConstraintError(f"the parameters of the tool {tool.name!r}: {error}", path=error.path) from None
    return {"type": "object"} | schema if isinstance(schema, dict) else {"type": "object"}


def _constraint(grammar: str) -> Constraint:
    tried = _tried(grammar)
    if isinstance(tried, str):
        raise ConstraintError(tried)
    return tried


@functools.lru_cache(maxsize=16)  # of a large grammar, what was compiled takes 20 MB
def _tried(grammar: str) -> Constraint | str:
    """Return a constraint, or what is wrong with its grammar: either may take a second."""
    try:
        return Constraint.lark(grammar)
    except ConstraintError as error:
        return str(error)


def result_message(call_id: str, name: str, result: object) -> dict[str, Any]:
    """Return the message that gives a tool's result to the model."""
    return {"role": "tool", "tool_call_id": call_id, "name": name, "content": as_text(result)}
