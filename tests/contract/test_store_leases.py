"""What every Store's leases do, and the fences that go with them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bacalhau_api.errors import FencedError, InvalidError
from bacalhau_controllers.store import Fence, Lease, Put, Why
from tests.support.stores import WHY, Rig, node, open_rig

TTL = 2.0
"""Of leases that are to run out. Until then there is time to spare for a machine that is busy."""


@pytest.fixture(params=["memory", "jetstream"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(request.param, tmp_path) as opened:
        yield opened


async def acquire(rig: Rig, holder: str, ttl: float = 30.0, name: str = "lead.er") -> Lease:
    lease = await rig.store.acquire_lease(name, holder, ttl)
    assert lease is not None
    return lease


def under(lease: Lease) -> Why:
    return Why("test", "Testing", fence=Fence(lease.name, lease.token))


async def test_one_holder_at_a_time(rig: Rig) -> None:
    before = rig.monotonic()
    lease = await acquire(rig, "a")
    assert (lease.name, lease.holder) == ("lead.er", "a")
    assert before + 20 < lease.deadline <= rig.monotonic() + 30
    assert await rig.store.acquire_lease("lead.er", "b", 30) is None
    other = await rig.store.acquire_lease("other", "b", 30)
    assert other is not None


async def test_the_holder_may_take_it_again_and_fences_itself(rig: Rig) -> None:
    first = await acquire(rig, "a")
    second = await acquire(rig, "a")
    assert second.token > first.token
    with pytest.raises(FencedError):
        await rig.store.commit([Put(node("n"), 0)], under(first))
    await rig.store.commit([Put(node("n"), 0)], under(second))


async def test_an_expired_lease_can_be_taken(rig: Rig) -> None:
    lease = await acquire(rig, "a", ttl=TTL)
    assert await rig.store.acquire_lease("lead.er", "b", TTL) is None
    await rig.sleep(TTL + 1)
    with pytest.raises(FencedError, match="no longer held"):
        await rig.store.renew_lease(lease, TTL)
    taken = await acquire(rig, "b")
    assert taken.token > lease.token


async def test_renewing_keeps_it(rig: Rig) -> None:
    lease = await acquire(rig, "a", ttl=TTL)
    for _ in range(3):
        await rig.sleep(0.8)  # and the rest for a machine that is busy
        renewed = await rig.store.renew_lease(lease, TTL)
        assert renewed.token == lease.token
        assert renewed.deadline > lease.deadline
        lease = renewed
        assert await rig.store.acquire_lease("lead.er", "b", TTL) is None


async def test_a_taken_lease_cannot_be_renewed_or_released_by_the_old_holder(rig: Rig) -> None:
    old = await acquire(rig, "a", ttl=TTL)
    await rig.sleep(TTL + 1)
    new = await acquire(rig, "b")
    with pytest.raises(FencedError):
        await rig.store.renew_lease(old, 30)
    await rig.store.release_lease(old)
    assert await rig.store.acquire_lease("lead.er", "c", 30) is None
    await rig.store.renew_lease(new, 30)


async def test_a_released_lease_is_free_at_once(rig: Rig) -> None:
    lease = await acquire(rig, "a")
    await rig.store.release_lease(lease)
    await rig.store.release_lease(lease)
    with pytest.raises(FencedError):
        await rig.store.renew_lease(lease, 30)
    taken = await acquire(rig, "b")
    assert taken.token > lease.token


async def test_only_one_of_many_gets_it(rig: Rig) -> None:
    got = await asyncio.gather(*(rig.store.acquire_lease("l", f"h{i}", 30) for i in range(16)))
    assert sum(lease is not None for lease in got) == 1


async def test_a_fenced_commit_passes_while_the_token_is_newest(rig: Rig) -> None:
    lease = await acquire(rig, "a", ttl=TTL)
    for i in range(5):
        await rig.store.commit([Put(node(f"n{i}"), 0)], under(lease))
    await rig.sleep(TTL + 1)
    # Expired, but nobody has taken it: nobody else can have written under it.
    await rig.store.commit([Put(node("late"), 0)], under(lease))
    assert len((await rig.store.list()).items) == 6


async def test_an_outdated_fence_stops_everything(rig: Rig) -> None:
    old = await acquire(rig, "a", ttl=TTL)
    (stored,) = await rig.store.commit([Put(node("n"), 0)], under(old))
    assert stored is not None
    await rig.sleep(TTL + 1)
    new = await acquire(rig, "b")
    for writes in (
        [Put(node("x"), 0)],
        [Put(node("y"), 0), Put(node("z"), 0)],
        [Put(stored, stored.metadata.resource_version)],
        [],
    ):
        with pytest.raises(FencedError, match=r"lead\.er"):
            await rig.store.commit(writes, under(old))
    assert (await rig.store.list()).items == (stored,)
    await rig.store.commit([Put(node("x"), 0)], under(new))
    await rig.store.commit([Put(node("y"), 0)], WHY)


async def test_a_fence_that_never_was_is_refused(rig: Rig) -> None:
    with pytest.raises(FencedError):
        await rig.store.commit(
            [Put(node("n"), 0)], Why("test", "Testing", fence=Fence("nobody", 5))
        )
    assert (await rig.store.list()).items == ()


async def test_old_and_new_leader_write_at_once(rig: Rig) -> None:
    """Both sides of a takeover in one crowd: only the new one's writes are stored."""
    old = await acquire(rig, "a", ttl=TTL)
    await rig.sleep(TTL + 1)
    new = await acquire(rig, "b")
    results = await asyncio.gather(
        *(
            rig.store.commit([Put(node(f"{lease.holder}{i}"), 0)], under(lease))
            for i in range(40)
            for lease in (old, new)
        ),
        return_exceptions=True,
    )
    assert all(isinstance(result, FencedError) for result in results[::2])
    assert not any(isinstance(result, BaseException) for result in results[1::2])
    names = {item.name for item in (await rig.store.list()).items}
    assert names == {f"b{i}" for i in range(40)}


async def test_a_lease_lasts_at_least_a_second(rig: Rig) -> None:
    with pytest.raises(InvalidError, match="at least 1"):
        await rig.store.acquire_lease("l", "a", 0.5)
