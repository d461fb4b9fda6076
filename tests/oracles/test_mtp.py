"""What MTP heads draft, against an implementation in numpy, in double precision."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

import minerva_native as mn
from minerva_native.speculative import OwnHead
from tiny_models import TinyModel, attends

from .test_forward_pass import Doubles, feed_forward, rms_norm, softmax

N_TOKENS, N_DRAFTED = 40, 3


class Reference(NamedTuple):
    """A model of the architecture mimo2, with dense layers alone."""

    spec: TinyModel
    weight: dict[str, Doubles]

    def of_layer(self, layer: int) -> dict[str, Doubles]:
        start = f"blk.{layer}."
        return {
            name[len(start) :].removesuffix(".weight"): w for name, w in self.weight.items() if name.startswith(start)
        }

    def norm(self, x: Doubles, gain: Doubles) -> Doubles:
        return rms_norm(x, gain, self.spec.rms_epsilon)

    def block(self, x: Doubles, layer: int) -> Doubles:
        own = self.of_layer(layer)
        x = x + self.attention(own, self.norm(x, own["attn_norm"]), 0 if attends(layer) else self.spec.sliding_window)
        return x + feed_forward(own, self.norm(x, own["ffn_norm"]))

    def attention(self, own: dict[str, Doubles], x: Doubles, window: int) -> Doubles:
        """Compute causal attention, to the last `window` tokens alone unless that is 0."""
        spec, n = self.spec, len(x)
        n_wide, n_narrow = spec.n_head * spec.head_size, spec.n_head_kv * spec.head_size
        q, k, v = np.split(x @ own["attn_qkv"].T, [n_wide, n_wide + n_narrow], axis=1)
        queries = self.rotate(q.reshape(n, spec.n_head, -1))
        keys, values = self.rotate(k.reshape(n, spec.n_head_kv, -1)), v.reshape(n, spec.n_head_kv, -1)
        distance = np.arange(n)[:, None] - np.arange(n)
        is_hidden = (distance < 0) | ((distance >= window) if window else False)
        heads = []
        for head in range(spec.n_head):
            shared = head * spec.n_head_kv // spec.n_head
            scores = queries[:, head] @ keys[:, shared].T / np.sqrt(spec.head_size)
            scores[is_hidden] = -np.inf
            heads.append(softmax(scores) @ values[:, shared])
        mixed: Doubles = np.concatenate(heads, axis=1) @ own["attn_output"].T
        return mixed

    def rotate(self, x: Doubles) -> Doubles:
        """Apply RoPE to pairs of dimensions that are half a head apart."""
        n, _, size = x.shape
        angle = np.arange(n)[:, None, None] * self.spec.rope_base ** -(np.arange(0, size, 2) / size)
        first, second = x[..., : size // 2], x[..., size // 2 :]
        turned = first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)
        return np.concatenate(turned, axis=-1)

    def hidden(self, ids: npt.NDArray[np.int64]) -> Doubles:
        """Return the hidden states after each token, before the last norm."""
        x = self.weight["token_embd.weight"][ids]
        for layer in range(self.spec.n_layer):
            x = self.block(x, layer)
        return x

    def head(self, ids: npt.NDArray[np.int64], before: Doubles, number: int) -> tuple[int, Doubles]:
        """Return what a head guesses after tokens and the hidden states before each, and its hidden state."""
        layer = self.spec.n_layer + number
        own = self.of_layer(layer)
        tokens = self.norm(self.weight["token_embd.weight"][ids], own["nextn.enorm"])
        both = np.concatenate([tokens, self.norm(before, own["nextn.hnorm"])], axis=1)
        state = self.block(both @ own["nextn.eh_proj"].T, layer)[-1]
        logits = self.norm(state, own["nextn.shared_head_norm"]) @ self.weight["output.weight"].T
        return int(logits.argmax()), state

    def drafts(self, ids: npt.NDArray[np.int64], n: int) -> list[int]:
        """Return what the heads guess after tokens, of which the model has not seen the last one."""
        before = np.concatenate([np.zeros((1, self.spec.n_embd)), self.hidden(ids[:-1])])
        found = list[int]()
        for step in range(n):
            token, state = self.head(ids, before, min(step, self.spec.n_mtp - 1))
            ids, before = np.append(ids, token), np.concatenate([before, state[None]])
            found.append(token)
        return found


@pytest.mark.parametrize("n_heads", [1, 3])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_drafts_are_those_of_the_reference(
    load_tiny: Callable[[TinyModel], mn.Model], n_heads: int, in_pieces: bool
) -> None:
    spec = TinyModel("mimo2", n_mtp=n_heads, seed=5)
    reference = Reference(spec, {name: weight.astype(np.float64) for name, weight in spec.weights.items()})
    ids = np.random.default_rng(7).integers(0, 256, N_TOKENS)
    with load_tiny(spec).context(
        mtp=True, n_ctx=64, n_ubatch=16, n_threads=1, kv_type="f32", flash_attention="off"
    ) as context:
        for n in range(2, N_TOKENS, 4):
            context.clear_cache()
            with context.sequence() as sequence:
                for piece in np.array_split(ids[: n - 1], min(n - 1, 5) if in_pieces else 1):
                    sequence.extend(piece)
                sequence.append(int(ids[n - 1]))
                drafted = OwnHead(sequence).draft(sequence.tokens, N_DRAFTED)
                assert drafted == reference.drafts(ids[:n], N_DRAFTED)
