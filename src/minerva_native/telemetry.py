"""Numbers and traces of what `LLM`s do: `Metrics` in Prometheus' text format, `OpenTelemetry` for any exporter.

Both observe (`LLM.observers`): they do something as a request comes and as it ends, and nothing for a token.
"""

import json
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import minerva_native as mn

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.metrics import CallbackOptions, Histogram, MeterProvider, Observation
    from opentelemetry.trace import Span, TracerProvider


class _Watch(ABC):
    """Observes LLMs, each under a name.

    The lock can be taken twice: a signal handler or a finaliser that ends a request may strike while it is held.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._watched: weakref.WeakKeyDictionary[mn.LLM, _Observer] = weakref.WeakKeyDictionary()
        _watches.add(self)

    def watch(self, llm: mn.LLM, name: str | None = None) -> None:
        """See the requests of an LLM that come from now on, until it is closed or `unwatch`.

        Args:
            llm: the LLM. One that is watched already gets the new name.
            name: what it is called; by default the name of the model's file. Several may have the same.
        """
        if not isinstance(llm, mn.LLM):
            raise TypeError(f"llm must be an LLM, not {type(llm).__name__}")
        if not isinstance(name, str | None):
            raise TypeError(f"name must be a str, not {type(name).__name__}")
        name = llm.model.path.name if name is None else name
        observer = _Observer(self, name.encode(errors="replace").decode())  # a file's name may be no text
        with self._lock:
            self.unwatch(llm)
            self._watched[llm] = observer
            llm.observers.append(observer)

    def unwatch(self, llm: mn.LLM) -> None:
        """See no further request of an LLM; those that have come are seen to their end. What was counted stays."""
        if not isinstance(llm, mn.LLM):
            raise TypeError(f"llm must be an LLM, not {type(llm).__name__}")
        with self._lock:
            observer = self._watched.pop(llm, None)
            if observer is not None and observer in llm.observers:
                llm.observers.remove(observer)

    def _loads(self) -> dict[str, tuple[int, ...]]:
        """Return the fields of `LLM.load` by name, as sums over the LLMs of that name."""
        with self._lock:
            watched = [(llm, observer.name) for llm, observer in self._watched.items()]
        loads: dict[str, tuple[int, ...]] = {}
        for llm, name in watched:
            if not llm.closed:
                load = llm.load
                loads[name] = tuple(map(sum, zip(load, loads.get(name, (0,) * len(load)), strict=True)))
        return loads

    @abstractmethod
    def _begin(self, name: str, record: mn.RequestRecord) -> Callable[[], object]:
        """See a request come; what is returned is called at its end."""

    @abstractmethod
    def _tool_call(self, name: str, tool: mn.Tool, call: mn.ToolCall) -> AbstractContextManager[object]:
        """See a tool called."""


_watches: "weakref.WeakSet[_Watch]" = weakref.WeakSet()


def _after_fork() -> None:
    """Renew the locks: a child of a fork has none of the threads that may hold them."""
    for watch in _watches:
        watch._lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


class _Observer:
    """What one LLM shows, with its name."""

    def __init__(self, watch: _Watch, name: str):
        self._watch, self.name = watch, name

    def request(self, record: mn.RequestRecord) -> Callable[[], object]:
        return self._watch._begin(self.name, record)

    def tool_call(self, tool: mn.Tool, call: mn.ToolCall) -> AbstractContextManager[object]:
        return self._watch._tool_call(self.name, tool, call)


def _seconds_per_token(record: mn.RequestRecord) -> Iterator[float]:
    """Yield the mean time of each answer's tokens after the first."""
    for answer in record.answers:
        n_later, timings = answer.usage.completion_tokens - 1, answer.timings
        if n_later > 0:
            yield (timings.total - timings.first_token) / n_later


# Prometheus


class _Family(NamedTuple):
    """Numbers of one name, with different labels."""

    kind: str
    help: str
    labels: tuple[str, ...] = ("model", "operation")
    buckets: tuple[float, ...] = ()


_WAITS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_LATER_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_DURATIONS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_TOKENS = tuple(4**power for power in range(14))
# Those above are what the GenAI conventions ask for. A small model writes a token in less than the least of them.
_FAST_TOKENS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, *_LATER_TOKENS)
_LONG_WAITS = (*_WAITS, 20.0, 40.0, 80.0, 160.0)

