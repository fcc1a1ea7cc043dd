"""The manager: outcomes, sweeps, watches, leadership, all in virtual time on a real store."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from bacalhau_api.errors import (
    ConflictError,
    FencedError,
    TerminalError,
    TransientError,
    UnavailableError,
)
from bacalhau_api.meta import Ref, Resource
from bacalhau_api.v1.job import Job
from bacalhau_controllers.cache import Cache, Informer
from bacalhau_controllers.contract import Result
from bacalhau_controllers.controller import ControllerSettings, owners_of_kind
from bacalhau_controllers.manager import Manager, ManagerSettings
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Lease, Put, Why
from bacalhau_controllers.workqueue import Backoff
from tests.support.samples import Bench, execution, job
from tests.support.simclock import SimClock, SimLoop


class Scripted:
    """A reconciler that does what it is told, and notes when."""

    name = "scripted"

    def __init__(self, clock: SimClock, body: Callable[[Ref], Any] | None = None) -> None:
        self._clock = clock
        self.body = body or (lambda ref: None)
        self.seen: list[tuple[float, str]] = []
        self.is_slow = 0.0
        self.inside = 0

    async def reconcile(self, ref: Ref) -> Result:
        self.seen.append((self._clock.monotonic() - 1000.0, ref.name))
        if self.is_slow:
            self.inside += 1
            try:
                await self._clock.sleep(self.is_slow)
            finally:
                self.inside -= 1
        outcome = self.body(ref)
        return outcome if isinstance(outcome, Result) else Result()

    def times(self, name: str) -> list[float]:
        return [when for when, who in self.seen if who == name]


def quiet(**more: Any) -> ManagerSettings:
    """No sweeps that matter."""
    return ManagerSettings(controllers=ControllerSettings(sweep_seconds=1e7, **more))


def start(
    bench: Bench, reconciler: Scripted, settings: ManagerSettings | None = None, **add: Any
) -> Manager:
    manager = Manager(bench.state, bench.clock, bench.rng, settings=settings or quiet())
    manager.add(reconciler, "Job", **add)
    bench.loop.create_task(manager.run(), name="manager")
    bench.loop.run_until_idle()
    assert manager.is_leader.is_set()
    return manager


def stop(bench: Bench, manager: Manager) -> None:
    bench.loop.run_until_complete(manager.close())


# -- where keys come from ------------------------------------------------------------------------


def test_existing_and_changed_and_deleted_objects_are_reconciled() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(job("a"))
        reconciler = Scripted(bench.clock)
        manager = start(bench, reconciler)
        assert [n for _, n in reconciler.seen] == ["a"]
        bench.put(job("b"))
        bench.put(job("a").with_meta(labels={"x": "y"}))
        assert [n for _, n in reconciler.seen] == ["a", "b", "a"]
        stop(bench, manager)
        bench.put(job("c"))
        assert len(reconciler.seen) == 3  # not while not leading


def test_changes_of_other_kinds_are_mapped() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(job("a"))
        reconciler = Scripted(bench.clock)
        manager = start(bench, reconciler, watches={"Execution": owners_of_kind("Job")})
        reconciler.seen.clear()
        bench.put(execution(job("a")))
        assert [n for _, n in reconciler.seen] == ["a"]
        stop(bench, manager)


def test_every_key_is_swept_within_the_interval_spread_and_not_in_a_burst() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        jobs = [job(f"j{i}") for i in range(300)]
        bench.put(*jobs)
        reconciler = Scripted(bench.clock)
        settings = ManagerSettings(controllers=ControllerSettings(sweep_seconds=60))
        manager = start(bench, reconciler, settings)
        reconciler.seen.clear()
        loop.advance(600)
        late = job("late")
        bench.put(late)
        loop.advance(600)
        for name in [j.name for j in jobs] + ["late"]:
            times = reconciler.times(name)
            gaps = [b - a for a, b in pairwise(times)]
            assert len(times) >= 9
            assert max(gaps) <= 62, (name, gaps)
        per_second = Counter(int(when) for when, _ in reconciler.seen)
        assert max(per_second.values()) <= 25  # 5 on average; all at once would be 300
        stop(bench, manager)


def test_settled_objects_are_swept_rarely() -> None:
    class Settling(Scripted):
        def is_settled(self, resource: Resource) -> bool:
            return resource.name.startswith("done")

    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(*[job(f"done{i}") for i in range(20)], job("busy"))
        reconciler = Settling(bench.clock)
        settings = ManagerSettings(controllers=ControllerSettings(sweep_seconds=60))
        manager = start(bench, reconciler, settings)
        loop.advance(3700)
        assert len(reconciler.times("busy")) >= 60
        for i in range(20):
            assert 2 <= len(reconciler.times(f"done{i}")) <= 5
        stop(bench, manager)


def test_sources_of_a_reconciler_are_open_only_while_leading() -> None:
    class WithSource(Scripted):
        wake: Callable[[Ref], None] | None = None

        @asynccontextmanager
        async def term(self, wake: Callable[[Ref], None]) -> AsyncIterator[None]:
            self.wake = wake
            try:
                yield
            finally:
                self.wake = None

    with SimLoop() as loop:
        bench = Bench(loop)
        reconciler = WithSource(bench.clock)
        manager = start(bench, reconciler)
        assert reconciler.wake is not None
        reconciler.wake(job("a").ref)
        loop.run_until_idle()
        assert [n for _, n in reconciler.seen] == ["a"]
        stop(bench, manager)
        assert reconciler.wake is None


def test_nothing_is_reconciled_on_half_a_view() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(job("a"))
        reconciler = Scripted(bench.clock)
        manager = start(bench, reconciler)
        reconciler.seen.clear()
        bench.cache._synced.clear()  # as while a list is received anew
        manager.controllers["scripted"].wake(job("a").ref)
        loop.advance(1)
        assert reconciler.seen == []
        bench.cache._synced.set()
        loop.run_until_idle()
        assert [n for _, n in reconciler.seen] == ["a"]
        stop(bench, manager)


def test_keys_may_be_others_than_the_objects() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(job("a"), job("b"))
        reconciler = Scripted(bench.clock)
        manager = start(bench, reconciler, key=lambda r: Ref("Namespace", "", r.ref.namespace))
        assert [n for _, n in reconciler.seen] == ["default"]
        stop(bench, manager)


# -- outcomes ------------------------------------------------------------------------------------


def test_requeue_after_looks_again_and_clears_the_backoff() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(job("a"))
        reconciler = Scripted(bench.clock, lambda ref: Result(requeue_after=100))
        manager = start(bench, reconciler)
        loop.advance(350)
        assert reconciler.times("a") == [0, 100, 200, 300]
        stop(bench, manager)


@pytest.mark.parametrize("error", [TransientError("no"), ConflictError("no")])
def test_transient_errors_back_off_with_one_warning(
    error: TransientError, caplog: pytest.LogCaptureFixture
) -> None:
    failures = 6

    def body(ref: Ref) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise error

    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(job("a"))
        reconciler = Scripted(bench.clock, body)
        manager = start(bench, reconciler, quiet(backoff=Backoff(1, 10)))
        loop.advance(100)
        times = reconciler.times("a")
        gaps = [b - a for a, b in pairwise(times)]
        assert len(times) == 7
        for gap, whole in zip(gaps, (1, 2, 4, 8, 10, 10), strict=True):
            assert whole / 2 <= gap <= whole
        warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert [r.message for r in warnings] == ["Reconcile failed"]
        assert manager.controllers["scripted"].outcomes.transient == 6
        assert manager.controllers["scripted"].queue.failures(job("a").ref) == 0
        stop(bench, manager)


def test_terminal_errors_wait_for_a_change() -> None:
    def body(ref: Ref) -> None:
        raise TerminalError("spec makes no sense")

    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(job("a"))
        reconciler = Scripted(bench.clock, body)
        settings = ManagerSettings(controllers=ControllerSettings(sweep_seconds=60))
        manager = start(bench, reconciler, settings)
        loop.advance(300)
        assert len(reconciler.times("a")) <= 2  # not in every sweep
        reconciler.seen.clear()
        bench.put(job("a").with_meta(labels={"now": "better"}))
        assert len(reconciler.times("a")) == 1
        stop(bench, manager)


def test_bugs_are_logged_with_traceback_and_back_off(caplog: pytest.LogCaptureFixture) -> None:
    def body(ref: Ref) -> None:
        if ref.name == "bad":
            raise ZeroDivisionError

    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(job("bad"), job("good"))
        reconciler = Scripted(bench.clock, body)
        manager = start(bench, reconciler)
        loop.advance(10)
        assert len(reconciler.times("bad")) > 3
        assert len(reconciler.times("good")) == 1
        bug = next(r for r in caplog.records if r.levelno == logging.ERROR)
        assert bug.exc_info
        assert bug.exc_info[0] is ZeroDivisionError
        assert manager.controllers["scripted"].outcomes.bugs == len(reconciler.times("bad"))
        stop(bench, manager)


def test_a_cancellation_from_inside_does_not_end_the_worker() -> None:
    calls = 0

    def body(ref: Ref) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise asyncio.CancelledError

    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(job("a"))
        manager = start(bench, Scripted(bench.clock, body), quiet(workers=1))
        loop.advance(5)
        assert calls == 2
        stop(bench, manager)


def test_a_reconcile_that_hangs_is_cut_off_and_tried_again() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(job("a"))
        reconciler = Scripted(bench.clock)
        reconciler.is_slow = 1e6
        manager = start(bench, reconciler, quiet(deadline_seconds=30))
        loop.advance(29)
        assert reconciler.inside == 1
        reconciler.is_slow = 0
        loop.advance(2)
        assert (reconciler.inside, len(reconciler.times("a"))) == (0, 2)
        assert manager.controllers["scripted"].outcomes.deadline == 1
        stop(bench, manager)


def test_a_timeout_of_the_reconciler_itself_is_a_bug_and_not_the_deadline() -> None:
    failed = False

    def body(ref: Ref) -> None:
        nonlocal failed
        if not failed:
            failed = True
            raise TimeoutError

    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(job("a"))
        manager = start(bench, Scripted(bench.clock, body))
        loop.advance(5)
        outcomes = manager.controllers["scripted"].outcomes
        assert (outcomes.bugs, outcomes.deadline, outcomes.done) == (1, 0, 1)
        stop(bench, manager)


def test_no_two_workers_hold_one_key() -> None:
    inside: Counter[str] = Counter()

    class Careful(Scripted):
        async def reconcile(self, ref: Ref) -> Result:
            inside[ref.name] += 1
            assert inside[ref.name] == 1
            await self._clock.sleep(1)
            inside[ref.name] -= 1
            return Result()

    with SimLoop() as loop:
        bench = Bench(loop)
        reconciler = Careful(bench.clock)
        manager = start(bench, reconciler)
        for i in range(30):
            bench.put(job("a").with_meta(labels={"n": str(i)}))
            loop.advance(0.1)
        loop.advance(10)
        assert manager.controllers["scripted"].outcomes.bugs == 0
        assert manager.is_idle
        stop(bench, manager)


# -- leadership ----------------------------------------------------------------------------------


class FlakyStore(MemoryStore):
    """A store that can be cut off from one process."""

    is_cut = False

    async def _gate(self) -> None:
        if self.is_cut:
            await asyncio.sleep(1.0)
            raise UnavailableError("no way to the store")

    async def renew_lease(self, lease: Lease, ttl_seconds: float) -> Lease:
        await self._gate()
        return await super().renew_lease(lease, ttl_seconds)

    async def release_lease(self, lease: Lease) -> None:
        await self._gate()
        await super().release_lease(lease)


class Process:
    """One orchestrator of two, with its own cache on a shared store."""

    def __init__(self, loop: SimLoop, store: MemoryStore, clock: SimClock, name: str) -> None:
        self.name = name
        self.cache = Cache()
        self.state = State(store, self.cache)
        self.events: list[tuple[float, str]] = []
        self.reconciler = Scripted(clock)
        self.manager = Manager(
            self.state,
            clock,
            Random(name),
            holder=name,
            informer=Informer(store, self.cache, clock),
            settings=quiet(),
            on_started_leading=lambda: self.events.append((loop.time(), "started")),
            on_stopped_leading=lambda: self.events.append((loop.time(), "stopped")),
        )
        self.manager.add(self.reconciler, "Job")
        self.task = loop.create_task(self.manager.run(), name=f"manager {name}")

    @property
    def leads(self) -> bool:
        return self.manager.is_leader.is_set()


def two(loop: SimLoop) -> tuple[FlakyStore, SimClock, Process, Process]:
    clock = SimClock(loop)
    store = FlakyStore(clock)
    first = Process(loop, store, clock, "first")
    loop.run_until_idle()
    second = Process(loop, store, clock, "second")
    loop.run_until_idle()
    assert (first.leads, second.leads) == (True, False)
    return store, clock, first, second


def test_one_leads_and_the_other_takes_over_at_once_after_a_clean_end() -> None:
    with SimLoop() as loop:
        _, _, first, second = two(loop)
        loop.advance(60)
        assert (first.leads, second.leads) == (True, False)
        loop.run_until_complete(first.manager.close())
        assert first.task.done()
        took = loop.run_until(lambda: second.leads)
        assert took <= 3.0  # the lease was released: the next attempt gets it
        assert [what for _, what in first.events] == ["started", "stopped"]
        loop.run_until_complete(second.manager.close())


def test_takeover_after_a_crash_within_the_ttl() -> None:
    with SimLoop() as loop:
        store, _, first, second = two(loop)
        loop.advance(1)
        store.is_cut = True  # the release does not arrive either
        first.task.cancel()
        loop.run_until(first.task.done, seconds_max=10)
        store.is_cut = False
        took = loop.run_until(lambda: second.leads)
        assert took <= 16
        loop.run_until_complete(second.manager.close())


def test_a_leader_that_cannot_renew_stops_before_the_other_begins() -> None:
    with SimLoop() as loop:
        store, _, first, second = two(loop)
        first.reconciler.is_slow = 1e6
        loop.run_until_complete(store.commit([Put(job("a"), 0)], Why("user:test", "Test")))
        loop.run_until_idle()
        assert first.reconciler.inside == 1
        store.is_cut = True
        loop.run_until(lambda: not first.leads, seconds_max=15)
        stopped_at = loop.time()
        assert first.reconciler.inside == 0
        store.is_cut = False
        loop.run_until(lambda: second.leads)
        assert loop.time() >= stopped_at
        assert [what for _, what in first.events] == ["started", "stopped"]
        loop.advance(60)
        assert first.leads != second.leads
        for process in (first, second):
            loop.run_until_complete(process.manager.close())


def test_a_write_of_a_leader_that_was_replaced_is_refused() -> None:
    """The pause: the old leader notices nothing, its write comes after the new leader's."""
    with SimLoop() as loop:
        store, _, first, second = two(loop)
        loop.run_until_complete(store.commit([Put(job("a"), 0)], Why("user:test", "Test")))
        loop.run_until_idle()

        async def steal() -> Lease | None:
            store._leases.clear()  # expired, while the first was paused
            return await store.acquire_lease("orchestrator", "second", 12)

        lease = loop.run_until_complete(steal())
        assert lease
        assert first.leads  # it does not know yet
        target = first.cache.get(job("a").ref)
        assert isinstance(target, Job)
        put = Put(target.with_meta(labels={"by": "first"}), target.metadata.resource_version)
        with pytest.raises(FencedError):
            loop.run_until_complete(first.state.commit([put], Why("test", "Late")))
        assert loop.run_until_complete(store.get(target.ref)).metadata.labels == {}
        loop.run_until(lambda: second.leads)
        loop.advance(4)
        assert not first.leads
        with pytest.raises(FencedError):  # for ever: the old fence is kept
            loop.run_until_complete(first.state.commit([put], Why("test", "Late")))
        for process in (first, second):
            loop.run_until_complete(process.manager.close())


