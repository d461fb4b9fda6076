"""A server to attack, in a process of its own: `python victim.py OPTIONS`, JSON with the fields of `Options`.

It prints a line once it listens. On SIGUSR1 it prints what it holds: `Held` in `test_abuse.py`.
"""

import dataclasses
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import minerva_native as mn
from minerva_native.server.app import create_app
from minerva_native.server.guard import Access
from minerva_native.server.models import Models
from minerva_native.server.run import run, tcp_socket
from minerva_native.server.settings import Settings, Source


@dataclasses.dataclass(kw_only=True)
class Options:
    """What to serve, and how.

    Attributes:
        settings: the arguments of `Settings`.
        models: paths of models by name; the built-in model if there is none.
        budget_bytes: as `Models` takes it.
        idle_seconds: as `Models` takes it.
        load_seconds: how much longer loading a model is to take.
        n_parallel: requests at once.
        n_ctx: the context.
        send_bytes: how much of a reply the system takes from the server before its client reads, or 0 for its default.
    """

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    models: dict[str, str] = dataclasses.field(default_factory=dict)
    budget_bytes: int = 1 << 30
    idle_seconds: float | None = None
    load_seconds: float = 0.0
    n_parallel: int = 4
    n_ctx: int = 4096
    send_bytes: int = 0


def load(options: Options, source: Source) -> mn.LLM:
    time.sleep(options.load_seconds)
    model = mn.Model.load(source.path, gpu_layers=0)
    return mn.LLM(model, n_parallel=options.n_parallel, n_ctx=options.n_ctx, n_threads=1)


def break_on(word: str, error: Exception) -> None:
    """Have whatever computes a prompt with a word in it raise an error, as a fault in the engine would."""
    extend = mn.Sequence.extend

    def breaking(self: mn.Sequence, ids: Any, **options: Any) -> Any:
        if word in self.context.model.tokenizer.decode(ids):
            raise error
        return extend(self, ids, **options)

    mn.Sequence.extend = breaking  # type: ignore[method-assign, assignment]


def main(options: Options) -> None:
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    break_on("break the context", mn.BrokenContextError("provoked, in /a/secret/path"))
    break_on("break the program", RuntimeError("provoked, in /a/secret/path"))
    break_on("break the code", TypeError("unsupported operand type(s) for prompt: 'a secret' and 'NoneType'"))
    break_on("break the sum", ValueError("operands could not be broadcast with /a/secret/path"))
    paths = options.models or {"demo": str(mn.DEMO_PATH)}
    sources = [Source(name=name, path=Path(path), size_bytes=os.path.getsize(path)) for name, path in paths.items()]
    metrics = mn.Metrics()
    models = Models(sources, partial(load, options), metrics, options.budget_bytes, options.idle_seconds)
    settings = Settings(**options.settings)

    def show_access(access: Access) -> None:
        print(f"access {access.method} {access.route} {access.status}", file=sys.stderr, flush=True)

    def tell(*_: object) -> None:
        gc.collect()
        places = models.places.values()
        llms = [place.llm for place in places if place.llm is not None]
        held = {
            "waiting": sum(len(llm.queue) for llm in llms),
            "cells": sum(llm.context.cells_used for llm in llms),
            "users": sum(place.n_users for place in places),
            "loaded": [place.source.name for place in places if place.llm is not None],
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "files": len(os.listdir("/proc/self/fd")),
            "rss": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        }
        print(json.dumps(held), flush=True)

    signal.signal(signal.SIGUSR1, tell)
    listening = tcp_socket("127.0.0.1", 0)
    if options.send_bytes:  # which its connections inherit
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options.send_bytes)
    port = listening.getsockname()[1]
    try:
        run(create_app(models, metrics, settings, show_access), listening, settings, lambda: print(port, flush=True))
    finally:
        models.close_now()


if __name__ == "__main__":
    main(Options(**json.loads(sys.argv[1])))
