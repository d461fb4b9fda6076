"""The cost of the KV cache's bookkeeping, and batched decoding against upstream's: `pytest bench/test_cache.py`.

Bars: 5 microseconds to append a token to 100,000; 1 millisecond for a fork, a truncation, or finding the longest prefix
among 64 sequences of 8,000 tokens; 0.97 of the speed of `llama-batched-bench` with eight sequences. The last one needs
upstream's tools, whose folder `MINERVA_TOOLS` names: see CONTRIBUTING.md.
"""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import minerva_native as mn
import models
from engine_room import open_up
from minerva_native.engine.cache import KVCache
from minerva_native.engine.pool import SlotPool
from minerva_native.sequence import slot_of
from tiny_models import TinyModel

ROOT = Path(__file__).parents[1]
N_SEQUENCES, N_TOKENS = 64, 8_000
N_LONG = 100_000

BATCH, N_PROMPT, N_STEPS = 8, 32, 32
ROUNDS = {("wide-34m", "f16"): 21, ("wide-34m", "q4_0"): 21, ("llama-3.2-1b", "q4_0"): 9}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mn.Model]:
    """A minimal model, so that many tokens can be evaluated."""
    shape = TinyModel(n_layer=1, n_embd=32, n_head=1, n_head_kv=1, n_ff=32, n_ctx_train=2 * N_LONG)
    with mn.Model.load(shape.write(tmp_path_factory.mktemp("small") / "small.gguf"), gpu_layers=0) as model:
        yield model


@pytest.fixture(scope="module")
def opened(small: mn.Model) -> Iterator[tuple[mn.Context, KVCache]]:
    """A context for many sequences, and the cache inside it."""
    context, cache = open_up(small, n_ctx=N_TOKENS + N_SEQUENCES**2, n_seq=N_SEQUENCES + 2, n_threads=1)
    with context:
        yield context, cache


@pytest.fixture(scope="module")
def pool(opened: tuple[mn.Context, KVCache]) -> SlotPool:
    return opened[1].pool


@pytest.fixture(scope="module")
def many(opened: tuple[mn.Context, KVCache]) -> list[mn.Sequence]:
    """64 sequences of 8,000 tokens, each sharing a prefix one token longer than the one before: the worst case."""
    text = np.random.default_rng(1).integers(0, 200, N_TOKENS).tolist()
    context = opened[0]
    first = context.sequence()
    first.extend(text)
    sequences = [first.fork(N_TOKENS - N_SEQUENCES + shared) for shared in range(N_SEQUENCES)]
    first.close()
    context.clear_cache()
    for shared, sequence in enumerate(sequences):
        sequence.extend([255] * (N_SEQUENCES - shared))
    return sequences


def test_appending_to_a_long_sequence(benchmark: BenchmarkFixture, small: mn.Model) -> None:
    with small.context(n_ctx=2 * N_LONG, n_batch=512, n_threads=1) as context, context.sequence() as sequence:
        for token in range(N_LONG):
            sequence.append(token % 256)

        def append() -> None:
            for _ in range(1000):
                sequence.append(1)

        benchmark.pedantic(append, setup=lambda: sequence.truncate(N_LONG), rounds=50)
        if benchmark.stats:
            benchmark.extra_info["us_per_token"] = round(1e3 * benchmark.stats.stats.median, 3)


def test_forking(benchmark: BenchmarkFixture, many: list[mn.Sequence]) -> None:
    def fork() -> None:
        forks.append(many[0].fork(N_TOKENS - 10))

    forks: list[mn.Sequence] = []
    benchmark.pedantic(fork, setup=lambda: close(forks), rounds=100)
    close(forks)


