"""Fetch a model from a hub, such as Hugging Face's, and print its path."""

import argparse
import fcntl
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urlsplit

import minerva_native as mn

from .messages import as_json, printable, warn
from .options import add_json
from .progress import Bar

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_REPO = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")
_SHA_1, _SHA_256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")
_MAGIC = b"GGUF"
_BLOCK_BYTES = 1 << 20
_REVISION = "main"
_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class File:
    """A file in a repository.

    Attributes:
        name: its path there.
        size_bytes: its size.
    """

    name: str
    size_bytes: int


Choice = list[File]
"""A model: one file, or all parts of one that is split."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    what = "the repository, and which of its GGUF files: its name or a quantisation, such as owner/model-GGUF:Q4_K_M"
    parser.add_argument("source", type=source, metavar="REPO[:FILE]", help=what)
    cache = "where to keep it (default: the cache of huggingface_hub, which HF_HOME and HF_HUB_CACHE name)"
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help=cache)
    add_json(parser)


def source(text: str) -> tuple[str, str]:
    """Parse what to fetch. Names that lead out of a folder are refused."""
    repo, _, name = text.partition(":")
    if not _REPO.fullmatch(repo) or not is_inside(repo):
        raise argparse.ArgumentTypeError(f"{repo!r} is not the name of a repository, as owner/name is")
    if name and not is_inside(name):
        raise argparse.ArgumentTypeError(f"{name!r} is not the name of a file in a repository")
    return repo, name


def is_inside(name: str) -> bool:
    """Return whether a name is that of a file in the folder, or in one below it."""
    parts = name.split("/")
    return "\\" not in name and name.isprintable() and not any(part in ("", ".", "..") for part in parts)


def run(options: argparse.Namespace) -> int:
    """Fetch all files of a model, and print the path of the first."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise mn.MinervaError("huggingface_hub is not installed: pip install 'minerva-native[pull]'")
    repo, wanted = options.source
    hub = Hub(repo, options.cache_dir)
    choice, is_known = hub.choose(wanted)
    paths = []
    for number, file in enumerate(choice, 1):
        label = "Downloading" if len(choice) == 1 else f"Downloading {number} of {len(choice)}"
        paths.append(hub.fetch(file, Bar(label, options.quiet)) if is_known else hub.cached(file.name))
    for path in paths:
        check_magic(path)
    if options.json:
        sizes = [path.stat().st_size for path in paths]
        files = [str(path) for path in paths]
        print(as_json({"repo": repo, "path": files[0], "files": files, "size_bytes": sum(sizes)}))
    else:
        print(printable(str(paths[0])))
    return 0


class Hub:
    """A repository on a hub, and what the cache has of it.

    Args:
        repo: its name.
        cache_dir: the cache; None for that of huggingface_hub.
    """

    def __init__(self, repo: str, cache_dir: Path | None):
        from huggingface_hub import constants
        from huggingface_hub.utils.logging import set_verbosity_error
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        set_verbosity_error()  # type: ignore[no-untyped-call]  # its warnings name signed addresses
        self._repo = repo
        self._cache_dir = Path(constants.HF_HUB_CACHE) if cache_dir is None else cache_dir
        self._folder = self._cache_dir / f"models--{repo.replace('/', '--')}"
        self._endpoint, self._is_offline = constants.ENDPOINT, constants.HF_HUB_OFFLINE

    def choose(self, wanted: str) -> tuple[Choice, bool]:
        """Return the files of a model, and whether the hub has named them, not the cache."""
        if self._is_offline:
            return choice_of(self._cached_files(), wanted, f"{self._repo} in the cache (HF_HUB_OFFLINE is set)"), False
        try:
            with self._errors():
                return choice_of(self._files(), wanted, self._repo), True
        except ConnectionError as error:
            files = self._cached_files()
            try:
                choice = choice_of(files, wanted, self._repo)
            except ValueError:
                raise error from None
            warn(f"{error}: this is what the cache has")
            return choice, False

    def _files(self) -> list[File]:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint)
        model = api.model_info(self._repo, revision=_REVISION, files_metadata=True, timeout=_TIMEOUT_SECONDS)
        files = [File(file.rfilename, file.size or 0) for file in model.siblings or ()]
        return [file for file in files if is_inside(file.name)]

    def _cached_files(self) -> list[File]:
        try:
            commit = (self._folder / "refs" / _REVISION).read_text()
        except FileNotFoundError:
            return []
        snapshot = self._folder / "snapshots" / commit
        return [
            File(path.relative_to(snapshot).as_posix(), path.stat().st_size)
            for path in sorted(snapshot.rglob("*.gguf"))
            if path.is_file()
        ]

    def cached(self, name: str) -> Path:
        """Return the path of a file that the cache has."""
        return self._folder / "snapshots" / (self._folder / "refs" / _REVISION).read_text() / name

    def fetch(self, file: File, bar: Bar) -> Path:
        """Return the path of a file, which is fetched unless the cache has it; what an earlier call has left is used.

        A file enters the cache once its checksum is that which the hub names.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        with self._errors():
            headers = build_hf_headers(library_name="minerva-native", library_version=mn.__version__)
            url = hf_hub_url(self._repo, file.name, revision=_REVISION, endpoint=self._endpoint)
            facts = get_hf_file_metadata(url, headers=headers, endpoint=self._endpoint)
            checksum, commit = facts.etag or "", facts.commit_hash or ""
            if not (_SHA_256.fullmatch(checksum) or _SHA_1.fullmatch(checksum)) or not _SHA_1.fullmatch(commit):
                raise ValueError(
                    f"{urlsplit(self._endpoint).netloc} names no checksum for {file.name}: it is not fetched"
                )
            blob = self._folder / "blobs" / checksum
            if not blob.exists():
                if urlsplit(facts.location).netloc != urlsplit(url).netloc:
                    headers.pop("authorization", None)  # it is for the hub alone
                blob.parent.mkdir(parents=True, exist_ok=True)
                download(facts.location, headers, blob, file, facts.size or file.size_bytes, bar)
            path = hf_hub_download(
                self._repo, file.name, revision=_REVISION, cache_dir=self._cache_dir, endpoint=self._endpoint
            )
        return Path(path)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Say what is wrong in terms of what was asked. The libraries for HTTP have errors of their own."""
        from huggingface_hub import errors

        host = urlsplit(self._endpoint).netloc
        try:
            yield
        except errors.GatedRepoError:
            raise ValueError(f"{self._repo} is gated: ask for access on {host}, then hf auth login") from None
        except errors.RepositoryNotFoundError:
            raise ValueError(
                f"{host} has no repository {self._repo}, or it is private and you are not logged in (hf auth login)"
            ) from None
        except errors.HfHubHTTPError as error:
            raise ConnectionError(f"{host} answers {error.response.status_code} for {self._repo}") from None
        except (mn.MinervaError, ValueError, OSError):
            raise
        except Exception as error:
            raise ConnectionError(f"{host} cannot be reached ({type(error).__name__}: {error})") from None


