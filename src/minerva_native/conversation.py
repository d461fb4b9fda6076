"""A conversation: messages, and a sequence that grows with them."""

import asyncio
import json
import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar
from weakref import ref

from ._arguments import file_path, integer, what
from .calling import ToolGiven, arun_tool, described, result_message, run_tool
from .chat import ChatTemplate, Message
from .completion import Chunk, Completion, Usage
from .context import Context
from .draft import Draft, RequestOptions
from .errors import ClosedError, ContextFullError, MinervaError, SequencesInUseError, StateError
from .requests import AsyncStream, Request, Signal, Stream, n_characters
from .sequence import Sequence as TokenSequence
from .tokenizer import Tokenizer
from .tools import Tool, ToolCall

if TYPE_CHECKING:
    from .llm import LLM

T = TypeVar("T")

WhenFull: TypeAlias = "str | Callable[[list[dict[str, Any]]], Sequence[Message]]"
"""What a chat does if its messages do not fit: "error", "drop_turns", or a function of the messages for fewer."""

_logger = logging.getLogger("minerva_native")

_FORMAT, _VERSION = "minerva chat", 1


class OpenChats:
    """The chats that have an open sequence, the one used longest ago first. Only the queue's thread uses it."""

    def __init__(self) -> None:
        self._chats: list[ref[Chat]] = []

    def use(self, chat: "Chat") -> None:
        """Put a chat at the end."""
        self._chats = [other for other in self._chats if other() not in (None, chat)]
        self._chats.append(ref(chat))

    def make_room(self, keep: "Chat | None" = None) -> bool:
        """Leave the sequence of the first chat to the prefix cache; return False if there is none."""
        for other in self._chats:
            chat = other()
            if chat is None or (chat is not keep and not chat.is_busy):
                self._chats.remove(other)
                if chat is not None:
                    chat.park()
                    return True
        return False

    def with_room(self, action: Callable[[], T], keep: "Chat | None" = None) -> T:
        """Return what an action returns, making room for it if it finds none."""
        while True:
            try:
                return action()
            except (ContextFullError, SequencesInUseError):
                if not self.make_room(keep):
                    raise

    def room(self, request: Request, action: Callable[[], T], keep: "Chat | None" = None) -> Generator[Signal, None, T]:
        """Do what `with_room` does, and wait for other requests to end if they have the room. For `yield from`."""
        while True:
            try:
                return self.with_room(action, keep)
            except (ContextFullError, SequencesInUseError):
                if not request.may_wait():
                    raise
            if keep is not None:  # those that it waits for may need its cells
                keep.empty()
            yield Signal.BLOCKED

    def leave_room(self, context: Context, wanted: int | None, keep: "Chat | None" = None) -> bool:
        """Make room for an answer of as many tokens, or of any length; return whether there is."""
        if not context.options.kv_unified:
            return True
        wanted = context.n_ctx if wanted is None else wanted
        while context.cells_used + wanted > context.n_ctx:
            if not self.make_room(keep):
                return False
        return True


