"""The strict check of a model's files: what libllama takes on trust is compared with what the rest of the file says.

libllama ends the process, corrupts memory, never returns or computes nonsense for values that no converter writes.
Each function here refuses one kind of them, in a sentence that names the file, the key or tensor, the value, and what
was expected.
"""

import functools
import math
import re
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from ._binding import lib, text
from .devices import initialise
from .errors import ModelLoadError
from .gguf import GGUF, TensorInfo, Value

MAX_LAYERS, MAX_EXPERTS = 512, 1024
"""The sizes of libllama's arrays: `LLAMA_MAX_LAYERS` and `LLAMA_MAX_EXPERTS`."""

OTHER_FILES = {
    "adapter": "a LoRA adapter, which changes a model and is none: load the model that it was made for",
    "mmproj": "a projector for images or sound, not a language model: load the model that it belongs to",
    "imatrix": "an importance matrix, which only helps to quantise a model: load the model itself",
    "clip": "a projector for images or sound, not a language model: load the model that it belongs to",
    "controlvector": "a control vector, which steers a model and is none: load the model that it was made for",
}
"""What a file that is not a model is instead, by its `general.type` or `general.architecture`."""

# In bytes. Vocabularies of these kinds are read by functions that recurse over the bytes of a token.
_LONGEST_TOKENS = dict.fromkeys(("t5", "rwkv", "plamo2", "bert"), 1000)
_LONGEST_TOKEN = 4096  # of the others
_LARGEST_PIECES = 1 << 30  # bytes: what libllama writes for a token can have the square of its length
_LARGEST_VOCABULARY = 1 << 24  # if there are no embeddings to count
_LARGEST_WINDOW = 1 << 24  # tokens: the room for a window's mask is reserved before a token is there
_LARGEST_TABLE = 5 * 10**9  # steps in which PLaMo-2's table of suffixes is made

_repr = reprlib.Repr()
_repr.maxstring, _repr.maxlist = 100, 8
_shown = _repr.repr  # of what may be long

_VECTOR_STEP = 64  # numbers that RWKV-7's kernel reads and writes at one time on the widest machines

_SCALING_TYPES = ("none", "linear", "yarn", "longrope")

# Numbers that libllama divides by or allocates with, by a part of the names of the tensors that they are for. A file
# that libllama has written has every key, and a 0 for what the model does not have.
_AT_LEAST_ONE = {
    "": ("context_length", "embedding_length"),
    ".attn_q": ("attention.key_length", "attention.value_length"),
    ".ssm_": ("ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank"),
    ".time_mix_": ("wkv.head_size",),
    ".shortconv.": ("shortconv.l_cache",),
    ".ple_": ("ple.head_vocab_sizes",),
    ".ffn_up_chexps": ("experts_per_group",),
}

# Whose states are of the size that ssm.inner_size says, and whose tensors are not.
_DELTA_NETS = ("qwen3next", "qwen35", "qwen35moe")

# Tensors of several dimensions that are used element by element, which ggml can only do with f32; and tables of ids.
_ELEMENTWISE = re.compile(r"norm|\.ssm_a$|\.ssm_conv1d|\.shortconv\.conv\.|\.time_mix_(lerp_|first)")
_IDS = re.compile(r"^d2t$|tid2eid|masked_embd_ordering")
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_\w+_exps\.weight")
_ATTENTION = re.compile(r"blk\.(\d+)\.attn_(q|qkv)\.weight")


class Tensor(NamedTuple):
    """A tensor, and the file that it is in."""

    path: Path
    info: TensorInfo


