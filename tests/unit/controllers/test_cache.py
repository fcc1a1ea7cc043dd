"""The cache: indexes, order of revisions, restarts, observers; and the informer that feeds it."""

import asyncio
import logging
import random
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bacalhau_api.errors import UnavailableError
from bacalhau_api.meta import Contact, ObjectMeta, Ref, Resource
from bacalhau_api.v1.execution import (
    Execution,
    ExecutionSpec,
    ExecutionStatus,
    Phase,
    Report,
    Slot,
)
from bacalhau_api.v1.job import JobType, SpecConfig, Task
from bacalhau_controllers.cache import Cache, Informer
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.store import (
    Changed,
    Cursor,
    Delete,
    Put,
    Removed,
    Restarted,
    Synced,
    WatchEvent,
)
from tests.support.stores import WHY, ManualClock, create, job, node

E1, E2 = "epoch-1", "epoch-2"


R = TypeVar("R", bound=Resource)


def at(resource: R, revision: int) -> R:
    return resource.with_meta(resource_version=revision)


def execution(name: str, on: str, phase: Phase = Phase.PENDING) -> Execution:
    report = None if phase is Phase.PENDING else Report(step=1, incarnation="i", phase=phase)
    return Execution(
        metadata=ObjectMeta(name=name, uid=name),
        spec=ExecutionSpec(
            job="j",
            job_uid="ju",
            job_type=JobType.BATCH,
            slot=Slot(generation=1),
            node=on,
            task=Task(engine=SpecConfig(type="noop")),
        ),
        status=ExecutionStatus(report=report, contact=Contact.REACHABLE),
    )


def names(found: tuple[Resource, ...]) -> list[str]:
    return [item.name for item in found]


def filled(*events: WatchEvent, cursor: int = 100) -> Cache:
    cache = Cache()
    for event in events:
        cache.apply(event)
    cache.apply(Synced(Cursor(E1, cursor)))
    return cache


def test_indexes_follow_changes() -> None:
    cache = filled(
        Changed(at(job("a", owner="u1"), 1)),
        Changed(at(job("a", "other", owner="u1"), 2)),
        Changed(at(execution("e1", "n1", Phase.RUNNING), 3)),
        Changed(at(execution("e2", "n2"), 4)),
        Changed(at(node("n1").with_meta(labels={"gpu": "yes"}), 5)),
    )
    assert names(cache.owned_by("u1", "Job")) == ["a", "a"]
    assert cache.owned_by("u1", "Execution") == ()
    assert names(cache.list("Job", "other")) == ["a"]
    assert names(cache.on_node("n1", "Execution")) == ["e1"]
    assert names(cache.on_node("n1", "Node")) == ["n1"]
    assert names(cache.by_phase("Execution", "Running")) == ["e1"]
    assert names(cache.by_phase("Execution", Phase.PENDING)) == ["e2"]
    assert names(cache.by_phase("Job", "Pending")) == ["a", "a"]
    assert names(cache.by_label("Node", "gpu", "yes")) == ["n1"]
    assert names(cache.by_label("Node", "name", "n1")) == ["n1"]  # as constraints see it
    assert cache.count("Job") == 2
    assert cache.count("Acceptance") == 0

    cache.apply(Changed(at(execution("e1", "n2", Phase.FAILED), 101)))
    assert cache.on_node("n1", "Execution") == ()
    assert sorted(names(cache.on_node("n2", "Execution"))) == ["e1", "e2"]
    assert cache.by_phase("Execution", "Running") == ()
    cache.apply(Removed(Ref("Execution", "default", "e1"), 102))
    assert names(cache.on_node("n2", "Execution")) == ["e2"]
    assert cache.by_phase("Execution", "Failed") == ()
    assert cache.count("Execution") == 1


