"""Slots: libllama's sequence ids, each with its tokens and what of them the KV cache holds."""

import weakref
from array import array
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ClosedError
from .memory import Cells, State

Logits = npt.NDArray[np.float32]

Run = tuple[int, int]
"""A run of cells that several slots may share: its number, and how many of them, from the first, this slot holds."""


class ReuseKey(NamedTuple):
    """What keys and values depend on besides tokens and positions. Cells are reused only between equal keys.

    Attributes:
        encoded: the text that an encoder has read.
        adapters: LoRA adapters and their scales, as (fingerprint, scale).
        control_vector: a fingerprint of the control vector.
        raw: a number no other key has, after the caller held libllama's pointer and may have changed anything.
    """

    encoded: tuple[int, ...] | None = None
    adapters: tuple[tuple[str, float], ...] = ()
    control_vector: str | None = None
    raw: str | None = None


class Checkpoint(NamedTuple):
    """The state after the first `n` tokens, and the logits there if they were known.

    A passing one is kept until the next of its kind.
    """

    n: int
    state: State
    logits: Logits | None
    is_passing: bool = False


class Mark(NamedTuple):
    """What a slot was, to come back to when a call fails.

    Attributes:
        n: the length of its list; None if the slot did not exist.
        tokens: its list, if the call may change more than add to it.
        logits: its logits, if they were read.
        row: where its logits lay in libllama's buffer,
        n_calls: and how many calls of libllama's there had been: with the next, they lie there no more.
        n_cuts: see `Slot`: if it has changed, a callback has made the list another one, which is left alone.
    """

    n: int | None
    tokens: "array[int] | None"
    logits: Logits | None
    row: int | None
    n_calls: int
    n_cuts: int


def _nobody_yet() -> object:
    return _nobody_yet