class Chat:
    """A conversation with a model; make one with `LLM.chat`. A context manager, safe to use from any thread.

    The next turn evaluates only what is new, as long as the template leaves the old turns as they were: tokens that
    spell the same text count as the same. The sequence stays open between turns; if others need its room, it goes to
    the prefix cache, and what is evicted from there is re-evaluated (`Usage.cached_tokens`).

    If a turn fails, is cancelled or its stream is closed, the messages are what they were before it. `keep_partial`
    keeps the text of an answer that was cancelled.

    Methods take the keywords of `LLM.complete`; those given to `LLM.chat` are the defaults.

    Attributes:
        template: the chat template.
        tools: descriptions of functions, as in OpenAI's API.
    """

    def __init__(
        self,
        llm: "LLM",
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[ToolGiven] = (),
        options: Mapping[str, Any] | None = None,
    ):
        self.template = template
        self._tools, self.tools = described(tools)
        self._results: list[dict[str, Any]] = []  # of calls, while others of the same answer have none yet
        self._llm, self._options = llm, dict(options or {})
        self._messages = [dict(message) for message in messages]
        self._sequence: TokenSequence | None = None
        self._parked: list[int] = []  # what the sequence held when it was last closed
        self._is_closed = self._is_reading = False
        self._running: tuple[Request, list[dict[str, Any]]] | None = None  # the turn that is written, what was said
        parsed = self._parse("chat", {})
        if parsed.constraint is not None:  # compiled once
            self._options |= {"constraint": parsed.constraint, "response_format": None}

    # Turns

    def send(self, message: str | Message | Sequence[Message], **options: Any) -> Completion:
        """Say something and return the answer; both are in `messages` then.

        Args:
            message: what the user says, or a message of any role, or several.
            options: the keywords of `LLM.complete`.

        Raises:
            TypeError, ValueError: an argument is unknown or wrong.
            TemplateError: the template refuses the messages.
            ContextFullError: they do not fit, and `on_full` finds no way.
            Cancelled: the request was stopped before the first token.
            ClosedError: the chat or the LLM is closed.
        """
        parsed = self._parse("send", options)
        work, record = self._completing(message, parsed), self._llm.record("chat", message, parsed)
        return self._llm.queue.call(work, key=self, record=record, **parsed.limits)

    def stream(self, message: str | Message, **options: Any) -> Stream[Chunk]:
        """Do what `send` does, and return an iterator over the pieces of the answer. Closing it stops the answer."""
        parsed = self._parse("stream", options)
        work, record = self._streaming(message, parsed), self._llm.record("chat", message, parsed, is_stream=True)
        return self._llm.queue.stream(work, key=self, record=record, **parsed.limits)

    async def asend(self, message: str | Message | Sequence[Message], **options: Any) -> Completion:
        """Do what `send` does, without blocking the event loop."""
        parsed = self._parse("asend", options)
        work, record = self._completing(message, parsed), self._llm.record("chat", message, parsed)
        return await self._llm.queue.acall(work, key=self, record=record, **parsed.limits)

    def astream(self, message: str | Message, **options: Any) -> AsyncStream[Chunk]:
        """Do what `stream` does, as an asynchronous iterator."""
        parsed = self._parse("astream", options)
        work, record = self._streaming(message, parsed), self._llm.record("chat", message, parsed, is_stream=True)
        return self._llm.queue.astream(work, key=self, record=record, **parsed.limits)

    def _parse(self, caller: str, options: Mapping[str, Any]) -> RequestOptions:
        given = {**self._options, **options}
        if options.keys() & {"constraint", "response_format"}:
            given |= {name: options.get(name) for name in ("constraint", "response_format")}
        if given.get("thinking_tags") is None:
            given["thinking_tags"] = self.template.thinking_tags
        return self._llm.options(caller, given)

    def _completing(
        self, message: str | Message | Sequence[Message], options: RequestOptions
    ) -> Callable[[Request], Iterator[Completion | Signal]]:
        turn = self._turn(message, options)

        def work(request: Request) -> Iterator[Completion | Signal]:
            drafts: list[Draft] = []
            for item in turn(request, drafts.append):
                yield item if isinstance(item, Signal) else Signal.STEP
            yield drafts[0].completion()

        return work

    def _streaming(
        self, message: str | Message, options: RequestOptions
    ) -> Callable[[Request], Iterator[Chunk | Signal]]:
        turn = self._turn(message, options)
        return lambda request: turn(request, lambda draft: None)

    @property
    def _given_tools(self) -> list[ToolGiven]:
        return [tool if tool.function else one for tool, one in zip(self._tools, self.tools, strict=True)]

    def _turn(
        self, message: str | Message | Sequence[Message], options: RequestOptions
    ) -> Callable[[Request, Callable[[Draft], object]], Iterator[Chunk | Signal]]:
        said = self._results + _said(message)
        use = options.tools_of(self._tools, self.template, self._llm.tokenizer)

        def turn(request: Request, begun: Callable[[Draft], object]) -> Iterator[Chunk | Signal]:
            before = self._messages
            self._running = (request, said)
            shown = self.tools if use is not None else []
            sequence: TokenSequence | None = None
            tokens: list[int] = []
            is_kept = False
            try:
                sequence = yield from self._open(request)
                tokens = self._held
                messages = yield from self._evaluate(sequence, [*before, *said], shown, options, request)
                if request.record is not None:
                    request.record.prompt = messages
                self._parked = []
                draft = Draft(
                    sequence,
                    options,
                    request,
                    cached_tokens=max(0, len(sequence) - request.n_evaluated),
                    is_chat=True,
                    tools=use,
                    speculation=self._llm.speculation(),
                    dropped_turns=_n_turns([*before, *said]) - _n_turns(messages),
                )
                begun(draft)
                self._llm.chats.leave_room(self._llm.context, options.max_tokens, keep=self)
                for chunk in draft.chunks():
                    if chunk.finish_reason is not None:
                        answer = draft.completion()
                        is_kept = chunk.finish_reason != "cancelled" or (options.keep_partial and bool(answer.text))
                        self._running = None
                        if is_kept and self._messages is before:  # nobody has undone it
                            self._messages, self._results = [*messages, answer.message], []
                    yield chunk
            finally:
                self._running = None
                if not is_kept and sequence is not None:
                    with suppress(MinervaError):  # the context may be closed
                        sequence.truncate(_common(tokens, list(sequence)))
                if sequence is not None:
                    self._llm.store_prompt(sequence)

        return turn

    def _evaluate(
        self,
        sequence: TokenSequence,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        options: RequestOptions,
        request: Request,
    ) -> Generator[Signal, None, list[dict[str, Any]]]:
        """Bring the sequence up to the prompt; return the messages that fit."""
        context = self._llm.context
        n_cells = context.options.n_cells
        room = n_cells // 4 if options.max_tokens is None else min(options.max_tokens, n_cells // 4)
        length = None
        while True:
            encode = partial(self._prompt, messages, tools, options)
            ids = yield from request.elsewhere(encode, n_characters(messages))
            is_shorter = length is None or len(ids) < length
            length = len(ids)
            fewer = self._fewer(messages) if is_shorter and length + room > n_cells else None
            if fewer is None:
                self._llm.load_prompt(ids, keep=self)
                try:
                    assign = partial(sequence.assign, ids, cancel=request, evaluate=False)
                    yield from self._llm.chats.room(request, assign, keep=self)
                    yield from request.evaluate(sequence)
                    return messages
                except ContextFullError:
                    fewer = self._fewer(messages) if is_shorter else None
                    if fewer is None:
                        raise
            _logger.warning("the context is full: a chat goes on with %d of %d messages", len(fewer), len(messages))
            messages = fewer

    def _prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], options: RequestOptions
    ) -> list[int]:
        tokenizer, said = self._llm.tokenizer, self.template.with_arguments(messages)
        ids = self.template.encode(tokenizer, said, tools or None, **options.chat_template_kwargs)
        return respelled(tokenizer, self._held, ids)

    def _fewer(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
        """Return fewer messages, as `on_full` says; None if it is an error that they do not fit."""
        on_full = self._llm.on_full
        if on_full == "error":
            return None
        if callable(on_full):
            return [dict(message) for message in on_full([dict(message) for message in messages])]
        return _without_oldest_turn(messages)

    # Calls of tools

    def send_tool_result(self, call: ToolCall | str, result: object, **options: Any) -> Completion | None:
        """Give the result of a call of the last answer to the model.

        When every call of that answer has its result, the model goes on.

        Args:
            call: the call, or its id.
            result: a str as it is, anything else as JSON.
            options: the keywords of `LLM.complete`.

        Returns:
            The next answer, or None while other calls have no result.

        Raises:
            ValueError: the last answer has no such call, or it has a result.
        """
        waiting = self._add_result(call, result)
        if waiting:
            return None
        added = self._results[-1]
        try:
            return self.send([], **options)
        finally:
            if added in self._results:  # nothing has come of it: it may be given again
                self._results.remove(added)

    def run(
        self, message: str | Message, tools: Sequence[ToolGiven] | None = None, max_rounds: int = 10, **options: Any
    ) -> Completion:
        """Do what `send` does, run the functions that the model calls, and go on until it answers.

        A function that fails gives its message to the model. Functions run on the calling thread, one after another.

        Args:
            message: see `send`.
            tools: functions, for this turn and later ones; by default those of the chat.
            max_rounds: after so many answers with calls the model has to answer without.
            options: the keywords of `LLM.complete`.

        Raises:
            TypeError: a tool that is called has no function.
        """
        self._begin_run(tools, max_rounds)
        answer = self.send(message, **options)
        for number in range(max_rounds):
            if not answer.tool_calls:
                break
            for call in answer.tool_calls:
                self._add_result(call, run_tool(self._tool(call), call, self._llm.observers))
            answer = self.send([], **options | ({"tool_choice": "none"} if number == max_rounds - 1 else {}))
        return answer

    async def arun(
        self, message: str | Message, tools: Sequence[ToolGiven] | None = None, max_rounds: int = 10, **options: Any
    ) -> Completion:
        """Do what `run` does, without blocking the event loop; coroutines are awaited, other tools run in threads."""
        self._begin_run(tools, max_rounds)
        answer = await self.asend(message, **options)
        for number in range(max_rounds):
            if not answer.tool_calls:
                break
            calls = [(self._tool(call), call) for call in answer.tool_calls]
            results = await asyncio.gather(*(arun_tool(*call, self._llm.observers) for call in calls))
            for call, result in zip(answer.tool_calls, results, strict=True):
                self._add_result(call, result)
            answer = await self.asend([], **options | ({"tool_choice": "none"} if number == max_rounds - 1 else {}))
        return answer

    def _begin_run(self, tools: Sequence[ToolGiven] | None, max_rounds: int) -> None:
        integer("max_rounds", max_rounds, 1)
        if tools is not None:
            self._tools, self.tools = described(tools)

    def _tool(self, call: ToolCall) -> Tool:
        tool = next((tool for tool in self._tools if tool.name == call.name), None)
        if tool is None or tool.function is None:
            raise TypeError(f"the tool {call.name!r} has no function: give run() functions, or use send_tool_result")
        return tool

    def _add_result(self, call: ToolCall | str, result: object) -> list[str]:
        """Add the result of a call; return the ids of the calls that wait for theirs."""
        last = self._messages[-1] if self._messages else {}
        calls = {one["id"]: one["function"]["name"] for one in last.get("tool_calls", ())}
        given = [one["tool_call_id"] for one in self._results]
        call_id = call.id if isinstance(call, ToolCall) else call
        if call_id not in calls:
            raise ValueError(f"the last answer has no call {call_id!r}")
        if call_id in given:
            raise ValueError(f"the call {call_id!r} has its result already")
        self._results.append(result_message(call_id, calls[call_id], result))
        return [one for one in calls if one not in (*given, call_id)]

    # What it is

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages so far, as copies."""
        return [dict(message) for message in self._messages]

    @property
    def sequence(self) -> TokenSequence:
        """The sequence in the KV cache. It may be another object after others have needed its room."""
        sequence = self._sequence
        if sequence is not None and not sequence.closed and (len(sequence) or not self._parked):
            return sequence

        def work(request: Request) -> Iterator[TokenSequence | Signal]:
            self._is_reading = True
            try:
                sequence = yield from self._open(request)
                assign = partial(sequence.assign, self._held, cancel=request, evaluate=False)
                yield from self._llm.chats.room(request, assign, keep=self)
                yield from request.evaluate(sequence)
            finally:
                self._is_reading = False
            if request.record is not None:
                n = len(sequence)
                request.record.reads(Usage(n, cached_tokens=max(0, n - request.n_evaluated)))
            yield sequence

        return self._llm.queue.call(work, key=self, record=self._llm.record("prefill", self._messages))

    @property
    def is_busy(self) -> bool:
        """Whether an answer is written, or the sequence is evaluated."""
        return self._running is not None or self._is_reading

    def undo(self) -> list[dict[str, Any]]:
        """Take back the last turn, and return its messages. One that is running is stopped, and nothing else undone."""
        messages = self._messages
        if (running := self._running) is not None:
            request, said = running
            request.stop()
            self._messages = list(messages)  # another list: see the end of a turn
            return said
        begin = next((at for at in range(len(messages) - 1, -1, -1) if messages[at]["role"] == "user"), len(messages))
        self._messages, self._results = messages[:begin], []
        return messages[begin:]

    def fork(self) -> "Chat":
        """Return a chat with the same messages, which goes its own way. What is cached is shared, not copied."""
        self._check_open()
        forked = Chat(self._llm, self.template, self._messages, self._given_tools, self._options)
        forked._parked, forked._results = self._held, list(self._results)
        return forked

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the messages, the tools and the template to a JSON file, which `LLM.load_chat` reads.

        The sequence is not in it: what the KV cache does not have then is evaluated with the next turn.

        Raises:
            OSError: the file cannot be written.
            TypeError: a message is not made of JSON values.
        """
        target = file_path("path", path)
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self._llm.model.path.name,
            "messages": self._messages,
            "tools": self.tools,
            "template": self.template.text,
        }
        text = json.dumps(data, indent=1, ensure_ascii=False)
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)

    # The end

    def park(self) -> None:
        """Leave the sequence to the prefix cache until the next turn."""
        if self._sequence is not None:
            if not self._sequence.closed:
                self._parked = self._held
                self._sequence.close()
            self._sequence = None

    def empty(self) -> None:
        """Leave what the sequence holds to the prefix cache, and keep its place."""
        if self._sequence is not None and not self._sequence.closed:
            self._parked = self._held
            self._sequence.assign([])

    @property
    def _held(self) -> list[int]:
        """The tokens of the sequence, or of the one before it if nothing is evaluated yet."""
        return list(self._sequence or ()) or self._parked

    def _open(self, request: Request) -> Generator[Signal, None, TokenSequence]:
        """Return the open sequence; one that was just opened holds nothing yet."""
        self._check_open()
        sequence = self._sequence
        if sequence is None or sequence.closed:
            sequence = yield from self._llm.chats.room(request, self._llm.context.sequence, keep=self)
            self._sequence = sequence
        self._llm.chats.use(self)
        return sequence

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("this Chat is closed")

    def close(self) -> None:
        """Give the place in the context back; what was evaluated stays cached while there is room."""
        self._is_closed = True
        if self._sequence is not None:
            self._sequence.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<Chat: closed>" if self._is_closed else f"<Chat of {len(self._messages)} messages>"


