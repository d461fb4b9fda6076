"""Telemetry: numbers that are those of the requests, in text that Prometheus reads, and spans as others expect them."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client.parser import text_string_to_metric_families

import minerva_native as mn

STORY = "Once upon a time, there was a little"
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
DEMO = "minerva-demo.gguf"


@pytest.fixture
def llm(demo: mn.Model) -> Iterator[mn.LLM]:
    with mn.LLM(demo, n_ctx=512, n_threads=1, template=TEMPLATE) as llm:
        yield llm


def never_ends(llm: mn.LLM) -> dict[int, float]:
    return {token: -100.0 for token in range(llm.tokenizer.n_vocab) if llm.tokenizer.is_end(token)}


# Prometheus


def parsed(metrics: mn.Metrics) -> dict[tuple[str, ...], float]:
    """Return the samples as Prometheus reads them, by name and label values."""
    samples = {}
    for family in text_string_to_metric_families(metrics.prometheus()):
        assert family.documentation
        for sample in family.samples:
            assert family.type in ("counter", "gauge", "histogram")
            assert sample.name.startswith(f"minerva_{family.name.removeprefix('minerva_')}")
            key = (sample.name, *sample.labels.values())
            assert key not in samples
            samples[key] = sample.value
    return samples


def test_the_numbers_are_those_of_the_requests(llm: mn.LLM) -> None:
    metrics = mn.Metrics()
    metrics.watch(llm, "a model")
    answers = [llm.complete(STORY, max_tokens=n, seed=1, logit_bias=never_ends(llm)) for n in (1, 3, 5)]
    answers.append(llm.complete(STORY, stop=[" "], seed=1))
    list(llm.stream(STORY, max_tokens=2, logit_bias=never_ends(llm)))
    llm.score(STORY)
    samples, where = parsed(metrics), ("a model", "text_completion")
    n_prompt = len(llm.tokenizer.encode(STORY))
    assert samples["minerva_requests_total", *where, "length"] == 4
    assert samples["minerva_requests_total", *where, "stop"] == 1
    assert samples["minerva_requests_total", "a model", "score", "end"] == 1
    assert samples["minerva_prompt_tokens_total", *where] == 5 * n_prompt
    assert samples["minerva_prompt_tokens_total", "a model", "score"] == n_prompt
    assert samples["minerva_cached_tokens_total", *where] >= sum(answer.usage.cached_tokens for answer in answers) > 0
    n_tokens = 2 + sum(answer.usage.completion_tokens for answer in answers)
    assert samples["minerva_completion_tokens_total", *where] == n_tokens
    for name in ("request_duration", "queue", "time_to_first_token"):
        assert samples[f"minerva_{name}_seconds_count", *where] == 5
        assert samples[f"minerva_{name}_seconds_bucket", *where, "+Inf"] == 5
    assert (
        samples["minerva_time_per_output_token_seconds_count", *where]
        == sum(answer.usage.completion_tokens > 1 for answer in answers) + 1
    )
    known = sum(answer.timings.first_token for answer in answers)
    assert samples["minerva_time_to_first_token_seconds_sum", *where] > known
    buckets = [
        value for key, value in samples.items() if key[0] == "minerva_queue_seconds_bucket" and key[2] == where[1]
    ]
    assert buckets == sorted(buckets)


def test_reasoning_and_guesses_are_counted(demo: mn.Model) -> None:
    metrics = mn.Metrics()
    with mn.LLM(demo, n_ctx=512, n_threads=1, template="<think>", speculate=lambda tokens, n: [40] * n) as llm:
        metrics.watch(llm)
        chat = llm.chat(thinking_tags=("<think>", "</think>"), max_tokens=40, logit_bias=never_ends(llm))
        usage = chat.send("Hello").usage
    assert usage.reasoning_tokens
    assert usage.drafted
    samples = parsed(metrics)
    for field in ("reasoning_tokens", "drafted", "accepted"):
        name = f"minerva_{field.removesuffix('_tokens')}_tokens_total"
        assert samples[name, DEMO, "chat"] == getattr(usage, field)


def test_what_fails_and_what_is_stopped_is_counted_as_that(llm: mn.LLM) -> None:
    metrics = mn.Metrics()
    metrics.watch(llm)
    with pytest.raises(mn.ContextFullError):
        llm.complete([5] * 600)
    with llm.stream(STORY, logit_bias=never_ends(llm)) as running:
        next(running)
        with pytest.raises(mn.Cancelled):
            llm.complete(STORY, timeout=0.02)
    llm.complete("x", max_tokens=0)  # those before it have ended then
    samples, where = parsed(metrics), (DEMO, "text_completion")
    assert samples["minerva_requests_total", *where, "error"] == 1
    assert samples["minerva_requests_total", *where, "cancelled"] == 2
    assert samples["minerva_queue_seconds_count", *where] == 4
    assert samples["minerva_queue_seconds_sum", *where] >= 0.02
    assert samples["minerva_time_to_first_token_seconds_count", *where] == 1


def test_gauges_say_what_is_now(llm: mn.LLM) -> None:
    metrics = mn.Metrics()
    metrics.watch(llm)
    with llm.stream(STORY, logit_bias=never_ends(llm)) as running, llm.stream("a"), llm.stream("b"):
        next(running)
        samples = parsed(metrics)
        assert samples["minerva_requests_waiting", DEMO] == 2
        assert samples["minerva_requests_served", DEMO] == 1
        assert samples["minerva_sequences", DEMO] == 1
        assert samples["minerva_sequences_limit", DEMO] == 8
        assert samples["minerva_kv_cells_used", DEMO] >= len(llm.tokenizer.encode(STORY))
        assert samples["minerva_kv_cells_limit", DEMO] == 512
    llm.complete("x", max_tokens=0)
    assert parsed(metrics)["minerva_requests_waiting", DEMO] == 0


def test_it_does_not_wait_for_a_computation(llm: mn.LLM) -> None:
    metrics = mn.Metrics()
    metrics.watch(llm)
    texts: list[str] = []
    with llm.context.raw():  # as a long prompt would, it keeps others out
        thread = threading.Thread(target=lambda: texts.append(metrics.prometheus()))
        thread.start()
        thread.join(60)
    assert "minerva_kv_cells_used" in texts[0]


def test_several_models_come_and_go(demo: mn.Model) -> None:
    metrics = mn.Metrics()
    with mn.LLM(demo, n_ctx=128, n_threads=1) as one, mn.LLM(demo, n_ctx=256, n_threads=1) as other:
        metrics.watch(one)
        metrics.watch(other)
        one.complete(STORY, max_tokens=1)
        other.complete(STORY, max_tokens=1)
        samples = parsed(metrics)
        assert samples["minerva_requests_total", DEMO, "text_completion", "length"] == 2
        assert samples["minerva_kv_cells_limit", DEMO] == 128 + 256
        metrics.watch(other, "another")  # a new name, and no request counted twice
        other.complete(STORY, max_tokens=1)
        metrics.unwatch(one)
        metrics.unwatch(one)
        one.complete(STORY, max_tokens=1)
        samples = parsed(metrics)
        assert samples["minerva_requests_total", DEMO, "text_completion", "length"] == 2
        assert samples["minerva_requests_total", "another", "text_completion", "length"] == 1
        assert ("minerva_kv_cells_limit", DEMO) not in samples
        assert samples["minerva_kv_cells_limit", "another"] == 256
        assert not one.observers
    assert ("minerva_kv_cells_limit", "another") not in parsed(metrics)
    assert parsed(metrics)["minerva_requests_total", "another", "text_completion", "length"] == 1


@pytest.mark.parametrize("name", ['a "quoted" \\name\\n\nof two lines', "", "ünïcode {le=1}"])
def test_any_name_is_escaped(llm: mn.LLM, name: str) -> None:
    metrics = mn.Metrics()
    metrics.watch(llm, name)
    llm.complete(STORY, max_tokens=1)
    assert parsed(metrics)["minerva_requests_total", name, "text_completion", "length"] == 1


def test_a_name_that_is_no_text_can_be_sent(llm: mn.LLM) -> None:
    metrics = mn.Metrics()
    metrics.watch(llm, "model-\udcff.gguf")
    assert metrics.prometheus().encode()


def test_many_threads_count_right(demo: mn.Model) -> None:
    metrics, done = mn.Metrics(), threading.Event()
    with mn.LLM(demo, n_ctx=2048, n_threads=1, n_parallel=4) as llm, ThreadPoolExecutor(9) as pool:
        metrics.watch(llm)

        def read() -> int:
            n = 0
            while not done.is_set():
                parsed(metrics)
                n += 1
            return n

        reading = pool.submit(read)
        asked = [pool.submit(llm.complete, f"{STORY} {at}", max_tokens=5 + at % 3, n=1 + at % 2) for at in range(24)]
        answers = [future.result() for future in asked]
        done.set()
        assert reading.result() > 0
        samples, where = parsed(metrics), (DEMO, "text_completion")
        outcomes = [samples.get(("minerva_requests_total", *where, outcome), 0) for outcome in ("length", "end")]
        assert sum(outcomes) == 24
        used = [choice.usage for answer in answers for choice in answer.choices]
        assert samples["minerva_completion_tokens_total", *where] == sum(usage.completion_tokens for usage in used)
        prompts = sum(answer.usage.prompt_tokens for answer in answers)
        cached = sum(answer.usage.cached_tokens for answer in answers)
        assert samples["minerva_prompt_tokens_total", *where] == prompts
        assert samples["minerva_cached_tokens_total", *where] == cached


def test_a_token_costs_no_call(llm: mn.LLM) -> None:
    metrics, calls = mn.Metrics(), 0

    def note(frame: Any, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call" and Path(frame.f_code.co_filename).name in ("telemetry.py", "observer.py")

    threading.setprofile(note)
    try:
        metrics.watch(llm)
        llm.complete(STORY, max_tokens=0)  # on a thread that begins with it

        def cost(n: int) -> int:
            before = calls
            llm.complete(STORY, max_tokens=n, logit_bias=never_ends(llm))
            return calls - before

        assert cost(10) == cost(60) > 0
    finally:
        threading.setprofile(None)


def test_what_is_not_asked_for_is_not_imported() -> None:
    code = f"""
