"""A source run next to its directory, against any orchestrator: reads by watches, writes by HTTP.

Everything that is written is checked again on the server, against its own view: that the object is
the claimed one, that the lease is held. So a view here that lags behind leads to work done in vain,
never to a wrong deletion.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Final, TypeVar

from bacalhau.client.aio import AsyncClient
from bacalhau.gitops.wire import (
    BODY_BYTES,
    ORDERS_MAX,
    DoneAnswer,
    DoneItem,
    LeaseRequest,
    LetGoRequest,
    OrderItem,
    OrdersRequest,
    ReportRequest,
    lease,
    let_go,
    orders,
    report,
)
from bacalhau_api.errors import (
    BacalhauError,
    ConflictError,
    FencedError,
    InvalidError,
    NotFoundError,
    Problem,
    TerminalError,
    TransientError,
    UnavailableError,
)
from bacalhau_api.meta import DEFAULT_NAMESPACE, Ref, Resource
from bacalhau_api.v1 import KINDS
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.source import Claim, Source, SourceStatus
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.gitops import Done, Order
from bacalhau_controllers.state import State
from bacalhau_controllers.store import (
    Changed,
    Cursor,
    HistoryEntry,
    Lease,
    Listing,
    Removed,
    Synced,
    WatchEvent,
    Why,
    Write,
    lease_deadline,
)
from bacalhau_controllers.tasks import until_all

logger = logging.getLogger(__name__)

KINDS_FOLLOWED: Final = ("Source", "Claim", "Namespace", "Job", "RetiredJob", "Node")
AGAIN_SECONDS: Final = 1.0
TOGETHER: Final = 4

T = TypeVar("T")


class RemoteStore:
    """What the manager and the reconciler need of a Store, over HTTP: reads and leases. Objects
    are written by `RemoteObjects`."""

    def __init__(self, client: AsyncClient, clock: Clock, source: str) -> None:
        self._client = client
        self._clock = clock
        self._source = source

    async def get(self, ref: Ref) -> Resource | None:
        """See Store.get."""
        try:
            return await self._client.get(KINDS[ref.kind], ref.name, ref.namespace)
        except NotFoundError:
            return None

    async def list(self, kind: str | None = None, namespace: str | None = None) -> Listing:
        """Not needed: the cache is kept by `follow`."""
        raise UnavailableError("objects are listed by watching them")

    async def commit(self, writes: Sequence[Write], why: Why) -> tuple[Resource | None, ...]:
        """Not possible: see RemoteObjects."""
        raise UnavailableError("objects are written through the API only")

    def watch(
        self, since: Cursor | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchEvent]]:
        """Only says that everything was seen: what is decided on an old view is refused by the
        server, so that nobody has to catch up first."""

        @asynccontextmanager
        async def open_() -> AsyncIterator[AsyncIterator[WatchEvent]]:
            async def events() -> AsyncIterator[WatchEvent]:
                yield Synced(since or Cursor("remote", 0))

            yield events()

        return open_()

    async def history(
        self, ref: Ref, *, limit: int = 1000, uid: str | None = None
    ) -> Sequence[HistoryEntry]:
        """Not needed here."""
        raise UnavailableError("the history is read on the server")

    async def acquire_lease(self, name: str, holder: str, ttl_seconds: float) -> Lease | None:
        """See Store.acquire_lease."""
        return await self._lease(name, holder, 0, ttl_seconds)

    async def renew_lease(self, lease: Lease, ttl_seconds: float) -> Lease:
        """See Store.renew_lease."""
        found = await self._lease(lease.name, lease.holder, lease.token, ttl_seconds)
        if found is None:
            raise FencedError(f"the lease {lease.name!r} is no longer held by {lease.holder!r}")
        return found

    async def release_lease(self, lease: Lease) -> None:
        """See Store.release_lease."""
        await self._lease(lease.name, lease.holder, lease.token, 0)

    async def _lease(self, name: str, holder: str, token: int, seconds: float) -> Lease | None:
        sent = self._clock.monotonic()
        asked = LeaseRequest(holder=holder, token=token, ttl_seconds=seconds)
        answer = await self._client.send(lease(self._source, asked))
        if not answer.token:
            return None
        return Lease(name, holder, answer.token, lease_deadline(sent, seconds))

    async def follow(self, cache: Cache) -> None:
        """Keep a cache, for ever. It counts as synced once every kind was told once."""
        waiting = set(KINDS_FOLLOWED)

        def synced(kind: str) -> None:
            waiting.discard(kind)
            if not waiting and not cache.is_synced:
                cache.apply(Synced(Cursor("remote", 0)))

        async with asyncio.TaskGroup() as tasks:
            for kind in KINDS_FOLLOWED:
                tasks.create_task(self._follow(cache, kind, synced), name=f"follow {kind}")

    async def _follow(self, cache: Cache, kind: str, synced: Callable[[str], None]) -> None:
        is_quiet = False
        while True:
            try:
                await self._follow_once(cache, kind, synced)
            except TransientError as error:
                if not is_quiet:
                    logger.warning(
                        "Watch failed", extra={"object_kind": kind, "error": error.message}
                    )
                is_quiet = True
            await self._clock.sleep(AGAIN_SECONDS)

    async def _follow_once(self, cache: Cache, kind: str, synced: Callable[[str], None]) -> None:
        # While a list is received: what it named so far.
        listed: dict[Ref, Resource] | None = {}
        async with aclosing(self._client.watch(KINDS[kind], namespace=None)) as updates:
            async for update in updates:
                item = update.item
                if update.type == "RESET":
                    listed = {}
                elif update.type == "SYNCED":
                    if listed is not None:
                        # All at once, whatever the revisions: the store may have been restored.
                        cache.replace(kind, listed.values())
                        listed = None
                    synced(kind)
                elif item is None:
                    continue
                elif listed is not None:
                    listed.pop(item.ref, None)
                    if update.type != "DELETED":
                        listed[item.ref] = item
                elif update.type == "DELETED":
                    cache.apply(Removed(item.ref, item.metadata.resource_version + 1))
                else:
                    cache.apply(Changed(item))


class RemoteObjects:
    """`gitops.Objects` over HTTP. `state` carries the fence of the lease."""

    def __init__(self, client: AsyncClient, state: State) -> None:
        self._client = client
        self._state = state

    async def apply(self, source: Source, wanted: Sequence[Order]) -> Sequence[Done]:
        """See gitops.Objects."""

        async def send(part: Sequence[tuple[OrderItem, str]]) -> DoneAnswer:
            asked = OrdersRequest(
                token=self._token(), commit=part[0][1], orders=tuple(item for item, _ in part)
            )
            return await self._client.send(orders(source.name, asked))

        items = [(_item(order), order.commit) for order in wanted]
        sizes = [len(json.dumps(item.manifest)) + 200 for item, _ in items]
        return await self._all(_parts(items, sizes), send)

    async def prune(self, source: Source, claims: Sequence[Claim], commit: str) -> Sequence[Done]:
        """See gitops.Objects."""

        async def send(part: Sequence[Claim]) -> DoneAnswer:
            asked = LetGoRequest(
                token=self._token(), action="prune", commit=commit, claims=_names(part)
            )
            return await self._client.send(let_go(source.name, asked))

        return await self._all(_parts(claims, [300] * len(claims)), send)

    async def release(self, source: Source, claims: Sequence[Claim], why: str) -> Sequence[Done]:
        """See gitops.Objects."""

        async def send(part: Sequence[Claim]) -> DoneAnswer:
            asked = LetGoRequest(
                token=self._token(), action="release", why=why, claims=_names(part)
            )
            return await self._client.send(let_go(source.name, asked))

        return await self._all(_parts(claims, [300] * len(claims)), send)

    async def report(self, source: Source, status: SourceStatus) -> Source:
        """See gitops.Objects."""
        asked = ReportRequest(
            token=self._token(),
            resource_version=source.metadata.resource_version,
            status=status,
        )
        stored = await self._sent(self._client.send(report(source.name, asked)))
        self._state.cache.learn(Changed(stored))
        return stored

    async def _all(
        self, parts: Iterator[Sequence[T]], send: Callable[[Sequence[T]], Awaitable[DoneAnswer]]
    ) -> Sequence[Done]:
        """A few requests at a time."""
        done: list[Done] = []

        async def work() -> None:
            for part in parts:
                answer = await self._sent(send(part))
                done.extend(_done(item) for item in answer.items)

        await until_all(work() for _ in range(TOGETHER))
        return done

    async def _sent(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except ConflictError as error:
            if error.reason == "LeaseLost":
                raise FencedError(error.message) from error
            raise

    def _token(self) -> int:
        fence = self._state.fence
        return fence.token if fence else 0


def _parts(items: Sequence[T], sizes: Sequence[int]) -> Iterator[Sequence[T]]:
    """As many at a time as one request holds."""
    part: list[T] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if part and (len(part) >= ORDERS_MAX or total + size > BODY_BYTES):
            yield part
            part, total = [], 0
        part.append(item)
        total += size
    if part:
        yield part


def _item(order: Order) -> OrderItem:
    """All that was given, for a node also where it is the default: `unschedulable: false` is a
    wish, too."""
    item, declared = order.declared.resource, order.declared
    if isinstance(item, Job):
        manifest = item.wire()
    else:
        manifest = item.model_dump(mode="json", by_alias=True, exclude_unset=True)
        manifest |= {"apiVersion": item.api_version, "kind": item.kind}
    return OrderItem(manifest=manifest, file=declared.file[:4096], line=declared.line)


def _names(claims: Sequence[Claim]) -> tuple[tuple[str, str, str], ...]:
    return tuple((c.ref.namespace or DEFAULT_NAMESPACE, c.name, c.spec.uid) for c in claims)


def _done(item: DoneItem) -> Done:
    ref = Ref(item.kind, item.namespace, item.name)
    if not item.reason:
        return Done(ref, item.outcome, versions=item.versions)
    error: BacalhauError
    if item.problems:
        error = InvalidError([Problem(p.field, p.message, hint=p.hint) for p in item.problems])
        error.reason = item.reason
    elif item.is_conflict:
        error = ConflictError(item.message, hint=item.hint, reason=item.reason)
    else:
        error = TerminalError(item.message, hint=item.hint, reason=item.reason)
    return Done(ref, error=error)
