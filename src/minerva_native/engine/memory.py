"""The memory of a libllama context: what it can do, and the libllama calls that change it."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .._binding import callbacks, ffi, lib, thrown
from ..options import ContextOptions
from .runner import Runner

if TYPE_CHECKING:
    from ..model import Model

Kind = Literal["attention", "sliding window", "recurrent", "hybrid", "encoder-decoder"]

State = npt.NDArray[np.uint8]

_WITHOUT_GAPS = ("attention", "encoder-decoder")

_NO_SNAPSHOTS = -1, 0  # the sequence id that has them, and how many tokens they go back

PARTLY_ROTATED = frozenset(
    {
        *("afmoe", "cohere2", "cohere2moe", "exaone-moe", "exaone4"),
        *("llama4", "maple", "muse-glimmer", "smallthinker", "smollm3"),
    }
)
"""Architectures with RoPE in only some of their layers, which libllama's shift does not know."""


@dataclass(frozen=True, eq=False, repr=False, match_args=False)
class Memory:
    """What the memory of a context can do, which depends on the model's architecture and on the options.

    Attributes:
        kind: "attention" keeps keys and values of every token. "sliding window" keeps, in some layers, only those of
            the last `window` tokens. "recurrent" keeps one state that every token changes. "hybrid" is the last and one
            of the others. "encoder-decoder" is attention, also to what `Context.encode` was given.
        window: how many tokens a sliding window has; 0 without one.
        can_truncate: whether the end of a sequence can be forgotten at any point. If not, a copy of the state (a
            checkpoint) is kept every `checkpoint_interval` tokens, and `truncate` goes back to the nearest one before.
            A full-size window may have given the cells of tokens that left it to others; if those come into the window
            again, everything is re-evaluated.
        n_rollback: how many tokens of the last batch can be forgotten at once, if nothing was evaluated since and
            `can_truncate` is False: from snapshots of the state (`n_rs_seq`).
        can_shift: whether tokens can be taken out of the middle and the rest moved up without re-evaluating them.
        can_share: whether sequences share the cells of a common prefix. If not, they copy them.
    """

    kind: Kind
    window: int
    can_truncate: bool
    n_rollback: int
    can_shift: bool
    can_share: bool

    def __repr__(self) -> str:
        able = [name for name in ("truncate", "shift", "share") if getattr(self, f"can_{name}")]
        return f"<Memory: {self.kind}, can {', '.join(able) or 'do nothing but grow'}>"

    @property
    def has_state(self) -> bool:
        """Whether there is a state that every token changes, and that a failed decode may have changed."""
        return self.kind in ("recurrent", "hybrid")

    @property
    def has_keys(self) -> bool:
        """Whether there are keys, which a shift has to rotate."""
        return self.kind != "recurrent"