import sys
import minerva_native as mn
with mn.LLM({str(mn.DEMO_PATH)!r}, n_ctx=128, n_threads=1) as llm:
    llm.complete("Once", max_tokens=1)
    assert "minerva_native.telemetry" not in sys.modules
    metrics = mn.Metrics()
    metrics.watch(llm)
    llm.complete("Once", max_tokens=1)
assert "minerva_requests_total" in metrics.prometheus()
assert not [name for name in sys.modules if name.startswith(("opentelemetry", "prometheus"))]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# OpenTelemetry


class Exported:
    """What an SDK gets: spans and numbers."""

    def __init__(self, **options: Any) -> None:
        self._spans = InMemorySpanExporter()
        self.traces = TracerProvider()
        self.traces.add_span_processor(SimpleSpanProcessor(self._spans))
        self._reader = InMemoryMetricReader()
        meters = MeterProvider([self._reader])
        self.telemetry = mn.OpenTelemetry(tracer_provider=self.traces, meter_provider=meters, **options)
        self.tracer = self.traces.get_tracer("the application")

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._spans.get_finished_spans()

    def named(self, name: str) -> ReadableSpan:
        (span,) = [span for span in self.spans if span.name == name]
        return span

    def children(self, parent: ReadableSpan) -> list[ReadableSpan]:
        spans = [span for span in self.spans if span.parent and span.parent.span_id == context_of(parent).span_id]
        return sorted(spans, key=lambda span: (span.start_time or 0, span.end_time or 0))

    def points(self) -> dict[str, list[Any]]:
        data = self._reader.get_metrics_data()
        assert data is not None
        metrics = [metric for one in data.resource_metrics for scope in one.scope_metrics for metric in scope.metrics]
        return {metric.name: list(metric.data.data_points) for metric in metrics}

    def everything(self) -> str:
        """Return all that leaves the process, as text."""
        data = self._reader.get_metrics_data()
        return "".join(span.to_json() for span in self.spans) + (data.to_json() if data else "")


