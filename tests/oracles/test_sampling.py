"""libllama's own samplers as the oracle: the same parameters on the same logits, the same survivors and probabilities.

What is compared, and how closely:

- The ids of the survivors, exactly, with two exceptions. *Ties*: at a cut through equal logits this sampler keeps the
  lowest ids, and libllama any; the logits are still the same. *Rounding*: above 1,024 candidates libllama's float32
  running sums drift. The drift is recomputed for each case, and only tokens closer than that to a cut may differ.
- Probabilities, within 1e-5.
- Random draws: their frequencies, by a chi-squared test at a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from minerva_native import Model
from minerva_native._binding import ffi, lib
from minerva_native.sampling import DEFAULT_ORDER, Candidates, Sampler, SamplingParams, filters
from minerva_native.sampling.adaptive import adaptive_p, mirostat, mirostat_mu, mirostat_v2
from minerva_native.sampling.candidates import probabilities
from minerva_native.sampling.penalties import dry, merge_breakers, penalties, string_breakers

Floats = NDArray[np.float32]
Maker = Callable[[], Any]

ENTRY = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
TOLERANCE = 1e-5

CASES = 500
exhaustive = settings(
    max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)

# Most cases have a small vocabulary: they are cheap and hit more corner cases.
SIZES = (1, 2, 50, 50, 50, 1000, 1, 2, 50, 50, 9000, 32_000, 32_000, 128_256)
KINDS = ("gaussian", "peaked", "flat", "nearly flat", "ties", "with -inf", "huge", "sharp")


@dataclass
class Case:
    """Logits, as the parameters that they are made from, which a failing example prints."""

    size: int
    kind: str
    seed: int

    @property
    def logits(self) -> Floats:
        rng = np.random.default_rng(self.seed)
        n = self.size
        if self.kind == "flat":
            return np.full(n, rng.normal(0, 5), np.float32)
        values = rng.normal(0.0, 3.0, n)
        if self.kind == "peaked":
            values[rng.choice(n, min(n, 20), replace=False)] += rng.uniform(5, 20, min(n, 20))
        elif self.kind == "nearly flat":
            values *= 0.01
        elif self.kind == "ties":
            values = np.round(values * 2) / 2
        elif self.kind == "with -inf":
            values[rng.random(n) < rng.random()] = -np.inf
            values[rng.integers(n)] = 1.0
        elif self.kind == "huge":
            values *= 1e30
        elif self.kind == "sharp":
            values *= 10
        return values.astype(np.float32)


def cases(kinds: Sequence[str] = KINDS, sizes: Sequence[int] = SIZES) -> st.SearchStrategy[Case]:
    return st.builds(Case, st.sampled_from(sizes), st.sampled_from(kinds), st.integers(0, 2**32 - 1))


def floats32(low: float, high: float) -> st.SearchStrategy[float]:
    """Draw numbers that are exact in a C float, so that both sides get the same number."""
    return st.floats(low, high).map(lambda value: float(np.float32(value)))


fractions = st.one_of(st.sampled_from([0.05, 0.5, 0.9, 0.95, 0.99]), floats32(0.001, 0.999))
keeps = st.sampled_from([0, 0, 0, 1, 2, 7])


@dataclass
class Outcome:
    """What libllama leaves in its array."""

    ids: NDArray[np.int64]
    logits: Floats
    p: Floats
    selected: int

    @property
    def possible(self) -> NDArray[np.int64]:
        return np.sort(self.ids[self.logits > -np.inf])


@contextmanager
def llama_chain(makers: Sequence[Maker], history: Sequence[int] = ()) -> Iterator[Any]:
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    for make in makers:
        lib.llama_sampler_chain_add(chain, make())
    for token in history:
        lib.llama_sampler_accept(chain, token)
    yield chain
    lib.llama_sampler_free(chain)


def llama_apply(chain: Any, logits: Floats) -> Outcome:
    entries = np.zeros(logits.size, ENTRY)
    entries["id"] = np.arange(logits.size)
    entries["logit"] = logits
    array = ffi.new("llama_token_data_array *")
    array.data = ffi.cast("llama_token_data *", entries.ctypes.data)
    array.size, array.selected, array.sorted = logits.size, -1, False
    lib.llama_sampler_apply(chain, array)
    left = np.frombuffer(ffi.buffer(array.data, array.size * ENTRY.itemsize), ENTRY).copy()
    return Outcome(left["id"].astype(np.int64), left["logit"].copy(), left["p"].copy(), array.selected)


def llama(logits: Floats, *makers: Maker, history: Sequence[int] = ()) -> Outcome:
    with llama_chain(makers, history) as chain:
        return llama_apply(chain, logits)


def dist(seed: int = 1) -> Maker:
    return lambda: lib.llama_sampler_init_dist(seed)


def possible(candidates: Candidates) -> NDArray[np.int64]:
    return np.sort(candidates.token_ids()[candidates.logits > -np.inf])


def lowest_ids(logits: Floats, ids: NDArray[np.int64], highest: bool = False) -> NDArray[np.int64]:
    """Return as many tokens of every logit value as are in `ids`, but those with the lowest (or highest) ids."""
    values, level = np.unique(logits, return_inverse=True)
    kept = np.bincount(level[ids], minlength=values.size)
    sizes = np.bincount(level, minlength=values.size)
    order = np.argsort(level, kind="stable")
    rank = np.empty(logits.size, np.int64)
    rank[order] = np.arange(logits.size) - np.repeat(np.add.accumulate(sizes) - sizes, sizes)
    chosen = rank >= (sizes - kept)[level] if highest else rank < kept[level]
    return np.flatnonzero(chosen)


def assert_same_survivors(
    logits: Floats,
    ours: Candidates,
    theirs: Outcome,
    undecided: NDArray[np.bool_] | None = None,
    highest: bool = False,
) -> None:
    """Assert equal ids, except for ties and for tokens that libllama decides by rounding (`undecided`, by id)."""
    mine, yours = possible(ours), theirs.possible
    if np.array_equal(mine, yours):
        return
    assert np.array_equal(mine, lowest_ids(logits, mine, highest))
    yours = lowest_ids(logits, yours, highest)
    different = np.setxor1d(mine, yours)
    if not different.size:
        event("ties differ")
        return
    event("rounding differs")
    assert undecided is not None, f"{different.size} ids differ: {different[:10]}"
    assert undecided[different].all(), f"{different.size} ids differ, {(~undecided[different]).sum()} beyond rounding"


@dataclass
class Drift:
    """How far libllama's float32 running sums over some logits are from the exact ones."""

    mass: float
    entropy: float


