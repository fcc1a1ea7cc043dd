"""Pinning an input: nodes, the desk and a store. The first proposal counts, for everybody."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from bacalhau.node.pins import LinkPins
from bacalhau.storages.objects import Entry
from bacalhau.storages.pins import Pinned
from bacalhau.system import SystemClock
from bacalhau_api.errors import TerminalError, TransientError
from bacalhau_api.meta import Ref
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.manifest import Manifest
from bacalhau_api.wire import PinReply, PinRequest, Refused
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.manifest import PinDesk, desk
from bacalhau_controllers.manifest.reconciler import GENERATIONS_KEPT
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.runner.ports import Use
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Put, Why
from tests.support.pins import DirectLine
from tests.support.samples import execution, job, job_spec

COUNT = 3


class World:
    """A store with one job of three partitions on two nodes."""

    def __init__(self) -> None:
        clock = SystemClock()
        self.store = MemoryStore(clock)
        self.state = State(self.store, Cache())
        self.desk = PinDesk(self.state, clock, lambda node, session: session == f"of-{node}")
        self.job = job(spec=job_spec(sources=("s3",)))
        self.lines = {n: DirectLine(self.desk, n, f"of-{n}") for n in ("n1", "n2")}
        self.pins = {n: LinkPins(line) for n, line in self.lines.items()}
        self.proposals: list[str] = []

    async def put(self, *things: Job | Execution) -> None:
        for thing in things:
            await self.state.commit([Put(thing, 0)], Why("test", "Test"))

    def use(self, partition: int) -> Use:
        made = execution(self.job, partition=partition, node=self.node_of(partition))
        return Use("default", self.job.metadata.uid, 1, made.name, 0, partition, COUNT)

    def node_of(self, partition: int) -> str:
        return ("n1", "n2", "n1")[partition]

    async def share(self, partition: int, *, prefix: str = "k", count: int = 30) -> list[str]:
        """The keys of one partition; proposes a listing of keys with that prefix."""

        async def propose() -> Pinned:
            self.proposals.append(prefix)
            entries = [Entry(f"{prefix}{n:05}", n, f'"{n}"') for n in range(count)]
            return Pinned.of(entries, [n % COUNT for n in range(count)], COUNT)

        pins = self.pins[self.node_of(partition)]
        return [entry.key for entry in await pins.share(self.use(partition), propose)]

    async def manifests(self) -> list[Manifest]:
        found = [one async for one in _all(self.store)]
        return [one for one in found if isinstance(one, Manifest)]


async def _all(store: MemoryStore) -> AsyncIterator[object]:
    for one in (await store.list()).items:
        yield one


@pytest.fixture
async def world() -> World:
    world = World()
    await world.put(world.job)
    for partition in range(COUNT):
        made = execution(world.job, partition=partition, node=world.node_of(partition))
        await world.put(made.but(spec=made.spec.but(partition_count=COUNT)))
    return world


async def test_each_partition_gets_its_share_of_the_first_listing(world: World) -> None:
    shares = [await world.share(n, prefix=f"at{n}-") for n in range(COUNT)]
    assert sorted(key for share in shares for key in share) == [f"at0-{n:05}" for n in range(30)]
    assert world.proposals == ["at0-"]
    (manifest,) = await world.manifests()
    assert (manifest.spec.objects, manifest.spec.partitions, manifest.spec.objects_max) == (
        30,
        3,
        10,
    )
    assert manifest.spec.node == "n1"
    assert manifest.metadata.owner_references[0].uid == world.job.metadata.uid


async def test_two_nodes_at_one_time_agree(world: World) -> None:
    async def other() -> None:
        await world.share(1, prefix="other")

    world.lines["n1"].before_make = other
    first = await world.share(0, prefix="mine")
    assert first == [f"other{n:05}" for n in range(0, 30, 3)]
    assert len(await world.manifests()) == 1
    # What n1 had listed is of no use; it is found by the reconciler.
    assert world.proposals == ["mine", "other"]


async def test_all_partitions_at_one_time(world: World) -> None:
    shares = await asyncio.gather(*(world.share(n, prefix=f"at{n}-") for n in range(COUNT)))
    keys = sorted(key for share in shares for key in share)
    assert len(keys) == 30
    assert len({key.split("-")[0] for key in keys}) == 1, "of one listing"
    assert len(world.proposals) <= 2, "once on a node"


async def test_lost_answers(world: World) -> None:
    for line in world.lines.values():
        line.cuts = 1
    assert await world.share(0) == await world.share(0)
    world.lines["n2"].cuts = 2
    assert len(await world.share(1)) == 10
    assert len(await world.manifests()) == 1


async def test_without_the_orchestrator_it_is_tried_again_later(world: World) -> None:
    world.lines["n1"].cuts = 3
    with pytest.raises(TransientError, match="lost"):
        await world.share(0)
    assert len(await world.share(0)) == 10


async def test_a_new_agent_gets_the_same(world: World) -> None:
    first = await world.share(0)
    world.pins["n1"] = LinkPins(world.lines["n1"])
    assert await world.share(0, prefix="later") == first


async def test_long_listings_go_in_parts(world: World) -> None:
    shares = [await world.share(n, count=60_000) for n in range(COUNT)]
    assert sum(map(len, shares)) == 60_000
    (manifest,) = await world.manifests()
    assert len(manifest.spec.parts) > 2
    reads = world.lines["n2"].asked.count("read")
    assert reads < len(manifest.spec.parts), "only the parts of its own partition"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"session": "of-n2"}, "SessionUnknown"),
        ({"node": "n2", "session": "of-n2"}, "ExecutionUnknown"),
        ({"execution": "nonsense"}, "ExecutionUnknown"),
        ({"input": 7}, "ExecutionUnknown"),
        ({"action": "put", "part": 5000}, "ListingTooLong"),
        ({"action": "put", "data": "x" * 600_000}, "ListingTooLong"),
        ({"action": "make"}, "ListingTooLong"),
    ],
)
async def test_what_the_desk_refuses(world: World, changes: dict[str, object], reason: str) -> None:
    """A node speaks for executions only that were given to it."""
    use = world.use(0)
    ask = PinRequest(
        node="n1", session="of-n1", action="find", namespace="default", execution=use.execution
    )
    reply = await world.desk.answer(ask.but(**changes))
    assert isinstance(reply, Refused)
    assert reply.reason == reason


def ask_of(world: World, partition: int, **changes: object) -> PinRequest:
    given = {
        "node": world.node_of(partition), "session": f"of-{world.node_of(partition)}",
        "action": "put", "namespace": "default", "execution": world.use(partition).execution,
    }  # fmt: skip
    return PinRequest.model_validate(given | changes)


def digest(number: int) -> str:
    return f"sha256:{number:02x}{'0' * 62}"


async def parts(world: World) -> int:
    return len((await world.store.list("ManifestPart")).items)


async def test_an_execution_proposes_so_many_parts_and_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the listings are called that they belong to."""
    monkeypatch.setattr(desk, "PARTS_KEPT_MAX", 4)
    for number in range(6):
        ask = ask_of(world, 0, digest=digest(number), data="eA==")
        reply = await world.desk.answer(ask)
        assert isinstance(reply, Refused) == (number >= 4)
    assert isinstance(reply, Refused)
    assert reply.reason == "TooManyListings"
    # What is there already may be sent again; and another execution has room of its own.
    assert isinstance(await world.desk.answer(ask_of(world, 0, digest=digest(0))), PinReply)
    assert isinstance(await world.desk.answer(ask_of(world, 1, digest=digest(9))), PinReply)
    assert await parts(world) == 5


