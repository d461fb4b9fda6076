"""Several tasks, one of which has not much time: python examples/asyncio_timeout.py [model.gguf]"""

import asyncio
import sys

import minerva_native as mn


async def main() -> None:
    with mn.LLM(sys.argv[1] if len(sys.argv) > 1 else mn.DEMO_PATH, n_ctx=1024) as llm:
        stories = [llm.acomplete(f"Once upon a time, {who}", max_tokens=20, seed=1) for who in ("a cat", "a girl")]
        for story in await asyncio.gather(*stories):
            print(story.text)
        # What there is when the time is over is the result; `asyncio.timeout` around it would throw it away.
        story = await llm.acomplete("One day,", timeout=0.02)
        print(f"{len(story.tokens)} tokens in time, then it was {story.finish_reason}")


asyncio.run(main())
