"""A context's memory: what of it can be cut, shifted, shared and copied, and the libllama calls that do it."""

import os
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ._binding import callbacks, ffi, lib
from ._handle import Handle

if TYPE_CHECKING:
    from .model import Model

Kind = Literal["attention", "sliding window", "recurrent", "hybrid", "encoder-decoder"]

State = npt.NDArray[np.uint8]

_WITHOUT_GAPS = ("attention", "encoder-decoder")

PARTLY_TURNED = frozenset(
    {
        *("afmoe", "cohere2", "cohere2moe", "exaone-moe", "exaone4"),
        *("llama4", "maple", "muse-glimmer", "smallthinker", "smollm3"),
    }
)
"""Architectures with rotary positions in some of their layers only, which libllama's shift does not know."""


class Memory:
    """What the memory of a context can do, which depends on the model's architecture.

    `kind`: "attention" keeps keys and values of every token, "sliding window" in some layers only of the last `window`
    tokens, "recurrent" one state that every token changes, "hybrid" the last and one of the others;
    "encoder-decoder" is attention, to what `Context.encode` was given besides.
    `can_truncate`: whether the end of a sequence can be forgotten at any point. Where not, a copy of the state is kept
    every so many tokens (a checkpoint), and `truncate` goes back to the nearest one before. (A window kept in full may
    have given the cells of tokens that left it to others; where those come into it again, all is evaluated anew.)
    `can_shift`: whether tokens can be taken out of the middle and the rest moved up without evaluating them again.
    `can_share`: whether sequences share the cells of what they have in common, rather than copy them.
    """

    def __init__(self, model: "Model", handle: Handle, key_type: str, unified: bool, swa_full: bool):
        self._handle = handle
        self._context = handle.pointer
        self._memory = lib.llama_get_memory(self._context)
        with model._handle as pointer:
            hybrid, recurrent = lib.llama_model_is_hybrid(pointer), lib.llama_model_is_recurrent(pointer)
            self.window: int = max(0, lib.llama_model_n_swa(pointer))
        self.kind: Kind = "attention"
        if recurrent:
            self.kind = "recurrent"
        elif hybrid or model.architecture == "deepseek4":  # whose compressed keys cannot be cut either
            self.kind = "hybrid"
        elif self.window:
            self.kind = "sliding window"
        elif model.has_encoder:
            self.kind = "encoder-decoder"
        self.exists = self._memory != ffi.NULL
        self.can_truncate = self.kind in _WITHOUT_GAPS or (self.kind == "sliding window" and swa_full)
        self.can_shift: bool = self.exists and lib.llama_memory_can_shift(self._memory) and _keys_turn(model, key_type)
        if self.kind == "hybrid" and self.window:  # libllama ends the process where no layer attends to everything
            self.can_shift = False
        self._is_small = bool(self.window) and not swa_full
        self.can_share = unified
        self.key_transformations = _key_transformations(model, self._context)
        self.state_version: int = lib.LLAMA_STATE_SEQ_VERSION
        self.spare = -1  # how many more tokens are known to find cells; below 0, that is to be counted again

    def __repr__(self) -> str:
        able = [name for name in ("truncate", "shift", "share") if getattr(self, f"can_{name}")]
        return f"<Memory: {self.kind}, can {', '.join(able) or 'do nothing but grow'}>"

    # What follows is for `Slot` and its pool. The caller holds the context's lock.

    def remove(self, sequence_id: int, start: int, stop: int = -1) -> bool:
        """Forget a sequence's tokens from position `start` on, or up to `stop`; False where this kind cannot."""
        if self._handle.closed or sequence_id < 0:
            return True
        return bool(lib.llama_memory_seq_rm(self._memory, sequence_id, start, stop))

    def holds(self, sequence_id: int, n: int) -> bool:
        """Whether a sequence's first `n` tokens, and no more, can be continued: all that `n` attends to is there."""
        if self._handle.closed or lib.llama_memory_seq_pos_max(self._memory, sequence_id) != n - 1:
            return n == 0 or self._handle.closed
        if self.kind != "sliding window":
            return True
        # libllama reuses the cells of tokens that have left the window, which is then not there to go back to.
        return bool(lib.llama_memory_seq_pos_min(self._memory, sequence_id) <= max(0, n + 1 - self.window))

    def is_whole(self, sequence_id: int, n: int) -> bool:
        """Whether a sequence that was read holds `n` tokens at their positions, as far as libllama tells."""
        first = lib.llama_memory_seq_pos_min(self._memory, sequence_id)
        return self.holds(sequence_id, n) and (first == 0 if self.kind in _WITHOUT_GAPS else first >= 0)

    def clear(self) -> None:
        """Forget everything, and overwrite it."""
        lib.llama_memory_clear(self._memory, True)

    def copy(self, source_id: int, target_id: int) -> bool:
        """Let an empty sequence hold what another does: the same cells, or copies where each has its own."""
        if not self.can_share:  # libllama's own copy is of the whole buffer, and only made by the next decode
            state = self.read(source_id)
            return state is not None and not self.write(target_id, state)
        # A small window reuses the cells of what has left it only while one sequence holds them: each gets its own.
        window = self.read(source_id, partial=True) if self._is_small else None
        lib.llama_memory_seq_cp(self._memory, source_id, target_id, -1, -1)
        return window is None or not self.write(target_id, window, partial=True)

    def shift(self, sequence_id: int, n: int, keep: int, discard: int) -> bool:
        """Forget the tokens at positions `keep` to `keep + discard` of `n`, and move those behind to their place.

        False where tokens that have left the window would come into it again, and are no longer there.
        """
        seen = max(0, n - discard + 1 - self.window)
        if self.kind == "sliding window" and keep > seen < lib.llama_memory_seq_pos_min(self._memory, sequence_id):
            return False
        self.remove(sequence_id, keep, keep + discard)
        lib.llama_memory_seq_add(self._memory, sequence_id, keep + discard, -1, -discard)
        return True

    def size_bytes(self, sequence_id: int, partial: bool = False) -> int:
        """Return how many bytes a sequence's state takes, or that part of it which cannot be cut."""
        flags = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY if partial else 0
        return lib.llama_state_seq_get_size_ext(self._context, sequence_id, flags)

    def read(self, sequence_id: int, partial: bool = False) -> State | None:
        """Copy a sequence's state, or that part of it which cannot be cut; None where libllama could not."""
        flags = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY if partial else 0
        state = np.empty(self.size_bytes(sequence_id, partial), np.uint8)
        size = lib.llama_state_seq_get_data_ext(self._context, _pointer(state), state.size, sequence_id, flags)
        return state if size == state.size else None

    def write(self, sequence_id: int, state: State, partial: bool = False) -> str:
        """Replace a sequence's state by one that was read; return why it could not be, or nothing."""
        flags = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY if partial else 0
        with callbacks.captured_errors() as errors:
            size = lib.llama_state_seq_set_data_ext(self._context, _pointer(state), state.size, sequence_id, flags)
        return "" if size == state.size else callbacks.reason(errors, "libllama gives no reason")


