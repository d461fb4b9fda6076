"""Sockets, and the server from its start to its end."""

import asyncio
import contextlib
import dataclasses
import errno
import ipaddress
import logging
import os
import resource
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from .connection import connection_class
from .guard import App
from .settings import Settings

_BACKLOG = 1024
_OTHER_FILES = 256  # models, caches, and what libraries open


def is_loopback(host: str) -> bool:
    """Say whether an address, or a name, is this machine's alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def tcp_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        OSError: the port is taken, or the host is none of this machine's; it names them.
        ValueError: the port is no port.
    """
    if not 0 <= port <= 0xFFFF:  # getaddrinfo takes it modulo 65536
        raise ValueError(f"port must be from 0 to 65535, not {port}")
    kind, flags = socket.SOCK_STREAM, socket.AI_PASSIVE
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(host, port, type=kind, flags=flags)
    except socket.gaierror as error:
        raise OSError(error.errno, error.strerror, host) from None
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except BaseException as error:
        listening.close()
        if isinstance(error, OSError):
            is_taken = error.errno == errno.EADDRINUSE
            why = "the port is in use; take another, or 0 for a free one" if is_taken else error.strerror
            raise OSError(error.errno, why, f"{host} port {port}") from None
        raise
    return listening


@contextmanager
def unix_socket(path: Path) -> Iterator[socket.socket]:
    """Return a socket in the file system that only this user can open; it is removed in the end.

    Raises:
        OSError: there is another file, or a server that listens there.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(17, "there is a file of that name, which is no socket", str(path))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()  # of a server that was killed
            else:
                raise FileExistsError(98, "another server listens there", str(path))
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listening.bind(str(path))
    except BaseException as error:
        listening.close()
        if isinstance(error, OSError):
            raise OSError(error.errno or errno.EINVAL, error.strerror or str(error), str(path)) from None
        raise
    finally:
        os.umask(before)
    made = path.lstat().st_ino
    try:
        listening.listen(_BACKLOG)
        yield listening
    finally:
        listening.close()
        with contextlib.suppress(OSError):
            if path.lstat().st_ino == made:
                path.unlink()


def _allowed_connections(wanted: int) -> int:
    """Return how many clients may be connected; have the system allow as many open files and some more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + _OTHER_FILES:
        soft = wanted + _OTHER_FILES if hard == resource.RLIM_INFINITY else min(wanted + _OTHER_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return min(wanted, max(1, soft - _OTHER_FILES))
    return wanted


class _Server(uvicorn.Server):
    """uvicorn's server, that says when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]):
        super().__init__(config)
        self._on_ready, self.is_interrupted = on_ready, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; at a second SIGINT, end."""
        self.is_interrupted |= sig == signal.SIGINT
        self.force_exit |= self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def run(app: App, listening: socket.socket, settings: Settings, on_ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM come. Requests may end within `grace_seconds`; a second SIGINT cuts that short.

    Raises:
        KeyboardInterrupt: SIGINT came.
    """
    settings = dataclasses.replace(settings, max_connections=_allowed_connections(settings.max_connections))
    logging.getLogger("uvicorn").addHandler(logging.NullHandler())  # what matters of its log, others say
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each client that leaves a stream
    config = uvicorn.Config(
        app,
        http=connection_class(settings),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type]
        timeout_graceful_shutdown=settings.grace_seconds,  # type: ignore[arg-type]
    )
    server = _Server(config, on_ready)
    asyncio.run(server.serve(sockets=[listening]))
    if server.is_interrupted:
        raise KeyboardInterrupt
