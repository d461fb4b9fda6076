"""Print what bench/gpu.sh has measured, with the bars beside each figure.

    python bench/gpu_table.py FOLDER MODEL...

reads MODEL.turns.json, MODEL.greedy.json and MODEL.drawn.json, which `minerva bench` has written.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BARS = {"tg128": 0.97, "pp512": 0.98}  # of llama-bench's speed
SAMPLING_BAR, SAMPLING_MODEL = 0.90, "llama-3.2-1b"  # of tg128 without a sampler

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what bench/gpu.sh has measured.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+")
    options = parser.parse_args()
    results = {
        (model, kind): read(options.folder / f"{model}.{kind}.json")
        for model in options.models
        for kind in ("turns", "greedy", "drawn")
    }
    machine = results[options.models[0], "turns"][0]
    print(f"On {machine['gpu_info'] or 'no GPU'}, {machine['cpu_info']}; llama.cpp {machine['build_commit']}, Q4_0.\n")
    print("| model | test | t/s | llama-bench | ratio | bar | of the bandwidth limit |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for model in options.models:
        for row in results[model, "turns"]:
            print(against_upstream(model, row))
    print()
    print("| model | sampler | t/s | without | ratio | bar |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for model in options.models:
        for kind in ("greedy", "drawn"):
            for row in results[model, kind]:
                print(with_sampler(model, kind, row))
    print("\nWhere the time of a token goes, in microseconds:\n")
    print("| model | sampler | llama_decode | logits | sampler | text | loop |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for model in options.models:
        for kind in ("greedy", "drawn"):
            for row in results[model, kind]:
                print(f"| {model} | {kind} | {' | '.join(parts(row))} |")


def read(path: Path) -> list[Row]:
    results: list[Row] = json.loads(path.read_text())["results"]
    return results


def against_upstream(model: str, row: Row) -> str:
    """Return a line about raw decode."""
    ratio = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
    share = f"{row['roofline_share']:.1%} of {row['roofline_ts']:,.0f}" if row["roofline_share"] else ""
    ours, theirs = statistics.median(row["samples_ts"]), statistics.median(row["compared_samples_ts"])
    bar = judged(row["ratio"], BARS[row["test"]])
    return f"| {model} | {row['test']} | {ours:,.1f} | {theirs:,.1f} | {ratio} | {bar} | {share} |"


def with_sampler(model: str, kind: str, row: Row) -> str:
    """Return a line about `generate` with a sampler, of which `tg128` is a part."""
    ours, raw = 1e9 / row["parts_sum_ns"], statistics.median(row["samples_ts"])
    bar = judged(ours / raw, SAMPLING_BAR) if model == SAMPLING_MODEL else "none"
    return f"| {model} | {kind} | {ours:,.1f} | {raw:,.1f} | {ours / raw:.3f} | {bar} |"


def parts(row: Row) -> Iterator[str]:
    for name in ("decode", "logits", "sampler", "text", "loop"):
        yield f"{row[f'part_{name}_ns'] / 1e3:,.1f}"


def judged(ratio: float, bar: float) -> str:
    return f"{bar:.2f}" if ratio >= bar else f"{bar:.2f}: missed by {bar - ratio:.3f}"


if __name__ == "__main__":
    main()
