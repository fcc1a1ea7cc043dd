"""What reconcilers hold: the cache to read from, the store to write to, and the fence they write
under. A reconciler reads its own writes."""

from collections.abc import Sequence
from dataclasses import replace

from bacalhau_api.meta import Resource
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.store import Changed, Delete, Fence, Removed, Store, Why, Write


class State:
    """Store and cache together. `fence` is set while this process leads."""

    def __init__(self, store: Store, cache: Cache) -> None:
        self.store = store
        self.cache = cache
        self.fence: Fence | None = None

    async def commit(self, writes: Sequence[Write], why: Why) -> tuple[Resource | None, ...]:
        """As Store.commit, under this state's fence unless `why` names one; the cache has the
        results when it returns."""
        if why.fence is None and self.fence is not None:
            why = replace(why, fence=self.fence)
        results = await self.store.commit(writes, why)
        for write, stored in zip(writes, results, strict=True):
            if stored is not None:
                self.cache.learn(Changed(stored))
            elif isinstance(write, Delete):
                # The revision of the removal is not known here. This one is above the version
                # that was removed, and not above any that could have followed.
                self.cache.learn(Removed(write.ref, write.expect + 1))
        return results