def _said(message: object) -> list[dict[str, Any]]:
    """Return the messages that a turn begins with."""
    if isinstance(message, str):
        return [{"role": "user", "content": message}]
    if isinstance(message, Mapping):
        return [dict(message)]
    if isinstance(message, list | tuple) and all(isinstance(one, Mapping) for one in message):
        return [dict(one) for one in message]
    raise TypeError(f"message must be a str, a dict or a list of dicts, not {what(message)}")


def read_chat(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Return the messages, tools and template that `Chat.save` wrote; raise `StateError` if it did not."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StateError(f"{path} is no saved chat ({error})") from None
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise StateError(f"{path} is no saved chat: its format is not {_FORMAT!r}")
    if data.get("version") != _VERSION:
        raise StateError(f"{path} was saved by another version: {data.get('version')!r}, not {_VERSION}")
    messages, tools, template = data.get("messages"), data.get("tools"), data.get("template")
    if (
        not isinstance(messages, list)
        or not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages)
        or not isinstance(tools, list)
        or not isinstance(template, str)
    ):
        raise StateError(f"{path} is damaged: messages, tools or template are not what they should be")
    return messages, tools, template


def respelled(tokenizer: Tokenizer, old: list[int], new: list[int]) -> list[int]:
    """Return `new` with as many tokens of `old` at its beginning as spell the same text.

    A model may write a word with other tokens than the tokenizer would. Special tokens equal only themselves.
    """
    special = {token.id for token in tokenizer.special_tokens}
    i = j = 0
    while True:
        n = _common(old[i:], new[j:])
        i, j = i + n, j + n
        old_text, old_ends = _spelled(tokenizer, old[i:], special)
        new_text, new_ends = _spelled(tokenizer, new[j:], special)
        n_same = len(os.path.commonprefix([old_text, new_text]))
        shared = max((end for end in old_ends.keys() & new_ends.keys() if end <= n_same), default=0)
        if not shared:
            return old[:i] + new[j:]
        i, j = i + old_ends[shared], j + new_ends[shared]


def _spelled(tokenizer: Tokenizer, ids: list[int], special: set[int]) -> tuple[bytes, dict[int, int]]:
    """Return the text up to the first special token, and how many tokens spell so many bytes of it."""
    text, ends = bytearray(), dict[int, int]()
    for count, token in enumerate(ids, 1):
        if token in special:
            break
        text += tokenizer.piece(token)
        ends[len(text)] = count
    return bytes(text), ends


def _common(one: list[int], other: list[int]) -> int:
    """Return how many tokens at the beginning are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _n_turns(messages: list[dict[str, Any]]) -> int:
    return sum(message["role"] == "user" for message in messages)


def _without_oldest_turn(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Return the messages without the first turn after the system prompt; None if the last turn is all there is."""
    users = [at for at, message in enumerate(messages) if message["role"] == "user"]
    head = next((at for at, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)
    later = [at for at in users if at > head]
    return messages[:head] + messages[later[0] :] if later else None
