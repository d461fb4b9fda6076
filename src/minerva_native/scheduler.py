"""The scheduler: serves several requests over one context, a token of each in one batch.

A request's work goes step by step. Before each round of steps the scheduler evaluates what they need in one batch: the
last token of every text that is written, and beside them a piece of the prompts that are read, at most `n_ubatch`
tokens in all (continuous batching with chunked prefill: Orca, OSDI 2022; Sarathi, arXiv:2308.16369). A request that is
alone is not told what to evaluate: its steps are those of the plain decode loop.
"""

import time
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial, reduce
from operator import attrgetter
from typing import Any, Protocol, TypeVar

import numpy as np

from .context import Context
from .engine.gate import CancelToken
from .engine.slot import common_prefix
from .errors import Cancelled, ContextFullError, MinervaError
from .requests import Ahead, Doorbell, Prompt, Request, RequestQueue, Signal, Writer
from .sequence import Sequence, look_ahead
from .speculative import Costs

T = TypeVar("T")

_WORTH_WAITING = 16  # tokens of a prompt that another request is about to evaluate
_MOST_STEPS = 64  # of one request that needs no logits, in a round
_MOST_WAITING = 32  # tokens of a text that is written; with more, it was parked
_needs_logits = attrgetter("needs_logits")

_SLACK = 64  # tokens that a parked request finds room for when it comes back


class Room(Protocol):
    """Makes room in a context; `conversation.OpenChats` does."""

    def make_room(self) -> bool:
        """Give up what nobody uses now; return False if there is nothing."""

    def with_room(self, action: Callable[[], T]) -> T:
        """Return what an action returns, making room for it if it finds none."""


class _Served:
    """A request that is served.

    Attributes:
        request: the request.
        steps: does a step each time that it is asked.
        parked: the tokens of its sequences, if others needed their room.
        is_blocked: whether it waits for another to end.
    """

    def __init__(self, request: Request):
        self.request = request
        self.steps: Generator[Any, None, None] = request.start()
        self.parked: dict[Sequence, list[int]] = {}
        self.is_blocked = False

    @property
    def is_running(self) -> bool:
        """Whether it takes part in the next round."""
        return not self.is_blocked and not self.parked

    @property
    def is_reading(self) -> bool:
        """Whether its prompt is evaluated: a request reads a text or writes some, not both at once."""
        writers = self.request.writers
        return len(writers) > 0 and isinstance(writers[0], Prompt)

    def needed(self) -> list[Sequence]:
        """Return the sequences whose logits the next step reads, and which have something waiting."""
        writers = self.request.writers
        return [writer.sequence for writer in writers if writer.needs_logits and writer.sequence.n_waiting]


