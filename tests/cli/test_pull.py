"""`minerva pull` against a stand-in of the hub on the loopback interface."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import minerva_native as mn
from minerva_native.cli import pull

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "owner/tiny-GGUF"
TOKEN = "hf_secretsecretsecret"

DEMO = mn.DEMO_PATH.read_bytes()


@dataclass
class Repository:
    """What the stand-in has, and what it was asked.

    Attributes:
        files: by name.
        cut_after: so many bytes into a download the connection ends, this many times.
        is_broken: answer each download with an error.
        checksums: what to name instead of the right one.
        requests: what was asked, as (method, path, Range).
        n_sent: bytes of files that were sent.
    """

    files: dict[str, bytes]
    cut_after: int = 0
    n_cuts: int = 0
    is_broken: bool = False
    checksums: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    n_sent: int = 0

    def downloads(self) -> list[str | None]:
        return [
            content_range for method, path, content_range in self.requests if method == "GET" and "/resolve/" in path
        ]


class Handler(BaseHTTPRequestHandler):
    repository: Repository

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(has_body=False)

    def do_GET(self) -> None:
        self.answer(has_body=True)

    def answer(self, has_body: bool) -> None:
        repository = self.repository
        repository.requests.append((self.command, self.path, self.headers.get("Range")))
        resolve = f"/{REPO}/resolve/main/"
        path = self.path.partition("?")[0]
        name = path.removeprefix(resolve)
        if path == f"/api/models/{REPO}/revision/main" and "blobs=" in self.path:
            files = [
                {
                    "rfilename": name,
                    "size": len(content),
                    "lfs": {"sha256": self.checksum(name), "size": len(content), "pointerSize": 130},
                }
                for name, content in repository.files.items()
            ]
            listed = {"id": REPO, "sha": COMMIT, "siblings": files}
            self.send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"}, has_body)
        elif path.startswith(resolve) and name in repository.files:
            self.send_file(name, has_body)
        else:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, has_body)

    def checksum(self, name: str) -> str:
        right = hashlib.sha256(self.repository.files[name]).hexdigest()
        return self.repository.checksums.get(name, right)

    def send_file(self, name: str, has_body: bool) -> None:
        repository, content, status = self.repository, self.repository.files[name], 200
        size = len(content)
        headers = {"ETag": '"other"', "X-Linked-ETag": f'"{self.checksum(name)}"', "X-Repo-Commit": COMMIT}
        headers |= {"X-Linked-Size": str(size), "Accept-Ranges": "bytes"}
        if has_body and repository.is_broken:
            self.send(500, b"", {}, has_body)
            return
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            content, status = content[start:], 206
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        if has_body and repository.n_cuts:
            repository.n_cuts -= 1
            self.send(status, content, headers, has_body, cut_after=repository.cut_after)
        else:
            self.send(status, content, headers, has_body)

    def send(
        self, status: int, content: bytes, headers: dict[str, str], has_body: bool, cut_after: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if has_body:
            self.wfile.write(content[:cut_after])
            if "/resolve/" in self.path:
                self.repository.n_sent += len(content[:cut_after])
        self.close_connection = True


class HubStandIn:
    """A repository and the commands that see no other hub."""

    def __init__(self, folder: Path, repository: Repository):
        self.folder, self.repository = folder, repository
        handler = type("Handler", (Handler,), {"repository": repository})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def pull(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        return subprocess.run(
            [sys.executable, "-m", "minerva_native", "pull", *arguments],
            env={
                **inherited,
                "HF_ENDPOINT": self.address,
                "HF_HOME": str(self.folder),
                "HF_TOKEN": TOKEN,
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_XET": "1",
                **environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    @property
    def cached(self) -> list[str]:
        """Names of what the cache has, with its blobs."""
        return [path.name for path in self.folder.rglob("*") if path.is_file() and ".locks" not in path.parts]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    stand_in = HubStandIn(tmp_path / "hub", Repository({"README.md": b"# Tiny", "tiny-Q8_0.gguf": DEMO}))
    yield stand_in
    stand_in.close()


def fails(result: subprocess.CompletedProcess[str], words: str) -> bool:
    assert result.returncode == 1, result
    assert result.stdout == ""
    assert result.stderr.startswith("minerva: error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    return True


def test_the_one_gguf_file_is_fetched_and_its_path_printed(hub: HubStandIn) -> None:
    result = hub.pull(REPO)
    assert result.returncode == 0, result
    path = Path(result.stdout.removesuffix("\n"))
    assert path.name == "tiny-Q8_0.gguf"
    assert path.is_relative_to(hub.folder)
    assert path.read_bytes() == DEMO
    assert result.stderr == ""
    assert len(hub.repository.downloads()) == 1
    shown = subprocess.check_output([sys.executable, "-m", "minerva_native", "tokenize", "-m", path, "-p", "a"])
    assert shown


def test_json_names_the_files_and_their_size(hub: HubStandIn) -> None:
    answer = json.loads(hub.pull(REPO, "--json").stdout)
    assert answer["repo"] == REPO
    assert answer["files"] == [answer["path"]]
    assert answer["size_bytes"] == len(DEMO)


def test_what_is_cached_is_not_fetched_again_and_needs_no_network(hub: HubStandIn) -> None:
    first = hub.pull(REPO).stdout
    assert hub.pull(REPO).stdout == first
    assert len(hub.repository.downloads()) == 1
    n_requests = len(hub.repository.requests)
    offline = hub.pull(f"{REPO}:Q8_0", HF_HUB_OFFLINE="1")
    assert (offline.stdout, offline.stderr) == (first, "")
    assert len(hub.repository.requests) == n_requests
    hub.close()
    unreachable = hub.pull(REPO)
    assert unreachable.stdout == first
    assert "cannot be reached" in unreachable.stderr
    assert "this is what the cache has" in unreachable.stderr
    assert fails(hub.pull("owner/other"), "cannot be reached")


def test_offline_without_the_file_is_an_error(hub: HubStandIn) -> None:
    assert fails(
        hub.pull(REPO, HF_HUB_OFFLINE="1"), "no GGUF file in owner/tiny-GGUF in the cache (HF_HUB_OFFLINE is set)"
    )
    assert not hub.repository.requests


def test_a_download_goes_on_after_a_cut_connection(hub: HubStandIn) -> None:
    content = DEMO + bytes(15 << 20)
    hub.repository.files["tiny-Q8_0.gguf"] = content
    hub.repository.cut_after, hub.repository.n_cuts = 11 << 20, 1
    result = hub.pull(REPO)
    assert result.returncode == 0, result
    assert Path(result.stdout.removesuffix("\n")).read_bytes() == content
    first, second = hub.repository.downloads()
    assert first is None
    assert second == f"bytes={10 << 20}-"  # what huggingface_hub writes at a time


def test_a_later_call_goes_on_where_an_earlier_one_ended(hub: HubStandIn) -> None:
    name = hashlib.sha256(DEMO).hexdigest()
    blobs = hub.folder / "hub" / f"models--{REPO.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{name}.incomplete").write_bytes(DEMO[:500_000])
    hub.repository.is_broken = True
    assert fails(hub.pull(REPO), "answers 500 for owner/tiny-GGUF")
    assert (blobs / f"{name}.incomplete").stat().st_size == 500_000
    hub.repository.is_broken = False
    hub.repository.requests.clear()
    result = hub.pull(REPO)
    assert Path(result.stdout.removesuffix("\n")).read_bytes() == DEMO
    assert hub.repository.downloads() == ["bytes=500000-"]


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(hub: HubStandIn) -> None:
    hub.repository.checksums["tiny-Q8_0.gguf"] = "a" * 64
    assert fails(hub.pull(REPO), "tiny-Q8_0.gguf is damaged: its checksum is")
    assert not hub.cached


def test_a_damaged_beginning_is_found(hub: HubStandIn) -> None:
    name = hashlib.sha256(DEMO).hexdigest()
    blobs = hub.folder / "hub" / f"models--{REPO.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{name}.incomplete").write_bytes(b"x" * 500_000)
    assert fails(hub.pull(REPO), "is damaged")
    assert hub.pull(REPO).returncode == 0


def test_a_git_object_has_a_checksum_too(hub: HubStandIn) -> None:
    right = hashlib.sha1(b"blob %d\0" % len(DEMO) + DEMO).hexdigest()
    hub.repository.checksums["tiny-Q8_0.gguf"] = right
    assert hub.pull(REPO).returncode == 0


@pytest.mark.parametrize("checksum", ["../../../../outside", "weak", ""])
def test_without_a_checksum_nothing_is_fetched(hub: HubStandIn, checksum: str) -> None:
    hub.repository.checksums["tiny-Q8_0.gguf"] = checksum
    assert fails(hub.pull(REPO), "names no checksum for tiny-Q8_0.gguf")
    assert not hub.repository.downloads()


def test_what_is_no_gguf_file_is_an_error(hub: HubStandIn) -> None:
    hub.repository.files["tiny-Q8_0.gguf"] = b"<html>"
    assert fails(hub.pull(REPO), "is not a GGUF file, whatever its name says")


def test_a_repository_that_is_not_there_is_an_error(hub: HubStandIn) -> None:
    result = hub.pull("owner/none")
    assert fails(result, "has no repository owner/none, or it is private")
    assert TOKEN not in result.stderr


def test_several_files_are_listed_with_their_sizes(hub: HubStandIn) -> None:
    hub.repository.files["tiny-Q4_K_M.gguf"] = DEMO
    assert fails(hub.pull(REPO), "several GGUF files in owner/tiny-GGUF: ask for one of tiny-Q4_K_M.gguf (1.")
    assert Path(hub.pull(f"{REPO}:q4_k_m").stdout).stem == "tiny-Q4_K_M"
    assert Path(hub.pull(f"{REPO}:tiny-Q8_0.gguf").stdout).stem == "tiny-Q8_0"
    none = hub.pull(f"{REPO}:Q4")
    assert fails(none, "there is no file or quantisation 'Q4' in owner/tiny-GGUF: it has tiny-Q4_K_M")
    assert fails(hub.pull(f"{REPO}:none.gguf"), "there is no file or quantisation 'none.gguf'")


def test_all_parts_of_a_split_model_are_fetched(hub: HubStandIn) -> None:
    parts = {f"big/m-Q4_0-0000{number}-of-00003.gguf": DEMO + bytes([number]) for number in (1, 2, 3)}
    hub.repository.files = {**parts, "other-Q8_0.gguf": DEMO}
    answer = json.loads(hub.pull(f"{REPO}:Q4_0", "--json").stdout)
    assert [Path(path).read_bytes() for path in answer["files"]] == list(parts.values())
    assert answer["path"] == answer["files"][0]
    assert len(hub.repository.downloads()) == 3
    assert hub.pull(f"{REPO}:big/m-Q4_0-00002-of-00003.gguf", HF_HUB_OFFLINE="1").stdout == answer["path"] + "\n"
    del hub.repository.files["big/m-Q4_0-00002-of-00003.gguf"]
    assert fails(hub.pull(f"{REPO}:Q4_0"), "has 2 of the 3 parts of big/m-Q4_0")


@pytest.mark.parametrize(
    "source", ["tiny", "a/b/c", "../x", "owner/..", f"{REPO}:../x.gguf", f"{REPO}:/x.gguf", f"{REPO}:a//b", "a b/c", ""]
)
def test_names_that_lead_elsewhere_are_refused(source: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        pull.source(source)


def test_a_wrong_name_is_wrong_usage(hub: HubStandIn) -> None:
    result = hub.pull(f"{REPO}:../x.gguf")
    assert result.returncode == 2
    assert "(see minerva pull --help)" in result.stderr
    assert not hub.repository.requests


def test_names_of_the_hub_that_lead_elsewhere_are_left_out(hub: HubStandIn) -> None:
    hub.repository.files = {"../../evil.gguf": DEMO, "/evil.gguf": DEMO, "a\x1b[2J.gguf": DEMO}
    assert fails(hub.pull(REPO), "there is no GGUF file in owner/tiny-GGUF")


def test_the_cache_can_be_elsewhere(hub: HubStandIn, tmp_path: Path) -> None:
    path = Path(hub.pull(REPO, "--cache-dir", str(tmp_path / "mine")).stdout)
    assert path.is_relative_to(tmp_path / "mine")


def test_the_token_is_never_printed(hub: HubStandIn) -> None:
    hub.repository.is_broken = True
    for arguments in ((REPO,), (REPO, "-v"), ("owner/none", "-v")):
        result = hub.pull(*arguments)
        assert TOKEN not in result.stdout + result.stderr


def test_without_huggingface_hub_the_extra_is_named() -> None:
    code = "import sys; sys.modules['huggingface_hub'] = None\nfrom minerva_native.cli import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code, "pull", REPO], capture_output=True, text=True, timeout=60)
    assert fails(result, "pip install 'minerva-native[pull]'")


def test_a_quantisation_is_a_word_of_the_name() -> None:
    files = [pull.File(name, 1) for name in ("m-Q4_K_M.gguf", "m-IQ4_XS.gguf", "m.f16.gguf", "Q8_0/m.gguf")]
    for wanted, name in (("q4_k_m", files[0]), ("IQ4_XS", files[1]), ("F16", files[2]), ("Q8_0", files[3])):
        assert pull.choice_of(files, wanted, "here") == [name]
    with pytest.raises(ValueError, match="several"):
        pull.choice_of(files, "m", "here")
