"""Models that are split into several files: whatever looks at a model looks at every part."""

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

import minerva_native as mn
from tiny_models import VOCABULARY, Array, Key, TinyModel, write_gguf

LLAMA, GPT2 = TinyModel(), TinyModel("gpt2")


def keys_of(model: TinyModel) -> dict[str, Key]:
    return {**{f"{model.architecture}.{key}": value for key, value in model.hyperparameters.items()}, **VOCABULARY}


def split(folder: Path, model: TinyModel = LLAMA, weights: dict[str, Array] | None = None, n_parts: int = 3) -> Path:
    """Write a tiny model in parts; return the path of the first."""
    weights = weights or model.weights
    in_a_part = -(-len(weights) // n_parts)
    return write_gguf(folder / "model.gguf", model.architecture, keys_of(model), weights, tensors_in_a_part=in_a_part)


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The first of three parts of a tiny llama model."""
    return split(tmp_path)


def part(first: Path, number: int) -> Path:
    return first.with_name(first.name.replace("-00001-", f"-{number:05d}-"))


def test_a_split_model_computes_like_the_whole_one(first: Path, tiny: mn.Model) -> None:
    logits = []
    with mn.Model.load(first, gpu_layers=0) as model:
        for each in (tiny, model):
            with each.context(n_ctx=64, n_threads=1) as context, context.sequence() as sequence:
                sequence.extend([1, 2, 3])
                logits.append(sequence.logits)
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.parametrize("vocab_only", [False, True])
def test_the_weights_of_all_parts_are_counted(first: Path, tiny: mn.Model, vocab_only: bool) -> None:
    with mn.Model.load(first, gpu_layers=0, vocab_only=vocab_only) as model:
        assert (model.n_params, model.size_bytes) == (tiny.n_params, tiny.size_bytes)
        assert model.path == first


def test_a_table_of_positions_in_a_later_part_limits_the_context(tmp_path: Path) -> None:
    weights = dict(GPT2.weights)
    weights["position_embd.weight"] = weights.pop("position_embd.weight")  # now the last
    with mn.Model.load(split(tmp_path, GPT2, weights), gpu_layers=0) as model:
        assert model.has_learned_positions
        with model.context(n_ctx=4096) as context:
            assert context.n_ctx == GPT2.n_ctx_train


def test_a_sequence_is_not_restored_into_a_model_that_differs_in_the_last_part(tmp_path: Path, first: Path) -> None:
    (tmp_path / "other").mkdir()
    weights = {**LLAMA.weights, "output.weight": LLAMA.weights["output.weight"] * 2}
    other = split(tmp_path / "other", weights=weights)
    assert [part(first, n).read_bytes() == part(other, n).read_bytes() for n in (1, 2, 3)] == [True, True, False]
    with mn.Model.load(first, gpu_layers=0) as model, model.context(n_ctx=64) as context:
        sequence = context.sequence()
        sequence.extend([1, 2, 3])
        sequence.save(tmp_path / "saved")
        sequence.close()
        context.restore(tmp_path / "saved").close()
    with (
        mn.Model.load(other, gpu_layers=0) as model,
        model.context(n_ctx=64) as context,
        pytest.raises(mn.StateError, match="another model"),
    ):
        context.restore(tmp_path / "saved")


@pytest.mark.parametrize("number", [2, 3])
def test_a_later_part_is_not_the_one_to_load(first: Path, number: int) -> None:
    with pytest.raises(mn.ModelLoadError, match=rf"is part {number} of 3 of a model: load the first, .*{first.name}"):
        mn.Model.load(part(first, number))


def test_parts_under_any_names_can_be_given_in_order(first: Path, tiny: mn.Model) -> None:
    paths = [part(first, number).rename(first.with_name(f"{number}.gguf")) for number in (1, 2, 3)]
    with mn.Model.load(paths) as model:
        assert model.n_params == tiny.n_params
        assert model.path == paths[0]
    for wrong, words in (
        (paths[:2], "has 3 parts, but 2 files are given"),
        ([*paths, paths[2]], "has 3 parts, but 4 files are given"),
        (paths[::-1], "is part 3 of 3 of a model: give the first part first"),
        ([paths[0], paths[2], paths[1]], "part 2 of 3, but part 3: give each part once, in order"),
        ([paths[0], paths[1], paths[1]], "part 3 of 3, but part 2: give each part once, in order"),
        ([paths[0], paths[1], first.with_name("4.gguf")], "4.gguf does not exist"),
    ):
        with pytest.raises(mn.ModelLoadError, match=words):
            mn.Model.load(wrong)
    with pytest.raises(ValueError, match="path must name a file"):
        mn.Model.load([])


def test_a_missing_part_is_named(first: Path) -> None:
    part(first, 3).unlink()
    with pytest.raises(mn.ModelLoadError, match=r"-00003-of-00003\.gguf, part 3 of 3 of the model, is missing"):
        mn.Model.load(first)


def test_a_part_under_another_name(first: Path) -> None:
    renamed = first.rename(first.with_name("model.gguf"))
    with pytest.raises(mn.ModelLoadError, match=r"model\.gguf is part 1 of 3 .* must end with -00001-of-00003\.gguf"):
        mn.Model.load(renamed)


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def overwrite(path: Path) -> None:
    path.write_text("This is no model.")


def retype(path: Path) -> None:
    """Say that a matrix has elements of another type with the same size, i32."""
    data, name = path.read_bytes(), b"blk.2.ffn_down.weight"
    assert data.count(name) <= 1
    at = data.find(name) + len(name) + 4 + 2 * 8
    if name in data:
        path.write_bytes(data[:at] + int(gguf.GGMLQuantizationType.I32).to_bytes(4, "little") + data[at + 4 :])


def number_as_first(path: Path) -> None:
    data, key = path.read_bytes(), b"split.no"
    at = data.index(key) + len(key) + 4
    path.write_bytes(data[:at] + bytes(2) + data[at + 2 :])


def renumber_with_another_type(path: Path) -> None:
    data, key = path.read_bytes(), b"split.no"
    at = data.index(key) + len(key)
    kind = int(gguf.GGUFValueType.INT16)
    path.write_bytes(data[:at] + kind.to_bytes(4, "little") + data[at + 4 :])


@pytest.mark.parametrize("vocab_only", [False, True])
@pytest.mark.parametrize(
    ("damage", "words", "whole"),
    [
        (make_pipe, "is not a regular file", True),
        (cut, "is truncated: tensor", True),
        (cut_in_the_header, "is a damaged or truncated GGUF file", True),
        (overwrite, "is not a GGUF file", True),
        (retype, "'blk.2.ffn_down.weight' has the type i32", False),
        (number_as_first, "does not say that it is part 3 of 3", True),
        (renumber_with_another_type, r"split.no is 2 \(i16\), not a u16 up to 2", True),
    ],
)
def test_damage_in_a_later_part_is_found_there(
    first: Path, damage: Callable[[Path], None], words: str, whole: bool, vocab_only: bool
) -> None:
    damage(part(first, 3))
    if vocab_only and not whole:  # nobody reads the weights
        mn.Model.load(first, vocab_only=True).close()
        return
    with pytest.raises(mn.ModelLoadError, match=f"-00003-of-00003.gguf.* {words}"):
        mn.Model.load(first, vocab_only=vocab_only)


def test_parts_of_different_models(tmp_path: Path, first: Path) -> None:
    (tmp_path / "other").mkdir()
    other = split(tmp_path / "other", TinyModel(n_layer=2))
    part(first, 3).write_bytes(part(other, 3).read_bytes())
    with pytest.raises(mn.ModelLoadError, match=r"other parts have \d+ tensors, but split.tensors.count is \d+"):
        mn.Model.load(first)


def test_a_count_of_parts_that_libllama_would_not_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", {**keys_of(LLAMA), "split.count": 70_000}, LLAMA.weights)
    with pytest.raises(mn.ModelLoadError, match=r"split.count is 70000 \(u32\), not a u16"):
        mn.Model.load(path)


def test_a_model_in_one_part_may_say_so(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint16("split.count", 1)
    writer.add_uint16("split.no", 0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(mn.ModelLoadError, match="no weights"):
        mn.Model.load(tmp_path / "model.gguf")