def choice_of(files: Iterable[File], wanted: str, where: str) -> Choice:
    """Return the files of the model that is meant.

    Args:
        files: all that there are.
        wanted: the name of a file, a quantisation, or nothing if there is but one model.
        where: what has the files, for messages.

    Raises:
        ValueError: none is meant, or several are; the message lists them.
    """
    models: dict[str, Choice] = {}
    for file in sorted(files, key=lambda file: file.name):
        if file.name.endswith(".gguf"):
            part = _SPLIT.fullmatch(file.name)
            models.setdefault(f"{part[1]} {part[3]}" if part else file.name, []).append(file)
    if not models:
        raise ValueError(f"there is no GGUF file in {where}")
    meant = list(models.values())
    if wanted:
        meant = [parts for parts in meant if any(file.name == wanted for file in parts)]
        if not meant:
            quantisation = re.compile(rf"(^|[-._/]){re.escape(wanted)}([-./]|$)", re.IGNORECASE)
            meant = [parts for parts in models.values() if quantisation.search(parts[0].name)]
    if len(meant) == 1:
        return _all_parts(meant[0], where)
    several = f"there are several GGUF files in {where}: ask for one of"
    problem = several if meant else f"there is no file or quantisation {wanted!r} in {where}: it has"
    raise ValueError(f"{problem} {'; '.join(map(_described, meant or models.values()))}")


def _all_parts(parts: Choice, where: str) -> Choice:
    split = _SPLIT.fullmatch(parts[0].name)
    if split is not None and [file.name for file in parts] != [
        f"{split[1]}-{number:05}-of-{split[3]}.gguf" for number in range(1, int(split[3]) + 1)
    ]:
        raise ValueError(f"{where} has {len(parts)} of the {int(split[3])} parts of {split[1]}")
    return parts


def _described(parts: Choice) -> str:
    size = sum(file.size_bytes for file in parts)
    unit, scale = ("GB", 1e9) if size >= 1e9 else ("MB", 1e6)
    count = f", {len(parts)} parts" if len(parts) > 1 else ""
    return f"{parts[0].name} ({size / scale:,.1f} {unit}{count})"


class _Counted:
    """A file that shows on a progress bar how much of it is there."""

    def __init__(self, file: BinaryIO, bar: Bar, size: int):
        self._file, self._bar, self._size = file, bar, size
        self.seek, self.tell, self.truncate = file.seek, file.tell, file.truncate

    def write(self, data: bytes) -> int:
        """Write, and move the bar."""
        n = self._file.write(data)
        self._bar.update(self._file.tell(), self._size)
        return n


def download(url: str, headers: dict[str, str], blob: Path, file: File, size: int, bar: Bar) -> None:
    """Fetch a blob, going on with what there is of it, and check it.

    Args:
        url: where it is.
        headers: of the request.
        blob: where it goes; the name is its checksum, a SHA-256, or the SHA-1 of a Git object.
        file: what it is.
        size: its size in bytes.
        bar: shows the progress.

    Raises:
        ValueError: it is not what the checksum says, and is removed.
        BlockingIOError: another process fetches it.
    """
    from huggingface_hub.file_download import http_get

    partial = blob.with_name(f"{blob.name}.incomplete")
    with partial.open("ab") as output:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process downloads {file.name} already") from None
        if output.tell() > size:
            output.truncate(0)
        try:
            counted = cast("BinaryIO", _Counted(output, bar, size))
            if output.tell() < size or not size:
                http_get(url, counted, resume_size=output.tell(), headers=headers)
        finally:
            bar.close()
        output.flush()
        if (found := _checksum(partial, blob.name)) != blob.name:
            partial.unlink()
            raise ValueError(
                f"{file.name} is damaged: its checksum is {found}, not {blob.name}. It is removed: try again"
            )
        os.replace(partial, blob)


def _checksum(path: Path, like: str) -> str:
    """Return the checksum of a file, of the kind that another one is."""
    digest = hashlib.sha256()
    if len(like) == 40:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def check_magic(path: Path) -> None:
    """Raise `ModelLoadError` if a file is not a GGUF file."""
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise mn.ModelLoadError(f"{path} is not a GGUF file, whatever its name says")
