"""Show the build, and what a model's file says about it."""

import argparse
from typing import Any

import minerva_native as mn

from .messages import as_json, printable
from .options import add_json, add_model, load_model

LONGEST_VALUE = 100  # characters of a metadata value to print


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the build, and the model."""
    with load_model(options, vocab_only=True) as model:
        build, facts, metadata = mn.build_info(), model_facts(model), dict(model.metadata)
    if options.json:
        print(as_json({"version": mn.__version__, "build": build, "model": facts, "metadata": metadata}))
        return 0
    print(f"minerva-native {mn.__version__}")
    for section in (build, facts, metadata):
        print()
        names = {name: printable(name) for name in section}
        width = max(map(len, names.values()))
        for name, value in section.items():
            print(f"{names[name]:{width}}  {summary(value, name)}")
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
        "n_ctx_train": model.n_ctx_train,
        "n_vocab": model.tokenizer.n_vocab,
        "vocabulary": model.tokenizer.type,
    }


def summary(value: Any, name: str = "") -> str:
    """Render a value on one line, for people: a size with its unit, yes or no, lists without their brackets."""
    if name == "size_bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
    if name == "n_params":
        return f"{value / 1e9:.2f} billion" if value >= 1e9 else f"{value / 1e6:.1f} million"
    if isinstance(value, dict):
        return ", ".join(f"{key}={summary(one)}" for key, one in value.items()) or "-"
    if isinstance(value, list):
        shown = ", ".join(
            repr(one) if isinstance(one, str) else summary(one) for one in value[: 3 if len(value) > 8 else 8]
        )
        return f"{shown}, ... ({len(value):,} in all)" if len(value) > 8 else shown or "-"
    text = value if isinstance(value, str) else _words(value)
    line = printable(" ".join(text.split()))
    return line if len(line) <= LONGEST_VALUE else f"{line[:LONGEST_VALUE]}... ({len(text):,} characters)"


def _words(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.7g}" if isinstance(value, float) else f"{value:,}"
