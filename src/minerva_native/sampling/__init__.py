"""Choosing tokens: libllama's samplers in numpy, on any float32 array.

The same parameters leave the same tokens with the same probabilities as in libllama. What differs, on purpose:

- Ties at a cut are broken by token id, where libllama's sorts are unstable.
- Sums over more than 1,024 candidates are more precise than libllama's float32 running sums, which drift; near a cut
  of top-p, typical-p or Mirostat that decides about tokens of almost the same probability.
- Typical-p takes a logit of -inf as probability 0. libllama computes NaN scores, whose order is undefined.
- Logits above 3e8 are sorted like others. libllama's bucket sort, for heads of more than 128, misplaces them.
- Mirostat 1 keeps all tokens of a flat distribution. libllama converts an infinite k to an integer.
- A low temperature cannot overflow. libllama's quotient becomes infinite, and its probabilities NaN.
- NaN, +inf, or nothing but -inf among the logits is an error, where libllama returns some token.
- A negative temperature or window is refused, where libllama takes it as 0.
- Adaptive-p is on whenever it has a target; llama-server also wants it named among the samplers.
- The random numbers are other ones: one stream for a sampler, of which XTC takes a number for every token.
"""

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
