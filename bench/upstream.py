"""Upstream's llama-server, for comparisons."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def llama_server(binary: str, model: str, n_threads: int, *arguments: str) -> Iterator[str]:
    """Run llama-server on a free port of loopback; give its address once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [binary, "-m", model, "--host", "127.0.0.1", "--port", str(port), "--no-webui"]
    command += ["-t", str(n_threads), "-tb", str(n_threads), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except OSError:
                time.sleep(0.1)
        else:
            sys.exit("llama-server did not start")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
