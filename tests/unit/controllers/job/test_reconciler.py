"""The thin part: commits that fail or stay in doubt, decisions at the same time, a change of leader."""

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from bacalhau_api.errors import ConflictError, OutcomeUnknownError
from bacalhau_api.meta import Ref, Resource
from bacalhau_api.v1.execution import Phase
from bacalhau_api.v1.job import Job, JobPhase
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.job import JobReconciler
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Put, Removed, Synced, Why, Write
from tests.support.job_world import make_node, make_spec, report_of, run_on, world
from tests.support.samples import job as sample_job
from tests.support.simclock import SimClock, SimLoop


class FlakyState(State):
    """A state whose commits can fail before or after they happen. `pause` lets others run first."""

    def __init__(self, store: MemoryStore, cache: Cache) -> None:
        super().__init__(store, cache)
        self.failures: list[Exception | None] = []
        self.is_done_before_failing = False
        self.commits: list[Sequence[Write]] = []

    async def commit(self, writes: Sequence[Write], why: Why) -> tuple[Resource | None, ...]:
        self.commits.append(writes)
        await asyncio.sleep(0)
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None and not self.is_done_before_failing:
            raise failure
        if failure is not None:
            await self.store.commit(writes, why)
            raise failure
        return await super().commit(writes, why)


class Small:
    """One reconciler without a manager."""

    def __init__(self, loop: SimLoop) -> None:
        self.loop = loop
        self.clock = SimClock(loop)
        self.store = MemoryStore(self.clock, strict=True)
        self.cache = Cache()
        self.state = FlakyState(self.store, self.cache)
        cursor = loop.run_until_complete(self.store.list()).cursor
        self.cache.apply(Synced(cursor))
        self.reconciler = JobReconciler(self.state, self.clock)

    def put(self, *resources: Resource) -> None:
        state = State(self.store, self.cache)
        for resource in resources:
            self.loop.run_until_complete(state.commit([Put(resource, 0)], Why("test", "Test")))

    def reconcile(self, *names: str) -> list[object]:
        async def all_at_once() -> list[object]:
            refs = [Ref("Job", "default", name) for name in names]
            return await asyncio.gather(
                *(self.reconciler.reconcile(ref) for ref in refs), return_exceptions=True
            )

        found: list[object] = self.loop.run_until_complete(all_at_once())
        return found

    def free_cpu(self, node: str) -> int:
        row = self.reconciler.nodes.row(node)
        assert row is not None
        return self.reconciler.nodes.free_on(row).cpu


@pytest.fixture
def small() -> Iterator[Small]:
    with SimLoop() as loop:
        yield Small(loop)


def stored_job(name: str, **spec: object) -> Job:
    return sample_job(name, spec=make_spec(**spec))  # type: ignore[arg-type]


def test_a_refused_commit_gives_its_places_back(small: Small) -> None:
    small.put(make_node("a", cpu=100), stored_job("j"))
    small.state.failures = [ConflictError("someone was first")]
    (outcome,) = small.reconcile("j")
    assert isinstance(outcome, ConflictError)
    assert small.free_cpu("a") == 100
    small.reconcile("j")
    assert small.free_cpu("a") == 0
    assert len(small.cache.list("Execution")) == 1


@pytest.mark.parametrize("is_done", [True, False])
def test_a_commit_in_doubt_keeps_its_places_until_it_is_known(small: Small, is_done: bool) -> None:
    small.put(make_node("a", cpu=100), stored_job("j"), stored_job("other"))
    small.state.failures = [OutcomeUnknownError("no answer")]
    small.state.is_done_before_failing = is_done
    (outcome,) = small.reconcile("j")
    assert isinstance(outcome, OutcomeUnknownError)
    assert small.free_cpu("a") == 0, "it may have happened"
    small.reconcile("other")
    assert not small.cache.list("Execution")
    if is_done:
        # The cache did not know yet: the store was asked, and nothing is made twice.
        (again,) = small.reconcile("j")
        assert not isinstance(again, Exception)
        listing = small.loop.run_until_complete(small.store.list("Execution"))
        assert len(listing.items) == 1
    else:
        small.reconcile("j")
        assert len(small.cache.list("Execution")) == 1
        assert small.free_cpu("a") == 0


