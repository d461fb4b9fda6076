"""A text as an instance of a class (needs the extra "structured"): python examples/record.py [instruct.gguf]"""

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import minerva_native as mn


@dataclass
class Hero:
    animal: Literal["cat", "dog", "duck", "dragon"]
    mood: Literal["happy", "sad"]
    friend: Annotated[Literal["Alex", "Emma", "Ben"] | None, "if one is named"]


with mn.LLM(sys.argv[1] if len(sys.argv) > 1 else mn.DEMO_PATH, n_ctx=1024) as llm:
    messages = [{"role": "user", "content": "Once upon a time, a dragon was sad. Describe the hero."}]
    answer = llm.chat_completion(messages, response_format=Hero, temperature=0, max_tokens=100)
    print(answer.parsed)
    print(f"{answer.usage.forced_tokens} of {answer.usage.completion_tokens} tokens left no choice")
