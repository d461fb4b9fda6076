"""Samplers that adapt to the tokens they drew: Mirostat 1 and 2, adaptive-p.

Each is a function from candidates to candidates, plus a small state that every draw updates.
"""

from __future__ import annotations

import math

import numpy as np

from .candidates import COLUMNS_FROM, Candidates, Scratch, largest_logit, probabilities, shares32, weigh, weights32
from .filters import top_k

MIROSTAT_ESTIMATE_FROM = 100
"""How many of the most likely tokens Mirostat 1 estimates Zipf's exponent from, as in llama.cpp."""

_ADAPTIVE_INVERSE_WIDTH = np.float32(1.0) / np.float32(0.3)
_ADAPTIVE_PEAK = np.float32(5.0)
_ADAPTIVE_SHARPNESS = np.float32(10.0)


def mirostat(candidates: Candidates, mu: float, n_vocab: int, scratch: Scratch | None = None) -> Candidates:
    """Keep the k most likely tokens, where k gives a surprise of mu bits under Zipf's law (Basu et al. 2021).

    Follows `llama_sampler_init_mirostat`.
    """
    head = top_k(candidates, MIROSTAT_ESTIMATE_FROM, scratch)
    weights = weights32(head)
    with np.errstate(all="ignore"):
        rank = np.arange(1, weights.size, dtype=np.float32)
        t = np.log((rank + 1) / rank)
        b = np.log(weights[:-1] / weights[1:])
        exponent = np.float32(np.add.reduce(t * b)) / np.float32(np.add.reduce(t * t))
        excess = exponent - np.float32(1)
        k = ((excess * np.float32(2) ** np.float32(mu)) / (1 - np.float32(n_vocab) ** -excess)) ** (1 / exponent)
    if math.isnan(k):  # one candidate, or logits that no power law fits
        return head.head(1)
    return top_k(candidates, max(1, int(min(float(k), candidates.logits.size))), scratch)


def mirostat_v2(candidates: Candidates, mu: float, scratch: Scratch | None = None) -> Candidates:
    """Keep tokens with a surprise of at most mu bits, or the most likely one (`llama_sampler_init_mirostat_v2`)."""
    least = 2.0**-mu
    if candidates.logits.size < COLUMNS_FROM:
        index = np.flatnonzero(probabilities(candidates) >= least)
    else:
        weights = weigh(candidates.logits, largest_logit(candidates), scratch or Scratch())
        index = np.flatnonzero(weights.values >= np.float32(min(least * weights.total, 3e38)))
    if not index.size:
        return top_k(candidates, 1, scratch)
    return candidates.take(index, candidates.descending)


def mirostat_mu(mu: float, probability: float, tau: float, eta: float) -> float:
    """Return Mirostat's mu after drawing a token that had this probability among the survivors; a float32."""
    error = np.float32(-math.log2(probability)) - np.float32(tau)
    return float(np.float32(mu) - np.float32(eta) * error)


def adaptive_p(candidates: Candidates, target: float, weighted_sum: float, total_weight: float) -> Candidates:
    """Replace the logits by ones that favour tokens near a target probability (`llama_sampler_init_adaptive_p`).

    The target is corrected by the moving average weighted_sum / total_weight of the tokens drawn so far.
    """
    target = min(max(target, 0.0), 1.0)
    if total_weight != 0.0:
        target = min(max(2.0 * target - weighted_sum / total_weight, 0.0), 1.0)
    distance = np.abs((shares32(candidates) - np.float32(target)) * _ADAPTIVE_INVERSE_WIDTH)
    logits = _ADAPTIVE_PEAK - _ADAPTIVE_SHARPNESS * distance * distance / (np.float32(1.0) + distance)
    logits[candidates.logits == -np.inf] = -np.inf
    return Candidates(logits, candidates.ids)
