"""Reading the header of a GGUF file. Invalid files are in `test_bad_input.py`."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minerva_native as mn
import minerva_native.gguf
from tiny_models import TOKENS, TinyModel, write_gguf

T = gguf.GGUFValueType

SCALARS = {
    "uint8": (T.UINT8, 255),
    "int8": (T.INT8, -128),
    "uint16": (T.UINT16, 65_535),
    "int16": (T.INT16, -32_768),
    "uint32": (T.UINT32, 2**32 - 1),
    "int32": (T.INT32, -(2**31)),
    "uint64": (T.UINT64, 2**64 - 1),
    "int64": (T.INT64, -(2**63)),
    "float32": (T.FLOAT32, 0.15625),
    "float64": (T.FLOAT64, 0.1),
    "bool": (T.BOOL, True),
    "string": (T.STRING, "Größe 🦙"),
    "empty string": (T.STRING, ""),
}

ARRAYS: dict[str, tuple[gguf.GGUFValueType, list[object]]] = {
    "uint8": (T.UINT8, [0, 255]),
    "int8": (T.INT8, [-128, 127]),
    "uint16": (T.UINT16, [0, 65_535]),
    "int16": (T.INT16, [-32_768, 32_767]),
    "uint32": (T.UINT32, [0, 2**32 - 1]),
    "int32": (T.INT32, [-(2**31), 2**31 - 1]),
    "uint64": (T.UINT64, [0, 2**64 - 1]),
    "int64": (T.INT64, [-(2**63), 2**63 - 1]),
    "float32": (T.FLOAT32, [-1.5, 0.0, 0.15625]),
    "float64": (T.FLOAT64, [0.1, 1e300]),
    "bool": (T.BOOL, [True, False, True]),
    "string": (T.STRING, ["", "a", "Größe 🦙"]),
}

Write = Callable[..., mn.GGUF]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function that writes one key with the `gguf` package and opens the file."""

    def write(value: object, kind: gguf.GGUFValueType, element: gguf.GGUFValueType | None = None) -> mn.GGUF:
        writer = gguf.GGUFWriter(tmp_path / "file.gguf", "llama")
        writer.add_key_value("the.key", value, kind, element)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return mn.GGUF(tmp_path / "file.gguf")

    return write


@pytest.fixture
def tensors(tmp_path: Path) -> mn.GGUF:
    return mn.GGUF(
        write_gguf(
            tmp_path / "file.gguf",
            "llama",
            {},
            {
                "vector": np.arange(3, dtype=np.float32),
                "matrix": np.zeros((5, 2), np.float32),
                "half": np.zeros((3, 4, 5), np.float16),
            },
        )
    )


