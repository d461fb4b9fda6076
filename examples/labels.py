"""Labels by probability, without generating anything: python examples/labels.py [model.gguf]"""

import sys

import minerva_native as mn

TEXTS = ("there was a little boy named Alex", "there was a little girl named Emma")

with mn.LLM(sys.argv[1] if len(sys.argv) > 1 else mn.DEMO_PATH, n_ctx=1024) as llm:
    for text in TEXTS:
        prompt = f"Once upon a time, {text}. One day, {text.split()[-1]} was sad because"
        chances = llm.choose(prompt, [" he", " she"])  # scored over forks, a batch for each token of an answer
        label = max(chances, key=lambda answer: chances[answer])
        print(f"{text}:{label} ({chances[label]:.1%})")
