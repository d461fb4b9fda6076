"""A sequence: a list of tokens that happens to be evaluated."""

import operator
import os
import time
from array import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as AbstractSequence
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self, overload

import numpy as np
import numpy.typing as npt

from ._arguments import file_path, flag, function, integer
from .engine import state
from .engine.cache import KVCache
from .engine.gate import CancelToken
from .engine.slot import Slot
from .errors import EmptySequenceError
from .sampling import Sampler, logprob, top_logprobs
from .sampling.rows import Chain, Survivors, survivors
from .tokenizer import TokenIds

if TYPE_CHECKING:
    from .context import Context


class Sequence(AbstractSequence[int]):
    """Tokens and, in the context's KV cache, their keys and values; make one with `Context.sequence`.

    It reads like a list of token ids: indices, slices, `in`, equality with lists and other sequences. The KV cache may
    lag behind the list (after `append`) but never contradicts it: what is missing is evaluated when logits are asked
    for. What another sequence of the context has cached, open or closed, is not evaluated again.

    A context manager, safe to use from any thread. Calls that compute take `cancel`, a `threading.Event` or anything
    else with `is_set`: once it is set, that call and no other raises `Cancelled`, also while it waits for its turn.
    """

    def __init__(self, context: "Context", cache: KVCache, slot: Slot):
        if not isinstance(slot, Slot):
            raise TypeError("a Sequence is made by Context.sequence")
        self._context, self._cache, self._slot = context, cache, slot
        self._tokens = slot.tokens  # once the slot is closed, it goes on with another list
        self._tokenizer = context.model.tokenizer
        self._n_vocab = self._tokenizer.n_vocab
        self._ahead: tuple[int, Chain, Survivors] | None = None  # see `look_ahead`
        slot.belong_to(self)

    @property
    def context(self) -> "Context":
        """The context that it belongs to."""
        return self._context

    # Reading

    @property
    def tokens(self) -> "Tokens":
        """The token ids, as a live read-only view that costs nothing to take."""
        return Tokens(self._tokens)

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """The logits after the last token: float32, shape (n_vocab,), a copy of your own.

        After `truncate` or `rewind` the last token is re-evaluated to have them, which `Context.stats` counts. Raises
        `EmptySequenceError` if there is no token.
        """
        cache = self._cache
        with cache.gate.enter():
            logits = cache.peek(self._slot)
            before = time.perf_counter()
            copy = logits.copy()
            cache.stats.logits_seconds += time.perf_counter() - before
            return copy

    @property
    def n_waiting(self) -> int:
        """How many tokens, from the end, wait to be evaluated."""
        slot = self._slot
        return len(slot.tokens) - slot.n_cached

    @property
    def is_full(self) -> bool:
        """Whether one more token would raise `ContextFullError`."""
        cache = self._cache
        if cache.pool.spare > 0:
            return False
        with cache.gate.enter():
            return not cache.has_room(self._slot)

    @property
    def size_bytes(self) -> int:
        """How many bytes the keys, values and states of what is evaluated take (`llama_state_seq_get_size`)."""
        with self._cache.gate.enter(), self._cache.handle:
            return self._cache.size_bytes(self._slot)

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

        Raises `TypeError` or `ValueError` for what is no token id, `ContextFullError` if no cell is free.
        """
        cache = self._cache
        with cache.gate.enter():
            if type(token) is not int or not 0 <= token < self._n_vocab:
                token = self._tokenizer.check(token)
            cache.append(self._slot, token)

    def extend(
        self,
        ids: TokenIds,
        on_progress: Callable[[int, int], object] | None = None,
        cancel: CancelToken | None = None,
        evaluate: bool = True,
    ) -> int:
        """Add tokens and evaluate them in batches of `n_batch`; return how many were evaluated.

        With `evaluate=False` they wait for `Context.evaluate`, which evaluates several sequences together, apart from
        what another sequence has cached. Then it returns how many wait; without ids it looks again for what is cached.
        `on_progress` is called after each batch with the tokens done and the tokens in all. Raises `TypeError` or
        `ValueError` for what is no token id, `ContextFullError` if they do not fit. Whatever is raised, the sequence is
        as it was before, or as `on_full` has made it.
        """
        cache, slot = self._cache, self._slot
        with cache.gate.enter(cancel):
            if (
                type(ids) is list
                and len(ids) == 1
                and type(ids[0]) is int
                and 0 <= ids[0] < self._n_vocab
                and on_progress is None
                and cancel is None
                and evaluate
                and cache.extend_by_one(slot, ids[0])
            ):
                return 1
            slot.check_open()
            function("on_progress", on_progress)
            with cache.handle:
                ids = self._tokenizer.as_array(ids)
                return cache.extend(slot, ids, on_progress, cancel, evaluate=flag("evaluate", evaluate))

    def assign(
        self,
        ids: TokenIds,
        on_progress: Callable[[int, int], object] | None = None,
        cancel: CancelToken | None = None,
        evaluate: bool = True,
    ) -> int:
        """Make the sequence these tokens, evaluating only what is not cached already; return how many that were.

        With `evaluate=False` those wait for `Context.evaluate`.
        The longest prefix is kept that it has in common with them, or that another sequence has, open or closed. What
        is given up stays in the prefix cache while there is room, so that switching back costs nothing.

        Raises what `extend` does, also with `on_full="shift"`: what is kept would not be those tokens. Whatever is
        raised, the tokens are as they were before.
        """
        cache, slot = self._cache, self._slot
        with cache.gate.enter(cancel), cache.handle:
            slot.check_open()
            function("on_progress", on_progress)
            return cache.assign(slot, self._tokenizer.as_array(ids), on_progress, cancel, flag("evaluate", evaluate))

    def logits_after(self, ids: TokenIds, cancel: CancelToken | None = None) -> npt.NDArray[np.float32]:
        """Add tokens and evaluate them, with what waits, in one pass; return the logits before and after each of them.

        float32, shape (len(ids) + 1, n_vocab): row 0 is `logits` as it was, row i is after the i-th token. This is what
        it takes to verify a draft: `truncate` what was not accepted.

        Raises what `extend` does, and `EmptySequenceError` if there is no token before.
        """
        cache, slot = self._cache, self._slot
        with cache.gate.enter(cancel), cache.handle:
            slot.check_open()
            new = self._tokenizer.as_array(ids)
            if not slot.tokens:
                raise EmptySequenceError("the sequence is empty: there are no logits before the first token")
            rows = np.full((len(new) + 1, self._n_vocab), np.nan, np.float32)
            cache.read_rows(slot, new, rows.__setitem__, cancel, is_guess=True)
            return rows

    def score(self, ids: TokenIds, cancel: CancelToken | None = None) -> npt.NDArray[np.float32]:
        """Add tokens as `extend` does, and return the log-probability of each given all before it.

        float32, shape (len(ids),), natural logarithm. In an empty sequence the first token has nothing before it: its
        entry is NaN.
        """
        return self.top_scores(ids, 0, cancel)[0]

    def top_scores(
        self, ids: TokenIds, n: int, cancel: CancelToken | None = None
    ) -> tuple[npt.NDArray[np.float32], list[list[tuple[int, float]]]]:
        """Do what `score` does, and return the `n` most likely tokens at each position as well.

        Those are pairs (id, log-probability), the most likely first; none at the beginning of an empty sequence.
        """
        cache, slot, n = self._cache, self._slot, integer("n", n, 0)
        with cache.gate.enter(cancel), cache.handle:
            slot.check_open()
            new = self._tokenizer.as_array(ids)
            scores = np.full(len(new), np.nan, np.float32)
            following = new.tolist()
            tops: list[list[tuple[int, float]]] = [[] for _ in following]

            def score(row: int, logits: npt.NDArray[np.float32]) -> None:
                if row < len(following):
                    scores[row] = logprob(logits, following[row])
                    if n:
                        tokens, values = top_logprobs(logits, n)
                        tops[row] = list(zip(tokens.tolist(), values.tolist(), strict=True))

            if following:
                cache.read_rows(slot, new, score, cancel)
            return scores, tops

    # Shrinking

    def truncate(self, n: int) -> None:
        """Keep the first `n` tokens, and forget the rest. Raises `ValueError` unless 0 <= n <= len."""
        with self._cache.gate.enter():
            self._slot.check_open()
            n = integer("n", n)
            if not 0 <= n <= len(self._tokens):
                raise ValueError(f"n must be from 0 to the sequence's length {len(self._tokens)}, not {n}")
            self._cache.cut(self._slot, n)

    def rewind(self, n: int) -> None:
        """Forget the last `n` tokens. Raises `ValueError` unless 0 <= n <= len."""
        with self._cache.gate.enter():
            self._slot.check_open()
            n = integer("n", n)
            if not 0 <= n <= len(self._tokens):
                raise ValueError(f"cannot rewind by {n}: the sequence has {len(self._tokens)} tokens")
            self._cache.cut(self._slot, len(self._tokens) - n)

    def shift(self, keep: int, discard: int) -> None:
        """Take the `discard` tokens after the first `keep` out, and move the rest to their positions (a RoPE shift).

        Nothing is evaluated: keys are rotated to their new positions with the next evaluation, and values stay. What
        follows therefore still remembers what was discarded, and is not what a fresh evaluation would give. A recurrent
        state cannot forget: there only the list becomes shorter. If tokens would come into a sliding window again that
        it has dropped, those after `keep` are re-evaluated when logits are asked for.

        Raises:
            ValueError: the range is outside the sequence.
            ContextError: the memory cannot shift (`Context.memory`).
            ContextFullError: cells are shared with another sequence, so that this one needs some of its own, and there
                are too few.
        """
        with self._cache.gate.enter(), self._cache.handle:
            self._slot.check_open()
            keep, discard = integer("keep", keep), integer("discard", discard)
            if keep < 0 or discard < 0 or keep + discard > len(self._tokens):
                raise ValueError(
                    f"cannot discard {discard} tokens after the first {keep}: there are {len(self._tokens)}"
                )
            self._cache.shift(self._slot, keep, discard)

    # Copying

    def fork(self, n: int | None = None) -> "Sequence":
        """Return a new sequence of the first `n` tokens, by default of all; nothing is evaluated.

        If the memory can share (`Context.memory`), no key or value is copied: the cells are in use until both have let
        go of them. If not, they are copied, and right after a shift one token is evaluated to have it done.

        Raises:
            ValueError: unless 0 <= n <= len.
            SequencesInUseError: all `n_seq` sequences are in use.
            ContextFullError: what cannot be shared does not fit.
        """
        with self._cache.gate.enter(), self._cache.handle:
            self._slot.check_open()
            n = len(self._tokens) if n is None else integer("n", n)
            if not 0 <= n <= len(self._tokens):
                raise ValueError(f"n must be from 0 to the sequence's length {len(self._tokens)}, not {n}")
            return Sequence(self._context, self._cache, self._cache.fork(self._slot, n))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokens, keys and values to a file that `Context.restore` reads.

        It is written beside the path and then renamed, so that there is always the old file or the new one. A symbolic
        link is followed. Right after a shift one token is evaluated to have it done.

        Raises:
            OSError: it cannot be written, or the path is no regular file.
            ContextFullError: a shift has to be done, and there is no cell for that.
            StateError: libllama does not give the state.
        """
        state.write(file_path("path", path), self._parts())

    def to_bytes(self) -> bytes:
        """Return what `save` would write, for `Context.from_bytes`; the errors are those of `save` without files."""
        return state.joined(self._parts())

    def _parts(self) -> list[bytes | memoryview]:
        model, cache = self._context.model, self._cache
        with cache.gate.enter(), cache.handle:
            payload, requirements = cache.payload(self._slot), cache.requirements()
        return state.parts(payload, requirements, model.path.name)

    # The end

    @property
    def pinned(self) -> bool:
        """Whether what this sequence holds stays in the KV cache when it is closed, however full the context is.

        Set it on a system prompt; it then takes one of the `n_seq` places until `Context.clear_cache(pinned=True)`.
        """
        return self._slot.pinned

    @pinned.setter
    def pinned(self, pinned: bool) -> None:
        with self._cache.gate.enter():
            self._slot.check_open()
            self._slot.pin(flag("pinned", pinned))

    def close(self) -> None:
        """Give the place back; what was evaluated stays cached while there is room. Closing twice is no error."""
        gate, slot = self._cache.gate, self._slot
        if gate.is_within():  # a finaliser or a signal handler, during a call: the next call gives it back
            slot.abandon()
            return
        with gate.enter():
            self._cache.release(slot)

    @property
    def closed(self) -> bool:
        """Whether `close` was called, here or on the context or the model."""
        return self._slot.closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Sequence cannot be copied or pickled: its keys and values are the context's")

    def __repr__(self) -> str:
        return "<Sequence: closed>" if self.closed else f"<Sequence of {len(self)} tokens>"


