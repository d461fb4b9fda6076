"""What is asked of a backend, and what it gives back: `BackendRequest` and `ChunkStream`.

A backend writes its answer once, as an asynchronous generator of chunks. `ChunkStream` derives from it what blocks, and
the whole completion.
"""

import asyncio
import atexit
import contextlib
import operator
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError as FutureCancelledError
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from minerva_native import Chunk, Completion, RequestOptions, SamplingParams, Timings, Tool, Usage, read_tools

from ._arguments import many, what
from .wire import SAMPLING

_CLOSE_SECONDS = 5.0  # how long `ChunkStream.close` waits for the connection to be closed


# Requests


@dataclass(frozen=True, init=False)
class BackendRequest:
    """What is asked of a backend: the arguments of `LLM.chat_completion`, or of `LLM.stream` with a `prompt`.

    What is not given is the backend's default: for `LLM` the model's own, for a server the server's own.

    Args:
        messages: dicts as OpenAI's API has them.
        tools: what the model may call: functions with type hints, or descriptions (dicts) as in OpenAI's API.
        prompt: a text or token ids to continue, instead of messages.
        options: the fields of `RequestOptions` and `SamplingParams`. A backend refuses those that it cannot keep.

    Attributes:
        messages: the messages, or None.
        prompt: a text, a tuple of token ids, or None.
        tools: the tools, as `Tool`.
        options: those that were given.
        checked: all options, with the defaults of this package.

    Raises:
        TypeError, ValueError: an argument is unknown or wrong.
        ConstraintError: a `response_format` or `constraint` cannot be used.
    """

    messages: tuple[dict[str, Any], ...] | None
    tools: tuple[Tool, ...]
    prompt: str | tuple[int, ...] | None
    options: Mapping[str, Any]
    checked: RequestOptions = field(repr=False, compare=False)

    def __init__(
        self,
        messages: Iterable[Mapping[str, Any]] | None = None,
        tools: Iterable[Any] | None = None,
        prompt: str | Iterable[int] | None = None,
        **options: Any,
    ):
        if (messages is None) == (prompt is None):
            raise TypeError("a request has either messages or a prompt")
        values = {
            "messages": None if messages is None else _read_messages(messages),
            "tools": () if tools is None else read_tools(tools),
            "prompt": None if prompt is None else _read_prompt(prompt),
            "options": dict(options),
            "checked": _check(options),
        }
        if values["tools"] and messages is None:
            raise ValueError("tools have no place beside a prompt: give messages")
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _check(options: Mapping[str, Any]) -> RequestOptions:
    own = {name: value for name, value in options.items() if name not in SAMPLING}
    sampling = {name: value for name, value in options.items() if name in SAMPLING}
    unknown = sorted(own.keys() - RequestOptions.__dataclass_fields__.keys())
    if unknown:
        raise TypeError(f"BackendRequest() has no argument {unknown[0]!r}: see RequestOptions and SamplingParams")
    if "sampling" in own and sampling:
        raise TypeError(f"sampling= is given, so that {', '.join(sampling)} would be ignored: give one or the other")
    return RequestOptions(**{"sampling": SamplingParams(**sampling), **own})


def _read_messages(messages: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    if isinstance(messages, str | bytes | Mapping):
        raise TypeError(f"messages must be a list of dicts, not {what(messages)}")
    read = tuple(many("messages", messages))
    for message in read:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError("messages must be dicts with a 'role' and a 'content'")
    if not read:
        raise ValueError("messages must be at least one")
    return tuple(map(dict, read))


def _read_prompt(prompt: str | Iterable[int]) -> str | tuple[int, ...]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, bytes | Mapping):
        raise TypeError(f"prompt must be a str or token ids, not {what(prompt)}")
    try:
        ids = tuple(operator.index(token) for token in many("prompt", prompt))
    except TypeError as error:
        raise TypeError(f"prompt must be a str or token ids: {error}") from None
    if any(token < 0 for token in ids):
        raise ValueError("prompt has a negative token id")
    return ids


# Streams


class AsyncPieces(Protocol):
    """What an asynchronous generator of chunks is: an iterator that can be closed."""

    async def __anext__(self) -> Chunk:
        """Return the next chunk."""
        ...

    async def aclose(self) -> None:
        """Stop."""


class Pieces(Protocol):
    """The same for a caller that waits."""

    def __next__(self) -> Chunk:
        """Return the next chunk."""
        ...

    def close(self) -> None:
        """Stop."""


