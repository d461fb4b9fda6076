"""The decode loop: sample a token, give it out, evaluate it, and so on."""

import math
import operator
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ._arguments import cancel_token, flag, integer, many, what
from .devices import available_cpus
from .engine.gate import CancelToken
from .errors import ClosedError, EmptySequenceError, TokenizerError
from .sampling import Sampler, SamplingParams, apply_mask, logprob
from .sampling import top_logprobs as most_likely
from .sampling.masks import Mask
from .sequence import Sequence as TokenSequence
from .sequence import Tokens, draw_next
from .tokenizer import Tokenizer

Chooser = Callable[[npt.NDArray[np.float32], Tokens], int]
"""A `Sampler`, or any function that takes the logits and the tokens so far and returns a token id.

The logits are the step's own: `Step.logprob` sees what is written into them.
"""


class Decoder(Protocol):
    """Turns tokens into text, as `StreamDecoder` does."""

    def feed(self, token: int) -> str:
        """Return the text that the token completes; it may be empty."""

    def flush(self) -> str:
        """Return what is left at the end."""


class Guide(Protocol):
    """Says which tokens may come next; `structured.Matcher` is one."""

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens that it has gone behind."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""

    @property
    def can_end(self) -> bool:
        """Whether the text may end here."""

    def forced(self) -> int | None:
        """Return the only way to go on, if there is one."""

    def prepare(self) -> None:
        """Begin to compute the mask; the model computes meanwhile."""

    def mask(self) -> Mask | None:
        """Return the mask of the tokens that may come next (see `apply_mask`), or None for any."""

    def consume(self, token: int) -> None:
        """Go behind a token."""

    def follow(self, tokens: list[int]) -> None:
        """Go to the place behind these tokens, all since the beginning."""


class Constraint(Protocol):
    """Says what the text may be; `structured.Constraint` is one."""

    def matcher(self, tokenizer: Tokenizer, *, in_thread: bool = False) -> Guide:
        """Return a guide at the beginning of a text."""


class Source(Protocol):
    """A sequence, or something like one that has logits sooner."""

    @property
    def tokens(self) -> Any:
        """The tokens so far, as `Tokens` or a view like them."""

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """The logits after the last token."""

    @property
    def is_full(self) -> bool:
        """Whether one more token would not fit."""

    def append(self, token: int) -> None:
        """Add a token."""


class Ahead(Source, Protocol):
    """A sequence whose logits may be there for tokens that were guessed."""

    def look(self) -> bool:
        """Guess, and evaluate, unless that was done; return whether the logits are those of a guess."""


class Speculation(Protocol):
    """Guesses tokens and evaluates them ahead; `speculative.Speculation` is one."""

    def over(self, sequence: TokenSequence, max_tokens: int | None = None) -> "Ahead":
        """Return the sequence with what is evaluated ahead; it grows by at most `max_tokens` tokens."""

    def end(self) -> None:
        """Take back what was guessed and not drawn."""


FinishReason = Literal["stop", "length", "end", "cancelled"]


class Step:
    """One generated token.

    `text` is what can be shown because of it: empty while a character or a possible stop string is incomplete.
    `seconds` is the time from asking for this step to having it: evaluating the token before it, and sampling.
    `top_logprobs` are the most likely tokens in its place, the best first, as (id, log-probability), if asked for.
    `is_forced`: the constraint left no choice.
    """

    __slots__ = ("__weakref__", "_logprob", "finish_reason", "is_forced", "seconds", "text", "token", "top_logprobs")

    text: str
    seconds: float
    _logprob: float | npt.NDArray[np.float32]

    def __init__(self, token: int, logits: npt.NDArray[np.float32] | None, is_forced: bool = False):
        self.token, self.is_forced = token, is_forced
        self.top_logprobs: Sequence[tuple[int, float]] = ()
        self.finish_reason: FinishReason | None = None
        self._logprob = math.nan if logits is None else logits  # until it is asked for

    @property
    def logprob(self) -> float:
        """The token's log-probability (natural logarithm) by the model's own distribution; computed when asked for.

        NaN for a forced token, whose logits nobody needed, unless `top_logprobs` were asked for.
        """
        if not isinstance(self._logprob, float):
            known = next((value for token, value in self.top_logprobs if token == self.token), None)
            self._logprob = logprob(self._logprob, self.token) if known is None else known
        return self._logprob

    def __repr__(self) -> str:
        return f"Step(token={self.token}, text={self.text!r}, finish_reason={self.finish_reason!r})"


