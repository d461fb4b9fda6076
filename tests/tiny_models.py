"""Tiny GGUF models with random weights, for tests that need a whole model but nothing it might know.

`ARCHITECTURES` is the table: a row says which hyperparameters and which tensors an architecture has.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Shape = tuple[int, ...]
Key = int | float | bool | str | list[int] | list[float] | list[str]


@dataclass(frozen=True)
class TinyModel:
    """What a model is to look like; equal values have equal weights."""

    architecture: str = "llama"
    n_layer: int = 3
    n_embd: int = 128
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 192
    n_ctx_train: int = 512
    rope_base: float = 10_000.0
    rms_epsilon: float = 1e-5
    tied: bool = False  # whether the output matrix is the embedding matrix
    seed: int = 1

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @cached_property
    def weights(self) -> dict[str, Array]:
        """Every tensor by its GGUF name; a matrix has one row for each output."""
        rng = np.random.default_rng(self.seed)
        return {name: draw(rng, name, shape) for name, shape in ARCHITECTURES[self.architecture].tensors(self)}

    def write(self, path: Path) -> Path:
        """Write the model as a GGUF file."""
        keys = {f"{self.architecture}.{key}": value for key, value in self.hyperparameters.items()}
        return write_gguf(path, self.architecture, {**keys, **VOCABULARY}, self.weights)

    @property
    def hyperparameters(self) -> dict[str, Key]:
        return ARCHITECTURES[self.architecture].hyperparameters(self)


def draw(rng: np.random.Generator, name: str, shape: Shape) -> Array:
    """Random weights at a scale at which every part of the model matters to its logits."""
    if len(shape) == 1:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    spread = 1.0 if name.startswith("token_embd") else 1.5 / np.sqrt(shape[-1])
    return (spread * rng.standard_normal(shape)).astype(np.float32)


def llama_hyperparameters(model: TinyModel) -> dict[str, Key]:
    return {
        "context_length": model.n_ctx_train,
        "embedding_length": model.n_embd,
        "block_count": model.n_layer,
        "feed_forward_length": model.n_ff,
        "attention.head_count": model.n_head,
        "attention.head_count_kv": model.n_head_kv,
        "attention.layer_norm_rms_epsilon": model.rms_epsilon,
        "rope.dimension_count": model.head_size,
        "rope.freq_base": model.rope_base,
        "vocab_size": len(TOKENS),
    }


def llama_tensors(model: TinyModel) -> Iterator[tuple[str, Shape]]:
    wide, narrow = model.n_head * model.head_size, model.n_head_kv * model.head_size
    yield "token_embd.weight", (len(TOKENS), model.n_embd)
    for layer in range(model.n_layer):
        yield f"blk.{layer}.attn_norm.weight", (model.n_embd,)
        yield f"blk.{layer}.attn_q.weight", (wide, model.n_embd)
        yield f"blk.{layer}.attn_k.weight", (narrow, model.n_embd)
        yield f"blk.{layer}.attn_v.weight", (narrow, model.n_embd)
        yield f"blk.{layer}.attn_output.weight", (model.n_embd, wide)
        yield f"blk.{layer}.ffn_norm.weight", (model.n_embd,)
        yield f"blk.{layer}.ffn_gate.weight", (model.n_ff, model.n_embd)
        yield f"blk.{layer}.ffn_up.weight", (model.n_ff, model.n_embd)
        yield f"blk.{layer}.ffn_down.weight", (model.n_embd, model.n_ff)
    yield "output_norm.weight", (model.n_embd,)
    if not model.tied:
        yield "output.weight", (len(TOKENS), model.n_embd)


class Architecture(NamedTuple):
    """One row of the table."""

    hyperparameters: Callable[[TinyModel], dict[str, Key]]  # without the "<architecture>." before each key
    tensors: Callable[[TinyModel], Iterator[tuple[str, Shape]]]


ARCHITECTURES = {"llama": Architecture(llama_hyperparameters, llama_tensors)}


def byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte: itself where it is visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(stand_ins)) for byte in range(256)]


MERGES = (
    *("t h", "th e", "i n", "a n", "an d", "e r", "o u", "h e", "l l", "Ġ t", "Ġt he", "Ġ a", "Ġ s", "Ġ w", "in g"),
    *("e n", "o r", "Ġ c", "Ġ b", "Ġ f", "r e", "o n", "Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "ð Ł", "Ã ¤"),
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENS = [*byte_characters(), *(merge.replace(" ", "") for merge in MERGES), *SPECIAL]
END, START_OF_TURN, END_OF_TURN = (TOKENS.index(name) for name in SPECIAL)

VOCABULARY: dict[str, Key] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [
        int(gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL) for token in TOKENS
    ],
    "tokenizer.ggml.merges": list(MERGES),
    "tokenizer.ggml.bos_token_id": END,
    "tokenizer.ggml.eos_token_id": END,
    "tokenizer.ggml.eot_token_id": END_OF_TURN,
    "tokenizer.ggml.add_bos_token": True,
}


def write_gguf(path: Path, architecture: str, keys: dict[str, Key], tensors: dict[str, Array] | None = None) -> Path:
    """Write a GGUF file; integers are written as uint32, other numbers as float32, lists as arrays."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
