"""The options that subcommands share, under llama.cpp's names."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import minerva_native as mn
from minerva_native import DEMO_PATH, Model

_MAX_TEXT_BYTES = 1 << 28


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `-m` and `-ngl`."""
    model = "a GGUF file; the built-in model by default"
    parser.add_argument("-m", "--model", type=file_name, metavar="FILE", help=model)
    parser.add_argument("-ngl", "--gpu-layers", type=gpu_layers, default="auto", metavar="N", help=LAYERS)
    add_rpc(parser)


LLM_N_SEQ = 8
"""How many sequences an `LLM` has for one request at a time."""

LAYERS = "layers to put on GPUs; -1 for all, auto for as many as fit, if there is a GPU (default)"


def add_rpc(parser: argparse.ArgumentParser) -> None:
    """Add `--rpc`."""
    workers = "RPC workers that take layers of the model too (see minerva rpc-worker)"
    parser.add_argument("--rpc", type=endpoints, metavar="HOST:PORT,...", help=workers)


def endpoints(text: str) -> list[str]:
    """Parse `--rpc`."""
    return [endpoint for endpoint in text.split(",") if endpoint]


def load_model(
    options: argparse.Namespace, vocab_only: bool = False, context: mn.ContextOptions | None = None
) -> Model:
    """Load what `-m` names, with a progress bar on a terminal if that takes a while.

    `context`: what `-ngl` is to leave room for.
    """
    given = of_loading(options)
    if options.model is None and not given:
        return Model.demo(gpu_layers=options.gpu_layers)
    from .progress import loading

    path = DEMO_PATH if options.model is None else options.model
    with loading(options.quiet) as on_progress:
        try:
            return Model.load(
                path,
                gpu_layers=options.gpu_layers,
                vocab_only=vocab_only,
                context=context,
                on_progress=on_progress,
                **given,
            )
        except TypeError as error:  # an override of another type than the file's key
            raise ValueError(str(error)) from None


LOADING_FLAGS = {
    "rpc": "--rpc",
    "kv_overrides": "--override-kv",
    "mlock": "--mlock",
    "split_mode": "-sm",
    "main_gpu": "-mg",
    "tensor_split": "-ts",
    "tensor_overrides": "-ot",
    "cpu_moe": "--cpu-moe",
    "n_cpu_moe": "--n-cpu-moe",
}


def of_loading(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `LOADING_FLAGS` that were given."""
    return {name: value for name in LOADING_FLAGS if (value := getattr(options, name, None)) is not None}


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add `--override-kv` and the other options of how a model is loaded."""
    add = parser.add_argument
    add(
        "--override-kv",
        dest="kv_overrides",
        type=kv_overrides,
        action=Updating,
        metavar="KEY=TYPE:VALUE,...",
        help="metadata to use instead of the file's; types: int, float, bool, str; can be repeated",
    )
    add("--mlock", action="store_true", default=None, help="keep the model in memory: the system must not swap it out")
    modes = ("none", "layer", "row", "tensor")
    add("-sm", "--split-mode", choices=modes, help="how several GPUs share the model (layer)")
    add("-mg", "--main-gpu", type=int, metavar="INDEX", help="the GPU that has all of it with -sm none (0)")
    shares = "how much of the model each GPU gets, in proportion, such as 3,1"
    add("-ts", "--tensor-split", type=tensor_split, metavar="N0,N1,...", help=shares)
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `-ot`, `--cpu-moe` and `--n-cpu-moe`."""
    add = parser.add_argument
    where = "put the tensors whose names a regular expression matches on a device, or on CPU; can be repeated"
    add(
        "-ot",
        "--override-tensor",
        dest="tensor_overrides",
        type=tensor_override,
        action=Updating,
        metavar="PATTERN=DEVICE",
        help=where,
    )
    experts = "keep the experts of a mixture of experts in this machine's memory"
    add("-cmoe", "--cpu-moe", action="store_true", default=None, help=experts)
    add("-ncmoe", "--n-cpu-moe", type=int, metavar="N", help="the same for the first N layers")


class Updating(argparse.Action):
    """Collects the entries of dicts."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Add the entries of one."""
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **values})


_OVERRIDE_TYPES: dict[str, Callable[[str], int | float | bool | str]] = {
    "int": int,
    "float": float,
    "bool": {"true": True, "false": False}.__getitem__,
    "str": str,
}


def kv_overrides(text: str) -> dict[str, int | float | bool | str]:
    """Parse `--override-kv`: comma-separated, with `"` around what has a comma in it."""
    import csv

    overrides: dict[str, int | float | bool | str] = {}
    for item in next(csv.reader([utf8(text)]), []):
        key, _, typed = item.partition("=")
        kind, colon, value = typed.partition(":")
        parse = _OVERRIDE_TYPES.get(kind)
        try:
            if not (key and colon and parse):
                raise ValueError
            overrides[key] = parse(value)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(
                f"{item!r} is not KEY=TYPE:VALUE with a value of type int, float, bool (true or false) or str"
            ) from None
    return overrides


