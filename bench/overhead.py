"""Compare the time of a token with that of another installed version of this package, in alternating runs.

    python bench/overhead.py --against /path/to/other/bin/python --pairs 9 [--model model.gguf]

Each program measures, on the built-in model with one thread: `extend` by a token, a token of `generate` with a trivial
sampler, a token each of eight sequences: all of it, and what lies outside `llama_decode`. Beside them a process that
imports the package, or lists the devices, and ends. With a model it is llama-bench's pp512 and tg128 of that instead,
with one thread, and the CPU time of each, which other work on the machine changes least. Printed are the medians and
the ratio of each pair, this one over the other: all are times.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

N_TOKENS, ROUNDS = 400, 7


def measure() -> dict[str, float]:
    """Return microseconds a token, the median of some rounds."""
    import minerva_native as mn

    found: dict[str, float] = {}
    with mn.Model.demo() as model, model.context(n_ctx=2048, n_seq=8, n_threads=1, prefix_cache=False) as context:
        sequences = [context.sequence() for _ in range(8)]
        sequence, stats = sequences[0], context.stats
        tokens = [[number % 300 + 10] for number in range(N_TOKENS)]

        def extend() -> None:
            for token in tokens:
                sequence.extend(token)

        def generate() -> None:
            for _ in mn.generate(sequence, lambda logits, ids: 40 + len(ids) % 50, max_tokens=N_TOKENS):
                pass

        def extend_each() -> None:
            for step in range(N_TOKENS // 8):
                context.extend({other: tokens[step + number] for number, other in enumerate(sequences)})

        def timed(action: Callable[[], None]) -> tuple[float, float]:
            for number, other in enumerate(sequences):
                other.truncate(0)
                other.extend([1, 5, 6 + number])
            decode, start = stats.decode_seconds, time.perf_counter()
            action()
            seconds = time.perf_counter() - start
            return 1e6 * seconds / N_TOKENS, 1e6 * (seconds - stats.decode_seconds + decode) / N_TOKENS

        for name, action in (("extend", extend), ("generate", generate), ("each of eight", extend_each)):
            timed(action)
            rounds = [timed(action) for _ in range(ROUNDS)]
            found[name] = statistics.median(whole for whole, _ in rounds)
            found[f"{name}, outside"] = statistics.median(outside for _, outside in rounds)
    return found


def measure_model(path: str) -> dict[str, float]:
    """Return milliseconds of pp512 and tg128, the best of some rounds, by the clock and of the CPU."""
    import minerva_native as mn

    found: dict[str, list[float]] = {}
    with mn.Model.load(path) as model, model.context(n_ctx=1024, n_threads=1, prefix_cache=False) as context:
        sequence = context.sequence()

        def prompt() -> None:
            sequence.extend(list(range(100, 100 + 512)))

        def tokens() -> None:
            for token in range(100, 100 + 128):
                sequence.extend([token])

        for _ in range(ROUNDS):
            for name, action in (("pp512", prompt), ("tg128", tokens)):
                sequence.truncate(0)
                before, cpu_before = time.perf_counter(), time.process_time()
                action()
                found.setdefault(f"{name} (ms)", []).append(1e3 * (time.perf_counter() - before))
                found.setdefault(f"{name}, CPU (ms)", []).append(1e3 * (time.process_time() - cpu_before))
    return {name: min(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="PYTHON", help="the interpreter of the other environment")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--model", metavar="FILE", help="a model to measure instead")
    options = parser.parse_args()
    if options.against is None:
        print(json.dumps(measure() if options.model is None else measure_model(options.model)))
        return

    def start(python: str, program: str) -> float:
        times = []
        for _ in range(ROUNDS):
            before = time.perf_counter()
            subprocess.run([python, "-c", program], check=True)
            times.append(1e3 * (time.perf_counter() - before))
        return statistics.median(times)

    def run(python: str) -> dict[str, float]:
        found = {
            "import (ms)": start(python, "import minerva_native"),
            "devices (ms)": start(python, "import minerva_native; minerva_native.devices()"),
        }
        given = ["--model", options.model] if options.model else []
        output = subprocess.run([python, __file__, *given], capture_output=True, text=True, check=True).stdout
        return {**found, **json.loads(output)}

    pairs = []
    for number in range(options.pairs):
        order = [sys.executable, options.against]
        results = {python: run(python) for python in (order if number % 2 else order[::-1])}
        pairs.append((results[sys.executable], results[options.against]))
    print(f"{'':26}{'this':>9}{'other':>9}{'ratio':>8}   lowest, highest")
    for name in pairs[0][0]:
        ratios = sorted(ours[name] / theirs[name] for ours, theirs in pairs)
        ours, theirs = (statistics.median(pair[side][name] for pair in pairs) for side in (0, 1))
        median = statistics.median(ratios)
        print(f"{name:26}{ours:9.2f}{theirs:9.2f}{median:8.3f}   {ratios[0]:.3f}, {ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