class Facts:
    """What the files of a model say about it.

    Attributes:
        file: the first part, which has the metadata.
        architecture: its `general.architecture`.
        tensors: the tensors of all parts by name.
        n_layer: the number of layers.
    """

    def __init__(self, parts: Sequence[GGUF]):
        self.file = parts[0]
        self.architecture = str(self.file.metadata.get("general.architecture", ""))
        self.tensors = {info.name: Tensor(part.path, info) for part in parts for info in part.tensors}
        self.n_layer = self.number("block_count", 0)

    def has_tensor_with(self, part: str) -> bool:
        """Return whether some tensor's name contains `part`."""
        return any(part in name for name in self.tensors)

    def key(self, name: str) -> str:
        """Return the whole name of a key that begins with the architecture's."""
        return f"{self.architecture}.{name}"

    def value(self, name: str) -> Value | None:
        """Return the value of such a key, or None."""
        return self.file.metadata.get(self.key(name))

    def number(self, name: str, default: int) -> int:
        """Return the value of such a key if it is an integer; the first one if it is an array."""
        values = self.each(name)
        return values[0] if values else default

    def each(self, name: str) -> list[int]:
        """Return the integers of such a key, whether it is one or an array; libllama refuses those of other types."""
        value = self.value(name)
        values = value if isinstance(value, list) else [value]
        return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]

    def by_layer(self, name: str, default: Sequence[int]) -> Sequence[int]:
        """Return the integers of such a key for each layer."""
        values = self.each(name) or default
        if isinstance(self.value(name), list) and len(values) != self.n_layer:
            self.refuse(self.key(name), f"has {len(values)} values", f"one for each of {self.n_layer} layers")
        return values if len(values) == self.n_layer else [*values[:1]] * self.n_layer

    def refuse(self, what: str, is_what: str, expected: str, path: Path | None = None) -> NoReturn:
        """Raise the error of a check."""
        raise ModelLoadError(f"{path or self.file.path}: {what} {is_what}: expected {expected}")

    def require(self, name: str, value: object, holds: bool, expected: str) -> None:
        """Refuse the value of such a key unless a condition holds."""
        if not holds:
            self.refuse(self.key(name), f"is {_shown(value)}", expected)


def check_model(parts: Sequence[GGUF], vocab_only: bool) -> Facts:
    """Raise `ModelLoadError` if libllama could not be trusted with a model's files; return what they say."""
    facts = Facts(parts)
    _check_kind(facts, vocab_only)
    for part in parts:
        part.check_tensors()
    _check_vocabulary(facts)
    if not vocab_only:
        _check_weights(facts)
    return facts


def check_loaded(facts: Facts, rope_type: int) -> None:
    """Raise `ModelLoadError` for what depends on the architecture's kind of RoPE (`llama_model_rope_type`)."""
    if rope_type == lib.LLAMA_ROPE_TYPE_NONE or not facts.number("attention.head_count", 0):
        return
    size = facts.number("rope.dimension_count", _head_size(facts))
    facts.require("rope.dimension_count", size, size > 0 and not size % 2, "an even number above 0")
    base = facts.value("rope.freq_base")
    facts.require("rope.freq_base", base, not isinstance(base, float) or base > 0, "above 0")
    if rope_type in (lib.LLAMA_ROPE_TYPE_MROPE, lib.LLAMA_ROPE_TYPE_IMROPE):
        sections = facts.each("rope.dimension_sections")
        facts.require("rope.dimension_sections", sections, any(sections[:3]), "three sizes that are not all 0")


def _check_weights(facts: Facts) -> None:
    for tensor in facts.tensors.values():
        _check_tensor(facts, tensor)
    _check_layers(facts)
    _check_companions(facts)
    _check_numbers(facts)
    _check_recurrence(facts)
    _check_experts(facts)
    _check_heads(facts)
    _check_rotation(facts)
    _check_rwkv(facts)
    _check_t5(facts)


# What kind of file it is


def _check_kind(facts: Facts, vocab_only: bool) -> None:
    path, metadata = facts.file.path, facts.file.metadata
    for key in ("general.type", "general.architecture"):
        kind = str(metadata.get(key))
        if kind in OTHER_FILES:
            raise ModelLoadError(f"{path} is {OTHER_FILES[kind]}")
    if not re.fullmatch(r"[\w.-]+", facts.architecture, re.ASCII):
        shown = _shown(metadata.get("general.architecture"))
        facts.refuse("general.architecture", f"is {shown}", "the name of an architecture, such as llama")
    if not vocab_only and not facts.tensors:
        raise ModelLoadError(f"{path} has a vocabulary at most, and no weights: load it with vocab_only=True")


# The vocabulary


