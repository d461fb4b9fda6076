"""Finds numbers in a saved state that attention cannot bear.

All sequences of a context share the tensors of its KV cache, and attention multiplies also what it has masked, by 0. A
NaN or an infinity in one sequence's cell therefore makes the logits of every other sequence NaN, and stays there after
the sequence is closed. So a state from a file is examined before libllama reads it.

The layout is what `llama_kv_cache::state_write` and its relatives write. It does not say everything: whether there are
values at all depends on the model. Every reading of the bytes that comes out even is therefore examined.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .._binding import lib
from ..errors import StateError

Bytes = npt.NDArray[np.uint8]

_START = 8  # libllama's magic number and the sequence's id
_DSV4 = 0x34565344  # DeepSeek 4's compressed keys have a layout of their own, which begins like this
_CELL = (12, 24)  # bytes a cell of keys and values: position, one sequence id and its number; some models add 12
_RECURRENT_CELL = 8

_MAX_SECTIONS = 4  # one for each of the caches that a memory is made of
_MAX_READINGS = 8  # there is one, or a second by chance: a file with more is made to take time
_MAX_STREAMS = 256
_MAX_LAYERS = 1024
_CHUNK = 1 << 17  # bytes that stay in the CPU's cache


class _Kind(NamedTuple):
    """An element type: bytes of a block, and how many of them, at its start, are f16 scales; 0 if all are numbers."""

    block: int
    scales: int


_KINDS = {
    kind: _Kind(lib.ggml_type_size(kind), scales)
    for kind, scales in (
        (lib.GGML_TYPE_F32, 0),
        (lib.GGML_TYPE_F16, 0),
        (lib.GGML_TYPE_BF16, 0),
        (lib.GGML_TYPE_Q8_0, 2),
        (lib.GGML_TYPE_Q5_1, 4),
        (lib.GGML_TYPE_Q5_0, 2),
        (lib.GGML_TYPE_Q4_1, 4),
        (lib.GGML_TYPE_Q4_0, 2),
        (lib.GGML_TYPE_IQ4_NL, 2),
    )
}


class _Segment(NamedTuple):
    """A run of elements of one type; with `is_cast`, attention converts them to f16."""

    kind: int
    start: int
    stop: int
    is_cast: bool = False


_Segments = list[_Segment]
_Reading = tuple[int, _Segments]  # where a section ends, and what is in it


def check(state: Bytes) -> None:
    """Raise `StateError` if a state holds NaN, an infinity, or a number that becomes one in attention."""
    if state.size >= _START + 4 and _word(state, _START) == _DSV4:
        return
    readings = list(islice(_readings(state, _START, _MAX_SECTIONS), _MAX_READINGS))
    if not 0 < len(readings) < _MAX_READINGS:
        raise StateError("its keys and values are not laid out as libllama's are")
    for segment in dict.fromkeys(segment for reading in readings for segment in reading):
        if not _is_finite(state, segment):
            raise StateError("it holds numbers that are not finite, which would spoil the other sequences")


def _readings(state: Bytes, at: int, n_sections: int) -> Iterator[_Segments]:
    """Yield what is in each reading of a state from `at` on that comes out even with at most that many sections."""
    if at == state.size:
        yield []
        return
    for section in (_attention, _recurrent) if n_sections else ():
        found: list[_Reading] = []
        with suppress(struct.error, _Unreadable):
            found += section(state, at)
        for end, segments in found:
            for rest in _readings(state, end, n_sections - 1):
                yield segments + rest


class _Unreadable(Exception):
    """The bytes are not what this section would have."""


def _attention(state: Bytes, at: int) -> Iterator[_Reading]:
    """Yield the ways to read a section of keys and values, of which only the sequence's own stream has any."""
    n_streams, at = _counted(state, at, 1, _MAX_STREAMS)
    for n_after in reversed(range(n_streams)):
        n_cells, at = _counted(state, at, 0, state.size)
        if n_cells:
            for size in _CELL:
                with suppress(struct.error, _Unreadable):
                    for end, segments in _cells(state, at, n_cells, size):
                        if not state[end : end + 4 * n_after].any():
                            yield end + 4 * n_after, segments
            return
    yield at, []


