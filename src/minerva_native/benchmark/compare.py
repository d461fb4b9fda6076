"""Comparisons: with results from a file, and with upstream's llama-bench, run in turns."""

import json
import math
import os
import stat
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import minerva_native as mn

from .measure import Test

CONFIDENCE = 0.95

_MAX_BYTES = 1 << 28  # of results to compare with

Row = Mapping[str, Any]

_TEST = ("n_prompt", "n_gen", "n_depth")
_MODEL = ("model_size", "model_n_params")
_SETTINGS = (
    *("n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "n_gpu_layers", "flash_attn", "mmap", "warm_up"),
    "placement",
    *("build_commit", "cpu_info", "gpu_info", "model_header_sha256"),
)


class Ratio(NamedTuple):
    """A speed as a multiple of another, from pairs of repetitions: the median, and a confidence interval for it.

    The interval is that of the sign test, between order statistics, so it assumes nothing about the distribution of the
    times. With few pairs its confidence is below 95%.

    Attributes:
        median: the median of the pairs' ratios.
        low: the lower end of the interval.
        high: the upper end of the interval.
        confidence: the probability that the interval contains the true median.
    """

    median: float
    low: float
    high: float
    confidence: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Ratio":
        """Compare speeds pair by pair; what the longer sequence has more is ignored."""
        ratios = sorted(own / other for own, other in zip(ours, theirs, strict=False))
        n = len(ratios)
        # outside[k]: the chance that the true median is outside ratios[k] to ratios[n - 1 - k]. It is that of at most k
        # heads, or at most k tails, in n throws.
        outside = [2 * sum(math.comb(n, heads) for heads in range(k + 1)) / 2**n for k in range((n + 1) // 2)]
        k = max((k for k, chance in enumerate(outside) if chance <= 1 - CONFIDENCE), default=0)
        return cls(statistics.median(ratios), ratios[k], ratios[n - 1 - k], max(0.0, 1 - outside[k]))


def load(path: str | os.PathLike[str]) -> list[Row]:
    """Read results that this benchmark or llama-bench wrote as JSON (a list, or `--json`'s object) or JSONL.

    Raises `ValueError` if the file has no results, `OSError` if it cannot be read.
    """
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
        raise ValueError(f"{path} is not a file of at most {_MAX_BYTES:,} bytes: write a baseline with -o json")
    content = Path(path).read_bytes()
    try:
        try:
            data = json.loads(content)
        except ValueError:
            data = [json.loads(line) for line in content.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is neither JSON nor JSONL: write a baseline with -o json") from None
    rows = data.get("results", [data]) if isinstance(data, dict) else data
    if not isinstance(rows, list) or not rows or not all(map(_is_result, rows)):
        raise ValueError(f"{path} holds no results of a benchmark: write a baseline with -o json")
    return rows


def _is_result(row: object) -> bool:
    if not isinstance(row, dict) or not all(type(row.get(name)) is int for name in _TEST):
        return False
    rates = row.get("samples_ts")
    return isinstance(rates, list) and bool(rates) and all(map(_is_rate, rates))


def _is_rate(value: object) -> bool:
    # Tokens per second that some hardware might reach.
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-9 < value < 1e15


def has(baseline: Sequence[Row], test: Test) -> bool:
    """Return whether there is a result of the same test, for any model."""
    return any(all(row[name] == getattr(test, name) for name in _TEST) for row in baseline)


def find(row: Row, baseline: Sequence[Row]) -> tuple[Row, list[str]] | None:
    """Return the baseline's result of the same test and model, and the names of the settings that differ.

    If there are several, it is the one with the fewest differences; if there is none, None.
    """

    def differences(other: Row) -> list[str]:
        differs = [name for name in _SETTINGS if name in other and other[name] != row[name]]
        if not row.get("gpu_info") and not other.get("gpu_info"):  # llama-bench reports layers even without a GPU
            differs = [name for name in differs if name != "n_gpu_layers"]
        return differs

    same = [
        other
        for other in baseline
        if all(other[name] == row[name] for name in _TEST)
        and all(other.get(name, row[name]) == row[name] for name in _MODEL)
    ]
    if not same:
        return None
    best = min(same, key=lambda other: len(differences(other)))
    return best, differences(best)


class LlamaBench:
    """Upstream's llama-bench, one repetition at a time."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).absolute()  # a bare name would be looked up in PATH
        if not self.path.is_file() or not os.access(self.path, os.X_OK):
            raise ValueError(f"{path} is not an executable file: see CONTRIBUTING.md on how to build llama-bench")

    def repeat(self, model: str, gpu_layers: int, test: Test, mmap: bool, warm_up: bool) -> float:
        """Run the same test on the same file, after its own warm-up if asked; return the time in nanoseconds.

        Raises `MinervaError` if llama-bench fails.
        """
        if "," in model:
            raise mn.MinervaError(f"llama-bench would read {model} as several files, because of the comma: rename it")
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
        if not warm_up:
            command.append("--no-warmup")
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        except OSError as error:
            raise mn.MinervaError(f"{self.path} could not be run: {error.strerror}") from None
        try:
            (row,) = json.loads(done.stdout)
            ns = float(row["avg_ns"])
            if done.returncode == 0 and 0 < ns < math.inf and _is_rate(1e9 * test.n_tokens / ns):
                return ns
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            pass
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["it printed no result"])[-1]
        raise mn.MinervaError(f"{self.path} failed (exit status {done.returncode}): {last}")
