"""Files that contradict themselves are refused before libllama sees them, and no other file is."""

import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import minerva_native as mn
from minerva_native._binding import lib
from minerva_native.check import MAX_EXPERTS, MAX_LAYERS, check_model
from minerva_native.gguf import open_parts
from tiny_models import ARCHITECTURES, TOKENS, VOCABULARY, Key, TinyModel, write_gguf

Arrays = dict[str, npt.NDArray[Any]]

LLAMA, GEMMA2, QWEN3MOE, LFM2 = TinyModel(), TinyModel("gemma2", tied=True), TinyModel("qwen3moe"), TinyModel("lfm2")
JAMBA, RWKV7, T5 = TinyModel("jamba"), TinyModel("rwkv7"), TinyModel("t5")

SPM: dict[str, Key] = {"tokenizer.ggml.model": "llama"}
WPM: dict[str, Key] = {"tokenizer.ggml.model": "bert"}
RWKV: dict[str, Key] = {"tokenizer.ggml.model": "rwkv"}


def write(
    path: Path,
    model: TinyModel = LLAMA,
    keys: dict[str, Key | None] | None = None,
    change: Callable[[Arrays], object] = lambda weights: None,
) -> Path:
    """Write a tiny model with keys changed or, if None, left out, and with its tensors changed; "~" is its name."""
    prefixed = {f"{model.architecture}.{key}": value for key, value in model.hyperparameters.items()}
    changed = {key.replace("~", model.architecture): value for key, value in (keys or {}).items()}
    weights: Arrays = dict(model.weights)
    change(weights)
    all_keys = {**prefixed, **VOCABULARY, **changed}
    return write_gguf(path, model.architecture, {k: v for k, v in all_keys.items() if v is not None}, weights)


def check(path: Path, vocab_only: bool = False) -> None:
    check_model(open_parts(path), vocab_only)


def tokens(*changes: tuple[int, str]) -> list[str]:
    changed = list(TOKENS)
    for token, text in changes:
        changed[token] = text
    return changed


def astype(name: str, dtype: type[np.generic]) -> Callable[[Arrays], object]:
    return lambda weights: weights.update({name: weights[name].astype(dtype)})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_models_pass(tmp_path: Path, architecture: str) -> None:
    check(write(tmp_path / "model.gguf", TinyModel(architecture, tied=architecture == "gemma2")))


def test_the_built_in_model_passes() -> None:
    check(mn.DEMO_PATH)


@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES} - {"step35", "t5"}))  # libllama does not write those
def test_models_that_libllama_has_written_pass(
    tmp_path: Path, load_tiny: Callable[[TinyModel], mn.Model], architecture: str
) -> None:
    with load_tiny(TinyModel(architecture, tied=architecture == "gemma2")).raw() as model:
        lib.llama_model_save_to_file(model, str(tmp_path / "model.gguf").encode())
    check(tmp_path / "model.gguf")


def test_the_vocabularies_of_the_pinned_source_pass(llama_cpp_source: Path) -> None:
    paths = sorted((llama_cpp_source / "models").glob("ggml-vocab-*.gguf"))
    assert paths
    for path in paths:
        check(path, vocab_only=True)


def test_the_sizes_of_libllamas_arrays_are_those_of_the_pinned_source(llama_cpp_source: Path) -> None:
    source = (llama_cpp_source / "src" / "llama-hparams.h").read_text()
    sizes = dict(re.findall(r"#define LLAMA_MAX_(LAYERS|EXPERTS)\s+(\d+)", source))
    assert sizes == {"LAYERS": str(MAX_LAYERS), "EXPERTS": str(MAX_EXPERTS)}


def test_the_kinds_of_rope_scaling_are_those_of_the_pinned_source(llama_cpp_source: Path, tmp_path: Path) -> None:
    source = (llama_cpp_source / "src" / "llama-model.cpp").read_text()
    names = re.findall(r'\{ LLAMA_ROPE_SCALING_TYPE_\w+,\s+"(\w+)"', source)
    assert len(names) > 3
    for name in names:
        check(write(tmp_path / "model.gguf", keys={"~.rope.scaling.type": name}))


