"""What `LLM` adds to the time of a token over `generate`: `pytest bench/test_llm_overhead.py`.

`us_per_token` in `extra_info` is the median of the differences between a completion and the same tokens made by
`generate`, in turns, on the built-in model; its bar is 15 microseconds. It includes what a request takes once, spread
over its tokens. The requests are greedy.
"""

import statistics
import time
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import minerva_native as mn

N_TOKENS = 200
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize("way", ["complete", "stream", "chat", "chat with reasoning"])
def test_the_overhead_of_the_facade(benchmark: BenchmarkFixture, way: str) -> None:
    with mn.LLM(mn.DEMO_PATH, n_ctx=1024, n_threads=1, template=TEMPLATE) as llm:
        ends = [token for token in range(llm.tokenizer.n_vocab) if llm.tokenizer.is_end(token)]
        bias = dict.fromkeys(ends, -float("inf"))
        prompt, sequence = llm.tokenizer.encode("Once upon a time"), llm.context.sequence()
        sequence.extend(prompt)
        params = mn.SamplingParams(temperature=0.0, logit_bias=bias)

        def generate() -> list[int]:
            sequence.truncate(len(prompt))
            _ = sequence.logits
            return [step.token for step in mn.generate(sequence, params, max_tokens=N_TOKENS)]

        def through_the_facade() -> list[int]:
            options: dict[str, Any] = {"max_tokens": N_TOKENS, "sampling": params}
            if way == "complete":
                return llm.complete(prompt, **options).tokens
            if way == "stream":
                return [chunk.token for chunk in llm.stream(prompt, **options) if chunk.token is not None]
            tags = ("<think>", "</think>") if way.endswith("reasoning") else None
            with llm.chat(thinking_tags=tags, **options) as chat:
                return chat.send("Once upon a time").tokens

        assert through_the_facade() == generate()
        differences: list[float] = []

        def pair() -> None:
            before = time.perf_counter()
            generate()
            between = time.perf_counter()
            through_the_facade()
            differences.append(time.perf_counter() - between - (between - before))

        benchmark.pedantic(pair, rounds=25, warmup_rounds=2)
        benchmark.extra_info["us_per_token"] = round(1e6 * statistics.median(differences) / N_TOKENS, 2)
