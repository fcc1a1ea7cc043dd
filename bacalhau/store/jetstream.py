"""The Store over NATS JetStream. See `bacalhau_controllers.store` for the contract, `codec.py` for
what lies where, `committer.py` for how writes travel."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final, Self

from bacalhau.nats.transport import Transport
from bacalhau.store.batch import Tip
from bacalhau.store.codec import (
    ALL_OBJECTS,
    OPERATION,
    TTL,
    CorruptError,
    decode_history,
    decode_object,
    encode_object,
    history_filter,
    history_headers,
    history_subject,
    is_tombstone,
    object_filter,
    object_subject,
    parse_ref,
)
from bacalhau.store.committer import Committer
from bacalhau.store.feed import Delivery
from bacalhau.store.follow import Current, Follow, Item
from bacalhau.store.history import without_unhappened
from bacalhau.store.lease import Leases
from bacalhau.store.pending import Change, conflict, fenced, revision_of
from bacalhau.store.stream import STREAM, Stream, StreamInfo
from bacalhau.store.trim import trim
from bacalhau_api.errors import UnavailableError
from bacalhau_api.meta import Ref, Resource
from bacalhau_controllers.contract import Clock, Ids
from bacalhau_controllers.store import (
    Changed,
    Cursor,
    Delete,
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
    check_size,
    check_total_size,
    check_writes,
)

logger = logging.getLogger(__name__)

HEADROOM_BYTES: Final = 16 * 1024
"""Of a message's limit, left for headers: the texts of a Why and NATS' own."""

HISTORY_SECONDS: Final = 30 * 86400
TOMBSTONE_SECONDS: Final = 7 * 86400
LIST_SECONDS: Final = 60.0
_SKIPS_LOGGED: Final = 5
# Decoded in a row, after which the event loop gets its turn.
_ITEMS_PER_TURN: Final = 64
_WRITTEN_KEPT: Final = 512


class JetStreamStore:
    """See Store. Open it before use, close it afterwards; it does not own the transport.

    `history_seconds` is how long changes are remembered; `history_seconds_of` says it of single
    namespaces, by name (None: no other), for what is written from then on.
    """

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        ids: Ids,
        *,
        stream: str = STREAM,
        replicas: int = 1,
        history_seconds: int = HISTORY_SECONDS,
        history_seconds_of: Callable[[str], int | None] = lambda namespace: None,
        tombstone_seconds: int = TOMBSTONE_SECONDS,
        batches_max: int | None = None,
        commit_seconds: float = 10.0,
    ) -> None:
        self._transport = transport
        self._clock = clock
        self._stream = Stream(transport, stream)
        self._replicas = replicas
        self._history_seconds = history_seconds
        self._history_seconds_of = history_seconds_of
        self._tombstone_seconds = max(tombstone_seconds, 1)
        tip = Tip()
        # In a cluster a second batch is refused while the first, under the same fence, is not yet
        # applied everywhere. And batches are staged in memory there, so pairs gain nothing.
        is_single = replicas == 1
        self._committer = Committer(
            self._stream,
            ids,
            tip,
            batches_max=batches_max or (2 if is_single else 1),
            use_pairs=is_single,
            deadline=commit_seconds,
        )
        self._leases = Leases(self._stream, clock, ids, tip)
        self._written = _Written()
        self._current = Current()

    async def open(self) -> StreamInfo:
        """Create or adapt the stream. Raises UnavailableError, InvalidError."""
        return await self._stream.ensure(replicas=self._replicas)

    async def close(self) -> None:
        """Wait for the writes under way, refuse the others."""
        await self._committer.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def get(self, ref: Ref) -> Resource | None:
        """See Store.get."""
        message = await self._stream.last(object_subject(ref))
        if message is None or is_tombstone(message.headers):
            return None
        return decode_object(ref.kind, message.data, message.sequence)

    async def list(self, kind: str | None = None, namespace: str | None = None) -> Listing:
        """See Store.list."""
        items: dict[str, Delivery] = {}
        cursor = await self._read(object_filter(kind, namespace), items)
        decode = _Decoder()
        decoded: list[Resource | None] = []
        for count, item in enumerate(items.values()):
            if not is_tombstone(item.headers):
                decoded.append(decode(item))
            if count % _ITEMS_PER_TURN == 0:
                await asyncio.sleep(0)
        return Listing(tuple(item for item in decoded if item is not None), cursor)

    async def commit(self, writes: Sequence[Write], why: Why) -> tuple[Resource | None, ...]:
        """See Store.commit."""
        check_writes(writes)
        if not writes:
            if why.fence is not None and not await self._leases.is_current(why.fence):
                raise fenced(why.fence)
            return ()
        now = self._clock.now()
        limit = self._transport.payload_bytes_max - HEADROOM_BYTES
        uids = await self._uids_of([write for write in writes if isinstance(write, Delete)])
        changes = [self._change(write, why, now, limit, uids) for write in writes]
        check_total_size(sum(len(change.data) for change in changes))
        first = await self._committer.commit(changes, why.fence)
        results: list[Resource | None] = []
        for i, (write, change) in enumerate(zip(writes, changes, strict=True)):
            stored = None
            if isinstance(write, Put):
                stored = write.resource.with_meta(resource_version=revision_of(first, i))
                self._written.note(stored, change.data)
            results.append(stored)
        return tuple(results)

    @asynccontextmanager
    async def watch(self, since: Cursor | None = None) -> AsyncIterator[AsyncIterator[WatchEvent]]:
        """See Store.watch."""
        async with Follow(
            self._stream, ALL_OBJECTS, since, self._tombstone_seconds, self._current
        ) as follow:
            yield _Events(follow, self._written)

    async def history(
        self, ref: Ref, *, limit: int = 1000, uid: str | None = None
    ) -> Sequence[HistoryEntry]:
        """See Store.history."""
        entries: dict[str, Delivery] = {}
        await self._read(history_filter(ref, uid), entries)
        found = await without_unhappened(self._stream, list(entries.values()))
        newest = found[max(len(found) - limit, 0) :]
        return tuple(decode_history(e.subject, e.sequence, e.headers, e.data) for e in newest)

    async def trim_history(
        self,
        namespace: str,
        *,
        oldest: datetime | None = None,
        bytes_max: int | None = None,
        young: datetime | None = None,
    ) -> int:
        """See store.HistoryKeeper."""
        return await trim(self._stream, namespace, oldest=oldest, bytes_max=bytes_max, young=young)

    async def acquire_lease(self, name: str, holder: str, ttl_seconds: float) -> Lease | None:
        """See Store.acquire_lease."""
        return await self._leases.acquire(name, holder, ttl_seconds)

    async def renew_lease(self, lease: Lease, ttl_seconds: float) -> Lease:
        """See Store.renew_lease."""
        return await self._leases.renew(lease, ttl_seconds)

    async def release_lease(self, lease: Lease) -> None:
        """See Store.release_lease."""
        await self._leases.release(lease)

    async def _read(self, subjects: str, into: dict[str, Delivery]) -> Cursor:
        """Everything under `subjects` now, by subject, in the order of sequences."""
        try:
            async with (
                asyncio.timeout(LIST_SECONDS),
                Follow(self._stream, subjects, None, self._tombstone_seconds) as follow,
            ):
                async for item in follow:
                    match item:
                        case Delivery():
                            into.pop(item.subject, None)
                            into[item.subject] = item
                        case Restarted():
                            into.clear()
                        case Synced(cursor):
                            return cursor
        except TimeoutError:
            pass
        raise UnavailableError(f"the store did not list {subjects} within {LIST_SECONDS:g} s")

    def _change(
        self, write: Write, why: Why, now: datetime, limit: int, uids: Mapping[Ref, str]
    ) -> Change:
        if isinstance(write, Put):
            ref, uid = write.resource.ref, write.resource.metadata.uid
            data = encode_object(write.resource)
            check_size(write.resource, len(data), limit)
            object_headers, operation = dict[str, str](), dict[str, str]()
        else:
            ref, uid, data = write.ref, uids[write.ref], b""
            operation = {OPERATION: "PURGE"}
            object_headers = {**operation, TTL: f"{self._tombstone_seconds}s"}
        return Change(
            ref=ref,
            subject=object_subject(ref),
            history_prefix=history_subject(ref, uid, 0).removesuffix(".0"),
            expect=write.expect,
            data=data,
            object_headers=object_headers,
            history_headers={
                **history_headers(why, uid, now),
                **operation,
                TTL: self._history_ttl(ref.namespace),
            },
            is_removal=isinstance(write, Delete),
        )

    def _history_ttl(self, namespace: str) -> str:
        own = self._history_seconds_of(namespace)
        return f"{max(self._history_seconds if own is None else own, 1)}s"

    async def _uids_of(self, deletes: Sequence[Delete]) -> dict[Ref, str]:
        uids = await asyncio.gather(*map(self._uid_of, deletes))
        return {write.ref: uid for write, uid in zip(deletes, uids, strict=True)}

    async def _uid_of(self, write: Delete) -> str:
        """The uid of the object to be removed, which its history is filed under."""
        subject = object_subject(write.ref)
        message = await self._stream.at(write.expect) if write.expect > 0 else None
        if message is None or message.subject != subject or is_tombstone(message.headers):
            newest = await self._stream.last(subject)
            is_absent = newest is None or is_tombstone(newest.headers)
            raise conflict(
                write.ref, write.expect, 0 if is_absent or not newest else newest.sequence
            )
        return decode_object(write.ref.kind, message.data, message.sequence).metadata.uid


class _Written:
    """What this process wrote last. A watch brings it all back a moment later, and it need not be
    decoded for that."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, tuple[bytes, Resource]] = OrderedDict()

    def note(self, stored: Resource, data: bytes) -> None:
        """An object was stored with this payload."""
        self._kept[stored.metadata.resource_version] = data, stored
        if len(self._kept) > _WRITTEN_KEPT:
            self._kept.popitem(last=False)

    def find(self, item: Delivery) -> Resource | None:
        """The object of a delivery, if it was stored here. The payload is compared, since a stream
        that was made anew counts from the start."""
        data, stored = self._kept.get(item.sequence, (b"", None))
        return stored if data == item.data else None


