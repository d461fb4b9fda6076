"""Text to tokens and back, with a vocabulary of 128,256: `pytest bench/test_tokenizing.py`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import minerva_native as mn
import models

TEXT = Path(__file__).with_name("models.py").read_text()[:4000]


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[mn.Tokenizer]:
    with mn.Model.load(models.VOCABULARIES / "ggml-vocab-llama-bpe.gguf", vocab_only=True) as model:
        yield model.tokenizer


def test_encoding_a_page(benchmark: BenchmarkFixture, tokenizer: mn.Tokenizer) -> None:
    ids = benchmark(tokenizer.encode, TEXT)
    benchmark.extra_info["tokens"] = len(ids)


def test_decoding_a_page(benchmark: BenchmarkFixture, tokenizer: mn.Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special=False)
    assert benchmark(tokenizer.decode, ids) == TEXT


def test_streaming_a_page(benchmark: BenchmarkFixture, tokenizer: mn.Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special=False)

    def stream() -> str:
        decoder = tokenizer.stream()
        return "".join([decoder.feed(token) for token in ids]) + decoder.flush()

    assert benchmark(stream) == TEXT
