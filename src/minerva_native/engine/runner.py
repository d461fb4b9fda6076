"""One libllama context: its batch, its threads, its abort flag and its logits. It knows ids and positions, no texts."""

import contextlib
import functools
import math
import time
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._binding import callbacks, ffi, is_lost, lib, thrown
from .._handle import Handle
from ..errors import BrokenContextError, Cancelled, ContextError, DecodeError, DeviceError
from ..options import ContextOptions, context_parameters, head_parameters
from .gate import CancelToken, check

if TYPE_CHECKING:
    from ..model import Model

Logits = npt.NDArray[np.float32]

OK, NO_CELLS, ABORTED = 0, 1, 2  # what `llama_decode` returns; below 0 it failed

_POLL_US = 50_000  # how often a long computation looks for Ctrl-C,
_POLL_CANCEL_US = 20_000  # and for a cancel token


_REMEDIES = {
    lib.MINERVA_LOST: "close the model and load it again",
    lib.MINERVA_GPU_LOST: "its GPU is lost to this process, which has to be started again to use it",
}


@dataclass
class Stats:
    """What a context has done since it was made.

    Attributes:
        tokens_evaluated: tokens that went through the model.
        tokens_reused: tokens that were asked for and were in the KV cache already.
        tokens_reevaluated: tokens evaluated again, because their state was gone or their logits were asked for.
        tokens_discarded: tokens dropped by `Sequence.shift`.
        tokens_encoded: tokens read by `Context.encode`.
        decode_calls: calls of `llama_decode` and `llama_encode`.
        decode_seconds: time in those calls, to the end of the computation.
        logits_seconds: time spent copying logits out of libllama's buffer.
    """

    tokens_evaluated: int = 0
    tokens_reused: int = 0
    tokens_reevaluated: int = 0
    tokens_discarded: int = 0
    tokens_encoded: int = 0
    decode_calls: int = 0
    decode_seconds: float = 0.0
    logits_seconds: float = 0.0


class Watch:
    """What a computation that runs is asked about a few times a second, by `callbacks`."""

    def __init__(self) -> None:
        self.token: CancelToken | None = None

    def is_cancelled(self) -> bool:
        """Return whether to stop."""
        return self.token is not None and self.token.is_set()


