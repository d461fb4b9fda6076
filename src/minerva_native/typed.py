"""Python types as JSON schemas, and JSON values as instances of them."""

import dataclasses
import datetime
import enum
import inspect
import re
import types
import typing
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ._arguments import what
from .errors import ConstraintError

Schema = dict[str, Any]

_SIMPLE: dict[Any, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    None: {"type": "null"},
    types.NoneType: {"type": "null"},
    Any: {},
    object: {},
    dict: {"type": "object"},
    list: {"type": "array"},
    datetime.datetime: {"type": "string", "format": "date-time"},
    datetime.date: {"type": "string", "format": "date"},
    datetime.time: {"type": "string", "format": "time"},
    uuid.UUID: {"type": "string", "format": "uuid"},
}


def schema_of(kind: Any, definitions: dict[str, Schema] | None = None) -> Schema:
    """Return the JSON schema of a type.

    Args:
        kind: a simple type, `list[...]`, `tuple[...]`, `set[...]`, `dict[str, ...]`, `Literal`, a union, an enum, a
            date or time, a dataclass, a `TypedDict`, a `NamedTuple`, or a pydantic model, and these within each other.
            The strings in `Annotated` are descriptions, and so is what a class's docstring says of its attributes.
        definitions: where the schemas of classes go; by default into the schema's "$defs".

    Raises:
        TypeError: there is no schema for it.
    """
    if definitions is not None:
        return _schema(kind, definitions)
    definitions = {}
    schema = _schema(kind, definitions)
    return {**schema, "$defs": definitions} if definitions else schema


def build(kind: Any, value: Any, where: str = "the value") -> Any:
    """Return a JSON value as an instance of a type, as `schema_of` describes it.

    Args:
        kind: the type.
        value: made of what `json.loads` returns.
        where: what it is, for messages.

    Raises:
        ConstraintError: the value is not of that type.
    """
    try:
        return _build(kind, value, where)
    except ConstraintError:
        raise
    except Exception as error:  # of the class that is built
        raise ConstraintError(f"{where} does not fit {_name(kind)}: {error}") from None


def plain(value: object) -> Any:
    """Return a value as JSON has it: instances of classes as dicts, enums as their values, dates as texts."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    return value


_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns?|Yields|Raises|Examples?|Notes?|Attributes):\s*$")
_ARGUMENT = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)")


def docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the description in a docstring of Google's style, and those of the arguments."""
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if _SECTION.match(line)), len(lines))
    found: dict[str, str] = {}
    section, name, indent = "", "", None
    for line in lines[first:]:
        if heading := _SECTION.match(line):
            section, indent, name = heading[1], None, ""
            continue
        if section not in ("Args", "Arguments", "Parameters", "Attributes") or not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None else indent
        argument = _ARGUMENT.match(line.strip())
        if depth <= indent and argument:
            name = argument[1]
            found[name] = argument[2].strip()
        elif name:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return "\n".join(lines[:first]).strip(), {name: text for name, text in found.items() if text}


def is_typed(kind: Any) -> bool:
    """Return whether something is a type that a schema may be taken from."""
    return isinstance(kind, type) or get_origin(kind) is not None or kind is None or kind is Any


def _schema(kind: Any, definitions: dict[str, Schema]) -> Schema:
    try:
        if kind in _SIMPLE:
            return dict(_SIMPLE[kind])
    except TypeError:  # not hashable
        raise TypeError(f"there is no JSON schema for {what(kind)}") from None
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is typing.Annotated:
        schema = _schema(arguments[0], definitions)
        texts = [text for text in arguments[1:] if isinstance(text, str)]
        return {**schema, "description": " ".join(texts)} if texts else schema
    if origin in (typing.Required, typing.NotRequired):
        return _schema(arguments[0], definitions)
    if origin is Literal:
        return {"enum": list(map(plain, arguments))}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(one, definitions) for one in arguments]}
    if origin is tuple and arguments[-1:] != (...,):
        prefix = [_schema(one, definitions) for one in arguments]
        return {"type": "array", "prefixItems": prefix, "items": False, "minItems": len(prefix)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if arguments[0] is not str:
            raise TypeError(f"the keys of {_name(kind)} must be str: JSON has no others")
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if isinstance(origin, type) and issubclass(origin, Sequence | set | frozenset):
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [member.value for member in kind]}
    if hasattr(kind, "model_json_schema"):
        own = kind.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(own.pop("$defs", {}))
        return dict(own)
    fields = _fields(kind)
    if fields is None:
        raise TypeError(f"there is no JSON schema for {_name(kind)}")
    name = kind.__name__
    if name not in definitions:
        definitions[name] = {}  # it may contain itself
        described = docstring(inspect.getdoc(kind) or "")[1]
        properties = {
            key: _schema(hint, definitions) | ({"description": described[key]} if key in described else {})
            for key, (hint, _) in fields.items()
        }
        required = [key for key, (_, is_required) in fields.items() if is_required]
        definitions[name] |= {"type": "object", "properties": properties, "required": required}
        definitions[name] |= {"additionalProperties": False}
    return {"$ref": f"#/$defs/{name}"}


