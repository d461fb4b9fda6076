"""Functions that the model calls (needs the extra "structured"): python examples/tools.py [instruct.gguf]"""

import random
import sys
from typing import Literal

import minerva_native as mn

TEMPLATE = """{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or m.tool_calls | tojson }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""  # for the built-in model, whose own template knows no tools


def roll(sides: Literal[4, 6, 20]) -> int:
    """Roll a die with so many sides."""
    return random.randint(1, sides)


path, template = (sys.argv[1], None) if len(sys.argv) > 1 else (mn.DEMO_PATH, TEMPLATE)
with mn.LLM(path, n_ctx=1024, template=template) as llm:
    chat = llm.chat(max_tokens=60, temperature=0, parallel_tool_calls=False)
    chat.run("Roll a die with 6 sides.", tools=[roll], tool_choice="required", max_rounds=1)
    for message in chat.messages:
        print(message["role"], message.get("tool_calls") or message["content"])
