"""Classifier-free guidance (arXiv:2306.17806): follow a prompt more than the model would by itself."""

import sys

import minerva_native as mn

SCALE = 3.0  # 1 is plain decoding

with mn.Model.load(sys.argv[1] if len(sys.argv) > 1 else mn.DEMO_PATH) as model, model.context(n_seq=2) as ctx:
    encode = model.tokenizer.encode
    guided, free = ctx.sequence(), ctx.sequence()
    prompt, beginning = encode("The cat was very sad."), encode(" One day,", add_special=False)
    ctx.extend({guided: prompt + beginning, free: encode("") + beginning})
    for _ in range(24):
        logits = free.logits + SCALE * (guided.logits - free.logits)
        token = int(logits.argmax())
        if model.tokenizer.is_end(token):
            break
        ctx.extend({guided: [token], free: [token]})  # one batch for both
    print(model.tokenizer.decode(guided[len(prompt) :]))
