"""Whole processes from start to end, against `import numpy`: `pytest bench/test_start_up.py --benchmark-enable`.

The processes take turns (A B A B ...), so that the machine's mood falls on both; `extra_info` has the median ratio.
Bars: `import minerva_native` at most 1.5 times `import numpy`, `minerva generate` at most 3 times.
"""

import statistics
import subprocess
import sys
import time

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 11

NUMPY = [sys.executable, "-c", "import numpy"]


def seconds(command: list[str]) -> float:
    before = time.perf_counter()
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return time.perf_counter() - before


@pytest.mark.parametrize(
    ("command", "bar"),
    [
        pytest.param([sys.executable, "-c", "import minerva_native"], 1.5, id="import"),
        pytest.param([sys.executable, "-m", "minerva_native", "generate", "-n", "1"], 3.0, id="first token"),
        pytest.param([sys.executable, "-m", "minerva_native", "generate"], 3.0, id="generate"),
    ],
)
def test_a_cold_process_against_importing_numpy(benchmark: BenchmarkFixture, command: list[str], bar: float) -> None:
    ratios: list[float] = []

    def pair() -> None:
        ratios.append(seconds(command) / seconds(NUMPY))

    benchmark.pedantic(pair, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["ratio_to_import_numpy"] = round(statistics.median(ratios[1:]), 2)
    benchmark.extra_info["bar"] = bar
