"""JSON as every program here writes it: printable ASCII, whatever a model or a file has in it."""

import json
from typing import Any


def as_json(value: Any, indent: int | None = None) -> str:
    """Return JSON in printable ASCII. A number that JSON does not have, such as NaN, becomes a string."""
    try:
        text = json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        text = json.dumps(json.loads(json.dumps(value), parse_constant=str), indent=indent)
    return text.replace("\x7f", "\\u007f")
