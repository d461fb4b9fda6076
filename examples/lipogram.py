"""A sampler of your own: a story without the letter "o": python examples/lipogram.py [model.gguf]"""

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

import minerva_native as mn

with mn.Model.load(sys.argv[1] if len(sys.argv) > 1 else mn.DEMO_PATH) as model, model.context() as ctx:
    pieces = map(model.tokenizer.piece, range(model.tokenizer.n_vocab))
    allowed = np.array([b"o" not in piece.lower() for piece in pieces])
    sampler = mn.Sampler(mn.SamplingParams.from_model(model, seed=1))

    def choose(logits: npt.NDArray[np.float32], tokens: Sequence[int]) -> int:
        return sampler(logits, tokens, mask=allowed)

    seq = ctx.sequence()
    seq.extend(model.tokenizer.encode("A little girl"))
    print("A little girl" + "".join(step.text for step in mn.generate(seq, choose, max_tokens=40)))