def test_truncating(benchmark: BenchmarkFixture, many: list[mn.Sequence]) -> None:
    def fork() -> None:
        close(forks)
        forks.append(many[0].fork())

    forks: list[mn.Sequence] = []
    benchmark.pedantic(lambda: forks[0].truncate(N_TOKENS // 2), setup=fork, rounds=100)
    close(forks)


def close(forks: list[mn.Sequence]) -> None:
    for fork in forks:
        fork.close()
        fork.context.clear_cache()
    forks.clear()


def test_finding_the_longest_prefix(benchmark: BenchmarkFixture, many: list[mn.Sequence], pool: SlotPool) -> None:
    with many[0].context.sequence() as sequence:
        slot = slot_of(sequence)
        slot.add(np.array([*many[-1].tokens[:-1], 254, 254], np.int32))
        source, n = benchmark(pool.find_prefix, slot)
        assert (source, n) == (slot_of(many[-1]), N_TOKENS - 1)
        slot.cut(0)


@pytest.fixture(scope="module")
def batched_bench() -> Path:
    folders = [Path(os.environ["MINERVA_TOOLS"])] if "MINERVA_TOOLS" in os.environ else ROOT.glob("build/*/bin")
    for folder in folders:
        if (folder / "llama-batched-bench").exists():
            return folder / "llama-batched-bench"
    pytest.skip("llama-batched-bench is not built: see CONTRIBUTING.md")


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("model_file", ROUNDS, ids="-".join)
def test_eight_sequences_against_upstream(
    benchmark: BenchmarkFixture, batched_bench: Path, model_file: tuple[str, str], n_threads: int
) -> None:
    path = models.make(*model_file)
    n_ctx = BATCH * (N_PROMPT + N_STEPS)
    arguments = ["-m", path, "-c", n_ctx, "-npp", N_PROMPT, "-ntg", N_STEPS, "-npl", BATCH, "-kvu", "-ngl", 0]
    command = [batched_bench, *arguments, "-t", n_threads, "-tb", n_threads, "--output-format", "jsonl"]

    def upstream() -> float:
        for _ in range(5):  # now and then it exits without printing its result
            result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
            for line in result.stdout.splitlines():
                if line.startswith("{"):
                    return float(json.loads(line)["speed_tg"])
        pytest.fail(f"{batched_bench} prints no result")

    def ours() -> float:
        with model.context(n_ctx=n_ctx, n_seq=BATCH, n_threads=n_threads, prefix_cache=False) as context:
            choice = np.random.default_rng(1)
            sequences = [context.sequence() for _ in range(BATCH)]
            context.extend({sequence: choice.integers(0, n_vocab, N_PROMPT) for sequence in sequences})
            draws = choice.integers(0, n_vocab, (N_STEPS, BATCH, 1)).tolist()
            before, decoding = time.perf_counter(), context.stats.decode_seconds
            for tokens in draws:
                context.extend(dict(zip(sequences, tokens, strict=True)))
            seconds = time.perf_counter() - before
            outside.append((seconds - context.stats.decode_seconds + decoding) / (BATCH * N_STEPS))
            return BATCH * N_STEPS / seconds

    ratios: list[float] = []
    speeds: list[float] = []
    outside: list[float] = []  # seconds per token outside `llama_decode`

    def round_() -> None:
        own, theirs = (ours(), upstream()) if len(ratios) % 2 else (upstream(), ours())[::-1]
        ratios.append(own / theirs)
        speeds.append(own)

    with mn.Model.load(path, gpu_layers=0) as model:
        n_vocab = model.tokenizer.n_vocab
        benchmark.pedantic(round_, rounds=ROUNDS[model_file], warmup_rounds=1)
    benchmark.extra_info["ratio"] = round(statistics.median(ratios[1:] or ratios), 3)
    benchmark.extra_info["ratios"] = [round(ratio, 3) for ratio in sorted(ratios[1:])]
    benchmark.extra_info["tokens_per_second"] = round(statistics.median(speeds), 1)
    benchmark.extra_info["us_outside_decode"] = round(1e6 * statistics.median(outside), 1)
