"""The sampler against libllama's own: `pytest bench/test_sampling.py`.

The baseline is `llama_sampler_sample`, on a context of a minimal model with a large vocabulary, whose logits are
overwritten: everything that libllama does for a token, from the logits to the accepted token, and nothing else.
A group has both. Both are also timed in turns on the same logits, so that other work on the machine affects them
equally; the medians are in `extra_info` as `ours_us`, `libllama_us` and `ratio`, with the `bar` for the ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from minerva_native._binding import ffi, lib
from minerva_native.sampling import Sampler, SamplingParams, apply_mask, logprob
from tiny_models import TinyModel, write_gguf

N_VOCAB = 128_256
TURNS = 200

Floats = NDArray[np.float32]


@dataclass
class Chain:
    """The same chain in both implementations, and how many times faster ours should be."""

    params: SamplingParams
    libllama: list[Callable[[], Any]]
    bar: float | None = None


def neutral(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1, **changes})


def dist() -> Any:
    return lib.llama_sampler_init_dist(1)


CHAINS = {
    "greedy": Chain(SamplingParams.greedy(), [lib.llama_sampler_init_greedy], 8.0),
    "top_k, top_p, temperature": Chain(
        neutral(top_k=40, top_p=0.95, temperature=0.8),
        [
            lambda: lib.llama_sampler_init_top_k(40),
            lambda: lib.llama_sampler_init_top_p(0.95, 0),
            lambda: lib.llama_sampler_init_temp(0.8),
            dist,
        ],
        2.5,
    ),
    "top_p": Chain(neutral(top_p=0.95), [lambda: lib.llama_sampler_init_top_p(0.95, 0), dist], 10.0),
    "min_p": Chain(neutral(min_p=0.05), [lambda: lib.llama_sampler_init_min_p(0.05, 0), dist], 10.0),
    "default chain with penalties and DRY": Chain(
        SamplingParams(
            repeat_penalty=1.1,
            frequency_penalty=0.1,
            presence_penalty=0.1,
            dry_multiplier=0.8,
            dry_sequence_breakers=(),
            seed=1,
        ),
        [
            lambda: lib.llama_sampler_init_penalties(N_VOCAB, 64, 1.1, 0.1, 0.1),
            lambda: lib.llama_sampler_init_dry(ffi.NULL, 0.8, 1.75, 2, 64, ffi.NULL, 0),
            lambda: lib.llama_sampler_init_top_n_sigma(-1.0),
            lambda: lib.llama_sampler_init_top_k(40),
            lambda: lib.llama_sampler_init_typical(1.0, 0),
            lambda: lib.llama_sampler_init_top_p(0.95, 0),
            lambda: lib.llama_sampler_init_min_p(0.05, 0),
            lambda: lib.llama_sampler_init_xtc(0.0, 0.1, 0, 1),
            lambda: lib.llama_sampler_init_temp_ext(0.8, 0.0, 1.0),
            dist,
        ],
        2.0,
    ),
    "temperature": Chain(neutral(temperature=0.8), [lambda: lib.llama_sampler_init_temp(0.8), dist]),
    "typical_p": Chain(neutral(typical_p=0.9), [lambda: lib.llama_sampler_init_typical(0.9, 0), dist]),
    "top_n_sigma": Chain(neutral(top_n_sigma=1.0), [lambda: lib.llama_sampler_init_top_n_sigma(1.0), dist]),
}
SHAPES = ("gaussian", "model")


def make_logits(shape: str) -> Floats:
    """Return `gaussian` logits (deviation 3, a nucleus of 12,000), or like a `model`'s (a few of 40 likely tokens)."""
    rng = np.random.default_rng(7)
    logits = rng.normal(0.0, 3.0 if shape == "gaussian" else 2.0, N_VOCAB).astype(np.float32)
    if shape == "model":
        logits[rng.choice(N_VOCAB, 40, replace=False)] += np.linspace(4, 16, 40, dtype=np.float32)
    return logits


