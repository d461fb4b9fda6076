"""Measure the latency of raw decode: llama-bench's tests, and where every microsecond of a token goes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

import minerva_native as mn

from . import roofline
from .compare import LlamaBench, Row, find
from .machine import facts, model_facts
from .measure import Parts, Repetition, Run, Test, clock_ns, context_options
from .report import FLASH_ATTENTION, compared, figures, steady, taken_apart

__all__ = ["LlamaBench", "Source", "Test", "bench"]

WIDE_SPREAD = 0.05  # a relative standard deviation of the rates above this is worth a warning

_LIMIT = (
    *("weight_bytes_per_token", "kv_bytes_per_token", "memory_bandwidth", "memory_bandwidth_samples"),
    *("roofline_ts", "roofline_share", "fits_cache"),
)


class Source(NamedTuple):
    """Which model is measured, and how it is loaded.

    Attributes:
        path: a GGUF file; None is the built-in model.
        gpu_layers: as for `Model.load`.
        mmap: as for `Model.load`.
        placement: other arguments of `Model.load`, such as rpc and tensor_overrides.
    """

    path: str | None = None
    gpu_layers: Literal["auto"] | int = "auto"
    mmap: bool = True
    placement: Mapping[str, Any] = MappingProxyType({})

    def load(self, context: mn.ContextOptions) -> mn.Model:
        """Load the model, with room for a context; raise what `Model.load` raises."""
        path = mn.DEMO_PATH if self.path is None else self.path
        return mn.Model.load(path, gpu_layers=self.gpu_layers, context=context, mmap=self.mmap, **self.placement)


def bench(
    source: Source,
    tests: Sequence[Test],
    *,
    repetitions: int = 5,
    warm_up: bool = True,
    sampling: Mapping[str, Any] | None = None,
    take_apart: bool = True,
    baseline: Sequence[Row] = (),
    llama_bench: LlamaBench | None = None,
    on_progress: Callable[[str, int, int], object] = lambda name, done, total: None,
    on_context: Callable[[mn.Context], object] = lambda context: None,
) -> Iterator[dict[str, Any]]:
    """Run tests on a model, and yield a row of figures (see `report`) for each as soon as it is measured.

    Args:
        source: the model.
        tests: what to measure.
        repetitions: how often to run each test.
        warm_up: evaluate the prompt and a token before the first repetition.
        sampling: sampling parameters that override what the model recommends (see `SamplingParams.from_model`).
        take_apart: also run the decode loop, and time its parts.
        baseline: rows to compare with.
        llama_bench: upstream's llama-bench, to take turns with; both then load the model again for every repetition.
        on_progress: called with the test's name, how many repetitions are done (first 0), and how many there are.
        on_context: called with the context of each test before the first repetition.

    Raises:
        MinervaError: llama-bench failed; also what loading a model and making a context raise.
    """
    machine = {**facts(), "clock_ns": clock_ns()}
    largest = max((context_options(test) for test in tests), key=lambda options: options.n_ctx)
    with source.load(largest) as model:
        params = mn.SamplingParams.from_model(model, **(sampling or {}))
        how = {"sampling": asdict(params), "warm_up": warm_up}
        # Where tensors are put elsewhere, or on other machines, what reads them is not known.
        weights = None if source.placement else roofline.weights_touched(model)
        about = _About(model_facts(model) | how, weights, model.gpu_layers)
        if llama_bench is None:
            for test in tests:
                on_progress(test.name, 0, repetitions)
                with Run(model, test, params) as run:
                    on_context(run.context)
                    limit, samples = about.limit(test), []
                    if warm_up:
                        run.warm_up()
                    for number in range(repetitions):
                        samples.append(_measure(run, limit, warm_up, take_apart))
                        on_progress(test.name, number + 1, repetitions)
                row = {**machine, **_row(about, source, test, samples)}
                if baseline:
                    row |= _against(row, baseline)
                yield row
            return
    upstream = (about.facts["model_filename"], about.gpu_layers)
    for test in tests:
        on_progress(test.name, 0, repetitions)
        samples, theirs = [], []
        for number in range(repetitions):
            theirs.append(llama_bench.repeat(*upstream, test, source.mmap, warm_up))
            with source.load(largest) as model, Run(model, test, params) as run:
                limit = about.limit(test)
                if warm_up:
                    run.warm_up()
                samples.append(_measure(run, limit, warm_up, take_apart))
            on_progress(test.name, number + 1, repetitions)
        row = {**machine, **_row(about, source, test, samples)}
        yield row | compared(row, "llama-bench", [1e9 * test.n_tokens / ns for ns in theirs])


class _About(NamedTuple):
    """What stays the same for all tests of a model."""

    facts: dict[str, Any]
    weights: roofline.Weights | None
    gpu_layers: int

    def limit(self, test: Test) -> roofline.Limit | None:
        """Return the limit that memory sets, if the test generates tokens, and it is known."""
        return roofline.Limit(self.weights, test.n_threads) if test.n_gen and self.weights else None


class _Sample(NamedTuple):
    """One repetition, and what was measured along with it."""

    repetition: Repetition
    parts: Parts | None
    kv_bytes: float
    limit_seconds: float


def _measure(run: Run, limit: roofline.Limit | None, warm_up: bool, take_apart: bool) -> _Sample:
    """Run a test once."""
    bandwidth = limit.cpu_bandwidth() if limit else 1.0
    if limit and warm_up:
        run.settle()  # measuring the bandwidth has evicted the caches; the first token should not pay for it
    repetition, kv_bytes = run.repeat(), run.kv_bytes()
    parts = run.take_apart() if take_apart else None
    return _Sample(repetition, parts, kv_bytes, limit.seconds(kv_bytes, bandwidth) if limit else 0.0)


def _row(about: _About, source: Source, test: Test, samples: Sequence[_Sample]) -> dict[str, Any]:
    row: dict[str, Any] = {
        **about.facts,
        "n_batch": test.n_batch,
        "n_ubatch": test.n_ubatch,
        "n_threads": test.n_threads,
        "type_k": test.type_k,
        "type_v": test.type_v,
        "n_gpu_layers": about.gpu_layers,
        "flash_attn": next(number for number, name in FLASH_ATTENTION.items() if name == test.flash_attention),
        "mmap": source.mmap,
        "placement": ", ".join(f"{name}={value}" for name, value in sorted(source.placement.items())),
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "test": test.name,
        "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **figures(test, [sample.repetition for sample in samples]),
        **taken_apart([sample.parts for sample in samples if sample.parts]),
    }
    return row | _limit(about.weights, samples)


def _limit(weights: roofline.Weights | None, samples: Sequence[_Sample]) -> dict[str, Any]:
    """Return the figures of the roofline: medians over the repetitions."""
    if weights is None or not samples[0].repetition.token_ns.size:
        return dict.fromkeys(_LIMIT)
    seconds = np.array([sample.limit_seconds for sample in samples])
    token_seconds = np.array([steady(sample.repetition.token_ns).mean() / 1e9 for sample in samples])
    total = weights.total + samples[-1].kv_bytes
    return {
        "weight_bytes_per_token": weights.total,
        "kv_bytes_per_token": samples[-1].kv_bytes,
        "memory_bandwidth": float(np.median(total / seconds)),
        "memory_bandwidth_samples": (total / seconds).tolist(),
        "roofline_ts": float(np.median(1.0 / seconds)),
        "roofline_share": float(np.median(seconds / token_seconds)),
        "fits_cache": not weights.gpu and total < roofline.largest_cache_bytes(),
    }


def _against(row: dict[str, Any], baseline: Sequence[Row]) -> dict[str, Any]:
    found = find(row, baseline)
    other, differs = found or ({}, [])
    return {**compared(row, "baseline", other.get("samples_ts", [])), "baseline_differs": differs}
