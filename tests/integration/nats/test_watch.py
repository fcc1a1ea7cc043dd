"""The watch over JetStream: cut lines, a slow reader, expired tombstones, odd messages."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bacalhau.nats.server import EmbeddedNats
from bacalhau.store import feed
from bacalhau.store.codec import CorruptError
from bacalhau.system import SystemClock
from bacalhau_api.errors import InvalidError, TransientError
from bacalhau_api.meta import Ref
from bacalhau_controllers.cache import Cache, Informer
from bacalhau_controllers.store import Changed, Delete, Put, Removed, Restarted, Synced
from tests.support.nats import (
    Proxy,
    crash,
    delete_stream,
    eventually,
    kill,
    open_connection,
    open_store,
    running_server,
)
from tests.support.stores import WHY, create, job, node, watching


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedNats]:
    async with running_server(tmp_path) as running:
        yield running


@pytest.fixture
async def proxy(server: EmbeddedNats) -> AsyncIterator[Proxy]:
    async with Proxy(int(server.url.rpartition(":")[2])) as opened:
        yield opened


def ref(name: str) -> Ref:
    return Ref("Node", "", name)


async def test_no_gap_and_no_repeat_through_cut_lines(server: EmbeddedNats, proxy: Proxy) -> None:
    """The watcher's line is cut again and again while another process writes."""
    expected: dict[Ref, int] = {}
    async with (
        open_store(server) as writer,
        open_store(server, proxy.url) as reader,
        watching(reader, keep_events=False) as view,
    ):
        await view.synced()
        for i in range(300):
            name = f"n{i % 40}"
            current = expected.pop(ref(name), 0)
            if current and i % 7 == 0:
                await writer.commit([Delete(ref(name), current)], WHY)
            else:
                (stored,) = await writer.commit([Put(node(name), current)], WHY)
                assert stored is not None
                expected[ref(name)] = stored.metadata.resource_version
            if i % 60 == 30:
                proxy.cut()
        await view.until(expected)
        assert (view.restarts, view.syncs) == (0, 1)


async def test_changes_made_during_an_outage_arrive(server: EmbeddedNats, proxy: Proxy) -> None:
    async with open_store(server) as writer, open_store(server, proxy.url) as reader:
        (a, b) = await create(writer, node("a"), node("b"))
        async with watching(reader) as view:
            await view.until({ref("a"): a, ref("b"): b})
            proxy.is_open = False
            proxy.cut()
            await writer.commit([Delete(ref("a"), a)], WHY)
            (c,) = await create(writer, node("c"))
            proxy.is_open = True
            await view.until({ref("b"): b, ref("c"): c})
            assert view.restarts == 0


async def test_a_line_cut_while_the_list_is_sent(server: EmbeddedNats, proxy: Proxy) -> None:
    async with open_store(server) as writer, open_store(server, proxy.url) as reader:
        objects = [job(f"j{i}", filler="x" * 20_000) for i in range(600)]
        for chunk in range(0, 600, 100):
            await writer.commit([Put(each, 0) for each in objects[chunk : chunk + 100]], WHY)
        expected = {i.ref: i.metadata.resource_version for i in (await writer.list()).items}
        async with reader.watch() as events:
            seen: dict[Ref, int] = {}
            last = cuts = 0
            async for event in events:
                if isinstance(event, Synced):
                    break
                assert isinstance(event, Changed)
                at = event.resource.metadata.resource_version
                assert at > last
                seen[event.resource.ref], last = at, at
                if len(seen) in (50, 250, 450):
                    proxy.cut()
                    cuts += 1
        assert cuts == 3
        assert seen == expected


