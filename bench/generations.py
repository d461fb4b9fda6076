"""Run a decode loop with its sampler, of this package or of llama-cpp-python, in a separate process.

    python bench/generations.py {minerva,llama-cpp-python} MODEL THREADS TOKENS CHAIN

generates TOKENS tokens after a warm-up and prints the tokens per second. Both loops run as they are, with no copies
added. Flash attention is off in both, and neither stops at an end token.
"""

import os
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

PROMPT = list(range(100, 116))
N_CTX = 512
WARM_UP = 8

CHAINS: dict[str, dict[str, Any]] = {
    "top_k, top_p, temperature": {"top_k": 40, "top_p": 0.95, "min_p": 0.0, "temp": 0.8},
    "top_p": {"top_k": 0, "top_p": 0.95, "min_p": 0.0, "temp": 1.0},
}


def minerva(path: str, n_threads: int, chain: dict[str, Any]) -> Iterator[object]:
    """Generate with this package."""
    import minerva_native as mn

    params = mn.SamplingParams(
        seed=1, temperature=chain["temp"], **{name: chain[name] for name in chain if name != "temp"}
    )
    sampler = mn.Sampler(params)
    with mn.Model.load(path, gpu_layers=0) as model:
        context = model.context(n_ctx=N_CTX, n_threads=n_threads, flash_attention="off")
        sequence = context.sequence()
        sequence.extend(PROMPT)
        while True:
            yield from mn.generate(sequence, sampler)


def llama_cpp_python(path: str, n_threads: int, chain: dict[str, Any]) -> Iterator[object]:
    """Generate with `Llama.generate`."""
    from llama_cpp import Llama

    model = Llama(
        path,
        n_gpu_layers=0,
        n_ctx=N_CTX,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        flash_attn=False,
        seed=1,
        verbose=False,
    )
    yield from model.generate(PROMPT, **chain)


def peer() -> str:
    """Return the Python with llama-cpp-python that `LLAMA_CPP_PYTHON` names; skip the test if it names none."""
    import pytest

    python = os.environ.get("LLAMA_CPP_PYTHON")
    if python is None:
        pytest.skip("LLAMA_CPP_PYTHON does not name a Python with llama-cpp-python: see CONTRIBUTING.md")
    return python


def main() -> int:
    loop, path, n_threads, n_tokens, chain = sys.argv[1:]
    steps = {"minerva": minerva, "llama-cpp-python": llama_cpp_python}[loop](path, int(n_threads), CHAINS[chain])
    for _ in islice(steps, WARM_UP):
        pass
    before = time.perf_counter()
    count = sum(1 for _ in islice(steps, int(n_tokens)))
    print(count / (time.perf_counter() - before))
    return 0


if __name__ == "__main__":
    sys.exit(main())
