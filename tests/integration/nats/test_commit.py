"""How commits travel: lost answers, lone changes, crowds, and a store that is not there."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bacalhau.nats.server import EmbeddedNats
from bacalhau.store import committer
from bacalhau.store.jetstream import JetStreamStore
from bacalhau.system import SystemClock, SystemIds
from bacalhau_api.errors import ConflictError, OutcomeUnknownError, UnavailableError
from bacalhau_api.meta import Ref, Resource
from bacalhau_controllers.store import Delete, Fence, Put, Why, Write
from tests.support.flaky import Fault, FlakyTransport
from tests.support.nats import crash, open_connection, open_store, running_server
from tests.support.stores import WHY, create, node, watching

OBJECTS = ("o.", "h.")


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EmbeddedNats]:
    # Killed often on purpose here: do not wait longer each time.
    monkeypatch.setattr("bacalhau.nats.server._RESTART_PAUSE_MAX", 0.1)
    async with running_server(tmp_path) as running:
        yield running


@asynccontextmanager
async def flaky_store(
    server: EmbeddedNats, **options: float
) -> AsyncIterator[tuple[JetStreamStore, FlakyTransport]]:
    async with open_connection(server) as connection:
        transport = FlakyTransport(connection, *OBJECTS)
        store = JetStreamStore(transport, SystemClock(), SystemIds(), **options)  # type: ignore[arg-type]
        async with store:
            yield store, transport


def ref(name: str) -> Ref:
    return Ref("Node", "", name)


async def revision(store: JetStreamStore, name: str) -> int:
    found = await store.get(ref(name))
    return found.metadata.resource_version if found else 0


async def created_in_doubt(
    store: JetStreamStore, transport: FlakyTransport, other: JetStreamStore
) -> tuple["asyncio.Task[tuple[Resource | None, ...]]", int]:
    """A commit that has created `n` and whose answer is lost; the revision that others see."""
    await create(store, node("before"))
    transport.faults.extend(["lose reply", "lose reply"])
    mine = asyncio.create_task(store.commit([Put(node("n"), 0)], WHY))
    async with watching(other) as view:
        return mine, await view.seen(ref("n"))


async def check_history(store: JetStreamStore, name: str, changes: int) -> None:
    """The history has exactly so many entries, and ends in the stored state."""
    entries = await store.history(ref(name))
    assert len(entries) == changes
    assert entries[-1].resource == await store.get(ref(name))


@pytest.mark.parametrize("fault", ["lose request", "lose reply"])
@pytest.mark.parametrize("writes_count", [1, 3])
@pytest.mark.parametrize("faults_count", [1, 3])
async def test_a_lost_answer_is_resolved(
    server: EmbeddedNats, fault: Fault, writes_count: int, faults_count: int
) -> None:
    """Whether the request or its answer was lost: the change is stored, once."""
    async with flaky_store(server) as (store, transport):
        transport.faults.extend([fault] * faults_count)
        writes = [Put(node(f"n{i}"), 0) for i in range(writes_count)]
        stored = await store.commit(writes, WHY)
        assert not transport.faults
        for i, item in enumerate(stored):
            assert item == await store.get(ref(f"n{i}"))
            await check_history(store, f"n{i}", 1)


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(["lose reply", ""], id="answer to the entry lost"),
        pytest.param(["", "lose reply"], id="answer to the change lost"),
        pytest.param(["lose reply", "lose reply"], id="both answers lost"),
        pytest.param(["", "lose request"], id="change lost"),
        pytest.param(["lose request", ""], id="entry lost"),
        pytest.param(["lose request", "lose request"], id="both lost"),
        pytest.param(["lose reply", "lose request"], id="answer and change lost"),
    ],
)
async def test_a_pair_with_losses_is_resolved(server: EmbeddedNats, faults: list[Fault]) -> None:
    async with flaky_store(server) as (store, transport):
        (at,) = await create(store, node("n"))
        transport.requests.clear()
        transport.faults.extend(faults)
        (stored,) = await store.commit([Put(node("n", drain=True), at)], WHY)
        assert transport.requests[0].startswith("h.")  # it did go out as a pair
        assert transport.requests[1].startswith("o.")
        assert stored == await store.get(ref("n"))
        await check_history(store, "n", 2)


async def test_a_change_that_was_only_begun_is_not_history(server: EmbeddedNats) -> None:
    """A crash between the entry and the change, after which nobody tries again."""
    async with flaky_store(server, commit_seconds=2.0) as (store, transport):
        (at,) = await create(store, node("n"))
        transport.faults.extend(["", *["lose request"] * 500])  # type: ignore[list-item]
        with pytest.raises(OutcomeUnknownError, match="did not confirm"):
            await store.commit([Put(node("n", drain=True), at)], WHY)
        transport.faults.clear()
        await check_history(store, "n", 1)
        assert await revision(store, "n") == at
        # The next change takes its place.
        (stored,) = await store.commit([Put(node("n", unschedulable=True), at)], WHY)
        await check_history(store, "n", 2)
        assert stored is not None
        (later,) = await store.commit([Put(stored, stored.metadata.resource_version)], WHY)
        await check_history(store, "n", 3)
        assert later is not None


async def test_a_lost_answer_that_others_have_built_on(server: EmbeddedNats) -> None:
    """Ours was stored and its answer lost; until we ask again, another has changed the object."""
    async with flaky_store(server) as (store, transport), open_store(server) as other:
        mine, at = await created_in_doubt(store, transport, other)
        await other.commit([Put(node("n", drain=True), at)], WHY)
        (stored,) = await mine
        assert stored is not None
        assert stored.metadata.resource_version == at
        await check_history(other, "n", 2)


async def test_what_was_created_and_removed_is_not_created_again(server: EmbeddedNats) -> None:
    """Ours was stored and its answer lost; until we ask again, another has removed the object."""
    async with flaky_store(server) as (store, transport), open_store(server) as other:
        mine, at = await created_in_doubt(store, transport, other)
        await other.commit([Delete(ref("n"), at)], WHY)
        (stored,) = await mine
        assert stored is not None
        assert stored.metadata.resource_version == at
        assert await store.get(ref("n")) is None
        assert [entry.resource is None for entry in await store.history(ref("n"))] == [False, True]


async def test_a_lost_answer_of_a_removal(server: EmbeddedNats) -> None:
    async with flaky_store(server) as (store, transport):
        (at,) = await create(store, node("n"))
        transport.faults.append("lose reply")
        assert await store.commit([Delete(ref("n"), at)], WHY) == (None,)
        assert await store.get(ref("n")) is None
        assert [entry.resource is None for entry in await store.history(ref("n"))] == [False, True]


async def test_a_lost_answer_of_a_creation_over_a_tombstone(server: EmbeddedNats) -> None:
    async with flaky_store(server) as (store, transport):
        (at,) = await create(store, node("n"))
        await store.commit([Delete(ref("n"), at)], WHY)
        transport.faults.append("lose reply")
        (again,) = await create(store, node("n"))
        assert await revision(store, "n") == again
        assert len(await store.history(ref("n"))) == 3


async def test_a_real_conflict_after_a_lost_request(server: EmbeddedNats) -> None:
    async with flaky_store(server) as (store, transport), open_store(server) as other:
        (at,) = await create(store, node("n"))
        await store.get(ref("n"))
        await other.commit([Put(node("n", drain=True), at)], WHY)
        transport.faults.append("lose request")
        with pytest.raises(ConflictError):
            await store.commit([Put(node("n"), at)], WHY)
        await check_history(other, "n", 2)


async def test_nothing_is_known_when_no_answer_comes(server: EmbeddedNats) -> None:
    async with flaky_store(server, commit_seconds=0.3) as (store, transport):
        transport.faults.extend(["lose reply"] * 50)
        with pytest.raises(OutcomeUnknownError) as caught:
            await create(store, node("n"))
        assert "read the object" in caught.value.hint


async def test_a_store_that_is_away_is_unavailable(server: EmbeddedNats) -> None:
    async with open_store(server, commit_seconds=2.0) as store:
        await create(store, node("n"))
        await server.stop()
        with pytest.raises(UnavailableError, match="took no write"):
            await store.commit([Put(node("m"), 0)], WHY)


async def test_lone_changes_skip_the_batch_and_removals_do_not(server: EmbeddedNats) -> None:
    async with flaky_store(server) as (store, transport):
        (at,) = await create(store, node("n"))  # learns the tip
        transport.requests.clear()
        (stored,) = await store.commit([Put(node("n", drain=True), at)], WHY)
        assert [subject[0] for subject in transport.requests] == ["h", "o"]
        transport.requests.clear()
        assert stored is not None
        await store.commit([Delete(ref("n"), stored.metadata.resource_version)], WHY)
        assert [subject[0] for subject in transport.requests] == ["o"]


async def test_a_fence_is_proved_before_changes_skip_the_batch(server: EmbeddedNats) -> None:
    async with flaky_store(server) as (store, transport), open_store(server) as other:
        await create(store, node("first"))
        lease = await other.acquire_lease("leader", "h", 30)
        assert lease is not None
        why = Why("test", "Testing", fence=Fence("leader", lease.token))
        kinds = []
        for i in range(4):
            transport.requests.clear()
            await store.commit([Put(node(f"n{i}"), 0)], why)
            kinds.append("".join(subject[0] for subject in transport.requests))
        assert kinds == ["o", "ho", "ho", "ho"]
        # Whatever another process writes, the fence may be among it.
        await other.renew_lease(lease, 30)
        transport.requests.clear()
        await store.commit([Put(node("n9"), 0)], why)
        assert [s[0] for s in transport.requests] == ["h", "o", "o"]


async def test_writers_in_two_processes(server: EmbeddedNats) -> None:
    """Each disturbs the other's tip all the time; nothing is lost or doubled."""
    async with open_store(server) as one, open_store(server) as two:
        await create(one, node("counter"))

        async def add(store: JetStreamStore, times: int) -> None:
            while times:
                read = await store.get(ref("counter"))
                assert read is not None
                count = int(read.metadata.annotations.get("count", "0")) + 1
                changed = read.with_meta(annotations={"count": str(count)})
                try:
                    await store.commit([Put(changed, read.metadata.resource_version)], WHY)
                    times -= 1
                except ConflictError:
                    pass

        await asyncio.gather(add(one, 60), add(two, 60), add(one, 60), add(two, 60))
        stored = await one.get(ref("counter"))
        assert stored is not None
        assert stored.metadata.annotations == {"count": "240"}
        entries = await one.history(ref("counter"))
        counts = [e.resource.metadata.annotations.get("count", "0") for e in entries if e.resource]
        assert counts == [str(i) for i in range(241)]


