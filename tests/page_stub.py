"""A server for the built-in page that says what it is told to say, and remembers what it was asked."""

import json
import math
import select
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import minerva_native as mn

PAGE = Path(mn.__file__).parent / "server" / "page"

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}

DEFAULTS = {
    "temperature": 0.800000011920929,  # a float32, as in llama-server's JSON
    "top_k": 40,
    "top_p": 0.949999988079071,
    "min_p": 0.05000000074505806,
    "repeat_penalty": 1.0,
    "seed": 4294967295,
    "max_tokens": -1,
}

Event = dict[str, Any]


class Gate:
    """A stream waits at a gate until it is opened, or until its client has gone."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def open(self) -> None:
        self.opened.set()


class Cut:
    """Here the connection ends."""


@dataclass(frozen=True)
class Refusal:
    """An answer that is no stream."""

    status: int
    message: str
    param: str | None = None


Step = Event | Gate | Cut
Script = list[Step] | Refusal


def piece(text: str, p: float = 1.0, others: Mapping[str, float] | None = None, what: str = "content") -> Event:
    """A chunk with one token of probability `p`; `what` may be "reasoning_content"."""
    alternatives = {text: p, **(others or {})}
    ranked = sorted(alternatives.items(), key=lambda item: -item[1])
    logprobs = {
        "token": text,
        "logprob": math.log(p),
        "bytes": list(text.encode()),
        "top_logprobs": [
            {"token": token, "logprob": math.log(q), "bytes": list(token.encode())} for token, q in ranked
        ],
    }
    choice = {"index": 0, "delta": {what: text}, "logprobs": {"content": [logprobs]}, "finish_reason": None}
    return {"choices": [choice]}


def pieces(text: str, what: str = "content") -> list[Step]:
    """A chunk for each word of a text."""
    return [piece(word, what=what) for word in text.replace(" ", "\0 ").split("\0")]


def end(reason: str = "stop", prompt: int = 20, cached: int = 12, predicted: int = 5) -> list[Step]:
    """What follows the last token."""
    usage = {"prompt_tokens": prompt, "completion_tokens": predicted, "total_tokens": prompt + predicted}
    timings = {
        "prompt_n": prompt - cached,
        "prompt_ms": 80.0,
        "prompt_per_second": 100.0,
        "predicted_n": predicted,
        "predicted_ms": 250.0,
        "predicted_per_second": 20.0,
        "cache_n": cached,
    }
    return [
        {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]},
        {"choices": [], "usage": usage, "timings": timings},
    ]


@dataclass
class Stub:
    """What the server is to do, and what it saw."""

    url: str
    token: str = "sesame-42"
    models: dict[str, dict[str, Any]] = field(default_factory=lambda: {"stories.gguf": DEFAULTS})
    scripts: list[Script] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)  # bodies of chat requests
    abandoned: threading.Event = field(default_factory=threading.Event)  # a client left in the midst of a stream

    def will(self, *scripts: Script) -> None:
        """Answers the next chat requests with these; afterwards each is "Good." and its end."""
        self.scripts.extend(scripts)

    def next_script(self) -> Script:
        return self.scripts.pop(0) if self.scripts else [*pieces("Good."), *end()]


class Handler(BaseHTTPRequestHandler):
    stub: Stub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        if path.path in FILES:
            name, kind = FILES[path.path]
            self.reply(200, (PAGE / name).read_bytes(), kind)
        elif not self.is_allowed():
            return
        elif path.path == "/v1/models":
            self.reply_json(200, {"object": "list", "data": [{"id": name} for name in self.stub.models]})
        elif path.path == "/props":
            [model] = parse_qs(path.query)["model"]
            settings = {"params": self.stub.models[model], "n_ctx": 4096}
            self.reply_json(200, {"default_generation_settings": settings, "model_path": model, "chat_template": ""})
        else:
            self.refuse(Refusal(404, "There is nothing here."))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.is_allowed():
            return
        self.stub.asked.append(body)
        script = self.stub.next_script()
        if isinstance(script, Refusal):
            self.refuse(script)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.play(script)
        except ConnectionError:
            self.stub.abandoned.set()

    def play(self, script: list[Step]) -> None:
        for step in script:
            if isinstance(step, Cut):
                return
            if isinstance(step, Gate):
                self.wait_at(step)
            else:
                self.wfile.write(f"data: {json.dumps(step)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def wait_at(self, gate: Gate) -> None:
        while not gate.opened.wait(0.005):
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and self.connection.recv(1, socket.MSG_PEEK) == b"":
                raise ConnectionResetError("the client has gone")

    def is_allowed(self) -> bool:
        if self.headers["Authorization"] == f"Bearer {self.stub.token}":
            return True
        self.refuse(Refusal(401, "Give the token that was printed at the start."))
        return False

    def refuse(self, refusal: Refusal) -> None:
        error = {"message": refusal.message, "type": "invalid_request_error", "param": refusal.param, "code": None}
        self.reply_json(refusal.status, {"error": error})

    def reply_json(self, status: int, value: object) -> None:
        self.reply(status, json.dumps(value).encode(), "application/json")

    def reply(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", CSP)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def running_stub() -> Iterator[Stub]:
    """A stub on a free port of 127.0.0.1, for as long as the block lasts."""

    class StubHandler(Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), StubHandler)
    server.daemon_threads = True
    stub = StubHandler.stub = Stub(f"http://127.0.0.1:{server.server_port}/")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
