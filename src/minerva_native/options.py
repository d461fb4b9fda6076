"""The options of a context: one frozen dataclass, validated when it is made, resolved against a model once."""

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ._arguments import flag, integer, number, what
from ._binding import ffi, lib
from .devices import available_cpus, devices, physical_memory_bytes
from .errors import OptionError

if TYPE_CHECKING:
    from .model import Model
    from .sequence import Sequence

_logger = logging.getLogger("minerva_native")

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""The element types that keys and values can have."""

FLASH_ATTENTION = ("auto", "on", "off")
"""The settings of `flash_attention`."""

_FLASH_ATTENTION_TYPES = {
    "auto": lib.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": lib.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": lib.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}

MOST_SEQUENCES: int = lib.llama_max_parallel_sequences()  # in one context

CELLS_STEP = 256  # libllama rounds the number of cells up to a multiple of this

# A token of a model this small takes less time than threads need to meet after every layer. If the machine is busy with
# something else, waiting for each other makes it up to a hundred times slower.
ONE_THREAD_BYTES = 8 << 20

ROPE_SCALING_TYPES = {
    "none": lib.LLAMA_ROPE_SCALING_TYPE_NONE,
    "linear": lib.LLAMA_ROPE_SCALING_TYPE_LINEAR,
    "yarn": lib.LLAMA_ROPE_SCALING_TYPE_YARN,
    "longrope": lib.LLAMA_ROPE_SCALING_TYPE_LONGROPE,
}

ROPE_NUMBERS = (
    *("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"),
    "yarn_orig_ctx",
)
"""The options whose names are those of `llama_context_params`, which has a number for "as the model says"."""

_MAX_BATCH = 1 << 16  # tokens in one call: more gain nothing, and their room is allocated at once

_MAX = 2**31 - 1

_MAX_SNAPSHOTS = 1 << 10  # of a sequence's state: more tokens than anybody guesses at once

# Whose recurrent states libllama keeps snapshots of, as far as tests/test_walks.py goes over them. Those with experts
# build theirs with the same code.
SNAPSHOT_ARCHITECTURES = frozenset({"lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe", "qwen35", "qwen35moe"})

OnFull: TypeAlias = 'Literal["error", "shift"] | Callable[[Sequence, int], object]'
"""What to do when no cell is free: raise, shift, or call a function with the sequence and how many cells it lacks."""


@dataclass(frozen=True, kw_only=True, match_args=False)
class ContextOptions:
    """How a context is made; the keywords of `Model.context`.

    Attributes:
        n_ctx: tokens that all sequences may hold together; 0 for as many as the model was trained on. A model with
            learned positions has at most as many as it has positions.
        n_seq: sequences at one time.
        n_batch: tokens evaluated in one call, at most 65,536.
        n_ubatch: tokens evaluated in one pass through the model.
        n_threads: CPU threads. None takes the CPUs that this process may use, or 1 if the model is so small that
            threads would wait for each other more than compute.
        n_threads_batch: CPU threads for evaluating several tokens at once; None for as many as `n_threads`.
        kv_type: the element type of the KV cache, such as "f16" or "q8_0", or a pair: of keys and of values. "f32"
            takes twice the memory of "f16", and flash attention still computes with it in f16.
        flash_attention: "auto" uses it if the model and the device can. True and False mean "on" and "off".
        kv_unified: sequences share one pool of cells. If False, each has n_ctx / n_seq of its own, which is faster for
            many sequences with little in common.
        swa_full: sliding-window layers keep all tokens. If False, they keep only what the window and a batch need,
            which saves memory; going back then takes checkpoints.
        prefix_cache: start a text from the longest prefix of it that another sequence, open or closed, has cached.
        on_full: what happens when a token finds no cell. "error" raises `ContextFullError`. "shift" keeps the first
            `n_keep` tokens and discards the older half of the rest (attention sinks: arXiv:2309.17453). A function is
            called with the sequence and how many cells it lacks, to make room.
        n_keep: tokens that "shift" keeps at the start.
        checkpoint_interval: tokens between checkpoints, which are copies of the state of a memory that cannot be cut
            (see `Context.memory`).
        checkpoint_bytes: memory for the checkpoints of all sequences, in bytes.
        n_rs_seq: how many snapshots to keep of each sequence's recurrent state, after the last tokens of a batch, so
            that as many tokens can be forgotten without a checkpoint. States then take 1 + n_rs_seq times the memory.
            It is cut to `n_ubatch` - 2, and to 0 if libllama has no snapshots for the architecture.
        mtp: have the model's own MTP head read whatever is evaluated, in a context of its own beside this one, so that
            it can draft (`Speculation("mtp")`). The model has to be loaded with `load_mtp=True`.
        rope_scaling_type: how positions beyond the training are scaled: "none", "linear", "yarn" or "longrope". None
            for this and for the next seven means as the model's file says.
        rope_freq_base: the base of RoPE's frequencies, above 0.
        rope_freq_scale: what positions are multiplied by, above 0: 0.25 for four times the context.
        yarn_ext_factor: how much YaRN (arXiv:2309.00071) extrapolates, from 0.
        yarn_attn_factor: what YaRN multiplies queries and keys by.
        yarn_beta_fast: above this many rotations within the training's context, YaRN does not scale.
        yarn_beta_slow: below this many, YaRN scales fully.
        yarn_orig_ctx: the context that the model was trained on before it was extended.

    Raises:
        TypeError, ValueError: an option is of the wrong type or out of range.
    """

    n_ctx: int = 4096
    n_seq: int = 1
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int | None = None
    n_threads_batch: int | None = None
    kv_type: str | tuple[str, str] = "f16"
    flash_attention: Literal["auto", "on", "off"] | bool = "auto"
    kv_unified: bool = True
    swa_full: bool = True
    prefix_cache: bool = True
    on_full: "OnFull" = "error"
    n_keep: int = 4
    checkpoint_interval: int = 512
    checkpoint_bytes: int = 1 << 30
    n_rs_seq: int = 0
    mtp: bool = False
    rope_scaling_type: Literal["none", "linear", "yarn", "longrope"] | None = None
    rope_freq_base: float | None = None
    rope_freq_scale: float | None = None
    yarn_ext_factor: float | None = None
    yarn_attn_factor: float | None = None
    yarn_beta_fast: float | None = None
    yarn_beta_slow: float | None = None
    yarn_orig_ctx: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("n_ctx", 0, _MAX + 1 - CELLS_STEP),
            ("n_seq", 1, MOST_SEQUENCES),
            ("n_batch", 1, _MAX),
            ("n_ubatch", 1, _MAX),
            ("n_keep", 0, _MAX),
            ("checkpoint_interval", 1, _MAX),
            ("checkpoint_bytes", 0, 2**63 - 1),
            ("n_rs_seq", 0, _MAX_SNAPSHOTS),
        ):
            self._set(name, integer(name, getattr(self, name), low, high))
        if self.n_ctx == 1:
            raise ValueError("n_ctx must be 0, for the model's own, or 2 and more, not 1")
        for name in ("n_threads", "n_threads_batch"):
            if getattr(self, name) is not None:
                self._set(name, integer(name, getattr(self, name), 1, lib.GGML_MAX_N_THREADS))
        self._check_rope()
        for name in ("kv_unified", "swa_full", "prefix_cache", "mtp"):
            self._set(name, flag(name, getattr(self, name)))
        if isinstance(self.kv_type, list):
            self._set("kv_type", tuple(self.kv_type))
        pair = self.kv_type if isinstance(self.kv_type, tuple) else (self.kv_type, self.kv_type)
        if len(pair) != 2 or not all(isinstance(name, str) and name in KV_TYPES for name in pair):
            raise ValueError(f"kv_type must be one of {', '.join(KV_TYPES)}, or a pair of them, not {self.kv_type!r}")
        if isinstance(self.flash_attention, bool):
            self._set("flash_attention", "on" if self.flash_attention else "off")
        if not isinstance(self.flash_attention, str) or self.flash_attention not in FLASH_ATTENTION:
            raise ValueError(f'flash_attention must be "auto", "on" or "off", not {self.flash_attention!r}')
        if not callable(self.on_full) and not (isinstance(self.on_full, str) and self.on_full in ("error", "shift")):
            raise ValueError(f'on_full must be "error", "shift" or a function, not {self.on_full!r}')
        if self.n_ctx and self.n_cells < 2:
            raise ValueError(
                f"n_ctx={self.n_ctx} leaves each of n_seq={self.n_seq} sequences less than 2 cells of its own"
            )

    def _check_rope(self) -> None:
        kind = self.rope_scaling_type
        if kind is not None and not (isinstance(kind, str) and kind in ROPE_SCALING_TYPES):
            raise ValueError(f"rope_scaling_type must be one of {', '.join(ROPE_SCALING_TYPES)}, not {kind!r}")
        for name in ROPE_NUMBERS[:-1]:
            if getattr(self, name) is not None:
                value = number(name, getattr(self, name))
                least = "more than 0" if name.startswith("rope") else "0 or more"
                if not math.isfinite(value) or value < 0 or (value == 0 and name.startswith("rope")):
                    raise ValueError(f"{name} must be {least}, not {value!r}")
                self._set(name, value)
        if self.yarn_orig_ctx is not None:
            self._set("yarn_orig_ctx", integer("yarn_orig_ctx", self.yarn_orig_ctx, 1, _MAX))

    @property
    def rope(self) -> dict[str, str | float | None]:
        """How keys are rotated, as far as it was given: keys of one form are of no use in another."""
        return {name: getattr(self, name) for name in ("rope_scaling_type", *ROPE_NUMBERS)}

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def n_cells(self) -> int:
        """How many tokens one sequence can have: all cells, or its own if `kv_unified` is False."""
        return self.n_ctx if self.kv_unified else self.n_ctx // self.n_seq

    @property
    def kv_types(self) -> tuple[str, str]:
        """The element types of keys and of values."""
        return self.kv_type if isinstance(self.kv_type, tuple) else (self.kv_type, self.kv_type)

    def resolve(self, model: "Model") -> "ContextOptions":
        """Return the options in force for a model: defaults filled in, sizes cut to what is of use.

        Raises `OptionError` for what this model or this machine cannot do.
        """
        if not callable(getattr(model, "hyperparameter", None)):
            raise TypeError(f"model must be a Model, not {what(model)}")
        n_ctx, n_threads = self.n_ctx or max(2, model.n_ctx_train), self.n_threads
        if model.has_learned_positions and n_ctx > model.n_ctx_train >= 2:
            n_ctx = model.n_ctx_train
            _logger.warning("n_ctx=%d is all that this model has positions for, not %d", n_ctx, self.n_ctx)
        if model.vocab_only:
            raise OptionError("the model was loaded with vocab_only=True: it has no weights to compute with")
        if n_threads is None:
            n_threads = 1
            if model.size_bytes >= ONE_THREAD_BYTES:
                n_threads = min(available_cpus(), lib.GGML_MAX_N_THREADS)
        n_batch = min(self.n_batch, n_ctx, _MAX_BATCH)
        n_ubatch = min(self.n_ubatch, n_batch)
        n_rs_seq = max(0, min(self.n_rs_seq, n_ubatch - 2))  # or libllama ends the process
        resolved = dataclasses.replace(
            self,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_rs_seq=n_rs_seq if model.architecture in SNAPSHOT_ARCHITECTURES else 0,
            n_threads=n_threads,
            n_threads_batch=self.n_threads_batch or n_threads,
            kv_type=self.kv_types,
        )
        _check_mtp(model, resolved)
        _check_sequences(model, resolved)
        _check_values(model, resolved)
        _check_heads(model, resolved)
        _check_memory(model, resolved)
        return resolved


def context_parameters(options: ContextOptions) -> Any:
    """Return libllama's `llama_context_params *` for options that are resolved."""
    n_seq, n_threads = options.n_seq, options.n_threads or 1
    parameters = ffi.new("struct llama_context_params *", lib.llama_context_default_params())
    # A multiple of libllama's step, so that it grants exactly this many cells; `n_ctx` is kept to in Python.
    n_cells = math.ceil(options.n_cells / CELLS_STEP) * CELLS_STEP
    parameters.n_ctx = n_cells * (1 if options.kv_unified else n_seq)
    parameters.n_batch = max(options.n_batch, n_seq)  # or libllama ends the process
    parameters.n_ubatch = options.n_ubatch
    parameters.n_seq_max, parameters.n_rs_seq = n_seq, options.n_rs_seq
    parameters.n_threads, parameters.n_threads_batch = n_threads, options.n_threads_batch or n_threads
    if options.rope_scaling_type is not None:
        parameters.rope_scaling_type = ROPE_SCALING_TYPES[options.rope_scaling_type]
    for name in ROPE_NUMBERS:  # libllama has numbers of its own for what is not given
        if (value := getattr(options, name)) is not None:
            setattr(parameters, name, value)
    parameters.type_k, parameters.type_v = map(ggml_type, options.kv_types)
    parameters.flash_attn_type = _FLASH_ATTENTION_TYPES[str(options.flash_attention)]
    parameters.kv_unified, parameters.swa_full = options.kv_unified, options.swa_full
    parameters.no_perf = True
    return parameters


