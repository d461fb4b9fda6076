"""Measure the latency of decoding: llama-bench's tests, and where the time of a token goes."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import product
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from minerva_native import FLASH_ATTENTION, KV_TYPES, Context, MinervaError, available_cpus

from .messages import placed, printable, say, warn, warnings_after
from .options import (
    LOADING_FLAGS,
    SAMPLING_FLAGS,
    add_overrides,
    add_rpc,
    add_sampling,
    file_name,
    gpu_layers,
    of_loading,
    sampling,
)
from .progress import measuring

if TYPE_CHECKING:
    from minerva_native.benchmark import Source, Test
    from minerva_native.benchmark.report import Row, Writer

FORMATS = ("table", "md", "json", "jsonl", "csv")

_MAX_RANGE = 10_000

T = TypeVar("T")

FLAGS = {
    "n_ctx": "-d + -p + -n",
    "n_batch": "-b",
    "n_ubatch": "-ub",
    "n_threads": "-t",
    "kv_type": "-ctk, -ctv",
    "flash_attention": "-fa",
    "gpu_layers": "-ngl",
    **LOADING_FLAGS,
    **SAMPLING_FLAGS,
}
"""The options for what errors name otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "Options marked * take several values, by being repeated or (except -m and -pg) separated by commas; "
        "every combination is tested. "
        "Numbers can be ranges: FIRST-LAST, FIRST-LAST+STEP, FIRST-LAST*FACTOR."
    )
    add = parser.add_argument

    def several(*names: str, type: Callable[[str], Sequence[Any]], help: str, metavar: str = "N", dest: str) -> None:
        add(*names, action="append", type=type, metavar=metavar, dest=dest, help=f"* {help}")

    model = "* a GGUF file; the built-in model by default"
    add("-m", "--model", action="append", type=file_name, metavar="FILE", help=model)
    several("-p", "--n-prompt", type=numbers, dest="n_prompt", help="test prompts of N tokens; 0 for none (512)")
    several("-n", "--n-gen", type=numbers, dest="n_gen", help="test generating N tokens; 0 for none (128)")
    several("-pg", type=pair, metavar="PP,TG", dest="pg", help="test a prompt of PP tokens with TG generated after it")
    several("-d", "--n-depth", type=numbers, dest="n_depth", help="tokens in the KV cache before the test (0)")
    several("-b", "--batch-size", type=counts, dest="n_batch", help="prompt tokens in one call (2048)")
    several("-ub", "--ubatch-size", type=counts, dest="n_ubatch", help="prompt tokens in one pass (512)")
    several("-t", "--threads", type=counts, dest="n_threads", help="threads (the usable CPUs)")
    kinds = one_of(KV_TYPES)
    several("-ctk", "--cache-type-k", type=kinds, metavar="TYPE", dest="type_k", help="type of the cached keys (f16)")
    several("-ctv", "--cache-type-v", type=kinds, metavar="TYPE", dest="type_v", help="type of the cached values (f16)")
    flash = one_of(FLASH_ATTENTION, {"1": "on", "0": "off", "-1": "auto"})
    several("-fa", "--flash-attn", type=flash, metavar="on|off|auto", dest="flash", help="flash attention (auto)")
    layers = "layers to put on GPUs; -1 for all, auto for as many as fit, if there is a GPU (auto)"
    several("-ngl", "--gpu-layers", "--n-gpu-layers", type=gpu_layer_list, dest="gpu_layers", help=layers)
    mmap = one_of(("0", "1"), {"none": "0", "mmap": "1"})
    how = "map the file into memory, or read it (mmap)"
    several("-lm", "--load-mode", "-mmp", "--mmap", type=mmap, metavar="mmap|none", dest="mmap", help=how)
    add_rpc(parser)
    add_overrides(parser)
    add("-r", "--repetitions", type=positive, default=5, metavar="N", help="how often to run each test (5)")
    add("--no-warmup", action="store_true", help="do not evaluate anything before the measurement")
    add("--no-parts", action="store_true", help="do not run the decode loop to time its parts")
    add_sampling(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("-o", "--output", choices=FORMATS, default="table", help="what to print (table)")
    output.add_argument("--json", action="store_true", help="print one JSON object, the same as -o json")
    add("--plot", type=file_name, metavar="FILE", help="plot the latencies of tokens into an image, such as out.png")
    against = parser.add_mutually_exclusive_group()
    results = "compare with results written by -o json or jsonl"
    against.add_argument("--baseline", type=file_name, metavar="FILE", help=results)
    in_turns = "run upstream's llama-bench in turns with this benchmark"
    against.add_argument("--compare-llama-bench", type=file_name, metavar="PATH", help=in_turns)
    fail = "exit with 1 if the median ratio of a test is below this, such as 0.97, or a test could not be compared"
    add("--fail-below", type=ratio, metavar="RATIO", help=fail)
    parser.set_defaults(refuse=parser.error)


def run(options: argparse.Namespace) -> int:
    """Run every test; the exit status is 1 if a comparison is below `--fail-below`."""
    if options.fail_below is not None and not (options.baseline or options.compare_llama_bench):
        options.refuse("--fail-below needs something to compare with: --baseline or --compare-llama-bench")
    if options.compare_llama_bench and (placement := of_loading(options)):
        given = ", ".join(LOADING_FLAGS[name] for name in placement)
        options.refuse(f"--compare-llama-bench has no place beside {given}: llama-bench would not do the same")
    from minerva_native.benchmark import compare, machine, plot

    sources, tests = read_sources(options), read_tests(options)
    if not tests:
        options.refuse("there is nothing to test: -p, -n and -pg leave no tokens")
    if options.plot and not any(test.n_gen for test in tests):
        options.refuse("there is nothing to plot: no test generates tokens (see -n)")
    if options.plot:
        plot.check(options.plot)
    settings = {
        "repetitions": options.repetitions,
        "warm_up": not options.no_warmup,
        "sampling": sampling(options),
        "take_apart": not options.no_parts,
        "baseline": compare.load(options.baseline) if options.baseline else (),
        "llama_bench": compare.LlamaBench(options.compare_llama_bench) if options.compare_llama_bench else None,
    }
    if settings["baseline"]:
        missing = [test.name for test in tests if not compare.has(settings["baseline"], test)]
        if len(missing) == len(tests):
            raise ValueError(f"{options.baseline} has none of these tests: there is nothing to compare with")
        if missing and options.fail_below is not None:
            raise ValueError(f"{options.baseline} has no {', '.join(missing)}: --fail-below could not judge all tests")
    for sentence in machine.noise(max(test.n_threads for test in tests)):
        warn(sentence)
    is_table = not options.json and options.output in ("table", "md")
    with warnings_after(is_table):
        rows = measure(options, sources, tests, settings, is_table)
    return verdict(rows, options.fail_below) if settings["baseline"] or settings["llama_bench"] else 0


def measure(
    options: argparse.Namespace,
    sources: "Sequence[Source]",
    tests: "Sequence[Test]",
    settings: dict[str, Any],
    is_table: bool,
) -> "list[Row]":
    """Run the tests and write each result as soon as it is there; return all of them."""
    from minerva_native import benchmark
    from minerva_native.benchmark import plot

    is_quiet = options.quiet or (is_table and not sys.stderr.isatty() and is_same_file(sys.stdout, sys.stderr))
    writer, rows = make_writer(options, sources, tests, sys.stdout), list["Row"]()

    placements = set[str]()

    def show_placement(context: Context) -> None:
        if not options.quiet and (where := placed(context)) and where not in placements:
            placements.add(where)
            progress.pause()
            say("placement", where)

    def finish() -> None:
        writer.end()
        if options.plot and any(row["token_ns"] for row in rows):
            plot.draw(rows, options.plot)

    try:
        with measuring(len(sources) * len(tests), is_quiet) as progress:
            for source in sources:
                for row in benchmark.bench(
                    source, tests, on_progress=progress.update, on_context=show_placement, **settings
                ):
                    progress.pause()
                    writer.row(shown(row) if is_table or options.output == "csv" else row)
                    rows.append(row)
                    for sentence in doubts(row, options):
                        warn(sentence)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            warn(f"interrupted: {len(rows)} of {len(sources) * len(tests)} tests are finished")
        if isinstance(error, BrokenPipeError) and options.fail_below is not None:
            raise MinervaError("the output was closed before all tests were compared") from None
        with suppress(OSError):  # report the first error, not this one
            finish()
        raise
    finish()
    return rows


def is_same_file(*files: TextIO) -> bool:
    """Return whether what is written to these goes to one place, such as a log."""
    try:
        return len({os.fstat(file.fileno())[:3] for file in files}) == 1
    except (OSError, ValueError):  # not all of them are files
        return False


def read_sources(options: argparse.Namespace) -> "list[Source]":
    """Return which models are loaded, and how."""
    from minerva_native.benchmark import Source

    layers, mmap, placement = flat(options.gpu_layers, ["auto"]), flat(options.mmap, ["1"]), of_loading(options)
    every = product(options.model or [None], layers, mmap)
    return [Source(path, n, mapped == "1", placement) for path, n, mapped in every]


def read_tests(options: argparse.Namespace) -> "list[Test]":
    """Return the tests that the options ask for, every combination, in llama-bench's order."""
    from minerva_native.benchmark import Test

    lengths = [
        *((n, 0) for n in flat(options.n_prompt, [512])),
        *((0, n) for n in flat(options.n_gen, [128])),
        *flat(options.pg, []),
    ]
    settings = product(
        flat(options.n_batch, [2048]),
        flat(options.n_ubatch, [512]),
        flat(options.type_k, ["f16"]),
        flat(options.type_v, ["f16"]),
        flat(options.flash, ["auto"]),
        flat(options.n_threads, [available_cpus()]),
        flat(options.n_depth, [0]),
    )
    return [
        Test(n_prompt, n_gen, depth, n_batch, n_ubatch, n_threads, type_k, type_v, flash)
        for n_batch, n_ubatch, type_k, type_v, flash, n_threads, depth in settings
        for n_prompt, n_gen in lengths
        if n_prompt or n_gen
    ]


def make_writer(
    options: argparse.Namespace, sources: "Sequence[Source]", tests: "Sequence[Test]", file: TextIO
) -> "Writer":
    """Return what writes the results."""
    from minerva_native.benchmark import report

    match "json" if options.json else options.output:
        case "json":
            return report.Json(file)
        case "jsonl":
            return report.JsonLines(file)
        case "csv":
            return report.Csv(file)
    columns = report.columns(
        [
            {
                **test._asdict(),
                "test": test.name,
                "flash_attn": test.flash_attention,
                "n_gpu_layers": source.gpu_layers,
                "mmap": source.mmap,
            }
            for source in sources
            for test in tests
        ],
        options.repetitions,
        is_compared=bool(options.baseline or options.compare_llama_bench),
        with_model=options.output == "md",
    )
    return report.Markdown(file, columns) if options.output == "md" else report.Screen(file, columns)


def shown(row: "Row") -> "Row":
    """Return a result as people may see it: names from files without their control characters."""
    return {name: printable(value) if isinstance(value, str) else value for name, value in row.items()}


def doubts(row: "Row", options: argparse.Namespace) -> Iterator[str]:
    """Yield reasons to doubt a result, as sentences."""
    from minerva_native.benchmark import WIDE_SPREAD

    spread = row["stddev_ts"] / row["avg_ts"]
    if spread > WIDE_SPREAD:
        yield f"{row['test']} varies by {spread:.1%} between repetitions, more than {WIDE_SPREAD:.0%}: noise"
    if not options.baseline:
        return
    if row["ratio"] is None:
        yield f"the baseline has no {row['test']} of this model"
    elif differs := row["baseline_differs"]:
        yield f"{row['test']} differs from the baseline in {', '.join(differs)}"
    if row["ratio"] is not None and (n := len(row["compared_samples_ts"])) < len(row["samples_ts"]):
        yield f"{row['test']} has {n} repetitions in the baseline: no more are compared"


def verdict(rows: "Sequence[Row]", fail_below: float | None) -> int:
    """Print which comparisons are below the limit, and return the exit status."""
    compared = [row for row in rows if row["ratio"] is not None]
    if not compared:
        raise ValueError("the baseline has none of these tests: nothing was compared")
    if fail_below is None:
        return 0
    slower = [row for row in compared if row["ratio"] < fail_below]
    for row in slower:
        print(f"minerva: {row['test']} has ratio {row['ratio']:.3f}, less than {fail_below}", file=sys.stderr)
    return 1 if slower or len(compared) < len(rows) else 0


def flat(lists: list[list[T]] | None, default: list[T]) -> list[T]:
    """Return all values of an option that can be repeated, or the default if it was not given."""
    return [value for values in lists for value in values] if lists else default


def numbers(text: str) -> list[int]:
    """Parse a list of numbers of 0 or more, such as "1,2", "0-8+4" or "128-1024*2"."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?", part.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"{part!r} is not a number or a range, such as 128 or 128-1024*2")
        first, last = int(match[1]), int(match[2] or match[1])
        step = (match[3] or "+", int(match[4] or 1))
        if last < first:
            raise argparse.ArgumentTypeError(f"the range {part!r} is empty")
        if step == ("+", 0) or (step[0] == "*" and (step[1] < 2 or first == 0)):
            raise argparse.ArgumentTypeError(f"the range {part!r} never ends")
        if (last - first) // (step[1] if step[0] == "+" else last) >= _MAX_RANGE:
            raise argparse.ArgumentTypeError(f"the range {part!r} has more than {_MAX_RANGE} numbers")
        while first <= last:
            found.append(first)
            first = first + step[1] if step[0] == "+" else first * step[1]
    return found


def counts(text: str) -> list[int]:
    """Parse a list of numbers of 1 or more."""
    found = numbers(text)
    if 0 in found:
        raise argparse.ArgumentTypeError("0 is not a number of 1 or more")
    return found


def ratio(text: str) -> float:
    """Parse `--fail-below`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a ratio, such as 0.97")
    return value


def positive(text: str) -> int:
    """Parse a number of 1 or more."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def pair(text: str) -> list[tuple[int, int]]:
    """Parse `-pg`."""
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers, such as 512,128")
    return [(int(match[1]), int(match[2]))]


def one_of(names: Sequence[str] | dict[str, int], others: dict[str, str] | None = None) -> Callable[[str], list[str]]:
    """Return a parser for a list of names; `others` maps other spellings to them."""

    def parse(text: str) -> list[str]:
        found = [(others or {}).get(name, name) for name in text.split(",")]
        for name in found:
            if name not in names:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join([*names, *(others or {})])}")
        return found

    return parse


def gpu_layer_list(text: str) -> list[Any]:
    """Parse `-ngl`."""
    try:
        return [gpu_layers(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, or auto") from None
