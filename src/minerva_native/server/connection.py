"""Connections that cannot be held for ever, over uvicorn's."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .settings import Settings


class Connection(HttpToolsProtocol):
    """A connection whose client may neither dawdle over the head of a request, nor leave a reply unread.

    uvicorn bounds only the time between requests.
    """

    settings = Settings()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._n_head = 0
        if len(self.connections) > self.settings.max_connections:
            transport.abort()
        else:
            self._wait_for_head()

    def _wait_for_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.settings.head_seconds, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._wait_for_head()
        if self._timer is not None:
            self._n_head += len(data)
        super().data_received(data)
        if self._timer is not None and self._n_head > self.settings.max_head_bytes:
            self.transport.abort()

    def on_headers_complete(self) -> None:
        """Begin a request."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._n_head = None, 0
        super().on_headers_complete()

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
        if self._timer is not None:
            self._timer.cancel()
        self._stop_writing()
        super().connection_lost(error)


def connection_class(settings: Settings) -> Any:
    """Return the class of connections with these settings, as uvicorn takes one."""
    return type("Connection", (Connection,), {"settings": settings})