_COUNTED = {  # fields of `Usage`
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that the KV cache had, so that they were not evaluated.",
    "completion_tokens": "Tokens that were generated.",
    "reasoning_tokens": "Generated tokens that were reasoning.",
    "drafted": "Tokens that speculation proposed.",
    "accepted": "Tokens that speculation proposed and that were right.",
}
_GAUGES = ("requests_waiting", "requests_served", "sequences", "sequences_limit", "kv_cells_used", "kv_cells_limit")

_FAMILIES = {
    "requests_total": _Family("counter", "Requests that have ended.", ("model", "operation", "outcome")),
    **{f"{name.removesuffix('_tokens')}_tokens_total": _Family("counter", text) for name, text in _COUNTED.items()},
    "tool_calls_total": _Family("counter", "Functions that were run for the model.", ("model", "tool", "outcome")),
    "time_to_first_token_seconds": _Family("histogram", "From the call to the first token.", buckets=_LONG_WAITS),
    "time_per_output_token_seconds": _Family(
        "histogram", "Mean time of an answer's tokens after the first.", buckets=_FAST_TOKENS
    ),
    "request_duration_seconds": _Family("histogram", "From the call to the end of a request.", buckets=_DURATIONS),
    "queue_seconds": _Family("histogram", "From the call to the beginning of the work.", buckets=_LONG_WAITS),
    "requests_waiting": _Family("gauge", "Requests that wait for their turn.", ("model",)),
    "requests_served": _Family("gauge", "Requests that are served.", ("model",)),
    "sequences": _Family("gauge", "Sequences in use.", ("model",)),
    "sequences_limit": _Family("gauge", "How many sequences there may be.", ("model",)),
    "kv_cells_used": _Family("gauge", "KV cells that sequences in use take.", ("model",)),
    "kv_cells_limit": _Family("gauge", "KV cells of the context.", ("model",)),
}


@dataclass
class _Distribution:
    """How many values fell into each bucket, and their sum."""

    counts: list[int]
    total: float = 0.0


class Metrics(_Watch):
    """Counts what LLMs do, in plain Python; `prometheus` says it. Safe to use from any thread.

        metrics = Metrics()
        metrics.watch(llm)
        text = metrics.prometheus()        # for GET /metrics

    Time is counted in seconds, in histograms. A request is counted when it has ended, whatever its end: the label
    `outcome` is "end", "stop", "length", "cancelled" or "error", and `operation` is that of `RequestRecord`.
    """

    CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
    """What `prometheus` returns, for the header of an HTTP response."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[str, dict[tuple[str, ...], int]] = {}
        self._distributions: dict[str, dict[tuple[str, ...], _Distribution]] = {}
        for name, family in _FAMILIES.items():
            if family.kind == "counter":
                self._numbers[name] = {}
            elif family.kind == "histogram":
                self._distributions[name] = {}

    def _begin(self, name: str, record: mn.RequestRecord) -> Callable[[], object]:
        """See a request come; what is returned counts it at its end."""
        return partial(self._count_request, name, record)

    @contextmanager
    def _tool_call(self, name: str, tool: mn.Tool, call: mn.ToolCall) -> Iterator[None]:
        """Count a tool that is called."""
        outcome = "error"
        try:
            yield
            outcome = "end"
        finally:
            with self._lock:
                self._count("tool_calls_total", (name, tool.name, outcome))

    def _count_request(self, name: str, record: mn.RequestRecord) -> None:
        assert record.ended is not None
        where = (name, record.operation)
        started = record.ended if record.started is None else record.started
        with self._lock:
            self._count("requests_total", (*where, record.outcome))
            for field in _COUNTED:
                self._count(f"{field.removesuffix('_tokens')}_tokens_total", where, getattr(record.usage, field))
            self._observe("request_duration_seconds", where, record.ended - record.submitted)
            self._observe("queue_seconds", where, started - record.submitted)
            if record.error is None and record.first_token is not None:
                self._observe("time_to_first_token_seconds", where, record.first_token - record.submitted)
                for seconds in _seconds_per_token(record):
                    self._observe("time_per_output_token_seconds", where, seconds)

    def _count(self, family: str, labels: tuple[str, ...], n: int = 1) -> None:
        numbers = self._numbers[family]
        numbers[labels] = numbers.get(labels, 0) + n

    def _observe(self, family: str, labels: tuple[str, ...], value: float) -> None:
        buckets = _FAMILIES[family].buckets
        distribution = self._distributions[family].get(labels)
        if distribution is None:
            distribution = self._distributions[family][labels] = _Distribution([0] * (len(buckets) + 1))
        distribution.counts[bisect_left(buckets, value)] += 1
        distribution.total += value

    def prometheus(self) -> str:
        """Return everything in Prometheus' text format 0.0.4. It waits for no computation."""
        loads = self._loads()
        lines: list[str] = []
        with self._lock:
            for family, (kind, text, names, buckets) in _FAMILIES.items():
                samples: list[str] = []
                if kind == "counter":
                    for labels, number in self._numbers[family].items():
                        samples.append(_sample(family, names, labels, number))
                elif kind == "histogram":
                    for labels, distribution in self._distributions[family].items():
                        samples += _samples(family, names, labels, buckets, distribution)
                else:
                    at = _GAUGES.index(family)
                    samples = [_sample(family, names, (model,), load[at]) for model, load in loads.items()]
                if samples:
                    lines += [f"# HELP minerva_{family} {text}", f"# TYPE minerva_{family} {kind}", *samples]
        return "".join(f"{line}\n" for line in lines)


