"""The C side of the package: decoding steps of a single call, and the check whether to stop a computation."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import minerva_native as mn
from minerva_native._binding import ffi, lib


class Bare:
    """A bare libllama context."""

    def __init__(self, model: mn.Model, **options: Any):
        parameters = lib.llama_context_default_params()
        for name, value in {"n_ctx": 1024, "n_seq_max": 64, "n_threads": 1, "kv_unified": True, **options}.items():
            setattr(parameters, name, value)
        parameters.n_threads_batch = parameters.n_threads
        with model.raw() as pointer:
            self.pointer = lib.llama_init_from_model(pointer, parameters)
        self.n_vocab = model.tokenizer.n_vocab
        self.decoder = ffi.new("minerva_decoder *", {"context": self.pointer})

    def row(self, index: int) -> npt.NDArray[np.float32]:
        logits = lib.llama_get_logits_ith(self.pointer, index)
        return np.frombuffer(ffi.buffer(logits, 4 * self.n_vocab), np.float32).copy()


@pytest.fixture
def bare(demo: mn.Model) -> Iterator[Bare]:
    context = Bare(demo)
    yield context
    lib.llama_free(context.pointer)


@pytest.mark.parametrize("count", [1, 5, 33, 64])
def test_row_i_belongs_to_token_i_in_a_batch_of_one_token_per_sequence(bare: Bare, demo: mn.Model, count: int) -> None:
    tokens = [20 + index for index in range(count)]
    ids = list(range(count))[::-1]
    assert lib.minerva_decode_each(bare.decoder, count, tokens, [0] * count, ids) == 0
    rows = [bare.row(index) for index in range(count)]
    alone = Bare(demo)
    for token, row in zip(tokens, rows, strict=True):
        lib.llama_memory_clear(lib.llama_get_memory(alone.pointer), True)
        assert lib.minerva_decode_one(alone.decoder, token, 0, 0) == 0
        np.testing.assert_allclose(row, alone.row(-1), atol=1e-2)
    lib.llama_free(alone.pointer)


def test_the_decoder_points_at_the_last_row(bare: Bare) -> None:
    assert lib.minerva_decode_each(bare.decoder, 3, [5, 6, 7], [0, 0, 0], [0, 1, 2]) == 0
    assert bare.decoder.logits == lib.llama_get_logits_ith(bare.pointer, 2)


@pytest.mark.parametrize(("answer", "code"), [(False, 0), (True, 2)])
def test_the_object_behind_the_handle_decides_whether_to_stop(bare: Bare, answer: bool, code: int) -> None:
    class Watch:
        asked = 0

        def is_cancelled(self) -> bool:
            self.asked += 1
            return answer

    watch = Watch()
    handle = ffi.new_handle(watch)
    state = ffi.new("minerva_abort_state *", {"data": handle})
    lib.llama_set_abort_callback(bare.pointer, lib.minerva_abort, state)
    assert lib.minerva_decode_one(bare.decoder, 5, 0, 0) == code
    assert watch.asked > 0


def test_without_a_handle_nothing_stops_a_computation(bare: Bare) -> None:
    state = ffi.new("minerva_abort_state *")
    lib.llama_set_abort_callback(bare.pointer, lib.minerva_abort, state)
    assert lib.minerva_decode_one(bare.decoder, 5, 0, 0) == 0


def test_the_stack_that_is_left_is_that_of_the_calling_thread() -> None:
    left: list[int] = []
    size = 1 << 28  # larger than the stacks that the system keeps for reuse
    before = threading.stack_size()
    try:
        threading.stack_size(size)
        thread = threading.Thread(target=lambda: left.append(lib.minerva_stack_left()))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert left == [0] or size - (1 << 17) < left[0] < size
