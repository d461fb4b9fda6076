"""Saved sequences: one file with a sequence's tokens, its state in the KV cache, and what both depend on.

The file is a magic, the length of a JSON header, the header, the token ids (int32), the logits after the last token
(float32, where they were known), libllama's state, and a BLAKE2b digest of all of it. Numbers are little-endian.
"""

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import StateError

if TYPE_CHECKING:
    from .context import Context
    from .model import Model
    from .sequence import Sequence

_MAGIC = b"MINERVA-SEQUENCE"
_VERSION = 1
_LEAD = struct.Struct("<16sII")  # magic, version, bytes of the header
_DIGEST_BYTES = 32

_SAMPLES, _SAMPLE_BYTES = 256, 4096  # of the model's file, for its fingerprint


def save(sequence: "Sequence", path: str | os.PathLike[str]) -> None:
    """Write a sequence to a file; see `Sequence.save`."""
    context, slot = sequence.context, sequence._slot
    with context._entry(), context._handle:
        sequence._slot.check_open()
        slot.settle()
        context._keep_logits(slot)
        context._apply_shift(slot)
        state = context.memory.read(slot.id) if slot.n_cached else np.empty(0, np.uint8)
        if state is None:
            raise StateError("libllama does not give the state of this sequence; see its log")
        parts = [np.array(slot.tokens, "<i4").tobytes()]
        if slot.logits is not None:
            parts.append(slot.logits.astype("<f4").tobytes())
        header = {
            **_requirements(context),
            "model": context.model.path.name,
            "n_tokens": len(slot.tokens),
            "n_cached": slot.n_cached,
            "n_pure": slot.n_pure,
            "n_logits": 0 if slot.logits is None else len(slot.logits),
        }
    written = json.dumps(header).encode()
    _write(Path(path), [_LEAD.pack(_MAGIC, _VERSION, len(written)), written, *parts, state.data])


def restore(context: "Context", path: str | os.PathLike[str]) -> "Sequence":
    """Read a sequence from a file; see `Context.restore`."""
    path = Path(path)
    header, body = _read(path)
    with context._entry(), context._handle:
        requirements = _requirements(context)
        numbers = ("n_tokens", "n_cached", "n_logits")
        if {*requirements, *numbers, "n_pure", "model"} - set(header) or not all(
            type(header[n]) is int for n in numbers
        ):
            raise StateError(f"{path} lacks what a saved sequence has: it was not written by this package")
        for name, here in requirements.items():
            if header[name] != here:
                raise StateError(
                    {
                        "fingerprint": f"{path} was saved from another model ({header['model']})",
                        "encoded": f"{path} answers another text than the one that this context has encoded",
                    }.get(
                        name, f"{path} does not fit this context: its {name} is {header[name]!r}, here it is {here!r}"
                    )
                )
        n_tokens, n_cached, n_logits = (header[name] for name in numbers)
        n_pure = header["n_pure"]
        # The digest is no signature: whoever writes a file of his own may write anything.
        if not (
            0 <= n_cached <= n_tokens <= len(body) // 4
            and n_logits in (0, context.model.tokenizer.n_vocab)
            and 4 * (n_tokens + n_logits) <= len(body)
            and (n_pure is None or (isinstance(n_pure, int) and 0 <= n_pure <= n_cached))
        ):
            raise StateError(f"{path} contradicts itself: it was not written by this package")
        try:
            ids = context.model.tokenizer.as_array(np.frombuffer(body, "<i4", n_tokens))
        except ValueError as error:
            raise StateError(f"{path} holds what is no token of this model ({error})") from None
        logits = np.frombuffer(body, "<f4", n_logits, offset=4 * n_tokens).astype(np.float32)
        state = np.frombuffer(body, np.uint8, offset=4 * (n_tokens + n_logits))
        sequence = context._new_sequence()
        slot, pool = sequence._slot, context._pool
        try:
            if pool.lacks(slot, n_tokens):
                raise context._full(n_tokens, slot)
            slot.add(ids)
            if n_cached:
                pool.place(slot)
                slot.settled = False
                reason = context.memory.write(slot.id, state)
                if reason or not context.memory.is_whole(slot.id, n_cached):
                    pool.forget_everything()  # what libllama has read of it may lie anywhere
                    raise StateError(f"{path} cannot be restored here ({reason or 'its positions are not its tokens'})")
                slot.n_cached = slot.n_seen = n_cached
                slot.n_pure = n_pure
                slot.logits = logits if n_logits else None
                context._checkpoint(slot)  # to go back as far as here: what was shifted before is nowhere else
                slot.settled = True
        except BaseException:
            sequence._discard()
            raise
        return sequence


def fingerprint(model: "Model") -> str:
    """Return a digest of a model's file: its size, its beginning, and samples from all over it.

    Two files of equal digests hold the same model for all but those who mean to deceive. Raises `StateError` where the
    file is no longer what was loaded, or gone.
    """
    if model._fingerprint is None:
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        try:
            with model.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(size.to_bytes(8, "little"))
                for number in range(_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise StateError(f"{model.path} can no longer be read to tell which model this is ({error})") from error
        model._fingerprint = digest.hexdigest()
    return model._fingerprint


def _requirements(context: "Context") -> dict[str, Any]:
    """Return what must be the same where a state is restored. libllama itself compares layers, sizes and layouts."""
    return {
        "fingerprint": fingerprint(context.model),
        "kv_type": list(context.kv_type),
        "kv_unified": context.memory.can_share,
        "encoded": context.encoded,
        **context.memory.key_transformations,
        "state_version": context.memory.state_version,
    }


def _write(path: Path, parts: "Iterable[bytes | memoryview]") -> None:
    """Write a file and its digest so that, whatever happens, the path holds the old content or the new."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    try:
        with temporary.open("xb") as file:
            for part in parts:
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(path: Path) -> tuple[dict[str, Any], memoryview]:
    """Return the header of a saved sequence, and what follows it, once the digest is proven."""
    content = memoryview(path.read_bytes())
    if len(content) < _LEAD.size or bytes(content[: len(_MAGIC)]) != _MAGIC[: len(content)]:
        raise StateError(f"{path} is not a saved sequence")
    _, version, header_bytes = _LEAD.unpack_from(content)
    if version != _VERSION:
        raise StateError(f"{path} has version {version} of the format, and this reads version {_VERSION}")
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != digest:
        raise StateError(f"{path} is damaged or cut short: its checksum does not match")
    start = _LEAD.size + header_bytes
    try:
        header = json.loads(bytes(body[_LEAD.size : start]))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise StateError(f"{path} has no header that can be read: it was not written by this package")
    return header, body[start:]
