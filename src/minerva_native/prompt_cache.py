"""The prompt cache on disk: what was evaluated of a prompt is read back by the next process.

If the memory can give the state of any part of a sequence, a prefix is kept in pieces of 256 tokens, and a tail. The
name of a piece is a digest of the model, the context's form, and all tokens up to its end, so that prompts with a
common beginning share its pieces, and a chat that grows writes only what is new. What cannot be cut (recurrent states,
small windows) is kept as a whole, a snapshot with its checkpoints.

Files are written by one thread in the background, beside their name and then renamed. Any number of processes may use
one directory: a file that is gone is no error, and what cannot be verified is skipped.
"""

import errno
import json
import logging
import os
import re
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from ._arguments import file_path, integer
from .context import Context, cache_of
from .devices import build_info, physical_memory_bytes
from .engine import state
from .engine.cache import Payload
from .engine.slot import Slot, common_prefix
from .errors import ContextFullError, MinervaError, SequencesInUseError, StateError
from .sequence import Sequence, slot_of
from .tokenizer import TokenIds

_logger = logging.getLogger("minerva_native")

Ids = npt.NDArray[np.int32]

MAX_BYTES = 4 << 30
"""How large the cache becomes by default."""

_PIECE = 256  # tokens
_LEAST = 16  # tokens that are worth a file of their own, or reading one
_LEAST_SHARE = 1 / 16  # of a prefix that is kept as a whole has to be new for it to be written again

_NAME = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})-([0-9]{1,10})\.prompt")
_DRAFT = re.compile(r"\.[0-9a-f]{16}\.part")
_STALE_SECONDS = 3600  # a draft that nobody has written to for so long was left by a process that was killed

_CHUNK_BYTES = 1 << 20
_REST = 100  # times as long as a chunk took, while tokens are generated: 1% of one core
_MOST_REST_SECONDS = 1.0
_DECODING_SECONDS = 1.0  # after a call of libllama's it may be that another follows
_MOST_WAITING_BYTES = 1 << 30
_CLOSE_SECONDS = 10.0


class CachedPrompt(NamedTuple):
    """A file of the cache.

    Attributes:
        path: the file.
        size_bytes: its size.
        used: when it was last used, in seconds since 1970.
        model: the file name of the model.
        start: the position of its first token.
        n_tokens: how many tokens it has.
    """

    path: Path
    size_bytes: int
    used: float
    model: str
    start: int
    n_tokens: int


class _File(NamedTuple):
    name: str
    size_bytes: int
    used_ns: int

    @property
    def age(self) -> tuple[int, int]:
        """What to sort by, so that what is evicted first comes first: of one prompt, the end before the beginning."""
        return self.used_ns, -int(self.name[66:-7])


