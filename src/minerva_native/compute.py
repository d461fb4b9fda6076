"""The backends of a build: what computes on one kind of device each, in the module or in a file beside it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._binding import BUILD_INFO, ffi, lib, text, thrown
from .errors import BuildError, missing_library

_PREFIX = "libggml-"
_NAMES = {"vulkan": "Vulkan", "opencl": "OpenCL", "hip": "ROCm"}  # ggml's, if they are not the file's in capitals

_REMEDIES = {  # what to do about a library that is missing, by the beginning of its name
    "libvulkan": "install the Vulkan loader (Debian: libvulkan1) and the GPU's driver",
    "libcuda.": "install NVIDIA's driver",
    "libcu": "pip install 'minerva-native[cuda]'",
    "libamdhip": "install ROCm",
    "libOpenCL": "install the OpenCL loader (Debian: ocl-icd-libopencl1) and the GPU's driver",
}


@dataclass(frozen=True)
class ComputeBackend:
    """A backend of this build of llama.cpp. Not an engine that answers requests: that is a `Backend`.

    Attributes:
        name: llama.cpp's name, such as "CPU", "CUDA" or "Vulkan".
        is_loaded: whether it was loaded: its devices are those of `devices()`.
        why_not: what is wrong and what to do: why it was not loaded, or has no device, or why not the best of its
            variants was loaded; empty if nothing is.
        file: the file that it is in; None if it is part of the module.
        variant: which of several that suit different CPUs it is, such as "haswell"; empty if there is one.
    """

    name: str
    is_loaded: bool
    why_not: str = ""
    file: Path | None = None
    variant: str = ""


def load(folder: Path) -> list[ComputeBackend]:
    """Load the backends in the files of a folder, the best of several variants; return all backends, loaded or not.

    Raises `BuildError` if there is none for the CPU, without which libllama computes nothing.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"{_PREFIX}*.so")):
        files.setdefault(_kind(path), []).append(path)
    found = [_load_best(kind, paths) if len(paths) > 1 else _load(kind, paths[0]) for kind, paths in files.items()]
    by_name = {backend.name: backend for backend in found}
    for index in range(lib.ggml_backend_reg_count()):
        registered = lib.ggml_backend_reg_get(index)
        name = text(lib.ggml_backend_reg_name(registered))
        if name not in by_name or not by_name[name].is_loaded:
            found.append(_described(registered))
    # In the module it registers itself only if the loader gives it an instance.
    if "GGML_VULKAN" in BUILD_INFO["options"] and not any(backend.name == "Vulkan" for backend in found):
        found.append(ComputeBackend("Vulkan", False, "it finds no driver: install that of your GPU"))
    if lib.ggml_backend_dev_by_type(lib.GGML_BACKEND_DEVICE_TYPE_CPU) == ffi.NULL:
        why = "; ".join(backend.why_not for backend in found if backend.name == "CPU") or "there is none"
        raise BuildError(f"no backend for the CPU can be loaded ({why}): install the package again")
    return found


def _kind(path: Path) -> str:
    return path.stem.removeprefix(_PREFIX).partition("-")[0]


def _variant(path: Path) -> str:
    return path.stem.removeprefix(_PREFIX).partition("-")[2]


def _load(kind: str, path: Path) -> ComputeBackend:
    registered = lib.minerva_backend_load(os.fsencode(path))
    if registered == ffi.NULL:
        return ComputeBackend(_NAMES.get(kind, kind.upper()), False, _explained(thrown(), path), path)
    return _described(registered, path)


def _load_best(kind: str, paths: list[Path]) -> ComputeBackend:
    """Load the variant that suits this CPU best, of those that can be loaded."""
    scored, problems = [], []
    for path in paths:
        score = lib.minerva_backend_score(os.fsencode(path))
        if score == lib.MINERVA_THREW:
            problems.append(_explained(thrown(), path))
        elif score:
            scored.append((score, path))
    for _, path in sorted(scored, reverse=True):
        backend = _load(kind, path)
        if backend.is_loaded:
            why_not = "; ".join([*problems, *filter(None, [backend.why_not])])
            return ComputeBackend(backend.name, True, why_not, path, _variant(path))
        problems.append(backend.why_not)
    return ComputeBackend(_NAMES.get(kind, kind.upper()), False, "; ".join(problems) or "no file is for this CPU")


def _described(registered: Any, path: Path | None = None) -> ComputeBackend:
    name = text(lib.ggml_backend_reg_name(registered))
    has_device = name == "RPC" or lib.ggml_backend_reg_dev_count(registered)
    return ComputeBackend(name, True, "" if has_device else "it finds no device", path)


def _explained(why: str, path: Path) -> str:
    """Return why a file was not loaded, and what to do, as a sentence without a full stop."""
    library = missing_library(why)
    if not library:
        return f"{path.name}: {why.removeprefix(f'{path}: ')}"
    remedy = next((remedy for start, remedy in _REMEDIES.items() if library.startswith(start)), "install it")
    return f"{library} is missing: {remedy}"