class Scheduler:
    """Serves the requests of a queue over one context, up to `n_parallel` at once, in the order they came.

    If the context is full, the request that came last gives its cells up, and goes on when there is room again.

    Args:
        context: where they compute.
        room: makes room in it.
        n_parallel: how many requests to serve at once.
        deterministic: evaluate each sequence in batches of its own.
        costs: of passes, if requests guess tokens. Guesses take cells until they are drawn or taken back.
    """

    def __init__(
        self,
        context: Context,
        room: Room,
        n_parallel: int = 1,
        deterministic: bool = False,
        costs: Costs | None = None,
    ):
        self._context, self._idle = context, room
        self._n_parallel, self._is_deterministic, self._costs = n_parallel, deterministic, costs
        self._served: list[_Served] = []
        self._room = 0  # how many cells are known to be free
        self._has_ended = False  # since those that are blocked have last tried
        self._n_rounds = 0
        self._bells: set[Doorbell] = set()  # to ring after the round

    def serve(self, queue: RequestQueue) -> None:
        """Serve requests until the queue is closed and all have ended."""
        while True:
            while self._bells:
                self._bells.pop().ring()
            self._admit(queue)
            if not self._served:
                return
            try:
                if len(self._served) == 1 and self._served[0].is_running:
                    self._serve_alone(self._served[0], queue)
                else:
                    self._round(queue)
            except BaseException as error:  # a fault of ours: nobody shall wait for ever
                for served in list(self._served):
                    served.parked = {}
                    self._step(served, queue, error)  # which lets its sequences go
                    if served in self._served:
                        self._end(served, queue, error)

    def _admit(self, queue: RequestQueue) -> None:
        """Let requests begin while there are places, but none before one that waits for room."""
        while len(self._served) < self._n_parallel and all(served.is_running for served in self._served):
            if self._served and not len(queue):
                return
            request = queue.take(wait=not self._served)
            if request is None:
                return
            self._served.append(served := _Served(request))
            request.may_wait = partial(self._runs_beside, served)
            if len(self._served) > 1:
                self._step(self._served[-1], queue)

    # One request

    def _serve_alone(self, served: _Served, queue: RequestQueue) -> None:
        """Do the steps of the only request, until it ends or others have come."""
        request, steps, deliver = served.request, served.steps, served.request.deliver
        may_join = self._n_parallel > 1
        self._room = 0
        # From a round it may come with something that its next step would not evaluate, or not well.
        evaluates = served.is_reading or len(request.writers) > 1 or any(s.n_waiting > 1 for s in served.needed())
        try:
            while True:
                if evaluates and not self._evaluate_alone(served, queue):
                    return
                item = next(steps)
                evaluates = item is Signal.EVALUATE
                if not isinstance(item, Signal) and (bell := deliver(item)) is not None:
                    bell.ring()
                if may_join:
                    if len(queue):
                        return
                    self._room = 0 if evaluates or self._costs is not None else self._room - 1
                    if self._room <= len(request.writers):
                        self._make_room(queue)  # of chats that were busy when it came
        except StopIteration:
            self._end(served, queue)
        except BaseException as error:  # the caller's to handle, whatever it is
            self._end(served, queue, error)

    def _evaluate_alone(self, served: _Served, queue: RequestQueue) -> bool:
        """Evaluate what the only request needs; return False if it was left off for others, or has failed."""
        max_tokens = self._context.n_ubatch if self._n_parallel > 1 else None
        while needed := served.needed():
            try:
                self._evaluate([served], needed, max_tokens)
            except BaseException as error:
                self._step(served, queue, error)
                return False
            if self._n_parallel > 1 and len(queue):
                return False
        return True

    # Several

    def _round(self, queue: RequestQueue) -> None:
        """Evaluate what all requests need next, as far as it goes into one batch, and do a step of those that can."""
        self._drop_stopped(queue)
        self._return_parked(queue)
        self._make_room(queue)
        self._n_rounds += 1
        running = [served for served in self._served if served.is_running]
        writing, reading = list[Sequence](), list[Sequence]()
        for served in running:
            for writer in served.request.writers:
                if writer.needs_logits and (n_waiting := writer.sequence.n_waiting):
                    is_written = n_waiting <= _MOST_WAITING and not isinstance(writer, Prompt)
                    (writing if is_written else reading).append(writer.sequence)
        needed = [*writing, *self._in_order(reading)]
        if len(writing) >= self._context.n_ubatch:  # not all of them fit into one batch
            turn = self._n_rounds % len(needed)
            needed = needed[turn:] + needed[:turn]
        n_left = len(reading)  # of which some may wait for their turn
        if needed:
            try:
                n_left += self._evaluate(running, needed, self._context.n_ubatch)
            except BaseException as error:
                self._find_failed(running, error, queue)
                n_left = len(needed)
        for served in running:
            if self._room < len(served.request.writers):  # the step of another took what was there, for a new prompt
                self._make_room(queue)
            if served in self._served and served.is_running and not (n_left and served.needed()):
                self._step(served, queue)
        if self._has_ended:
            self._has_ended = False
            for served in [served for served in self._served if served.is_blocked]:
                self._step(served, queue)

    def _in_order(self, reading: list[Sequence]) -> list[Sequence]:
        """Return which prompts to evaluate first: in turns the first come, and the shortest.

        A prompt waits while an earlier one is evaluated that begins with the same tokens, to share its cells.
        """
        ready = list[Sequence]()
        texts = [np.array(sequence[:], np.int32) for sequence in reading]
        may_share = self._context.options.prefix_cache
        for at, sequence in enumerate(reading):
            if may_share:
                with suppress(MinervaError):  # which evaluating it will raise
                    sequence.extend([], evaluate=False)
            cached = len(sequence) - sequence.n_waiting
            for other, text in zip(reading[:at], texts, strict=False):
                n_common = common_prefix(text, texts[at]) if may_share else 0
                if n_common >= cached + _WORTH_WAITING and len(other) - other.n_waiting < n_common:
                    break
            else:
                ready.append(sequence)
        return sorted(ready, key=lambda sequence: sequence.n_waiting) if self._n_rounds % 2 else ready

    def _evaluate(self, running: list[_Served], needed: list[Sequence], max_tokens: int | None) -> int:
        """Evaluate what waits in sequences, and count what of it was prompts; return how many tokens are left."""
        context, n_left = self._context, 0
        reading = [
            (served.request, writer.sequence, writer.sequence.n_waiting)
            for served in running
            for writer in served.request.writers
            if isinstance(writer, Prompt)
        ]
        # What is written ends by itself, with what it has.
        cancel = running[0].request if len(running) == 1 and running[0].is_reading else None
        batches = [[sequence] for sequence in needed] if self._is_deterministic else [needed]
        for batch in batches:
            if self._costs is not None:
                n_left += self._evaluate_guessing(running, batch, max_tokens, cancel, self._costs)
            else:
                n_left += self._idle.with_room(partial(context.evaluate, batch, max_tokens, cancel=cancel))
        for request, sequence, before in reading:
            request.n_evaluated += before - sequence.n_waiting
        drawing = [
            (writer.sequence, writer.sampler)
            for served in running
            for writer in served.request.writers
            if writer.sampler is not None
        ]
        look_ahead(drawing)
        return n_left

    def _evaluate_guessing(
        self,
        running: list[_Served],
        batch: list[Sequence],
        max_tokens: int | None,
        cancel: CancelToken | None,
        costs: Costs,
    ) -> int:
        """Evaluate what waits in a batch, with guesses after texts that have some, and measure what a pass takes."""
        context, stats = self._context, self._context.stats
        writers = self._writers(running, batch)
        guesses = self._guesses(running, writers, max_tokens or context.n_ubatch)
        n_before, before = stats.tokens_evaluated, time.perf_counter()
        rows = dict[Sequence, Any]()
        if guesses:
            drafts = {sequence: draft for sequence, (_, draft) in guesses.items()}
            with suppress(ContextFullError):  # it is evaluated without them
                rows = context.logits_after(drafts, batch, max_tokens)
        if rows:
            n_left = sum(sequence.n_waiting for sequence in batch)
        else:
            n_left = self._idle.with_room(partial(context.evaluate, batch, max_tokens, cancel=cancel))
        if len(writers) == len(batch) and not n_left:
            n_guessed = sum(len(found) - 1 for found in rows.values())
            costs.note(stats.tokens_evaluated - n_before, n_guessed, time.perf_counter() - before)
        for sequence, found in rows.items():
            ahead, draft = guesses[sequence]
            ahead.verify(draft, found)
        return n_left

    def _writers(self, running: list[_Served], batch: list[Sequence]) -> list[Writer]:
        """Return what writes the texts in a batch."""
        in_batch = set(batch)
        return [
            writer
            for served in running
            if not served.is_reading
            for writer in served.request.writers
            if writer.sequence in in_batch and writer.sequence.n_waiting <= _MOST_WAITING
        ]

    def _guesses(
        self, running: list[_Served], writers: list[Writer], max_tokens: int
    ) -> dict[Sequence, tuple[Ahead, list[int]]]:
        """Return guesses for which there is room: half of a batch, and cells that texts do not need next."""
        n_free = max_tokens // 2 - len(writers)
        if self._context.options.kv_unified:
            n_kept = 1 + 2 * sum(len(served.request.writers) for served in running)
            n_free = min(n_free, self._context.n_ctx - self._context.cells_used - n_kept)
        guesses = dict[Sequence, tuple[Ahead, list[int]]]()
        for writer in writers:
            if writer.ahead is not None and n_free > 0 and (draft := writer.ahead.propose(len(writers), n_free)):
                guesses[writer.sequence] = writer.ahead, draft
                n_free -= len(draft)
        return guesses

    def _find_failed(self, running: list[_Served], error: BaseException, queue: RequestQueue) -> None:
        """Evaluate what each request needs by itself, after an error in a common batch; end those that fail."""
        for served in running:
            try:
                if isinstance(error, Cancelled):  # by `Context.cancel`: it concerns whatever was computed
                    raise error
                if needed := served.needed():
                    self._evaluate([served], needed, self._context.n_ubatch)
            except BaseException as own:
                self._step(served, queue, own)

    # Steps

    def _step(self, served: _Served, queue: RequestQueue, error: BaseException | None = None) -> None:
        """Do the next step of a request, or have it fail, and deliver what comes of it."""
        request, steps = served.request, served.steps
        served.is_blocked = False
        try:
            for _ in range(_MOST_STEPS):
                item = next(steps) if error is None else steps.throw(error)
                error = None
                if not isinstance(item, Signal):
                    if (bell := request.deliver(item)) is not None:
                        self._bells.add(bell)
                elif item is not Signal.STEP:
                    served.is_blocked = item is Signal.BLOCKED
                    self._room = 0  # a prompt was added, or sequences were
                    return
                writers = request.writers
                self._room -= len(writers)
                if self._room < 1 or not writers or any(map(_needs_logits, writers)):
                    break
            if self._costs is not None:
                self._room = 0
        except StopIteration:
            self._end(served, queue)
        except BaseException as failed:  # the caller's to handle, whatever it is
            self._end(served, queue, failed)

    def _runs_beside(self, served: _Served) -> bool:
        """Say whether another request runs."""
        return any(other.is_running for other in self._served if other is not served)

    def _end(self, served: _Served, queue: RequestQueue, error: BaseException | None = None) -> None:
        self._served.remove(served)
        self._has_ended = True
        with suppress(BaseException):  # what it cleans up with cannot be told to anybody
            served.steps.close()
        queue.done(served.request)
        with suppress(BaseException):  # of an observer
            served.request.end(error)

    def _drop_stopped(self, queue: RequestQueue) -> None:
        """End the requests that were stopped and do not look whether they were: they wait, or their prompt is read."""
        for served in list(self._served):
            request = served.request
            if served.is_running and not served.is_reading:
                continue
            try:
                if not request.is_set():
                    continue
                failed: BaseException = request.cancelled()
            except BaseException as error:  # of the caller's token
                failed = error
            if served.parked and not served.is_reading:
                request.is_dropped, served.parked = True, {}
                self._step(served, queue)
            else:
                served.parked = {}
                self._step(served, queue, failed)

    # Room

    def _make_room(self, queue: RequestQueue) -> None:
        """Have cells for two tokens of each text that is written, and one more: if need be, the last request's."""
        context = self._context
        if not context.options.kv_unified:
            return
        while self._room < (n := 1 + 2 * sum(len(one.request.writers) for one in self._served if one.is_running)):
            self._room = context.n_ctx - context.cells_used
            if self._room < n and not self._idle.make_room() and not self._park_last(queue):
                return

    def _park_last(self, queue: RequestQueue) -> bool:
        """Leave the cells of the request that came last to the prefix cache; return False if there is no other."""
        running = [served for served in self._served if served.is_running and served.request.writers]
        if len(running) < 2:
            return False
        last = running[-1]
        try:
            for writer in last.request.writers:
                if writer.ahead is not None:
                    writer.ahead.settle()
                last.parked[writer.sequence] = writer.sequence[:]
                writer.sequence.assign([])
        except MinervaError as error:  # somebody has closed it
            last.parked = {}
            self._step(last, queue, error)
        return True

    def _return_parked(self, queue: RequestQueue) -> None:
        """Give requests that were parked their tokens back if there is room."""
        for served in [served for served in self._served if served.parked]:
            others = [other for other in self._served if other.is_running]
            common = reduce(_in_common, served.parked.values())
            n_own = sum(len(tokens) - len(common) for tokens in served.parked.values())
            wanted = len(common) + n_own + _SLACK * (1 + len(others))
            if others and self._context.n_ctx - self._context.cells_used < wanted:
                return
            try:
                if len(served.parked) > 1:  # they share the cells of what is evaluated
                    self._idle.with_room(partial(next(iter(served.parked)).assign, common))
                for sequence, tokens in served.parked.items():
                    self._idle.with_room(lambda: sequence.assign(tokens, evaluate=False))  # noqa: B023
            except MinervaError as error:
                if others and isinstance(error, ContextFullError):
                    for sequence in served.parked:
                        sequence.assign([])
                    return
                served.parked = {}
                self._step(served, queue, error)
                continue
            served.parked = {}
            self._room = 0


def _in_common(one: list[int], other: list[int]) -> list[int]:
    """Return the tokens at the beginning of both."""
    return one[: common_prefix(np.array(one, np.int32), np.array(other, np.int32))]