def _samples(
    family: str,
    names: tuple[str, ...],
    labels: tuple[str, ...],
    buckets: tuple[float, ...],
    distribution: _Distribution,
) -> Iterator[str]:
    sums = list(accumulate(distribution.counts))
    for limit, n in zip((*map(str, buckets), "+Inf"), sums, strict=True):
        yield _sample(f"{family}_bucket", (*names, "le"), (*labels, limit), n)
    yield _sample(f"{family}_sum", names, labels, distribution.total)
    yield _sample(f"{family}_count", names, labels, sums[-1])


def _sample(name: str, names: Iterable[str], labels: Iterable[str], value: float) -> str:
    pairs = ",".join(f'{label}="{_escaped(text)}"' for label, text in zip(names, labels, strict=True))
    return f"minerva_{name}{{{pairs}}} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# OpenTelemetry

_PROVIDER = "minerva_native"


class OpenTelemetry(_Watch):
    """Traces and metrics through the OpenTelemetry API (the extra `otel`); the application chooses SDK and exporter.

        telemetry = OpenTelemetry()
        telemetry.watch(llm)

    A request is a span, a child of the caller's current one, with children "queue", "prefill" and "decode"; a function
    that `Chat.run` or `Chat.arun` calls is the span "execute_tool". The names of spans, attributes and metrics are
    those of the GenAI semantic conventions, and `minerva.*` for what they have none. What people and models write,
    the messages of errors included, is not recorded unless `capture_content` is True.

    Args:
        capture_content: record prompts, answers, arguments of tools and messages of errors.
        tracer_provider: makes the tracer; by default the global one.
        meter_provider: makes the meter; by default the global one.

    Raises:
        MinervaError: `opentelemetry-api` is not installed.
    """

    def __init__(
        self,
        *,
        capture_content: bool = False,
        tracer_provider: "TracerProvider | None" = None,
        meter_provider: "MeterProvider | None" = None,
    ):
        if not isinstance(capture_content, bool):
            raise TypeError(f"capture_content must be True or False, not {type(capture_content).__name__}")
        for name, provider, makes in (
            ("tracer_provider", tracer_provider, "get_tracer"),
            ("meter_provider", meter_provider, "get_meter"),
        ):
            if provider is not None and not callable(getattr(provider, makes, None)):
                raise TypeError(f"{name} must have {makes}(), which {type(provider).__name__} has not")
        try:
            from opentelemetry import metrics, trace
        except ImportError:
            raise mn.MinervaError(
                "OpenTelemetry needs its API: pip install 'minerva-native[otel]', and an SDK of your choice"
            ) from None
        super().__init__()
        self._trace, self._observation = trace, metrics.Observation
        self._captures = capture_content
        self._tracer = trace.get_tracer(_PROVIDER, mn.__version__, tracer_provider)
        meter = metrics.get_meter(_PROVIDER, mn.__version__, meter_provider)

        def histogram(name: str, unit: str, text: str, buckets: Sequence[float]) -> "Histogram":
            return meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=buckets)

        self._duration = histogram("gen_ai.server.request.duration", "s", "Duration of requests.", _DURATIONS)
        self._first_token = histogram("gen_ai.server.time_to_first_token", "s", "Time to the first token.", _WAITS)
        self._per_token = histogram(
            "gen_ai.server.time_per_output_token", "s", "Time per output token after the first.", _LATER_TOKENS
        )
        self._usage = histogram("gen_ai.client.token.usage", "{token}", "Input and output tokens.", _TOKENS)
        self._queue = histogram("minerva.queue.duration", "s", "Time that requests wait for their turn.", _WAITS)
        self._cached = meter.create_counter("minerva.cached_tokens", "{token}", "Prompt tokens found in the KV cache.")
        for at, (name, unit, text) in enumerate(
            (
                ("minerva.requests.waiting", "{request}", "Requests that wait for their turn."),
                ("minerva.requests.served", "{request}", "Requests that are served."),
                ("minerva.sequences.used", "{sequence}", "Sequences in use."),
                ("minerva.sequences.limit", "{sequence}", "How many sequences there may be."),
                ("minerva.kv_cells.used", "{cell}", "KV cells that sequences in use take."),
                ("minerva.kv_cells.limit", "{cell}", "KV cells of the context."),
            )
        ):
            meter.create_observable_up_down_counter(name, [partial(self._read, at)], unit, text)

    def _read(self, at: int, options: "CallbackOptions") -> "list[Observation]":
        return [
            self._observation(load[at], {"gen_ai.provider.name": _PROVIDER, "gen_ai.request.model": name})
            for name, load in self._loads().items()
        ]

    def _begin(self, name: str, record: mn.RequestRecord) -> Callable[[], object]:
        """Begin the span of a request; what is returned ends it."""
        # All times come from one clock that never jumps; this is where it stood.
        start = time.time_ns() - round(1e9 * (time.perf_counter() - record.submitted))
        span = self._tracer.start_span(
            f"{record.operation} {name}",
            kind=self._trace.SpanKind.INTERNAL,
            attributes={**_where(name, record), **_asked(record)},
            start_time=start,
        )
        return partial(self._end, name, record, span, start)

    def _end(self, name: str, record: mn.RequestRecord, span: "Span", start: int) -> None:
        assert record.ended is not None

        def at(seconds: float) -> int:
            return start + round(1e9 * (seconds - record.submitted))

        context = self._trace.set_span_in_context(span)
        try:
            self._measure(name, record, context)
            if span.is_recording():
                for phase, begun, ended in _phases(record):
                    self._tracer.start_span(phase, context, start_time=at(begun)).end(at(ended))
                span.set_attributes(_used(record))
                if record.error is not None:
                    self._fail(span, record.error)
                if self._captures:
                    span.set_attributes(_content(record))
        finally:
            span.end(at(record.ended))

    def _measure(self, name: str, record: mn.RequestRecord, context: "Context") -> None:
        assert record.ended is not None
        where, usage, error = _where(name, record), record.usage, record.error
        failed = {} if error is None else {"error.type": type(error).__qualname__}
        self._duration.record(record.ended - record.submitted, {**where, **failed}, context)
        started = record.ended if record.started is None else record.started
        self._queue.record(started - record.submitted, where, context)
        if record.prefilled is not None:
            self._usage.record(usage.prompt_tokens, {**where, "gen_ai.token.type": "input"}, context)
            self._cached.add(usage.cached_tokens, where, context)
        if record.answers:
            self._usage.record(usage.completion_tokens, {**where, "gen_ai.token.type": "output"}, context)
        if error is None and record.first_token is not None:
            self._first_token.record(record.first_token - record.submitted, where, context)
            for seconds in _seconds_per_token(record):
                self._per_token.record(seconds, where, context)

    @contextmanager
    def _tool_call(self, name: str, tool: mn.Tool, call: mn.ToolCall) -> Iterator[None]:
        """Make a span of a tool that is called, the current one meanwhile."""
        attributes = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": tool.name,
            "gen_ai.tool.type": "function",
            "gen_ai.tool.call.id": call.id,
        }
        if tool.description:
            attributes["gen_ai.tool.description"] = tool.description
        if self._captures:
            attributes["gen_ai.tool.call.arguments"] = call.text
        with self._tracer.start_as_current_span(
            f"execute_tool {tool.name}",
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except BaseException as error:
                self._fail(span, error)
                raise

    def _fail(self, span: "Span", error: BaseException) -> None:
        span.set_attribute("error.type", type(error).__qualname__)
        said = str(error) if self._captures else None
        span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, said))


