"""The header of a GGUF file: its metadata and tensors, and checks that the file is complete and has all its parts."""

import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._arguments import path as as_path
from ._arguments import what
from ._binding import callbacks, ffi, lib, text, thrown
from ._handle import Handle, NoCopy
from .errors import ModelLoadError

MAGIC = b"GGUF"

Value = int | float | bool | str | list[Any]

Override = int | float | bool | str
"""A value to use instead of a file's."""

_LONGEST_OVERRIDE = 127  # bytes of a key or a string in `llama_model_kv_override`

SCALARS: dict[int, Callable[[Any, int], Any]] = {
    lib.GGUF_TYPE_UINT8: lib.gguf_get_val_u8,
    lib.GGUF_TYPE_INT8: lib.gguf_get_val_i8,
    lib.GGUF_TYPE_UINT16: lib.gguf_get_val_u16,
    lib.GGUF_TYPE_INT16: lib.gguf_get_val_i16,
    lib.GGUF_TYPE_UINT32: lib.gguf_get_val_u32,
    lib.GGUF_TYPE_INT32: lib.gguf_get_val_i32,
    lib.GGUF_TYPE_FLOAT32: lib.gguf_get_val_f32,
    lib.GGUF_TYPE_UINT64: lib.gguf_get_val_u64,
    lib.GGUF_TYPE_INT64: lib.gguf_get_val_i64,
    lib.GGUF_TYPE_FLOAT64: lib.gguf_get_val_f64,
    lib.GGUF_TYPE_BOOL: lib.gguf_get_val_bool,
}

ARRAYS: dict[int, type[np.generic]] = {
    lib.GGUF_TYPE_UINT8: np.uint8,
    lib.GGUF_TYPE_INT8: np.int8,
    lib.GGUF_TYPE_UINT16: np.uint16,
    lib.GGUF_TYPE_INT16: np.int16,
    lib.GGUF_TYPE_UINT32: np.uint32,
    lib.GGUF_TYPE_INT32: np.int32,
    lib.GGUF_TYPE_FLOAT32: np.float32,
    lib.GGUF_TYPE_UINT64: np.uint64,
    lib.GGUF_TYPE_INT64: np.int64,
    lib.GGUF_TYPE_FLOAT64: np.float64,
    lib.GGUF_TYPE_BOOL: np.bool_,
}


