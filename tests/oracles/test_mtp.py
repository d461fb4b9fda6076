"""What MTP heads draft, against an implementation in numpy, in double precision, and against upstream's llama-server.

`MINERVA_TOOLS` names the folder of llama-server (see CONTRIBUTING.md).
"""

import json
import math
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

import minerva_native as mn
from echo_models import Echo
from minerva_native.speculative import OwnHead
from tiny_models import END, END_OF_TURN, TinyModel, attends
from upstream import llama_server

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


LLAMA_SERVER = Path(os.environ.get("MINERVA_TOOLS", "")) / "llama-server"
N_WRITTEN = 200
ENDS = [END, END_OF_TURN]
PROMPT = list(range(60, 90))

WITH_HEADS = {
    "cohere2moe": Echo("cohere2moe", n_mtp=1, share=0.05),
    "deepseek2": Echo("deepseek2", n_mtp=1, share=0.05),
    "glm4moe": Echo("glm4moe", n_mtp=1, share=0.05),
    "hy_v3": Echo("hy_v3", n_mtp=2, share=0.05),
    "mimo2": Echo("mimo2", n_mtp=3, share=0.05),
    "qwen35": Echo("qwen35", n_mtp=1, share=0.05),
    "qwen35moe": Echo("qwen35moe", n_mtp=1, share=0.05),
    "qwen3next": Echo("qwen3next", n_mtp=1, share=0.05),
    "step35": Echo("step35", n_mtp=3, share=0.05),
    "random": TinyModel("glm4moe", n_mtp=1),
}


class Written(NamedTuple):
    """A greedy text, how many of its tokens were drafted, and how many of these were right."""

    tokens: list[int]
    drafted: int
    accepted: int


def by_upstream(path: Path) -> Written:
    options = ["-c", "512", "-np", "1", "-ngl", "0", "-fa", "off", "--no-warmup", "--spec-type", "draft-mtp"]
    options += ["--spec-draft-n-max", str(N_DRAFTED)]
    for name in ("-ctk", "-ctv", "-ctkd", "-ctvd"):
        options += [name, "f32"]
    body = {"prompt": PROMPT, "n_predict": N_WRITTEN, "samplers": ["top_k"], "top_k": 1, "return_tokens": True}
    body["logit_bias"] = [[token, False] for token in ENDS]
    with llama_server(str(LLAMA_SERVER), str(path), 1, *options) as address:
        request = urllib.request.Request(
            f"http://{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            answer = json.load(reply)
    timings = answer["timings"]
    return Written(answer["tokens"], timings["draft_n"], timings["draft_n_accepted"])


def by_hand(model: mn.Model) -> Written:
    """Draft as many tokens each time, and take those that are right."""

    def best(row: npt.NDArray[np.float32]) -> int:
        return int(np.where(np.isin(np.arange(len(row)), ENDS), -math.inf, row).argmax())

    options: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "kv_type": "f32", "flash_attention": "off", "n_rs_seq": 4}
    drafted = accepted = 0
    with model.context(mtp=True, **options) as context, context.sequence() as sequence:
        sequence.extend(PROMPT)
        found = [best(sequence.logits)]
        sequence.append(found[-1])
        while len(found) < N_WRITTEN:
            start, n = len(sequence), min(N_DRAFTED, N_WRITTEN - len(found) - 1)
            drafts = OwnHead(sequence).draft(sequence.tokens, n) if n else []
            drafted += len(drafts)
            n_right = 0
            for row in sequence.logits_after(drafts):
                found.append(best(row))
                if drafts[n_right : n_right + 1] != found[-1:]:
                    break
                n_right += 1
            accepted += n_right
            sequence.truncate(start + n_right)
            sequence.append(found[-1])
    return Written(found, drafted, accepted)


@pytest.mark.skipif("MINERVA_TOOLS" not in os.environ or not LLAMA_SERVER.exists(), reason="there is no llama-server")
@pytest.mark.parametrize("name", WITH_HEADS)
def test_llama_server_writes_drafts_and_accepts_the_same(tmp_path: Path, name: str) -> None:
    path = WITH_HEADS[name].write(tmp_path / "headed.gguf")
    with mn.Model.load(path, load_mtp=True, gpu_layers=0) as model:
        assert by_hand(model) == by_upstream(path)