async def test_a_slow_reader_holds_the_server_back(
    server: EmbeddedNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the connection may hold, read slowly: nothing is lost, and little is buffered."""
    monkeypatch.setattr(feed, "_BUFFER_BYTES_MAX", 256 * 1024)
    async with open_store(server) as store:
        for chunk in range(8):
            writes = [Put(job(f"j{chunk}-{i}", filler="x" * 200_000), 0) for i in range(60)]
            await store.commit(writes, WHY)  # 96 MB in all; a client is cut off at 64 MB
        async with store.watch() as events:
            count = 0
            async for event in events:
                if isinstance(event, Synced):
                    break
                count += 1
                if count % 40 == 0:
                    await asyncio.sleep(0.1)
        assert count == 480
        assert (await server._ask("/varz"))["slow_consumers"] == 0


async def test_consumers_are_removed(server: EmbeddedNats) -> None:
    async with open_store(server) as store:
        await create(store, node("n"))
        for _ in range(10):
            await store.list()
        async with watching(store) as view:
            await view.synced()

        async def consumers() -> int:
            answer = await server._ask("/jsz?accounts=true&streams=true&consumers=true")
            (account,) = answer["account_details"]
            return len(account["stream_detail"][0].get("consumer_detail") or [])

        async with asyncio.timeout(20):
            while True:
                if await consumers() == 0:
                    break
                await asyncio.sleep(0.05)


async def test_a_stream_made_anew_restarts_the_cache(server: EmbeddedNats) -> None:
    async with open_store(server) as store:
        cache = Cache()
        informer = asyncio.create_task(Informer(store, cache).run())
        try:
            await create(store, *(node(f"old{i}") for i in range(30)))
            await eventually(lambda: cache.count("Node") == 30)
            await delete_stream(server)
            await store.open()
            await create(store, node("new"))
            await eventually(lambda: [n.name for n in cache.list("Node")] == ["new"])
        finally:
            informer.cancel()
            await asyncio.gather(informer, return_exceptions=True)


async def test_a_position_older_than_the_tombstones_restarts(server: EmbeddedNats) -> None:
    """A tombstone that expired is gone without a trace. Who was away for longer lists anew."""
    async with open_store(server, tombstone_seconds=3) as store:
        (a, b) = await create(store, node("a"), node("b"))
        cursor = (await store.list()).cursor
        await store.commit([Delete(ref("a"), a)], WHY)
        (c,) = await create(store, node("c"))
        async with watching(store, cursor) as view:
            await view.until({ref("c"): c})
            assert view.restarts == 0
            assert [e.ref for e in view.events if isinstance(e, Removed)] == [ref("a")]
        await asyncio.sleep(4.5)
        async with watching(store, cursor) as view:
            await view.until({ref("b"): b, ref("c"): c})
            assert [type(event) for event in view.events[:1]] == [Restarted]


async def test_a_store_that_lost_its_end_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup is restored under a process that goes on: what came after it never was, though its
    revisions are the higher ones."""
    monkeypatch.setattr("bacalhau.nats.server._RESTART_PAUSE_MAX", 0.1)
    files, copy = tmp_path / "nats" / "jetstream", tmp_path / "copy"
    async with running_server(tmp_path / "nats") as server, open_store(server) as store:
        kept, changed = await create(store, node("kept"), node("changed"))
        shutil.copytree(files, copy)
        cache = Cache()
        informer = asyncio.create_task(Informer(store, cache, SystemClock()).run())
        await cache.wait_synced()
        revision = changed
        for _ in range(3):
            (stored,) = await store.commit([Put(node("changed"), revision)], WHY)
            assert stored is not None
            revision = stored.metadata.resource_version
        await create(store, node("lost"))
        await eventually(lambda: cache.get(ref("lost")) is not None)
        epoch = cache.cursor and cache.cursor.epoch
        kill(server)
        shutil.rmtree(files)
        shutil.copytree(copy, files)
        await eventually(lambda: cache.get(ref("lost")) is None)
        seen = {item.name: item.metadata.resource_version for item in cache.list("Node")}
        assert seen == {"kept": kept, "changed": changed}
        await eventually(lambda: cache.is_synced)
        assert cache.cursor is not None
        assert cache.cursor.epoch != epoch
        (again,) = await store.commit([Put(node("changed"), changed)], WHY)
        assert again is not None
        await eventually(lambda: cache.get(ref("changed")) == again)
        async with watching(store, cache.cursor) as view:  # the new epoch can be continued
            await view.synced()
            assert view.restarts == 0
        informer.cancel()


async def test_a_removal_that_left_nothing_newer_restarts(server: EmbeddedNats) -> None:
    async with open_store(server, tombstone_seconds=1) as store:
        (a, b) = await create(store, node("a"), node("b"))
        cursor = (await store.list()).cursor
        await store.commit([Delete(ref("a"), a)], WHY)
        await asyncio.sleep(2.5)
        async with watching(store, cursor) as view:
            await view.until({ref("b"): b})
            assert view.restarts == 1


async def test_a_line_cut_for_longer_than_tombstones_are_kept(
    server: EmbeddedNats, proxy: Proxy
) -> None:
    async with (
        open_store(server, tombstone_seconds=1) as writer,
        open_store(server, proxy.url, tombstone_seconds=1) as reader,
    ):
        (a, b) = await create(writer, node("a"), node("b"))
        async with watching(reader) as view:
            await view.until({ref("a"): a, ref("b"): b})
            await view.synced()
            proxy.is_open = False
            proxy.cut()
            await writer.commit([Delete(ref("a"), a)], WHY)
            await asyncio.sleep(2.5)
            proxy.is_open = True
            await view.until({ref("b"): b})
            assert view.restarts == 1


async def test_a_watch_that_was_current_goes_on_however_old_the_objects_are(
    server: EmbeddedNats, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that begins where it has been, as that of a new leader does."""
    monkeypatch.setattr(feed, "HEARTBEAT_SECONDS", 0.2)
    async with open_store(server, proxy.url, tombstone_seconds=4) as store:
        await create(store, node("a"))
        async with watching(store) as view:
            await view.synced()
            (synced,) = [event for event in view.events if isinstance(event, Synced)]
            await asyncio.sleep(4.5)
            await store.acquire_lease("leader", "x", 60)  # the stream itself is not idle
            async with watching(store, synced.cursor) as second:
                await second.synced()
                assert second.restarts == 0
            proxy.cut()
            (b,) = await create(store, node("b"))
            assert await view.seen(ref("b")) == b
            assert view.restarts == 0


async def test_an_idle_store_does_not_restart_a_watch(server: EmbeddedNats) -> None:
    async with open_store(server, tombstone_seconds=1) as store:
        await create(store, node("a"))
        cursor = (await store.list()).cursor
        await asyncio.sleep(2)
        async with watching(store, cursor) as view:
            await view.synced()
            assert view.restarts == 0


async def test_creating_over_a_tombstone_that_has_expired(server: EmbeddedNats) -> None:
    async with open_store(server, tombstone_seconds=1) as store:
        (a,) = await create(store, node("a"))
        await store.commit([Delete(ref("a"), a)], WHY)
        await asyncio.sleep(2.2)
        (again,) = await create(store, node("a"))
        found = await store.get(ref("a"))
        assert found is not None
        assert found.metadata.resource_version == again
        assert len(await store.history(ref("a"))) == 3


async def test_history_expires(server: EmbeddedNats) -> None:
    async with open_store(server, history_seconds=3) as store:
        (a,) = await create(store, node("a"))
        assert len(await store.history(ref("a"))) == 1
        async with asyncio.timeout(20):
            while True:
                if not await store.history(ref("a")):
                    break
                await asyncio.sleep(0.1)
        (stored,) = await store.commit([Put(node("a", drain=True), a)], WHY)
        (entry,) = await store.history(ref("a"))
        assert entry.resource == stored == await store.get(ref("a"))


async def test_an_object_that_cannot_be_read_hides_no_other(
    server: EmbeddedNats, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(server) as store, open_connection(server) as connection:
        await create(store, node("good"))
        await connection.request("o.Node.=.bad", b'{"metadata":{"name":"bad"},"spec":7}')
        await connection.request("o.Future.=.odd", b'{"metadata":{"name":"odd"}}')
        assert [item.name for item in (await store.list()).items] == ["good"]
        async with watching(store) as view:
            await view.synced()
            assert list(view.objects) == [ref("good")]
        assert "Skipped a stored object" in caplog.text
        with pytest.raises(CorruptError, match="Node of revision"):
            await store.get(ref("bad"))


async def test_a_subject_that_is_too_long_costs_nobody_the_connection(
    server: EmbeddedNats,
) -> None:
    async with open_connection(server) as connection:
        with pytest.raises(InvalidError, match="too long"):
            await connection.request("o.Node.=." + "x" * 5000, timeout=1)
        await connection.request("$JS.API.INFO", b"{}")
        assert connection.generation == 1


async def test_tombstones_of_other_tools_and_of_the_server_count(server: EmbeddedNats) -> None:
    async with open_store(server) as store, open_connection(server) as connection:
        (a, b) = await create(store, node("a"), node("b"))
        async with watching(store) as view:
            await view.until({ref("a"): a, ref("b"): b})
            await connection.request("o.Node.=.a", b"", headers={"KV-Operation": "DEL"})
            await connection.request("o.Node.=.b", b"", headers={"Nats-Marker-Reason": "MaxAge"})
            await view.until({})
        assert await store.get(ref("a")) is None
        assert await store.get(ref("b")) is None
        await create(store, node("a"))


async def test_a_watch_that_begins_while_the_server_is_down(server: EmbeddedNats) -> None:
    async with open_store(server) as store:
        (a,) = await create(store, node("a"))
        await crash(server)
        async with watching(store) as view:
            await view.until({ref("a"): a})


async def test_many_watches_and_lists_at_once(server: EmbeddedNats) -> None:
    async with open_store(server) as store:
        revisions = await create(store, *(node(f"n{i}") for i in range(100)))
        listings = await asyncio.gather(*(store.list() for _ in range(30)))
        assert all(len(listing.items) == 100 for listing in listings)
        assert {listing.cursor.revision for listing in listings} == {revisions[-1]}


async def test_the_first_reconnect_is_quick(server: EmbeddedNats, proxy: Proxy) -> None:
    """The client's own watch is blind for many seconds after a cut; ours for a fraction of one."""
    async with (
        open_store(server) as writer,
        open_store(server, proxy.url) as reader,
        watching(reader) as view,
    ):
        await view.synced()
        for i in range(5):
            proxy.cut()
            (at,) = await create(writer, node(f"n{i}"))
            async with asyncio.timeout(3):
                assert await view.seen(ref(f"n{i}")) == at


async def test_reads_outlast_a_restart(server: EmbeddedNats) -> None:
    async with open_store(server) as store:
        (a,) = await create(store, node("a"))
        for _ in range(3):
            await crash(server)
            try:
                found = await store.get(ref("a"))
            except TransientError as error:
                raise AssertionError("a read did not wait for the server") from error
            assert found is not None
            assert found.metadata.resource_version == a
