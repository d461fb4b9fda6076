"""Fetching the pinned source: it is verified, unpacked safely, and never fetched twice."""

import hashlib
import io
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

# A build backend inside the archive, so that pip's metadata hook needs no installed package.
BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    folder = pathlib.Path(directory, "llama_cpp_python-9.9.9.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: 9.9.9\\n")
    return folder.name
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def write_archive(path: Path, members: dict[str, str], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            entry = tarfile.TarInfo(f"llama_cpp_python-9.9.9/{name}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(f"llama_cpp_python-9.9.9/{name}")
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    return path


@pytest.fixture
def wheelhouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private package index, configured as a user would configure one."""
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def archive(wheelhouse: Path) -> Path:
    members = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 9.9.9\n",
        "pyproject.toml": PYPROJECT,
        "backend.py": BACKEND,
        "vendor/llama.cpp/include/llama.h": "// a header\n",
        "vendor/llama.cpp/LICENSE": "MIT\n",
        "vendor/llama.cpp/docs/long.md": "not needed\n",
        "llama_cpp/llama.py": "# not ours\n",
    }
    return write_archive(wheelhouse / "llama_cpp_python-9.9.9.tar.gz", members)


def pin_of(fetch: ModuleType, archive: Path, sha256: str | None = None) -> object:
    return fetch.Pin("abc", "llama-cpp-python", "9.9.9", sha256 or hashlib.sha256(archive.read_bytes()).hexdigest())


def test_the_pin_names_commit_archive_and_checksum(fetch: ModuleType) -> None:
    pin = fetch.read_pin()
    assert (pin.commit, pin.package, pin.version) == ("0c1e57098", "llama-cpp-python", "0.3.36")
    assert len(bytes.fromhex(pin.sha256)) == 32


def test_what_the_build_needs_is_unpacked_and_nothing_else(fetch: ModuleType, archive: Path, tmp_path: Path) -> None:
    folder = fetch.fetch(pin_of(fetch, archive), tmp_path / "source")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {".pin", "LICENSE", "include/llama.h"}


def test_a_second_call_does_not_fetch_again(fetch: ModuleType, archive: Path, tmp_path: Path) -> None:
    pin = pin_of(fetch, archive)
    fetch.fetch(pin, tmp_path / "source")
    archive.unlink()
    assert fetch.fetch(pin, tmp_path / "source") == tmp_path / "source"


def test_moving_the_pin_replaces_the_source(fetch: ModuleType, archive: Path, tmp_path: Path) -> None:
    stale = tmp_path / "source" / "stale"
    stale.parent.mkdir()
    stale.touch()
    fetch.fetch(pin_of(fetch, archive), tmp_path / "source")
    assert not stale.exists()


def test_nothing_is_unpacked_after_a_wrong_checksum(fetch: ModuleType, archive: Path, tmp_path: Path) -> None:
    with pytest.raises(fetch.FetchError, match="does not have the pinned checksum"):
        fetch.fetch(pin_of(fetch, archive, "0" * 64), tmp_path / "source")
    assert not (tmp_path / "source").exists()
    with pytest.raises(fetch.FetchError, match="instead of the pinned"):
        fetch.verify(archive, "0" * 64)


def test_the_error_for_a_missing_archive_is_one_sentence_that_says_what_to_do(
    fetch: ModuleType, wheelhouse: Path, tmp_path: Path
) -> None:
    with pytest.raises(fetch.FetchError, match="MINERVA_LLAMA_CPP_DIR") as caught:
        fetch.fetch(fetch.Pin("abc", "llama-cpp-python", "9.9.9", "0" * 64), tmp_path / "source")
    assert "\n" not in str(caught.value)


def test_an_archive_without_llama_cpp_is_refused(fetch: ModuleType, tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "other.tar.gz", {"README.md": "hello"})
    with pytest.raises(fetch.FetchError, match=r"contains no llama\.cpp source"):
        fetch.unpack(archive, tmp_path / "source")


@pytest.mark.parametrize(
    "name",
    ["vendor/llama.cpp/include/../../../../escaped.h", "../escaped.h", "vendor/llama.cpp/../escaped.h"],
)
def test_no_path_leaves_the_folder(fetch: ModuleType, tmp_path: Path, name: str) -> None:
    members = {"vendor/llama.cpp/include/llama.h": "", name: "gotcha"}
    archive = write_archive(tmp_path / "evil.tar.gz", members)
    fetch.unpack(archive, tmp_path / "a" / "b" / "source")
    assert list(tmp_path.rglob("escaped.h")) == []


def test_links_are_not_unpacked(fetch: ModuleType, tmp_path: Path) -> None:
    links = {"vendor/llama.cpp/include/link.h": str(tmp_path)}
    archive = write_archive(tmp_path / "evil.tar.gz", {"vendor/llama.cpp/include/llama.h": ""}, links)
    fetch.unpack(archive, tmp_path / "source")
    assert not (tmp_path / "source" / "include" / "link.h").is_symlink()
