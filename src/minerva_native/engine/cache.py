"""The KV cache: brings what libllama holds up to the lists of sequences, by the least work that does it.

Every way to grow a list goes: mark the slots, find room, share what others have cached, evaluate the rest in batches.
`_Rollback` is the one place that undoes it.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

import numpy as np
import numpy.typing as npt

from .._binding import callbacks, lib
from ..errors import ContextError, ContextFullError, EmptySequenceError, OptionError, StateError
from ..options import ContextOptions
from .gate import CancelToken, Gate, check
from .memory import Cells, State
from .pool import SlotPool
from .runner import ABORTED, NO_CELLS, Logits, Runner
from .slot import Checkpoint, Mark, ReuseKey, Slot, common_prefix

if TYPE_CHECKING:
    from ..model import Model

_logger = logging.getLogger("minerva_native")

Ids = npt.NDArray[np.int32]

OnProgress = Callable[[int, int], object]

_MIN_STRIDE = 16  # that many tokens evaluated at once are worth a checkpoint of their own

_ROWS_BYTES = 64 << 20  # how much libllama's logits buffer may take while rows are read


class Payload(NamedTuple):
    """What is saved of a slot.

    Attributes:
        tokens: the list, int32.
        n_cached: how many of them the state holds.
        n_exact: see `Slot`.
        logits: after the last token, float32, if they are known.
        state: libllama's, uint8.
        start: the position of the first of the tokens; above 0 this is a part of a slot.
        checkpoints: of the slot.
    """

    tokens: Ids
    n_cached: int
    n_exact: int | None
    logits: Logits | None
    state: State
    start: int = 0
    checkpoints: tuple[Checkpoint, ...] = ()


class KVCache:
    """The KV cache of one context. The caller is inside the `gate` and has checked its arguments.

    Attributes:
        gate: what calls enter by.
        runner: what computes.
        pool: the slots, and how many cells are free.
        handle: libllama's context, which has to be held during a call that may be closed by a callback.
        stats: what was done.
        memory: what the memory can do.
    """

    def __init__(self, model: "Model", options: ContextOptions):
        self.gate = Gate()
        self.runner = Runner(model, options)
        self.handle, self.stats = self.runner.handle, self.runner.stats
        self._model, self._options = model, options
        self._cells = Cells(model, self.runner, options)
        self.memory = self._cells.facts
        self.pool = SlotPool(self._cells, options.n_cells, options.n_seq, options.prefix_cache)
        # With several passes in one call, libllama may drop from a window what the first of them still needs.
        self._max_batch = options.n_ubatch if self.memory.window else options.n_batch
        self._stride = self._max_batch
        if not self.memory.can_truncate:
            self._stride = min(self._max_batch, options.checkpoint_interval)
        # Each sequence has its share, so that none can take another's away.
        self._checkpoint_bytes = options.checkpoint_bytes // options.n_seq
        self._in_buffer: tuple[Slot, ...] = ()  # whose logits the rows of libllama's buffer are, and nowhere else
        if options.on_full == "shift" and not self.memory.can_shift:
            self.handle.close()
            raise OptionError(self._cannot_shift())

    # Slots

    @property
    def key(self) -> ReuseKey:
        """What is evaluated now depends on, besides the tokens."""
        return self.pool.key

    def rekey(self, key: ReuseKey) -> None:
        """Have what is evaluated from now on depend on something else: what is cached stays under the old key."""
        for slot in self._in_buffer:
            self._keep_logits(slot)
        self.pool.rekey(key)

    def new(self) -> Slot:
        """Return a new empty slot; raise `ContextError` or `SequencesInUseError` if there can be none."""
        name = self._model.architecture
        if not self._cells.exists or not self.runner.has_decoder:
            raise ContextError(f"this model ({name}) has no decoder: it cannot continue a text")
        self._check_encoded()
        return self.pool.new()

    def release(self, slot: Slot) -> None:
        """Take a slot back: its sequence is closed."""
        if not slot.closed:
            self._keep_logits(slot)
            self.pool.release(slot)

    def clear_finished(self, pinned: bool = False) -> None:
        """Forget what closed sequences have left, pinned ones only if asked to."""
        self.pool.clear_finished(pinned)

    def distrust(self) -> None:
        """Trust nothing that is cached: somebody else is about to use libllama's context."""
        self._in_buffer = ()
        self.runner.wake()
        self.pool.distrust(self.key._replace(encoded=None, raw=os.urandom(8).hex()))

    def forget_everything(self) -> None:
        """Empty the memory: what sequences hold is re-evaluated when logits are asked for."""
        self._in_buffer = ()
        self.pool.forget_everything()

    def close(self) -> None:
        """Close every slot and free the context."""
        self.pool.clear()
        self.handle.close()

    @property
    def cells_used(self) -> int:
        """How many cells the tokens of open and pinned sequences take, each shared one counted once."""
        return self.pool.used()

    @property
    def is_full(self) -> bool:
        """Whether the tokens of sequences take every cell."""
        n_places = 1 if self.memory.can_share else self._options.n_seq
        return self.cells_used >= self._options.n_cells * n_places

    def has_room(self, slot: Slot) -> bool:
        """Return whether a slot can take one more token."""
        if self.pool.spare > 0 or self._options.on_full != "error":
            return True
        return slot.closed or self.pool.used(slot) < self._options.n_cells

    def size_bytes(self, slot: Slot) -> int:
        """Return how many bytes the keys, values and states of what is cached take."""
        slot.check_open()
        slot.settle()
        return self._cells.size_bytes(slot.id) if slot.n_cached else 0

    # Logits

    def peek(self, slot: Slot) -> Logits:
        """Return the logits after the last token; evaluate what waits, or the last token if need be.

        They are libllama's, or what forks and checkpoints rely on: to be read, or copied, before the gate is left.
        """
        if slot.closed:
            slot.check_open()
        if slot.row is None and slot.logits is None:
            runner, n = self.runner, slot.n_cached
            # The fast path of a decode loop: one token waits.
            if len(slot.tokens) - n == 1 and slot.in_sync and slot.id >= 0 <= self.pool.spare:
                if runner.was_cancelled:
                    runner.begin()
                self._decode((slot,), 1, runner.decode_one, slot.tokens[n], n, slot.id)
                self.stats.tokens_reevaluated += slot.commit(n + 1, -1)
                if not self.memory.can_truncate:
                    self._checkpoint(slot, 1)
            elif self._needs_evaluation(slot):
                self._evaluate([slot])
        if slot.row is not None:
            return self.runner.peek(slot.row)
        assert slot.logits is not None
        return slot.logits

    def rows(self) -> tuple[Logits, dict[Slot, int]]:
        """Return the logits in libllama's buffer, (n, n_vocab), and the rows after the last tokens of open slots.

        They are to be read before the gate is left.
        """
        rows = {slot: row for row, slot in enumerate(self._in_buffer) if slot.row is not None and not slot.closed}
        return self.runner.rows(len(self._in_buffer)), rows

    def _keep_logits(self, slot: Slot) -> None:
        """Copy a slot's logits before libllama's buffer is used for something else."""
        if slot.row is not None:
            slot.keep_logits(self.runner.logits(slot.row))

    def _needs_evaluation(self, slot: Slot) -> bool:
        """Have the logits without evaluating anything, if possible; return whether they are still unknown."""
        slot.settle()
        self.stats.tokens_reused += self._attach_prefix(slot)
        slot.recall_logits()
        return not slot.has_logits

    # Growing

    def append(self, slot: Slot, token: int) -> None:
        """Add a token that is valid to the list; it waits to be evaluated."""
        pool = self.pool
        if slot.closed or pool.spare <= 0:
            slot.check_open()
            self._make_room(slot, 1)
        pool.spare -= pool.spare > 0
        slot.append(token)

    def extend(
        self,
        slot: Slot,
        ids: Ids,
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        exactly: bool = False,
        evaluate: bool = True,
    ) -> int:
        """Add tokens and evaluate them; return how many were evaluated, or are to be.

        `exactly`: those that are there must stay.
        """
        slot.check_open()
        with self._rollback() as undo:
            if ids.size:
                self._grow(slot, ids, undo, exactly)
                if evaluate and slot.n_waiting:
                    return self._evaluate([slot], on_progress, cancel)
            elif not evaluate:
                slot.settle()
                self.stats.tokens_reused += self._attach_prefix(slot)
        return 0 if evaluate else slot.n_waiting

    def extend_by_one(self, slot: Slot, token: int) -> bool:
        """Add a valid token and evaluate it, if it is as simple as that; return whether it was.

        The fast path of a decode loop (bench/test_loop.py measures what it saves).
        """
        pool = self.pool
        if slot.closed or slot.n_cached != len(slot.tokens) or not slot.in_sync or slot.id < 0 or pool.spare <= 0:
            return False
        n, runner = slot.n_cached, self.runner
        if runner.was_cancelled:
            runner.begin()
        self._decode((slot,), 1, runner.decode_one, token, n, slot.id)
        pool.spare -= 1
        slot.commit(n + 1, -1, token)
        if not self.memory.can_truncate:
            self._checkpoint(slot, 1)
        return True

    def extend_each(
        self,
        grown: list[tuple[Slot, Ids]],
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
    ) -> int:
        """Add tokens to several slots and evaluate them in shared batches; return how many were evaluated."""
        for slot, _ in grown:
            slot.check_open()
        with self._rollback() as undo:
            for slot, ids in grown:
                if ids.size:
                    self._grow(slot, ids, undo)
            waiting = [slot for slot, ids in grown if ids.size and slot.n_waiting]
            return self._evaluate(waiting, on_progress, cancel)

    def extend_each_by_one(self, slots: list[Slot], tokens: list[int]) -> bool:
        """Add a valid token to each of several slots and evaluate all in one batch, if it is as simple as that.

        The fast path of batched decoding (bench/test_loop.py measures what it saves).
        """
        pool = self.pool
        count = len(slots)
        if not 0 < count <= min(pool.spare, self._max_batch) or not self.memory.can_truncate:
            return False
        for slot in slots:
            if slot.closed or slot.n_cached != len(slot.tokens) or not slot.in_sync or slot.id < 0:
                return False
        if self.runner.was_cancelled:
            self.runner.begin()
        positions = self._decode_each(slots, tokens)
        pool.spare -= count
        for row, slot in enumerate(slots):
            slot.commit(positions[row] + 1, row, tokens[row])
        return True

    def _decode_each(self, slots: list[Slot], tokens: list[int]) -> list[int]:
        """Have libllama evaluate the next token of each slot in one batch; return their positions."""
        positions = [slot.n_cached for slot in slots]
        ids = [slot.id for slot in slots]
        self._decode(tuple(slots), len(slots), self.runner.decode_each, len(slots), tokens, positions, ids)
        return positions

    def assign(
        self,
        slot: Slot,
        new: Ids,
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        evaluate: bool = True,
    ) -> int:
        """Make the list these tokens, evaluating only what is not cached; return how many were evaluated, or are to be.

        If they are only to be, an error in evaluating them undoes nothing.
        """
        slot.check_open()
        before = slot.tokens[:]
        n = common_prefix(before, new)
        slot.settle()
        self._keep_logits(slot)
        with self._rollback() as undo:
            undo.mark(slot, whole=True)
            if n < len(before):
                if not self._options.prefix_cache and not callable(self._options.on_full):
                    needed = len(new) - n
                    if self.pool.used_after_cut(slot, n) + needed > self._options.n_cells:
                        raise self._full(len(new), slot)
                kept = self.pool.part(slot)
                undo.parted(slot, kept)
                slot.cut(n if kept is None else 0)
            n = len(slot.tokens)
            self.stats.tokens_reused += min(n, slot.n_cached)
            return self.extend(slot, new[n:], on_progress, cancel, exactly=True, evaluate=evaluate)

    def _grow(self, slot: Slot, new: Ids, undo: "_Rollback", exactly: bool = False) -> None:
        """Add tokens to the list, with a cell for each, and share what others have cached of the whole."""
        slot.check_open()
        slot.settle()
        undo.mark(slot)
        if self._try_to_grow(slot, new):
            return
        undo.forget(slot)  # it is as it was, and from now on as `on_full` makes it
        self._make_room(slot, len(new), exactly)
        undo.mark(slot)
        self._add(slot, new)

    def _try_to_grow(self, slot: Slot, new: Ids) -> bool:
        """Add tokens to the list, share what others have cached of the whole, and return whether all of it fits."""
        is_counted = self.pool.spare >= len(new)
        if not is_counted:
            self._keep_logits(slot)
        undo = self._rollback()  # an error is the caller's to undo
        undo.mark(slot)
        self._add(slot, new)
        reused = self._attach_prefix(slot)
        if is_counted or not self.pool.reserve(slot, 0):
            self.stats.tokens_reused += reused
            return True
        undo.now()
        return False

    def _add(self, slot: Slot, new: Ids) -> None:
        self.pool.spare -= len(new)
        slot.add(new)

    def _make_room(self, slot: Slot, wanted: int, exactly: bool = False) -> None:
        """Have room for `wanted` more tokens: evict what may be evicted, then do as `on_full` says, or raise.

        `exactly`: the tokens that are there have to stay.
        """
        pool, on_full = self.pool, self._options.on_full
        lacking = pool.reserve(slot, wanted)
        if lacking and callable(on_full):
            before = slot.tokens[:] if exactly else None
            sequence: Any = slot.owner() if slot.owner is not None else None
            with self.gate.calling_back():
                on_full(sequence, lacking)
            slot.check_open()
            slot.settle()
            if before is None or before == slot.tokens:
                lacking = pool.reserve(slot, wanted)
        elif lacking and on_full == "shift" and not exactly:
            keep = min(self._options.n_keep, len(slot.tokens))
            discard = max(lacking, (len(slot.tokens) - keep) // 2)
            pool.clear_finished()  # they would have to go in any case; cells shared with others do not become free
            if keep + discard <= len(slot.tokens) and not pool.n_shared(slot, keep):
                _logger.info("the context is full: %d tokens after the first %d are discarded", discard, keep)
                self.shift(slot, keep, discard)
                lacking = pool.reserve(slot, wanted)
        if lacking:
            raise self._full(wanted, slot)

    def _full(self, wanted: int, slot: Slot, counted: int = 0) -> ContextFullError:
        """Return the error; of the cells wanted, `counted` are counted as used already."""
        options = self._options
        used = self.pool.used(slot) - counted
        free = max(0, options.n_cells - used)
        whole = f"n_ctx={options.n_cells}"
        if not options.kv_unified:
            whole = f"{options.n_cells} (n_ctx={options.n_ctx} for n_seq={options.n_seq})"
        return ContextFullError(
            f"the context is full: {used} of {whole} cells are used, {wanted} more are wanted, {free} are free: "
            "shorten the text, or make a context with a larger n_ctx",
            needed=wanted,
            available=free,
        )

    def _attach_prefix(self, slot: Slot) -> int:
        """Give a slot the longest prefix of its tokens that another one has cached; return how many that saves."""
        if slot.n_waiting < 2:  # the last token is evaluated anyway, to have its logits
            return 0
        source, n = self.pool.find_prefix(slot)
        before = slot.n_cached
        if source is not None:
            self._share(source, slot, n)
        return max(0, slot.n_cached - before)

    def _share(self, source: Slot, slot: Slot, n: int) -> None:
        self._keep_logits(source)
        if not self.memory.can_share:  # then it is read and written
            self._apply_shift(source)
        self.pool.share(source, slot, n)

    # Evaluating

    def evaluate(
        self,
        slots: Iterable[Slot],
        max_tokens: int | None = None,
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
    ) -> int:
        """Evaluate what waits, at most `max_tokens` of it, so that logits are known; return how many tokens are left.

        Whatever is raised, the lists are as they were, and what was evaluated stays cached.
        """
        slots = list(dict.fromkeys(slots))  # each once, or its tokens would be in a batch twice
        is_simple = on_progress is None and cancel is None and (max_tokens is None or max_tokens >= len(slots))
        if is_simple and self._evaluate_one_each(slots):
            return 0
        for slot in slots:
            slot.check_open()
            self._check_not_empty(slot)
        lacking = [slot for slot in slots if not slot.has_logits and self._needs_evaluation(slot)]
        if lacking:
            self._evaluate(lacking, on_progress, cancel, max_tokens)
        return sum(slot.n_waiting for slot in lacking)

    def _evaluate_one_each(self, slots: list[Slot]) -> bool:
        """Evaluate the one token that waits in each slot, if it is as simple as that; return whether it was.

        The fast path of sequences that are decoded together (bench/test_loop.py measures what it saves).
        """
        if not 0 < len(slots) <= self._max_batch or self.pool.spare < 0 or not self.memory.can_truncate:
            return False
        for slot in slots:
            if slot.closed or len(slot.tokens) - slot.n_cached != 1 or not slot.in_sync or slot.id < 0:
                return False
        if self.runner.was_cancelled:
            self.runner.begin()
        if not self.memory.can_share:  # see `_fill_batch`
            slots.sort(key=attrgetter("id"))
        positions = self._decode_each(slots, [slot.tokens[-1] for slot in slots])
        for row, slot in enumerate(slots):
            self.stats.tokens_reevaluated += slot.commit(positions[row] + 1, row)
        return True

    def _check_not_empty(self, slot: Slot) -> None:
        if not slot.tokens:
            raise EmptySequenceError("the sequence is empty: extend it with a prompt first (at least a BOS token)")

    def _evaluate(
        self,
        slots: Iterable[Slot],
        on_progress: OnProgress | None = None,
        cancel: CancelToken | None = None,
        max_tokens: int | None = None,
        rows: "_Rows | None" = None,
    ) -> int:
        """Bring the cache of slots up to their lists, at least by the last token; return how many tokens that takes.

        `rows`: reads the logits of guesses.
        """
        queue = deque(slots)
        for slot in queue:
            self._make_evaluable(slot)
        total, done = sum(slot.n_waiting for slot in queue), 0
        self.runner.begin(cancel)
        while queue and (max_tokens is None or done < max_tokens):
            check(cancel)
            n_left = self._max_batch if max_tokens is None else min(self._max_batch, max_tokens - done)
            parts = self._fill_batch(queue, n_left, rows)
            if not parts:
                break
            count = sum(size for _, size in parts)
            batch = self.runner.batch
            self._decode(tuple(slot for slot, _ in parts), count, self.runner.decode, batch.pointer, cancel=cancel)
            if rows is not None:  # some have several rows there
                self._in_buffer = tuple(slot for slot, size in parts for _ in range(rows.n_outputs(slot, size)))
            row = -1
            for slot, size in parts:
                row += size
                is_guess = rows is not None and rows.read(slot, size, row)
                self._commit(slot, size, row, is_guess)
                if not slot.n_waiting:
                    queue.remove(slot)
            done += count
            if on_progress is not None:
                with self.gate.calling_back():
                    on_progress(done, total)
        return total

    def _make_evaluable(self, slot: Slot) -> None:
        """Have a place for a slot, and at least one token to evaluate."""
        slot.check_open()
        self._check_not_empty(slot)
        if not slot.in_sync or not slot.n_waiting:
            slot.rollback(min(slot.n_cached, len(slot.tokens) - 1))
        if self.pool.spare < 0 and (lacking := self.pool.reserve(slot, 0)):
            raise self._full(lacking, slot, lacking)
        self.pool.place(slot)

    def _fill_batch(self, queue: "deque[Slot]", n_max: int, rows: "_Rows | None" = None) -> list[tuple[Slot, int]]:
        """Fill the batch with at most `n_max` tokens of the slots in the queue; return how many of each."""
        # libllama splits a batch by the lengths of its parts: those of windows in cells of their own have to be equal.
        is_even = self.memory.window and not self.memory.can_share
        parts: list[tuple[Slot, int]] = []
        count = 0
        for slot in list(queue):
            slot.check_open()  # `on_progress` may have done anything
            slot.settle()
            if not slot.n_waiting:
                queue.remove(slot)
                continue
            self.pool.place(slot)
            size = min(slot.n_waiting, self._stride, n_max - count)
            if size <= 0 or (parts and is_even and size != parts[0][1]):
                break
            parts.append((slot, size))
            count += size
        if not self.memory.can_share:  # libllama computes in one pass those whose ids follow each other
            parts.sort(key=lambda part: part[0].id)
        at = 0
        for slot, size in parts:
            n = slot.n_cached
            n_outputs = 1 if rows is None else rows.n_outputs(slot, size)
            self.runner.batch.put(at, slot.tokens[n : n + size], n, slot.id, n_outputs)
            at += size
        return parts

    def _commit(self, slot: Slot, size: int, row: int, is_guess: bool = False) -> None:
        """Note that `size` more tokens of a slot's list are cached, and where the logits of the last one are.

        A guess is no text of some length that is worth a checkpoint.
        """
        is_last = size == slot.n_waiting
        self.stats.tokens_reevaluated += slot.commit(slot.n_cached + size, row if is_last else None)
        if not self.memory.can_truncate:
            self._checkpoint(slot, 1 if is_guess else size)

    def read_rows(
        self,
        slot: Slot,
        new: Ids,
        on_row: Callable[[int, Logits], object],
        cancel: CancelToken | None = None,
        is_guess: bool = False,
    ) -> None:
        """Add tokens and evaluate them together with what waits; call `on_row` with a copy of each row of logits.

        Row 0 is before the first new token, and is missing if the list was empty; row i is after the i-th.
        `is_guess`: they may be taken back soon.
        """
        slot.check_open()
        slot.settle()
        if slot.n_waiting:  # an interrupt may have left logits alone
            slot.forget_logits()
        self.stats.tokens_reused += self._attach_prefix(slot)
        slot.recall_logits()
        if self.pool.spare < len(new):
            self._make_room(slot, len(new))
        start = len(slot.tokens)  # `on_full` may have changed it
        if start and not new.size:
            self.evaluate([slot], cancel=cancel)
        if start and not slot.has_logits and not slot.n_waiting:
            slot.rollback(start - 1)  # so that its logits are a row of the pass
        if self.pool.spare < len(new):  # the last token may take a cell of its own now
            self._make_room(slot, len(new), exactly=True)
        if start and slot.has_logits:
            on_row(0, self.peek(slot).copy())
        if not new.size:
            return
        n_rows = max(1, min(self._stride, _ROWS_BYTES // (4 * self.runner.n_vocab)))
        if is_guess and not self.memory.can_truncate and not self.memory.n_rollback:
            self._keep_logits(slot)
            slot.checkpoint(1, self._checkpoint_bytes, is_passing=True)
        batch, index = self.runner.batch, int(slot.has_logits or not start)
        self.runner.begin(cancel)
        with self._rollback() as undo:
            undo.mark(slot)
            self._add(slot, new)
            self.pool.place(slot)
            while slot.n_waiting:
                check(cancel)
                n = slot.n_cached
                n_unwanted = max(0, start - 1 - n)  # tokens in the middle of what waited
                size = min(slot.n_waiting, self._stride, n_unwanted + n_rows)
                first = min(size, n_unwanted)
                batch.put(0, slot.tokens[n : n + size], n, slot.id, max(1, size - first))
                self._decode((slot,), size, self.runner.decode, batch.pointer, cancel=cancel)
                self._commit(slot, size, -1, is_guess)
                for row in range(first, size):
                    on_row(index, self.runner.logits(row))
                    index += 1

    def read_guesses(
        self,
        guesses: dict[Slot, Ids],
        others: list[Slot],
        max_tokens: int | None = None,
        cancel: CancelToken | None = None,
    ) -> dict[Slot, Logits]:
        """Evaluate what waits in slots in shared batches, and in some a guess after it.

        Return the rows of those: logits before and after each token. A guess that `max_tokens` cuts off is taken back.
        """
        rows = _Rows(self.runner)
        with self._rollback() as undo:
            is_alone = len(guesses) == 1 and not others
            for slot, ids in guesses.items():
                self._add_guess(slot, ids, rows, undo, is_alone)
            lacking = []
            for slot in others:
                slot.check_open()
                self._check_not_empty(slot)
                if not slot.has_logits and self._needs_evaluation(slot):
                    lacking.append(slot)
            waiting = [slot for slot in guesses if slot.n_waiting]
            self._evaluate([*waiting, *lacking], cancel=cancel, max_tokens=max_tokens, rows=rows)
        for slot in guesses:
            if slot.n_waiting:
                rows.drop(slot)
                slot.cut(len(slot.tokens) - len(guesses[slot]))
        return rows.found

    def draft(self, slot: Slot, n: int) -> list[int]:
        """Return up to `n` tokens that the model's MTP head guesses after the one that waits; none if it cannot."""
        slot.check_open()
        if slot.n_waiting != 1 or not slot.in_sync or slot.id < 0 or n < 1:
            return []
        if self.runner.was_cancelled:
            self.runner.begin()
        return self.runner.draft(slot.tokens[-1], slot.n_cached, slot.id, n)

    def _add_guess(self, slot: Slot, ids: Ids, rows: "_Rows", undo: "_Rollback", is_alone: bool) -> None:
        """Add a guess to the list, so that evaluating it gives the logits before and after each token."""
        slot.check_open()
        self._check_not_empty(slot)
        slot.settle()
        if slot.n_waiting:  # an interrupt may have left logits alone
            slot.forget_logits()
        self.stats.tokens_reused += self._attach_prefix(slot)
        slot.recall_logits()
        if not slot.has_logits and not slot.n_waiting:
            slot.rollback(len(slot.tokens) - 1)  # so that its logits are a row of the pass
        if self.pool.spare < len(ids):
            self._make_room(slot, len(ids))
        # Snapshots are of no use after a batch of several sequences.
        if not self.memory.can_truncate and not (self.memory.n_rollback and is_alone):
            self._keep_logits(slot)
            slot.checkpoint(1, self._checkpoint_bytes, is_passing=True)
        rows.expect(slot, len(ids), self.peek(slot) if slot.has_logits else None)
        undo.mark(slot)
        self._add(slot, ids)

    def encode(self, ids: list[int]) -> None:
        """Have the encoder read a text. libllama wants the memory to be empty: all answers are forgotten."""
        self.forget_everything()
        self.rekey(self.key._replace(encoded=None))
        self.runner.begin()
        since = time.perf_counter()
        code = self.runner.encode(ids)
        if code or callbacks.kept:
            self.runner.raise_for(code, len(ids), since)
        self.stats.tokens_encoded += len(ids)
        self.rekey(self.key._replace(encoded=tuple(ids)))

    def _check_encoded(self) -> None:
        if self.runner.has_encoder and self.key.encoded is None:
            raise ContextError(
                f"this model ({self._model.architecture}) has an encoder: give it the text to answer with encode first"
            )

    def _decode(
        self,
        slots: tuple[Slot, ...],
        count: int,
        decode: Callable[..., int],
        *arguments: Any,
        cancel: CancelToken | None = None,
    ) -> None:
        """Have libllama evaluate `count` tokens of slots, whose logits its buffer then holds; raise if it fails.

        The slots have begun then, and whoever called this commits.
        """
        for slot in slots:
            slot.begin()
        for slot in self._in_buffer:
            if slot.row is not None:
                self._keep_logits(slot)
        pool, stats = self.pool, self.stats
        if pool.is_unclean:  # an interrupt came before it was cleaned
            pool.clean()
        if self.runner.has_encoder:
            self._check_encoded()
        if cancel is not None:
            self.runner.watch(cancel)
        if self.memory.n_rollback:
            self._cells.begin_decode()
        stats.decode_calls += 1  # before it: from now on the logits in the buffer are not there any more
        code = ABORTED  # should an interrupt strike before it is known
        since = time.perf_counter()
        try:
            code = decode(*arguments)
            if code == NO_CELLS and pool.remove_strays():
                code = decode(*arguments)
            stats.decode_seconds += time.perf_counter() - since
        finally:
            if code or pool.is_shift_pending:
                self._doubt(code)
            if cancel is not None:
                self.runner.watch(None)
        if code or callbacks.kept:
            if code == NO_CELLS:
                raise self._full(count, slots[0])
            self.runner.raise_for(code, count, since)
        stats.tokens_evaluated += count
        self._in_buffer = slots
        if self.memory.n_rollback:
            self._cells.end_decode([slot.id for slot in slots], count)

    def _doubt(self, code: int) -> None:
        """Trust what a decode with this return code has left, and no more."""
        if code and self.memory.has_state:
            self.pool.doubt_all()
            self.pool.clean()
        if code and self.pool.is_shift_pending:
            self.pool.doubt_shifted()
        self.pool.is_shift_pending = False

    def _checkpoint(self, slot: Slot, n_evaluated: int | None = None) -> None:
        """Keep the state if the memory cannot be cut: after every interval, and after a text of some length.

        Without `n_evaluated` in any case: evaluating the tokens would not give this state again.
        """
        if not self.memory.can_truncate and self._checkpoint_bytes:
            self._keep_logits(slot)
            stride = self._options.checkpoint_interval
            if n_evaluated is None:
                stride = 0
            elif n_evaluated >= _MIN_STRIDE:
                stride = min(_MIN_STRIDE, stride)
            slot.checkpoint(stride, self._checkpoint_bytes)

    # Shrinking and shifting

    def cut(self, slot: Slot, n: int) -> None:
        """Keep the first `n` tokens of the list."""
        slot.check_open()
        if n < len(slot.tokens):
            slot.cut(n)

    def shift(self, slot: Slot, keep: int, discard: int) -> None:
        """Take `discard` tokens after the first `keep` out, and move the rest to their positions."""
        slot.check_open()
        slot.settle()
        if not discard:
            return
        if keep + discard == len(slot.tokens):
            slot.cut(keep)
            return
        if keep + discard < slot.n_cached:
            if not self.memory.can_shift:
                raise ContextError(self._cannot_shift())
            self._own_cells(slot, keep + discard)  # which may take re-evaluating the whole
        if keep + discard < slot.n_cached:
            if slot.shift(keep, discard):
                self.pool.is_shift_pending |= self.memory.has_keys
                self._checkpoint(slot)  # to go back as far as here, and not to before the shift
        else:  # what follows is not evaluated yet
            slot.remove(keep, discard)
        self.stats.tokens_discarded += discard

    def _own_cells(self, slot: Slot, start: int) -> None:
        """Copy all cells if another sequence holds some of those from `start` on: they are about to change."""
        if shared := self.pool.n_shared(slot, start):
            if self.pool.reserve(slot, shared):
                raise self._full(shared, slot)
            self._keep_logits(slot)
            self._apply_shift(slot)
            self.pool.remove_strays()
            state = self._cells.read(slot.id)
            if state is None:
                raise ContextError("libllama does not give the state of this sequence")
            if reason := slot.rewrite(state):
                raise ContextError(f"libllama could not copy this sequence ({reason})")

    def _apply_shift(self, slot: Slot) -> None:
        """Have a slot's shifted keys rotated now, before they are copied: by evaluating one more token, for nothing."""
        if self.pool.is_shift_pending and slot.n_exact is not None:
            if self.pool.reserve(slot, 1):
                raise self._full(1, slot)
            self._keep_logits(slot)
            n, logits = slot.n_cached, slot.logits
            self.runner.begin()
            self.runner.batch.put(0, slot.tokens[:1], n, slot.id)
            self._decode((slot,), 1, self.runner.decode, self.runner.batch.pointer)
            slot.rollback(n)
            slot.take_logits(logits if slot.n_cached == n else None)

    def _cannot_shift(self) -> str:
        return (
            f"the memory of this model ({self._model.architecture}: {self.memory.kind}, "
            f"kv_type={self._options.kv_types}) cannot shift: truncate instead, or try keys of another type"
        )

    # Copying

    def fork(self, slot: Slot, n: int) -> Slot:
        """Return a new slot that holds the first `n` tokens of another."""
        slot.check_open()
        slot.settle()
        with self._rollback() as undo:
            forked = self.new()
            undo.made(forked)
            forked.add(np.array(slot.tokens[:n], np.int32))
            if shared := min(n, slot.n_cached):
                self._share(slot, forked, shared)
            self.pool.recount()
            if lacking := self.pool.reserve(forked, 0):
                raise self._full(lacking, forked, lacking)
            return forked

    def payload(self, slot: Slot) -> Payload:
        """Return what is to be saved of a slot."""
        slot.check_open()
        slot.settle()
        self._keep_logits(slot)
        self._apply_shift(slot)
        state = self._cells.read(slot.id) if slot.n_cached else np.empty(0, np.uint8)
        if state is None:
            raise StateError("libllama does not give the state of this sequence")
        return Payload(np.array(slot.tokens, np.int32), slot.n_cached, slot.n_exact, slot.logits, state)

    def admit(self, payload: Payload) -> Slot:
        """Return a new slot that holds what was saved of another; raise `StateError` if libllama does not take it."""
        with self._rollback() as undo:
            slot = self.new()
            undo.made(slot)
            if self.pool.reserve(slot, len(payload.tokens)):
                raise self._full(len(payload.tokens), slot)
            self._add(slot, payload.tokens)
            if payload.n_cached:
                self.pool.place(slot)
                self.pool.remove_strays()
                if reason := slot.read_back(payload.state, payload.n_cached, payload.n_exact):
                    self._refuse(reason)
                slot.take_logits(payload.logits)
                self._checkpoint(slot)  # to go back as far as here: what was shifted before is nowhere else
            return slot

    # What is kept for other processes

    @property
    def can_split(self) -> bool:
        """Whether `part` and `keep_parts` can be used. `snapshot` and `keep_snapshot` always can."""
        return self._cells.can_split

    def n_cached(self, ids: Ids) -> int:
        """Return how many of some tokens, from the first, need no evaluation."""
        return self.pool.n_cached(ids)

    def n_exact(self, slot: Slot) -> int:
        """Return how many tokens of a slot are cached just as an evaluation of them would have it."""
        slot.check_open()
        slot.settle()
        return slot.n_cached if slot.n_exact is None else min(slot.n_exact, slot.n_cached)

    def part(self, slot: Slot, start: int, stop: int) -> Payload | None:
        """Return the tokens from `start` to `stop` of a slot, which are cached exactly, no more than a window.

        Return None if others have been given cells of tokens that had left the window.
        """
        state = slot.part(start, stop)
        if state is None:
            return None
        return Payload(np.array(slot.tokens[start:stop], np.int32), stop - start, None, None, state, start)

    def snapshot(self, slot: Slot) -> Payload:
        """Return what is cached of a slot, all of it exactly, with its checkpoints."""
        payload = self.payload(slot)
        logits = None if slot.n_waiting else payload.logits
        tokens = payload.tokens[: payload.n_cached]
        checkpoints = tuple(checkpoint for checkpoint in slot.checkpoints if not checkpoint.is_passing)
        return payload._replace(tokens=tokens, logits=logits, checkpoints=checkpoints)

    def keep_parts(self, ids: Ids, parts: Iterable[Payload]) -> None:
        """Put tokens among what closed sequences have left, as many as are cached or are in the saved parts."""
        with self._rollback() as undo:
            slot = self._new_for_cache(ids, undo)
            self._attach_prefix(slot)
            self._reserve_place(slot)
            for part in parts:
                if part.start > slot.n_cached:  # what was cached before it has been evicted
                    break
                if reason := slot.add_part(part.state, part.start, part.start + len(part.tokens)):
                    self._refuse(reason)
            slot.rollback(slot.n_cached)  # back to where the window is complete
        self.pool.release(slot)

    def keep_snapshot(self, payload: Payload) -> None:
        """Put what was saved as a whole among what closed sequences have left."""
        with self._rollback() as undo:
            slot = self._new_for_cache(payload.tokens, undo)
            self._reserve_place(slot)
            if reason := slot.read_back(payload.state, payload.n_cached, None):
                self._refuse(reason)
            slot.take_checkpoints(list(payload.checkpoints))
            slot.take_logits(payload.logits)
        self.pool.release(slot)

    def _new_for_cache(self, ids: Ids, undo: "_Rollback") -> Slot:
        slot = self.pool.new_for_cache()
        undo.made(slot)
        self._add(slot, ids)
        return slot

    def _reserve_place(self, slot: Slot) -> None:
        if lacking := self.pool.reserve(slot, 0):
            raise self._full(lacking, slot, lacking)
        self.pool.place(slot)
        self.pool.remove_strays()

    def _refuse(self, reason: str) -> NoReturn:
        """Raise `StateError`, with an empty memory: what libllama has read of a bad state may lie anywhere."""
        self.forget_everything()
        raise StateError(reason)

    def requirements(self) -> dict[str, Any]:
        """Return what has to be the same for a saved slot to be admitted, as JSON has it.

        libllama itself compares layers, sizes and layouts. Raises `StateError` if the model's file is gone.
        """
        key = self.key
        return {
            "fingerprint": self._model.fingerprint(),
            "kv_type": list(self._options.kv_types),
            "kv_unified": self.memory.can_share,
            **key._asdict(),
            "encoded": None if key.encoded is None else list(key.encoded),
            "adapters": [list(adapter) for adapter in key.adapters],
            **self._cells.key_form,
            "state_version": lib.LLAMA_STATE_SEQ_VERSION,
        }

    def _rollback(self) -> "_Rollback":
        return _Rollback(self.pool, self.stats)


class _Rows:
    """The logits of guesses, while they are evaluated.

    Attributes:
        found: of each slot, before and after each token of its guess: float32, shape (tokens + 1, n_vocab).
    """

    def __init__(self, runner: Runner):
        self._runner = runner
        self._first: dict[Slot, int] = {}  # the token whose logits are the first row
        self.found: dict[Slot, Logits] = {}

    def expect(self, slot: Slot, n: int, logits: Logits | None) -> None:
        """Have the rows of a guess of `n` tokens, which comes after the list; `logits` is row 0 if it is known."""
        rows = self.found[slot] = np.empty((n + 1, self._runner.n_vocab), np.float32)
        self._first[slot] = len(slot.tokens) - 1
        if logits is not None:
            rows[0] = logits

    def drop(self, slot: Slot) -> None:
        """Have no rows of a slot."""
        del self.found[slot]

    def n_outputs(self, slot: Slot, size: int) -> int:
        """Return of how many of the next `size` tokens of a slot, from the last, logits are wanted."""
        if slot not in self._first:
            return 1
        return min(size, max(1, slot.n_cached + size - self._first[slot]))

    def read(self, slot: Slot, size: int, row: int) -> bool:
        """Copy the logits of the last `size` tokens of a slot that are rows; return whether it has a guess.

        `row`: where those of the last token are in libllama's buffer.
        """
        if slot not in self._first:
            return False
        first, end = self._first[slot], slot.n_cached + size
        for n in range(max(first, slot.n_cached), end):
            self.found[slot][n - first] = self._runner.peek(row + 1 + n - end)
        return True


class _Rollback:
    """Brings slots back to what they were, if an error leaves its block. The innermost mark of a slot counts."""

    def __init__(self, pool: SlotPool, stats: Any):
        self._pool, self._stats = pool, stats
        self._marks: dict[Slot, Mark] = {}
        self._parted: dict[Slot, Slot | None] = {}

    def mark(self, slot: Slot, whole: bool = False) -> None:
        """Come back to what a slot is now; `whole` if more may change of its list than what is added."""
        self._marks[slot] = slot.mark(self._stats.decode_calls, whole)

    def forget(self, slot: Slot) -> None:
        """Leave a slot as it is."""
        del self._marks[slot]

    def made(self, slot: Slot) -> None:
        """Discard this slot, which was not there before."""
        self._marks[slot] = Mark(None, None, None, None, 0, 0)

    def parted(self, slot: Slot, kept: Slot | None) -> None:
        """Note which finished slot now has the cells of a slot, to give them back."""
        self._parted[slot] = kept

    def now(self) -> None:
        """Bring the slots back, without an error."""
        for slot, mark in self._marks.items():
            self._return(slot, mark)

    def _return(self, slot: Slot, mark: Mark) -> None:
        if mark.n is None:
            self._pool.discard(slot)
        elif slot.closed:  # by a callback: there is nobody to give anything back to
            return
        elif mark.tokens is not None:
            if slot.tokens != mark.tokens or not slot.in_sync or self._parted.get(slot) is not None:
                self._pool.take_back(slot, self._parted.get(slot), mark.tokens)
        elif slot.n_cuts == mark.n_cuts:  # else a callback has made the list another
            slot.cut(mark.n)
            if slot.n_cached == mark.n:
                is_there = mark.row is not None and mark.n_calls == self._stats.decode_calls
                slot.take_logits(mark.logits, mark.row if is_there else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self.now()
