"""Whole processes against `import numpy` and llama-cpp-python: `pytest bench/test_start_up.py`.

The processes take turns (A B A B ...), so that other work on the machine affects both; `extra_info` has the median
ratio. Bars: `import minerva_native` takes at most 1.5 times as long as `import numpy`, and `minerva generate` at most 3
times. The first token of the built-in model takes at most 0.8 times as long as with llama-cpp-python, and at most 45 MB
of memory, without weights and KV cache.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import generations
import minerva_native as mn

ROUNDS = 11

N_CTX = 512
PROMPT = "Once upon a time"

NUMPY = [sys.executable, "-c", "import numpy"]

MINERVA = f"""
import minerva_native as mn
model = mn.Model.demo()
seq = model.context(n_ctx={N_CTX}).sequence()
seq.extend(model.tokenizer.encode("{PROMPT}"))
print(next(mn.generate(seq)).text)
"""

LLAMA_CPP_PYTHON = f"""
from llama_cpp import Llama
llm = Llama({str(mn.DEMO_PATH)!r}, n_ctx={N_CTX}, verbose=False)
tokens = llm.tokenize(b"{PROMPT}")
print(llm.detokenize([next(llm.generate(tokens))]).decode())
"""

# The resident memory, and how much of it is pages of the model's file, which are weights.
MEMORY = """
import json, re
weights = whole = 0
for line in open("/proc/self/smaps"):
    if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
        is_model = line.rstrip().endswith(".gguf")
    elif line.startswith("Rss:"):
        whole += int(line.split()[1]) << 10
        weights += (int(line.split()[1]) << 10) * is_model
print(json.dumps({"whole": whole, "weights": weights}))
"""


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
    benchmark.extra_info["ratio_to_import_numpy"] = round(statistics.median(ratios[1:] or ratios), 2)
    benchmark.extra_info["bar"] = bar


def test_a_cold_start_against_llama_cpp_python(benchmark: BenchmarkFixture) -> None:
    llama_cpp_python = generations.peer()
    ratios: list[float] = []

    def pair() -> None:
        own = seconds([sys.executable, "-c", MINERVA])
        ratios.append(own / seconds([llama_cpp_python, "-c", LLAMA_CPP_PYTHON]))

    benchmark.pedantic(pair, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["ratio_to_llama_cpp_python"] = round(statistics.median(ratios[1:] or ratios), 2)
    benchmark.extra_info["bar"] = 0.8


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system has no /proc/self/smaps")
@pytest.mark.parametrize("program", ["minerva", "llama_cpp_python"])
def test_memory_at_the_first_token(benchmark: BenchmarkFixture, program: str) -> None:
    python, script = sys.executable, MINERVA
    if program == "llama_cpp_python":
        python, script = generations.peer(), LLAMA_CPP_PYTHON

    def memory() -> dict[str, int]:
        done = subprocess.run([python, "-c", script + MEMORY], capture_output=True, text=True, check=True)
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return found

    found = benchmark.pedantic(memory, rounds=1)
    with mn.Model.demo() as model, model.context(n_ctx=N_CTX) as context, context.sequence() as sequence:
        sequence.extend([1] * 2)
        kv_cache = sequence.size_bytes // 2 * N_CTX
    benchmark.extra_info["megabytes"] = round((found["whole"] - found["weights"] - kv_cache) / 1e6, 1)
    benchmark.extra_info["kv_cache_megabytes"] = round(kv_cache / 1e6, 2)
    benchmark.extra_info["bar"] = 45
