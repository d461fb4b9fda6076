"""Tiny models whose MTP heads are right."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tiny_models import ARCHITECTURES, Array, TinyModel, draw


@dataclass(frozen=True)
class Echo(TinyModel):
    """A model whose heads see all that the model does, as far as its layers add nothing to the token's embedding.

    Without `share` a token depends on the one before alone, and the heads pass that one's embedding on.
    """

    share: float = 0.0  # of what random layers of the model would add

    @cached_property
    def weights(self) -> dict[str, Array]:
        rng, row = np.random.default_rng(self.seed), ARCHITECTURES[self.architecture]
        weights = {name: draw(rng, name, shape, row.scales) for name, shape in row.tensors(self)}
        heads = range(self.n_layer, self.n_layer + self.n_mtp)
        for name, weight in weights.items():
            is_of_head = any(name.startswith(f"blk.{head}.") for head in heads)
            if "attn_output" in name or "ffn_down" in name or "ssm_out" in name:
                weight *= 0.0 if is_of_head else self.share
            elif "eh_proj" in name:
                weight[:] = np.eye(self.n_embd, 2 * self.n_embd)
            elif "enorm" in name or "output_norm" in name or "shared_head_norm" in name:
                weight[:] = 1.0
        return weights
