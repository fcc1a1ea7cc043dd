"""A Store in memory: for simulations, tests and throw-away servers. Deterministic; nothing is kept
when the process ends. The contract it shares with the JetStream store is in `store.py`.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import dropwhile

from bacalhau_api.errors import ConflictError, FencedError
from bacalhau_api.meta import Ref, Resource
from bacalhau_api.v1 import decode_resource
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.store import (
    OBJECT_BYTES_MAX,
    Changed,
    Cursor,
    Delete,
    Fence,
    HistoryEntry,
    Lease,
    Listing,
    Put,
    Removed,
    Restarted,
    Synced,
    WatchEvent,
    Why,
    Write,
    check_lease_ttl,
    check_size,
    check_total_size,
    check_writes,
    clip,
    lease_deadline,
)

# Revisions advance by two, because in JetStream each change also stores its history entry. Code
# that wrongly counts on gapless revisions then fails in the simulation already.
_STRIDE = 2


@dataclass(slots=True)
class _Held:
    holder: str
    token: int
    expires: float


class _Turn:
    """Awaiting it lets others run once: as with a real store, no call returns in the same turn."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class _Mailbox(AsyncIterator[WatchEvent]):
    """What one watch has not read yet. Holds at most one event for each object."""

    def __init__(self) -> None:
        self._events: dict[Ref | int, WatchEvent] = {}
        self._marks = 0
        self._filled = asyncio.Event()

    def put(self, event: Changed | Removed) -> None:
        """Add a change; an unread one of the same object is skipped over."""
        if isinstance(event, Changed):
            key, revision = event.resource.ref, _revision_of(event.resource)
        else:
            key, revision = event.ref, event.revision
        ends = self._ends_after(key)
        self._events.pop(key, None)
        self._events[key] = event
        # What existed when the list began comes before its end, in whichever version.
        for mark, end in ends:
            del self._events[mark]
            self._events[mark] = Synced(Cursor(end.cursor.epoch, revision))
        self._filled.set()

    def _ends_after(self, key: Ref) -> list[tuple[Ref | int, Synced]]:
        """The unread ends of lists that an unread event of this key comes before."""
        if key not in self._events:
            return []
        later = dropwhile(lambda pair: pair[0] != key, self._events.items())
        return [(mark, end) for mark, end in later if isinstance(end, Synced)]

    def mark(self, event: Restarted | Synced) -> None:
        """Add a mark that keeps its place in the order."""
        self._marks += 1
        self._events[self._marks] = event
        self._filled.set()

    def clear(self) -> None:
        """Forget what was not read."""
        self._events.clear()

    async def __anext__(self) -> WatchEvent:
        while not self._events:
            self._filled.clear()
            await self._filled.wait()
        return self._events.pop(next(iter(self._events)))


