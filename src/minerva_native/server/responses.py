"""OpenAI's responses API in terms of chat completions: items to messages, answers to items and events."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import minerva_native as mn

from .bodies import ChatBody, ResponseBody
from .errors import HTTPError, wrong
from .replies import event, new_id

_OWN_NAMES = {"messages": "input", "response_format": "text", "max_tokens": "max_output_tokens"}


def chat_body(body: ResponseBody) -> ChatBody:
    """Return the chat completion that a request stands for.

    Raises:
        HTTPError: it needs what was stored, or what is not text.
    """
    for name in ("previous_response_id", "conversation"):
        if getattr(body, name) is not None:
            raise wrong(name, "nothing is stored here: send the whole conversation as the input")
    if body.background:
        raise wrong("background", "it is not supported")
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    messages += [{"role": "user", "content": body.input}] if isinstance(body.input, str) else _messages(body.input)
    has_logprobs = "message.output_text.logprobs" in (body.include or ()) or bool(body.top_logprobs)
    effort = (body.reasoning or {}).get("effort")
    return ChatBody(
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        logprobs=has_logprobs,
        top_logprobs=body.top_logprobs,
        tools=None if not body.tools else [_tool(tool, number) for number, tool in enumerate(body.tools)],
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format((body.text or {}).get("format")),
        add_generation_prompt=True,
        reasoning_effort=effort if isinstance(effort, str) else None,
    )


@contextmanager
def own_names() -> Iterator[None]:
    """Name fields as this API does in errors that are about the chat completion."""
    try:
        yield
    except HTTPError as error:
        if (own := _OWN_NAMES.get(error.param or "")) is not None:
            message = own + error.message.removeprefix(error.param or "")
            raise HTTPError(error.status, message, own, error.code, error.headers) from error
        raise


def _messages(items: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages that items stand for: reasoning and calls belong to an assistant's message."""
    messages: list[dict[str, Any]] = []
    reasoning: dict[str, str] = {}  # for the next message

    def said(role: object, content: object) -> dict[str, Any]:
        nonlocal reasoning
        messages.append({"role": role, "content": content, **(reasoning if role == "assistant" else {})})
        reasoning = {}
        return messages[-1]

    for number, item in enumerate(items):
        kind = item.get("type", "message")
        call_id = item.get("call_id")
        if kind == "message":
            said(item.get("role"), item.get("content"))
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            if not all(isinstance(value, str) for value in (call_id, *function.values())):
                raise wrong("input", f"item {number} must have a call_id, a name and arguments")
            is_next = messages and messages[-1]["role"] == "assistant" and not reasoning
            message = messages[-1] if is_next else said("assistant", "")
            message.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        elif kind == "function_call_output":
            said("tool", item.get("output"))["tool_call_id"] = call_id
        elif kind == "reasoning":
            content = item.get("content")
            parts = content if isinstance(content, list) else []
            texts = [part.get("text") for part in parts if isinstance(part, dict)]
            reasoning = {"reasoning_content": "".join(text for text in texts if isinstance(text, str))}
        else:
            raise wrong("input", f"item {number} is of the type {str(kind)[:40]!r}, which is not supported")
    if not messages:
        raise wrong("input", "it has no message")
    return messages


def _tool(tool: Mapping[str, Any], number: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise wrong("tools", f"tools[{number}] is of the type {str(tool.get('type'))[:40]!r}: there are only functions")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _format(given: Any) -> dict[str, Any] | None:
    """Return a `response_format`: its schema lies a level deeper than here."""
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        return given if given is None or isinstance(given, dict) else {}
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}


def _status(reason: str | None) -> str:
    return "incomplete" if reason in ("length", "cancelled") else "completed"


