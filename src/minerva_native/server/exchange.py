"""A request with its reply, and the end of both if the client goes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar
from urllib.parse import parse_qs

import msgspec

from .bodies import B, read
from .errors import HTTPError, of_engine
from .guard import Access, Gone, Receive, Scope, Send, last, read_body
from .replies import event

T = TypeVar("T")

_JSON = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


as_json = msgspec.json.encode


class Exchange:
    """A request and its reply.

    Attributes:
        access: what the log will say of it.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self._scope, self._receive, self._send = scope, receive, send
        self.access: Access = scope["access"]

    def query(self, name: str) -> str | None:
        """Return a parameter of the URL."""
        values = parse_qs(self._scope.get("query_string", b"").decode("latin-1")).get(name)
        return values[-1] if values else None

    def in_path(self, name: str) -> str:
        """Return a part of the path."""
        return str(self._scope["path_params"][name])

    async def read(self, kind: type[B]) -> tuple[B, dict[str, Any]]:
        """Return the body, and the fields of `SamplingParams` that came with it."""
        return read(await read_body(self._receive), kind)

    async def reply(self, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """Send a reply."""
        length = (b"content-length", str(len(body)).encode())
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        await self._send({"type": "http.response.body", "body": b"" if self.access.method == "HEAD" else body})

    async def json(self, data: Any) -> None:
        """Send JSON."""
        await self.encoded(as_json(data))

    async def encoded(self, data: bytes) -> None:
        """Send what is JSON already."""
        await self.reply(200, data, _JSON)

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what some work returns; stop it as soon as the client has gone.

        Raises:
            Gone: it has.
        """
        task, left = asyncio.ensure_future(work), asyncio.ensure_future(self._left())
        try:
            await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Gone
        finally:
            left.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))

    async def _left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def stream(self, events: AsyncIterator[bytes]) -> None:
        """Send events as they come. What goes wrong before the first one has a status; later it is an event."""
        await self.wait(self._pump(events))

    async def _pump(self, events: AsyncIterator[bytes]) -> None:
        async with contextlib.aclosing(events):  # type: ignore[type-var]
            try:
                first = await anext(events)
            except StopAsyncIteration:
                first = b""
            send = self._send
            await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
            try:
                await send({"type": "http.response.body", "body": first, "more_body": True})
                async for piece in events:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except asyncio.CancelledError:  # the client has gone, or the server ends
                ended = HTTPError(503, "the server ends", code="unavailable")
                await last(send({"type": "http.response.body", "body": event(ended.body)}))
                raise
            except Exception as error:
                failed = of_engine(error)
                self.access.facts["error"] = failed.code or failed.message
                await send({"type": "http.response.body", "body": event(failed.body)})
                if failed.status >= 500:
                    raise
            else:
                await send({"type": "http.response.body", "body": b""})


Handler = Callable[[Exchange], Awaitable[None]]


class Endpoint:
    """An ASGI application that answers one method of one path."""

    def __init__(self, method: str, route: str, handler: Handler):
        self._methods = (method, "HEAD") if method == "GET" else (method,)
        self._route, self._handler = route, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        scope["access"].route = self._route
        if scope["method"] not in self._methods:
            allowed = ", ".join(self._methods)
            raise HTTPError(405, f"the method must be {allowed}", headers={"allow": allowed})
        await self._handler(Exchange(scope, receive, send))
