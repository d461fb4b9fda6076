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
    """Print every device."""
    found = [*mn.devices(), *mn.devices_at(options.rpc or ())]
    if options.json:
        print(as_json({"devices": [dataclasses.asdict(device) for device in found]}))
        return 0
    for device in found:
        memory = f"{size(device.memory_total_bytes)}, {size(device.memory_free_bytes)} free"
        line = printable(f"{device.name}: {device.description} ({device.type}, {memory})")
        print(folded(line, room(), indent=2))
    return 0