def drift_of(logits: Floats) -> Drift:
    """Recompute the sums in float32; the exponentials are the same to within an ulp."""
    if logits.size <= filters.EXACT_UP_TO:
        return Drift(0.0, 0.0)
    weights = np.exp((logits - logits.max()).astype(np.float64)).astype(np.float32)
    exact = np.sort(exact_shares(logits))[::-1]
    drift = Drift(1e-6, 1e-6)
    # Some of libllama's filters sum by id, and some by rank.
    for total in (np.add.accumulate(weights)[-1], np.add.accumulate(np.sort(weights)[::-1])[-1]):
        shares = np.sort(weights / total)[::-1]
        drift.mass = max(drift.mass, 1e-6 + float(np.abs(np.add.accumulate(shares) - np.add.accumulate(exact)).max()))
        possible = shares[shares > 0]
        terms = possible * np.log(possible)
        entropy = float(np.add.accumulate(terms)[-1] - np.add.accumulate(terms, dtype=np.float64)[-1])
        scale = abs(math.log(float(total) / float(np.add.reduce(weights, dtype=np.float64))))
        drift.entropy = max(drift.entropy, 1e-6 + abs(entropy) + 12 * scale)
    return drift


def exact_shares(logits: Floats) -> NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    return np.asarray(weights / weights.sum())


