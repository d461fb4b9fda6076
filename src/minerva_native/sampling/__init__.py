"""Choosing tokens: libllama's samplers in numpy, on any float32 array.

The same parameters keep the same tokens with the same probabilities as in libllama. The intended differences:

- Ties at a cut are broken by token id. libllama's sorts are unstable.
- Sums over more than 1,024 candidates are more precise than libllama's float32 running sums, which drift. Near a cut of
  top-p, typical-p or Mirostat this can change which of several almost equally likely tokens are kept.
- Typical-p treats a logit of -inf as probability 0. libllama computes NaN scores, whose order is undefined.
- Logits above 3e8 are sorted like any others. To keep more than 128 tokens libllama uses a bucket sort, which misplaces
  such logits.
- Mirostat 1 keeps every token of a flat distribution. libllama converts an infinite k to an integer.
- A low temperature cannot overflow. libllama's quotient becomes infinite and its probabilities NaN.
- Logits that contain NaN or +inf, or that are all -inf, are an error. libllama returns some token.
- A negative temperature or window is an error. libllama treats it as 0.
- Adaptive-p is on whenever it has a target. llama-server also requires it to be named among the samplers.
- The random numbers differ: a sampler has one stream, and XTC draws from it for every token.
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
