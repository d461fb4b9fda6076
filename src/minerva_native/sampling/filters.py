"""The filters and temperatures of libllama's chain, each a pure function from candidates to candidates.

They keep the same tokens as libllama's samplers, except that ties are broken by token id and not by an unstable sort.
Up to `EXACT_UP_TO` candidates, sums are float32 and sequential as in libllama, so cuts agree to the last bit. Longer
sums are more precise than libllama's, which moves a cut only among tokens that libllama's rounding error decides.
"""

from __future__ import annotations

import math

import numpy as np

from .arguments import checked
from .candidates import (
    COLUMNS_FROM,
    Candidates,
    Doubles,
    Floats,
    Ids,
    Scratch,
    at_least,
    check_largest,
    column_maxima,
    column_sums,
    largest_logit,
    maximum,
    shares32,
    weigh,
    weights32,
)
from .masks import apply_mask

EXACT_UP_TO = 1024
"""Up to this many candidates, sums use libllama's order and precision."""

_NUCLEUS_GUESSES = (32, 256)
_SAMPLE = 2048
_BINS = 4096


@checked
def top_k(candidates: Candidates, k: int, scratch: Scratch | None = None) -> Candidates:
    """Keep the k largest logits, in descending order (Fan et al. 2018; `llama_sampler_init_top_k`).

    k <= 0 keeps all.
    """
    size = candidates.logits.size
    if k <= 0:
        return candidates
    if candidates.descending:
        return candidates.head(k)
    if k >= size:
        return candidates.sorted()
    if size < COLUMNS_FROM:
        largest_logit(candidates)
        return _top_of(candidates, _reaching(candidates.logits, _kth_bound(candidates.logits, k), k), k)
    scratch = scratch or Scratch()
    return _top_k_columns(candidates, k, column_maxima(candidates.logits, scratch), scratch)


def _top_k_columns(candidates: Candidates, k: int, maxima: Floats, scratch: Scratch) -> Candidates:
    logits = candidates.logits
    check_largest(maximum(maxima))
    if 2 * k > maxima.size:
        return _top_of(candidates, _reaching(logits, _kth_bound(logits, k), k), k)
    bound = _kth_bound(maxima, k)
    index = at_least(logits, bound, maxima, scratch) if bound > -np.inf else _reaching(logits, bound, k)
    return _top_of(candidates, index, k)


def _reaching(logits: Floats, bound: float, k: int) -> Ids:
    """Return the ascending positions of logits >= `bound`; of those that are -inf, only as many as k needs."""
    if bound > -np.inf:
        return (logits >= bound).nonzero()[0]
    (above,) = (logits > bound).nonzero()  # few, if a mask leaves few
    if above.size >= k:
        return above
    (level,) = (logits == bound).nonzero()
    return np.sort(np.concatenate((above, level[: k - above.size])))


def _kth_bound(values: Floats, k: int) -> float:
    """Return a tight lower bound of the k-th largest value.

    The maxima of disjoint groups are themselves values, so the k-th largest maximum is a lower bound. With many more
    than k groups, few values besides the k largest reach it. Folding the values into quarters first, while many more
    than k are left, keeps the partition small.
    """
    while values.size >= 24 * k and values.size >= 256:
        quarter = values.size // 4
        values = np.maximum.reduce(values[: 4 * quarter].reshape(4, quarter), axis=0)
    place = values.size - k
    values = values.copy()
    values.partition(place)
    return values.item(place)


def _top_of(candidates: Candidates, index: Ids, k: int) -> Candidates:
    """Return the k largest candidates, given ascending positions `index` that include all of them."""
    logits = candidates.logits[index]
    if index.size > 2 * k + 64:
        cut = np.partition(logits, index.size - k)[index.size - k]
        above = np.flatnonzero(logits > cut)
        level = np.flatnonzero(logits == cut)[: k - above.size]
        chosen = np.concatenate((above, level))
        index, logits = index[chosen], logits[chosen]
    order = (-logits).argsort(kind="stable")[:k]
    index = index[order]
    return Candidates(logits[order], index if candidates.ids is None else candidates.ids[index], True)