def test_a_fenced_reconcile_ends_the_term() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        reconciler = Scripted(bench.clock)
        manager = start(bench, reconciler)

        def fenced(ref: Ref) -> None:
            raise FencedError("another leads")

        reconciler.body = fenced
        bench.put(job("a"))
        assert not manager.is_leader.is_set()
        reconciler.body = lambda ref: None
        loop.run_until(manager.is_leader.is_set)  # it stands for election again
        stop(bench, manager)


def test_the_next_leader_knows_all_that_was_written_before_it() -> None:
    """Its own watch lags; it must not place work on a view older than the last leader's writes."""
    with SimLoop() as loop:
        clock = SimClock(loop)
        store = MemoryStore(clock)
        cache = Cache()
        informer = loop.create_task(Informer(store, cache, clock).run())
        loop.run_until_idle()
        informer.cancel()  # the watch stands still from here on
        loop.run_until_idle()
        loop.run_until_complete(store.commit([Put(job("a"), 0)], Why("leader", "Before")))
        assert cache.get(job("a").ref) is None
        state = State(store, cache)
        reconciler = Scripted(clock)
        manager = Manager(state, clock, Random(1), settings=quiet())
        manager.add(reconciler, "Job")
        loop.create_task(manager.run())
        loop.run_until(manager.is_leader.is_set)
        loop.run_until_idle()
        assert reconciler.times("a")
        loop.run_until_complete(manager.close())


