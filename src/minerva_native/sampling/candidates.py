"""What the steps of a chain hand on to each other: token ids and their logits, and room to work in."""

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
"""From this many logits on, a pass over columns of a matrix view beats a sort or a partition of the whole."""

_COLUMN_WIDTH = 2000


class Candidates(NamedTuple):
    """The tokens that a chain has not dropped yet; libllama's `llama_token_data_array`.

    Attributes:
        logits: float32 (n,), finite or `-inf`; never modified, a step that changes logits makes new ones.
        ids: intp (n,), the token of each logit; `None` while the whole vocabulary is there and position is id.
        descending: whether the logits are sorted, ties by id.
    """

    logits: Floats
    ids: Ids | None = None
    descending: bool = False

    def take(self, index: Ids, descending: bool = False) -> Candidates:
        """The candidates at these positions, in this order."""
        return Candidates(self.logits[index], index if self.ids is None else self.ids[index], descending)

    def head(self, count: int) -> Candidates:
        """The first `count` candidates."""
        if count >= self.logits.size:
            return self
        ids = np.arange(count, dtype=np.intp) if self.ids is None else self.ids[:count]
        return Candidates(self.logits[:count], ids, self.descending)

    def sorted(self) -> Candidates:
        """By descending logit, ties by id; the logits are checked."""
        if self.descending:
            return self
        largest_logit(self)
        if self.ids is None or _ascending(self.ids):
            return self.take((-self.logits).argsort(kind="stable"), True)
        return self.take(np.lexsort((self.ids, -self.logits)), True)

    def token_ids(self) -> Ids:
        """The ids, also when they are the whole vocabulary."""
        return np.arange(self.logits.size, dtype=np.intp) if self.ids is None else self.ids


class Scratch:
    """Arrays that a sampler allocates once and uses for every token."""

    __slots__ = ("_flags", "_floats")

    def __init__(self) -> None:
        self._floats: dict[str, Floats] = {}
        self._flags: NDArray[np.bool_] = np.empty(0, np.bool_)

    def floats(self, name: str, size: int) -> Floats:
        """Uninitialised float32 (size,), the same memory for the same name."""
        buffer = self._floats.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._floats[name] = np.empty(size, np.float32)
        return buffer if buffer.size == size else buffer[:size]

    def flags(self, size: int) -> NDArray[np.bool_]:
        """Uninitialised bool (size,)."""
        if self._flags.size < size:
            self._flags = np.empty(size, np.bool_)
        return self._flags if self._flags.size == size else self._flags[:size]


def check_largest(largest: float) -> float:
    """The largest logit, refused when nothing can be drawn: a maximum is NaN if any logit is."""
    if -math.inf < largest < math.inf:
        return largest
    if largest == -math.inf:
        raise SamplingError(
            "every logit is -inf, nothing is left to draw: look at the mask, the bias and the processors"
        )
    raise SamplingError(
        f"the logits contain {'+inf' if largest == math.inf else 'NaN'}: the model's output is unusable"
    )


def largest_logit(candidates: Candidates) -> float:
    """The checked maximum of the logits."""
    return check_largest(candidates.logits.item(0) if candidates.descending else maximum(candidates.logits))


def maximum(values: Floats) -> float:
    """The maximum, NaN if there is one; on short vectors argmax finds it sooner than a reduction."""
    return values.item(values.argmax()) if values.size < COLUMNS_FROM else float(np.maximum.reduce(values))


def column_shape(size: int) -> tuple[int, int]:
    """(rows, columns) of the largest matrix view of a long vector; fewer than `rows` entries stay outside."""
    rows = max(1, size // _COLUMN_WIDTH)
    return rows, size // rows


def column_maxima(logits: Floats, scratch: Scratch) -> Floats:
    """The maximum of every column of the matrix view, then the entries outside it."""
    rows, columns = column_shape(logits.size)
    inside = rows * columns
    maxima = scratch.floats("maxima", columns + logits.size - inside)
    np.maximum.reduce(logits[:inside].reshape(rows, columns), axis=0, out=maxima[:columns])
    if inside != logits.size:
        maxima[columns:] = logits[inside:]
    return maxima


def at_least(logits: Floats, floor: float, maxima: Floats, scratch: Scratch) -> Ids:
    """Ascending positions of the logits that are `floor` or more; looks only into columns that have one."""
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
        values: float32 (n,), in the sampler's scratch memory: valid until the next step.
        shift: what was subtracted from the logits.
        columns: float64 (columns + rest,), the sum of every column, then the entries outside the matrix view.
        total: the sum of all values.
    """

    values: Floats
    shift: float
    columns: Doubles
    total: float


def weigh(logits: Floats, largest: float, scratch: Scratch) -> Weights:
    """The softmax's numerators in two passes; the sums are by column, so that float32 keeps its precision."""
    values = scratch.floats("weights", logits.size)
    # The vocabulary's sum stays inside float32 for maxima in this range, which saves the pass that subtracts.
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
    """The sum of every column of the matrix view, then the entries outside it; few terms each, so float32 will do."""
    rows, columns = column_shape(values.size)
    inside = rows * columns
    sums = scratch.floats("sums", columns + values.size - inside)
    np.add.reduce(values[:inside].reshape(rows, columns), axis=0, out=sums[:columns])
    sums[columns:] = values[inside:]
    return sums.astype(np.float64)


def log_sum_exp(logits: Floats, scratch: Scratch | None = None) -> float:
    """log(sum(exp(logits))), to about 1e-7; the logits are checked."""
    largest = check_largest(maximum(logits))
    if logits.size < COLUMNS_FROM:
        total = float(np.add.reduce(np.exp(np.subtract(logits, largest, dtype=np.float64))))
        return largest + math.log(total)
    weights = weigh(logits, largest, Scratch() if scratch is None else scratch)
    return weights.shift + math.log(weights.total)


def probabilities(candidates: Candidates) -> Doubles:
    """The softmax of the candidates, float64 (n,), in their order."""
    weights = np.exp(np.subtract(candidates.logits, largest_logit(candidates), dtype=np.float64))
    weights /= np.add.reduce(weights)
    return weights


def weights32(candidates: Candidates) -> Floats:
    """The softmax's numerators as libllama has them: float32 differences, and exponentials rounded to float32."""
    logits = candidates.logits
    if candidates.descending and logits.item(-1) > -1e37 and logits.item(0) < 1e37:
        below = logits - logits[0]
    else:
        with np.errstate(over="ignore"):  # a difference that leaves float32 is -inf
            below = logits - np.float32(largest_logit(candidates))
    weights: Floats = np.exp(below.astype(np.float64)).astype(np.float32)
    return weights


def shares32(candidates: Candidates) -> Floats:
    """The softmax as libllama has it: float32, the sum taken one by one."""
    weights = weights32(candidates)
    weights /= np.add.accumulate(weights)[-1]
    return weights


def _ascending(ids: Ids) -> bool:
    return bool((ids[1:] > ids[:-1]).all())