def make_history() -> list[int]:
    """Return a history with a phrase that repeats, so that DRY has something to find."""
    rng = np.random.default_rng(11)
    phrase = rng.integers(0, N_VOCAB, 12).tolist()
    return [token for _ in range(16) for token in (*phrase, *rng.integers(0, N_VOCAB, 4).tolist())]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A libllama context with one row of logits for a vocabulary of 128,256."""
    shape = TinyModel(n_layer=1, n_embd=32, n_head=1, n_head_kv=1, n_ff=32, tied=True)
    weights = {**shape.weights, "token_embd.weight": np.zeros((N_VOCAB, shape.n_embd), np.float32)}
    keys = {f"llama.{key}": value for key, value in shape.hyperparameters.items()}
    keys |= {"llama.vocab_size": N_VOCAB, "tokenizer.ggml.model": "none"}
    path: Path = write_gguf(tmp_path_factory.mktemp("wide") / "wide.gguf", "llama", keys, weights)
    lib.llama_backend_init()
    model_params = lib.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(path).encode(), model_params)
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 64, 8, 1, 1
    context = lib.llama_init_from_model(model, params)
    token = ffi.new("llama_token[]", [1])
    assert lib.llama_decode(context, lib.llama_batch_get_one(token, 1)) == 0
    yield context
    lib.llama_free(context)
    lib.llama_model_free(model)


class LlamaChain:
    """libllama's chain, and the context that it samples from."""

    def __init__(self, context: Any, makers: list[Callable[[], Any]], logits: Floats, history: list[int]) -> None:
        self.context = context
        self.chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for make in makers:
            lib.llama_sampler_chain_add(self.chain, make())
        for token in history:
            lib.llama_sampler_accept(self.chain, token)
        row = lib.llama_get_logits_ith(context, -1)
        np.frombuffer(ffi.buffer(row, logits.nbytes), np.float32)[:] = logits

    def sample(self) -> int:
        return int(lib.llama_sampler_sample(self.chain, self.context, -1))

    def close(self) -> None:
        lib.llama_sampler_free(self.chain)


def microseconds(function: Callable[[], object]) -> float:
    before = time.perf_counter()
    function()
    return 1e6 * (time.perf_counter() - before)


@pytest.fixture
def pair(context: Any, name: str, shape: str) -> Iterator[tuple[Callable[[], int], Callable[[], int]]]:
    chain, logits, history = CHAINS[name], make_logits(shape), make_history()
    theirs = LlamaChain(context, chain.libllama, logits, history)
    sampler = Sampler(chain.params)
    yield (lambda: sampler(logits, history)), theirs.sample
    theirs.close()


each_chain = pytest.mark.parametrize("name", CHAINS)
each_shape = pytest.mark.parametrize("shape", SHAPES)
Pair = tuple[Callable[[], int], Callable[[], int]]


@each_chain
@each_shape
def test_ours(benchmark: BenchmarkFixture, pair: Pair, name: str, shape: str) -> None:
    ours, theirs = pair
    benchmark.group = f"{name}, {shape}"
    turns = [(microseconds(ours), microseconds(theirs)) for _ in range(TURNS if benchmark.enabled else 2)]
    ours_us, theirs_us = (statistics.median(times) for times in zip(*turns, strict=True))
    benchmark.extra_info.update(
        ours_us=round(ours_us, 1), libllama_us=round(theirs_us, 1), ratio=round(theirs_us / ours_us, 2)
    )
    benchmark.extra_info["bar"] = CHAINS[name].bar
    assert 0 <= benchmark(ours) < N_VOCAB


@each_chain
@each_shape
def test_libllama(benchmark: BenchmarkFixture, pair: Pair, name: str, shape: str) -> None:
    benchmark.group = f"{name}, {shape}"
    assert 0 <= benchmark(pair[1]) < N_VOCAB


@pytest.mark.parametrize("kind", ["bool", "packed"])
def test_mask(benchmark: BenchmarkFixture, kind: str) -> None:
    """Time `apply_mask`; the bar is 30 microseconds."""
    benchmark.group = "mask"
    logits, out = make_logits("gaussian"), np.empty(N_VOCAB, np.float32)
    allowed = np.random.default_rng(3).random(N_VOCAB) < 0.5
    mask = allowed if kind == "bool" else np.packbits(allowed, bitorder="little")
    benchmark(apply_mask, logits, mask, out)


def test_logprob(benchmark: BenchmarkFixture) -> None:
    benchmark.group = "logprob"
    assert benchmark(logprob, make_logits("model"), 5) < 0


@pytest.mark.parametrize("params", [SamplingParams.greedy(), SamplingParams(seed=1)], ids=["greedy", "default chain"])
def test_small_vocabulary(benchmark: BenchmarkFixture, params: SamplingParams) -> None:
    benchmark.group = "1,024 logits"
    logits = np.random.default_rng(5).normal(0.0, 3.0, 1024).astype(np.float32)
    assert 0 <= benchmark(Sampler(params), logits, []) < logits.size