def context_of(span: ReadableSpan) -> Any:
    assert span.context is not None
    return span.context


def times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


@pytest.fixture
def exported() -> Exported:
    return Exported()


def test_a_request_is_a_span_with_its_phases(llm: mn.LLM, exported: Exported) -> None:
    exported.telemetry.watch(llm, "m")
    with exported.tracer.start_as_current_span("caller") as caller:
        answer = llm.complete(
            STORY, max_tokens=8, temperature=0.5, top_k=7, seed=3, stop=["xyzzy"], logit_bias=never_ends(llm)
        )
    request = exported.named("text_completion m")
    assert request.kind == SpanKind.INTERNAL
    assert request.parent == caller.get_span_context()
    assert request.status.status_code == StatusCode.UNSET
    attributes = dict(request.attributes or {})
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "minerva_native",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": DEMO,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": 7.0,
        "gen_ai.request.seed": 3,
        "gen_ai.request.stop_sequences": ("xyzzy",),
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": answer.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }
    assert {name: attributes.get(name) for name in expected} == expected
    phases = exported.children(request)
    assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
    begin, end = times(request)
    outer = times(exported.named("caller"))
    assert outer[0] <= begin
    assert end <= outer[1]
    borders = [begin, *(times(phase)[1] for phase in phases)]
    assert borders[-1] == end
    assert [times(phase)[0] for phase in phases] == borders[:-1]
    seconds = [(last - first) / 1e9 for first, last in map(times, phases)]
    assert seconds[:2] == pytest.approx([answer.timings.queue, answer.timings.prefill], abs=1e-6)
    assert sum(seconds) >= answer.timings.total - 1e-6


