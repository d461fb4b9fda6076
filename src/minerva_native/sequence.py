"""A sequence: a list of tokens that happens to be evaluated."""

import logging
import operator
import os
import weakref
from array import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as AbstractSequence
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self, overload

import numpy as np
import numpy.typing as npt

from .errors import ContextError
from .sampling import logprob
from .slot import Before, Slot, clipped, common_prefix
from .tokenizer import TokenIds

if TYPE_CHECKING:
    from .context import Context

_logger = logging.getLogger("minerva_native")

_SCORE_BYTES = 64 << 20  # how much libllama's logits buffer may take while a text is scored


class Sequence(AbstractSequence[int]):
    """Tokens and, in the context's KV cache, their keys and values; make one with `Context.sequence`.

    It reads like a list of token ids: indices, slices, `in`, equality with lists and other sequences. The KV cache may
    lag behind the list (after `append`) but never contradicts it: what is missing is evaluated when logits are asked
    for. What another sequence of the context has cached, open or closed, is not evaluated again.
    A context manager, safe to use from any thread.
    """

    def __init__(self, context: "Context", slot: Slot):
        self.context = context
        self._slot = slot
        self._tokens = slot.tokens
        slot.owner = weakref.ref(self)

    # Reading

    @property
    def tokens(self) -> "Tokens":
        """The token ids, as a live read-only view that costs nothing to take."""
        return Tokens(self._tokens)

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """The logits after the last token: float32, shape (n_vocab,), a copy of your own.

        After `truncate` or `rewind` the last token is evaluated again to have them, which `Context.stats` counts.
        Raises `ContextError` where the sequence is empty.
        """
        context, slot = self.context, self._slot
        with context._entry():
            slot.check_open()
            if slot.unread:
                return context._read_logits(slot.row)
            if slot.logits is None:
                if len(self._tokens) - slot.n_cached == 1 and slot.settled and slot.id >= 0 <= context.memory.spare:
                    context._begin()
                    context._decode_one(slot)
                    return context._read_logits()
                self._find_logits()
            return self._copied_logits()

    def _copied_logits(self) -> npt.NDArray[np.float32]:
        """Copy the logits, which are known, so that no caller can write into what forks and checkpoints rely on."""
        slot = self._slot
        if slot.unread:
            return self.context._read_logits(slot.row)
        assert slot.logits is not None
        return np.array(slot.logits)

    def _find_logits(self) -> None:
        """Have the logits, by the least work that gives them."""
        context, slot = self.context, self._slot
        slot.settle()
        context.stats.tokens_reused += context._attach_prefix(slot)
        if slot.logits is None:
            slot.logits = slot.at_checkpoint()
        if slot.logits is None:
            context._evaluate([slot])

    @property
    def is_full(self) -> bool:
        """Whether one token more would raise `ContextFullError`."""
        context = self.context
        if context.memory.spare > 0 or context.on_full != "error":
            return False
        with context._entry():
            return not self.closed and context._pool.used(self._slot) >= context.n_cells

    @property
    def size_bytes(self) -> int:
        """How many bytes the keys, values and states of what is evaluated take (`llama_state_seq_get_size`)."""
        context, slot = self.context, self._slot
        with context._entry(), context._handle:
            slot.check_open()
            slot.settle()
            return context.memory.size_bytes(slot.id) if slot.n_cached else 0

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self.tokens[index]

    def __eq__(self, other: object) -> bool:
        return self.tokens == (other.tokens if isinstance(other, Sequence) else other)

    __hash__ = object.__hash__  # by identity: a sequence that grows stays the same key

    # Growing

    def append(self, token: int) -> None:
        """Add one token without evaluating it yet: that happens when logits are asked for, or with the next `extend`.

        Raises `TypeError` or `ValueError` for what is no token id, `ContextFullError` where no cell is free.
        """
        context = self.context
        with context._entry():
            self._slot.check_open()
            token = context.model.tokenizer.check(token)
            memory, slot = context.memory, self._slot
            if memory.spare <= 0:
                self._make_room(1)
            memory.spare = max(0, memory.spare - 1)
            slot.logits, slot.unread = None, False
            self._tokens.append(token)

    def extend(self, ids: TokenIds, on_progress: Callable[[int, int], object] | None = None) -> int:
        """Add tokens and evaluate them in chunks of `n_batch`; return how many were evaluated.

        `on_progress` is called after each chunk with the tokens done and the tokens in all. Raises `TypeError` or
        `ValueError` for what is no token id, `ContextFullError` where they do not fit; whatever is raised, the
        sequence is as it was before, or as `on_full` has made it.
        """
        context, slot = self.context, self._slot
        with context._entry():
            slot.check_open()
            if (
                on_progress is None
                and type(ids) is list
                and len(ids) == 1
                and type(ids[0]) is int
                and 0 <= ids[0] < context._n_vocab
                and context.memory.spare > 0
                and slot.n_cached == len(self._tokens)
                and slot.settled
                and slot.id >= 0
            ):
                return self._extend_by_one(ids[0])
            with context._handle:
                new = context.model.tokenizer.as_array(ids)
                return self._extend(new, on_progress) if new.size else 0

    def _extend_by_one(self, token: int) -> int:
        """`extend` by a token that finds a cell, at the least cost: after each token, all code is cold again."""
        context, slot = self.context, self._slot
        context.memory.spare -= 1
        slot.logits, slot.unread = None, False
        self._tokens.append(token)
        try:
            if context._was_cancelled:
                context._begin()
            context._decode_one(slot)
        except BaseException:
            slot.cut(len(self._tokens) - 1)
            raise
        return 1

    def assign(self, ids: TokenIds, on_progress: Callable[[int, int], object] | None = None) -> int:
        """Make the sequence these tokens, evaluating only what is not cached already; return how many that were.

        Kept is the longest beginning that it has in common with them, or that another sequence has, open or closed.
        What is given up stays in the prefix cache while there is room, so that switching back costs nothing.
        Raises what `extend` does, also where `on_full="shift"`: what is kept would not be those tokens. Whatever is
        raised, the tokens are as they were before.
        """
        context, slot = self.context, self._slot
        with context._entry(), context._handle:
            slot.check_open()
            new = context.model.tokenizer.as_array(ids)
            before = self._tokens[:]
            n, given_up = common_prefix(before, new), None
            slot.settle()
            context._keep_logits(slot)
            try:
                if n < len(before):
                    if not context.prefix_cache and context._pool.cells_after(slot, n) + len(new) - n > context.n_cells:
                        raise context._full(len(new), slot)
                    given_up = context._pool.give_up(slot, n)
                kept = len(self._tokens)
                context.stats.tokens_reused += min(kept, slot.n_cached)
                return self._extend(new[kept:], on_progress, exactly=True) if kept < len(new) else 0
            except BaseException:
                if given_up is not None:
                    context._pool.take_back(slot, given_up, before)
                elif self._tokens != before:
                    n = common_prefix(before, self._tokens)
                    slot.cut(n)
                    slot.add(np.array(before[n:], np.int32))
                raise

    def score(self, ids: TokenIds) -> npt.NDArray[np.float32]:
        """Add tokens as `extend` does, and return the log-probability of each given all before it.

        float32, shape (len(ids),), natural logarithm. In an empty sequence the first token has nothing before it: its
        entry is NaN.
        """
        context, slot = self.context, self._slot
        with context._entry(), context._handle:
            slot.check_open()
            new = context.model.tokenizer.as_array(ids)
            scores = np.empty(len(new), np.float32)
            if not new.size:
                return scores
            slot.settle()
            if slot.n_cached < len(self._tokens):  # an interrupt may have left logits alone
                slot.forget_logits()
            if context.memory.spare < len(new):
                self._make_room(len(new))
            scores[0] = np.nan
            if self._tokens:
                if not slot.unread and slot.logits is None:
                    self._find_logits()
                scores[0] = logprob(self._copied_logits(), int(new[0]))
            if context.memory.spare < len(new):  # the last token may have taken a cell of its own
                self._make_room(len(new), exactly=True)
            rows = max(1, min(context._stride, _SCORE_BYTES // (4 * context._n_vocab)))
            context._begin()
            context._pool.place(slot)
            length = len(self._tokens)
            try:
                for start in range(0, len(new), rows):
                    chunk = new[start : start + rows]
                    slot.add(chunk)
                    slot.settled = False
                    context._decode(slot, chunk, all_logits=True)
                    slot.settled = True
                    following = new[start + 1 : start + 1 + len(chunk)]
                    for row, token in enumerate(following.tolist()):
                        scores[start + 1 + row] = logprob(context._read_logits(row), token)
            except BaseException:
                slot.cut(length)
                raise
            context._unread, slot.row, slot.unread = (slot,), -1, True
            return scores

    # Shrinking

    def truncate(self, n: int) -> None:
        """Keep the first `n` tokens, and forget the rest. Raises `ValueError` unless 0 <= n <= len."""
        with self.context._entry():
            self._slot.check_open()
            n = operator.index(n)
            if not 0 <= n <= len(self._tokens):
                raise ValueError(f"n must be from 0 to the sequence's length {len(self._tokens)}, not {n}")
            if n < len(self._tokens):
                self._slot.cut(n)

    def rewind(self, n: int) -> None:
        """Forget the last `n` tokens. Raises `ValueError` unless 0 <= n <= len."""
        with self.context._entry():
            self._slot.check_open()
            n = operator.index(n)
            if not 0 <= n <= len(self._tokens):
                raise ValueError(f"cannot rewind by {n}: the sequence has {len(self._tokens)} tokens")
            if n:
                self._slot.cut(len(self._tokens) - n)

    def shift(self, keep: int, discard: int) -> None:
        """Take the `discard` tokens after the first `keep` out, and move the rest to their positions.

        Nothing is evaluated: keys are turned to their new positions (with the next evaluation), values stay, so what
        follows still remembers what was discarded and is not what a fresh evaluation would give. A recurrent state
        cannot forget: there only the list becomes shorter. Where tokens would come into a sliding window again that it
        has dropped, those after `keep` are evaluated anew when logits are asked for.
        Raises `ValueError` for a range outside the sequence, `ContextError` where the memory cannot shift
        (`Context.memory`), `ContextFullError` where cells are shared with another sequence, so that this one needs some
        of its own, and there are too few.
        """
        context = self.context
        with context._entry(), context._handle:
            self._slot.check_open()
            keep, discard = operator.index(keep), operator.index(discard)
            if keep < 0 or discard < 0 or keep + discard > len(self._tokens):
                raise ValueError(
                    f"cannot discard {discard} tokens after the first {keep}: there are {len(self._tokens)}"
                )
            self._shift(keep, discard)

    # Copying

    def fork(self, n: int | None = None) -> "Sequence":
        """Return a new sequence of the first `n` tokens, by default of all; nothing is evaluated.

        Where the memory can share (`Context.memory`), no key or value is copied: the cells are in use until both have
        let go of them; where not, they are copied, and right after a shift one token is evaluated to have it done.
        Raises `ValueError` unless 0 <= n <= len, `ContextError` where all `n_seq` sequences are in use,
        `ContextFullError` where what cannot be shared does not fit.
        """
        context, slot = self.context, self._slot
        with context._entry(), context._handle:
            slot.check_open()
            n = len(self._tokens) if n is None else operator.index(n)
            if not 0 <= n <= len(self._tokens):
                raise ValueError(f"n must be from 0 to the sequence's length {len(self._tokens)}, not {n}")
            slot.settle()
            forked = context._new_sequence()
            try:
                forked._tokens.extend(self._tokens[:n])
                if shared := min(n, slot.n_cached):
                    context._share(slot, forked._slot, shared)
                context.memory.spare = -1
                if lacking := context._pool.lacks(forked._slot, 0):
                    raise context._full(lacking, forked._slot, lacking)
            except BaseException:
                forked._discard()
                raise
            return forked

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokens, keys and values to a file that `Context.restore` reads.

        It is written beside the path and then renamed, so that there is always the old file or the new one. Right after
        a shift one token is evaluated to have it done (`ContextFullError` where there is no cell for that).
        Raises `OSError` where it cannot be written, `StateError` where libllama does not give the state.
        """
        from .state import save

        save(self, path)

    # The end

    @property
    def pinned(self) -> bool:
        """Whether what this sequence holds stays in the KV cache when it is closed, however full the context is.

        Set it on a system prompt; it then takes one of the `n_seq` places until `Context.clear_cache(pinned=True)`.
        """
        return self._slot.pinned

    @pinned.setter
    def pinned(self, pinned: bool) -> None:
        with self.context._entry():
            self._slot.check_open()
            self._slot.pinned = bool(pinned)

    def close(self) -> None:
        """Give the place back; what was evaluated stays cached while there is room. Closing twice is no error."""
        if self.context._is_within():  # a finaliser or a signal handler, amid a call: the next call gives it back
            self._slot.closed, self._slot.owner = True, None
            return
        with self.context._entry():
            if not self.closed:
                self.context._release(self._slot)

    @property
    def closed(self) -> bool:
        """Whether `close` was called, here or on the context or the model."""
        return self._slot.closed

    # The caller holds the lock.

    def _extend(
        self,
        new: npt.NDArray[np.int32],
        on_progress: Callable[[int, int], object] | None = None,
        exactly: bool = False,
    ) -> int:
        before = self._grow(new, exactly)
        if self._slot.n_cached == len(self._tokens):
            return 0
        try:
            return self.context._evaluate([self._slot], on_progress)
        except BaseException:
            self._slot.cut(before.n)
            raise

    def _grow(self, new: npt.NDArray[np.int32], exactly: bool = False) -> Before:
        """Put tokens at the end, with a cell for each; return what was before. On an error the list is as it was."""
        slot = self._slot
        slot.check_open()
        slot.settle()
        before = slot.before()
        if not self._try_to_grow(new):
            self._make_room(len(new), exactly)
            before = slot.before()  # `on_full` may have made the list another
            slot.add(new)
        return before

    def _try_to_grow(self, new: npt.NDArray[np.int32]) -> bool:
        """Put tokens at the end, share what others have cached of the whole, and say whether all of it fits."""
        context, slot, length = self.context, self._slot, len(self._tokens)
        counted = context.memory.spare >= len(new)
        if not counted:
            context._keep_logits(slot)
        logits, fits = slot.logits, False
        try:
            slot.add(new)
            reused = context._attach_prefix(slot)
            fits = counted or not context._pool.lacks(slot, 0)
            if fits:
                context.stats.tokens_reused += reused
        finally:
            if not fits:
                slot.cut(length)
                if slot.n_cached == length:
                    slot.logits = logits
        return fits

    def _make_room(self, wanted: int, exactly: bool = False) -> None:
        """Have room for so many tokens more: drop what may be dropped, then do as `on_full` says, or raise.

        `exactly`: the tokens that are there have to stay.
        """
        context, pool, slot = self.context, self.context._pool, self._slot
        lacking = pool.lacks(slot, wanted)
        if lacking and callable(context.on_full):
            before = self._tokens[:] if exactly else None
            with context._calling_back():
                context.on_full(self, lacking)
            slot.check_open()
            slot.settle()
            if before is None or before == self._tokens:
                lacking = pool.lacks(slot, wanted)
        elif lacking and context.on_full == "shift" and not exactly:
            keep = min(context.n_keep, len(self._tokens))
            discard = max(lacking, (len(self._tokens) - keep) // 2)
            pool.clear_finished()  # they would have to go in any case; cells shared with others do not become free
            if keep + discard <= len(self._tokens) and not pool.n_shared(slot, keep):
                _logger.info("the context is full: %d tokens after the first %d are discarded", discard, keep)
                self._shift(keep, discard)
                lacking = pool.lacks(slot, wanted)
        if lacking:
            raise context._full(wanted, slot)

    def _shift(self, keep: int, discard: int) -> None:
        context, slot = self.context, self._slot
        slot.settle()
        if not discard:
            return
        if keep + discard == len(self._tokens):
            slot.cut(keep)
            return
        if keep + discard < slot.n_cached:
            if not context.memory.can_shift:
                raise context._cannot_shift()
            self._own_cells(keep + discard)  # which may take having the whole evaluated anew
        if keep + discard < slot.n_cached:
            self._shift_cells(keep, discard)
        else:  # what is behind is not evaluated yet
            rest = self._tokens[keep + discard :]
            slot.cut(keep)
            self._tokens.extend(rest)
        slot.n_seen = slot.n_cached
        context.stats.tokens_discarded += discard

    def _shift_cells(self, keep: int, discard: int) -> None:
        context, slot = self.context, self._slot
        n, logits, unread = slot.n_cached, slot.logits, slot.unread
        n_pure = keep if slot.n_pure is None else min(keep, slot.n_pure)
        slot.settled, slot.n_cached = False, keep
        slot.checkpoints = [checkpoint for checkpoint in slot.checkpoints if checkpoint.n <= n_pure]
        del self._tokens[keep : keep + discard]
        if not context.memory.shift(slot.id, n, keep, discard):
            slot.forget_from(keep)
            return
        if context.memory.kind != "recurrent":
            context._pool.shifted = True
        slot.n_pure, slot.pieces = n_pure, clipped(slot.pieces, keep)
        slot.n_cached, slot.logits, slot.unread, slot.settled = n - discard, logits, unread, True
        context._checkpoint(slot)  # to go back as far as here, and not to before the shift

    def _own_cells(self, start: int) -> None:
        """Copy all cells where another sequence holds some of those from `start` on: they are about to change."""
        context, slot = self.context, self._slot
        if shared := context._pool.n_shared(slot, start):
            if context._pool.lacks(slot, shared):
                raise context._full(shared, slot)
            context._keep_logits(slot)
            context._apply_shift(slot)
            state, n = context.memory.read(slot.id), slot.n_cached
            if state is None:
                raise ContextError("libllama does not give the state of this sequence; see its log")
            logits, n_pure, checkpoints = slot.logits, slot.n_pure, slot.checkpoints
            slot.forget_from(0)
            slot.settled = False
            if reason := context.memory.write(slot.id, state):
                slot.forget_from(0)
                raise ContextError(f"libllama could not copy this sequence ({reason})")
            slot.n_pure, slot.checkpoints, slot.n_cached, slot.logits = n_pure, checkpoints, n, logits
            slot.settled = True

    def _discard(self) -> None:
        """Close without leaving anything in the KV cache."""
        if not self.closed:
            self._slot.n_cached = 0
            self.context._release(self._slot)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Sequence cannot be copied or pickled: its keys and values are the context's")

    def __repr__(self) -> str:
        return "<Sequence: closed>" if self.closed else f"<Sequence of {len(self)} tokens>"


class Tokens(AbstractSequence[int]):
    """A live, read-only view of a sequence's tokens. Slices are lists."""

    __slots__ = ("_tokens",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tokens: "array[int]"):
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return self._tokens[index].tolist()
        return self._tokens[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._tokens)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Tokens):
            return self._tokens == other._tokens
        if isinstance(other, list | tuple):
            return self._tokens.tolist() == list(other)
        return NotImplemented

    def __repr__(self) -> str:
        return repr(self._tokens.tolist())
