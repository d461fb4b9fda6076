"""The `minerva` command: one file per subcommand, each using only the public API."""

import argparse
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from minerva_native import ContextError, DeviceError, MinervaError, SamplingError, TokenizerError, __version__

from . import bench, cache, chat, devices, generate, info, pull, rpc_worker, serve, tokenize
from .messages import printable, say, shown_log
from .options import add_verbosity

COMMANDS = {
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "bench": bench,
    "pull": pull,
    "cache": cache,
    "info": info,
    "devices": devices,
    "tokenize": tokenize,
    "rpc-worker": rpc_worker,
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and show what was typed without its control characters.

    Attributes:
        options: what `add_argument` has made.
    """

    def __init__(self, **settings: Any):
        self.options: list[argparse.Action] = []
        super().__init__(**settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """Add an option."""
        self.options.append(super().add_argument(*names, **settings))
        return self.options[-1]

    def as_typed(self, flag: str, arguments: Sequence[str]) -> str:
        """Return the spelling of an option that was typed, such as --ctx-size for -c; `flag` if it was not."""
        names = next((option.option_strings for option in self.options if flag in option.option_strings), [])
        typed = [name for word in arguments if (name := word.partition("=")[0]) in names]
        return typed[-1] if typed else flag

    def error(self, message: str) -> NoReturn:
        """Print an error, and exit."""
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 (an error), 2 (usage), 130 (Ctrl-C)."""
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        return 130


def _run(arguments: Sequence[str]) -> int:
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
    commands: dict[str, Parser] = {}
    for name, module in COMMANDS.items():
        summary = str(module.__doc__).partition("\n")[0]
        subparser = commands[name] = subparsers.add_parser(name, help=summary, description=summary)
        module.add_arguments(subparser)
        add_verbosity(subparser)
    options, unknown = parser.parse_known_args(arguments)
    command = commands[options.command]
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
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
        flags = getattr(COMMANDS[options.command], "FLAGS", {})
        say("error", _sentence(error, {name: command.as_typed(flag, arguments) for name, flag in flags.items()}))
        status = 1
    try:
        sys.stdout.flush()
    except OSError:  # Python would report the error again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _sentence(error: Exception, flags: Mapping[str, str]) -> str:
    """Return what an error says, with the options that people type in place of the names that the package has."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if not isinstance(error, ValueError | ContextError | DeviceError | SamplingError | TokenizerError):
        return str(error) or "there is not enough memory"
    return in_options(str(error), flags)


_KV_TYPES = re.compile(r"""kv_type=\(['"](\w+)['"], ['"](\w+)['"]\)""")
_VALUE = r"""-?\d+(?:\.\d+)?|"[^"]*"|'[^']*'"""


def in_options(sentence: str, flags: Mapping[str, str]) -> str:
    """Return a sentence with options in place of API arguments: "-c 64" for "n_ctx=64", and "-c" for "n_ctx".

    A name in `flags` may be "name=value" too, for an option that stands for that value.
    """
    if "kv_type" in flags:
        sentence = _KV_TYPES.sub(r"-ctk \1 -ctv \2", sentence)

    def option(found: re.Match[str]) -> str:
        flag, value = flags[found["name"]].replace(", ", " or "), found["value"]
        if value is not None and found["unit"]:
            return f"the {value}{found['unit']} of {flag}"
        if value is not None:
            return f"{flag}{' = ' if ' + ' in flag else ' '}{value.strip(chr(34) + chr(39))}"
        is_english = not re.search("[_=]", found["name"]) and not sentence.startswith(" must ", found.end())
        return found[0] if is_english else flag

    names = "|".join(re.escape(name) for name in sorted(flags, key=len, reverse=True)) or "(?!)"
    return re.sub(
        rf"(?<![\w/.-])(?P<name>{names})(?:=(?P<value>{_VALUE})(?P<unit> cells)?)?(?![\w/.-])", option, sentence
    )