class Slot:
    """A list of tokens, how many of them are in the KV cache, and under which sequence id.

    Invariant: libllama holds at least the first `n_cached` tokens under `id`. A signal handler may raise anywhere, so
    it may hold more; then `in_sync` is False until `rollback` has removed what is too much. What is computed goes
    `begin`, libllama's call, `commit`; if anything fails between them, the next use rolls back.

    Only the methods of this class change a slot.

    Attributes:
        id: libllama's sequence id; -1 before anything is evaluated.
        tokens: the list. It may be ahead of the cache, never behind.
        n_cached: how many tokens, from the first, the cache holds.
        n_seen: how many tokens, from the first, were evaluated at some time.
        n_exact: after a shift, how many of the cached tokens are as a fresh evaluation would leave them; else None.
        in_sync: whether the cache holds exactly `n_cached` tokens.
        logits: the logits after the last token, if they are known and read.
        row: the row of libllama's buffer that has them, if they are known and nobody else evaluated since; -1 is the
            last row.
        runs: the shared runs that its first cells belong to; the cells after them are its own.
        checkpoints: states to go back to, by rising `n`.
        key: what the cells depend on besides the tokens.
        n_cuts: how often tokens were taken out of the list, or what they mean changed.
        pinned: whether the cells stay when the sequence is closed.
        closed: whether the sequence was closed.
        owner: gives the sequence, or None once nobody refers to it.
    """

    def __init__(self, cells: Cells, key: ReuseKey, on_rollback: Callable[[], None]):
        self._cells = cells
        self._on_rollback = on_rollback
        self._is_doubtful = False
        self.id = -1
        self.tokens = array("i")
        self.n_cached = 0
        self.n_seen = 0
        self.n_exact: int | None = None
        self.in_sync = True
        self.logits: Logits | None = None
        self.row: int | None = None
        self.runs: list[Run] = []
        self.checkpoints: list[Checkpoint] = []
        self.key = key
        self.pinned = False
        self.n_cuts = 0
        self.closed = False
        self.owner: Callable[[], object] | None = _nobody_yet

    def check_open(self) -> None:
        """Raise `ClosedError` if the sequence was closed, also by a callback during the call."""
        if self.closed:
            raise ClosedError("this Sequence is closed")

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody can use the sequence any more, although it was never released."""
        return self.owner is None or self.owner() is None

    @property
    def n_waiting(self) -> int:
        """How many tokens wait to be evaluated."""
        return len(self.tokens) - self.n_cached

    @property
    def has_logits(self) -> bool:
        """Whether the logits after the last token are known."""
        return self.row is not None or self.logits is not None

    # The life of a slot

    def belong_to(self, sequence: object) -> None:
        """Note whose slot this is, without keeping it alive."""
        self.owner = weakref.ref(sequence)

    def pin(self, pinned: bool) -> None:
        """Set whether the cells stay when the sequence is closed."""
        self.pinned = pinned

    def abandon(self) -> None:
        """Close, from a finaliser during another call: the pool takes the slot back later."""
        self.closed, self.owner = True, None

    def close(self) -> None:
        """Close; what is not cached is no part of the list any more. The sequence keeps the list that it had."""
        self.closed = True
        self.tokens = self.tokens[: self.n_cached]

    # The list

    def mark(self, n_calls: int, whole: bool = False) -> Mark:
        """Return what the slot is; `whole` if the call may change more of the list than add to it."""
        return Mark(len(self.tokens), self.tokens[:] if whole else None, self.logits, self.row, n_calls, self.n_cuts)

    def append(self, token: int) -> None:
        """Add a token to the list."""
        self.logits = self.row = None
        self.tokens.append(token)

    def add(self, tokens: npt.NDArray[np.int32]) -> None:
        """Add tokens to the list."""
        self.logits = self.row = None
        self.tokens.frombytes(tokens.tobytes())

    def cut(self, n: int) -> None:
        """Make list and cache end after the first `n` tokens."""
        self.forget_logits()
        self.n_cuts += 1
        agree = self.in_sync and n >= self.n_cached
        self.in_sync = False
        self.n_cached, self.n_seen = min(n, self.n_cached), min(n, self.n_seen)
        self._keep_checkpoints(n)
        del self.tokens[n:]
        if agree:
            self.in_sync = True
        else:
            self.rollback()

    def remove(self, keep: int, discard: int) -> None:
        """Take tokens after the first `keep` out of the list, none of which is cached; the cache holds no more."""
        rest = self.tokens[keep + discard :]
        self.cut(keep)
        self.tokens.extend(rest)
        self.n_seen = self.n_cached

    # The cache

    def begin(self) -> None:
        """Note that libllama is about to evaluate more tokens under this id; the logits are not of the last token."""
        self.in_sync = False
        self.logits = self.row = None

    def commit(self, n_cached: int, row: int | None = None, token: int | None = None) -> int:
        """Note that the cache now holds `n_cached` tokens; return how many of them were evaluated again.

        `row`: where the logits of the last one are, if it is the last of the list. `token`: one that was evaluated
        before it was in the list, and now is.
        """
        n_again = 0
        if token is not None:
            self.tokens.append(token)
        if self.n_seen > self.n_cached:
            n_again = min(self.n_seen, n_cached) - self.n_cached
        if self.n_seen < n_cached:
            self.n_seen = n_cached
        self.n_cached = n_cached
        self.row = row
        self.in_sync = True
        return n_again

    def rollback(self, n: int | None = None) -> None:
        """Have the cache hold the first `n` tokens, by default as many as are cached, and be in sync again.

        If the memory cannot be cut there, it holds those up to the checkpoint before, or none.
        """
        n = self.n_cached if n is None else n
        self.in_sync = False
        self._on_rollback()
        self.forget_logits()
        self.n_cached = n if self.id >= 0 else 0  # before cells go: an interrupt finds no fewer than are noted
        if self.id >= 0 and (self._is_doubtful or not self._cells.cut(self.id, n)):
            self._return_to_checkpoint(n)
        self._is_doubtful = False
        self.runs = clipped(self.runs, self.n_cached)
        if self.n_exact is not None and self.n_exact >= self.n_cached:
            self._keep_checkpoints(self.n_exact)
            self.n_exact = None
        self.in_sync = True

    def settle(self) -> None:
        """Roll back if list and cache may not agree."""
        if not self.in_sync:
            self.rollback()

    def doubt(self) -> None:
        """Trust checkpoints alone: a decode that failed may have changed the state."""
        self.in_sync, self._is_doubtful = False, True

    def distrust(self, key: ReuseKey) -> None:
        """Trust neither cells nor checkpoints, and depend on something else from now on."""
        self.begin()
        self.doubt()
        self.checkpoints, self.key = [], key

    @property
    def is_doubtful(self) -> bool:
        """Whether only checkpoints are to be trusted."""
        return self._is_doubtful

    def _return_to_checkpoint(self, n: int) -> None:
        for checkpoint in reversed(self.checkpoints):
            if checkpoint.n <= n:
                self.n_cached = checkpoint.n
                self._cells.remove(self.id, checkpoint.n)  # of a hybrid this fails: it is cut after the state is back
                if not self._cells.write(self.id, checkpoint.state, partial=True) and self._cells.cut(
                    self.id, checkpoint.n
                ):
                    return
        self.n_cached = 0
        self._cells.remove(self.id, -1)

    def _keep_checkpoints(self, n: int) -> None:
        """Drop the checkpoints after the first `n` tokens."""
        self.checkpoints = [checkpoint for checkpoint in self.checkpoints if checkpoint.n <= n]

    # Ids and cells of others

    def place(self, sequence_id: int) -> None:
        """Take a sequence id that nobody has; anything left under it is forgotten."""
        self._cells.remove(sequence_id, -1)
        self.id = sequence_id

    def vacate(self) -> None:
        """Give id and cells up."""
        sequence_id, self.id = self.id, -1
        self.forget_logits()
        self.n_cached, self.runs, self.checkpoints = 0, [], []
        if sequence_id >= 0:
            self._cells.remove(sequence_id, -1)

    def take(self, other: "Slot", n: int) -> None:
        """Take over another slot's cells, to hold its first `n` tokens; this slot has none, and its list has those."""
        held, n_exact, runs, checkpoints = other.n_cached, other.n_exact, other.runs, other.checkpoints
        self.in_sync = other.in_sync = False
        other.n_cached, other.n_exact, other.runs, other.checkpoints = 0, None, [], []
        sequence_id, other.id = other.id, -1
        self.id, self.runs, self.key = sequence_id, runs, other.key
        self._hold(held, n, n_exact, checkpoints)
        other.in_sync = True

    def share(self, source: "Slot", n: int, new_run: Callable[[], int]) -> None:
        """Hold the first `n` cached tokens of another slot, whose list this one has; this slot has an id and no cells.

        `new_run` gives the number of a run, if the source's own cells are shared for the first time.
        """
        self.in_sync = False
        if self._cells.facts.can_share:
            held = sum(length for _, length in source.runs)
            if n > held:
                source.runs = [*source.runs, (new_run(), n - held)]
            self.runs = source.runs
        if self._cells.copy(source.id, self.id):
            self.key = source.key
            self._hold(source.n_cached, n, source.n_exact, source.checkpoints)
        else:
            self.rollback(0)

    def _hold(self, held: int, n: int, n_exact: int | None, checkpoints: list[Checkpoint]) -> None:
        """Note that the cache holds `held` tokens, of which the first `n` are this list's: forget the others."""
        self.n_exact, self.checkpoints = n_exact, [checkpoint for checkpoint in checkpoints if checkpoint.n <= n]
        if n < held:
            self.rollback(n)
        else:
            self.n_cached, self.in_sync = n, True
        self.n_seen = max(self.n_seen, n)

    def rekey(self, key: ReuseKey) -> None:
        """Depend on something else from now on: the slot holds no cells."""
        self.key = key
        self.n_cuts += 1

    def rewrite(self, state: State) -> str:
        """Hold the same tokens in cells that nobody shares, from a state that was read; return why not, or nothing."""
        n, n_exact, checkpoints, logits = self.n_cached, self.n_exact, self.checkpoints, self.logits
        self.rollback(0)
        self.begin()
        if reason := self._cells.write(self.id, state):
            self.rollback(0)
            return reason
        self.n_exact, self.checkpoints, self.n_cached = n_exact, checkpoints, n
        self.logits, self.in_sync = logits, True
        return ""

    def read_back(self, state: State, n_cached: int, n_exact: int | None) -> str:
        """Hold what a saved state has of the list; return why it cannot be, or nothing."""
        self.begin()
        if reason := self._cells.write(self.id, state, check=True):
            return reason
        if not self._cells.is_whole(self.id, n_cached):
            return "its positions are not its tokens"
        self.n_cached = self.n_seen = n_cached
        self.n_exact, self.in_sync = n_exact, True
        return ""

    def part(self, start: int, stop: int) -> State | None:
        """Return the state of the cached tokens from `start` to `stop`; None if some of it is gone."""
        self.doubt()
        state = self._cells.read_part(self.id, start, stop)
        self.in_sync, self._is_doubtful = True, False
        return state

    def add_part(self, state: State, start: int, stop: int) -> str:
        """Hold more of the list, from a saved state of the tokens from `start` to `stop`; return why not, or nothing.

        At least those before `start` are cached.
        """
        self.begin()
        n = min(stop, len(self.tokens))
        if n > self.n_cached and (reason := self._cells.write_part(self.id, state, self.n_cached, start, stop, n)):
            return reason
        self.n_cached = self.n_seen = max(n, self.n_cached)
        self.in_sync = True
        return ""

    def take_checkpoints(self, checkpoints: list[Checkpoint]) -> None:
        """Take over the checkpoints that were saved with the state."""
        self.checkpoints = checkpoints

    def shift(self, keep: int, discard: int) -> bool:
        """Discard cached tokens after the first `keep`, and move those after them up; the cells are its own.

        Return False if tokens would come into a window again that are gone: then only the first `keep` are cached.
        """
        n, logits, row = self.n_cached, self.logits, self.row
        n_exact = keep if self.n_exact is None else min(keep, self.n_exact)
        self.in_sync, self.n_cached = False, keep
        self.n_cuts += 1
        self._keep_checkpoints(n_exact)
        del self.tokens[keep : keep + discard]
        if not self._cells.shift(self.id, n, keep, discard):
            self.rollback(keep)
            self.n_seen = self.n_cached
            return False
        self.n_exact, self.runs = n_exact, clipped(self.runs, keep)
        self.n_cached = self.n_seen = n - discard
        self.logits, self.row, self.in_sync = logits, row, True
        return True

    # Logits and checkpoints

    def forget_logits(self) -> None:
        """Drop the logits: the last token is about to be another."""
        self.logits = self.row = None

    def keep_logits(self, logits: Logits) -> None:
        """Hold the logits after the last token, which libllama's buffer is about to lose."""
        self.logits, self.row = logits, None

    def take_logits(self, logits: Logits | None, row: int | None = None) -> None:
        """Have the logits that were known before, if they were: the last token is the same again."""
        self.logits, self.row = logits, row

    def recall_logits(self) -> None:
        """Take the logits after the last token from a checkpoint, if there is one and the cache is there."""
        last = self.checkpoints[-1] if self.checkpoints else None
        if not self.has_logits and last and last.n == self.n_cached == len(self.tokens):
            self.logits = last.logits

    def checkpoint(self, stride: int, max_bytes: int, is_passing: bool = False) -> None:
        """Keep the state, unless one within `stride` tokens is kept; of too many, drop the most crowded one."""
        lasting = [checkpoint for checkpoint in self.checkpoints if not checkpoint.is_passing]
        known = self.checkpoints if is_passing else lasting
        if self.n_cached - (known[-1].n if known else 0) < stride:
            return
        state = self._cells.read(self.id, partial=True)
        if state is None or state.size > max_bytes:
            return
        kept = [*(lasting if is_passing else self.checkpoints)]
        kept.append(Checkpoint(self.n_cached, state, self.logits, is_passing))
        while sum(checkpoint.state.size for checkpoint in kept) > max_bytes:
            starts = [0, *(checkpoint.n for checkpoint in kept)]
            gaps = [after - before for before, after in zip(starts[:-2], starts[2:], strict=True)]
            del kept[min(range(len(gaps)), key=gaps.__getitem__) if gaps else 0]
        self.checkpoints = kept

    def n_usable(self, wanted: npt.NDArray[np.int32], at_least: int) -> int:
        """Return how many of the wanted tokens, from the first, this slot has cached; 0 if not over `at_least`."""
        limit = min(len(wanted), self.n_cached if self.n_exact is None else self.n_exact)
        if limit <= at_least or self.tokens[at_least] != wanted[at_least]:
            return 0
        n = common_prefix(self.tokens[:limit], wanted)
        if not self._cells.facts.can_truncate and n < self.n_cached:
            n = max((checkpoint.n for checkpoint in self.checkpoints if checkpoint.n <= n), default=0)
        elif n < self.n_cached and not self._cells.has_beginning(self.id, n):
            return 0
        return n if n > at_least else 0


def clipped(runs: list[Run], n: int) -> list[Run]:
    """Return the runs that hold the first `n` tokens of what these hold."""
    kept = []
    for run, length in runs:
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
