"""A completion while it is written: what was asked for, and the loop from the steps of `generate` to chunks."""

import dataclasses
import inspect
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from ._arguments import cancel_token, flag, integer, many, what
from .calling import CallDecoder, ToolUse, read_choice
from .chat import ChatTemplate
from .completion import Chunk, Completion, Timings, TokenLogprob, Usage
from .context import Context
from .engine.gate import CancelToken
from .generation import Guide, generate, guide_of
from .model import Model
from .reasoning import AfterReasoning, ReasoningDecoder, opens_reasoning
from .requests import Request, Signal, check_timeout
from .sampling import Sampler, SamplingParams
from .sampling.params import MAX_SEED
from .sequence import Sequence as TokenSequence
from .speculative import Lookahead, Speculation
from .structured import Constraint
from .tokenizer import Tokenizer
from .tools import ParsedPiece, Tool, ToolCall

_SAMPLING = frozenset(field.name for field in dataclasses.fields(SamplingParams))

_OF_ENCODING = frozenset(inspect.signature(ChatTemplate.encode).parameters)

_TAIL = 16  # tokens at the end of a prompt in which an opening tag is looked for


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What a request may ask for, together with the fields of `SamplingParams`: the keywords of `LLM.complete`.

    Attributes:
        max_tokens: how many tokens to make at most; None for as many as the context has room for.
        stop: strings that end the text, and names of control tokens that do.
        echo: begin with the prompt, and with its log-probabilities if they are asked for.
        logprobs: give each token's log-probability.
        top_logprobs: how many of the most likely tokens to name for each; above 0 it implies `logprobs`.
        response_format: the JSON that the answer shall be: a dict as in OpenAI's API, a JSON schema, a pydantic model,
            a dataclass or another type. See `Constraint.of_format`, and `Completion.parsed` for the value.
        constraint: what else the answer shall be: see `Constraint.of`. It begins after the reasoning.
        tool_choice: in a chat with tools "auto" (the default), "none", "required", or the name of the one to call.
        parallel_tool_calls: whether an answer may have more than one call of a tool.
        thinking_tags: the tags around the model's reasoning; by default those of the chat template in a chat, and none
            for a raw prompt.
        reasoning_budget: after this many tokens the reasoning is ended by force; 0 for none. None for no limit.
        reasoning_message: text that is put before the end tag if the budget is spent.
        keep_partial: what a chat does with the text of an answer that was cancelled: keep it, or undo the turn.
        continue_final_message: go on with the last message, as if the model had written it so far.
        chat_template_kwargs: other variables of the chat template, such as `{"enable_thinking": False}`.
        cancel: a `threading.Event`, or anything else with `is_set`: stops the request once it is set.
        timeout: stops the request after this many seconds, the time in the queue included.
        sampling: the parameters of the sampler; by default the model's own.

    Raises:
        TypeError, ValueError: an option is unknown, of the wrong type or out of range.
    """

    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    echo: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    response_format: Any = None
    constraint: Any = None
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    thinking_tags: tuple[str, str] | None = None
    reasoning_budget: int | None = None
    reasoning_message: str = ""
    keep_partial: bool = False
    continue_final_message: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    cancel: CancelToken | None = None
    timeout: float | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "reasoning_budget"):
            if getattr(self, name) is not None:
                self._set(name, integer(name, getattr(self, name), 0))
        self._set("top_logprobs", integer("top_logprobs", self.top_logprobs, 0))
        for name in ("echo", "logprobs", "keep_partial", "continue_final_message"):
            self._set(name, flag(name, getattr(self, name)))
        self._set("logprobs", self.logprobs or self.top_logprobs > 0)
        self._set("stop", (self.stop,) if isinstance(self.stop, str) else tuple(many("stop", self.stop)))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise TypeError("stop must be strings that are not empty")
        if self.thinking_tags is not None:
            self._set("thinking_tags", tuple(many("thinking_tags", self.thinking_tags)))
            if len(self.thinking_tags) != 2 or not all(isinstance(tag, str) and tag for tag in self.thinking_tags):
                raise TypeError('thinking_tags must be a pair of strings, such as ("<think>", "</think>")')
        if not isinstance(self.reasoning_message, str):
            raise TypeError(f"reasoning_message must be a str, not {what(self.reasoning_message)}")
        if not isinstance(self.chat_template_kwargs, Mapping):
            raise TypeError(f"chat_template_kwargs must be a dict, not {what(self.chat_template_kwargs)}")
        for name in self.chat_template_kwargs:
            if not (isinstance(name, str) and name.isidentifier()) or name in _OF_ENCODING:
                raise ValueError(f"chat_template_kwargs cannot have {name!r}: only other variables of the template")
        self._set("constraint", self._read_constraint())
        self._set("tool_choice", read_choice(self.tool_choice))
        self._set("parallel_tool_calls", flag("parallel_tool_calls", self.parallel_tool_calls))
        cancel_token(self.cancel)
        check_timeout(self.timeout)
        if not isinstance(self.sampling, SamplingParams):
            raise TypeError(f"sampling must be SamplingParams, not {what(self.sampling)}")

    def _read_constraint(self) -> Constraint | None:
        if self.response_format is None and self.constraint is None:
            return None
        if self.response_format is not None and self.constraint is not None:
            raise TypeError("give response_format or constraint, not both")
        if self.echo:
            raise ValueError("echo has no place beside a response_format or a constraint: the prompt is not part of it")
        return Constraint.of_format(self.response_format) or Constraint.of(self.constraint)

    def tools_of(self, tools: Sequence[Tool], template: ChatTemplate, tokenizer: Tokenizer) -> ToolUse | None:
        """Return how the answer may call tools; None if it may not."""
        use = ToolUse.of(tools, self.tool_choice, self.parallel_tool_calls, self.thinking_tags, template, tokenizer)
        if use is not None and self.constraint is not None:
            raise TypeError(
                "an answer cannot have a response_format or a constraint and call tools: tool_choice='none'"
            )
        return use

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, model: Model, caller: str, options: Mapping[str, Any]) -> Self:
        """Return the options of a call, whose name is in the message if there is no such option."""
        own, sampling = {}, {}
        for name, value in options.items():
            if name in _SAMPLING:
                sampling[name] = value
            elif name in cls.__dataclass_fields__:
                own[name] = value
            else:
                raise TypeError(f"{caller}() has no argument {name!r}: see RequestOptions and SamplingParams")
        if "sampling" not in own:
            own["sampling"] = SamplingParams.from_model(model, **sampling)
        elif sampling:
            raise TypeError(
                f"sampling= is given, so that {', '.join(sampling)} would be ignored: give one or the other"
            )
        return cls(**own)

    @property
    def limits(self) -> dict[str, Any]:
        """What stops the request, for the queue."""
        return {"cancel": self.cancel, "timeout": self.timeout}


class Room(Protocol):
    """Makes room in a context; `conversation.OpenChats` does."""

    def leave_room(self, context: Context, wanted: int | None) -> bool:
        """Make room for as many tokens; return whether there is."""


class Draft:
    """A completion while it is written into a sequence, whose prompt is evaluated.

    Args:
        sequence: what to continue.
        options: what was asked for.
        request: whose turn it is; its token stops the generation.
        cached_tokens: how many tokens of the prompt were not evaluated.
        is_chat: whether the prompt is messages.
        dropped_turns: see `Completion`.
        tools: which tools the answer may call, and how.
        speculation: guesses tokens.
        echoed: the prompt's text and log-probabilities, if they come first.
        seed_offset: added to the seed, if there is one, so that several answers to one prompt differ.

    Attributes:
        sequence: the sequence that it is written into.
        sampler: what draws the next token from the logits as they are; None if there is more to it.
        tokens: what was generated.
        is_last: whether the next token is the last for which there is room, because of others.
    """

    def __init__(
        self,
        sequence: TokenSequence,
        options: RequestOptions,
        request: Request,
        *,
        cached_tokens: int,
        is_chat: bool = False,
        dropped_turns: int = 0,
        tools: ToolUse | None = None,
        speculation: Speculation | None = None,
        echoed: tuple[str, list[TokenLogprob]] | None = None,
        seed_offset: int = 0,
    ):
        self.sequence, self._options, self._request = sequence, options, request
        self._tokenizer = sequence.context.model.tokenizer
        self._prompt_tokens, self._cached_tokens = len(sequence), cached_tokens
        self._is_chat, self._dropped_turns, self._echoed = is_chat, dropped_turns, echoed
        self._speculation = speculation
        self._prefilled = time.perf_counter()
        self._first_token = 0.0
        self._reasoning = self._decoder()
        self._calls = self._call_decoder(tools)
        params = options.sampling
        if params.seed is not None and seed_offset:
            params = params.replace(seed=(params.seed + seed_offset) % (MAX_SEED + 1))
        sampler = Sampler(params, tokenizer=self._tokenizer)
        self._sampler = sampler if self._reasoning is None else self._reasoning.forcing(sampler)
        constraint = options.constraint
        if tools is not None:
            constraint = constraint or tools.constraint
        self._guide = self._guided(constraint)
        is_plain = self._sampler is sampler and self._guide is None and speculation is None and not options.logprobs
        self.sampler = sampler if is_plain else None
        # Forced tokens have log-probabilities only if others are asked for, too.
        self._top_logprobs = options.top_logprobs or int(options.logprobs and self._guide is not None)
        self._n_forced = 0
        self._texts: list[str] = []
        self._reasonings: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._tool_calls: list[ToolCall] = []
        self._tool_errors: list[str] = []
        self.tokens: list[int] = []
        self.is_last = False
        self.last = Chunk(finish_reason="length")
        if request.record is not None:
            request.record.writes(self.completion)

    @property
    def ahead(self) -> Lookahead | None:
        """What guesses its tokens, once it has begun."""
        return None if self._speculation is None else self._speculation.ahead

    @property
    def needs_logits(self) -> bool:
        """Whether the next token depends on logits that are not there: a constraint may leave only one token."""
        if self.last.usage is not None:  # it is finished
            return False
        if self._speculation is not None and self.ahead is not None and self.ahead.is_ahead:
            return False
        if self._guide is None or self._top_logprobs:
            return True
        try:
            return self._guide.forced() is None
        except Exception:  # which the next step raises
            return True

    def _decoder(self) -> ReasoningDecoder | None:
        options, sequence = self._options, self.sequence
        if options.thinking_tags is None:
            return None
        tail = self._tokenizer.decode(sequence[-_TAIL:], special=True)
        return ReasoningDecoder(
            self._tokenizer,
            options.thinking_tags,
            after=sequence[-1],
            inside=opens_reasoning(tail, options.thinking_tags),
            budget=options.reasoning_budget,
            message=options.reasoning_message,
        )

    def _call_decoder(self, tools: ToolUse | None) -> CallDecoder | None:
        if tools is None:
            return None
        tail = self._tokenizer.decode(self.sequence[-_TAIL:], special=True)
        return tools.decoder(self._tokenizer, tail, self.sequence[-1], self._reasoning)

    def _guided(self, constraint: Constraint | None) -> Guide | None:
        guide, reasoning = guide_of(constraint, self.sequence), self._reasoning
        if guide is None or reasoning is None:
            return guide
        tags = self._options.thinking_tags or ("", "")
        is_over = opens_reasoning(self._tokenizer.decode(self.sequence[-_TAIL:], special=True), tags[::-1])
        return AfterReasoning(guide, reasoning, may_begin=self._is_chat and not is_over, tokenizer=self._tokenizer)

    def is_set(self) -> bool:
        """Say whether to end after the next token."""
        return self.is_last or self._request.is_set()

    def chunks(self) -> Iterator[Chunk]:
        """Write it, and yield every piece; the last one has a `finish_reason`."""
        options, reasoning, has_logprobs = self._options, self._reasoning, self._options.logprobs
        request = self._request
        request.writers = (self,)
        if request.is_dropped:
            raise request.cancelled()
        tokens, texts = self.tokens, self._texts
        if self._echoed is not None:
            text, entries = self._echoed
            self._logprobs += entries  # other answers to the same prompt have the same list
            texts.append(text)
            yield Chunk(text, echoed=entries)
        steps = generate(
            self.sequence,
            self._sampler,
            max_tokens=options.max_tokens,
            stop=options.stop,
            cancel=self,
            decoder=reasoning if self._calls is None else self._calls,
            top_logprobs=self._top_logprobs,
            constraint=self._guide,
            speculate=self._speculation,
            logprobs=has_logprobs,
        )
        for step in steps:
            chunk = Chunk(step.text, step.token)
            tokens.append(step.token)
            texts.append(step.text)
            self._n_forced += step.is_forced
            if self._calls is not None:
                self._add_calls(chunk, self._calls.take())
            elif reasoning is not None and (text := reasoning.take()):
                chunk.reasoning = text
                self._reasonings.append(text)
            if has_logprobs:
                chunk.logprob, chunk.top_logprobs = step.logprob, step.top_logprobs[: options.top_logprobs]
                chunk.token_logprob = TokenLogprob.of(self._tokenizer, step.token, step.logprob, chunk.top_logprobs)
                self._logprobs.append(chunk.token_logprob)
            if not self._first_token:
                self._first_token = time.perf_counter()
            if step.finish_reason is not None:
                is_full = self.is_last and step.finish_reason == "cancelled" and not request.is_set()
                chunk.finish_reason = "length" if is_full else step.finish_reason
                self._finish(chunk)
            yield chunk
            if request.is_dropped:
                self._finish(Chunk(finish_reason="cancelled"))
                yield self.last
                return
        if not tokens:  # none was asked for
            self._finish(self.last)
            yield self.last

    def _add_calls(self, chunk: Chunk, piece: ParsedPiece) -> None:
        if piece.reasoning:
            chunk.reasoning = piece.reasoning
            self._reasonings.append(piece.reasoning)
        chunk.tool_calls, chunk.tool_call_deltas = tuple(piece.calls), tuple(piece.deltas)
        chunk.tool_error = piece.error or ""
        self._tool_calls += piece.calls
        self._tool_errors += [error.message for error in piece.errors]

    def _finish(self, chunk: Chunk) -> None:
        chunk.context_full = chunk.finish_reason == "length" and len(self.tokens) != self._options.max_tokens
        chunk.usage, chunk.timings = self._usage, self._timings
        chunk.dropped_turns = self._dropped_turns
        self.last = chunk

    @property
    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=len(self.tokens),
            reasoning_tokens=self._reasoning.n_tokens if self._reasoning is not None else 0,
            drafted=self._speculation.drafted if self._speculation else 0,
            accepted=self._speculation.accepted if self._speculation else 0,
            forced_tokens=self._n_forced,
        )

    @property
    def _timings(self) -> Timings:
        request = self._request
        started = request.started or request.submitted
        return Timings(
            queue=started - request.submitted,
            prefill=self._prefilled - started,
            first_token=self._first_token - request.submitted if self._first_token else 0.0,
            total=time.perf_counter() - request.submitted,
        )

    @property
    def mean_logprob(self) -> float:
        """The mean of the tokens' log-probabilities, which have to be asked for; minus infinity without any."""
        entries = self._logprobs[-len(self.tokens) :] if self.tokens else []
        values = [entry.logprob for entry in entries if entry.logprob is not None]
        return sum(values) / len(values) if values else -math.inf

    def completion(self) -> Completion:
        """Return the whole, or what there is of it yet."""
        last = self.last
        is_finished = last.usage is not None
        return Completion(
            text="".join(self._texts),
            reasoning="".join(self._reasonings),
            tool_calls=tuple(self._tool_calls),
            tool_error="; ".join(self._tool_errors),
            tokens=self.tokens,
            finish_reason=last.finish_reason or "cancelled",
            context_full=last.context_full,
            logprobs=self._logprobs if self._options.logprobs else None,
            usage=last.usage or self._usage,
            timings=last.timings or self._timings,
            dropped_turns=last.dropped_turns,
            model=self.sequence.context.model.path.name,
            created=int(time.time()),
            is_chat=self._is_chat,
            constraint=self._options.constraint,
            # A stop string is not part of the text, but what the guide has seen; and a guide that failed cannot say it.
            is_complete=self._guide is None or (is_finished and last.finish_reason != "stop" and self._guide.can_end),
        )


def write_together(request: Request, drafts: Sequence[Draft], room: Room) -> Iterator[Signal]:
    """Write several drafts of one request side by side, until one more token of each would not fit."""
    writing = {draft: draft.chunks() for draft in drafts}
    while writing:
        request.writers = tuple(writing)
        yield Signal.EVALUATE
        is_last = not request.may_wait() and not room.leave_room(drafts[0].sequence.context, 2 * len(writing))
        for draft, chunks in list(writing.items()):
            draft.is_last = is_last
            if next(chunks).finish_reason is not None:
                del writing[draft]
