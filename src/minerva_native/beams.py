"""Beam search: the most likely texts rather than drawn ones."""

import time
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from .completion import Completion, Timings, TokenLogprob, Usage
from .conversation import OpenChats
from .draft import RequestOptions
from .requests import Request, Signal
from .sequence import Sequence

_WITHOUT_BEAMS = ("stop", "echo", "constraint", "top_logprobs", "reasoning_budget")


def check_beams(options: RequestOptions) -> None:
    """Raise `ValueError` for options that a beam search does not heed."""
    for name in _WITHOUT_BEAMS:
        if getattr(options, name):
            raise ValueError(f"{name} has no place beside beam_width")


@dataclass(eq=False)
class _Beam:
    """A text in the search, and the sequence that holds it."""

    sequence: Sequence
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    total: float = 0.0
    is_finished: bool = False
    needs_logits: bool = True
    ahead: None = None
    sampler: None = None

    @property
    def score(self) -> float:
        """The mean log-probability of its tokens, by which texts of different length are compared."""
        return self.total / len(self.tokens) if self.tokens else 0.0

    def with_token(self, sequence: Sequence, token: int, logprob: float, is_finished: bool = False) -> "_Beam":
        """Return it with one more token."""
        total = self.total + logprob
        return _Beam(sequence, [*self.tokens, token], [*self.logprobs, logprob], total, is_finished)


class BeamSearch:
    """Looks for the most likely continuations of a text, keeping `width` of them at each length.

    Texts are compared by the mean log-probability of their tokens. It ends when none of those that are not finished
    could still be better than `width` that are, going by what they are now, or at `max_tokens`.

    Args:
        request: whose turn it is.
        room: finds places for forks.
        width: how many texts to keep.
        max_tokens: of a text; None for as many as there is room for.
    """

    def __init__(self, request: Request, room: OpenChats, width: int, max_tokens: int | None):
        self._request, self._room, self._width, self._max_tokens = request, room, width, max_tokens
        self._finished: list[_Beam] = []
        self._is_cancelled = False
        self._first_token = 0.0

    def run(self, sequence: Sequence, cached_tokens: int, is_chat: bool) -> Generator[Signal, None, list[Completion]]:
        """Return the `width` best continuations of a sequence whose prompt is evaluated, the best first."""
        request = self._request
        prefilled, n_prompt = time.perf_counter(), len(sequence)
        beams = [_Beam(sequence)]
        forks: list[Sequence] = []
        try:
            while beams and not self._is_over(beams):
                request.writers = beams
                yield Signal.EVALUATE
                if request.is_dropped:
                    if not beams[0].tokens:
                        raise request.cancelled()
                    self._is_cancelled = True
                    break
                beams = yield from self._grow(beams, forks)
                self._first_token = self._first_token or time.perf_counter()
        finally:
            for fork in forks:
                fork.close()
        best = sorted([*self._finished, *beams], key=lambda beam: -beam.score)[: self._width]
        tokenizer = sequence.context.model.tokenizer
        started = request.started or request.submitted
        timings = Timings(
            queue=started - request.submitted,
            prefill=prefilled - started,
            first_token=self._first_token - request.submitted if self._first_token else 0.0,
            total=time.perf_counter() - request.submitted,
        )
        answers = [
            Completion(
                text=tokenizer.decode([token for token in beam.tokens if not tokenizer.is_end(token)]),
                tokens=beam.tokens,
                finish_reason="end" if beam.is_finished else "cancelled" if self._is_cancelled else "length",
                context_full=not (beam.is_finished or self._is_cancelled or len(beam.tokens) == self._max_tokens),
                logprobs=[
                    TokenLogprob(token, tokenizer.piece(token, special=True), value)
                    for token, value in zip(beam.tokens, beam.logprobs, strict=True)
                ],
                usage=Usage(prompt_tokens=n_prompt, cached_tokens=cached_tokens, completion_tokens=len(beam.tokens)),
                timings=timings,
                model=sequence.context.model.path.name,
                created=int(time.time()),
                is_chat=is_chat,
            )
            for beam in best
        ]
        if request.record is not None:
            request.record.answers = tuple(answers)
        return answers

    def _is_over(self, beams: list[_Beam]) -> bool:
        if len(beams[0].tokens) == self._max_tokens or any(beam.sequence.is_full for beam in beams):
            return True
        if not self._request.may_wait() and not self._room.leave_room(beams[0].sequence.context, self._width):
            return True
        if beams[0].tokens and self._request.is_set():
            self._is_cancelled = True
            return True
        best = sorted(beam.score for beam in self._finished)[-self._width :]
        return len(best) == self._width and best[0] >= max(beam.score for beam in beams)

    def _grow(self, beams: list[_Beam], forks: list[Sequence]) -> Generator[Signal, None, list[_Beam]]:
        """Return the most likely texts that are a token longer; those that end are `_finished`."""
        is_end = beams[0].sequence.context.model.tokenizer.is_end
        found: list[tuple[float, int, int, float]] = []
        for at, beam in enumerate(beams):
            logits = beam.sequence.logits.astype(np.float64)
            logits -= logits.max()
            logits -= np.log(np.exp(logits).sum())
            n = min(2 * self._width, len(logits))
            for token in np.argpartition(-logits, n - 1)[:n].tolist():
                found.append((beam.total + logits[token], at, token, float(logits[token])))
        found.sort(key=lambda one: (-one[0], one[1], one[2]))
        chosen: list[tuple[int, int, float]] = []
        for rank, (_, at, token, logprob) in enumerate(found):
            if is_end(token):
                if rank < self._width:
                    self._finished.append(beams[at].with_token(beams[at].sequence, token, logprob, is_finished=True))
            elif len(chosen) < self._width:
                chosen.append((at, token, logprob))
        free = [at for at in range(len(beams)) if at not in {at for at, _, _ in chosen}]
        for at in free:
            if beams[at].sequence in forks:  # the first belongs to the caller
                forks.remove(beams[at].sequence)
                beams[at].sequence.close()
        sequences, grown = list[Sequence](), set[int]()
        for at, _, _ in chosen:
            sequence = beams[at].sequence
            if at in grown:
                sequence = yield from self._room.room(self._request, sequence.fork)
                forks.append(sequence)
            grown.add(at)
            sequences.append(sequence)
        for sequence, (_, token, _) in zip(sequences, chosen, strict=True):
            yield from self._room.room(self._request, partial(sequence.append, token))
        return [
            beams[at].with_token(sequence, token, logprob)
            for sequence, (at, token, logprob) in zip(sequences, chosen, strict=True)
        ]
