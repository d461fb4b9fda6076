"""`Model.load`: its options reach libllama, and what it cannot do is said."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

import minerva_native as mn
from minerva_native import model as model_module
from minerva_native._binding import ffi, lib
from tiny_models import TinyModel


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return TinyModel().write(tmp_path / "tiny.gguf")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The parameters that libllama is given."""
    found: list[Any] = []
    load = lib.minerva_model_load

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(lib, name)

        def minerva_model_load(self, paths: Any, count: int, parameters: Any, connections: Any) -> Any:
            found.append(ffi.new("struct llama_model_params *", parameters[0]))
            return load(paths, count, parameters, connections)

    monkeypatch.setattr(model_module, "lib", Watched())
    return found


# Metadata


def test_overrides_are_seen_by_libllama_and_by_everything_here(path: Path) -> None:
    overrides: dict[str, Any] = {
        "tokenizer.ggml.add_bos_token": False,
        "llama.context_length": 77,
        "general.name": "another",
        "llama.rope.freq_base": 500,  # a float in the file
        "minerva.new": 0.5,
    }
    with mn.Model.load(path) as model:
        assert model.tokenizer.adds_bos
    with mn.Model.load(path, kv_overrides=overrides) as model:
        assert not model.tokenizer.adds_bos
        assert model.n_ctx_train == 77
        assert model.metadata["general.name"] == "another"
        assert model.metadata["llama.rope.freq_base"] == 500.0
        assert model.metadata["minerva.new"] == 0.5
        assert set(overrides) <= set(model.metadata)
        assert model.kv_overrides == overrides
    with mn.Model.load(path, vocab_only=True, kv_overrides=overrides) as model:
        assert (model.n_ctx_train, model.tokenizer.adds_bos) == (77, False)


def test_an_override_that_changes_the_computation_does_so(path: Path) -> None:
    logits = []
    for overrides in ({}, {"llama.attention.layer_norm_rms_epsilon": 0.5}):
        with mn.Model.load(path, kv_overrides=overrides) as model, model.context(n_ctx=32) as context:
            sequence = context.sequence()
            sequence.extend([5, 6, 7])
            logits.append(sequence.logits.tolist())
    assert logits[0] != logits[1]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"llama.block_count": 30}, "tensor"),
        ({"llama.attention.head_count": 7}, "head_count"),
        ({"general.architecture": "nonsense"}, "nonsense"),
    ],
)
def test_an_override_is_checked_as_if_the_file_said_so(path: Path, overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(mn.ModelLoadError, match=words):
        mn.Model.load(path, kv_overrides=overrides)


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ([("a", 1)], TypeError, "kv_overrides must be a dict"),
        ({1: 2}, TypeError, "a key must be a str"),
        ({"a": None}, TypeError, "a must be a bool, int, float or str, not None"),
        ({"a": [1]}, TypeError, "not a list"),
        ({"a": 2**31}, ValueError, "from 0 to 2147483647"),
        ({"a": -1}, ValueError, "from 0 to 2147483647"),
        ({"a": float("nan")}, ValueError, "must be finite"),
        ({"a" * 128: 1}, ValueError, "127 bytes each"),
        ({"a": "x" * 128}, ValueError, "127 bytes each"),
        ({"a": "x\0y"}, ValueError, "no NUL"),
        ({"\ud800": 1}, ValueError, "may have"),
        ({"split.count": 1}, ValueError, "how the file is laid out"),
        ({"": 1}, ValueError, "how the file is laid out"),
        ({"llama.block_count": "two"}, ValueError, "llama.block_count is a int in tiny.gguf, not a str"),
        ({"llama.context_length": True}, ValueError, "is a int in tiny.gguf, not a bool"),
        ({"tokenizer.ggml.tokens": "a"}, ValueError, "is a list in tiny.gguf, not a str"),
    ],
)
def test_overrides_that_libllama_cannot_be_told(path: Path, overrides: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        mn.Model.load(path, kv_overrides=overrides)


def test_a_sequence_is_not_restored_into_a_model_with_other_overrides(path: Path, tmp_path: Path) -> None:
    overrides = {"llama.rope.freq_base": 5000.0}
    with mn.Model.load(path, kv_overrides=overrides) as model, model.context(n_ctx=32) as context:
        sequence = context.sequence()
        sequence.extend([5, 6, 7])
        sequence.save(tmp_path / "saved")
    with mn.Model.load(path) as model, model.context(n_ctx=32) as context:
        pytest.raises(mn.StateError, context.restore, tmp_path / "saved").match("another model")
    with mn.Model.load(path, kv_overrides=overrides) as model, model.context(n_ctx=32) as context:
        assert context.restore(tmp_path / "saved") == [5, 6, 7]


# Memory and devices


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, lib.LLAMA_LOAD_MODE_AUTO),
        ({"mmap": False}, lib.LLAMA_LOAD_MODE_NONE),
        ({"mlock": True}, lib.LLAMA_LOAD_MODE_MMAP_MLOCK),
        ({"mlock": True, "mmap": False}, lib.LLAMA_LOAD_MODE_MLOCK),
    ],
    ids=str,
)
def test_mmap_and_mlock_reach_libllama(path: Path, asked: list[Any], options: dict[str, Any], mode: int) -> None:
    mn.Model.load(path, **options).close()
    assert asked[0].load_mode == mode


@pytest.mark.parametrize("mode", ["none", "layer", "row", "tensor"])
def test_the_split_mode_reaches_libllama(path: Path, asked: list[Any], mode: str) -> None:
    with contextlib.suppress(mn.ModelLoadError):  # "tensor" without a GPU, in libllama's words
        mn.Model.load(path, split_mode=mode, gpu_layers=0).close()
    assert asked[0].split_mode == getattr(lib, f"LLAMA_SPLIT_MODE_{mode.upper()}")


def test_shares_and_the_main_gpu_reach_libllama(path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "gpus", lambda: [ffi.NULL, ffi.NULL])
    mn.Model.load(path, tensor_split=[3, 1], main_gpu=1, gpu_layers=0).close()
    assert asked[0].main_gpu == 1
    assert [asked[0].tensor_split[index] for index in range(lib.llama_max_devices())][:3] == [3.0, 1.0, 0.0][
        : lib.llama_max_devices()
    ]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"split_mode": "columns"}, ValueError, "split_mode must be one of none, layer, row, tensor"),
        ({"split_mode": 1}, ValueError, "split_mode"),
        ({"main_gpu": 7}, mn.DeviceError, "main_gpu=7"),
        ({"main_gpu": -1}, ValueError, "main_gpu"),
        ({"main_gpu": "0"}, TypeError, "main_gpu"),
        ({"tensor_split": [1.0] * 40}, mn.DeviceError, "tensor_split has 40 shares"),
        ({"tensor_split": [0.0]}, ValueError, "not all 0"),
        ({"tensor_split": [-1.0, 2.0]}, ValueError, "0 or more"),
        ({"tensor_split": ["a"]}, TypeError, r"tensor_split\[0\] must be a number"),
        ({"tensor_split": 1.0}, TypeError, "tensor_split"),
        ({"mlock": "yes"}, TypeError, "mlock"),
    ],
)
def test_wrong_options_are_named(path: Path, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        mn.Model.load(path, **options)


# Paths


def test_a_tilde_is_the_home_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(path.parent))
    with mn.Model.load("~/tiny.gguf") as model:
        assert model.path == path
    with pytest.raises(mn.ModelLoadError, match="does not exist"):
        mn.Model.load("~nobody-of-that-name/tiny.gguf")
