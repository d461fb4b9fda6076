"""Models with the exact shapes of real ones and random quantised weights, whose values do not affect the speed.

    python bench/models.py llama-3.2-1b q4_0

makes a file in the user's cache folder (or the one that `MINERVA_BENCH_MODELS` names) unless it is already there, and
prints its path. The tokenizers are real: they come from the vocabulary files of the pinned source.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

import minerva_native as mn

ROOT = Path(__file__).parents[1]
VOCABULARIES = ROOT / "vendor" / "llama.cpp" / "source" / "models"
VERSION = 3  # of the files written here; files of other versions are not used


class Type(NamedTuple):
    """A type of weights.

    Attributes:
        of_tensors: the type of the tensors.
        of_file: the type of the file.
        spread: the standard deviation of the numbers in a random block of scale 1.
    """

    of_tensors: gguf.GGMLQuantizationType
    of_file: gguf.LlamaFileType
    spread: float


TYPES = {
    "q4_0": Type(gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0, 4.6),
    "q8_0": Type(gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0, 74.0),
    "q4_k": Type(gguf.GGMLQuantizationType.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_S, 258.0),
    "f16": Type(gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16, 1.0),
}
MINIMUM = 7.5  # q4_k: a block's scale of minimums divided by its scale of numbers, for a mean of 0

# Makes logits as peaked as real ones: 95% of the probability on about 100 of 128,256 tokens. Samplers depend on that.
OUTPUT_NORM = 6.0

OUTPUT_NORMS = {"lfm2": "token_embd_norm.weight"}  # its name, if it is another
SHORT_CONVOLUTION = 3  # tokens

Key = int | float | bool | str | list[int]


class Shape(NamedTuple):
    """The hyperparameters of a model.

    Attributes:
        vocabulary: which of the pinned source's ggml-vocab-*.gguf it uses.
        tied: whether the output matrix is the embedding matrix.
        attends: which layers attend, if the others are short convolutions.
    """

    architecture: str
    vocabulary: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_size: int
    n_ctx_train: int
    rope_base: float
    tied: bool
    attends: tuple[int, ...] = ()


SHAPES = {
    "qwen2.5-0.5b": Shape("qwen2", "qwen2", 24, 896, 4864, 14, 2, 64, 32768, 1e6, True),
    "llama-3.2-1b": Shape("llama", "llama-bpe", 16, 2048, 8192, 32, 8, 64, 131072, 5e5, True),
    "mistral-7b": Shape("llama", "llama-spm", 32, 4096, 14336, 32, 8, 128, 32768, 1e6, False),
    # With another vocabulary: its own, of 65,536 tokens, is not in the source.
    "lfm2-350m": Shape("lfm2", "gpt-2", 16, 1024, 4608, 16, 8, 64, 128000, 1e6, True, (2, 5, 8, 10, 12, 14)),
    # Not a real model: small, with a large vocabulary, so that the time outside llama_decode matters. A token takes
    # about 2 ms in f16 and less than 1 ms in q4_0.
    "wide-34m": Shape("llama", "llama-bpe", 2, 256, 1024, 4, 2, 64, 8192, 5e5, True),
}


def make(name: str, kind: str) -> Path:
    """Return the file of a shape with weights of a type; make it if there is none yet, with progress on stderr."""
    folder = Path(os.environ.get("MINERVA_BENCH_MODELS") or Path.home() / ".cache" / "minerva-native" / "bench")
    folder /= str(VERSION)
    path = folder / f"{name}-{kind}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        write(part, SHAPES[name], kind)
        part.replace(path)
    return path


def write(path: Path, shape: Shape, kind: str) -> None:
    """Write a model to a file, one tensor at a time."""
    from rich.console import Console
    from rich.progress import track

    source = mn.GGUF(VOCABULARIES / f"ggml-vocab-{shape.vocabulary}.gguf").metadata
    tokens = source["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_file_type(TYPES[kind].of_file)
    for key, value in hyperparameters(shape).items():
        add(writer, f"{shape.architecture}.{key}", value)
    for key, known in source.items():
        if key.startswith("tokenizer."):
            writer.add_array(key, known) if isinstance(known, list) else add(writer, key, known)
    wanted = dict(tensors(shape, len(tokens)))
    matrix = TYPES[kind].of_tensors
    block, _ = gguf.GGML_QUANT_SIZES[matrix]
    if any(is_matrix(size) and size[1] % block for size in wanted.values()):
        raise SystemExit(f"{kind} has blocks of {block} weights, which do not divide the rows of this shape")
    for name, size in wanted.items():
        dtype = matrix if is_matrix(size) else gguf.GGMLQuantizationType.F32
        stored = gguf.quant_shape_to_byte_shape(size, dtype) if is_matrix(size) else size
        writer.add_tensor_info(
            name, stored, np.dtype(np.uint8 if is_matrix(size) else np.float32), n_bytes(size, dtype), raw_dtype=dtype
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(1)
    for name, size in track(wanted.items(), f"making {path.stem}", console=Console(stderr=True)):
        norm = OUTPUT_NORM if name == OUTPUT_NORMS.get(shape.architecture, "output_norm.weight") else 1.0
        writer.write_tensor_data(blocks(rng, size, kind) if is_matrix(size) else np.full(size, norm, np.float32))
    writer.close()


def add(writer: gguf.GGUFWriter, key: str, value: Key) -> None:
    """Write one key."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def hyperparameters(shape: Shape) -> dict[str, Key]:
    """Return the keys of the file, without the architecture before each."""
    kv_heads: int | list[int] = shape.n_head_kv
    if shape.attends:
        kv_heads = [shape.n_head_kv if layer in shape.attends else 0 for layer in range(shape.n_layer)]
    return {
        **({"shortconv.l_cache": SHORT_CONVOLUTION} if shape.attends else {}),
        "context_length": shape.n_ctx_train,
        "embedding_length": shape.n_embd,
        "block_count": shape.n_layer,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": shape.head_size,
        "rope.freq_base": shape.rope_base,
    }


