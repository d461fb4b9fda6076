"""Several streams at once: `python bench/parallel.py server | batch | single | ... MODEL.gguf`.

    server --llama-server PATH    eight clients that stream, against `llama-server --parallel 8`, in turns
    batch --batched-bench PATH    eight streams, with our sampler and without one, against `llama-batched-bench`
    single                        one stream, with n_parallel=8 against n_parallel=1
    deterministic                 eight streams, with deterministic=True against without, both in cells of their own
    rounds                        what a round of eight takes besides evaluating, in CPU time: other load matters little
    cells                         decoding beside cells of finished sequences, and in cells of one's own, without `LLM`;
                                  with `--threads 1` in CPU time

Ratios are of tokens a second in each pair of turns: the median, the lowest and the highest.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

import minerva_native as mn
from upstream import llama_server

PROMPTS = [f"The {animal} went to the {place}, and there it saw" for animal in ("cat", "dog", "bear", "hen")
           for place in ("market", "river")]  # fmt: skip


class Turn(NamedTuple):
    """One turn of streams.

    Attributes:
        rate: tokens a second of all together.
        steady: the same from when all had their first token.
        first: seconds to the first token, of each.
        gaps: seconds between two tokens of one stream.
    """

    rate: float
    steady: float
    first: list[float]
    gaps: list[float]


def of_times(start: float, times: list[list[float]]) -> Turn:
    """Return a turn, from when the tokens of each stream came."""
    gaps = [after - before for one in times for before, after in itertools.pairwise(one)]
    end, begun = max(one[-1] for one in times), max(one[0] for one in times)
    steady = sum(at > begun for one in times for at in one) / (end - begun)
    return Turn(sum(map(len, times)) / (end - start), steady, [one[0] - start for one in times], gaps)


def ours(
    llm: mn.LLM, prompts: Sequence[str] | Sequence[list[int]], n: int, number: int, temperature: float = 0.8
) -> Turn:
    """Have each prompt continued by `n` tokens in-process; texts are numbered, so that none is cached."""
    options: dict[str, Any] = {"max_tokens": n, "temperature": temperature}
    bias = {token: -float("inf") for token in range(llm.tokenizer.n_vocab) if llm.tokenizer.is_end(token)}

    async def one(prompt: str | list[int]) -> list[float]:
        numbered = f"{number}. {prompt}" if isinstance(prompt, str) else prompt
        return [time.perf_counter() async for _ in llm.astream(numbered, logit_bias=bias, **options)]

    async def main() -> Turn:
        start = time.perf_counter()
        return of_times(start, await asyncio.gather(*map(one, prompts)))

    return asyncio.run(main())


def together(one: Callable[[str], Coroutine[Any, Any, list[float]]], prompts: Sequence[str], number: int) -> Turn:
    """Ask for all prompts at once; texts are numbered, so that none is cached."""

    async def main() -> Turn:
        start = time.perf_counter()
        return of_times(start, await asyncio.gather(*(one(f"{number}. {prompt}") for prompt in prompts)))

    return asyncio.run(main())


def theirs(address: str, prompts: list[str], n: int, number: int) -> Turn:
    """Have each prompt continued by `n` tokens by llama-server."""

    async def one(prompt: str) -> list[float]:
        request = {"prompt": prompt, "n_predict": n, "stream": True, "ignore_eos": True, "temperature": 0.8}
        body = json.dumps(request).encode()
        reader, writer = await asyncio.open_connection(*address.split(":"))
        head = f"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        times = []
        async for line in reader:
            if line.startswith(b"data: ") and b'"stop":false' in line:
                times.append(time.perf_counter())
            if b'"stop":true' in line:
                break
        writer.close()
        return times

    return together(one, prompts, number)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def report(turns: dict[str, list[Turn]]) -> None:
    """Print what was measured, and ratios to the first."""
    names = list(turns)
    for name, some in turns.items():
        gaps = [gap for turn in some for gap in turn.gaps]
        first = [seconds for turn in some for seconds in turn.first]
        print(
            f"{name}: {statistics.median(turn.rate for turn in some):.1f} t/s, "
            f"between two tokens p50 {1e3 * percentile(gaps, 0.5):.1f}, p99 {1e3 * percentile(gaps, 0.99):.1f} ms, "
            f"first token p95 {1e3 * percentile(first, 0.95):.0f} ms"
        )
    mine = turns[names[0]]
    for name in names[1:]:
        pairs = list(zip(mine, turns[name], strict=True))
        print(f"  {names[0]} over {name}: {spread([one.rate / other.rate for one, other in pairs])}")
        p99 = [percentile(one.gaps, 0.99) / percentile(other.gaps, 0.99) for one, other in pairs]
        print(f"  its p99 between two tokens over theirs: {spread(p99)}")
        p95 = [percentile(one.first, 0.95) / percentile(other.first, 0.95) for one, other in pairs]
        print(f"  its p95 to the first token over theirs: {spread(p95)}")


def in_turns(ways: dict[str, Callable[[int], Turn]], pairs: int) -> dict[str, list[Turn]]:
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    for number in range(pairs + 1):
        for name, way in ways.items() if number % 2 else reversed(ways.items()):
            turn = way(number)
            if number:  # the first is to warm up
                turns[name].append(turn)
    return turns


def server(arguments: argparse.Namespace) -> None:
    n_threads, n, unified = arguments.threads, arguments.tokens, arguments.unified
    shared = ["--parallel", "8", *(["--kv-unified"] if unified else [])]
    with (
        mn.LLM(arguments.model, n_ctx=8192, n_parallel=8, n_seq=8, n_threads=n_threads, kv_unified=unified) as llm,
        llama_server(arguments.llama_server, arguments.model, n_threads, "-c", "8192", *shared) as address,
    ):
        ways: dict[str, Callable[[int], Turn]] = {
            "minerva": lambda number: ours(llm, PROMPTS, n, number),
            "llama-server": lambda number: theirs(address, PROMPTS, n, number),
        }
        report(in_turns(ways, arguments.pairs))


def single(arguments: argparse.Namespace) -> None:
    with (
        mn.LLM(arguments.model, n_ctx=4096, n_threads=arguments.threads) as one,
        mn.LLM(one.model, n_ctx=4096, n_parallel=8, n_threads=arguments.threads) as eight,
    ):
        ways: dict[str, Callable[[int], Turn]] = {
            "n_parallel=8": lambda number: ours(eight, PROMPTS[:1], arguments.tokens, number),
            "n_parallel=1": lambda number: ours(one, PROMPTS[:1], arguments.tokens, number),
        }
        report(in_turns(ways, arguments.pairs))


def deterministic(arguments: argparse.Namespace) -> None:
    options: dict[str, Any] = {"n_ctx": 8192, "n_parallel": 8, "n_threads": arguments.threads}
    with (
        mn.LLM(arguments.model, deterministic=True, **options) as exact,
        mn.LLM(exact.model, n_seq=9, kv_unified=False, **options) as plain,
    ):
        ways: dict[str, Callable[[int], Turn]] = {
            "deterministic": lambda number: ours(exact, PROMPTS, arguments.tokens, number),
            "not deterministic": lambda number: ours(plain, PROMPTS, arguments.tokens, number),
        }
        report(in_turns(ways, arguments.pairs))


def cells(arguments: argparse.Namespace) -> None:
    ways = {
        "in one KV cache": (True, 0),
        "beside 400 cells": (True, 400),
        "beside 3,000 cells": (True, 3000),
        "in cells of their own": (False, 0),
    }
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    rates: dict[tuple[str, int], list[float]] = {}
    with mn.Model.load(arguments.model) as model:
        for _ in range(arguments.pairs):
            for name, (unified, n_others) in ways.items():
                options: dict[str, Any] = {"n_ctx": 8192, "n_seq": 16, "n_threads": arguments.threads}
                with model.context(kv_unified=unified, **options) as context:
                    for at in range(6 if n_others else 0):
                        with context.sequence() as other:
                            other.extend([2000 + at] * (n_others // 6))
                    sequences = [context.sequence() for _ in range(8)]
                    for at, sequence in enumerate(sequences):
                        sequence.extend([1000 + at] * 16)
                    for some in (sequences, sequences[:1]):
                        before = clock()
                        for at in range(arguments.tokens):
                            context.extend({sequence: [500 + at] for sequence in some})
                        rate = len(some) * arguments.tokens / (clock() - before)
                        rates.setdefault((name, len(some)), []).append(rate)
                        if not n_others:
                            for sequence in sequences[1:]:
                                sequence.close()
                            context.clear_cache()
    first = next(iter(ways))
    for (name, n), values in rates.items():
        ratios = [one / other for one, other in zip(values, rates[first, n], strict=True)]
        print(f"{n} streams {name}: {statistics.median(values):.1f} t/s, over {first}: {spread(ratios)}")


def batch(arguments: argparse.Namespace) -> None:
    n, threads = arguments.tokens, str(arguments.threads)
    command = [arguments.batched_bench, "-m", arguments.model, "-npp", "16", "-ntg", str(n), "-npl", "8", "-c", "2048"]
    command += ["-t", threads, "-tb", threads, "--kv-unified", "--output-format", "jsonl"]
    prompts = [[1000 + at] * 16 for at in range(8)]
    ratios: dict[str, list[float]] = {"greedy": [], "drawn": []}
    with mn.LLM(arguments.model, n_ctx=2048, n_parallel=8, n_threads=arguments.threads) as llm:
        for number in range(arguments.pairs + 1):
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
            speed = next(json.loads(line)["speed_tg"] for line in lines if line.startswith("{"))
            llm.context.clear_cache()
            for name, temperature in (("greedy", 0.0), ("drawn", 0.8)):
                rate = ours(llm, prompts, n, number, temperature).steady
                if number:
                    ratios[name].append(rate / speed)
                    print(f"{name} {rate:.0f} t/s, llama-batched-bench {speed:.0f} t/s", file=sys.stderr)
    for name, values in ratios.items():
        print(f"eight streams, {name}, over llama-batched-bench: {spread(values)}")


def rounds(arguments: argparse.Namespace) -> None:
    with mn.LLM(arguments.model, n_ctx=4096, n_parallel=8, n_threads=arguments.threads) as llm:
        evaluate, ended = llm.context.evaluate, 0.0
        seconds: list[float] = []

        def timed(sequences: list[mn.Sequence], *others: Any, **options: Any) -> int:
            nonlocal ended
            if ended and len(sequences) == 8:
                seconds.append(time.thread_time() - ended)
            n_left = evaluate(sequences, *others, **options)
            ended = time.thread_time() if len(sequences) == 8 and not n_left else 0.0
            return n_left

        llm.context.evaluate = timed  # type: ignore[method-assign, assignment]
        for name, temperature in (("greedy", 0.0), ("drawn", 0.8)):
            seconds.clear()
            for number in range(arguments.pairs):
                llm.context.clear_cache()
                ours(llm, [[1000 + at] * 16 for at in range(8)], arguments.tokens, number, temperature)
            tenth, median = (1e6 * percentile(seconds, share) for share in (0.1, 0.5))
            print(f"{name}: p10 {tenth:.0f}, p50 {median:.0f} us of {len(seconds)} rounds")


def main() -> None:
    ways = {way.__name__: way for way in (server, batch, single, deterministic, rounds, cells)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=ways)
    parser.add_argument("model")
    parser.add_argument("--llama-server", default="llama-server")
    parser.add_argument("--batched-bench", default="llama-batched-bench")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--unified", action="store_true", help="server: all streams in one KV cache, on both sides")
    parser.add_argument("--pairs", type=int, default=7)
    arguments: Any = parser.parse_args()
    ways[arguments.what](arguments)


if __name__ == "__main__":
    main()
