"""What a request gives back: `Completion`, and `Chunk` for a piece of one."""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from .errors import ConstraintError
from .generation import FinishReason
from .structured import Constraint
from .tokenizer import Tokenizer
from .tools import CallDelta, ToolCall


class TokenLogprob(NamedTuple):
    """A token and its log-probability (natural logarithm) by the model's own distribution.

    Attributes:
        token: its id; -1 if a server did not name it.
        piece: the bytes that it stands for, perhaps a part of a character; control tokens by their names.
        logprob: None for the first token of an echoed prompt, which has nothing before it.
        top: the most likely tokens in its place, the best first, if they were asked for.
    """

    token: int
    piece: bytes
    logprob: float | None
    top: "tuple[TokenLogprob, ...]" = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer, token: int, logprob: float | None, top: Sequence[tuple[int, float]] = ()) -> Self:
        """Return the entry of a token; `top` are the most likely ones in its place."""
        piece = tokenizer.piece(token, special=True)
        return cls(token, piece, logprob, tuple(cls.of(tokenizer, other, value) for other, value in top))

    @property
    def text(self) -> str:
        """The piece as text, with a replacement character for what is not a whole one."""
        return self.piece.decode(errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """Return it as OpenAI's API has it in the answers of chats."""
        return {**self._named(), "top_logprobs": [other._named() for other in self.top]}

    def _named(self) -> dict[str, Any]:
        return {"token": self.text, "logprob": self.logprob, "bytes": list(self.piece)}


@dataclass(frozen=True)
class Usage:
    """What a completion took, in tokens.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: how many of those were not evaluated, because the KV cache had them.
        completion_tokens: tokens that were generated, the end token included.
        reasoning_tokens: how many of those were reasoning, without its tags and without what a budget has forced.
        drafted: tokens that speculation proposed.
        accepted: how many of those were right.
        forced_tokens: how many of the generated tokens a constraint left no choice for, so that none was sampled.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    forced_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Where the time of a request went, in seconds.

    Attributes:
        queue: waiting for the requests before it.
        prefill: evaluating the prompt.
        first_token: from the call to the first token.
        total: from the call to the last token.
    """

    queue: float = 0.0
    prefill: float = 0.0
    first_token: float = 0.0
    total: float = 0.0


@dataclass(slots=True)
class Chunk:
    """A piece of a completion: what one token adds to it.

    Attributes:
        text: text of the answer; empty while a character, a tag or a possible stop string is incomplete.
        token: the token's id; None for an echoed prompt, and if a server does not name it.
        logprob: the token's log-probability, if asked for.
        top_logprobs: the most likely tokens in its place as (id, log-probability), if asked for.
        token_logprob: the same with the tokens' texts, as in `Completion.logprobs`, if asked for.
        reasoning: text of the reasoning.
        tool_calls: calls of tools that are complete now.
        tool_call_deltas: pieces of calls, complete or not, for who shows them as they come.
        tool_error: what was wrong with a call; its text is in `text`, unless it was cut off.
        finish_reason: why the completion ends here, on the last chunk only. "end": the model ended it, or what was
            constrained is complete. "stop": a stop
            string or token was reached. "length": `max_tokens`, or the context is full. "cancelled": it was stopped.
        context_full: whether "length" means a full context.
        echoed: the log-probabilities of an echoed prompt's tokens, if they were asked for; its text is in `text`.
        usage: on the last chunk.
        timings: on the last chunk.
        dropped_turns: on the last chunk of a chat's answer: see `Completion`.
    """

    text: str = ""
    token: int | None = None
    logprob: float | None = None
    top_logprobs: Sequence[tuple[int, float]] = ()
    token_logprob: TokenLogprob | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_deltas: tuple[CallDelta, ...] = ()
    tool_error: str = ""
    finish_reason: FinishReason | None = None
    context_full: bool = False
    echoed: Sequence[TokenLogprob] = ()
    usage: Usage | None = None
    timings: Timings | None = None
    dropped_turns: int = 0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the model wrote.

    Attributes:
        text: the text, or the answer after the reasoning.
        reasoning: the text between the thinking tags.
        tool_calls: calls of tools: `ToolCall.name` with `ToolCall.arguments`.
        tool_error: what was wrong with calls that are none; their text is in `text`, unless they were cut off.
        tokens: the ids of the generated tokens.
        finish_reason: "end", "stop", "length" or "cancelled": see `Chunk`.
        context_full: whether "length" means a full context.
        logprobs: one entry a token, if asked for.
        usage: what it took, in tokens.
        timings: where the time went.
        dropped_turns: how many old turns of a chat had to go, for this answer to have room.
        alternatives: the other answers, if more than one was asked for.
        model: the name of the model's file.
        created: when, in seconds since 1970.
        is_chat: whether it answers messages, not a raw prompt.
        constraint: what the text had to be, if anything.
        is_complete: whether it is that, and not cut off.
    """

    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_error: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    context_full: bool = False
    logprobs: list[TokenLogprob] | None = None
    usage: Usage = Usage()
    timings: Timings = Timings()
    dropped_turns: int = 0
    alternatives: "tuple[Completion, ...]" = ()
    model: str = ""
    created: int = 0
    is_chat: bool = False
    constraint: Constraint | None = None
    is_complete: bool = True

    @property
    def parsed(self) -> Any:
        """The value that the text stands for, if there was a `response_format` or a `constraint`; else None.

        A JSON value, or an instance of the class that was given. Raises `ConstraintError`, which holds the text, if
        that is incomplete: see `finish_reason`.
        """
        if self.constraint is None:
            return None
        if not self.is_complete:
            cut = f"the text was cut off before it was complete (finish_reason {self.finish_reason!r})"
            raise ConstraintError(cut, text=self.text)
        return self.constraint.parse(self.text)

    @property
    def choices(self) -> "tuple[Completion, ...]":
        """This answer and its alternatives."""
        return (self, *self.alternatives)

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message of a conversation."""
        reasoning = {"reasoning_content": self.reasoning} if self.reasoning else {}
        calls = {"tool_calls": [call.to_dict() for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": "assistant", "content": self.text, **reasoning, **calls}

    def to_dict(self) -> dict[str, Any]:
        """Return it in the shape of OpenAI's API: a chat completion, or a completion of a raw prompt.

        "end" is "stop" there, and "tool_calls" if there are some.
        """
        kind = "chat.completion" if self.is_chat else "text_completion"
        generated = sum(choice.usage.completion_tokens for choice in self.choices)
        reasoning = sum(choice.usage.reasoning_tokens for choice in self.choices)
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": [choice._choice(index) for index, choice in enumerate(self.choices)],
            "usage": {
                "prompt_tokens": self.usage.prompt_tokens,
                "completion_tokens": generated,
                "total_tokens": self.usage.prompt_tokens + generated,
                "prompt_tokens_details": {"cached_tokens": self.usage.cached_tokens},
                "completion_tokens_details": {"reasoning_tokens": reasoning},
            },
        }

    def _choice(self, index: int) -> dict[str, Any]:
        content: dict[str, Any] = {"message": self.message} if self.is_chat else {"text": self.text}
        logprobs: dict[str, Any] | None = None
        if self.logprobs is not None and self.is_chat:
            logprobs = {"content": [one.to_dict() for one in self.logprobs]}
        elif self.logprobs is not None:
            logprobs = {
                "tokens": [one.text for one in self.logprobs],
                "token_logprobs": [one.logprob for one in self.logprobs],
                "top_logprobs": [{other.text: other.logprob for other in one.top} or None for one in self.logprobs],
                "text_offset": _offsets(self.text, [one.piece for one in self.logprobs]),
            }
        ended = "tool_calls" if self.tool_calls else "stop"
        reason = ended if self.finish_reason == "end" else self.finish_reason
        return {"index": index, **content, "finish_reason": reason, "logprobs": logprobs}

    def _repr_markdown_(self) -> str:
        """Return what a notebook shows: the reasoning as a quotation, then the text."""
        quoted = "\n".join(f"> {line}" for line in self.reasoning.strip().splitlines())
        return f"{quoted}\n\n{self.text}" if quoted else self.text


def _offsets(text: str, pieces: Iterable[bytes]) -> list[int]:
    """Return where in a text each of its tokens begins, in characters.

    A token that is not in the text, such as BOS, has the place of the next one.
    """
    data, at, offset, offsets = text.encode(), 0, 0, []
    for piece in pieces:
        offsets.append(offset)
        if not at and not data.startswith(piece):
            piece = piece.removeprefix(b" ")  # which some vocabularies put before a text
        if data.startswith(piece, at):
            at, offset = at + len(piece), offset + sum(byte & 0xC0 != 0x80 for byte in piece)  # begin a character
    return offsets
