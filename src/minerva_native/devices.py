"""The devices that this build of libllama can compute on, and the machine's CPUs and memory."""

import math
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._arguments import file_path, integer, what
from ._binding import BUILD_INFO, FOLDER, callbacks, ffi, lib, text, thrown
from .compute import ComputeBackend, load
from .errors import DeviceError

TYPES = {
    lib.GGML_BACKEND_DEVICE_TYPE_CPU: "cpu",
    lib.GGML_BACKEND_DEVICE_TYPE_GPU: "gpu",
    lib.GGML_BACKEND_DEVICE_TYPE_IGPU: "igpu",
    lib.GGML_BACKEND_DEVICE_TYPE_ACCEL: "accel",
}

_MAX_COPY_BYTES = 1 << 62


@dataclass(frozen=True)
class Device:
    """A device that libllama can compute on.

    Attributes:
        name: libllama's name, such as "CUDA0", which `Model.load(devices=[...])` takes.
        description: the name of the hardware.
        type: "cpu", "gpu", "igpu" (shares the machine's memory), "accel" (works beside the CPU, such as BLAS), "rpc"
            (is behind an RPC worker, whose address is the description) or "other".
        memory_total_bytes: the size of its memory.
        memory_free_bytes: how much of it was free when the device was listed.
    """

    name: str
    description: str
    type: str
    memory_total_bytes: int
    memory_free_bytes: int

    def copy_bandwidth(self, size_bytes: int = 256 << 20) -> float:
        """Measure how fast the device copies within its own memory: return bytes read and written per second.

        The best of several rounds, with two buffers of `size_bytes` each.

        Raises `DeviceError` if the device is gone or has no room for the buffers.
        """
        size_bytes = integer("size_bytes", size_bytes, 1, _MAX_COPY_BYTES)
        pointer = _by_name().get(self.name)
        if pointer is None:
            raise DeviceError(f"there is no device {self.name!r} here")
        if self.type != "cpu":
            check_not_inherited([pointer])
        free = described(pointer).memory_free_bytes
        if 2 * size_bytes > free > 0:
            raise DeviceError(f"{self.name} has {free:,} free bytes: no room for two buffers of {size_bytes:,}")
        rate = ffi.new("double *")
        if lib.minerva_copy_rate(pointer, size_bytes, rate):
            why = thrown()
            callbacks.raise_kept()
            raise DeviceError(f"{self.name} cannot be measured: {why}")
        if not rate[0]:
            raise DeviceError(f"{self.name} has no room for two buffers of {size_bytes:,} bytes")
        return float(rate[0])


@dataclass(frozen=True)
class Placement:
    """What of a model is on a device.

    Attributes:
        device: libllama's name of the device; "CPU" for all that is in this machine's memory.
        description: the name of the hardware, or the address of an RPC worker.
        layers: how many layers it has.
        has_output: whether it computes the logits.
        size_bytes: the size of its weights.
        cache_bytes: the size of what it has of the context's memory, such as the KV cache of its layers.
        buffer_bytes: the size of what it computes in.
    """

    device: str
    description: str
    layers: int
    has_output: bool
    size_bytes: int
    cache_bytes: int = 0
    buffer_bytes: int = 0


def initialise() -> None:
    """Load and start libllama's backends, once per process, and warn of those that cannot be used. Thread-safe."""
    global _is_initialised, _backends
    if _is_initialised:
        return
    with _initialise_lock:
        if _is_initialised:
            return
        backends = load(FOLDER)
        lib.llama_backend_init()
        _backends = backends
        _is_initialised = True
    for backend in backends:
        if backend.why_not:
            state = "was loaded, but" if backend.is_loaded else "is not used:"
            warnings.warn(f"the {backend.name} backend {state} {backend.why_not}", RuntimeWarning, stacklevel=3)