@exhaustive
@given(cases(), st.sampled_from([1, 2, 3, 40, 40, 128, 129, 500, 5000, 200_000]))
def test_top_k_keeps_what_libllama_keeps(case: Case, k: int) -> None:
    logits = case.logits
    assert_same_survivors(
        logits, filters.top_k(Candidates(logits), k), llama(logits, lambda: lib.llama_sampler_init_top_k(k))
    )


@exhaustive
@given(cases(), fractions, keeps)
def test_top_p_keeps_what_libllama_keeps(case: Case, p: float, keep: int) -> None:
    logits = case.logits
    shares = exact_shares(logits)
    order = np.argsort(-logits, kind="stable")
    mass = np.empty(logits.size)
    mass[order] = np.add.accumulate(shares[order])
    slack = drift_of(logits).mass
    undecided = (mass >= np.float32(p) - slack) & (mass - shares <= np.float32(p) + slack)
    ours = filters.top_p(Candidates(logits), p, keep)
    theirs = llama(logits, lambda: lib.llama_sampler_init_top_p(p, keep))
    assert_same_survivors(logits, ours, theirs, undecided if slack else None)


@exhaustive
@given(cases(), st.one_of(fractions, st.just(0.0), st.just(1.0)), keeps)
def test_min_p_keeps_what_libllama_keeps(case: Case, p: float, keep: int) -> None:
    logits = case.logits
    ours = filters.min_p(Candidates(logits), p, keep)
    assert_same_survivors(logits, ours, llama(logits, lambda: lib.llama_sampler_init_min_p(p, keep)))


@exhaustive
@given(cases(kinds=("gaussian", "peaked", "flat", "nearly flat", "ties")), fractions, keeps)
def test_typical_p_keeps_what_libllama_keeps(case: Case, p: float, keep: int) -> None:
    logits = case.logits
    shares = exact_shares(logits)
    surprise = -np.log(shares)
    distance = np.abs(surprise - float(np.sum(shares * surprise)))
    order = np.argsort(distance, kind="stable")
    mass = np.empty(logits.size)
    mass[order] = np.add.accumulate(shares[order])
    drift = drift_of(logits)
    # A drifting entropy shifts all distances, so tokens at the cut may enter or leave.
    band = np.abs(mass - np.float32(p)) <= drift.mass + shares
    cuts = distance[band] if band.any() else distance[order][-1:]
    blur = 2 * drift.entropy + 2e-6 * (1 + np.abs(surprise))
    undecided = (distance >= cuts.min() - blur) & (distance <= cuts.max() + blur)
    ours = filters.typical_p(Candidates(logits), p, keep)
    theirs = llama(logits, lambda: lib.llama_sampler_init_typical(p, keep))
    assert_same_survivors(logits, ours, theirs, undecided if drift.mass else None)


@exhaustive
@given(cases(), st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), floats32(0.01, 6.0)))
def test_top_n_sigma_keeps_what_libllama_keeps(case: Case, n: float) -> None:
    logits = case.logits
    finite = logits[logits > -np.inf].astype(np.float64)
    deviation = float(finite.std())
    floor = float(finite.max()) - n * deviation
    slack = n * deviation * 5e-5 + abs(float(finite.max())) * 1e-6
    ours = filters.top_n_sigma(Candidates(logits), n)
    theirs = llama(logits, lambda: lib.llama_sampler_init_top_n_sigma(n))
    assert_same_survivors(logits, ours, theirs, np.abs(logits - floor) <= slack)


@exhaustive
@given(cases(), st.one_of(st.sampled_from([0.1, 0.05, 0.5, 0.6]), floats32(0.001, 0.7)), keeps)
def test_xtc_drops_what_libllama_drops(case: Case, threshold: float, keep: int) -> None:
    logits = case.logits
    undecided = np.abs(exact_shares(logits) - np.float32(threshold)) <= (drift_of(logits).mass + 1e-6) * threshold
    ours = filters.xtc(Candidates(logits), threshold, keep)
    theirs = llama(logits, lambda: lib.llama_sampler_init_xtc(1.0, threshold, keep, 1))
    assert_same_survivors(logits, ours, theirs, undecided, highest=True)


