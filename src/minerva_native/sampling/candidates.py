"""What a sampling chain passes from step to step: token ids with their logits, and scratch memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import SamplingError

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.intp]

COLUMNS_FROM = 8192
"""With at least this many logits, a pass over the columns of a matrix view beats sorting or partitioning them all."""

_COLUMN_WIDTH = 2000


class Candidates(NamedTuple):
    """The tokens that the chain has not dropped yet (`llama_token_data_array` in libllama).

    Attributes:
        logits: float32 (n,), finite or `-inf`. No step modifies the caller's array.
        ids: intp (n,), the token of each logit. `None` means the whole vocabulary: the position is the id.
        descending: whether the logits are sorted in descending order, with ties in order of id.
    """

    logits: Floats
    ids: Ids | None = None
    descending: bool = False

    def take(self, index: Ids, descending: bool = False) -> Candidates:
        """Return the candidates at the positions `index`, in that order."""
        return Candidates(self.logits[index], index if self.ids is None else self.ids[index], descending)

    def head(self, count: int) -> Candidates:
        """Return the first `count` candidates."""
        if count >= self.logits.size:
            return self
        ids = np.arange(count, dtype=np.intp) if self.ids is None else self.ids[:count]
        return Candidates(self.logits[:count], ids, self.descending)

    def sorted(self) -> Candidates:
        """Check the logits and return the candidates by descending logit, with ties in order of id."""
        if self.descending:
            return self
        largest_logit(self)
        if self.ids is None or _ascending(self.ids):
            return self.take((-self.logits).argsort(kind="stable"), True)
        return self.take(np.lexsort((self.ids, -self.logits)), True)

    def token_ids(self) -> Ids:
        """Return the ids as an array, even if `ids` is `None`."""
        return np.arange(self.logits.size, dtype=np.intp) if self.ids is None else self.ids


class Scratch:
    """Work arrays that a sampler allocates once and reuses for every token."""

    __slots__ = ("_flags", "_floats")

    def __init__(self) -> None:
        self._floats: dict[str, Floats] = {}
        self._flags: NDArray[np.bool_] = np.empty(0, np.bool_)

    def floats(self, name: str, size: int) -> Floats:
        """Return an uninitialised float32 array of shape (size,); the same name returns the same memory."""
        buffer = self._floats.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._floats[name] = np.empty(size, np.float32)
        return buffer if buffer.size == size else buffer[:size]

    def flags(self, size: int) -> NDArray[np.bool_]:
        """Return an uninitialised bool array of shape (size,); the next call reuses its memory."""
        if self._flags.size < size:
            self._flags = np.empty(size, np.bool_)
        return self._flags if self._flags.size == size else self._flags[:size]


def check_largest(largest: float) -> float:
    """Return the largest logit, or raise `SamplingError` if it is not finite. It is NaN if any logit is NaN."""
    if -math.inf < largest < math.inf:
        return largest
    if largest == -math.inf:
        raise SamplingError(
            "every logit is -inf, so no token can be drawn: check the mask, the logit bias and the processors"
        )
    raise SamplingError(
        f"the logits contain {'+inf' if largest == math.inf else 'NaN'}: the model's output is unusable"
    )


def largest_logit(candidates: Candidates) -> float:
    """Return the largest logit after checking it with `check_largest`."""
    return check_largest(candidates.logits.item(0) if candidates.descending else maximum(candidates.logits))


def maximum(values: Floats) -> float:
    """Return the maximum, or NaN if there is one. On short vectors argmax is faster than a reduction."""
    return values.item(values.argmax()) if values.size < COLUMNS_FROM else float(np.maximum.reduce(values))


def column_shape(size: int) -> tuple[int, int]:
    """Return (rows, columns) of the largest matrix view of a long vector; it leaves out fewer than `rows` entries."""
    rows = max(1, size // _COLUMN_WIDTH)
    return rows, size // rows


def column_maxima(logits: Floats, scratch: Scratch) -> Floats:
    """Return the maximum of each column of the matrix view, followed by the entries outside the view."""
    rows, columns = column_shape(logits.size)
    inside = rows * columns
    maxima = scratch.floats("maxima", columns + logits.size - inside)
    np.maximum.reduce(logits[:inside].reshape(rows, columns), axis=0, out=maxima[:columns])
    if inside != logits.size:
        maxima[columns:] = logits[inside:]
    return maxima


def at_least(logits: Floats, floor: float, maxima: Floats, scratch: Scratch) -> Ids:
    """Return the ascending positions of logits >= `floor`, reading only columns whose maximum reaches it."""
    size = logits.size
    rows, columns = column_shape(size)
    (hits,) = (maxima >= floor).nonzero()
    if hits.size * 8 > columns:
        return np.greater_equal(logits, floor, out=scratch.flags(size)).nonzero()[0]
    inside = rows * columns
    outside = None
    if inside != size:
        known = int(hits.searchsorted(columns))
        outside = hits[known:] + (inside - columns)
        hits = hits[:known]
    block = logits[:inside].reshape(rows, columns).take(hits, axis=1)
    (place,) = (block >= floor).ravel().nonzero()
    found, column = np.divmod(place, max(1, hits.size))
    found *= columns
    found += hits[column]
    return found if outside is None else np.concatenate((found, outside))


class Weights(NamedTuple):
    """exp(logit - shift) of each logit, and the sum.

    Attributes:
        values: float32 (n,), in scratch memory: valid until the next step.
        shift: what was subtracted from every logit.
        columns: float64 (columns + rest,), the sum of each column, followed by the entries outside the matrix view.
        total: the sum of all values.
    """

    values: Floats
    shift: float
    columns: Doubles
    total: float


def weigh(logits: Floats, largest: float, scratch: Scratch) -> Weights:
    """Return the numerators of the softmax, summed by column so that float32 stays precise."""
    values = scratch.floats("weights", logits.size)
    # For maxima in this range the sum over a vocabulary fits float32, so the subtracting pass is not needed.
    if -20.0 <= largest <= 75.0:
        shift = 0.0
        np.exp(logits, out=values)
    else:
        shift = largest
        with np.errstate(over="ignore"):
            np.subtract(logits, np.float32(largest), out=values)
        np.exp(values, out=values)
    columns = column_sums(values, scratch)
    return Weights(values, shift, columns, float(np.add.reduce(columns)))


def column_sums(values: Floats, scratch: Scratch) -> Doubles:
    """Return the sum of each column of the matrix view, followed by the entries outside the view.

    A column has few terms, so a float32 sum is precise enough.
    """
    rows, columns = column_shape(values.size)
    inside = rows * columns
    sums = scratch.floats("sums", columns + values.size - inside)
    np.add.reduce(values[:inside].reshape(rows, columns), axis=0, out=sums[:columns])
    sums[columns:] = values[inside:]
    return sums.astype(np.float64)


def log_sum_exp(logits: Floats, scratch: Scratch | None = None) -> float:
    """Check the logits and return log(sum(exp(logits))), accurate to about 1e-7."""
    largest = check_largest(maximum(logits))
    if logits.size < COLUMNS_FROM:
        total = float(np.add.reduce(np.exp(np.subtract(logits, largest, dtype=np.float64))))
        return largest + math.log(total)
    weights = weigh(logits, largest, Scratch() if scratch is None else scratch)
    return weights.shift + math.log(weights.total)


def probabilities(candidates: Candidates) -> Doubles:
    """Return the softmax of the candidates, float64 (n,), in their order."""
    weights = np.exp(np.subtract(candidates.logits, largest_logit(candidates), dtype=np.float64))
    weights /= np.add.reduce(weights)
    return weights


def weights32(candidates: Candidates) -> Floats:
    """Return the numerators of the softmax as libllama computes them: float32 differences, float32 exponentials."""
    logits = candidates.logits
    if candidates.descending and logits.item(-1) > -1e37 and logits.item(0) < 1e37:
        below = logits - logits[0]
    else:
        with np.errstate(over="ignore"):  # a difference below the float32 range becomes -inf
            below = logits - np.float32(largest_logit(candidates))
    weights: Floats = np.exp(below.astype(np.float64)).astype(np.float32)
    return weights


def shares32(candidates: Candidates) -> Floats:
    """Return the softmax as libllama computes it: in float32, with a sequential sum."""
    weights = weights32(candidates)
    weights /= np.add.accumulate(weights)[-1]
    return weights


def _ascending(ids: Ids) -> bool:
    return bool((ids[1:] > ids[:-1]).all())
