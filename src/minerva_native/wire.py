"""What goes to a server that speaks OpenAI's API, and what comes back. No I/O: `backends` has that.

Servers differ. What is read here is the API as OpenAI documents it, and what vLLM, Ollama, LM Studio and llama-server
make of it: reasoning under two names, calls of tools in pieces or whole and without an index, `usage` or none.
"""

import dataclasses
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from html import unescape
from typing import Any, Literal

from minerva_native import (
    BackendError,
    CallDelta,
    Chunk,
    RequestOptions,
    SamplingParams,
    Timings,
    TokenLogprob,
    Tool,
    ToolCall,
    Usage,
)

_logger = logging.getLogger("minerva_native")

SAMPLING = frozenset(field.name for field in dataclasses.fields(SamplingParams))
"""Names of options that are fields of `SamplingParams`."""

_HERE = frozenset({"cancel", "timeout"})  # options that the client heeds itself

_OF_THE_API = frozenset(
    {
        *("max_tokens", "stop", "logprobs", "top_logprobs", "response_format", "tool_choice", "parallel_tool_calls"),
        *("temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias", "seed"),
    }
)

_OF_CHATS = (
    *("response_format", "tool_choice", "parallel_tool_calls", "chat_template_kwargs"),
    "continue_final_message",
)

EXTENSIONS = (SAMPLING - _OF_THE_API - {"order"}) | {"chat_template_kwargs", "continue_final_message"}
"""Options that some servers take under the same name, and the others ignore without a word."""

_LEAST_BIAS = -100.0  # which bans a token in OpenAI's API; JSON has no infinity

_MOST_BYTES = 16 << 20  # of one event

_LONGEST_MESSAGE = 300

_FINISH: Mapping[str, Literal["end", "length"]] = {
    "stop": "end",
    "tool_calls": "end",
    "function_call": "end",
    "length": "length",
}


# What is sent


def body(
    messages: Sequence[Mapping[str, Any]] | None,
    prompt: str | Sequence[int] | None,
    tools: Sequence[Tool],
    options: Mapping[str, Any],
    checked: RequestOptions,
    accepts: Collection[str],
) -> dict[str, Any]:
    """Return the fields of a request, all but the model.

    Args:
        messages: of a chat.
        prompt: of a plain completion.
        tools: what may be called.
        options: those that were given.
        checked: the same, checked.
        accepts: names of `EXTENSIONS` that the server takes.

    Raises:
        ValueError: the API has no field for an option, or a value is none that JSON has.
    """
    fields: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    if messages is None:
        fields["prompt"] = prompt
    else:
        fields["messages"] = messages
    if tools:
        fields["tools"] = [tool.to_dict() for tool in tools]
    for name in options:
        value = getattr(checked.sampling if name in SAMPLING else checked, name)
        is_default = name not in SAMPLING and value == RequestOptions.__dataclass_fields__[name].default
        if name in _HERE or is_default or (name not in SAMPLING and value in ((), {})):
            continue
        if name not in _OF_THE_API and name not in accepts:
            raise ValueError(_refusal(name))
        if messages is None and name in _OF_CHATS:
            raise ValueError(f"{name} has no place beside a prompt in OpenAI's API: give messages")
        fields[name] = value
    _spell(fields, options, checked, tools)
    try:
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"messages, tools or options have a value that JSON has not: {error}") from None
    return fields


def _refusal(name: str) -> str:
    if name in EXTENSIONS:
        return (
            f"{name} is not in OpenAI's API, and a server that does not know it ignores it: if yours takes it, say so "
            f"with OpenAIBackend(..., accepts=[{name!r}])"
        )
    if name == "constraint":
        return "constraint cannot be sent to a server: use response_format, which takes JSON schemas and types"
    if name == "sampling":
        return "sampling cannot be sent to a server as a whole: give the fields that you want, such as temperature=0.7"
    return f"{name} cannot be sent to a server: OpenAI's API has nothing like it"


