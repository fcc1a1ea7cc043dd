"""What MemoryStore has beyond the contract: expiry of history and tombstones, strictness."""

import pytest
from pydantic import ValidationError

from bacalhau_api.meta import Ref
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.store import Delete, Put, Restarted
from tests.support.stores import WHY, ManualClock, create, node, watching


async def test_old_history_is_dropped() -> None:
    clock = ManualClock()
    store = MemoryStore(clock, history_seconds=100)
    (at,) = await create(store, node("n"))
    await clock.sleep(60)
    await store.commit([Put(node("n", drain=True), at)], WHY)
    await clock.sleep(60)
    (entry,) = await store.history(Ref("Node", "", "n"))
    assert entry.resource == await store.get(Ref("Node", "", "n"))


async def test_a_cursor_older_than_the_tombstones_restarts() -> None:
    clock = ManualClock()
    store = MemoryStore(clock, tombstone_seconds=100)
    (at,) = await create(store, node("n"))
    cursor = (await store.list()).cursor
    await store.commit([Delete(Ref("Node", "", "n"), at)], WHY)
    await clock.sleep(50)
    async with watching(store, cursor) as view:
        await view.synced()
        assert view.restarts == 0
    await clock.sleep(60)
    async with watching(store, cursor) as view:
        await view.synced()
        assert [type(event) for event in view.events[:1]] == [Restarted]


async def test_strict_refuses_what_could_not_be_read_back() -> None:
    broken = node("n").but(spec=node("n").spec.but(drain="yes"))
    with pytest.raises(ValidationError), pytest.warns(UserWarning, match="serializer"):
        await MemoryStore(ManualClock(), strict=True).commit([Put(broken, 0)], WHY)


async def test_an_unread_watch_holds_one_event_for_each_object() -> None:
    store = MemoryStore(ManualClock())
    async with store.watch() as events:
        at = 0
        for _ in range(100):
            (stored,) = await store.commit([Put(node("n"), at)], WHY)
            assert stored is not None
            at = stored.metadata.resource_version
        await anext(events)  # Synced
        event = await anext(events)
        assert event.resource == stored  # type: ignore[union-attr]