def generate(
    sequence: TokenSequence,
    sampler: Chooser | SamplingParams | None = None,
    *,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    cancel: CancelToken | None = None,
    decoder: Decoder | None = None,
    top_logprobs: int = 0,
    constraint: Constraint | Guide | None = None,
    speculate: Speculation | None = None,
    logprobs: bool = True,
) -> Iterator[Step]:
    """Continue a sequence, one token a step, until there is a reason to finish, which the last step names.

    "end": the model chose an end-of-generation token, or the text that a constraint describes is complete. "stop": the
    text reached one of the `stop` strings, which is not part of the text, or the model chose a control token that is
    named there. "length": `max_tokens` tokens were made,
    or the context is full. "cancelled": `cancel` was set.
    Every step's token is in `sequence.tokens`. The last one is not evaluated unless more is asked of the sequence.

    The sequence may be changed between steps (rewound, extended): the next step continues what it is then. Text that
    was held back, for a stop string or an incomplete character, still comes out.

    Args:
        sequence: what to continue; at least one token.
        sampler: a `Sampler`, `SamplingParams` to make one from, or a function of the logits and the tokens so far.
        max_tokens: how many tokens to make at most.
        stop: strings that end the text, and names of control tokens that do, such as "<|im_end|>".
        cancel: ends the generation after the current token when it is set. While the prompt is still being evaluated,
            there is no token yet: then it raises `Cancelled`.
        decoder: turns tokens into text; by default `Tokenizer.stream` after the last token.
        top_logprobs: how many of the most likely tokens each step names, with their log-probabilities.
        constraint: what the text may be. Tokens that it forces are not sampled, and are evaluated together. A guide, as
            `Constraint.matcher` returns it, stays in step with the sequence, and tells afterwards where it is; give a
            `fork` of both to go on in two ways.
        speculate: guesses what comes, to evaluate several tokens in one pass; the text is the same. The sequence may
            not be changed between steps then.
        logprobs: whether steps are asked for their `logprob`. If not, it may be NaN, and a `Sampler` without processors
            reads the logits where libllama has them, unless there is a constraint.

    Raises:
        EmptySequenceError: the sequence has no tokens.
        ContextFullError: not even one token fits.
        TypeError, ValueError: an argument is of the wrong type or out of range.
        Cancelled: the prompt's evaluation was cancelled, or `Context.cancel` was called.
        ClosedError, ConstraintError, SamplingError: see there.
    """
    if not isinstance(sequence, TokenSequence):
        raise TypeError(f"generate continues a Sequence, not a {type(sequence).__name__}: see Context.sequence")
    if isinstance(sampler, SamplingParams):
        sampler = Sampler(sampler)
    if sampler is not None and not callable(sampler):
        raise TypeError(f"sampler must be a Sampler, SamplingParams or a function, not {type(sampler).__name__}")
    cancel_token(cancel)
    if decoder is not None and not all(callable(getattr(decoder, name, None)) for name in ("feed", "flush")):
        raise TypeError(f"decoder must have feed() and flush(), as StreamDecoder has, not {type(decoder).__name__}")
    stop = (stop,) if isinstance(stop, str) else tuple(many("stop", stop))
    for text in stop:
        if not isinstance(text, str):
            raise TypeError(f"stop must be strings, not {what(text)}")
        if not text:
            raise ValueError("stop must be strings that are not empty")
    max_tokens = None if max_tokens is None else integer("max_tokens", max_tokens, 0)
    top_logprobs = integer("top_logprobs", top_logprobs, 0)
    if sequence.closed:
        raise ClosedError("this Sequence is closed")
    if not len(sequence):
        raise EmptySequenceError("the sequence is empty: extend it with a prompt first (at least a BOS token)")
    if speculate is not None and not (hasattr(speculate, "over") and hasattr(speculate, "end")):
        raise TypeError(f"speculate must be a Speculation, not {what(speculate)}")
    sampler, guide = Sampler() if sampler is None else sampler, guide_of(constraint, sequence)
    wants_logits = flag("logprobs", logprobs) or top_logprobs or guide is not None
    in_place = not wants_logits and isinstance(sampler, Sampler) and sampler.only_reads
    steps = _decode_loop(sequence, sampler, max_tokens, stop, cancel, decoder, top_logprobs, guide, speculate, in_place)
    return steps if speculate is None else _to_the_end(steps, speculate)


def _to_the_end(steps: Iterator[Step], speculate: Speculation) -> Iterator[Step]:
    """Yield steps, and take guesses back even if nobody asks for the last one."""
    try:
        yield from steps
    finally:
        speculate.end()


