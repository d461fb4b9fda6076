"""Log-probabilities of tokens under the model's distribution, before any sampling step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._arguments import integer
from .arguments import checked_logits
from .candidates import Candidates, Doubles, Floats, Ids, Scratch, log_sum_exp
from .filters import top_k


class TokenLogprobs(NamedTuple):
    """The natural log-probabilities of a token and of the most likely alternatives.

    Attributes:
        token: the requested token.
        logprob: its log-probability; `-inf` if it cannot be drawn.
        ids: intp (n,), the most likely tokens, in descending order, with ties in order of id.
        logprobs: float64 (n,), the log-probabilities of `ids`.
    """

    token: int
    logprob: float
    ids: NDArray[np.intp]
    logprobs: Doubles


def logprob(logits: Floats, token: int, scratch: Scratch | None = None) -> float:
    """Return log(softmax(logits)[token]), the natural logarithm, accurate to about 1e-7.

    Raises:
        TypeError, ValueError: the logits are no float32 array of one dimension, or the token is none of the vocabulary.
        SamplingError: the logits contain NaN or +inf, or are all -inf.
    """
    logits, token = checked_logits(logits), integer("token", token)
    if not 0 <= token < logits.size:
        raise ValueError(f"token {token} is outside a vocabulary of {logits.size}")
    return float(logits[token]) - log_sum_exp(logits, scratch)


def top_logprobs(logits: Floats, n: int, scratch: Scratch | None = None) -> tuple[Ids, Doubles]:
    """Return the n most likely tokens and their log-probabilities, in descending order, with ties in order of id."""
    logits, n = checked_logits(logits), integer("n", n)
    if n <= 0:
        return np.empty(0, np.intp), np.empty(0, np.float64)
    head = top_k(Candidates(logits), n, scratch)
    return head.token_ids(), head.logits.astype(np.float64) - log_sum_exp(logits, scratch)