def _spell(fields: dict[str, Any], options: Mapping[str, Any], checked: RequestOptions, tools: Sequence[Tool]) -> None:
    """Write the values of some fields as the API has them."""
    if "stop" in fields:
        fields["stop"] = list(checked.stop)
    if fields.get("seed", ...) is None:
        del fields["seed"]
    if "logit_bias" in fields:
        fields["logit_bias"] = {
            str(token): _LEAST_BIAS if bias == -math.inf else bias
            for token, bias in dict(checked.sampling.logit_bias).items()
        }
    if checked.logprobs and "messages" in fields:
        fields["logprobs"] = True
    elif checked.logprobs:
        fields["logprobs"] = max(1, fields.pop("top_logprobs", 0))  # as completions of a prompt have it
    if checked.constraint is not None and "response_format" in fields:
        fields["response_format"] = _format(options["response_format"], checked.constraint.schema)
    choice = fields.get("tool_choice", "none")
    if choice == "required" and not tools:
        raise ValueError("tool_choice is 'required', but there are no tools")
    if choice not in ("none", "required"):
        if choice not in {tool.name for tool in tools}:
            raise ValueError(f"tool_choice is {choice!r}, but there is no tool of that name")
        fields["tool_choice"] = {"type": "function", "function": {"name": choice}}
    if not tools:
        for name in ("tool_choice", "parallel_tool_calls"):
            fields.pop(name, None)


def _format(given: Any, schema: dict[str, Any] | bool | None) -> Any:
    if isinstance(given, Mapping) and given.get("type") == "json_object":
        return given
    if (
        isinstance(given, Mapping)
        and given.get("type") == "json_schema"
        and isinstance(given.get("json_schema"), Mapping)
    ):
        return given
    if not isinstance(schema, dict):
        raise ValueError(f"response_format cannot be {given!r} for a server: give a schema that is an object")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


# What comes back


