"""The roofline: no token can be generated faster than its bytes can be read from memory.

To generate a token, a model reads every weight that the token uses, and all keys and values before it, once. The best
memory bandwidth measured with the same number of threads gives the least time that this can take.
"""

import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

import minerva_native as mn

READ_BYTES = 256 << 20  # what all threads read together; four times the largest cache if that is more
READ_SECONDS, READ_ROUNDS = 0.04, 3  # how long a round takes, and how many there are: the best one counts


class Weights(NamedTuple):
    """How many bytes of weights a token uses, by where they are.

    Attributes:
        cpu: bytes in the machine's memory.
        gpu: bytes in a GPU's memory.
    """

    cpu: float
    gpu: float

    @property
    def total(self) -> float:
        """Bytes in both."""
        return self.cpu + self.gpu


def weights_touched(model: mn.Model) -> Weights:
    """Return how many bytes of weights are read to generate one token.

    - Of an embedding table one row is read, or all of it if it is also the output matrix.
    - Of the experts, only those that the router chooses.
    - Nothing of an encoder, or of layers that predict additional tokens.
    """
    gguf = mn.GGUF(model.path)
    tensors = gguf.tensors
    gguf.close()
    tied = not any(tensor.name == "output.weight" for tensor in tensors)
    n_expert, n_used = (max(model.hyperparameter(key)) for key in ("expert_count", "expert_used_count"))
    first_on_gpu = model.n_blocks + 1 - model.gpu_layers  # the output counts as the layer after the last
    cpu = gpu = 0.0
    for tensor in tensors:
        parts = tensor.name.split(".")
        layer = int(parts[parts.index("blk") + 1]) if "blk" in parts else model.n_blocks
        size = float(tensor.size_bytes)
        if parts[0] == "enc" or model.n_layer <= layer < model.n_blocks:
            continue
        if parts[0].endswith(("_embd", "_types")) and not (parts[0] == "token_embd" and tied):
            size, layer = size / tensor.shape[-1], -1  # rows are looked up on the CPU
        elif "exps." in tensor.name and n_expert:
            size *= n_used / n_expert
        if layer >= first_on_gpu:
            gpu += size
        else:
            cpu += size
    return Weights(cpu, gpu)


class Limit:
    """The limit that memory bandwidth sets for a model on `n_threads` threads."""

    def __init__(self, weights: Weights, n_threads: int):
        self._weights = weights
        self._on_gpu = weights.gpu / weights.total  # keys and values are where their layers are
        self._reader = Reader(n_threads) if self._on_gpu < 1.0 else None
        self._gpu_bandwidth = first_gpu().copy_bandwidth() if self._on_gpu > 0.0 else 1.0

    def cpu_bandwidth(self) -> float:
        """Measure how many bytes per second the threads read; 1 if they have nothing to read.

        Call it for each repetition: the bandwidth of a shared machine varies over time.
        """
        return self._reader.bandwidth() if self._reader is not None else 1.0

    def seconds(self, kv_bytes: float, cpu_bandwidth: float) -> float:
        """Return the least time that a token can take, with `kv_bytes` of keys and values before it."""
        weights, on_gpu = self._weights, self._on_gpu
        on_cpu = (weights.cpu + (1.0 - on_gpu) * kv_bytes) if self._reader is not None else 0.0
        return (weights.gpu + on_gpu * kv_bytes) / self._gpu_bandwidth + on_cpu / cpu_bandwidth


class Reader:
    """Memory for each of `n_threads` threads to read."""

    def __init__(self, n_threads: int):
        size = max(READ_BYTES, 4 * largest_cache_bytes()) // n_threads
        self._buffers = [np.ones(size // 8, np.uint64) for _ in range(n_threads)]

    def bandwidth(self) -> float:
        """Return how many bytes per second the threads read together, in the best round."""
        return max(_read_together(self._buffers) for _ in range(READ_ROUNDS))


def _read_together(buffers: list[npt.NDArray[np.uint64]]) -> float:
    """Have each thread read its buffer repeatedly; return the sum of their rates."""
    rates: list[float] = []
    barrier = threading.Barrier(len(buffers))

    def read(buffer: npt.NDArray[np.uint64]) -> None:
        try:
            barrier.wait()
        except threading.BrokenBarrierError:
            return
        passes, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < READ_SECONDS:
            np.bitwise_or.reduce(buffer)  # limited by memory bandwidth, and releases the GIL
            passes += 1
        rates.append(passes * buffer.nbytes / elapsed)

    threads = [threading.Thread(target=read, args=(buffer,), daemon=True) for buffer in buffers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except RuntimeError as error:
        raise mn.MinervaError(f"the memory cannot be read with {len(buffers)} threads ({error})") from None
    finally:
        barrier.abort()  # after Ctrl-C, threads that wait for the others would wait for ever
    return sum(rates)


def first_gpu() -> mn.Device:
    """Return the first GPU, to which layers go first."""
    return next(device for device in mn.devices() if device.type in ("gpu", "igpu"))


def largest_cache_bytes() -> int:
    """Return the size of the CPU's largest cache, or 0 if the system does not say."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit() and text[-1:] in "KM":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes)