class _Decoder:
    """Decodes deliveries; skips what cannot be read, for one bad object must not hide all others.
    Of many such, few are logged: the first ones, then each time there are ten times as many."""

    def __init__(self, written: _Written | None = None) -> None:
        self._written = written
        self._skipped = 0

    def __call__(self, item: Delivery) -> Resource | None:
        """The object, or None if it cannot be read."""
        if self._written is not None and (known := self._written.find(item)) is not None:
            return known
        try:
            return decode_object(parse_ref(item.subject).kind, item.data, item.sequence)
        except CorruptError as error:
            self._skipped += 1
            if self._skipped <= _SKIPS_LOGGED or str(self._skipped).strip("0") == "1":
                logger.error(
                    "Skipped a stored object",
                    extra={"error": str(error)[:1000], "skipped": self._skipped},
                )
            return None


class _Events(AsyncIterator[WatchEvent]):
    """Deliveries as events."""

    def __init__(self, follow: Follow, written: _Written) -> None:
        self._follow = follow
        self._decode = _Decoder(written)

    async def __anext__(self) -> WatchEvent:
        while True:
            event = self._translated(await anext(self._follow))
            if event is not None:
                return event

    def _translated(self, item: Item) -> WatchEvent | None:
        if not isinstance(item, Delivery):
            return item
        if not is_tombstone(item.headers):
            found = self._decode(item)
            return Changed(found) if found is not None else None
        if self._follow.is_listing and item.sequence <= self._follow.floor:
            return None  # removed before the list began
        return Removed(parse_ref(item.subject), item.sequence)
