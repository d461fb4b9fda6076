"""A context: the KV cache's memory, the compute graph, and the one place that calls `llama_decode`."""

import logging
import math
import operator
import os
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from ._binding import callbacks, ffi, lib
from ._handle import Handle
from .devices import available_cpus, devices, physical_memory_bytes
from .errors import Cancelled, ContextError, ContextFullError
from .memory import Memory, head_sizes
from .slot import Before, Slot, SlotPool
from .tokenizer import TokenIds

if TYPE_CHECKING:
    from .model import Model
    from .sequence import Sequence

_logger = logging.getLogger("minerva_native")

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

FLASH_ATTENTION = {
    "auto": lib.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": lib.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": lib.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}

# A token of a model this small is computed in less time than threads need to meet after every layer; on a machine that
# is busy with something else, waiting for each other makes it up to a hundred times slower.
_ONE_THREAD_BYTES = 8 << 20

_CELLS_STEP = 256  # libllama rounds the number of cells up to a multiple of this

_MAX_BATCH = 1 << 16  # tokens in one call: more gain nothing, and the room for them is taken at once

_MIN_STRIDE = 16  # so many tokens evaluated at once are worth a checkpoint of their own

_POLL_INTERVAL_US = 50_000  # how often a long computation looks for Ctrl-C

OnFull: TypeAlias = 'Literal["error", "shift"] | Callable[[Sequence, int], object]'
"""What to do when no cell is free: raise, shift, or call a function of the sequence and how many cells it lacks."""


@dataclass
class Stats:
    """What a context has done since it was made."""

    tokens_evaluated: int = 0
    tokens_reused: int = 0  # that were asked for and were in the KV cache already
    tokens_reevaluated: int = 0  # evaluated again: their state was gone, or logits were asked for in their midst
    tokens_discarded: int = 0  # by `shift`
    tokens_encoded: int = 0  # by `Context.encode`
    decode_calls: int = 0
    decode_seconds: float = 0.0  # in `llama_decode` and the wait for its result
    logits_seconds: float = 0.0  # copying logits out of libllama's buffer