@checked
def top_p(candidates: Candidates, p: float, min_keep: int = 0, scratch: Scratch | None = None) -> Candidates:
    """Keep the smallest set of most likely tokens with total probability >= p (nucleus; Holtzman et al. 2020).

    Follows `llama_sampler_init_top_p`. p >= 1 keeps all. At least `min_keep` tokens are kept.
    """
    p32 = np.float32(p)
    if p32 >= 1.0:
        return candidates
    size = candidates.logits.size
    if candidates.descending or size <= EXACT_UP_TO:
        share = weights = weights32(candidates)
        if not candidates.descending:
            candidates = candidates.sorted()
            share = weights32(candidates)
        running = np.add.accumulate(share / np.add.accumulate(weights)[-1])
        return candidates.head(_count_reaching(running, p32, min_keep))
    if size < COLUMNS_FROM:
        return _top_p_sorted_whole(candidates, float(p32), min_keep)
    return _top_p_columns(candidates, float(p32), min_keep, scratch or Scratch())


def _top_p_sorted_whole(candidates: Candidates, p: float, min_keep: int) -> Candidates:
    largest = largest_logit(candidates)
    candidates = candidates.sorted()
    running = np.add.accumulate(np.exp(np.subtract(candidates.logits, largest, dtype=np.float64)))
    return candidates.head(_count_reaching(running, p * running[-1], min_keep))


def _top_p_columns(candidates: Candidates, p: float, min_keep: int, scratch: Scratch) -> Candidates:
    """Try short heads first, as the nucleus is usually short, and look further only if their mass is too small."""
    logits = candidates.logits
    maxima = column_maxima(logits, scratch)
    largest = check_largest(maximum(maxima))
    weights = weigh(logits, largest, scratch)
    target = p * weights.total
    for guess in _NUCLEUS_GUESSES:
        head = _top_k_columns(candidates, max(guess, min(min_keep, logits.size)), maxima, scratch)
        running = np.add.accumulate(np.exp(np.subtract(head.logits, weights.shift, dtype=np.float64)))
        if running[-1] >= target:
            return head.head(_count_reaching(running, target, min_keep))
        if running[-1] < 0.5 * target:
            break
    heavy, heavy_weights = _heavier_part(weights.values, weights.total, target, scratch)
    return candidates.take(heavy[lightest(-logits[heavy], heavy_weights, target)])