def assert_same_distribution(ours: Candidates, theirs: Outcome, size: int) -> None:
    mine, yours = np.zeros(size), np.zeros(size)
    mine[ours.token_ids()] = probabilities(ours)
    yours[theirs.ids] = theirs.p
    assert np.abs(mine - yours).max() <= TOLERANCE


FINITE_KINDS = tuple(kind for kind in KINDS if kind != "huge")


@exhaustive
@given(cases(FINITE_KINDS), st.one_of(st.sampled_from([0.0, 0.1, 0.8, 1.0, 2.0]), floats32(0.05, 10.0)))
def test_temperature_gives_libllamas_probabilities(case: Case, t: float) -> None:
    logits = case.logits
    assume(t > 0 or np.count_nonzero(logits == logits.max()) == 1)
    theirs = llama(logits, lambda: lib.llama_sampler_init_temp(t), dist())
    assert_same_distribution(filters.temperature(Candidates(logits), t), theirs, logits.size)


@exhaustive
@given(cases(FINITE_KINDS), floats32(0.1, 2.0), floats32(0.05, 2.0), floats32(0.1, 3.0))
def test_dynamic_temperature_gives_libllamas_probabilities(case: Case, t: float, spread: float, power: float) -> None:
    logits = case.logits
    theirs = llama(logits, lambda: lib.llama_sampler_init_temp_ext(t, spread, power), dist())
    assert_same_distribution(filters.dynamic_temperature(Candidates(logits), t, spread, power), theirs, logits.size)


