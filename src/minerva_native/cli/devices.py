"""List the devices that can compute here."""

import argparse
import dataclasses

import minerva_native as mn

from .messages import as_json, folded, printable, room, size
from .options import add_json, add_rpc


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_rpc(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print every device, and every backend of this build."""
    devices, backends = [*mn.devices(), *mn.devices_at(options.rpc or ())], mn.compute_backends()
    if options.json:
        print(
            as_json(
                {
                    "devices": [dataclasses.asdict(device) for device in devices],
                    "backends": [_facts(backend) for backend in backends],
                }
            )
        )
        return 0
    lines = [
        f"{device.name}: {device.description} ({device.type}, {size(device.memory_total_bytes)}, "
        f"{size(device.memory_free_bytes)} free)"
        for device in devices
    ]
    for line in [*lines, *map(_line, backends)]:
        print(folded(printable(line), room(), indent=2))
    return 0


def _facts(backend: mn.ComputeBackend) -> dict[str, object]:
    return {**dataclasses.asdict(backend), "file": None if backend.file is None else str(backend.file)}


def _line(backend: mn.ComputeBackend) -> str:
    state = "loaded" if backend.is_loaded else "not loaded"
    of_file = f", {backend.variant}" if backend.variant else ""
    return f"backend {backend.name}: {state}{of_file}{': ' if backend.why_not else ''}{backend.why_not}"
