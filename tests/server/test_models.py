"""Which models are loaded, and when: `server.models` without a socket."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

import minerva_native as mn
from minerva_native.server import models as module
from minerva_native.server.errors import HTTPError
from minerva_native.server.models import Models
from minerva_native.server.settings import Source

SECONDS = 30.0  # how long anything may take before the test fails
SIZES = {"one": 2, "two": 1, "three": 1, "large": 4}  # of their files, as if


class Loader:
    """Loads the built-in model under any name. A name that is held is loaded once it is let go."""

    def __init__(self) -> None:
        self.made: list[tuple[str, mn.LLM]] = []
        self.were_closed: list[bool] = []  # whether those made before were, at each load
        self.held = {name: threading.Event() for name in SIZES}
        for event in self.held.values():
            event.set()

    def __call__(self, source: Source) -> mn.LLM:
        assert self.held[source.name].wait(SECONDS)
        self.were_closed.append(all(llm.closed for _, llm in self.made))
        llm = mn.LLM(mn.Model.demo(), n_ctx=64, n_threads=1)
        self.made.append((source.name, llm))
        return llm

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.made]


@pytest.fixture
def loader() -> Iterator[Loader]:
    loader = Loader()
    yield loader
    for _, llm in loader.made:
        llm.close()
        llm.model.close()


def run(story: Callable[[Models], Awaitable[None]], loader: Loader, budget: int = 4) -> None:
    async def told() -> None:
        sources = [Source(name=name, path=Path(name), size_bytes=size) for name, size in SIZES.items()]
        models = Models(sources, loader, mn.Metrics(), budget)
        try:
            async with asyncio.timeout(SECONDS):
                await story(models)
        finally:
            await models.close()

    asyncio.run(told())


async def use(models: Models, name: str) -> None:
    async with models.lend(name):
        pass


async def until_it_waits() -> None:
    for _ in range(5):  # it takes the lock, looks, and waits
        await asyncio.sleep(0)


def loaded(models: Models) -> list[str]:
    return [name for name, place in models.places.items() if place.llm is not None]


def test_a_model_that_waits_for_room_holds_up_no_other(loader: Loader) -> None:
    async def story(models: Models) -> None:
        async with models.lend("one"):
            waiting = asyncio.create_task(use(models, "large"))
            await until_it_waits()
            await use(models, "two")  # for which there is room
            await use(models, "one")
            assert not waiting.done()
            assert loaded(models) == ["one", "two"]
        await waiting
        assert loaded(models) == ["large"]

    run(story, loader)


def test_of_several_models_one_has_to_be_named(loader: Loader) -> None:
    async def story(models: Models) -> None:
        for name, status in ((None, 400), ("four", 404)):
            with pytest.raises(HTTPError, match="one, two, three, large") as raised:
                models.place(name)
            assert (raised.value.status, raised.value.param) == (status, "model")
        assert loader.names == []

    run(story, loader)


def test_the_only_model_has_any_name_or_none(loader: Loader) -> None:
    only = Models([Source(name="one", path=Path("one"), size_bytes=1)], loader, mn.Metrics(), 1)
    assert only.place(None) is only.place("gpt-4") is only.place("one")


def test_nothing_is_unloaded_for_a_model_that_will_not_fit_yet(loader: Loader) -> None:
    async def story(models: Models) -> None:
        await use(models, "two")
        async with models.lend("one"):
            waiting = asyncio.create_task(use(models, "large"))
            await until_it_waits()
            await use(models, "two")
            assert loader.names == ["two", "one"]
        await waiting

    run(story, loader)


def test_who_waits_too_long_for_room_is_told_so(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROOM_SECONDS", 0.05)

    async def story(models: Models) -> None:
        async with models.lend("one"):
            with pytest.raises(HTTPError, match="leave no memory") as raised:
                await use(models, "large")
            assert (raised.value.status, raised.value.code) == (503, "busy")
        await use(models, "large")

    run(story, loader)


def test_a_model_that_failed_is_loaded_again_once_its_memory_is_free(loader: Loader) -> None:
    async def story(models: Models) -> None:
        async with models.lend("large") as (name, broken):
            pass
        dropping = asyncio.create_task(models.drop(name, broken))
        again = asyncio.create_task(use(models, "large"))
        await asyncio.gather(dropping, again, models.drop(name, broken))
        assert models.places["large"].llm is not broken
        assert loaded(models) == ["large"]

    run(story, loader)
    assert loader.names == ["large", "large"]
    assert loader.were_closed == [True, True]


def test_a_model_that_failed_is_not_closed_while_another_is_loaded(loader: Loader) -> None:
    async def story(models: Models) -> None:
        async with models.lend("one") as (name, broken):
            pass
        loader.held["two"].clear()
        loading = asyncio.create_task(use(models, "two"))
        await until_it_waits()
        dropping = asyncio.create_task(models.drop(name, broken))
        await until_it_waits()
        assert loaded(models) == []  # who asks from now on gets another
        again = asyncio.create_task(use(models, "one"))
        await until_it_waits()
        assert not broken.closed
        loader.held["two"].set()
        await asyncio.gather(loading, dropping, again)
        assert broken.closed

    run(story, loader)
    assert loader.names == ["one", "two", "one"]


def test_a_server_that_ends_closes_what_was_to_be_dropped(loader: Loader) -> None:
    async def story(models: Models) -> None:
        async with models.lend("one") as (name, broken):
            pass
        loader.held["two"].clear()
        loading = asyncio.create_task(use(models, "two"))
        await until_it_waits()
        dropping = asyncio.create_task(models.drop(name, broken))
        await until_it_waits()
        dropping.cancel()
        await asyncio.gather(dropping, return_exceptions=True)
        assert broken.closed
        loader.held["two"].set()
        await loading

    run(story, loader)
