"""JSON schemas: what has to be done to one before an engine compiles it."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from .errors import ConstraintError

Schema = dict[str, Any]

T = TypeVar("T")

_MOST_CHARACTERS = 1_000_000
_MOST_LEVELS = 100
_MOST_DEFINITIONS = 2_000

_OF_ONE = (
    *("items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties"),
)
_OF_LIST = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_OF_NAMES = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")

_MERGING = {"allOf", "if", "dependentSchemas", "unevaluatedProperties", "$dynamicRef"}

_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties"}


def prepare(schema: Any) -> Schema | bool:
    """Return a copy of a schema, as the engine shall see it.

    - An object whose schema names `properties`, and says nothing about others, has no others: models would go on
      inventing them. `additionalProperties: true` allows them. (Not in schemas that merge objects, as `allOf` does.)
    - What would have to be infinite, as an object that requires itself, is `false`: not allowed.

    Raises:
        TypeError: it is no schema.
        ConstraintError: it is too large or too deep, refers to something outside itself or to nothing, or nothing of
            finite length satisfies it.
    """
    if not isinstance(schema, Mapping | bool):
        raise TypeError(f"a JSON schema must be a dict or a bool, not {type(schema).__name__}")
    try:
        text = json.dumps(schema, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise ConstraintError(f"the schema is not made of JSON values ({error})") from None
    except RecursionError:
        raise ConstraintError(f"the schema is nested more than {_MOST_LEVELS} levels deep") from None
    if len(text) > _MOST_CHARACTERS:
        raise ConstraintError(f"the schema has {len(text):,} characters; at most {_MOST_CHARACTERS:,} are allowed")
    prepared: Schema | bool = json.loads(text)
    if isinstance(prepared, bool):
        return prepared
    nodes, targets = _with_targets(prepared)
    keys = {key for _, node in nodes for key in node}
    merges = bool(keys & _MERGING) or any("properties" in node and _alternatives(node) for _, node in nodes)
    if len(targets) > _MOST_DEFINITIONS:
        raise ConstraintError(f"the schema has {len(targets):,} references; at most {_MOST_DEFINITIONS:,} are allowed")
    for _, node in nodes:
        if not merges and "properties" in node and not node.keys() & _OPEN:
            node["additionalProperties"] = False
    if targets:
        _Ends(prepared, nodes, targets).check()
    return prepared


def blame(schema: Schema | bool, refuses: Callable[[Schema | bool], bool], path: str = "#") -> str:
    """Return where the innermost part is that an engine refuses, as a JSON pointer."""
    if isinstance(schema, bool):
        return path
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    while isinstance(schema, dict):
        for inner_path, inner in _children(schema, path):
            if refuses({**definitions, **inner} if isinstance(inner, dict) else inner):
                schema, path = inner, inner_path
                break
        else:
            break
    return path


def _alternatives(node: Schema) -> bool:
    return bool(node.keys() & {"anyOf", "oneOf", "$ref"})


def _children(node: Schema, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the schemas right inside a schema, with their paths."""
    for key in _OF_NAMES:
        named = node.get(key)
        if isinstance(named, dict):
            for name, inner in named.items():
                yield f"{path}/{key}/{name.replace('~', '~0').replace('/', '~1')}", inner
    for key in _OF_LIST:
        listed = node.get(key)
        if isinstance(listed, list):
            for at, inner in enumerate(listed):
                yield f"{path}/{key}/{at}", inner
    for key in _OF_ONE:
        if isinstance(node.get(key), dict | bool):
            yield f"{path}/{key}", node[key]


def _with_targets(root: Schema) -> tuple[list[tuple[str, Schema]], dict[int, Any]]:
    """Return every schema with its path, wherever a `$ref` finds it, and by their ids what the references mean."""
    waiting = [("#", root)]
    nodes: dict[int, tuple[str, Schema]] = {}
    targets: dict[int, Any] = {}
    while waiting:
        fresh = [(path, node) for start in waiting for path, node in _nodes(*start) if id(node) not in nodes]
        nodes |= {id(node): (path, node) for path, node in fresh}
        waiting = []
        for path, node in fresh:
            if "$ref" in node:
                targets[id(node)] = target = _target(root, node["$ref"], path)
                if isinstance(target, dict) and id(target) not in nodes:
                    waiting.append((node["$ref"], target))
    return list(nodes.values()), targets