def test_status_info_labels_of_nodes_are_found_and_overridden() -> None:
    plain = node("n")
    info = plain.status.info.but(labels={"zone": "eu", "gpu": "no"})
    cache = filled(
        Changed(
            at(
                plain.but(status=plain.status.but(info=info)).with_meta(labels={"gpu": "yes"}),
                1,
            )
        )
    )
    assert names(cache.by_label("Node", "zone", "eu")) == ["n"]
    assert names(cache.by_label("Node", "gpu", "yes")) == ["n"]
    assert cache.by_label("Node", "gpu", "no") == ()


def test_older_events_are_ignored() -> None:
    new, old = at(node("n", drain=True), 7), at(node("n"), 5)
    cache = filled(Changed(new))
    cache.apply(Changed(old))
    cache.apply(Removed(new.ref, 6))
    cache.apply(Removed(new.ref, 7))
    assert cache.get(new.ref) == new
    cache.apply(Removed(new.ref, 8))
    assert cache.get(new.ref) is None
    cache.apply(Changed(new))  # late, and removed since
    assert cache.get(new.ref) is None
    cache.apply(Changed(at(node("n"), 9)))
    assert cache.get(new.ref) is not None


def test_cursor_follows_the_watch_once_synced() -> None:
    cache = Cache()
    assert cache.cursor is None
    cache.apply(Changed(at(node("a"), 3)))
    assert cache.cursor is None
    assert not cache.is_synced
    cache.apply(Synced(Cursor(E1, 4)))
    assert cache.is_synced
    cache.apply(Changed(at(node("a"), 6)))
    cache.apply(Removed(Ref("Node", "", "x"), 8))
    assert cache.cursor == Cursor(E1, 8)
    cache.learn(Changed(at(node("a"), 20)))  # own writes leave gaps behind them
    assert cache.cursor == Cursor(E1, 8)


def test_what_was_written_is_learned_at_once_and_confirmed_later() -> None:
    cache = filled(Changed(at(node("n"), 5)), cursor=5)
    mine = at(node("n", drain=True), 9)
    cache.learn(Changed(mine))
    assert cache.get(mine.ref) == mine
    calls: list[int] = []
    cache.observe(lambda old, new: calls.append(1))
    cache.apply(Changed(at(node("n"), 7)))  # the watch is behind
    cache.apply(Changed(mine))
    assert cache.get(mine.ref) == mine
    assert calls == []


def test_an_answer_later_than_the_watch_brings_nothing_back() -> None:
    mine = at(node("n"), 9)
    cache = filled(cursor=5)
    cache.apply(Changed(mine))
    cache.apply(Removed(mine.ref, 11))
    cache.learn(Changed(mine))
    assert cache.get(mine.ref) is None


def test_an_answer_later_than_the_watch_after_many_removals() -> None:
    mine = at(node("n"), 9)
    cache = filled(cursor=5)
    cache.apply(Removed(mine.ref, 11))
    for i in range(20_000):
        cache.apply(Removed(Ref("Node", "", f"other{i}"), 12 + i))
    cache.learn(Changed(mine))
    assert cache.get(mine.ref) is None


def test_learned_removal() -> None:
    cache = filled(Changed(at(node("n"), 5)), cursor=5)
    ref = Ref("Node", "", "n")
    cache.learn(Removed(ref, 6))
    assert cache.get(ref) is None
    cache.apply(Changed(at(node("n"), 5)))
    assert cache.get(ref) is None
    cache.apply(Removed(ref, 20))
    cache.apply(Changed(at(node("n"), 21)))
    assert cache.get(ref) is not None
    cache.learn(Removed(ref, 6))  # an answer that comes late
    assert cache.get(ref) is not None


