from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from minerva_native.errors import SamplingError
from minerva_native.sampling import Sampler, SamplingParams

Floats = NDArray[np.float32]


def make_logits(size: int = 1000, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


CONFIGURATIONS = {
    "greedy": SamplingParams.greedy(),
    "default": SamplingParams(seed=1),
    "unfiltered": SamplingParams(top_k=0, top_p=1.0, min_p=0.0, temperature=1.0, seed=1),
    "top_p": SamplingParams(top_k=0, top_p=0.9, min_p=0.0, seed=1),
    "min_p": SamplingParams(top_k=0, top_p=1.0, min_p=0.1, seed=1),
    "typical": SamplingParams(top_k=0, typical_p=0.8, seed=1),
    "sigma": SamplingParams(top_k=0, top_p=1.0, min_p=0.0, top_n_sigma=1.0, seed=1),
    "xtc": SamplingParams(xtc_probability=0.5, xtc_threshold=0.05, seed=1),
    "dynamic": SamplingParams(dynatemp_range=0.5, seed=1),
    "penalties": SamplingParams(repeat_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1, seed=1),
    "dry": SamplingParams(dry_multiplier=0.8, dry_sequence_breakers=(3,), seed=1),
    "mirostat": SamplingParams(mirostat=1, seed=1),
    "mirostat 2": SamplingParams(mirostat=2, seed=1),
    "adaptive": SamplingParams(adaptive_target=0.3, seed=1),
    "everything": SamplingParams(
        top_n_sigma=3.0,
        typical_p=0.95,
        xtc_probability=0.5,
        repeat_penalty=1.1,
        dry_multiplier=0.5,
        dry_sequence_breakers=(),
        dynatemp_range=0.3,
        adaptive_target=0.3,
        logit_bias={0: 3.0},
        min_keep=3,
        seed=1,
    ),
}
every_configuration = pytest.mark.parametrize("params", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())


def generate(sampler: Sampler, count: int, tokens: list[int], size: int = 1000) -> list[int]:
    """Append `count` tokens, drawn from logits that depend on the position like a model's."""
    for _ in range(count):
        tokens.append(sampler(make_logits(size, len(tokens)), tokens))
    return tokens


@every_configuration
@pytest.mark.parametrize("size", [1, 2, 50, 1000, 9001, 32_000, 128_256])
def test_a_drawn_token_is_in_the_distribution(params: SamplingParams, size: int) -> None:
    sampler, logits, history = Sampler(params), make_logits(size), [0, 0, size - 1]
    ids, probs = sampler.distribution(logits, history)
    assert probs.sum() == pytest.approx(1.0)
    assert (probs > 0).all()
    assert (np.diff(probs) <= 0).all()
    assert sampler(logits, history) in ids


@every_configuration
@pytest.mark.parametrize("size", [50, 9001, 128_256])
def test_the_logits_are_not_modified(params: SamplingParams, size: int) -> None:
    logits = make_logits(size)
    before = logits.copy()
    logits.flags.writeable = False
    sampler = Sampler(params, [lambda tokens, logits: logits.fill(0)])
    sampler(logits, [1, 2, 3])
    sampler.distribution(logits, [1, 2, 3])
    np.testing.assert_array_equal(logits, before)


@every_configuration
def test_the_same_seed_gives_the_same_tokens(params: SamplingParams) -> None:
    assert generate(Sampler(params), 20, []) == generate(Sampler(params), 20, [])


@every_configuration
def test_a_restored_sampler_continues_with_the_same_tokens(params: SamplingParams) -> None:
    sampler = Sampler(params)
    tokens = generate(sampler, 10, [])
    restored = Sampler(params.replace(seed=99))
    restored.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert generate(restored, 10, tokens.copy()) == generate(sampler, 10, tokens.copy())


@every_configuration
def test_a_fork_continues_independently_with_the_same_tokens(params: SamplingParams) -> None:
    sampler = Sampler(params)
    tokens = generate(sampler, 10, [])
    branch = sampler.fork()
    expected = generate(sampler, 10, tokens.copy())
    assert generate(branch, 10, tokens.copy()) == expected


@every_configuration
def test_a_reset_sampler_repeats_its_tokens(params: SamplingParams) -> None:
    sampler = Sampler(params)
    first = generate(sampler, 10, [])
    sampler.reset()
    assert generate(sampler, 10, []) == first


@every_configuration
def test_distribution_does_not_change_the_state(params: SamplingParams) -> None:
    asked, other = Sampler(params), Sampler(params)
    for place in range(10):
        asked.distribution(make_logits(seed=place), [1, 2])
        assert asked(make_logits(seed=place), [1, 2]) == other(make_logits(seed=place), [1, 2])


@every_configuration
@pytest.mark.parametrize("size", [2, 50, 128_256])
@pytest.mark.parametrize(("bad", "message"), [(np.nan, "NaN"), (np.inf, r"\+inf"), (-np.inf, "every logit is -inf")])
def test_unusable_logits_raise_an_error(params: SamplingParams, size: int, bad: float, message: str) -> None:
    logits = np.full(size, bad, np.float32) if bad == -np.inf else make_logits(size)
    logits[size // 2] = bad
    with pytest.raises(SamplingError, match=message):
        Sampler(params)(logits, [0, 1, 0])
    with pytest.raises(SamplingError, match=message):
        Sampler(params).distribution(logits, [0, 1, 0])


@pytest.mark.parametrize(
    ("logits", "error"),
    [
        ([1.0, 2.0], TypeError),
        (np.zeros(3), TypeError),
        (np.zeros(3, np.float16), TypeError),
        (np.zeros((1, 3), np.float32), ValueError),
        (np.zeros(0, np.float32), SamplingError),
    ],
)
def test_anything_but_a_row_of_float32_logits_is_rejected(logits: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="logits"):
        Sampler()(logits)


def test_logits_may_be_strided() -> None:
    matrix = np.random.default_rng(0).normal(0, 3, (50, 4)).astype(np.float32)
    assert Sampler(SamplingParams.greedy())(matrix[:, 1]) == int(matrix[:, 1].argmax())


def test_greedy_takes_the_lowest_id_among_equal_logits() -> None:
    logits = np.zeros(128_256, np.float32)
    logits[[70, 900]] = 5
    assert Sampler(SamplingParams.greedy())(logits) == 70
    assert Sampler(SamplingParams(temperature=0.0))(logits) == 70


def test_temperature_0_applies_the_penalties() -> None:
    logits = np.array([0.0, 2.0, 1.5], np.float32)
    sampler = Sampler(SamplingParams(temperature=0.0, presence_penalty=1.0))
    assert (sampler(logits, []), sampler(logits, [1])) == (1, 2)


def test_temperature_0_after_xtc_takes_the_most_likely_remaining_token() -> None:
    logits = np.array([0.0, 2.0, 1.9], np.float32)
    sampler = Sampler(SamplingParams(temperature=0.0, xtc_probability=1.0, xtc_threshold=0.2, top_p=1.0, min_p=0.0))
    assert sampler(logits) == 2


class CountedHistory(Sequence[int]):
    """A history of any length that counts how many of its tokens were read."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.read = 0

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            places = range(self.length)[index]
            self.read += len(places)
            return [place % 7 for place in places]
        self.read += 1
        return index % 7

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("the whole history was read")


def test_only_the_penalty_windows_of_the_history_are_read() -> None:
    history = CountedHistory(100_000)
    params = SamplingParams(repeat_penalty=1.2, repeat_last_n=30, dry_multiplier=1.0, dry_penalty_last_n=50, seed=1)
    Sampler(params.replace(dry_sequence_breakers=(3,)))(make_logits(), history)
    assert history.read <= 80


def test_a_penalty_window_of_minus_1_is_the_whole_history() -> None:
    history, logits = [1] + [2] * 100 + [1], np.array([0.0, 2.0, 1.5], np.float32)
    for params in (
        SamplingParams(frequency_penalty=0.75, repeat_last_n=-1),  # twice for token 1, 100 times for token 2
        SamplingParams(dry_multiplier=9.0, dry_penalty_last_n=-1, dry_allowed_length=1, dry_sequence_breakers=()),
    ):
        whole, as_long, short = (
            Sampler(params.replace(repeat_last_n=n, dry_penalty_last_n=n)).distribution(logits, history)
            for n in (-1, len(history), 1)
        )
        assert np.array_equal(whole[0], as_long[0])
        assert np.array_equal(whole[1], as_long[1])
        assert not np.array_equal(whole[1], short[1])


def test_the_history_may_be_an_array() -> None:
    sampler = Sampler(SamplingParams(temperature=0.0, presence_penalty=100.0))
    logits = np.array([0.0, 2.0, 1.5], np.float32)
    assert sampler(logits, np.array([1], np.int32)) == 2  # type: ignore[arg-type]


def test_processors_run_in_order_after_the_bias_and_before_the_chain() -> None:
    seen: list[float] = []

    def first(tokens: Sequence[int], logits: Floats) -> None:
        seen.append(float(logits[0]))
        logits[0] += 1

    def second(tokens: Sequence[int], logits: Floats) -> None:
        seen.append(float(logits[0]))
        assert list(tokens) == [7]
        logits[0] = -np.inf

    sampler = Sampler(SamplingParams(logit_bias={0: 5.0}, seed=1), [first, second])
    ids, _ = sampler.distribution(np.zeros(3, np.float32), [7])
    assert seen == [5.0, 6.0]
    assert ids.tolist() == [1, 2]


def test_a_bias_can_ban_or_force_a_token() -> None:
    logits = np.zeros(1000, np.float32)
    assert Sampler(SamplingParams(logit_bias={5: 100.0}, seed=1))(logits) == 5
    ids, _ = Sampler(SamplingParams(logit_bias={0: -math.inf}, seed=1)).distribution(logits)
    assert 0 not in ids


def test_a_bias_for_a_token_outside_the_vocabulary_is_rejected() -> None:
    with pytest.raises(ValueError, match="logit_bias"):
        Sampler(SamplingParams(logit_bias={3: 1.0}))(np.zeros(3, np.float32))


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_bias_that_only_lowers_is_as_if_it_were_added_to_all(data: st.DataObject) -> None:
    """A sampler with a processor adds it to all logits; one without may leave it to the step that keeps the best."""
    levels = st.sampled_from([-math.inf, -1.0, 0.0, 1.0, 1.5, 2.0])
    n = data.draw(st.integers(2, 40))
    logits = np.array(data.draw(st.lists(levels, min_size=n, max_size=n)), np.float32)
    bias = data.draw(st.dictionaries(st.integers(0, n - 1), st.sampled_from([-math.inf, -1.0, -0.5, 0.0]), min_size=1))
    top_k, temperature = data.draw(st.integers(1, 8)), data.draw(st.sampled_from([0.0, 0.7]))
    params = SamplingParams(top_k=top_k, temperature=temperature, logit_bias=bias, seed=1)
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n).map(np.array))
    given_to_all = Sampler(params, [lambda tokens, work: None])
    expected = outcome(given_to_all, logits, mask)
    assert outcome(Sampler(params), logits, mask) == expected
    assert outcome(pickle.loads(pickle.dumps(Sampler(params))), logits, mask) == expected


def outcome(sampler: Sampler, logits: Floats, mask: Any) -> Any:
    """Return the distribution and some draws, or what the error says."""
    try:
        ids, probs = sampler.distribution(logits, mask=mask)
        return ids.tolist(), probs.tolist(), [sampler(logits, mask=mask) for _ in range(5)]
    except SamplingError as error:
        return str(error)


def test_a_bias_on_a_large_vocabulary_is_as_if_it_were_added_to_all() -> None:
    logits = make_logits(20_000)
    best = np.argsort(-logits)[:50].tolist()
    for n in (1, 5, 50):
        for temperature in (0.0, 0.8):
            params = SamplingParams(temperature=temperature, logit_bias=dict.fromkeys(best[:n], -math.inf), seed=1)
            given_to_all = Sampler(params, [lambda tokens, work: None])
            assert outcome(Sampler(params), logits, None) == outcome(given_to_all, logits, None)


def test_steps_missing_from_the_order_do_not_run() -> None:
    ids, _ = Sampler(SamplingParams(top_k=1, order=("temperature",), seed=1)).distribution(np.zeros(10, np.float32))
    assert ids.size == 10


def test_mirostat_replaces_the_chain() -> None:
    ids, _ = Sampler(SamplingParams(mirostat=2, top_k=1, temperature=1.0)).distribution(np.zeros(10, np.float32))
    assert ids.size == 10


def test_mirostat_converges_to_its_target_surprise() -> None:
    sampler = Sampler(SamplingParams(mirostat=2, mirostat_tau=3.0, temperature=1.0, seed=1))
    logits = make_logits(5000)
    surprises = []
    for _ in range(600):
        ids, probs = sampler.distribution(logits)
        token = sampler(logits)
        surprises.append(-math.log2(float(probs[ids == token][0])))
    assert np.mean(surprises[100:]) == pytest.approx(3.0, abs=0.3)


def test_adaptive_p_converges_to_its_target_probability() -> None:
    sampler = Sampler(SamplingParams(adaptive_target=0.2, temperature=1.0, top_k=20, seed=1))
    plain = Sampler(SamplingParams(temperature=1.0, top_k=20, seed=1))
    drawn = []
    for place in range(600):
        logits = make_logits(500, place)
        ids, probs = plain.distribution(logits)
        drawn.append(float(probs[ids == sampler(logits)][0]))
    assert np.mean(drawn[100:]) == pytest.approx(0.2, abs=0.05)


def test_a_fork_with_another_seed_draws_other_tokens() -> None:
    sampler = Sampler(SamplingParams(seed=1))
    branch = sampler.fork(seed=2)
    assert branch.seed == 2
    assert generate(branch, 20, []) != generate(sampler, 20, [])


def test_runs_without_a_seed_differ_but_can_be_repeated() -> None:
    sampler = Sampler(SamplingParams())
    assert sampler.seed != Sampler(SamplingParams()).seed
    assert generate(Sampler(SamplingParams(seed=sampler.seed)), 10, []) == generate(sampler, 10, [])


def test_a_known_seed_gives_known_tokens_on_every_platform() -> None:
    logits = (np.arange(100) / 8).astype(np.float32)
    sampler = Sampler(SamplingParams(seed=42))
    assert [sampler(logits) for _ in range(12)] == [91, 98, 97, 97, 99, 87, 98, 90, 97, 94, 98, 95]


@pytest.mark.parametrize("state", [{}, {"version": 2}, {"version": 1, "seed": 1}])
def test_an_incomplete_state_is_rejected(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="state"):
        Sampler().load_state_dict(state)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**64 - 1), st.integers(1, 60))
def test_no_seed_draws_a_banned_token(seed: int, size: int) -> None:
    logits = make_logits(size, seed % 1000)
    logits[seed % size] = -np.inf if size > 1 else 0.0
    params = SamplingParams(seed=seed, top_k=0, top_p=1.0, min_p=0.0)
    assert logits[Sampler(params)(logits)] > -np.inf


def test_importing_the_sampler_does_not_import_numpy_random() -> None:
    code = (
        "import sys, types, importlib.util as u\n"
        "spec = u.find_spec('minerva_native'); package = types.ModuleType('minerva_native')\n"
        "package.__path__ = list(spec.submodule_search_locations); sys.modules['minerva_native'] = package\n"
        "import minerva_native.sampling\n"
        "print([name for name in ('numpy.random', 'scipy', 'minerva_native._binding') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_distribution_with_xtc_mixes_both_cases_and_penalises_each_once() -> None:
    logits = np.array([3.0, 2.9, 0.5, 0.0], np.float32)
    params = SamplingParams(
        xtc_probability=0.25, presence_penalty=0.5, top_k=0, top_p=1.0, min_p=0.0, temperature=1.0, logit_bias={3: 0.0}
    )
    history = [1, 2]
    ids, probs = Sampler(params).distribution(logits, history)
    mixed = dict(zip(ids.tolist(), probs.tolist(), strict=True))
    for chance, share in ((0.0, 0.75), (1.0, 0.25)):
        case = Sampler(params.replace(xtc_probability=chance)).distribution(logits, history)
        for token, probability in zip(*case, strict=True):
            mixed[int(token)] -= share * float(probability)
    assert max(map(abs, mixed.values())) < 1e-12


@pytest.mark.parametrize("change", [{"version": 2}, {"seed": None}, {"drawn": -1}, {"mu": float("nan")}, {"seed": "x"}])
def test_an_invalid_state_is_rejected(change: dict[str, object]) -> None:
    sampler = Sampler(SamplingParams(seed=1))
    with pytest.raises(ValueError, match="state"):
        sampler.load_state_dict({**sampler.state_dict(), **change})
