"""Decides what becomes of a submitted job: created, configured or unchanged. Pure.

Canonical and defaulted specs are stored and compared, so that a file applied again changes nothing,
however its quantities, paths or parameter names are spelled. The generation grows only with what
affects a run (`run_hash`). What the server owns (status, uid, finalizers, keys beginning with
`bacalhau.org/`, `stopGeneration`, `rerunNonce`) outlives every submission.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from bacalhau_api.canonical import canonical_job
from bacalhau_api.errors import ConflictError, InvalidError, Problem
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.names import RESERVED_KEY_PREFIX
from bacalhau_api.v1.job import Job, JobSpec, JobStatus, Resources, run_hash

EXECUTIONS_FINALIZER: Final = "bacalhau.org/executions"
"""Keeps a deleted job until all of its executions are gone."""

DEFAULT_RESOURCES: Final = Resources(cpu_millis=500, memory_bytes=512_000_000)
"""What a task gets of the resources that it does not ask for; 0 means none by default."""

Outcome = Literal["created", "configured", "unchanged"]


@dataclass(frozen=True, slots=True)
class Admitted:
    """The job as it is to be stored (`unchanged`: as it is stored), and what its user should
    know."""

    job: Job
    outcome: Outcome
    warnings: tuple[str, ...] = ()


def admit_job(
    existing: Job | None,
    submitted: Job,
    *,
    now: datetime,
    uid: str,
    defaults: Resources = DEFAULT_RESOURCES,
) -> Admitted:
    """Create or update a job. `existing` is what the store holds under the submitted name; `uid`
    is used if the job is new.

    Raises InvalidError (the job is wrong, or changes its type), ConflictError (the existing job is
    being deleted).
    """
    wanted = _defaulted(canonical_job(submitted), defaults)
    if existing is None:
        return Admitted(_created(wanted, now, uid), "created")
    assert existing.ref == wanted.ref, "admit_job compares a job with the one of the same name"
    if existing.is_deleting:
        raise ConflictError(
            f"{existing.ref} is being deleted",
            hint="wait until it is gone, then apply again; `bacalhau get` shows what it waits for",
        )
    _check_type(existing, wanted)
    return _updated(existing, wanted)


def rerun(job: Job, nonce: str) -> Job:
    """Run the job again as it is: a new generation, unless this very `nonce` was used last.

    Raises ConflictError if the job is being deleted.
    """
    if job.is_deleting:
        raise ConflictError(
            f"{job.ref} is being deleted", hint="apply its manifest once it is gone"
        )
    if job.spec.rerun_nonce == nonce:
        return job
    changed = job.but(spec=job.spec.but(rerun_nonce=nonce))
    return changed.with_meta(generation=job.metadata.generation + 1)


def stop(job: Job) -> Job:
    """Stop the current generation. The job itself if there is nothing to stop: it was stopped, has
    ended, or is being deleted."""
    has_ended = (
        job.status.phase.is_final and job.status.observed_generation == job.metadata.generation
    )
    if job.is_stopped or job.is_deleting or has_ended:
        return job
    return job.but(spec=job.spec.but(stop_generation=max(job.metadata.generation, 1)))


def _defaulted(job: Job, defaults: Resources) -> Job:
    """With the default for each resource that a task does not ask for."""
    tasks = []
    for task in job.spec.tasks:
        asked = task.resources
        resources = Resources(
            cpu_millis=asked.cpu_millis or defaults.cpu_millis,
            memory_bytes=asked.memory_bytes or defaults.memory_bytes,
            disk_bytes=asked.disk_bytes or defaults.disk_bytes,
            gpu=asked.gpu or defaults.gpu,
        )
        tasks.append(task.but(resources=resources))
    return job.but(spec=job.spec.but(tasks=tuple(tasks)))


def _created(wanted: Job, now: datetime, uid: str) -> Job:
    given = wanted.metadata
    meta = ObjectMeta(
        name=given.name,
        namespace=given.namespace,
        uid=uid,
        labels=given.labels,
        annotations=given.annotations,
        generation=1,
        creation_timestamp=now,
        finalizers=(EXECUTIONS_FINALIZER,),
        owner_references=given.owner_references,
    )
    spec = wanted.spec.but(stop_generation=0, rerun_nonce="")
    return Job(metadata=meta, spec=spec, status=JobStatus())


def _check_type(existing: Job, wanted: Job) -> None:
    old, new = existing.spec.type, wanted.spec.type
    if old is not new:
        message = f"cannot change from {old} to {new}"
        hint = f"delete {existing.ref} first, or give the new job another name"
        raise InvalidError([Problem("spec.type", message, hint=hint)])


def _updated(existing: Job, wanted: Job) -> Admitted:
    old = existing.metadata
    spec = wanted.spec.but(
        stop_generation=existing.spec.stop_generation,
        rerun_nonce=existing.spec.rerun_nonce,
        meta=_with_reserved(existing.spec.meta, wanted.spec.meta),
    )
    runs_anew = spec != existing.spec and run_hash(spec) != run_hash(_comparable(existing))
    job = existing.but(spec=spec).with_meta(
        labels=_with_reserved(old.labels, wanted.metadata.labels),
        annotations=_with_reserved(old.annotations, wanted.metadata.annotations),
        generation=old.generation + runs_anew,
    )
    outcome: Outcome = "unchanged" if job == existing else "configured"
    return Admitted(existing if outcome == "unchanged" else job, outcome, _warnings(job))


def _with_reserved(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """The new entries, and those of the old ones that only the system writes."""
    return {k: v for k, v in old.items() if k.startswith(RESERVED_KEY_PREFIX)} | dict(new)


def _comparable(existing: Job) -> JobSpec:
    """The stored spec in today's canonical form: an upgrade that spells something differently must
    not run every job again."""
    try:
        return canonical_job(existing).spec
    except InvalidError:  # stored under rules that have become stricter
        return existing.spec


def _warnings(job: Job) -> tuple[str, ...]:
    if job.is_stopped:
        return (f"{job.ref} is stopped; run it again with `bacalhau rerun {job.name}`",)
    if job.spec.suspend:
        return (f"{job.ref} is suspended; it runs once spec.suspend is false",)
    return ()
