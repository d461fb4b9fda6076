"""Random JSON schemas: nested, with bounds, enums, optional and recursive parts, and keys of every alphabet."""

import random
from typing import Any

_KEYS = [
    "name",
    "age",
    "größe",
    "ключ",
    "名前",
    "a b",
    'say "hi"',
    "back\\slash",
    "ชื่อ",
    "🙂",
    "x",
    "n_items",
    "",
    "tab\t",
]
_TEXTS = ["red", "green", "blue", "naïve", "日本", "a\nb", '"', "\\", "", "0", "null"]


def random_schema(random: random.Random, depth: int = 3) -> dict[str, Any]:
    """Return a schema with at most so many levels; now and then a recursive one."""
    schema = _schema(random, depth)
    if random.random() < 0.15:
        node = {"type": "object", "properties": {"value": _schema(random, 1), "next": {"$ref": "#/$defs/node"}}}
        if random.random() < 0.5:
            node["required"] = ["value"]
        return {
            "type": "object",
            "properties": {"head": {"$ref": "#/$defs/node"}, "rest": schema},
            "required": ["head"],
            "$defs": {"node": node},
        }
    return schema


def _schema(random: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _integer, _number, _enum, _simple]
    if depth > 0:
        kinds += [_object, _object, _array, _tuple, _any_of]
    return random.choice(kinds)(random, depth)


def _string(random: random.Random, depth: int) -> dict[str, Any]:
    if random.random() < 0.3:
        return {
            "type": "string",
            "pattern": random.choice(["^[a-z]{1,8}$", r"^\d{3}-\d{4}$", "^(yes|no)$", "^[^\\\\]{0,5}$"]),
        }
    if random.random() < 0.3:
        return {"type": "string", "format": random.choice(["date", "time", "uuid", "ipv4", "email", "date-time"])}
    low = random.randrange(4)
    return {"type": "string", "minLength": low, "maxLength": low + random.randrange(1, 12)}


def _integer(random: random.Random, depth: int) -> dict[str, Any]:
    low = random.randrange(-1000, 1000)
    schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": low + random.randrange(1, 500)}
    if random.random() < 0.3:
        schema |= {"exclusiveMinimum": schema.pop("minimum") - 1}
    return schema


def _number(random: random.Random, depth: int) -> dict[str, Any]:
    low = round(random.uniform(-100, 100), 2)
    return {"type": "number", "minimum": low, "exclusiveMaximum": round(low + random.uniform(0.5, 100), 3)}


def _enum(random: random.Random, depth: int) -> dict[str, Any]:
    values: list[Any] = random.sample(_TEXTS, random.randrange(1, 5))
    values += random.sample([1, 2.5, True, None, -7], random.randrange(3))
    return {"const": values[0]} if random.random() < 0.2 else {"enum": values}


def _simple(random: random.Random, depth: int) -> dict[str, Any]:
    return random.choice([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}])


def _object(random: random.Random, depth: int) -> dict[str, Any]:
    keys = random.sample(_KEYS, random.randrange(1, 6))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {key: _schema(random, depth - 1) for key in keys},
        "required": [key for key in keys if random.random() < 0.7],
    }
    if random.random() < 0.1:
        schema["additionalProperties"] = _schema(random, 0)
    return schema


def _array(random: random.Random, depth: int) -> dict[str, Any]:
    low = random.randrange(3)
    items = _schema(random, depth - 1)
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + random.randrange(1, 4)}


def _tuple(random: random.Random, depth: int) -> dict[str, Any]:
    n = random.randrange(1, 4)
    prefix = [_schema(random, depth - 1) for _ in range(n)]
    return {"type": "array", "prefixItems": prefix, "items": False, "minItems": n}


def _any_of(random: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(random, depth - 1) for _ in range(random.randrange(1, 4))]}