def test_closing_lets_workers_finish_and_releases_the_lease() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(job("a"))
        finished: list[str] = []
        reconciler = Scripted(bench.clock, lambda ref: finished.append(ref.name))
        reconciler.is_slow = 2
        manager = start(bench, reconciler)
        closing = loop.create_task(manager.close())
        loop.advance(1)
        assert not closing.done()
        loop.advance(2)
        assert closing.done()
        assert finished == ["a"]
        assert bench.store._leases == {}


def test_closing_does_not_wait_for_a_worker_that_hangs() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(job("a"))
        reconciler = Scripted(bench.clock)
        reconciler.is_slow = 1e6
        manager = start(bench, reconciler, quiet(deadline_seconds=1e6))
        closing = loop.create_task(manager.close())
        loop.advance(6)
        assert closing.done()
        assert reconciler.inside == 0


def test_closing_before_leading() -> None:
    with SimLoop() as loop:
        _, _, first, second = two(loop)
        loop.run_until_complete(second.manager.close())
        assert second.task.done()
        loop.run_until_complete(first.manager.close())
        manager = Manager(first.state, SimClock(loop), Random(1))
        loop.run_until_complete(manager.close())  # never ran


def test_a_start_callback_that_cannot_succeed_now_ends_the_term_and_is_tried_again() -> None:
    attempts = 0

    async def begin() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise UnavailableError("not synced")

    with SimLoop() as loop:
        bench = Bench(loop)
        manager = Manager(
            bench.state, bench.clock, bench.rng, settings=quiet(), on_started_leading=begin
        )
        manager.add(Scripted(bench.clock), "Job")
        loop.create_task(manager.run())
        loop.run_until(lambda: attempts == 2)
        loop.run_until_idle()
        assert manager.is_leader.is_set()
        stop(bench, manager)


