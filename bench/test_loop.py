"""What this package adds to the time of a token: `pytest bench/test_loop.py`.

The cost of the loop is the time of a generation minus the time spent in `llama_decode` and in the sampler, which are
timed separately. Its median over the rounds is in `extra_info` as `loop_us_per_token`; its bar is 10 microseconds. The
more a sampler does, the less of the loop stays in the CPU's caches.

Reading logits and greedy sampling are timed with a vocabulary of 128,256; the bar of each is 40 microseconds.
"""

import statistics
import threading
import time
from collections.abc import Iterator
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import minerva_native as mn
import models
from engine_room import open_up
from tiny_models import TinyModel, write_gguf

N_VOCAB = 128_256
N_TOKENS = 200


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mn.Sequence]:
    """A sequence of a minimal model with a large vocabulary."""
    shape = TinyModel(n_layer=1, n_embd=32, n_head=1, n_head_kv=1, n_ff=32, tied=True)
    weights = {**shape.weights, "token_embd.weight": np.zeros((N_VOCAB, shape.n_embd), np.float32)}
    keys = {f"llama.{key}": value for key, value in shape.hyperparameters.items()}
    keys |= {"llama.vocab_size": N_VOCAB, "tokenizer.ggml.model": "none"}
    path = write_gguf(tmp_path_factory.mktemp("wide") / "wide.gguf", "llama", keys, weights)
    with mn.Model.load(path) as model, model.context(n_ctx=256, n_threads=1) as context:
        sequence = context.sequence()
        sequence.extend([1, 2, 3])
        yield sequence


class TimedSampler:
    """A sampler, and the time spent in it."""

    def __init__(self, sampler: mn.Sampler):
        self.sampler, self.seconds = sampler, 0.0

    def __call__(self, logits: npt.NDArray[np.float32], tokens: mn.sequence.Tokens) -> int:
        before = time.perf_counter()
        token = self.sampler(logits, tokens)
        self.seconds += time.perf_counter() - before
        return token


@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "default chain"])
def test_the_cost_of_the_loop_on_the_built_in_model(benchmark: BenchmarkFixture, temperature: float) -> None:
    with mn.Model.demo() as model, model.context(n_ctx=1024, n_threads=1) as context, context.sequence() as sequence:
        prompt = model.tokenizer.encode("Once upon a time")
        ends = [token for token in range(model.tokenizer.n_vocab) if model.tokenizer.is_end(token)]
        bias = dict.fromkeys(ends, -float("inf"))
        sampler = TimedSampler(mn.Sampler(mn.SamplingParams(temperature=temperature, seed=1, logit_bias=bias)))
        loop_seconds: list[float] = []

        def generate() -> None:
            sequence.truncate(0)
            sequence.extend(prompt)
            decode, sampling = context.stats.decode_seconds, sampler.seconds
            before = time.perf_counter()
            for _ in mn.generate(sequence, sampler, max_tokens=N_TOKENS):
                pass
            elapsed = time.perf_counter() - before
            inside = context.stats.decode_seconds - decode + sampler.seconds - sampling
            loop_seconds.append((elapsed - inside) / N_TOKENS)

        benchmark.pedantic(generate, rounds=25, warmup_rounds=2)
        benchmark.extra_info["loop_us_per_token"] = round(1e6 * statistics.median(loop_seconds), 2)


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("n", [1, 512], ids=["a token", "a prompt of 512"])
@pytest.mark.parametrize("kind", ["f16", "q4_0"])
def test_what_extend_adds_to_llama_decode(benchmark: BenchmarkFixture, kind: str, n: int, n_threads: int) -> None:
    """Report `us_outside_decode` in `extra_info`; 34 million weights have just evicted the caches."""
    ids, outside = list(range(1000, 1000 + n)), list[float]()
    with (
        mn.Model.load(models.make("wide-34m", kind), gpu_layers=0) as model,
        model.context(n_ctx=1024, n_threads=n_threads, prefix_cache=False) as context,
        context.sequence() as sequence,
    ):
        sequence.extend([1])

        def extend() -> None:
            before, decoding = time.perf_counter(), context.stats.decode_seconds
            sequence.extend(ids)
            outside.append(time.perf_counter() - before - context.stats.decode_seconds + decoding)

        benchmark.pedantic(extend, setup=lambda: sequence.truncate(1) if n > 1 else None, rounds=100, warmup_rounds=5)
    benchmark.extra_info["us_outside_decode"] = round(1e6 * statistics.median(outside), 1)


