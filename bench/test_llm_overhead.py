"""What `LLM` adds to the time of a token over `generate`: `pytest bench/test_llm_overhead.py`.

The model's own time varies by more than the facade takes, so `generate` is replaced by one that gives the same steps
again, and costs next to nothing. `us_per_token` in `extra_info` is the median time of a request for 200 tokens without
that of the steps, divided by 200; its bar is 15 microseconds. It includes what a request takes once: options, queue,
sampler, and the evaluation of a prompt of one token. `us_per_request` is that alone.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import minerva_native as mn
from minerva_native import draft

N_TOKENS = 200
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize("way", ["complete", "stream", "chat", "chat with reasoning"])
def test_the_overhead_of_the_facade(benchmark: BenchmarkFixture, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with mn.LLM(mn.DEMO_PATH, n_ctx=1024, n_threads=1, template=TEMPLATE) as llm:
        ends = [token for token in range(llm.tokenizer.n_vocab) if llm.tokenizer.is_end(token)]
        params = mn.SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(ends, -float("inf")))
        options: dict[str, Any] = {"max_tokens": N_TOKENS, "sampling": params}
        with llm.context.sequence() as sequence:
            sequence.extend(llm.tokenizer.encode("Once upon a time"))
            steps = list(mn.generate(sequence, params, max_tokens=N_TOKENS))
        assert len(steps) == N_TOKENS

        def replay(*_: object, cancel: Any, decoder: Any, **__: object) -> Iterator[mn.Step]:
            for step in steps:
                cancel.is_set()
                if decoder is not None:
                    decoder.feed(step.token)
                yield step

        def request() -> object:
            if way == "complete":
                return llm.complete([1], **options)
            if way == "stream":
                return list(llm.stream([1], **options))
            tags = ("<think>", "</think>") if way.endswith("reasoning") else None
            with llm.chat(thinking_tags=tags, **options) as chat:
                return chat.send("a")

        def median(action: Callable[[], object]) -> float:
            times = []
            for _ in range(50):
                before = time.perf_counter()
                action()
                times.append(time.perf_counter() - before)
            return statistics.median(times)

        monkeypatch.setattr(draft, "generate", replay)
        benchmark.pedantic(request, rounds=50, warmup_rounds=2)
        whole = median(request)
        del steps[1:]
        once = median(request)
        benchmark.extra_info["us_per_token"] = round(1e6 * whole / N_TOKENS, 2)
        benchmark.extra_info["us_per_request"] = round(1e6 * once)


@pytest.mark.parametrize("observer", ["Metrics", "OpenTelemetry"])
def test_the_cost_of_being_watched(benchmark: BenchmarkFixture, observer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an observer adds to a request for 200 tokens, in turns with one that nobody watches: medians of the pairs.

    The steps are given again, as above. OpenTelemetry has an SDK, which keeps spans in memory.
    """
    with mn.LLM(mn.DEMO_PATH, n_ctx=1024, n_threads=1) as llm:
        ends = [token for token in range(llm.tokenizer.n_vocab) if llm.tokenizer.is_end(token)]
        params = mn.SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(ends, -float("inf")))
        with llm.context.sequence() as sequence:
            sequence.extend(llm.tokenizer.encode("Once upon a time"))
            made = list(mn.generate(sequence, params, max_tokens=N_TOKENS))
        monkeypatch.setattr(draft, "generate", lambda *_, **__: iter(made))
        watch = mn.Metrics() if observer == "Metrics" else telemetry_with_sdk()

        def seconds() -> float:
            before = time.perf_counter()
            llm.complete("Once upon a time", max_tokens=N_TOKENS, sampling=params)
            return time.perf_counter() - before

        def pair() -> None:
            plain = seconds()
            watch.watch(llm)
            added.append(seconds() - plain)
            watch.unwatch(llm)

        added: list[float] = []
        benchmark.pedantic(pair, rounds=201, warmup_rounds=3)
        benchmark.extra_info["us_per_request"] = round(1e6 * statistics.median(added), 1)
        benchmark.extra_info["us_per_token"] = round(1e6 * statistics.median(added) / N_TOKENS, 3)


def telemetry_with_sdk() -> mn.OpenTelemetry:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    traces = TracerProvider()
    traces.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    return mn.OpenTelemetry(tracer_provider=traces, meter_provider=MeterProvider([InMemoryMetricReader()]))
