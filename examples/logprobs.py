"""What the model chose, and what else it could have said: python examples/logprobs.py [model.gguf]"""

import math
import sys

import minerva_native as mn

with mn.LLM(sys.argv[1] if len(sys.argv) > 1 else mn.DEMO_PATH, n_ctx=1024) as llm:
    completion = llm.complete("Once upon a time, there was a little", max_tokens=12, temperature=0, top_logprobs=3)
    for entry in completion.logprobs or ():
        others = ", ".join(f"{other.text!r} {math.exp(other.logprob or 0):.0%}" for other in entry.top)
        print(f"{entry.text!r:12} from {others}")
    scores = llm.score("Once upon a time, there was a little cat.")
    print(f"the sentence has a log-probability of {sum(scores.logprobs[1:]):.2f}")
