"""All objects in memory, indexed, kept by one watch: what controllers and the API read from.

The cache lags behind the store by a moment. Reconcilers write with compare-and-set, so a decision
on an old view is refused, not wrong. What a process wrote itself is learned at once (`state.py`).
"""

import asyncio
import logging
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Final

from bacalhau_api.errors import TransientError
from bacalhau_api.meta import Ref, Resource
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.store import (
    Changed,
    Cursor,
    Removed,
    Restarted,
    Store,
    Synced,
    WatchEvent,
)

logger = logging.getLogger(__name__)

Handler = Callable[[Resource | None, Resource | None], None]
"""Called with the old and the new object; None stands for absent."""

# Removals remembered, so that a late answer cannot bring a removed object back.
_REMOVALS_MAX: Final = 10_000

_RETRY_SECONDS_MIN: Final = 0.05
_RETRY_SECONDS_MAX: Final = 2.0


class Cache:
    """The newest known version of every object.

    All lookups answer in a stable order (that of first appearance), except `page`, which goes by
    namespace and name.
    """

    def __init__(self) -> None:
        self._objects: dict[Ref, Resource] = {}
        self._kinds: dict[str, dict[Ref, Resource]] = {}
        self._index: dict[tuple[str, ...], dict[Ref, Resource]] = {}
        self._sorted: dict[str, list[tuple[str, str]]] = {}
        self._removals: OrderedDict[Ref, int] = OrderedDict()
        self._handlers: list[Handler] = []
        self._cursor: Cursor | None = None
        self._synced = asyncio.Event()
        # While a list is received anew: what it named so far, and what it has yet to confirm.
        self._relisted: set[Ref] | None = None
        self._unconfirmed: set[Ref] = set()

    @property
    def is_synced(self) -> bool:
        """True once a full list was received (False again while another one is under way)."""
        return self._synced.is_set()

    @property
    def cursor(self) -> Cursor | None:
        """Up to where the store was seen; None before the first full list."""
        return self._cursor

    async def wait_synced(self) -> None:
        """Return once `is_synced`."""
        await self._synced.wait()

    def get(self, ref: Ref) -> Resource | None:
        """One object, or None."""
        return self._objects.get(ref)

    def list(self, kind: str, namespace: str | None = None) -> tuple[Resource, ...]:
        """All objects of a kind, or those in one namespace."""
        if namespace is None:
            return tuple(self._kinds.get(kind, {}).values())
        return self._indexed(("namespace", kind, namespace))

    def page(
        self,
        kind: str,
        namespace: str | None = None,
        *,
        after: tuple[str, str] = ("", ""),
        limit: int = 500,
    ) -> tuple[Resource, ...]:
        """At most `limit` objects by namespace and name, following the pair `after`."""
        return tuple(
            item for _, item in zip(range(limit), self._walk(kind, namespace, after), strict=False)
        )

    def count(self, kind: str) -> int:
        """How many objects of a kind there are."""
        return len(self._kinds.get(kind, {}))

    def owned_by(self, uid: str, kind: str) -> tuple[Resource, ...]:
        """Objects of a kind with an owner reference to `uid`."""
        return self._indexed(("owner", kind, uid))

    def on_node(self, node: str, kind: str) -> tuple[Resource, ...]:
        """Objects of a kind whose spec names the node; for kind Node, that node itself."""
        return self._indexed(("node", kind, node))

    def by_phase(self, kind: str, phase: str) -> tuple[Resource, ...]:
        """Objects of a kind in one phase."""
        return self._indexed(("phase", kind, str(phase)))

    def by_label(self, kind: str, key: str, value: str) -> tuple[Resource, ...]:
        """Objects of a kind with that label; for kind Node, the labels that constraints see."""
        return self._indexed(("label", kind, key, value))

    def observe(self, handler: Handler) -> None:
        """Have `handler` called on every change from now on, after the cache has it.

        It must be quick and must not await. What it raises is logged; the others are still called.
        """
        self._handlers.append(handler)

    def resume(self) -> Cursor | None:
        """A watch is about to begin: from where, None for a full list.

        An earlier one may have broken in the middle of a list. Without a cursor, what only that
        list named may have gone since; with one, all that changed since then follows.
        """
        self._relisted = set() if self._cursor is None else None
        return self._cursor

    def apply(self, event: WatchEvent) -> None:
        """Take in one event of the watch. Older revisions than those held are ignored."""
        match event:
            case Changed(resource):
                self._change(resource)
                if self._relisted is not None:
                    self._relisted.add(resource.ref)
                self._advance(resource.metadata.resource_version)
            case Removed(ref, revision):
                self._remove(ref, revision)
                self._advance(revision)
            case Restarted(epoch):
                self._restart(epoch)
            case Synced(cursor):
                self._finish_list(cursor)

    def learn(self, event: Changed | Removed) -> None:
        """Take in what this process wrote itself, before the watch tells of it."""
        if isinstance(event, Removed):
            self._remove(event.ref, event.revision)
            return
        seen = self._cursor.revision if self._cursor and self.is_synced else 0
        # At or below the cursor, the watch has told of this version or of what came after it,
        # perhaps of a removal.
        if event.resource.metadata.resource_version > seen:
            self._change(event.resource)

    def replace(self, kind: str, items: Iterable[Resource]) -> None:
        """Take a full list as all that there is of a kind. It may be of another epoch than what is
        held, so revisions do not count."""
        listed = {item.ref: item for item in items}
        for ref in [ref for ref in self._removals if ref.kind == kind]:
            del self._removals[ref]
        for ref, old in list(self._kinds.get(kind, {}).items()):
            if ref not in listed:
                self._forget(ref, old)
        for ref, item in listed.items():
            if self._objects.get(ref) != item:
                self._set(item)

    def _indexed(self, key: tuple[str, ...]) -> tuple[Resource, ...]:
        return tuple(self._index.get(key, {}).values())

    def _walk(self, kind: str, namespace: str | None, after: tuple[str, str]) -> Iterator[Resource]:
        names = self._sorted.get(kind)
        if names is None:
            names = self._sorted[kind] = sorted(
                (ref.namespace, ref.name) for ref in self._kinds.get(kind, {})
            )
        start = bisect_right(names, after) if after != ("", "") else 0
        if namespace is not None:
            start = max(start, bisect_left(names, (namespace, "")))
        for i in range(start, len(names)):
            if namespace is not None and names[i][0] != namespace:
                return
            yield self._objects[Ref(kind, *names[i])]

    def _advance(self, revision: int) -> None:
        cursor = self._cursor
        if cursor and self.is_synced and revision > cursor.revision:
            self._cursor = Cursor(cursor.epoch, revision)

    def _change(self, resource: Resource) -> None:
        ref, revision = resource.ref, resource.metadata.resource_version
        old = self._objects.get(ref)
        if ref in self._unconfirmed:  # from an earlier epoch: revisions do not compare
            self._unconfirmed.discard(ref)
        elif (old is not None and old.metadata.resource_version >= revision) or self._removals.get(
            ref, 0
        ) >= revision:
            return
        self._removals.pop(ref, None)
        self._set(resource)

    def _set(self, resource: Resource) -> None:
        ref = resource.ref
        old = self._objects.get(ref)
        self._objects[ref] = resource
        self._kinds.setdefault(ref.kind, {})[ref] = resource
        self._reindex(ref, old, resource)
        self._notify(old, resource)

    def _remove(self, ref: Ref, revision: int) -> None:
        old = self._objects.get(ref)
        is_comparable = old is not None and ref not in self._unconfirmed
        if old is not None and is_comparable and old.metadata.resource_version >= revision:
            return
        self._removals[ref] = max(revision, self._removals.get(ref, 0))
        self._removals.move_to_end(ref)
        if len(self._removals) > _REMOVALS_MAX:
            self._removals.popitem(last=False)
        if old is not None:
            self._forget(ref, old)

    def _forget(self, ref: Ref, old: Resource) -> None:
        self._unconfirmed.discard(ref)
        del self._objects[ref]
        del self._kinds[ref.kind][ref]
        self._reindex(ref, old, None)
        self._notify(old, None)

    def _restart(self, epoch: str) -> None:
        self._synced.clear()
        self._relisted = set()
        if self._cursor is None or self._cursor.epoch != epoch:
            self._unconfirmed = set(self._objects)
            self._removals.clear()

    def _finish_list(self, cursor: Cursor) -> None:
        if self._relisted is not None:
            for ref, old in list(self._objects.items()):
                is_newer = old.metadata.resource_version > cursor.revision
                if ref in self._unconfirmed or not (ref in self._relisted or is_newer):
                    self._forget(ref, old)
        self._relisted = None
        self._unconfirmed = set()
        self._cursor = cursor
        self._synced.set()

    def _reindex(self, ref: Ref, old: Resource | None, new: Resource | None) -> None:
        keys = index_keys(new) if new is not None else []
        if old is not None:
            for key in set(index_keys(old)).difference(keys):
                group = self._index[key]
                del group[ref]
                if not group:
                    del self._index[key]
        if new is not None:
            for key in keys:
                self._index.setdefault(key, {})[ref] = new
        if (old is None) != (new is None):
            self._resort(ref, is_added=new is not None)

    def _resort(self, ref: Ref, *, is_added: bool) -> None:
        names = self._sorted.get(ref.kind)
        if names is None:  # never paged; sorted on first use
            return
        if not self.is_synced:  # many changes at once: sort again on next use
            del self._sorted[ref.kind]
            return
        pair = (ref.namespace, ref.name)
        if is_added:
            insort(names, pair)
        else:
            del names[bisect_left(names, pair)]

    def _notify(self, old: Resource | None, new: Resource | None) -> None:
        for handler in self._handlers:
            try:
                handler(old, new)
            except Exception:
                named = new or old
                logger.exception(
                    "Cache observer failed", extra={"object": str(named and named.ref)}
                )