def histories(size: int, seed: int, length: int) -> list[int]:
    """Return random tokens from a small set, so that they repeat often."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, size, int(rng.integers(1, 9)))
    return [int(token) for token in rng.choice(words, length)]


@exhaustive
@given(
    cases(),
    st.integers(0, 300),
    st.sampled_from([0, 1, 5, 64, 64, 1000]),
    floats32(0.5, 2.0),
    floats32(-1.0, 2.0),
    floats32(-1.0, 2.0),
)
def test_penalties_change_logits_as_libllama_does(
    case: Case, length: int, window: int, repeat: float, frequency: float, presence: float
) -> None:
    logits = case.logits
    history = histories(case.size, case.seed, length)
    theirs = llama(
        logits,
        lambda: lib.llama_sampler_init_penalties(case.size, window, repeat, frequency, presence),
        history=history,
    )
    ours = penalties(Candidates(logits), history[-window:] if window else [], repeat, frequency, presence)
    np.testing.assert_array_equal(ours.logits, theirs.logits)


@exhaustive
@given(
    cases(),
    st.integers(0, 300),
    st.sampled_from([0, 1, 5, 64, 64, 1000]),
    floats32(-1.0, 5.0),
    floats32(1.0, 4.0),
    st.sampled_from([0, 1, 2, 2, 3, 10]),
)
def test_dry_changes_logits_as_libllama_does(
    case: Case, length: int, window: int, multiplier: float, base: float, allowed: int
) -> None:
    logits = case.logits
    history = histories(case.size, case.seed, length)
    theirs = llama(
        logits,
        lambda: lib.llama_sampler_init_dry(ffi.NULL, multiplier, base, allowed, window, ffi.NULL, 0),
        history=history,
    )
    ours = dry(Candidates(logits), history[-window:] if window else [], multiplier, base, allowed)
    np.testing.assert_array_equal(ours.logits, theirs.logits)


BREAKERS = ("\n", ":", '"', "*", "User:", "ing of")
TEXTS = ("the king of", "User: hello", '"yes"', "\n\n", "a * b", "hello world", ":", " of the", "ing", " of")


@pytest.mark.parametrize("name", ["llama-bpe", "phi-3"])
def test_dry_with_strings_as_breakers_changes_logits_as_libllama_does(
    name: str, vocabulary_model: Callable[[str], Model]
) -> None:
    model = vocabulary_model(name)
    tokenizer = model.tokenizer
    pieces = [tokenizer.encode(text, add_special=False) for text in TEXTS]
    breakers = merge_breakers(string_breakers(tokenizer, BREAKERS).values())
    texts = [ffi.new("char[]", text.encode()) for text in BREAKERS]
    array = ffi.new("const char *[]", texts)

    def make() -> Any:
        with model.raw() as pointer:
            vocab = lib.llama_model_get_vocab(pointer)
            return lib.llama_sampler_init_dry(vocab, 1.0, 1.75, 1, 64, array, len(texts))

    logits = np.zeros(tokenizer.n_vocab, np.float32)
    with llama_chain([make]) as chain:

        @exhaustive
        @given(st.lists(st.integers(0, len(pieces) - 1), max_size=25))
        def check(chosen: list[int]) -> None:
            history = [token for piece in chosen for token in pieces[piece]]
            lib.llama_sampler_reset(chain)
            for token in history:
                lib.llama_sampler_accept(chain, token)
            ours = dry(Candidates(logits), history[-64:], 1.0, 1.75, 1, breakers)
            np.testing.assert_array_equal(ours.logits, llama_apply(chain, logits).logits)

        check()


@exhaustive
@given(cases(), st.lists(st.tuples(st.integers(0, 200_000), st.one_of(floats32(-50, 50), st.just(-math.inf)))))
def test_logit_bias_adds_what_libllama_adds(case: Case, pairs: list[tuple[int, float]]) -> None:
    logits = case.logits
    bias = {token % case.size: value for token, value in pairs}
    assume(bias)
    raw = ffi.new("llama_logit_bias[]", [{"token": token, "bias": value} for token, value in bias.items()])
    theirs = llama(logits, lambda: lib.llama_sampler_init_logit_bias(case.size, len(bias), raw))
    assume((theirs.logits > -np.inf).any())
    seen: list[Floats] = []
    sampler = Sampler(SamplingParams(logit_bias=bias, seed=1), [lambda tokens, logits: seen.append(logits.copy())])
    sampler(logits)
    np.testing.assert_array_equal(seen[0], theirs.logits)


@exhaustive
@given(cases(), floats32(0.5, 8.0), floats32(0.01, 1.0), st.integers(0, 1000))
def test_mirostat_2_keeps_what_libllama_keeps_and_learns_what_it_learns(
    case: Case, tau: float, eta: float, seed: int
) -> None:
    logits, mu = case.logits, float(np.float32(2) * np.float32(tau))
    with llama_chain([lambda: lib.llama_sampler_init_mirostat_v2(seed, tau, eta)]) as chain:
        for _ in range(3):
            theirs = llama_apply(chain, logits)
            ours = mirostat_v2(Candidates(logits), mu)
            surprise = -np.log2(np.maximum(exact_shares(logits), 1e-300))
            undecided = np.abs(surprise - mu) <= 2e-5 + 2 * drift_of(logits).entropy
            assert_same_survivors(logits, ours, theirs, undecided)
            mu = mirostat_mu(mu, float(theirs.p[theirs.selected]), tau, eta)


@exhaustive
@given(
    cases(("gaussian", "peaked", "ties", "sharp")),
    floats32(0.5, 8.0),
    floats32(0.01, 1.0),
    st.integers(0, 1000),
)
def test_mirostat_1_keeps_what_libllama_keeps_and_learns_what_it_learns(
    case: Case, tau: float, eta: float, seed: int
) -> None:
    logits, mu = case.logits, float(np.float32(2) * np.float32(tau))
    with llama_chain([lambda: lib.llama_sampler_init_mirostat(case.size, seed, tau, eta, 100)]) as chain:
        for _ in range(3):
            theirs = llama_apply(chain, logits)
            ours = mirostat(Candidates(logits), mu, case.size)
            # k is the integer part of a float32 power, which rounding changes by a few parts per million.
            if abs(ours.logits.size - theirs.ids.size) <= 1 + 1e-4 * theirs.ids.size:
                short = min(ours.logits.size, theirs.ids.size)
                np.testing.assert_array_equal(ours.logits[:short], theirs.logits[:short])
            else:
                raise AssertionError(f"k is {ours.logits.size}, libllama's {theirs.ids.size}")
            mu = mirostat_mu(mu, float(theirs.p[theirs.selected]), tau, eta)


@exhaustive
@given(cases(FINITE_KINDS), floats32(0.0, 1.0), floats32(0.0, 0.99), st.integers(0, 1000))
def test_adaptive_p_gives_libllamas_probabilities_and_average(
    case: Case, target: float, decay: float, seed: int
) -> None:
    logits = case.logits
    assume(case.kind != "ties")
    head = filters.top_k(Candidates(logits), 100)
    total_weight = 1.0 / (1.0 - decay)
    weighted_sum = target * total_weight
    makers = [
        lambda: lib.llama_sampler_init_top_k(100),
        lambda: lib.llama_sampler_init_adaptive_p(target, decay, seed),
    ]
    with llama_chain(makers) as chain:
        for _ in range(3):
            theirs = llama_apply(chain, logits)
            ours = adaptive_p(head, target, weighted_sum, total_weight)
            assert_same_distribution(ours, theirs, logits.size)
            token = int(theirs.ids[theirs.selected])
            lib.llama_sampler_accept(chain, token)
            weighted_sum = float(probabilities(head)[head.token_ids() == token][0]) + decay * weighted_sum
            total_weight = 1.0 + decay * total_weight


def makers_of(params: SamplingParams, size: int) -> dict[str, Maker]:
    p = params
    return {
        "penalties": lambda: lib.llama_sampler_init_penalties(
            size, p.repeat_last_n, p.repeat_penalty, p.frequency_penalty, p.presence_penalty
        ),
        "dry": lambda: lib.llama_sampler_init_dry(
            ffi.NULL, p.dry_multiplier, p.dry_base, p.dry_allowed_length, p.dry_penalty_last_n, ffi.NULL, 0
        ),
        "top_n_sigma": lambda: lib.llama_sampler_init_top_n_sigma(p.top_n_sigma),
        "top_k": lambda: lib.llama_sampler_init_top_k(p.top_k),
        "typical_p": lambda: lib.llama_sampler_init_typical(p.typical_p, p.min_keep),
        "top_p": lambda: lib.llama_sampler_init_top_p(p.top_p, p.min_keep),
        "min_p": lambda: lib.llama_sampler_init_min_p(p.min_p, p.min_keep),
        "xtc": lambda: lib.llama_sampler_init_xtc(p.xtc_probability, p.xtc_threshold, p.min_keep, 1),
        "temperature": lambda: lib.llama_sampler_init_temp_ext(p.temperature, p.dynatemp_range, p.dynatemp_exponent),
    }


def sometimes(neutral: Any, active: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.just(neutral), active)


@st.composite
def chain_params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(floats32(0.1, 2.0)),
        dynatemp_range=draw(sometimes(0.0, floats32(0.1, 1.0))),
        top_k=draw(st.sampled_from([1, 5, 40, 40, 100, 1000])),
        top_p=draw(sometimes(1.0, fractions)),
        min_p=draw(sometimes(0.0, floats32(0.01, 0.5))),
        typical_p=draw(sometimes(1.0, fractions)),
        top_n_sigma=draw(sometimes(-1.0, floats32(0.5, 5.0))),
        xtc_probability=draw(st.sampled_from([0.0, 1.0])),
        xtc_threshold=draw(floats32(0.01, 0.4)),
        repeat_penalty=draw(sometimes(1.0, floats32(1.0, 1.5))),
        frequency_penalty=draw(sometimes(0.0, floats32(0.0, 1.0))),
        presence_penalty=draw(sometimes(0.0, floats32(0.0, 1.0))),
        dry_multiplier=draw(sometimes(0.0, floats32(0.1, 2.0))),
        dry_sequence_breakers=(),
        min_keep=draw(keeps),
        seed=1,
    )


def assert_same_chain(params: SamplingParams, case: Case, length: int) -> None:
    logits = case.logits
    history = histories(case.size, case.seed, length)
    makers = makers_of(params, case.size)
    theirs = llama(logits, *(makers[name] for name in params.order), dist(), history=history)
    ids, probs = Sampler(params).distribution(logits, history)
    mine = dict(zip(ids.tolist(), probs.tolist(), strict=True))
    yours = {int(i): float(p) for i, p in zip(theirs.ids, theirs.p, strict=True) if p > 0}
    assert sum(mine.values()) == pytest.approx(1.0, abs=1e-9)
    common = mine.keys() & yours.keys()
    for token in common:
        assert abs(mine[token] - yours[token]) <= TOLERANCE
    # A token that only one side has is tied with another at the cut, or its probability is too small for float32.
    rest_mine = sorted((p for t, p in mine.items() if t not in common and p > 1e-37), reverse=True)
    rest_yours = sorted((p for t, p in yours.items() if t not in common and p > 1e-37), reverse=True)
    assert len(rest_mine) == len(rest_yours)
    # Relative, because tied tokens are equally likely however unlikely they are.
    np.testing.assert_allclose(rest_mine, rest_yours, rtol=1e-3, atol=0.0)
    if rest_mine:
        event("ties differ")


CHAIN_KINDS = ("gaussian", "peaked", "nearly flat", "with -inf", "sharp")


@exhaustive
@given(chain_params(), cases(CHAIN_KINDS), st.integers(0, 200))
def test_the_default_chain_gives_libllamas_distribution(params: SamplingParams, case: Case, length: int) -> None:
    # libllama's typical-p computes NaN if a probability is 0; that difference has its own test.
    assume(params.typical_p == 1.0 or case.kind in ("gaussian", "peaked", "nearly flat"))
    assume(params.typical_p == 1.0 or params.top_n_sigma <= 0)
    assert_same_chain(params, case, length)


@exhaustive
@given(
    chain_params(), st.permutations(list(DEFAULT_ORDER)), cases(CHAIN_KINDS, (1, 2, 50, 50, 1000)), st.integers(0, 200)
)
def test_any_order_of_the_chain_gives_libllamas_distribution(
    params: SamplingParams, order: list[str], case: Case, length: int
) -> None:
    assume(params.typical_p == 1.0 or case.kind in ("gaussian", "peaked", "nearly flat"))
    assume(params.typical_p == 1.0 or params.top_n_sigma <= 0)
    # A low temperature before typical-p makes some probabilities 0, for which libllama computes NaN.
    assume(params.typical_p == 1.0 or order.index("typical_p") < order.index("temperature"))
    assert_same_chain(params.replace(order=order), case, length)


def chi_squared(counts: NDArray[np.int64], probs: NDArray[np.float64]) -> tuple[float, int]:
    """Return the statistic and its degrees of freedom; tokens expected fewer than 8 times are pooled."""
    expected = probs * counts.sum()
    rare = expected < 8
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
        assert observed[-1] == 0
        observed, expected = observed[:-1], expected[:-1]
    return float(((observed - expected) ** 2 / expected).sum()), observed.size - 1


def assert_drawn_from(counts: NDArray[np.int64], probs: NDArray[np.float64]) -> None:
    """Apply the chi-squared test at a quantile of 1 - 1e-6 (Wilson and Hilferty's approximation)."""
    statistic, freedom = chi_squared(counts, probs)
    if freedom == 0:
        return
    limit = freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


DRAWN = {
    "plain": SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=3),
    "default": SamplingParams(seed=3),
    "xtc": SamplingParams(xtc_probability=0.4, xtc_threshold=0.1, seed=3),
    "xtc first": SamplingParams(xtc_probability=0.7, xtc_threshold=0.05, order=("xtc", "top_p", "temperature"), seed=3),
}
N_DRAWS = 20_000


