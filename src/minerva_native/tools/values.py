"""Parameters that a format writes as bare text: what their schema says they are."""

import ast
import json
from collections.abc import Mapping
from typing import Any

from .calls import to_json
from .reader import is_scalar

_SCALARS = ("null", "boolean", "integer", "number")
_ALL_TYPES = (*_SCALARS, "object", "array", "string")
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_MAX_HOPS = 20


def accepted_types(schema: object, root: Mapping[str, Any]) -> frozenset[str]:
    """Return the JSON types that a schema accepts; its references lead into the schema `root`."""
    return frozenset(_types(schema, root, _MAX_HOPS))


def _types(schema: object, root: Mapping[str, Any], hops: int) -> set[str]:
    if not isinstance(schema, Mapping) or not hops:
        return set(_ALL_TYPES)
    found = set(_ALL_TYPES)
    reference, kind = schema.get("$ref"), schema.get("type")
    if isinstance(reference, str):
        found &= _types(_resolve(reference, root), root, hops - 1)
    if isinstance(kind, str):
        found &= {kind, *(("integer",) if kind == "number" else ())}
    elif isinstance(kind, list):
        found &= {each for each in kind if isinstance(each, str)}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            found &= set[str]().union(*(_types(each, root, hops - 1) for each in schema[key]))
    for each in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        found &= _types(each, root, hops - 1)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        found &= {_type_of(value) for value in values}
    return found or set(_ALL_TYPES)


def _resolve(reference: str, root: Mapping[str, Any]) -> object:
    found: object = root
    for part in reference.lstrip("#/").split("/") if reference != "#" else ():
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def resolved(schema: object, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema, or what it refers to in the schema `root`."""
    for _ in range(_MAX_HOPS):
        if not isinstance(schema, Mapping):
            break
        if not isinstance(reference := schema.get("$ref"), str):
            return schema
        schema = _resolve(reference, root)
    return {}


def _type_of(value: object) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object"}
    return kinds.get(type(value), "array")


def bare_to_json(text: str, types: frozenset[str]) -> str:
    """Return bare text as JSON, as one of some types if it can be read so, and else as a string.

    A schema that accepts strings and other things gets the other thing if the text is one, because templates write
    both alike.
    """
    bare = text.strip()
    literal = _PYTHON.get(bare, bare)
    if is_scalar(literal) and _type_of(_number(literal)) in types:
        return literal
    if is_scalar(literal) and _type_of(_number(literal)) == "number" and "integer" in types and "string" not in types:
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
        json.loads(text, strict=True)
    except (ValueError, RecursionError):
        try:
            return to_json(ast.literal_eval(text))
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return None
    return text
