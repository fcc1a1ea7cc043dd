"""What a job's status says. Made from the round of work that was just done, never read back to
decide, apart from the few moments that only the status can remember: since when something is
waited for, when a generation was admitted, and that it is over."""

import hashlib
from datetime import datetime, timedelta
from typing import Final

from bacalhau_api.admission import EXECUTIONS_FINALIZER
from bacalhau_api.meta import Condition, Waiting
from bacalhau_api.v1.job import Job, JobPhase, JobStatus, JobType, SlotCounts, Verdict
from bacalhau_controllers.job.allowance import QUOTA
from bacalhau_controllers.job.draft import Draft
from bacalhau_controllers.job.outcome import Outcome
from bacalhau_controllers.job.pins import known_pins
from bacalhau_controllers.job.placing import CAPACITY, Placer
from bacalhau_controllers.job.tally import Tally
from bacalhau_controllers.placement import delivery

FINALIZER: Final = EXECUTIONS_FINALIZER
ADMITTED: Final = "Admitted"
DELIVERED: Final = "Delivered"


def with_finalizer(job: Job) -> Job:
    """The job with the finalizer that keeps it until its executions are stopped."""
    if FINALIZER in job.metadata.finalizers:
        return job
    return job.with_meta(finalizers=(*job.metadata.finalizers, FINALIZER))


def is_of_generation(job: Job) -> bool:
    """Whether the status speaks of the current generation, though perhaps not of what
    `rerun --failed` has asked of it since (`Job.is_observed`)."""
    return job.status.observed_generation == job.metadata.generation


def admitted_at(job: Job, now: datetime) -> datetime:
    """When this generation was first looked at (or resumed): total timeouts count from here, and
    so does a job's place in the queue."""
    for condition in job.status.conditions:
        if condition.type == ADMITTED and condition.reason == _admission(job) and condition.status:
            return condition.last_transition_time
    return now


def total_deadline(job: Job, now: datetime) -> datetime | None:
    """When the job as a whole fails, None if never."""
    seconds = job.spec.task.timeouts.total_timeout
    return admitted_at(job, now) + timedelta(seconds=seconds) if seconds else None


def queue_deadline(job: Job, since: datetime) -> datetime | None:
    """When waiting for a place fails the job, None if never."""
    seconds = job.spec.task.timeouts.queue_timeout
    return since + timedelta(seconds=seconds) if seconds else None


def waiting_since(job: Job, what: str, now: datetime) -> datetime:
    """Since when a job waits for this: kept as long as it is waited for."""
    waiting = job.status.waiting
    if is_of_generation(job) and waiting is not None and waiting.what == what:
        return waiting.since
    return now


def working(draft: Draft, outcome: Outcome) -> JobStatus:
    """The status of a job that is under way."""
    job, now, tally = draft.job, draft.now, outcome.tally
    placer = outcome.placer
    phase = JobPhase.RUNNING
    if placer.waiting and not tally.running:
        phase = JobPhase.QUEUED
    status = _base(draft, tally)
    has_started = status.started_at is not None or placer.created > 0
    if not has_started and phase is JobPhase.RUNNING and tally.waiting:
        phase = JobPhase.PENDING
    return status.but(
        phase=phase,
        reason=_no_place(placer) if phase is JobPhase.QUEUED else "",
        message=placer.explain() if phase is JobPhase.QUEUED else "",
        started_at=status.started_at or (now if placer.created else None),
        ops_nodes=outcome.ops_nodes,
        verdicts=_verdicts(draft, status.verdicts),
        waiting=_waiting(draft, total_deadline(job, now)),
        conditions=_conditions(draft, is_admitted=True, is_over=False),
    )


def _no_place(placer: Placer) -> str:
    return "OverQuota" if placer.quota else "NoPlace"


def over(
    draft: Draft,
    tally: Tally,
    phase: JobPhase,
    *,
    reason: str,
    message: str,
    ops_nodes: tuple[str, ...] | None = None,
) -> JobStatus:
    """The status of a job that has just come to its end."""
    status = _base(draft, tally)
    slots = status.slots.but(running=0, waiting=0)
    return status.but(
        phase=phase,
        reason=reason,
        message=message,
        finished_at=draft.now,
        slots=slots,
        ops_nodes=ops_nodes or status.ops_nodes,
        verdicts=_verdicts(draft, status.verdicts),
        waiting=None,
        conditions=_conditions(draft, is_admitted=True, is_over=True),
    )


def held(draft: Draft, tally: Tally, phase: JobPhase, reason: str, message: str) -> JobStatus:
    """The status of a job that is suspended, stopping or being deleted."""
    status = _base(draft, tally)
    return status.but(
        phase=phase,
        reason=reason,
        message=message,
        waiting=_waiting(draft, None),
        conditions=_conditions(draft, is_admitted=reason != "Suspended", is_over=False),
    )