@pytest.mark.parametrize("name", DRAWN)
def test_both_draw_from_the_stated_distribution(name: str) -> None:
    params = DRAWN[name]
    logits = np.random.default_rng(0).normal(0, 2, 50).astype(np.float32)
    sampler = Sampler(params)
    ids, probs = sampler.distribution(logits)
    stated = np.zeros(50)
    stated[ids] = probs
    assert_drawn_from(np.bincount([sampler(logits) for _ in range(N_DRAWS)], minlength=50), stated)
    makers = makers_of(params, 50)
    with llama_chain([*(makers[step] for step in params.order), dist(5)]) as chain:
        outcomes = (llama_apply(chain, logits) for _ in range(N_DRAWS))
        drawn = [int(outcome.ids[outcome.selected]) for outcome in outcomes]
    assert_drawn_from(np.bincount(drawn, minlength=50), stated)


def test_an_unfiltered_vocabulary_is_drawn_from_in_proportion() -> None:
    logits = np.random.default_rng(0).normal(0, 3, 128_256).astype(np.float32)
    sampler = Sampler(DRAWN["plain"])
    drawn = np.array([sampler(logits) for _ in range(5000)])
    # There are too many tokens to count each, so count bands of 1,000 by probability.
    band = np.empty(logits.size, np.int64)
    band[np.argsort(-logits)] = np.arange(logits.size) // 1000
    shares: NDArray[np.float64] = np.bincount(band, weights=exact_shares(logits)).astype(np.float64)
    assert_drawn_from(np.bincount(band[drawn], minlength=shares.size), shares)