class Items:
    """The items of an answer."""

    def __init__(self) -> None:
        self.message_id = new_id("msg", "_")
        self.reasoning_id = new_id("rs", "_")

    def reasoning(self, text: str, status: str) -> dict[str, Any]:
        """Return the item of the reasoning."""
        content = [{"type": "reasoning_text", "text": text}] if text else []
        return {"id": self.reasoning_id, "type": "reasoning", "summary": [], "content": content, "status": status}

    def message(self, text: str | None, status: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the item of the text; None for one that has not begun."""
        content = [] if text is None else [_part(text, logprobs)]
        return {"id": self.message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    @staticmethod
    def call(identity: str, name: str, arguments: str, status: str) -> dict[str, Any]:
        """Return the item of a call."""
        made = {"call_id": identity, "name": name, "arguments": arguments, "status": status}
        return {"id": f"fc_{identity}", "type": "function_call", **made}


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _of_text(text: str, entries: Sequence[mn.TokenLogprob], reasoning: str = "") -> list[dict[str, Any]]:
    """Return the log-probabilities of the tokens that a text is made of, among those of an answer.

    The others are tokens of the reasoning, which comes before it, of calls, and those that the text leaves out, such as
    tags, the end, and a stop string. If the text is not found, as it is in several pieces, all behind the reasoning are
    taken for it.
    """
    data, wanted = b"".join(one.piece for one in entries), text.encode()
    begin = max(0, data.find(reasoning.encode())) + len(reasoning.encode())
    ends = list(accumulate(len(one.piece) for one in entries))
    starts = [0, *ends][:-1]
    is_there = (at for at in starts if at >= begin and data.startswith(wanted, at))  # a tag may have a letter of it
    start = next(is_there, data.find(wanted, begin))
    if start < 0:
        start, wanted = begin, data[begin:]
    places = zip(entries, starts, ends, strict=True)
    return [one.to_dict() for one, at, end in places if end > start and at < start + len(wanted)]


def _usage(usage: mn.Usage | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _response(
    body: ResponseBody,
    identity: str,
    created: float,
    model: str,
    output: list[dict[str, Any]],
    status: str,
    usage: mn.Usage | None,
    sampling: Mapping[str, Any],
) -> dict[str, Any]:
    is_cut = status == "incomplete"
    return {
        "id": identity,
        "object": "response",
        "created_at": int(created),
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": model,
        "output": output,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": body.reasoning or {"effort": None, "summary": None},
        "store": False,
        "temperature": sampling.get("temperature"),
        "top_p": sampling.get("top_p"),
        "top_logprobs": body.top_logprobs or 0,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "truncation": "disabled",
        "usage": _usage(usage),
        "metadata": body.metadata or {},
    }


def response_of(
    body: ResponseBody, model: str, completion: mn.Completion, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the reply to a request; `sampling` is what it asked of the sampler."""
    items, status = Items(), _status(completion.finish_reason)
    output = []
    if completion.reasoning:
        output.append(items.reasoning(completion.reasoning, "completed"))
    if completion.text or not completion.tool_calls:
        entries = _of_text(completion.text, completion.logprobs or (), completion.reasoning)
        output.append(items.message(completion.text, status, entries))
    output += [items.call(call.id, call.name, call.text, "completed") for call in completion.tool_calls]
    usage = completion.usage
    return _response(body, new_id("resp", "_"), completion.created, model, output, status, usage, sampling)


class ResponseEvents:
    """Chunks of an answer as the events of the responses API."""

    def __init__(self, body: ResponseBody, model: str, sampling: Mapping[str, Any]):
        self._body, self._model, self._sampling = body, model, sampling
        self._identity, self._created = new_id("resp", "_"), time.time()
        self._items = Items()
        self._number = 0  # of the event
        self._output: list[dict[str, Any]] = []  # the items that are complete
        self._open: str | None = None  # which kind of item is being written
        self._text, self._call_index = "", -1
        self._call: dict[str, str] = {}
        self._logprobs: list[dict[str, Any]] = []
        self._waiting: list[mn.TokenLogprob] = []  # of tokens whose text has not come yet

    def of(self, chunk: mn.Chunk) -> bytes:
        """Return the events of a chunk."""
        events = []
        if not self._number:
            response = self._response("in_progress", None)
            events += [self._event("response.created", response=response)]
            events += [self._event("response.in_progress", response=response)]
        if chunk.token_logprob is not None:
            self._waiting.append(chunk.token_logprob)
        if chunk.reasoning:
            self._waiting = []
            events += self._turn_to("reasoning")
            self._text += chunk.reasoning
            events.append(self._delta("response.reasoning_text.delta", content_index=0, delta=chunk.reasoning))
        if chunk.text:
            is_more = self._open == "message"
            entries = [one.to_dict() for one in self._waiting] if is_more else _of_text(chunk.text, self._waiting)
            events += self._turn_to("message")
            self._text += chunk.text
            self._logprobs += entries
            self._waiting = []
            text = {"content_index": 0, "delta": chunk.text, "logprobs": entries}
            events.append(self._delta("response.output_text.delta", **text))
        for piece in chunk.tool_call_deltas:
            self._waiting = []
            if piece.index != self._call_index:
                events += self._close("completed")
                self._call_index = piece.index
                self._call = {"id": piece.id or "", "name": piece.name or ""}
                events += self._turn_to("function_call")
            if piece.arguments:
                self._text += piece.arguments
                events.append(self._delta("response.function_call_arguments.delta", delta=piece.arguments))
        if chunk.finish_reason is not None:
            events += self._end(chunk)
        return b"".join(events)

    def _end(self, chunk: mn.Chunk) -> list[bytes]:
        status = _status(chunk.finish_reason)
        kinds = {self._open, *(item["type"] for item in self._output)}
        events = [] if kinds & {"message", "function_call"} else self._turn_to("message")
        events += self._close(status)
        kind = "response.completed" if status == "completed" else "response.incomplete"
        return [*events, self._event(kind, response=self._response(status, chunk.usage))]

    def _turn_to(self, kind: str) -> list[bytes]:
        """Begin an item, unless it has begun."""
        if self._open == kind and kind != "function_call":
            return []
        events = self._close("completed")
        self._open, self._text, self._logprobs = kind, "", []
        events.append(self._event("response.output_item.added", output_index=len(self._output), item=self._item(None)))
        if kind == "message":
            events.append(self._delta("response.content_part.added", content_index=0, part=_part("", [])))
        return events

    def _close(self, status: str) -> list[bytes]:
        """End the item that is being written."""
        if self._open is None:
            return []
        item, text = self._item(status), self._text
        events = []
        if self._open == "message":
            done = {"content_index": 0, "text": text, "logprobs": self._logprobs}
            events.append(self._delta("response.output_text.done", **done))
            events.append(self._delta("response.content_part.done", content_index=0, part=_part(text, self._logprobs)))
        elif self._open == "reasoning":
            events.append(self._delta("response.reasoning_text.done", content_index=0, text=text))
        else:
            name = self._call["name"]
            events.append(self._delta("response.function_call_arguments.done", name=name, arguments=text))
        events.append(self._event("response.output_item.done", output_index=len(self._output), item=item))
        self._output.append(item)
        self._open, self._call_index = None, -1
        self._items = Items()
        return events

    def _item(self, status: str | None) -> dict[str, Any]:
        """Return the item that is being written; it has no content before it has a status."""
        shown, text = status or "in_progress", None if status is None else self._text
        if self._open == "message":
            return self._items.message(text, shown, self._logprobs)
        if self._open == "reasoning":
            return self._items.reasoning(text or "", shown)
        return self._items.call(self._call["id"], self._call["name"], text or "", shown)

    def _response(self, status: str, usage: mn.Usage | None) -> dict[str, Any]:
        output = list(self._output)
        return _response(self._body, self._identity, self._created, self._model, output, status, usage, self._sampling)

    def _delta(self, kind: str, **fields: Any) -> bytes:
        """Return an event about the item that is being written."""
        return self._event(kind, item_id=self._item(None)["id"], output_index=len(self._output), **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)
