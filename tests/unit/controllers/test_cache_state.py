"""State: reconcilers read their own writes, and write under the fence of their leader."""

import pytest

from bacalhau_api.errors import ConflictError, FencedError
from bacalhau_api.meta import Ref
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Cursor, Delete, Fence, Put, Synced, Why
from tests.support.stores import WHY, ManualClock, node


def state() -> State:
    cache = Cache()
    cache.apply(Synced(Cursor("memory-1", 0)))
    return State(MemoryStore(ManualClock()), cache)


async def test_own_writes_are_read_at_once() -> None:
    under_test = state()
    made, other = await under_test.commit([Put(node("a"), 0), Put(node("b"), 0)], WHY)
    assert made is not None
    assert other is not None
    assert under_test.cache.list("Node") == (made, other)
    results = await under_test.commit(
        [Delete(made.ref, made.metadata.resource_version), Put(node("c"), 0)], WHY
    )
    assert results[0] is None
    assert [item.name for item in under_test.cache.list("Node")] == ["b", "c"]


async def test_a_refused_commit_changes_nothing() -> None:
    under_test = state()
    with pytest.raises(ConflictError):
        await under_test.commit([Put(node("a"), 0), Put(node("b"), 5)], WHY)
    assert under_test.cache.list("Node") == ()


async def test_commits_go_under_the_fence() -> None:
    under_test = state()
    old = await under_test.store.acquire_lease("leader", "a", 10)
    new = await under_test.store.acquire_lease("leader", "a", 10)
    assert old is not None
    assert new is not None
    under_test.fence = Fence("leader", old.token)
    with pytest.raises(FencedError):
        await under_test.commit([Put(node("a"), 0)], WHY)
    own = Why("test", "Testing", fence=Fence("leader", new.token))
    await under_test.commit([Put(node("a"), 0)], own)  # the Why's own fence goes first
    under_test.fence = Fence("leader", new.token)
    await under_test.commit([Put(node("b"), 0)], WHY)
    assert under_test.cache.get(Ref("Node", "", "b")) is not None
