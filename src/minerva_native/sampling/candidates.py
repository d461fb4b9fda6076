"""What the steps of a chain pass to each other, token ids and their logits, and scratch memory for them."""

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
"""At this many logits and more, working on the columns of a matrix view is faster than sorting or partitioning all."""

_COLUMN_WIDTH = 2000


class Candidates(NamedTuple):
    """The tokens that a chain has not dropped so far; libllama's `llama_token_data_array`.

    Attributes:
        logits: float32 (n,), finite or `-inf`. Never modified: a step that changes logits makes a new array.
        ids: intp (n,), the token of each logit. `None` for the whole vocabulary, in which a position is an id.
        descending: whether the logits are in descending order, ties by id.
    """

    logits: Floats
    ids: Ids | None = None
    descending: bool = False

    def take(self, index: Ids, descending: bool = False) -> Candidates:
        """Return the candidates at these positions, in this order."""
        return Candidates(self.logits[index], index if self.ids is None else self.ids[index], descending)

    def head(self, count: int) -> Candidates:
        """Return the first `count` candidates."""
        if count >= self.logits.size:
            return self
        ids = np.arange(count, dtype=np.intp) if self.ids is None else self.ids[:count]
        return Candidates(self.logits[:count], ids, self.descending)

    def sorted(self) -> Candidates:
        """Return the candidates by descending logit, ties by id, after checking the logits."""
        if self.descending:
            return self
        largest_logit(self)
        if self.ids is None or _ascending(self.ids):
            return self.take((-self.logits).argsort(kind="stable"), True)
        return self.take(np.lexsort((self.ids, -self.logits)), True)

    def token_ids(self) -> Ids:
        """Return the ids, even if `ids` is None."""
        return np.arange(self.logits.size, dtype=np.intp) if self.ids is None else self.ids


class Scratch:
    """Arrays that a sampler allocates once and reuses for every token."""

    __slots__ = ("_flags", "_floats")

    def __init__(self) -> None:
        self._floats: dict[str, Floats] = {}
        self._flags: NDArray[np.bool_] = np.empty(0, np.bool_)

    def floats(self, name: str, size: int) -> Floats:
        """Return an uninitialised float32 (size,); the same name gets the same memory."""
        buffer = self._floats.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._floats[name] = np.empty(size, np.float32)
        return buffer if buffer.size == size else buffer[:size]

    def flags(self, size: int) -> NDArray[np.bool_]:
        """Return an uninitialised bool (size,)."""
        if self._flags.size < size:
            self._flags = np.empty(size, np.bool_)
        return self._flags if self._flags.size == size else self._flags[:size]


def check_largest(largest: float) -> float:
    """Return the largest logit; raise `SamplingError` if it shows that nothing can be drawn.

    It is NaN if any logit is.
    """
    if -math.inf < largest < math.inf:
        return largest
    if largest == -math.inf:
        raise SamplingError(
            "every logit is -inf, so no token can be drawn: check the mask, the bias and the processors"
        )
    raise SamplingError(
        f"the logits contain {'+inf' if largest == math.inf else 'NaN'}: the model's output is unusable"
    )


def largest_logit(candidates: Candidates) -> float:
    """Return the maximum of the logits, checked."""
    return check_largest(candidates.logits.item(0) if candidates.descending else maximum(candidates.logits))


def maximum(values: Floats) -> float:
    """Return the maximum, or NaN if there is one. For short vectors argmax is faster than a reduction."""
    return values.item(values.argmax()) if values.size < COLUMNS_FROM else float(np.maximum.reduce(values))


def column_shape(size: int) -> tuple[int, int]:
    """Return (rows, columns) of the largest matrix view of a long vector; it leaves out fewer than `rows` entries."""
    rows = max(1, size // _COLUMN_WIDTH)
    return rows, size // rows


def column_maxima(logits: Floats, scratch: Scratch) -> Floats:
    """Return the maximum of every column of the matrix view, then the entries outside it."""
    rows, columns = column_shape(logits.size)
    inside = rows * columns
    maxima = scratch.floats("maxima", columns + logits.size - inside)
    np.maximum.reduce(logits[:inside].reshape(rows, columns), axis=0, out=maxima[:columns])
    if inside != logits.size:
        maxima[columns:] = logits[inside:]
    return maxima


def at_least(logits: Floats, floor: float, maxima: Floats, scratch: Scratch) -> Ids:
    """Return the ascending positions of logits of at least `floor`; searches only the columns that have one."""
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
    """exp(logit - shift) of many logits, and their sum.

    Attributes:
        values: float32 (n,), in the sampler's scratch memory, so valid only until the next step.
        shift: what was subtracted from the logits.
        columns: float64 (columns + rest,), the sum of every column, then the entries outside the matrix view.
        total: the sum of all values.
    """

    values: Floats
    shift: float
    columns: Doubles
    total: float


def weigh(logits: Floats, largest: float, scratch: Scratch) -> Weights:
    """Compute the numerators of the softmax and their sum, column by column, so that float32 is precise enough."""
    values = scratch.floats("weights", logits.size)
    # For maxima in this range the sum over a vocabulary fits into float32, and there is no need to subtract first.
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
    """Return the sum of every column of the matrix view, then the entries outside it.

    A column is short, so a float32 sum is precise enough.
    """
    rows, columns = column_shape(values.size)
    inside = rows * columns
    sums = scratch.floats("sums", columns + values.size - inside)
    np.add.reduce(values[:inside].reshape(rows, columns), axis=0, out=sums[:columns])
    sums[columns:] = values[inside:]
    return sums.astype(np.float64)


def log_sum_exp(logits: Floats, scratch: Scratch | None = None) -> float:
    """Return log(sum(exp(logits))), to about 1e-7, after checking the logits."""
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
    """Return the softmax's numerators as libllama does: float32 differences, exponentials rounded to float32."""
    logits = candidates.logits
    if candidates.descending and logits.item(-1) > -1e37 and logits.item(0) < 1e37:
        below = logits - logits[0]
    else:
        with np.errstate(over="ignore"):  # a difference too large for float32 is -inf
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
