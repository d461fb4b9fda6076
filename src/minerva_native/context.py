"""A context: libllama's compute graph and KV cache, and the sequences in it."""

import dataclasses
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np
import numpy.typing as npt

from ._arguments import file_path, flag, function, integer, many, what
from ._binding import ffi, lib
from .devices import Placement, placement
from .engine import state
from .engine.cache import KVCache
from .engine.gate import CancelToken
from .engine.memory import Memory
from .engine.runner import Stats
from .errors import ContextError, OptionError, StateError
from .options import ContextOptions
from .sequence import Sequence, context_of, slot_of
from .tokenizer import TokenIds

if TYPE_CHECKING:
    from .model import Model

__all__ = ["Context", "Memory", "Stats"]


class Context:
    """Computes with a model; make one with `Model.context`, or from a model and its options.

    A context manager. It may be used from any thread: calls are serialised by one lock, and long ones release the GIL.
    A signal handler or a finaliser that uses it during a call on the same thread gets a `ReentryError`.

    Raises:
        OptionError: the model, this machine or libllama cannot do what an option asks for.
        ContextError: libllama refuses for a reason of its own, such as a lack of memory.
    """

    def __init__(self, model: "Model", options: ContextOptions | None = None):
        if options is not None and not isinstance(options, ContextOptions):
            raise TypeError(f"options must be ContextOptions, not {what(options)}")
        self._model, self._options = model, (options or ContextOptions()).resolve(model)
        if not model.is_causal:
            raise ContextError(
                f"this model ({model.architecture}) attends to a text as a whole, not only to what comes before: "
                "it cannot continue one, and only its tokenizer can be used"
            )
        self._cache = KVCache(model, self._options)
        self._n_vocab = model.tokenizer.n_vocab
        model.close_first(self)

    # What it is

    @property
    def model(self) -> "Model":
        """The model that it computes with."""
        return self._model

    @property
    def options(self) -> ContextOptions:
        """The options in force."""
        return self._options

    @property
    def n_ctx(self) -> int:
        """How many tokens all sequences may hold together."""
        return self._options.n_ctx

    @property
    def n_seq(self) -> int:
        """How many sequences there may be at one time."""
        return self._options.n_seq

    @property
    def n_batch(self) -> int:
        """How many tokens are evaluated in one call of libllama's."""
        return self._options.n_batch

    @property
    def n_ubatch(self) -> int:
        """How many tokens are evaluated in one pass through the model."""
        return self._options.n_ubatch

    @property
    def n_threads(self) -> int:
        """How many CPU threads compute."""
        return self._options.n_threads or 1

    @property
    def n_threads_batch(self) -> int:
        """How many CPU threads compute several tokens at once."""
        return self._options.n_threads_batch or self.n_threads

    def set_threads(self, n: int, batch: int | None = None) -> None:
        """Compute with `n` CPU threads from now on, and several tokens at once with `batch`, by default as many.

        Raises `ValueError` for a number out of range, `ContextError` if the system does not grant that many.
        """
        options = dataclasses.replace(self._options, n_threads=n, n_threads_batch=n if batch is None else batch)
        with self._cache.gate.enter(), self._cache.handle:
            self._cache.runner.set_threads(options.n_threads or 1, options.n_threads_batch or 1)
            self._options = options

    @property
    def kv_type(self) -> tuple[str, str]:
        """The element types of keys and of values."""
        return self._options.kv_types

    @property
    def placement(self) -> list[Placement]:
        """What of the model and of this context is on which device: the CPU first, then the others that have some."""
        with self._cache.gate.enter(), self._cache.handle as context, self._model.raw() as model:
            head = lib.minerva_head_context(self._cache.runner.decoder)
            return placement(model, self._model.n_layer, [context] if head == ffi.NULL else [context, head])

    @property
    def memory(self) -> Memory:
        """What the memory can do."""
        return self._cache.memory

    @property
    def stats(self) -> Stats:
        """What the context has done so far."""
        return self._cache.stats

    @property
    def encoded(self) -> list[int] | None:
        """What an encoder-decoder model has read."""
        text = self._cache.key.encoded
        return None if text is None else list(text)

    @property
    def cells_used(self) -> int:
        """How many KV cells the tokens of all sequences take, each shared one counted once.

        What closed sequences have left is not counted, as it is evicted when room is needed, unless it is pinned.
        """
        with self._cache.gate.enter():
            return self._cache.cells_used

    @property
    def is_full(self) -> bool:
        """Whether the tokens of its sequences take every cell."""
        with self._cache.gate.enter():
            return self._cache.is_full

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._cache.handle.closed

    # What it does

    def sequence(self) -> Sequence:
        """Return a new empty sequence; raise `SequencesInUseError` if all `n_seq` are in use."""
        with self._cache.gate.enter(), self._cache.handle:
            return Sequence(self, self._cache, self._cache.new())

    def extend(
        self,
        prompts: Mapping[Sequence, TokenIds],
        on_progress: Callable[[int, int], object] | None = None,
        cancel: CancelToken | None = None,
    ) -> int:
        """Add tokens to several sequences and evaluate them together; return how many were evaluated.

        It does what `Sequence.extend` does for each, but in shared batches, in which one more token costs little.
        Prompts in one call do not share a prefix: evaluate the prefix first and `fork` it.

        Raises what `Sequence.extend` does, and `ValueError` for sequences of another context. Whatever is raised, every
        sequence is as it was before, or as `on_full` has made it.
        """
        if not isinstance(prompts, Mapping):
            raise TypeError(f"prompts must be a mapping of sequences to token ids, not {type(prompts).__name__}")
        prompts, cache, n_vocab = dict(prompts), self._cache, self._n_vocab
        with cache.gate.enter(cancel):
            slots, tokens = [], []
            for sequence, ids in prompts.items():
                slots.append(slot_of(self._own(sequence)))
                if type(ids) is list and len(ids) == 1 and type(ids[0]) is int and 0 <= ids[0] < n_vocab:
                    tokens.append(ids[0])
            is_simple = len(tokens) == len(slots) and on_progress is None and cancel is None
            if is_simple and cache.extend_each_by_one(slots, tokens):
                return len(slots)
            function("on_progress", on_progress)
            with cache.handle:
                as_array = self._model.tokenizer.as_array
                arrays = [as_array(ids) for ids in prompts.values()]
                return cache.extend_each(list(zip(slots, arrays, strict=True)), on_progress, cancel)

    def evaluate(
        self,
        sequences: Iterable[Sequence],
        max_tokens: int | None = None,
        on_progress: Callable[[int, int], object] | None = None,
        cancel: CancelToken | None = None,
    ) -> int:
        """Evaluate what waits in several sequences, in shared batches; return how many tokens are still waiting.

        Once nothing waits, the logits of all of them are known: reading them evaluates nothing. Call it before a round
        of several `generate` iterators, and each round takes one call of libllama's. Sequences are served in the order
        given.

        Args:
            sequences: sequences of this context.
            max_tokens: evaluate at most this many tokens, so that a long prompt is evaluated in pieces. Between two
                calls, other threads have their turn.
            on_progress: called after each batch with the tokens done and the tokens in all.
            cancel: stops the call when it is set (`Cancelled`); what was evaluated stays cached.

        Raises:
            EmptySequenceError: a sequence has no tokens.
            ContextFullError: a token that has to be re-evaluated finds no cell.
            ValueError: a sequence belongs to another context, or `max_tokens` is less than 1.
        """
        max_tokens = None if max_tokens is None else integer("max_tokens", max_tokens, 1)
        function("on_progress", on_progress)
        slots = [slot_of(self._own(sequence)) for sequence in many("sequences", sequences)]
        cache = self._cache
        with cache.gate.enter(cancel), cache.handle:
            n_left = cache.evaluate(slots, max_tokens, on_progress, cancel)
        if n_left:
            cache.gate.let_others_in()
        return n_left

    def logits_after(
        self,
        guesses: Mapping[Sequence, TokenIds],
        others: Iterable[Sequence] = (),
        max_tokens: int | None = None,
        cancel: CancelToken | None = None,
    ) -> dict[Sequence, npt.NDArray[np.float32]]:
        """Do what `Sequence.logits_after` does for several sequences, in batches shared with what waits in others.

        Args:
            guesses: sequences of this context, and the tokens to add to each.
            others: more of them, which are evaluated as `evaluate` does, in what room there is after those.
            max_tokens: evaluate at most this many tokens. A sequence whose guess is cut off by that is left as it was.
            cancel: stops the call when it is set (`Cancelled`).

        Returns:
            The logits before and after each token: float32, shape (tokens + 1, n_vocab), of each sequence in `guesses`
            that was not cut off.

        Raises what `Sequence.logits_after` and `evaluate` do, and `OptionError` unless `on_full` is "error". Whatever
        is raised, the sequences are as they were.
        """
        if self._options.on_full != "error":
            raise OptionError(f"guesses for several sequences need on_full='error', not {self._options.on_full!r}")
        if not isinstance(guesses, Mapping):
            raise TypeError(f"guesses must be a mapping of sequences to token ids, not {what(guesses)}")
        max_tokens = None if max_tokens is None else integer("max_tokens", max_tokens, 1)
        guesses, cache = dict(guesses), self._cache
        with cache.gate.enter(cancel), cache.handle:
            as_array = self._model.tokenizer.as_array
            guessed = {slot_of(self._own(sequence)): as_array(ids) for sequence, ids in guesses.items()}
            own = {slot_of(self._own(sequence)): None for sequence in many("others", others)}
            rows = cache.read_guesses(guessed, [slot for slot in own if slot not in guessed], max_tokens, cancel)
        return {sequence: rows[slot] for sequence, slot in zip(guesses, guessed, strict=True) if slot in rows}

    def _own(self, sequence: Sequence) -> Sequence:
        if not isinstance(sequence, Sequence):
            raise TypeError(f"sequences are wanted, not {type(sequence).__name__}")
        if context_of(sequence) is not self:
            raise ValueError(f"{sequence!r} belongs to another context")
        return sequence

    def encode(self, ids: TokenIds) -> int:
        """Have an encoder-decoder model read the text that its sequences answer; return the token to begin those with.

        It replaces the text before: what sequences hold is re-evaluated when logits are asked for, and what closed ones
        have left is forgotten, pinned or not.

        Raises:
            ContextError: the model has no encoder.
            TypeError, ValueError: something is no token id, or there are more than `n_ubatch` of them, which an encoder
                has to see at once.
        """
        model, cache = self._model, self._cache
        with cache.gate.enter(), cache.handle:
            text: list[int] = model.tokenizer.as_array(ids).tolist()
            if not cache.runner.has_encoder:
                raise ContextError(f"this model ({model.architecture}) is no encoder-decoder: extend a sequence")
            if not 1 <= len(text) <= self.n_ubatch:
                raise ValueError(f"the text has {len(text)} tokens, and can have 1 to n_ubatch={self.n_ubatch}")
            cache.encode(text)
            with model.raw() as pointer:
                start: int = lib.llama_model_decoder_start_token(pointer)
            return start if start >= 0 else model.tokenizer.bos or 0

    def restore(self, path: str | os.PathLike[str]) -> Sequence:
        """Return a new sequence as `Sequence.save` wrote it; nothing is evaluated.

        The checksum finds damage, not malice: like a model, a file has to come from somebody who is trusted.

        Raises:
            StateError: the file is damaged, or was saved from another model, by another version, or with a KV cache of
                another form.
            ContextFullError: it does not fit.
            SequencesInUseError: all `n_seq` sequences are in use.
            OSError: it cannot be read.
        """
        path = file_path("path", path)
        with self._cache.gate.enter(), self._cache.handle:
            return self._restored(path, state.read(path))

    def from_bytes(self, data: bytes | bytearray | memoryview) -> Sequence:
        """Return a new sequence as `Sequence.to_bytes` gave it; the errors are those of `restore` without files."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data must be bytes, as Sequence.to_bytes gives them, not {what(data)}")
        data = bytes(data)
        with self._cache.gate.enter(), self._cache.handle:
            return self._restored("the data", data)

    def _restored(self, path: Path | str, content: bytes) -> Sequence:
        cache, tokenizer = self._cache, self._model.tokenizer
        payload = state.parsed(path, content, cache.requirements(), tokenizer.n_vocab)
        try:
            tokenizer.as_array(payload.tokens)
        except ValueError as error:
            raise StateError(f"{path} holds what is no token of this model ({error})") from None
        try:
            return Sequence(self, cache, cache.admit(payload))
        except StateError as error:
            raise StateError(f"{path} cannot be restored here ({error})") from None

    def clear_cache(self, pinned: bool = False) -> None:
        """Forget what closed sequences have left in the KV cache, pinned ones only if asked to."""
        with self._cache.gate.enter(), self._cache.handle:
            self._cache.clear_finished(flag("pinned", pinned))

    def cancel(self) -> None:
        """Stop whatever computes at this moment, on whatever thread: that call raises `Cancelled`.

        A later call is unaffected. To stop one call and no other, give it a cancel token (`cancel=`) of its own.
        """
        self._cache.runner.cancel()

    @contextmanager
    def raw(self) -> Iterator[Any]:
        """Lend libllama's `llama_context *` for calls of `lib`, within a `with` block that keeps others out.

        As anything may have been changed, nothing that was cached is trusted afterwards: sequences keep their tokens,
        which are re-evaluated when logits are asked for, and files saved before cannot be restored. An encoder has to
        read its text again.
        """
        cache = self._cache
        with cache.gate.enter(), cache.handle as pointer:
            cache.distrust()
            try:
                yield pointer
            finally:
                cache.forget_everything()

    def close(self) -> None:
        """Free the context and close its sequences. Closing twice is no error."""
        with self._cache.gate.enter():
            self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Context cannot be copied or pickled: it owns memory outside Python")

    def __repr__(self) -> str:
        if self.closed:
            return "<Context: closed>"
        return f"<Context of {self._model.path.name}: n_ctx={self.n_ctx}, n_seq={self.n_seq}>"


# For the prompt cache on disk, and for `LLM.load`.
cache_of: Callable[[Context], KVCache] = operator.attrgetter("_cache")
