"""A generation, loop and sampler, against llama-cpp-python's: `pytest bench/test_whole_generation.py`.

The model has 34 million weights and a vocabulary of 128,256: it is so small that the time outside `llama_decode`
matters. The two run in turns, in separate processes; `ratio` in `extra_info` is the median of the pairs. See
CONTRIBUTING.md on how to install llama-cpp-python.
"""

import statistics
import subprocess
import sys

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import generations
import models

ROUNDS, N_TOKENS = 21, 200
BARS = {"top_k, top_p, temperature": 1.05, "top_p": 1.5}


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("chain", generations.CHAINS)
@pytest.mark.parametrize("kind", ["f16", "q4_0"])
def test_a_generation_against_llama_cpp_python(
    benchmark: BenchmarkFixture, kind: str, chain: str, n_threads: int
) -> None:
    llama_cpp_python = generations.peer()
    path = models.make("wide-34m", kind)

    def rate(python: str, loop: str) -> float:
        command = [python, generations.__file__, loop, str(path), str(n_threads), str(N_TOKENS), chain]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
        return float(done.stdout)

    ours: list[float] = []
    theirs: list[float] = []

    def turn() -> None:
        ours.append(rate(sys.executable, "minerva"))
        theirs.append(rate(llama_cpp_python, "llama-cpp-python"))

    benchmark.pedantic(turn, rounds=ROUNDS)
    ratios = sorted(own / other for own, other in zip(ours, theirs, strict=True))
    benchmark.extra_info |= {
        "tokens_per_second": round(statistics.median(ours), 1),
        "llama_cpp_python": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "bar": BARS[chain],
    }