class Context:
    """Computes with a model; make one with `Model.context`.

    A context manager. It may be used from any thread: one lock serialises the calls, and long ones release the GIL.
    """

    stats: Stats
    model: "Model"
    n_ctx: int
    n_seq: int
    n_batch: int
    n_ubatch: int
    n_threads: int

    def __init__(
        self,
        model: "Model",
        *,
        n_ctx: int = 4096,
        n_seq: int = 1,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        kv_type: str | tuple[str, str] = "f16",
        flash_attention: Literal["auto", "on", "off"] | bool = "auto",
        kv_unified: bool = True,
        swa_full: bool = True,
        prefix_cache: bool = True,
        on_full: "OnFull" = "error",
        n_keep: int = 4,
        checkpoint_interval: int = 512,
        checkpoint_bytes: int = 1 << 30,
    ):
        self.model = model
        self.n_ctx = _in_range("n_ctx", n_ctx, 2, 2**31 - _CELLS_STEP)
        if model.has_learned_positions and self.n_ctx > model.n_ctx_train >= 2:
            self.n_ctx = model.n_ctx_train
            _logger.warning("n_ctx=%d is all that this model has positions for, not %d", self.n_ctx, n_ctx)
        self.n_seq = _in_range("n_seq", n_seq, 1, lib.llama_max_parallel_sequences())
        kv_unified = bool(kv_unified)
        if model.architecture == "kimi-linear" and not kv_unified and self.n_seq > 2:
            raise ContextError("libllama computes kimi-linear with at most 2 sequences where kv_unified=False")
        if model.has_encoder and not kv_unified and self.n_seq > 1:
            raise ContextError("libllama computes an encoder-decoder with one sequence only where kv_unified=False")
        # How many tokens a sequence can have: all cells, or its own.
        self.n_cells = n_cells = self.n_ctx if kv_unified else self.n_ctx // self.n_seq
        if n_cells < 2:
            raise ValueError(f"n_ctx={n_ctx} leaves each of n_seq={n_seq} sequences less than 2 cells of its own")
        self.n_batch = min(_in_range("n_batch", n_batch, 1, 2**31 - 1), self.n_ctx, _MAX_BATCH)
        self.n_ubatch = min(_in_range("n_ubatch", n_ubatch, 1, 2**31 - 1), self.n_batch)
        if n_threads is None:
            few = not model.vocab_only and model.size_bytes < _ONE_THREAD_BYTES
            n_threads = 1 if few else min(available_cpus(), lib.GGML_MAX_N_THREADS)
        self.n_threads = _in_range("n_threads", n_threads, 1, lib.GGML_MAX_N_THREADS)
        flash = {True: "on", False: "off"}[flash_attention] if isinstance(flash_attention, bool) else flash_attention
        if flash not in FLASH_ATTENTION:
            raise ValueError(f'flash_attention must be "auto", "on" or "off", not {flash_attention!r}')
        self.kv_type = _kv_types(model, kv_type, flash)
        if on_full not in ("error", "shift") and not callable(on_full):
            raise ValueError(f'on_full must be "error", "shift" or a function, not {on_full!r}')
        self.on_full: OnFull = on_full
        self.prefix_cache = bool(prefix_cache)
        self.n_keep = _in_range("n_keep", n_keep, 0, 2**31 - 1)
        self._checkpoint_interval = _in_range("checkpoint_interval", checkpoint_interval, 1, 2**31 - 1)
        # Each sequence has its share, so that none can take another's away.
        self._checkpoint_bytes = _in_range("checkpoint_bytes", checkpoint_bytes, 0, 2**63 - 1) // self.n_seq
        if model.vocab_only:
            raise ContextError("the model was loaded with vocab_only=True: it has no weights to compute with")
        self.stats = Stats()
        self._lock = threading.RLock()
        # Whether this thread holds it, as `threading.Condition` asks.
        self._is_mine: Callable[[], bool] = self._lock._is_owned  # type: ignore[attr-defined]
        self._calls_back = False
        self._abort = ffi.new("minerva_abort_state *")
        self._abort.poll_interval_us = _POLL_INTERVAL_US
        self._was_cancelled = False

        parameters = lib.llama_context_default_params()
        # A multiple of libllama's step, so that it grants exactly this many cells; `n_ctx` is kept to in Python.
        parameters.n_ctx = math.ceil(n_cells / _CELLS_STEP) * _CELLS_STEP * (1 if kv_unified else self.n_seq)
        parameters.n_batch = max(self.n_batch, self.n_seq)  # or libllama ends the process
        parameters.n_ubatch = self.n_ubatch
        parameters.n_seq_max = self.n_seq
        parameters.n_threads = parameters.n_threads_batch = self.n_threads
        parameters.type_k, parameters.type_v = map(_ggml_type, self.kv_type)
        parameters.flash_attn_type = FLASH_ATTENTION[flash]
        parameters.kv_unified, parameters.swa_full = kv_unified, swa_full
        parameters.no_perf = True
        parameters.abort_callback = lib.minerva_abort
        parameters.abort_callback_data = self._abort
        with model._handle as model_pointer:
            _check_heads(model, self.kv_type)
            _check_memory(model, self.n_ctx, self.kv_type)
            with callbacks.captured_errors() as errors:
                pointer = lib.llama_init_from_model(model_pointer, parameters)
            if pointer == ffi.NULL:
                why = callbacks.reason(errors, "libllama gives no reason")
                raise ContextError(
                    f"no context could be made with n_ctx={n_ctx}, n_batch={n_batch}, n_seq={n_seq}, "
                    f"kv_type={self.kv_type}, flash_attention={flash!r} ({why}): ask for less, or another type"
                )
            # Without a pool of its own, libllama makes one for every graph that it computes.
            threads = ffi.new("struct ggml_threadpool_params *")
            lib.ggml_threadpool_params_init(threads, self.n_threads)
            pool = lib.ggml_threadpool_new(threads)
            lib.llama_attach_threadpool(pointer, pool, ffi.NULL)

            def free(pointer: Any) -> None:
                lib.llama_free(pointer)
                lib.ggml_threadpool_free(pool)

            self._handle = Handle("Context", pointer, free, parent=model._handle)
            self._has_decoder = bool(lib.llama_model_has_decoder(model_pointer))
            self._has_encoder = self._has_decoder and bool(lib.llama_model_has_encoder(model_pointer))
        try:
            callbacks.raise_kept()
        except BaseException:
            self._handle.close()
            raise
        self._pointer = pointer
        self.memory = Memory(model, self._handle, self.kv_type[0], kv_unified, swa_full)
        if on_full == "shift" and not self.memory.can_shift:
            self._handle.close()
            raise self._cannot_shift()
        self._pool = SlotPool(self.memory, n_cells, self.n_seq, prefix_cache)
        # With several passes in one call, libllama may drop from a window what the first of them still needs.
        self._max_batch = self.n_ubatch if self.memory.window else self.n_batch
        self._stride = self._max_batch if self.memory.can_truncate else min(self._max_batch, self._checkpoint_interval)
        self.encoded: list[int] | None = None  # what an encoder-decoder model has read
        self._n_vocab = model.tokenizer.n_vocab
        self._decoder = ffi.new("minerva_decoder *", {"context": pointer})
        self._seen_at = ffi.NULL
        # libllama's memory at `_seen_at`: never given out
        self._seen: npt.NDArray[np.float32] = np.empty(0, np.float32)
        self._batch = _Batch(self.n_batch)
        self._unread: tuple[Slot, ...] = ()  # whose logits lie in libllama's buffer and nowhere else
        model._contexts.add(self)

    def sequence(self) -> "Sequence":
        """Return a new empty sequence; raise `ContextError` where all `n_seq` are in use."""
        with self._entry(), self._handle:
            return self._new_sequence()

    def encode(self, ids: TokenIds) -> int:
        """Have an encoder-decoder model read the text that its sequences answer; return the token to begin those with.

        It takes the place of the text before: what sequences hold is evaluated anew when logits are asked for, and what
        closed ones have left is forgotten, pinned or not.
        Raises `ContextError` where the model has no encoder, `TypeError` or `ValueError` for what is no token id, or
        for more than `n_ubatch` of them, which an encoder has to see at once.
        """
        with self._entry(), self._handle:
            text: list[int] = self.model.tokenizer.as_array(ids).tolist()
            if not self._has_encoder:
                raise ContextError(f"this model ({self.model.architecture}) is no encoder-decoder: extend a sequence")
            if not 1 <= len(text) <= self.n_ubatch:
                raise ValueError(f"the text has {len(text)} tokens, and can have 1 to n_ubatch={self.n_ubatch}")
            self._pool.clear_finished(pinned=True)
            self.encoded = None
            for slot in self._pool.open:
                slot.forget_from(0)
            self._unread = ()
            batch = lib.llama_batch_init(len(text), 0, self.n_seq)
            try:
                for index, token in enumerate(text):
                    batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, index, self.n_seq
                    for sequence_id in range(self.n_seq):
                        batch.seq_id[index][sequence_id] = sequence_id
                batch.n_tokens = len(text)
                self._begin()
                self.stats.decode_calls += 1
                before = time.perf_counter()
                code = lib.llama_encode(self._pointer, batch)
                lib.llama_synchronize(self._pointer)
                self.stats.decode_seconds += time.perf_counter() - before
            finally:
                lib.llama_batch_free(batch)
            if code or callbacks.kept:
                self._raise_for(code, len(text))
            self.stats.tokens_encoded += len(text)
            self.encoded = text
            with self.model._handle as pointer:
                start: int = lib.llama_model_decoder_start_token(pointer)
            return start if start >= 0 else self.model.tokenizer.bos or 0

    def extend(
        self, texts: "Mapping[Sequence, TokenIds]", on_progress: Callable[[int, int], object] | None = None
    ) -> int:
        """Add tokens to several sequences and evaluate them together; return how many were evaluated.

        As `Sequence.extend` of each, but in shared batches, where a token more costs little. Texts that begin alike are
        evaluated each: of one evaluated before they would take their beginning, see `Sequence.fork`.
        Raises what `Sequence.extend` does, and `ValueError` for sequences of another context; whatever is raised, every
        sequence is as it was before, or as `on_full` has made it.
        """
        from .sequence import Sequence

        if not isinstance(texts, Mapping):
            raise TypeError(f"texts must be a mapping of sequences to token ids, not {type(texts).__name__}")
        with self._entry(), self._handle:
            texts = dict(texts)
            for sequence in texts:
                if not isinstance(sequence, Sequence):
                    raise TypeError(f"the keys of texts must be sequences, not {type(sequence).__name__}")
                if sequence.context is not self:
                    raise ValueError(f"{sequence!r} belongs to another context")
                sequence._slot.check_open()
            if on_progress is None and (n := self._extend_each_by_one(texts)):
                return n
            arrays = [(sequence, self.model.tokenizer.as_array(ids)) for sequence, ids in texts.items()]
            calls = self.stats.decode_calls
            grown: list[tuple[Slot, Before]] = []
            try:
                for sequence, new in arrays:
                    if new.size:
                        grown.append((sequence._slot, sequence._grow(new)))
                return self._evaluate([slot for slot, _ in grown if slot.n_cached < len(slot.tokens)], on_progress)
            except BaseException:
                for slot, before in grown:
                    slot.cut(before.n)
                    if slot.n_cached == before.n and self.stats.decode_calls == calls:
                        slot.logits, slot.unread = before.logits, before.unread
                raise

    def _extend_each_by_one(self, texts: "Mapping[Sequence, TokenIds]") -> int:
        """`extend` by a token each, where every one finds a cell, at the least cost; return 0 where it is not so."""
        slots: list[Slot] = []
        tokens: list[int] = []
        for sequence, ids in texts.items():
            if type(ids) is not list or len(ids) != 1 or type(ids[0]) is not int or not 0 <= ids[0] < self._n_vocab:
                return 0
            slot = sequence._slot
            if not slot.settled or slot.id < 0 or slot.n_cached != len(slot.tokens):
                return 0
            slots.append(slot)
            tokens.append(ids[0])
        count = len(slots)
        if not 0 < count <= min(self.memory.spare, self._max_batch) or not self.memory.can_truncate:
            return 0
        positions = [slot.n_cached for slot in slots]
        try:
            self.memory.spare -= count
            for slot, token in zip(slots, tokens, strict=True):
                slot.settled = False
                slot.logits, slot.unread = None, False
                slot.tokens.append(token)
            self._batch.put_each(tokens, positions, [slot.id for slot in slots])
            self._begin()
            self._run(count)
            self._unread = tuple(slots)
            for row, slot in enumerate(slots):
                self._advance(slot, 1)
                slot.row, slot.unread, slot.settled = row, True, True
        except BaseException:
            for slot, position in zip(slots, positions, strict=True):
                slot.cut(position)
            raise
        return count

    def restore(self, path: str | os.PathLike[str]) -> "Sequence":
        """Return a new sequence as `Sequence.save` wrote it; nothing is evaluated.

        The checksum finds damage, not malice: like a model, a file has to come from somebody who is trusted.
        Raises `StateError` for a file that is damaged, or was saved from another model, by another version, or with a
        KV cache of another form; `ContextFullError` where it does not fit, `ContextError` where all `n_seq` sequences
        are in use, `OSError` where it cannot be read.
        """
        from .state import restore

        return restore(self, path)

    @property
    def is_full(self) -> bool:
        """Whether the tokens of its sequences take every cell."""
        return self.cells_used >= (self.n_cells if self.memory.can_share else self.n_cells * self.n_seq)

    def clear_cache(self, pinned: bool = False) -> None:
        """Forget what closed sequences have left in the KV cache, pinned ones only if asked to."""
        with self._entry(), self._handle:
            self._pool.clear_finished(pinned)

    @property
    def cells_used(self) -> int:
        """How many KV cells the tokens of all sequences take, each shared one counted once.

        What closed sequences have left is not counted, as it is dropped when room is needed, unless it is pinned.
        """
        with self._entry():
            return self._pool.used()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._handle.closed

    def cancel(self) -> None:
        """Stop the computation that runs in another thread: its call raises `Cancelled`. A later call is unaffected."""
        self._abort.cancelled, self._was_cancelled = 1, True

    def close(self) -> None:
        """Free the context and close its sequences. Closing twice is no error."""
        with self._entry():
            self._pool.clear()
            self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Context cannot be copied or pickled: it owns memory outside Python")

    def __repr__(self) -> str:
        if self.closed:
            return "<Context: closed>"
        return f"<Context of {self.model.path.name}: n_ctx={self.n_ctx}, n_seq={self.n_seq}>"

    # What follows is for `Sequence`.

    def _entry(self) -> AbstractContextManager[object]:
        """Return what a call is made within: the lock, or where this thread has it, what lets only callbacks in.

        A signal handler or a finaliser amid a call gets a `ContextError`, also amid a call that a callback makes.
        """
        return self._nested() if self._is_mine() else self._lock

    @contextmanager
    def _nested(self) -> Iterator[None]:
        if not self._calls_back:
            raise ContextError("this context is computing: it cannot be used or closed from within")
        self._calls_back = False
        try:
            yield
        finally:
            self._calls_back = True

    def _is_within(self) -> bool:
        """Whether a call of this thread is under way, and is not waiting for a callback of its own to return."""
        return self._is_mine() and not self._calls_back

    # The caller holds the lock, and the handle is open.

    @contextmanager
    def _calling_back(self) -> Iterator[None]:
        """Let what is called now use the context."""
        before, self._calls_back = self._calls_back, True
        try:
            yield
        finally:
            self._calls_back = before

    def _new_sequence(self) -> "Sequence":
        from .sequence import Sequence

        name = self.model.architecture
        if not self.memory.exists or not self._has_decoder:
            raise ContextError(f"this model ({name}) has no decoder: it cannot continue a text")
        self._check_encoded()
        return Sequence(self, self._pool.new())

    def _check_encoded(self) -> None:
        if self._has_encoder and self.encoded is None:
            raise ContextError(
                f"this model ({self.model.architecture}) has an encoder: give it the text to answer with encode first"
            )

    def _begin(self) -> None:
        """Start a call: a `cancel` that came before it does not concern it."""
        if self._was_cancelled:
            self._abort.cancelled, self._was_cancelled = 0, False

    def _evaluate(self, slots: "Iterable[Slot]", on_progress: Callable[[int, int], object] | None = None) -> int:
        """Bring the cache of slots up to their lists, at least by the last token; return how many tokens that took."""
        queue = deque(slots)
        for slot in queue:
            slot.check_open()
            if not slot.tokens:
                raise ContextError("the sequence is empty: extend it with a prompt first (a BOS token at the least)")
            if not slot.settled or slot.n_cached == len(slot.tokens):
                slot.forget_from(min(slot.n_cached, len(slot.tokens) - 1))
            if self.memory.spare < 0 and (lacking := self._pool.lacks(slot, 0)):
                raise self._full(lacking, slot, lacking)
            self._pool.place(slot)
        started = list(queue)
        one_pass = self.memory.window and not self.memory.can_share  # libllama splits those by the lengths of the parts
        total, done = sum(len(slot.tokens) - slot.n_cached for slot in queue), 0
        self._begin()
        try:
            while queue:
                parts: list[tuple[Slot, int, int]] = []
                count = 0
                for slot in list(queue):
                    slot.check_open()  # `on_progress` may have done anything
                    slot.settle()
                    if slot.n_cached == len(slot.tokens):
                        queue.remove(slot)
                        continue
                    self._pool.place(slot)
                    size = min(len(slot.tokens) - slot.n_cached, self._stride, self._max_batch - count)
                    if not size or (parts and one_pass and size != parts[0][1]):
                        break
                    self._batch.put(count, slot.tokens[slot.n_cached : slot.n_cached + size], slot.n_cached, slot.id)
                    count += size
                    parts.append((slot, size, count - 1))
                    slot.settled = False
                if not parts:
                    break
                self._run(count)
                self._unread = tuple(slot for slot, _, _ in parts)
                for slot, size, row in parts:
                    finished = slot.n_cached + size == len(slot.tokens)
                    self._advance(slot, size)
                    slot.row, slot.unread = row, finished
                    self._checkpoint(slot, size)
                    slot.settled = True
                    if finished:
                        queue.remove(slot)
                done += count
                if on_progress is not None:
                    with self._calling_back():
                        on_progress(done, total)
        except BaseException:
            for slot in started:
                if not slot.settled:
                    slot.forget_from(slot.n_cached)
            raise
        return total

    def _decode(self, slot: "Slot", tokens: npt.NDArray[np.int32], all_logits: bool) -> None:
        """Evaluate at most `n_batch` tokens that follow what is cached; the caller has unsettled the slot."""
        slot.check_open()
        self._batch.put(0, tokens, slot.n_cached, slot.id, all_logits)
        self._run(len(tokens))
        self._advance(slot, len(tokens))
        self._checkpoint(slot, len(tokens))

    def _decode_one(self, slot: "Slot") -> None:
        """Evaluate a settled slot's last token, all before it being cached, at the least cost: the loop's case."""
        slot.settled = False
        position = slot.n_cached
        self._call(1, lib.minerva_decode_one, slot.tokens[position], position, slot.id)
        self._advance(slot, 1)
        self._unread, slot.row, slot.unread = (slot,), -1, True
        if not self.memory.can_truncate:
            self._checkpoint(slot, 1)
        slot.settled = True

    def _advance(self, slot: "Slot", size: int) -> None:
        """Take note that so many tokens more are cached."""
        start, end = slot.n_cached, slot.n_cached + size
        slot.n_cached = end
        if slot.n_seen <= start:
            slot.n_seen = end
        else:
            self.stats.tokens_reevaluated += min(slot.n_seen, end) - start
            slot.n_seen = max(slot.n_seen, end)

    def _checkpoint(self, slot: "Slot", n_evaluated: int | None = None) -> None:
        """Where the memory cannot be cut, keep the state: every so many tokens, and after a text of some length.

        Without `n_evaluated` in any case: where evaluating the tokens would not give it again.
        """
        if not self.memory.can_truncate and self._checkpoint_bytes:
            self._keep_logits(slot)
            stride = self._checkpoint_interval
            if n_evaluated is None:
                stride = 0
            elif n_evaluated >= _MIN_STRIDE:
                stride = min(_MIN_STRIDE, stride)
            slot.checkpoint(stride, self._checkpoint_bytes)

    def _run(self, count: int) -> None:
        """Have libllama evaluate so many tokens of the batch, and wait for the result."""
        self._batch.struct.n_tokens = count
        self._call(count, lib.minerva_decode, self._batch.pointer)

    def _call(self, count: int, decode: Callable[..., int], *arguments: Any) -> None:
        """Have one of the decode functions evaluate so many tokens, and wait for the result."""
        if self._has_encoder:
            self._check_encoded()
        for slot in self._unread:
            if slot.unread:
                self._keep_logits(slot)
        if self._pool.unclean:  # an interrupt came before it was cleaned
            self._pool.clean()
        stats = self.stats
        stats.decode_calls += 1  # before it: from now on what logits lay in the buffer are not there any more
        code = 2  # as if it was aborted, should an interrupt strike before it is known
        try:
            before = time.perf_counter()
            code = decode(self._decoder, *arguments)
            if code == 1 and self._pool.remove_strays():  # it found no cells
                code = decode(self._decoder, *arguments)
            stats.decode_seconds += time.perf_counter() - before
        finally:
            if code or self._pool.shifted:
                self._doubt(code)
        if code or callbacks.kept:
            self._raise_for(code, count)
        stats.tokens_evaluated += count

    def _doubt(self, code: int) -> None:
        """Trust what a decode with this return code has left, and no more."""
        if code and self.memory.kind in ("recurrent", "hybrid"):
            self._pool.doubt_all()
            self._pool.clean()
        if code and self._pool.shifted:
            self._pool.doubt_shifted()
        self._pool.shifted = False

    def _apply_shift(self, slot: "Slot") -> None:
        """Have a slot's shifted keys turned now, before they are copied: by evaluating one token more, for nothing."""
        if self._pool.shifted and slot.n_pure is not None:
            if self._pool.lacks(slot, 1):
                raise self._full(1, slot)
            self._keep_logits(slot)
            n, logits = slot.n_cached, slot.logits
            self._begin()
            slot.settled = False
            self._batch.put(0, slot.tokens[:1], n, slot.id)
            self._run(1)
            slot.forget_from(n)
            slot.logits = logits if slot.n_cached == n else None

    def _raise_for(self, code: int, count: int) -> None:
        """Raise what a callback has left behind, else what libllama's return code says, if anything."""
        callbacks.raise_kept()
        if code == 0:
            return
        if code == 2:
            raise Cancelled("the computation was stopped by cancel()")
        if code == 1:
            raise self._full(count)
        raise ContextError(f"libllama could not evaluate a batch of {count} tokens (code {code}); see its log")

    def _cannot_shift(self) -> ContextError:
        return ContextError(
            f"the memory of this model ({self.model.architecture}: {self.memory.kind}, kv_type={self.kv_type}) cannot "
            "shift: truncate instead, or try keys of another type"
        )

    def _full(self, wanted: int, slot: "Slot | None" = None, counted: int = 0) -> ContextFullError:
        """Return the error; of the cells wanted, so many are counted as used already."""
        used = self._pool.used(slot) - counted
        return ContextFullError(
            f"the context is full: {used} of n_ctx={self.n_cells} cells are used, {wanted} more are wanted, "
            f"{max(0, self.n_cells - used)} are free: shorten the text, or make a context with a larger n_ctx"
        )

    def _read_logits(self, row: int = -1) -> npt.NDArray[np.float32]:
        """Copy the logits of a token of the last batch, by its index there, out of libllama's buffer."""
        before = time.perf_counter()
        pointer = self._decoder.logits if row == -1 else lib.llama_get_logits_ith(self._pointer, row)
        if pointer != self._seen_at:
            if not pointer:
                raise ContextError("libllama has no logits for the last token; see its log")
            self._seen_at = ffi.NULL  # should an interrupt come before both are set
            self._seen = np.frombuffer(ffi.buffer(pointer, 4 * self._n_vocab), np.float32)
            self._seen_at = pointer
        logits: npt.NDArray[np.float32] = self._seen.copy()
        self.stats.logits_seconds += time.perf_counter() - before
        return logits

    def _keep_logits(self, slot: "Slot") -> None:
        """Copy a slot's logits before libllama's buffer is used for something else."""
        if slot.unread:
            slot.logits = self._read_logits(slot.row)
            slot.unread = False

    def _attach_prefix(self, slot: "Slot") -> int:
        """Give a slot the longest beginning of its tokens that another one has cached; return how many that saves."""
        if len(slot.tokens) - slot.n_cached < 2:  # the last token is evaluated anyway, to have its logits
            return 0
        source, n = self._pool.find_prefix(slot)
        before = slot.n_cached
        if source is not None:
            self._share(source, slot, n)
        return max(0, slot.n_cached - before)

    def _share(self, source: "Slot", slot: "Slot", n: int) -> None:
        self._keep_logits(source)
        if not self.memory.can_share:  # then it is read and written
            self._apply_shift(source)
        self._pool.share(source, slot, n)

    def _release(self, slot: "Slot") -> None:
        """Take a slot back: its sequence is closed, or was collected."""
        if not slot.closed:
            self._keep_logits(slot)
            self._pool.release(slot)


