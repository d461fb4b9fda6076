"""Who may ask, and what a request may be like: the middleware around all endpoints."""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .errors import HTTPError
from .settings import Settings

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_logger = logging.getLogger("minerva_native.server")

OPEN = frozenset({"/", "/page.js", "/page.css", "/favicon.svg", "/health", "/v1/health", "/openapi.json"})
"""Paths that say nothing about models or people, and need no token."""

_HOST = re.compile(r"([a-zA-Z0-9._-]+|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?")

_LAST_SECONDS = 0.5

_ONCE = frozenset({b"host", b"origin", b"authorization"})

_SAFETY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Gone(Exception):
    """The client has closed its connection."""


@dataclass
class Access:
    """A line of the access log.

    Attributes:
        method: of the request.
        route: which endpoint, or None for a path that is none: what clients make up is not logged.
        status: of the reply; 499 if the client has gone before it, as others call that.
        seconds: from the request to the end of the reply.
        facts: more, such as the model and the counts of tokens.
    """

    method: str
    route: str | None = None
    status: int = 0
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


class Guard:
    """Lets in who has a token, by a name of this machine, and not from another page in a browser.

    It bounds the bodies of requests, answers errors, and logs a line for each request.
    """

    def __init__(self, app: App, settings: Settings, on_access: Callable[[Access], None]):
        self._app, self._settings, self._on_access = app, settings, on_access
        self._keys = [key.encode() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        access = scope["access"] = Access(scope["method"])
        begun, headers = time.perf_counter(), dict(scope["headers"])
        more = list(_SAFETY)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                access.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        try:
            self._check_head(scope["headers"])
            self._check_host(headers)
            origin = self._checked_origin(headers, scope["scheme"])
            if origin is not None:
                more += [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
            if origin is not None and scope["method"] == "OPTIONS":
                access.route = "preflight"
                await _reply(answer, 204, b"", _PREFLIGHT)
                return
            self._check_key(scope["path"], headers)
            self._check_length(headers)
            await self._app(scope, self._bounded(receive), answer)
        except HTTPError as error:
            if access.status == 0:
                more += [(name.encode(), value.encode()) for name, value in error.headers.items()]
                await _reply(answer, error.status, json.dumps(error.body).encode(), _JSON)
        except Gone:
            access.status = access.status or 499
        except asyncio.CancelledError:  # the server ends
            if access.status == 0:
                ended = HTTPError(503, "the server ends", code="unavailable")
                await last(_reply(answer, ended.status, json.dumps(ended.body).encode(), _JSON))
        except Exception as error:
            _logger.error("a request failed: %s", type(error).__name__)
            _logger.debug("of this:", exc_info=True)
            if access.status == 0:
                failed = HTTPError(500, "the server failed: its log says why", code="internal_error")
                await _reply(answer, failed.status, json.dumps(failed.body).encode(), _JSON)
        finally:
            access.seconds = time.perf_counter() - begun
            self._on_access(access)

    def _check_head(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Refuse a head that is too large, or says twice what is to be checked."""
        if sum(len(name) + len(value) + 4 for name, value in headers) > self._settings.max_head_bytes:
            most = self._settings.max_head_bytes
            raise HTTPError(431, f"the head has more than {most:,} bytes", headers={"connection": "close"})
        names = [name for name, _ in headers if name in _ONCE]
        if len(names) > len(set(names)):
            raise HTTPError(400, "a header is there twice")

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """Refuse a name that is not this machine's: by one, a page could make a browser take this server for its own.

        An address is nothing that others can have point here.
        """
        if self._settings.hosts is None:
            return
        given = _HOST.fullmatch(headers.get(b"host", b"").decode("latin-1"))
        name = "" if given is None else given[1].strip("[]").lower().removesuffix(".")
        if name in ("localhost", *(host.lower() for host in self._settings.hosts)):
            return
        try:
            ipaddress.ip_address(name)
        except ValueError:
            raise HTTPError(
                403, "the Host header names another machine: --allowed-host admits a name", code="wrong_host"
            ) from None

    def _checked_origin(self, headers: dict[bytes, bytes], scheme: str) -> bytes | None:
        """Return the origin of another page that is allowed; raise if it is not."""
        origin = headers.get(b"origin")
        if origin is None or origin == f"{scheme}://".encode() + headers.get(b"host", b""):
            return None
        if origin.decode("latin-1") in self._settings.cors_origins:
            return origin
        raise HTTPError(
            403,
            "pages of other origins may not use this server, unless --cors-origin admits theirs",
            code="wrong_origin",
        )

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self._keys or path in OPEN:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        given = given.strip() if scheme.lower() == b"bearer" else b""
        matches = [hmac.compare_digest(given, key) for key in self._keys]  # all of them, for the time to be the same
        if not any(matches):
            said = "the token is wrong" if given else "this server needs a token: Authorization: Bearer TOKEN"
            raise HTTPError(401, said, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _check_length(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._settings.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> HTTPError:
        most = self._settings.max_body_bytes
        return HTTPError(413, f"the body has more than {most:,} bytes")

    def _bounded(self, receive: Receive) -> Receive:
        """Return a `receive` that bounds how large a body is, and how long it takes."""
        deadline, n_bytes, is_whole = time.monotonic() + self._settings.body_seconds, 0, False

        async def bounded() -> Message:
            nonlocal n_bytes, is_whole
            if is_whole:  # what comes is the client's leaving
                return await receive()
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPError(408, "the body took too long", headers={"connection": "close"}) from None
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._settings.max_body_bytes:
                raise self._too_large()
            is_whole = not message.get("more_body", False)
            return message

        return bounded


_JSON = [(b"content-type", b"application/json")]
_PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-allow-headers", b"authorization, *"),
    (b"access-control-max-age", b"600"),
]


async def _reply(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    length = [(b"content-length", str(len(body)).encode())] if status != 204 else []
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *length]})
    await send({"type": "http.response.body", "body": body})


async def last(work: Awaitable[None]) -> None:
    """Send the last words of a request that is cancelled, unless the client does not read them at once."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_SECONDS):
            await work


async def read_body(receive: Receive) -> bytes:
    """Return the body of a request.

    Raises:
        Gone: the client has gone before it was there.
    """
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
