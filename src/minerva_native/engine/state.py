"""The file format of a saved sequence: a header and arrays to bytes, and back.

A file is a magic, the version of the format, the length of a JSON header, the header, the token ids (int32), the logits
after the last token (float32, if they were known), libllama's state, and a BLAKE2b digest of all of it. Numbers are
little-endian.
"""

import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..devices import physical_memory_bytes
from ..errors import StateError
from .cache import Payload
from .slot import Checkpoint, Logits

_MAGIC = b"MINERVA-SEQUENCE"
_VERSION = 3
_LEAD = struct.Struct("<16sII")  # magic, version, bytes of the header
_DIGEST_BYTES = 32

_NUMBERS = ("n_tokens", "n_cached", "n_logits")


def parts(payload: Payload, requirements: Mapping[str, Any], model_name: str) -> list[bytes | memoryview]:
    """Return what a saved sequence consists of, with what has to be the same to restore it, without the digest."""
    n_logits = 0 if payload.logits is None else len(payload.logits)
    header = {
        **requirements,
        "model": model_name,
        "n_tokens": len(payload.tokens),
        "n_cached": payload.n_cached,
        "n_pure": payload.n_exact,
        "n_logits": n_logits,
        **({"checkpoints": [_form(checkpoint) for checkpoint in payload.checkpoints]} if payload.checkpoints else {}),
    }
    import json

    written = json.dumps(header).encode()
    found: list[bytes | memoryview] = [_LEAD.pack(_MAGIC, _VERSION, len(written)), written]
    found.append(payload.tokens.astype("<i4").tobytes())
    if payload.logits is not None:
        found.append(payload.logits.astype("<f4").tobytes())
    for checkpoint in payload.checkpoints:
        if checkpoint.logits is not None:
            found.append(checkpoint.logits.astype("<f4").tobytes())
        found.append(checkpoint.state.data)
    return [*found, payload.state.data]


def _form(checkpoint: Checkpoint) -> list[int]:
    n_logits = 0 if checkpoint.logits is None else len(checkpoint.logits)
    return [checkpoint.n, n_logits, checkpoint.state.size]


def joined(parts: Iterable[bytes | memoryview]) -> bytes:
    """Return the parts of a saved sequence and their digest as one."""
    return b"".join(signed(parts))


