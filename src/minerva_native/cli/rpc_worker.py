"""Lend this machine's devices to models that run on another."""

import argparse
import ipaddress

import minerva_native as mn

from .messages import printable, size, warn

FLAGS = {"host": "-H", "port": "-p", "n_threads": "-t", "devices": "-d"}
"""The options for what errors name otherwise."""

_WARNING = (
    "{} can be reached by others: there is no password and no encryption, whoever connects can end this worker, use it "
    "and read what is in it, and upstream calls the protocol a fragile and insecure proof of concept: never expose it "
    "to an open network"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("-H", "--host", default="127.0.0.1", help="the IPv4 address to listen on (127.0.0.1: this machine alone)")
    add("-p", "--port", type=int, default=50052, metavar="N", help="the port; 0 for a free one (50052)")
    add(
        "-t", "--threads", dest="n_threads", type=int, metavar="N", help="threads of the CPU (default: the usable CPUs)"
    )
    devices = "the devices to lend, as minerva devices names them (default: all but the CPU, or the CPU)"
    add("-d", "--device", dest="devices", type=names, metavar="NAME,...", help=devices)


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    if not is_loopback(options.host):
        warn(_WARNING.format(options.host))
    mn.rpc_worker(
        options.host, options.port, n_threads=options.n_threads, devices=options.devices, on_listening=announce
    )
    return 0


def announce(address: str, devices: list[mn.Device]) -> None:
    """Say where the worker listens, on stdout, and what it lends."""
    host, _, port = address.rpartition(":")
    is_everywhere = host == "0.0.0.0"  # which is no address to connect to
    print(f"listening on all addresses of this machine, port {port}" if is_everywhere else f"listening on {address}")
    for device in devices:
        memory = f"{size(device.memory_free_bytes)} free of {size(device.memory_total_bytes)}"
        print(printable(f"{device.name}: {device.description} ({device.type}, {memory})"))
    endpoint = f"ADDRESS:{port}, with an address of this machine" if is_everywhere else address
    print(f"Ctrl-C ends it; to use it: minerva generate --rpc {endpoint}", flush=True)


def is_loopback(host: str) -> bool:
    """Return whether nobody else can connect to an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def names(text: str) -> list[str]:
    """Parse `-d`."""
    return [name for name in text.split(",") if name]
