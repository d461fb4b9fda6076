"""Contrastive decoding (arXiv:2210.15097): what an expert knows and an amateur, who sees 4 tokens, does not."""

import sys

import numpy as np

import minerva_native as mn

ALPHA = 0.1  # a token has to be at least this likely, compared with the expert's first choice

with mn.Model.load(sys.argv[1] if len(sys.argv) > 1 else mn.DEMO_PATH) as model, model.context(n_seq=2) as ctx:
    expert, amateur = ctx.sequence(), ctx.sequence()
    expert.extend(prompt := model.tokenizer.encode("Once upon a time, there was a little"))
    for _ in range(24):
        amateur.assign(expert[-4:])
        logits = expert.logits
        plausible = logits >= logits.max() + np.log(ALPHA)
        token = int(np.where(plausible, logits - amateur.logits, -np.inf).argmax())
        if model.tokenizer.is_end(token):
            break
        expert.append(token)
    print(model.tokenizer.decode(expert[len(prompt) :]))