def head_parameters(options: ContextOptions) -> Any:
    """Return the same for the context of the model's MTP head, which has room for the same tokens."""
    parameters = context_parameters(options)
    parameters.ctx_type, parameters.n_rs_seq = lib.LLAMA_CONTEXT_TYPE_MTP, 0
    return parameters


def ggml_type(name: str) -> int:
    """Return ggml's number of an element type."""
    number: int = getattr(lib, f"GGML_TYPE_{name.upper()}")
    return number


def _check_mtp(model: "Model", options: ContextOptions) -> None:
    """Refuse an MTP head that is not there."""
    if options.mtp and not model.load_mtp:
        name = f"{model.path.name} ({model.architecture})"
        if not model.n_mtp_layers:
            raise OptionError(f"{name} has no MTP head that libllama can draft with")
        raise OptionError(f"{name} was loaded without its MTP head: give load_mtp=True to Model.load")


def _check_sequences(model: "Model", options: ContextOptions) -> None:
    """Refuse numbers of sequences for which libllama would end the process."""
    if options.kv_unified:
        return
    if model.architecture == "kimi-linear" and options.n_seq > 2:
        raise OptionError("libllama computes kimi-linear with at most 2 sequences if kv_unified=False")
    if model.has_encoder and options.n_seq > 1:
        raise OptionError("libllama computes an encoder-decoder with one sequence only if kv_unified=False")


