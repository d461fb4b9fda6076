"""The bytes that a token needs, against sums over weights that the test wrote."""

import re
import threading
from collections.abc import Callable

import pytest

import minerva_native as mn
from minerva_native.benchmark import roofline
from tiny_models import TOKENS, TinyModel

Load = Callable[[TinyModel], mn.Model]


def touched(shape: TinyModel, share: Callable[[str], float]) -> float:
    """Return the bytes that a token reads of float32 weights, given the share it reads of each tensor."""
    return sum(share(name) * weights.nbytes for name, weights in shape.weights.items())


def test_all_weights_are_read_but_one_row_of_the_embeddings(load_tiny: Load) -> None:
    shape = TinyModel()
    expected = touched(shape, lambda name: 1 / len(TOKENS) if name == "token_embd.weight" else 1)
    assert roofline.weights_touched(load_tiny(shape)).total == pytest.approx(expected)


def test_tied_embeddings_are_read_whole(load_tiny: Load) -> None:
    shape = TinyModel("gemma2", tied=True)
    model = load_tiny(shape)
    assert roofline.weights_touched(model).total == pytest.approx(touched(shape, lambda name: 1))
    assert roofline.weights_touched(model).total == model.size_bytes


def test_only_the_experts_in_use_are_read(load_tiny: Load) -> None:
    shape = TinyModel("qwen3moe", n_expert=6, n_expert_used=2)

    def share(name: str) -> float:
        if name == "token_embd.weight":
            return 1 / len(TOKENS)
        return 2 / 6 if "_exps" in name else 1

    assert roofline.weights_touched(load_tiny(shape)).total == pytest.approx(touched(shape, share))


def test_an_encoder_is_not_read_again(load_tiny: Load) -> None:
    shape = TinyModel("t5")

    def share(name: str) -> float:
        if name == "token_embd.weight":
            return 1 / len(TOKENS)
        return 0 if re.match(r"enc\.", name) else 1

    assert roofline.weights_touched(load_tiny(shape)).total == pytest.approx(touched(shape, share))


def test_heads_that_predict_more_tokens_are_not_read(load_tiny: Load) -> None:
    shape = TinyModel("mimo2", n_layer=3, n_mtp=2)
    model = load_tiny(shape)

    def share(name: str) -> float:
        if name == "token_embd.weight":
            return 1 / len(TOKENS)
        return 0 if name.startswith(("blk.3.", "blk.4.")) else 1

    whole = roofline.weights_touched(model)
    assert whole.total == pytest.approx(touched(shape, share))
    try:
        model.gpu_layers = 4  # the output, the heads, and the last layer
        on_gpu = touched(shape, lambda name: share(name) * name.startswith(("output", "blk.2.")))
        assert roofline.weights_touched(model).gpu == pytest.approx(on_gpu)
    finally:
        model.gpu_layers = 0


def test_weights_are_on_the_device_of_their_layer(load_tiny: Load) -> None:
    shape = TinyModel(n_layer=3)
    model = load_tiny(shape)
    whole = roofline.weights_touched(model)
    assert whole.gpu == 0
    try:
        model.gpu_layers = 2  # the output and the last layer
        on_gpu = touched(shape, lambda name: name.startswith(("output", "blk.2.")))
        assert tuple(roofline.weights_touched(model)) == pytest.approx((whole.total - on_gpu, on_gpu))
        model.gpu_layers = 4
        assert roofline.weights_touched(model).cpu == pytest.approx(whole.total - touched(shape, is_on_gpu))
    finally:
        model.gpu_layers = 0


def is_on_gpu(name: str) -> bool:
    return name != "token_embd.weight"


@pytest.mark.parametrize("n_threads", [1, 2])
def test_memory_can_be_read(monkeypatch: pytest.MonkeyPatch, n_threads: int) -> None:
    monkeypatch.setattr(roofline, "READ_SECONDS", 0.001)
    assert roofline.Reader(n_threads).bandwidth() > 0


def test_a_thread_that_cannot_start_does_not_leave_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def start_one(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(mn.MinervaError, match="cannot be read with 2 threads"):
        roofline.Reader(2).bandwidth()
    started[0].join(10)
    assert not started[0].is_alive()


def test_the_limit_is_the_time_to_read_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline.Reader, "bandwidth", lambda reader: 1e9)
    limit = roofline.Limit(roofline.Weights(6e8, 0.0), 1)
    assert limit.cpu_bandwidth() == 1e9
    assert limit.seconds(4e8, 1e9) == pytest.approx(1.0)
    assert limit.seconds(4e8, 2e9) == pytest.approx(0.5)


def test_weights_on_a_gpu_are_read_at_its_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = mn.Device("CUDA0", "a card", "gpu", 1 << 40, 1 << 40)
    monkeypatch.setattr(mn, "devices", lambda: [gpu])
    monkeypatch.setattr(roofline.Reader, "bandwidth", lambda reader: 1e9)
    monkeypatch.setattr(mn.Device, "copy_bandwidth", lambda device: {"CUDA0": 1e12}[device.name])
    half = roofline.Weights(1e9, 1e9)
    assert roofline.Limit(half, 1).seconds(2e9, 1e9) == pytest.approx(2.0 + 0.002)
    whole = roofline.Limit(roofline.Weights(0.0, 1e12), 1)
    assert whole.seconds(0.0, whole.cpu_bandwidth()) == pytest.approx(1.0)