def _check_vocabulary(facts: Facts) -> None:
    metadata, key = facts.file.metadata, "tokenizer.ggml.tokens"
    kind = metadata.get("tokenizer.ggml.model")
    embeddings = facts.tensors.get("token_embd.weight")
    rows = (*embeddings.info.shape, 1)[1] if embeddings and facts.architecture != "eagle3" else None
    if kind in ("no_vocab", "none"):
        size = facts.number("vocab_size", 0)
        most = _LARGEST_VOCABULARY if rows is None else rows
        facts.require("vocab_size", size, 0 <= size <= most, f"at most {most}")
        return
    tokens = facts.file.string_facts(key)
    if tokens is None:
        return  # libllama says so, in words as good
    if not tokens.n or rows not in (None, tokens.n):
        expected = "as many as token_embd.weight has rows" if rows is None else f"the {rows} of token_embd.weight"
        facts.refuse(key, f"has {tokens.n} tokens", expected)
    types, scores = (facts.file.numbers(f"tokenizer.ggml.{name}") for name in ("token_type", "scores"))
    for name, values in ("token_type", types), ("scores", scores):
        if values is not None and len(values) != tokens.n:
            facts.refuse(f"tokenizer.ggml.{name}", f"has {len(values)} values", f"one for each of {tokens.n} tokens")
    if scores is not None and np.isnan(scores).any():
        facts.refuse("tokenizer.ggml.scores", f"is NaN for token {np.isnan(scores).argmax()}", "a number for each")
    if kind == "bert" and types is not None and (types == lib.LLAMA_TOKEN_TYPE_BYTE).any():
        token = (types == lib.LLAMA_TOKEN_TYPE_BYTE).argmax()
        facts.refuse(
            "tokenizer.ggml.token_type", f"is {types[token]} (a byte) for token {token}", "no bytes in WordPiece"
        )
    longest = _LONGEST_TOKENS.get(str(kind), _LONGEST_TOKEN)
    if tokens.longest > longest:
        facts.refuse(key, f"has {tokens.longest} bytes in token {tokens.longest_at}", f"at most {longest}")
    if tokens.squares > _LARGEST_PIECES or (kind == "plamo2" and tokens.cubes > _LARGEST_TABLE):
        facts.refuse(key, f"has up to {tokens.longest} bytes in {tokens.n} tokens", "mostly short tokens")
    if tokens.equal:
        first, second = tokens.equal
        names = facts.file.strings(key) or []
        name = _shown(max(names[first], names[second]).decode(errors="replace"))  # one may be empty
        facts.refuse(key, f"has {name} as tokens {first} and {second}", "every token once")
    if kind == "rwkv":
        _check_single_bytes(facts, key, facts.file.strings(key) or [])


def _check_single_bytes(facts: Facts, key: str, tokens: list[bytes]) -> None:
    """Refuse an RWKV vocabulary without a token for each first byte of its tokens: libllama may never get past one."""
    seen = {_unescaped(token) for token in tokens}
    for byte in sorted({token[0] for token in seen if token}):
        if bytes([byte]) not in seen:
            facts.refuse(
                key, f"has tokens that begin with the byte {byte} and none that is only it", "one for each byte"
            )


_ESCAPE = re.compile(rb"\\(x.{0,2}|.?)", re.DOTALL)


def _unescaped(token: bytes) -> bytes:
    """Return the bytes that a token of an RWKV vocabulary stands for."""

    def plain(match: re.Match[bytes]) -> bytes:
        name = match[1]
        if len(name) == 3:
            return bytes([sum(_hex(digit) << shift for digit, shift in zip(name[1:], (4, 0), strict=True)) % 256])
        return {b"t": b"\t", b"n": b"\n", b"r": b"\r"}.get(name, b"" if name.startswith(b"x") else name)

    return _ESCAPE.sub(plain, token)


def _hex(digit: int) -> int:
    return digit - (ord("a") - 10 if digit >= ord("a") else ord("0"))


# Tensors


def _check_tensor(facts: Facts, tensor: Tensor) -> None:
    path, (name, shape, kind, _, _) = tensor
    if 0 in shape:
        facts.refuse(f"tensor {name!r}", f"has the shape {shape}", "one with numbers in it", path)
    if _IDS.search(name):
        return
    if (len(shape) == 1 or _ELEMENTWISE.search(name)) and kind != "f32":
        facts.refuse(f"tensor {name!r}", f"has the type {kind}", "f32, as norms, biases and other vectors must", path)
    if kind not in _computable():
        facts.refuse(f"tensor {name!r}", f"has the type {kind}", "one that ggml can compute with", path)


@functools.cache
def _computable() -> frozenset[str]:
    """Return the names of the types that ggml has a dot product for."""
    initialise()
    kinds = range(lib.GGML_TYPE_COUNT)
    has_dot = [kind for kind in kinds if lib.minerva_has_dot(kind)]
    return frozenset(text(lib.ggml_type_name(kind)) for kind in has_dot)


# Hyperparameters


def _check_layers(facts: Facts) -> None:
    n_layer = facts.n_layer
    facts.require("block_count", n_layer, 0 < n_layer <= MAX_LAYERS, f"from 1 to {MAX_LAYERS}")
    for name in ("nextn_predict_layers", "n_deepstack_layers", "attention.shared_kv_layers"):
        for count in facts.each(name):
            facts.require(name, count, 0 <= count <= n_layer, f"at most the {n_layer} of {facts.key('block_count')}")