def deleting(draft: Draft) -> JobStatus:
    """The status of a job that waits for its executions to stop before it goes."""
    waiting = _waiting(draft, None)
    return draft.job.status.but(reason="Deleting", message="is being deleted", waiting=waiting)


def closed(draft: Draft) -> JobStatus:
    """The status of a job that was over before: late results and deliveries still count. What was
    counted stays so: of a job that was pruned and restored, only the record of it is left."""
    status = draft.job.status
    counts = status.slots.but(
        succeeded=max(status.slots.succeeded, _count_accepted(draft)),
        delivered=max(status.slots.delivered, draft.view.current.delivered),
    )
    if status.phase is JobPhase.FAILED:
        counts = counts.but(failed=max(min(counts.failed, counts.total - counts.succeeded), 0))
    return status.but(slots=counts, conditions=_conditions(draft, is_admitted=True, is_over=True))


def _count_accepted(draft: Draft) -> int:
    """Slots of the current generation that hold a result, with those of this plan."""
    current, spec = draft.view.current, draft.job.spec
    new = [a.spec.slot for a in draft.accept if a.spec.slot.generation == draft.view.generation]
    if spec.type is not JobType.SERVICE:
        return current.accepted + len(new)
    # A service that was scaled down may hold results beyond its count.
    held = [view.slot for view in current.slots.values() if view.acceptance is not None]
    return sum(slot.partition < spec.count for slot in (*held, *new))


def _base(draft: Draft, tally: Tally) -> JobStatus:
    """What every status says, from the counts; the rest as it was for this generation."""
    job = draft.job
    known = job.status if is_of_generation(job) else JobStatus()
    if not job.is_observed:  # of a new generation nothing is known, of one that goes on its nodes
        known = JobStatus(ops_nodes=known.ops_nodes)
    return known.but(
        observed_generation=job.metadata.generation,
        observed_retry_nonce=job.spec.retry_nonce,
        pins=dict(known_pins(draft.view)),
        slots=SlotCounts(
            total=tally.total,
            waiting=tally.waiting,
            running=tally.running,
            succeeded=tally.succeeded,
            failed=tally.failed,
            delivered=draft.view.current.delivered,
        ),
    )


def _waiting(draft: Draft, deadline: datetime | None) -> Waiting | None:
    waiting = draft.waiting(since=draft.now)
    if waiting is None:
        return None
    since = waiting_since(draft.job, waiting.what, draft.now)
    if waiting.what in (CAPACITY, QUOTA) and draft.create:
        since = draft.now  # something was placed just now, so the wait begins anew
    until = min(filter(None, (waiting.until, deadline)), default=None)
    return waiting.but(since=since, until=until)


def _verdicts(draft: Draft, known: tuple[Verdict, ...]) -> tuple[Verdict, ...]:
    """The newest few: those of this plan, then those known of other slots."""
    new = {verdict.slot: verdict for verdict in draft.verdicts}
    # What says why something waits is outdated once nothing does.
    old = [v for v in known if v.slot not in new and v.node]
    return (*new.values(), *old)[: draft.settings.verdicts_kept]


def _admission(job: Job) -> str:
    nonce = job.spec.retry_nonce
    again = f"Retry{hashlib.sha256(nonce.encode()).hexdigest()[:8]}" if nonce else ""
    return f"Generation{job.metadata.generation}{again}"


def _conditions(draft: Draft, *, is_admitted: bool, is_over: bool) -> tuple[Condition, ...]:
    job, now = draft.job, draft.now
    wanted = [(ADMITTED, is_admitted, _admission(job), "")]
    if job.spec.type.runs_to_completion and delivery(job.spec.task) is not None:
        wanted.append(_delivery(draft, is_over=is_over))
    elif is_over:
        wanted.append((DELIVERED, True, "NothingToDeliver", ""))
    kept = [c for c in job.status.conditions if c.type not in (ADMITTED, DELIVERED)]
    for kind, status, reason, message in wanted:
        known = [c for c in job.status.conditions if c.type == kind]
        since = now
        if known and (known[0].status, known[0].reason) == (status, reason):
            since = known[0].last_transition_time
        kept.append(
            Condition(
                type=kind, status=status, reason=reason, message=message, last_transition_time=since
            )
        )
    return tuple(kept)


def _delivery(draft: Draft, *, is_over: bool) -> tuple[str, bool, str, str]:
    current = draft.view.current
    total = len(current.publications) + len(draft.publish)
    failed = [current.publications[name] for name in current.failed_deliveries]
    if failed:
        report = failed[0].status.report
        why = report.message or report.reason if report else ""
        return DELIVERED, False, "DeliveryFailed", f"{failed[0].name}: {why}"
    if is_over and current.delivered == total:
        return DELIVERED, True, "Delivered" if total else "NothingToDeliver", ""
    return DELIVERED, False, "Delivering" if total else "NoResultYet", ""