def _nodes(path: str, schema: Schema) -> Iterator[tuple[str, Schema]]:
    """Yield every schema that is a dict, the outer ones first."""
    level: list[tuple[str, Schema]] = [(path, schema)]
    for _ in range(_MOST_LEVELS):
        yield from level
        level = [pair for path, node in level for pair in _children(node, path) if isinstance(pair[1], dict)]
        if not level:
            return
    raise ConstraintError(f"the schema is nested more than {_MOST_LEVELS} levels deep", path=level[0][0][:200])


def _target(root: Schema, reference: Any, path: str) -> Any:
    """Return what a `$ref` means; nothing is fetched."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise ConstraintError(
            f"{path}/$ref: {reference!r} is outside the schema, and nothing is fetched: only '#/...' is followed",
            path=path,
        )
    found: Any = root
    for part in reference.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            raise ConstraintError(f"{path}/$ref: the schema has no {reference}", path=path)
    return found


class _Ends:
    """Finds schemas that only something infinite would satisfy."""

    def __init__(self, root: Schema, nodes: list[tuple[str, Schema]], targets: dict[int, Any]):
        self._root, self._nodes, self._targets = root, nodes, targets
        self._ends: set[int] = set()

    def check(self) -> None:
        """Make them `false` where they are optional; raise `ConstraintError` if the whole is one."""
        waiting, n_before = self._nodes[::-1], -1  # the inner ones first
        while len(waiting) != n_before:
            n_before = len(waiting)
            for _, node in waiting:
                if self._can_end(node):
                    self._ends.add(id(node))
            waiting = [(path, node) for path, node in waiting if id(node) not in self._ends]
        if id(self._root) not in self._ends:
            path = waiting[0][0]
            raise ConstraintError(f"nothing finite satisfies the schema: {path} requires itself", path=path)
        for _, node in self._nodes:
            for key in ("properties", "patternProperties"):
                named = _part(node, key, dict[str, Any]())
                named.update((name, False) for name, inner in named.items() if not self._ended(inner))
            if "anyOf" in node:
                node["anyOf"] = [inner for inner in _part(node, "anyOf", list[Any]()) if self._ended(inner)]
            for key in ("items", "additionalProperties"):
                if not self._ended(node.get(key, True)):
                    node[key] = False

    def _ended(self, schema: Any) -> bool:
        return schema is not False and (not isinstance(schema, dict) or id(schema) in self._ends)

    def _can_end(self, node: Schema) -> bool:
        if not self._ended(self._targets.get(id(node), True)):
            return False
        for key, fits in (("allOf", all), ("anyOf", any), ("oneOf", any)):
            if key in node and not fits(map(self._ended, _part(node, key, list[Any]()))):
                return False
        kinds = node.get("type", "null")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if any(kind not in ("object", "array") for kind in kinds) or "enum" in node or "const" in node:
            return True
        return ("object" in kinds and self._object_can_end(node)) or ("array" in kinds and self._array_can_end(node))

    def _object_can_end(self, node: Schema) -> bool:
        properties, others = _part(node, "properties", dict[str, Any]()), node.get("additionalProperties", True)
        required = (name for name in _part(node, "required", list[Any]()) if isinstance(name, str))
        return all(self._ended(properties.get(name, others)) for name in required)

    def _array_can_end(self, node: Schema) -> bool:
        n_items, prefix = _part(node, "minItems", 0), _part(node, "prefixItems", list[Any]())
        is_covered = n_items <= len(prefix) or self._ended(node.get("items", True))
        return is_covered and all(map(self._ended, prefix[:n_items]))


def _part(node: Schema, key: str, default: T) -> T:
    """Return a part of a schema if it is of the right type; what is not is for the engine to refuse."""
    value = node.get(key)
    return value if isinstance(value, type(default)) else default
