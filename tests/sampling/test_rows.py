from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from minerva_native.sampling import Sampler, SamplingParams
from minerva_native.sampling.rows import survivors

SHAPES = ("normal", "tied", "flat", "mostly -inf", "heavy", "huge", "with NaN", "with inf")


def make_rows(shape: str, n_vocab: int, seed: int) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    scale = random.choice([0.1, 2.0, 10.0])
    rows: NDArray[np.float32] = (random.standard_normal((5, n_vocab)) * scale).astype(np.float32)
    if shape == "tied":
        rows = np.round(rows)
    elif shape == "flat":
        rows[:] = 1.5
    elif shape == "mostly -inf":
        rows[random.random(rows.shape) < random.choice([0.5, 0.99])] = -np.inf
    elif shape == "heavy":
        rows = random.standard_t(1.5, rows.shape).astype(np.float32)
    elif shape == "huge":
        rows *= np.float32(1e29)
    elif shape != "normal":
        rows[random.integers(5), random.integers(n_vocab)] = np.nan if shape == "with NaN" else np.inf
    return rows


def drawn(sampler: Sampler, logits: NDArray[np.float32], n: int) -> list[int] | str:
    try:
        return [sampler(logits) for _ in range(n)]
    except Exception as error:
        return repr(error)


@settings(max_examples=300, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    n_vocab=st.sampled_from([7, 50, 97, 1280, 8192, 10_007, 32_000]),
    seed=st.integers(0, 2**32),
    params=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 1e-7, 1e-6, 0.01, 0.8, 1.0, 5.0, 1e30]),
            "top_k": st.sampled_from([0, 1, 2, 5, 40, 100]),
            "top_p": st.sampled_from([0.0, 0.1, 0.5, 0.95, 0.99999999, 1.0]),
            "min_p": st.sampled_from([0.0, 1e-46, 0.05, 0.5, 1.0]),
            "min_keep": st.sampled_from([0, 1, 3, 60]),
            "xtc_probability": st.sampled_from([0.0, 0.0, 0.5]),
            "order": st.permutations(["top_k", "top_p", "min_p", "temperature"]).map(lambda order: [*order, "xtc"]),
        }
    ),
    biases=st.lists(st.sampled_from([-float("inf"), -1.0, -0.3, 0.5]), max_size=3),
)
def test_rows_together_are_drawn_as_each_by_itself(
    shape: str, n_vocab: int, seed: int, params: dict[str, Any], biases: list[float]
) -> None:
    rows = make_rows(shape, n_vocab, seed)
    # Of tokens that matter, and perhaps of one that the vocabulary does not have.
    likely = rows[0].argsort()[::-1]
    bias = {int(likely[3 * at]) if 3 * at < n_vocab else n_vocab: value for at, value in enumerate(biases)}
    samplers = [Sampler(SamplingParams(seed=at, logit_bias=bias, **params)) for at in range(5)]
    chain = samplers[0].chain
    if chain is None:
        return
    assert {sampler.chain for sampler in samplers} == {chain}
    some = sorted(np.random.default_rng(seed).permutation(5)[: 1 + seed % 5].tolist())
    found = survivors(rows, some, chain)
    assert len(found) == len(some)
    for row, left in zip(some, found, strict=True):
        if left is not None:
            alone = Sampler(SamplingParams(seed=row, logit_bias=bias, **params))
            assert drawn(alone, rows[row], 20) == [samplers[row].draw(left) for _ in range(20)]
            assert alone.state_dict() == samplers[row].state_dict()


@pytest.mark.parametrize("n_vocab", [1280, 32_000, 50_257])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"logit_bias": {3: -float("inf")}}, {"min_p": 0.0}])
def test_the_usual_parameters_need_no_second_look(n_vocab: int, params: dict[str, Any]) -> None:
    rows = make_rows("normal", n_vocab, 1)
    chain = Sampler(SamplingParams(seed=1, **params)).chain
    assert chain is not None
    assert None not in survivors(rows, range(5), chain)


@pytest.mark.parametrize(
    "params",
    [
        {"mirostat": 2},
        {"adaptive_target": 0.5},
        {"repeat_penalty": 1.1},
        {"xtc_probability": 0.5},
        {"dynatemp_range": 0.5},
        {"typical_p": 0.9},
        {"top_n_sigma": 1.0},
        {"top_k": 0},
        {"logit_bias": {1: 2.0}},
    ],
)
def test_other_steps_are_no_chain(params: dict[str, Any]) -> None:
    assert Sampler(SamplingParams(seed=1, **params)).chain is None


def test_what_edits_logits_is_no_chain() -> None:
    class Mine(Sampler):
        pass

    assert Sampler(processors=[lambda tokens, logits: None]).chain is None
    assert Mine().chain is None