def tensor_override(text: str) -> dict[str, str]:
    """Parse `-ot`."""
    pattern, equals, device = utf8(text).rpartition("=")
    if not (pattern and equals and device):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=DEVICE, such as ffn_down=CPU")
    return {pattern: device}


def tensor_split(text: str) -> list[float]:
    """Parse `-ts`."""
    try:
        return [float(share) for share in text.replace("/", ",").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, such as 3,1") from None


CONTEXT_FLAGS = {
    "n_threads_batch": "-tb",
    "rope_scaling_type": "--rope-scaling",
    "rope_freq_base": "--rope-freq-base",
    "rope_freq_scale": "--rope-freq-scale, --rope-scale",
    "yarn_orig_ctx": "--yarn-orig-ctx",
    "yarn_ext_factor": "--yarn-ext-factor",
    "yarn_attn_factor": "--yarn-attn-factor",
    "yarn_beta_slow": "--yarn-beta-slow",
    "yarn_beta_fast": "--yarn-beta-fast",
}

_OF_THE_MODEL = {"rope_freq_base": 0, "yarn_orig_ctx": 0, "yarn_ext_factor": -1}
"""What llama.cpp's flags take for the model's own value."""


def add_context(parser: argparse.ArgumentParser) -> None:
    """Add `-tb`, and the options of RoPE and YaRN."""
    add = parser.add_argument
    add("-tb", "--threads-batch", dest="n_threads_batch", type=int, metavar="N", help="threads for the prompt (as -t)")
    scalings = ("none", "linear", "yarn")
    scaling = "how to stretch RoPE to a longer context (default: as the model says, else linear)"
    add("--rope-scaling", dest="rope_scaling_type", choices=scalings, help=scaling)
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--rope-scale", type=float, metavar="N", help="for a context that is N times as long")
    scale.add_argument("--rope-freq-scale", type=float, metavar="N", help="the same as --rope-scale 1/N")
    add("--rope-freq-base", type=float, metavar="N", help="the base of RoPE's frequencies (default: the model's)")
    original = "YaRN: the context of the training, in tokens (default: the model's)"
    add("--yarn-orig-ctx", type=int, metavar="N", help=original)
    add("--yarn-ext-factor", type=float, metavar="N", help="YaRN: how much of it, 0 to 1; 0 is linear (1)")
    add("--yarn-attn-factor", type=float, metavar="N", help="multiply queries and keys; not with YaRN (1)")
    add("--yarn-beta-slow", type=float, metavar="N", help="YaRN: fewer turns than this are scaled (1)")
    add("--yarn-beta-fast", type=float, metavar="N", help="YaRN: more turns than this are left (32)")


def of_context(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_context` that were given."""
    if options.rope_scale is not None:
        if options.rope_scale <= 0:
            raise ValueError(f"--rope-scale must be above 0, not {options.rope_scale:g}")
        options.rope_freq_scale = 1 / options.rope_scale
    given = {name: value for name in CONTEXT_FLAGS if (value := getattr(options, name)) is not None}
    return {name: value for name, value in given.items() if _OF_THE_MODEL.get(name) != value}


def of_batches(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `-b`, `-ub` if there is one, `-t`, `-ctk`, `-ctv`, `-fa` and `--swa-full` say of a context."""
    given = {
        "n_batch": options.batch_size,
        "n_threads": options.threads,
        "kv_type": (options.cache_type_k, options.cache_type_v),
        "flash_attention": options.flash_attn,
        "swa_full": options.swa_full,
    }
    return given | ({"n_ubatch": options.ubatch_size} if hasattr(options, "ubatch_size") else {})


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


def add_constraint(parser: argparse.ArgumentParser) -> None:
    """Add `--grammar`, `--json-schema` and their files."""
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "-j", "--json-schema", type=utf8, metavar="SCHEMA", help="the answer is JSON that this schema describes"
    )
    one.add_argument(
        "-jf", "--json-schema-file", type=file_name, metavar="FILE", help="the same, with the schema in a file"
    )
    one.add_argument(
        "--grammar", type=utf8, metavar="GBNF", help="the answer is a text of this grammar, in llama.cpp's notation"
    )
    one.add_argument("--grammar-file", type=file_name, metavar="FILE", help="the same, with the grammar in a file")


def constraint(options: argparse.Namespace) -> mn.Constraint | None:
    """Return what the answer shall be; None for anything."""
    schema, grammar = options.json_schema, options.grammar
    if options.json_schema_file is not None:
        schema = Path(options.json_schema_file).read_text(encoding="utf-8")
    if options.grammar_file is not None:
        grammar = Path(options.grammar_file).read_text(encoding="utf-8")
    if grammar is not None:
        return mn.Constraint.gbnf(grammar)
    if schema is None:
        return None
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the JSON schema is not JSON: {error}") from None
    if not isinstance(parsed, dict | bool):
        raise ValueError("the JSON schema is neither an object nor true or false")
    return mn.Constraint.json_schema(parsed)


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