def _where(name: str, record: mn.RequestRecord) -> dict[str, str]:
    return {
        "gen_ai.operation.name": record.operation,
        "gen_ai.provider.name": _PROVIDER,
        "gen_ai.request.model": name,
    }


def _asked(record: mn.RequestRecord) -> dict[str, Any]:
    """Return the parameters of a request as attributes."""
    options = record.options
    if options is None:
        return {}
    sampling = options.sampling
    asked = {
        "stream": record.is_stream or None,
        "choice.count": record.n if record.n != 1 else None,
        "max_tokens": options.max_tokens,
        "stop_sequences": list(options.stop) or None,
        "seed": sampling.seed if sampling.seed is not None and sampling.seed < 1 << 63 else None,
        "temperature": sampling.temperature,
        "top_k": float(sampling.top_k),
        "top_p": sampling.top_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
    }
    return {f"gen_ai.request.{name}": value for name, value in asked.items() if value is not None}


def _used(record: mn.RequestRecord) -> dict[str, Any]:
    """Return what came of a request as attributes."""
    if record.prefilled is None:
        return {}
    usage = record.usage
    used: dict[str, Any] = {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
    }
    if record.answers:
        used["gen_ai.response.model"] = record.model
        used["gen_ai.usage.output_tokens"] = usage.completion_tokens
        if record.error is None:
            used["gen_ai.response.finish_reasons"] = [_finish_reason(answer) for answer in record.answers]
    if usage.reasoning_tokens:
        used["gen_ai.usage.reasoning.output_tokens"] = usage.reasoning_tokens
    if usage.drafted:
        used |= {"minerva.usage.drafted_tokens": usage.drafted, "minerva.usage.accepted_tokens": usage.accepted}
    if record.is_stream and record.first_token is not None:
        used["gen_ai.response.time_to_first_chunk"] = record.first_token - record.submitted
    return used


