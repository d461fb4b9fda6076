"""Tiny GGUF models with random weights, for tests that need a complete model but not a trained one.

`ARCHITECTURES` lists the hyperparameters and tensors of each architecture.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Shape = tuple[int, ...]
Tensor = tuple[str, Shape]
Key = int | float | bool | str | list[int] | list[float] | list[str] | list[bool]


@dataclass(frozen=True)
class TinyModel:
    """The shape of a model. Equal values have equal weights."""

    architecture: str = "llama"
    n_layer: int = 3
    n_embd: int = 128
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 192  # of each expert, if there are experts
    n_ctx_train: int = 512
    rope_base: float = 10_000.0
    rms_epsilon: float = 1e-5
    tied: bool = False  # whether the output matrix is the embedding matrix
    seed: int = 1
    sliding_window: int = 16
    n_expert: int = 6
    n_expert_used: int = 2
    ssm_state: int = 16
    ssm_conv: int = 4
    ssm_dt_rank: int = 8
    ssm_group: int = 2
    n_buckets: int = 32  # of relative positions
    lora_rank: int = 16  # of RWKV's small matrices
    kv_rank: int = 32  # of DeepSeek's compressed keys and values
    n_mtp: int = 0  # heads for multi-token prediction, in layers after the others

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def ssm_inner(self) -> int:
        return 2 * self.n_embd

    @cached_property
    def weights(self) -> dict[str, Array]:
        """Every tensor by its GGUF name; a matrix has one row for each output."""
        rng, row = np.random.default_rng(self.seed), ARCHITECTURES[self.architecture]
        return {name: draw(rng, name, shape, row.scales) for name, shape in row.tensors(self)}

    def write(self, path: Path) -> Path:
        """Write the model as a GGUF file."""
        keys = {f"{self.architecture}.{key}": value for key, value in self.hyperparameters.items()}
        return write_gguf(path, self.architecture, {**keys, **VOCABULARY}, self.weights)

    @property
    def hyperparameters(self) -> dict[str, Key]:
        return ARCHITECTURES[self.architecture].hyperparameters(self)


def draw(rng: np.random.Generator, name: str, shape: Shape, scales: Mapping[str, float]) -> Array:
    """Draw random weights, scaled so that every part of the model affects its logits."""
    scale = scales.get(re.sub(r".*blk\.\d+\.", "", name), 1.0)
    if len(shape) == 1 or name.endswith("ssm_a"):
        return (scale * rng.uniform(0.5, 1.5, shape)).astype(np.float32)
    spread = 1.0 if name.startswith("token_embd") else 1.5 / np.sqrt(shape[-1])
    return (scale * spread * rng.standard_normal(shape)).astype(np.float32)


def common_hyperparameters(model: TinyModel) -> dict[str, Key]:
    return {
        "context_length": model.n_ctx_train,
        "embedding_length": model.n_embd,
        "block_count": model.n_layer + model.n_mtp,
        **({"nextn_predict_layers": model.n_mtp} if model.n_mtp else {}),
        "attention.layer_norm_rms_epsilon": model.rms_epsilon,
        "vocab_size": len(TOKENS),
    }


def llama_hyperparameters(model: TinyModel) -> dict[str, Key]:
    return {
        **common_hyperparameters(model),
        "feed_forward_length": model.n_ff,
        "attention.head_count": model.n_head,
        "attention.head_count_kv": model.n_head_kv,
        "rope.dimension_count": model.head_size,
        "rope.freq_base": model.rope_base,
    }


def gemma2_hyperparameters(model: TinyModel) -> dict[str, Key]:
    return {**llama_hyperparameters(model), "attention.sliding_window": model.sliding_window}


def qwen3moe_hyperparameters(model: TinyModel) -> dict[str, Key]:
    return {
        **llama_hyperparameters(model),
        "expert_count": model.n_expert,
        "expert_used_count": model.n_expert_used,
        "expert_feed_forward_length": model.n_ff,
    }


def glm4moe_hyperparameters(model: TinyModel) -> dict[str, Key]:
    return {**qwen3moe_hyperparameters(model), "expert_shared_count": 1, "leading_dense_block_count": 1}


def mimo2_hyperparameters(model: TinyModel) -> dict[str, Key]:
    is_window = [not attends(layer) for layer in range(model.n_layer + model.n_mtp)]
    return {
        **gemma2_hyperparameters(model),
        "attention.sliding_window_pattern": is_window,
        "expert_feed_forward_length": model.n_ff,
    }


def hy_v3_hyperparameters(model: TinyModel) -> dict[str, Key]:
    return {**llama_hyperparameters(model), "expert_feed_forward_length": model.n_ff}


def cohere2moe_hyperparameters(model: TinyModel) -> dict[str, Key]:
    return {**glm4moe_hyperparameters(model), "attention.sliding_window": model.sliding_window, "logit_scale": 1.0}


def deepseek2_hyperparameters(model: TinyModel) -> dict[str, Key]:
    size, rank = model.head_size, model.kv_rank
    return {
        **glm4moe_hyperparameters(model),
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": 2 * rank,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + size // 2,
        "attention.value_length": rank,
        "attention.key_length_mla": size + size // 2,
        "attention.value_length_mla": size,
        "rope.dimension_count": size // 2,
    }


def gpt2_hyperparameters(model: TinyModel) -> dict[str, Key]:
    return {
        **common_hyperparameters(model),
        "feed_forward_length": model.n_ff,
        "attention.head_count": model.n_head,
        "attention.layer_norm_epsilon": model.rms_epsilon,
    }


def attends(layer: int) -> bool:
    """Return whether this layer of a hybrid is an attention layer, not a recurrent one."""
    return layer % 2 == 1


def lfm2_hyperparameters(model: TinyModel) -> dict[str, Key]:
    heads = [model.n_head_kv if attends(layer) else 0 for layer in range(model.n_layer)]
    return {**gemma2_hyperparameters(model), "attention.head_count_kv": heads, "shortconv.l_cache": model.ssm_conv - 1}


def rwkv7_hyperparameters(model: TinyModel) -> dict[str, Key]:
    ranks = ("decay", "iclr", "value_residual_mix", "gate")
    return {
        **common_hyperparameters(model),
        **{f"attention.{name}_lora_rank": model.lora_rank for name in ranks},
        "attention.layer_norm_epsilon": model.rms_epsilon,
        "feed_forward_length": model.n_ff,
        "wkv.head_size": model.n_embd // 2,
    }


def mamba_hyperparameters(model: TinyModel) -> dict[str, Key]:
    return {
        **common_hyperparameters(model),
        "ssm.conv_kernel": model.ssm_conv,
        "ssm.inner_size": model.ssm_inner,
        "ssm.state_size": model.ssm_state,
        "ssm.time_step_rank": model.ssm_dt_rank,
    }


def jamba_hyperparameters(model: TinyModel) -> dict[str, Key]:
    heads = [model.n_head_kv if attends(layer) else 0 for layer in range(model.n_layer)]
    return {**llama_hyperparameters(model), **mamba_hyperparameters(model), "attention.head_count_kv": heads}


def qwen35_hyperparameters(model: TinyModel) -> dict[str, Key]:
    half = model.head_size // 2
    return {
        **llama_hyperparameters(model),
        **grouped_ssm_hyperparameters(model),
        "ssm.inner_size": model.ssm_dt_rank * model.ssm_state,  # whose heads are as wide as the state
        "rope.dimension_sections": [half - 2 * (half // 3), half // 3, half // 3, 0],
        "full_attention_interval": 2,  # see `attends`
    }


def qwen35moe_hyperparameters(model: TinyModel) -> dict[str, Key]:
    return {**qwen3moe_hyperparameters(model), **qwen35_hyperparameters(model)}


def nemotron_hyperparameters(model: TinyModel) -> dict[str, Key]:
    layers = range(model.n_layer)
    return {
        **llama_hyperparameters(model),
        **grouped_ssm_hyperparameters(model),
        "attention.layer_norm_epsilon": model.rms_epsilon,
        "attention.head_count_kv": [model.n_head_kv if attends(layer) else 0 for layer in layers],
        "feed_forward_length": [model.n_ff if feeds_forward(model, layer) else 0 for layer in layers],
    }


def grouped_ssm_hyperparameters(model: TinyModel) -> dict[str, Key]:
    return {**mamba_hyperparameters(model), "ssm.group_count": model.ssm_group}


def t5_hyperparameters(model: TinyModel) -> dict[str, Key]:
    return {
        **common_hyperparameters(model),
        "feed_forward_length": model.n_ff,
        "attention.head_count": model.n_head,
        "attention.relative_buckets_count": model.n_buckets,
        "decoder_start_token_id": END,
    }


def attention(model: TinyModel, prefix: str) -> Iterator[Tensor]:
    wide, narrow = model.n_head * model.head_size, model.n_head_kv * model.head_size
    yield f"{prefix}.attn_q.weight", (wide, model.n_embd)
    yield f"{prefix}.attn_k.weight", (narrow, model.n_embd)
    yield f"{prefix}.attn_v.weight", (narrow, model.n_embd)
    yield f"{prefix}.attn_output.weight", (model.n_embd, wide)


def feed_forward(model: TinyModel, prefix: str, kind: str = "", *n_expert: int) -> Iterator[Tensor]:
    yield f"{prefix}.ffn_norm.weight", (model.n_embd,)
    yield f"{prefix}.ffn_gate{kind}.weight", (*n_expert, model.n_ff, model.n_embd)
    yield f"{prefix}.ffn_up{kind}.weight", (*n_expert, model.n_ff, model.n_embd)
    yield f"{prefix}.ffn_down{kind}.weight", (*n_expert, model.n_embd, model.n_ff)


def llama_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    yield f"blk.{layer}.attn_norm.weight", (model.n_embd,)
    yield from attention(model, f"blk.{layer}")
    yield from feed_forward(model, f"blk.{layer}")


def gemma2_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    """Yield the tensors of a layer. Odd layers attend to all positions, even ones to the window."""
    assert model.tied, "gemma2 has no separate output matrix"
    yield from llama_layer(model, layer)
    yield f"blk.{layer}.post_attention_norm.weight", (model.n_embd,)
    yield f"blk.{layer}.post_ffw_norm.weight", (model.n_embd,)


def qwen3_attention(model: TinyModel, layer: int) -> Iterator[Tensor]:
    yield f"blk.{layer}.attn_norm.weight", (model.n_embd,)
    yield from attention(model, f"blk.{layer}")
    yield f"blk.{layer}.attn_q_norm.weight", (model.head_size,)
    yield f"blk.{layer}.attn_k_norm.weight", (model.head_size,)


def qwen3moe_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    yield from qwen3_attention(model, layer)
    yield f"blk.{layer}.ffn_gate_inp.weight", (model.n_expert, model.n_embd)
    yield from feed_forward(model, f"blk.{layer}", "_exps", model.n_expert)


def experts(model: TinyModel, prefix: str) -> Iterator[Tensor]:
    """Yield what chooses experts, the experts, and one more that every token has; no norm."""
    yield f"{prefix}.ffn_gate_inp.weight", (model.n_expert, model.n_embd)
    for kind, *n_expert in ("_exps", model.n_expert), ("_shexp",):
        yield from (tensor for tensor in feed_forward(model, prefix, kind, *n_expert) if "norm" not in tensor[0])


def experts_after_the_first(model: TinyModel, layer: int, has_bias: bool = True) -> Iterator[Tensor]:
    prefix = f"blk.{layer}"
    if layer > 0:
        yield from experts(model, prefix)
        if has_bias:
            yield f"{prefix}.exp_probs_b.bias", (model.n_expert,)
    else:
        yield from (tensor for tensor in feed_forward(model, prefix) if "norm" not in tensor[0])


def glm4moe_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    yield f"blk.{layer}.attn_norm.weight", (model.n_embd,)
    yield from attention(model, f"blk.{layer}")
    yield from experts_after_the_first(model, layer)
    yield f"blk.{layer}.post_attention_norm.weight", (model.n_embd,)


def cohere2moe_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    yield f"blk.{layer}.attn_norm.weight", (model.n_embd,)
    yield from attention(model, f"blk.{layer}")
    yield from experts_after_the_first(model, layer, has_bias=False)


def deepseek2_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    prefix, size, rank, n_head = f"blk.{layer}", model.head_size, model.kv_rank, model.n_head
    yield f"{prefix}.attn_norm.weight", (model.n_embd,)
    yield f"{prefix}.attn_q_a.weight", (2 * rank, model.n_embd)
    yield f"{prefix}.attn_q_a_norm.weight", (2 * rank,)
    yield f"{prefix}.attn_q_b.weight", (n_head * (size + size // 2), 2 * rank)
    yield f"{prefix}.attn_kv_a_mqa.weight", (rank + size // 2, model.n_embd)
    yield f"{prefix}.attn_kv_a_norm.weight", (rank,)
    yield f"{prefix}.attn_k_b.weight", (n_head, rank, size)
    yield f"{prefix}.attn_v_b.weight", (n_head, size, rank)
    yield f"{prefix}.attn_output.weight", (model.n_embd, n_head * size)
    yield f"{prefix}.ffn_norm.weight", (model.n_embd,)
    yield from experts_after_the_first(model, layer)


def hy_v3_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    yield from qwen3_attention(model, layer)
    yield from feed_forward(model, f"blk.{layer}")


def mimo2_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    wide = (model.n_head + 2 * model.n_head_kv) * model.head_size
    yield f"blk.{layer}.attn_norm.weight", (model.n_embd,)
    yield f"blk.{layer}.attn_qkv.weight", (wide, model.n_embd)
    yield f"blk.{layer}.attn_output.weight", (model.n_embd, model.n_head * model.head_size)
    yield from feed_forward(model, f"blk.{layer}")


def mamba_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    yield f"blk.{layer}.attn_norm.weight", (model.n_embd,)
    yield f"blk.{layer}.ssm_in.weight", (2 * model.ssm_inner, model.n_embd)
    yield f"blk.{layer}.ssm_conv1d.weight", (model.ssm_inner, model.ssm_conv)
    yield f"blk.{layer}.ssm_conv1d.bias", (model.ssm_inner,)
    yield f"blk.{layer}.ssm_x.weight", (model.ssm_dt_rank + 2 * model.ssm_state, model.ssm_inner)
    yield f"blk.{layer}.ssm_dt.weight", (model.ssm_inner, model.ssm_dt_rank)
    yield f"blk.{layer}.ssm_dt.bias", (model.ssm_inner,)
    yield f"blk.{layer}.ssm_a", (model.ssm_inner, model.ssm_state)
    yield f"blk.{layer}.ssm_d", (model.ssm_inner,)
    yield f"blk.{layer}.ssm_out.weight", (model.n_embd, model.ssm_inner)


def jamba_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    if attends(layer):
        yield from llama_layer(model, layer)
        return
    yield from mamba_layer(model, layer)
    yield f"blk.{layer}.ssm_dt_norm.weight", (model.ssm_dt_rank,)
    yield f"blk.{layer}.ssm_b_norm.weight", (model.ssm_state,)
    yield f"blk.{layer}.ssm_c_norm.weight", (model.ssm_state,)
    yield from feed_forward(model, f"blk.{layer}")


def qwen35_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    prefix, key, value = f"blk.{layer}", model.ssm_group * model.ssm_state, model.ssm_dt_rank * model.ssm_state
    if attends(layer) or layer >= model.n_layer:  # with a gate for each number of the queries
        for name, shape in qwen3_attention(model, layer):
            yield name, (2 * shape[0], *shape[1:]) if name.endswith("attn_q.weight") else shape
    else:
        yield f"{prefix}.attn_norm.weight", (model.n_embd,)
        yield f"{prefix}.attn_qkv.weight", (2 * key + value, model.n_embd)
        yield f"{prefix}.attn_gate.weight", (value, model.n_embd)
        yield f"{prefix}.ssm_conv1d.weight", (2 * key + value, model.ssm_conv)
        yield f"{prefix}.ssm_dt.bias", (model.ssm_dt_rank,)
        yield f"{prefix}.ssm_a", (model.ssm_dt_rank,)
        yield f"{prefix}.ssm_beta.weight", (model.ssm_dt_rank, model.n_embd)
        yield f"{prefix}.ssm_alpha.weight", (model.ssm_dt_rank, model.n_embd)
        yield f"{prefix}.ssm_norm.weight", (model.ssm_state,)
        yield f"{prefix}.ssm_out.weight", (model.n_embd, value)
    for name, shape in feed_forward(model, prefix):
        yield name.replace("ffn_norm", "post_attention_norm"), shape


def qwen35moe_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    for name, shape in qwen35_layer(model, layer):
        if ".ffn_" not in name:
            yield name, shape
    yield from experts(model, f"blk.{layer}")
    yield f"blk.{layer}.ffn_gate_inp_shexp.weight", (model.n_embd,)


def qwen3next_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    for name, shape in qwen35moe_layer(model, layer):
        if name.endswith("ssm_alpha.weight"):
            yield name.replace("ssm_alpha", "ssm_ba"), (2 * shape[0], shape[1])
        elif not name.endswith("ssm_beta.weight"):
            yield name, shape


def feeds_forward(model: TinyModel, layer: int) -> bool:
    """Return whether this layer of Nemotron-H is a feed-forward one, which has no state: the last one is."""
    return layer == model.n_layer - 1


def nemotron_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    prefix, wide = f"blk.{layer}", model.ssm_inner + 2 * model.ssm_group * model.ssm_state
    yield f"{prefix}.attn_norm.weight", (model.n_embd,)
    if feeds_forward(model, layer):
        yield f"{prefix}.ffn_up.weight", (model.n_ff, model.n_embd)
        yield f"{prefix}.ffn_down.weight", (model.n_embd, model.n_ff)
    elif attends(layer):
        yield from attention(model, prefix)
    else:
        yield f"{prefix}.ssm_in.weight", (wide + model.ssm_inner + model.ssm_dt_rank, model.n_embd)
        yield f"{prefix}.ssm_conv1d.weight", (wide, model.ssm_conv)
        yield f"{prefix}.ssm_conv1d.bias", (wide,)
        yield f"{prefix}.ssm_dt.bias", (model.ssm_dt_rank,)
        yield f"{prefix}.ssm_a", (model.ssm_dt_rank, 1)
        yield f"{prefix}.ssm_d", (model.ssm_dt_rank, 1)
        yield f"{prefix}.ssm_norm.weight", (model.ssm_group, model.ssm_inner // model.ssm_group)
        yield f"{prefix}.ssm_out.weight", (model.n_embd, model.ssm_inner)


def lfm2_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    if attends(layer):
        yield from qwen3_attention(model, layer)
    else:
        yield f"blk.{layer}.attn_norm.weight", (model.n_embd,)
        yield f"blk.{layer}.shortconv.conv.weight", (model.n_embd, model.ssm_conv - 1)
        yield f"blk.{layer}.shortconv.in_proj.weight", (3 * model.n_embd, model.n_embd)
        yield f"blk.{layer}.shortconv.out_proj.weight", (model.n_embd, model.n_embd)
    yield from feed_forward(model, f"blk.{layer}")


def lfm2_tensors(model: TinyModel) -> Iterator[Tensor]:
    for name, shape in decoder(lfm2_layer, model):
        yield name.replace("output_norm", "token_embd_norm"), shape


def gpt2_tensors(model: TinyModel) -> Iterator[Tensor]:
    yield "position_embd.weight", (model.n_ctx_train, model.n_embd)
    for name, shape in decoder(gpt2_layer, model):
        yield name, shape
        if "embd" not in name and name != "output.weight":
            yield name.replace(".weight", ".bias"), shape[:1]


def gpt2_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    yield f"blk.{layer}.attn_norm.weight", (model.n_embd,)
    yield f"blk.{layer}.attn_qkv.weight", (3 * model.n_embd, model.n_embd)
    yield f"blk.{layer}.attn_output.weight", (model.n_embd, model.n_embd)
    yield f"blk.{layer}.ffn_norm.weight", (model.n_embd,)
    yield f"blk.{layer}.ffn_up.weight", (model.n_ff, model.n_embd)
    yield f"blk.{layer}.ffn_down.weight", (model.n_embd, model.n_ff)


def rwkv7_tensors(model: TinyModel) -> Iterator[Tensor]:
    for name, shape in decoder(rwkv7_layer, model):
        yield name, shape
        if name.endswith(("norm.weight", "norm_2.weight", "time_mix_ln.weight")):
            yield name.replace(".weight", ".bias"), shape
        if name == "token_embd.weight":
            yield "token_embd_norm.weight", (model.n_embd,)
            yield "token_embd_norm.bias", (model.n_embd,)


def rwkv7_layer(model: TinyModel, layer: int) -> Iterator[Tensor]:
    wide = (model.n_embd,)
    yield f"blk.{layer}.attn_norm.weight", wide
    yield f"blk.{layer}.attn_norm_2.weight", wide
    for name in "wav":
        yield f"blk.{layer}.time_mix_{name}0.weight", wide
    for name in "wavg":
        yield f"blk.{layer}.time_mix_{name}1.weight", (model.lora_rank, model.n_embd)
        yield f"blk.{layer}.time_mix_{name}2.weight", (model.n_embd, model.lora_rank)
    yield f"blk.{layer}.time_mix_lerp_fused.weight", (6, 1, 1, model.n_embd)
    for name in ("k_k", "k_a", "r_k", "ln"):
        yield f"blk.{layer}.time_mix_{name}.weight", wide
    for name in ("key", "value", "receptance", "output"):
        yield f"blk.{layer}.time_mix_{name}.weight", (model.n_embd, model.n_embd)
    yield f"blk.{layer}.channel_mix_lerp_k.weight", wide
    yield f"blk.{layer}.channel_mix_key.weight", (model.n_ff, model.n_embd)
    yield f"blk.{layer}.channel_mix_value.weight", (model.n_embd, model.n_ff)


def decoder(layer_tensors: Callable[[TinyModel, int], Iterator[Tensor]], model: TinyModel) -> Iterator[Tensor]:
    yield "token_embd.weight", (len(TOKENS), model.n_embd)
    for layer in range(model.n_layer + model.n_mtp):
        yield from layer_tensors(model, layer)
        if layer >= model.n_layer:
            yield f"blk.{layer}.nextn.eh_proj.weight", (model.n_embd, 2 * model.n_embd)
            for name in ("enorm", "hnorm", "shared_head_norm"):
                yield f"blk.{layer}.nextn.{name}.weight", (model.n_embd,)
    yield "output_norm.weight", (model.n_embd,)
    if not model.tied:
        yield "output.weight", (len(TOKENS), model.n_embd)


def t5_tensors(model: TinyModel) -> Iterator[Tensor]:
    yield "token_embd.weight", (len(TOKENS), model.n_embd)
    for stack, kinds in ("enc", ("attn",)), ("dec", ("attn", "cross_attn")):
        for prefix in (f"{stack}.blk.{layer}" for layer in range(model.n_layer)):
            for kind in kinds:
                yield f"{prefix}.{kind}_norm.weight", (model.n_embd,)
                yield from ((f"{prefix}.{kind}_{part}.weight", (model.n_embd, model.n_embd)) for part in "qkvo")
            yield f"{prefix}.attn_rel_b.weight", (model.n_buckets, model.n_head)
            yield from feed_forward(model, prefix)
        yield f"{stack}.output_norm.weight", (model.n_embd,)
    yield "output.weight", (len(TOKENS), model.n_embd)


class Architecture(NamedTuple):
    """The hyperparameters and tensors of an architecture."""

    hyperparameters: Callable[[TinyModel], dict[str, Key]]  # without the "<architecture>." before each key
    tensors: Callable[[TinyModel], Iterator[Tensor]]
    scales: Mapping[str, float] = MappingProxyType({})  # factors for the random weights, by name within a layer


SSM_SCALES = {"ssm_a": -0.5, "ssm_dt.bias": -2.0, "ssm_x.weight": 0.3}  # a state halves in about ten tokens
GEMMA_SCALES = {"token_embd.weight": 0.02, "output_norm.weight": 6.0}  # it multiplies embeddings by sqrt(n_embd)
RWKV_SCALES = {
    "time_mix_w0.weight": -3.0,
    **dict.fromkeys(("attn_norm.bias", "attn_norm_2.bias", "time_mix_ln.bias"), 0.1),
}
T5_SCALES = {"attn_q.weight": 0.2, "cross_attn_q.weight": 0.2}  # it does not divide by sqrt(head_size)

ARCHITECTURES = {
    "llama": Architecture(llama_hyperparameters, partial(decoder, llama_layer)),
    "gemma2": Architecture(gemma2_hyperparameters, partial(decoder, gemma2_layer), GEMMA_SCALES),
    "qwen3moe": Architecture(qwen3moe_hyperparameters, partial(decoder, qwen3moe_layer)),
    "glm4moe": Architecture(glm4moe_hyperparameters, partial(decoder, glm4moe_layer)),
    "mimo2": Architecture(mimo2_hyperparameters, partial(decoder, mimo2_layer)),
    "step35": Architecture(mimo2_hyperparameters, partial(decoder, llama_layer)),
    "hy_v3": Architecture(hy_v3_hyperparameters, partial(decoder, hy_v3_layer)),
    "cohere2moe": Architecture(cohere2moe_hyperparameters, partial(decoder, cohere2moe_layer)),
    "deepseek2": Architecture(deepseek2_hyperparameters, partial(decoder, deepseek2_layer)),
    "mamba": Architecture(mamba_hyperparameters, partial(decoder, mamba_layer), SSM_SCALES),
    "jamba": Architecture(jamba_hyperparameters, partial(decoder, jamba_layer), SSM_SCALES),
    "gpt2": Architecture(gpt2_hyperparameters, gpt2_tensors),
    "smollm3": Architecture(llama_hyperparameters, partial(decoder, llama_layer)),
    "lfm2": Architecture(lfm2_hyperparameters, lfm2_tensors),
    "qwen35": Architecture(qwen35_hyperparameters, partial(decoder, qwen35_layer), SSM_SCALES),
    "qwen35moe": Architecture(qwen35moe_hyperparameters, partial(decoder, qwen35moe_layer), SSM_SCALES),
    "qwen3next": Architecture(qwen35moe_hyperparameters, partial(decoder, qwen3next_layer), SSM_SCALES),
    "nemotron_h": Architecture(nemotron_hyperparameters, partial(decoder, nemotron_layer), SSM_SCALES),
    "rwkv7": Architecture(rwkv7_hyperparameters, rwkv7_tensors, RWKV_SCALES),
    "t5": Architecture(t5_hyperparameters, t5_tensors, T5_SCALES),
}


def byte_characters() -> list[str]:
    """Return what byte-level BPE writes for each byte: itself if it is visible, otherwise a character from U+0100."""
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


def write_gguf(
    path: Path,
    architecture: str,
    keys: dict[str, Key],
    tensors: Mapping[str, npt.NDArray[Any]] | None = None,
    tensors_in_a_part: int = 0,
    alignment: int = 0,
) -> Path:
    """Write a GGUF file; integers are written as uint32, other numbers as float32, lists as arrays.

    If there is a limit to the tensors in a part, write `path`-00001-of-0000N.gguf and so on; return the first.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_in_a_part)
    if alignment:
        writer.add_custom_alignment(alignment)
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
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if tensors_in_a_part else path
