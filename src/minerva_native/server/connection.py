"""Connections that cannot be held for ever, nor be made to fill the memory, over uvicorn's."""

import asyncio
import logging
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .settings import Settings

_AHEAD_BYTES = 256 << 10  # what a client may send before it has the reply to its request: as much as one read returns
_MOST_BEHIND = 512  # requests that wait for the one before them: each takes 5 KB

_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)


class Connection(HttpToolsProtocol):
    """A connection whose client may neither dawdle over a request, nor leave a reply unread, nor send without end.

    uvicorn bounds only the time between requests. It takes trailers for headers, drops the body of a request that
    offers an upgrade, and does not tell a request with others behind it that the client has gone.
    """

    settings = Settings()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        self.logger = logging.getLogger("minerva_native.server")
        transport.set_write_buffer_limits(high=0)  # `pause_writing` as soon as something is left unread
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._served: Any = None  # the request that is answered; those behind it wait in `pipeline`
        self._n_extra = 0  # bytes since the last head or reply that are not the body of the request that is answered
        self._in_head = self._in_message = False
        if len(self.connections) > self.settings.max_connections:
            transport.abort()
        else:
            self._start_timer()

    def _start_timer(self) -> None:
        """Give the client a while to the end of the next head."""
        if self._timer is None:
            self._timer = self.loop.call_later(self.settings.head_seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        if self._served is None:
            self._start_timer()
        self._n_extra += len(data)
        super().data_received(_without_upgrade(data) if not self._in_message else data)
        if self._n_extra > self._most_extra():
            self.transport.abort()

    def _most_extra(self) -> int:
        is_body = self._in_message and not self._in_head
        if is_body and (self._served is None or self._served is self.cycle):
            return self.settings.max_body_bytes  # how chunks are framed, or a body that nobody wants
        return self.settings.max_head_bytes if self._served is None else _AHEAD_BYTES

    def on_message_begin(self) -> None:
        """Begin a head."""
        self._in_head = self._in_message = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. What comes after a body is none."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin a request, or have it wait for the one before it."""
        self._in_head = False
        if len(self.pipeline) >= _MOST_BEHIND:
            raise ValueError("too many requests at once")  # for the parser, which ends
        super().on_headers_complete()
        if self._served is None:
            self._stop_timer()
            self._served, self._n_extra = self.cycle, 0
        else:
            self.flow.resume_reading()  # to see that the client goes

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        super().on_body(body)
        if self._served is self.cycle:
            self._n_extra = max(0, self._n_extra - len(body))
        else:
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        """End a request."""
        self._in_message = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request."""
        self._served = self.pipeline[-1][0] if self.pipeline else None
        self._n_extra = 0
        super().on_response_complete()
        if self._served is None and self._in_message:
            self._start_timer()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, and end."""
        if self._served is not None and self._served.response_started:
            self.transport.abort()
        else:
            super().send_400_response(msg)

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._writing = self.loop.call_later(self.settings.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: it has read."""
        super().resume_writing()
        self._stop_writing()

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def connection_lost(self, error: Exception | None) -> None:
        """End."""
        self._stop_timer()
        self._stop_writing()
        super().connection_lost(error)
        if self._served is not None and not self._served.response_complete:
            self._served.disconnected = True
            self._served.message_event.set()


def _without_upgrade(data: bytes) -> bytes:
    """Return the beginning of a request without the offer of another protocol, which Java's client makes each time."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"", head) + end + rest if b"pgrade" in head else data


def connection_class(settings: Settings) -> Any:
    """Return the class of connections with these settings, as uvicorn takes one."""
    return type("Connection", (Connection,), {"settings": settings})