class Cells:
    """The calls that change the memory of one context. The caller holds the gate.

    Those that only forget do nothing to a context that is closed or broken; the others raise `BrokenContextError`.
    """

    def __init__(self, model: "Model", runner: Runner, options: ContextOptions):
        self._runner, self._decoder = runner, runner.decoder
        self._memory = lib.llama_get_memory(runner.handle.pointer)
        self.exists = self._memory != ffi.NULL
        self.facts = _facts(model, options, self._memory)
        self._is_small = bool(self.facts.window) and not options.swa_full
        self.key_form = _key_form(model, options, runner.handle.pointer)
        # Cells in common take any sequence id that libllama knows. Slots use those below `n_seq`.
        can_split = self.facts.can_truncate and self.facts.can_share
        self.scratch_id = options.n_seq if can_split and options.n_seq < lib.llama_max_parallel_sequences() else -1
        # libllama would go back to any snapshot, of an earlier batch as well: here is what the last one has left.
        self._snapshots = _NO_SNAPSHOTS
        self._rolled_back: set[int] = set()  # ids whose state goes back to a snapshot only with the next decode

    @property
    def _is_gone(self) -> bool:
        return self._runner.handle.closed or self._runner.is_broken

    def remove(self, sequence_id: int, start: int, stop: int = -1) -> bool:
        """Forget a sequence's tokens from position `start` on, or up to `stop`; return False if this kind cannot."""
        if self._is_gone or sequence_id < 0:
            return True
        if self.facts.n_rollback and stop < 0 and not self._prepare_rollback(sequence_id, start):
            return False
        return lib.minerva_memory_seq_rm(self._decoder, sequence_id, start, stop) != 0  # also if it broke: all is gone

    def begin_decode(self) -> None:
        """Note that the state is about to be another, and so are its snapshots."""
        self._snapshots = _NO_SNAPSHOTS

    def end_decode(self, sequence_ids: list[int], n: int) -> None:
        """Note that `n` tokens were evaluated together, of these sequences."""
        self._rolled_back.difference_update(sequence_ids)
        if len(sequence_ids) == 1:  # with several, libllama may move states and leave their snapshots behind
            self._snapshots = sequence_ids[0], min(n - 1, self.facts.n_rollback)

    def _prepare_rollback(self, sequence_id: int, start: int) -> bool:
        """Return whether a sequence's state can forget its tokens from `start` on: all of them, or by a snapshot."""
        holder, n_snapshots = self._snapshots
        if start <= 0:
            self._rolled_back.discard(sequence_id)
        else:
            n = lib.llama_memory_seq_pos_max(self._memory, sequence_id) + 1 - start
            if n <= 0:
                return True
            if holder != sequence_id or n > n_snapshots:
                return False
            self._rolled_back.add(sequence_id)
        if holder == sequence_id:
            self._snapshots = _NO_SNAPSHOTS
        return True

    def cut(self, sequence_id: int, n: int) -> bool:
        """Have a sequence hold its first `n` tokens; return whether it now does, and can be continued."""
        return self.remove(sequence_id, n if n else -1) and self.holds(sequence_id, n)

    def holds(self, sequence_id: int, n: int) -> bool:
        """Return whether a sequence has exactly `n` tokens and everything that the next one attends to."""
        if self._is_gone:
            return True
        if lib.llama_memory_seq_pos_max(self._memory, sequence_id) != n - 1:
            return n == 0
        return self._reaches(sequence_id, n)

    def has_beginning(self, sequence_id: int, n: int) -> bool:
        """Return whether another sequence can have the first `n` tokens of this one, which holds more."""
        if self.facts.kind == "sliding window" and not self.facts.can_share:
            return False  # a state that is read has no more than the last window
        return self._reaches(sequence_id, n)

    def _reaches(self, sequence_id: int, n: int) -> bool:
        """Return whether a sequence still has what the token after its first `n` attends to.

        libllama reuses the cells of tokens that have left a window, which is then not there to go back to.
        """
        if self.facts.kind != "sliding window":
            return True
        return bool(lib.llama_memory_seq_pos_min(self._memory, sequence_id) <= max(0, n + 1 - self.facts.window))

    def is_whole(self, sequence_id: int, n: int) -> bool:
        """Return whether a sequence that was read back has `n` tokens at their positions, as far as libllama tells."""
        first = lib.llama_memory_seq_pos_min(self._memory, sequence_id)
        return self.holds(sequence_id, n) and (first == 0 if self.facts.kind in _WITHOUT_GAPS else first >= 0)

    def clear(self) -> None:
        """Forget everything, and overwrite it."""
        self._snapshots, self._rolled_back = _NO_SNAPSHOTS, set()
        lib.minerva_memory_clear(self._decoder)

    def copy(self, source_id: int, target_id: int) -> bool:
        """Let an empty sequence hold what another does: the same cells, or copies if each has its own."""
        if not self.facts.can_share:  # libllama's own copy is of the whole buffer, and only made by the next decode
            state = self.read(source_id)
            if state is None or self.write(target_id, state):
                return False
            lib.minerva_head_copy(self._decoder, source_id, target_id)
            return True
        if source_id in self._rolled_back:  # a copy would share the state from which it has yet to go back
            state = self.read(source_id, partial=True)
            if state is None or self.write(source_id, state, partial=True):
                return False
        self._snapshots = _NO_SNAPSHOTS  # the state is shared, and libllama would roll it back for both
        # A small window reuses the cells of what has left it only while one sequence holds them: each gets its own.
        window = self.read(source_id, partial=True) if self._is_small else None
        self._check(lib.minerva_memory_seq_cp(self._decoder, source_id, target_id))
        return window is None or not self.write(target_id, window, partial=True)

    def shift(self, sequence_id: int, n: int, keep: int, discard: int) -> bool:
        """Forget the tokens at positions `keep` to `keep + discard` of `n`, and move those after them to their place.

        Return False if tokens that have left the window would come into it again: they are no longer there.
        """
        seen = max(0, n - discard + 1 - self.facts.window)
        first = lib.llama_memory_seq_pos_min(self._memory, sequence_id)
        if self.facts.kind == "sliding window" and keep > seen < first:
            return False
        self._snapshots = _NO_SNAPSHOTS
        self.remove(sequence_id, keep, keep + discard)
        self._check(lib.minerva_memory_seq_add(self._decoder, sequence_id, keep + discard, -discard))
        return True

    def size_bytes(self, sequence_id: int, partial: bool = False) -> int:
        """Return how many bytes a sequence's state takes, or that part of it which cannot be cut."""
        flags = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY if partial else 0
        return self._check(lib.minerva_state_size(self._decoder, sequence_id, flags))

    def read(self, sequence_id: int, partial: bool = False) -> State | None:
        """Copy a sequence's state, or that part of it which cannot be cut; return None if libllama could not."""
        flags = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY if partial else 0
        state = np.empty(self.size_bytes(sequence_id, partial), np.uint8)
        size = lib.minerva_state_read(self._decoder, sequence_id, flags, _pointer(state), state.size)
        self._check_not_refused(size)
        return state if size == state.size else None

    def write(self, sequence_id: int, state: State, partial: bool = False, check: bool = False) -> str:
        """Replace a sequence's state by one that was read; return why it could not be, or an empty string.

        `check`: it comes from outside, and must not hold numbers that would spoil the other sequences.
        """
        flags = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY if partial else 0
        self._snapshots = _NO_SNAPSHOTS
        with callbacks.captured_errors() as errors:
            size = lib.minerva_state_write(self._decoder, sequence_id, flags, _pointer(state), state.size, check)
        self._check_not_refused(size)
        self._rolled_back.discard(sequence_id)
        return "" if size == state.size else thrown() or callbacks.reason(errors, "libllama gives no reason")

    @property
    def can_split(self) -> bool:
        """Whether the state of any part of a sequence can be read, and written after what another has."""
        return self.scratch_id >= 0

    def read_part(self, sequence_id: int, start: int, stop: int) -> State | None:
        """Copy the state of a sequence's tokens from `start` to `stop`; return None if some of it is gone.

        A window that is shorter would leave out its beginning. An error may leave the sequence with those tokens alone.
        """
        self.remove(self.scratch_id, -1)
        # libllama writes cells only of ids below `n_seq`: the whole goes to the scratch id, and the part stays.
        self._check(lib.minerva_memory_seq_cp(self._decoder, sequence_id, self.scratch_id))
        try:
            self.remove(sequence_id, stop)
            if start:
                self.remove(sequence_id, 0, start)
            state = self.read(sequence_id) if self._spans(sequence_id, start, stop) else None
            self.remove(sequence_id, -1)
            self._check(lib.minerva_memory_seq_cp(self._decoder, self.scratch_id, sequence_id))
            return state
        finally:
            self.remove(self.scratch_id, -1)

    def write_part(self, sequence_id: int, state: State, held: int, start: int, stop: int, n: int) -> str:
        """Add what a state from outside has of the tokens from `start` to `stop` to a sequence that holds `held`.

        It then holds `n`. Return why it could not be, or an empty string.
        """
        try:
            if reason := self.write(self.scratch_id, state, check=True):
                return reason
            if not self._spans(self.scratch_id, start, stop):
                return "its positions are not its tokens"
            lib.llama_memory_seq_cp(self._memory, self.scratch_id, sequence_id, held, n)
            return ""
        finally:
            self.remove(self.scratch_id, -1)

    def _spans(self, sequence_id: int, start: int, stop: int) -> bool:
        first = lib.llama_memory_seq_pos_min(self._memory, sequence_id)
        last = lib.llama_memory_seq_pos_max(self._memory, sequence_id)
        return (first, last) == (start, stop - 1)

    def _check_not_refused(self, result: int) -> None:
        if result == lib.MINERVA_THREW and lib.minerva_thrown_cause() in (lib.MINERVA_FAILED, lib.MINERVA_INHERITED):
            raise self._runner.broken()

    def _check(self, result: int) -> int:
        if result == lib.MINERVA_THREW:
            raise self._runner.broken()
        return result