async def test_a_crowd_shares_batches(server: EmbeddedNats) -> None:
    async with flaky_store(server) as (store, transport):
        await asyncio.gather(*(create(store, node(f"n{i}")) for i in range(1000)))
        assert len(transport.requests) <= 6
        assert len((await store.list("Node")).items) == 1000


async def test_commits_that_share_an_object_keep_their_order(server: EmbeddedNats) -> None:
    async with open_store(server) as store:
        results = await asyncio.gather(
            *(store.commit([Put(node("n", drain=i % 2 == 0), 0)], WHY) for i in range(10)),
            return_exceptions=True,
        )
        assert isinstance(results[0], tuple)
        assert all(isinstance(result, ConflictError) for result in results[1:])


async def test_the_queue_is_bounded(server: EmbeddedNats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer, "WAITING_MESSAGES_MAX", 100)
    async with open_store(server) as store:
        results = await asyncio.gather(
            *(create(store, node(f"n{i}")) for i in range(200)), return_exceptions=True
        )
        refused = [result for result in results if isinstance(result, UnavailableError)]
        assert 100 <= len(refused) < 200
        assert "wait for the store already" in str(refused[0])
        assert len((await store.list()).items) == 200 - len(refused)
        await create(store, node("later"))


async def test_a_caller_that_gives_up_leaves_no_write_behind(server: EmbeddedNats) -> None:
    async with open_store(server) as store:
        first = asyncio.create_task(create(store, node("first")))
        second = asyncio.create_task(create(store, node("second")))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert await revision(store, "first")
        assert not await revision(store, "second")


