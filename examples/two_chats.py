"""Two conversations at once, from two threads, on one model: python examples/two_chats.py [instruct.gguf]"""

import sys
from concurrent.futures import ThreadPoolExecutor

import minerva_native as mn

with mn.LLM(sys.argv[1] if len(sys.argv) > 1 else mn.DEMO_PATH, n_ctx=1024) as llm:

    def converse(animal: str) -> list[str]:
        with llm.chat(temperature=0, max_tokens=60) as chat:
            questions = (f"Tell me a story about a {animal}.", "Tell me another one.")
            return [chat.send(question).text for question in questions]

    with ThreadPoolExecutor() as pool:  # requests take turns; each chat keeps its place in the KV cache
        for animal, answers in zip(("cat", "dog"), pool.map(converse, ("cat", "dog")), strict=True):
            print(f"{animal}: {answers[0]}\n     {answers[1]}\n")
    print(llm.context.stats)