class _Batch:
    """A `llama_batch` of fixed capacity, with its arrays seen through numpy."""

    def __init__(self, capacity: int):
        self.tokens, self.positions, self.sequences = (np.empty(capacity, np.int32) for _ in range(3))
        self.outputs = np.empty(capacity, np.int8)
        self.steps = np.arange(capacity, dtype=np.int32)
        # Each token belongs to one sequence, whose id lies at the token's index in `sequences`.
        self._counts = np.ones(capacity, np.int32)
        self._addresses = self.sequences.ctypes.data + np.arange(capacity, dtype=np.uintp) * self.sequences.itemsize
        self.pointer = ffi.new("struct llama_batch *")
        self.struct = self.pointer[0]
        self.struct.token = ffi.from_buffer("llama_token[]", self.tokens)
        self.struct.pos = ffi.from_buffer("llama_pos[]", self.positions)
        self.struct.n_seq_id = ffi.from_buffer("int32_t[]", self._counts)
        self.struct.seq_id = ffi.cast("llama_seq_id **", self._addresses.ctypes.data)
        self.struct.logits = ffi.from_buffer("int8_t[]", self.outputs)

    def put(
        self,
        at: int,
        tokens: "array[int] | npt.NDArray[np.int32]",
        start: int,
        sequence_id: int,
        all_logits: bool = False,
    ) -> None:
        """Set the entries from `at` on: tokens at positions from `start`, of which the last is to have logits."""
        end = at + len(tokens)
        self.tokens[at:end] = tokens
        self.positions[at:end] = self.steps[: end - at]
        self.positions[at:end] += start
        self.sequences[at:end] = sequence_id
        self.outputs[at:end] = all_logits
        self.outputs[end - 1] = True

    def put_each(self, tokens: list[int], positions: list[int], sequence_ids: list[int]) -> None:
        """Set the entries from the first on: a token of each of several sequences, all of which are to have logits."""
        count = len(tokens)
        self.tokens[:count], self.positions[:count], self.sequences[:count] = tokens, positions, sequence_ids
        self.outputs[:count] = True