async def test_closing_refuses_new_writes_and_ends_those_under_way(server: EmbeddedNats) -> None:
    async with open_connection(server) as connection:
        store = JetStreamStore(connection, SystemClock(), SystemIds())
        await store.open()
        under_way = asyncio.create_task(create(store, node("n")))
        for _ in range(3):
            await asyncio.sleep(0)
        await store.close()
        await under_way
        with pytest.raises(UnavailableError, match="closed"):
            await create(store, node("m"))


async def test_a_mixed_commit_of_400_with_a_conflict(server: EmbeddedNats) -> None:
    async with open_store(server) as store:
        await create(store, node("n399"))
        writes: list[Write] = [Put(node(f"n{i}"), 0) for i in range(400)]
        with pytest.raises(ConflictError, match="n399"):
            await store.commit(writes, WHY)
        assert len((await store.list()).items) == 1


async def test_an_unanswered_crash_in_the_middle(server: EmbeddedNats) -> None:
    """kill -9 while a commit is under way: it is stored afterwards, once, and the caller knows."""
    async with open_store(server) as store:
        for i in range(5):
            pending = asyncio.create_task(create(store, node(f"a{i}"), node(f"b{i}")))
            await asyncio.sleep(0.002 * i)
            await crash(server)
            (a, b) = await pending
            assert await revision(store, f"a{i}") == a
            assert await revision(store, f"b{i}") == b
            await check_history(store, f"a{i}", 1)
