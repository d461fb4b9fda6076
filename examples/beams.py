"""Beam search over forks, which share the cells of what they have in common: python examples/beams.py [model.gguf]"""

import sys

import minerva_native as mn

WIDTH, LENGTH = 4, 12

with mn.Model.load(sys.argv[1] if len(sys.argv) > 1 else mn.DEMO_PATH) as model, model.context(n_seq=2 * WIDTH) as ctx:
    root = ctx.sequence()
    root.extend(prompt := model.tokenizer.encode("Once upon a time, there was a little"))
    beams = [(0.0, root)]
    for _ in range(LENGTH):
        options = list[tuple[float, mn.Sequence, int]]()
        for score, beam in beams:
            ids, logprobs = mn.top_logprobs(beam.logits, WIDTH)
            options += [(score + float(lp), beam, int(token)) for token, lp in zip(ids, logprobs, strict=True)]
        best = sorted(options, key=lambda option: -option[0])[:WIDTH]
        grown = [(score, beam.fork(), token) for score, beam, token in best]
        for old in beams:
            old[1].close()
        ctx.extend({fork: [token] for _, fork, token in grown})  # one batch for all beams
        beams = [(score, fork) for score, fork, _ in grown]
    for score, beam in beams:
        print(f"{score:7.2f} {model.tokenizer.decode(beam[len(prompt) :])}")
