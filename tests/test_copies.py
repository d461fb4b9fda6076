"""What can be copied and pickled, and what says that it cannot."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

import minerva_native as mn

COPIES: dict[str, Callable[[object], object]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}

OWNERS = {
    "Model": "model",
    "Context": "context",
    "Sequence": "sequence",
    "Tokenizer": "model.tokenizer",
    "Metadata": "model.metadata",
    "GGUF": "GGUF(DEMO_PATH)",
    "StreamDecoder": "model.tokenizer.stream()",
    "Handle": "model.raw()",
}


@pytest.mark.parametrize("name", OWNERS)
def test_what_owns_memory_refuses_to_be_copied_and_says_no_more(name: str) -> None:
    program = f"""
import copy, gc, pickle
from minerva_native import *
with Model.demo() as model, model.context(n_ctx=64) as context, context.sequence() as sequence:
    sequence.extend([1, 2, 3])
    subject = {OWNERS[name]}
    for action in (copy.copy, copy.deepcopy, pickle.dumps):
        for value in (subject, [subject]):
            try:
                action(value)
            except TypeError as error:
                assert "cannot be copied or pickled" in str(error), error
            else:
                assert action is copy.copy and value is not subject  # a list of the same object
    gc.collect()
    assert len(sequence.logits) == model.tokenizer.n_vocab
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def draws(sampler: mn.Sampler, count: int = 20) -> list[int]:
    history: list[int] = []
    for number in range(count):
        history.append(sampler(np.random.default_rng(number).normal(0, 3, 300).astype(np.float32), history))
    return history


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"mirostat": 1},
        {"mirostat": 2},
        {"adaptive_target": 0.3},
        {"dry_multiplier": 0.8, "dry_sequence_breakers": [5], "repeat_penalty": 1.3},
        {"xtc_probability": 0.5, "logit_bias": {3: 2.0}},
        {"temperature": 0.0},
    ],
    ids=str,
)
def test_a_copied_sampler_draws_what_the_original_would_have(how: str, params: dict[str, object]) -> None:
    sampler = mn.Sampler(mn.SamplingParams(**params))  # type: ignore[arg-type]
    draws(sampler, 7)
    copied = COPIES[how](sampler)
    assert isinstance(copied, mn.Sampler)
    expected = draws(sampler)
    assert draws(copied) == expected
    assert copied.seed == sampler.seed
    assert copied.state_dict() == sampler.state_dict()


def test_a_copied_sampler_keeps_its_processors() -> None:
    sampler = mn.Sampler(mn.SamplingParams.greedy(), [forbid_the_first])
    assert all(COPIES[how](sampler)(np.array([9.0, 1.0], np.float32)) == 1 for how in COPIES)  # type: ignore[operator]


def forbid_the_first(tokens: object, logits: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> None:
    logits[0] = -np.inf


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    "value", [mn.SamplingParams(top_k=3, logit_bias={1: -1.0}), mn.ContextOptions(n_ctx=77, kv_type=("q8_0", "f16"))]
)
def test_parameters_and_options_are_values(how: str, value: object) -> None:
    assert COPIES[how](value) == value
