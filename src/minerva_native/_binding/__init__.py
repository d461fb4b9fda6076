"""The raw layer: `lib` holds libllama's C functions and constants, `ffi` makes and reads C data (see cffi)."""

from pathlib import Path
from typing import Any

from minerva_native.errors import BuildError, missing_library

try:
    from ._build_info import BUILD_INFO
    from ._llama import __file__ as module
    from ._llama import ffi, lib
except ImportError as error:
    remedy = "install the package again"
    if library := missing_library(str(error)):
        remedy = f"install what has {library}, such as your GPU's driver, or a build without that GPU"
    raise BuildError(f"the compiled binding cannot be loaded ({error}): {remedy}") from error

from . import callbacks

FOLDER = Path(module).parent
"""The folder of the compiled module, and of the backends that are files of their own."""

__all__ = ["BUILD_INFO", "FOLDER", "callbacks", "ffi", "is_lost", "lib", "text", "thrown"]


def text(pointer: Any) -> str:
    """Copy a NUL-terminated C string; bytes that are not UTF-8 become U+FFFD."""
    return ffi.string(pointer).decode(errors="replace")


def thrown() -> str:
    """Return what the last guarded call on this thread threw (see hooks.h), or an empty string."""
    callbacks.end_at_exit()
    return text(lib.minerva_thrown()) if lib.minerva_thrown_cause() != lib.MINERVA_NOTHING else ""


def is_lost() -> bool:
    """Return whether the last guarded call on this thread has failed because an RPC worker was lost."""
    return lib.minerva_thrown_cause() == lib.MINERVA_LOST
