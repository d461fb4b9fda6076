"""Layers on RPC workers of this machine, against the same model alone: `python bench/rpc.py [MODEL.gguf]`.

Each turn generates with the model alone, with one worker and with two, which have a process and a thread each; ratios
are of tokens a second in each turn: the median, the lowest and the highest. What goes over the network is counted by a
relay in between, which can also hold back whatever it is sent, as a network does (`--delay`).
"""

import argparse
import contextlib
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import minerva_native as mn

Counts = dict[str, int]


@contextlib.contextmanager
def worker() -> Iterator[str]:
    """Run a worker on loopback; give its address."""
    command = [sys.executable, "-m", "minerva_native", "rpc-worker", "-p", "0", "-t", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.kill()


@contextlib.contextmanager
def relay(target: str, counts: Counts, delay: float) -> Iterator[str]:
    """Pass on what one client sends and gets, `delay` seconds late; count it."""
    host, _, port = target.partition(":")

    def forward(source: socket.socket, to: socket.socket, name: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                counts[name] += len(data)
                counts[f"{name} packets"] += 1
                time.sleep(delay)
                to.sendall(data)
        with contextlib.suppress(OSError):
            to.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                upstream = socket.create_connection((host, int(port)))
                for one in (client, upstream):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=forward, args=(client, upstream, "sent"), daemon=True).start()
                threading.Thread(target=forward, args=(upstream, client, "received"), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


class Generator:
    """A model and a context that generates from the same prompt again and again."""

    def __init__(self, path: str, workers: Sequence[str], n_prompt: int, n_tokens: int):
        self.model = mn.Model.load(path, rpc=workers, gpu_layers=-1 if workers else 0)
        self.context = self.model.context(n_ctx=n_prompt + n_tokens + 64, n_threads=1, prefix_cache=False)
        self.prompt, self.n_tokens = [7 + number % 900 for number in range(n_prompt)], n_tokens

    def turn(self, counts: Counts | None = None) -> tuple[float, float]:
        """Return tokens a second of the prompt, and of what is generated; counts are of the latter alone."""
        with self.context.sequence() as sequence:
            before = time.perf_counter()
            sequence.extend(self.prompt)
            read = time.perf_counter()
            for _ in range(3):  # the first steps send their graphs
                sequence.append(int(sequence.logits.argmax()))
            _ = sequence.logits
            if counts is not None:
                counts.update(dict.fromkeys(counts, 0))
            begun = time.perf_counter()
            for _ in range(self.n_tokens):
                sequence.append(int(sequence.logits.argmax()))
            _ = sequence.logits
            return len(self.prompt) / (read - before), self.n_tokens / (time.perf_counter() - begun)


def compare(path: str, turns: int, n_prompt: int, n_tokens: int) -> None:
    """Time the model alone, with one worker and with two, in turns."""
    with worker() as first, worker() as second:
        kinds = {"alone": [], "one worker": [first], "two workers": [first, second]}
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        all_of_them = {name: Generator(path, workers, n_prompt, n_tokens) for name, workers in kinds.items()}
        for generator in all_of_them.values():
            generator.turn()
        for _ in range(turns):
            for name, generator in all_of_them.items():
                rates[name].append(generator.turn())
        for index, what in enumerate((f"pp{n_prompt}", f"tg{n_tokens}")):
            for name, found in rates.items():
                own = [rate[index] for rate in found]
                ratios = [rate / alone[index] for rate, alone in zip(own, rates["alone"], strict=True)]
                middle, us = statistics.median(own), statistics.median(1e6 / rate for rate in own)
                spread = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
                print(f"{what:6} {name:12} {middle:10,.1f} t/s {us:10,.0f} us a token   {spread}")


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
            rate = generator.turn(own)[1]
            print(f"worker {number}, a generated token: { {name: own[name] / n_tokens for name in names} }")
        print(f"{rate:,.1f} t/s through the relays, each message {1e3 * delay:g} ms late")


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
