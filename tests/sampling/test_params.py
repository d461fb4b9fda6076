from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minerva_native.sampling import DEFAULT_ORDER, SamplingParams


def test_the_defaults_are_those_of_llama_cpp() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.8, 40, 0.95, 0.05)
    assert (params.repeat_last_n, params.repeat_penalty, params.dry_base, params.dry_allowed_length) == (
        64,
        1.0,
        1.75,
        2,
    )
    assert params.seed is None
    assert params.order == DEFAULT_ORDER


def test_parameters_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 1.0  # type: ignore[misc]


def test_replace_validates_the_copy() -> None:
    params = SamplingParams(top_k=5).replace(temperature=0.5)
    assert (params.top_k, params.temperature) == (5, 0.5)
    with pytest.raises(ValueError, match="temperature"):
        params.replace(temperature=-1.0)


def test_parameters_with_the_same_values_are_equal_and_have_the_same_hash() -> None:
    assert len({SamplingParams(logit_bias={1: 2.0}), SamplingParams(logit_bias=[(1, 2)])}) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e300),
        ("dynatemp_range", -1.0),
        ("dynatemp_exponent", math.nan),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("typical_p", -1.0),
        ("xtc_probability", 2.0),
        ("xtc_threshold", -0.5),
        ("repeat_last_n", -2),
        ("repeat_penalty", 0.0),
        ("repeat_penalty", -1.0),
        ("repeat_penalty", 1e-320),
        ("frequency_penalty", math.inf),
        ("presence_penalty", math.nan),
        ("dry_multiplier", math.inf),
        ("dry_base", -1.0),
        ("dry_allowed_length", -1),
        ("dry_penalty_last_n", -2),
        ("dry_sequence_breakers", ("",)),
        ("mirostat", 3),
        ("mirostat_tau", -1.0),
        ("mirostat_eta", math.nan),
        ("adaptive_target", 1.5),
        ("adaptive_decay", 1.0),
        ("min_keep", -1),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: math.nan}),
        ("seed", -2),
        ("seed", 2**64),
        ("order", ("top_k", "top_k")),
        ("order", ("top_k", "magic")),
    ],
)
def test_a_value_out_of_range_is_rejected_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "0.8"),
        ("temperature", True),
        ("temperature", None),
        ("top_k", 40.0),
        ("top_k", True),
        ("top_p", [0.9]),
        ("seed", 1.5),
        ("seed", "1"),
        ("mirostat", "2"),
        ("logit_bias", 3),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1.0}),
        ("dry_sequence_breakers", "\n"),
        ("dry_sequence_breakers", (1.5,)),
        ("order", "top_k"),
        ("order", (1,)),
    ],
)
def test_a_value_of_the_wrong_type_is_rejected_by_name(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: value})


def test_numpy_scalars_are_accepted() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3))  # type: ignore[arg-type]
    assert (type(params.temperature), type(params.top_k)) == (float, int)


def test_llama_cpps_spellings_of_the_steps_are_accepted() -> None:
    assert SamplingParams(order=("typ_p", "nucleus", "Min-P", "temp")).order == (
        "typical_p",
        "top_p",
        "min_p",
        "temperature",
    )


def test_ids_in_a_bias_may_be_strings_of_digits_as_in_json() -> None:
    assert SamplingParams(logit_bias={"5": 1.0, "17": 2.0}).logit_bias == ((5, 1.0), (17, 2.0))
    for wrong in ("", "-5", "five", "\u0665", "9" * 11):
        with pytest.raises((TypeError, ValueError), match="logit_bias"):
            SamplingParams(logit_bias={wrong: 1.0})


def test_minus_1_is_a_random_seed() -> None:
    assert SamplingParams(seed=-1) == SamplingParams(seed=None)


def test_a_false_bias_bans_as_in_llama_server() -> None:
    assert SamplingParams(logit_bias=[(5, False)]).logit_bias == ((5, -math.inf),)


def test_a_single_token_id_can_be_a_breaker() -> None:
    assert SamplingParams(dry_sequence_breakers=(13, (1, 2), "x")).dry_sequence_breakers == ((13,), (1, 2), "x")


class TestFromModel:
    """Parameters recommended by the model's metadata."""

    def test_every_key_that_llama_cpp_reads_is_read(self) -> None:
        keys = {
            "sequence": "top_k;temperature",
            "top_k": 20,
            "top_p": float(np.float32(0.9)),
            "min_p": 0.0,
            "xtc_probability": 0.5,
            "xtc_threshold": 0.25,
            "temp": float(np.float32(0.6)),
            "penalty_last_n": 32,
            "penalty_repeat": float(np.float32(1.1)),
            "mirostat": 2,
            "mirostat_tau": 4.0,
            "mirostat_eta": float(np.float32(0.2)),
        }
        model = SimpleNamespace(metadata={f"general.sampling.{key}": value for key, value in keys.items()})
        assert SamplingParams.from_model(model) == SamplingParams(
            order=("top_k", "temperature"),
            top_k=20,
            top_p=0.9,
            min_p=0.0,
            xtc_probability=0.5,
            xtc_threshold=0.25,
            temperature=0.6,
            repeat_last_n=32,
            repeat_penalty=1.1,
            mirostat=2,
            mirostat_tau=4.0,
            mirostat_eta=0.2,
        )

    def test_a_model_without_recommendations_gets_the_defaults(self) -> None:
        assert SamplingParams.from_model(SimpleNamespace(metadata={})) == SamplingParams()

    def test_keyword_arguments_override_the_metadata(self) -> None:
        model = SimpleNamespace(metadata={"general.sampling.temp": 0.6, "general.sampling.top_k": 20})
        params = SamplingParams.from_model(model, temperature=1.0, seed=3)
        assert (params.temperature, params.top_k, params.seed) == (1.0, 20, 3)

    def test_invalid_metadata_is_rejected_with_its_key(self) -> None:
        with pytest.raises(ValueError, match=r"general\.sampling\.temp"):
            SamplingParams.from_model(SimpleNamespace(metadata={"general.sampling.temp": -2.0}))
        with pytest.raises(ValueError, match=r"general\.sampling\.top_k"):
            SamplingParams.from_model(SimpleNamespace(metadata={"general.sampling.top_k": "many"}))