def signed(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Yield the parts of a saved sequence, and then their digest."""
    digest = _new_digest()
    for part in parts:
        digest.update(part)
        yield part
    yield digest.digest()


def parsed(path: Path | str, content: bytes, requirements: Mapping[str, Any], n_vocab: int) -> Payload:
    """Return what a saved sequence holds; raise `StateError` if it is damaged, or does not meet the requirements.

    `path`: where it comes from, for messages.
    """
    header, body = _verified(path, content)
    if {*requirements, *_NUMBERS, "n_pure", "model"} - set(header) or not all(
        type(header[name]) is int for name in _NUMBERS
    ):
        raise StateError(f"{path} lacks what a saved sequence has: it was not written by this package")
    for name, here in requirements.items():
        if header[name] != here:
            raise StateError(_difference(path, name, header, here))
    n_tokens, n_cached, n_logits = (header[name] for name in _NUMBERS)
    n_exact = header["n_pure"]
    # The digest is no signature: whoever writes a file of his own may write anything.
    if not (
        0 <= n_cached <= n_tokens <= len(body) // 4
        and n_logits in (0, n_vocab)
        and 4 * (n_tokens + n_logits) <= len(body)
        and (n_exact is None or (isinstance(n_exact, int) and 0 <= n_exact <= n_cached))
    ):
        raise StateError(f"{path} contradicts itself: it was not written by this package")
    logits = _logits(path, body, n_logits, 4 * n_tokens)
    checkpoints, end = _checkpoints(path, header, body, 4 * (n_tokens + n_logits), n_vocab)
    return Payload(
        tokens=np.frombuffer(body, "<i4", n_tokens).astype(np.int32),
        n_cached=n_cached,
        n_exact=n_exact,
        logits=logits,
        state=np.frombuffer(body, np.uint8, offset=end),
        checkpoints=checkpoints,
    )


def _checkpoints(
    path: Path | str, header: Mapping[str, Any], body: memoryview, at: int, n_vocab: int
) -> tuple[tuple[Checkpoint, ...], int]:
    """Return the checkpoints that a saved sequence has, and where they end."""
    forms = header.get("checkpoints", [])
    found: list[Checkpoint] = []
    if isinstance(forms, list) and all(
        isinstance(form, list) and len(form) == 3 and all(type(number) is int for number in form) for form in forms
    ):
        last = 0
        for n, n_logits, n_bytes in forms:
            stop = at + 4 * n_logits + n_bytes
            if not (last < n <= header["n_cached"] and n_logits in (0, n_vocab) and n_bytes > 0 and stop <= len(body)):
                break
            state = np.array(np.frombuffer(body, np.uint8, n_bytes, offset=at + 4 * n_logits))
            found.append(Checkpoint(n, state, _logits(path, body, n_logits, at)))
            last, at = n, stop
        else:
            return tuple(found), at
    raise StateError(f"{path} contradicts itself: it was not written by this package")


def _logits(path: Path | str, body: memoryview, n: int, at: int) -> Logits | None:
    logits = np.frombuffer(body, "<f4", n, offset=at).astype(np.float32)
    if not (logits < np.inf).all():  # NaN is not less either
        raise StateError(f"{path} holds logits that are not finite")
    return logits if n else None


def peeked(path: Path | str, file: BinaryIO) -> tuple[dict[str, Any], npt.NDArray[np.int32]]:
    """Return the header and the tokens of a saved sequence, whose digest is not proven."""
    lead = file.read(_LEAD.size)
    size = os.fstat(file.fileno()).st_size
    if len(lead) == _LEAD.size and lead[: len(_MAGIC)] == _MAGIC:
        _, version, header_bytes = _LEAD.unpack(lead)
        header = _header(file.read(min(header_bytes, size))) if version == _VERSION else None
        n_tokens = -1 if header is None else header.get("n_tokens")
        if header is not None and type(n_tokens) is int and 0 <= 4 * n_tokens <= size:
            tokens = file.read(4 * n_tokens)
            if len(tokens) == 4 * n_tokens:
                return header, np.frombuffer(tokens, "<i4").astype(np.int32)
    raise StateError(f"{path} is damaged, or no saved sequence of this version")


def checkpoint_ends(header: Mapping[str, Any]) -> list[int]:
    """Return after how many tokens a saved sequence has checkpoints; of a header that is not proven, whatever it is."""
    forms = header.get("checkpoints")
    if not isinstance(forms, list):
        return []
    return [form[0] for form in forms if isinstance(form, list) and form and type(form[0]) is int]


def short_digest(*parts: bytes) -> str:
    """Return a digest of 128 bits, in hexadecimal."""
    import hashlib

    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _header(written: bytes) -> dict[str, Any] | None:
    import json

    try:
        header = json.loads(written)
    except (ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def _new_digest() -> Any:
    import hashlib  # which loads OpenSSL: not to be part of every start

    return hashlib.blake2b(digest_size=_DIGEST_BYTES)


def _difference(path: Path | str, name: str, header: dict[str, Any], here: object) -> str:
    if name == "fingerprint":
        return f"{path} was saved from another model ({header['model']})"
    if name == "encoded":
        return f"{path} answers another text than the one that this context has encoded"
    if name == "raw":
        return f"{path} was saved before or after raw() was used: what was changed there is not known"
    return f"{path} does not fit this context: its {name} is {header[name]!r}, here it is {here!r}"


def write(path: Path, parts: "Iterable[bytes | memoryview]") -> None:
    """Write a saved sequence and its digest so that, whatever happens, the path holds the old content or the new.

    A symbolic link is followed, and the mode of an old file kept. Raises `OSError` if the path is no regular file:
    replacing a device would destroy it.
    """
    path = path.resolve()
    mode = None
    if path.exists():
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a regular file: a sequence is saved to a file of its own")
        mode = stat.S_IMODE(status.st_mode)
    temporary = path.with_name(f".{os.urandom(8).hex()}.part")
    try:
        with temporary.open("xb") as file:
            for part in signed(parts):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path) -> bytes:
    """Return what is in a file; raise `StateError` for what would block or exhaust the memory, such as a FIFO."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise StateError(f"{path} is not a regular file, so it is not a saved sequence")
    if status.st_size > physical_memory_bytes():
        raise StateError(f"{path} has {status.st_size:,} bytes, more than the memory of this machine")
    try:
        return path.read_bytes()
    except MemoryError:
        raise StateError(f"{path} has {status.st_size:,} bytes, for which there is not enough memory") from None


def _verified(path: Path | str, saved: bytes) -> tuple[dict[str, Any], memoryview]:
    """Return the header of a saved sequence, and what follows it, once the digest is proven."""
    content = memoryview(saved)
    if len(content) < _LEAD.size or bytes(content[: len(_MAGIC)]) != _MAGIC[: len(content)]:
        raise StateError(f"{path} is not a saved sequence")
    _, version, header_bytes = _LEAD.unpack_from(content)
    if version != _VERSION:
        raise StateError(f"{path} has version {version} of the format, and this reads version {_VERSION}")
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    expected = _new_digest()
    expected.update(body)
    if expected.digest() != digest:
        raise StateError(f"{path} is damaged or cut short: its checksum does not match")
    start = _LEAD.size + header_bytes
    header = _header(bytes(body[_LEAD.size : start]))
    if header is None:
        raise StateError(f"{path} has no header that can be read: it was not written by this package")
    return header, body[start:]