def look_ahead(drawing: list[tuple[Sequence, Sampler]]) -> None:
    """Have samplers of which several are alike do together what each would do next, after sequences of one context."""
    alike: dict[Chain, list[Sequence]] = {}
    for sequence, sampler in drawing:
        if sampler.chain is not None:
            alike.setdefault(sampler.chain, []).append(sequence)
    for chain, some in alike.items():
        cache = some[0]._cache
        if len(some) < 2:
            continue
        with cache.gate.enter():
            logits, rows = cache.rows()
            found = [(sequence, rows[sequence._slot]) for sequence in some if sequence._slot in rows]
            if len(found) < 2:
                continue
            left = survivors(logits, [row for _, row in found], chain)
            for (sequence, _), one in zip(found, left, strict=True):
                sequence._ahead = None if one is None else (cache.stats.decode_calls, chain, one)


def draw_next(sequence: Sequence, sampler: Sampler, tokens: "Tokens") -> int:
    """Return what a sampler that only reads draws after a sequence; nothing is copied, nor computed twice."""
    cache, slot = sequence._cache, sequence._slot
    ahead, sequence._ahead = sequence._ahead, None
    if ahead is not None:
        n_calls, chain, left = ahead
        # They are of its last token if that is in the buffer, and nothing was computed since.
        if slot.row is not None and n_calls == cache.stats.decode_calls and chain == sampler.chain:
            return sampler.draw(left)
    with cache.gate.enter():
        return sampler(cache.peek(slot), tokens)


def draft_next(sequence: Sequence, n: int) -> list[int]:
    """Return up to `n` tokens that the model's own MTP head guesses after a sequence, whose last token waits."""
    cache = sequence._cache
    with cache.gate.enter(), cache.handle:
        return cache.draft(sequence._slot, n)


# For `Context`, on its fast path: C functions, where properties would be Python calls.
slot_of: Callable[[Sequence], Slot] = operator.attrgetter("_slot")
context_of: Callable[[Sequence], "Context"] = operator.attrgetter("_context")


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
