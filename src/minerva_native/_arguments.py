"""Checks of arguments, whose messages name the argument."""

import math
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_MAX_FLOAT32 = 3.4028234663852886e38


def integer(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> int:
    """Return an integer within a range; raise `TypeError` or `ValueError`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {what(value)}") from None
    if not low <= number <= high:
        expected = f"{low} or more" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be {expected}, not {number}")
    return number


def number(name: str, value: Any) -> float:
    """Return a number that float32 can hold, or raise `TypeError` or `ValueError`."""
    if isinstance(value, str | bytes | np.ndarray):  # some of which float() would take
        raise TypeError(f"{name} must be a number, not {what(value)}")
    try:
        result = float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit a 32-bit float, which this integer is too large for") from None
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, not {what(value)}") from None
    if math.isnan(result):
        raise ValueError(f"{name} must be a number, not NaN")
    if _MAX_FLOAT32 < abs(result) < math.inf:
        raise ValueError(f"{name} must fit a 32-bit float, not {result!r}")
    return result


def flag(name: str, value: Any) -> bool:
    """Return True or False; raise `TypeError` for what only happens to have a truth value, such as "off"."""
    try:
        if isinstance(value, np.bool_) or operator.index(value) in (0, 1):
            return bool(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be True or False, not {what(value)}")


def path(name: str, value: Any) -> Path:
    """Return a path, with the home folder for a "~" at its beginning; raise `TypeError` for anything else."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a str or a path, not {what(value)}")
    try:
        return Path(value).expanduser()
    except RuntimeError:  # there is no such user: it is a file of that name
        return Path(value)


def file_path(name: str, value: Any) -> Path:
    """Return a path; raise `TypeError` for anything else, or `ValueError` if no file can have that name."""
    file = path(name, value)
    try:
        if b"\0" not in os.fsencode(file):
            return file
    except UnicodeEncodeError:
        pass
    raise ValueError(f"{name} has a character that no file name can have: {str(file)!r}")


def many(name: str, value: Any) -> Iterator[Any]:
    """Return an iterator; raise `TypeError` for what cannot be iterated over."""
    try:
        return iter(value)
    except TypeError:
        raise TypeError(f"{name} must be a list or something else with several items, not {what(value)}") from None


def function(name: str, value: Any) -> None:
    """Raise `TypeError` for what is neither None nor can be called."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None, not {what(value)}")


def cancel_token(value: Any) -> None:
    """Raise `TypeError` for what is neither None nor can be asked whether it is set."""
    if value is not None and (isinstance(value, type) or not callable(getattr(value, "is_set", None))):
        raise TypeError(f"cancel must have is_set(), as a threading.Event has, not be {what(value)}")


def what(value: object) -> str:
    """Return what a value is, for a message."""
    return "None" if value is None else f"a {type(value).__name__}"