class ChunkStream(Iterator[Chunk], AsyncIterator[Chunk]):
    """The pieces of an answer, for `for` or for `async for`. It begins with the first piece that is asked for.

    Closing it, dropping it or cancelling the task that reads it stops the request and closes its connection.
    A context manager of both kinds.

    Args:
        request: what was asked.
        pieces: begins the answer. Its last chunk has a `finish_reason`.
        blocking: the same for callers that wait. By default they have `pieces` run on an event loop in a thread that
            this process keeps for it, so that they can be interrupted wherever it waits.
        model: returns the model's name, once it is known.

    Attributes:
        request: what was asked.
    """

    def __init__(
        self,
        request: BackendRequest,
        pieces: Callable[[], AsyncPieces],
        blocking: Callable[[], Pieces] | None = None,
        model: Callable[[], str] = str,
    ):
        self.request = request
        self._begin, self._begin_blocking, self._model = pieces, blocking, model
        self._pieces: AsyncPieces | None = None
        self._blocking: Pieces | None = None
        self._is_closed = False

    @property
    def model(self) -> str:
        """The model's name; empty until it is known."""
        return self._model()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if self._is_closed:
            raise StopIteration
        if self._blocking is None:
            if self._pieces is not None:
                raise TypeError("this stream is read with `async for`: make another one for `for`")
            begin = self._begin_blocking
            self._blocking = _OnLoop(self._begin()) if begin is None else begin()
        try:
            return next(self._blocking)
        except BaseException:  # Ctrl-C among others
            self.close()
            raise

    def close(self) -> None:
        """Stop it; for callers that wait."""
        self._is_closed = True
        if self._blocking is not None:
            self._blocking.close()

    def complete(self) -> Completion:
        """Read it to its end, and return the whole; raises what reading raises."""
        whole = _Whole()
        with self:
            for chunk in self:
                whole.add(chunk)
        return whole.completion(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if self._is_closed:
            raise StopAsyncIteration
        if self._blocking is not None:
            raise TypeError("this stream is read with `for`: make another one for `async for`")
        if self._pieces is None:
            self._pieces = self._begin()
        try:
            return await self._pieces.__anext__()
        except BaseException:
            self._is_closed = True
            raise

    async def aclose(self) -> None:
        """Stop it; for coroutines."""
        self._is_closed = True
        if self._pieces is not None:
            await self._pieces.aclose()

    async def acomplete(self) -> Completion:
        """Do what `complete` does, without blocking the event loop."""
        whole = _Whole()
        async with self:
            async for chunk in self:
                whole.add(chunk)
        return whole.completion(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()


class _Whole:
    """Puts chunks together."""

    def __init__(self) -> None:
        self._chunks: list[Chunk] = []

    def add(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)

    def completion(self, stream: ChunkStream) -> Completion:
        chunks, checked = self._chunks, stream.request.checked
        last = chunks[-1] if chunks else Chunk(finish_reason="cancelled")
        tokens = [chunk.token for chunk in chunks if chunk.token is not None]
        entries = [one for chunk in chunks for one in (*chunk.echoed, chunk.token_logprob) if one is not None]
        return Completion(
            text="".join(chunk.text for chunk in chunks),
            reasoning="".join(chunk.reasoning for chunk in chunks),
            tool_calls=tuple(call for chunk in chunks for call in chunk.tool_calls),
            tool_error="; ".join(chunk.tool_error for chunk in chunks if chunk.tool_error),
            tokens=tokens,
            finish_reason=last.finish_reason or "cancelled",
            context_full=last.context_full,
            logprobs=entries if checked.logprobs else None,
            usage=last.usage or Usage(),
            timings=last.timings or Timings(),
            dropped_turns=last.dropped_turns,
            model=stream.model,
            created=int(time.time()),
            is_chat=stream.request.messages is not None,
            constraint=checked.constraint,
            is_complete=checked.constraint is None or last.finish_reason == "end",
        )


class _OnLoop:
    """The pieces of an asynchronous generator for a caller that waits, from an event loop in another thread."""

    def __init__(self, pieces: AsyncPieces):
        self._pieces, self._loop = pieces, _background.loop()
        self._task: asyncio.Task[Any] | None = None

    def __next__(self) -> Chunk:
        future = asyncio.run_coroutine_threadsafe(self._next(), self._loop)
        try:
            chunk = future.result()
        except FutureCancelledError:  # another thread has closed it
            chunk = None
        if chunk is None:
            raise StopIteration
        return chunk

    async def _next(self) -> Chunk | None:
        self._task = asyncio.current_task()
        try:
            return await self._pieces.__anext__()
        except StopAsyncIteration:
            return None
        finally:
            self._task = None

    def close(self) -> None:
        with contextlib.suppress(TimeoutError, FutureCancelledError):
            asyncio.run_coroutine_threadsafe(self._aclose(), self._loop).result(_CLOSE_SECONDS)

    async def _aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._pieces.aclose()


class _Background:
    """An event loop in a daemon thread, from the first time that one is needed."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin again: a child of a fork has neither the thread nor who holds the lock."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="minerva_native backends", daemon=True
                )
                self._thread.start()
            return self._loop

    def stop(self) -> None:
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_SECONDS)


_background = _Background()
os.register_at_fork(after_in_child=_background.forget)
atexit.register(lambda: _background.stop())
