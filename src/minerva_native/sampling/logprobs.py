"""Log-probabilities of tokens under a model's own distribution."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .candidates import Candidates, Doubles, Floats, Ids, Scratch, log_sum_exp
from .filters import top_k


class TokenLogprobs(NamedTuple):
    """A token's log-probability, and the most likely alternatives.

    Attributes:
        token: the token.
        logprob: its natural log-probability; `-inf` for a token that cannot be drawn.
        ids: intp (n,), the most likely tokens, in descending order, ties by id.
        logprobs: float64 (n,), their log-probabilities.
    """

    token: int
    logprob: float
    ids: NDArray[np.intp]
    logprobs: Doubles


def logprob(logits: Floats, token: int, scratch: Scratch | None = None) -> float:
    """Return log(softmax(logits)[token]), the natural logarithm, to about 1e-7.

    Raises:
        ValueError: the token is outside the vocabulary.
        SamplingError: the logits contain NaN or +inf, or are all -inf.
    """
    if not 0 <= token < logits.size:
        raise ValueError(f"token {token} is outside a vocabulary of {logits.size}")
    return float(logits[token]) - log_sum_exp(logits, scratch)


def top_logprobs(logits: Floats, n: int, scratch: Scratch | None = None) -> tuple[Ids, Doubles]:
    """Return the n most likely tokens and their log-probabilities, in descending order, ties by id."""
    if n <= 0:
        return np.empty(0, np.intp), np.empty(0, np.float64)
    head = top_k(Candidates(logits), n, scratch)
    return head.token_ids(), head.logits.astype(np.float64) - log_sum_exp(logits, scratch)