def test_a_job_that_vanished_in_doubt_keeps_nothing(small: Small) -> None:
    small.put(make_node("a", cpu=100), stored_job("j"))
    small.state.failures = [OutcomeUnknownError("no answer")]
    small.reconcile("j")
    small.cache.apply(Removed(Ref("Job", "default", "j"), 10**6))
    small.reconcile("j")
    assert small.free_cpu("a") == 100


def test_decisions_at_the_same_time_do_not_over_commit(small: Small) -> None:
    names = [f"j{i}" for i in range(10)]
    small.put(make_node("a", cpu=300), *(stored_job(name) for name in names))
    small.reconcile(*names)
    assert len(small.cache.list("Execution")) == 3
    assert small.free_cpu("a") == 0
    phases = [j.status.phase for j in small.cache.list("Job") if isinstance(j, Job)]
    assert sorted(phases) == [JobPhase.QUEUED] * 7 + [JobPhase.RUNNING] * 3


def test_a_place_that_appears_during_the_commit_is_not_missed(small: Small) -> None:
    """The job stands in line from the moment of its decision, not from that of its commit."""
    small.put(stored_job("j"))
    woken: list[Ref] = []

    async def meanwhile() -> None:
        async with small.reconciler.term(woken.append):
            deciding = asyncio.ensure_future(small.reconciler.reconcile(Ref("Job", "default", "j")))
            await asyncio.sleep(0)
            assert not deciding.done()
            state = State(small.store, small.cache)
            await state.commit([Put(make_node("a"), 0)], Why("test", "Test"))
            await deciding

    small.loop.run_until_complete(meanwhile())
    assert woken == [Ref("Job", "default", "j")]


def test_planning_for_a_look_changes_nothing(small: Small) -> None:
    small.put(make_node("a", cpu=100), stored_job("j"))
    job = small.cache.get(Ref("Job", "default", "j"))
    assert isinstance(job, Job)
    todo = small.reconciler.plan(job)
    assert [e.spec.node for e in todo.create] == ["a"]
    assert small.free_cpu("a") == 100
    assert not small.state.commits


def test_a_reconciler_that_comes_later_knows_what_is_there() -> None:
    with world() as w:
        w.add_node("a", cpu=200)
        w.default = run_on
        w.submit("one", make_spec(cpu=100))
        w.submit("two", make_spec(cpu=500, priority=3))
        w.settle()
        later = JobReconciler(w.bench.state, w.bench.clock)
        row = later.nodes.row("a")
        assert row is not None
        assert later.nodes.free_on(row).cpu == 100
        woken: list[Ref] = []

        async def lead() -> None:
            async with later.term(woken.append):
                assert w.job("two").ref in later.queue
                assert w.job("one").ref not in later.queue

        w.bench.loop.run_until_complete(lead())


def test_execution_events_wake_their_job() -> None:
    with world() as made:
        made.add_node("a")
        made.default = run_on
        made.submit("j", make_spec())
        made.settle()
        (execution,) = made.executions("j")
        made.report(execution, report_of(execution, Phase.SUCCEEDED, exit_code=0))
        assert made.job("j").status.phase is JobPhase.COMPLETED
        assert made.reconciler.is_settled(made.job("j"))
        assert not made.reconciler.is_settled(execution)


def test_a_commit_that_was_given_up_cannot_land_any_more(small: Small) -> None:
    """A lost answer does not say that nothing will happen: the write may still be under way, and
    land when its places were given to others."""
    small.put(make_node("a", cpu=100), stored_job("j"))
    small.state.failures = [OutcomeUnknownError("no answer"), None, OutcomeUnknownError("again")]
    small.reconcile("j")
    (late,) = small.state.commits
    small.reconcile("j")
    with pytest.raises(ConflictError):
        small.loop.run_until_complete(small.store.commit(late, Why("test", "Late")))


def test_the_history_of_a_job_names_its_executions(small: Small) -> None:
    small.put(make_node("a"), stored_job("j", count=6))
    small.reconcile("j")
    entries = small.loop.run_until_complete(small.store.history(Ref("Job", "default", "j")))
    (placed,) = [entry for entry in entries if entry.reason == "Placed"]
    made = sorted(e.name for e in small.cache.list("Execution"))
    assert placed.message == ", ".join([*(f"{name} on a" for name in made[:4]), "2 more"])