def _facts(model: "Model", options: ContextOptions, memory: Any) -> Memory:
    with model.raw() as pointer:
        hybrid, recurrent = lib.llama_model_is_hybrid(pointer), lib.llama_model_is_recurrent(pointer)
        window = max(0, lib.llama_model_n_swa(pointer))
    kind: Kind = "attention"
    if recurrent:
        kind = "recurrent"
    elif hybrid or model.architecture == "deepseek4":  # whose compressed keys cannot be cut either
        kind = "hybrid"
    elif window:
        kind = "sliding window"
    elif model.has_encoder:
        kind = "encoder-decoder"
    can_shift = memory != ffi.NULL and lib.llama_memory_can_shift(memory) and _keys_rotate(model, options)
    if kind == "hybrid" and window:  # libllama ends the process if no layer attends to everything
        can_shift = False
    return Memory(
        kind=kind,
        window=window,
        can_truncate=kind in _WITHOUT_GAPS or (kind == "sliding window" and options.swa_full),
        n_rollback=options.n_rs_seq if kind in ("recurrent", "hybrid") else 0,
        can_shift=bool(can_shift),
        can_share=options.kv_unified,
    )


def _keys_rotate(model: "Model", options: ContextOptions) -> bool:
    """Return whether libllama can rotate keys to other positions: for some types, its shift ends the process.

    It rotates quantised keys by way of a Hadamard transform, which it has only for whole heads of a multiple of 64. If
    some layers have no RoPE, or learned positions are in all of them, it rotates the keys all the same, and they are
    wrong. If RoPE multiplies keys too, as YaRN does, the shift multiplies them once more.
    """
    key_type = options.kv_types[0]
    if _rope_multiplies(model, options):
        return False
    if model.architecture in PARTLY_ROTATED or model.has_learned_positions:
        return False
    size = model.head_sizes[0]
    rotated = model.hyperparameter("rope.dimension_count", size)
    uniform = {size, *rotated, *model.hyperparameter("attention.key_length_swa", size)} == {size}
    transforms = uniform and size % 64 == 0 and _transforms_quantised_keys()
    return key_type in ("f32", "f16") or (key_type != "bf16" and transforms)


