"""The options that subcommands share, under llama.cpp's names."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any, Literal

from minerva_native import Model

_MAX_TEXT_BYTES = 1 << 28


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `-m` and `-ngl`."""
    model = "a GGUF file; the built-in model by default"
    parser.add_argument("-m", "--model", type=file_name, metavar="FILE", help=model)
    layers = "layers to put on a GPU; -1 for all, auto for all if there is a GPU (default)"
    parser.add_argument("-ngl", "--gpu-layers", type=gpu_layers, default="auto", metavar="N", help=layers)


def load_model(options: argparse.Namespace, vocab_only: bool = False) -> Model:
    """Load what `-m` names, with a progress bar on a terminal if that takes a while."""
    if options.model is None:
        return Model.demo(gpu_layers=options.gpu_layers)
    from .progress import loading

    with loading(options.quiet) as on_progress:
        return Model.load(options.model, gpu_layers=options.gpu_layers, vocab_only=vocab_only, on_progress=on_progress)


def file_name(text: str) -> str:
    """Refuse an empty name, which an unset variable gives."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    return text


def utf8(text: str) -> str:
    """Return the text that an argument is in UTF-8, also if the locale says that it is another encoding."""
    try:
        return text.encode(errors="surrogateescape").decode()  # surrogates stand for bytes beyond the locale's
    except UnicodeError:
        raise argparse.ArgumentTypeError("it is not UTF-8 text") from None


def gpu_layers(text: str) -> Literal["auto"] | int:
    """Parse `-ngl`."""
    return "auto" if text == "auto" else int(text)


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add `-v` and `-q`."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument("-v", "--verbose", action="store_true", help="show all that is logged, not just warnings")
    how.add_argument("-q", "--quiet", action="store_true", help="show errors only: no warnings, progress or timings")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


SAMPLING_FLAGS = {"temperature": "--temp", "top_k": "--top-k", "top_p": "--top-p", "min_p": "--min-p", "seed": "-s"}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add `--temp` and the other sampling options."""
    add = parser.add_argument
    add("-s", "--seed", type=int, metavar="N", help="seed of the sampler; -1 for a random one (default)")
    add("--temp", type=float, dest="temperature", metavar="T", help="temperature; 0 is greedy (default 0.8)")
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens; 0 for all (default 40)")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the top tokens of total probability P (default 0.95)",
    )
    add(
        "--min-p",
        type=float,
        metavar="P",
        help="drop tokens less than P times as likely as the top one (default 0.05)",
    )


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling parameters that were given."""
    given = {name: value for name in SAMPLING_FLAGS if (value := getattr(options, name)) is not None}
    if given.get("seed") == -1:
        del given["seed"]
    return given


def add_text(parser: argparse.ArgumentParser) -> None:
    """Add `-p`, `-f`, `-e` and `--parse-special`."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "-p", "--prompt", type=utf8, metavar="TEXT", help="the text (default: standard input, unless a terminal)"
    )
    file = "read the text from a file; - for standard input"
    source.add_argument("-f", "--file", type=file_name, metavar="FILE", help=file)
    escapes = r"read \n, \t, \r, \', \", \\ and \x41 in -p and -f (default); standard input is taken as it is"
    parser.add_argument("-e", "--escape", action="store_true", default=True, help=escapes)
    no = "take backslashes as they are"
    parser.add_argument("--no-escape", action="store_false", dest="escape", help=no)
    special = "treat the names of special tokens in the text, such as <|im_start|>, as those tokens"
    parser.add_argument("--parse-special", action="store_true", help=special)


def read_text(options: argparse.Namespace) -> str:
    """Return what `-p` or `-f` give, or else standard input unless it is a terminal, without one final newline."""
    if options.prompt is not None:
        return unescaped(options.prompt, "-p") if options.escape else str(options.prompt)
    name = options.file
    if name in (None, "-") and sys.stdin is None:
        return ""
    if name is None and sys.stdin.isatty():
        return ""
    if name in (None, "-"):
        name, data = "standard input", sys.stdin.buffer.read(_MAX_TEXT_BYTES + 1)  # it may have no end
    else:
        with Path(name).open("rb") as file:
            data = file.read(_MAX_TEXT_BYTES + 1)
    if len(data) > _MAX_TEXT_BYTES:
        raise ValueError(f"{name} has more than {_MAX_TEXT_BYTES:,} bytes, too many for a prompt")
    try:
        text = data.decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8 text") from None
    return unescaped(text, name) if options.escape and name != "standard input" else text


_ESCAPE = re.compile(rb"\\(?:x([0-9A-Fa-f]{2})|([nrt'\"\\]))|\\.", re.DOTALL)
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def unescaped(text: str, source: str) -> str:
    r"""Return a text with the escapes of llama.cpp's command line replaced, such as \n; others stay as they are.

    `\x41` is a byte. Raises `ValueError`, which names the source, if the bytes are not UTF-8 in the end.
    """

    def character(found: re.Match[bytes]) -> bytes:
        if found[1]:
            return bytes.fromhex(found[1].decode())
        return _ESCAPED.get(found[2], found[2]) if found[2] else found[0]

    try:
        return _ESCAPE.sub(character, text.encode()).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{source} is not UTF-8 text once its escapes are read: see --no-escape") from None