class TestIntendedDifferences:
    """The intended differences from libllama, with what libllama does."""

    def test_top_k_breaks_ties_by_id(self) -> None:
        logits = np.zeros(1000, np.float32)
        assert filters.top_k(Candidates(logits), 5).token_ids().tolist() == [0, 1, 2, 3, 4]
        assert llama(logits, lambda: lib.llama_sampler_init_top_k(5)).ids.size == 5

    def test_typical_p_treats_a_logit_of_minus_infinity_as_probability_0(self) -> None:
        logits = np.array([2.0, 1.0, 0.0, -np.inf, -np.inf], np.float32)
        without = filters.typical_p(Candidates(logits[:3]), 0.5)
        assert np.array_equal(possible(filters.typical_p(Candidates(logits), 0.5)), possible(without))
        # libllama multiplies 0 by log 0: every score is NaN, and their order is that of the array.
        assert llama(logits, lambda: lib.llama_sampler_init_typical(0.5, 0)).ids.tolist() == [0]

    def test_a_vocabulary_of_both_huge_and_ordinary_logits_is_sorted(self) -> None:
        logits = np.random.default_rng(0).normal(0, 1, 1000).astype(np.float32)
        logits[7] = 1e10
        assert filters.top_k(Candidates(logits), 200).token_ids()[0] == 7
        # libllama sorts heads of more than 128 by buckets, and 1e10 overflows the bucket's number.
        theirs = llama(logits, lambda: lib.llama_sampler_init_top_k(200))
        assert theirs.ids[0] != 7

    def test_mirostat_1_keeps_a_flat_vocabulary_whole(self) -> None:
        # libllama converts an infinite k to int, which is undefined: 1 on x86, all on ARM.
        assert mirostat(Candidates(np.zeros(1000, np.float32)), 20.0, 1000).logits.size == 1000

    def test_a_temperature_that_overflows_float32_still_gives_probabilities(self) -> None:
        logits = np.array([1e38, 1e38, 0.0], np.float32)
        ids, probs = Sampler(SamplingParams(temperature=0.1, seed=1)).distribution(logits)
        assert (ids.tolist(), probs.tolist()) == ([0, 1], [0.5, 0.5])
        theirs = llama(logits, lambda: lib.llama_sampler_init_temp(0.1), dist())
        assert np.isnan(theirs.p).any()

    def test_a_long_sum_does_not_drift(self) -> None:
        # 40 likely tokens of 0.02 each, then many unlikely ones whose float32 sum stops growing.
        logits = np.full(128_256, -9.0, np.float32)
        logits[:40] = 0.0
        exact = exact_shares(logits)
        p = float(exact[:40].sum()) + 0.05
        ours = filters.top_p(Candidates(logits), p).token_ids()
        mass = float(exact[ours].sum())
        assert np.float32(p) <= mass <= np.float32(p) + 1e-5
