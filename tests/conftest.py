"""Shared fixtures: the pinned source, its vocabularies, the demo model, and tiny random models."""

import functools
import importlib.util
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest

import minerva_native as mn
from tiny_models import TinyModel
from workers import Worker

ROOT = Path(__file__).parents[1]

# A shell starts background jobs with Ctrl-C ignored, and processes that the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every run and no deadline, so that a failure can be reproduced anywhere.
hypothesis.settings.register_profile("minerva", max_examples=40, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("minerva")


@pytest.fixture(scope="session")
def fetch() -> ModuleType:
    """The build's fetch script, as a module."""
    spec = importlib.util.spec_from_file_location("fetch", ROOT / "vendor" / "llama.cpp" / "fetch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def llama_cpp_source(fetch: ModuleType) -> Path:
    """The folder of the pinned llama.cpp source; fetched through pip only if no build has fetched it yet."""
    source: Path = fetch.fetch(fetch.read_pin(), fetch.HERE / "source")
    return source


@pytest.fixture(scope="session")
def vocabulary_model(llama_cpp_source: Path) -> Callable[[str], mn.Model]:
    """A function that loads a vocabulary file of the pinned source, such as "llama-bpe": a model without weights."""

    @functools.cache
    def load(name: str) -> mn.Model:
        return mn.Model.load(llama_cpp_source / "models" / f"ggml-vocab-{name}.gguf", vocab_only=True)

    return load


@pytest.fixture(scope="session")
def vocabulary(vocabulary_model: Callable[[str], mn.Model]) -> Callable[[str], mn.Tokenizer]:
    """A function that returns the tokenizer of one of those files."""
    return lambda name: vocabulary_model(name).tokenizer


@pytest.fixture(scope="session")
def demo() -> Iterator[mn.Model]:
    """The trained model inside the package."""
    with mn.Model.demo() as model:
        yield model


@pytest.fixture(scope="session")
def demo_draft() -> Iterator[mn.Model]:
    """The smaller trained model, which drafts for it."""
    with mn.Model.demo_draft() as model:
        yield model


@pytest.fixture(scope="session")
def load_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyModel], mn.Model]:
    """A function that makes and loads a tiny random model, with its heads if it has some, on the CPU."""
    folder = tmp_path_factory.mktemp("tiny-models")

    @functools.cache
    def load(wanted: TinyModel) -> mn.Model:
        path = wanted.write(folder / f"{len(list(folder.iterdir()))}-{wanted.architecture}.gguf")
        return mn.Model.load(path, gpu_layers=0, load_mtp=wanted.n_mtp > 0)

    return load


@pytest.fixture(scope="session")
def tiny(load_tiny: Callable[[TinyModel], mn.Model]) -> mn.Model:
    """A tiny random llama model in F32."""
    return load_tiny(TinyModel())


@pytest.fixture(scope="module")
def two() -> Iterator[list[str]]:
    """Two workers that nothing is done to."""
    workers = [Worker(), Worker()]
    yield [worker.endpoint for worker in workers]
    for worker in workers:
        worker.kill()