def _check_companions(facts: Facts) -> None:
    """Refuse a layer that lacks a tensor which libllama uses without having asked for it."""
    if any(name.startswith("blk.") for name in facts.tensors) and not facts.has_tensor_with("blk.0."):
        facts.refuse("tensor 'blk.0.*'", "is missing", "the first layer (this may be only the part that drafts)")
    for layer in range(facts.n_layer):
        _check_layer(facts, f"blk.{layer}.")


def _check_layer(facts: Facts, prefix: str) -> None:
    def missing(*parts: str) -> str | None:
        """Return the first of these tensors that the layer does not have."""
        return next((part for part in parts if f"{prefix}{part}.weight" not in facts.tensors), None)

    lacks = None
    if not missing("ffn_gate_inp"):
        lacks = missing("ffn_down_exps") or (missing("ffn_gate_up_exps") and missing("ffn_up_exps"))
    if not lacks and facts.architecture in ("phi3", "pockettts"):
        lacks = missing("attn_qkv") and missing("attn_q", "attn_k", "attn_v")
    if not lacks and facts.architecture in _DELTA_NETS and not missing("ssm_conv1d"):
        lacks = missing("ssm_in") and missing("attn_qkv", "attn_gate")
    if lacks:
        facts.refuse(f"tensor '{prefix}{lacks}.weight'", "is missing", "all tensors of the layer")


def _check_numbers(facts: Facts) -> None:
    prefix, metadata = facts.key(""), facts.file.metadata
    for key in (key for key in metadata if key.startswith(prefix)):
        value = metadata[key]
        if isinstance(value, float) and math.isnan(value):
            facts.refuse(key, "is NaN", "a number")
        if isinstance(value, float) and key.endswith("epsilon") and not 0 <= value < math.inf:
            facts.refuse(key, f"is {value!r}", "from 0 on and finite")
    for part, names in _AT_LEAST_ONE.items():
        for name in names if facts.has_tensor_with(part) else ():
            facts.require(name, facts.value(name), all(value > 0 for value in facts.each(name)), "at least 1")
    most = max(_LARGEST_WINDOW, facts.number("context_length", 0))
    for window in facts.each("attention.sliding_window"):
        facts.require("attention.sliding_window", window, 0 <= window <= most, f"from 0 to {most}")


def _check_recurrence(facts: Facts) -> None:
    for every in facts.each("full_attention_interval"):  # libllama divides by it
        is_used = facts.architecture in (*_DELTA_NETS, "minimax-01")
        facts.require("full_attention_interval", every, every > 0 or not is_used, "at least 1")
    if facts.architecture in _DELTA_NETS:
        inner, rank, state = (facts.number(f"ssm.{name}", 0) for name in ("inner_size", "time_step_rank", "state_size"))
        expected = f"{rank * state}, as ssm.time_step_rank is {rank} and ssm.state_size is {state}"
        facts.require("ssm.inner_size", inner, inner == rank * state, expected)
    scalars = any(name.endswith(".ssm_a") and shape[0] == 1 for name, (_, (_, shape, *_)) in facts.tensors.items())
    if scalars:  # Mamba-2, whose states come in groups
        groups = facts.number("ssm.group_count", 0)
        facts.require("ssm.group_count", groups, groups > 0, "at least 1")
    if facts.architecture in ("jamba", "granitehybrid"):
        inner, width = facts.number("ssm.inner_size", 0), facts.number("embedding_length", 0)
        facts.require(
            "ssm.inner_size", inner, inner == 2 * width, f"twice the {width} of {facts.key('embedding_length')}"
        )


def _check_experts(facts: Facts) -> None:
    n, groups = facts.number("expert_count", 0), facts.number("expert_group_count", 0)
    if n < 2 and facts.architecture.startswith("hunyuan"):
        return  # whose dense models have these keys too
    used = facts.by_layer("expert_used_count", [0])
    most = max(used, default=0)
    facts.require("expert_count", n, 0 <= n <= MAX_EXPERTS, f"from 0 to {MAX_EXPERTS}")
    if facts.architecture in ("qwen35moe", "qwen4exp"):  # where libllama divides by those that are used
        facts.require("expert_count", n, n > 0, "at least 1")
    expected = f"from {min(n, 1)} to the {n} of {facts.key('expert_count')}"
    facts.require("expert_used_count", most, min(used, default=0) >= 0 and min(n, 1) <= most <= n, expected)
    facts.require("expert_group_count", groups, 0 <= groups < max(n, 1), f"less than the {n} experts")
    if groups > 1:
        facts.require("expert_group_count", groups, n % groups == 0, f"a divisor of the {n} experts")
        count = facts.number("expert_group_used_count", 0)
        facts.require("expert_group_used_count", count, 0 < count < groups, f"from 1 to less than the {groups} groups")
    for layer in _layers_with(_EXPERTS, facts):
        facts.require(
            "expert_used_count", used[layer], used[layer] > 0, f"at least 1 in layer {layer}, which has experts"
        )