def _decode_loop(
    sequence: TokenSequence,
    sampler: Chooser,
    max_tokens: int | None,
    stop: tuple[str, ...],
    cancel: CancelToken | None,
    decoder: Decoder | None,
    top_logprobs: int,
    guide: Guide | None,
    speculate: Speculation | None,
    in_place: bool,
) -> Iterator[Step]:
    tokenizer = sequence.context.model.tokenizer
    ahead = None if speculate is None else speculate.over(sequence, max_tokens)
    source = sequence if ahead is None else ahead
    tokens = source.tokens
    if decoder is None and tokenizer.type != "none":  # without a vocabulary there are tokens, and no text
        decoder = tokenizer.stream(after=next(iter(tokens[-1:]), None))  # it may have been emptied since the call
    matcher = _StopMatcher(stop) if stop else None
    stop_tokens = _control_tokens(tokenizer, stop) if stop else ()
    previous = None
    count = 0
    if cancel is not None and max_tokens != 0 and sequence.n_waiting > 1:
        sequence.context.evaluate([sequence], cancel=cancel)
    while count != max_tokens:
        before = time.perf_counter()
        forced = guide.forced() if guide else None
        if forced is not None:
            chosen, logits = forced, source.logits if top_logprobs else None
        elif in_place and (ahead is None or not ahead.look()):
            chosen, logits = draw_next(sequence, sampler, tokens), None  # type: ignore[arg-type]
        elif guide is None:
            logits = source.logits
            chosen = sampler(logits, tokens)
        else:
            guide.prepare()
            logits = source.logits
            chosen = _masked(sampler, logits, tokens, guide.mask())
        try:
            token = operator.index(chosen)
        except TypeError:
            raise TypeError(f"sampler must return a token id, not {what(chosen)}") from None
        step = Step(token, logits, forced is not None)
        # Whatever may fail comes before the token is appended, so that a failure leaves the sequence unchanged.
        if tokenizer.is_end(token):
            step.text, step.finish_reason = "", "end"
        elif token in stop_tokens:
            rest = decoder.flush() if decoder else ""
            step.text, step.finish_reason = matcher.release() + rest if matcher else rest, "stop"
        else:
            step.text = decoder.feed(token) if decoder else ""
            if not isinstance(step.text, str):
                raise TypeError(f"decoder must return text from feed(), not {what(step.text)}")
            if matcher and matcher.feed(step):
                step.finish_reason = "stop"
            if guide:
                guide.consume(token)
                if guide.is_complete and step.finish_reason is None:
                    step.finish_reason = "end"
        if top_logprobs and logits is not None:
            ids, logprobs = most_likely(logits, top_logprobs)
            step.top_logprobs = list(zip(ids.tolist(), logprobs.tolist(), strict=True))
        is_cancelled = step.finish_reason is None and cancel is not None and cancel.is_set()
        source.append(token)
        count += 1
        if is_cancelled:
            step.finish_reason = "cancelled"
        elif step.finish_reason is None and (count == max_tokens or source.is_full):
            step.finish_reason = "length"
        if step.finish_reason is not None and step.finish_reason != "stop":
            rest = decoder.flush() if decoder else ""
            step.text += matcher.release() + rest if matcher else rest
        if speculate is not None and step.finish_reason is not None:
            speculate.end()
        step.seconds = time.perf_counter() - before
        start = len(tokens) - len(guide.tokens) if guide else 0  # a shift may have moved it
        yield step
        if step.finish_reason is not None:
            return
        if guide:  # the caller may have changed the sequence
            guide.follow([*guide.tokens[:-start], *tokens] if start < 0 else tokens[start:])
        # If the caller keeps steps, compute their log-probabilities now: at most two rows of logits live on.
        if previous is not None and (kept := previous()) is not None:
            _ = kept.logprob
        previous = weakref.ref(step)
        del step


def guide_of(constraint: Constraint | Guide | None, sequence: TokenSequence) -> Guide | None:
    """Return the guide that `constraint=` is or makes; masks are computed in a thread if a core is free for it."""
    guide: object = constraint
    if constraint is not None and hasattr(constraint, "matcher"):
        context = sequence.context
        guide = constraint.matcher(context.model.tokenizer, in_thread=available_cpus() > context.n_threads)
    if guide is not None and not all(hasattr(guide, name) for name in ("forced", "mask", "consume", "follow")):
        raise TypeError(f"constraint must be a Constraint, or what its matcher() returns, not {what(constraint)}")
    return guide  # type: ignore[return-value]


def _masked(sampler: Chooser, logits: npt.NDArray[np.float32], tokens: Tokens, mask: Mask | None) -> int:
    """Return the token that a sampler chooses among those that a mask allows."""
    if mask is None:
        return sampler(logits, tokens)
    if isinstance(sampler, Sampler):
        return sampler(logits, tokens, mask=mask)
    return sampler(apply_mask(logits, mask), tokens)


def _control_tokens(tokenizer: Tokenizer, names: tuple[str, ...]) -> list[int]:
    """Return the control tokens that have one of these names."""
    found = []
    for name in names if tokenizer.type != "none" else ():
        try:
            ids = tokenizer.encode(name, add_special=False, parse_special=True)
        except TokenizerError:  # nor can the text contain it
            continue
        if len(ids) == 1 and tokenizer.is_control(ids[0]):
            found += ids
    return found


class _StopMatcher:
    """Holds back the text that may turn out to begin a stop string."""

    def __init__(self, stop: tuple[str, ...]):
        self._stop = stop
        self._held = ""

    def feed(self, step: Step) -> bool:
        """Make `step.text` what is safe to show; say whether a stop string is complete."""
        text = self._held + step.text
        found = [index for index in map(text.find, self._stop) if index >= 0]
        if found:
            step.text, self._held = text[: min(found)], ""
            return True
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        step.text, self._held = text[: len(text) - held], text[len(text) - held :]
        return False

    def release(self) -> str:
        """Return what was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
