"""JSON as every command prints it."""

import json
from typing import Any


def as_json(value: Any) -> str:
    """Return JSON in printable ASCII. A number that JSON does not have, such as NaN, becomes a string."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        text = json.dumps(json.loads(json.dumps(value), parse_constant=str))
    return text.replace("\x7f", "\\u007f")
