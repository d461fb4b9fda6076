"""The files that the fuzzer starts from: tiny valid models of many kinds, and sequences saved from some of them."""

import os
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, TokenType

import minerva_native as mn
from minerva_native._binding import ffi, lib
from tiny_models import (
    TOKENS,
    VOCABULARY,
    Key,
    Tensor,
    TinyModel,
    common_hyperparameters,
    decoder,
    draw,
    feed_forward,
    write_gguf,
)

from . import mutate


@dataclass(frozen=True)
class Base:
    """What a mutant is made from.

    Attributes:
        name: its name, which is part of the mutant's.
        parts: the files of the model, one unless it is split.
        saved: a sequence saved from the model, if that is what is mutated.
        kv_type: the element type of that sequence's cells.
    """

    name: str
    parts: tuple[bytes, ...]
    saved: bytes | None = None
    kv_type: str = "f16"


SMALL = TinyModel(n_layer=2, n_embd=64, n_head=2, n_head_kv=1, n_ff=96, n_ctx_train=128)
BLOCKS = TinyModel(n_layer=1, n_embd=256, n_ff=256, n_ctx_train=128)  # rows for blocks of 256

ARCHITECTURES = ("llama", "qwen3moe", "mamba", "jamba", "gpt2", "smollm3", "lfm2", "t5")
MODELS = {
    **{name: replace(SMALL, architecture=name) for name in ARCHITECTURES},
    "gemma2": replace(SMALL, architecture="gemma2", tied=True),
    "llama-tied": replace(SMALL, tied=True),
    "rwkv7": replace(SMALL, architecture="rwkv7", n_embd=128),  # heads of 64
    "mtp-glm4moe": replace(SMALL, architecture="glm4moe", n_mtp=1),
    "mtp-mimo2": replace(SMALL, architecture="mimo2", n_mtp=2),
    "mtp-qwen35": replace(SMALL, architecture="qwen35", n_mtp=1),
}
TENSOR_TYPES = ("f16", "bf16", "q8_0", "q4_0", "q5_1", "q2_K", "q4_K", "q6_K", "iq4_nl", "iq4_xs", "tq2_0", "mxfp4")
SAVED = {
    "saved-llama": ("llama", "f16"),
    "saved-f32": ("llama", "f32"),
    "saved-q8_0": ("llama", "q8_0"),
    "saved-gemma2": ("gemma2", "f16"),
    "saved-mamba": ("mamba", "f16"),
    "saved-jamba": ("jamba", "f16"),
    "saved-lfm2": ("lfm2", "f16"),
    "saved-deepseek2": ("deepseek2", "f16"),
}
SPLIT = {"split-llama": ("llama", 2), "split-gpt2": ("gpt2", 3)}

N_CTX = 64
IDS = list(range(20, 40))

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def padded(tokens: list[str]) -> list[str]:
    """Return as many tokens as the models have rows for."""
    return (tokens + [f"extra{number}" for number in range(len(TOKENS))])[: len(TOKENS)]


