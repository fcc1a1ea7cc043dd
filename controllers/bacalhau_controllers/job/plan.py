"""What is to be done about one job: the pure heart of the job reconciler.

Everything that decides is here and in the modules it calls: no await, clock, randomness or
logging. The one thing that a plan changes is the node table: a place that it gives out is set aside
at once, so that the next plan does not give it out again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from bacalhau_api.errors import TerminalError
from bacalhau_api.v1.execution import Acceptance, Execution, Publication
from bacalhau_api.v1.job import Job, JobPhase
from bacalhau_controllers.job import cleanup, status
from bacalhau_controllers.job.draft import Draft, Plan, without_job
from bacalhau_controllers.job.look import Sight
from bacalhau_controllers.job.outcome import Outcome
from bacalhau_controllers.job.placing import CAPACITY
from bacalhau_controllers.job.settings import JobSettings
from bacalhau_controllers.job.slots import JobView, names
from bacalhau_controllers.job.work import work
from bacalhau_controllers.placement import NodeTable
from bacalhau_controllers.placement.table import unit_hash

# While room is kept for jobs that go first, it is asked again soon: they are being looked at.
_TURN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a plan is made from.

    `executions`, `acceptances` and `publications` are all that the job owns. `held` names nodes
    whose room is kept for jobs that go first, with the reason.
    """

    job: Job
    executions: Sequence[Execution]
    acceptances: Sequence[Acceptance]
    publications: Sequence[Publication]
    nodes: NodeTable
    now: datetime
    held: Mapping[str, str] = field(default_factory=dict)
    settings: JobSettings = JobSettings()


def plan(inputs: Inputs) -> Plan:
    """Compare a job with what it owns, and list what is missing, extra, or to be said.

    Places are set aside in `inputs.nodes` under the names of `Plan.create`; whoever does not carry
    the plan out has to release them. Raises TerminalError for a job that cannot be worked on.
    """
    job = inputs.job
    if not job.metadata.uid:
        raise TerminalError(
            f"{job.ref} has no uid, so nothing can be made for it",
            hint="create it through the API",
        )
    view = JobView(job, inputs.executions, inputs.acceptances, inputs.publications)
    draft = Draft(view, inputs.settings, inputs.now)
    sight = Sight.of(job, inputs.nodes, inputs.settings, inputs.now)
    if job.is_deleting:
        return _delete(draft, sight)
    cleanup.take_older_results(draft, sight)
    if status.is_over(job):
        return _close(draft, sight)
    if job.is_stopped:
        return _stop(draft, sight)
    if job.spec.suspend:
        return _suspend(draft, sight)
    return _work(draft, sight, inputs.held)


def _delete(draft: Draft, sight: Sight) -> Plan:
    job = draft.job
    if not cleanup.is_ready_for_removal(draft, sight):
        tally = cleanup.take_results(draft, sight)
        said = status.held(draft, tally, job.status.phase, "Deleting", "is being deleted")
        return draft.finish(job.but(status=said), reason="Deleting")
    draft.accept.clear()
    cleanup.remove_everything(draft)
    if draft.is_full:
        return draft.finish(job, reason="Deleting", message="removing what the job owns")
    others = tuple(f for f in job.metadata.finalizers if f != status.FINALIZER)
    if others:
        return draft.finish(job.with_meta(finalizers=others), reason="Deleted")
    return without_job(draft.finish(job, reason="Deleted"), job)


def _close(draft: Draft, sight: Sight) -> Plan:
    """A generation that is over stays over. What was late still counts, what runs is stopped."""
    job = draft.job
    cleanup.take_results(draft, sight)
    draft.stop_all(draft.view.active(), f"Job{job.status.phase}")
    cleanup.prune(draft, sight)
    done = status.with_finalizer(job).but(status=status.closed(draft))
    return draft.finish(done, reason="Closed")


def _stop(draft: Draft, sight: Sight) -> Plan:
    tally = cleanup.take_results(draft, sight)
    active = [e for e in draft.view.active() if not _is_taken(e, draft)]
    draft.stop_all(active, "JobStopped")
    waited = cleanup.wait_for_stops(active, draft, sight)
    job = status.with_finalizer(draft.job)
    phase = job.status.phase if status.is_observed(job) else JobPhase.PENDING
    if waited or draft.is_full:
        said = status.held(draft, tally, phase, "Stopping", "was asked to stop")
    else:
        message = "stopped by request"
        if active:
            message += f"; not heard from, and told when they return: {names(active)}"
        said = status.over(
            draft, tally, JobPhase.STOPPED, reason="Stopped", message=message, outcome=None
        )
    return draft.finish(job.but(status=said), reason="Stop")


def _suspend(draft: Draft, sight: Sight) -> Plan:
    tally = cleanup.take_results(draft, sight)
    active = [e for e in draft.view.active() if not _is_taken(e, draft)]
    draft.stop_all(active, "Suspended")
    cleanup.prune(draft, sight)
    if not cleanup.wait_for_stops(active, draft, sight):
        draft.wait("Resume", "suspended; set spec.suspend to false to go on", mover="user")
    tally.total = _slots_wanted(draft, tally.total)
    job = status.with_finalizer(draft.job)
    said = status.held(draft, tally, JobPhase.PENDING, "Suspended", "suspended by request")
    return draft.finish(job.but(status=said), reason="Suspend")


def _slots_wanted(draft: Draft, known: int) -> int:
    return known if draft.job.spec.type.is_per_node else draft.job.spec.count


def _is_taken(execution: Execution, draft: Draft) -> bool:
    return any(a.spec.execution == execution.name for a in draft.accept)


def _work(draft: Draft, sight: Sight, held: Mapping[str, str]) -> Plan:
    job, now = draft.job, draft.now
    deadline = status.total_deadline(job, now)
    if deadline is not None and deadline <= now:
        seconds = job.spec.task.timeouts.total_timeout
        tally = cleanup.take_results(draft, sight)
        return _end(
            draft,
            sight,
            Outcome(tally, _no_placer(draft, sight), JobPhase.FAILED, "TotalTimeout"),
            f"not done within the total timeout of {seconds} s",
        )
    outcome = work(draft, sight, held)
    if outcome.ended is not None and not draft.is_full:
        return _end(draft, sight, outcome, outcome.message)
    if outcome.placer.waiting:
        failed = _queue(draft, outcome, is_held=bool(held))
        if failed:
            outcome.ended, outcome.reason = JobPhase.FAILED, "QueueTimeout"
            return _end(draft, sight, outcome, failed)
    outcome.placer.close()
    if not draft.waits:
        _say_idle(draft, outcome)
    if deadline is not None:
        draft.look_again(deadline)
    cleanup.prune(draft, sight)
    done = status.with_finalizer(job).but(status=status.working(draft, outcome))
    reason = "Placed" if draft.create else "Accepted" if draft.accept else "Observed"
    return draft.finish(done, reason=reason, message=outcome.placer.explain())