def _cells(state: Bytes, at: int, n_cells: int, size: int) -> Iterator[_Reading]:
    """Yield the ways to read the cells of a stream, each described in `size` bytes, and their keys and values."""
    start = at + n_cells * size
    if start > state.size or (_column(state, at, n_cells, size) != 1).any():
        raise _Unreadable
    is_transposed, first = _counted(state, start, 0, 1)
    n_layers, first = _counted(state, first, 0, _MAX_LAYERS)
    segments: _Segments = []
    if not n_layers:  # all of them are in the section that follows, of the layers with a window
        yield first, segments
        return
    for read in (_rows, _columns if is_transposed else _rows):
        for _ in range(n_layers):
            segment = read(state, first, n_cells, not is_transposed)
            segments.append(segment)
            first = segment.stop
        yield first, list(segments)  # the keys alone: a model whose values are computed from them


def _recurrent(state: Bytes, at: int) -> Iterator[_Reading]:
    """Yield the ways to read a section of recurrent states, which are all f32."""
    n_cells, at = _counted(state, at, 1, state.size)
    end = at + n_cells * _RECURRENT_CELL
    if end > state.size or _column(state, at, n_cells, _RECURRENT_CELL).any():
        raise _Unreadable
    _, at = _counted(state, end, 0, 0)
    n_layers, at = _counted(state, at, 1, _MAX_LAYERS)
    segments: _Segments = []
    for _ in range(3 * n_layers):
        try:
            if _word(state, at):  # a convolution's history follows without a type
                size, start = _fitting(state, struct.unpack_from("<Q", state.data, at)[0] * n_cells, at + 8)
                segment = _Segment(lib.GGML_TYPE_F32, start, start + size)
            else:
                segment = _rows(state, at, n_cells, False)
        except (struct.error, _Unreadable):
            break
        segments.append(segment)
        at = segment.stop
    yield at, segments


def _rows(state: Bytes, at: int, n_cells: int, is_cast: bool) -> _Segment:
    kind, row = struct.unpack_from("<iQ", state.data, at)
    size, start = _fitting(state, row * n_cells, at + 12)
    return _checked(_Segment(kind, start, start + size, is_cast))


def _columns(state: Bytes, at: int, n_cells: int, is_cast: bool) -> _Segment:
    kind, size, n_rows = struct.unpack_from("<iII", state.data, at)
    size, start = _fitting(state, size * n_rows * n_cells, at + 12)
    return _checked(_Segment(kind, start, start + size, is_cast))


def _checked(segment: _Segment) -> _Segment:
    kind = _KINDS.get(segment.kind)
    if kind is None or (segment.stop - segment.start) % kind.block:
        raise _Unreadable
    return segment


def _fitting(state: Bytes, size: int, start: int) -> tuple[int, int]:
    if size > state.size - start:
        raise _Unreadable
    return size, start


def _word(state: Bytes, at: int) -> int:
    word: int = struct.unpack_from("<I", state.data, at)[0]
    return word


def _counted(state: Bytes, at: int, low: int, high: int) -> tuple[int, int]:
    """Return a number that must lie in a range, and where the next one is."""
    number = _word(state, at)
    if not low <= number <= high:
        raise _Unreadable
    return number, at + 4


def _column(state: Bytes, at: int, n_cells: int, size: int) -> npt.NDArray[np.uint32]:
    """Return the second number of every cell."""
    return np.ascontiguousarray(state[at : at + n_cells * size].reshape(n_cells, size)[:, 4:8]).view("<u4")


def _is_finite(state: Bytes, segment: _Segment) -> bool:
    kind = _KINDS[segment.kind]
    data = state[segment.start : segment.stop]
    if kind.scales:
        data = np.ascontiguousarray(data.reshape(-1, kind.block)[:, : kind.scales]).reshape(-1)
    if segment.kind == lib.GGML_TYPE_F32:
        # The scores are products of two numbers of f32: those of keys must leave room for a query's.
        return _is_below(data, np.dtype("<u4"), 0x477FF000 if segment.is_cast else 0x71800000)
    if segment.kind == lib.GGML_TYPE_BF16:
        return _is_below(data, np.dtype("<u2"), 0x7180)
    return _is_below(data, np.dtype("<u2"), 0x7C00)


def _is_below(data: Bytes, word: np.dtype[np.unsignedinteger], limit: int) -> bool:
    """Return whether the absolute values of floats are all below a limit, both seen as the integers of their bits.

    Signed, the largest integer is the largest of the positive numbers; unsigned, it is the largest of the negative
    ones, if there are any. Two maxima need no memory, and a copy of a chunk is aligned.
    """
    signed = np.dtype(f"<i{word.itemsize}")
    below_zero = limit + (1 << (8 * word.itemsize - 1))
    for start in range(0, data.size, _CHUNK):
        chunk = data[start : start + _CHUNK].copy()
        if chunk.view(signed).max() >= limit or chunk.view(word).max() >= below_zero:
            return False
    return True