def test_each_caller_has_its_own_parent(demo: mn.Model, exported: Exported) -> None:
    with mn.LLM(demo, n_ctx=1024, n_threads=1, n_parallel=4) as llm:
        exported.telemetry.watch(llm)

        async def task(at: int) -> None:
            with exported.tracer.start_as_current_span(f"task {at}"):
                await llm.acomplete(f"{STORY} {at}", max_tokens=3)

        def thread(at: int) -> None:
            with exported.tracer.start_as_current_span(f"thread {at}"):
                list(llm.stream(f"{STORY} {at}", max_tokens=3))

        async def tasks() -> None:
            await asyncio.gather(*map(task, range(4)))

        asyncio.run(tasks())
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(thread, range(4)))
    for name in [f"{kind} {at}" for kind in ("task", "thread") for at in range(4)]:
        (request,) = exported.children(exported.named(name))
        assert [span.name for span in exported.children(request)] == ["queue", "prefill", "decode"]
        assert context_of(request).trace_id == context_of(exported.named(name)).trace_id


def test_what_fails_says_so(llm: mn.LLM, exported: Exported) -> None:
    exported.telemetry.watch(llm)
    with pytest.raises(mn.ContextFullError):
        llm.complete([5] * 600)
    (request,) = [span for span in exported.spans if span.parent is None]
    assert request.status.status_code == StatusCode.ERROR
    assert request.status.description is None
    assert (request.attributes or {})["error.type"] == "ContextFullError"
    assert [span.name for span in exported.children(request)] == ["queue", "prefill"]
    (point,) = exported.points()["gen_ai.server.request.duration"]
    assert point.attributes["error.type"] == "ContextFullError"
    assert "gen_ai.server.time_to_first_token" not in exported.points()


def test_what_is_stopped_in_the_queue_has_no_other_phase(llm: mn.LLM, exported: Exported) -> None:
    exported.telemetry.watch(llm)
    with llm.stream(STORY, logit_bias=never_ends(llm)) as running:
        next(running)
        with pytest.raises(mn.Cancelled):
            llm.complete(STORY, timeout=0.02)
        (request,) = [span for span in exported.spans if span.parent is None]
        assert (request.attributes or {})["error.type"] == "Cancelled"
        (queue,) = exported.children(request)
        assert times(queue) == times(request)
        assert times(queue)[1] - times(queue)[0] >= 0.02 * 1e9
    llm.complete("x", max_tokens=0)
    stopped = [span for span in exported.spans if span.parent is None][1]
    assert (stopped.attributes or {})["gen_ai.response.finish_reasons"] == ("cancelled",)
    assert stopped.status.status_code == StatusCode.UNSET


def test_the_metrics_are_those_of_the_conventions(llm: mn.LLM, exported: Exported) -> None:
    exported.telemetry.watch(llm)
    answers = [llm.complete(STORY, max_tokens=n, logit_bias=never_ends(llm)) for n in (4, 6)]
    points = exported.points()

    def one(name: str, **attributes: str) -> Any:
        (point,) = [point for point in points[name] if attributes.items() <= point.attributes.items()]
        assert point.attributes["gen_ai.request.model"] == DEMO
        assert point.attributes["gen_ai.provider.name"] == "minerva_native"
        return point

    duration = one("gen_ai.server.request.duration")
    assert isinstance(duration, HistogramDataPoint)
    assert duration.count == 2
    assert duration.sum >= sum(answer.timings.total for answer in answers)
    assert duration.explicit_bounds[:3] == (0.01, 0.02, 0.04)
    first = one("gen_ai.server.time_to_first_token")
    assert first.sum == pytest.approx(sum(answer.timings.first_token for answer in answers))
    assert first.explicit_bounds[-1] == 10.0
    later = one("gen_ai.server.time_per_output_token")
    assert later.sum == pytest.approx(
        sum((each.timings.total - each.timings.first_token) / (len(each.tokens) - 1) for each in answers)
    )
    tokens = "gen_ai.client.token.usage"
    written = one(tokens, **{"gen_ai.token.type": "output"})
    read = one(tokens, **{"gen_ai.token.type": "input"})
    assert (read.sum, written.sum) == (sum(answer.usage.prompt_tokens for answer in answers), 10)
    assert read.explicit_bounds[:4] == (1, 4, 16, 64)
    assert one("minerva.cached_tokens").value == answers[1].usage.cached_tokens > 0
    assert one("minerva.queue.duration").count == 2
    assert one("minerva.kv_cells.limit").value == 512
    assert one("minerva.kv_cells.used").value == 0
    assert one("minerva.requests.waiting").value == 0
    exported.telemetry.unwatch(llm)
    assert "minerva.kv_cells.limit" not in exported.points()


