"""What clients may do to a server: nothing that others notice.

By hand, `MINERVA_ABUSE_CLIENTS=1000` has as many clients come and vanish as it says, in three rounds, and
`MINERVA_ABUSE_REQUESTS=5000` sends as many requests with wrong fields.
"""

import concurrent.futures
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minerva_native as mn

CLIENTS = int(os.environ.get("MINERVA_ABUSE_CLIENTS", "150"))
SECONDS = 20.0  # how long anything may take before the test fails
TOKEN = "a-token-of-the-test"
SHORT = {
    "head_seconds": 0.4,
    "body_seconds": 0.5,
    "write_seconds": 0.4,
    "keep_alive_seconds": 0.3,
    "grace_seconds": 0.5,
    "max_body_bytes": 1 << 20,
    "max_connections": 40,
}
HOST = b"Host: localhost\r\n"
CLOSE = b"Connection: close\r\n"
LONG = {"prompt": "Once upon a time", "max_tokens": 3000, "ignore_eos": True}
BRIEF = {"prompt": "Once", "max_tokens": 1}


class Victim:
    """A server in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path, port: int):
        self.process, self.log, self.port = process, log, port
        self._asking = threading.Lock()

    def held(self) -> dict[str, Any]:
        """Return what it holds: see `victim.py`."""
        assert self.process.stdout is not None
        with self._asking:
            self.process.send_signal(signal.SIGUSR1)
            held: dict[str, Any] = json.loads(self.process.stdout.readline())
        return held

    def until(self, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for it to hold something, and return that."""
        end = time.monotonic() + SECONDS
        while not is_so(held := self.held()):
            assert time.monotonic() < end, held
            time.sleep(0.02)
        return held

    def idle(self) -> dict[str, Any]:
        """Wait until no request is left."""
        return self.until(lambda held: not held["users"] and not held["cells"] and not held["waiting"])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def send(self, data: bytes) -> socket.socket:
        client = self.connect()
        client.sendall(data)
        return client

    def tell(self, data: bytes) -> bytes:
        """Send something, and return everything that comes until the server closes."""
        with self.connect() as client:
            return received(client, data)

    def flood(self, client: socket.socket, piece: bytes, most: int) -> int:
        """Send a piece again and again, until the server closes; return how many bytes it let pass."""
        sent = 0
        try:
            while sent < most:
                sent += client.send(piece)
        except OSError:
            pass
        return sent

    def ask(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Return the status and the JSON of a reply; `body` is JSON, or bytes, or None for a GET."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            client.request("GET" if body is None else "POST", path, data, headers or {})
            reply = client.getresponse()
            content = reply.read()
            return reply.status, json.loads(content) if content.startswith(b"{") else content
        finally:
            client.close()


def received(client: socket.socket, sent: bytes = b"") -> bytes:
    """Return everything that comes until the server closes, after something was sent."""
    data = b""
    try:
        client.sendall(sent)
        while piece := client.recv(1 << 16):
            data += piece
    except ConnectionError:  # it has had enough
        pass
    return data


def statuses(reply: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", reply)]


def post(path: str, body: Any, headers: bytes = b"") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\n%s%sContent-Length: %d\r\n\r\n%s" % (path.encode(), HOST, headers, len(data), data)


def get(path: str = "/health", headers: bytes = HOST + CLOSE) -> bytes:
    return b"GET " + path.encode() + b" HTTP/1.1\r\n" + headers + b"\r\n"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@contextmanager
def victim_with(folder: Path, **options: Any) -> Iterator[Victim]:
    log = folder / "log"
    script = str(Path(__file__).parent / "victim.py")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, script, json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(),
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        yield Victim(process, log, int(line))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """A server with short timeouts that lets everybody in. It has to live through all tests."""
    with victim_with(tmp_path_factory.mktemp("victim"), settings=SHORT) as victim:
        assert victim.ask("/v1/completions", BRIEF)[0] == 200
        yield victim
        assert victim.ask("/v1/completions", BRIEF)[0] == 200
        held = victim.idle()
        assert set(held["threads"]) <= {"MainThread", "minerva_native LLM", "minerva_native masks"} | {
            name for name in held["threads"] if name.startswith(("asyncio_", "minerva_native long texts"))
        }
        log = victim.log.read_text()
        assert "Traceback" not in log
        assert "failed" not in log


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """A server that wants a token, and lets the scripts of one other page in."""
    options = {**SHORT, "keys": [TOKEN, "another"], "cors_origins": ["http://app.example"]}
    with victim_with(tmp_path_factory.mktemp("guarded"), settings=options) as victim:
        yield victim


# What is no request, or a strange one

STRANGE = {
    "HTTP/0.9": (b"GET /health\r\n", []),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\n" + HOST + b"\r\n", [200]),
    "HTTP/1.0 without a host": (b"GET /health HTTP/1.0\r\n\r\n", [403]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    "TLS": (bytes.fromhex("1603010200010001fc0303") + bytes(range(256)), [400]),
    "a NUL": (b"GET /\0 HTTP/1.1\r\n" + HOST + b"\r\n", [400]),
    "bytes above 127": (b"GET /\xff\xfe HTTP/1.1\r\n" + HOST + b"\r\n", [400]),
    "an escaped NUL": (get("/%00"), [404]),
    "escapes that are none": (get("/v1/models/%ff%zz%0d%0aX:"), [404]),
    "an address": (get("http://localhost/health"), [200]),
    "an address without a path": (get("http://localhost"), [400]),
    "CONNECT": (b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n", [400]),
    "CONNECT to a path": (b"CONNECT /health HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n", [405]),
    "OPTIONS of everything": (b"OPTIONS * HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n", [404]),
    "TRACE": (b"TRACE /health HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n", [405]),
    "a WebSocket": (get(headers=HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"), [200]),
    "a long path": (get("/" + "a" * 100_000), [400]),
    "long headers": (get(headers=HOST + CLOSE + b"X: " + b"a" * 40_000 + b"\r\n"), [431]),
    "a negative length": (post("/tokenize", b"").replace(b": 0", b": -5"), [400]),
    "two lengths": (post("/tokenize", b"", b"Content-Length: 5\r\n"), [400]),
    "a list of lengths": (post("/tokenize", b"").replace(b": 0", b": 5, 5"), [400]),
    "a length of many digits": (post("/tokenize", b"").replace(b": 0", b": " + b"9" * 5000), [400]),
    "a length, and chunks": (post("/tokenize", b"", b"Transfer-Encoding: chunked\r\n") + get(), [400]),
    "an unknown encoding": (
        b"POST /tokenize HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        [400],
    ),
    "two encodings": (
        b"POST /tokenize HTTP/1.1\r\n"
        + HOST
        + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        [400],
    ),
    "a folded header": (
        b"POST /tokenize HTTP/1.1\r\n" + HOST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
        [400],
    ),
    "a space before a colon": (b"POST /tokenize HTTP/1.1\r\n" + HOST + b"Transfer-Encoding : chunked\r\n\r\n", [400]),
    "a chunk that is too large": (
        b"POST /tokenize HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 18 + b"\r\n",
        [400],
    ),
    "a body that is too short": (post("/tokenize", b"{}").replace(b": 2", b": 50"), [408]),
    "a body that is too long": (post("/tokenize", b'{"content":"a"}').replace(b": 15", b": 5"), [400]),
    "100-continue": (post("/tokenize", b'{"content":"a"}', CLOSE + b"Expect: 100-continue\r\n"), [100, 200]),
    "trailers that would be headers": (
        b"POST /tokenize HTTP/1.1\r\n"
        + HOST
        + b"Transfer-Encoding: chunked\r\n\r\nf\r\n"
        + b'{"content":"a"}\r\n0\r\nHost: evil.example\r\nOrigin: http://evil.example\r\n\r\n',
        [200],
    ),
    "two hosts": (get(headers=HOST + b"Host: evil.example\r\n" + CLOSE), [400]),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_proper_request_is_refused_or_answered(victim: Victim, name: str) -> None:
    sent, expected = STRANGE[name]
    assert statuses(victim.tell(sent)) == expected


def test_the_body_of_a_request_that_offers_an_upgrade_is_read(victim: Victim) -> None:
    """Java's client offers HTTP/2 with each request."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAA\r\n"
    reply = victim.tell(post("/tokenize", {"content": "\r\nUpgrade: a"}, offer))
    assert statuses(reply) == [200]
    assert json.loads(reply.split(b"\r\n\r\n")[1])["tokens"]


# What has no end


def test_heads_have_an_end_in_time(victim: Victim) -> None:
    with victim.connect() as client, pytest.raises(OSError):
        for byte in get(headers=b"X: " + b"a" * 4000):
            client.sendall(bytes([byte]))
            time.sleep(0.01)
    assert victim.tell(b"") == b""
    assert statuses(victim.tell(get(headers=HOST) + b"GET /hea")) == [200]


@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (b"GET /", b"a" * 65536),
        (b"GET / HTTP/1.1\r\n", b"X: " + b"a" * 65536 + b"\r\n"),
        (b"GET / HTTP/1.1\r\n", b"X: a\r\n" * 10_000),
        (post("/v1/completions", LONG) + b"GET /", b"a" * 65536),
        (post("/v1/completions", LONG) + b"GET / HTTP/1.1\r\n", b"X: " + b"a" * 65536 + b"\r\n"),
        (post("/v1/completions", LONG), get(headers=HOST) * 1000),
        (post("/v1/completions", LONG), post("/tokenize", b"a" * 65536)),
        (b"POST /tokenize HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: " + b"a" * 65536),
        (b"POST /tokenize HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a" * 65536),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999999\r\n\r\n", b"a" * 65536),
    ],
    ids=["path", "header", "headers", "path behind", "header behind", "requests behind", "bodies behind", "trailers",
         "chunk", "unwanted body"],
)  # fmt: skip
def test_what_is_sent_without_end_is_cut_off(victim: Victim, first: bytes, piece: bytes) -> None:
    before = victim.idle()["rss"]
    with victim.send(first) as client:
        most = 64 << 20
        assert victim.flood(client, piece, most) < most
        assert victim.held()["rss"] - before < 32 << 20
    victim.idle()


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_client_with_too_large_a_body_gets_to_know_it(victim: Victim, is_chunked: bool) -> None:
    body = b"a" * (int(SHORT["max_body_bytes"]) + 300_000)
    sent = post("/tokenize", body)
    if is_chunked:
        framing = HOST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body)
        sent = b"POST /tokenize HTTP/1.1\r\n" + framing + body + b"\r\n0\r\n\r\n"
    with victim.send(sent) as client:  # all of it, before it reads
        assert statuses(received(client)) == [413]


def test_who_does_not_read_is_cut_off(victim: Victim) -> None:
    before = victim.idle()["files"]
    clients = []
    for sent in [get("/openapi.json", HOST) * n for n in (1, 10, 500)]:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", victim.port))
        client.sendall(sent)
        clients.append(client)
    victim.until(lambda held: held["files"] <= before)
    for client in clients:
        client.close()
    victim.idle()


@pytest.mark.parametrize("n", [1, 4])
def test_who_does_not_read_a_stream_is_cut_off_and_frees_its_place(tmp_path: Path, n: int) -> None:
    with victim_with(tmp_path, settings=SHORT, send_bytes=4096) as victim:
        assert victim.ask(TEXT, BRIEF)[0] == 200
        before = victim.idle()["files"]
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.settimeout(SECONDS)
        client.connect(("127.0.0.1", victim.port))
        client.sendall(post(TEXT, {**LONG, "max_tokens": 3000 // n, "n": n, "stream": True}))
        victim.until(lambda held: held["cells"] > 0)
        victim.until(lambda held: held["files"] <= before and not held["users"] and not held["cells"])
        reply = received(client)  # what the system had taken already
        client.close()
        assert reply.startswith(b"HTTP/1.1 200")
        assert b"[DONE]" not in reply
        assert victim.ask(TEXT, BRIEF)[0] == 200


def test_there_is_an_end_of_connections(victim: Victim) -> None:
    before = victim.idle()["files"]
    most = int(SHORT["max_connections"])
    clients = [victim.connect() for _ in range(2 * most)]
    with concurrent.futures.ThreadPoolExecutor(len(clients)) as pool:
        answered = sum(pool.map(lambda client: bool(received(client, get())), clients))
    assert 0 < answered <= most
    victim.until(lambda held: held["files"] <= before)
    assert victim.ask("/health", None)[0] == 200


# Several requests on a connection


def test_requests_sent_together_are_answered_in_turn(victim: Victim) -> None:
    assert statuses(victim.tell(get(headers=HOST) * 300)) == [200] * 300
    replies = victim.tell(post("/v1/completions", {**BRIEF, "stream": True}) + get(headers=HOST) * 5 + get("/no"))
    assert statuses(replies) == [200] * 6 + [404]
    assert replies.index(b"[DONE]") < replies.index(b'"status"')


@pytest.mark.parametrize("behind", [b"", get(), post("/v1/completions", LONG) * 3, post("/tokenize", b"a" * 70_000)])
@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("is_reset", [False, True])
def test_a_client_that_goes_frees_its_place_whatever_waits_behind(
    victim: Victim, behind: bytes, is_stream: bool, is_reset: bool
) -> None:
    client = victim.send(post("/v1/completions", {**LONG, "stream": is_stream}))
    victim.until(lambda held: held["cells"] > 0)
    client.sendall(behind)
    vanish(client, is_reset)
    victim.idle()


def vanish(client: socket.socket, is_reset: bool) -> None:
    if is_reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def test_clients_that_vanish_leave_nothing(victim: Victim) -> None:
    chance = random.Random(17)
    rounds = 3 if CLIENTS >= 1000 else 2

    def come_and_go(number: int) -> None:
        sent = post("/v1/completions", {**LONG, "stream": number % 2 == 0})
        cut = {0: 0, 1: chance.randrange(1, 60), 2: len(sent) - chance.randrange(1, 30)}.get(number % 5, len(sent))
        try:
            client = victim.connect()
            client.sendall(sent[:cut])
            if cut == len(sent):
                time.sleep(chance.random() / 5)
            vanish(client, chance.random() < 0.5)
        except OSError:  # there are too many
            pass

    def once() -> dict[str, Any]:
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            list(pool.map(come_and_go, range(CLIENTS)))
        return victim.idle()

    before = once()
    for _ in range(rounds - 1):
        after = once()
    after = victim.until(lambda held: held["files"] <= before["files"])
    assert after["threads"] == before["threads"]
    assert after["rss"] - before["rss"] < 8 << 20
    together = [victim.send(post("/v1/completions", {**LONG, "stream": True})) for _ in range(4)]
    for client in together:  # all four places are there: each has text before any has ended
        while b"data: " not in client.recv(1 << 12):
            pass
    for client in together:
        client.close()
    victim.idle()


# Who may ask


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((name, 200) for name in ("localhost", "LOCALHOST:99", "localhost.", "127.0.0.1", "[::1]:80", "10.1.2.3")),
        *((name, 403) for name in ("", "evil.example", "evil.localhost", "xlocalhost", "localhost.evil.example")),
        *((name, 403) for name in ("127.0.0.1.evil.example", "0x7f.1", "2130706433", "127.1", "::1", "[::1", "\xe9")),
        *((name, 403) for name in ("a@localhost", "evil.example@localhost", "localhost@evil.example")),
        *((name, 403) for name in ("localhost/evil.example", "localhost?evil", "localhost#evil", "localhost\\evil")),
        *((name, 403) for name in ("localhost:evil", "localhost:", "localhost, evil.example", "loc\talhost")),
    ],
)
def test_only_names_of_this_machine_are_answered(victim: Victim, host: str, status: int) -> None:
    reply = victim.tell(get(headers=CLOSE + b"Host: " + host.encode("latin-1") + b"\r\n"))
    assert statuses(reply) == [status]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (b"http://localhost", 200),
        (b"http://app.example", 200),
        *((origin, 403) for origin in (b"null", b"http://localhost:1", b"https://localhost", b"http://evil.example")),
        *((origin, 403) for origin in (b"http://app.example.evil.example", b"HTTP://APP.EXAMPLE", b"", b"*", b"\xff")),
    ],
)
def test_pages_of_other_origins_are_refused(guarded: Victim, origin: bytes, status: int) -> None:
    asked = HOST + CLOSE + b"Authorization: Bearer " + TOKEN.encode() + b"\r\nOrigin: " + origin + b"\r\n"
    reply = guarded.tell(get("/v1/models", asked)).lower()
    assert statuses(reply.upper()) == [status]
    allowed = re.findall(rb"access-control-allow-origin: (.*)\r", reply)
    assert allowed == ([origin] if origin == b"http://app.example" else [])
    wanted = asked + b"Access-Control-Request-Method: POST\r\n"
    before = guarded.tell(b"OPTIONS /v1/chat/completions HTTP/1.1\r\n" + wanted + b"\r\n")
    assert statuses(before) == [204 if allowed else 403 if status == 403 else 405]


@pytest.mark.parametrize(
    ("given", "status"),
    [
        *((f"Bearer {TOKEN}", 200), (f"bearer  {TOKEN}", 200), ("Bearer another", 200)),
        *(("", 401), ("Bearer", 401), ("Bearer ", 401), (TOKEN, 401), (f"Basic {TOKEN}", 401), (f"Bearer{TOKEN}", 401)),
        *((f"Bearer {TOKEN[:-1]}", 401), (f"Bearer {TOKEN}a", 401), (f"Bearer {TOKEN.upper()}", 401)),
        *(("Bearer \xe9\xff", 401), ("Bearer " + "a" * 20_000, 401), (f"Bearer {TOKEN}, Bearer {TOKEN}", 401)),
    ],
)
def test_only_the_whole_token_lets_in(guarded: Victim, given: str, status: int) -> None:
    sent = HOST + CLOSE + b"Authorization: " + given.encode("latin-1") + b"\r\n"
    reply = guarded.tell(get("/v1/models", sent))
    assert statuses(reply) == [status]
    assert TOKEN.encode() not in reply
    assert statuses(guarded.tell(get("/health", sent))) == [200]


def test_a_token_that_comes_twice_is_refused(guarded: Victim) -> None:
    sent = b"Authorization: Bearer x\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n"
    assert statuses(guarded.tell(get("/v1/models", HOST + CLOSE + sent))) == [400]


def test_the_log_has_nothing_that_clients_make_up(guarded: Victim) -> None:
    secret = "a-secret-path"
    keyed = HOST + CLOSE + b"Authorization: Bearer " + TOKEN.encode() + b"\r\n"
    for sent in [
        get(f"/{secret}%0d%0aaccess GET /forged 200", keyed),
        get(f"/v1/models/{secret}%0aaccess", keyed),
        get(f"/health?{secret}", keyed + b"User-Agent: " + secret.encode() + b"\r\n"),
        b"GET\naccess /" + secret.encode() + b" HTTP/1.1\r\n" + keyed + b"\r\n",
        post("/v1/completions", {**BRIEF, "prompt": secret, f"{secret}\nfield": 1}, keyed[len(HOST) :]),
    ]:
        assert statuses(guarded.tell(sent)) in ([200], [400], [404])
    log = guarded.log.read_text()
    assert TOKEN not in log
    assert secret not in log
    assert "forged" not in log
    assert all(
        re.fullmatch(r"access [A-Z]+ \S+ \d{3}|Invalid HTTP request received\.", line) for line in log.splitlines()
    )


# What is asked


def nested(depth: int, opened: str, closed: str) -> bytes:
    return opened.encode() * depth + b"1" + closed.encode() * depth


MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "max_tokens": 1, **fields}


def shaped(schema: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})


def tool(**parameters: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", **parameters}}}]


CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TWICE: dict[str, Any] = {f"d{at}": {"allOf": [{"$ref": f"#/$defs/d{at + 1}"}] * 2} for at in range(40)}
IDS: list[Any] = [[-1], [2**31], [2**63], [10**30], [1.5], [True], [], [[]]]
ODD: list[Any] = [{}, {"role": 5}, {"role": "assistant", "tool_calls": 5}]
BAD: dict[str, tuple[str, Any]] = {
    **{f"arrays, {n} deep": (CHAT, b'{"messages":' + nested(n, "[", "]") + b"}") for n in (65, 500_000)},
    **{f"objects, {n} deep": (CHAT, b'{"messages":[' + nested(n, '{"a":', "}") + b"]}") for n in (65, 100_000)},
    "many arrays": (TEXT, b'{"prompt":"a","x":[' + b"[" * 600_000),
    "no JSON": (TEXT, b"\xff\xfe"),
    "nothing": (TEXT, b""),
    "null": (TEXT, b"null"),
    "two": (TEXT, b'{"prompt":"a"}{}'),
    "a byte order mark": (TEXT, b'\xef\xbb\xbf{"prompt":"a"}'),
    "UTF-16": (TEXT, '{"prompt":"a"}'.encode("utf-16")),
    "not UTF-8": (TEXT, b'{"prompt":"\xff"}'),
    "a surrogate": (TEXT, b'{"prompt":"\\ud800"}'),
    "an encoded surrogate": (TEXT, b'{"prompt":"\xed\xa0\x80"}'),
    "NaN": (TEXT, b'{"prompt":"a","temperature":NaN}'),
    **{f"temperature {x}": (TEXT, b'{"prompt":"a","temperature":%s}' % x.encode()) for x in ("1e999", "-1", "9" * 400)},
    **{f"seed {x}": (TEXT, b'{"prompt":"a","seed":%s}' % x.encode()) for x in ("18446744073709551616", "-2", "1.5")},
    **{f"max_tokens {x}": (TEXT, {**BRIEF, "max_tokens": x}) for x in (-2, 2**31, 2**70, 0.5, "1", True)},
    **{f"n {x}": (CHAT, chat(n=x)) for x in (0, 129, -1, 2**64, 1.5)},
    **{f"ids {x}": (TEXT, {**BRIEF, "prompt": x}) for x in IDS},
    **{f"tokens {x}": ("/detokenize", {"tokens": [x]}) for x in (-1, 1280, 2**31, 2**63, 10**30, None, "a")},
    "ids and texts": (TEXT, {**BRIEF, "prompt": [1, "a"]}),
    "many ids": (TEXT, {**BRIEF, "prompt": [1] * 10_000}),
    "many prompts": (TEXT, {**BRIEF, "prompt": ["a"] * 129}),
    "many answers": (TEXT, {**BRIEF, "prompt": ["a"] * 64, "n": 3}),
    "many stop strings": (TEXT, {**BRIEF, "stop": ["a"] * 65}),
    "a long stop string": (TEXT, {**BRIEF, "stop": "a" * 5000}),
    "a long bias": (TEXT, {**BRIEF, "logit_bias": {"a" * 300: 1}}),
    **{f"bias {x}": (TEXT, {**BRIEF, "logit_bias": x}) for x in ({"9999": 1}, {"1": 1e39}, {"1": True}, [[2**70, 1]])},
    "a prompt that cannot fit": (TEXT, {**BRIEF, "prompt": "a " * 400_000}),
    "messages that cannot fit": (CHAT, chat(messages=[{"role": "a " * 200_000, "content": "b " * 200_000}])),
    "top_logprobs": (CHAT, chat(logprobs=True, top_logprobs=21)),
    "a schema that explodes": (
        CHAT,
        shaped({"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(6)]} for i in range(12)]}),
    ),
    "a schema in itself": (CHAT, shaped({"$ref": "#"})),
    "a schema in a file": (CHAT, shaped({"$ref": "file:///etc/passwd"})),
    "a grammar in itself": (CHAT, chat(grammar="root ::= x\nx ::= root")),
    "a grammar without a rule": (CHAT, chat(grammar="root ::= x")),
    "a deep grammar": (CHAT, chat(grammar="root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000)),
    "a NUL in a grammar": (CHAT, chat(grammar="\0")),
    "large tools": (CHAT, chat(tools=tool(properties={f"p{at}": {"type": "string"} for at in range(20_000)}))),
    **{
        f"variable {name}": (CHAT, chat(chat_template_kwargs={name: "x"}))
        for name in ("messages", "tools", "add_generation_prompt", "self", "a.b", "")
    },
    "a picture": (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/"}}]}]),
    ),
    **{f"message {x}": (CHAT, chat(messages=[x])) for x in ODD},
    "an item of no type": (RESPONSES, {"input": [{"type": []}]}),
    "an item of no role": (RESPONSES, {"input": [{"type": "message", "role": 5}]}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_request_is_told_what_is_wrong(victim: Victim, name: str) -> None:
    path, body = BAD[name]
    status, reply = victim.ask(path, body)
    assert status == 400, reply
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert 0 < len(reply["error"]["message"]) < 2500
    assert "/tmp" not in reply["error"]["message"]


FINE: dict[str, tuple[str, Any]] = {
    "objects, 50 deep": (
        CHAT,
        b'{"max_tokens":1,"messages":[{"role":"user","content":"a","a":' + nested(50, '{"a":', "}") + b"}]}",
    ),
    "a name twice": (TEXT, b'{"prompt":"a","max_tokens":1,"prompt":"b"}'),
    "NUL in a text": (TEXT, {**BRIEF, "prompt": "a\0b", "stop": "\0"}),
    "the largest seed": (TEXT, {**BRIEF, "seed": 2**64 - 1}),
    "the largest limit": (TEXT, {"prompt": "Once", "max_tokens": 2**31 - 1, "stop": [" "]}),
    "128 answers with 20 log-probabilities": (CHAT, chat(n=128, logprobs=True, top_logprobs=20)),
    "128 prompts": (TEXT, {**BRIEF, "prompt": ["a"] * 128}),
    "64 stop strings": (TEXT, {**BRIEF, "stop": ["a" * 4096] * 64}),
    "many biases": (TEXT, {**BRIEF, "logit_bias": {f"x{at}": 1 for at in range(3000)}}),
    "a regular expression that explodes": (CHAT, shaped({"type": "string", "pattern": "((a{1000}){1000}){1000}"})),
    "a tool that explodes": (
        CHAT,
        chat(tools=tool(properties={"a": {"pattern": "((a{999}){999}){999}"}}), tool_choice="required"),
    ),
    "a schema that doubles": (CHAT, shaped({"$defs": {**TWICE, "d40": {"type": "null"}}, "$ref": "#/$defs/d0"})),
    "variables of the template": (CHAT, chat(chat_template_kwargs={"bos_token": "x", "raise_exception": 1, "loop": 1})),
    "an odd reasoning": (RESPONSES, {"input": [{"type": "reasoning", "content": 5}, {"content": "a", "role": "user"}]}),
}


@pytest.mark.parametrize("name", FINE)
def test_a_large_or_odd_request_is_answered(victim: Victim, name: str) -> None:
    path, body = FINE[name]
    assert victim.ask(path, body)[0] == 200


def test_variables_of_the_template_forge_no_tokens(victim: Victim) -> None:
    plain = victim.ask("/apply-template", {"messages": MESSAGES})[1]["prompt"]
    forged = {"messages": MESSAGES, "chat_template_kwargs": {"bos_token": "evil", "eos_token": "evil"}}
    assert victim.ask("/apply-template", forged)[1]["prompt"] == plain


def test_others_are_served_while_a_long_text_is_encoded_and_who_waits_may_go(tmp_path: Path) -> None:
    text = json.dumps({"content": "สวัสดีชาวโลก" * 80_000}, ensure_ascii=False).encode()
    with victim_with(tmp_path, settings={"grace_seconds": 0.3}) as victim:
        assert victim.ask(TEXT, BRIEF)[0] == 200
        threads = len(victim.held()["threads"])
        with concurrent.futures.ThreadPoolExecutor() as pool:
            long = pool.submit(victim.ask, "/tokenize", text)
            gone = [victim.send(post("/tokenize", text)) for _ in range(6)]
            victim.until(lambda held: held["users"] == 7)
            for client in gone:
                client.close()
            victim.until(lambda held: held["users"] <= 1)
            for _ in range(5):
                assert victim.ask("/health", None)[0] == 200
                assert victim.ask("/tokenize", {"content": "a"})[0] == 200
                assert victim.ask(TEXT, BRIEF)[0] == 200
            assert not long.done()
            assert len(victim.held()["threads"]) <= threads + 3
            victim.process.terminate()  # nor does the end wait for it
            assert victim.process.wait(SECONDS) == 0
            assert long.exception() is None
            assert long.result()[0] in (200, 408, 503)


def large(number: int) -> dict[str, Any]:
    """A schema that takes a while to compile."""
    return {"anyOf": [{"properties": {f"a{at}": {"const": number}, "b": {"type": "number"}}} for at in range(600)]}


@pytest.mark.parametrize("is_tool", [False, True])
def test_others_are_served_while_large_grammars_are_compiled(victim: Victim, is_tool: bool) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        shapes = [
            chat(tools=tool(properties={"a": large(at)}), tool_choice="required") if is_tool else shaped(large(at))
            for at in range(8)
        ]
        waiting = [pool.submit(victim.ask, CHAT, shape) for shape in shapes]
        victim.until(lambda held: held["users"] > 0)
        for _ in range(5):
            assert victim.ask("/health", None)[0] == 200
            assert victim.ask("/tokenize", {"content": "a"})[0] == 200
            assert victim.ask(TEXT, BRIEF)[0] == 200
        assert not all(one.done() for one in waiting)
        assert [one.result()[0] for one in waiting] == [200] * 8


NAMES = ["type", "function", "name", "parameters", "role", "content", "json_schema", "schema", "properties", "text"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 3) | st.floats(width=32) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.sampled_from(NAMES), inner),
    max_leaves=6,
)
SOUND = {
    CHAT: chat(),
    TEXT: BRIEF,
    RESPONSES: {"input": "hi", "max_output_tokens": 1},
    "/tokenize": {"content": "a"},
    "/detokenize": {"tokens": [1]},
    "/apply-template": {"messages": MESSAGES},
    "/v1/embeddings": {"input": "a"},
}


@pytest.fixture(scope="module")
def fields(victim: Victim) -> dict[str, list[str]]:
    """The names of the fields of each request."""
    document = victim.ask("/openapi.json", None)[1]
    schemas = document["components"]["schemas"]
    found = {"/v1/embeddings": ["input"]}
    for path, methods in document["paths"].items():
        if "post" in methods:
            schema = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
            found[path] = sorted(schemas[schema["$ref"].rsplit("/", 1)[1]]["properties"])
    return found


@given(data=st.data())
@settings(max_examples=int(os.environ.get("MINERVA_ABUSE_REQUESTS", "80")))
def test_no_request_is_answered_by_a_fault(victim: Victim, fields: dict[str, list[str]], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(SOUND)))
    names = st.sampled_from(fields[path])
    values = JSON | st.lists(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3), max_size=2)
    wrong = data.draw(st.dictionaries(names, values, min_size=1, max_size=2))
    body = {**SOUND[path], **wrong, **({"max_tokens": 2} if path == TEXT and "max_tokens" not in wrong else {})}
    status, reply = victim.ask(path, json.dumps(body).encode())
    assert status in (200, 400) or (status, path) == (501, "/v1/embeddings"), (body, reply)


# What breaks


def test_a_broken_engine_is_an_error_and_the_next_request_gets_another(tmp_path: Path) -> None:
    with victim_with(tmp_path, settings=SHORT) as victim:
        for word in ("context", "program", "code", "sum"):
            broken = {**BRIEF, "prompt": f"break the {word}"}
            for path, body in [(TEXT, broken), (CHAT, chat(messages=[{"role": "user", "content": broken["prompt"]}]))]:
                status, reply = victim.ask(path, body)
                assert (status, reply["error"]["code"]) == (500, "internal_error")
                assert "secret" not in json.dumps(reply)
                assert statuses(victim.tell(post(path, {**body, "stream": True}, CLOSE))) == [500]
                assert victim.ask(TEXT, BRIEF)[0] == 200
        assert victim.idle()["loaded"] == ["demo"]
        log = victim.log.read_text()
        failed = re.findall(r"a request failed: (.*)", log)
        assert sorted(failed) == sorted(["RuntimeError", "TypeError", "ValueError"] * 4)
        assert not re.search("break the|a secret|broadcast", log)  # nor what was said, or what may quote it
        other = victim.send(post(TEXT, {**LONG, "stream": True}, CLOSE))
        victim.until(lambda held: held["cells"] > 0)
        assert victim.ask(TEXT, {**BRIEF, "prompt": "break the context"})[0] == 500
        assert b"data: " in received(other)  # which ends with what it has, or an error
        assert victim.ask(TEXT, BRIEF)[0] == 200


def test_models_come_and_go_within_their_memory(tmp_path: Path) -> None:
    size = mn.DEMO_PATH.stat().st_size
    paths = {name: tmp_path / f"{name}.gguf" for name in ("one", "two", "three", "junk", "gone")}
    for name in ("one", "two", "three", "gone"):
        shutil.copy(mn.DEMO_PATH, paths[name])
    paths["junk"].write_bytes(b"GGUF" + bytes(range(256)) * 64)
    given = {name: str(path) for name, path in paths.items()}
    with victim_with(tmp_path, settings=SHORT, models=given, budget_bytes=2 * size + 1, load_seconds=0.1) as victim:
        paths["gone"].unlink()

        def loaded_after(name: str) -> list[str]:
            assert victim.ask(TEXT, {**BRIEF, "model": name})[0] == 200
            return list(victim.held()["loaded"])

        assert loaded_after("one") == ["one"]
        assert loaded_after("two") == ["one", "two"]
        assert loaded_after("one") == ["one", "two"]
        assert loaded_after("three") == ["one", "three"]
        for name in ("junk", "gone"):
            for path in (TEXT, "/tokenize"):
                status, reply = victim.ask(path, {**BRIEF, "content": "a", "model": name})
                assert (status, reply["error"]["code"]) == (500, "model_load_failed")
                assert str(tmp_path) not in json.dumps(reply)
            status, reply = victim.ask(f"/props?model={name}", None)
            assert (status, reply["error"]["code"]) == (500, "model_load_failed")
        assert victim.ask(TEXT, {**BRIEF, "model": "none"})[0] == 404
        busy = [victim.send(post(TEXT, {**LONG, "stream": True, "model": name})) for name in ("one", "three")]
        victim.until(lambda held: held["users"] == 2 and held["loaded"] == ["one", "three"])
        with concurrent.futures.ThreadPoolExecutor() as pool:
            waiting = [pool.submit(loaded_after, "two") for _ in range(3)]
            victim.until(lambda held: held["users"] == 5)
            for client in busy:
                client.close()
            assert all("two" in future.result() for future in waiting)
        with concurrent.futures.ThreadPoolExecutor() as pool:  # each wants what another has to give up
            mixed = pool.map(lambda at: victim.ask(TEXT, {**BRIEF, "model": list(paths)[at % 3]})[0], range(9))
            assert list(mixed) == [200] * 9
        leaving = victim.send(post(TEXT, {**BRIEF, "model": "one"}))
        leaving.close()
        victim.until(lambda held: not held["users"])
        assert victim.ask(TEXT, {**BRIEF, "model": "one"})[0] == 200


def test_a_model_that_nobody_uses_is_unloaded_and_comes_back(tmp_path: Path) -> None:
    with victim_with(tmp_path, settings=SHORT, idle_seconds=0.1) as victim:
        for _ in range(3):
            assert victim.ask(TEXT, BRIEF)[0] == 200
            victim.until(lambda held: held["loaded"] == [])
        client = victim.send(post(TEXT, {**LONG, "max_tokens": 200, "stream": True}, CLOSE))
        assert received(client).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert "minerva_native LLM" not in victim.until(lambda held: held["loaded"] == [])["threads"]


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_streams_that_last_longer_than_the_server_end_with_an_error(tmp_path: Path, number: signal.Signals) -> None:
    with victim_with(tmp_path, settings={**SHORT, "body_seconds": 60}) as victim:
        clients = [victim.send(post(TEXT, {**LONG, "stream": True, "n": 8, "max_tokens": 400})) for _ in range(3)]
        whole = victim.send(post(TEXT, {**LONG, "n": 8, "max_tokens": 400}))
        half = victim.send(post(TEXT, LONG)[:-5])
        idle = victim.connect()
        victim.until(lambda held: held["users"] == 4 and held["cells"] > 0)
        victim.process.send_signal(number)
        for client in clients:
            assert b"unavailable" in received(client)
        assert statuses(received(whole)) == [503]
        assert statuses(received(half)) == [503]
        assert received(idle) == b""
        assert victim.process.wait(SECONDS) == (0 if number == signal.SIGTERM else -signal.SIGINT)
        lines = victim.log.read_text().splitlines()
        assert sum(line.startswith("access POST /v1/completions") for line in lines) >= 4


def serving(*arguments: object) -> "subprocess.Popen[str]":
    """Return `minerva serve`, once it listens."""
    command = [sys.executable, "-m", "minerva_native", "serve", "--json", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment())


@contextmanager
def served(*arguments: object) -> Iterator[tuple["subprocess.Popen[str]", dict[str, Any]]]:
    process = serving(*arguments)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def test_signals_end_the_command(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with served("--unix-socket", path) as (process, _):
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        refused = serving("--unix-socket", path)
        assert "another server listens there" in refused.communicate(timeout=SECONDS)[1]
        assert refused.returncode == 1
        process.terminate()
        assert process.wait(SECONDS) == 0
        assert not path.exists()
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    with served("--unix-socket", path) as (process, _):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(post(TEXT, {**LONG, "stream": True, "n": 64}))
            assert client.recv(1 << 12).startswith(b"HTTP/1.1 200")
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS) == 130
        assert not path.exists()
    path.write_text("mine")
    process = serving("--unix-socket", path)
    assert "no socket" in process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 1
    assert path.read_text() == "mine"


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with served("--port", 0) as (_, facts):
        process = serving("--port", facts["url"].rsplit(":", 1)[1])
        said = process.communicate(timeout=SECONDS)
        assert process.returncode == 1
        assert said[0] == ""
        assert len(said[1].splitlines()) == 1
        assert re.search(r"127\.0\.0\.1 port \d+: the port is in use", said[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--port", 65536), "--port must be from 0 to 65535, not 65536"),
        (("--unix-socket", "{folder}/none/socket"), "{folder}/none/socket: No such file"),
        (("--unix-socket", f"{{folder}}/{'x' * 120}"), "xxx: AF_UNIX path too long"),
        (("--host", "nowhere.invalid", "--api-key-file", "{folder}/keys"), "nowhere.invalid: "),
        (("--cors-origin", "localhost:3000"), "is no origin, such as http://localhost:3000"),
        (("--cors-origin", "http://localhost:3000/"), "is no origin"),
        (("--allowed-host", "box.example:80"), "is no name of a host"),
    ],
)
def test_what_cannot_be_listened_on_is_named(options: tuple[object, ...], said: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\n")
    process = serving(*(str(option).format(folder=tmp_path) for option in options))
    shown = process.communicate(timeout=SECONDS)
    assert process.returncode in (1, 2)
    assert shown[0] == ""
    assert said.format(folder=tmp_path) in shown[1].splitlines()[-1]


def test_the_log_tells_what_is_refused_from_what_is_no_endpoint() -> None:
    with served("--port", 0) as (process, facts):
        for headers in ({}, {"Authorization": f"Bearer {facts['token']}"}):
            connection = http.client.HTTPConnection("127.0.0.1", int(facts["url"].rsplit(":", 1)[1]), timeout=SECONDS)
            connection.request("GET", "/nothing", headers=headers)
            connection.getresponse().read()
            connection.close()
        process.terminate()
        lines = process.communicate(timeout=SECONDS)[1]
        assert "GET (refused) 401" in lines
        assert "GET (no endpoint) 404" in lines
