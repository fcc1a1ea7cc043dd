"""What every Store does: compare-and-set, all or none, history, limits. Watches and leases have
suites of their own."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bacalhau_api.errors import ConflictError, InvalidError
from bacalhau_api.meta import Ref, Resource
from bacalhau_controllers.store import Delete, Put, Why, Write
from tests.support.stores import WHY, Rig, create, job, node, open_rig


@pytest.fixture(params=["memory", "jetstream"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(request.param, tmp_path) as opened:
        yield opened


def revision(resource: Resource | None) -> int:
    assert resource is not None
    return resource.metadata.resource_version


async def test_get_returns_what_was_committed(rig: Rig) -> None:
    made = job("a.b-c_D9", "team.x")
    (stored,) = await rig.store.commit([Put(made, 0)], WHY)
    assert stored is not None
    assert stored == made.with_meta(resource_version=revision(stored))
    assert revision(stored) > 0
    assert await rig.store.get(made.ref) == stored


async def test_get_of_an_unknown_object_is_none(rig: Rig) -> None:
    assert await rig.store.get(Ref("Job", "default", "nope")) is None


@pytest.mark.parametrize("name", ["x.y", "x-y", "x_y", "X", "a" * 63, "job-12345678-1-node.a-0"])
async def test_names_do_not_mix(rig: Rig, name: str) -> None:
    await create(rig.store, node(name), node("x"), node("xy"))
    found = await rig.store.get(Ref("Node", "", name))
    assert found is not None
    assert found.name == name


async def test_revision_in_the_given_object_is_ignored(rig: Rig) -> None:
    (stored,) = await rig.store.commit([Put(node("n").with_meta(resource_version=77), 0)], WHY)
    assert await rig.store.get(Ref("Node", "", "n")) == stored
    assert revision(stored) != 77


async def test_create_refuses_an_existing_object(rig: Rig) -> None:
    (first,) = await create(rig.store, node("n"))
    with pytest.raises(ConflictError, match=f"Node n .* at {first}"):
        await create(rig.store, node("n"))
    assert revision(await rig.store.get(Ref("Node", "", "n"))) == first


async def test_update_needs_the_current_revision(rig: Rig) -> None:
    (first,) = await create(rig.store, node("n"))
    (stored,) = await rig.store.commit([Put(node("n", drain=True), first)], WHY)
    second = revision(stored)
    assert second > first
    with pytest.raises(ConflictError, match=f"at revision {first} and is at {second}"):
        await rig.store.commit([Put(node("n"), first)], WHY)
    assert await rig.store.get(Ref("Node", "", "n")) == stored


async def test_update_refuses_an_absent_object(rig: Rig) -> None:
    with pytest.raises(ConflictError, match="is at 0"):
        await rig.store.commit([Put(node("n"), 5)], WHY)
    with pytest.raises(ConflictError, match="is at 0"):
        await rig.store.commit([Delete(Ref("Node", "", "n"), 5)], WHY)
    assert await rig.store.get(Ref("Node", "", "n")) is None


async def test_delete_and_create_again(rig: Rig) -> None:
    ref = Ref("Node", "", "n")
    (first,) = await create(rig.store, node("n"))
    with pytest.raises(ConflictError):
        await rig.store.commit([Delete(ref, first + 100)], WHY)
    assert await rig.store.commit([Delete(ref, first)], WHY) == (None,)
    assert await rig.store.get(ref) is None
    assert (await rig.store.list("Node")).items == ()
    with pytest.raises(ConflictError):  # the tombstone does not count as the object
        await rig.store.commit([Delete(ref, first)], WHY)
    (again,) = await create(rig.store, node("n"))
    assert again > first
    assert revision(await rig.store.get(ref)) == again
    with pytest.raises(ConflictError):
        await create(rig.store, node("n"))


async def test_commit_is_all_or_none(rig: Rig) -> None:
    (kept, gone) = await create(rig.store, node("kept"), node("gone"))
    writes: list[Write] = [
        Put(node("new"), 0),
        Put(node("kept", drain=True), kept),
        Delete(Ref("Node", "", "gone"), gone),
        Put(job("late"), 9),  # does not hold
    ]
    with pytest.raises(ConflictError, match="late"):
        await rig.store.commit(writes, WHY)
    found = {item.ref.name: revision(item) for item in (await rig.store.list()).items}
    assert found == {"kept": kept, "gone": gone}
    for name in ("new", "kept", "gone"):
        entries = await rig.store.history(Ref("Node", "", name))
        assert len(entries) == (0 if name == "new" else 1)

    new, changed, removed = await rig.store.commit(writes[:3], WHY)
    assert removed is None
    found = {item.ref.name: revision(item) for item in (await rig.store.list()).items}
    assert found == {"new": revision(new), "kept": revision(changed)}


async def test_list_by_kind_and_namespace(rig: Rig) -> None:
    await create(rig.store, node("n"), job("a"), job("b"), job("a", "other"))
    for arguments, expected in [
        ((), 4),
        (("Job",), 3),
        (("Job", "other"), 1),
        (("Job", "none"), 0),
        (("Node", ""), 1),
        (("Acceptance",), 0),
    ]:
        listing = await rig.store.list(*arguments)
        assert len(listing.items) == expected, arguments
        assert listing.cursor.epoch


async def test_list_of_an_empty_store(rig: Rig) -> None:
    listing = await rig.store.list()
    assert listing.items == ()
    assert (await rig.store.list()).cursor == listing.cursor


async def test_history_folds_to_the_stored_state(rig: Rig) -> None:
    ref = Ref("Node", "", "n")
    first = node("n")
    (at,) = await create(rig.store, first)
    for i in range(4):
        (stored,) = await rig.store.commit(
            [Put(first.but(spec=first.spec.but(drain=i % 2 == 0)), at)],
            Why("user:zoë", "Changed", f"number {i}\r\nNats-Rollup: all"),
        )
        at = revision(stored)
    entries = await rig.store.history(ref)
    assert [entry.message for entry in entries[1:]] == [
        f"number {i}\r\nNats-Rollup: all" for i in range(4)
    ]
    assert {entry.actor for entry in entries[1:]} == {"user:zoë"}
    assert [entry.reason for entry in entries] == ["Testing"] + ["Changed"] * 4
    assert {entry.uid for entry in entries} == {first.metadata.uid}
    assert {entry.ref for entry in entries} == {ref}
    revisions = [entry.revision for entry in entries]
    assert revisions == sorted(set(revisions))
    assert all(
        entry.resource is not None and revision(entry.resource) == entry.revision
        for entry in entries
    )
    assert entries[-1].resource == await rig.store.get(ref)
    assert entries[0].time <= entries[-1].time


async def test_history_keeps_removals_and_incarnations(rig: Rig) -> None:
    ref = Ref("Node", "", "n")
    old, new = node("n"), node("n")
    (at,) = await create(rig.store, old)
    await rig.store.commit([Delete(ref, at)], Why("user:x", "Gone"))
    await create(rig.store, new)
    entries = await rig.store.history(ref)
    assert [(entry.uid, entry.resource is None) for entry in entries] == [
        (old.metadata.uid, False),
        (old.metadata.uid, True),
        (new.metadata.uid, False),
    ]
    assert entries[1].reason == "Gone"
    assert entries[1].revision > entries[0].revision
    assert len(await rig.store.history(ref, uid=old.metadata.uid)) == 2
    assert [e.uid for e in await rig.store.history(ref, limit=1)] == [new.metadata.uid]
    assert await rig.store.history(Ref("Node", "", "other")) == ()


async def test_history_of_a_refused_change_is_empty(rig: Rig) -> None:
    """Lone changes store their history entry first; a refusal must not leave it to be read."""
    kept = node("n")
    (at,) = await create(rig.store, kept)
    for expect in (0, at + 50):
        for _ in range(2):
            with pytest.raises(ConflictError):
                await rig.store.commit([Put(node("n", drain=True), expect)], WHY)
    entries = await rig.store.history(kept.ref)
    assert [(entry.uid, entry.revision) for entry in entries] == [(kept.metadata.uid, at)]


async def test_long_and_odd_texts_of_why_survive(rig: Rig) -> None:
    message = "% :\t " + "ü" * 3000
    await rig.store.commit([Put(node("n"), 0)], Why(" lead", "R", message))
    (entry,) = await rig.store.history(Ref("Node", "", "n"))
    assert entry.actor == " lead"
    assert entry.message == message[:1000]


async def test_times_of_history_are_utc(rig: Rig) -> None:
    await create(rig.store, node("n"))
    (entry,) = await rig.store.history(Ref("Node", "", "n"))
    assert entry.time.tzinfo is UTC
    assert entry.time <= datetime.now(UTC)


async def test_too_large_an_object_is_refused_by_name(rig: Rig) -> None:
    with pytest.raises(InvalidError, match=r"Job default/big has \d+ bytes"):
        await rig.store.commit([Put(job("ok"), 0), Put(job("big", filler="x" * 1_100_000), 0)], WHY)
    assert (await rig.store.list()).items == ()


async def test_the_largest_object_fits(rig: Rig) -> None:
    large = job("large", filler="x" * 1_030_000)
    (stored,) = await rig.store.commit([Put(large, 0)], Why("a" * 999, "R", "ü" * 1000))
    assert await rig.store.get(large.ref) == stored


async def test_an_object_named_twice_is_refused(rig: Rig) -> None:
    with pytest.raises(InvalidError, match="Node n twice"):
        await rig.store.commit([Put(node("n"), 0), Delete(Ref("Node", "", "n"), 3)], WHY)


async def test_too_many_writes_are_refused(rig: Rig) -> None:
    with pytest.raises(InvalidError, match="more than 400"):
        await create(rig.store, *(node(f"n{i}") for i in range(401)))
    revisions = await create(rig.store, *(node(f"n{i}") for i in range(400)))
    assert revisions == sorted(set(revisions))
    assert len(revisions) == 400


async def test_an_empty_commit_does_nothing(rig: Rig) -> None:
    assert await rig.store.commit([], WHY) == ()


async def test_64_writers_count_together(rig: Rig) -> None:
    """Read, add one, write: nothing is lost, and everybody gets through."""
    counter = node("counter")
    await create(rig.store, counter)

    async def add() -> None:
        while True:
            read = await rig.store.get(counter.ref)
            assert read is not None
            count = int(read.metadata.annotations.get("count", "0")) + 1
            changed = read.with_meta(annotations={"count": str(count)})
            try:
                await rig.store.commit([Put(changed, revision(read))], WHY)
            except ConflictError:
                continue
            return

    await asyncio.gather(*(add() for _ in range(64)))
    stored = await rig.store.get(counter.ref)
    assert stored is not None
    assert stored.metadata.annotations == {"count": "64"}
    entries = await rig.store.history(counter.ref)
    counts = [e.resource.metadata.annotations.get("count", "0") for e in entries if e.resource]
    assert counts == [str(i) for i in range(65)]


async def test_only_one_of_many_creates_the_object(rig: Rig) -> None:
    made = [node("n") for _ in range(32)]
    results = await asyncio.gather(
        *(rig.store.commit([Put(each, 0)], WHY) for each in made), return_exceptions=True
    )
    winners = [result[0] for result in results if not isinstance(result, BaseException)]
    assert len(winners) == 1
    assert all(isinstance(r, ConflictError) for r in results if isinstance(r, BaseException))
    assert await rig.store.get(made[0].ref) == winners[0]


async def test_conflicts_do_not_disturb_others(rig: Rig) -> None:
    await create(rig.store, *(node(f"taken{i}") for i in range(20)))
    good = [rig.store.commit([Put(node(f"free{i}"), 0)], WHY) for i in range(40)]
    bad = [rig.store.commit([Put(node(f"taken{i}"), 0)], WHY) for i in range(20)]
    mixed = [pair for both in zip(good, bad, strict=False) for pair in both] + good[20:]
    results = await asyncio.gather(*mixed, return_exceptions=True)
    assert sum(isinstance(result, tuple) for result in results) == 40
    assert sum(isinstance(result, ConflictError) for result in results) == 20
    assert len((await rig.store.list("Node")).items) == 60


async def changes(rig: Rig, ref: Ref) -> list[int]:
    """The revisions that the history has of an object."""
    return [entry.revision for entry in await rig.store.history(ref)]


async def test_history_of_one_namespace_is_trimmed_by_age(rig: Rig) -> None:
    mine, other = job("a", "mine"), job("a", "other")
    first, elsewhere = await create(rig.store, mine, other)
    gone = job("gone", "mine")
    (at,) = await create(rig.store, gone)
    await rig.store.commit([Delete(gone.ref, at)], WHY)
    await rig.sleep(0.05)
    moment = await rig.now()
    await rig.sleep(0.05)
    (stored,) = await rig.store.commit([Put(mine, first)], WHY)
    assert await rig.keeper.trim_history("mine", oldest=moment) == 0
    assert await changes(rig, mine.ref) == [revision(stored)]
    assert await changes(rig, gone.ref) == []
    assert await changes(rig, other.ref) == [elsewhere]
    assert await rig.store.get(mine.ref) == stored, "the object itself stays"
    await rig.sleep(0.05)
    await rig.keeper.trim_history("mine", oldest=await rig.now())
    assert await changes(rig, mine.ref) == []
    (again,) = await rig.store.commit([Put(mine, revision(stored))], WHY)
    assert await changes(rig, mine.ref) == [revision(again)], "it goes on after that"


async def test_history_of_one_namespace_is_trimmed_by_size(rig: Rig) -> None:
    items = [job(f"j{i}", "mine", filler="x" * 10_000) for i in range(6)]
    made = [(await create(rig.store, item))[0] for item in items]
    other = job("j", "other", filler="x" * 100_000)
    await create(rig.store, other)
    whole = await rig.keeper.trim_history("mine", bytes_max=10**9)
    assert 60_000 < whole < 70_000
    left = await rig.keeper.trim_history("mine", bytes_max=35_000)
    assert 30_000 < left <= 35_000
    kept = [at for item in items for at in await changes(rig, item.ref)]
    assert kept == made[3:], "the oldest went"
    assert len(await changes(rig, other.ref)) == 1
    assert await rig.keeper.trim_history("mine", bytes_max=35_000) == left
    assert await rig.keeper.trim_history("empty", bytes_max=0) == 0


async def test_young_history_is_not_trimmed_for_its_size(rig: Rig) -> None:
    old = job("old", "mine", filler="x" * 10_000)
    await create(rig.store, old)
    await rig.sleep(0.05)
    young = await rig.now()
    await rig.sleep(0.05)
    new = job("new", "mine", filler="x" * 10_000)
    await create(rig.store, new)
    left = await rig.keeper.trim_history("mine", bytes_max=100, young=young)
    assert left > 10_000
    assert await changes(rig, old.ref) == []
    assert len(await changes(rig, new.ref)) == 1