SECRET = "marmalade"


def say_secrets(llm: mn.LLM) -> None:
    """Make requests of all kinds whose texts are secret."""
    llm.complete(f"A secret: {SECRET}", max_tokens=3)
    llm.complete(llm.tokenizer.encode(SECRET), max_tokens=3)
    llm.choose("Once", [f" {SECRET}", " a"])
    llm.score(SECRET)
    chat = llm.chat(system=SECRET, max_tokens=3)
    chat.send(SECRET)
    list(chat.stream(SECRET))
    llm.chat_completion([{"role": "user", "content": SECRET}], max_tokens=2)
    with pytest.raises(mn.TemplateError, match=SECRET):
        llm.chat(template=f"{{{{ raise_exception('{SECRET}') }}}}").send("Hello")


def test_nobodys_text_is_recorded_unless_asked_for(llm: mn.LLM, exported: Exported) -> None:
    exported.telemetry.watch(llm)
    metrics = mn.Metrics()
    metrics.watch(llm)
    say_secrets(llm)
    assert len([span for span in exported.spans if span.parent is None]) == 8
    assert SECRET not in exported.everything() + metrics.prometheus()
    assert "messages" not in exported.everything()


def test_texts_are_recorded_if_asked_for(llm: mn.LLM) -> None:
    exported = Exported(capture_content=True)
    exported.telemetry.watch(llm)
    say_secrets(llm)
    failed = [span for span in exported.spans if span.status.status_code == StatusCode.ERROR]
    assert [SECRET in (span.status.description or "") for span in failed] == [True]
    chat = llm.chat(system="Be kind.", max_tokens=3, logit_bias=never_ends(llm))
    answer = chat.send("Hello")
    attributes = [span for span in exported.spans if span.parent is None][-1].attributes or {}
    assert json.loads(str(attributes["gen_ai.input.messages"])) == [
        {"role": "system", "parts": [{"type": "text", "content": "Be kind."}]},
        {"role": "user", "parts": [{"type": "text", "content": "Hello"}]},
    ]
    assert json.loads(str(attributes["gen_ai.output.messages"])) == [
        {"role": "assistant", "parts": [{"type": "text", "content": answer.text}], "finish_reason": "length"}
    ]


# Tools


@pytest.fixture
def with_tools(demo: mn.Model, llama_cpp_source: Path) -> Iterator[mn.LLM]:
    template = llama_cpp_source / "models" / "templates" / "Qwen-Qwen2.5-7B-Instruct.jinja"
    with mn.LLM(demo, n_ctx=4096, n_threads=1, template=template.read_text(encoding="utf-8")) as llm:
        yield llm


