"""Finds numbers in a saved state that attention cannot bear.

All sequences of a context share the tensors of its KV cache, and attention multiplies also what it has masked, by 0. A
NaN or an infinity in one sequence's cell therefore makes the logits of every other sequence NaN, and stays there after
the sequence is closed. So a state from a file is examined before libllama reads it.

The layout is what `llama_kv_cache::state_write` and its relatives write. It does not say everything: whether there are
values at all depends on the model. Every reading of the bytes that comes out even is therefore examined.
"""

import math
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
_MAX_TRIES = 100
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
    reader = _Reader(state)
    if state.size >= _START + 4 and reader.word(_START) == _DSV4:
        return
    readings = list(islice(reader.readings(_START, _MAX_SECTIONS), _MAX_READINGS))
    if not 0 < len(readings) < _MAX_READINGS:
        raise StateError("its keys and values are not laid out as libllama's are")
    for segment in dict.fromkeys(segment for reading in readings for segment in reading):
        if not _is_finite(state, segment):
            raise StateError("it holds numbers that are not finite, which would spoil the other sequences")


class _Unreadable(Exception):
    """The bytes are not what this section would have."""


class _Reader:
    """Finds the ways to read a state: what begins at a byte, where that ends, and the segments in it."""

    def __init__(self, state: Bytes):
        self._state, self._n_tries = state, 0

    def readings(self, at: int, n_sections: int) -> Iterator[_Segments]:
        """Yield what is in each reading from `at` on that comes out even with at most that many sections."""
        if at == self._state.size:
            yield []
            return
        for section in (self._attention, self._recurrent) if n_sections else ():
            found: list[_Reading] = []
            with suppress(struct.error, _Unreadable):
                found += section(at)
            for end, segments in found:
                for rest in self.readings(end, n_sections - 1):
                    yield segments + rest

    def word(self, at: int) -> int:
        """Return the 32-bit number at a byte."""
        word: int = self._unpack("<I", at)[0]
        return word

    def _attention(self, at: int) -> Iterator[_Reading]:
        n_streams, at = self._number(at, 1, _MAX_STREAMS)
        return self._streams(at, n_streams)

    def _streams(self, at: int, n: int) -> Iterator[_Reading]:
        for n_after in reversed(range(n)):
            n_cells, at = self._number(at, 0, self._state.size)
            if n_cells:
                for size in _CELL:
                    with suppress(struct.error, _Unreadable):
                        for end, segments in self._cells(at, n_cells, size):
                            for last, more in self._streams(end, n_after):
                                yield last, segments + more
                return
        yield at, []

    def _cells(self, at: int, n_cells: int, size: int) -> Iterator[_Reading]:
        """Yield the ways to read the cells of a stream, each described in `size` bytes, and their keys and values."""
        self._n_tries += 1
        if self._n_tries > _MAX_TRIES:
            raise StateError("it can be read in more ways than any that libllama wrote")
        at = self._skip_cells(at, n_cells, size, 1)
        is_transposed, at = self._number(at, 0, 1)
        n_layers, at = self._number(at, 0, _MAX_LAYERS)
        segments: _Segments = []
        if not n_layers:  # all of them are in the section that follows, of the layers with a window
            yield at, segments
            return
        for form in ("<iQ", "<iII" if is_transposed else "<iQ"):
            for _ in range(n_layers):
                segments.append(self._segment(form, at, n_cells, is_cast=not is_transposed))
                at = segments[-1].stop
            yield at, list(segments)  # the keys alone: a model whose values are computed from them

    def _recurrent(self, at: int) -> Iterator[_Reading]:
        """Yield the one way to read a section of recurrent states, which are all f32."""
        n_cells, at = self._number(at, 1, self._state.size)
        at = self._skip_cells(at, n_cells, _RECURRENT_CELL, 0)
        _, at = self._number(at, 0, 0)
        n_layers, at = self._number(at, 1, _MAX_LAYERS)
        segments: _Segments = []
        with suppress(struct.error, _Unreadable):
            for _ in range(3 * n_layers):
                # A convolution's second history has no type: where that of others is, 0 for f32, it has its size.
                form = "<Q" if self.word(at) else "<iQ"
                segments.append(self._segment(form, at, n_cells, is_cast=False))
                at = segments[-1].stop
        yield at, segments

    def _segment(self, form: str, at: int, n_cells: int, is_cast: bool) -> _Segment:
        """Return the numbers of all cells in a layer, which begin with their type and sizes."""
        kind, *sizes = self._unpack(form, at) if form != "<Q" else (lib.GGML_TYPE_F32, *self._unpack(form, at))
        start = at + struct.calcsize(form)
        stop = start + n_cells * math.prod(sizes)
        if stop > self._state.size or kind not in _KINDS or (stop - start) % _KINDS[kind].block:
            raise _Unreadable
        return _Segment(kind, start, stop, is_cast)

    def _number(self, at: int, low: int, high: int) -> tuple[int, int]:
        """Return a number that must lie in a range, and where the next one is."""
        number = self.word(at)
        if not low <= number <= high:
            raise _Unreadable
        return number, at + 4

    def _skip_cells(self, at: int, n_cells: int, size: int, n_ids: int) -> int:
        """Return where the descriptions of cells end, whose second number is how many sequence ids follow."""
        end = at + n_cells * size
        cells = self._state[at:end]
        if end > self._state.size or (np.ascontiguousarray(cells.reshape(-1, size)[:, 4:8]).view("<u4") != n_ids).any():
            raise _Unreadable
        return end

    def _unpack(self, form: str, at: int) -> tuple[int, ...]:
        return struct.unpack_from(form, self._state.data, at)


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
