"""RPC workers: devices of other machines, and this machine's devices for others (llama.cpp's RPC)."""

import re
import socket
from collections.abc import Callable, Iterable
from typing import Any

from ._arguments import function, integer, many, number, what
from ._binding import callbacks, ffi, lib, thrown
from .devices import Device, available_cpus, described, on_this_machine, select
from .errors import DeviceError

DEFAULT_PORT = 50052
"""llama.cpp's port for workers."""

DEFAULT_TIMEOUT = 300.0
"""How many seconds a worker may be silent while something is asked of it."""

_MOST_DEVICES = 64  # of one worker
_MOST_SECONDS = 7 * 86_400

_HOST = r"[A-Za-z0-9_.-]+"
_ENDPOINT = re.compile(rf"{_HOST}:(\d{{1,5}})")


def connect(endpoints: Iterable[str], timeout: float = DEFAULT_TIMEOUT) -> list[Any]:
    """Return libllama's devices of the workers at "host:port", in order.

    Raises `DeviceError` if a worker cannot be reached, or is none.
    """
    found: list[Any] = []
    timeout_us = _microseconds(timeout)
    for endpoint in checked(endpoints):
        array = ffi.new("ggml_backend_dev_t[]", _MOST_DEVICES)
        count = lib.minerva_rpc_add(endpoint.encode(), timeout_us, array, _MOST_DEVICES)
        callbacks.raise_kept()
        if count == lib.MINERVA_THREW:
            why = thrown()
            remedy = ": start one there with minerva rpc-worker" if "cannot be reached" in why else ""
            raise DeviceError(f"{why}{remedy}")
        found += ffi.unpack(array, count)
    return found


def devices_at(endpoints: Iterable[str], timeout: float = DEFAULT_TIMEOUT) -> list[Device]:
    """Return the devices of the workers at "host:port"; raise `DeviceError` if one cannot be reached."""
    return [described(pointer) for pointer in connect(endpoints, timeout)]


def checked(endpoints: Iterable[str]) -> list[str]:
    """Return a list of different "host:port"s; raise `TypeError` or `ValueError` for anything else."""
    if isinstance(endpoints, str):
        raise TypeError(f"rpc must be a list of workers, not a str: [{endpoints!r}]")
    given = list(many("rpc", endpoints))
    for index, endpoint in enumerate(given):
        if not isinstance(endpoint, str):
            raise TypeError(f"rpc[{index}] must be a str such as 'host:{DEFAULT_PORT}', not {what(endpoint)}")
        match = _ENDPOINT.fullmatch(endpoint)
        if not match or not 0 < int(match[1]) < 65536:
            raise ValueError(
                f"rpc[{index}] must be a host's name or IPv4 address and a port, such as 'host:{DEFAULT_PORT}', not "
                f"{endpoint!r}"
            )
    if len({*given}) < len(given):
        raise ValueError(f"rpc names a worker twice: {', '.join(given)}")
    return given


def _microseconds(timeout: float) -> int:
    seconds = number("rpc_timeout", timeout)
    if not 0 < seconds <= _MOST_SECONDS:
        raise ValueError(f"rpc_timeout must be above 0 and at most {_MOST_SECONDS} seconds, not {seconds:g}")
    return max(1, int(seconds * 1e6))


def rpc_worker(
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    *,
    n_threads: int | None = None,
    devices: Iterable[str] | None = None,
    on_listening: Callable[[str, list[Device]], object] | None = None,
) -> None:
    """Lend this machine's devices to one client after another, until Ctrl-C or another signal handler raises.

    There is no authentication and no encryption, and whoever connects can end this process or read what it computes:
    never listen where others than the clients can connect.

    Args:
        host: the address to listen on, IPv4; loopback by default.
        port: the port; 0 for a free one.
        n_threads: threads of the CPU; by default as many as this process may use.
        devices: names from `minerva_native.devices()`; by default all but the CPU, or the CPU if there is nothing else.
        on_listening: called with the address ("host:port") and the devices, once clients can connect.

    Raises:
        DeviceError: there is no such device, this build has no RPC, or what a client asked for made a computation fail.
        OSError: the address cannot be listened on.
    """
    if not isinstance(host, str):
        raise TypeError(f"host must be a str, not {what(host)}")
    if not re.fullmatch(_HOST, host):
        raise ValueError(f"host must be an IPv4 address or a name, such as '127.0.0.1', not {host!r}")
    port = integer("port", port, 0, 65535)
    threads = available_cpus() if n_threads is None else integer("n_threads", n_threads, 1, 512)
    if isinstance(devices, str):
        raise TypeError(f"devices must be a list of names, not a str: [{devices!r}]")
    function("on_listening", on_listening)
    chosen = _offered(None if devices is None else list(many("devices", devices)))
    if not lib.minerva_has_rpc():
        raise DeviceError("this build has no RPC (GGML_RPC=OFF): build it without that option")
    try:
        listener = socket.create_server((host, port), backlog=4)
    except OSError as error:
        why = str(error.strerror).partition(" (while ")[0]  # without the address as a tuple
        raise OSError(error.errno, why, f"{host} port {port}") from None
    with listener:
        address = "{}:{}".format(*listener.getsockname()[:2])
        if on_listening:
            on_listening(address, [described(pointer) for pointer in chosen])
        array = ffi.new("ggml_backend_dev_t[]", chosen)
        code = lib.minerva_rpc_serve(listener.fileno(), address.encode(), threads, len(chosen), array)
        callbacks.raise_kept()
        if code == lib.MINERVA_THREW:
            raise DeviceError(f"the worker has failed: {thrown()}")


def _offered(names: list[str] | None) -> list[Any]:
    if names is not None:
        if not names:
            raise ValueError("devices must name at least one")
        return select(names, offload=False)
    every = on_this_machine()
    kinds = [described(pointer).type for pointer in every]
    fast = [pointer for pointer, kind in zip(every, kinds, strict=True) if kind not in ("cpu", "accel")]
    return fast or [pointer for pointer, kind in zip(every, kinds, strict=True) if kind == "cpu"][:1]
