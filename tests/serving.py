"""`minerva serve` in a process of its own, for tests."""

import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai

_START_SECONDS = 60
_END_SECONDS = 20


@dataclass(frozen=True)
class Served:
    """A server that listens.

    Attributes:
        url: where.
        token: lets clients in; empty if it is not shown.
        pid: of its process.
        models: their names.
    """

    url: str
    token: str
    pid: int
    models: list[str]

    def client(self, **options: Any) -> openai.OpenAI:
        """Return a client, which does not try again."""
        return openai.OpenAI(**self._given(options))

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        """Return a client for asyncio."""
        return openai.AsyncOpenAI(**self._given(options))

    def http(self) -> httpx.Client:
        """Return a client without a token."""
        return httpx.Client(base_url=self.url, timeout=60)

    def _given(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"base_url": f"{self.url}/v1", "api_key": self.token, "max_retries": 0, "timeout": 60, **options}


@contextmanager
def serve(*options: str) -> Iterator[Served]:
    """Start a server on a free port of this machine, and end it.

    Args:
        options: of the command line.
    """
    command = [sys.executable, "-m", "minerva_native", "serve", "--port", "0", "--json", "-t", "1", *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            deadline = time.monotonic() + _START_SECONDS
            ready = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
            line = process.stdout.readline() if ready else ""
            if not line:
                log.seek(0)
                raise AssertionError(f"the server did not start: {log.read()}")
            facts = json.loads(line)
            yield Served(facts["url"], facts["token"] or "", facts["pid"], facts["models"])
        finally:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
