"""The Store: what reconcilers and the API keep objects in. Implementations: `memory.MemoryStore`
here, `bacalhau.store.jetstream.JetStreamStore` over NATS. One contract suite runs over both.

Every write is a compare-and-set. Writes that belong together go into one `commit`, which is
applied whole or not at all, and which also appends each change to the history.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.meta import Ref, Resource


@dataclass(frozen=True, slots=True)
class Put:
    """Create or replace an object.

    `expect` is the resource version that must be current; 0 means that the object must not exist
    (a tombstone counts as not existing). The stored object's `metadata.resource_version` is set
    by the store; whatever it holds here is ignored.
    """

    resource: Resource
    expect: int


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove an object whose current resource version is `expect`. Watchers see it; the history
    keeps it."""

    ref: Ref
    expect: int


Write = Put | Delete


@dataclass(frozen=True, slots=True)
class Fence:
    """Proof of a lease: the commit is refused with FencedError unless `token` is still the newest
    token of the lease `name`."""

    name: str
    token: int


@dataclass(frozen=True, slots=True)
class Why:
    """Who writes, and why: goes into the history with each change.

    `actor` is such as `user:alice`, `job-reconciler`, `node:edge-1`; `reason` one CamelCase word.
    Stores keep the first `WHY_LENGTH_MAX` characters of each text.
    """

    actor: str
    reason: str
    message: str = ""
    fence: Fence | None = None


@dataclass(frozen=True, slots=True)
class Cursor:
    """A position in a store: which store (`epoch` changes when it was re-created), and up to which
    revision everything was seen."""

    epoch: str
    revision: int


@dataclass(frozen=True, slots=True)
class Listing:
    """All matching objects as of `cursor`."""

    items: tuple[Resource, ...]
    cursor: Cursor


@dataclass(frozen=True, slots=True)
class Changed:
    """An object was created or replaced; its resource version is the revision."""

    resource: Resource


@dataclass(frozen=True, slots=True)
class Removed:
    """An object was removed at this revision."""

    ref: Ref
    revision: int


@dataclass(frozen=True, slots=True)
class Restarted:
    """The watch could not continue from where it was (the store was re-created, or history was
    lost). A full list follows, then Synced; forget whatever is not in it."""

    epoch: str


@dataclass(frozen=True, slots=True)
class Synced:
    """Everything that existed when the watch began (or began anew) has been delivered."""

    cursor: Cursor


WatchEvent = Changed | Removed | Restarted | Synced


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One change of one object. `resource` is None for a removal."""

    ref: Ref
    uid: str
    revision: int
    time: datetime
    actor: str
    reason: str
    message: str
    resource: Resource | None


@dataclass(frozen=True, slots=True)
class Lease:
    """A held lease. Valid until `deadline` on the holder's own monotonic clock; `token` fences."""

    name: str
    holder: str
    token: int
    deadline: float


class Store(Protocol):
    """Keeps objects durably. All methods raise UnavailableError when the store cannot be reached
    within their deadline."""

    async def get(self, ref: Ref) -> Resource | None:
        """The current object, read from the leader (never stale), or None."""
        ...

    async def list(self, kind: str | None = None, namespace: str | None = None) -> Listing:
        """All objects, or those of one kind, or of one kind in one namespace."""
        ...

    async def commit(self, writes: Sequence[Write], why: Why) -> tuple[Resource | None, ...]:
        """Apply all writes or none; return the objects as stored (None for deletes), in order.

        Durable when it returns. Raises ConflictError (nothing was written) if an expectation does
        not hold, FencedError if the fence is outdated, OutcomeUnknownError if the answer was lost,
        InvalidError if one object is too large. At most 400 writes; no object twice.
        """
        ...

    def watch(
        self, since: Cursor | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchEvent]]:
        """All changes after `since`, without gap or repeat, for as long as the context is open.

        Without `since`: first every existing object, then Synced, then changes. With a cursor that
        cannot be continued: Restarted, every existing object, Synced, then changes. Intermediate
        versions of an object may be skipped; the newest never is. Survives reconnects and server
        restarts silently.
        """
        ...

    async def history(
        self, ref: Ref, *, limit: int = 1000, uid: str | None = None
    ) -> Sequence[HistoryEntry]:
        """The newest `limit` changes of one object, oldest first; of one incarnation if `uid`."""
        ...

    async def acquire_lease(self, name: str, holder: str, ttl_seconds: float) -> Lease | None:
        """Take a lease if it is free, expired, or already held by `holder`; else None. The token
        is greater than any before, and taking it fences all earlier ones."""
        ...

    async def renew_lease(self, lease: Lease, ttl_seconds: float) -> Lease:
        """Extend a held lease. Raises FencedError if it is no longer held."""
        ...

    async def release_lease(self, lease: Lease) -> None:
        """Give a lease back at once. No error if it is gone already."""
        ...


