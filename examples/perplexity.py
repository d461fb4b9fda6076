"""The perplexity of a text: python examples/perplexity.py [model.gguf] [text.txt]"""

import sys
from pathlib import Path

import numpy as np

import minerva_native as mn

path = sys.argv[1] if len(sys.argv) > 1 else mn.DEMO_PATH
text = (
    Path(sys.argv[2]).read_text()
    if len(sys.argv) > 2
    else "Once upon a time, there was a little cat. The cat was happy."
)
with mn.Model.load(path) as model, model.context(n_ctx=0) as ctx:
    ids = model.tokenizer.encode(text)
    scores = []
    for start in range(0, len(ids), ctx.n_ctx):  # each window begins with nothing before it
        with ctx.sequence() as seq:
            scores.append(seq.score(ids[start : start + ctx.n_ctx]))
    print(f"{len(ids)} tokens, perplexity {np.exp(-np.nanmean(np.concatenate(scores))):.4f}")