class Events:
    """Takes the data of server-sent events from bytes, however they are cut."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[str]:
        """Return the data of the events that are complete now; raise `BackendError` for one that never ends."""
        self._rest += data
        if b"\n" in data:
            lines = self._rest.splitlines(keepends=True)
            self._rest = lines.pop() if not lines[-1].endswith(b"\n") else bytearray()
            for line in lines:
                yield from self._line(bytes(line.rstrip(b"\r\n")))
        if len(self._rest) + self._size > _MOST_BYTES:
            raise BackendError(f"the server sent an event of more than {_MOST_BYTES:,} bytes", status=200)

    def flush(self) -> Iterator[str]:
        """Return the data of an event whose last line end is missing."""
        yield from self._line(bytes(self._rest.rstrip(b"\r")))
        yield from self._line(b"")
        self._rest = bytearray()

    def _line(self, line: bytes) -> Iterator[str]:
        if not line and self._data:
            yield b"\n".join(self._data).decode(errors="replace")
            self._data, self._size = [], 0
        elif line.startswith(b"data:"):  # any other line is a comment, or a field that the API does not use
            self._data.append(line[5:].removeprefix(b" "))
            self._size += len(line)


class Answer:
    """An answer while its events come in.

    Args:
        checked: the options of the request.
        started: when the request was made, by `time.perf_counter`.

    Attributes:
        has_begun: whether there was a piece of it.
        is_finished: whether the server has said why it ends.
    """

    def __init__(self, checked: RequestOptions, started: float):
        self._checked, self._started = checked, started
        self._first_token = 0.0
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._reason: Any = None
        self._stop_reason: Any = None
        self._usage: Usage | None = None
        self.has_begun = self.is_finished = False

    def add(self, data: str) -> list[Chunk]:
        """Return what an event adds, a chunk for each token if the server gives their log-probabilities.

        Raises:
            BackendError: the server reports an error, or the event is none of this API.
        """
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, Mapping):
            raise BackendError(f"the server sent what is no event of OpenAI's API: {shortened(data)}", status=200)
        if event.get("error") or event.get("object") == "error":
            raise failure(200, event)
        if isinstance(event.get("usage"), Mapping):
            self._usage = _usage(event["usage"])
        choices = event.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        return self._choice(choice) if isinstance(choice, Mapping) else []

    def _choice(self, choice: Mapping[str, Any]) -> list[Chunk]:
        if choice.get("finish_reason") is not None:
            self._reason, self._stop_reason = choice["finish_reason"], choice.get("stop_reason")
            self.is_finished = True
        delta = choice.get("delta")
        delta = delta if isinstance(delta, Mapping) else {}
        chunk = Chunk(_text(choice.get("text")) or _content(delta.get("content")))
        # Some servers give both, for those who know only one of them.
        chunk.reasoning = _text(delta.get("reasoning_content")) or _text(delta.get("reasoning"))
        calls = delta.get("tool_calls")
        if isinstance(calls, list):
            pieces = [self._call(piece) for piece in calls if isinstance(piece, Mapping)]
            chunk.tool_call_deltas = tuple(pieces)
        entries = _logprobs(choice.get("logprobs"), self._checked.top_logprobs) if self._checked.logprobs else []
        if not (chunk.text or chunk.reasoning or chunk.tool_call_deltas or entries):
            return []
        if not self.has_begun:
            self.has_begun, self._first_token = True, time.perf_counter()
        chunks = [Chunk() for _ in entries[:-1]] + [chunk]
        for piece, entry in zip(chunks, entries, strict=False):
            piece.token, piece.logprob, piece.token_logprob = _id(entry), entry.logprob, entry
            piece.top_logprobs = [
                (other.token, other.logprob) for other in entry.top if other.token >= 0 and other.logprob is not None
            ]
        return chunks

    def _call(self, piece: Mapping[str, Any]) -> CallDelta:
        """Return what a piece adds to a call, or a call that it begins."""
        function = piece.get("function")
        function = function if isinstance(function, Mapping) else {}
        index, call_id, name = piece.get("index"), _text(piece.get("id")), _text(function.get("name"))
        given = function.get("arguments")
        arguments = json.dumps(given) if isinstance(given, Mapping) else _text(given)
        call = self._calls[-1] if self._calls else None
        if isinstance(index, int):
            call = self._by_index.get(index)
        # Some servers give no index, or 0 to each call: a new id, or a name without an id, begins another.
        if call is not None and (call_id not in ("", call.id) or (name and not call_id and not isinstance(index, int))):
            call = None
        is_new = call is None
        if call is None:
            # Nine letters and digits are the one form of an id that every chat template takes.
            call = _Call(len(self._calls), call_id or uuid.uuid4().hex[:9])
            self._calls.append(call)
            if isinstance(index, int):
                self._by_index[index] = call
        is_named = bool(name) and not call.name
        call.name = call.name or name
        call.arguments.append(arguments)
        return CallDelta(call.index, call.id if is_new else None, name if is_named else None, arguments)

    def end(self) -> Chunk:
        """Return the last chunk: how it ended, and the calls."""
        last = self._last("end")
        if self._reason is not None:
            last.finish_reason = _FINISH.get(_text(self._reason), "cancelled")
            if self._stop_reason is not None and self._reason == "stop":
                last.finish_reason = "stop"
            if last.finish_reason == "cancelled":
                _logger.warning("the server ended an answer for the reason %r", shortened(str(self._reason)))
        most, usage = self._checked.max_tokens, self._usage
        if last.finish_reason == "length":
            last.context_full = most is None or (usage is not None and 0 < usage.completion_tokens < most)
        return last

    def cancelled(self) -> Chunk:
        """Return the last chunk of an answer that was stopped."""
        return self._last("cancelled")

    def _last(self, reason: Literal["end", "cancelled"]) -> Chunk:
        calls = [call.read() for call in self._calls]
        now = time.perf_counter()
        return Chunk(
            tool_calls=tuple(call for call in calls if isinstance(call, ToolCall)),
            tool_error="; ".join(call for call in calls if isinstance(call, str)),
            finish_reason=reason,
            usage=self._usage,
            timings=Timings(
                first_token=self._first_token - self._started if self.has_begun else 0.0, total=now - self._started
            ),
        )


class _Call:
    """A call of a tool whose arguments come in pieces."""

    def __init__(self, index: int, call_id: str):
        self.index, self.id, self.name = index, call_id, ""
        self.arguments: list[str] = []

    def read(self) -> ToolCall | str:
        """Return the call, or what is wrong with it."""
        text = "".join(self.arguments).strip() or "{}"
        try:
            arguments = json.loads(text)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            return f"the arguments of a call of {self.name!r} are no JSON object: {shortened(text)}"
        if not self.name:
            return "a call names no tool"
        return ToolCall(self.id, self.name, arguments, text, self.index)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _content(value: object) -> str:
    """Return the text of a message's content, which may be a list of parts."""
    if isinstance(value, list):
        return "".join(_text(part.get("text")) for part in value if isinstance(part, Mapping))
    return _text(value)