class HistoryKeeper(Protocol):
    """A store whose history can be shortened."""

    async def trim_history(
        self,
        namespace: str,
        *,
        oldest: datetime | None = None,
        bytes_max: int | None = None,
        young: datetime | None = None,
    ) -> int:
        """Forget changes of a namespace's objects: those before `oldest`, and the oldest ones
        while all together have more than `bytes_max` bytes, but for the latter none since `young`.
        The objects themselves are not touched.

        Returns how many bytes are left if `bytes_max` is given, else 0. Raises UnavailableError.
        """
        ...


WRITES_MAX = 400
"""Most writes in one commit."""

COMMIT_BYTES_MAX = 32 * 1024 * 1024
"""Most bytes of all objects in one commit."""

WHY_LENGTH_MAX = 1000

OBJECT_BYTES_MAX = 1024 * 1024 - 16 * 1024
"""Most bytes of one encoded object: NATS' default payload limit, less room for headers."""


def check_writes(writes: Sequence[Write]) -> None:
    """What every store refuses before it looks at anything else. Raises InvalidError."""
    if len(writes) > WRITES_MAX:
        raise InvalidError(
            [Problem("writes", f"has more than {WRITES_MAX} entries", str(len(writes)))],
            hint="split the commit",
        )
    seen: set[Ref] = set()
    for write in writes:
        ref = write.resource.ref if isinstance(write, Put) else write.ref
        if ref in seen:
            raise InvalidError([Problem("writes", f"names {ref} twice")])
        if not ref.name:
            raise InvalidError([Problem("metadata.name", f"is empty for a {ref.kind}")])
        seen.add(ref)


def check_size(resource: Resource, size_bytes: int, size_bytes_max: int) -> None:
    """Refuse an object that would not fit into one message. Raises InvalidError."""
    if size_bytes > size_bytes_max:
        problem = Problem(
            "",
            f"{resource.ref} has {size_bytes} bytes when encoded, at most {size_bytes_max} fit",
            hint="keep large data outside the object, such as in an input source",
        )
        raise InvalidError([problem])


def check_total_size(size_bytes: int) -> None:
    """Refuse a commit that no batch should hold. Raises InvalidError."""
    if size_bytes > COMMIT_BYTES_MAX:
        problem = Problem("writes", f"have more than {COMMIT_BYTES_MAX} bytes", str(size_bytes))
        raise InvalidError([problem], hint="split the commit")


def clip(text: str) -> str:
    """A text of a Why as stores keep it."""
    return text[:WHY_LENGTH_MAX]


def check_lease_ttl(ttl_seconds: float) -> None:
    """Leases count whole seconds on the server. Raises InvalidError."""
    if ttl_seconds < 1:
        raise InvalidError([Problem("ttl_seconds", "must be at least 1", repr(ttl_seconds))])


def lease_deadline(sent: float, ttl_seconds: float) -> float:
    """When a holder stops trusting a lease that it asked for at `sent` (monotonic): a little before
    the store lets another have it, since the two clocks need not run at the same speed."""
    return sent + 0.9 * ttl_seconds
