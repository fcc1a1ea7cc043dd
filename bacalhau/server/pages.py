"""Lists in pages that belong together.

The first page takes a snapshot (a tuple of references to immutable objects) and the others are
cut from it, so that all show one moment. Snapshots are few and short-lived; when one is gone, or
another server answers, the list goes on behind the last key against the present state, and its
`resourceVersion` differs from that of the earlier pages.
"""

import base64
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from bacalhau.server.query import Selection, cursor_text, select_sorted, sort_key
from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.meta import Resource
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.contract import Clock, Ids

PAGE_ITEMS_DEFAULT = 500
PAGE_ITEMS_MAX = 5000
SNAPSHOTS_MAX = 32
SNAPSHOT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Page:
    """Some objects, the cursor of the moment they show, and how to get the next ones."""

    items: Sequence[Resource]
    resource_version: str
    next_token: str
    remaining: int


@dataclass(frozen=True, slots=True)
class _Snapshot:
    asked: tuple[Selection, str]
    items: Sequence[Resource]
    resource_version: str
    until: float


class Pager:
    """Lists for all callers of one server."""

    def __init__(self, cache: Cache, clock: Clock, ids: Ids) -> None:
        self._cache = cache
        self._clock = clock
        self._ids = ids
        self._snapshots: OrderedDict[str, _Snapshot] = OrderedDict()

    def page(self, selection: Selection, sort: str, limit: int | None, token: str) -> Page:
        """One page. `limit` None means everything. Raises InvalidError for a bad token."""
        if token:
            return self._continue(selection, sort, limit or PAGE_ITEMS_DEFAULT, token)
        items = self._select(selection, sort)
        version = cursor_text(self._cache.cursor)
        if limit is None or len(items) <= limit:
            return Page(items, version, "", 0)
        name = self._ids.uid()[:16]
        snapshot = _Snapshot(
            (selection, sort), items, version, self._clock.monotonic() + SNAPSHOT_SECONDS
        )
        self._snapshots[name] = snapshot
        self._drop_old()
        return _cut(snapshot, name, 0, limit, sort)

    def _select(self, selection: Selection, sort: str) -> list[Resource]:
        items: Sequence[Resource] = self._cache.list(selection.kind, selection.namespace)
        for constraint in selection.labels:
            if constraint.operator in ("=", "==") and len(constraint.values) == 1:
                items = self._cache.by_label(selection.kind, constraint.key, constraint.values[0])
                break
        return select_sorted(items, selection, sort)

    def _continue(self, selection: Selection, sort: str, limit: int, token: str) -> Page:
        name, start, last = _parse_token(token)
        snapshot = self._snapshots.get(name)
        if snapshot is not None and snapshot.asked != (selection, sort):
            raise _bad_token()
        if snapshot is not None and start <= len(snapshot.items):
            return _cut(snapshot, name, start, limit, sort)
        key, is_reversed = sort_key(sort)
        rest = [
            item
            for item in self._select(selection, sort)
            if (key(item) < last if is_reversed else key(item) > last)
        ]
        version = cursor_text(self._cache.cursor)
        fresh = _Snapshot(
            (selection, sort), rest, version, self._clock.monotonic() + SNAPSHOT_SECONDS
        )
        name = self._ids.uid()[:16]
        self._snapshots[name] = fresh
        self._drop_old()
        return _cut(fresh, name, 0, limit, sort)

    def _drop_old(self) -> None:
        now = self._clock.monotonic()
        while self._snapshots:
            oldest = next(iter(self._snapshots.values()))
            if len(self._snapshots) <= SNAPSHOTS_MAX and oldest.until > now:
                return
            self._snapshots.popitem(last=False)


def _cut(snapshot: _Snapshot, name: str, start: int, limit: int, sort: str) -> Page:
    items = snapshot.items[start : start + limit]
    end = start + len(items)
    remaining = len(snapshot.items) - end
    token = ""
    if remaining:
        key, _ = sort_key(sort)
        data = json.dumps([name, end, key(items[-1])], separators=(",", ":"))
        token = base64.urlsafe_b64encode(data.encode()).decode().rstrip("=")
    return Page(items, snapshot.resource_version, token, remaining)


def _parse_token(token: str) -> tuple[str, int, tuple[str, ...]]:
    try:
        padded = token + "=" * (-len(token) % 4)
        name, start, last = json.loads(base64.urlsafe_b64decode(padded.encode("ascii")))
        if (
            type(name) is str
            and type(start) is int
            and start >= 0
            and type(last) is list
            and all(type(part) is str for part in last)
        ):
            return name, start, tuple(last)
    except (ValueError, TypeError, RecursionError):
        pass
    raise _bad_token()


def _bad_token() -> InvalidError:
    hint = "give back `metadata.continue` of the page before, with the same selectors and order"
    return InvalidError([Problem("continue", "is not a token this server gave", hint=hint)])
