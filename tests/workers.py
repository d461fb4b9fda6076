"""RPC workers in processes of their own, and what a model on them writes."""

import os
import select
import subprocess
import sys

import minerva_native as mn

COMMAND = [sys.executable, "-m", "minerva_native"]
GREEDY = mn.SamplingParams(temperature=0)


class Worker:
    """A process of our own command on loopback."""

    def __init__(self, port: int = 0):
        command = [*COMMAND, "rpc-worker", "-p", str(port), "-t", "1"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 60)[0], "the worker does not start"
        self.endpoint = self.process.stdout.readline().removeprefix("listening on ").strip()
        self.port = int(self.endpoint.partition(":")[2])

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def tale(model: mn.Model, n: int = 24) -> list[int]:
    with model.context(n_ctx=128, n_threads=1) as context, context.sequence() as sequence:
        sequence.extend(model.tokenizer.encode("Once upon a time"))
        return [step.token for step in mn.generate(sequence, GREEDY, max_tokens=n)]