def test_a_restart_in_another_epoch_replaces_everything() -> None:
    kept, gone = at(node("kept"), 50), at(node("gone"), 60)
    cache = filled(Changed(kept), Changed(gone), cursor=60)
    seen: list[tuple[str, bool]] = []
    cache.observe(lambda old, new: seen.append(((new or old).name, new is None)))  # type: ignore[union-attr]
    cache.apply(Restarted(E2))
    assert not cache.is_synced
    assert cache.get(gone.ref) == gone  # better than nothing until the list is complete
    again = at(node("kept"), 2)
    cache.apply(Changed(again))
    assert cache.get(kept.ref) == again  # lower, but of the new epoch
    cache.apply(Synced(Cursor(E2, 2)))
    assert cache.get(gone.ref) is None
    assert cache.is_synced
    assert cache.cursor == Cursor(E2, 2)
    assert seen == [("kept", False), ("gone", True)]
    cache.apply(Changed(at(node("gone"), 3)))
    assert cache.get(gone.ref) is not None


def test_a_restart_in_the_same_epoch_keeps_newer_versions() -> None:
    cache = filled(Changed(at(node("a"), 5)), Changed(at(node("b"), 6)), cursor=6)
    mine, fresh = at(node("a", drain=True), 30), at(node("c"), 31)
    cache.apply(Restarted(E1))
    cache.learn(Changed(mine))
    cache.learn(Changed(fresh))
    cache.apply(Changed(at(node("a"), 20)))
    cache.apply(Synced(Cursor(E1, 20)))
    assert cache.get(mine.ref) == mine
    assert cache.get(fresh.ref) == fresh
    assert cache.get(Ref("Node", "", "b")) is None


def test_a_list_of_one_kind_replaces_it_whatever_the_revisions() -> None:
    other, gone = at(job("other"), 40), at(node("gone"), 60)
    cache = filled(Changed(other), Changed(at(node("kept"), 50)), Changed(gone), cursor=60)
    same = at(node("same"), 55)
    cache.apply(Changed(same))
    seen: list[tuple[str, bool]] = []
    cache.observe(lambda old, new: seen.append(((new or old).name, new is None)))  # type: ignore[union-attr]
    older = at(node("kept", drain=True), 2)
    cache.replace("Node", [older, same])
    assert cache.get(older.ref) == older
    assert names(cache.page("Node")) == ["kept", "same"]
    assert cache.get(other.ref) == other
    assert seen == [("gone", True), ("kept", False)]
    cache.apply(Removed(older.ref, 3))
    cache.replace("Node", [])
    again = at(node("kept"), 1)
    cache.apply(Changed(again))
    assert cache.get(again.ref) == again


def test_own_writes_during_a_restart_survive_it() -> None:
    cache = filled(Changed(at(node("a"), 500)), cursor=500)
    cache.apply(Restarted(E2))
    mine = at(node("mine"), 9)
    cache.learn(Changed(mine))
    cache.apply(Synced(Cursor(E2, 5)))
    assert cache.get(mine.ref) == mine


def test_observers_see_old_and_new_after_the_fact() -> None:
    cache = Cache()
    seen: list[tuple[Resource | None, Resource | None, Resource | None]] = []
    ref = Ref("Node", "", "n")
    cache.observe(lambda old, new: seen.append((old, new, cache.get(ref))))
    one, two = at(node("n"), 1), at(node("n", drain=True), 2)
    for event in (Changed(one), Changed(two), Removed(ref, 3), Removed(ref, 4)):
        cache.apply(event)
    assert seen == [(None, one, one), (one, two, two), (two, None, None)]


def test_a_failing_observer_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache()
    calls: list[str] = []

    def broken(old: Resource | None, new: Resource | None) -> None:
        calls.append("broken")
        raise RuntimeError("bug")

    cache.observe(broken)
    cache.observe(lambda old, new: calls.append("good"))
    with caplog.at_level(logging.ERROR):
        cache.apply(Changed(at(job("a"), 1)))
    assert calls == ["broken", "good"]
    assert names(cache.list("Job")) == names(cache.list("Job", "default")) == ["a"]
    assert "Cache observer failed" in caplog.text


def test_an_observer_may_change_the_cache() -> None:
    cache = Cache()

    def add_other(old: Resource | None, new: Resource | None) -> None:
        if new is not None and new.name == "a":
            cache.learn(Changed(at(node("b"), 2)))

    cache.observe(add_other)
    cache.apply(Changed(at(node("a"), 1)))
    assert names(cache.list("Node")) == ["a", "b"]