def tensors(shape: Shape, n_vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every tensor's name and its shape, rows first."""
    wide, narrow = shape.n_head * shape.head_size, shape.n_head_kv * shape.head_size
    yield "token_embd.weight", (n_vocab, shape.n_embd)
    for layer in range(shape.n_layer):
        prefix = f"blk.{layer}."
        yield prefix + "attn_norm.weight", (shape.n_embd,)
        if shape.attends and layer not in shape.attends:
            yield prefix + "shortconv.conv.weight", (shape.n_embd, SHORT_CONVOLUTION)
            yield prefix + "shortconv.in_proj.weight", (3 * shape.n_embd, shape.n_embd)
            yield prefix + "shortconv.out_proj.weight", (shape.n_embd, shape.n_embd)
        else:
            for name, rows in (("q", wide), ("k", narrow), ("v", narrow)):
                yield f"{prefix}attn_{name}.weight", (rows, shape.n_embd)
                if shape.architecture == "qwen2":
                    yield f"{prefix}attn_{name}.bias", (rows,)
                if shape.architecture == "lfm2" and name != "v":
                    yield f"{prefix}attn_{name}_norm.weight", (shape.head_size,)
            yield prefix + "attn_output.weight", (shape.n_embd, wide)
        yield prefix + "ffn_norm.weight", (shape.n_embd,)
        yield prefix + "ffn_gate.weight", (shape.n_ff, shape.n_embd)
        yield prefix + "ffn_up.weight", (shape.n_ff, shape.n_embd)
        yield prefix + "ffn_down.weight", (shape.n_embd, shape.n_ff)
    yield OUTPUT_NORMS.get(shape.architecture, "output_norm.weight"), (shape.n_embd,)
    if not shape.tied:
        yield "output.weight", (n_vocab, shape.n_embd)


def is_matrix(size: tuple[int, ...]) -> bool:
    """Return whether a tensor is quantised: vectors and the kernels of convolutions are not."""
    return len(size) == 2 and size[1] > SHORT_CONVOLUTION


def n_bytes(size: tuple[int, ...], dtype: gguf.GGMLQuantizationType) -> int:
    """Return how many bytes a tensor takes."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[dtype]
    return math.prod(size) // block * block_bytes


def blocks(rng: np.random.Generator, size: tuple[int, ...], kind: str) -> npt.NDArray[np.uint8]:
    """Return random weights in blocks with a float16 scale; a row times a unit-variance vector has variance 1."""
    dtype, _, spread = TYPES[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[dtype]
    rows, columns = size
    scale = 1 / (spread * math.sqrt(columns))
    if kind == "f16":
        return (rng.standard_normal(size, np.float32) * scale).astype(np.float16).view(np.uint8)
    data = rng.integers(0, 256, (rows, columns // block, block_bytes), np.uint8)
    data[..., :2] = np.array([scale], np.float16).view(np.uint8)
    if kind == "q4_k":
        data[..., 2:4] = np.array([MINIMUM * scale], np.float16).view(np.uint8)
    return data.reshape(rows, -1)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a model of a real one's shape with random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", choices=TYPES, default="q4_0", nargs="?")
    options = parser.parse_args()
    print(make(options.shape, options.type))
    return 0


if __name__ == "__main__":
    sys.exit(main())
