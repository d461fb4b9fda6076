"""Slots: libllama's sequence ids, each with its tokens and what of them the KV cache holds."""

import itertools
from array import array
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import ClosedError, ContextError
from .memory import Memory, State

Piece = tuple[int, int]
"""A run of cells that several slots may hold, by its number, and how many of them, from the first, this one holds."""


class Checkpoint(NamedTuple):
    """The state after the first `n` tokens, and the logits there where they were at hand."""

    n: int
    state: State
    logits: npt.NDArray[np.float32] | None


class Before(NamedTuple):
    """What a list was before tokens were added: its length, and the logits after its last token, as a slot has them."""

    n: int
    logits: npt.NDArray[np.float32] | None
    unread: bool


class Slot:
    """A list of tokens, how many of them are in the KV cache, and under which sequence id.

    An interrupt may strike between any two lines: the cache then holds more than `n_cached` tokens, never less, and
    `settled` stays False until `forget_from` has made them agree again. Cells of an id that it has taken from every
    slot are found when they are missed (`SlotPool.remove_strays`).
    """

    def __init__(self, memory: Memory):
        self._memory = memory
        self.id = -1  # none, before anything is evaluated
        self.tokens = array("i")
        self.n_cached = 0  # of the tokens, from the first
        self.settled = True
        self.doubtful = False  # whether what the cache holds, besides, may not be what was evaluated
        self.logits: npt.NDArray[np.float32] | None = None  # after the last token, once they are read
        self.unread = False  # whether they lie in libllama's buffer, and nowhere else,
        self.row = -1  # at the index that the token had in its batch; -1 is the last
        self.n_seen = 0  # how many tokens, from the first, were evaluated at some time
        self.n_pure: int | None = None  # once shifted: how many of the cached are what a fresh evaluation would give
        self.pieces: list[Piece] = []  # of the cells, from the first; those after are this slot's alone
        self.checkpoints: list[Checkpoint] = []  # by rising n
        self.pinned = False
        self.closed = False
        self.owner: Callable[[], object] | None = None  # gives the sequence, or None when nobody refers to it any more

    def check_open(self) -> None:
        """Raise `ClosedError` where the sequence was closed, be it by a callback amid the call."""
        if self.closed:
            raise ClosedError("this Sequence is closed")

    def before(self) -> Before:
        """Return what the list is, to come back to."""
        return Before(len(self.tokens), self.logits, self.unread)

    def add(self, tokens: npt.NDArray[np.int32]) -> None:
        """Put tokens at the end of the list."""
        self.forget_logits()
        self._memory.spare -= len(tokens)
        self.tokens.frombytes(tokens.tobytes())

    def cut(self, n: int) -> None:
        """Make list and cache end after the first `n` tokens."""
        self.forget_logits()
        agree = self.settled and n >= self.n_cached
        self.settled = False
        self.n_cached, self.n_seen = min(n, self.n_cached), min(n, self.n_seen)
        self.checkpoints = [checkpoint for checkpoint in self.checkpoints if checkpoint.n <= n]
        del self.tokens[n:]
        if agree:
            self.settled = True
        else:
            self.forget_from(self.n_cached)

    def settle(self) -> None:
        """Make list and cache agree, where they may not."""
        if not self.settled:
            self.forget_from(self.n_cached)

    def forget_from(self, n: int) -> None:
        """Have the cache hold the first `n` tokens; where it cannot, those up to a checkpoint before, or none."""
        self.settled = False
        self._memory.spare = -1  # cells that were shared may have to be evaluated anew
        self.forget_logits()
        self.n_cached = n if self.id >= 0 else 0  # before cells go: an interrupt is to find no less than is noted
        if self.id >= 0 and (self.doubtful or not self._cut_cells(n)):
            self._return_to_checkpoint(n)
        self.doubtful = False
        self.pieces = clipped(self.pieces, self.n_cached)
        if self.n_pure is not None and self.n_pure >= self.n_cached:
            self.checkpoints = [checkpoint for checkpoint in self.checkpoints if checkpoint.n <= self.n_pure]
            self.n_pure = None
        self.settled = True

    def _cut_cells(self, n: int) -> bool:
        return self._memory.remove(self.id, n if n else -1) and self._memory.holds(self.id, n)

    def _return_to_checkpoint(self, n: int) -> None:
        for checkpoint in reversed(self.checkpoints):
            if checkpoint.n <= n:
                self.n_cached = checkpoint.n
                self._memory.remove(self.id, checkpoint.n)  # of a hybrid this fails: it is cut after the state is back
                if not self._memory.write(self.id, checkpoint.state, partial=True) and self._cut_cells(checkpoint.n):
                    return
        self.n_cached = 0
        self._memory.remove(self.id, -1)

    def take(self, other: "Slot", n: int) -> None:
        """Take over another slot's cells, to hold its first `n` tokens; this slot has none, and its list has those."""
        held, n_pure, pieces, checkpoints = other.n_cached, other.n_pure, other.pieces, other.checkpoints
        self.settled = other.settled = False
        other.n_cached, other.n_pure, other.pieces, other.checkpoints = 0, None, [], []
        sequence_id, other.id = other.id, -1
        self.id, self.pieces = sequence_id, pieces
        self.hold(held, n, n_pure, checkpoints)
        other.settled = True

    def hold(self, held: int, n: int, n_pure: int | None, checkpoints: list[Checkpoint]) -> None:
        """Take note that the cache holds `held` tokens, of which the first `n` are this list's: forget the others."""
        self.n_pure, self.checkpoints = n_pure, [checkpoint for checkpoint in checkpoints if checkpoint.n <= n]
        if n < held:
            self.forget_from(n)
        else:
            self.n_cached, self.settled = n, True
        self.n_seen = max(self.n_seen, n)

    def forget_logits(self) -> None:
        """Drop the logits, also those that nobody has read yet: the last token is about to be another."""
        self.logits, self.unread = None, False

    def at_checkpoint(self) -> npt.NDArray[np.float32] | None:
        """Return the logits after the last token, where a checkpoint has them and the cache is there."""
        last = self.checkpoints[-1] if self.checkpoints else None
        return last.logits if last and last.n == self.n_cached == len(self.tokens) else None

    def checkpoint(self, stride: int, max_bytes: int) -> None:
        """Keep the state, unless one nearby is kept; of too many, drop the one whose neighbours are nearest."""
        last = self.checkpoints[-1].n if self.checkpoints else 0
        if self.n_cached - last < stride:
            return
        state = self._memory.read(self.id, partial=True)
        if state is None or state.size > max_bytes:
            return
        kept = [*self.checkpoints, Checkpoint(self.n_cached, state, self.logits)]
        while sum(checkpoint.state.size for checkpoint in kept) > max_bytes:
            starts = [0, *(checkpoint.n for checkpoint in kept)]
            gaps = [after - before for before, after in zip(starts[:-2], starts[2:], strict=True)]
            del kept[min(range(len(gaps)), key=gaps.__getitem__) if gaps else 0]
        self.checkpoints = kept

    def n_usable(self, wanted: npt.NDArray[np.int32], at_least: int) -> int:
        """Return how many of the wanted tokens, from the first, this slot has cached; 0 where not over `at_least`."""
        limit = min(len(wanted), self.n_cached if self.n_pure is None else self.n_pure)
        if limit <= at_least or self.tokens[at_least] != wanted[at_least]:
            return 0
        n = common_prefix(self.tokens[:limit], wanted)
        if not self._memory.can_truncate and n < self.n_cached:
            n = max((checkpoint.n for checkpoint in self.checkpoints if checkpoint.n <= n), default=0)
        return n if n > at_least else 0


