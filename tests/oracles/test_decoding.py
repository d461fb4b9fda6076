"""Greedy decoding against a loop over libllama's greedy sampler, with a separate model and context."""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import numpy as np
import pytest

import minerva_native as mn
from minerva_native._binding import ffi, lib
from tiny_models import TinyModel

N_STEPS = 220


class Libllama:
    """The decode loop of upstream's `simple` example, using only the binding of this package."""

    def __init__(self, path: str):
        model_parameters = lib.llama_model_default_params()
        model_parameters.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(path.encode(), model_parameters)
        self.vocab = lib.llama_model_get_vocab(self.model)

    def __enter__(self) -> "Libllama":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        lib.llama_model_free(self.model)

    def greedy(self, prompt: list[int], n_steps: int, barred: Iterable[int] = ()) -> list[int]:
        """Return the next tokens, without stopping at end tokens; a barred token is never chosen."""
        context_parameters = lib.llama_context_default_params()
        context_parameters.n_ctx, context_parameters.n_threads = 512, 1
        context = lib.llama_init_from_model(self.model, context_parameters)
        sampler = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        biases = [{"token": token, "bias": -np.inf} for token in barred]
        lib.llama_sampler_chain_add(
            sampler, lib.llama_sampler_init_logit_bias(lib.llama_vocab_n_tokens(self.vocab), len(biases), biases)
        )
        lib.llama_sampler_chain_add(sampler, lib.llama_sampler_init_greedy())
        chosen: list[int] = []
        try:
            following: Any = ffi.new("llama_token[]", prompt)
            for _ in range(n_steps):
                assert lib.llama_decode(context, lib.llama_batch_get_one(following, len(following))) == 0
                chosen.append(lib.llama_sampler_sample(sampler, context, -1))
                following = ffi.new("llama_token[]", chosen[-1:])
        finally:
            lib.llama_sampler_free(sampler)
            lib.llama_free(context)
        return chosen

    def is_end(self, token: int) -> bool:
        return bool(lib.llama_vocab_is_eog(self.vocab, token))

    def ends(self) -> list[int]:
        return [token for token in range(lib.llama_vocab_n_tokens(self.vocab)) if self.is_end(token)]


@pytest.fixture(scope="module", params=["demo", "tiny", "tiny tied"])
def model(request: pytest.FixtureRequest, demo: mn.Model, load_tiny: Callable[[TinyModel], mn.Model]) -> mn.Model:
    return {
        "demo": lambda: demo,
        "tiny": lambda: load_tiny(TinyModel()),
        "tiny tied": lambda: load_tiny(TinyModel(tied=True, seed=2)),
    }[request.param]()


@pytest.fixture
def context(model: mn.Model) -> mn.Context:
    return model.context(n_ctx=512, n_threads=1)


@pytest.fixture
def prompt(model: mn.Model) -> list[int]:
    return model.tokenizer.encode("Once upon a time")


def greedy(barred: Iterable[int] = ()) -> mn.Sampler:
    return mn.Sampler(mn.SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(barred, -np.inf)))


def test_sampling_and_appending_for_220_steps_chooses_libllamas_tokens(
    model: mn.Model, context: mn.Context, prompt: list[int]
) -> None:
    sampler, sequence = greedy(), context.sequence()
    sequence.extend(prompt)
    for _ in range(N_STEPS):
        sequence.append(sampler(sequence.logits, sequence.tokens))
    with Libllama(str(model.path)) as libllama:
        assert sequence.tokens[len(prompt) :] == libllama.greedy(prompt, N_STEPS)


def test_generating_220_tokens_in_one_run_chooses_libllamas_tokens(
    model: mn.Model, context: mn.Context, prompt: list[int]
) -> None:
    sequence = context.sequence()
    sequence.extend(prompt)
    with Libllama(str(model.path)) as libllama:
        ends = libllama.ends()
        expected = libllama.greedy(prompt, N_STEPS, barred=ends)
    steps = list(mn.generate(sequence, greedy(barred=ends), max_tokens=N_STEPS))
    assert [step.token for step in steps] == expected
    assert steps[-1].finish_reason == "length"


def test_generating_until_the_model_ends_chooses_libllamas_tokens(demo: mn.Model) -> None:
    n_steps = 0
    with Libllama(str(demo.path)) as libllama, demo.context(n_ctx=512, n_threads=1) as context:
        for text in ("Once upon a time", "One day,", "The little cat", "It was raining", '"Hello,"'):
            prompt = demo.tokenizer.encode(text)
            with context.sequence() as sequence:
                sequence.extend(prompt)
                steps = list(mn.generate(sequence, greedy(), max_tokens=300))
            expected = libllama.greedy(prompt, len(steps))
            assert [step.token for step in steps] == expected
            assert libllama.is_end(expected[-1]) == (steps[-1].finish_reason == "end")
            assert not any(map(libllama.is_end, expected[:-1]))
            n_steps += len(steps)
    assert n_steps >= 200
