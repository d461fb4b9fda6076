"""A sequence: a list of tokens that happens to be evaluated."""

import operator
import weakref
from array import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as AbstractSequence
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, overload

import numpy as np
import numpy.typing as npt

from .errors import ClosedError, ContextError
from .sampling import logprob
from .tokenizer import TokenIds

if TYPE_CHECKING:
    from typing_extensions import Self

    from .context import Context

_SCORE_BYTES = 64 << 20  # how much libllama's logits buffer may take while a text is scored


class Sequence:
    """Tokens and, in the context's KV cache, their keys and values; make one with `Context.sequence`.

    The KV cache may lag behind the list (after `append`) but never contradicts it: what is missing is evaluated when
    logits are asked for. A context manager, safe to use from any thread.
    """

    def __init__(self, context: "Context", sequence_id: int):
        self.context = context
        self._id = sequence_id
        self._tokens = array("i")
        # How many of the tokens, from the first, have their keys and values in the cache. An interrupt may strike
        # between any two lines below: the cache then holds more than that, never less, and `_settled` stays False.
        self._n_cached = 0
        self._settled = True
        self._logits: npt.NDArray[np.float32] | None = None  # of the last token, once they are read
        self._closed = False
        self._reference = weakref.ref(self)

    @property
    def tokens(self) -> "Tokens":
        """The token ids, as a live read-only view that costs nothing to take."""
        return Tokens(self._tokens)

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """The logits after the last token: float32, shape (n_vocab,), Python's own memory.

        The array is yours: the same one until the sequence changes, and never written to again.
        After `truncate` or `rewind` the last token is evaluated again to have them, which `Context.stats` counts.
        Raises `ContextError` where the sequence is empty.
        """
        context = self.context
        with context._lock:
            self._check_open()
            if self._logits is None:
                if context._unread is not self._reference or self._n_cached != len(self._tokens):
                    self._evaluate_pending()
                self._logits = context._read_logits()
                context._unread = None
            return self._logits

    def __len__(self) -> int:
        return len(self._tokens)

    def append(self, token: int) -> None:
        """Add one token without evaluating it yet: that happens when logits are asked for, or with the next `extend`.

        Raises `TypeError` or `ValueError` for what is no token id, `ContextFullError` where no cell is free.
        """
        context = self.context
        with context._lock:
            self._check_open()
            token = context.model.tokenizer.check(token)
            context._check_room(1)
            self._forget_logits()
            self._tokens.append(token)

    def extend(self, ids: TokenIds, on_progress: Callable[[int, int], object] | None = None) -> int:
        """Add tokens and evaluate them in chunks of `n_batch`; return how many were evaluated.

        `on_progress` is called after each chunk with the tokens done and the tokens in all. Raises `TypeError` or
        `ValueError` for what is no token id, `ContextFullError` where they do not fit; whatever is raised, the
        sequence is as it was before.
        """
        context = self.context
        with context._lock:
            self._check_open()
            new = context.model.tokenizer.as_array(ids)
            if not new.size:
                return 0
            context._check_room(len(new))
            length = len(self._tokens)
            try:
                self._add(new)
                return self._evaluate_pending(on_progress)
            except BaseException:
                self._cut(length)
                raise

    def truncate(self, n: int) -> None:
        """Keep the first `n` tokens, and forget the rest. Raises `ValueError` unless 0 <= n <= len."""
        with self.context._lock:
            self._check_open()
            n = operator.index(n)
            if not 0 <= n <= len(self._tokens):
                raise ValueError(f"n must be from 0 to the sequence's length {len(self._tokens)}, not {n}")
            if n < len(self._tokens):
                self._cut(n)

    def rewind(self, n: int) -> None:
        """Forget the last `n` tokens. Raises `ValueError` unless 0 <= n <= len."""
        with self.context._lock:
            self._check_open()
            n = operator.index(n)
            if not 0 <= n <= len(self._tokens):
                raise ValueError(f"cannot rewind by {n}: the sequence has {len(self._tokens)} tokens")
            self.truncate(len(self._tokens) - n)

    def score(self, ids: TokenIds) -> npt.NDArray[np.float32]:
        """Add tokens as `extend` does, and return the log-probability of each given all before it.

        float32, shape (len(ids),), natural logarithm. In an empty sequence the first token has nothing before it: its
        entry is NaN.
        """
        context = self.context
        with context._lock:
            self._check_open()
            new = context.model.tokenizer.as_array(ids)
            scores = np.empty(len(new), np.float32)
            if not new.size:
                return scores
            length = len(self._tokens)
            if not self._settled:
                self._forget_from(self._n_cached)
            context._check_room(len(new))
            scores[0] = logprob(self.logits, int(new[0])) if length else np.nan
            rows = max(1, min(context.n_batch, _SCORE_BYTES // (4 * context._n_vocab)))
            context._begin()
            self._settled = False
            try:
                for start in range(0, len(new), rows):
                    chunk = new[start : start + rows]
                    self._add(chunk)
                    context._decode(self, chunk, length + start, all_logits=True)
                    self._n_cached = len(self._tokens)
                    following = new[start + 1 : start + 1 + len(chunk)]
                    for row, token in enumerate(following.tolist()):
                        scores[start + 1 + row] = logprob(context._read_logits(row), token)
            except BaseException:
                self._cut(length)
                raise
            self._settled = True
            return scores

    def close(self) -> None:
        """Free the cells and the place in the context. Closing twice is no error."""
        with self.context._lock:
            if not self._closed:
                self.context._check_idle()
                self._closed = True
                self.context._release(self)

    @property
    def closed(self) -> bool:
        """Whether `close` was called, here or on the context or the model."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this Sequence is closed")

    def _add(self, tokens: npt.NDArray[np.int32]) -> None:
        """Put tokens at the end of the list."""
        self._forget_logits()
        self._tokens.frombytes(tokens.tobytes())

    def _cut(self, n: int) -> None:
        """Make list and cache end after the first `n` tokens."""
        self._forget_logits()
        self._settled = False
        self._n_cached = min(n, self._n_cached)
        del self._tokens[n:]
        self._forget_from(self._n_cached)

    def _evaluate_pending(self, on_progress: Callable[[int, int], object] | None = None) -> int:
        """Bring the cache up to the list, at least by its last token; return how many tokens that evaluated."""
        context, total = self.context, len(self._tokens)
        if not total:
            raise ContextError("the sequence is empty: extend it with a prompt first (a BOS token at the least)")
        if not self._settled:
            self._forget_from(self._n_cached)
        if self._n_cached == total:
            self._forget_from(total - 1)
        first = self._n_cached
        context._begin()
        self._settled = False
        try:
            if total - first == 1:
                context._decode_one(self, self._tokens[-1], first)
                self._n_cached = total
            else:
                tokens = np.array(self._tokens[first:], np.int32)
                for start in range(0, total - first, context.n_batch):
                    chunk = tokens[start : start + context.n_batch]
                    context._decode(self, chunk, first + start)
                    self._n_cached += len(chunk)
                    if on_progress is not None:
                        on_progress(self._n_cached - first, total - first)
        except BaseException:
            self._forget_from(self._n_cached)
            raise
        self._settled = True
        return total - first

    def _forget_from(self, n: int) -> None:
        """Make the cache hold the first `n` tokens, or nothing where this kind of memory cannot forget a part."""
        if self._closed:  # by a callback amid the call: the cells are someone else's by now
            return
        self._settled = False
        self._n_cached = n
        self._forget_logits()
        if not self.context._remove(self._id, n):
            self._n_cached = 0
            self.context._remove(self._id, -1)
        self._settled = True

    def _forget_logits(self) -> None:
        """Drop the logits, also those that nobody has read yet: the last token is about to be another."""
        self._logits = None
        if self.context._unread is self._reference:
            self.context._unread = None

    def _keep_logits(self) -> None:
        """Copy the logits before libllama's buffer is used for something else."""
        self._logits = self.context._read_logits()

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # A collection may come at any point of another call: the context takes the id back when it next looks.
        if not getattr(self, "_closed", True):
            self.context._orphans.append(self._id)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Sequence cannot be copied or pickled: its keys and values are the context's")

    def __repr__(self) -> str:
        return "<Sequence: closed>" if self._closed else f"<Sequence of {len(self)} tokens>"


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