# A fork waits for it: what is made once, and is half made, never gets ready in a child.
_is_initialised = False
_backends: list[ComputeBackend] = []
_initialise_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_initialise_lock.acquire,
        after_in_parent=_initialise_lock.release,
        after_in_child=_initialise_lock.release,
    )


def devices() -> list[Device]:
    """Return every device of this machine that this build can use, including the CPU."""
    return [described(pointer) for pointer in on_this_machine()]


def compute_backends() -> list[ComputeBackend]:
    """Return every backend that this build has, with why it was not loaded if it was not."""
    initialise()
    return list(_backends)


def build_info() -> dict[str, Any]:
    """Return what was built: llama.cpp (pinned commit or custom folder), compiler, options, backends, CPU features.

    "backends" has the names of those that were loaded; `compute_backends` has the others, too.
    """
    return {
        **BUILD_INFO,
        "backends": [backend.name for backend in compute_backends() if backend.is_loaded],
        "cpu_features": text(lib.llama_print_system_info()).strip(" |"),
    }


def gpus() -> list[Any]:
    """Return libllama's devices of this machine that it would put layers on without being told which."""
    kinds = [(pointer, described(pointer).type) for pointer in on_this_machine()]
    dedicated = [pointer for pointer, kind in kinds if kind == "gpu"]
    return dedicated or [pointer for pointer, kind in kinds if kind == "igpu"]  # if there are no others


def check_not_inherited(pointers: list[Any]) -> None:
    """Raise `DeviceError` if this process was forked from one that has started the drivers of these GPUs."""
    if pointers and _is_inherited:
        raise DeviceError(
            f"{described(pointers[0]).name} cannot be used: this process was forked from one that has started its "
            "driver, which does not survive that; start processes with 'spawn', or pass devices=[] for the CPU alone"
        )


def _after_fork() -> None:
    global _is_inherited
    _is_inherited = _is_initialised


_is_inherited = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def is_about(pointers: list[Any], log: str) -> bool:
    """Return whether what libllama has logged says that one of these devices failed."""
    signs = []
    for pointer in pointers:
        signs += [text(lib.ggml_backend_dev_name(pointer)), text(lib.ggml_backend_dev_description(pointer))]
        signs.append(text(lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(pointer))) + " error")
    return any(sign in log for sign in signs)


def warn_that_nothing_fits(path: object, pointers: list[Any]) -> None:
    """Warn that a model is on the CPU, because no layer of it fits on these devices."""
    found = [described(pointer) for pointer in pointers]
    free = ", ".join(f"{one.name} ({one.description}) has {one.memory_free_bytes:,} bytes free" for one in found)
    callbacks.logger.warning("%s is on the CPU: no layer of it fits beside a context; %s", path, free)


def placement(model: Any, n_layer: int, contexts: Sequence[Any] = ()) -> list[Placement]:
    """Return what of a loaded `llama_model *`, and of `llama_context *`s of it, is where; the CPU is first."""
    owners = [lib.minerva_layer_device(model, layer) for layer in range(n_layer + 1)]
    pointers, found = [ffi.NULL], []
    while (pointer := lib.minerva_model_device(model, len(pointers) - 1)) != ffi.NULL:
        pointers.append(pointer)
    for pointer in pointers:
        name, description = ("CPU", "this machine's memory")
        if pointer != ffi.NULL:
            name, description = (
                text(lib.ggml_backend_dev_name(pointer)),
                text(lib.ggml_backend_dev_description(pointer)),
            )
        layers = sum(owner == pointer for owner in owners[:-1])
        part = Placement(name, description, layers, owners[-1] == pointer, *memory_used(model, contexts, pointer))
        if pointer == ffi.NULL or part.layers or part.has_output or part.size_bytes or part.cache_bytes:
            found.append(part)
    return found


