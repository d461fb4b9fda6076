"""Checks of what steps and log-probabilities are called with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np

from .._arguments import integer, number, what
from ..errors import SamplingError
from .candidates import Candidates, Floats, Scratch

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Have a step that fails say which of its arguments was wrong. One that does not fail costs nothing more."""
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def step(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            for name, value in given.items():
                _CHECKS.get(name, number)(name, value)
            numbers = ", ".join(f"{name}={value!r}" for name, value in given.items() if isinstance(value, int | float))
            raise ValueError(f"{function.__name__} cannot compute with {numbers}") from None

    return step


def checked_logits(logits: Any) -> Floats:
    """Return logits that a sampler can read, contiguous in memory; raise `TypeError` or `ValueError` for others."""
    if not isinstance(logits, np.ndarray):
        raise TypeError(f"logits must be a numpy array, not {what(logits)}")
    if logits.dtype != np.float32:
        raise TypeError(f"logits must be float32, not {logits.dtype}")
    if logits.ndim != 1:
        raise ValueError(f"logits must have one dimension, not {logits.ndim}")
    if not logits.size:
        raise SamplingError("the logits are empty: no token can be drawn")
    return logits if logits.flags.c_contiguous else np.ascontiguousarray(logits)


def _candidates(name: str, value: Any) -> None:
    if not isinstance(value, Candidates):
        raise TypeError(f"{name} must be Candidates, not {what(value)}")
    try:
        checked_logits(value.logits)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    ids: object = value.ids
    if ids is not None and not (isinstance(ids, np.ndarray) and ids.dtype == np.intp):
        raise TypeError(f"{name}: ids must be an array of intp or None, not {what(ids)}")
    if isinstance(ids, np.ndarray) and ids.shape != value.logits.shape:
        raise ValueError(f"{name}: ids must be as many as the logits, not of shape {ids.shape}")


def history(name: str, value: Any) -> None:
    """Raise `TypeError` or `ValueError` unless a value is a list of token ids."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        raise TypeError(f"{name}, the tokens so far, must be a list of token ids, not {what(value)}")
    if isinstance(value, np.ndarray) and value.ndim != 1:
        raise ValueError(f"{name}, the tokens so far, must have one dimension, not {value.ndim}")
    for token in value.tolist() if isinstance(value, np.ndarray) else value:
        if not -(2**63) <= integer(f"{name}: each of the tokens so far", token) < 2**63:
            raise ValueError(f"{name}: {token} among the tokens so far is no token id")


def _breakers(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of tokens to tails, not {what(value)}")
    for tails in (value or {}).values():
        if not isinstance(tails, list) or not all(isinstance(tail, tuple) for tail in tails):
            raise TypeError(f"{name} must map tokens to lists of tuples of tokens, not to {what(tails)}")


def _scratch(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Scratch):
        raise TypeError(f"{name} must be a Scratch or None, not {what(value)}")


_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "candidates": _candidates,
    **dict.fromkeys(("k", "min_keep", "allowed_length"), integer),
    "scratch": _scratch,
    "history": history,
    "breakers": _breakers,
}
