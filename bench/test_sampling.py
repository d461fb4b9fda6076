"""The sampler against libllama's own chain, side by side: `pytest bench/test_sampling.py --benchmark-enable`.

Every chain is measured twice in one group: `ours`, and `libllama`, which does what `llama_sampler_sample` does for a
token: it fills an array of `llama_token_data` from the logits and applies the chain to it. The filling is done with
numpy in one strided store per field, because the array has to be made anew: a chain reorders it. `libllama_apply`
leaves the filling out of the timing; its difference to `libllama` is what the filling costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from minerva_native._binding import ffi, lib
from minerva_native.sampling import Sampler, SamplingParams, apply_mask, logprob

N_VOCAB = 128_256
HISTORY = 256
ENTRY = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])

Floats = NDArray[np.float32]


@dataclass
class Chain:
    """The same chain twice, and by how much ours is to be faster."""

    params: SamplingParams
    libllama: list[Callable[[], Any]]
    bar: float | None = None
    shapes: tuple[str, ...] = field(default=("gaussian", "model"))


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
    "mirostat 2": Chain(
        SamplingParams(mirostat=2, seed=1),
        [lambda: lib.llama_sampler_init_temp(0.8), lambda: lib.llama_sampler_init_mirostat_v2(1, 5.0, 0.1)],
    ),
}


def make_logits(shape: str) -> Floats:
    """`gaussian`: standard deviation 3. `model`: the same, and 40 tokens that stand out, like after a prompt."""
    rng = np.random.default_rng(7)
    logits = rng.normal(0.0, 3.0 if shape == "gaussian" else 2.0, N_VOCAB).astype(np.float32)
    if shape == "model":
        logits[rng.choice(N_VOCAB, 40, replace=False)] += np.linspace(4, 16, 40, dtype=np.float32)
    return logits


def make_history() -> list[int]:
    """Words that come back, so that DRY has something to find."""
    rng = np.random.default_rng(11)
    phrase = rng.integers(0, N_VOCAB, 12).tolist()
    return [token for _ in range(HISTORY // 16) for token in (*phrase, *rng.integers(0, N_VOCAB, 4).tolist())]


class LlamaChain:
    """libllama's chain over an array of its own."""

    def __init__(self, makers: list[Callable[[], Any]], logits: Floats, history: list[int]) -> None:
        self.chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for make in makers:
            lib.llama_sampler_chain_add(self.chain, make())
        for token in history:
            lib.llama_sampler_accept(self.chain, token)
        self.logits = logits
        self.ids = np.arange(logits.size, dtype=np.int32)
        self.entries = np.empty(logits.size, ENTRY)
        self.fields = tuple(self.entries[name] for name in ("id", "logit", "p"))
        self.array = ffi.new("llama_token_data_array *")
        self.data = ffi.cast("llama_token_data *", self.entries.ctypes.data)

    def fill(self) -> None:
        ids, logits, p = self.fields
        ids[:] = self.ids
        logits[:] = self.logits
        p[:] = 0.0
        array = self.array
        array.data, array.size, array.selected, array.sorted = self.data, self.logits.size, -1, False

    def apply(self) -> int:
        lib.llama_sampler_apply(self.chain, self.array)
        return int(self.array.data[self.array.selected].id)

    def sample(self) -> int:
        self.fill()
        return self.apply()

    def close(self) -> None:
        lib.llama_sampler_free(self.chain)


CASES = [pytest.param(name, shape, id=f"{name}-{shape}") for name, chain in CHAINS.items() for shape in chain.shapes]


@pytest.fixture
def libllama(request: pytest.FixtureRequest) -> Iterator[LlamaChain]:
    name, shape = request.param
    chain = LlamaChain(CHAINS[name].libllama, make_logits(shape), make_history())
    yield chain
    chain.close()


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_ours(benchmark: BenchmarkFixture, name: str, shape: str) -> None:
    benchmark.group = f"{name}, {shape}"
    benchmark.extra_info["bar"] = CHAINS[name].bar
    sampler, logits, history = Sampler(CHAINS[name].params), make_logits(shape), make_history()
    assert 0 <= benchmark(sampler, logits, history) < N_VOCAB


@pytest.mark.parametrize("libllama", [case.values[:2] for case in CASES], indirect=True, ids=[c.id for c in CASES])
def test_libllama(benchmark: BenchmarkFixture, libllama: LlamaChain, request: pytest.FixtureRequest) -> None:
    name, shape = request.node.callspec.params["libllama"]
    benchmark.group = f"{name}, {shape}"
    assert 0 <= benchmark(libllama.sample) < N_VOCAB


@pytest.mark.parametrize("libllama", [case.values[:2] for case in CASES], indirect=True, ids=[c.id for c in CASES])
def test_libllama_apply(benchmark: BenchmarkFixture, libllama: LlamaChain, request: pytest.FixtureRequest) -> None:
    name, shape = request.node.callspec.params["libllama"]
    benchmark.group = f"{name}, {shape}"
    assert 0 <= benchmark.pedantic(libllama.apply, setup=libllama.fill, rounds=200) < N_VOCAB


@pytest.mark.parametrize("kind", ["bool", "packed"])
def test_mask(benchmark: BenchmarkFixture, kind: str) -> None:
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