def _check_values(model: "Model", options: ContextOptions) -> None:
    """Refuse quantised values without flash attention."""
    key, value = options.kv_types
    if lib.ggml_is_quantized(ggml_type(value)):
        other = f'use kv_type=({key!r}, "f16")'
        if options.flash_attention == "off":
            raise OptionError(f'values of type {value!r} need flash attention: leave it "auto", or {other}')
        if model.has_encoder:  # it adds positions to the scores, which flash attention never has; memory is corrupted
            raise OptionError(f"values of type {value!r} need flash attention, which T5's positions forbid: {other}")


def _check_heads(model: "Model", options: ContextOptions) -> None:
    """Refuse a quantised type whose blocks do not divide a head."""
    for name, chosen, size in zip(("keys", "values"), options.kv_types, model.head_sizes, strict=True):
        block = lib.ggml_blck_size(ggml_type(chosen))
        if size % block:
            raise OptionError(
                f"{name} of type {chosen!r} come in blocks of {block} numbers, and a head of this model has "
                f"{size:.0f}: ask for another kv_type"
            )


def _check_memory(model: "Model", options: ContextOptions) -> None:
    """Refuse a KV cache that this machine cannot hold: the system would promise the memory, then kill the process."""
    bytes_per_token = _kv_bytes_per_token(model, options.kv_types)
    memory = physical_memory_bytes() + sum(device.memory_total_bytes for device in devices() if device.type == "gpu")
    if bytes_per_token * options.n_ctx > memory:
        raise OptionError(
            f"n_ctx={options.n_ctx} needs a KV cache of about {bytes_per_token * options.n_ctx / 1e9:,.0f} GB, and "
            f"this machine has {memory / 1e9:,.0f} GB: ask for at most n_ctx={int(memory / bytes_per_token)}"
        )


def _kv_bytes_per_token(model: "Model", kv_types: tuple[str, str]) -> float:
    """Return the bytes that one token's keys and values take, by the model's metadata; at least 1."""
    of_key, of_value = (lib.ggml_type_size(number) / lib.ggml_blck_size(number) for number in map(ggml_type, kv_types))
    key, value = model.head_sizes
    heads = model.hyperparameter("attention.head_count_kv", *model.hyperparameter("attention.head_count"))
    heads = heads if len(heads) > 1 else heads * model.n_layer
    compressed = max(model.hyperparameter("attention.kv_lora_rank")) * model.n_layer
    return max(1.0, compressed * of_key or sum(heads) * (key * of_key + value * of_value))