def _heavier_part(weights: Floats, total: float, target: float, scratch: Scratch) -> tuple[Ids, Floats]:
    """Return the positions and values of the heaviest weights, enough of them to sum to at least `target`.

    They are all the weights above a bound, which is estimated from a sample.
    """
    sample = np.sort(weights[:: max(1, weights.size // _SAMPLE)])[::-1]
    running = np.add.accumulate(sample, dtype=np.float64)
    wanted = running[-1] * (0.2 + 0.8 * target / total)
    flags = scratch.flags(weights.size)
    guess = sample[min(int(running.searchsorted(wanted)), sample.size - 1)]
    heavy = np.flatnonzero(np.greater_equal(weights, guess, out=flags))
    heavy_weights = weights[heavy]
    if float(np.add.reduce(heavy_weights, dtype=np.float64)) > target:
        return heavy, heavy_weights
    # Together, all weights below this bound are less than the mass that may be dropped.
    certain = np.float32(0.99 * (total - target) / weights.size)
    heavy = np.flatnonzero(np.greater_equal(weights, certain, out=flags))
    return heavy, weights[heavy]


def lightest(keys: Floats, weights: Floats, target: float, strictly: bool = False) -> Ids:
    """Return the positions of the smallest keys whose weights sum to `target` or more (to more, if `strictly`).

    The positions are in no particular order; equal keys are taken in order of position. The keys are put into
    buckets, and only the bucket at the cut is sorted.
    """
    low, high = float(keys.min()), float(keys.max())
    scale = (_BINS - 1) / (high - low) if high > low else 0.0
    scaled = keys - np.float32(low)
    scaled *= np.float32(scale)
    bins = scaled.astype(np.intp)
    running = np.add.accumulate(np.bincount(bins, weights=weights, minlength=_BINS))
    cut = int(running.searchsorted(target, side="right" if strictly else "left"))
    if cut >= running.size:
        return np.arange(keys.size, dtype=np.intp)
    before = np.flatnonzero(bins < cut)
    edge = np.flatnonzero(bins == cut)
    edge = edge[np.argsort(keys[edge], kind="stable")]
    mass = np.add.accumulate(weights[edge], dtype=np.float64)
    mass += running[cut - 1] if cut else 0.0
    count = int(mass.searchsorted(target, side="right" if strictly else "left")) + 1
    return np.concatenate((before, edge[:count]))


@checked
def min_p(candidates: Candidates, p: float, min_keep: int = 0, scratch: Scratch | None = None) -> Candidates:
    """Keep tokens at least p times as likely as the most likely one (Nguyen et al. 2024).

    Follows `llama_sampler_init_min_p`. p <= 0 keeps all. At least `min_keep` tokens are kept.
    """
    p32 = float(np.float32(p))
    if p32 <= 0.0:
        return candidates
    logits = candidates.logits
    log_p = np.float32(math.log(p32))
    if candidates.descending:
        count = int(np.count_nonzero(logits >= logits[0] + log_p))
        return candidates.head(max(count, min_keep))
    if logits.size < COLUMNS_FROM:
        index = np.flatnonzero(logits >= np.float32(largest_logit(candidates)) + log_p)
    else:
        scratch = scratch or Scratch()
        maxima = column_maxima(logits, scratch)
        largest = check_largest(maximum(maxima))
        index = at_least(logits, float(np.float32(largest) + log_p), maxima, scratch)
    if index.size < min_keep:
        return top_k(candidates, min_keep, scratch)
    return candidates.take(index)


@checked
def typical_p(candidates: Candidates, p: float, min_keep: int = 0, scratch: Scratch | None = None) -> Candidates:
    """Keep tokens whose surprise is closest to the entropy, until their mass exceeds p (Meister et al. 2022).

    Follows `llama_sampler_init_typical`. p >= 1 keeps all. At least `min_keep` tokens are kept.
    A logit of `-inf` counts as probability 0; libllama computes NaN scores for it, whose order is undefined.
    """
    if np.float32(p) >= 1.0:
        return candidates
    if candidates.logits.size <= EXACT_UP_TO:
        return _typical_p_exact(candidates.sorted(), p, min_keep)
    largest = largest_logit(candidates)
    if float(candidates.logits.min()) == -math.inf:
        candidates = candidates.take(np.flatnonzero(candidates.logits > -math.inf))
    logits = candidates.logits
    scratch = scratch or Scratch()
    weights = weigh(logits, largest, scratch)
    distance = scratch.floats("distance", logits.size)
    mean = _sum(np.multiply(weights.values, logits, out=distance), scratch) / weights.total
    # surprise - entropy = (log total - logit) - (log total - mean)
    np.subtract(logits, np.float32(mean), out=distance)
    np.abs(distance, out=distance)
    index = lightest(distance, weights.values, float(np.float32(p)) * weights.total, strictly=True)
    if index.size < min_keep:
        index = np.argsort(distance, kind="stable")[:min_keep]
    return candidates.take(index)


def _typical_p_exact(candidates: Candidates, p: float, min_keep: int) -> Candidates:
    share = shares32(candidates)
    surprise = np.full(share.size, np.inf, np.float32)
    possible = share > 0.0
    surprise[possible] = -np.log(share[possible], dtype=np.float64)
    entropy = np.add.accumulate(share[possible] * surprise[possible])[-1]
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    running = np.add.accumulate(share[order])
    count = int(running.searchsorted(np.float32(p), side="right")) + 1
    return candidates.take(order[: max(count, min_keep)])


@checked
def top_n_sigma(candidates: Candidates, n: float, scratch: Scratch | None = None) -> Candidates:
    """Set logits more than n standard deviations below the largest to `-inf` (Tang et al. 2024).

    Follows `llama_sampler_init_top_n_sigma`: the deviation is taken over the logits that are not `-inf`, and a
    filtered token remains a candidate with probability 0. n <= 0 keeps all.
    """
    if n <= 0.0 or candidates.logits.size <= 1:
        return candidates
    scratch = scratch or Scratch()
    largest = largest_logit(candidates)
    logits = candidates.logits
    finite = logits if float(logits.min()) > -math.inf else logits[logits > -math.inf]
    mean = np.float32(_sum(finite, scratch) / finite.size)
    with np.errstate(over="ignore", invalid="ignore"):  # an infinite deviation keeps all, as in libllama
        deviations = np.subtract(finite, mean, out=scratch.floats("deviations", finite.size))
        np.multiply(deviations, deviations, out=deviations)
        deviation = np.float32(math.sqrt(_sum(deviations, scratch) / finite.size))
        floor = np.float32(largest) - np.float32(n) * deviation
    masked = apply_mask(logits, logits >= floor, scratch.floats("sigma", logits.size))
    return Candidates(masked, candidates.ids, candidates.descending)


@checked
def xtc(candidates: Candidates, threshold: float, min_keep: int = 0, scratch: Scratch | None = None) -> Candidates:
    """Drop all tokens with probability >= `threshold` except the least likely of them (`llama_sampler_init_xtc`).

    The sampler decides at random whether to apply XTC; this function always applies it. Everything is kept if
    `threshold` is above 0.5 or if fewer than `min_keep` tokens would be left.
    """
    size = candidates.logits.size
    if threshold > 0.5 or size < 2:
        return candidates
    if candidates.descending or size <= EXACT_UP_TO:
        candidates = candidates.sorted()
        likely = int(np.count_nonzero(shares32(candidates) >= np.float32(threshold)))
        dropped = max(0, likely - 1)
        if not dropped or size - dropped < min_keep:
            return candidates
        return Candidates(candidates.logits[dropped:], candidates.token_ids()[dropped:], True)
    weights64 = weigh(candidates.logits, largest_logit(candidates), scratch or Scratch())
    likely_index = np.flatnonzero(weights64.values >= np.float32(np.float32(threshold) * weights64.total))
    if likely_index.size < 2 or size - (likely_index.size - 1) < min_keep:
        return candidates
    kept = np.ones(size, np.bool_)
    kept[likely_index] = False
    # Spare the last one in sorted order: the smallest logit and, among equal logits, the largest id.
    head = candidates.logits[likely_index]
    kept[likely_index[head.size - 1 - int(head[::-1].argmin())]] = True
    return candidates.take(np.flatnonzero(kept))


@checked
def temperature(candidates: Candidates, t: float) -> Candidates:
    """Divide the logits by t; t <= 0 keeps only the most likely token (`llama_sampler_init_temp`)."""
    logits = candidates.logits
    t32 = np.float32(t)
    if t32 == 1.0:
        return candidates
    if t32 <= 0.0:
        best = 0 if candidates.descending else int(logits.argmax())
        check_largest(float(logits[best]))
        return candidates.take(np.array([best], np.intp), True)
    if t32 < 1.0:
        largest = largest_logit(candidates)
        if abs(largest) > 3.4e38 * t:  # the quotient would overflow float32
            logits = logits - np.float32(largest)
    scaled: Floats = np.divide(logits, t32)
    return Candidates(scaled, candidates.ids, candidates.descending)


@checked
def dynamic_temperature(candidates: Candidates, t: float, spread: float, exponent: float) -> Candidates:
    """Apply a temperature from t - spread to t + spread that grows with the entropy (`llama_sampler_init_temp_ext`).

    With H the entropy divided by its maximum, the temperature is low + (t + spread - low) * H ** exponent, where
    low = max(0, t - spread). spread <= 0 applies the plain temperature t.
    """
    if spread <= 0.0:
        return temperature(candidates, t)
    if candidates.logits.size <= 1:
        return candidates
    candidates = candidates.sorted()
    share = shares32(candidates)
    share = share[share > 0.0]
    entropy = -np.add.accumulate(share * np.log(share, dtype=np.float64).astype(np.float32))[-1]
    normalised = max(0.0, float(entropy) / math.log(candidates.logits.size))
    low = max(0.0, t - spread)
    return temperature(candidates, low + (t + spread - low) * normalised**exponent)


def _count_reaching(running: Floats | Doubles, target: float | np.float32, min_keep: int) -> int:
    return max(int(running.searchsorted(target)) + 1, min_keep)


def _sum(values: Floats, scratch: Scratch) -> float:
    if values.size <= EXACT_UP_TO:
        return float(np.add.accumulate(values)[-1])
    return float(np.add.reduce(column_sums(values, scratch)))
