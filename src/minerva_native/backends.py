"""Engines behind one protocol: this process's `LLM`, or a server that speaks OpenAI's API.

    with connect("model.gguf") as backend:                  # or connect("http://127.0.0.1:8080/v1")
        request = BackendRequest([{"role": "user", "content": "Hello"}], temperature=0)
        for chunk in backend.stream(request):               # or async for
            print(chunk.text, end="")
        print(backend.stream(request).complete().text)      # or await ....acomplete()

A backend's one method is `stream`; `ChunkStream` is what it returns. What a server sends is read by `wire`.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import math
import os
import random
import re
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Collection, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar
from urllib.parse import urlsplit

from minerva_native import (
    LLM,
    BackendError,
    BackendRequest,
    Cancelled,
    Chunk,
    ChunkStream,
    MinervaError,
    Model,
    RequestOptions,
)

from . import wire
from ._arguments import integer, many, number, what

if TYPE_CHECKING:
    import openai

T = TypeVar("T")

_logger = logging.getLogger("minerva_native")

_LOOK_SECONDS = 0.02  # how often a cancel token is looked at while nothing comes

_CONNECT_SECONDS = 5.0  # after which a server that does not answer at all is not there

_USAGE_SECONDS = 2.0  # how long to wait for the end of a stream after the end of the answer

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0  # seconds before the first retry, which double from one to the next

_LONGEST_RETRY_AFTER = 60.0  # seconds; a server that wants more gets no retry

_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/.*)?")

_MOST_BYTES = 1 << 16  # of an answer that is no stream

_HEADERS = frozenset(
    {
        *("host", "accept", "accept-encoding", "connection", "content-type", "content-length", "user-agent"),
        "x-stainless-raw-response",  # by which the client tells its own requests apart
    }
)

_NO_STREAMS = ("application/json", "text/html", "text/plain")


class Backend(Protocol):
    """What answers requests."""

    def stream(self, request: BackendRequest) -> ChunkStream:
        """Return the pieces of an answer.

        Raises:
            TypeError, ValueError: the backend cannot do what an option asks for.

        Reading the stream raises `BackendError`, what `LLM` raises, or `Cancelled` if the request was stopped before
        the first token. Later, the `finish_reason` of its last chunk is "cancelled".
        """
        ...


class NativeBackend:
    """An `LLM` of this process as a backend. A context manager; it closes what it has opened.

    Args:
        llm: an `LLM`, or what one is made of: the path of a GGUF file, or a `Model`.
        options: of `LLM`, if `llm` is none.

    Raises what `LLM` does.
    """

    def __init__(self, llm: LLM | Model | str | os.PathLike[str], **options: Any):
        self._is_owner = not isinstance(llm, LLM)
        if isinstance(llm, LLM):
            if options:
                raise TypeError(f"{', '.join(options)}: the LLM is made already, so give that to LLM")
            self.llm = llm
        else:
            self.llm = LLM(llm, **options)

    def stream(self, request: BackendRequest) -> ChunkStream:
        """Return the pieces of an answer: see `Backend.stream`. No option is refused."""
        llm, options = self.llm, _checked(request).options
        prompt = list(request.prompt) if isinstance(request.prompt, tuple) else request.prompt
        if prompt is not None:
            return ChunkStream(
                request,
                lambda: llm.astream(prompt, **options),
                lambda: llm.stream(prompt, **options),
                model=lambda: llm.model.path.name,
            )
        messages, tools = request.messages or (), request.tools or None
        return ChunkStream(
            request,
            lambda: llm.achat_completion_stream(messages, tools, **options),
            lambda: llm.chat_completion(messages, tools, stream=True, **options),
            model=lambda: llm.model.path.name,
        )

    def close(self) -> None:
        """Close the `LLM`, if this has made it."""
        if self._is_owner:
            self.llm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class OpenAIBackend:
    """A server that speaks OpenAI's API: vLLM, Ollama, LM Studio, llama-server. Needs the extra `openai`.

    Each request has a connection of its own, so a backend may be used from any thread and event loop. Nothing goes to
    the server but the request, the key and the name of the client; no key, address or header is taken from the
    environment. On loopback no proxy is asked, and redirects are not followed.

    A request that fails before the first piece of its answer is made again if that may help: the connection was refused
    or cut, or the status is 408, 425, 429 or 5xx (but 501). A timeout is not retried, as the server may still work on
    the request.

    Args:
        base_url: where the API begins, such as "http://127.0.0.1:8080/v1".
        model: the model's name; by default the first that the server names.
        api_key: sent as a bearer token.
        timeout: seconds for which the server may be silent, before the first token and between two. The time for a
            whole request is its own `timeout`.
        retries: how often a request is made again, after 0.5 s, 1 s, 2 s, ... or when the server says (`Retry-After`,
            at most 60 s).
        accepts: names of options beyond OpenAI's API that this server takes under the same name, such as `top_k`,
            `min_p` or `chat_template_kwargs`. Other servers ignore them, so they are refused by default.

    Raises:
        TypeError, ValueError: an argument is wrong.
        MinervaError: the `openai` client is not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        retries: int = 2,
        accepts: Collection[str] = (),
    ):
        self.base_url = _read_url(base_url)
        for name, value in (("model", model), ("api_key", api_key)):
            if value is not None and not (isinstance(value, str) and value):
                raise TypeError(f"{name} must be a str that is not empty, or None, not {what(value)}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("api_key has a character that no header can have")
        self.model, self._api_key = model, api_key
        self.timeout = number("timeout", timeout)
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout}")
        self.retries = integer("retries", retries, 0)
        if isinstance(accepts, str):
            raise TypeError("accepts must be a list of names, not a str")
        self.accepts = frozenset(map(str, many("accepts", accepts)))
        if unknown := sorted(self.accepts - wire.EXTENSIONS):
            raise ValueError(f"accepts cannot have {unknown[0]!r}: only {', '.join(sorted(wire.EXTENSIONS))}")
        self._openai, self._httpx = _client_library()
        self._is_loopback = _is_loopback(urlsplit(self.base_url).hostname or "")
        # Certificates take a while to load, and are needed for HTTPS alone.
        is_plain = urlsplit(self.base_url).scheme == "http"
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if is_plain else ssl.create_default_context()
        self._client().chat.completions  # noqa: B018 - it imports at first use, which would block an event loop

    def stream(self, request: BackendRequest) -> ChunkStream:
        """Return the pieces of an answer: see `Backend.stream`.

        `usage` is None if the server gives none. `finish_reason` is "end" for a stop string as well, unless the server
        tells which it was, as vLLM does. `timings` are measured here: `first_token` and `total`.

        Raises:
            ValueError: OpenAI's API has nothing like an option, and it is not in `accepts`.
        """
        _checked(request)
        fields = wire.body(
            request.messages, request.prompt, request.tools, request.options, request.checked, self.accepts
        )
        return ChunkStream(request, lambda: self._pieces(request, fields), model=lambda: self.model or "")

    def close(self) -> None:
        """Do nothing: connections end with their requests."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<OpenAIBackend {self.base_url}: {self.model or 'its first model'}>"

    async def _pieces(self, request: BackendRequest, fields: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
        """Make a request, again if that may help, and yield the pieces of its answer."""
        limits, started, n_failed = _Limits(request.checked), time.perf_counter(), 0
        while True:
            answer, status = wire.Answer(request.checked, started), None
            try:
                async with contextlib.AsyncExitStack() as stack:
                    response = await self._open(stack, limits, fields)
                    status = response.status_code
                    events = await stack.enter_async_context(
                        contextlib.aclosing(self._events(response, limits, answer))
                    )
                    async for data in events:
                        for chunk in answer.add(data):
                            yield chunk
                yield answer.end()
                return
            except _Stopped:
                if not (answer.has_begun or answer.is_finished):
                    raise limits.cancelled() from None
                yield answer.end() if answer.is_finished else answer.cancelled()
                return
            except (BackendError, self._openai.OpenAIError, self._httpx.HTTPError) as error:
                failure, pause = self._failure(error, status)
                n_failed += 1
                if answer.has_begun or n_failed > self.retries or pause is None:
                    raise failure from (None if failure is error else error)
                pause = pause or _pause(n_failed)
                _logger.warning("%s: %s; trying again in %.1f s", self.base_url, failure, pause)
            try:
                await limits.wait(asyncio.sleep(pause))
            except _Stopped:
                raise limits.cancelled() from None

    async def _open(self, stack: contextlib.AsyncExitStack, limits: "_Limits", fields: dict[str, Any]) -> Any:
        """Return a response that is a stream of events; `stack` closes it, and its connection."""
        client = await stack.enter_async_context(self._client())
        if self.model is None:
            self.model = await limits.wait(_first_model(client))
        api = client.completions if "prompt" in fields else client.chat.completions
        named = {name: fields[name] for name in ("prompt", "messages", "stream") if name in fields}
        others = {name: value for name, value in fields.items() if name not in named}
        call = api.with_streaming_response.create(model=self.model, **named, extra_body=others)
        response = await limits.wait(stack.enter_async_context(call))
        if response.headers.get("content-type", "").startswith(_NO_STREAMS):
            raise await limits.wait(_no_stream(response))
        return response

    def _client(self) -> "openai.AsyncOpenAI":
        client: openai.AsyncOpenAI = self._openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self._api_key or "none",  # which `_keep_to_ourselves` takes out
            max_retries=0,
            timeout=self._openai.Timeout(self.timeout, connect=min(self.timeout, _CONNECT_SECONDS)),
            http_client=self._openai.DefaultAsyncHttpxClient(
                verify=self._tls,
                trust_env=not self._is_loopback,
                follow_redirects=False,
                event_hooks={"request": [self._keep_to_ourselves]},
            ),
        )
        return client

    async def _keep_to_ourselves(self, request: Any) -> None:
        """Take out of a request what the client found in the environment or says about this machine."""
        for name in set(request.headers) - _HEADERS:
            del request.headers[name]
        if self._api_key is not None:
            request.headers["authorization"] = f"Bearer {self._api_key}"

    async def _events(self, response: Any, limits: "_Limits", answer: wire.Answer) -> AsyncGenerator[str, None]:
        """Yield the data of each event, up to the end of the stream."""
        events, pieces = wire.Events(), response.iter_bytes()
        try:
            while True:
                # An answer that is finished lacks its usage at most, and not every server closes the stream.
                longest = _USAGE_SECONDS if answer.is_finished else None
                piece = await limits.wait(anext(pieces, None), longest)
                for data in events.flush() if piece is None else events.feed(piece):
                    if data.startswith("[DONE]"):
                        return
                    yield data
                if piece is None:
                    if answer.is_finished:
                        return
                    raise self._httpx.RemoteProtocolError("the stream ended in the middle of the answer")
        except (self._httpx.HTTPError, TimeoutError):
            if not answer.is_finished:
                raise

    def _failure(self, error: Exception, status: int | None) -> tuple[BackendError, float | None]:
        """Return what went wrong after a status was received, and whether to try again.

        That is in how many seconds; 0 if the server does not say, None for not at all.
        """
        openai, httpx = self._openai, self._httpx
        if isinstance(error, openai.APITimeoutError | httpx.TimeoutException):
            silent = f"the server at {self.base_url} was silent for its timeout of {self.timeout:g} s"
            return BackendError(silent, status=status), None
        if isinstance(error, openai.APIStatusError):
            failure = wire.failure(error.status_code, error.body)
            if error.status_code == 404 and "/v1" not in self.base_url:
                failure = BackendError(f"{failure} (base_url usually ends with /v1)", status=404)
            pause = wire.retry_after(error.response.headers) or 0.0
            return failure, pause if wire.may_retry(failure.status) and pause <= _LONGEST_RETRY_AFTER else None
        if isinstance(error, BackendError):
            return error, 0.0 if wire.may_retry(error.status) else None
        cause = error.__cause__ or error
        failed = f"the connection to {self.base_url} failed: {wire.shortened(str(cause)) or type(cause).__name__}"
        return BackendError(failed, status=status), 0.0


async def _first_model(client: "openai.AsyncOpenAI") -> str:
    response = await client.models.with_raw_response.list()
    found = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(response.content)
    models = found.get("data") if isinstance(found, dict) else None
    first = models[0] if isinstance(models, list) and models else None
    name = first.get("id") if isinstance(first, dict) else None
    if not isinstance(name, str):
        raise BackendError("the server names no model: give OpenAIBackend(..., model=)", status=200)
    return name


async def _no_stream(response: Any) -> BackendError:
    """Return the error for a response that is none of events."""
    data = bytearray()
    async for piece in response.iter_bytes():
        data += piece
        if len(data) > _MOST_BYTES:
            break
    text = data[:_MOST_BYTES].decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        if isinstance(found, Mapping) and found.get("error"):
            return wire.failure(response.status_code, found)
    return wire.failure(response.status_code, text)


def _pause(n_failed: int) -> float:
    """Return how many seconds to wait after so many failures, a little at random, lest all clients come at once."""
    return min(_LONGEST_PAUSE, math.ldexp(_FIRST_PAUSE, min(n_failed - 1, 10))) * (0.75 + random.random() / 4)


class _Stopped(Exception):
    """A request is cancelled, or its time is up."""


class _Limits:
    """What stops a request: its cancel token and its timeout."""

    def __init__(self, checked: RequestOptions):
        self._cancel, self._timeout = checked.cancel, checked.timeout
        self._deadline = None if checked.timeout is None else time.perf_counter() + checked.timeout

    def check(self) -> None:
        """Raise `_Stopped` if it is to stop."""
        is_late = self._deadline is not None and time.perf_counter() >= self._deadline
        if is_late or (self._cancel is not None and self._cancel.is_set()):
            raise _Stopped

    def cancelled(self) -> Cancelled:
        """Return the error of a request that was stopped before it had a result."""
        if self._deadline is not None and time.perf_counter() >= self._deadline:
            return Cancelled(f"the request was stopped by its timeout of {self._timeout:g} s before the first token")
        return Cancelled("the request was cancelled before the first token")

    async def wait(self, work: Awaitable[T], longest: float | None = None) -> T:
        """Return the result of some work, which is cancelled if the request is to stop.

        Raises:
            _Stopped: it is.
            TimeoutError: it took longer than that many seconds.
        """
        if self._cancel is None and self._deadline is None and longest is None:
            return await work
        task = asyncio.ensure_future(work)
        end = None if longest is None else time.perf_counter() + longest
        try:
            while not task.done():
                self.check()
                if end is not None and time.perf_counter() >= end:
                    raise TimeoutError
                await asyncio.wait({task}, timeout=_LOOK_SECONDS)
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})


def _checked(request: object) -> BackendRequest:
    if not isinstance(request, BackendRequest):
        raise TypeError(f"request must be a BackendRequest, not {what(request)}")
    return request


def _client_library() -> tuple[Any, Any]:
    try:
        import httpx2
        import openai
    except ImportError:
        raise MinervaError("OpenAIBackend needs the openai client: pip install 'minerva-native[openai]'") from None
    return openai, httpx2


def _read_url(url: object) -> str:
    if not isinstance(url, str):
        raise TypeError(f"base_url must be a str, not {what(url)}")
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"base_url must be an address such as http://127.0.0.1:8080/v1, not {url!r}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("base_url must have no user, query or fragment: a key is given as api_key")
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def connect(target: str | os.PathLike[str] | LLM | Model, **options: Any) -> NativeBackend | OpenAIBackend:
    """Return the backend for an address or a model.

    Args:
        target: an address that begins with "http://" or "https://", or what `NativeBackend` takes, as a path.
        options: of `OpenAIBackend`, or of `LLM`.

    Raises what those do, and `ValueError` for an address without its "http://".
    """
    if isinstance(target, str) and target.lower().startswith(("http://", "https://")):
        return OpenAIBackend(target, **options)
    if isinstance(target, str) and _HOST_AND_PORT.fullmatch(target) and not os.path.exists(target):
        raise ValueError(f"{target!r} is no file: if it is a server's address, begin it with http:// or https://")
    return NativeBackend(target, **options)