def _fields(kind: Any) -> dict[str, tuple[Any, bool]] | None:
    """Return the fields of a class: their types, and whether they are required; None if it has none."""
    if not isinstance(kind, type):
        return None
    if dataclasses.is_dataclass(kind):
        hints, missing = get_type_hints(kind, include_extras=True), dataclasses.MISSING
        return {
            field.name: (hints[field.name], field.default is missing and field.default_factory is missing)
            for field in dataclasses.fields(kind)
            if field.init
        }
    if typing.is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        required: frozenset[str] = kind.__required_keys__  # type: ignore[attr-defined]
        return {name: (hint, name in required) for name, hint in hints.items()}
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        hints = get_type_hints(kind, include_extras=True)
        parameters = inspect.signature(kind).parameters
        return {name: (hint, parameters[name].default is inspect.Parameter.empty) for name, hint in hints.items()}
    return None


def _build(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (typing.Annotated, typing.Required, typing.NotRequired):
        return _build(arguments[0], value, where)
    if origin in (Union, types.UnionType):
        return _build_one_of(kind, value, where)
    if kind in (Any, object):
        return value
    if origin is Literal:
        _require(any(value == one and type(value) is type(one) for one in arguments), kind, value, where)
        return value
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        _require(any(value == member.value for member in kind), kind, value, where)
        return kind(value)
    if hasattr(kind, "model_validate"):
        return kind.model_validate(value)
    if kind in (datetime.datetime, datetime.date, datetime.time):
        return kind.fromisoformat(value)
    if kind is uuid.UUID:
        return uuid.UUID(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if kind in (None, types.NoneType):
        _require(value is None, kind, value, where)
        return None
    if isinstance(origin, type):
        return _build_several(kind, value, where)
    fields = _fields(kind)
    if fields is None:
        _require(type(value) is kind, kind, value, where)
        return value
    _require(isinstance(value, dict), kind, value, where)
    for name in value:
        if name not in fields:
            raise ConstraintError(f"{where} has no {name!r}")
    for name, (_, is_required) in fields.items():
        if is_required and name not in value:
            raise ConstraintError(f"{where} does not fit {_name(kind)}: it has no {name!r}")
    return kind(**{name: _build(fields[name][0], inner, f"{where}.{name}") for name, inner in value.items()})


def _build_several(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if issubclass(origin, Mapping):
        _require(isinstance(value, dict), kind, value, where)
        return {name: _build(arguments[1], inner, f"{where}.{name}") for name, inner in value.items()}
    _require(isinstance(value, list), kind, value, where)
    if origin is tuple and arguments[-1:] != (...,):
        if len(value) != len(arguments):
            raise ConstraintError(f"{where} must have {len(arguments)} items, not {len(value)}")
        pairs = enumerate(zip(arguments, value, strict=True))
        return tuple(_build(one, inner, f"{where}[{at}]") for at, (one, inner) in pairs)
    items = [_build(arguments[0], inner, f"{where}[{at}]") for at, inner in enumerate(value)]
    return origin(items) if origin in (tuple, set, frozenset) else items


def _build_one_of(kind: Any, value: Any, where: str) -> Any:
    """Return the value as the first of several types that it is."""
    kinds = get_args(kind)
    exact = [one for one in kinds if isinstance(one, type) and type(value) is one]
    for one in [*exact, *kinds]:
        try:
            return _build(one, value, where)
        except Exception:  # of the class that is tried
            continue
    raise ConstraintError(f"{where} must be {_name(kind)}, not {value!r}")


def _require(condition: bool, kind: Any, value: Any, where: str) -> None:
    if not condition:
        raise ConstraintError(f"{where} must be {_name(kind)}, not {value!r}")


def _name(kind: Any) -> str:
    """Return what a JSON value of a type is called."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is typing.Annotated:
        return _name(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(map(_name, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {', '.join(repr(member.value) for member in kind)}"
    if _SIMPLE.get(kind):
        return str(_SIMPLE[kind].get("format", _SIMPLE[kind]["type"]))
    if isinstance(origin, type) and not issubclass(origin, Mapping):
        return "an array"
    return kind.__name__ if isinstance(kind, type) and origin is None else "an object"
