"""Waiting for an object, or for anything owned by one, to change, without polling."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from bacalhau_api.meta import Ref, Resource
from bacalhau_controllers.cache import Cache

Key = Ref | str


class Waiter:
    """Wakes those who wait for changes. One observer of the cache, however many wait."""

    def __init__(self, cache: Cache) -> None:
        self._bells: dict[Key, set[asyncio.Event]] = {}
        cache.observe(self._on_change)

    @asynccontextmanager
    async def bell(self, key: Key) -> AsyncIterator[asyncio.Event]:
        """An event that is set on each change of an object (a Ref) or of what it owns (a uid)."""
        event = asyncio.Event()
        bells = self._bells.setdefault(key, set())
        bells.add(event)
        try:
            yield event
        finally:
            bells.discard(event)
            if not bells:
                self._bells.pop(key, None)

    def ring_all(self) -> None:
        """Wake everybody up."""
        for bells in self._bells.values():
            for bell in bells:
                bell.set()

    def _on_change(self, old: Resource | None, new: Resource | None) -> None:
        item = new or old
        if item is None or not self._bells:
            return
        keys: list[Key] = [item.ref]
        keys += [owner.uid for owner in item.metadata.owner_references]
        for key in keys:
            for bell in self._bells.get(key, ()):
                bell.set()


async def rings(bell: asyncio.Event, seconds: float) -> bool:
    """Wait for a bell, at most so long; it is silent again afterwards. True if it rang."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await bell.wait()
    was_set = bell.is_set()
    bell.clear()
    return was_set