def test_reading_the_logits_of_a_large_vocabulary(benchmark: BenchmarkFixture, wide: mn.Sequence) -> None:
    assert benchmark(lambda: wide.logits).shape == (N_VOCAB,)


def test_greedy_sampling_on_a_large_vocabulary(benchmark: BenchmarkFixture) -> None:
    logits = np.random.default_rng(1).standard_normal(N_VOCAB).astype(np.float32)
    sampler = mn.Sampler(mn.SamplingParams(temperature=0.0))
    assert benchmark(sampler, logits, ()) == logits.argmax()


def test_appending_and_rewinding_a_token(benchmark: BenchmarkFixture, wide: mn.Sequence) -> None:
    def append_and_rewind() -> None:
        wide.append(1)
        wide.rewind(1)

    benchmark(append_and_rewind)


@pytest.mark.parametrize("path", ["extend_by_one", "extend_each_by_one"])
def test_what_a_fast_path_saves(benchmark: BenchmarkFixture, path: str) -> None:
    """`us_with` and `us_without` it, a token outside `llama_decode`, in turns, and `saved`, the median of the pairs."""
    n_seq = 1 if path == "extend_by_one" else 8
    with mn.Model.demo() as model:
        context, cache = open_up(model, n_ctx=2048, n_seq=n_seq, n_threads=1, prefix_cache=False)
        with context:
            sequences = [context.sequence() for _ in range(n_seq)]

            def outside() -> float:
                for number, sequence in enumerate(sequences):
                    sequence.truncate(0)
                    sequence.extend([1, 5, 6 + number])
                before, decoding = time.perf_counter(), context.stats.decode_seconds
                for step in range(N_TOKENS):
                    if n_seq == 1:
                        sequences[0].extend([step + 10])
                    else:
                        context.extend({sequence: [step + 10] for sequence in sequences})
                spent = time.perf_counter() - before - context.stats.decode_seconds + decoding
                return 1e6 * spent / N_TOKENS / n_seq

            pairs: list[tuple[float, float]] = []

            def pair() -> None:
                fast = outside()
                with mock.patch.object(cache, path, return_value=False):
                    pairs.append((fast, outside()))

            benchmark.pedantic(pair, rounds=15, warmup_rounds=1)
    benchmark.extra_info["us_with"] = round(statistics.median(fast for fast, _ in pairs), 2)
    benchmark.extra_info["us_without"] = round(statistics.median(slow for _, slow in pairs), 2)
    benchmark.extra_info["saved"] = round(statistics.median(1 - fast / slow for fast, slow in pairs), 2)


def test_cancelling_a_prompt(benchmark: BenchmarkFixture) -> None:
    """`ms` from setting a cancel token to `Cancelled`, on a CPU in the middle of a prompt: median and maximum."""
    delays: list[float] = []
    prompt = [token % 30_000 for token in range(6000)]
    with (
        mn.Model.load(models.make("wide-34m", "f16"), gpu_layers=0) as model,
        model.context(n_ctx=8192, n_threads=2, prefix_cache=False) as context,
        context.sequence() as sequence,
    ):

        def cancel() -> None:
            token, set_at = threading.Event(), list[float]()

            def set_token() -> None:
                set_at.append(time.perf_counter())
                token.set()

            timer = threading.Timer(0.02 + 0.004 * (len(delays) % 10), set_token)
            timer.start()
            with pytest.raises(mn.Cancelled):
                sequence.extend(prompt, cancel=token)
            delays.append(1e3 * (time.perf_counter() - set_at[0]))

        benchmark.pedantic(cancel, rounds=20)
    benchmark.extra_info["ms"] = [round(statistics.median(delays), 1), round(max(delays), 1)]
