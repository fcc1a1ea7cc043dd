"""What stays of retired jobs: written with the retirement itself, kept within bounds."""

from datetime import timedelta

import pytest

from bacalhau_api.admission import admit_job, retire
from bacalhau_api.meta import ObjectMeta, Ref
from bacalhau_api.v1.job import Job, JobPhase
from bacalhau_api.v1.namespace import Namespace, NamespaceSpec, Retention
from bacalhau_api.v1.retired import RetiredJob
from bacalhau_controllers.retention import RetentionReconciler, RetentionSettings
from bacalhau_controllers.retention.plan import forgotten
from tests.support.samples import Bench, at, job
from tests.support.simclock import SimLoop

KEY = Ref("Namespace", "", "default")


def finished(name: str, *, seconds: float = 0) -> Job:
    """A job that ended so many seconds after the start."""
    made = job(name)
    status = made.status.but(
        observed_generation=1, phase=JobPhase.COMPLETED, finished_at=at(seconds)
    )
    return made.but(status=status)


def test_a_retired_job_leaves_its_record_in_the_same_commit() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        retention = RetentionReconciler(
            bench.state, bench.clock, RetentionSettings(finished_seconds=10)
        )
        bench.put(finished("a"))
        loop.advance(11)
        loop.run_until_complete(retention.reconcile(KEY))
        marked, record = (
            bench.stored(finished("a")),
            bench.cache.get(Ref("RetiredJob", "default", "a")),
        )
        assert marked is not None
        assert marked.is_deleting
        assert isinstance(record, RetiredJob)
        assert record.spec.phase is JobPhase.COMPLETED
        assert record.as_job().spec == finished("a").spec
        written = {r.metadata.resource_version for r in (marked, record)}
        assert max(written) - min(written) == 2, "the two are of one commit"


def test_what_is_retired_is_not_admitted_again() -> None:
    stored = admit_job(None, finished("a"), now=at(0), uid="u").job
    record = retire(stored.but(status=finished("a").status), at(5))
    again = admit_job(None, finished("a"), now=at(9), uid="v", retired=record)
    assert (again.outcome, again.held, again.job.metadata.uid) == ("unchanged", "retired", "u")
    changed = finished("a").but(spec=finished("a").spec.but(run_nonce="2"))
    assert admit_job(None, changed, now=at(9), uid="v", retired=record).outcome == "created"


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        pytest.param(RetentionSettings(retired_max=2), ["c", "d"], id="count"),
        pytest.param(RetentionSettings(retired_seconds=25), ["c", "d"], id="age"),
        pytest.param(RetentionSettings(), ["a", "b", "c", "d"], id="neither"),
        pytest.param(
            RetentionSettings(retired_max=0, deletions_max=1), ["b", "c", "d"], id="bounded pass"
        ),
    ],
)
def test_records_are_kept_within_bounds(settings: RetentionSettings, kept: list[str]) -> None:
    records = [
        retire(finished(name), at(10 * number)) for number, name in enumerate(("a", "b", "c", "d"))
    ]
    gone = {record.name for record in forgotten(records, settings, at(35))}
    assert [record.name for record in records if record.name not in gone] == kept


def test_old_records_are_forgotten_without_any_job() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        settings = RetentionSettings(retired_seconds=60)
        retention = RetentionReconciler(bench.state, bench.clock, settings)
        bench.put(retire(finished("a"), bench.clock.now()))
        loop.advance(timedelta(minutes=2).total_seconds())
        loop.run_until_complete(retention.reconcile(KEY))
        assert bench.cache.list("RetiredJob") == ()


def test_a_namespace_says_how_long_its_own_are_kept() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        retention = RetentionReconciler(bench.state, bench.clock)
        spec = NamespaceSpec(retention=Retention(finished_seconds=5))
        bench.put(
            finished("a"),
            Namespace(metadata=ObjectMeta(name="default", namespace="", uid="n"), spec=spec),
        )
        loop.advance(6)
        loop.run_until_complete(retention.reconcile(KEY))
        found = bench.stored(finished("a"))
        assert found is not None
        assert found.is_deleting