def test_a_bug_in_the_machinery_ends_the_run_and_gives_the_lease_back() -> None:
    def begin() -> None:
        raise ZeroDivisionError

    with SimLoop() as loop:
        bench = Bench(loop)
        manager = Manager(
            bench.state, bench.clock, bench.rng, settings=quiet(), on_started_leading=begin
        )
        manager.add(Scripted(bench.clock), "Job")
        with pytest.raises(ExceptionGroup):
            loop.run_until_complete(manager.run())
        assert bench.store._leases == {}
        loop.run_until_complete(manager.close())


def test_reconcilers_are_added_once_and_in_time() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        manager = start(bench, Scripted(bench.clock))
        with pytest.raises(RuntimeError, match="before the manager runs"):
            manager.add(Scripted(bench.clock), "Job")
        stop(bench, manager)
        manager = Manager(bench.state, bench.clock, bench.rng)
        manager.add(Scripted(bench.clock), "Job")
        with pytest.raises(ValueError, match="added already"):
            manager.add(Scripted(bench.clock), "Node")


def test_owners_of_kind() -> None:
    watch = owners_of_kind("Job")
    found: Iterable[Ref] = watch(execution(job("a")), None)
    assert list(found) == [job("a").ref]
    assert list(watch(None, job("a"))) == []
