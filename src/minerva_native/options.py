"""The options of a context: one frozen dataclass, validated when it is made, resolved against a model once."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from ._arguments import flag, integer, what
from ._binding import lib
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

CELLS_STEP = 256  # libllama rounds the number of cells up to a multiple of this

# A token of a model this small takes less time than threads need to meet after every layer. If the machine is busy with
# something else, waiting for each other makes it up to a hundred times slower.
ONE_THREAD_BYTES = 8 << 20

_MAX_BATCH = 1 << 16  # tokens in one call: more gain nothing, and their room is allocated at once

_MAX = 2**31 - 1

OnFull: TypeAlias = 'Literal["error", "shift"] | Callable[[Sequence, int], object]'
"""What to do when no cell is free: raise, shift, or call a function with the sequence and how many cells it lacks."""


@dataclass(frozen=True, kw_only=True, match_args=False)
class ContextOptions:
    """How a context is made; the keywords of `Model.context`.

    Attributes:
        n_ctx: tokens that all sequences may hold together. A model with learned positions has at most as many as it has
            positions.
        n_seq: sequences at one time.
        n_batch: tokens evaluated in one call, at most 65,536.
        n_ubatch: tokens evaluated in one pass through the model.
        n_threads: CPU threads. None takes the CPUs that this process may use, or 1 if the model is so small that
            threads would wait for each other more than compute.
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

    Raises:
        TypeError, ValueError: an option is of the wrong type or out of range.
    """

    n_ctx: int = 4096
    n_seq: int = 1
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int | None = None
    kv_type: str | tuple[str, str] = "f16"
    flash_attention: Literal["auto", "on", "off"] | bool = "auto"
    kv_unified: bool = True
    swa_full: bool = True
    prefix_cache: bool = True
    on_full: "OnFull" = "error"
    n_keep: int = 4
    checkpoint_interval: int = 512
    checkpoint_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name, low, high in (
            ("n_ctx", 2, _MAX + 1 - CELLS_STEP),
            ("n_seq", 1, lib.llama_max_parallel_sequences()),
            ("n_batch", 1, _MAX),
            ("n_ubatch", 1, _MAX),
            ("n_keep", 0, _MAX),
            ("checkpoint_interval", 1, _MAX),
            ("checkpoint_bytes", 0, 2**63 - 1),
        ):
            self._set(name, integer(name, getattr(self, name), low, high))
        if self.n_threads is not None:
            self._set("n_threads", integer("n_threads", self.n_threads, 1, lib.GGML_MAX_N_THREADS))
        for name in ("kv_unified", "swa_full", "prefix_cache"):
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
        if self.n_cells < 2:
            raise ValueError(
                f"n_ctx={self.n_ctx} leaves each of n_seq={self.n_seq} sequences less than 2 cells of its own"
            )

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
        n_ctx, n_threads = self.n_ctx, self.n_threads
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
        resolved = dataclasses.replace(
            self,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=min(self.n_ubatch, n_batch),
            n_threads=n_threads,
            kv_type=self.kv_types,
        )
        _check_sequences(model, resolved)
        _check_values(model, resolved)
        _check_heads(model, resolved)
        _check_memory(model, resolved)
        return resolved


def ggml_type(name: str) -> int:
    """Return ggml's number of an element type."""
    number: int = getattr(lib, f"GGML_TYPE_{name.upper()}")
    return number


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