VOCABULARIES: dict[str, tuple[dict[str, Key | None], str]] = {
    "two equal tokens": (
        {"tokenizer.ggml.tokens": tokens((70, "A"), (80, "A"))},
        r"tokenizer\.ggml\.tokens has 'A' as tokens \d+ and \d+: expected every token once",
    ),
    "two tokens that are equal up to a NUL": (
        {"tokenizer.ggml.tokens": tokens((70, "xyz\0a"), (80, "xyz\0b"))},
        "has 'xyz' as tokens 70 and 80",
    ),
    "a token that is called like an empty one": (
        {"tokenizer.ggml.tokens": tokens((70, ""), (80, "[EMPTY_70]"))},
        r"has '\[EMPTY_70\]' as tokens 70 and 80",
    ),
    "a token that begins with a NUL, and one that is called like it": (
        {"tokenizer.ggml.tokens": tokens((70, "\0a"), (80, "[EMPTY_70]"))},
        r"has '\[EMPTY_70\]' as tokens 70 and 80",
    ),
    "a long token": (
        {"tokenizer.ggml.tokens": tokens((70, "a" * 5000))},
        r"tokenizer\.ggml\.tokens has 5000 bytes in token 70: expected at most 4096",
    ),
    "a long token of a kind of vocabulary that recurses over it": (
        {**RWKV, "tokenizer.ggml.tokens": tokens((70, "a" * 1001))},
        "has 1001 bytes in token 70: expected at most 1000",
    ),
    "many long tokens": (
        {"tokenizer.ggml.tokens": [f"{number:04000}" for number in range(len(TOKENS))]},
        "bytes in 286 tokens: expected mostly short tokens",
    ),
    "fewer tokens than embeddings": (
        {"tokenizer.ggml.tokens": TOKENS[:-1], "tokenizer.ggml.token_type": None},
        f"tokenizer.ggml.tokens has {len(TOKENS) - 1} tokens: expected the {len(TOKENS)} of token_embd.weight",
    ),
    "no vocabulary, and more tokens than embeddings": (
        {"tokenizer.ggml.model": "none", "~.vocab_size": 10_000_000},
        f"llama.vocab_size is 10000000: expected at most {len(TOKENS)}",
    ),
    "too few types": (
        {"tokenizer.ggml.token_type": [1, 1, 1]},
        f"tokenizer.ggml.token_type has 3 values: expected one for each of {len(TOKENS)} tokens",
    ),
    "too many types": ({"tokenizer.ggml.token_type": [1] * 1000}, "tokenizer.ggml.token_type has 1000 values"),
    "too few scores": ({**SPM, "tokenizer.ggml.scores": [0.5]}, "tokenizer.ggml.scores has 1 values"),
    "a score that is not a number": (
        {**SPM, "tokenizer.ggml.scores": [0.5, math.nan] * (len(TOKENS) // 2)},
        "tokenizer.ggml.scores is NaN for token 1",
    ),
    "a byte token in WordPiece": (
        {**WPM, "tokenizer.ggml.token_type": [int(gguf.TokenType.BYTE)] * len(TOKENS)},
        r"tokenizer.ggml.token_type is 6 \(a byte\) for token 0",
    ),
    "an RWKV vocabulary in which a text may never end": (
        {**RWKV, "tokenizer.ggml.tokens": [f"{number}?" for number in range(len(TOKENS))]},
        "has tokens that begin with the byte 48 and none that is only it",
    ),
}


@pytest.mark.parametrize(("keys", "words"), VOCABULARIES.values(), ids=VOCABULARIES.keys())
@pytest.mark.parametrize("vocab_only", [False, True])
def test_a_vocabulary_is_refused(tmp_path: Path, keys: dict[str, Key | None], words: str, vocab_only: bool) -> None:
    path = write(tmp_path / "model.gguf", keys=keys)
    with pytest.raises(mn.ModelLoadError, match=f"model.gguf: .*{words}"):
        check(path, vocab_only)


def test_a_vocabulary_without_weights_may_not_be_of_any_size(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "none.gguf", "llama", {"tokenizer.ggml.model": "none", "llama.vocab_size": 2**32 - 1})
    with pytest.raises(mn.ModelLoadError, match=r"llama\.vocab_size is 4294967295"):
        mn.Model.load(path, vocab_only=True)


def test_a_vocabulary_without_tokens(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "none.gguf", "llama")
    writer.add_string("tokenizer.ggml.model", "test")
    writer.add_key_value("tokenizer.ggml.tokens", [""], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    data = (tmp_path / "none.gguf").read_bytes()
    assert data.endswith(b"\x01" + bytes(7) + bytes(8))  # one string, of no bytes
    (tmp_path / "none.gguf").write_bytes(data[:-16] + bytes(8))
    with pytest.raises(mn.ModelLoadError, match=r"tokenizer\.ggml\.tokens has 0 tokens"):
        mn.Model.load(tmp_path / "none.gguf", vocab_only=True)


def test_empty_tokens_and_tokens_with_a_nul_are_no_error_in_themselves(tmp_path: Path) -> None:
    check(write(tmp_path / "model.gguf", keys={"tokenizer.ggml.tokens": tokens((70, ""), (80, ""), (90, "xyz\0"))}))


@pytest.mark.parametrize("token", [1000, 2**31, 2**32 - 1])
def test_a_special_token_beyond_the_vocabulary_is_no_error(tmp_path: Path, token: int) -> None:
    """libllama ignores it, and converters write -1 for none."""
    check(write(tmp_path / "model.gguf", keys={"tokenizer.ggml.bos_token_id": token}))


def test_an_rwkv_vocabulary_with_escapes_passes(tmp_path: Path) -> None:
    singles = [f"\\x{byte:02x}" for byte in range(256) if byte not in (9, 10, 13, 92)]
    vocabulary = [*singles, "\\t", "\\n", "\\r", "\\\\", "\\n\\n", "\\xe4\\xb8", "abc", "\\\\x"]
    vocabulary += [f"{number:03}" for number in range(len(TOKENS) - len(vocabulary))]
    keys: dict[str, Key | None] = {**RWKV, "tokenizer.ggml.tokens": list(vocabulary), "tokenizer.ggml.token_type": None}
    check(write(tmp_path / "model.gguf", keys=keys))
    for single, other, byte in ("\\xe4", "\\xe4\\xe4", 0xE4), ("\\x61", "\\xa", 0x61), ("\\\\", "\\", 0x5C):
        without = [other if token == single else token for token in vocabulary]
        with pytest.raises(mn.ModelLoadError, match=f"begin with the byte {byte}"):
            check(write(tmp_path / "model.gguf", keys={**keys, "tokenizer.ggml.tokens": without}))


NUMBERS: dict[str, tuple[TinyModel, dict[str, Key | None], str]] = {
    "no layers": (LLAMA, {"~.block_count": 0}, "llama.block_count is 0: expected from 1 to 512"),
    "too many layers": (LLAMA, {"~.block_count": 513}, "llama.block_count is 513: expected from 1 to 512"),
    "no number of layers": (LLAMA, {"~.block_count": None}, "llama.block_count is 0"),
    "more layers that predict than layers": (
        LLAMA,
        {"~.nextn_predict_layers": 4},
        "llama.nextn_predict_layers is 4: expected at most the 3 of llama.block_count",
    ),
    "a negative number of layers": (LLAMA, {"~.block_count": [-1]}, "llama.block_count is -1"),
    "a first token of answers that there is not": (
        T5,
        {"~.decoder_start_token_id": 65535},
        "t5.decoder_start_token_id is 65535",
    ),
    "too many decoder layers": (T5, {"~.decoder_block_count": 2**31}, "t5.decoder_block_count is 2147483648"),
    "more experts used than there are": (
        QWEN3MOE,
        {"~.expert_used_count": 7},
        "qwen3moe.expert_used_count is 7: expected from 1 to the 6 of qwen3moe.expert_count",
    ),
    "no experts used": (
        QWEN3MOE,
        {"~.expert_used_count": 0},
        "qwen3moe.expert_used_count is 0: expected from 1 to the 6",
    ),
    "no experts used in a layer that has them": (
        QWEN3MOE,
        {"~.expert_used_count": [2, 0, 2]},
        "qwen3moe.expert_used_count is 0: expected at least 1 in layer 1",
    ),
    "experts used without any": (
        LLAMA,
        {"~.expert_used_count": 2},
        "llama.expert_used_count is 2: expected from 0 to the 0",
    ),
    "too many experts": (QWEN3MOE, {"~.expert_count": 1025}, "qwen3moe.expert_count is 1025: expected from 0 to 1024"),
    "as many groups as experts": (
        QWEN3MOE,
        {"~.expert_group_count": 6},
        "qwen3moe.expert_group_count is 6: expected less than the 6 experts",
    ),
    "groups that do not divide the experts": (
        QWEN3MOE,
        {"~.expert_group_count": 4},
        "qwen3moe.expert_group_count is 4: expected a divisor of the 6 experts",
    ),
    "as many groups used as there are": (
        QWEN3MOE,
        {"~.expert_group_count": 3, "~.expert_group_used_count": 3},
        "qwen3moe.expert_group_used_count is 3: expected from 1 to less than the 3 groups",
    ),
    "groups without experts": (
        LLAMA,
        {"~.expert_group_count": 2},
        "llama.expert_group_count is 2: expected less than the 0",
    ),
    "a value too few for the layers": (
        LLAMA,
        {"~.attention.head_count": [4, 4]},
        "llama.attention.head_count has 2 values: expected one for each of 3 layers",
    ),
    "no heads": (
        LLAMA,
        {"~.attention.head_count": 0},
        "llama.attention.head_count is 0: expected at least 1 in layer 0",
    ),
    "no heads with keys": (
        LLAMA,
        {"~.attention.head_count_kv": 0},
        "llama.attention.head_count_kv is 0: expected a divisor of the 4 heads of layer 0",
    ),
    "heads that the keys do not divide": (
        LLAMA,
        {"~.attention.head_count_kv": 3},
        "llama.attention.head_count_kv is 3",
    ),
    "a width that the heads do not divide": (
        TinyModel("gpt2"),
        {"~.attention.head_count": 5},
        "gpt2.attention.head_count is 5: expected a divisor of the 128 of gpt2.embedding_length",
    ),
    "an unknown kind of rope scaling": (
        LLAMA,
        {"~.rope.scaling.type": "cubic"},
        "llama.rope.scaling.type is 'cubic': expected one of none, linear, yarn, longrope",
    ),
    "an odd number of rope dimensions": (
        LFM2,
        {"~.rope.dimension_count": 31},
        "lfm2.rope.dimension_count is 31: expected an even number up to the 32 of a head",
    ),
    "more rope dimensions than a head has": (LFM2, {"~.rope.dimension_count": 34}, "lfm2.rope.dimension_count is 34"),
    "a negative number of rope dimensions": (
        LFM2,
        {"~.rope.dimension_count": 2**32 - 2},
        "lfm2.rope.dimension_count is 4294967294",
    ),
    "more rope dimensions than a head of a window has": (
        GEMMA2,
        {"~.rope.dimension_count_swa": 32, "~.attention.key_length_swa": 16},
        "gemma2.rope.dimension_count_swa is 32: expected an even number up to the 16 of a head",
    ),
    "rope sections that cancel each other out": (
        LLAMA,
        {"~.rope.dimension_sections": [8, -8, 0, 0]},
        r"llama.rope.dimension_sections is \[8, -8, 0, 0\]: expected from 0 on",
    ),
    "an interval of attention layers to divide by": (
        TinyModel("qwen35"),
        {"~.full_attention_interval": 0},
        "qwen35.full_attention_interval is 0: expected at least 1",
    ),
    "states larger than what computes them": (
        TinyModel("qwen35moe"),
        {"~.ssm.inner_size": 1 << 24},
        "qwen35moe.ssm.inner_size is 16777216: expected 128, as ssm.time_step_rank is 8 and ssm.state_size is 16",
    ),
    "no experts to divide by": (
        TinyModel("qwen35moe"),
        {"~.expert_count": None, "~.expert_used_count": None},
        "qwen35moe.expert_count is 0: expected at least 1",
    ),
    "a negative epsilon": (
        LLAMA,
        {"~.attention.layer_norm_rms_epsilon": -1.0},
        "llama.attention.layer_norm_rms_epsilon is -1.0: expected from 0 on and finite",
    ),
    "an infinite epsilon": (
        LLAMA,
        {"~.attention.layer_norm_rms_epsilon": math.inf},
        "llama.attention.layer_norm_rms_epsilon is inf",
    ),
    "an epsilon that is not a number": (
        LLAMA,
        {"~.attention.layer_norm_rms_epsilon": math.nan},
        "llama.attention.layer_norm_rms_epsilon is NaN: expected a number",
    ),
    "a scale that is not a number": (LLAMA, {"~.rope.scaling.factor": math.nan}, "llama.rope.scaling.factor is NaN"),
    "a window without end": (
        GEMMA2,
        {"~.attention.sliding_window": 2**32 - 1},
        "gemma2.attention.sliding_window is 4294967295: expected from 0 to 16777216",
    ),
    "no trained context": (LLAMA, {"~.context_length": 0}, "llama.context_length is 0: expected at least 1"),
    "a state of no size": (JAMBA, {"~.ssm.state_size": 0}, "jamba.ssm.state_size is 0: expected at least 1"),
    "a recurrent layer of a width that libllama does not expect": (
        JAMBA,
        {"~.ssm.inner_size": 16},
        "jamba.ssm.inner_size is 16: expected twice the 128 of jamba.embedding_length",
    ),
    "a convolution of no width": (LFM2, {"~.shortconv.l_cache": 0}, "lfm2.shortconv.l_cache is 0: expected at least 1"),
    "a head of no size": (LLAMA, {"~.attention.key_length": 0}, "llama.attention.key_length is 0: expected at least 1"),
    "no head size in RWKV-7": (RWKV7, {"~.wkv.head_size": 0}, "rwkv7.wkv.head_size is 0: expected at least 1"),
    "a head of RWKV-7 that is smaller than what its kernel writes": (
        RWKV7,
        {"~.wkv.head_size": 16},
        "rwkv7.wkv.head_size is 16: expected a multiple of 64",
    ),
    "a head of RWKV-7 that does not divide the width": (RWKV7, {"~.wkv.head_size": 48}, "rwkv7.wkv.head_size is 48"),
    "three tokens to shift in RWKV-7": (
        RWKV7,
        {"~.token_shift_count": 3},
        "rwkv7.token_shift_count is 3: expected 1 or 2",
    ),
    "too few buckets of distances": (
        T5,
        {"~.attention.relative_buckets_count": 2},
        "t5.attention.relative_buckets_count is 2: expected from 4 to 255",
    ),
}


@pytest.mark.parametrize(("model", "keys", "words"), NUMBERS.values(), ids=NUMBERS.keys())
def test_a_number_is_refused(tmp_path: Path, model: TinyModel, keys: dict[str, Key | None], words: str) -> None:
    path = write(tmp_path / "model.gguf", model, keys)
    with pytest.raises(mn.ModelLoadError, match=f"model.gguf: {words}"):
        check(path)


TENSORS: dict[str, tuple[TinyModel, Callable[[Arrays], object], str]] = {
    "a norm": (
        LLAMA,
        astype("blk.1.attn_norm.weight", np.float16),
        "tensor 'blk.1.attn_norm.weight' has the type f16: expected f32",
    ),
    "a bias": (TinyModel("gpt2"), astype("blk.0.ffn_up.bias", np.float16), "'blk.0.ffn_up.bias' has the type f16"),
    "a state": (JAMBA, astype("blk.0.ssm_a", np.float16), "tensor 'blk.0.ssm_a' has the type f16: expected f32"),
    "a convolution": (
        LFM2,
        astype("blk.0.shortconv.conv.weight", np.float16),
        "tensor 'blk.0.shortconv.conv.weight' has the type f16: expected f32",
    ),
    "a mix": (
        RWKV7,
        astype("blk.0.time_mix_lerp_fused.weight", np.float16),
        "time_mix_lerp_fused.weight' has the type",
    ),
    "a matrix of integers": (
        LLAMA,
        astype("blk.2.ffn_down.weight", np.int8),
        "tensor 'blk.2.ffn_down.weight' has the type i8: expected one that ggml can compute with",
    ),
    "embeddings of integers": (LLAMA, astype("token_embd.weight", np.int32), "'token_embd.weight' has the type i32"),
    "a matrix of doubles": (LLAMA, astype("output.weight", np.float64), "'output.weight' has the type f64"),
    "nothing in it": (
        LLAMA,
        lambda weights: weights.update({"blk.0.attn_q.weight": np.zeros((0, 128), np.float32)}),
        r"tensor 'blk.0.attn_q.weight' has the shape \(128, 0\): expected one with numbers in it",
    ),
    "no first layer": (
        LLAMA,
        lambda weights: [weights.pop(name) for name in list(weights) if name.startswith("blk.0.")],
        r"tensor 'blk\.0\.\*' is missing: expected the first layer",
    ),
    "a router without experts": (
        QWEN3MOE,
        lambda weights: weights.pop("blk.1.ffn_up_exps.weight"),
        "tensor 'blk.1.ffn_up_exps.weight' is missing: expected all tensors of the layer",
    ),
    "no queries in a layer with a state": (
        TinyModel("qwen35"),
        lambda weights: weights.pop("blk.0.attn_qkv.weight"),
        "tensor 'blk.0.attn_qkv.weight' is missing: expected all tensors of the layer",
    ),
    "no gate in a layer with a state": (
        TinyModel("qwen3next"),
        lambda weights: weights.pop("blk.2.attn_gate.weight"),
        "tensor 'blk.2.attn_gate.weight' is missing: expected all tensors of the layer",
    ),
    "no positions in an encoder": (
        T5,
        lambda weights: weights.pop("enc.blk.0.attn_rel_b.weight"),
        "tensor 'enc.blk.0.attn_rel_b.weight' is missing",
    ),
    "no positions in a decoder": (
        T5,
        lambda weights: weights.pop("dec.blk.0.attn_rel_b.weight"),
        "tensor 'dec.blk.0.attn_rel_b.weight' is missing",
    ),
}


@pytest.mark.parametrize(("model", "change", "words"), TENSORS.values(), ids=TENSORS.keys())
def test_a_tensor_is_refused(tmp_path: Path, model: TinyModel, change: Callable[[Arrays], object], words: str) -> None:
    path = write(tmp_path / "model.gguf", model, change=change)
    with pytest.raises(mn.ModelLoadError, match=f"model.gguf: .*{words}"):
        check(path)


def test_phi_3_without_keys_is_refused(tmp_path: Path) -> None:
    keys: dict[str, Key] = {f"phi3.{key}": value for key, value in LLAMA.hyperparameters.items()}
    weights: Arrays = dict(LLAMA.weights)
    check(write_gguf(tmp_path / "model.gguf", "phi3", {**keys, **VOCABULARY}, weights))
    weights.pop("blk.0.attn_k.weight")
    with pytest.raises(mn.ModelLoadError, match=r"tensor 'blk\.0\.attn_k\.weight' is missing"):
        check(write_gguf(tmp_path / "model.gguf", "phi3", {**keys, **VOCABULARY}, weights))


def test_mamba_2_without_groups_is_refused(tmp_path: Path) -> None:
    def make_scalars(weights: Arrays) -> None:
        weights["blk.0.ssm_a"] = weights["blk.0.ssm_a"][:, :1]

    check(write(tmp_path / "model.gguf", JAMBA, {"~.ssm.group_count": 1}, make_scalars))
    with pytest.raises(mn.ModelLoadError, match=r"jamba\.ssm\.group_count is 0: expected at least 1"):
        check(write(tmp_path / "model.gguf", JAMBA, {"~.ssm.group_count": 0}, make_scalars))


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_1, gguf.GGMLQuantizationType.Q8_K])
def test_a_type_that_ggml_uses_for_activations_alone_is_refused(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    _, size = gguf.GGML_QUANT_SIZES[kind]
    writer.add_tensor("matrix.weight", np.zeros((2, size * 8), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(mn.ModelLoadError, match=f"'matrix.weight' has the type {kind.name.replace('Q', 'q')}"):
        check(tmp_path / "model.gguf")


def test_a_model_of_f16_matrices_passes(tmp_path: Path) -> None:
    def half(weights: Arrays) -> None:
        weights.update({name: weight.astype(np.float16) for name, weight in weights.items() if weight.ndim > 1})

    check(write(tmp_path / "model.gguf", change=half))


# Whether an architecture uses RoPE is known once libllama has loaded it.


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"~.rope.dimension_count": 0}, "lfm2.rope.dimension_count is 0: expected an even number above 0"),
        ({"~.rope.freq_base": 0.0}, "lfm2.rope.freq_base is 0.0: expected above 0"),
        ({"~.rope.freq_base": -1.0}, "lfm2.rope.freq_base is -1.0: expected above 0"),
    ],
)
def test_a_rotation_that_libllama_cannot_do_is_refused(tmp_path: Path, keys: dict[str, Key | None], words: str) -> None:
    with pytest.raises(mn.ModelLoadError, match=words):
        mn.Model.load(write(tmp_path / "model.gguf", LFM2, keys), gpu_layers=0)