def head_sizes(model: "Model") -> tuple[float, float]:
    """Return how many numbers a head's key and value have."""
    width = model.n_embd // max(1.0, max(model.hyperparameter("attention.head_count")))
    key = max(model.hyperparameter("attention.key_length", width))
    return key, max(model.hyperparameter("attention.value_length", width))


def _keys_turn(model: "Model", key_type: str) -> bool:
    """Whether libllama can turn keys of this type to other positions: for some, its shift ends the process.

    Quantised ones it turns through a Hadamard rotation, which it has for whole heads of a multiple of 64 alone. Where
    some layers' keys are not turned by position in the first place, or a learned position is in all of them, it turns
    them all the same, and they are wrong.
    """
    if model.architecture in PARTLY_TURNED or model.has_learned_positions:
        return False
    size = head_sizes(model)[0]
    turned = model.hyperparameter("rope.dimension_count", size)
    uniform = {size, *turned, *model.hyperparameter("attention.key_length_swa", size)} == {size}
    rotates = uniform and size % 64 == 0 and rotates_quantised_keys()
    return key_type in ("f32", "f16") or (key_type != "bf16" and rotates)


def rotates_quantised_keys() -> bool:
    """Whether libllama turns quantised keys through a rotation of its own, which its environment can forbid."""
    return "LLAMA_ATTN_ROT_DISABLE" not in os.environ


def _key_transformations(model: "Model", context: Any) -> dict[str, bool]:
    """Return what keys are transformed by, besides the model: those of one form are of no use in another."""
    original = max(model.hyperparameter("rope.scaling.original_context_length", model.n_ctx_train))
    return {
        "rotated": rotates_quantised_keys(),
        # Some models have two sets of rotary factors: one for contexts no longer than the first training's.
        "long_factors": model.has_long_factors and lib.llama_n_ctx_seq(context) > original,
    }


def _pointer(state: State) -> Any:
    return ffi.from_buffer("uint8_t[]", state)
