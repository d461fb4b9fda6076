"""The models that are served: loaded when they are first asked for, unloaded when others need the room."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import minerva_native as mn

from .errors import HTTPError
from .settings import Source

_logger = logging.getLogger("minerva_native.server")


_ROOM_SECONDS = 60.0  # how long a request waits for others to leave memory for its model


@dataclass
class Place:
    """A model, and what is loaded of it.

    Attributes:
        source: where it comes from.
        llm: what serves it, or None.
        n_users: how many requests use it.
        used: when it was last used, by `time.monotonic`.
        loading: loads it, for all who wait for it.
    """

    source: Source
    llm: mn.LLM | None = None
    n_users: int = 0
    used: float = 0.0
    loading: asyncio.Task[mn.LLM] | None = None


class Models:
    """Models by name. Used on one event loop.

    Args:
        sources: the models.
        load: makes what serves one, in a thread.
        metrics: count what each model does while it is loaded.
        budget_bytes: how large the files of the loaded models may be together. One is loaded in any case.
        idle_seconds: unload a model that was not used for so long; None to keep it.

    Attributes:
        places: by name.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        load: Callable[[Source], mn.LLM],
        metrics: mn.Metrics,
        budget_bytes: int,
        idle_seconds: float | None = None,
    ):
        self.places = {source.name: Place(source) for source in sources}
        self._load, self._metrics = load, metrics
        self._budget, self._idle_seconds = budget_bytes, idle_seconds
        self._freed = asyncio.Event()
        self._changing = asyncio.Lock()  # held by who loads or unloads, so that the memory is as the places say

    def place(self, name: str | None) -> Place:
        """Return a model. If there is only one, every name is its, and none.

        Raises:
            HTTPError: there is none of that name, or several and no name.
        """
        if len(self.places) == 1:
            return next(iter(self.places.values()))
        known = ", ".join(self.places)
        if name is None:
            raise HTTPError(400, f"model: there are several, so name one of {known}", "model")
        if name not in self.places:
            raise HTTPError(404, f"there is no model {name[:200]!r}: there are {known}", "model", "model_not_found")
        return self.places[name]

    @asynccontextmanager
    async def lend(self, name: str | None) -> AsyncIterator[tuple[str, mn.LLM]]:
        """Lend a model, by its name and loaded; it stays while it is lent."""
        place = self.place(name)
        place.n_users += 1
        try:
            llm = place.llm
            if llm is None:
                if place.loading is None:
                    place.loading = asyncio.create_task(self._loaded(place))
                    place.loading.add_done_callback(_look_at)  # perhaps all who waited have gone
                llm = await asyncio.shield(place.loading)
            yield place.source.name, llm
        finally:
            place.n_users -= 1
            place.used = time.monotonic()
            self._freed.set()

    async def _loaded(self, place: Place) -> mn.LLM:
        """Load a model. While it waits for room, others may be loaded for which there is enough."""
        until = None
        try:
            while True:
                async with self._changing:
                    if await self._make_room(place):
                        return await self._load_now(place)
                    self._freed.clear()
                now = asyncio.get_running_loop().time()
                until = now + _ROOM_SECONDS if until is None else until
                async with asyncio.timeout_at(until):
                    await self._freed.wait()
        except TimeoutError:
            busy = "other models are in use, and leave no memory for this one"
            raise HTTPError(503, busy, "model", "busy", {"retry-after": "10"}) from None
        finally:
            place.loading = None

    async def _load_now(self, place: Place) -> mn.LLM:
        name, begun = place.source.name, time.monotonic()
        _logger.info("loading %s", name)
        try:
            place.llm = llm = await asyncio.to_thread(self._load, place.source)
        except (OSError, mn.MinervaError) as error:
            _logger.error("%s cannot be loaded: %s", name, error)
            failed = "the model cannot be loaded: the server's log says why"
            raise HTTPError(500, failed, "model", "model_load_failed") from None
        place.used = time.monotonic()
        self._metrics.watch(llm, name)
        _logger.info("loaded %s in %.1f s", name, place.used - begun)
        return llm

    async def _make_room(self, wanted: Place) -> bool:
        """Unload what was used longest ago until the model fits; return False if what is in use has to end first."""
        while True:
            loaded = [place for place in self.places.values() if place.llm is not None]
            if not loaded or _size(loaded) + wanted.source.size_bytes <= self._budget:
                return True
            idle = [place for place in loaded if not place.n_users]
            in_use = _size(loaded) - _size(idle)
            if not idle or (in_use and in_use + wanted.source.size_bytes > self._budget):
                return False
            await self._unload(min(idle, key=lambda place: place.used))

    async def _unload(self, place: Place) -> None:
        llm = self._taken(place)
        if llm is not None:
            await asyncio.to_thread(_close, llm)

    def _taken(self, place: Place) -> mn.LLM | None:
        """Take what is loaded from a place, to close it: who asks for the model from now on has it loaded again."""
        llm, place.llm = place.llm, None
        if llm is not None:
            self._metrics.unwatch(llm)
            _logger.info("unloading %s", place.source.name)
        return llm

    def adopt(self, name: str, llm: mn.LLM) -> None:
        """Take a model that is loaded."""
        place = self.places[name]
        place.llm, place.used = llm, time.monotonic()
        self._metrics.watch(llm, name)

    async def drop(self, name: str, llm: mn.LLM) -> None:
        """Unload a model that has failed: the next request loads it again, once its memory is free."""
        place = self.places[name]
        if place.llm is not llm:
            return
        self._taken(place)
        try:
            async with self._changing:
                await asyncio.to_thread(_close, llm)
        except asyncio.CancelledError:  # the server ends
            _close(llm)
            raise

    async def unload_idle(self) -> None:
        """Unload what is not used, for ever; does nothing if everything is to stay."""
        while self._idle_seconds is not None:
            async with self._changing:
                for place in self.places.values():
                    is_idle = place.llm is not None and not place.n_users
                    if is_idle and time.monotonic() - place.used >= self._idle_seconds:
                        await self._unload(place)
            await asyncio.sleep(min(1.0, self._idle_seconds / 4 + 0.01))

    async def close(self) -> None:
        """Unload everything."""
        for place in self.places.values():
            await self._unload(place)

    def close_now(self) -> None:
        """Unload everything once the event loop has ended, if it had no time to."""
        for place in self.places.values():
            llm, place.llm = place.llm, None
            if llm is not None:
                _close(llm)


def _size(places: Iterable[Place]) -> int:
    return sum(place.source.size_bytes for place in places)


def _close(llm: mn.LLM) -> None:
    llm.close()
    llm.model.close()


def _look_at(task: "asyncio.Task[mn.LLM]") -> None:
    """Take note of how a task ended."""
    if not task.cancelled():
        task.exception()
