"""Parameters that a format writes as bare text: what their schema says they are."""

import json

from .calls import to_json
from .json_types import type_of
from .notation import PYTHON, PYTHON_WORDS
from .reader import CutOff, Malformed, Reader, is_scalar


def bare_to_json(text: str, types: frozenset[str]) -> str:
    """Return bare text as JSON, as one of some types if it can be read so, and else as a string.

    A schema that accepts strings and other things gets the other thing if the text is one, because templates write
    both alike.
    """
    bare = text.strip()
    literal = PYTHON_WORDS.get(bare, bare)
    if is_scalar(literal) and type_of(_number(literal)) in types:
        return literal
    if is_scalar(literal) and type_of(_number(literal)) == "number" and "integer" in types and "string" not in types:
        return literal  # 5.0 for an integer
    if bare[:1] in ("{", "[") and ("object" if bare[0] == "{" else "array") in types:
        return _container(bare) or to_json(text)
    return to_json(text)


def _number(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:  # more digits than Python reads
        return 0


def _container(text: str) -> str | None:
    """Return an object or a list as JSON; it may be spelled in Python's way."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return _python_to_json(text)
    return text


def _python_to_json(text: str) -> str | None:
    reader, parts = Reader(), list[str]()
    reader.push(text)
    reader.end()
    try:
        for _ in PYTHON.read_value(reader, parts.append):
            pass
    except (Malformed, CutOff):
        return None
    return None if reader.n_waiting else "".join(parts)
