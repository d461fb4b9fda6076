"""Token masks: the tokens of the vocabulary that may be drawn, for example according to a grammar engine."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._arguments import what
from .arguments import checked_logits
from .candidates import Floats

_EIGHT_FLOATS = np.dtype("V32")

Mask = NDArray[np.bool_] | NDArray[np.uint8] | NDArray[np.uint32] | NDArray[np.int32]


def apply_mask(logits: Floats, mask: Mask, out: Floats | None = None) -> Floats:
    """Set the logits of tokens that are not allowed to `-inf` and return the result.

    Args:
        logits: float32 (n_vocab,).
        mask: true for allowed tokens. Either bool (n_vocab,), or at least n_vocab packed bits in uint8, int32 or
            uint32, starting at the lowest bit of the first element (the layout of llguidance and xgrammar).
        out: output array, float32 (n_vocab,); may be `logits` itself. `None` allocates a new one.

    Raises:
        TypeError: something is not an array or has another dtype.
        ValueError: something is not one-dimensional, or the mask does not fit the number of logits.
    """
    logits = checked_logits(logits)
    if out is not None and (not isinstance(out, np.ndarray) or out.dtype != np.float32 or out.shape != logits.shape):
        raise TypeError(f"out must be a float32 array of {logits.size} numbers or None, not {what(out)}")
    octets = _packed(logits.size, mask)
    # A table gives the bias of eight tokens at a time, without branches: a mixed mask costs no more than a uniform one.
    apart = out is not None and out.flags.c_contiguous and not np.may_share_memory(out, logits)
    if out is not None and apart and logits.size % 8 == 0:
        bias = out
        _octets().take(octets, out=out.view(_EIGHT_FLOATS), mode="clip")
    else:
        bias = _octets().take(octets, mode="clip").view(np.float32)[: logits.size]
    return np.add(logits, bias, out=bias if out is None else out)


def _packed(size: int, mask: Any) -> NDArray[np.intp]:
    if not isinstance(mask, np.ndarray):
        raise TypeError(f"mask must be a numpy array, not {type(mask).__name__}")
    if mask.ndim != 1:
        raise ValueError(f"mask must have one dimension, not {mask.ndim}")
    if mask.dtype == np.bool_:
        if mask.size != size:
            raise ValueError(f"mask has {mask.size} entries for {size} logits")
        return np.packbits(mask, bitorder="little").astype(np.intp)
    if mask.dtype not in (np.uint8, np.uint32, np.int32):
        raise TypeError(f"mask must be bool, or packed bits in uint8, int32 or uint32, not {mask.dtype}")
    if mask.dtype.itemsize > 1:
        mask = np.ascontiguousarray(mask.astype(mask.dtype.newbyteorder("<"), copy=False)).view(np.uint8)
    if mask.size * 8 < size:
        raise ValueError(f"mask has {mask.size * 8} bits for {size} logits")
    octets: NDArray[np.intp] = mask[: (size + 7) // 8].astype(np.intp)
    return octets


@lru_cache(maxsize=1)
def _octets() -> NDArray[np.void]:
    """Return a table of 256 entries: entry b is eight floats, 0 for each set bit of b and -inf for the others."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits, np.float32(0.0), np.float32(-np.inf)).astype(np.float32).view(_EIGHT_FLOATS)[:, 0]