def _count(of: object, name: str) -> int:
    value = of.get(name) if isinstance(of, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _usage(given: Mapping[str, Any]) -> Usage:
    return Usage(
        prompt_tokens=_count(given, "prompt_tokens"),
        cached_tokens=_count(given.get("prompt_tokens_details"), "cached_tokens"),
        completion_tokens=_count(given, "completion_tokens"),
        reasoning_tokens=_count(given.get("completion_tokens_details"), "reasoning_tokens"),
    )


def _logprobs(given: object, n_top: int) -> list[TokenLogprob]:
    """Return the log-probabilities of a choice, in the form of chats or the older one of completions."""
    if not isinstance(given, Mapping):
        return []
    if isinstance(given.get("content"), list):
        return [_entry(one, n_top) for one in given["content"] if isinstance(one, Mapping)]
    tokens, values, tops = (given.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
    if not isinstance(tokens, list) or not isinstance(values, list):
        return []
    tops = tops if isinstance(tops, list) else [None] * len(tokens)
    entries = []
    for token, value, top in zip(tokens, values, tops, strict=False):
        others = top.items() if isinstance(top, Mapping) else ()
        best = sorted((_plain(*other) for other in others), key=lambda one: -(one.logprob or 0.0))[:n_top]
        entries.append(_plain(token, value)._replace(top=tuple(best)))
    return entries


def _entry(one: Mapping[str, Any], n_top: int = 0) -> TokenLogprob:
    entry = _plain(one.get("token"), one.get("logprob"))
    token, piece, top = one.get("id"), one.get("bytes"), one.get("top_logprobs")
    if isinstance(token, int):
        entry = entry._replace(token=token)
    if isinstance(piece, list) and all(isinstance(byte, int) and 0 <= byte < 256 for byte in piece):
        entry = entry._replace(piece=bytes(piece))
    others = top[:n_top] if isinstance(top, list) else []
    return entry._replace(top=tuple(_entry(other) for other in others if isinstance(other, Mapping)))


def _plain(token: object, value: object) -> TokenLogprob:
    logprob = float(value) if isinstance(value, int | float) else None
    return TokenLogprob(-1, _text(token).encode(errors="replace"), logprob)


def _id(entry: TokenLogprob) -> int | None:
    return entry.token if entry.token >= 0 else None


# Errors


def failure(status: int, error: object) -> BackendError:
    """Return the error that a server reports with an HTTP status, or in the middle of a stream with that of its start.

    Args:
        status: of the response.
        error: the body: JSON, or text, which may be a web page.
    """
    found = error.get("error") or error if isinstance(error, Mapping) else error
    code = found.get("code") if isinstance(found, Mapping) else None
    if status < 400 and isinstance(code, int) and 400 <= code < 600:
        status = code
    return BackendError(f"the server answered with status {status}: {_message(found)}", status=status)


def _message(found: object) -> str:
    if isinstance(found, Mapping):
        for name in ("message", "detail", "error"):
            if found.get(name):
                return _message(found[name])
        return shortened(json.dumps(found))
    text = _text(found) if isinstance(found, str) else "" if found is None else str(found)
    if re.match(r"\s*<(!doctype|html|\?xml)", text, re.IGNORECASE):
        text = re.sub(r"(?is)<(script|style)\b.*?</\1>|<[^>]*>", " ", text[:10_000])
        text = f"a web page: {unescape(text)}"
    return shortened(text) or "no message"


def shortened(text: str) -> str:
    """Return a text of a server on one line, without its end if it is long."""
    line = " ".join(text[: 4 * _LONGEST_MESSAGE].split())
    return line if len(line) <= _LONGEST_MESSAGE else line[:_LONGEST_MESSAGE] + "..."


def may_retry(status: int | None) -> bool:
    """Return whether a request that failed so may succeed the next time."""
    return status is None or status in (408, 425, 429) or (status >= 500 and status != 501)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds a server wants a client to wait, or None."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