class Runner:
    """A `llama_context`. The caller holds the gate; the handle is open.

    `decode`, `decode_one` and `decode_each` return libllama's code: `OK`, `NO_CELLS`, `ABORTED`, or a failure. They are
    C functions with their first argument bound: after each token all Python code is cold, and a call costs.
    """

    def __init__(self, model: "Model", options: ContextOptions):
        self.model, self.options, self.stats = model, options, Stats()
        self.n_vocab = model.tokenizer.n_vocab
        self.was_cancelled = False
        self._watch = Watch()
        self._watch_handle = ffi.new_handle(self._watch)
        self._abort = ffi.new("minerva_abort_state *", {"poll_interval_us": _POLL_US, "data": self._watch_handle})
        self.decoder = ffi.new("minerva_decoder *", {"abort": self._abort, "connections": model.connections})
        self._remedy = "close it and make another"  # once it is broken
        self._head_has_failed = False
        self.handle = self._make()
        with model.raw() as pointer:
            self.has_decoder = bool(lib.llama_model_has_decoder(pointer))
            self.has_encoder = self.has_decoder and bool(lib.llama_model_has_encoder(pointer))
        self._context = self.handle.pointer
        self.decode = functools.partial(lib.minerva_decode, self.decoder)
        self.decode_one = functools.partial(lib.minerva_decode_one, self.decoder)
        self.decode_each = functools.partial(lib.minerva_decode_each, self.decoder)
        self.batch = Batch(options.n_batch)
        self._seen_at = ffi.NULL
        self._seen: Logits = np.empty(0, np.float32)  # libllama's memory at `_seen_at`: never handed out
        self._rows_end = ffi.NULL
        self._rows: Logits = np.empty((0, 0), np.float32)  # and the same of several rows, of which this is the last

    def _make(self) -> Handle:
        model, options = self.model, self.options
        n_threads = options.n_threads or 1
        n_threads_batch = options.n_threads_batch or n_threads
        parameters = context_parameters(options)
        parameters.abort_callback = lib.minerva_abort
        parameters.abort_callback_data = self._abort
        with model.raw() as model_pointer, contextlib.ExitStack() as undo:
            pointer = self._new_context(model_pointer, parameters)
            decoder = self.decoder

            def free(pointer: Any) -> None:
                lib.minerva_head_free(decoder)
                lib.minerva_threads_free(decoder)
                lib.minerva_context_free(pointer)

            handle = Handle("Context", pointer, free, parent=model.raw())
            undo.callback(handle.close)
            callbacks.raise_kept()
            decoder.context = pointer
            if options.mtp:
                self._add_head(model_pointer)
            # Without threads of its own, libllama starts some for every graph that it computes.
            self.set_threads(n_threads, n_threads_batch)
            undo.pop_all()
            return handle

    def _new_context(self, model: Any, parameters: Any) -> Any:
        """Return a `llama_context *`."""
        options = self.options
        with callbacks.captured_errors() as errors:
            pointer = lib.minerva_context_new(model, parameters, self.model.connections)
        if pointer != ffi.NULL:
            return pointer
        callbacks.raise_kept()
        of_head = " for the model's MTP head" if parameters.ctx_type == lib.LLAMA_CONTEXT_TYPE_MTP else ""
        if is_lost():
            raise DeviceError(f"no context could be made{of_head}: {thrown()}; close the model and load it again")
        why = thrown() or callbacks.reason(errors, "libllama gives no reason")
        if why.startswith("device lost"):  # as ggml's Vulkan says
            raise DeviceError(f"no context could be made{of_head}: {why}; {_REMEDIES[lib.MINERVA_GPU_LOST]}")
        raise ContextError(
            f"no context could be made{of_head} with n_ctx={options.n_ctx}, n_batch={options.n_batch}, "
            f"n_seq={options.n_seq}, kv_type={options.kv_types}, flash_attention={options.flash_attention!r} ({why}): "
            "ask for less, or another type"
        )

    def _add_head(self, model: Any) -> None:
        """Give the decoder the model's MTP head, which from then on reads whatever is evaluated."""
        parameters = head_parameters(self.options)
        parameters.abort_callback, parameters.abort_callback_data = lib.minerva_abort, self._abort
        with callbacks.rehearsal():  # of what the options are warned of, the other context has warned
            pointer = self._new_context(model, parameters)
        if lib.minerva_head_new(self.decoder, pointer):
            lib.minerva_context_free(pointer)
            raise ContextError(f"the model's MTP head cannot be used: {thrown()}")
        callbacks.raise_kept()

    def draft(self, token: int, position: int, sequence_id: int, n: int) -> list[int]:
        """Return up to `n` tokens that the head guesses after one that is evaluated next."""
        drafts = ffi.new("int32_t[]", min(n, lib.MINERVA_MOST_DRAFTED))
        count = lib.minerva_head_draft(self.decoder, sequence_id, token, position, len(drafts), drafts)
        why = thrown() if count == lib.MINERVA_THREW else ""
        callbacks.raise_kept()
        if self._abort.cancelled:
            raise Cancelled("the computation was cancelled")
        if count < 0:
            if not self._head_has_failed:
                callbacks.logger.warning("the model's MTP head has failed, and drafts no more in this context: %s", why)
            self._head_has_failed = True
            return []
        drafted: list[int] = ffi.unpack(drafts, count)
        return drafted

    def set_threads(self, n: int, batch: int) -> None:
        """Compute a single token with `n` threads and several with `batch`; raise `ContextError` if it cannot be."""
        if lib.minerva_threads_set(self.decoder, n, batch):
            if self.is_broken:
                raise self.broken()
            raise ContextError(f"a context with n_threads={n} and n_threads_batch={batch} cannot be had: {thrown()}")

    def wake(self) -> None:
        """Have the threads compute for whoever calls libllama itself."""
        lib.minerva_threads_wake(self.decoder)

    def cancel(self) -> None:
        """Stop what computes now, on whatever thread."""
        self._abort.cancelled, self.was_cancelled = 1, True

    def begin(self, cancel: CancelToken | None = None) -> None:
        """Start a call: a `cancel` that came before it does not concern it, a token that is set does."""
        if self.was_cancelled:
            self._abort.cancelled, self.was_cancelled = 0, False
        check(cancel)

    def watch(self, cancel: CancelToken | None) -> None:
        """Have the next computations look at a cancel token, or at none."""
        callbacks.forget_stop()
        self._watch.token = cancel
        self._abort.poll_interval_us = _POLL_US if cancel is None else _POLL_CANCEL_US
        if cancel is not None:
            self._abort.next_poll_us = 0

    def encode(self, ids: list[int]) -> int:
        """Have an encoder read a text as the only one of every sequence; return libllama's code."""
        self.stats.decode_calls += 1
        before = time.perf_counter()
        code: int = lib.minerva_encode(self.decoder, len(ids), ids, self.options.n_seq)
        self.stats.decode_seconds += time.perf_counter() - before
        return code

    def logits(self, row: int = -1) -> Logits:
        """Copy the logits of a token of the last batch, by its index there, out of libllama's buffer."""
        before = time.perf_counter()
        logits = self.peek(row).copy()
        self.stats.logits_seconds += time.perf_counter() - before
        return logits

    def peek(self, row: int) -> Logits:
        """Return the same where libllama has them: to be read, or copied, before the next computation."""
        before = time.perf_counter()
        pointer = self.decoder.logits if row == -1 else lib.llama_get_logits_ith(self._context, row)
        if pointer != self._seen_at:
            if not pointer:
                raise DecodeError(f"libllama has no logits for the last token{callbacks.logged_since(before)}")
            self._seen_at = ffi.NULL  # an interrupt may come before both are set
            self._seen = np.frombuffer(ffi.buffer(pointer, 4 * self.n_vocab), np.float32)
            self._seen_at = pointer
        return self._seen

    def rows(self, n: int) -> Logits:
        """Return the last `n` logits of the last batch, (n, n_vocab), where libllama has them: to be read at once."""
        pointer = self.decoder.logits
        if pointer != self._rows_end or n != len(self._rows):
            size = n * self.n_vocab
            self._rows_end = ffi.NULL  # an interrupt may come before both are set
            memory = ffi.buffer(pointer - (size - self.n_vocab), 4 * size)
            self._rows = np.frombuffer(memory, np.float32).reshape(n, self.n_vocab)
            self._rows_end = pointer
        return self._rows

    def raise_for(self, code: int, count: int, since: float) -> None:
        """Raise what a callback has left behind, else what libllama's return code says, if anything.

        `since`: when the call began, by `time.perf_counter`, to tell its log lines from older ones.
        """
        callbacks.raise_kept()
        if code == ABORTED:
            raise Cancelled("the computation was cancelled")
        if code == lib.MINERVA_THREW:
            raise self.broken(since)
        if code == lib.MINERVA_NO_STACK:
            raise ContextError("this thread's stack is too small to compute: give it a megabyte (threading.stack_size)")
        if code:
            why = callbacks.logged_since(since)
            raise DecodeError(f"libllama could not evaluate a batch of {count} tokens (code {code}){why}", code=code)

    @property
    def is_broken(self) -> bool:
        """Whether a computation has failed in a way after which libllama must not touch the context again."""
        return bool(self.decoder.failed)

    def broken(self, since: float = math.inf) -> BrokenContextError:
        """Return the error for a guarded call that threw, or was refused because an earlier one did.

        `since`: when the call began, by `time.perf_counter`, if its log lines say more than what was thrown.
        """
        self._remedy = _REMEDIES.get(lib.minerva_thrown_cause(), self._remedy)
        why = thrown() + callbacks.logged_since(since)
        return BrokenContextError(f"this context cannot be used any more ({why}): {self._remedy}")


class Batch:
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
        self, at: int, tokens: "array[int] | npt.NDArray[np.int32]", start: int, sequence_id: int, n_outputs: int = 1
    ) -> None:
        """Set the entries from `at` on: tokens at positions from `start`, of which the last `n_outputs` get logits."""
        end = at + len(tokens)
        self.tokens[at:end] = tokens
        self.positions[at:end] = self.steps[: end - at]
        self.positions[at:end] += start
        self.sequences[at:end] = sequence_id
        self.outputs[at:end] = False
        if n_outputs:
            self.outputs[end - n_outputs : end] = True
        self.struct.n_tokens = end
