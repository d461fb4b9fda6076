"""A conversation, streamed: python examples/chat.py [instruct.gguf]"""

import sys

import minerva_native as mn

with mn.LLM(sys.argv[1] if len(sys.argv) > 1 else mn.DEMO_PATH, n_ctx=1024) as llm:
    chat = llm.chat(temperature=0.3, seed=1, max_tokens=120)
    for question in ("Tell me a story about a cat.", "And one about a girl?"):
        print(f"> {question}")
        for chunk in chat.stream(question):
            print(chunk.text, end="", flush=True)
        usage = chunk.usage
        assert usage is not None  # the last chunk has it
        print(f"\n[{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were cached]\n")
