"""A context: the KV cache's memory, the compute graph, and the one place that calls `llama_decode`."""

import functools
import math
import operator
import struct
import threading
import time
import weakref
from array import array
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from ._binding import callbacks, ffi, lib
from ._handle import Handle
from .devices import available_cpus, devices, physical_memory_bytes
from .errors import Cancelled, ClosedError, ContextError, ContextFullError

if TYPE_CHECKING:
    from typing_extensions import Self

    from .model import Model
    from .sequence import Sequence

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

FLASH_ATTENTION = {
    "auto": lib.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": lib.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": lib.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}

_CELLS_STEP = 256  # libllama rounds the number of cells up to a multiple of this

_POLL_INTERVAL_US = 50_000  # how often a long computation looks for Ctrl-C


@dataclass
class Stats:
    """What a context has done since it was made."""

    tokens_evaluated: int = 0
    tokens_reused: int = 0  # tokens that were asked for and were in the KV cache already: none, as yet
    decode_calls: int = 0
    decode_seconds: float = 0.0  # in `llama_decode` and the wait for its result


class Context:
    """Computes with a model; make one with `Model.context`.

    A context manager. It may be used from any thread: one lock serialises the calls, and long ones release the GIL.
    """

    stats: Stats
    model: "Model"
    n_ctx: int
    n_seq: int
    n_batch: int
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
        kv_type: str = "f16",
        flash_attention: Literal["auto", "on", "off"] | bool = "auto",
    ):
        self.model = model
        self.n_ctx = _in_range("n_ctx", n_ctx, 2, 2**31 - _CELLS_STEP)
        self.n_seq = _in_range("n_seq", n_seq, 1, lib.llama_max_parallel_sequences())
        self.n_batch = min(_in_range("n_batch", n_batch, 1, 2**31 - 1), self.n_ctx)
        n_ubatch = _in_range("n_ubatch", n_ubatch, 1, 2**31 - 1)
        if n_threads is None:
            n_threads = min(available_cpus(), lib.GGML_MAX_N_THREADS)
        self.n_threads = _in_range("n_threads", n_threads, 1, lib.GGML_MAX_N_THREADS)
        if kv_type not in KV_TYPES:
            raise ValueError(f"kv_type must be one of {', '.join(KV_TYPES)}, not {kv_type!r}")
        flash = {True: "on", False: "off"}[flash_attention] if isinstance(flash_attention, bool) else flash_attention
        if flash not in FLASH_ATTENTION:
            raise ValueError(f'flash_attention must be "auto", "on" or "off", not {flash_attention!r}')
        if model.vocab_only:
            raise ContextError("the model was loaded with vocab_only=True: it has no weights to compute with")
        self.stats = Stats()
        self._lock = threading.RLock()
        self._abort = ffi.new("minerva_abort_state *")
        self._abort.poll_interval_us = _POLL_INTERVAL_US
        self._was_cancelled = False
        self._computing = False

        parameters = lib.llama_context_default_params()
        # A multiple of libllama's step, so that it grants exactly this many cells; `n_ctx` is kept to in Python.
        parameters.n_ctx = math.ceil(self.n_ctx / _CELLS_STEP) * _CELLS_STEP
        parameters.n_batch = self.n_batch
        parameters.n_ubatch = min(n_ubatch, self.n_batch)
        parameters.n_seq_max = self.n_seq
        parameters.n_threads = parameters.n_threads_batch = self.n_threads
        parameters.type_k = parameters.type_v = getattr(lib, f"GGML_TYPE_{kv_type.upper()}")
        parameters.flash_attn_type = FLASH_ATTENTION[flash]
        parameters.kv_unified = True  # sequences share one pool of cells, so a lone one may use all of it
        parameters.no_perf = True
        parameters.abort_callback = lib.minerva_abort
        parameters.abort_callback_data = self._abort
        with model._handle as model_pointer:
            _check_memory(model, self.n_ctx, kv_type)
            with callbacks.captured_errors() as errors:
                pointer = lib.llama_init_from_model(model_pointer, parameters)
            if pointer == ffi.NULL:
                why = callbacks.reason(errors, "libllama gives no reason")
                raise ContextError(
                    f"no context could be made with n_ctx={n_ctx}, n_batch={n_batch}, n_seq={n_seq}, "
                    f"kv_type={kv_type!r}, flash_attention={flash!r} ({why}): ask for less, or another type"
                )
            self._handle = Handle("Context", pointer, lib.llama_free, parent=model._handle)
            self._encodes = lib.llama_model_has_encoder(model_pointer)
        callbacks.raise_kept()
        self._pointer = pointer
        self._memory = lib.llama_get_memory(pointer)
        self._n_vocab = model.tokenizer.n_vocab
        self._last_row = self._seen_at = ffi.NULL
        self._seen: npt.NDArray[np.float32] = np.empty(
            0, np.float32
        )  # libllama's memory at `_seen_at`: never given out
        self._batch, self._single = _Batch(self.n_batch), _SingleToken()
        self._sequences: weakref.WeakSet[Sequence] = weakref.WeakSet()
        self._unread: weakref.ref[Sequence] | None = None  # whose logits lie in libllama's buffer and nowhere else
        self._free_ids = list(range(self.n_seq - 1, -1, -1))
        self._tokens: dict[int, array[int]] = {}  # of every sequence, by its id
        self._orphans: deque[int] = deque()  # ids of sequences that were collected without `close`
        model._contexts.add(self)

    def sequence(self) -> "Sequence":
        """Return a new empty sequence; raise `ContextError` where all `n_seq` are in use."""
        from .sequence import Sequence

        with self._lock, self._handle:
            if self._memory == ffi.NULL or self._encodes:
                raise ContextError(
                    f"this model ({self.model.architecture}) has an encoder: it cannot continue a text by itself"
                )
            self._collect_orphans()
            if not self._free_ids:
                raise ContextError(
                    f"all {self.n_seq} sequences of this context are in use: close one, or make a context with more "
                    f"room, such as n_seq={self.n_seq + 1}"
                )
            sequence = Sequence(self, self._free_ids.pop())
            self._sequences.add(sequence)
            self._tokens[sequence._id] = sequence._tokens
            return sequence

    @property
    def cells_used(self) -> int:
        """How many KV cells the tokens of all sequences take."""
        with self._lock:
            if self._orphans:
                self._collect_orphans()
            return sum(map(len, self._tokens.values()))

    @property
    def is_full(self) -> bool:
        """Whether every cell is taken."""
        return sum(map(len, self._tokens.values())) >= self.n_ctx

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._handle.closed

    def cancel(self) -> None:
        """Stop the computation that runs in another thread: its call raises `Cancelled`. A later call is unaffected."""
        self._abort.cancelled, self._was_cancelled = 1, True

    def close(self) -> None:
        """Free the context and close its sequences. Closing twice is no error."""
        with self._lock:
            self._check_idle()
            for sequence in list(self._sequences):
                sequence.close()
            self._handle.close()

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Context cannot be copied or pickled: it owns memory outside Python")

    def __repr__(self) -> str:
        if self.closed:
            return "<Context: closed>"
        return f"<Context of {self.model.path.name}: {self.cells_used} of {self.n_ctx} cells used>"

    # What follows is for `Sequence`. The caller holds the lock, and the handle is open.

    def _check_idle(self) -> None:
        """Refuse what a signal handler or a callback asks for amid a computation on its own thread."""
        if self._computing:
            raise ContextError("this context is computing: it cannot be used or closed from within")

    def _begin(self) -> None:
        """Start a call: a `cancel` that came before it does not concern it."""
        if self._was_cancelled:
            self._abort.cancelled, self._was_cancelled = 0, False

    def _decode(
        self, sequence: "Sequence", tokens: npt.NDArray[np.int32], start: int, all_logits: bool = False
    ) -> None:
        """Evaluate at most `n_batch` tokens at positions from `start`; on an error nothing of them is kept."""
        batch = self._batch
        count = len(tokens)
        batch.tokens[:count] = tokens
        batch.positions[:count] = batch.steps[:count]
        batch.positions[:count] += start
        batch.sequences[:count] = sequence._id
        batch.outputs[: count - 1] = all_logits
        batch.outputs[count - 1] = True
        batch.struct.n_tokens = count
        self._run(sequence, batch.struct, count)

    def _decode_one(self, sequence: "Sequence", token: int, start: int) -> None:
        """Evaluate one token, as `_decode` does, at the least cost: the decode loop's case."""
        self._single.set(token, start, sequence._id)
        self._run(sequence, self._single.struct, 1)

    def _run(self, sequence: "Sequence", batch: Any, count: int) -> None:
        self._check_idle()
        if sequence._closed:  # by a callback amid the call
            raise ClosedError("this Sequence is closed")
        unread = self._unread
        if unread is not None:
            self._unread = None
            if unread is not sequence._reference and (other := unread()) is not None:
                other._keep_logits()
        stats = self.stats
        try:
            self._computing = True
            before = time.perf_counter()
            code = lib.llama_decode(self._pointer, batch)
            if not code:
                self._last_row = lib.llama_get_logits_ith(self._pointer, -1)  # waits for the result
            stats.decode_seconds += time.perf_counter() - before
        finally:
            self._computing = False
        stats.decode_calls += 1
        if callbacks.kept:
            callbacks.raise_kept()
        if code:
            self._raise_for(code, count)
        stats.tokens_evaluated += count
        self._unread = sequence._reference

    def _raise_for(self, code: int, count: int) -> None:
        """Turn libllama's return code into an exception."""
        if code == 2:
            raise Cancelled("the computation was stopped by cancel()")
        if code == 1:
            raise self._full(count)
        raise ContextError(f"libllama could not evaluate a batch of {count} tokens (code {code}); see its log")

    def _check_room(self, wanted: int) -> None:
        """Raise `ContextFullError` unless `wanted` more tokens fit."""
        if self._orphans:
            self._collect_orphans()
        if sum(map(len, self._tokens.values())) + wanted > self.n_ctx:
            raise self._full(wanted)

    def _full(self, wanted: int) -> ContextFullError:
        used = self.cells_used
        return ContextFullError(
            f"the context is full: {used} of n_ctx={self.n_ctx} cells are used, {wanted} more are wanted, "
            f"{self.n_ctx - used} are free: shorten the text, or make a context with a larger n_ctx"
        )

    def _read_logits(self, row: int | None = None) -> npt.NDArray[np.float32]:
        """Copy the last row of logits, or that of a token of the last batch, out of libllama's buffer."""
        pointer = self._last_row if row is None else lib.llama_get_logits_ith(self._pointer, row)
        if pointer != self._seen_at:
            if not pointer:
                raise ContextError("libllama has no logits for the last token; see its log")
            self._seen = np.frombuffer(ffi.buffer(pointer, 4 * self._n_vocab), np.float32)
            self._seen_at = pointer
        logits: npt.NDArray[np.float32] = self._seen.copy()
        return logits

    def _remove(self, sequence_id: int, start: int) -> bool:
        """Forget a sequence's tokens from position `start` on; False where this kind of memory cannot."""
        self._check_idle()
        if self.closed:
            return True
        return bool(lib.llama_memory_seq_rm(self._memory, sequence_id, start, -1))

    def _release(self, sequence: "Sequence") -> None:
        """Take a sequence's id and cells back."""
        if self._unread is sequence._reference:
            self._unread = None
        self._sequences.discard(sequence)
        self._orphans.append(sequence._id)
        self._collect_orphans()

    def _collect_orphans(self) -> None:
        while self._orphans:
            if self._computing:  # a signal handler looks at the context: not now
                return
            sequence_id = self._orphans.popleft()
            self._remove(sequence_id, -1)
            self._tokens.pop(sequence_id, None)
            self._free_ids.append(sequence_id)


