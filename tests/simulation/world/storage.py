"""The store as one orchestrator sees it: slow, unreliable, and behind.

The truth is one `MemoryStore`. Each process has a `StoreClient` of its own, which takes time, fails
before or after a write, lets a write land after its answer was given up, and delivers its watch
late, with gaps filled by newer versions, or anew from the start.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import replace
from random import Random
from typing import TypeVar

from bacalhau_api.errors import OutcomeUnknownError, UnavailableError
from bacalhau_api.meta import Ref, Resource
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.store import (
    Cursor,
    HistoryEntry,
    Lease,
    Listing,
    Put,
    WatchEvent,
    Why,
    Write,
    lease_deadline,
)
from tests.simulation.world.faults import Fault, Faults
from tests.simulation.world.life import WorldLoop, check_alive

T = TypeVar("T")

DEADLINE_SECONDS = 5.0
_LATENCY = (0.0005, 0.004)
_SLOW = (0.2, 3.0)
_LAG = (0.1, 6.0)

Boundary = Callable[[str], Awaitable[None]]


class TrueStore(MemoryStore):
    """The store itself. `on_commit` is called after each commit, with what it wrote."""

    on_commit: Callable[[Sequence[Write], Why, Sequence[Resource | None]], None]
    before_commit: Callable[[Sequence[Write]], None]

    async def commit(self, writes: Sequence[Write], why: Why) -> tuple[Resource | None, ...]:
        """See Store.commit."""
        self.before_commit(writes)
        results = await super().commit(writes, why)
        self.on_commit(writes, why, results)
        return results

    def _size_of(self, resource: Resource) -> int:
        """Nothing here comes near the limits: only a strict store pays for looking."""
        return super()._size_of(resource) if self._strict else 0

    def peek(self, ref: Ref) -> Resource | None:
        """The current object, for the world's own eyes."""
        return self._objects.get(ref)

    def everything(self, kind: str) -> list[Resource]:
        """All objects of a kind, for the world's own eyes."""
        return [item for ref, item in self._objects.items() if ref.kind == kind]

    def all_history(self) -> dict[Ref, list[HistoryEntry]]:
        """All history there is."""
        return {ref: list(entries) for ref, entries in self._history.items()}