@pytest.mark.parametrize(("kind", "value"), SCALARS.values(), ids=SCALARS.keys())
def test_a_value_is_what_was_written(write: Write, kind: gguf.GGUFValueType, value: object) -> None:
    read = write(value, kind).metadata["the.key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(("kind", "values"), ARRAYS.values(), ids=ARRAYS.keys())
def test_an_array_is_a_list_of_what_was_written(write: Write, kind: gguf.GGUFValueType, values: list[object]) -> None:
    read = write(values, T.ARRAY, kind).metadata["the.key"]
    assert read == values
    assert isinstance(read, list)
    assert list(map(type, read)) == list(map(type, values))


def test_metadata_is_a_mapping_of_every_key(tmp_path: Path) -> None:
    metadata = mn.GGUF(write_gguf(tmp_path / "file.gguf", "llama", {"one": 1, "two": "zwei"})).metadata
    assert dict(metadata) == {"general.architecture": "llama", "one": 1, "two": "zwei"}
    assert len(metadata) == 3
    assert "one" in metadata
    assert "three" not in metadata


def test_a_missing_key_is_a_key_error(tiny: mn.Model) -> None:
    with pytest.raises(KeyError):
        tiny.metadata["no.such.key"]
    assert tiny.metadata.get("no.such.key") is None


def test_metadata_is_read_only(tiny: mn.Model) -> None:
    with pytest.raises(TypeError):
        tiny.metadata["general.name"] = "other"  # type: ignore[index]


def test_a_models_metadata_holds_its_vocabulary(tiny: mn.Model) -> None:
    assert tiny.metadata["tokenizer.ggml.tokens"] == TOKENS


def test_tensors_are_listed_with_type_shape_and_size(tensors: mn.GGUF) -> None:
    assert [(tensor.name, tensor.type, tensor.size_bytes) for tensor in tensors.tensors] == [
        ("vector", "f32", 12),
        ("matrix", "f32", 40),
        ("half", "f16", 120),
    ]


def test_a_shape_has_the_fastest_varying_dimension_first(tensors: mn.GGUF) -> None:
    assert [tensor.shape for tensor in tensors.tensors] == [(3,), (2, 5), (5, 4, 3)]


def test_an_offset_is_where_the_data_begins_in_the_file(tensors: mn.GGUF) -> None:
    vector = tensors.tensors[0]
    data = tensors.path.read_bytes()[vector.offset : vector.offset + vector.size_bytes]
    assert np.frombuffer(data, np.float32).tolist() == [0.0, 1.0, 2.0]


def test_a_complete_file_passes_the_check_of_its_tensors(tensors: mn.GGUF) -> None:
    tensors.check_tensors()


def test_a_tensor_beyond_the_end_of_the_file_is_named(tensors: mn.GGUF, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tensors.path.read_bytes()[: tensors.tensors[1].offset + 8])
    with pytest.raises(mn.ModelLoadError, match="'matrix'"):
        mn.GGUF(cut).check_tensors()


def test_values_read_before_close_remain_valid(tmp_path: Path) -> None:
    file = mn.GGUF(write_gguf(tmp_path / "file.gguf", "llama", {"numbers": [1, 2, 3]}))
    numbers = file.metadata["numbers"]
    file.close()
    assert numbers == [1, 2, 3]


@pytest.mark.parametrize("read", [lambda file: file.metadata["general.architecture"], lambda file: file.tensors])
def test_using_a_closed_file(tmp_path: Path, read: Callable[[mn.GGUF], object]) -> None:
    file = mn.GGUF(write_gguf(tmp_path / "file.gguf", "llama", {}))
    file.close()
    file.close()
    with pytest.raises(mn.ClosedError):
        read(file)


def test_a_model_counts_the_weights_and_bytes_of_its_file(tiny: mn.Model) -> None:
    weights = TinyModel().weights.values()
    assert tiny.n_params == sum(weight.size for weight in weights)
    assert tiny.size_bytes == sum(weight.nbytes for weight in weights)


def test_changing_a_list_of_the_metadata_does_not_change_the_metadata(demo: mn.Model) -> None:
    tokens = demo.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    tokens.clear()
    assert demo.metadata["tokenizer.ggml.tokens"] != []


@pytest.mark.parametrize(("kind", "values"), ARRAYS.values(), ids=ARRAYS.keys())
def test_arrays_can_be_read_as_numpy_arrays(write: Write, kind: gguf.GGUFValueType, values: list[object]) -> None:
    file = write(values, T.ARRAY, kind)
    numbers, strings = file.numbers("the.key"), file.strings("the.key")
    if kind == T.STRING:
        assert numbers is None
        assert strings == [str(value).encode() for value in values]
    else:
        assert strings is None
        assert numbers is not None
        assert numbers.tolist() == values


@pytest.mark.parametrize("key", ["no.such.key", "general.architecture", "number"])
def test_what_is_no_array_has_no_elements(tmp_path: Path, key: str) -> None:
    file = mn.GGUF(write_gguf(tmp_path / "file.gguf", "llama", {"number": 1}))
    assert file.numbers(key) is None
    assert file.strings(key) is None
    assert file.string_facts(key) is None


@given(st.lists(st.sampled_from(["", "a", "ab", "b\0c", "\0", "[EMPTY_2]", "x" * 300]), min_size=1))
def test_strings_are_read_as_libllama_reads_tokens(strings: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = mn.GGUF(write_gguf(Path(folder) / "file.gguf", "llama", {"strings": strings}))
        raw, facts = file.strings("strings"), file.string_facts("strings")
        file.close()
    assert raw == [string.partition("\0")[0].encode() for string in strings]
    seen = [text or b"[EMPTY_%d]" % index for index, text in enumerate(raw)]
    lengths = [len(text) for text in seen]
    assert facts is not None
    assert (facts.n, facts.longest) == (len(seen), max(lengths))
    assert lengths[facts.longest_at] == facts.longest
    assert (facts.squares, facts.cubes) == (sum(n**2 for n in lengths), sum(n**3 for n in lengths))
    if facts.equal is None:
        assert len(set(seen)) == len(seen)
    else:
        first, second = facts.equal
        assert first < second
        assert seen[first] == seen[second]
