"""A server of OpenAI's API on loopback whose every byte is a test's: it says what real servers say, right or wrong."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

Answer = Callable[["Connection"], None]
"""What is done with a connection once its request was read."""


@dataclass
class Seen:
    """A request that came in."""

    path: str
    headers: dict[str, str]
    body: Any
    at: float = field(default_factory=time.perf_counter)


class Connection:
    """A connection, after its request."""

    def __init__(self, sock: socket.socket, stopping: threading.Event):
        self._socket, self._stopping = sock, stopping

    def head(self, status: int = 200, kind: str = "text/event-stream", **headers: str) -> None:
        """Send the head of a response that comes in chunks."""
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", "Transfer-Encoding: chunked", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode())

    def send(self, data: str | bytes) -> None:
        data = data.encode() if isinstance(data, str) else data
        self._socket.sendall(b"%x\r\n%b\r\n" % (len(data), data))

    def event(self, value: Any) -> None:
        self.send(f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n")

    def end(self) -> None:
        self._socket.sendall(b"0\r\n\r\n")

    def wait_until_closed(self, seconds: float = 10) -> bool:
        """Return whether the client has closed the connection."""
        self._socket.settimeout(0.02)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end and not self._stopping.is_set():
            try:
                return self._socket.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                return True
        return False


class StubServer:
    """Answers one request after another with `answers`; the last of them answers all that follow.

    Attributes:
        seen: the requests.
        vanished: is released for each client that closed its connection while `stall` waited for that.
    """

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.seen: list[Seen] = []
        self.vanished = threading.Semaphore(0)
        self._stopping = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self._threads = [threading.Thread(target=self._accept)]
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    def _accept(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                sock, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(sock,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(10)
            file = sock.makefile("rb")
            if not (start := file.readline()):
                return  # the client has changed its mind
            path = start.split()[1].decode()
            headers = {}
            while line := file.readline().strip():
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            body = file.read(int(headers.get("content-length", 0)))
            self.seen.append(Seen(path, headers, json.loads(body) if body else None))
            self.answers[min(len(self.seen), len(self.answers)) - 1](Connection(sock, self._stopping))

    def stall(self, connection: Connection) -> None:
        """Say nothing more, until the client closes the connection."""
        if connection.wait_until_closed():
            self.vanished.release()

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()


def piece(content: str | None = None, finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    """Return an event as a chat's answer has it."""
    delta = delta if content is None else {"content": content, **delta}
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "stub", "choices": [choice]}


USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 4},
    },
}

STORY = (piece("", role="assistant"), piece("Once"), piece(" upon"), piece(None, "stop"), USAGE, "[DONE]")


def events(*values: Any) -> Answer:
    """Return an answer of these events: JSON values, or texts as they are."""

    def answer(connection: Connection) -> None:
        connection.head()
        for value in values:
            connection.event(value)
        connection.end()

    return answer


def raw(data: bytes, size: int | None = None) -> Answer:
    """Return an answer of these bytes, `size` at a time."""

    def answer(connection: Connection) -> None:
        connection.head()
        for start in range(0, len(data), size or len(data)):
            connection.send(data[start : start + (size or len(data))])
        connection.end()

    return answer


def cut(*values: Any) -> Answer:
    """Return an answer of these events, in the middle of which the connection is closed."""

    def answer(connection: Connection) -> None:
        connection.head()
        for value in values:
            connection.event(value)

    return answer


def status(code: int, body: str, kind: str = "application/json", **headers: str) -> Answer:
    """Return an answer that is an error."""

    def answer(connection: Connection) -> None:
        connection.head(code, kind, **headers)
        connection.send(body)
        connection.end()

    return answer


def hang_up(connection: Connection) -> None:
    """Close the connection without a word."""


@contextlib.contextmanager
def stub_server() -> Iterator[StubServer]:
    with StubServer() as server:
        yield server
