"""The machine and the build: what others need to know to repeat a measurement, and what makes it doubtful."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

import minerva_native as mn

# Environment variables that affect the libraries we use.
_VARIABLES = ("OMP_", "GOMP_", "KMP_", "GGML_", "LLAMA_", "CUDA_", "GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD")

# Worth a warning, in CPUs: one process that has been computing all the time. Less may be the rest of what has ended
# within the last minutes, which an average over a minute forgets slowly.
BUSY_LOAD = 1.0


def facts() -> dict[str, Any]:
    """Return what results depend on besides the model and the test, under llama-bench's names if it has them."""
    build, devices = mn.build_info(), mn.devices()
    return {
        "build_commit": build["llama_cpp"],
        "build_number": 0,  # upstream's count of commits, which its source does not contain
        "cpu_info": ", ".join(device.description for device in devices if device.type == "cpu"),
        "gpu_info": ", ".join(device.description for device in devices if device.type in ("gpu", "igpu")),
        "backends": ",".join(name for name in build["backends"] if name != "CPU") or "CPU",
        "minerva_version": mn.__version__,
        "build": build,
        "devices": [device.name for device in devices],
        "cpus": usable_cpus(),
        "cpu_quota": quota if (quota := mn.cpu_quota()) < float("inf") else None,
        "governor": governors(),
        "transparent_hugepages": _chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "load_average": load_average(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
    }


def model_facts(model: mn.Model) -> dict[str, Any]:
    """Return which model was measured: the name of its file, and the SHA-256 of everything before the weights."""
    gguf = mn.GGUF(model.path)
    header_bytes = min((tensor.offset for tensor in gguf.tensors), default=gguf.size_bytes)
    gguf.close()
    with model.path.open("rb") as file:
        header = hashlib.sha256(file.read(header_bytes)).hexdigest()
    return {
        "model_filename": str(model.path),
        "model_type": model.description,
        "model_size": model.size_bytes,
        "model_n_params": model.n_params,
        "model_file_type": model.file_type,
        "model_file_bytes": gguf.size_bytes,
        "model_header_sha256": header,
    }


def noise(n_threads: int) -> list[str]:
    """Return, as sentences, what on this machine makes times vary from run to run."""
    found = []
    load, quota, cpus = load_average(), mn.cpu_quota(), len(usable_cpus())
    if load is not None and load >= BUSY_LOAD and load + n_threads > cpus:
        found.append(f"the load was {load:.1f} in the minute before: other work may be using the CPUs")
    if n_threads > quota:
        found.append(f"the CPU quota of {quota:g} is less than {n_threads} threads need: they will be paused at times")
    if n_threads > cpus:
        found.append(f"{n_threads} threads share {cpus} CPUs: they will wait for each other")
    slower = sorted(set(governors() or []) - {"performance"})
    if slower:
        found.append(f"the CPU's frequency is governed by {', '.join(slower)!r}, not 'performance'")
    return found


def usable_cpus() -> list[int]:
    """Return the CPUs that the process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def load_average() -> float | None:
    """Return the load average over a minute, or None if the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def governors() -> list[str] | None:
    """Return the distinct frequency governors of the CPUs, or None if the system does not say."""
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return sorted({file.read_text().strip() for file in files}) or None


def _chosen(file: Path) -> str | None:
    """Return the word in brackets, which is how the kernel marks the setting in force."""
    try:
        return file.read_text().partition("[")[2].partition("]")[0] or None
    except OSError:
        return None
