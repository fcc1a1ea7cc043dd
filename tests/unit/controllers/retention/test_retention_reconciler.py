"""The retention reconciler under a manager."""

from bacalhau_api.meta import ObjectMeta
from bacalhau_api.v1.execution import PublicationPhase
from bacalhau_api.v1.job import Job, JobPhase
from bacalhau_api.v1.namespace import Namespace, NamespaceSpec, Retention
from bacalhau_controllers.manager import Manager
from bacalhau_controllers.retention import (
    RetentionReconciler,
    RetentionSettings,
    namespace_key,
)
from tests.support.samples import Bench, at, execution, job, publication, publication_report
from tests.support.simclock import SimLoop


def finished(name: str, ended: float = 0) -> Job:
    made = job(name)
    status = made.status.but(phase=JobPhase.COMPLETED, finished_at=at(ended), observed_generation=1)
    return made.but(status=status)


def office(bench: Bench, **settings: float) -> Manager:
    manager = Manager(bench.state, bench.clock, bench.rng)
    limits = RetentionSettings(**settings)  # type: ignore[arg-type]
    reconciler = RetentionReconciler(bench.state, bench.clock, limits)
    manager.add(reconciler, "Job", key=namespace_key)
    bench.loop.create_task(manager.run(), name="manager")
    bench.loop.run_until(manager.is_leader.is_set)
    return manager


def is_going(bench: Bench, of: Job) -> bool:
    found = bench.stored(of)
    assert found
    return found.is_deleting


def test_a_job_goes_when_its_time_has_come_and_not_before() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        done, other = finished("a"), job("b")
        bench.put(done, other)
        manager = office(bench, finished_seconds=3600)
        loop.advance(3500)
        assert not is_going(bench, done)
        loop.advance(200)
        assert is_going(bench, done)
        assert not is_going(bench, other)
        writes = bench.revisions(done)
        loop.advance(3600)
        assert bench.revisions(done) == writes  # once is enough
        loop.run_until_complete(manager.close())


def test_surplus_is_worked_off_in_bounded_passes() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        jobs = [finished(f"j{i}", i) for i in range(10)]
        bench.put(*jobs)
        manager = office(bench, finished_max=3, deletions_max=2)
        loop.advance(1)
        assert [is_going(bench, j) for j in jobs] == [True] * 2 + [False] * 8
        loop.advance(200)
        assert [is_going(bench, j) for j in jobs] == [True] * 7 + [False] * 3
        loop.run_until_complete(manager.close())


def test_for_ever_is_no_reason_to_keep_more_than_so_many() -> None:
    """Longer than there are dates."""
    with SimLoop() as loop:
        bench = Bench(loop)
        limits = Retention(finished_seconds=1e12, finished_max=2)
        meta = ObjectMeta(name="default", namespace="", uid="space", generation=1)
        bench.put(Namespace(metadata=meta, spec=NamespaceSpec(retention=limits)))
        jobs = [finished(f"j{i}", i) for i in range(4)]
        bench.put(*jobs)
        manager = office(bench)
        loop.advance(100)
        assert [is_going(bench, j) for j in jobs] == [True, True, False, False]
        loop.run_until_complete(manager.close())


def test_outputs_on_their_way_hold_their_job() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        done = finished("a")
        outputs = publication(execution(done))
        bench.put(done, outputs)
        manager = office(bench, finished_seconds=60)
        loop.advance(600)
        assert not is_going(bench, done)
        delivered = publication_report(PublicationPhase.DELIVERED)
        bench.put(outputs.but(status=outputs.status.but(report=delivered)))
        loop.advance(120)
        assert is_going(bench, done)
        loop.run_until_complete(manager.close())


def test_many_changes_do_not_mean_many_passes() -> None:
    class Counting(RetentionReconciler):
        passes = 0

        def _publishing(self, namespace: str) -> set[str]:
            self.passes += 1
            return super()._publishing(namespace)

    with SimLoop() as loop:
        bench = Bench(loop)
        reconciler = Counting(bench.state, bench.clock)
        manager = Manager(bench.state, bench.clock, bench.rng)
        manager.add(reconciler, "Job", key=namespace_key)
        loop.create_task(manager.run(), name="manager")
        loop.run_until(manager.is_leader.is_set)
        for i in range(100):
            bench.put(finished(f"j{i}"))
            loop.advance(0.6)
        assert reconciler.passes <= 3
        loop.run_until_complete(manager.close())


def test_a_job_that_was_changed_meanwhile_is_left_for_later() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        done = finished("a")
        bench.put(done)
        settings = RetentionSettings(finished_seconds=-1)
        reconciler = RetentionReconciler(bench.state, bench.clock, settings)
        stale = bench.cache.get(done.ref)
        assert stale
        bench.put(done.with_meta(labels={"rerun": "soon"}))
        bench.cache._kinds["Job"][done.ref] = stale  # a view that lags
        bench.cache._index[("namespace", "Job", "default")][done.ref] = stale
        loop.run_until_complete(reconciler.reconcile(namespace_key(done)))
        assert not is_going(bench, done)