def test_pages_go_by_namespace_and_name() -> None:
    cache = filled(
        *(Changed(at(job(n, ns), i + 1)) for i, (ns, n) in enumerate(
            [("b", "x"), ("a", "z"), ("a", "y"), ("c", "w"), ("a", "k")]
        ))
    )  # fmt: skip
    assert [(j.ref.namespace, j.name) for j in cache.page("Job", limit=3)] == [
        ("a", "k"), ("a", "y"), ("a", "z"),
    ]  # fmt: skip
    assert names(cache.page("Job", after=("a", "z"))) == ["x", "w"]
    assert names(cache.page("Job", "a", after=("a", "k"), limit=1)) == ["y"]
    assert cache.page("Job", "a", after=("a", "z")) == ()
    assert names(cache.page("Job", "b")) == ["x"]
    assert cache.page("Node") == ()
    cache.apply(Changed(at(job("l", "a"), 101)))
    cache.apply(Removed(Ref("Job", "a", "y"), 102))
    assert names(cache.page("Job", "a")) == ["k", "l", "z"]


EVENTS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.booleans(), st.sampled_from(["n1", "n2"])), max_size=40
)


@settings(deadline=None)
@given(EVENTS, st.randoms(use_true_random=False))
def test_indexes_match_the_objects_in_any_order(
    steps: list[tuple[str, bool, str]], rng: random.Random
) -> None:
    """Events in a random order, some twice: the newest of each object decides, and every index
    says the same as the objects."""
    events: list[WatchEvent] = []
    newest: dict[Ref, Resource | None] = {}
    for revision, (name, is_removal, on) in enumerate(steps, start=1):
        made = at(execution(name, on), revision)
        newest[made.ref] = None if is_removal else made
        events.append(Removed(made.ref, revision) if is_removal else Changed(made))
    shuffled = events + events[::3]
    rng.shuffle(shuffled)
    cache = Cache()
    for event in shuffled:
        cache.apply(event)
    expected = {ref: item for ref, item in newest.items() if item is not None}
    assert {item.ref: item for item in cache.list("Execution")} == expected
    by_node = {i.ref: i for on in ("n1", "n2") for i in cache.on_node(on, "Execution")}
    assert by_node == expected
    assert names(cache.page("Execution")) == sorted(ref.name for ref in expected)


class FailingStore(MemoryStore):
    """Its watch fails a few times before it works."""

    failures = 3

    def watch(self, since: Cursor | None = None):  # type: ignore[no-untyped-def]
        if self.failures:
            self.failures -= 1
            raise UnavailableError("not now")
        return super().watch(since)


async def test_informer_fills_the_cache_and_keeps_it() -> None:
    store, cache = MemoryStore(ManualClock()), Cache()
    (a,) = await create(store, node("a"))
    task = asyncio.create_task(Informer(store, cache).run())
    try:
        async with asyncio.timeout(5):
            await cache.wait_synced()
            assert names(cache.list("Node")) == ["a"]
            gone = asyncio.Event()
            cache.observe(lambda old, new: gone.set() if new is None else None)
            await store.commit([Delete(Ref("Node", "", "a"), a), Put(node("b"), 0)], WHY)
            await gone.wait()
            store.recreate("other")
            await gone.wait()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_informer_tries_again_after_growing_pauses() -> None:
    clock = ManualClock()
    store, cache = FailingStore(clock), Cache()
    task = asyncio.create_task(Informer(store, cache, clock, random.Random(1)).run())
    try:
        async with asyncio.timeout(5):
            await cache.wait_synced()
        assert 0.1 < clock.monotonic() < 1.0
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_informer_without_a_clock_passes_the_error_on() -> None:
    with pytest.raises(UnavailableError):
        await Informer(FailingStore(ManualClock()), Cache()).run()
