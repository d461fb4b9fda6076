"""Show the token ids of a text."""

import argparse

from .messages import as_json
from .options import add_json, add_model, add_text, load_model, read_text

FLAGS = {"add_special=False": "--no-bos", "parse_special=True": "--parse-special"}
"""The options for what errors name otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model(parser)
    add_text(parser)
    parser.add_argument("--no-bos", action="store_true", help="do not add the special tokens that the model expects")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print one token per line, id and text, or one JSON object."""
    with load_model(options, vocab_only=True) as model:
        tokenizer = model.tokenizer
        ids = tokenizer.encode(read_text(options), add_special=not options.no_bos, parse_special=options.parse_special)
        pieces = [tokenizer.piece(token, special=True).decode(errors="replace") for token in ids]
    if options.json:
        print(as_json({"ids": ids, "pieces": pieces}))
        return 0
    for token, piece in zip(ids, pieces, strict=True):
        print(f"{token:6d}  {piece!r}")
    return 0
