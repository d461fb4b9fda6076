"""The vocabularies of the pinned source that come with expected token ids, against those ids.

The format is that of upstream's test: `<vocabulary>.inp` has pieces of text with a separator line between them;
`<vocabulary>.out` has a line for each piece with its ids, without BOS and EOS and without parsing special tokens.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import minerva_native as mn
from minerva_native._binding import ffi, lib

SEPARATOR = "\n__ggml_vocab_test__\n"

# Vocabularies that give every piece of text back from its ids.
LOSSLESS = (
    *("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe", "llama-spm", "mpt"),
    *("phi-3", "qwen2", "qwen35", "refact", "starcoder"),
)

# WordPiece lowercases, strips accents, and drops spaces and control characters before it looks for tokens.
LOSSY = ("bert-bge",)

# With these, `llama_detokenize`, unlike llama.cpp's own streaming, removes the space before "?".
TIDIED = ("gemma-4", "llama-bpe")

Cases = list[tuple[str, list[int]]]


@pytest.fixture(scope="module")
def cases(llama_cpp_source: Path) -> Callable[[str], Cases]:
    def read(name: str) -> Cases:
        file = llama_cpp_source / "models" / f"ggml-vocab-{name}.gguf"
        pieces = file.with_suffix(".gguf.inp").read_bytes().decode().split(SEPARATOR)
        lines = file.with_suffix(".gguf.out").read_text().splitlines()
        if len(pieces) > len(lines) and not pieces[-1]:
            pieces.pop()
        return [(text, [int(word) for word in line.split()]) for text, line in zip(pieces, lines, strict=True)]

    return read


def test_every_vocabulary_that_has_cases_is_tested(llama_cpp_source: Path) -> None:
    found = {path.name[len("ggml-vocab-") : -len(".gguf.out")] for path in (llama_cpp_source / "models").glob("*.out")}
    assert found == {*LOSSLESS, *LOSSY}


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_encode_gives_the_expected_ids_for_every_piece(
    name: str, vocabulary: Callable[[str], mn.Tokenizer], cases: Callable[[str], Cases]
) -> None:
    tokenizer, expected = vocabulary(name), cases(name)
    assert len(expected) >= 46
    for text, ids in expected:
        assert tokenizer.encode(text, add_special=False) == ids


@pytest.mark.parametrize("name", LOSSLESS)
def test_decode_gives_every_piece_back(
    name: str, vocabulary: Callable[[str], mn.Tokenizer], cases: Callable[[str], Cases]
) -> None:
    tokenizer = vocabulary(name)
    for text, ids in cases(name):
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", LOSSLESS)
def test_decode_leaves_out_special_tokens_around_a_text(
    name: str, vocabulary: Callable[[str], mn.Tokenizer], cases: Callable[[str], Cases]
) -> None:
    tokenizer = vocabulary(name)
    for text, _ in cases(name):
        assert tokenizer.decode(tokenizer.encode(text, add_special=True)) == text


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_vocabulary_gives_normalised_text_back(name: str, vocabulary: Callable[[str], mn.Tokenizer]) -> None:
    tokenizer = vocabulary(name)
    assert tokenizer.decode(tokenizer.encode("an unaffable llama walks home")) == "an unaffable llama walks home"
    assert tokenizer.decode(tokenizer.encode("Él \tgrüßt")) == "el grußt"


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", [name for name in LOSSLESS if name not in TIDIED])
def test_decode_gives_the_bytes_of_llama_detokenize_for_any_ids(
    name: str, special: bool, vocabulary_model: Callable[[str], mn.Model]
) -> None:
    # Control tokens are left out: after one, libllama keeps the space that SentencePiece puts before a text.
    model = vocabulary_model(name)
    tokenizer = model.tokenizer
    for seed in range(20):
        drawn = np.random.default_rng(seed).integers(0, tokenizer.n_vocab, 30).tolist()
        ids = [token for token in drawn if not tokenizer.is_control(token)]
        assert tokenizer.decode_bytes(ids, special) == detokenize(model, ids, special)


def detokenize(model: mn.Model, ids: list[int], special: bool) -> bytes:
    capacity = 1 << 16
    buffer = ffi.new("char[]", capacity)
    with model.raw() as pointer:
        vocab = lib.llama_model_get_vocab(pointer)
        count = lib.llama_detokenize(vocab, ids, len(ids), buffer, capacity, False, special)
    text: bytes = ffi.unpack(buffer, count)
    return text
