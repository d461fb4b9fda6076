"""The logits of a small F32 llama model against an implementation in numpy, in double precision."""

from collections.abc import Callable

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


def reference_logits(model: TinyModel, ids: npt.NDArray[np.int64]) -> Doubles:
    """Compute the llama architecture (Touvron et al. 2023): logits after each token, shape (len(ids), n_vocab)."""
    weight = {name: tensor.astype(np.float64) for name, tensor in model.weights.items()}
    x = weight["token_embd.weight"][ids]
    for layer in range(model.n_layer):
        own = {name.split(".")[2]: w for name, w in weight.items() if name.startswith(f"blk.{layer}.")}
        x = x + attention(model, own, rms_norm(x, own["attn_norm"], model.rms_epsilon))
        x = x + feed_forward(own, rms_norm(x, own["ffn_norm"], model.rms_epsilon))
    output = weight["token_embd.weight"] if model.tied else weight["output.weight"]
    logits: Doubles = rms_norm(x, weight["output_norm.weight"], model.rms_epsilon) @ output.T
    return logits


def rms_norm(x: Doubles, gain: Doubles, epsilon: float) -> Doubles:
    """Compute RMSNorm (Zhang and Sennrich 2019)."""
    normed: Doubles = gain * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon)
    return normed


def attention(model: TinyModel, weight: dict[str, Doubles], x: Doubles) -> Doubles:
    """Compute causal attention with key and value heads shared by groups of query heads (Ainslie et al. 2023)."""
    n = len(x)
    queries = rotate((x @ weight["attn_q"].T).reshape(n, model.n_head, -1), model.rope_base)
    keys = rotate((x @ weight["attn_k"].T).reshape(n, model.n_head_kv, -1), model.rope_base)
    values = (x @ weight["attn_v"].T).reshape(n, model.n_head_kv, -1)
    heads = []
    for head in range(model.n_head):
        shared = head * model.n_head_kv // model.n_head
        scores = queries[:, head] @ keys[:, shared].T / np.sqrt(model.head_size)
        scores[np.triu_indices(n, 1)] = -np.inf
        heads.append(softmax(scores) @ values[:, shared])
    mixed: Doubles = np.concatenate(heads, axis=1) @ weight["attn_output"].T
    return mixed


def rotate(x: Doubles, base: float) -> Doubles:
    """Apply RoPE (Su et al. 2021) in its original form, used by llama in GGUF: neighbours are a pair."""
    n, _, size = x.shape
    angle = np.arange(n)[:, None, None] * base ** (-np.arange(0, size, 2) / size)
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = np.empty_like(x)
    rotated[..., 0::2] = even * np.cos(angle) - odd * np.sin(angle)
    rotated[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
    return rotated


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

    def context(self, n_batch: int = 512, n_ubatch: int = 512, kv_type: str = "f32") -> mn.Context:
        flash = kv_type != "f32"
        return self.model.context(
            n_ctx=64,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_threads=1,
            kv_type=kv_type,
            flash_attention=flash,
            prefix_cache=False,  # so that every prefix is evaluated
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