class PromptFiles:
    """A directory that holds prompts, for who looks after it. Files that are not the cache's own are left alone.

    Args:
        directory: by default `minerva-native/prompts` in `$XDG_CACHE_HOME`, or else in `~/.cache`.

    Attributes:
        directory: the same, as a path.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None):
        if directory is None:
            base = os.environ.get("XDG_CACHE_HOME", "")
            cache = Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()
            self.directory = cache / "minerva-native" / "prompts"
        else:
            self.directory = file_path("directory", directory)

    def prompts(self) -> list[CachedPrompt]:
        """Return what there is, the last used first; what cannot be read is left out, with a warning."""
        found = []
        for file in sorted(self.files(), key=lambda file: file.age, reverse=True):
            path = self.directory / file.name
            try:
                with opened(path) as content:
                    header, tokens = state.peeked(path, content)
            except FileNotFoundError:
                continue
            except (StateError, OSError) as error:
                _logger.warning("%s; it is left out", error)
                continue
            model, start = str(header.get("model", "")), header.get("start", 0)
            start = start if isinstance(start, int) else 0
            found.append(CachedPrompt(path, file.size_bytes, file.used_ns / 1e9, model, start, len(tokens)))
        return found

    @property
    def size_bytes(self) -> int:
        """How many bytes the files take."""
        return sum(file.size_bytes for file in self.files())

    def clear(self) -> int:
        """Remove all prompts; return how many files those were."""
        for draft in self.drafts():
            self.remove(draft)
        return sum(self.remove(file.name) for file in self.files())

    def names(self) -> list[str]:
        """Return the names of everything in the directory; none if it is not there."""
        try:
            return os.listdir(self.directory)
        except FileNotFoundError:
            return []

    def files(self) -> list[_File]:
        """Return the files of the cache, unread."""
        found = []
        for name in self.names():
            if _NAME.fullmatch(name):
                with suppress(FileNotFoundError):
                    status = os.lstat(self.directory / name)
                    found.append(_File(name, status.st_size, status.st_mtime_ns))
        return found

    def drafts(self, older_than: float = 0.0) -> list[str]:
        """Return the names of files that are not written to the end, and were not touched for some seconds."""
        found = []
        for name in self.names():
            if _DRAFT.fullmatch(name):
                with suppress(FileNotFoundError):
                    if time.time() - os.lstat(self.directory / name).st_mtime >= older_than:
                        found.append(name)
        return found

    def remove(self, name: str) -> bool:
        """Remove a file; return False if another process was faster."""
        try:
            os.unlink(self.directory / name)
        except FileNotFoundError:
            return False
        return True

    def evict(self, max_bytes: int) -> int:
        """Remove files until the others take no more than so many bytes, least recently used first.

        Return how many bytes those take.
        """
        files = sorted(self.files(), key=lambda file: file.age)
        total = sum(file.size_bytes for file in files)
        for file in files:
            if total <= max_bytes:
                break
            self.remove(file.name)
            total -= file.size_bytes
        for draft in self.drafts(_STALE_SECONDS):
            self.remove(draft)
        return total


class _Job(NamedTuple):
    """A file to write."""

    name: str
    parent: str
    tokens: Ids
    parts: list[bytes | memoryview]
    size_bytes: int
    used_ns: int


class PromptCache:
    """Keeps the prompts of a context in a directory. Safe to use from any thread.

    Nothing that happens to the files is an error of a request: it is logged, and the prompt is evaluated.

    Args:
        directory: where to keep the files; created with mode 0700 if it does not exist.
        context: what evaluates; it needs a `prefix_cache`.
        max_bytes: how large the files may become together; those not used for longest are removed.

    Raises:
        OSError: the directory cannot be made.
        ValueError: the context has no prefix cache.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, context: Context, max_bytes: int = MAX_BYTES):
        self.max_bytes = integer("max_bytes", max_bytes, 0)
        if not context.options.prefix_cache:
            raise ValueError("a prompt cache on disk needs a context with prefix_cache=True")
        self.files = PromptFiles(directory)
        self._make_directory()
        self._context, self._cache = context, cache_of(context)
        self._name = context.model.path.name
        window = context.memory.window
        self._piece = min(_PIECE, max(1, window // 2)) if window else _PIECE  # a window leaves nothing of it out
        self._bad: set[str] = set()  # files that were skipped: they may be replaced
        self._foreign: set[str] = set()
        self._most_waiting = min(_MOST_WAITING_BYTES, physical_memory_bytes() // 8)
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._waiting: dict[str, int] = {}  # the names of jobs, and their sizes
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        self._process = os.getpid()
        self._is_closed = self._is_abandoned = self._has_warned = False
        self._n_calls, self._called_at = 0, 0.0
        self._size_bytes: int | None = None  # of all files, when they were last looked at
        self._written_bytes = 0  # since then
        build = build_info()
        self._engine = {
            "engine": [build["llama_cpp_source"], build["llama_cpp"]],
            "flash_attention": context.options.flash_attention,
            "piece": self._piece,
        }

    # Reading

    def load(self, ids: TokenIds) -> int:
        """Bring what the directory has of the longest prefix of some tokens into the context.

        It is there like what a closed sequence has left: the next `extend` or `assign` finds it.

        Returns:
            How many more tokens need no evaluation.

        Raises:
            ContextFullError, SequencesInUseError: there is no room beside what is open.
        """
        wanted, cache = np.array(ids, np.int32), self._cache
        try:
            with cache.gate.enter(), cache.handle:
                requirements, n_before = self._requirements(), cache.n_cached(wanted)
                if len(wanted) - n_before < _LEAST:
                    return 0
                children = self._children()
                chain, n = self._chain(wanted, requirements, children) if cache.can_split else ([], 0)
                snapshot, n_there = self._best_snapshot(wanted, requirements, children)
                if max(n, n_there) - n_before < _LEAST:
                    return 0
                if n >= n_there:
                    self._touch(name for name, _ in chain)
                    needed = [(name, start) for name, start in chain if start + self._piece > n_before]
                    self._keep_parts(wanted[:n], needed, requirements)
                else:
                    self._touch([snapshot])
                    self._keep_snapshot(snapshot, requirements)
                return cache.n_cached(wanted) - n_before
        except (ContextFullError, SequencesInUseError):
            raise
        except (MinervaError, OSError) as error:
            _logger.warning("the prompt cache is not used: %s", error)
            return 0

    def _chain(
        self, wanted: Ids, requirements: Mapping[str, Any], children: Mapping[str, list[str]]
    ) -> tuple[list[tuple[str, int]], int]:
        """Return the names and positions of the pieces of the longest prefix that is there, and its length."""
        chain: list[tuple[str, int]] = []
        parent, n = _root(requirements), 0
        while n < len(wanted):
            piece = wanted[n : n + self._piece]
            name = _name(parent, piece, n)
            if name not in children.get(parent, ()):
                name, n_common = self._closest(children.get(parent, ()), piece)
                return ([*chain, (name, n)], n + n_common) if n_common else (chain, n)
            chain.append((name, n))
            parent, n = name[33:65], n + len(piece)
        return chain, n

    def _closest(self, names: Iterable[str], wanted: Ids) -> tuple[str, int]:
        """Return which of some files has most of some tokens, from the first, and how many."""
        best, most = "", 0
        for name in names:
            _, tokens = self._peek(name)
            if (n := common_prefix(tokens, wanted)) > most:
                best, most = name, n
        return best, most

    def _keep_parts(self, ids: Ids, chain: list[tuple[str, int]], requirements: Mapping[str, Any]) -> None:
        last = ""

        def parts() -> Iterator[Payload]:  # one at a time in memory
            nonlocal last
            for last, start in chain:
                payload = self._read(last, start, requirements)
                if payload is None:
                    return
                yield payload

        try:
            self._cache.keep_parts(ids, parts())
        except StateError as error:
            self._refuse(last, error)

    def _best_snapshot(
        self, wanted: Ids, requirements: Mapping[str, Any], children: Mapping[str, list[str]]
    ) -> tuple[str, int]:
        """Return the name of the snapshot that gives most of some tokens, from the first, and how many."""
        memory = self._cache.memory
        best, most = "", 0
        for name in children.get(_root(requirements, is_whole=True), ()):
            header, tokens = self._peek(name)
            n = common_prefix(tokens, wanted)
            if n < len(tokens) and (memory.window or not memory.can_truncate):
                n = max((end for end in state.checkpoint_ends(header) if end <= n), default=0)
            if n > most:
                best, most = name, n
        return best, most

    def _keep_snapshot(self, name: str, requirements: Mapping[str, Any]) -> None:
        payload = self._read(name, 0, requirements)
        if payload is not None:
            try:
                self._cache.keep_snapshot(payload)
            except StateError as error:
                self._refuse(name, error)

    def _refuse(self, name: str, error: StateError) -> None:
        self._skip(name, StateError(f"{self.files.directory / name} cannot be restored here ({error})"))

    def _children(self) -> dict[str, list[str]]:
        """Return the names of the files by the piece that they follow."""
        found: dict[str, list[str]] = {}
        foreign = []
        for name in self.files.names():
            if not _NAME.fullmatch(name):
                if not _DRAFT.fullmatch(name) and name not in self._foreign:
                    foreign.append(name)
            elif name not in self._bad:
                found.setdefault(name[:32], []).append(name)
        if foreign:
            self._foreign.update(foreign)
            shown = ", ".join(repr(name) for name in sorted(foreign)[:3]) + (", ..." if len(foreign) > 3 else "")
            _logger.warning("%s has what is not the prompt cache's, and is skipped: %s", self.files.directory, shown)
        return found

    def _peek(self, name: str) -> tuple[dict[str, Any], Ids]:
        """Return the header and the tokens of a file, not verified yet; nothing if it cannot be read."""
        path = self.files.directory / name
        try:
            with opened(path) as file:
                return state.peeked(path, file)
        except (StateError, OSError) as error:
            self._skip(name, error)
        return {}, np.empty(0, np.int32)

    def _read(self, name: str, start: int, requirements: Mapping[str, Any]) -> Payload | None:
        """Return what a file holds, if it is what its name says."""
        path, parent = self.files.directory / name, name[:32]
        try:
            with opened(path) as file:
                content = file.read()
            needed = {**requirements, "start": start, "parent": parent}
            payload = state.parsed(path, content, needed, self._context.model.tokenizer.n_vocab)
            if _name(parent, payload.tokens, start) != name or payload.n_cached != len(payload.tokens):
                raise StateError(f"{path} holds other tokens than its name says")
            try:
                self._context.model.tokenizer.as_array(payload.tokens)
            except ValueError as error:
                raise StateError(f"{path} holds what is no token of this model ({error})") from None
        except (StateError, OSError, MemoryError) as error:
            self._skip(name, error)
            return None
        return payload._replace(start=start)

    def _skip(self, name: str, error: Exception) -> None:
        """Do not use a file any more; say so, unless another process has just removed it."""
        if not isinstance(error, FileNotFoundError):
            self._bad.add(name)
            _logger.warning("%s; the prompt cache skips it", error)

    def _touch(self, names: Iterable[str], now: int | None = None) -> None:
        """Note that the pieces of a prompt were used, its beginning last: that it is evicted last."""
        now = time.time_ns() if now is None else now
        for number, name in enumerate(names):
            with suppress(OSError):
                used = now - number * _PIECE
                os.utime(self.files.directory / name, ns=(used, used), follow_symlinks=False)

    # Writing

    def store(self, sequence: Sequence) -> None:
        """Keep what is evaluated of a sequence, if that is not there yet.

        Its state is copied here; all else is done in the background. If that falls behind, nothing is kept.
        """
        cache, slot = self._cache, slot_of(sequence)
        if slot.closed or self._is_closed or self._process != os.getpid():
            return
        try:
            with cache.gate.enter(), cache.handle:
                n = cache.n_exact(slot)
                ids = np.array(slot.tokens[:n], np.int32)
                if n < _LEAST:
                    return
                requirements, children = self._requirements(), self._children()
                is_done = cache.can_split and self._store_parts(slot, ids, requirements, children)
                if not is_done and n == slot.n_cached:  # what was shifted is not what an evaluation gives
                    self._store_snapshot(slot, ids, requirements, children)
        except (MinervaError, OSError, MemoryError) as error:
            _logger.warning("the prompt cache keeps nothing of this request: %s", error)

    def _store_parts(
        self, slot: Slot, ids: Ids, requirements: Mapping[str, Any], children: Mapping[str, list[str]]
    ) -> bool:
        """Keep pieces that are not there yet; return False if the memory has lost one."""
        now, parent = time.time_ns(), _root(requirements)
        for start in range(0, len(ids), self._piece):
            piece = ids[start : start + self._piece]
            name, siblings = _name(parent, piece, start), children.get(parent, ())
            if name in siblings or name in self._waiting:
                self._touch([name], now - start)
            elif len(piece) == self._piece or not self._has_most_of(siblings, piece):
                if sum(self._waiting.values()) > self._most_waiting:
                    _logger.info("the prompt cache drops a part of a prompt: too much waits to be written")
                    return True
                payload = self._cache.part(slot, start, start + len(piece))
                if payload is None:
                    return False
                self._submit(name, piece, payload, requirements, now - start)
            parent = name[33:65]
        return True

    def _has_most_of(self, names: Iterable[str], piece: Ids) -> bool:
        """Return whether too little of a tail is new."""
        least = min(_LEAST, max(1, self._piece // 8))
        return len(piece) < least or len(piece) - self._closest(names, piece)[1] < least

    def _store_snapshot(
        self, slot: Slot, ids: Ids, requirements: Mapping[str, Any], children: Mapping[str, list[str]]
    ) -> None:
        root = _root(requirements, is_whole=True)
        name, names = _name(root, ids, 0), children.get(root, [])
        if name in names or name in self._waiting:
            self._touch([name])
            return
        held, n_held = self._closest(names, ids)
        if len(ids) - n_held < max(_LEAST, _LEAST_SHARE * len(ids)):
            self._touch([held])
            return
        size = self._cache.size_bytes(slot) + sum(checkpoint.state.nbytes for checkpoint in slot.checkpoints)
        if sum(self._waiting.values()) + size > self._most_waiting:
            _logger.info("the prompt cache drops a prompt of %d bytes: too much waits to be written", size)
            return
        self._submit(name, ids, self._cache.snapshot(slot), requirements, time.time_ns())

    def _submit(self, name: str, tokens: Ids, payload: Payload, requirements: Mapping[str, Any], used_ns: int) -> None:
        needed = {**requirements, "start": payload.start, "parent": name[:32]}
        parts = state.parts(payload, needed, self._name)
        size = sum(len(part) for part in parts)
        if size > self.max_bytes:
            return
        job = _Job(name, name[:32], tokens, parts, size, used_ns)
        with self._changed:
            if self._is_closed:
                return
            self._jobs.append(job)
            self._waiting[name] = size
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="minerva_native prompt cache", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _requirements(self) -> dict[str, Any]:
        return {**self._cache.requirements(), **self._engine}

    # On the thread in the background

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._is_closed:
                    self._changed.wait()
                if not self._jobs or self._is_abandoned:
                    return
                job = self._jobs[0]
            try:
                self._write(job)
                self._has_warned = False
            except (OSError, MemoryError) as error:
                if not self._has_warned:
                    _logger.warning("the prompt cache cannot write to %s: %s", self.files.directory, error)
                self._has_warned = True
            except _Abandoned:
                return
            finally:
                with self._changed:
                    self._jobs.popleft()
                    del self._waiting[job.name]
                    self._changed.notify_all()

    def _write(self, job: _Job) -> None:
        self._make_directory()
        draft = self.files.directory / f".{os.urandom(8).hex()}.part"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o600)  # whatever the umask is
                for chunk in self._paced(state.signed(_chunks(job.parts))):
                    file.write(chunk)
                file.flush()
                os.fsync(descriptor)
                os.utime(descriptor, ns=(job.used_ns, job.used_ns))
            os.replace(draft, self.files.directory / job.name)
        finally:
            draft.unlink(missing_ok=True)
        self._bad.discard(job.name)
        self._written_bytes += job.size_bytes
        self._remove_superseded(job)
        self._keep_to_budget()

    def _paced(self, chunks: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        """Yield chunks, with rests while tokens are generated, so that those are hardly slower."""
        before = time.perf_counter()
        for chunk in chunks:
            yield chunk
            if self._is_abandoned:
                raise _Abandoned
            if self._is_decoding():
                self._hurry.wait(min(_REST * (time.perf_counter() - before), _MOST_REST_SECONDS))
            before = time.perf_counter()

    def _is_decoding(self) -> bool:
        n_calls, now = self._context.stats.decode_calls, time.perf_counter()
        if n_calls != self._n_calls:
            self._n_calls, self._called_at = n_calls, now
        return now - self._called_at < _DECODING_SECONDS

    def _remove_superseded(self, job: _Job) -> None:
        """Remove what the file that was just written begins with."""
        n = int(job.name[66:-7])
        for name in self._children().get(job.parent, ()):
            if int(name[66:-7]) < n:
                _, tokens = self._peek(name)
                if 0 < len(tokens) == common_prefix(tokens, job.tokens):
                    self.files.remove(name)

    def _keep_to_budget(self) -> None:
        """Evict what is too much. Others write too, so the files are counted again now and then."""
        known = self._size_bytes
        if known is None or known + self._written_bytes > self.max_bytes or 16 * self._written_bytes > self.max_bytes:
            self._size_bytes, self._written_bytes = self.files.evict(self.max_bytes), 0

    # The end

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything is written, or for so many seconds; return whether it is."""
        with self._changed:
            self._hurry.set()
            done = self._changed.wait_for(lambda: not self._jobs, timeout)
            if not self._is_closed:
                self._hurry.clear()
            return done

    def close(self, timeout: float = _CLOSE_SECONDS) -> None:
        """Write what waits, but for no longer than so many seconds. Closing twice is no error."""
        if self._process != os.getpid():  # inherited by a fork, without the thread
            return
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if not self.flush(timeout):
            _logger.warning("the prompt cache was closed before everything was written")
            self._is_abandoned = True

    def _make_directory(self) -> None:
        directory = self.files.directory
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            if not directory.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory)) from None
        else:
            directory.chmod(0o700)  # whatever the umask is


class _Abandoned(Exception):
    """Nobody waits for what is written any more."""


def opened(path: Path) -> BinaryIO:
    """Open a file of the cache; raise `StateError` for what this user has not written there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StateError(f"{path} is a symbolic link") from None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(descriptor)
        raise StateError(f"{path} is not a file that only this user can have written")
    return os.fdopen(descriptor, "rb")


def _chunks(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            yield view[start : start + _CHUNK_BYTES]


def _root(requirements: Mapping[str, Any], is_whole: bool = False) -> str:
    """Return what the first piece, or a snapshot, follows: the model and the form of the context."""
    return state.short_digest(json.dumps([requirements, is_whole], sort_keys=True).encode())


def _name(parent: str, tokens: Ids, start: int) -> str:
    """Return the name of the file of some tokens at a position after what was before."""
    own = state.short_digest(parent.encode(), tokens.astype("<i4").tobytes())
    return f"{parent}-{own}-{start + len(tokens)}.prompt"
