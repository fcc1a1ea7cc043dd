"""Watches: every change of the cache to everyone who asked, bounded for each, resumable.

A watch is level-triggered like the store's own: intermediate versions may be skipped on resuming,
the newest never is, and an object may be told of twice. To resume, a client names the last cursor
it was given; what changed since is found by the objects' versions and by remembered removals.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from bacalhau.server.problems import ApiError
from bacalhau.server.query import Selection, cursor_text
from bacalhau.server.reply import full_json
from bacalhau_api.meta import Resource
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.store import Cursor

BUFFER_EVENTS_MAX = 2000
REMOVALS_MAX = 10_000
WATCHERS_MAX = 1000

EventType = Literal["ADDED", "MODIFIED", "DELETED", "SYNCED", "RESET", "ERROR"]


class Change:
    """One change of one object; encoded once, however many watch it."""

    def __init__(self, old: Resource | None, new: Resource | None) -> None:
        self.old = old
        self.new = new

    @cached_property
    def new_json(self) -> bytes:
        """The object as it is now."""
        assert self.new is not None
        return full_json(self.new)

    @cached_property
    def old_json(self) -> bytes:
        """The object as it was, for those for whom it is gone."""
        assert self.old is not None
        return full_json(self.old)


@dataclass(frozen=True, slots=True)
class Event:
    """What a watcher gets. `cursor` is empty where resuming from here would miss something."""

    type: EventType
    body: bytes
    cursor: str = ""


@dataclass(frozen=True, slots=True)
class _Removal:
    seen_at: Cursor
    change: Change


@dataclass(slots=True, eq=False)
class Subscription:
    """One watcher. Read `initial` to its end, then `take` until it says that it was cut."""

    selection: Selection
    initial: Iterator[Event]
    buffer_max: int
    is_cut: bool = False
    is_closed: bool = False
    _events: deque[tuple[Change, str]] = field(default_factory=deque)
    _filled: asyncio.Event = field(default_factory=asyncio.Event)

    def offer(self, change: Change, cursor: str) -> None:
        """Called for each change; never blocks. Too many unread ones cut the watcher off."""
        if self.is_cut or self.is_closed or event_type(self.selection, change) is None:
            return
        if len(self._events) >= self.buffer_max:
            self.is_cut = True
            self._events.clear()
        else:
            self._events.append((change, cursor))
        self._filled.set()

    def close(self) -> None:
        """Wake the watcher up to find that its watch is over."""
        self.is_closed = True
        self._filled.set()

    async def take(self, timeout_seconds: float) -> Event | None:
        """The next event; None after `timeout_seconds` without one, or once it was cut or closed."""
        if not self._events and not self.is_cut and not self.is_closed:
            self._filled.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await self._filled.wait()
        if not self._events:
            return None
        change, cursor = self._events.popleft()
        kind = event_type(self.selection, change)
        assert kind is not None
        return Event(kind, change.old_json if kind == "DELETED" else change.new_json, cursor)


def event_type(
    selection: Selection, change: Change
) -> Literal["ADDED", "MODIFIED", "DELETED"] | None:
    """What a change is to a watcher: an object that no longer matches is gone for it."""
    before = change.old is not None and selection.holds(change.old)
    after = change.new is not None and selection.holds(change.new)
    if after:
        return "MODIFIED" if before else "ADDED"
    return "DELETED" if before else None


class WatchHub:
    """All watchers of one server. Create it before the cache is filled, or right after."""

    def __init__(
        self,
        cache: Cache,
        *,
        buffer_max: int = BUFFER_EVENTS_MAX,
        removals_max: int = REMOVALS_MAX,
        watchers_max: int = WATCHERS_MAX,
    ) -> None:
        self._cache = cache
        self._watchers_max = watchers_max
        self._buffer_max = buffer_max
        self._removals_max = removals_max
        self._removals: deque[_Removal] = deque()
        # From where on every removal is known.
        self._horizon: Cursor | None = None
        self._subscriptions: set[Subscription] = set()
        cache.observe(self._on_change)

    def __len__(self) -> int:
        return len(self._subscriptions)

    def subscribe(self, selection: Selection, since: Cursor | None) -> Subscription:
        """Begin to watch, from the present or after `since`. Close it with `unsubscribe`."""
        subscription = Subscription(selection, iter(()), self._buffer_max)
        subscription.initial = self._initial(selection, since)
        self._subscriptions.add(subscription)
        return subscription

    def check_room(self) -> None:
        """Raises ApiError (429) if there are as many watchers as there may be."""
        if len(self._subscriptions) >= self._watchers_max:
            message = f"the server has {len(self._subscriptions)} watchers, and takes no more"
            raise ApiError(429, "TooManyWatchers", message, hint="try again later")

    def unsubscribe(self, subscription: Subscription) -> None:
        """Stop watching; no error if it was done."""
        self._subscriptions.discard(subscription)

    def close(self) -> None:
        """End all watches there are; clients are told how to go on."""
        for subscription in tuple(self._subscriptions):
            subscription.close()

    @property
    def cursor(self) -> str:
        """From where a client that was told everything can resume; empty while relisting."""
        return cursor_text(self._cache.cursor) if self._cache.is_synced else ""

    def _on_change(self, old: Resource | None, new: Resource | None) -> None:
        if not self._cache.is_synced:
            # The store is listed anew, and may be another one: watchers are to begin anew, too.
            self.close()
        change = Change(old, new)
        self._note_horizon()
        cursor = self._cache.cursor
        if new is None and cursor is not None:
            # The cursor moves after the observers were called, so that it is below the removal's
            # own revision here: whoever holds this cursor or an older one may not know of it.
            self._removals.append(_Removal(cursor, change))
            if len(self._removals) > self._removals_max:
                lost = self._removals.popleft().seen_at
                self._horizon = Cursor(lost.epoch, lost.revision + 1)
        text = self.cursor
        for subscription in tuple(self._subscriptions):
            subscription.offer(change, text)

    def _note_horizon(self) -> None:
        cursor = self._cache.cursor
        if not self._cache.is_synced or cursor is None:
            return
        if self._horizon is None or self._horizon.epoch != cursor.epoch:
            self._horizon = cursor

    def _initial(self, selection: Selection, since: Cursor | None) -> Iterator[Event]:
        """What exists now, or what has changed since. Taken at once, encoded as it is read."""
        self._note_horizon()
        items = [
            item
            for item in self._cache.list(selection.kind, selection.namespace)
            if selection.holds(item)
        ]
        gone: list[Change] = []
        is_reset = False
        if since is not None:
            horizon = self._horizon
            is_reset = (
                horizon is None or since.epoch != horizon.epoch or since.revision < horizon.revision
            )
            if not is_reset:
                changed = [
                    item
                    for item in self._cache.list(selection.kind, selection.namespace)
                    if item.metadata.resource_version > since.revision
                ]
                items = [item for item in changed if selection.holds(item)]
                # What does not match now may have matched before.
                gone = [
                    Change(item, None)
                    for item in changed
                    if not selection.holds(item) and selection.may_have_held(item)
                ]
                gone += [
                    removal.change
                    for removal in self._removals
                    if removal.seen_at.epoch == since.epoch
                    and removal.seen_at.revision >= since.revision
                    and event_type(selection, removal.change) == "DELETED"
                ]
        return _initial_events(items, gone, is_reset, self.cursor)


def _initial_events(
    items: list[Resource], gone: list[Change], is_reset: bool, cursor: str
) -> Iterator[Event]:
    if is_reset:
        yield Event("RESET", b"null")
    for change in gone:
        yield Event("DELETED", change.old_json)
    for item in items:
        yield Event("ADDED", full_json(item))
    yield Event("SYNCED", b"null", cursor)
