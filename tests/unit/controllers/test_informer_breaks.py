"""Watches that break in the middle of a list."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bacalhau_api.errors import UnavailableError
from bacalhau_api.meta import Ref
from bacalhau_controllers.cache import Cache, Informer
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.store import Cursor, Delete, Put, WatchEvent, Why
from tests.support.samples import node
from tests.support.simclock import SimClock, SimLoop

WHY = Why("user:test", "Test")


@dataclass(frozen=True, slots=True)
class Watch:
    """How one watch goes: it breaks after so many events; `lists` means from the start anew."""

    events: int
    lists: bool = False
    before_break: Callable[[], None] = lambda: None


class BreakingStore(MemoryStore):
    """The first watches go as planned, later ones do not break."""

    watches: tuple[Watch, ...] = ()

    @asynccontextmanager
    async def watch(self, since: Cursor | None = None) -> AsyncIterator[AsyncIterator[WatchEvent]]:
        plan, self.watches = (self.watches or (Watch(1_000_000),))[0], self.watches[1:]
        if plan.lists and since is not None:
            since = Cursor("another", since.revision)
        async with super().watch(since) as events:
            yield _some(events, plan)


async def _some(events: AsyncIterator[WatchEvent], plan: Watch) -> AsyncIterator[WatchEvent]:
    for _ in range(plan.events):
        yield await anext(events)
    plan.before_break()
    raise UnavailableError("the watch broke")


def _nodes(watches: Callable[[SimLoop, MemoryStore], tuple[Watch, ...]]) -> list[str]:
    """The names in the cache in the end; `a` and `b` are there at first."""
    with SimLoop() as loop:
        clock = SimClock(loop)
        store, cache = BreakingStore(clock), Cache()
        store.watches = watches(loop, store)
        loop.run_until_complete(store.commit([Put(node("a"), 0), Put(node("b"), 0)], WHY))
        loop.create_task(Informer(store, cache, clock).run())
        loop.advance(60)
        assert cache.is_synced
        return sorted(one.name for one in cache.list("Node"))


def test_what_went_while_the_first_list_was_broken_off_is_gone() -> None:
    def watches(loop: SimLoop, store: MemoryStore) -> tuple[Watch, ...]:
        async def remove() -> None:
            found = await store.get(Ref("Node", "", "a"))
            assert found is not None
            await store.commit([Delete(found.ref, found.metadata.resource_version)], WHY)

        def begin() -> None:
            loop.create_task(remove())

        return (Watch(1, before_break=begin),)

    assert _nodes(watches) == ["b"]


def test_a_list_anew_that_was_broken_off_forgets_nothing() -> None:
    # Three events are the first list and its end, two the news of a new one and its first object.
    assert _nodes(lambda loop, store: (Watch(3), Watch(2, lists=True))) == ["a", "b"]
