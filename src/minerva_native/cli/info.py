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
            print(f"{names[name]:{width}}  {summary(value)}")
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


def summary(value: Any) -> str:
    """Render a value on one line."""
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(map(repr, value[:3]))}, ... {len(value):,} in all]"
    text = value if isinstance(value, str) else repr(value)
    line = printable(" ".join(text.split()))
    return line if len(line) <= LONGEST_VALUE else f"{line[:LONGEST_VALUE]}... ({len(text):,} characters)"
