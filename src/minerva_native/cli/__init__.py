"""The `minerva` command: one file per subcommand, each using only the public API."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from minerva_native import MinervaError, __version__

from . import bench, devices, generate, info, tokenize

COMMANDS = {"generate": generate, "bench": bench, "info": info, "devices": devices, "tokenize": tokenize}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 (an error), 2 (usage), 130 (Ctrl-C)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the parent process closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show is no error
    parser = argparse.ArgumentParser(prog="minerva", description="Run GGUF models in-process, over libllama.")
    parser.add_argument("--version", action="version", version=f"minerva-native {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = str(module.__doc__).partition("\n")[0]
        module.add_arguments(subparsers.add_parser(name, help=summary, description=summary))
    options = parser.parse_args(arguments)
    status = 0
    try:
        status = COMMANDS[options.command].run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        pass  # the reader of our output has exited, which is no error
    except KeyboardInterrupt:
        status = 130
    except (MinervaError, OSError, ValueError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"minerva: error: {text}", file=sys.stderr)
        status = 1
    try:
        sys.stdout.flush()
    except OSError:  # Python would report the error again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status
