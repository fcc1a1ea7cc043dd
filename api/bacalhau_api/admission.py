"""Decides what becomes of a submitted job: created, configured or unchanged. Pure.

Canonical and defaulted specs are stored and compared, so that a file applied again changes nothing,
however its quantities, paths or parameter names are spelled. The generation grows only with what
affects a run (`run_hash`). What the server owns (status, uid, finalizers, keys beginning with
`bacalhau.org/`, `stopGeneration`, `rerunNonce`, `retryNonce`) outlives every submission.

What has run stays run: the same run of a job that ended and was retired is not started again, and
`spec.onChange` says what an edit of a job that runs to completion does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from bacalhau_api.canonical import canonical_job
from bacalhau_api.errors import ConflictError, InvalidError, Problem
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.names import RESERVED_KEY_PREFIX, is_reserved
from bacalhau_api.v1.job import (
    Job,
    JobPhase,
    JobSpec,
    JobStatus,
    Resources,
    run_hash,
    without_run,
)
from bacalhau_api.v1.namespace import Namespace
from bacalhau_api.v1.node import Node
from bacalhau_api.v1.retired import RetiredJob, RetiredJobSpec

EXECUTIONS_FINALIZER: Final = "bacalhau.org/executions"
"""Keeps a deleted job until all of its executions are gone."""

DEFAULT_RESOURCES: Final = Resources(cpu_millis=500, memory_bytes=512_000_000)
"""What a task gets of the resources that it does not ask for; 0 means none by default."""

HELD_SPEC: Final = f"{RESERVED_KEY_PREFIX}held-spec"
"""The annotation with the spec that waits for `rerun` (`onChange: manual`)."""

DEFAULTED: Final = f"{RESERVED_KEY_PREFIX}defaulted"
"""The annotation that lists which resources a job got from its namespace's defaults. It keeps them:
else a change of the defaults would run every job again whose file is applied again."""

_RESOURCES: Final = ("cpu_millis", "memory_bytes", "disk_bytes", "gpu")

Outcome = Literal["created", "configured", "unchanged"]
Held = Literal["", "manual", "ignore", "retired"]


@dataclass(frozen=True, slots=True)
class Admitted:
    """The job as it is to be stored (`unchanged`: as it is stored), and what its user should
    know. `held`: why what was submitted does not run, though it differs from what ran or is gone.
    """

    job: Job
    outcome: Outcome
    warnings: tuple[str, ...] = ()
    held: Held = ""


@dataclass(frozen=True, slots=True)
class AdmittedNode:
    """The node as it is to be stored."""

    node: Node
    outcome: Outcome


def admit_job(
    existing: Job | None,
    submitted: Job,
    *,
    now: datetime,
    uid: str,
    namespace: Namespace | None = None,
    retired: RetiredJob | None = None,
    is_explicit: bool = False,
    is_canonical: bool = False,
) -> Admitted:
    """Create or update a job. `existing` is what the store holds under the submitted name; `uid`
    is used if the job is new. `namespace` is the object of the job's namespace, which has defaults;
    `retired` is what is left of an earlier job of that name.
    `is_explicit`: the user asks for the run itself, so `onChange` does not hold it back.
    `is_canonical`: the submitted job comes from `parse_manifests`, and need not be checked again.

    Raises InvalidError (the job is wrong, or changes its type), ConflictError (the existing job is
    being deleted).
    """
    wanted = _defaulted(
        submitted if is_canonical else canonical_job(submitted),
        namespace_defaults(namespace),
        existing or (retired.as_job() if retired is not None else None),
    )
    if existing is None:
        if retired is not None and not is_explicit and (held := _retired(retired, wanted)):
            return held
        return Admitted(_created(wanted, now, uid), "created")
    assert existing.ref == wanted.ref, "admit_job compares a job with the one of the same name"
    if existing.is_deleting:
        raise ConflictError(
            f"{existing.ref} is being deleted",
            hint="wait until it is gone, then apply again; `bacalhau get` shows what it waits for",
        )
    _check_type(existing, wanted)
    return _updated(existing, wanted, is_explicit=is_explicit)


def admit_namespace(
    existing: Namespace | None, submitted: Namespace, *, now: datetime, uid: str
) -> tuple[Namespace, Outcome]:
    """Create or replace what is said of a namespace. Raises ConflictError if it is being
    deleted."""
    if existing is None:
        given = submitted.metadata
        meta = ObjectMeta(
            name=given.name,
            namespace="",
            uid=uid,
            labels=given.labels,
            annotations=given.annotations,
            generation=1,
            creation_timestamp=now,
        )
        return Namespace(metadata=meta, spec=submitted.spec), "created"
    if existing.is_deleting:
        raise ConflictError(f"{existing.ref} is being deleted", hint="apply it once it is gone")
    old = existing.metadata
    changed = existing.but(spec=submitted.spec).with_meta(
        labels=_with_reserved(old.labels, submitted.metadata.labels),
        annotations=_with_reserved(old.annotations, submitted.metadata.annotations),
        generation=old.generation + (submitted.spec != existing.spec),
    )
    return changed, "unchanged" if changed == existing else "configured"


def admit_node(existing: Node, submitted: Node) -> AdmittedNode:
    """Change what operators say of a node: labels, annotations, and the given spec fields, but
    never its key.

    Raises ConflictError if the node is being deleted.
    """
    if existing.is_deleting:
        raise ConflictError(f"{existing.ref} is being deleted", hint="let it join again")
    given = submitted.spec.model_fields_set - {"public_key"}
    spec = existing.spec.but(**{name: getattr(submitted.spec, name) for name in given})
    kept = submitted.metadata.model_fields_set & {"labels", "annotations"}
    meta = {
        name: _with_reserved(getattr(existing.metadata, name), getattr(submitted.metadata, name))
        for name in kept
    }
    changed = existing.but(spec=spec).with_meta(**meta)
    return AdmittedNode(changed, "unchanged" if changed == existing else "configured")


def rerun(job: Job, nonce: str) -> Job:
    """Run the job again: as it is, or as a held change (`onChange: manual`) has it. A new
    generation, unless this very `nonce` was used last.

    Raises ConflictError if the job is being deleted.
    """
    if job.is_deleting:
        raise ConflictError(
            f"{job.ref} is being deleted", hint="apply its manifest once it is gone"
        )
    if job.spec.rerun_nonce == nonce:
        return job
    spec = held_spec(job) or job.spec
    spec = spec.but(rerun_nonce=nonce, stop_generation=job.spec.stop_generation)
    notes = {k: v for k, v in job.metadata.annotations.items() if k != HELD_SPEC}
    return job.but(spec=spec).with_meta(generation=job.metadata.generation + 1, annotations=notes)


def rerun_failed(job: Job, nonce: str) -> Job:
    """Try the slots again that hold no result, in the same generation: with the same pinned inputs
    and references, beside the results that there are. Nothing changes if this very `nonce` was used
    last.

    Raises ConflictError if the job is not over, has nothing left to do, or never ends by itself.
    """
    if job.is_deleting:
        raise ConflictError(
            f"{job.ref} is being deleted", hint="apply its manifest once it is gone"
        )
    if job.spec.retry_nonce == nonce:
        return job
    if not job.spec.type.runs_to_completion:
        raise ConflictError(
            f"{job.ref} is a {job.spec.type}, whose slots are filled again by themselves",
            hint=f"run all of it anew: bacalhau rerun {job.name}",
        )
    if not job.is_over:
        raise ConflictError(
            f"{job.ref} is not over; what fails is tried again as spec.retry says",
            hint=f"wait for its end: bacalhau wait {job.name}",
        )
    if job.status.phase is JobPhase.COMPLETED:
        raise ConflictError(
            f"{job.ref} is complete: all of its slots hold a result",
            hint=f"run all of it anew: bacalhau rerun {job.name}",
        )
    before = min(job.spec.stop_generation, max(job.metadata.generation, 1) - 1)
    return job.but(spec=job.spec.but(retry_nonce=nonce, stop_generation=before))


def held_spec(job: Job) -> JobSpec | None:
    """The spec that waits for `rerun`, if there is one."""
    text = job.metadata.annotations.get(HELD_SPEC, "")
    return JobSpec.decode(text) if text else None


def revive(retired: RetiredJob, nonce: str, *, now: datetime, uid: str) -> Job:
    """A job that ended and was retired, to run again on request."""
    made = _created(retired.as_job(), now, uid)
    return made.but(spec=made.spec.but(rerun_nonce=nonce))


def retire(job: Job, now: datetime) -> RetiredJob:
    """What stays of a job that has ended."""
    meta, status = job.metadata, job.status
    return RetiredJob(
        metadata=ObjectMeta(
            name=meta.name,
            namespace=meta.namespace,
            uid=f"retired-{meta.uid}",
            labels=meta.labels,
            annotations=meta.annotations,
            creation_timestamp=meta.creation_timestamp,
        ),
        spec=RetiredJobSpec(
            uid=meta.uid,
            generation=meta.generation,
            run_hash=run_hash(job.spec),
            phase=status.phase,
            reason=status.reason,
            message=status.message,
            slots=status.slots,
            started_at=status.started_at,
            finished_at=status.finished_at,
            retired_at=now,
            job=job.spec,
        ),
    )


def stop(job: Job) -> Job:
    """Stop the current generation. The job itself if there is nothing to stop: it was stopped, has
    ended, or is being deleted."""
    if job.is_stopped or job.is_deleting or job.is_over:
        return job
    return job.but(spec=job.spec.but(stop_generation=max(job.metadata.generation, 1)))


def namespace_defaults(namespace: Namespace | None) -> Resources:
    """What tasks in a namespace get that do not ask; 0 where the namespace leaves it open."""
    return namespace.spec.defaults.resources if namespace is not None else Resources()


def _defaulted(job: Job, defaults: Resources, known: Job | None) -> Job:
    """With a default for each resource that a task does not ask for: what the job was given
    before, else what its namespace says, else that of all."""
    task = job.spec.task
    before = known.spec.task.resources if known is not None else Resources()
    marks = known.metadata.annotations.get(DEFAULTED, "").split(",") if known is not None else []
    amounts: dict[str, int] = {}
    marked: list[str] = []
    for name in _RESOURCES:
        asked, common = getattr(task.resources, name), getattr(DEFAULT_RESOURCES, name)
        own, had = getattr(defaults, name), getattr(before, name)
        if asked:
            amounts[name] = asked
        elif known is not None and (name in marks or had == common):
            amounts[name] = had
            marked += [name] if name in marks else []
        else:
            amounts[name] = own or common
            marked += [name] if own else []
    notes = {k: v for k, v in job.metadata.annotations.items() if k != DEFAULTED}
    if marked:
        notes[DEFAULTED] = ",".join(marked)
    tasks = (task.but(resources=Resources(**amounts)),)
    return job.but(spec=job.spec.but(tasks=tasks)).with_meta(annotations=notes)


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
    spec = wanted.spec.but(stop_generation=0, rerun_nonce="", retry_nonce="")
    return Job(metadata=meta, spec=spec, status=JobStatus())


def _check_type(existing: Job, wanted: Job) -> None:
    old, new = existing.spec.type, wanted.spec.type
    if old is not new:
        message = f"cannot change from {old} to {new}"
        hint = f"delete {existing.ref} first, or give the new job another name"
        raise InvalidError([Problem("spec.type", message, hint=hint)])


def _retired(retired: RetiredJob, wanted: Job) -> Admitted | None:
    """Whether a job that was retired stays so. None: it is another run now, and starts."""
    old = retired.as_job()
    spec = wanted.spec.but(rerun_nonce=old.spec.rerun_nonce, retry_nonce=old.spec.retry_nonce)
    again = f"run it again with `bacalhau rerun {old.name}`"
    ended = retired.spec.finished_at
    when = f" at {ended:%Y-%m-%d %H:%M} UTC" if ended else ""
    if run_hash(spec) == run_hash(_comparable(old)):
        message = f"{old.ref} ended as {old.status.phase}{when} and was retired; {again}"
        return Admitted(old, "unchanged", (message,), "retired")
    is_asked = spec.run_nonce != old.spec.run_nonce
    if wanted.spec.on_change == "rerun" or is_asked or not spec.type.runs_to_completion:
        return None
    message = (
        f"{old.ref} ended{when} and was retired; spec.onChange is {wanted.spec.on_change}, so the "
        f"changed one does not run: change spec.runNonce to run it"
    )
    return Admitted(old, "unchanged", (message,), "retired")


def _updated(existing: Job, wanted: Job, *, is_explicit: bool) -> Admitted:
    old = existing.metadata
    spec = wanted.spec.but(
        stop_generation=existing.spec.stop_generation,
        rerun_nonce=existing.spec.rerun_nonce,
        retry_nonce=existing.spec.retry_nonce,
        meta=_with_reserved(existing.spec.meta, wanted.spec.meta),
    )
    runs_anew = spec != existing.spec and run_hash(spec) != run_hash(_comparable(existing))
    held: Held = ""
    notes = _with_reserved(old.annotations, wanted.metadata.annotations)
    notes.pop(HELD_SPEC, None)
    if DEFAULTED not in wanted.metadata.annotations:
        notes.pop(DEFAULTED, None)
    is_asked = is_explicit or spec.run_nonce != existing.spec.run_nonce
    if runs_anew and not is_asked and spec.on_change != "rerun" and spec.type.runs_to_completion:
        held, runs_anew = spec.on_change, False
        if held == "manual":
            bare = spec.but(stop_generation=0, rerun_nonce="", retry_nonce="")
            notes[HELD_SPEC] = bare.encode().decode()
        spec = existing.spec.but(**without_run(spec))
    job = existing.but(spec=spec).with_meta(
        labels=_with_reserved(old.labels, wanted.metadata.labels),
        annotations=notes,
        generation=old.generation + runs_anew,
    )
    outcome: Outcome = "unchanged" if job == existing else "configured"
    stored = existing if outcome == "unchanged" else job
    return Admitted(stored, outcome, _warnings(job, held), held)


def _with_reserved(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """The new entries, and those of the old ones that only the system writes."""
    return {k: v for k, v in old.items() if is_reserved(k)} | dict(new)


def _comparable(existing: Job) -> JobSpec:
    """The stored spec in today's canonical form: an upgrade that spells something differently must
    not run every job again."""
    try:
        return canonical_job(existing).spec
    except InvalidError:  # stored under rules that have become stricter
        return existing.spec


def _warnings(job: Job, held: Held) -> tuple[str, ...]:
    if held == "manual":
        again = f"`bacalhau rerun {job.name}`"
        message = f"spec.onChange is manual, so what changed runs with {again}"
        return (f"{job.ref} is held back: {message}",)
    if held:
        message = "what changed of its execution is ignored, as spec.onChange says"
        return (f"{job.ref}: {message}; change spec.runNonce to run it",)
    if job.is_stopped:
        return (f"{job.ref} is stopped; run it again with `bacalhau rerun {job.name}`",)
    if job.spec.suspend:
        return (f"{job.ref} is suspended; it runs once spec.suspend is false",)
    return ()
