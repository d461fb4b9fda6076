"""Show the build, and what a model's file says about it."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import minerva_native as mn

from .messages import as_json, count, folded, printable, room, size
from .options import add_json, add_model, load_model

LONGEST_VALUE = 100  # characters of a metadata value to print
LONGEST_LIST = 8  # items


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the build, and the model."""
    with load_model(options, vocab_only=not options.rpc) as model:  # where weights go is known once they are there
        build, facts, metadata = mn.build_info(), model_facts(model), dict(model.metadata)
        placement = {part.device: part for part in model.placement}
    if options.json:
        where = {"placement": [dataclasses.asdict(part) for part in placement.values()]} if placement else {}
        print(as_json({"version": mn.__version__, "build": build, "model": facts, **where, "metadata": metadata}))
        return 0
    print(f"minerva-native {mn.__version__}")
    places = {name: placed(part) for name, part in placement.items()}
    for section in (build, for_people(facts), *([places] if places else []), metadata):
        print()
        print_section({printable(name): summary(value) for name, value in section.items()}, room())
    return 0


def model_facts(model: mn.Model) -> dict[str, Any]:
    """Return the properties of the model."""
    return {
        "path": str(model.path),
        "architecture": model.architecture,
        "file_type": model.file_type,
        "n_params": model.n_params,
        "size_bytes": model.size_bytes,
        "n_embd": model.n_embd,
        "n_layer": model.n_layer,
        "n_mtp_layers": model.n_mtp_layers,
        "n_ctx_train": model.n_ctx_train,
        "n_vocab": model.tokenizer.n_vocab,
        "vocabulary": model.tokenizer.type,
    }


def for_people(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the properties of a model with their units."""
    n_heads = facts["n_mtp_layers"]
    return {
        "path": facts["path"],
        "architecture": facts["architecture"],
        "quantisation": facts["file_type"],
        "weights": f"{size(facts['size_bytes'])}, {count(facts['n_params'])} parameters",
        "width": f"{facts['n_embd']:,}",
        "layers": f"{facts['n_layer']:,}" + (f", and {n_heads} that can draft (MTP)" if n_heads else ""),
        "trained context": f"{facts['n_ctx_train']:,} tokens",
        "vocabulary": f"{facts['n_vocab']:,} tokens, {facts['vocabulary']}",
    }


def placed(part: mn.Placement) -> str:
    """Return what of a model is on a device."""
    output = " and the output" if part.has_output else ""
    return f"{part.layers:,} layers{output}, {size(part.size_bytes)} ({part.description})"


def print_section(texts: Mapping[str, str], width: int | None) -> None:
    """Print names and values, in lines of at most `width` columns if that is possible without breaking a word."""
    name_width = max(map(len, texts), default=0)
    for name, text in texts.items():
        line = f"{name:{name_width}}  {text}"
        longest = max(map(len, text.split()), default=0)
        if width is None or len(line) <= width or longest <= width - name_width - 2:
            print(folded(line, width, indent=name_width + 2))
        else:  # a value with a long word, such as a path, has lines of its own
            print(name)
            print(folded(f"  {text}", width, indent=2))


def summary(value: Any) -> str:
    """Return a value on one line: no quotes, lists cut short, numbers with separators."""
    if isinstance(value, list):
        shown = value[:3] if len(value) > LONGEST_LIST else value
        items = [summary(item) for item in shown] + ([f"... {len(value):,} in all"] if len(shown) < len(value) else [])
        return ", ".join(items) if value else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.7g}"  # as many digits as a 32-bit float has
    text = str(value)
    line = printable(" ".join(text.split()))
    if len(line) <= LONGEST_VALUE:
        return line
    return f"{line[:LONGEST_VALUE].rpartition(' ')[0] or line[:LONGEST_VALUE]} ... ({len(text):,} characters)"
