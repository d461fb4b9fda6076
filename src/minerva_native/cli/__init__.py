"""The `minerva` command: one file per subcommand, each using only the public API."""

import argparse
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from minerva_native import ContextError, MinervaError, __version__

from . import bench, chat, devices, generate, info, pull, tokenize
from .messages import printable, say, shown_log
from .options import add_verbosity

COMMANDS = {
    "generate": generate,
    "chat": chat,
    "bench": bench,
    "pull": pull,
    "info": info,
    "devices": devices,
    "tokenize": tokenize,
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors show what was typed without its control characters."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and an error, and exit."""
        super().error(printable(message))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 (an error), 2 (usage), 130 (Ctrl-C)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the parent process closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show is no error
        if sys.stdout.encoding.lower() in ("ascii", "us-ascii") and not os.environ.get("PYTHONIOENCODING"):
            sys.stdout.reconfigure(encoding="utf-8")  # the POSIX locale, which says nothing about the terminal
    parser = Parser(prog="minerva", description="Run GGUF models in-process, over libllama.")
    parser.add_argument("--version", action="version", version=f"minerva-native {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = str(module.__doc__).partition("\n")[0]
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        module.add_arguments(subparser)
        add_verbosity(subparser)
    options = parser.parse_args(arguments)
    status = 0
    try:
        with shown_log(options.verbose, options.quiet) as log:
            status = COMMANDS[options.command].run(options)
            sys.stdout.flush()
            if status == 0:
                log.show_errors()
    except BrokenPipeError:
        pass  # the reader of our output has exited, which is no error
    except KeyboardInterrupt:
        status = 130
    except (MinervaError, OSError, ValueError, MemoryError) as error:
        say("error", _sentence(error, getattr(COMMANDS[options.command], "FLAGS", {})))
        status = 1
    try:
        sys.stdout.flush()
    except OSError:  # Python would report the error again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _sentence(error: Exception, flags: Mapping[str, str]) -> str:
    """Return what an error says, with the flags that people type behind the names that the package has for them."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if not isinstance(error, ValueError | ContextError):
        return str(error) or "there is not enough memory"
    name = rf"(?<![\w/.-])({'|'.join(flags) or '(?!)'})(=\d+)?(?![\w/.-])"
    return re.sub(name, lambda found: f"{found[0]} ({flags[found[1]]})", str(error))