def index_keys(resource: Resource) -> list[tuple[str, ...]]:
    """Under which keys an object is found: by namespace, owners, node, phase, labels."""
    kind, meta = resource.kind, resource.metadata
    keys: list[tuple[str, ...]] = [("namespace", kind, resource.ref.namespace)]
    keys.extend(("owner", kind, owner.uid) for owner in meta.owner_references)
    node = meta.name if kind == "Node" else getattr(getattr(resource, "spec", None), "node", "")
    if node:
        keys.append(("node", kind, node))
    status = getattr(resource, "status", None)
    phase = getattr(status, "phase", None) or getattr(resource, "phase", None)
    if phase is not None:
        keys.append(("phase", kind, str(phase)))
    labels: dict[str, str] = getattr(resource, "labels", meta.labels)
    keys.extend(("label", kind, key, value) for key, value in labels.items())
    return keys


class Informer:
    """Keeps a cache by one watch."""

    def __init__(
        self, store: Store, cache: Cache, clock: Clock | None = None, rng: Random | None = None
    ) -> None:
        self._store = store
        self._cache = cache
        self._clock = clock
        self._rng = rng

    async def run(self) -> None:
        """Watch for ever, from where the cache is.

        A watch survives outages by itself. Should it fail nevertheless with a TransientError, it
        is begun again after a growing pause; without a clock the error is passed on.
        """
        pause = _RETRY_SECONDS_MIN
        while True:
            try:
                async with self._store.watch(self._cache.resume()) as events:
                    async for event in events:
                        self._cache.apply(event)
                        pause = _RETRY_SECONDS_MIN
            except TransientError as error:
                if self._clock is None:
                    raise
                logger.warning("Watch failed", extra={"error": str(error), "pause": pause})
            if self._clock is None:
                return
            jitter = self._rng.uniform(0.5, 1.5) if self._rng else 1.0
            await self._clock.sleep(pause * jitter)
            pause = min(pause * 2, _RETRY_SECONDS_MAX)
