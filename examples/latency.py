"""Time to the first token against the length of the prompt: python examples/latency.py [model.gguf]"""

import statistics
import sys
import time

import minerva_native as mn

with mn.Model.load(sys.argv[1] if len(sys.argv) > 1 else mn.DEMO_PATH) as model:
    n_ctx = min(1024, model.n_ctx_train)
    ids = model.tokenizer.encode("Once upon a time, there was a little cat. " * n_ctx)
    with model.context(n_ctx=n_ctx, prefix_cache=False) as ctx:
        length = 16
        while length < n_ctx:
            times = []
            for _ in range(5):
                with ctx.sequence() as seq:
                    before = time.perf_counter()
                    seq.extend(ids[:length])
                    next(mn.generate(seq, max_tokens=1))
                    times.append(time.perf_counter() - before)
            print(f"{length:5} tokens: {1e3 * statistics.median(times):8.2f} ms, {length / min(times):8.0f} tokens/s")
            length *= 2
