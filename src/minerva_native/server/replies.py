"""Answers as OpenAI's API has them: whole, and piece by piece."""

import dataclasses
import functools
import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

import minerva_native as mn

_encode = msgspec.json.encode

Usages = Sequence[mn.Usage]


def new_id(kind: str, mark: str = "-") -> str:
    """Return an id that nobody has, such as "chatcmpl-..."."""
    return f"{kind}{mark}{uuid.uuid4().hex}"


@functools.cache
def fingerprint() -> str:
    """Return what names this build: with another one, the same seed may give another text."""
    return f"build-{mn.__version__}-{mn.build_info()['llama_cpp']}"


def event(data: Any, name: str | None = None) -> bytes:
    """Return a server-sent event."""
    return (b"" if name is None else b"event: " + name.encode() + b"\n") + b"data: " + _encode(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def timings_of(usage: mn.Usage, timings: mn.Timings) -> dict[str, float]:
    """Return where the time went, as llama-server says it: the first token is the prompt's, the others are steps."""
    prompt_n = usage.prompt_tokens - usage.cached_tokens
    n_steps = max(0, usage.completion_tokens - 1)
    predicted = max(0.0, timings.total - timings.first_token) if n_steps else 0.0
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": prompt_n,
        "prompt_ms": timings.prefill * 1e3,
        "prompt_per_token_ms": _ratio(timings.prefill * 1e3, prompt_n),
        "prompt_per_second": _ratio(prompt_n, timings.prefill),
        "predicted_n": usage.completion_tokens,
        "predicted_ms": predicted * 1e3,
        "predicted_per_token_ms": _ratio(predicted * 1e3, n_steps),
        "predicted_per_second": _ratio(n_steps, predicted),
        "queue_ms": timings.queue * 1e3,
        "first_token_ms": timings.first_token * 1e3,
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def usage_of(usages: Usages) -> dict[str, Any]:
    """Return the usage of answers to one prompt, or of several requests if their prompts were added up."""
    prompt = max((usage.prompt_tokens for usage in usages), default=0)
    cached = min((usage.cached_tokens for usage in usages), default=0)
    generated = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": sum(usage.reasoning_tokens for usage in usages)},
    }


def added(usages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the usage of several prompts."""
    total = usage_of(())
    for usage in usages:
        for name, value in usage.items():
            total[name] = (
                {key: total[name][key] + item for key, item in value.items()}
                if isinstance(value, dict)
                else total[name] + value
            )
    return total


def whole(completions: Sequence[mn.Completion], model: str) -> dict[str, Any]:
    """Return the reply to a request: the answers to each of its prompts."""
    replies = [completion.to_dict() for completion in completions]
    choices = [choice for reply in replies for choice in reply["choices"]]
    first = completions[0]
    return {
        **replies[0],
        "model": model,
        "system_fingerprint": fingerprint(),
        "choices": [{**choice, "index": index} for index, choice in enumerate(choices)],
        "usage": added([reply["usage"] for reply in replies]),
        "timings": timings_of(first.usage, first.timings),
    }


class Pieces:
    """Chunks of one answer as events.

    Args:
        identity: the id of the reply.
        model: the name to give.
        index: of the answer.
        tokenizer: of the model.
        is_chat: whether it answers messages.
    """

    def __init__(self, identity: str, model: str, index: int, tokenizer: mn.Tokenizer, is_chat: bool):
        self._tokenizer, self._is_chat, self._index = tokenizer, is_chat, index
        self._head = {
            "id": identity,
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint(),
        }
        opened = _encode({**self._head, "choices": [{"index": index}]})[:-3]
        self._before = b"data: " + opened + (b',"delta":{"content":' if is_chat else b',"text":')
        self._after = (b"}" if is_chat else b"") + b',"logprobs":null,"finish_reason":null}]}\n\n'
        self._called = False
        self._offset = 0  # of the text, in characters

    def begin(self) -> bytes:
        """Return what comes first."""
        if not self._is_chat:
            return b""
        return self._event({"delta": {"role": "assistant", "content": None}})

    def of(self, chunk: mn.Chunk) -> bytes:
        """Return the events of a chunk; none if it adds nothing."""
        self._called = self._called or bool(chunk.tool_calls)
        logprobs = self._logprobs(chunk)
        if not (chunk.finish_reason is not None or logprobs or chunk.reasoning or chunk.tool_call_deltas):
            return self._before + _encode(chunk.text) + self._after if chunk.text else b""
        events = self._content(chunk, logprobs)
        if chunk.finish_reason is not None:
            ended = "tool_calls" if self._called else "stop"
            reason = ended if chunk.finish_reason == "end" else chunk.finish_reason
            content: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
            events += self._event(content, reason)
        return events

    def _content(self, chunk: mn.Chunk, logprobs: dict[str, Any] | None) -> bytes:
        if not self._is_chat:
            return self._event({"text": chunk.text}, logprobs=logprobs) if chunk.text or logprobs else b""
        delta: dict[str, Any] = {}
        if chunk.text or (logprobs and not chunk.reasoning and not chunk.tool_call_deltas):
            delta["content"] = chunk.text
        if chunk.reasoning:
            delta["reasoning_content"] = chunk.reasoning
        if chunk.tool_call_deltas:
            delta["tool_calls"] = [piece.to_dict() for piece in chunk.tool_call_deltas]
        return self._event({"delta": delta}, logprobs=logprobs) if delta else b""

    def _event(self, content: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": self._index, **content, "logprobs": logprobs, "finish_reason": reason}
        return event({**self._head, "choices": [choice]})

    def _logprobs(self, chunk: mn.Chunk) -> dict[str, Any] | None:
        if chunk.echoed:
            self._offset = len(chunk.text)
            prompt = mn.Completion(text=chunk.text, logprobs=list(chunk.echoed))
            logprobs: dict[str, Any] = prompt.to_dict()["choices"][0]["logprobs"]
            return logprobs
        one = chunk.token_logprob
        if one is None:
            return None
        if self._is_chat:
            return {"content": [one.to_dict()]}
        offset, self._offset = self._offset, self._offset + _n_characters(self._tokenizer.piece(one.token))
        return {
            "tokens": [one.text],
            "token_logprobs": [one.logprob],
            "top_logprobs": [{other.text: other.logprob for other in one.top} or None],
            "text_offset": [offset],
        }

    def end(self, usage: dict[str, Any], timings: dict[str, float]) -> bytes:
        """Return the event with the usage, which has no choices."""
        return event({**self._head, "choices": [], "usage": usage, "timings": timings})


def _n_characters(piece: bytes) -> int:
    """Return how many characters begin in a piece of UTF-8."""
    return sum(byte & 0xC0 != 0x80 for byte in piece)


def params_of(params: mn.SamplingParams) -> dict[str, Any]:
    """Return the parameters of the sampler as JSON."""
    fields = dataclasses.asdict(params)
    fields["samplers"] = fields.pop("order")
    fields["logit_bias"] = []  # a model recommends none
    fields["seed"] = -1 if params.seed is None else params.seed
    return fields