class SlotPool:
    """The slots of a context: which are in use, which are kept as a prefix cache, and how many cells are left."""

    def __init__(self, memory: Memory, n_cells: int, n_seq: int, prefix_cache: bool):
        self._memory = memory
        self._n_cells, self._n_seq = n_cells, n_seq
        self._prefix_cache = prefix_cache
        self.open: list[Slot] = []
        self.finished: list[Slot] = []  # least recently used first
        self.shifted = False  # whether the next decode turns keys to their new positions
        self.unclean = False  # whether states that no slot holds may be left of a decode that failed
        self._run_numbers = itertools.count()

    def new(self) -> Slot:
        """Return a new empty slot; raise `ContextError` where all places are taken."""
        self.collect()
        if len(self.open) + sum(slot.pinned for slot in self.finished) >= self._n_seq:
            raise self._no_place()
        slot = Slot(self._memory)
        self.open.append(slot)
        return slot

    def collect(self) -> None:
        """Release the slots whose sequence was never closed, and is gone."""
        for slot in list(self.open):
            if slot.owner is None or slot.owner() is None:
                slot.unread = False
                self.release(slot)

    def remove_strays(self) -> bool:
        """Free the cells that an interrupt has left under ids which no slot has; return whether there may be any."""
        strays = set(range(self._n_seq)) - {slot.id for slot in (*self.open, *self.finished)}
        for sequence_id in strays:
            self._memory.remove(sequence_id, -1)
        return bool(strays)

    def place(self, slot: Slot) -> None:
        """Give a slot a sequence id, if need be that of the finished one that was least recently used."""
        if slot.id < 0:
            sequence_id = self._free_id()
            if sequence_id is None:
                oldest = self._oldest()
                if oldest is None:
                    raise self._no_place()
                sequence_id = oldest.id
                self.drop(oldest)
            self._memory.remove(sequence_id, -1)
            slot.id = sequence_id

    def _free_id(self) -> int | None:
        used = {slot.id for slot in (*self.open, *self.finished)}
        return next((number for number in range(self._n_seq) if number not in used), None)

    def _no_place(self) -> ContextError:
        return ContextError(
            f"all {self._n_seq} sequences of this context are in use: close one, or make a context with more room, "
            f"such as n_seq={self._n_seq + 1}"
        )

    def release(self, slot: Slot) -> None:
        """Take a slot out of use: what it holds stays as long as there is room for it."""
        slot.closed = True
        if slot in self.open:
            self.open.remove(slot)
        if self._prefix_cache and slot.settled:
            slot.tokens = slot.tokens[: slot.n_cached]
            self.keep(slot)
        else:
            self.drop(slot)

    def drop(self, slot: Slot) -> None:
        """Free a slot's cells and its id."""
        if slot in self.finished:
            self.finished.remove(slot)
        sequence_id, slot.id = slot.id, -1
        slot.forget_logits()
        slot.n_cached, slot.pieces, slot.checkpoints = 0, [], []
        if sequence_id >= 0:
            self._memory.remove(sequence_id, -1)

    def clear_finished(self, pinned: bool = False) -> None:
        """Drop what closed sequences have left, pinned ones only if asked to."""
        self.collect()
        for slot in list(self.finished):
            if pinned or not slot.pinned:
                self.drop(slot)

    def _oldest(self) -> Slot | None:
        """Return the finished slot to drop first."""
        return next((old for old in self.finished if not old.pinned), None)

    def give_up(self, slot: Slot, n: int) -> Slot | None:
        """Cut an open slot to `n` tokens; or to none, and return the finished slot that now has its cells."""
        if not self._prefix_cache or not slot.settled or not slot.n_cached:
            slot.cut(n)
            return None
        kept = Slot(self._memory)
        kept.tokens, kept.closed = slot.tokens[: slot.n_cached], True
        logits = slot.logits if slot.n_cached == len(slot.tokens) else None
        kept.take(slot, slot.n_cached)
        kept.logits = logits
        slot.cut(0)
        self.keep(kept)
        return kept

    def take_back(self, slot: Slot, kept: Slot, tokens: "array[int]") -> None:
        """Undo `give_up`, as far as the cells are still there."""
        if slot.closed:  # by a callback: there is nobody to give them back to
            return
        slot.cut(0)
        slot.add(np.array(tokens, np.int32))
        if kept in self.finished:
            self.finished.remove(kept)
            logits = kept.logits
            slot.take(kept, kept.n_cached)
            slot.logits = logits if slot.n_cached == len(tokens) else None

    def cells_after(self, slot: Slot, n: int) -> int:
        """Return how many cells open and pinned sequences would take, were a slot cut to `n` tokens."""
        cut = Slot(self._memory)
        cut.tokens, cut.pieces = slot.tokens[:n], clipped(slot.pieces, n)
        return count_cells([*(other for other in self.open if other is not slot), cut])

    def keep(self, slot: Slot) -> None:
        """Put a slot among the finished ones, unless it adds nothing to them; drop those that add nothing to it."""
        self.tidy()
        if not slot.n_cached:
            self.drop(slot)
            return
        tokens = np.array(slot.tokens, np.int32)
        for old in list(self.finished):
            if slot.n_usable(np.array(old.tokens, np.int32), 0) == len(old.tokens) and slot.pinned >= old.pinned:
                self.drop(old)
            elif old.n_usable(tokens, 0) == len(tokens) and not slot.pinned:
                self.drop(slot)
                return
        self.finished.append(slot)

    def tidy(self) -> None:
        """Have the lists of finished slots end where their caches do."""
        for slot in list(self.finished):
            slot.settle()
            if slot.n_cached < len(slot.tokens):
                slot.cut(slot.n_cached)
            if not slot.n_cached:
                self.drop(slot)

    def share(self, source: Slot, slot: Slot, n: int) -> None:
        """Let a slot hold the first `n` cached tokens of another in place of what it has; its list has them already."""
        logits = source.logits if n == source.n_cached == len(source.tokens) == len(slot.tokens) else None
        slot.forget_from(0)
        if source in self.finished:  # it is used: the last to be dropped from now on
            self.finished.remove(source)
            self.finished.append(source)
        if slot.id < 0 and self._is_better_taken(source, n):
            self.finished.remove(source)
            slot.take(source, n)
        else:
            self.place(slot)
            slot.settled = False
            if self._memory.can_share:
                held = sum(length for _, length in source.pieces)
                if n > held:
                    source.pieces = [*source.pieces, (next(self._run_numbers), n - held)]
                slot.pieces = source.pieces
            if not self._memory.copy(source.id, slot.id):
                slot.forget_from(0)
                return
            slot.hold(source.n_cached, n, source.n_pure, source.checkpoints)
        if slot.n_cached == n:
            slot.logits = logits

    def _is_better_taken(self, source: Slot, n: int) -> bool:
        """Whether a finished slot should become the one that wants its first `n` tokens: else another had to go."""
        if source.pinned or source not in self.finished or self._free_id() is not None:
            return False
        return 2 * n >= source.n_cached or self._oldest() is source

    def doubt_shifted(self) -> None:
        """Trust no keys that were to be turned: a decode that failed may have turned some of them."""
        for slot in (*self.open, *self.finished):
            if slot.n_pure is not None:
                slot.forget_from(min(slot.n_pure, slot.n_cached))

    def doubt_all(self) -> None:
        """Trust checkpoints alone: a decode that failed may have moved any recurrent state, and not its numbers."""
        for slot in (*self.open, *self.finished):
            slot.settled, slot.doubtful = False, True
        self.unclean = True

    def clean(self) -> None:
        """Go back to checkpoints, and empty all other places of states.

        libllama means to zero them as it evaluates. Where that failed, it would begin a new sequence with what is left.
        """
        for slot in self.open:
            if slot.doubtful:
                slot.settle()
        self.tidy()
        holders = [slot.id for slot in (*self.open, *self.finished) if slot.n_cached]
        state = self._memory.read(holders[0], partial=True) if holders else None
        if state is None:
            self.forget_everything()
        else:  # a place that was taken and given back is empty
            free = [number for number in range(self._n_seq) if number not in holders]
            for sequence_id in free:
                self._memory.write(sequence_id, state, partial=True)
            for sequence_id in free:
                self._memory.remove(sequence_id, -1)
        self.unclean = False

    def find_prefix(self, slot: Slot) -> tuple[Slot | None, int]:
        """Return which other slot has most of this one's tokens cached, from the first, and how many."""
        best, n = None, slot.n_cached
        if not self._prefix_cache or not slot.settled or slot.n_pure is not None:
            return None, 0
        wanted = np.array(slot.tokens, np.int32)
        self.tidy()
        for other in (*self.open, *self.finished):
            other.settle()
            if other is not slot and (usable := other.n_usable(wanted, n)):
                best, n = other, usable
        return best, n

    def lacks(self, slot: Slot, wanted: int) -> int:
        """Return how many cells are missing for `wanted` tokens more, when all that may be dropped is dropped."""
        if not self._memory.can_share:
            self._memory.spare = 0
            return max(0, len(slot.tokens) + wanted - self._n_cells)
        over = self.used() + wanted - self._n_cells
        if over > 0:  # whatever is dropped
            return over
        while (over := count_cells([*self.open, *self.finished]) + wanted - self._n_cells) > 0:
            oldest = self._oldest()
            if oldest is None:
                return over
            self.drop(oldest)
        self._memory.spare = wanted - over
        return 0

    def used(self, slot: Slot | None = None) -> int:
        """Return how many cells hold, or wait for, the tokens of open and pinned sequences."""
        self.collect()
        if slot is not None and not self._memory.can_share:
            return len(slot.tokens)
        return count_cells([*self.open, *(old for old in self.finished if old.pinned)])

    def n_shared(self, slot: Slot, start: int) -> int:
        """Return how many of a slot's cells it shares, where any of those from `start` on is among them, else 0."""
        others = {run: 0 for run, _ in slot.pieces}
        for other in (*self.open, *self.finished):
            if other is not slot:
                for run, length in other.pieces:
                    if run in others:
                        others[run] = max(others[run], length)
        end, shared, reaches = 0, 0, False
        for run, length in slot.pieces:
            held = min(length, others[run])
            reaches |= held > 0 and end + held > start
            end, shared = end + length, shared + held
        return shared if reaches else 0

    def forget_everything(self) -> None:
        """Empty the memory: what open sequences hold is evaluated anew when it is asked for."""
        for slot in self.open:
            slot.forget_from(0)
        for slot in list(self.finished):
            self.drop(slot)
        self._memory.clear()

    def clear(self) -> None:
        """Drop every slot: the context is closing."""
        for slot in self.open:
            slot.closed = True
        self.open, self.finished = [], []


def count_cells(slots: list[Slot]) -> int:
    """Return how many cells the tokens of some slots take together."""
    runs: dict[int, int] = {}
    total = 0
    for slot in slots:
        total += len(slot.tokens)
        for run, length in slot.pieces:
            total -= length
            if length > runs.get(run, 0):  # a call of `max` takes longer than all the rest
                runs[run] = length
    return total + sum(runs.values())


def clipped(pieces: list[Piece], n: int) -> list[Piece]:
    """Return the pieces that hold the first `n` tokens of what these hold."""
    kept = []
    for run, length in pieces:
        if n > 0:
            kept.append((run, min(length, n)))
        n -= length
    return kept


def common_prefix(one: "array[int] | npt.NDArray[np.int32]", other: "array[int] | npt.NDArray[np.int32]") -> int:
    """Return how many tokens, from the first, two texts have in common."""
    n = min(len(one), len(other))
    differs = np.array(one[:n], np.int32) != np.array(other[:n], np.int32)
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n
