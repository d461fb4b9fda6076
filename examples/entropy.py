"""How sure the model is of each next token, as a plot: python examples/entropy.py [model.gguf] [plot.png]"""

import sys

import numpy as np
from matplotlib.figure import Figure

import minerva_native as mn

with mn.Model.load(sys.argv[1] if len(sys.argv) > 1 else mn.DEMO_PATH) as model, model.context() as ctx:
    seq, pieces, entropies = ctx.sequence(), list[str](), list[float]()
    seq.extend(model.tokenizer.encode("Once upon a time,"))
    for _ in range(40):
        probs = np.exp(seq.logits - seq.logits.max(), dtype=np.float64)
        probs /= probs.sum()
        entropies.append(float(-(probs[probs > 0] * np.log2(probs[probs > 0])).sum()))
        seq.append(int(probs.argmax()))
        pieces.append(model.tokenizer.decode(seq[-1:], special=True))
figure = Figure(figsize=(12, 4), layout="constrained")
axes = figure.subplots()
axes.bar(range(len(pieces)), entropies)
axes.set_xticks(range(len(pieces)), [repr(piece) for piece in pieces], rotation=90)
axes.set(ylabel="entropy (bits)", title="of the distribution that each token was chosen from")
figure.savefig(sys.argv[2] if len(sys.argv) > 2 else "entropy.png")
