"""The logits of a small F32 llama model against an implementation in numpy, in double precision."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

import minerva_native as mn
from tiny_models import TOKENS, TinyModel

Doubles = npt.NDArray[np.float64]

# The largest deviation from the reference at one position, relative to the largest logit there.
EXACT = 1e-4  # float32 throughout; about 2e-6 was measured
HALF = 2e-2  # keys and values rounded to float16, with 11 bits; up to 4.3e-3 was measured

MODELS = {
    "grouped queries": TinyModel(),
    "tied embeddings": TinyModel(tied=True, seed=2),
    "a head for each query, other rope": TinyModel(n_head_kv=4, rope_base=500_000.0, rms_epsilon=1e-6, seed=3),
    "one head for all queries": TinyModel(n_head_kv=1, n_layer=2, n_ff=96, seed=4),
}
N_TOKENS = 50


class Rope(NamedTuple):
    """How positions are turned: `options` as a context takes them, and what they mean."""

    options: dict[str, Any]
    base: float | None = None  # the model's own
    scale: float = 1.0
    extrapolation: float = 0.0
    factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    n_trained: int = 16

    def frequencies(self, base: float, size: int) -> Doubles:
        """Return the angle of each pair of dimensions for one position: YaRN (arXiv:2309.00071), section 3.2."""
        power = np.arange(0, size, 2) / size
        full: Doubles = base**-power
        if not self.extrapolation:
            return full * self.scale
        # The pair of dimensions that makes so many rotations within the training's context.
        low, high = (
            size * np.log(self.n_trained / (2 * np.pi * rotations)) / (2 * np.log(base))
            for rotations in (self.beta_fast, self.beta_slow)
        )
        low, high = max(0.0, np.floor(low)), min(size - 1.0, np.ceil(high))
        kept = 1 - np.clip((np.arange(size // 2) - low) / max(0.001, high - low), 0, 1)
        mixed: Doubles = full * self.scale * (1 - kept * self.extrapolation) + full * kept * self.extrapolation
        return mixed

    @property
    def multiplier(self) -> float:
        """What queries and keys are multiplied by (section 3.4)."""
        return 1 + 0.1 * np.log(1 / self.scale) if self.extrapolation else self.factor


PLAIN = Rope({})


def reference_logits(model: TinyModel, ids: npt.NDArray[np.int64], rope: Rope = PLAIN) -> Doubles:
    """Compute the llama architecture (Touvron et al. 2023): logits after each token, shape (len(ids), n_vocab)."""
    weight = {name: tensor.astype(np.float64) for name, tensor in model.weights.items()}
    x = weight["token_embd.weight"][ids]
    for layer in range(model.n_layer):
        own = {name.split(".")[2]: w for name, w in weight.items() if name.startswith(f"blk.{layer}.")}
        x = x + attention(model, own, rms_norm(x, own["attn_norm"], model.rms_epsilon), rope)
        x = x + feed_forward(own, rms_norm(x, own["ffn_norm"], model.rms_epsilon))
    output = weight["token_embd.weight"] if model.tied else weight["output.weight"]
    logits: Doubles = rms_norm(x, weight["output_norm.weight"], model.rms_epsilon) @ output.T
    return logits


def rms_norm(x: Doubles, gain: Doubles, epsilon: float) -> Doubles:
    """Compute RMSNorm (Zhang and Sennrich 2019)."""
    normed: Doubles = gain * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon)
    return normed


def attention(model: TinyModel, weight: dict[str, Doubles], x: Doubles, rope: Rope) -> Doubles:
    """Compute causal attention with key and value heads shared by groups of query heads (Ainslie et al. 2023)."""
    n = len(x)
    base = rope.base or model.rope_base
    queries = rotate((x @ weight["attn_q"].T).reshape(n, model.n_head, -1), base, rope)
    keys = rotate((x @ weight["attn_k"].T).reshape(n, model.n_head_kv, -1), base, rope)
    values = (x @ weight["attn_v"].T).reshape(n, model.n_head_kv, -1)
    heads = []
    for head in range(model.n_head):
        shared = head * model.n_head_kv // model.n_head
        scores = queries[:, head] @ keys[:, shared].T / np.sqrt(model.head_size)
        scores[np.triu_indices(n, 1)] = -np.inf
        heads.append(softmax(scores) @ values[:, shared])
    mixed: Doubles = np.concatenate(heads, axis=1) @ weight["attn_output"].T
    return mixed


def rotate(x: Doubles, base: float, rope: Rope) -> Doubles:
    """Apply RoPE (Su et al. 2021) in its original form, used by llama in GGUF: neighbours are a pair."""
    n, _, size = x.shape
    angle = np.arange(n)[:, None, None] * rope.frequencies(base, size)
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = np.empty_like(x)
    rotated[..., 0::2] = even * np.cos(angle) - odd * np.sin(angle)
    rotated[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
    return rope.multiplier * rotated


def feed_forward(weight: dict[str, Doubles], x: Doubles) -> Doubles:
    """Compute SwiGLU (Shazeer 2020)."""
    gate = x @ weight["ffn_gate"].T
    out: Doubles = (gate / (1 + np.exp(-gate)) * (x @ weight["ffn_up"].T)) @ weight["ffn_down"].T
    return out


def softmax(x: Doubles) -> Doubles:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    normed: Doubles = weights / weights.sum(axis=-1, keepdims=True)
    return normed


class Case:
    """A model, a text, and the reference logits."""

    def __init__(self, spec: TinyModel, model: mn.Model):
        self.model = model
        self.ids = np.random.default_rng(7).integers(0, len(TOKENS), N_TOKENS)
        self.expected = reference_logits(spec, self.ids)

    def context(self, n_batch: int = 512, n_ubatch: int = 512, kv_type: str = "f32", **options: Any) -> mn.Context:
        flash = kv_type != "f32"
        return self.model.context(
            n_ctx=64,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_threads=1,
            kv_type=kv_type,
            flash_attention=flash,
            prefix_cache=False,  # so that every prefix is evaluated
            **options,
        )

    def error(self, logits: list[npt.NDArray[np.float32]]) -> float:
        """Return the largest relative error at any position."""
        assert len(logits) == N_TOKENS
        errors = np.abs(np.stack(logits) - self.expected).max(axis=1) / np.abs(self.expected).max(axis=1)
        return float(errors.max())


@pytest.fixture(scope="module", params=MODELS.values(), ids=list(MODELS))
def case(request: pytest.FixtureRequest, load_tiny: Callable[[TinyModel], mn.Model]) -> Case:
    return Case(request.param, load_tiny(request.param))


def logits_after_each_prefix(case: Case, context: mn.Context) -> list[npt.NDArray[np.float32]]:
    """Evaluate every prefix of the text as a separate prompt, and return the logits after each."""
    logits = []
    for length in range(1, N_TOKENS + 1):
        with context.sequence() as sequence:
            sequence.extend(case.ids[:length])
            logits.append(sequence.logits)
    return logits


def test_a_prompt_in_one_batch_gives_the_reference_logits(case: Case) -> None:
    with case.context() as context:
        assert case.error(logits_after_each_prefix(case, context)) < EXACT
        assert context.stats.decode_calls == N_TOKENS


@pytest.mark.parametrize("n_batch", [2, 7, 49])
def test_a_prompt_in_several_chunks_gives_the_reference_logits(case: Case, n_batch: int) -> None:
    with case.context(n_batch=n_batch) as context:
        assert case.error(logits_after_each_prefix(case, context)) < EXACT
        assert context.stats.decode_calls > N_TOKENS


def test_a_batch_in_several_passes_gives_the_reference_logits(case: Case) -> None:
    with case.context(n_ubatch=8) as context:
        assert case.error(logits_after_each_prefix(case, context)) < EXACT


def test_token_by_token_gives_the_reference_logits(case: Case) -> None:
    with case.context() as context, context.sequence() as sequence:
        logits = []
        for token in case.ids.tolist():
            sequence.extend([token])
            logits.append(sequence.logits)
        assert case.error(logits) < EXACT


def test_appended_tokens_evaluated_when_logits_are_read_give_the_reference_logits(case: Case) -> None:
    with case.context() as context, context.sequence() as sequence:
        logits = []
        for token in case.ids.tolist():
            sequence.append(token)
            logits.append(sequence.logits)
        assert case.error(logits) < EXACT


@pytest.mark.parametrize("n_batch", [512, 7])
def test_scores_are_the_log_softmax_of_the_reference_logits(case: Case, n_batch: int) -> None:
    logprobs = np.log(softmax(case.expected[:-1]))
    expected = np.take_along_axis(logprobs, case.ids[1:, None], axis=1)[:, 0]
    with case.context(n_batch=n_batch) as context, context.sequence() as sequence:
        scores = sequence.score(case.ids)
        assert np.abs(scores[1:] - expected).max() < EXACT * np.abs(case.expected).max()


def test_a_half_precision_cache_with_flash_attention_stays_within_its_precision(case: Case) -> None:
    with case.context(kv_type="f16") as context:
        assert case.error(logits_after_each_prefix(case, context)) < HALF


ROPES = {
    "another base": Rope({"rope_freq_base": 700.0}, base=700.0),
    "linear": Rope({"rope_freq_scale": 0.25}, scale=0.25),
    "linear by name": Rope({"rope_scaling_type": "linear", "rope_freq_scale": 0.5}, scale=0.5),
    "none": Rope({"rope_scaling_type": "none", "rope_freq_scale": 0.25}),
    "yarn": Rope(
        {"rope_scaling_type": "yarn", "rope_freq_scale": 0.25, "yarn_orig_ctx": 16}, scale=0.25, extrapolation=1.0
    ),
    "yarn with all its numbers": Rope(
        {
            "rope_scaling_type": "yarn",
            "rope_freq_base": 2000.0,
            "rope_freq_scale": 0.125,
            "yarn_ext_factor": 0.75,
            "yarn_beta_fast": 8.0,
            "yarn_beta_slow": 0.5,
            "yarn_orig_ctx": 40,
        },
        base=2000.0,
        scale=0.125,
        extrapolation=0.75,
        beta_fast=8.0,
        beta_slow=0.5,
        n_trained=40,
    ),
    "a factor alone": Rope({"yarn_ext_factor": 0.0, "yarn_attn_factor": 1.5}, factor=1.5),
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=list(ROPES))
def test_every_scaling_of_positions_gives_the_reference_logits(
    load_tiny: Callable[[TinyModel], mn.Model], rope: Rope
) -> None:
    spec = MODELS["grouped queries"]
    case = Case(spec, load_tiny(spec))
    plain, case.expected = case.expected, reference_logits(spec, case.ids, rope)
    with case.context(**rope.options) as context, context.sequence() as sequence:
        rows = []
        for token in case.ids.tolist():
            sequence.extend([token])
            rows.append(sequence.logits)
        assert case.error(rows) < EXACT
        assert context.memory.can_shift == (rope.multiplier == 1.0)
    is_other = np.abs(plain - case.expected).max() > 100 * EXACT * np.abs(plain).max()
    assert is_other == (rope.scale != 1 or rope.base is not None or rope.factor != 1)


@pytest.mark.parametrize("rope", [rope for rope in ROPES.values() if rope.multiplier == 1], ids=str)
def test_a_shift_under_a_scaling_is_that_of_the_reference(
    load_tiny: Callable[[TinyModel], mn.Model], rope: Rope
) -> None:
    """In the first layer keys depend on nothing but token and position: there a shift is exact."""
    spec = TinyModel(n_layer=1)
    case = Case(spec, load_tiny(spec))
    kept = np.concatenate([case.ids[:4], case.ids[14:]])
    expected = reference_logits(spec, kept, rope)[-1]
    with case.context(**rope.options) as context, context.sequence() as sequence:
        sequence.extend(case.ids[:-1])
        sequence.shift(4, 10)
        sequence.extend(case.ids[-1:])
        assert np.abs(sequence.logits - expected).max() < EXACT * np.abs(expected).max()
