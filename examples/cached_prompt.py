"""A system prompt that is evaluated once, whatever comes after it: python examples/cached_prompt.py [model.gguf]"""

import sys

import minerva_native as mn

with mn.Model.load(sys.argv[1] if len(sys.argv) > 1 else mn.DEMO_PATH) as model, model.context(n_seq=4) as ctx:
    encode = model.tokenizer.encode
    with ctx.sequence() as system:
        system.extend(encode("Once upon a time, there was a little cat. " * 10))
        system.pinned = True  # its cells stay, however full the context gets
    for question in ("The cat was happy", "The cat found a ball"):
        before = ctx.stats.tokens_evaluated
        with ctx.sequence() as seq:
            seq.extend(system.tokens[:] + encode(question, add_special=False))
            text = "".join(step.text for step in mn.generate(seq, mn.SamplingParams(temperature=0), max_tokens=12))
            print(f"{question}{text}  [{ctx.stats.tokens_evaluated - before} of {len(seq)} tokens evaluated]")
