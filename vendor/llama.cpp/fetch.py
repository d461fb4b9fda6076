"""Fetch the pinned llama.cpp source through pip, verify it, and unpack what the build and the tests need.

`python vendor/llama.cpp/fetch.py` prints the folder that holds the source. A folder that already holds the pinned
source is left unchanged, so only the first build uses the package index.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

HERE = Path(__file__).resolve().parent

# What the build, the comparison tools and the tests need. The rest of the archive is never written to disk.
KEPT = (
    "CMakeLists.txt",
    "LICENSE",
    "cmake",
    "common",
    "ggml",
    "include",
    "licenses",
    "models",
    "src",
    "tools/batched-bench",
    "tools/llama-bench",
    "tools/perplexity",
    "vendor",
)


class Pin(NamedTuple):
    """Which llama.cpp this project is built on, and the published archive that contains it.

    Attributes:
        commit: the upstream commit.
        package: the name of the source distribution.
        version: its version.
        sha256: its checksum.
    """

    commit: str
    package: str
    version: str
    sha256: str


class FetchError(Exception):
    """The pinned source is not available; the message is one sentence for whoever runs the build."""


def read_pin(path: Path = HERE / "pin.json") -> Pin:
    """Read the pin."""
    return Pin(**json.loads(path.read_text()))


def fetch(pin: Pin, destination: Path) -> Path:
    """Put the pinned source into `destination`, unless it is already there; return `destination`."""
    stamp = destination / ".pin"
    wanted = json.dumps([*pin, KEPT])
    if stamp.is_file() and stamp.read_text() == wanted:
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".fetch-") as scratch:
        archive = download(pin, Path(scratch))
        verify(archive, pin.sha256)
        unpacked = Path(scratch, "source")
        unpack(archive, unpacked)
        (unpacked / ".pin").write_text(wanted)
        shutil.rmtree(destination, ignore_errors=True)
        os.replace(unpacked, destination)
    return destination


def download(pin: Pin, folder: Path) -> Path:
    """Download the archive with pip, from whatever index, mirror or wheelhouse the user has configured."""
    # pip runs code of the archive to get its metadata, so give pip the hash too: nothing unverified is executed.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n")
    options = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--require-hashes", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return next(folder.glob("*.tar.gz"))
    if "DO NOT MATCH THE HASHES" in result.stderr:
        raise FetchError(
            f"The archive of {pin.package} {pin.version} that your package index serves does not have the pinned "
            f"checksum sha256:{pin.sha256}, so it was not used: check which index or mirror pip is configured for."
        )
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")] or [result.stderr.strip()]
    raise FetchError(
        f"pip could not download {pin.package} {pin.version}, the archive that contains the llama.cpp source "
        f"({errors[-1].removeprefix('ERROR: ')}): check the network and pip's index settings, or build a llama.cpp "
        "checkout of your own with -DMINERVA_LLAMA_CPP_DIR=/path/to/llama.cpp."
    )


def verify(archive: Path, sha256: str) -> None:
    """Refuse an archive whose checksum is not the pinned one."""
    with archive.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise FetchError(
            f"{archive.name} has checksum sha256:{digest.hexdigest()} instead of the pinned sha256:{sha256}, "
            "so it was not used: check which index or mirror pip is configured for."
        )


def unpack(archive: Path, destination: Path) -> None:
    """Write the files of the archive's `vendor/llama.cpp` that are in `KEPT` to `destination`, and none outside it."""
    kept = {PurePosixPath(name) for name in KEPT}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(*PurePosixPath(member.name).parts[3:])
            inside = PurePosixPath(member.name).parts[1:3] == ("vendor", "llama.cpp") and ".." not in path.parts
            if not (inside and member.isfile() and kept & {path, *path.parents}):
                continue
            target = destination / path
            target.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None  # it is None only for other than regular files
            with content, target.open("wb") as file:
                shutil.copyfileobj(content, file)
    if not (destination / "include" / "llama.h").is_file():
        raise FetchError(
            f"{archive.name} contains no llama.cpp source: vendor/llama.cpp/pin.json names the wrong archive; "
            "see vendor/llama.cpp/README.md on how to move the pin."
        )


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("destination", nargs="?", type=Path, default=HERE / "source")
    arguments = parser.parse_args()
    try:
        print(fetch(read_pin(), arguments.destination))
    except (FetchError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