class _Batch:
    """A `llama_batch` of fixed capacity, with its arrays seen through numpy."""

    def __init__(self, capacity: int):
        self.tokens, self.positions, self.sequences = (np.empty(capacity, np.int32) for _ in range(3))
        self.outputs = np.empty(capacity, np.int8)
        self.steps = np.arange(capacity, dtype=np.int32)
        # Each token belongs to one sequence, whose id lies at the token's index in `sequences`.
        self._counts = np.ones(capacity, np.int32)
        self._addresses = self.sequences.ctypes.data + np.arange(capacity, dtype=np.uintp) * self.sequences.itemsize
        self._owner = ffi.new("struct llama_batch *")
        self.struct = self._owner[0]
        self.struct.token = ffi.from_buffer("llama_token[]", self.tokens)
        self.struct.pos = ffi.from_buffer("llama_pos[]", self.positions)
        self.struct.n_seq_id = ffi.from_buffer("int32_t[]", self._counts)
        self.struct.seq_id = ffi.cast("llama_seq_id **", self._addresses.ctypes.data)
        self.struct.logits = ffi.from_buffer("int8_t[]", self.outputs)


class _SingleToken:
    """A `llama_batch` of one token, whose three numbers lie side by side and are set in one go."""

    def __init__(self) -> None:
        self._numbers = ffi.new("int32_t[]", 3)  # token, position, sequence id
        self._count, self._output = ffi.new("int32_t *", 1), ffi.new("int8_t *", 1)
        self._sequence = ffi.new("llama_seq_id **", self._numbers + 2)
        self._owner = ffi.new(
            "struct llama_batch *",
            {
                "n_tokens": 1,
                "token": self._numbers,
                "pos": self._numbers + 1,
                "n_seq_id": self._count,
                "seq_id": self._sequence,
                "logits": self._output,
            },
        )
        self.struct = self._owner[0]
        self.set = functools.partial(struct.Struct("=3i").pack_into, ffi.buffer(self._numbers), 0)