def _phases(record: mn.RequestRecord) -> Iterator[tuple[str, float, float]]:
    """Yield the phases that a request went through, each with its beginning and its end."""
    assert record.ended is not None
    if record.started is None:
        yield "queue", record.submitted, record.ended
        return
    yield "queue", record.submitted, record.started
    if record.prefilled is None:
        yield "prefill", record.started, record.ended
        return
    yield "prefill", record.started, record.prefilled
    if record.answers:
        yield "decode", record.prefilled, record.ended


def _finish_reason(answer: mn.Completion) -> str:
    """Return why an answer ended, in the words of the conventions; "cancelled" is ours."""
    return ("tool_call" if answer.tool_calls else "stop") if answer.finish_reason == "end" else answer.finish_reason


def _content(record: mn.RequestRecord) -> dict[str, str]:
    """Return what was said as attributes: JSON of the conventions' messages."""
    prompt = record.prompt
    if isinstance(prompt, str):
        asked = [{"role": "user", "parts": [_text(prompt)]}]
    elif isinstance(prompt, Mapping):
        asked = [_message(prompt)]
    elif isinstance(prompt, Sequence) and all(isinstance(one, Mapping) for one in prompt):
        asked = [_message(one) for one in prompt]
    else:
        asked = [{"role": "user", "parts": [{"type": "token_ids", "content": [int(token) for token in prompt]}]}]
    content = {"gen_ai.input.messages": json.dumps(asked, ensure_ascii=False, default=str)}
    if record.answers:
        said = [{**_message(one.message), "finish_reason": _finish_reason(one)} for one in record.answers]
        content["gen_ai.output.messages"] = json.dumps(said, ensure_ascii=False, default=str)
    return content


def _text(content: object, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "content": content}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message of OpenAI's form in that of the conventions."""
    role, content = message.get("role"), message.get("content")
    if role == "tool":
        response = {"type": "tool_call_response", "id": message.get("tool_call_id"), "response": content}
        return {"role": role, "parts": [response]}
    parts = [_text(message["reasoning_content"], "reasoning")] if message.get("reasoning_content") else []
    if isinstance(content, str):
        parts += [_text(content)] if content else []
    elif content is not None:
        parts += [_text(one.get("text")) if "text" in one else dict(one) for one in content]
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with suppress(ValueError):
                arguments = json.loads(arguments)
        parts.append({"type": "tool_call", "id": call.get("id"), "name": function.get("name"), "arguments": arguments})
    return {"role": role, "parts": parts}