def memory_used(model: Any, contexts: Sequence[Any], device: Any) -> tuple[int, int, int]:
    """Return the bytes that weights, caches and buffers take of a device, or would take if they are a dry run's."""
    use = ffi.new("minerva_memory_use *")
    cache = buffers = 0
    for context in contexts or [ffi.NULL]:
        if lib.minerva_memory_used(model, context, device, use):
            why = thrown()
            callbacks.raise_kept()
            raise DeviceError(why)
        cache, buffers = cache + use.context, buffers + use.compute
    return use.weights, cache, buffers


def buffer_types(pointers: list[Any]) -> dict[str, Any]:
    """Return where weights can be put, by the device's name, or the address of an RPC worker; "CPU" is always one."""
    types = {}
    for pointer in [*pointers, ffi.NULL]:
        kind = lib.minerva_buffer_type(pointer)
        if kind == ffi.NULL:
            why = thrown()
            callbacks.raise_kept()
            raise DeviceError(why)
        if pointer == ffi.NULL:
            types["CPU"] = kind
            continue
        device = described(pointer)
        types[device.name] = kind
        if device.type == "rpc":
            types.setdefault(device.description, kind)
    return types


def _by_name() -> dict[str, Any]:
    return {described(pointer).name: pointer for pointer in on_this_machine()}


def select(names: list[str], *, offload: bool = True) -> list[Any]:
    """Return libllama's devices of these names, without the CPU if it is for `offload`.

    Raises `DeviceError` if there is no such device.
    """
    known = _by_name()
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"devices must be names, such as {next(iter(known))!r}, not {what(name)}")
        if name not in known:
            raise DeviceError(f"there is no device {name!r} here; this build has {', '.join(known)}")
    # libllama uses the CPU anyway, and accepts only offload devices.
    return [known[name] for name in names if not offload or described(known[name]).type != "cpu"]


def available_cpus() -> int:
    """Return how many CPUs this process may use, by its affinity and its cgroup's quota, rounded up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(affinity, cpu_quota())))


def physical_memory_bytes() -> int:
    """Return the machine's memory in bytes, without swap."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def on_this_machine() -> list[Any]:
    """Return libllama's devices of this machine, including the CPU."""
    initialise()
    return [lib.ggml_backend_dev_get(index) for index in range(lib.ggml_backend_dev_count())]


def described(pointer: Any) -> Device:
    """Return what is known of one of libllama's devices; raise `DeviceError` if it is a worker's, and that is lost.

    One of this machine that has failed, or was inherited by a fork, has no memory: the others are of use.
    """
    free, total = ffi.new("size_t *"), ffi.new("size_t *")
    is_remote = text(lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(pointer))) == "RPC"
    if lib.minerva_device_memory(pointer, free, total):
        why = thrown()
        callbacks.raise_kept()
        if is_remote:
            raise DeviceError(why)
        free[0] = total[0] = 0
    return Device(
        text(lib.ggml_backend_dev_name(pointer)),
        text(lib.ggml_backend_dev_description(pointer)),
        "rpc" if is_remote else TYPES.get(lib.ggml_backend_dev_type(pointer), "other"),
        total[0],
        free[0],
    )


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """Return the smallest CPU quota of all enclosing cgroups (v2 `cpu.max`, v1 `cfs_quota_us`), or infinity."""
    root, membership = file_path("root", root), file_path("membership", membership)
    try:
        lines = membership.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return math.inf
    tightest = math.inf
    for line in lines:
        fields = line.split(":", 2)
        if len(fields) < 3 or "\0" in line:
            continue
        _, controllers, path = fields
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root if not controllers else root / controllers
        folder = base / path.lstrip("/")
        # In a container the path is the host's and may not exist below the mount; then the mount itself counts.
        for place in [folder, *folder.parents]:
            if not place.is_relative_to(base):
                break
            tightest = min(tightest, _read_quota(place))
    return tightest


def _read_quota(folder: Path) -> float:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if quota != "max" and float(quota) > 0 and float(period) > 0:
                return float(quota) / float(period)
        except (OSError, ValueError):
            continue
    return math.inf
