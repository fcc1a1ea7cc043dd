"""What every Store's watch does: no gap, no repeat, through whatever happens to the store."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bacalhau_api.errors import TransientError
from bacalhau_api.meta import Ref
from bacalhau_controllers.store import Changed, Cursor, Delete, Put, Removed, Restarted, Synced
from tests.support.stores import WHY, Rig, create, node, open_rig, watching


@pytest.fixture(params=["memory", "jetstream"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(request.param, tmp_path) as opened:
        yield opened


def ref(name: str) -> Ref:
    return Ref("Node", "", name)


async def test_first_everything_then_synced_then_changes(rig: Rig) -> None:
    (a, b) = await create(rig.store, node("a"), node("b"))
    (c,) = await create(rig.store, node("c"))
    await rig.store.commit([Delete(ref("b"), b)], WHY)
    async with watching(rig.store) as view:
        await view.synced()
        assert view.objects == {ref("a"): a, ref("c"): c}
        # A removal from before the watch is no news.
        assert [type(event) for event in view.events] == [Changed, Changed, Synced]
        (d,) = await create(rig.store, node("d"))
        await rig.store.commit([Delete(ref("a"), a)], WHY)
        await view.until({ref("c"): c, ref("d"): d})
        assert [type(event) for event in view.events[3:]] == [Changed, Removed]
        assert view.syncs == 1


async def test_an_empty_store_is_synced_at_once(rig: Rig) -> None:
    async with watching(rig.store) as view:
        await view.synced()
        assert view.objects == {}
        (a,) = await create(rig.store, node("a"))
        await view.until({ref("a"): a})


async def test_a_store_with_only_tombstones_is_synced(rig: Rig) -> None:
    (a,) = await create(rig.store, node("a"))
    await rig.store.commit([Delete(ref("a"), a)], WHY)
    async with watching(rig.store) as view:
        await view.synced()
        assert view.objects == {}


async def test_what_changes_during_the_first_list_is_in_it(rig: Rig) -> None:
    """An object that exists all the time is never missing at Synced, however often it is rewritten
    meanwhile: who finds it missing would take it for gone."""
    await create(rig.store, *(node(f"n{i}") for i in range(300)))
    await create(rig.store, node("busy"))
    stopping = asyncio.Event()

    async def rewrite() -> None:
        while not stopping.is_set():
            await rig.store.commit([Put(node("busy"), await _read(rig, "busy"))], WHY)

    async with asyncio.TaskGroup() as group:
        group.create_task(rewrite())
        for _ in range(20):
            async with rig.store.watch() as events, asyncio.timeout(20):
                seen = set()
                async for event in events:
                    if isinstance(event, Changed):
                        seen.add(event.resource.name)
                    elif isinstance(event, Synced):
                        break
                    await asyncio.sleep(0)
            assert "busy" in seen
            assert "busy" in {item.name for item in (await rig.store.list()).items}
        stopping.set()


async def test_delivered_objects_are_whole(rig: Rig) -> None:
    (stored,) = await rig.store.commit([Put(node("a", drain=True), 0)], WHY)
    async with watching(rig.store) as view:
        await view.synced()
        assert view.events[0] == Changed(stored)  # type: ignore[arg-type]


async def test_continues_after_a_cursor(rig: Rig) -> None:
    (a, b) = await create(rig.store, node("a"), node("b"))
    cursor = (await rig.store.list()).cursor
    await rig.store.commit([Delete(ref("b"), b)], WHY)
    (c,) = await create(rig.store, node("c"))
    async with watching(rig.store, cursor) as view:
        await view.synced()
        assert [type(event) for event in view.events] == [Removed, Changed, Synced]
        assert view.restarts == 0
        (d,) = await create(rig.store, node("d"))
        await view.until({ref("c"): c, ref("d"): d})
    assert a


async def test_continues_after_the_newest_cursor(rig: Rig) -> None:
    await create(rig.store, node("a"))
    cursor = (await rig.store.list()).cursor
    async with watching(rig.store, cursor) as view:
        await view.synced()
        assert [type(event) for event in view.events] == [Synced]
        (b,) = await create(rig.store, node("b"))
        await view.until({ref("b"): b})


async def test_the_cursor_of_synced_can_be_continued(rig: Rig) -> None:
    await create(rig.store, node("a"))
    async with watching(rig.store) as view:
        await view.synced()
    (synced,) = [event for event in view.events if isinstance(event, Synced)]
    (b,) = await create(rig.store, node("b"))
    async with watching(rig.store, synced.cursor) as view:
        await view.until({ref("b"): b})


@pytest.mark.parametrize("cursor", [Cursor("another", 1), Cursor("", 0)])
async def test_a_cursor_of_another_store_restarts(rig: Rig, cursor: Cursor) -> None:
    (a,) = await create(rig.store, node("a"))
    async with watching(rig.store, cursor) as view:
        await view.synced()
        assert [type(event) for event in view.events] == [Restarted, Changed, Synced]
        assert view.objects == {ref("a"): a}


async def test_a_cursor_of_the_future_restarts(rig: Rig) -> None:
    await create(rig.store, node("a"))
    epoch = (await rig.store.list()).cursor.epoch
    async with watching(rig.store, Cursor(epoch, 10_000)) as view:
        await view.synced()
        assert view.restarts == 1


async def test_a_recreated_store_restarts_watches_under_way(rig: Rig) -> None:
    await create(rig.store, node("a"), node("b"), node("c"))
    async with watching(rig.store) as view:
        await view.synced()
        await rig.recreate()
        (x,) = await create(rig.store, node("x"))
        await view.until({ref("x"): x})
        assert view.restarts >= 1
        assert view.syncs >= 2


async def test_several_watches_see_the_same(rig: Rig) -> None:
    async with watching(rig.store) as one, watching(rig.store) as two:
        revisions = await create(rig.store, *(node(f"n{i}") for i in range(50)))
        expected = {ref(f"n{i}"): revision for i, revision in enumerate(revisions)}
        await one.until(expected)
        await two.until(expected)


async def test_a_watch_that_is_not_read_does_no_harm(rig: Rig) -> None:
    async with rig.store.watch() as events:
        await create(rig.store, *(node(f"n{i}") for i in range(300)))
        seen = set()
        async with asyncio.timeout(20):
            async for event in events:
                if isinstance(event, Changed):
                    seen.add(event.resource.name)
                if len(seen) == 300:
                    break


async def test_no_gap_and_no_repeat_through_crashes(rig: Rig) -> None:
    """Writers and a watcher through kill -9 of the server, several times."""
    expected: dict[Ref, int] = {}
    stopping = asyncio.Event()

    async def write(writer: int) -> None:
        i = 0
        while not stopping.is_set():
            i += 1
            name = f"w{writer}-{i % 7}"
            current = await _read(rig, name)
            try:
                if current and i % 5 == 0:
                    await rig.store.commit([Delete(ref(name), current)], WHY)
                else:
                    await rig.store.commit([Put(node(name), current)], WHY)
            except TransientError:
                await asyncio.sleep(0)

    async with watching(rig.store, keep_events=False) as view:
        await view.synced()
        async with asyncio.TaskGroup() as group:
            for writer in range(4):
                group.create_task(write(writer))
            for _ in range(3):
                await asyncio.sleep(0.3)
                await rig.crash()
            await asyncio.sleep(0.6)
            stopping.set()
        for item in (await rig.store.list()).items:
            expected[item.ref] = item.metadata.resource_version
        await view.until(expected)
        assert view.restarts == 0
        assert view.syncs == 1


async def _read(rig: Rig, name: str) -> int:
    while True:
        try:
            found = await rig.store.get(ref(name))
        except TransientError:
            continue
        return found.metadata.resource_version if found else 0
