"""Loading a model and making a context: `pytest bench/test_loading.py`."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import minerva_native as mn
import models
from minerva_native.check import check_model
from minerva_native.gguf import open_parts


def load(path: Path) -> None:
    mn.Model.load(path, gpu_layers=0).close()


def load_unmapped(path: Path) -> None:
    mn.Model.load(path, gpu_layers=0, mmap=False).close()


def load_unchecked(path: Path) -> None:
    mn.Model.load(path, gpu_layers=0, check=False).close()


def load_vocabulary(path: Path) -> None:
    mn.Model.load(path, vocab_only=True).close()


@pytest.mark.parametrize("how", [load, load_unchecked, load_unmapped, load_vocabulary])
def test_loading_a_vocabulary_of_128_256(benchmark: BenchmarkFixture, how: Callable[[Path], None]) -> None:
    benchmark.pedantic(how, (models.make("wide-34m", "q4_0"),), rounds=9, warmup_rounds=1)


@pytest.mark.parametrize("vocabulary", ["1,280", "128,256"])
def test_checking_a_file_with_a_vocabulary(benchmark: BenchmarkFixture, vocabulary: str) -> None:
    parts = open_parts(models.make("wide-34m", "q4_0") if vocabulary == "128,256" else mn.DEMO_PATH)
    benchmark(check_model, parts, False)


def test_loading_the_built_in_model(benchmark: BenchmarkFixture) -> None:
    benchmark(lambda: mn.Model.demo().close())


def test_making_a_context(benchmark: BenchmarkFixture) -> None:
    with mn.Model.demo() as model:
        benchmark(lambda: model.context(n_ctx=4096).close())
