"""Layers on RPC workers of this machine, against the same model alone: `python bench/rpc.py [MODEL.gguf]`.

Each turn generates with the model alone, with one worker and with two, which have a process and a thread each; ratios
are of the speeds in each turn: the median, the lowest and the highest. What goes over the network is counted by a relay
in between, which can also hold back whatever it is sent, as a network does (`--delay`). The CPU time can still be
compared on a machine that has other work.
"""

import argparse
import contextlib
import os
import queue
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import minerva_native as mn

Counts = dict[str, int]

pids: list[int] = [os.getpid()]  # ours, and the workers'


def cpu_seconds() -> float:
    """Return how long all threads of this process and of the workers have computed."""
    tasks = [task for pid in pids for task in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


@contextlib.contextmanager
def worker() -> Iterator[str]:
    """Run a worker on loopback; give its address."""
    command = [sys.executable, "-m", "minerva_native", "rpc-worker", "-p", "0", "-t", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            endpoint = process.stdout.readline().split()[-1]
            pids.append(process.pid)
            yield endpoint
        finally:
            process.kill()


@contextlib.contextmanager
def relay(target: str, counts: Counts, delay: float) -> Iterator[str]:
    """Pass on what one client sends and gets, `delay` seconds late; count it."""
    host, _, port = target.partition(":")

    def receive(source: socket.socket, late: "queue.SimpleQueue[tuple[float, bytes]]", name: str) -> None:
        data = b"begin"
        while data:
            with contextlib.suppress(OSError):
                data = b""
                data = source.recv(1 << 20)
            counts[name] += len(data)
            counts[f"{name} packets"] += 1
            late.put((time.perf_counter() + delay, data))

    def forward(late: "queue.SimpleQueue[tuple[float, bytes]]", to: socket.socket) -> None:
        data = b"begin"
        with contextlib.suppress(OSError):
            while data:
                due, data = late.get()
                time.sleep(max(0.0, due - time.perf_counter()))
                to.sendall(data) if data else to.shutdown(socket.SHUT_WR)

    def join(source: socket.socket, to: socket.socket, name: str) -> None:
        late: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        threading.Thread(target=receive, args=(source, late, name), daemon=True).start()
        threading.Thread(target=forward, args=(late, to), daemon=True).start()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                upstream = socket.create_connection((host, int(port)))
                for one in (client, upstream):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                join(client, upstream, "sent")
                join(upstream, client, "received")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


class Generator:
    """A model and a context that generates from the same prompt again and again."""

    def __init__(self, path: str, workers: Sequence[str], n_prompt: int, n_tokens: int):
        self.model = mn.Model.load(path, rpc=workers, gpu_layers=-1 if workers else 0)
        self.context = self.model.context(n_ctx=n_prompt + n_tokens + 64, n_threads=1, prefix_cache=False)
        self.cpu: list[float] = []  # seconds a token, of all processes, in each turn
        self.prompt, self.n_tokens = [7 + number % 900 for number in range(n_prompt)], n_tokens

    def turn(self, counts: Counts | None = None) -> tuple[float, list[float]]:
        """Return the seconds that the prompt and each token after it took; counts are of the latter alone."""
        with self.context.sequence() as sequence:
            before = time.perf_counter()
            sequence.extend(self.prompt)
            read = time.perf_counter() - before
            for _ in range(3):  # the first steps send their graphs
                sequence.append(int(sequence.logits.argmax()))
            token, seconds = int(sequence.logits.argmax()), []
            if counts is not None:
                counts.update(dict.fromkeys(counts, 0))
            computed = cpu_seconds()
            for _ in range(self.n_tokens):
                before = time.perf_counter()
                sequence.append(token)
                token = int(sequence.logits.argmax())
                seconds.append(time.perf_counter() - before)
            self.cpu.append((cpu_seconds() - computed) / self.n_tokens)
            return read, seconds


def compare(path: str, turns: int, n_prompt: int, n_tokens: int) -> None:
    """Time the model alone, with one worker and with two, in turns."""
    with worker() as first, worker() as second:
        kinds = {"alone": [], "one worker": [first], "two workers": [first, second]}
        found: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in kinds}
        all_of_them = {name: Generator(path, workers, n_prompt, n_tokens) for name, workers in kinds.items()}
        for generator in all_of_them.values():
            generator.turn()
        for _ in range(turns):
            for name, generator in all_of_them.items():
                found[name].append(generator.turn())
        for name, own in found.items():
            print(f"{name:12} pp{n_prompt} {show([[read] for read, _ in own], [[read] for read, _ in found['alone']])}")
        for name, own in found.items():
            print(f"{name:12} tg{n_tokens} {show([each for _, each in own], [each for _, each in found['alone']])}")
        base = all_of_them["alone"].cpu[1:]
        for name, generator in all_of_them.items():
            more = [1e6 * (cpu - alone) for cpu, alone in zip(generator.cpu[1:], base, strict=True)]
            spread = f"{statistics.median(more):,.0f} [{min(more):,.0f}, {max(more):,.0f}]"
            median = 1e6 * statistics.median(generator.cpu[1:])
            print(f"{name:12} {median:9,.0f} us of CPU time a token in all processes, {spread} more than alone")


def show(own: list[list[float]], alone: list[list[float]]) -> str:
    """Return the times of all turns, and the ratios of the speeds in each."""
    every = sorted(1e6 * seconds for turn in own for seconds in turn)
    ratios = [statistics.median(base) / statistics.median(turn) for turn, base in zip(own, alone, strict=True)]
    spread = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
    return f"p10 {every[len(every) // 10]:9,.0f} us, median {statistics.median(every):9,.0f} us, ratio {spread}"


def count(path: str, delay: float, n_prompt: int, n_tokens: int) -> None:
    """Print what a token of two workers sends and receives, through relays."""
    names = ("sent", "received", "sent packets", "received packets")
    counts = [dict.fromkeys(names, 0) for _ in range(2)]
    with (
        worker() as first,
        worker() as second,
        relay(first, counts[0], delay) as one,
        relay(second, counts[1], delay) as two,
    ):
        generator = Generator(path, [one, two], n_prompt, n_tokens)
        generator.turn()
        for number, own in enumerate(counts):
            seconds = sorted(generator.turn(own)[1])
            print(f"worker {number}, a generated token: { {name: own[name] / n_tokens for name in names} }")
        tenth, middle = 1e3 * seconds[len(seconds) // 10], 1e3 * statistics.median(seconds)
        print(f"a token, with each message {1e3 * delay:g} ms late: p10 {tenth:.2f} ms, median {middle:.2f} ms")


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default=str(mn.DEMO_PATH))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("-p", type=int, default=128)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--count", action="store_true", help="count what goes over the network, instead of timing")
    parser.add_argument("--delay", type=float, default=0.0, help="milliseconds that the relays hold a message back")
    options = parser.parse_args()
    if options.count or options.delay:
        count(options.model, options.delay / 1e3, options.p, options.n)
    else:
        compare(options.model, options.turns, options.p, options.n)


if __name__ == "__main__":
    main()
