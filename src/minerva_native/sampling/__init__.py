"""Token sampling: libllama's samplers in numpy, on any float32 array of logits.

The same parameters keep the same tokens with the same probabilities as in libllama, with these deliberate differences:

- Ties at a cut are broken by token id. libllama's sorts are unstable.
- Sums over more than 1,024 candidates are more precise than libllama's float32 running sums, which drift. Near a cut
  of top-p, typical-p or Mirostat this can change which of several almost equally likely tokens are kept.
- Typical-p treats a logit of -inf as probability 0. libllama computes NaN scores, whose order is undefined.
- Logits above 3e8 are sorted correctly. libllama uses a bucket sort for k above 128, which misplaces them.
- Mirostat 1 keeps all tokens of a flat distribution. libllama converts an infinite k to an integer.
- A low temperature cannot overflow. In libllama the quotient becomes infinite and the probabilities NaN.
- Logits that contain NaN or +inf, or are all -inf, raise an error. libllama returns an arbitrary token.
- A negative temperature or penalty window is rejected. libllama treats it as 0.
- Adaptive-p is on whenever it has a target. llama-server also requires its name in the list of samplers.
- The random numbers differ: each sampler has a single stream, and XTC consumes one number per token.
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