async def test_once_an_input_is_pinned_no_part_is_stored(world: World) -> None:
    await world.share(0)
    before = await parts(world)
    for action in ("put", "make"):
        manifest = (await world.manifests())[0].spec
        proposal = manifest.but(digest=digest(7)) if action == "make" else None
        ask = ask_of(world, 1, action=action, digest=digest(7), manifest=proposal)
        reply = await world.desk.answer(ask)
        assert isinstance(reply, PinReply)
        assert reply.manifest == manifest
    assert await parts(world) == before


async def test_generations_long_past_pin_nothing(world: World) -> None:
    newer = world.job.with_meta(generation=1 + GENERATIONS_KEPT)
    found = await world.store.get(world.job.ref)
    assert found is not None
    await world.state.commit([Put(newer, found.metadata.resource_version)], Why("test", "Test"))
    reply = await world.desk.answer(ask_of(world, 0, digest=digest(1)))
    assert isinstance(reply, Refused)
    assert reply.reason == "ExecutionUnknown"


async def test_a_manifest_whose_parts_are_not_here_is_not_made(world: World) -> None:
    await world.share(0)
    (manifest,) = await world.manifests()
    other = world.job.but(metadata=world.job.metadata.but(name="other", uid="uid-of-other"))
    await world.put(other, execution(other))
    ask = PinRequest(
        node="n1", session="of-n1", action="make", namespace="default",
        execution=execution(other).name, manifest=manifest.spec,
    )  # fmt: skip
    reply = await world.desk.answer(ask)
    assert isinstance(reply, Refused)
    assert reply.reason == "PartMissing"


async def test_a_job_that_is_gone(world: World) -> None:
    found = await world.store.get(Ref("Job", "default", world.job.name))
    assert found is not None
    from bacalhau_controllers.store import Delete

    await world.state.commit(
        [Delete(found.ref, found.metadata.resource_version)], Why("test", "Test")
    )
    with pytest.raises(TransientError, match="is not on n1"):
        await world.share(0)


async def test_too_many_objects_are_refused_for_good(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "PARTS_MAX", 1)
    with pytest.raises(TerminalError, match="too many objects"):
        await world.share(0, count=60_000)
