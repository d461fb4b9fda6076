from __future__ import annotations

import math

import numpy as np
import pytest

from minerva_native.errors import SamplingError
from minerva_native.sampling import Sampler, SamplingParams, logprob, top_logprobs


@pytest.mark.parametrize("size", [1, 2, 50, 8191, 8192, 32_000, 128_256])
@pytest.mark.parametrize("shift", [-200.0, -30.0, 0.0, 60.0, 90.0])
def test_a_logprob_is_the_logarithm_of_the_softmax(size: int, shift: float) -> None:
    logits = (np.random.default_rng(size).normal(0, 4, size) + shift).astype(np.float32)
    wide = logits.astype(np.float64)
    exact = wide - float(wide.max()) - math.log(np.exp(wide - float(wide.max())).sum())
    for token in {0, size // 2, size - 1}:
        assert logprob(logits, token) == pytest.approx(float(exact[token]), abs=2e-6)


def test_a_banned_token_has_logprob_minus_infinity() -> None:
    assert logprob(np.array([0.0, -np.inf], np.float32), 1) == -math.inf


@pytest.mark.parametrize("token", [-1, 3])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        logprob(np.zeros(3, np.float32), token)


def test_nan_has_no_logprob() -> None:
    with pytest.raises(SamplingError, match="NaN"):
        logprob(np.array([0.0, np.nan], np.float32), 0)


def test_the_top_logprobs_are_the_largest_in_order() -> None:
    ids, values = top_logprobs(np.array([1.0, 3.0, 2.0, 3.0], np.float32), 3)
    assert ids.tolist() == [1, 3, 2]
    assert np.exp(values).sum() == pytest.approx(1 - math.exp(logprob(np.array([1, 3, 2, 3], np.float32), 0)))


def test_a_sampler_returns_the_models_logprobs() -> None:
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    told = Sampler(SamplingParams.greedy()).logprobs(logits, 0, n=2)
    assert told.logprob == pytest.approx(logprob(logits, 0))
    assert told.ids.tolist() == [1, 2]


def test_a_sampler_returns_the_logprobs_it_samples_from() -> None:
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    sampler = Sampler(SamplingParams(top_k=2, top_p=1.0, min_p=0.0, temperature=1.0, seed=1))
    told = sampler.sampled_logprobs(logits, 1, n=5)
    assert told.logprob == pytest.approx(-math.log1p(math.exp(-1)))
    assert told.ids.tolist() == [1, 2]
    assert sampler.sampled_logprobs(logits, 0).logprob == -math.inf