def _rope_multiplies(model: "Model", options: ContextOptions) -> bool:
    """Return whether RoPE also multiplies keys by a number other than 1 (`llama_context::llama_context`)."""
    kind = options.rope_scaling_type or model.metadata.get(f"{model.architecture}.rope.scaling.type", "linear")
    scale = 1.0 / (max(model.hyperparameter("rope.scaling.factor", *model.hyperparameter("rope.scale_linear"))) or 1.0)
    scale = 1.0 if kind == "none" else options.rope_freq_scale or scale
    ext, attn = options.yarn_ext_factor, options.yarn_attn_factor
    if ext is None:
        ext = max(model.hyperparameter("rope.scaling.yarn_ext_factor", float(kind == "yarn")))
    if ext and scale != 1.0:
        return True
    if attn is None or ext:  # libllama computes it itself if there is a factor to extrapolate by
        attn = 1.0 if ext else max(model.hyperparameter("rope.scaling.yarn_attn_factor", 1.0))
    return attn * max(model.hyperparameter("rope.scaling.attn_factor", 1.0)) != 1.0


def _transforms_quantised_keys() -> bool:
    """Return whether libllama transforms the quantised keys that it stores, which its environment can forbid."""
    return "LLAMA_ATTN_ROT_DISABLE" not in os.environ


def _key_form(model: "Model", options: ContextOptions, context: Any) -> dict[str, Any]:
    """Return what keys are transformed by, besides the model: keys of one form are of no use in another."""
    original = max(model.hyperparameter("rope.scaling.original_context_length", model.n_ctx_train))
    return {
        "rotated": _transforms_quantised_keys(),
        # Some models have two sets of RoPE factors: one for contexts no longer than in the first training.
        "long_factors": model.has_long_factors and lib.llama_n_ctx_seq(context) > original,
        "rope": options.rope,
    }


def _pointer(state: State) -> Any:
    return ffi.from_buffer("uint8_t[]", state)