def vocabulary(kind: str, tokens: list[str], types: dict[str, TokenType], **others: Key) -> dict[str, Key]:
    tokens = padded(tokens)
    keys: dict[str, Key] = {
        "model": kind,
        "tokens": tokens,
        "token_type": [int(types.get(token, TokenType.NORMAL)) for token in tokens],
        "scores": [-float(index) / 8 for index in range(len(tokens))],
        **others,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def charsmap() -> list[int]:
    """Return a SentencePiece normaliser that replaces "A" by "a", as a double array and its strings."""
    units = [0] * 256
    units[ord("A")] = ord("A") | 1 << 8 | 0x80 << 10  # a leaf, whose value lies 0x80 away
    data = struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + b"a\0b\0"
    return list(data)


def vocabularies() -> dict[str, dict[str, Key]]:
    """Return the tokenizer keys of each kind of vocabulary but byte-level BPE."""
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    as_bytes = dict.fromkeys(in_bytes, TokenType.BYTE)
    first = ["<unk>", "<s>", "</s>"]
    as_first = dict(zip(first, (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL), strict=True))
    bert = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    t5 = ["<pad>", "</s>", "<unk>"]
    as_t5 = dict(zip(t5, (TokenType.CONTROL, TokenType.CONTROL, TokenType.UNKNOWN), strict=True))
    plamo = ["<|plamo:unk|>", "<|plamo:bos|>", "<|plamo:eos|>", "<|plamo:pad|>"]
    return {
        "spm": vocabulary("llama", [*first, *in_bytes, "▁", "▁t", "▁th", *LETTERS[:24]], as_first | as_bytes),
        "wpm": vocabulary(
            "bert",
            [
                *bert,
                *(f"▁{letter}" for letter in LETTERS),
                *LETTERS,
                "▁the",
                "ing",
                "▁.",
                "▁,",
                *(f"▁{n}" for n in range(10)),
            ],
            dict.fromkeys(bert, TokenType.CONTROL),
            cls_token_id=2,
            bos_token_id=2,
            seperator_token_id=3,
            unknown_token_id=1,
            padding_token_id=0,
            mask_token_id=4,
        ),
        "ugm": vocabulary(
            "t5",
            [*t5, "▁", *LETTERS, "▁the", "ing", "▁a", *".,!?0123456789"],
            as_t5,
            precompiled_charsmap=charsmap(),
            add_space_prefix=True,
            remove_extra_whitespaces=True,
        ),
        "rwkv": vocabulary("rwkv", ["<s>", *(f"\\x{byte:02x}" for byte in range(256)), "the", " the", "ing"], {}),
        "plamo2": vocabulary(
            "plamo2",
            [*plamo, *in_bytes, *LETTERS[:24], "th", "the"],
            dict.fromkeys(plamo, TokenType.CONTROL) | as_bytes,
        ),
    }


def mamba2(model: TinyModel) -> tuple[dict[str, Key], list[Tensor]]:
    """Return the keys and tensors of a recurrent model with heads and groups."""
    n_head, n_group, n_state, n_conv, inner = 4, 2, 16, 4, 2 * model.n_embd
    mixed = inner + 2 * n_group * n_state
    keys: dict[str, Key] = {
        "ssm.conv_kernel": n_conv,
        "ssm.inner_size": inner,
        "ssm.state_size": n_state,
        "ssm.time_step_rank": n_head,
        "ssm.group_count": n_group,
    }
    return keys, [
        *(
            (f"blk.{layer}.{name}", shape)
            for layer in range(model.n_layer)
            for name, shape in (
                ("attn_norm.weight", (model.n_embd,)),
                ("ssm_in.weight", (inner + mixed + n_head, model.n_embd)),
                ("ssm_conv1d.weight", (mixed, n_conv)),
                ("ssm_conv1d.bias", (mixed,)),
                ("ssm_dt.bias", (n_head,)),
                ("ssm_a", (n_head, 1)),
                ("ssm_d", (n_head, 1)),
                ("ssm_norm.weight", (n_group, inner // n_group)),
                ("ssm_out.weight", (model.n_embd, inner)),
            )
        ),
    ]


def deepseek2(model: TinyModel) -> tuple[dict[str, Key], list[Tensor]]:
    """Return the keys and tensors of a model with compressed keys and values (MLA) and groups of experts."""
    n_head, n_query, n_latent, n_rope, n_rest, n_expert, n_ff = 2, 16, 32, 16, 16, 4, 32
    keys: dict[str, Key] = {
        "attention.head_count": n_head,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": n_query,
        "attention.kv_lora_rank": n_latent,
        "attention.key_length": n_latent + n_rope,
        "attention.value_length": n_latent,
        "attention.key_length_mla": n_rest + n_rope,
        "attention.value_length_mla": n_latent,
        "rope.dimension_count": n_rope,
        "feed_forward_length": model.n_ff,
        "leading_dense_block_count": 1,
        "expert_count": n_expert,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_feed_forward_length": n_ff,
        "expert_group_count": 2,
        "expert_group_used_count": 1,
        "expert_gating_func": 2,
        "expert_weights_scale": 1.5,
        "expert_weights_norm": True,
    }
    attention: tuple[Tensor, ...] = (
        ("attn_norm.weight", (model.n_embd,)),
        ("attn_q_a_norm.weight", (n_query,)),
        ("attn_kv_a_norm.weight", (n_latent,)),
        ("attn_q_a.weight", (n_query, model.n_embd)),
        ("attn_q_b.weight", (n_head * (n_rest + n_rope), n_query)),
        ("attn_kv_a_mqa.weight", (n_latent + n_rope, model.n_embd)),
        ("attn_k_b.weight", (n_head, n_latent, n_rest)),
        ("attn_v_b.weight", (n_head, n_latent, n_latent)),
        ("attn_output.weight", (model.n_embd, n_head * n_latent)),
    )
    experts: tuple[Tensor, ...] = (
        ("ffn_norm.weight", (model.n_embd,)),
        ("ffn_gate_inp.weight", (n_expert, model.n_embd)),
        ("exp_probs_b.bias", (n_expert,)),
        ("ffn_gate_exps.weight", (n_expert, n_ff, model.n_embd)),
        ("ffn_up_exps.weight", (n_expert, n_ff, model.n_embd)),
        ("ffn_down_exps.weight", (n_expert, model.n_embd, n_ff)),
        ("ffn_gate_shexp.weight", (n_ff, model.n_embd)),
        ("ffn_up_shexp.weight", (n_ff, model.n_embd)),
        ("ffn_down_shexp.weight", (model.n_embd, n_ff)),
    )
    return keys, [
        *((f"blk.{layer}.{name}", shape) for layer in range(model.n_layer) for name, shape in attention),
        *feed_forward(model, "blk.0"),
        *((f"blk.1.{name}", shape) for name, shape in experts),
    ]


def write_other(path: Path, make: Callable[[TinyModel], tuple[dict[str, Key], list[Tensor]]]) -> bytes:
    """Write a model whose architecture `TinyModel` does not know."""
    own_keys, own_tensors = make(SMALL)
    keys: dict[str, Key] = {
        f"{make.__name__}.{key}": value for key, value in (common_hyperparameters(SMALL) | own_keys).items()
    }
    tensors = [*decoder(lambda model, layer: iter(()), SMALL), *own_tensors]
    rng = np.random.default_rng(1)
    weights = {name: draw(rng, name, shape, {"ssm_a": -0.5}) for name, shape in tensors}
    return write_gguf(path, make.__name__, keys | VOCABULARY, weights).read_bytes()


def quantized(data: bytes, name: str) -> bytes:
    """Return a model with its matrices in another type."""
    kind, file = int(GGMLQuantizationType[name.upper()]), mutate.parse(data)
    for tensor in file.tensors:
        if len(tensor.dims) < 2 or tensor.dims[0] % mutate.TYPE_SIZES[kind][0]:
            continue
        tensor.data, tensor.kind = quantize(tensor.data, kind, tensor.dims[0]), kind
    return mutate.write(file)


def quantize(data: bytes, kind: int, width: int) -> bytes:
    weights = np.frombuffer(data, np.float32).copy()
    elements, size = mutate.TYPE_SIZES[kind]
    output = np.zeros(len(weights) // elements * size, np.uint8)
    source = ffi.from_buffer("float[]", weights)
    target = ffi.from_buffer("char[]", output, require_writable=True)
    lib.ggml_quantize_chunk(kind, source, target, 0, len(weights) // width, width, ffi.NULL)
    return output.tobytes()


def split(data: bytes, count: int) -> tuple[bytes, ...]:
    """Cut a model into files, as llama.cpp's `gguf-split` does."""
    whole = mutate.parse(data)
    parts, size = [], -(-len(whole.tensors) // count)
    for number in range(count):
        tensors = whole.tensors[number * size : (number + 1) * size]
        keys = [
            mutate.Entry(b"split.no", 2, number),
            mutate.Entry(b"split.count", 2, count),
            mutate.Entry(b"split.tensors.count", mutate.INT32, len(whole.tensors)),
        ]
        parts.append(mutate.write(mutate.File([*whole.entries, *keys] if not number else keys, tensors)))
    return tuple(parts)


def save(data: bytes, kv_type: str, folder: Path) -> bytes:
    """Return a sequence saved from a model, as a child process wrote it: nothing may compute in this one."""
    path, saved = folder / "model.gguf", folder / "saved"
    path.write_bytes(data)
    child = os.fork()
    if not child:
        status = 1
        try:
            with mn.Model.load(path, gpu_layers=0) as model, context(model, kv_type) as own, own.sequence() as sequence:
                sequence.extend(IDS)
                _ = sequence.logits
                sequence.save(saved)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "no sequence can be saved from a base"
    return saved.read_bytes()


def context(model: mn.Model, kv_type: str) -> mn.Context:
    """Return a context that those sequences can be restored into.

    Without flash attention, which never looks at the cells of other sequences, so that nothing bad in them could show.
    """
    flash = kv_type.startswith("q")
    return model.context(n_ctx=N_CTX, n_seq=2, n_threads=1, kv_type=kv_type, flash_attention=flash, prefix_cache=False)


def models(folder: Path) -> list[Base]:
    """Return every model, made in a folder; they are the same on every machine."""
    made = {name: model.write(folder / f"{name}.gguf").read_bytes() for name, model in MODELS.items()}
    made |= {make.__name__: write_other(folder / "other.gguf", make) for make in (mamba2, deepseek2)}
    blocks = BLOCKS.write(folder / "blocks.gguf").read_bytes()
    llama = MODELS["llama"]
    keys: dict[str, Key] = {f"llama.{key}": value for key, value in llama.hyperparameters.items()}
    vocabularies_of_llama = {}
    for name, vocabulary_keys in vocabularies().items():
        path = write_gguf(folder / f"{name}.gguf", "llama", keys | vocabulary_keys, llama.weights)
        file = mutate.parse(path.read_bytes())
        if charsmap_of := file.array(b"tokenizer.ggml.precompiled_charsmap"):
            charsmap_of.kind = mutate.UINT8
        vocabularies_of_llama[name] = mutate.write(file)
    types = {name: quantized(blocks, name) for name in TENSOR_TYPES}
    return [
        *(Base(name, (data,)) for name, data in (made | vocabularies_of_llama | types).items()),
        *(Base(name, split(made[of], count)) for name, (of, count) in SPLIT.items()),
    ]


def bases() -> list[Base]:
    """Return every base, the saved sequences included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = {base.name: base for base in models(folder)}
        for name, (of, kv_type) in SAVED.items():
            made[name] = Base(name, made[of].parts, save(made[of].parts[0], kv_type, folder), kv_type)
    return list(made.values())