class TensorInfo(NamedTuple):
    """A tensor of a GGUF file, without its data.

    Attributes:
        name: its name, such as "blk.0.attn_q.weight".
        shape: its dimensions, fastest-varying first, as in the file.
        type: ggml's name for the element type, such as "q8_0".
        offset: where its data begins, in bytes from the start of the file.
        size_bytes: the size of its data.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size_bytes: int


class StringFacts(NamedTuple):
    """Facts about an array of strings, as libllama reads them as tokens: up to a NUL, an empty one as "[EMPTY_n]".

    Attributes:
        n: how many strings there are.
        longest: how many bytes the longest one has.
        longest_at: its index.
        equal: the indices of two equal strings, or None.
        squares: the sum of the squares of their lengths.
        cubes: the sum of the cubes.
    """

    n: int
    longest: int
    longest_at: int
    equal: tuple[int, int] | None
    squares: float
    cubes: float


def checked_overrides(overrides: object) -> dict[str, Override]:
    """Return values to use instead of a file's; raise `TypeError` or `ValueError` for what libllama cannot be told."""
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise TypeError(f"kv_overrides must be a dict of keys and values, not {what(overrides)}")
    found = dict[str, Override]()
    for key, value in overrides.items():
        if not isinstance(key, str):
            raise TypeError(f"kv_overrides: a key must be a str, not {what(key)}")
        if key.startswith("split.") or key in ("", "general.alignment"):
            raise ValueError(f"kv_overrides: {key!r} cannot be overridden: it says how the file is laid out")
        if isinstance(value, np.generic):
            value = value.item()
        if not isinstance(value, str | bool | int | float):
            raise TypeError(f"kv_overrides: {key} must be a bool, int, float or str, not {what(value)}")
        if type(value) is int and not 0 <= value < 2**31:  # what every type that libllama puts it in can hold
            raise ValueError(f"kv_overrides: {key} must be from 0 to {2**31 - 1}, not {value}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"kv_overrides: {key} must be finite, not {value}")
        for string in (key, value) if isinstance(value, str) else (key,):
            data = string.encode(errors="replace")
            if len(data) > _LONGEST_OVERRIDE or b"\0" in data or data.decode() != string:
                raise ValueError(
                    f"kv_overrides: {key!r} and its value may have {_LONGEST_OVERRIDE} bytes each, and no NUL"
                )
        found[key] = value
    return found


class GGUF(NoCopy):
    """The header of a GGUF file.

    Attributes:
        path: the file.
        size_bytes: the size of the file.
        metadata: every key of the file, as a read-only mapping.

    Raises:
        ModelLoadError: the path is not a GGUF file, or its header cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = as_path("path", path)
        self.size_bytes = check_file(self.path)
        parameters = ffi.new("struct gguf_init_params *", {"no_alloc": True, "ctx": ffi.NULL})
        with callbacks.captured_errors() as errors:
            pointer = lib.minerva_gguf_init(os.fsencode(self.path), parameters)
        if pointer == ffi.NULL:
            why = thrown() or callbacks.reason(errors, "its header cannot be parsed")
            raise ModelLoadError(
                f"{self.path} is a damaged or truncated GGUF file ({why}): download it again and compare its checksum"
            )
        self._handle = Handle("GGUF file", pointer, lib.gguf_free)
        self.metadata = Metadata(self._handle)

    @property
    def can_be_mapped(self) -> bool:
        """Whether every tensor begins where a backend can compute with it in place, without a copy."""
        with self._handle as gguf:
            return bool(lib.gguf_get_alignment(gguf) % lib.GGUF_DEFAULT_ALIGNMENT == 0)

    @property
    def tensors(self) -> list[TensorInfo]:
        """Every tensor, in file order."""
        with self._handle as gguf:
            start = lib.gguf_get_data_offset(gguf)
            return [_tensor_info(gguf, index, start) for index in range(lib.gguf_get_n_tensors(gguf))]

    def has_tensor(self, name: str) -> bool:
        """Return whether the file has a tensor with that name."""
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {what(name)}")
        with self._handle as gguf:
            return bool(lib.gguf_find_tensor(gguf, name.encode(errors="surrogatepass")) >= 0)

    def numbers(self, key: str) -> npt.NDArray[Any] | None:
        """Return an array of numbers as a numpy array, or None if the file has none under that key."""
        with self._handle as gguf:
            index = lib.gguf_find_key(gguf, key.encode())
            if index < 0 or lib.gguf_get_kv_type(gguf, index) != lib.GGUF_TYPE_ARRAY:
                return None
            kind = lib.gguf_get_arr_type(gguf, index)
            return None if kind == lib.GGUF_TYPE_STRING else _numbers(gguf, index, kind).copy()

    def strings(self, key: str) -> list[bytes] | None:
        """Return an array of strings, each up to its first NUL, or None if the file has none under that key."""
        with self._handle as gguf:
            index = _string_array(gguf, key)
            if index is None:
                return None
            return [ffi.string(lib.gguf_get_arr_str(gguf, index, at)) for at in range(lib.gguf_get_arr_n(gguf, index))]

    def string_facts(self, key: str) -> StringFacts | None:
        """Return facts about an array of strings, much faster than `strings`; None if there is none under that key."""
        with self._handle as gguf:
            index = _string_array(gguf, key)
            if index is None:
                return None
            found = ffi.new("minerva_strings *")
            if lib.minerva_gguf_strings(gguf, index, found):
                raise ModelLoadError(f"{self.path}: {key} cannot be read ({thrown()})")
            equal = (found.first, found.second) if found.second >= 0 else None
            return StringFacts(found.count, found.longest, found.longest_at, equal, found.squares, found.cubes)

    def check_tensors(self) -> None:
        """Raise `ModelLoadError` if a tensor's data would end beyond the end of the file."""
        for tensor in self.tensors:
            end = tensor.offset + tensor.size_bytes
            if end > self.size_bytes:
                raise ModelLoadError(
                    f"{self.path} is truncated: tensor {tensor.name!r} ends at byte {end:,}, but the file ends at byte "
                    f"{self.size_bytes:,}. Download the file again and compare its checksum"
                )

    def override(self, values: Mapping[str, Override]) -> dict[str, Override]:
        """Have `metadata` give these values; return them, with the type that the file has for each.

        Raises `ValueError` if the file has another type under a key.
        """
        typed = dict[str, Override]()
        for key, value in values.items():
            old = self.metadata.get(key, value)
            if isinstance(old, float) and type(value) is int:
                value = float(value)
            if type(old) is not type(value):
                raise ValueError(f"kv_overrides: {key} is {what(old)} in {self.path.name}, not {what(value)}")
            typed[key] = value
        self.metadata = Metadata(self._handle, typed)
        return typed

    def close(self) -> None:
        """Free the header; afterwards `metadata` and `tensors` raise `ClosedError`."""
        self._handle.close()


class Metadata(NoCopy, Mapping[str, Value]):
    """Every key of a GGUF file, as a read-only mapping. An array becomes a list when it is first read.

    ggml returns NUL-terminated strings, so a string with a NUL character is cut off there.
    """

    def __init__(self, handle: Handle, overrides: Mapping[str, Override] | None = None):
        self._handle = handle
        self._cache: dict[str, Value] = {**overrides} if overrides else {}
        with handle as gguf:
            count = lib.gguf_get_n_kv(gguf)
            self._ids = {text(lib.gguf_get_key(gguf, key)): key for key in range(count)}
        self._ids.update(dict.fromkeys(self._cache.keys() - self._ids.keys(), -1))

    def __getitem__(self, key: str) -> Value:
        with self._handle as gguf:
            if key not in self._cache:
                self._cache[key] = _value(gguf, self._ids[key])
            value = self._cache[key]
            return list(value) if isinstance(value, list) else value

    def __contains__(self, key: object) -> bool:
        return key in self._ids

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"<GGUF metadata, {len(self)} keys>"


def open_parts(path: str | os.PathLike[str], others: Sequence[str | os.PathLike[str]] = ()) -> list[GGUF]:
    """Open a model's file, and all its other parts if it is split: those that are given, or else by their names.

    Raises `ModelLoadError` if a part is missing or is not a GGUF file, or if the path is not that of the first part.
    """
    first = GGUF(path)
    count = _split_key(first, "count", 1, 2**16 - 1)
    if others and len(others) + 1 != count:
        raise ModelLoadError(
            f"{first.path} says that its model has {count} parts, but {len(others) + 1} files are given"
        )
    if count < 2:
        return [first]
    number = _split_key(first, "no", 0, count - 1)
    if others:
        if number:
            raise ModelLoadError(f"{first.path} is part {number + 1} of {count} of a model: give the first part first")
        return _with_parts(first, [GGUF(other) for other in others])
    name = re.fullmatch(rf"(.*)-{number + 1:05d}-of-{count:05d}\.gguf", first.path.name, re.DOTALL)
    if name is None:
        raise ModelLoadError(
            f"{first.path} is part {number + 1} of {count} of a model, so its name must end with "
            f"-{number + 1:05d}-of-{count:05d}.gguf, and the other parts must be named alike and lie next to it"
        )
    paths = [first.path.with_name(f"{name[1]}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    if number:
        raise ModelLoadError(f"{first.path} is part {number + 1} of {count} of a model: load the first, {paths[0]}")
    for number, other in enumerate(paths[1:], 1):
        if not other.exists():
            raise ModelLoadError(f"{other}, part {number + 1} of {count} of the model, is missing: download it as well")
    return _with_parts(first, [GGUF(other) for other in paths[1:]])


def _with_parts(first: GGUF, others: list[GGUF]) -> list[GGUF]:
    """Return all parts of a model, once they say that they are, in this order."""
    parts = [first, *others]
    count = len(parts)
    for number, part in enumerate(others, 1):
        said = _split_key(part, "no", -1, count - 1)
        if said != number:
            found = f"but part {said + 1}: give each part once, in order" if said >= 0 else "download it again"
            raise ModelLoadError(f"{part.path} does not say that it is part {number + 1} of {count}, {found}")
    total, wanted = sum(len(part.tensors) for part in parts), first.metadata.get("split.tensors.count")
    if total != wanted:
        raise ModelLoadError(
            f"{first.path} and its other parts have {total} tensors, but split.tensors.count is {wanted}: download all "
            f"{count} parts again"
        )
    return parts


def _split_key(part: GGUF, name: str, default: int, most: int) -> int:
    """Return a number of a part of a split model; raise `ModelLoadError` if it cannot be one."""
    key = f"split.{name}"
    if key not in part.metadata:
        return default
    value = part.metadata[key]
    with part._handle as gguf:  # libllama ends the process if it is of another type
        kind = lib.gguf_get_kv_type(gguf, lib.gguf_find_key(gguf, key.encode()))
    if kind != lib.GGUF_TYPE_UINT16 or not isinstance(value, int) or value > most:
        raise ModelLoadError(
            f"{part.path}: {key} is {value!r} ({text(lib.gguf_type_name(kind))}), not a u16 up to {most}"
        )
    return value


def check_file(path: Path) -> int:
    """Return the size of the file in bytes; raise `ModelLoadError` if it is obviously not a GGUF file."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelLoadError(f"{path} is a directory: give the path of the .gguf file in it")
        if not stat.S_ISREG(status.st_mode):
            raise ModelLoadError(f"{path} is not a regular file: libllama needs to seek in it")
        with path.open("rb") as file:
            head = file.read(len(MAGIC))
    except FileNotFoundError:
        raise ModelLoadError(f"{path} does not exist: check the path") from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    size = status.st_size
    if not size:
        raise ModelLoadError(f"{path} is empty: was its download interrupted?")
    if head != MAGIC:
        raise ModelLoadError(f"{path} is not a GGUF file: it begins with {head!r} instead of {MAGIC!r}")
    return size


def _tensor_info(gguf: Any, index: int, start: int) -> TensorInfo:
    shape = ffi.unpack(lib.gguf_get_tensor_ne(gguf, index), lib.GGML_MAX_DIMS)
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return TensorInfo(
        text(lib.gguf_get_tensor_name(gguf, index)),
        tuple(shape),
        text(lib.ggml_type_name(lib.gguf_get_tensor_type(gguf, index))),
        start + lib.gguf_get_tensor_offset(gguf, index),
        lib.gguf_get_tensor_size(gguf, index),
    )


def _value(gguf: Any, key: int) -> Value:
    kind = lib.gguf_get_kv_type(gguf, key)
    if kind == lib.GGUF_TYPE_STRING:
        return text(lib.gguf_get_val_str(gguf, key))
    if kind != lib.GGUF_TYPE_ARRAY:
        value: Value = SCALARS[kind](gguf, key)
        return value
    kind, count = lib.gguf_get_arr_type(gguf, key), lib.gguf_get_arr_n(gguf, key)
    if kind == lib.GGUF_TYPE_STRING:
        return [text(lib.gguf_get_arr_str(gguf, key, index)) for index in range(count)]
    values: list[Any] = _numbers(gguf, key, kind).tolist()
    return values


def _string_array(gguf: Any, key: str) -> int | None:
    """Return the index of a key that has an array of strings."""
    index: int = lib.gguf_find_key(gguf, key.encode())
    if index < 0 or lib.gguf_get_kv_type(gguf, index) != lib.GGUF_TYPE_ARRAY:
        return None
    return index if lib.gguf_get_arr_type(gguf, index) == lib.GGUF_TYPE_STRING else None


def _numbers(gguf: Any, key: int, kind: int) -> npt.NDArray[Any]:
    """Return an array of numbers, in libllama's memory."""
    count, dtype = lib.gguf_get_arr_n(gguf, key), np.dtype(ARRAYS[kind])
    if not count:
        return np.empty(0, dtype)
    return np.frombuffer(ffi.buffer(lib.gguf_get_arr_data(gguf, key), count * dtype.itemsize), dtype)