def call_tool(llm: mn.LLM, function: Callable[..., object], is_async: bool) -> mn.Completion:
    """Have a function called once, with "marmalade", and an answer made of its result."""
    chat = llm.chat(tools=[function], parallel_tool_calls=False, seed=1)
    options: dict[str, Any] = {"max_rounds": 1, "tool_choice": "required", "max_tokens": 200}
    if is_async:
        return asyncio.run(chat.arun("Hello", **options))
    return chat.run("Hello", **options)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_tool_that_is_called_is_a_span(with_tools: mn.LLM, exported: Exported, is_async: bool) -> None:
    exported.telemetry.watch(with_tools)
    metrics = mn.Metrics()
    metrics.watch(with_tools)

    def look_up(word: Literal["marmalade"]) -> str:
        """Look a word up."""
        with exported.tracer.start_as_current_span("work"):
            return f"{word} is sweet"

    with exported.tracer.start_as_current_span("caller"):
        call_tool(with_tools, look_up, is_async)
    tool = exported.named("execute_tool look_up")
    assert dict(tool.attributes or {}) == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "look_up",
        "gen_ai.tool.type": "function",
        "gen_ai.tool.call.id": (tool.attributes or {})["gen_ai.tool.call.id"],
        "gen_ai.tool.description": "Look a word up.",
    }
    names = [span.name for span in exported.children(exported.named("caller"))]
    assert names == [f"chat {DEMO}", "execute_tool look_up", f"chat {DEMO}"]
    assert [span.name for span in exported.children(tool)] == ["work"]
    asked, answered = [span for span in exported.spans if span.name == f"chat {DEMO}"]
    assert (asked.attributes or {})["gen_ai.response.finish_reasons"] == ("tool_call",)
    assert times(asked)[1] <= times(tool)[0] <= times(tool)[1] <= times(answered)[0]
    assert parsed(metrics)["minerva_tool_calls_total", DEMO, "look_up", "end"] == 1
    assert SECRET not in exported.everything() + metrics.prometheus()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("captures", [False, True])
def test_a_tool_that_fails_is_a_span_that_says_so(with_tools: mn.LLM, is_async: bool, captures: bool) -> None:
    exported, metrics = Exported(capture_content=captures), mn.Metrics()
    exported.telemetry.watch(with_tools)
    metrics.watch(with_tools)

    def fail(word: Literal["marmalade"]) -> str:
        raise LookupError(f"no {word} here")

    call_tool(with_tools, fail, is_async)
    tool = exported.named("execute_tool fail")
    assert tool.status.status_code == StatusCode.ERROR
    assert (tool.attributes or {})["error.type"] == "LookupError"
    assert tool.status.description == ("no marmalade here" if captures else None)
    arguments = (tool.attributes or {}).get("gen_ai.tool.call.arguments")
    assert (arguments is not None and json.loads(str(arguments)) == {"word": SECRET}) == captures
    assert parsed(metrics)["minerva_tool_calls_total", DEMO, "fail", "error"] == 1
    assert (SECRET in exported.everything()) == captures


def test_an_observer_that_fails_does_not_change_what_a_tool_returns(with_tools: mn.LLM) -> None:
    class Failing:
        def request(self, record: mn.RequestRecord) -> None:
            raise ZeroDivisionError

        def tool_call(self, tool: mn.Tool, call: mn.ToolCall) -> Any:
            class Hiding:
                def __enter__(self) -> None:
                    pass

                def __exit__(self, *_: object) -> bool:
                    return True  # which would hide an error

            return Hiding()

    with_tools.observers.append(Failing())
    seen: list[mn.RequestRecord] = []

    class Seeing:
        def request(self, record: mn.RequestRecord) -> None:
            seen.append(record)

        def tool_call(self, tool: mn.Tool, call: mn.ToolCall) -> Any:
            raise ZeroDivisionError

    with_tools.observers.append(Seeing())

    def fail(word: Literal["marmalade"]) -> str:
        raise LookupError(f"no {word} here")

    call_tool(with_tools, fail, is_async=False)
    assert seen[-1].prompt[-1]["content"] == "error: LookupError: no marmalade here"


# Making one


def test_without_the_api_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(mn.MinervaError, match="otel"):
        mn.OpenTelemetry()


def test_without_an_sdk_nothing_is_recorded_and_nothing_fails(llm: mn.LLM) -> None:
    telemetry = mn.OpenTelemetry(capture_content=True)
    telemetry.watch(llm)
    assert len(llm.complete(STORY, max_tokens=3).tokens) <= 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_of_a_fork_counts_though_another_thread_held_the_lock(demo: mn.Model) -> None:
    entered, may_go = threading.Event(), threading.Event()

    class Held(mn.LLM):
        def __hash__(self) -> int:  # is asked for with the lock held
            entered.set()
            may_go.wait(20)
            return id(self)

    metrics = mn.Metrics()
    with Held(demo, n_ctx=64, n_threads=1) as llm:
        watching = threading.Thread(target=metrics.watch, args=(llm,))
        watching.start()
        assert entered.wait(20)
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            may_go.set()
            os._exit(0 if metrics.prometheus() == "" else 1)
        may_go.set()
        watching.join()
        assert os.waitpid(child, 0)[1] == 0
