"""`minerva serve`: `python bench/serve.py peer | single | idle [MODEL.gguf]`.

    peer --llama-server PATH    eight clients that stream, against `llama-server --parallel 8`, in turns
    single                      one client that streams, against `mn.LLM` in this process, in turns
    idle                        how much memory the server takes, and when it is ready, without any request

Both servers answer `/v1/completions` as streams, with the same client. Ratios are of tokens a second in each pair of
turns: the median, the lowest and the highest.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import minerva_native as mn
from parallel import PROMPTS, Turn, in_turns, ours, report, together
from upstream import llama_server


@contextmanager
def minerva_serve(*arguments: str) -> Iterator[dict[str, Any]]:
    """Run `minerva serve` on a free port of loopback; give what it says once it is ready."""
    command = [sys.executable, "-m", "minerva_native", "serve", "--port", "0", "--json", "-q", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline()) | {"pid": process.pid}
    finally:
        process.terminate()
        process.wait(20)


def streamed(address: str, token: str, prompts: Sequence[str], n: int, number: int, bias: dict[str, bool]) -> Turn:
    """Have each prompt continued by `n` tokens; texts are numbered, so that none is cached."""

    async def one(prompt: str) -> list[float]:
        request = {"prompt": prompt, "max_tokens": n, "stream": True, "temperature": 0.8, "logit_bias": bias}
        body = json.dumps(request).encode()
        reader, writer = await asyncio.open_connection(*address.split(":"))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(body)}\r\n"
        head += f"Content-Type: application/json\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        times = []
        async for line in reader:
            if line.startswith(b"data: {") and b'"finish_reason":null' in line:
                times.append(time.perf_counter())
            elif line.startswith(b"data: [DONE]"):
                break
        writer.close()
        return times

    return together(one, prompts, number)


def ends(model: str) -> dict[str, bool]:
    """Return biases that ban the ends of a text, so that all are equally long."""
    with mn.Model.load(model, vocab_only=True) as loaded:
        tokenizer = loaded.tokenizer
        return {str(token): False for token in range(tokenizer.n_vocab) if tokenizer.is_end(token)}


def peer(arguments: argparse.Namespace) -> None:
    n, threads, bias = arguments.tokens, str(arguments.threads), ends(arguments.model)
    ours_is = ["-m", arguments.model, "-np", "8", "-c", "8192", "-t", threads]
    theirs_is = ["-c", "8192", "--parallel", "8", "--kv-unified"]
    with (
        minerva_serve(*ours_is) as said,
        llama_server(arguments.llama_server, arguments.model, arguments.threads, *theirs_is) as theirs,
    ):
        mine, token = said["url"].removeprefix("http://"), said["token"]
        ways: dict[str, Callable[[int], Turn]] = {
            "minerva serve": lambda number: streamed(mine, token, PROMPTS[:8], n, number, bias),
            "llama-server": lambda number: streamed(theirs, token, PROMPTS[:8], n, number, bias),
        }
        report(in_turns(ways, arguments.pairs))


def single(arguments: argparse.Namespace) -> None:
    n, bias = arguments.tokens, ends(arguments.model)
    with (
        mn.LLM(arguments.model, n_ctx=4096, n_parallel=4, n_threads=arguments.threads) as llm,
        minerva_serve("-m", arguments.model, "-c", "4096", "-t", str(arguments.threads)) as said,
    ):
        address, token = said["url"].removeprefix("http://"), said["token"]
        ways: dict[str, Callable[[int], Turn]] = {
            "minerva serve": lambda number: streamed(address, token, PROMPTS[:1], n, number, bias),
            "mn.LLM": lambda number: ours(llm, PROMPTS[:1], n, number),
        }
        report(in_turns(ways, arguments.pairs))


def idle(arguments: argparse.Namespace) -> None:
    model = [] if arguments.model is None else ["-m", arguments.model]
    ready, resident = [], []
    for _ in range(arguments.pairs):
        begun = time.perf_counter()
        with minerva_serve(*model) as said:
            ready.append(time.perf_counter() - begun)
            time.sleep(0.5)
            with open(f"/proc/{said['pid']}/status") as status:
                resident += [int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS")]
    print(f"ready after {statistics.median(ready):.2f} s ({min(ready):.2f} to {max(ready):.2f})")
    print(f"resident {statistics.median(resident):.0f} MiB ({min(resident):.0f} to {max(resident):.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["peer", "single", "idle"])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--llama-server", default="llama-server")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=7)
    arguments: Any = parser.parse_args()
    {"peer": peer, "single": single, "idle": idle}[arguments.what](arguments)


if __name__ == "__main__":
    main()
