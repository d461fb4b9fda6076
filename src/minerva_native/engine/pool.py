"""The slots of a context: which are in use, which are kept as a prefix cache, and how many cells are free."""

import itertools
from array import array
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import SequencesInUseError
from .memory import Cells
from .slot import ReuseKey, Run, Slot, clipped, common_prefix

Ids = npt.NDArray[np.int32]


class Holder(Protocol):
    """What takes cells: tokens, some of them in runs that others may share."""

    @property
    def tokens(self) -> "array[int]":
        """The token ids."""

    @property
    def runs(self) -> list[Run]:
        """The shared runs that the first of them belong to."""


class SlotPool:
    """The slots of a context.

    Attributes:
        open: the slots of sequences in use.
        finished: what closed sequences have left, least recently used first.
        key: what is evaluated now depends on, besides the tokens.
        spare: how many more tokens are known to find cells; below 0, that has to be counted again.
        is_shift_pending: whether the next decode rotates keys to their new positions.
        is_unclean: whether a failed decode may have left states that no slot holds.
    """

    def __init__(self, cells: Cells, n_cells: int, n_seq: int, prefix_cache: bool):
        self._cells = cells
        self._n_cells, self._n_seq = n_cells, n_seq
        self._prefix_cache = prefix_cache
        self._run_numbers = itertools.count()
        self.open: list[Slot] = []
        self.finished: list[Slot] = []
        self.key = ReuseKey()
        self.spare = -1
        self.is_shift_pending = False
        self.is_unclean = False

    def recount(self) -> None:
        """Have the free cells counted again: some that were shared may have to be re-evaluated."""
        self.spare = -1

    # Places

    @property
    def n_open(self) -> int:
        """How many sequences are in use."""
        return sum(not slot.is_abandoned for slot in self.open)

    @property
    def has_place(self) -> bool:
        """Whether another sequence can be opened."""
        abandoned = sum(slot.pinned for slot in self.open if slot.is_abandoned)
        return self.n_open + abandoned + sum(slot.pinned for slot in self.finished) < self._n_seq

    def new(self) -> Slot:
        """Return a new empty slot; raise `SequencesInUseError` if all places are taken."""
        self.collect()
        if not self.has_place:
            raise self._no_place()
        return self.new_for_cache()

    def new_for_cache(self) -> Slot:
        """Return a new empty slot that no sequence is made of: it takes a place only once it has an id."""
        slot = self._new_slot()
        self.open.append(slot)
        return slot

    def _new_slot(self) -> Slot:
        return Slot(self._cells, self.key, self.recount)

    def collect(self) -> None:
        """Release the slots whose sequence was never closed, and is gone."""
        for slot in list(self.open):
            if slot.is_abandoned:
                if slot.row is not None:  # reading them now may be in the middle of anything
                    slot.forget_logits()
                self.release(slot)

    def remove_strays(self) -> bool:
        """Free the cells that an interrupt has left under ids which no slot has; return whether there may be any."""
        strays = {*range(self._n_seq), self._cells.scratch_id} - {slot.id for slot in (*self.open, *self.finished)}
        for sequence_id in strays:
            self._cells.remove(sequence_id, -1)
        return bool(strays)

    def place(self, slot: Slot) -> None:
        """Give a slot a sequence id, if it has none: a free one, or that of the finished slot to evict first."""
        if slot.id >= 0:
            return
        sequence_id = self._free_id()
        if sequence_id is None:
            oldest = self._oldest()
            if oldest is None:
                raise self._no_place()
            sequence_id = oldest.id
            self.drop(oldest)
        slot.place(sequence_id)

    def _free_id(self) -> int | None:
        used = {slot.id for slot in (*self.open, *self.finished)}
        return next((number for number in range(self._n_seq) if number not in used), None)

    def _no_place(self) -> SequencesInUseError:
        return SequencesInUseError(
            f"all {self._n_seq} sequences of this context are in use: close one, or make a context with more room, "
            f"such as n_seq={self._n_seq + 1}"
        )

    def release(self, slot: Slot) -> None:
        """Take a slot out of use: what it holds stays as long as there is room for it."""
        slot.settle()
        self._take_out(slot)
        if self._prefix_cache:
            self.keep(slot)
        else:
            self.drop(slot)

    def discard(self, slot: Slot) -> None:
        """Take a slot out of use that was just made, without leaving anything."""
        self._take_out(slot)
        self.drop(slot)

    def _take_out(self, slot: Slot) -> None:
        slot.close()
        if slot in self.open:
            self.open.remove(slot)

    def clear(self) -> None:
        """Close every slot: the context is closing."""
        for slot in self.open:
            slot.close()
        self.open, self.finished = [], []

    # The prefix cache

    def keep(self, slot: Slot) -> None:
        """Put a slot among the finished ones, unless it adds nothing to them; drop those that add nothing to it."""
        self.tidy()
        if not slot.n_cached:
            self.drop(slot)
            return
        tokens = np.array(slot.tokens, np.int32)
        for old in list(self.finished):
            if old.key != slot.key:
                continue
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
            if slot.n_waiting:
                slot.cut(slot.n_cached)
            if not slot.n_cached:
                self.drop(slot)

    def drop(self, slot: Slot) -> None:
        """Free a slot's cells and its id."""
        if slot in self.finished:
            self.finished.remove(slot)
        slot.vacate()

    def clear_finished(self, pinned: bool = False) -> None:
        """Drop what closed sequences have left, pinned ones only if asked to."""
        self.collect()
        for slot in list(self.finished):
            if pinned or not slot.pinned:
                self.drop(slot)

    def _oldest(self) -> Slot | None:
        """Return the finished slot to evict first."""
        return next((old for old in self.finished if not old.pinned), None)

    def n_cached(self, wanted: Ids) -> int:
        """Return how many of some tokens, from the first, a slot has cached."""
        n = 0
        self.tidy()
        for slot in (*self.open, *self.finished):
            slot.settle()
            if slot.key == self.key:
                n = max(n, slot.n_usable(wanted, n))
        return n

    def find_prefix(self, slot: Slot) -> tuple[Slot | None, int]:
        """Return which other slot has most of this one's tokens cached, from the first, and how many."""
        best, n = None, slot.n_cached
        if not self._prefix_cache or not slot.in_sync or slot.n_exact is not None:
            return None, 0
        wanted = np.array(slot.tokens, np.int32)
        self.tidy()
        for other in (*self.open, *self.finished):
            other.settle()
            if other is not slot and other.key == slot.key and (usable := other.n_usable(wanted, n)):
                best, n = other, usable
        return best, n

    def share(self, source: Slot, slot: Slot, n: int) -> None:
        """Let a slot hold the first `n` cached tokens of another instead of what it has; its list has them already."""
        whole = n == source.n_cached == len(source.tokens) == len(slot.tokens)
        logits = source.logits if whole else None
        slot.rollback(0)
        if source in self.finished:  # it is used: the last to be evicted from now on
            self.finished.remove(source)
            self.finished.append(source)
        if slot.id < 0 and self._is_better_taken(source, n):
            self.finished.remove(source)
            slot.take(source, n)
        else:
            self.place(slot)
            slot.share(source, n, self._run_numbers.__next__)
        if slot.n_cached == n:
            slot.take_logits(logits)

    def _is_better_taken(self, source: Slot, n: int) -> bool:
        """Return whether a finished slot should become the one that wants its first `n` tokens: else another has to go.

        So it is if no id is free, and either most of it is wanted or it would be evicted first.
        """
        if source.pinned or source not in self.finished or self._free_id() is not None:
            return False
        return 2 * n >= source.n_cached or self._oldest() is source

    def part(self, slot: Slot) -> Slot | None:
        """Move what an open slot has cached to a finished one, and return that; its list then waits to be evaluated.

        Return None if there is nothing to move, or no prefix cache: then nothing has changed.
        """
        if not self._prefix_cache or not slot.in_sync or not slot.n_cached:
            return None
        kept = self._new_slot()
        kept.add(np.array(slot.tokens[: slot.n_cached], np.int32))
        logits = slot.logits if not slot.n_waiting else None
        slot.forget_logits()
        kept.take(slot, slot.n_cached)
        kept.take_logits(logits)
        kept.close()
        self.keep(kept)
        self.recount()
        return kept

    def take_back(self, slot: Slot, kept: Slot | None, tokens: "array[int]") -> None:
        """Give a slot the list that it had, and undo `part` as far as the cells are still there."""
        n = 0 if kept is not None else common_prefix(slot.tokens, tokens)
        slot.cut(n)
        slot.add(np.array(tokens[n:], np.int32))
        self.recount()
        if kept is not None and kept in self.finished and kept.key == slot.key:
            self.finished.remove(kept)
            logits = kept.logits
            slot.take(kept, kept.n_cached)
            slot.take_logits(logits if not slot.n_waiting else None)

    # Cells

    def reserve(self, slot: Slot, wanted: int) -> int:
        """Have cells for `wanted` more tokens, evicting finished slots if need be; return how many are lacking.

        Nothing is evicted if that would not be enough.
        """
        if not self._cells.facts.can_share:
            self.spare = 0
            return max(0, len(slot.tokens) + wanted - self._n_cells)
        self.collect()
        over = self.used() + wanted - self._n_cells
        if over > 0:  # whatever is evicted
            return over
        while (over := count_cells([*self.open, *self.finished]) + wanted - self._n_cells) > 0:
            oldest = self._oldest()
            if oldest is None:
                return over
            self.drop(oldest)
        self.spare = wanted - over
        return 0

    def used(self, slot: Slot | None = None) -> int:
        """Return how many cells hold, or wait for, the tokens of open and pinned sequences.

        With a slot, those that it has to share the room with: if each has cells of its own, only its own.
        """
        if slot is not None and not self._cells.facts.can_share:
            return len(slot.tokens)
        return count_cells([held for held in (*self.open, *self.finished) if held.pinned or self._is_in_use(held)])

    def _is_in_use(self, slot: Slot) -> bool:
        return not slot.closed and not slot.is_abandoned

    def used_after_cut(self, slot: Slot, n: int) -> int:
        """Return how many cells a slot would share the room with, itself included, if it were cut to `n` tokens."""
        if not self._cells.facts.can_share:
            return n
        self.collect()
        cut = _Cut(slot.tokens[:n], clipped(slot.runs, n))
        return count_cells([*(other for other in self.open if other is not slot), cut])

    def n_shared(self, slot: Slot, start: int) -> int:
        """Return how many of a slot's cells it shares, if any of those from `start` on is among them, else 0."""
        others = {run: 0 for run, _ in slot.runs}
        for other in (*self.open, *self.finished):
            if other is not slot:
                for run, length in other.runs:
                    if run in others:
                        others[run] = max(others[run], length)
        end, shared, reaches = 0, 0, False
        for run, length in slot.runs:
            held = min(length, others[run])
            reaches |= held > 0 and end + held > start
            end, shared = end + length, shared + held
        return shared if reaches else 0

    # After failures

    def doubt_shifted(self) -> None:
        """Trust no keys that were to be rotated: a decode that failed may have rotated some of them."""
        for slot in (*self.open, *self.finished):
            if slot.n_exact is not None:
                slot.rollback(min(slot.n_exact, slot.n_cached))

    def doubt_all(self) -> None:
        """Trust checkpoints alone: a decode that failed may have moved any recurrent state, and not its numbers."""
        for slot in (*self.open, *self.finished):
            slot.doubt()
        self.is_unclean = True

    def distrust(self, key: ReuseKey) -> None:
        """Trust nothing, and have what is evaluated from now on depend on something else."""
        self.key = key
        for slot in (*self.open, *self.finished):
            slot.distrust(key)

    def clean(self) -> None:
        """Go back to checkpoints, and empty all other places of states.

        libllama means to zero them as it evaluates. If that failed, it would begin a new sequence with what is left.
        """
        for slot in self.open:
            if slot.is_doubtful:
                slot.settle()
        self.tidy()
        holders = [slot.id for slot in (*self.open, *self.finished) if slot.n_cached]
        state = self._cells.read(holders[0], partial=True) if holders else None
        if state is None:
            self.forget_everything()
        else:  # a place that was taken and given back is empty
            free = [number for number in range(self._n_seq) if number not in holders]
            for sequence_id in free:
                self._cells.write(sequence_id, state, partial=True)
            for sequence_id in free:
                self._cells.remove(sequence_id, -1)
        self.is_unclean = False

    def forget_everything(self) -> None:
        """Empty the memory: what open sequences hold is re-evaluated when it is asked for."""
        for slot in self.open:
            slot.rollback(0)
        for slot in list(self.finished):
            self.drop(slot)
        self._cells.clear()

    def rekey(self, key: ReuseKey) -> None:
        """Have what is evaluated from now on depend on something else; what is cached stays under the old key."""
        if key == self.key:
            return
        for slot in self.open:
            if self.part(slot) is None:
                slot.rollback(0)
            slot.rekey(key)
        self.key = key


class _Cut:
    """What a slot would take if it were cut."""

    def __init__(self, tokens: "array[int]", runs: list[Run]):
        self.tokens, self.runs = tokens, runs


def count_cells(holders: Iterable[Holder]) -> int:
    """Return how many cells the tokens of some slots take together."""
    runs: dict[int, int] = {}
    total = 0
    for holder in holders:
        total += len(holder.tokens)
        for run, length in holder.runs:
            total -= length
            if length > runs.get(run, 0):  # a call of `max` takes longer than all the rest
                runs[run] = length
    return total + sum(runs.values())
