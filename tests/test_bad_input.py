"""Input that could make libllama abort is refused in Python, with the documented errors. None of it may crash."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minerva_native as mn


@pytest.fixture
def sequence(demo: mn.Model) -> Any:
    with demo.context(n_ctx=64, n_threads=1) as context, context.sequence() as sequence:
        yield sequence


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(mn.ModelLoadError, match="does not exist"):
        mn.Model.load(tmp_path / "nothing.gguf")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(mn.ModelLoadError, match="is empty"):
        mn.Model.load(tmp_path / "empty.gguf")


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(mn.ModelLoadError, match="is a directory"):
        mn.Model.load(tmp_path)


def test_a_file_that_is_not_gguf() -> None:
    with pytest.raises(mn.ModelLoadError, match="is not a GGUF file"):
        mn.Model.load(__file__)


def test_a_path_with_a_nul_byte() -> None:
    with pytest.raises(mn.ModelLoadError, match="cannot be read"):
        mn.Model.load("a\0b.gguf")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(mn.ModelLoadError, match="is not a regular file"):
        mn.Model.load(tmp_path / "pipe.gguf")


def test_a_file_truncated_anywhere(demo: mn.Model, tmp_path: Path) -> None:
    whole = demo.path.read_bytes()
    for part in range(1, 50):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[: len(whole) * part // 50])
        with pytest.raises(mn.ModelLoadError, match="truncated"):
            mn.Model.load(path)


def test_a_header_truncated_anywhere(demo: mn.Model, tmp_path: Path) -> None:
    whole = demo.path.read_bytes()
    for size in range(4, 400):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:size])
        with pytest.raises(mn.ModelLoadError):
            mn.Model.load(path)


def test_a_gguf_file_of_an_unknown_architecture(demo: mn.Model, tmp_path: Path) -> None:
    path = tmp_path / "unknown.gguf"
    path.write_bytes(demo.path.read_bytes().replace(b"llama", b"lambs"))
    with pytest.raises(mn.ModelLoadError, match="lambs"):
        mn.Model.load(path)


@pytest.mark.parametrize("n_ctx", [1, -1, 10**12, -(10**30)])
def test_a_context_size_out_of_range(demo: mn.Model, n_ctx: int) -> None:
    with pytest.raises(ValueError, match="n_ctx must be"):
        demo.context(n_ctx=n_ctx)


def test_a_context_larger_than_the_machine(demo: mn.Model) -> None:
    with pytest.raises(mn.ContextError, match="KV cache of about"):
        demo.context(n_ctx=2_000_000_000)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"n_ctx": 1.5}, TypeError),
        ({"n_ctx": "4096"}, TypeError),
        ({"n_ctx": None}, TypeError),
        ({"n_seq": 0}, ValueError),
        ({"n_seq": 10**6}, ValueError),
        ({"n_batch": 0}, ValueError),
        ({"n_ubatch": -1}, ValueError),
        ({"n_threads": 0}, ValueError),
        ({"n_threads": 10**6}, ValueError),
        ({"kv_type": "q9_9"}, ValueError),
        ({"kv_type": 16}, ValueError),
        ({"flash_attention": "perhaps"}, ValueError),
        ({"kv_type": "q8_0", "flash_attention": "off"}, mn.ContextError),
        ({"n_context": 64}, TypeError),
    ],
)
def test_a_context_option_out_of_range(demo: mn.Model, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        demo.context(**{"n_ctx": 64, **options})


@pytest.mark.parametrize("n_ctx", [2, 3, 255, 256, 257, 1000])
def test_a_small_context_works_to_its_last_cell(demo: mn.Model, n_ctx: int) -> None:
    with demo.context(n_ctx=n_ctx, n_threads=1) as context, context.sequence() as sequence:
        assert sequence.extend([5] * n_ctx) == n_ctx
        assert np.isfinite(sequence.logits).all()
        with pytest.raises(mn.ContextFullError, match=f"{n_ctx} of n_ctx={n_ctx} cells are used"):
            sequence.append(5)


def test_a_prompt_longer_than_the_context(sequence: mn.Sequence) -> None:
    with pytest.raises(mn.ContextFullError, match="65 more are wanted, 64 are free"):
        sequence.extend([5] * 65)
    assert len(sequence) == 0


def test_an_empty_prompt(sequence: mn.Sequence) -> None:
    assert sequence.extend([]) == 0
    with pytest.raises(mn.ContextError, match="the sequence is empty"):
        _ = sequence.logits
    with pytest.raises(ValueError, match="the sequence is empty"):
        mn.generate(sequence)


@pytest.mark.parametrize("call", ["extend", "score", "decode"])
@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([-1], ValueError),
        ([10**6], ValueError),
        ([10**30], ValueError),
        ([1, 2, -(2**31)], ValueError),
        (np.array([2**32], np.uint64), ValueError),
        (np.array([[1, 2]]), ValueError),
        ([1.0], TypeError),
        (np.array([1.0]), TypeError),
        ([float("nan")], TypeError),
        (["1"], TypeError),
        ("12", TypeError),
        (b"12", TypeError),
        ([None], TypeError),
        ([[1]], (TypeError, ValueError)),
        ([True, False], TypeError),
        (7, TypeError),
        (None, TypeError),
    ],
)
def test_ids_that_are_not_tokens(sequence: mn.Sequence, call: str, ids: Any, error: Any) -> None:
    owner: Any = sequence.context.model.tokenizer if call == "decode" else sequence
    with pytest.raises(error):
        getattr(owner, call)(ids)
    assert len(sequence) == 0


@pytest.mark.parametrize(
    ("token", "error"), [(-1, ValueError), (10**6, ValueError), (1.5, TypeError), ("a", TypeError)]
)
def test_an_id_that_is_not_a_token(sequence: mn.Sequence, token: Any, error: type[Exception]) -> None:
    tokenizer = sequence.context.model.tokenizer
    for call in (sequence.append, tokenizer.is_end, tokenizer.is_control, tokenizer.stream().feed):
        with pytest.raises(error):
            call(token)


@pytest.mark.parametrize("text", [None, 7, ["a"]])
def test_a_text_that_is_not_a_string(demo: mn.Model, text: Any) -> None:
    with pytest.raises(TypeError, match="text must be a str"):
        demo.tokenizer.encode(text)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_a_temperature_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        mn.SamplingParams(temperature=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.5, "1", -2, 2**64])
def test_a_seed_out_of_range(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="seed"):
        mn.SamplingParams(seed=value)


@pytest.mark.parametrize("n", [-1, 4, 10**30])
def test_truncating_and_rewinding_out_of_range(sequence: mn.Sequence, n: int) -> None:
    sequence.extend([5, 6, 7])
    for call in (sequence.truncate, sequence.rewind):
        with pytest.raises(ValueError, match="3"):
            call(n)
    assert sequence.tokens == [5, 6, 7]


def test_more_sequences_than_n_seq(demo: mn.Model) -> None:
    with demo.context(n_ctx=64, n_seq=2, n_threads=1) as context:
        first, second = context.sequence(), context.sequence()
        with pytest.raises(mn.ContextError, match="all 2 sequences"):
            context.sequence()
        first.close()
        context.sequence().extend([1])
        second.extend([2])


def uses_of_a_closed_object() -> list[Callable[[mn.Model, mn.Context, mn.Sequence], object]]:
    return [
        lambda model, context, sequence: model.n_params,
        lambda model, context, sequence: model.metadata["general.name"],
        lambda model, context, sequence: model.context(n_ctx=64),
        lambda model, context, sequence: model.tokenizer.encode("Hello"),
        lambda model, context, sequence: context.sequence(),
        lambda model, context, sequence: sequence.extend([1]),
        lambda model, context, sequence: sequence.append(1),
        lambda model, context, sequence: sequence.score([1]),
        lambda model, context, sequence: sequence.truncate(0),
        lambda model, context, sequence: sequence.rewind(0),
        lambda model, context, sequence: sequence.logits,
    ]


@pytest.mark.parametrize("use", uses_of_a_closed_object())
def test_using_a_closed_object(use: Callable[[mn.Model, mn.Context, mn.Sequence], object]) -> None:
    model = mn.Model.demo()
    context = model.context(n_ctx=64, n_threads=1)
    sequence = context.sequence()
    sequence.extend([1, 2, 3])
    model.close()
    with pytest.raises(mn.ClosedError, match="is closed"):
        use(model, context, sequence)
    for thing in (sequence, context, model):
        thing.close()


def test_a_model_without_weights_has_no_context(demo: mn.Model) -> None:
    with mn.Model.load(demo.path, vocab_only=True) as model:
        assert model.tokenizer.encode("Hello")
        assert (model.n_embd, model.n_layer, model.n_params) == (demo.n_embd, demo.n_layer, demo.n_params)
        with pytest.raises(mn.ContextError, match="vocab_only"):
            model.context(n_ctx=64)


@pytest.mark.parametrize("devices", [["GPU99"], ["CPU", "GPU99"]])
def test_a_device_that_does_not_exist(demo: mn.Model, devices: list[str]) -> None:
    with pytest.raises(mn.DeviceError, match="there is no device 'GPU99' here"):
        mn.Model.load(demo.path, devices=devices)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"gpu_layers": "many"}, ValueError),
        ({"gpu_layers": -2}, ValueError),
        ({"gpu_layers": 2**40}, ValueError),
        ({"gpu_layers": 1.5}, TypeError),
        ({"devices": "CPU"}, TypeError),
    ],
)
def test_a_load_option_out_of_range(demo: mn.Model, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        mn.Model.load(demo.path, **options)
