"""What becomes of a submitted job: generations, what the server owns, and what changes nothing."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings

from bacalhau_api.admission import Admitted, admit_job, rerun, retire, stop
from bacalhau_api.errors import ConflictError, InvalidError, NotFoundError
from bacalhau_api.flatjob import from_job
from bacalhau_api.jobfile import parse_manifests
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.v1.job import (
    Constraint,
    InputSource,
    Job,
    JobPhase,
    JobSpec,
    JobStatus,
    JobType,
    Resources,
    RetryPolicy,
    SpecConfig,
    Task,
)
from bacalhau_api.v1.namespace import Namespace, NamespaceDefaults, NamespaceSpec
from tests.support.jobs import jobs

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
LATER = datetime(2026, 2, 1, 12, tzinfo=UTC)


def job(job_type: JobType = JobType.BATCH, **spec: Any) -> Job:
    task = Task(engine=SpecConfig(type="docker", params={"image": "a"}))
    return Job(metadata=ObjectMeta(name="a"), spec=JobSpec(type=job_type, tasks=(task,), **spec))


def admit(existing: Job | None, submitted: Job) -> Admitted:
    return admit_job(existing, submitted, now=LATER, uid="u2")


def stored(submitted: Job | None = None) -> Job:
    """A job as the store holds it: admitted, written, and looked at by its reconciler."""
    created = admit_job(None, submitted or job(), now=NOW, uid="u1").job
    status = JobStatus(observed_generation=1, phase=JobPhase.RUNNING)
    return created.with_meta(resource_version=7).but(status=status)


def test_a_new_job_gets_what_the_server_gives() -> None:
    user = job().with_meta(
        uid="mine", generation=9, resource_version=5, labels={"a": "b"}, annotations={"c": "d"}
    )
    got = admit_job(None, user.but(status=JobStatus(phase=JobPhase.FAILED)), now=NOW, uid="u1")
    assert (got.outcome, got.warnings) == ("created", ())
    assert got.job.metadata == ObjectMeta(
        name="a", uid="u1", generation=1, creation_timestamp=NOW, labels={"a": "b"}, annotations={"c": "d"},
        finalizers=("bacalhau.org/executions",),
    )  # fmt: skip
    assert got.job.status == JobStatus()


def test_resources_that_are_not_asked_for_get_the_defaults() -> None:
    assert stored().spec.task.resources == Resources(cpu_millis=500, memory_bytes=512_000_000)
    task = job().spec.task.but(resources=Resources(cpu_millis=100, gpu=2))
    given_resources = job().but(spec=job().spec.but(tasks=(task,)))
    assert stored(given_resources).spec.task.resources == Resources(
        cpu_millis=100, memory_bytes=512_000_000, gpu=2
    )


def namespace(**resources: int) -> Namespace:
    """A namespace with defaults."""
    defaults = NamespaceDefaults(resources=Resources(**resources))
    return Namespace(metadata=ObjectMeta(name="default"), spec=NamespaceSpec(defaults=defaults))


def test_a_namespace_has_defaults_of_its_own() -> None:
    own = admit_job(None, job(), now=NOW, uid="u", namespace=namespace(cpu_millis=2000))
    assert own.job.spec.task.resources == Resources(cpu_millis=2000, memory_bytes=512_000_000)


def test_a_change_of_defaults_runs_nothing_again() -> None:
    for before, after in ((2000, 4000), (2000, 0), (0, 2000)):
        had = namespace(cpu_millis=before) if before else None
        has = namespace(cpu_millis=after) if after else None
        old = admit_job(None, job(), now=NOW, uid="u", namespace=had).job
        assert admit_job(old, job(), now=LATER, uid="", namespace=has).outcome == "unchanged"
        retired_record = retire(old, LATER)
        again = admit_job(None, job(), now=LATER, uid="v", namespace=has, retired=retired_record)
        assert again.held == "retired"


def test_what_was_asked_for_and_is_no_longer_gets_the_default() -> None:
    task = job().spec.task.but(resources=Resources(cpu_millis=100))
    asked = job().but(spec=job().spec.but(tasks=(task,)))
    old = admit_job(None, asked, now=NOW, uid="u").job
    new = admit_job(old, job(), now=LATER, uid="", namespace=namespace(cpu_millis=2000))
    assert new.job.spec.task.resources.cpu_millis == 2000
    assert new.job.metadata.generation == 2


def test_what_is_stored_is_canonical() -> None:
    task = Task(
        engine=SpecConfig(type="DOCKER", params={"Image": "a", "Entrypoint": None}),
        input_sources=(
            InputSource(
                source=SpecConfig(type="inline", params={"URL": "data:,x"}), target="/a//b/"
            ),
        ),
    )
    constraint = Constraint(key="a", operator="In", values=("b",))
    got = stored(job(constraints=(constraint,)).but(spec=job().spec.but(tasks=(task,))))
    assert got.spec.task.engine == SpecConfig(type="docker", params={"image": "a"})
    assert got.spec.task.input_sources[0].target == "/a/b"


def test_the_same_again_changes_nothing() -> None:
    existing = stored()
    got = admit(existing, job())
    assert (got.outcome, got.job) == ("unchanged", existing)
    written = existing.but(status=JobStatus())
    assert admit(existing, written).job is existing


@settings(deadline=None)
@given(jobs())
def test_any_job_applied_again_in_any_form_is_unchanged(submitted: Job) -> None:
    existing = admit_job(None, submitted, now=NOW, uid="u1").job
    for text in (existing.encode(), json.dumps(from_job(submitted))):
        (document,) = parse_manifests(text)
        assert isinstance(document.resource, Job)
        assert admit(existing, document.resource).outcome == "unchanged"


CHANGES: list[tuple[str, Callable[[Job], Job], bool]] = [
    ("labels", lambda j: j.with_meta(labels={"x": "y"}), False),
    ("annotations", lambda j: j.with_meta(annotations={"x": "y"}), False),
    ("priority", lambda j: j.but(spec=j.spec.but(priority=5)), False),
    ("suspend", lambda j: j.but(spec=j.spec.but(suspend=True)), False),
    ("retry", lambda j: j.but(spec=j.spec.but(retry=RetryPolicy(attempts=9))), False),
    ("meta", lambda j: j.but(spec=j.spec.but(meta={"x": "y"})), False),
    ("image", lambda j: j.but(spec=j.spec.but(tasks=(j.spec.task.but(
        engine=SpecConfig(type="docker", params={"image": "b"})),))), True),
    ("env", lambda j: j.but(spec=j.spec.but(tasks=(j.spec.task.but(env={"A": "b"}),))), True),
    ("memory", lambda j: j.but(spec=j.spec.but(tasks=(j.spec.task.but(
        resources=Resources(memory_bytes=5)),))), True),
    ("nonce", lambda j: j.but(spec=j.spec.but(run_nonce="again")), True),
    ("count", lambda j: j.but(spec=j.spec.but(count=3)), True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "runs_anew"), [pytest.param(c, r, id=name) for name, c, r in CHANGES]
)
def test_only_what_affects_a_run_makes_a_generation(
    change: Callable[[Job], Job], runs_anew: bool
) -> None:
    existing = stored()
    got = admit(existing, change(job()))
    assert got.outcome == "configured"
    assert got.job.metadata.generation == (2 if runs_anew else 1)
    meta = got.job.metadata
    assert (meta.uid, meta.creation_timestamp, meta.resource_version) == ("u1", NOW, 7)
    assert meta.finalizers == existing.metadata.finalizers
    assert got.job.status == existing.status
    # And going back is a change again, while staying is none.
    assert admit(got.job, change(job())).outcome == "unchanged"
    assert admit(got.job, job()).job.metadata.generation == (3 if runs_anew else 1)


def test_scaling_a_service_runs_nothing_again() -> None:
    existing = stored(job(JobType.SERVICE))
    got = admit(existing, job(JobType.SERVICE, count=5))
    assert (got.outcome, got.job.spec.count, got.job.metadata.generation) == ("configured", 5, 1)


def test_removed_keys_go_but_those_of_the_system_stay() -> None:
    mine, own = {"mine": "x"}, {"bacalhau.org/source": "git"}
    existing = stored(job(meta=mine | own).with_meta(labels=mine | own, annotations=mine | own))
    got = admit(existing, job()).job
    assert (got.metadata.labels, got.metadata.annotations, got.spec.meta) == (own, own, own)
    assert got.metadata.generation == 1


def test_the_type_cannot_change() -> None:
    with pytest.raises(InvalidError) as caught:
        admit(stored(), job(JobType.SERVICE))
    (problem,) = caught.value.problems
    assert str(problem) == (
        "spec.type: cannot change from batch to service; delete Job default/a first, or give the new job another name"
    )


def test_a_job_that_is_being_deleted_takes_no_changes() -> None:
    deleting = stored().with_meta(deletion_timestamp=NOW)
    for attempt in (lambda: admit(deleting, job()), lambda: rerun(deleting, "n")):
        with pytest.raises(ConflictError, match="is being deleted") as caught:
            attempt()
        assert "gone" in caught.value.hint
        assert not isinstance(caught.value, NotFoundError)
    assert stop(deleting) is deleting


def test_what_is_wrong_is_refused_at_the_door() -> None:
    with pytest.raises(InvalidError, match=r"spec\.tasks\[0\]\.env\.lower"):
        admit(
            None, job().but(spec=job().spec.but(tasks=(job().spec.task.but(env={"lower": "x"}),)))
        )


def test_rerun_survives_the_next_apply_and_is_idempotent() -> None:
    again = rerun(stored(), "n1")
    assert again.metadata.generation == 2
    assert rerun(again, "n1") is again
    assert rerun(again, "n2").metadata.generation == 3
    assert admit(again, job()).outcome == "unchanged"
    assert admit(again, job(run_nonce="x")).job.metadata.generation == 3


def test_stop_and_what_comes_after() -> None:
    existing = stored()
    stopped = stop(existing)
    assert stopped.is_stopped
    assert (stopped.spec.stop_generation, stopped.metadata.generation) == (1, 1)
    assert stop(stopped) is stopped
    same = admit(stopped, job())
    assert (same.outcome, same.job.is_stopped) == ("unchanged", True)
    assert "bacalhau rerun a" in same.warnings[0]
    relabelled = admit(stopped, job().with_meta(labels={"a": "b"}))
    assert (relabelled.outcome, relabelled.job.is_stopped) == ("configured", True)
    changed = admit(stopped, job(run_nonce="x"))
    assert (changed.job.is_stopped, changed.warnings) == (False, ())
    assert not rerun(stopped, "n").is_stopped


def test_stopping_what_has_ended_changes_nothing() -> None:
    done = stored().but(status=JobStatus(observed_generation=1, phase=JobPhase.COMPLETED))
    assert stop(done) is done
    # The status still speaks of the generation before: the new one has not ended.
    assert stop(done.with_meta(generation=2)).is_stopped


def test_a_suspended_job_says_so() -> None:
    assert "suspended" in admit(stored(), job(suspend=True)).warnings[0]


def test_a_stored_spelling_of_old_does_not_run_again() -> None:
    """Canonical forms may change with an upgrade; what is stored is compared in today's."""
    task = stored().spec.task.but(engine=SpecConfig(type="docker", params={"Image": "a"}))
    old = stored().but(spec=stored().spec.but(tasks=(task,)))
    got = admit(old, job())
    assert (got.outcome, got.job.metadata.generation) == ("configured", 1)