def _in_range(name: str, value: int, low: int, high: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, not {value}")
    return value


def _kv_types(model: "Model", kv_type: str | tuple[str, str], flash: str) -> tuple[str, str]:
    """Return the types of keys and of values."""
    types = tuple(kv_type) if isinstance(kv_type, tuple | list) else (kv_type, kv_type)
    if len(types) != 2 or not all(kind in KV_TYPES for kind in types):
        raise ValueError(f"kv_type must be one of {', '.join(KV_TYPES)}, or a pair of them, not {kv_type!r}")
    key, value = types
    if lib.ggml_is_quantized(_ggml_type(value)):
        other = f'use kv_type=({key!r}, "f16")'
        if flash == "off":
            raise ContextError(f'values of type {value!r} need flash attention: leave it "auto", or {other}')
        if model.has_encoder:  # it adds positions to the scores, which flash attention never has; memory is corrupted
            raise ContextError(f"values of type {value!r} need flash attention, which T5's positions forbid: {other}")
    return key, value


def _ggml_type(name: str) -> int:
    kind: int = getattr(lib, f"GGML_TYPE_{name.upper()}")
    return kind


def _check_heads(model: "Model", kv_type: tuple[str, str]) -> None:
    """Refuse a quantised type whose blocks do not divide a head."""
    for name, kind, size in zip(("keys", "values"), kv_type, head_sizes(model), strict=True):
        block = lib.ggml_blck_size(_ggml_type(kind))
        if size % block:
            raise ContextError(
                f"{name} of type {kind!r} come in blocks of {block} numbers, and a head of this model has {size:.0f}: "
                "ask for another kv_type"
            )


def _check_memory(model: "Model", n_cells: int, kv_type: tuple[str, str]) -> None:
    """Refuse a KV cache that this machine cannot hold: the system would promise the memory, then kill the process."""
    kv_bytes_per_token = _kv_bytes_per_token(model, kv_type)
    memory = physical_memory_bytes() + sum(device.memory_total_bytes for device in devices() if device.type == "gpu")
    if kv_bytes_per_token * n_cells > memory:
        raise ContextError(
            f"n_ctx={n_cells} needs a KV cache of about {kv_bytes_per_token * n_cells / 1e9:,.0f} GB, and this machine "
            f"has {memory / 1e9:,.0f} GB: ask for at most n_ctx={int(memory / kv_bytes_per_token)}"
        )


def _kv_bytes_per_token(model: "Model", kv_type: tuple[str, str]) -> float:
    """Return the bytes that one token's keys and values take, by the model's metadata; at least 1."""
    of_key, of_value = (lib.ggml_type_size(kind) / lib.ggml_blck_size(kind) for kind in map(_ggml_type, kv_type))
    key, value = head_sizes(model)
    heads = model.hyperparameter("attention.head_count_kv", *model.hyperparameter("attention.head_count"))
    heads = heads if len(heads) > 1 else heads * model.n_layer
    compressed = max(model.hyperparameter("attention.kv_lora_rank")) * model.n_layer
    return max(1.0, compressed * of_key or sum(heads) * (key * of_key + value * of_value))