def test_no_rotation_is_no_error_in_a_model_without_any(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", JAMBA, {"~.rope.dimension_count": 0, "~.rope.freq_base": 0.0})
    mn.Model.load(path, gpu_layers=0).close()


# Files that are something else


@pytest.mark.parametrize(
    ("architecture", "keys", "words"),
    [
        ("llama", {"general.type": "adapter", "adapter.type": "lora"}, "is a LoRA adapter, which changes a model"),
        ("llama", {"general.type": "mmproj"}, "is a projector for images or sound, not a language model"),
        ("clip", {}, "is a projector for images or sound, not a language model"),
        ("imatrix", {"general.type": "imatrix"}, "is an importance matrix, which only helps to quantise a model"),
        ("controlvector", {}, "is a control vector, which steers a model"),
        ("llama", {**VOCABULARY, "llama.block_count": 3}, "no weights: load it with vocab_only=True"),
        ("\x1b[31mllama", {}, r"general.architecture is '\\x1b\[31mllama': expected the name of an architecture"),
    ],
)
def test_a_file_that_is_no_model_is_called_what_it_is(
    tmp_path: Path, architecture: str, keys: dict[str, Key], words: str
) -> None:
    path = write_gguf(tmp_path / "other.gguf", architecture, keys)
    with pytest.raises(mn.ModelLoadError, match=f"other.gguf.* {words}"):
        mn.Model.load(path)


@pytest.mark.parametrize("value", [7, -1.5, True, "text", ["a", "b"], [1, 2], [0.5, 1.5]], ids=repr)
def test_values_of_unexpected_types_are_refused_or_left_to_libllama(tmp_path: Path, value: Key) -> None:
    keys = [*(f"~.{key}" for key in {**LLAMA.hyperparameters, "rope.scaling.type": ""}), *VOCABULARY, "general.type"]
    for key in keys:
        path = write(tmp_path / "model.gguf", keys={key: value})
        with contextlib.suppress(mn.ModelLoadError):
            check(path)


def test_the_check_can_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", keys={"~.attention.layer_norm_rms_epsilon": math.inf})
    with pytest.raises(mn.ModelLoadError, match="epsilon"):
        mn.Model.load(path, gpu_layers=0)
    mn.Model.load(path, gpu_layers=0, check=False).close()


# Models whose attention is not causal


@pytest.mark.parametrize("architecture", ["llama", "dream"])
def test_a_model_that_is_not_causal_can_be_loaded_but_has_no_context(tmp_path: Path, architecture: str) -> None:
    keys: dict[str, Key] = {f"{architecture}.{key}": value for key, value in LLAMA.hyperparameters.items()}
    if architecture == "llama":
        keys["llama.attention.causal"] = False
    path = write_gguf(tmp_path / "model.gguf", architecture, {**keys, **VOCABULARY}, LLAMA.weights)
    with mn.Model.load(path, gpu_layers=0) as model:
        assert not model.is_causal
        assert model.tokenizer.encode("the")
        with pytest.raises(mn.ContextError, match=rf"this model \({architecture}\) attends to a text as a whole"):
            model.context(n_ctx=64)


@pytest.mark.parametrize("model", [LLAMA, RWKV7, T5], ids=lambda model: model.architecture)
def test_models_that_continue_a_text_are_causal(load_tiny: Callable[[TinyModel], mn.Model], model: TinyModel) -> None:
    assert load_tiny(model).is_causal


# Alignment


def test_a_model_of_small_alignment_is_loaded_without_a_mapping(tmp_path: Path, tiny: mn.Model) -> None:
    keys: dict[str, Key] = {f"llama.{key}": value for key, value in LLAMA.hyperparameters.items()}
    path = write_gguf(tmp_path / "model.gguf", "llama", {**keys, **VOCABULARY}, LLAMA.weights, alignment=8)
    for model in (tiny, mn.Model.load(path, gpu_layers=0)):
        with model.context(n_ctx=64, n_threads=1) as context, context.sequence() as sequence:
            sequence.extend([1, 2, 3])
            if model is tiny:
                expected = sequence.logits
            else:
                np.testing.assert_array_equal(sequence.logits, expected)
    model.close()


@pytest.mark.parametrize("alignment", [0, 24])
def test_an_alignment_that_is_no_power_of_two(tmp_path: Path, alignment: int) -> None:
    path = write(tmp_path / "model.gguf", keys={"general.alignment": alignment})
    with pytest.raises(mn.ModelLoadError, match="is not a power of 2"):
        mn.Model.load(path)