class StoreClient:
    """See `bacalhau_controllers.store.Store`. `is_cut_off` is an outage of this one client."""

    def __init__(
        self,
        truth: TrueStore,
        loop: WorldLoop,
        clock: Clock,
        rng: Random,
        faults: Faults,
        boundary: Boundary,
    ) -> None:
        self.is_cut_off = False
        self.stale_until = 0.0
        """Until then nothing new is seen, and then everything, version by version."""
        self.blind_until = 0.0
        """Until then nothing new is seen, and then only the newest version of each object."""
        self._truth = truth
        self._loop = loop
        self._clock = clock
        self._rng = rng
        self._faults = faults
        self._boundary = boundary
        self._context = copy_context()

    def heal(self) -> None:
        """No more faults."""
        self._faults = Faults.none()
        self.is_cut_off = False

    async def get(self, ref: Ref) -> Resource | None:
        """See Store."""
        await self._travel()
        found = await self._truth.get(ref)
        await self._travel()
        return found

    async def list(self, kind: str | None = None, namespace: str | None = None) -> Listing:
        """See Store."""
        await self._travel()
        return await self._truth.list(kind, namespace)

    async def commit(self, writes: Sequence[Write], why: Why) -> tuple[Resource | None, ...]:
        """See Store."""
        await self._boundary(f"before {why.actor}")
        check_alive()
        if self._happens(Fault.STORE_REFUSES) or (self.is_cut_off and self._rng.random() < 0.8):
            await self._travel()
            raise UnavailableError("refused before anything was written")
        is_late = self._happens(Fault.STORE_LATE_WRITE)
        delay = self._latency() + (self._rng.uniform(0.0, 4.0) if is_late else 0.0)
        # On its way the write does not need its writer any more.
        done: asyncio.Future[tuple[Resource | None, ...]] = self._loop.create_future()
        self._loop.create_task(
            self._land(writes, why, delay, done, is_late=is_late),
            name="write",
            context=self._context,
        )
        if is_late:
            await asyncio.sleep(self._rng.uniform(0.0, 0.5))
            check_alive()
            raise OutcomeUnknownError("the answer was lost, and the write may be under way")
        results = await done
        check_alive()
        await self._boundary(f"after {why.actor}")
        if self._happens(Fault.STORE_LOSES_ANSWER) or self.is_cut_off:
            raise OutcomeUnknownError("written, and the answer was lost")
        await asyncio.sleep(self._latency())
        check_alive()
        return results

    @asynccontextmanager
    async def watch(self, since: Cursor | None = None) -> AsyncIterator[AsyncIterator[WatchEvent]]:
        """See Store."""
        await self._travel()
        if since is not None and self._happens(Fault.WATCH_RESTARTS):
            since = Cursor("another-epoch", since.revision)
        async with self._truth.watch(since) as events:
            yield _Watch(self, events)

    async def history(
        self, ref: Ref, *, limit: int = 1000, uid: str | None = None
    ) -> Sequence[HistoryEntry]:
        """See Store."""
        await self._travel()
        return await self._truth.history(ref, limit=limit, uid=uid)

    async def acquire_lease(self, name: str, holder: str, ttl_seconds: float) -> Lease | None:
        """See Store."""
        sent = self._clock.monotonic()
        lease = await self._lease(lambda: self._truth.acquire_lease(name, holder, ttl_seconds))
        return lease and replace(lease, deadline=lease_deadline(sent, ttl_seconds))

    async def renew_lease(self, lease: Lease, ttl_seconds: float) -> Lease:
        """See Store."""
        sent = self._clock.monotonic()
        lease = await self._lease(lambda: self._truth.renew_lease(lease, ttl_seconds))
        return replace(lease, deadline=lease_deadline(sent, ttl_seconds))

    async def release_lease(self, lease: Lease) -> None:
        """See Store."""
        await self._lease(lambda: self._truth.release_lease(lease))

    # -- trouble ---------------------------------------------------------------------------------

    async def _lease(self, call: Callable[[], Awaitable[T]]) -> T:
        await self._travel()
        if self._happens(Fault.LEASE_FAILS):
            raise UnavailableError("the lease was not answered")
        result = await call()
        if self._happens(Fault.LEASE_FAILS):
            raise OutcomeUnknownError("the lease's answer was lost")
        await self._travel()
        return result

    async def _land(
        self,
        writes: Sequence[Write],
        why: Why,
        delay: float,
        done: "asyncio.Future[tuple[Resource | None, ...]]",
        *,
        is_late: bool,
    ) -> None:
        before = await self._newest(writes) if is_late else {}
        await asyncio.sleep(delay)
        # What a message expects is a revision, that of a removal, too: it cannot create anew what
        # was created and removed while it was under way.
        if is_late and await self._newest(writes) != before:
            return
        try:
            results = await self._truth.commit(writes, why)
        except Exception as error:  # noqa: BLE001 whoever still waits gets it
            if not done.done():
                done.set_exception(error)
                done.exception()  # or nobody does
        else:
            if not done.done():
                done.set_result(results)

    async def _newest(self, writes: Sequence[Write]) -> dict[Ref, int]:
        """The newest revision of each object, also if that is its removal."""
        refs = [write.resource.ref if isinstance(write, Put) else write.ref for write in writes]
        found = [await self._truth.history(ref, limit=1) for ref in refs]
        return {entry.ref: entry.revision for entries in found for entry in entries}

    async def next_event(self, events: AsyncIterator[WatchEvent]) -> WatchEvent:
        """One event of a watch, as late as it gets here."""
        check_alive()
        if self._happens(Fault.WATCH_SKIPS):
            # What changes meanwhile arrives in its newest version only.
            await asyncio.sleep(self._rng.uniform(*_LAG))
        await self._outage_ends()
        await self._pass(self.blind_until)
        event = await anext(events)
        await self._pass(self.stale_until)
        lag = self._rng.uniform(*_LAG) if self._happens(Fault.WATCH_LAGS) else 0.0005
        await asyncio.sleep(lag)
        check_alive()
        if self._happens(Fault.WATCH_BREAKS):
            raise UnavailableError("the watch broke")
        return event

    async def _pass(self, until: float) -> None:
        if until > self._loop.time():
            await asyncio.sleep(until - self._loop.time())

    async def _outage_ends(self) -> None:
        while self.is_cut_off:  # noqa: ASYNC110 the world sets it at random
            await asyncio.sleep(0.5)

    async def _travel(self) -> None:
        check_alive()
        await asyncio.sleep(self._latency())
        check_alive()
        if self.is_cut_off:
            await asyncio.sleep(DEADLINE_SECONDS)
            check_alive()
            raise UnavailableError("the store did not answer in time")

    def _latency(self) -> float:
        if self._happens(Fault.STORE_SLOW):
            return self._rng.uniform(*_SLOW)
        return self._rng.uniform(*_LATENCY)

    def _happens(self, fault: Fault) -> bool:
        rate = self._faults.rate(fault)
        return rate > 0 and self._rng.random() < rate


class _Watch(AsyncIterator[WatchEvent]):
    """The events of one watch of one client."""

    def __init__(self, client: StoreClient, events: AsyncIterator[WatchEvent]) -> None:
        self._client = client
        self._events = events

    async def __anext__(self) -> WatchEvent:
        return await self._client.next_event(self._events)
