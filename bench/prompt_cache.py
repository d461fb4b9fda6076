"""What the prompt cache on disk saves and costs: `python bench/prompt_cache.py MODEL.gguf`.

Restart: a process that finds the prompt on disk against one that has no cache, in turns: how many of the prompt's
tokens it evaluates, and the time from the request to the first token, with the model loaded and the files in the page
cache. Writing: the time of a token while a prompt of the same length is written, against that while nothing is, in
turns within one process. Ratios are medians of pairs, with the smallest and the largest in brackets.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import minerva_native as mn

WORDS = ["the", "river", "rises", "in", "northern", "hills", "near", "a", "village", "and", "flows", "south"]


def prompt(tokenizer: mn.Tokenizer, n: int, seed: int = 0) -> list[int]:
    """Return n tokens of text that hardly repeats."""
    text = " ".join(WORDS[(at * at + seed * at + at // 7) % len(WORDS)] + str((at * 31 + seed) % 97) for at in range(n))
    return tokenizer.encode(f"{seed}: {text}")[:n]


def restart(arguments: argparse.Namespace) -> None:
    """Answer one request, and print what it took."""
    options = {"n_ctx": arguments.tokens + 512, "n_threads": arguments.threads, "cache_dir": arguments.restart or None}
    with mn.LLM(arguments.model, **options) as llm:
        ids = prompt(llm.tokenizer, arguments.tokens)
        llm.complete("warm", max_tokens=2)
        before, n_before = time.perf_counter(), llm.context.stats.tokens_evaluated
        first, n_evaluated = 0.0, 0
        for chunk in llm.stream(ids, max_tokens=8, temperature=0.0):
            if not first:
                first = time.perf_counter() - before
                n_evaluated = llm.context.stats.tokens_evaluated - n_before
            if chunk.usage is not None:
                cached = chunk.usage.cached_tokens
        print(json.dumps({"seconds": first, "evaluated": n_evaluated, "cached": cached, "prompt": len(ids)}))


def in_process(arguments: argparse.Namespace, directory: str) -> dict[str, float]:
    sizes = ["--tokens", str(arguments.tokens), "--threads", str(arguments.threads)]
    command = [sys.executable, __file__, arguments.model, "--restart", directory, *sizes]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def restarts(arguments: argparse.Namespace) -> None:
    """Compare restarts with and without the cache."""
    with tempfile.TemporaryDirectory() as directory:
        in_process(arguments, directory)
        ratios = []
        for at in range(arguments.pairs):
            order = (directory, "") if at % 2 else ("", directory)
            results = {where: in_process(arguments, where) for where in order}
            ratios.append(results[""]["seconds"] / results[directory]["seconds"])
            print(f"  without {results['']}, with {results[directory]}")
    median = statistics.median(ratios)
    print(f"first token after a restart: {median:.1f} [{min(ratios):.1f}, {max(ratios):.1f}] times sooner")


def writer_seconds() -> float:
    """Return the CPU time that the thread in the background has taken so far (Linux)."""
    threads = [thread for thread in threading.enumerate() if thread.name == "minerva_native prompt cache"]
    paths = [Path(f"/proc/self/task/{thread.native_id}/schedstat") for thread in threads]
    return sum(int(path.read_text().split()[0]) for path in paths if path.exists()) / 1e9


def writing(arguments: argparse.Namespace) -> None:
    """Compare decoding with and without what the cache writes meanwhile."""
    ratios, copying, shares, n_busy = [], [], [], 0
    options = {"n_ctx": arguments.tokens + 1024, "n_threads": arguments.threads}
    with tempfile.TemporaryDirectory() as directory, mn.LLM(arguments.model, cache_dir=directory, **options) as llm:
        cache, n = llm.prompt_cache, arguments.decode
        assert cache is not None
        with llm.context.sequence() as long, llm.context.sequence() as short:
            long.extend(prompt(llm.tokenizer, arguments.tokens))
            short.extend(llm.tokenizer.encode("Once upon a time"))

            def decode(is_writing: bool) -> float:
                """Return the seconds that some tokens take."""
                nonlocal n_busy
                if is_writing:
                    cache.files.clear()
                    began = time.perf_counter()
                    cache.store(long)
                    copying.append(time.perf_counter() - began)
                _ = short.logits
                used = writer_seconds()
                began = time.perf_counter()
                for token in range(n):
                    short.extend([1000 + token])
                    _ = short.logits
                seconds = time.perf_counter() - began
                if is_writing:
                    shares.append((writer_seconds() - used) / seconds)
                n_busy += is_writing and not cache.flush(0.0)
                cache.flush()
                short.rewind(n)
                return seconds

            decode(True)
            for at in range(arguments.decode_pairs):
                seconds = {
                    is_writing: decode(is_writing) for is_writing in ((False, True) if at % 2 else (True, False))
                }
                ratios.append(seconds[True] / seconds[False])
    low, median, high = statistics.quantiles(ratios)
    print(f"a token while the cache writes takes {median:.4f} [{min(ratios):.4f}, {max(ratios):.4f}] times as long; "
          f"quartiles {low:.4f} and {high:.4f}; it still wrote at the end of {n_busy} of {len(copying)}")  # fmt: skip
    print(
        f"the writer takes {statistics.median(shares):.2%} [{min(shares):.2%}, {max(shares):.2%}] of one core meanwhile"
    )
    print(f"before that, copying the prompt's state out of the memory takes {1e3 * statistics.median(copying):.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--decode-pairs", type=int, default=41)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--restart", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.restart is not None:
        restart(arguments)
        return
    restarts(arguments)
    writing(arguments)


if __name__ == "__main__":
    main()
