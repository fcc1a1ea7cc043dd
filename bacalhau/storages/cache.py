"""The node's input cache: everything remote is fetched once, and shared read-only.

Wishes for one source at the same time wait for one download. It goes on as long as anybody waits;
what it got is kept for the next try. The disk's part is in `content.py`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bacalhau.storages.content import ContentStore, Usage
from bacalhau.storages.draft import Blob, Draft, Known
from bacalhau.transfer.progress import Transfer
from bacalhau.transfer.threads import WRITER_LET_GO_SECONDS, TransferThreads
from bacalhau_api.errors import TransientError
from bacalhau_api.locality import input_key
from bacalhau_api.v1.job import InputSource
from bacalhau_api.v1.node import HeldInput
from bacalhau_controllers.runner.ports import Progress, Use

T = TypeVar("T")

_TRIES_MAX = 5


@dataclass(slots=True)
class Fetch:
    """What a fetcher works with: where the bytes go, what the source had last time, and how far
    the transfer is."""

    draft: Draft
    known: Known | None
    transfer: Transfer
    threads: TransferThreads

    async def in_thread(self, function: Callable[..., T], *args: object) -> T:
        """Run a blocking part of this transfer."""
        return await self.threads.run(
            self.transfer, function, *args, patience_seconds=WRITER_LET_GO_SECONDS
        )


def use_key(item: InputSource, use: Use) -> str:
    """The key of what an execution reads of an input (see `bacalhau_api.locality`)."""
    return input_key(item.source, use.partition, use.partitions)


Bring = Callable[[Fetch], Awaitable[Blob]]


@dataclass(slots=True)
class _Flight:
    """One download, and how many wait for it."""

    task: asyncio.Task[Blob]
    transfer: Transfer
    waiters: int = 0


@dataclass(slots=True)
class Hold:
    """Contents that one input needs, kept until it has them. `total` are all its bytes, if that
    is known before they come; `finished` those that are here. By `key` the node tells later that
    it holds the input (see `bacalhau_api.locality`)."""

    cache: "InputCache"
    place_at: Path
    key: str = ""
    total: int | None = None
    finished: int = 0
    held: list[str] = field(default_factory=list)
    active: list[Transfer] = field(default_factory=list)

    def progress(self) -> Progress:
        """How far it is."""
        done = self.finished + sum(transfer.done for transfer in self.active)
        total = self.total
        if total is None and len(self.active) == 1:
            total = self.active[0].total
        return Progress(done, total)

    async def obtain(self, identity: str, bring: Bring, *, is_fixed: bool) -> Blob:
        """The content of a source. With `is_fixed` an identity always means the same bytes, and
        nothing is asked of anybody if they are here; else `bring` decides."""
        for _ in range(_TRIES_MAX):
            blob = await self.cache._obtain(identity, bring, is_fixed, self.active)
            if await self.cache.threads.quick(self.cache.store.hold, blob.sha256):
                self.held.append(blob.sha256)
                self.finished += blob.size_bytes
                return blob
        raise AssertionError("contents vanish as soon as they are here")

    async def blob(self, sha256: str) -> Blob | None:
        """A content by its digest, if it is here."""
        store = self.cache.store
        if not await self.cache.threads.quick(store.hold, sha256):
            return None
        self.held.append(sha256)
        return await self.cache.threads.quick(store.blob, sha256)

    async def place(
        self, files: Mapping[str, Blob], links: Mapping[str, str] | None = None
    ) -> Path:
        """Link contents into the input's own directory; return that, read-only for workloads."""
        store, quick = self.cache.store, self.cache.threads.quick
        placed = await quick(store.place, files, self.place_at, links)
        if self.key:
            with suppress(TransientError):  # only a hint: the input is there whatever becomes of it
                await quick(store.note_input, self.key, tuple(files.values()))
        return placed


class InputCache:
    """One per node. `progress` tells how far the inputs of an execution are."""

    def __init__(self, store: ContentStore, threads: TransferThreads) -> None:
        self.store = store
        self.threads = threads
        self._flights: dict[str, _Flight] = {}
        self._holds: dict[Path, Hold] = {}

    @asynccontextmanager
    async def hold(self, into: Path, key: str = "") -> AsyncIterator[Hold]:
        """Contents obtained within are not evicted until the end of the block. `key` is that of
        the input (`bacalhau_api.locality`)."""
        hold = Hold(self, into, key)
        self._holds[into] = hold
        try:
            yield hold
        finally:
            self._holds.pop(into, None)
            for sha256 in hold.held:
                self.store.release(sha256)

    def progress(self, into: Path) -> Progress | None:
        """How far the input is that goes to `into`; None if nothing is under way."""
        hold = self._holds.get(into)
        return None if hold is None else hold.progress()

    def usage(self) -> Usage:
        """How full it is."""
        return self.store.usage()

    async def held_inputs(self) -> tuple[HeldInput, ...]:
        """See Inventory."""
        return await self.threads.quick(self.store.held_inputs)

    async def close(self) -> None:
        """End what is under way."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.task.cancel()
        await asyncio.gather(*(flight.task for flight in flights), return_exceptions=True)
        self.threads.close()
        self.store.close()

    async def _obtain(
        self, identity: str, bring: Bring, is_fixed: bool, active: list[Transfer]
    ) -> Blob:
        while True:
            flight = self._flights.get(identity)
            if flight is None:
                known = await self.threads.quick(self.store.find, identity)
                if known is not None and is_fixed:
                    return known.blob
                if identity in self._flights:  # somebody was faster
                    continue
                flight = self._take_off(identity, bring, known)
            elif flight.transfer.is_cancelled:
                # Its last waiter has gone; wait until it has let go of the file.
                await asyncio.wait([flight.task])
                continue
            flight.waiters += 1
            active.append(flight.transfer)
            try:
                return await asyncio.shield(flight.task)
            finally:
                active.remove(flight.transfer)
                flight.waiters -= 1
                if not flight.waiters and not flight.task.done():
                    flight.transfer.cancel()
                    flight.task.cancel()
                    await asyncio.wait([flight.task])

    def _take_off(self, identity: str, bring: Bring, known: Known | None) -> _Flight:
        transfer = Transfer(what=identity)
        task = asyncio.create_task(
            self._fly(identity, bring, known, transfer), name=f"fetch {identity[:100]}"
        )
        flight = self._flights[identity] = _Flight(task, transfer)
        task.add_done_callback(lambda _: self._land(identity, flight))
        return flight

    def _land(self, identity: str, flight: _Flight) -> None:
        if self._flights.get(identity) is flight:
            del self._flights[identity]
        if not flight.task.cancelled():
            flight.task.exception()  # if nobody waits any more, nobody needs it

    async def _fly(
        self, identity: str, bring: Bring, known: Known | None, transfer: Transfer
    ) -> Blob:
        draft = self.store.draft(identity)
        self.store.activate(draft.key, True)
        try:
            return await bring(Fetch(draft, known, transfer, self.threads))
        finally:
            self.store.activate(draft.key, False)
            await self.threads.quick(draft.close)
