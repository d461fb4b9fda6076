"""Choosing tokens: libllama's samplers in numpy, on any float32 array."""

from .candidates import Candidates
from .logprobs import TokenLogprobs, logprob, top_logprobs
from .masks import apply_mask
from .params import DEFAULT_ORDER, SamplingParams
from .sampler import Processor, Sampler

__all__ = [
    "DEFAULT_ORDER",
    "Candidates",
    "Processor",
    "Sampler",
    "SamplingParams",
    "TokenLogprobs",
    "apply_mask",
    "logprob",
    "top_logprobs",
]
