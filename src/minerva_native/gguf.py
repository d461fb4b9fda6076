"""The header of a GGUF file: its metadata and tensors, and checks that the file is valid and complete."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ._binding import callbacks, ffi, lib, text, thrown
from ._handle import Handle
from .errors import ModelLoadError

MAGIC = b"GGUF"

Value = int | float | bool | str | list[Any]

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


class GGUF:
    """The header of a GGUF file.

    Attributes:
        path: the file.
        size_bytes: the size of the file.
        metadata: every key of the file, as a read-only mapping.

    Raises:
        ModelLoadError: the path is not a GGUF file, or its header cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
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
    def tensors(self) -> list[TensorInfo]:
        """Every tensor, in file order."""
        with self._handle as gguf:
            start = lib.gguf_get_data_offset(gguf)
            return [_tensor_info(gguf, index, start) for index in range(lib.gguf_get_n_tensors(gguf))]

    def has_tensor(self, name: str) -> bool:
        """Return whether the file has a tensor with that name."""
        with self._handle as gguf:
            return bool(lib.gguf_find_tensor(gguf, name.encode()) >= 0)

    def check_tensors(self) -> None:
        """Raise `ModelLoadError` if a tensor's data would end beyond the end of the file."""
        for tensor in self.tensors:
            end = tensor.offset + tensor.size_bytes
            if end > self.size_bytes:
                raise ModelLoadError(
                    f"{self.path} is truncated: tensor {tensor.name!r} ends at byte {end:,}, but the file ends at byte "
                    f"{self.size_bytes:,}. Download the file again and compare its checksum"
                )

    def close(self) -> None:
        """Free the header; afterwards `metadata` and `tensors` raise `ClosedError`."""
        self._handle.close()


class Metadata(Mapping[str, Value]):
    """Every key of a GGUF file, as a read-only mapping. An array becomes a list when it is first read.

    ggml returns NUL-terminated strings, so a string with a NUL character is cut off there.
    """

    def __init__(self, handle: Handle):
        self._handle = handle
        self._cache: dict[str, Value] = {}
        with handle as gguf:
            count = lib.gguf_get_n_kv(gguf)
            self._ids = {text(lib.gguf_get_key(gguf, key)): key for key in range(count)}

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
    if not count:
        return []
    dtype = np.dtype(ARRAYS[kind])
    data = ffi.buffer(lib.gguf_get_arr_data(gguf, key), count * dtype.itemsize)
    values: list[Any] = np.frombuffer(data, dtype).tolist()
    return values
