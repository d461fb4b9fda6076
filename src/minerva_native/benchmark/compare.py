"""Comparing: with results kept in a file, and with upstream's llama-bench run in turns."""

import json
import math
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import minerva_native as mn

from .measure import Test

CONFIDENCE = 0.95

Row = Mapping[str, Any]

_TEST = ("n_prompt", "n_gen", "n_depth")
_MODEL = ("model_size", "model_n_params")
_SETTINGS = ("n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "n_gpu_layers", "flash_attn", "build_commit")


class Ratio(NamedTuple):
    """How many times as fast, by pairs of repetitions: the median, and an interval that holds the true one.

    The interval is the sign test's, of order statistics: it supposes nothing of how times are distributed, and has the
    confidence that is stated, which few pairs cannot bring to 95%.
    """

    median: float
    low: float
    high: float
    confidence: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Ratio":
        """Compare speeds pair by pair; of sequences of different lengths the first ones."""
        ratios = sorted(own / other for own, other in zip(ours, theirs, strict=False))
        n = len(ratios)
        # The true median lies beyond the k-th smallest with the chance of at most k heads in n throws.
        outside = [2 * sum(math.comb(n, heads) for heads in range(k + 1)) / 2**n for k in range((n + 1) // 2)]
        k = max((k for k, chance in enumerate(outside) if chance <= 1 - CONFIDENCE), default=0)
        return cls(statistics.median(ratios), ratios[k], ratios[n - 1 - k], max(0.0, 1 - outside[k]))


def load(path: str | os.PathLike[str]) -> list[Row]:
    """Read results that were written as JSON (a list, or `--json`'s object) or JSONL, here or by llama-bench.

    Raises `ValueError` for a file that holds none, `OSError` where it cannot be read.
    """
    content = Path(path).read_text()
    try:
        try:
            data = json.loads(content)
        except ValueError:
            data = [json.loads(line) for line in content.splitlines() if line.strip()]
    except ValueError:
        raise ValueError(f"{path} is neither JSON nor JSONL: write a baseline with -o json") from None
    rows = data.get("results", [data]) if isinstance(data, dict) else data
    needed = {*_TEST, "samples_ts"}
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and needed <= row.keys() for row in rows)
    ):
        raise ValueError(f"{path} holds no results of a benchmark: write a baseline with -o json")
    return rows


def find(row: Row, baseline: Sequence[Row]) -> tuple[Row, list[str]] | None:
    """Return the baseline's result of the same test and model, and the names of the settings that differ.

    Of several, the one with the fewest differences; None where there is none.
    """

    def differences(other: Row) -> list[str]:
        return [name for name in _SETTINGS if name in other and other[name] != row[name]]

    same = [
        other
        for other in baseline
        if all(int(other[name]) == row[name] for name in _TEST)
        and all(other.get(name, row[name]) == row[name] for name in _MODEL)
    ]
    if not same:
        return None
    best = min(same, key=lambda other: len(differences(other)))
    return best, differences(best)


class LlamaBench:
    """Upstream's llama-bench, one repetition at a time."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_file() or not os.access(self.path, os.X_OK):
            raise ValueError(f"{path} is no program that can be run: see CONTRIBUTING.md on how to build llama-bench")

    def repeat(self, model: str, gpu_layers: int, test: Test, mmap: bool) -> float:
        """Run the same test on the same file, after a warm-up of its own; return its time in nanoseconds.

        Raises `MinervaError` where it fails.
        """
        settings: dict[str, object] = {
            "-m": model,
            "-d": test.n_depth,
            "-b": test.n_batch,
            "-ub": test.n_ubatch,
            "-ctk": test.type_k,
            "-ctv": test.type_v,
            "-t": test.n_threads,
            "-ngl": gpu_layers,
            "-p": 0 if test.n_gen else test.n_prompt,
            "-n": 0 if test.n_prompt else test.n_gen,
            "-r": 1,
            "-o": "json",
        }
        if test.n_prompt and test.n_gen:
            settings["-pg"] = f"{test.n_prompt},{test.n_gen}"
        if test.flash_attention != "auto":
            settings["-fa"] = test.flash_attention
        if not mmap:
            settings["-lm"] = "none"
        command = [str(self.path), *(str(word) for pair in settings.items() for word in pair)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        try:
            (row,) = json.loads(done.stdout)
            return float(row["avg_ns"])
        except (ValueError, KeyError, TypeError):
            last = (done.stderr.strip().splitlines() or ["it printed no result"])[-1]
            raise mn.MinervaError(f"{self.path} failed (exit status {done.returncode}): {last}") from None