class MemoryStore:
    """See `store.Store`.

    With `strict` every object is encoded and decoded on its way in, so that one that could not be
    read back from a disk fails at once. `epoch` names this store in cursors. It begins with
    `objects`, at their own versions and without a history.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        epoch: str = "memory-1",
        object_bytes_max: int = OBJECT_BYTES_MAX,
        history_seconds: float = 30 * 86400,
        tombstone_seconds: float = 7 * 86400,
        strict: bool = False,
        objects: Iterable[Resource] = (),
    ) -> None:
        self._clock = clock
        self._epoch = epoch
        self._object_bytes_max = object_bytes_max
        self._history_retention = timedelta(seconds=history_seconds)
        self._tombstone_seconds = tombstone_seconds
        self._strict = strict
        self._objects: dict[Ref, Resource] = {item.ref: item for item in objects}
        self._revision = max(map(_revision_of, self._objects.values()), default=0)
        self._history: dict[Ref, deque[HistoryEntry]] = {}
        self._tombstones: dict[Ref, tuple[int, float]] = {}  # revision, monotonic time
        self._forgotten = 0  # newest revision of a tombstone that was dropped
        self._tokens: dict[str, int] = {}
        self._leases: dict[str, _Held] = {}
        self._watches: list[_Mailbox] = []

    async def get(self, ref: Ref) -> Resource | None:
        """See Store.get."""
        await _Turn()
        return self._objects.get(ref)

    async def list(self, kind: str | None = None, namespace: str | None = None) -> Listing:
        """See Store.list."""
        await _Turn()
        items = tuple(
            item
            for ref, item in self._objects.items()
            if kind in (None, ref.kind) and namespace in (None, ref.namespace)
        )
        return Listing(items, self._cursor())

    async def commit(self, writes: Sequence[Write], why: Why) -> tuple[Resource | None, ...]:
        """See Store.commit."""
        await _Turn()
        check_writes(writes)
        self._check_fence(why.fence)
        total = 0
        for write in writes:
            if isinstance(write, Put):
                size = self._size_of(write.resource)
                check_size(write.resource, size, self._object_bytes_max)
                total += size
        check_total_size(total)
        for write in writes:
            self._check_expectation(write)
        return tuple([self._apply(write, why) for write in writes])

    @asynccontextmanager
    async def watch(self, since: Cursor | None = None) -> AsyncIterator[AsyncIterator[WatchEvent]]:
        """See Store.watch."""
        mailbox = _Mailbox()
        if since is None or not self._can_continue(since):
            if since is not None:
                mailbox.mark(Restarted(self._epoch))
            self._send_all(mailbox)
        else:
            for event in self._changes_after(since.revision):
                mailbox.put(event)
            mailbox.mark(Synced(self._cursor()))
        self._watches.append(mailbox)
        try:
            yield mailbox
        finally:
            self._watches.remove(mailbox)

    async def history(
        self, ref: Ref, *, limit: int = 1000, uid: str | None = None
    ) -> Sequence[HistoryEntry]:
        """See Store.history."""
        await _Turn()
        entries = self._history.get(ref, deque())
        self._drop_old_history(entries)
        found = [entry for entry in entries if uid in (None, entry.uid)]
        return tuple(found[max(len(found) - limit, 0) :])

    async def trim_history(
        self,
        namespace: str,
        *,
        oldest: datetime | None = None,
        bytes_max: int | None = None,
        young: datetime | None = None,
    ) -> int:
        """See store.HistoryKeeper."""
        await _Turn()
        own = [entries for ref, entries in self._history.items() if ref.namespace == namespace]
        for entries in own:
            while entries and oldest is not None and entries[0].time < oldest:
                entries.popleft()
        if bytes_max is None:
            return 0
        total = sum(_entry_bytes(entry) for entries in own for entry in entries)
        for entry in sorted((e for entries in own for e in entries), key=lambda e: e.revision):
            if total <= bytes_max or (young is not None and entry.time >= young):
                break
            total -= _entry_bytes(entry)
            self._history[entry.ref].remove(entry)
        return total

    async def acquire_lease(self, name: str, holder: str, ttl_seconds: float) -> Lease | None:
        """See Store.acquire_lease."""
        await _Turn()
        check_lease_ttl(ttl_seconds)
        now = self._clock.monotonic()
        held = self._leases.get(name)
        if held is not None and held.expires > now and held.holder != holder:
            return None
        token = self._next_revision()
        self._tokens[name] = token
        self._leases[name] = _Held(holder, token, now + ttl_seconds)
        return Lease(name, holder, token, lease_deadline(now, ttl_seconds))

    async def renew_lease(self, lease: Lease, ttl_seconds: float) -> Lease:
        """See Store.renew_lease."""
        await _Turn()
        check_lease_ttl(ttl_seconds)
        now = self._clock.monotonic()
        held = self._leases.get(lease.name)
        if held is None or held.token != lease.token or held.expires <= now:
            raise FencedError(f"the lease {lease.name!r} is no longer held by {lease.holder!r}")
        held.expires = now + ttl_seconds
        return Lease(lease.name, lease.holder, lease.token, lease_deadline(now, ttl_seconds))

    async def release_lease(self, lease: Lease) -> None:
        """See Store.release_lease."""
        await _Turn()
        held = self._leases.get(lease.name)
        if held is not None and held.token == lease.token:
            del self._leases[lease.name]

    def recreate(self, epoch: str) -> None:
        """Lose everything and start over as a new store, as when a disk was replaced."""
        self._epoch = epoch
        self._revision = self._forgotten = 0
        for table in (self._objects, self._history, self._tombstones, self._tokens, self._leases):
            table.clear()
        for mailbox in self._watches:
            mailbox.clear()
            mailbox.mark(Restarted(epoch))
            self._send_all(mailbox)

    def _size_of(self, resource: Resource) -> int:
        """Bytes of an object, for its limits."""
        return len(resource.encode())

    def _next_revision(self) -> int:
        revision = self._revision + 1
        self._revision += _STRIDE
        return revision

    def _cursor(self) -> Cursor:
        return Cursor(self._epoch, self._revision)

    def _check_fence(self, fence: Fence | None) -> None:
        if fence is not None and self._tokens.get(fence.name) != fence.token:
            raise FencedError(
                f"the lease {fence.name!r} was taken by another since token {fence.token}"
            )

    def _check_expectation(self, write: Write) -> None:
        ref = write.resource.ref if isinstance(write, Put) else write.ref
        current = self._objects.get(ref)
        found = current.metadata.resource_version if current else 0
        if found != write.expect or (isinstance(write, Delete) and current is None):
            raise ConflictError(
                f"{ref} was expected at revision {write.expect} and is at {found}",
                hint="read it again",
            )

    def _apply(self, write: Write, why: Why) -> Resource | None:
        revision = self._next_revision()
        event: Changed | Removed
        if isinstance(write, Put):
            ref = write.resource.ref
            stored = self._stored(write.resource, revision)
            uid = stored.metadata.uid
            self._objects[ref] = stored
            self._tombstones.pop(ref, None)
            event = Changed(stored)
        else:
            ref, stored = write.ref, None
            uid = self._objects.pop(ref).metadata.uid
            self._tombstones[ref] = (revision, self._clock.monotonic())
            event = Removed(ref, revision)
            self._drop_old_tombstones()
        entry = HistoryEntry(
            ref=ref,
            uid=uid,
            revision=revision,
            time=self._clock.now(),
            actor=clip(why.actor),
            reason=clip(why.reason),
            message=clip(why.message),
            resource=stored,
        )
        entries = self._history.setdefault(ref, deque())
        entries.append(entry)
        self._drop_old_history(entries)
        for mailbox in self._watches:
            mailbox.put(event)
        return stored

    def _stored(self, resource: Resource, revision: int) -> Resource:
        if self._strict:
            resource = decode_resource(resource.encode())
        return resource.with_meta(resource_version=revision)

    def _can_continue(self, since: Cursor) -> bool:
        self._drop_old_tombstones()
        return since.epoch == self._epoch and self._forgotten <= since.revision <= self._revision

    def _send_all(self, mailbox: _Mailbox) -> None:
        for item in sorted(self._objects.values(), key=_revision_of):
            mailbox.put(Changed(item))
        mailbox.mark(Synced(self._cursor()))

    def _changes_after(self, revision: int) -> Iterator[Changed | Removed]:
        events: list[tuple[int, Changed | Removed]] = []
        events += [(_revision_of(item), Changed(item)) for item in self._objects.values()]
        events += [(at, Removed(ref, at)) for ref, (at, _) in self._tombstones.items()]
        for at, event in sorted(events, key=lambda pair: pair[0]):
            if at > revision:
                yield event

    def _drop_old_tombstones(self) -> None:
        limit = self._clock.monotonic() - self._tombstone_seconds
        while self._tombstones:
            ref, (revision, at) = next(iter(self._tombstones.items()))
            if at >= limit:
                return
            del self._tombstones[ref]
            self._forgotten = revision

    def _drop_old_history(self, entries: deque[HistoryEntry]) -> None:
        limit = self._clock.now() - self._history_retention
        while entries and entries[0].time < limit:
            entries.popleft()


def _entry_bytes(entry: HistoryEntry) -> int:
    """About what a stored entry takes: the object, and who, when and why."""
    size = len(entry.resource.encode()) if entry.resource is not None else 0
    return size + len(entry.actor) + len(entry.reason) + len(entry.message) + 200


def _revision_of(resource: Resource) -> int:
    return resource.metadata.resource_version
