"""What several samplers with the same chain would each compute from their logits, computed for all of them at once.

Eight rows take hardly more calls of numpy than one. What a sampler does alone is the reference, equal to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .candidates import Doubles, Floats, Ids

COLDEST = 1e-6
"""The lowest temperature of a `Chain`."""

_HUGE = 1e30  # divided by that, what is smaller fits float32

_MOST_PARTS = 32


class Chain(NamedTuple):
    """The steps of a sampler that begins with the k largest logits, and goes on with filters that cut their tail.

    Attributes:
        k: how many logits the first step keeps.
        steps: those after it, "top_p", "min_p" and "temperature" in any order, with their parameters.
        min_keep: how many tokens the filters keep at least.
        biased: tokens whose logits are lowered before all that,
        biases: and by how much, as numbers below or equal to 0.
    """

    k: int
    steps: tuple[tuple[str, float], ...]
    min_keep: int
    biased: tuple[int, ...]
    biases: tuple[float, ...]


class Survivors(NamedTuple):
    """What a chain leaves of a row.

    Attributes:
        ids: the tokens, the most likely first.
        running: float64 (n,), the running sums of their weights.
    """

    ids: Sequence[int] | Ids
    running: Doubles


def survivors(logits: Floats, rows: Sequence[int], chain: Chain) -> list[Survivors | None]:
    """Return what a chain leaves of some rows; None for those that a sampler has to look at by itself.

    Args:
        logits: float32 (n, n_vocab), contiguous.
        rows: which of them.
        chain: the steps.
    """
    if max(chain.biased, default=0) >= logits.shape[1]:
        return [None] * len(rows)
    if chain.k == 1:
        return _best(logits, rows, chain.biased)
    found = _largest(logits, np.array(rows, np.intp), chain.k + len(chain.biased))
    if found is None:
        return [None] * len(rows)
    values, ids = _biased(*found, chain)
    counts = np.full(len(rows), chain.k)
    for name, parameter in chain.steps:
        if name == "temperature":
            values = np.divide(values, np.float32(parameter))
            continue
        n = _n_nucleus(values, counts, parameter) if name == "top_p" else _n_likely(values, parameter)
        counts = np.minimum(counts, np.maximum(n, chain.min_keep))
    running = np.add.accumulate(np.exp(np.subtract(values, values[:, :1], dtype=np.float64)), axis=1)
    return [Survivors(ids[at, :n], running[at, :n]) for at, n in enumerate(counts.tolist())]


_ALONE: Doubles = np.ones(1)


def _best(logits: Floats, rows: Sequence[int], biased: Sequence[int]) -> list[Survivors | None]:
    """Return the largest logit of each row; None if it is not finite, or has a bias."""
    if len(rows) == len(logits):
        every = logits.argmax(axis=1).tolist()
        best = [every[row] for row in rows]
    else:
        best = [int(logits[row].argmax()) for row in rows]
    return [
        Survivors((token,), _ALONE) if math.isfinite(logits.item(row, token)) and token not in biased else None
        for row, token in zip(rows, best, strict=True)
    ]


def _largest(logits: Floats, rows: Ids, k: int) -> tuple[Floats, Ids] | None:
    """Return the k largest logits of each row and their ids, (n, k), in descending order with ties in order of id.

    Return None if there are not as many, or some are not finite, or huge.
    """
    n, n_vocab = rows.size, logits.shape[1]
    n_parts = math.gcd(n_vocab, _MOST_PARTS)
    while n_parts > 1 and n_vocab < 8 * k * n_parts:
        n_parts //= 2
    width = n_vocab // n_parts
    if k > width:
        return None
    parts = logits.reshape(-1, n_parts, width)
    maxima = np.empty((n, width), np.float32)
    for at, row in enumerate(rows.tolist()):
        np.maximum.reduce(parts[row], axis=0, out=maxima[at])
    bounds = _kth_bounds(maxima, k)
    if not (bounds.min() > -_HUGE and maxima.max() < _HUGE):  # NaN is neither
        return None
    # Only columns whose maximum reaches the bound have entries that do: in all some more than k.
    owner, column = np.divmod((maxima >= bounds).ravel().nonzero()[0], width)
    block = parts[rows[owner], :, column]
    hit, part = np.divmod((block >= bounds[owner]).ravel().nonzero()[0], n_parts)
    places = np.sort(owner[hit] * n_vocab + part * width + column[hit])
    owner, ids = np.divmod(places, n_vocab)
    values = logits[rows[owner], ids]
    counts = np.bincount(owner, minlength=n)
    starts = np.add.accumulate(counts) - counts
    keys = np.full((n, int(counts.max())), np.inf, np.float32)
    keys[owner, np.arange(owner.size) - starts[owner]] = -values
    order = keys.argsort(axis=1, kind="stable")[:, :k] + starts[:, None]
    return values[order], ids[order]


def _kth_bounds(values: Floats, k: int) -> Floats:
    """Return a lower bound of the k-th largest value of each row, (n, 1), as `filters.top_k` finds one."""
    while values.shape[1] >= max(16 * k, 256):
        quarter = values.shape[1] // 4
        values = np.maximum.reduce(values[:, : 4 * quarter].reshape(-1, 4, quarter), axis=1)
    place = values.shape[1] - k
    return np.partition(values, place, axis=1)[:, place : place + 1]


def _biased(values: Floats, ids: Ids, chain: Chain) -> tuple[Floats, Ids]:
    """Return the k largest after a bias that only lowers some: they are among as many more that were before."""
    is_among = False
    for token, bias in zip(chain.biased, chain.biases, strict=True):
        place = ids == token
        if place.any():
            values[place] += np.float32(bias)
            is_among = True
    if is_among:
        row, order = np.arange(len(ids))[:, None], np.lexsort((ids, -values))
        values, ids = values[row, order], ids[row, order]
    return values[:, : chain.k], ids[:, : chain.k]


def _n_nucleus(values: Floats, counts: Ids, p: float) -> Ids:
    """Return how many of the first `counts` values of each row have the probability p together: see `filters.top_p`."""
    weights = np.exp((values - values[:, :1]).astype(np.float64)).astype(np.float32)
    totals = np.add.accumulate(weights, axis=1)[np.arange(counts.size), counts - 1]
    running = np.add.accumulate(weights / totals[:, None], axis=1)
    n: Ids = np.add.reduce(running < np.float32(p), axis=1) + 1
    return n


def _n_likely(values: Floats, p: float) -> Ids:
    """Return how many values of each row are at least p times as likely as the first: see `filters.min_p`."""
    n: Ids = np.add.reduce(values >= values[:, :1] + np.float32(math.log(np.float32(p))), axis=1)
    return n