def _check_heads(facts: Facts) -> None:
    heads = facts.by_layer("attention.head_count", [0])
    shared = facts.by_layer("attention.head_count_kv", heads)
    for layer in _layers_with(_ATTENTION, facts):
        name, count, of_keys = "attention.head_count", heads[layer], shared[layer]
        facts.require(name, count, count > 0, f"at least 1 in layer {layer}, which has attention")
        if of_keys or not any(shared):  # a hybrid has layers without keys, but not only such layers
            fits = of_keys > 0 and count % of_keys == 0
            facts.require(f"{name}_kv", of_keys, fits, f"a divisor of the {count} heads of layer {layer}")
    width, count = facts.number("embedding_length", 0), max(heads[0], 1)
    if facts.value("attention.key_length") is None and facts.value("features_length") is None:
        expected = f"a divisor of the {width} of {facts.key('embedding_length')}, or with attention.key_length given"
        facts.require("attention.head_count", heads[0], width % count == 0, expected)


def _head_size(facts: Facts) -> int:
    heads = max(1, facts.number("attention.head_count", 0))
    return facts.number("attention.key_length", facts.number("embedding_length", 0) // heads)


def _check_rotation(facts: Facts) -> None:
    scaling = facts.value("rope.scaling.type")
    expected = f"one of {', '.join(_SCALING_TYPES)}"
    facts.require("rope.scaling.type", scaling, scaling is None or scaling in _SCALING_TYPES, expected)
    if facts.number("attention.head_count", 0):
        size = _head_size(facts)
        for name, most in ("", size), ("_swa", facts.number("attention.key_length_swa", size)):
            for count in facts.each(f"rope.dimension_count{name}"):
                fits = 0 <= count <= most and count % 2 == 0
                facts.require(f"rope.dimension_count{name}", count, fits, f"an even number up to the {most} of a head")
    sections = facts.each("rope.dimension_sections")
    facts.require("rope.dimension_sections", sections, all(count >= 0 for count in sections), "from 0 on")


def _check_rwkv(facts: Facts) -> None:
    if not facts.has_tensor_with(".time_mix_"):
        return
    name, width = "wkv.head_size", facts.number("embedding_length", 0)
    for size in facts.each(name):
        facts.require(name, size, width % size == 0, f"a divisor of the {width} of {facts.key('embedding_length')}")
        if facts.architecture.endswith("rwkv7"):
            facts.require(name, size, size % _VECTOR_STEP == 0, f"a multiple of {_VECTOR_STEP}")
    for count in facts.each("token_shift_count"):
        facts.require("token_shift_count", count, count in (1, 2), "1 or 2")


def _check_t5(facts: Facts) -> None:
    """Refuse a T5 without the table of its positions, which libllama takes from the first layer."""
    if facts.architecture not in ("t5", "t5encoder"):
        return
    for count in facts.each("decoder_block_count"):
        facts.require("decoder_block_count", count, 0 < count <= MAX_LAYERS, f"from 1 to {MAX_LAYERS}")
    embeddings = facts.tensors.get("token_embd.weight")
    n_vocab = embeddings.info.shape[-1] if embeddings else 0
    for token in facts.each("decoder_start_token_id"):
        facts.require("decoder_start_token_id", token, 0 <= token < n_vocab, f"one of {n_vocab} tokens")
    for stack in ("enc", "dec") if facts.architecture == "t5" else ("enc",):
        name = f"{stack}.blk.0.attn_rel_b.weight"
        if name not in facts.tensors:
            facts.refuse(f"tensor {name!r}", "is missing", "the table of positions")
    # A quarter of them are for single distances, and the others have to reach the distance of 128.
    for count in facts.each("attention.relative_buckets_count"):
        facts.require("attention.relative_buckets_count", count, 4 <= count < 256, "from 4 to 255")


def _layers_with(pattern: re.Pattern[str], facts: Facts) -> Iterable[int]:
    found = {int(match[1]) for match in map(pattern.fullmatch, facts.tensors) if match}
    return sorted(layer for layer in found if layer < facts.n_layer)
