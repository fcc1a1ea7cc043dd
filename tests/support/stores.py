"""Both stores behind one handle, for suites that run over both; and objects to put into them."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from bacalhau.nats.server import EmbeddedNats
from bacalhau.store.jetstream import JetStreamStore
from bacalhau_api.meta import ObjectMeta, OwnerReference, Ref
from bacalhau_api.v1.job import Job, JobSpec, JobType, SpecConfig, Task
from bacalhau_api.v1.node import Node, NodeSpec
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.store import (
    Changed,
    Cursor,
    HistoryKeeper,
    Put,
    Removed,
    Restarted,
    Store,
    Synced,
    WatchEvent,
    Why,
)
from tests.support.nats import crash, delete_stream, open_store, running_server

WHY = Why("test", "Testing")
T0 = datetime(2026, 1, 1, tzinfo=UTC)
_uids = itertools.count(1)


def uid() -> str:
    """A fresh one."""
    return f"{next(_uids):032x}"


def node(name: str, **spec: object) -> Node:
    """A small object."""
    return Node(
        metadata=ObjectMeta(name=name, namespace="", uid=uid()),
        spec=NodeSpec.model_validate(spec),
    )


def job(name: str, namespace: str = "default", *, filler: str = "", owner: str = "") -> Job:
    """A larger object, as large as `filler` makes it."""
    owners = (OwnerReference(kind="Job", name="owner", uid=owner),) if owner else ()
    task = Task(engine=SpecConfig(type="noop"), meta={"filler": filler} if filler else {})
    return Job(
        metadata=ObjectMeta(name=name, namespace=namespace, uid=uid(), owner_references=owners),
        spec=JobSpec(type=JobType.BATCH, tasks=(task,)),
    )


class ManualClock:
    """Moves when told to."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def now(self) -> datetime:
        """T0 and what was added."""
        return T0 + timedelta(seconds=self._seconds)

    def monotonic(self) -> float:
        """Seconds added so far."""
        return self._seconds

    async def sleep(self, seconds: float) -> None:
        """Moves the clock."""
        self._seconds += seconds


class Rig(Protocol):
    """A store, and what can happen to it."""

    store: Store
    keeper: HistoryKeeper

    async def now(self) -> datetime:
        """The time that the store gives to what it is told now."""

    async def crash(self) -> None:
        """The store's server dies and comes back with all that was acknowledged."""

    async def recreate(self) -> None:
        """The store loses everything and begins anew."""

    async def sleep(self, seconds: float) -> None:
        """Let the store's time pass."""

    def monotonic(self) -> float:
        """The clock that leases are measured on."""


class MemoryRig:
    """Over MemoryStore."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.memory = MemoryStore(self.clock, strict=True)
        self.store: Store = self.memory
        self.keeper: HistoryKeeper = self.memory
        self._epochs = itertools.count(2)

    async def now(self) -> datetime:
        """See Rig."""
        return self.clock.now()

    async def crash(self) -> None:
        """Nothing that could be seen from outside."""

    async def recreate(self) -> None:
        """See Rig."""
        self.memory.recreate(f"memory-{next(self._epochs)}")

    async def sleep(self, seconds: float) -> None:
        """See Rig."""
        await self.clock.sleep(seconds)

    def monotonic(self) -> float:
        """See Rig."""
        return self.clock.monotonic()


class JetStreamRig:
    """Over a real server."""

    def __init__(self, server: EmbeddedNats, store: JetStreamStore) -> None:
        self.server = server
        self.store: Store = store
        self.keeper: HistoryKeeper = store

    async def now(self) -> datetime:
        """See Rig."""
        return datetime.now(UTC)

    async def crash(self) -> None:
        """See Rig."""
        await crash(self.server)

    async def recreate(self) -> None:
        """See Rig."""
        await delete_stream(self.server)
        await self.store.open()  # type: ignore[attr-defined]

    async def sleep(self, seconds: float) -> None:
        """See Rig."""
        await asyncio.sleep(seconds)

    def monotonic(self) -> float:
        """See Rig."""
        return asyncio.get_running_loop().time()


@asynccontextmanager
async def open_rig(kind: str, data_dir: Path) -> AsyncIterator[Rig]:
    """A rig of kind `memory` or `jetstream`."""
    if kind == "memory":
        yield MemoryRig()
        return
    async with running_server(data_dir) as server, open_store(server) as store:
        yield JetStreamRig(server, store)


async def create(store: Store, *resources: Node | Job) -> list[int]:
    """Create objects in one commit; return their revisions."""
    stored = await store.commit([Put(resource, 0) for resource in resources], WHY)
    return [item.metadata.resource_version for item in stored if item is not None]


class View:
    """What a watcher has seen: objects by reference, and whether it was all in order."""

    def __init__(self, *, keep_events: bool) -> None:
        self._keep_events = keep_events
        self.objects: dict[Ref, int] = {}
        self.events: list[WatchEvent] = []
        self.restarts = 0
        self.syncs = 0
        self._changed = asyncio.Event()
        self._last = 0

    async def follow(self, events: AsyncIterator[WatchEvent]) -> None:
        """Take in events for ever. Fails on one that is out of order or repeated."""
        async for event in events:
            if self._keep_events:
                self.events.append(event)
            match event:
                case Changed(resource):
                    self._in_order(resource.metadata.resource_version)
                    self.objects[resource.ref] = resource.metadata.resource_version
                case Removed(ref, revision):
                    self._in_order(revision)
                    self.objects.pop(ref, None)
                case Restarted():
                    self.restarts += 1
                    self.objects.clear()
                    self._last = 0
                case Synced():
                    self.syncs += 1
            self._changed.set()

    def _in_order(self, revision: int) -> None:
        assert revision > self._last, f"{revision} came after {self._last}"
        self._last = revision

    async def until(self, expected: dict[Ref, int], seconds: float = 20.0) -> None:
        """Return once exactly these objects are there, at these revisions."""
        try:
            async with asyncio.timeout(seconds):
                while self.objects != expected:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            missing = {r: v for r, v in expected.items() if self.objects.get(r) != v}
            extra = {r: v for r, v in self.objects.items() if r not in expected}
            raise AssertionError(f"missing {missing}, extra {extra}") from None

    async def seen(self, ref: Ref, seconds: float = 20.0) -> int:
        """The revision of an object, once it is there."""
        async with asyncio.timeout(seconds):
            while ref not in self.objects:
                self._changed.clear()
                await self._changed.wait()
        return self.objects[ref]

    async def synced(self, times: int = 1, seconds: float = 20.0) -> None:
        """Return once Synced came so often."""
        async with asyncio.timeout(seconds):
            while self.syncs < times:
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def watching(
    store: Store, since: Cursor | None = None, *, keep_events: bool = True
) -> AsyncIterator[View]:
    """A watch that runs beside the test; what it raises fails the test."""
    view = View(keep_events=keep_events)
    async with store.watch(since) as events:
        task = asyncio.create_task(view.follow(events))
        try:
            yield view
        finally:
            if task.done():
                await task
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
