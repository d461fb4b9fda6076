"""Each filter against its definition in a few lines of float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from minerva_native.errors import SamplingError
from minerva_native.sampling import Candidates, filters
from minerva_native.sampling.adaptive import mirostat, mirostat_v2

Floats = NDArray[np.float32]

CASES = 500
exhaustive = settings(max_examples=CASES, deadline=None, derandomize=True, database=None)
exhaustive = settings(exhaustive, suppress_health_check=list(HealthCheck))
SIZES = (1, 2, 50, 50, 50, 50, 1, 2, 50, 1500, 8192, 32_000, 128_256)


@st.composite
def logit_arrays(draw: st.DrawFn) -> Floats:
    """Draw Gaussian logits, some with many ties, some with many -inf."""
    size = draw(st.sampled_from(SIZES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.normal(0, 3, size)
    if draw(st.booleans()):
        values = np.round(values * 4) / 4
    logits = values.astype(np.float32)
    if size > 1 and draw(st.booleans()):
        logits[rng.random(size) < 0.3] = -np.inf
        logits[0] = 0.5
    return logits


def shares(logits: Floats) -> NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    return np.asarray(weights / weights.sum())


def by_rank(logits: Floats) -> NDArray[np.intp]:
    return np.lexsort((np.arange(logits.size), -logits))


@exhaustive
@given(logit_arrays(), st.integers(1, 2000))
def test_top_k_keeps_the_first_k_of_the_sorted_vocabulary(logits: Floats, k: int) -> None:
    kept = filters.top_k(Candidates(logits), k)
    assert kept.descending
    np.testing.assert_array_equal(kept.token_ids(), by_rank(logits)[:k])
    np.testing.assert_array_equal(kept.logits, logits[kept.token_ids()])


@exhaustive
@given(logit_arrays(), st.floats(0.01, 0.99), st.integers(0, 5))
def test_top_p_keeps_the_shortest_head_with_the_mass(logits: Floats, p: float, keep: int) -> None:
    kept = np.sort(filters.top_p(Candidates(logits), p, keep).token_ids())
    order = by_rank(logits)
    np.testing.assert_array_equal(kept, np.sort(order[: kept.size]))
    mass = np.add.accumulate(shares(logits)[order])
    slack = 1e-5
    assert mass[kept.size - 1] >= p - slack or kept.size == logits.size
    assert kept.size <= max(keep, 1) or mass[kept.size - 2] < p + slack
    assert kept.size >= min(keep, logits.size)


@exhaustive
@given(logit_arrays(), st.floats(0.001, 1.0), st.integers(0, 5))
def test_min_p_keeps_what_is_likely_enough(logits: Floats, p: float, keep: int) -> None:
    kept = np.sort(filters.min_p(Candidates(logits), p, keep).token_ids())
    ratio = shares(logits) / shares(logits).max()
    expected = np.flatnonzero(ratio >= p * (1 + 1e-6))
    assert np.isin(expected, kept).all()
    assert (ratio[kept] >= p * (1 - 1e-6)).all() or kept.size == min(keep, logits.size)
    assert kept.size >= min(keep, logits.size)


@exhaustive
@given(logit_arrays(), st.floats(0.01, 0.99))
def test_typical_p_keeps_a_band_around_the_entropy_with_the_mass(logits: Floats, p: float) -> None:
    kept = filters.typical_p(Candidates(logits), p).token_ids()
    share = shares(logits)
    surprise = -np.log(np.maximum(share, 1e-300))
    distance = np.where(share > 0, np.abs(surprise - float((share * surprise).sum())), np.inf)
    dropped = np.setdiff1d(np.flatnonzero(share > 0), kept)
    if dropped.size:
        assert distance[kept].max() <= distance[dropped].min() + 1e-4
        assert share[kept].sum() > p - 1e-5
    assert (
        kept.size == 1
        or share[kept].sum() - share[kept][distance[kept] >= distance[kept].max() - 1e-4].sum() < p + 1e-5
    )


@exhaustive
@given(logit_arrays(), st.floats(0.1, 5.0))
def test_top_n_sigma_bans_what_is_n_deviations_below(logits: Floats, n: float) -> None:
    left = filters.top_n_sigma(Candidates(logits), n).logits
    finite = logits[logits > -np.inf].astype(np.float64)
    floor = float(finite.max() - n * finite.std())
    clear = np.abs(logits - floor) > 1e-4
    expected = np.where(logits >= floor, logits, np.float32(-np.inf))
    np.testing.assert_array_equal(left[clear], expected[clear])


@exhaustive
@given(logit_arrays(), st.floats(0.01, 0.5), st.integers(0, 5))
def test_xtc_leaves_only_the_least_likely_of_the_likely(logits: Floats, threshold: float, keep: int) -> None:
    kept = filters.xtc(Candidates(logits), threshold, keep).token_ids()
    likely = by_rank(logits)[: int((shares(logits) >= threshold).sum())]
    dropped = likely[:-1]
    if logits.size - dropped.size < keep:
        dropped = dropped[:0]
    np.testing.assert_array_equal(np.sort(kept), np.setdiff1d(np.arange(logits.size), dropped))


@exhaustive
@given(logit_arrays(), st.floats(0.05, 5.0))
def test_temperature_divides(logits: Floats, t: float) -> None:
    np.testing.assert_array_equal(filters.temperature(Candidates(logits), t).logits, logits / np.float32(t))


@exhaustive
@given(logit_arrays(), st.floats(0.2, 2.0), st.floats(0.0, 2.0), st.floats(0.0, 3.0))
def test_dynamic_temperature_follows_the_entropy(logits: Floats, t: float, spread: float, power: float) -> None:
    scaled = filters.dynamic_temperature(Candidates(logits), t, spread, power)
    share = shares(logits)[shares(logits) > 0]
    entropy = float(-(share * np.log(share)).sum()) / math.log(logits.size) if logits.size > 1 else 0.0
    low = max(0.0, t - spread)
    expected = low + (t + spread - low) * entropy**power if spread > 0 and logits.size > 1 else t
    if spread > 0 and logits.size == 1:
        expected = 1.0
    if expected < 0.01:
        return
    original = logits[scaled.token_ids()]
    sized = np.abs(original) > 0.1
    sized &= original > -np.inf
    np.testing.assert_allclose(original[sized] / scaled.logits[sized], expected, rtol=1e-3)


ALL: list[Callable[[Candidates], Candidates]] = [
    lambda c: filters.top_k(c, 3),
    lambda c: filters.top_p(c, 0.5),
    lambda c: filters.min_p(c, 0.5),
    lambda c: filters.typical_p(c, 0.5),
    lambda c: filters.top_n_sigma(c, 1.0),
    lambda c: filters.xtc(c, 0.1),
    lambda c: filters.temperature(c, 0.0),
    lambda c: filters.dynamic_temperature(c, 1.0, 0.5, 1.0),
    lambda c: mirostat(c, 5.0, c.logits.size),
    lambda c: mirostat_v2(c, 5.0),
]
NAMES = ["top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "xtc", "greedy", "dynatemp", "mirostat", "mirostat_v2"]


@pytest.mark.parametrize("apply", ALL, ids=NAMES)
@pytest.mark.parametrize("size", [2, 50, 2000, 10_000, 128_256])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_unusable_logits_are_refused(
    apply: Callable[[Candidates], Candidates], size: int, bad: float, place: int
) -> None:
    logits = np.zeros(size, np.float32)
    logits[place] = bad
    with pytest.raises(SamplingError, match=r"NaN|\+inf"):
        apply(Candidates(logits))


@pytest.mark.parametrize("apply", ALL, ids=NAMES)
@pytest.mark.parametrize("size", [2, 50, 2000, 10_000])
def test_logits_that_are_all_minus_infinity_are_refused(apply: Callable[[Candidates], Candidates], size: int) -> None:
    with pytest.raises(SamplingError, match="every logit is -inf"):
        apply(Candidates(np.full(size, -np.inf, np.float32)))


@pytest.mark.parametrize("apply", ALL, ids=NAMES)
@pytest.mark.parametrize("size", [1, 2, 50, 2000, 10_000, 128_256])
def test_a_filter_does_not_modify_its_input(apply: Callable[[Candidates], Candidates], size: int) -> None:
    logits = np.random.default_rng(size).normal(0, 3, size).astype(np.float32)
    before = logits.copy()
    apply(Candidates(logits))
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("apply", ALL, ids=NAMES)
@pytest.mark.parametrize("size", [1, 2, 50, 2000, 10_000, 128_256])
def test_a_filter_keeps_a_token_of_a_flat_vocabulary(apply: Callable[[Candidates], Candidates], size: int) -> None:
    left = apply(Candidates(np.zeros(size, np.float32)))
    assert left.logits.size >= 1
    assert left.logits.max() > -np.inf


@pytest.mark.parametrize("p", [0.9999999999, 1.0])
def test_a_mass_that_rounds_to_1_in_float32_keeps_all(p: float) -> None:
    logits = np.arange(10, dtype=np.float32)
    assert filters.top_p(Candidates(logits), p).logits.size == 10
    assert filters.typical_p(Candidates(logits), p).logits.size == 10


def test_filters_work_on_what_other_filters_left() -> None:
    logits = np.array([1, 9, 3, 7, 5], np.float32)
    left = filters.top_k(Candidates(logits, np.array([10, 11, 12, 13, 14])), 3)
    assert left.token_ids().tolist() == [11, 13, 14]
    assert filters.min_p(left, 0.1).token_ids().tolist() == [11, 13]
