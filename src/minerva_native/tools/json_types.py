"""Which JSON types a schema accepts."""

from collections.abc import Mapping
from typing import Any

ANY = frozenset({"null", "boolean", "integer", "number", "object", "array", "string"})
TEXT = frozenset({"string"})
_MAX_DEPTH = 50


def accepted_types(schema: object, root: Mapping[str, Any]) -> frozenset[str]:
    """Return the JSON types that a schema accepts; its references lead into the schema `root`."""
    return _types(schema, root, {}, 0) or ANY


def _types(schema: object, root: Mapping[str, Any], known: dict[str, frozenset[str]], depth: int) -> frozenset[str]:
    """Return the types; a reference to what is being looked at adds none."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return ANY
    found, reference, kind = ANY, schema.get("$ref"), schema.get("type")
    if isinstance(reference, str):
        if reference not in known:
            known[reference] = frozenset()
            known[reference] = _types(_resolve(reference, root), root, known, depth + 1)
        found &= known[reference]
    if isinstance(kind, str):
        found &= {kind, *(("integer",) if kind == "number" else ())}
    elif isinstance(kind, list):
        found &= {each for each in kind if isinstance(each, str)}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            found &= frozenset[str]().union(*(_types(each, root, known, depth + 1) for each in schema[key]))
    for each in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        found &= _types(each, root, known, depth + 1)
    if (values := choices(schema)) is not None:
        found &= {type_of(value) for value in values}
    return found


def _resolve(reference: str, root: Mapping[str, Any]) -> object:
    found: object = root
    for part in reference.lstrip("#/").split("/") if reference != "#" else ():
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def resolved(schema: object, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema, or what it refers to in the schema `root`."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, Mapping):
            break
        if not isinstance(reference := schema.get("$ref"), str):
            return schema
        schema = _resolve(reference, root)
    return {}


def type_of(value: object) -> str:
    """Return the JSON type of a value; a whole number is an integer."""
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object"}
    return kinds.get(type(value), "array")


def choices(schema: object) -> list[Any] | None:
    """Return the values that a schema lists, if it does."""
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return list(values) if isinstance(values, list) else None