def _in_range(name: str, value: int, low: int, high: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, not {value}")
    return value


def _check_memory(model: "Model", n_cells: int, kv_type: str) -> None:
    """Refuse a KV cache that this machine cannot hold: the system would promise the memory, then kill the process."""
    kv_bytes_per_token = _kv_bytes_per_token(model, kv_type)
    memory = physical_memory_bytes() + sum(device.memory_total_bytes for device in devices() if device.type == "gpu")
    if kv_bytes_per_token * n_cells > memory:
        raise ContextError(
            f"n_ctx={n_cells} needs a KV cache of about {kv_bytes_per_token * n_cells / 1e9:,.0f} GB, and this machine "
            f"has {memory / 1e9:,.0f} GB: ask for at most n_ctx={int(memory / kv_bytes_per_token)}"
        )


def _kv_bytes_per_token(model: "Model", kv_type: str) -> float:
    """Return the bytes that one token's keys and values take, by the model's metadata; at least 1."""
    kind = getattr(lib, f"GGML_TYPE_{kv_type.upper()}")
    element = lib.ggml_type_size(kind) / lib.ggml_blck_size(kind)
    n_head = model.hyperparameter("attention.head_count")
    width = model.n_embd / max(1.0, max(n_head))
    key = max(model.hyperparameter("attention.key_length", width))
    value = max(model.hyperparameter("attention.value_length", width))
    heads = model.hyperparameter("attention.head_count_kv", *n_head)
    heads = heads if len(heads) > 1 else heads * model.n_layer
    compressed = max(model.hyperparameter("attention.kv_lora_rank")) * model.n_layer
    return max(1.0, (compressed or sum(heads) * (key + value)) * element)
