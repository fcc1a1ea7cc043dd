"""What is to be done about one job: the pure heart of the job reconciler.

Everything that decides is here and in the modules it calls: no await, clock, randomness or
logging. The one thing that a plan changes is the node table: a place that it gives out is set aside
at once, so that the next plan does not give it out again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from bacalhau_api.errors import TerminalError
from bacalhau_api.v1.job import Job, JobPhase, JobType
from bacalhau_controllers.job import cleanup, status
from bacalhau_controllers.job.allowance import QUOTA, Allowance
from bacalhau_controllers.job.draft import Draft, Plan, without_job
from bacalhau_controllers.job.look import Sight
from bacalhau_controllers.job.outcome import Outcome
from bacalhau_controllers.job.owned import Owned
from bacalhau_controllers.job.placing import CAPACITY
from bacalhau_controllers.job.settings import JobSettings
from bacalhau_controllers.job.slots import JobView, names
from bacalhau_controllers.job.tally import Tally
from bacalhau_controllers.job.work import work
from bacalhau_controllers.placement import NodeTable

# While room is kept for jobs that go first, it is asked again soon: they are being looked at.
_TURN_SECONDS = 1.0
# New executions that the reason of a write names.
_NAMED_MAX = 4


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a plan is made from.

    `owned` is all that the job owns. `held` names nodes whose room is kept for jobs that go first,
    with the reason; `allowance` is the quota of the job's namespace, if it has one.
    """

    job: Job
    owned: Owned
    nodes: NodeTable
    now: datetime
    held: Mapping[str, str] = field(default_factory=dict)
    allowance: Allowance | None = None
    settings: JobSettings = field(default_factory=JobSettings)


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
    view = JobView(job, inputs.owned)
    draft = Draft(view, inputs.settings, inputs.now, inputs.allowance)
    sight = Sight.of(job, inputs.nodes, inputs.settings, inputs.now)
    if job.is_deleting:
        return _delete(draft)
    if job.is_over:
        return _close(draft, sight)
    if job.is_stopped:
        return _stop(draft, sight)
    if job.spec.suspend:
        return _suspend(draft, sight)
    return _work(draft, sight, inputs.held)


def _delete(draft: Draft) -> Plan:
    job = draft.job
    if not cleanup.is_ready_for_removal(draft):
        return draft.finish(job.but(status=status.deleting(draft)), reason="Deleting")
    # Nobody has to be told to stop any more what is removed: all of the room is for removals.
    draft = Draft(draft.view, draft.settings, draft.now)
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
    draft.stop_all(draft.view.active(), f"Job{job.status.phase}")
    cleanup.take_results(draft, sight)
    cleanup.tidy(draft, sight)
    done = status.with_finalizer(job).but(status=status.closed(draft))
    return draft.finish(done, reason="Closed")


def _stop(draft: Draft, sight: Sight) -> Plan:
    active = draft.view.active()
    draft.stop_all(active, "JobStopped")
    tally = cleanup.take_results(draft, sight)
    _count_total(draft, tally)
    cleanup.tidy(draft, sight)
    is_waiting = cleanup.wait_for_stops(active, draft)
    job = status.with_finalizer(draft.job)
    phase = job.status.phase if job.is_observed else JobPhase.PENDING
    if is_waiting or draft.is_full:
        said = status.held(draft, tally, phase, "Stopping", "was asked to stop")
    else:
        message = "stopped by request"
        if active:
            message += f"; not heard from, and told when they return: {names(active)}"
        said = status.over(draft, tally, JobPhase.STOPPED, reason="Stopped", message=message)
    return draft.finish(job.but(status=said), reason="Stop")


def _suspend(draft: Draft, sight: Sight) -> Plan:
    active = draft.view.active()
    draft.stop_all(active, "Suspended")
    tally = cleanup.take_results(draft, sight)
    cleanup.tidy(draft, sight)
    if not cleanup.wait_for_stops(active, draft):
        draft.wait("Resume", "suspended; set spec.suspend to false to go on", mover="user")
    _count_total(draft, tally)
    tally.waiting = max(tally.total - tally.succeeded - tally.failed - tally.running, 0)
    job = status.with_finalizer(draft.job)
    said = status.held(draft, tally, JobPhase.PENDING, "Suspended", "suspended by request")
    return draft.finish(job.but(status=said), reason="Suspend")


def _work(draft: Draft, sight: Sight, held: Mapping[str, str]) -> Plan:
    job, now = draft.job, draft.now
    deadline = status.total_deadline(job, now)
    if deadline is not None and deadline <= now:
        draft.stop_all(draft.view.active(), "TotalTimeout")
        tally = cleanup.take_results(draft, sight)
        _count_total(draft, tally)
        seconds = job.spec.task.timeouts.total_timeout
        message = f"not done within the total timeout of {seconds} s"
        return _end(draft, sight, tally, JobPhase.FAILED, "TotalTimeout", message)
    outcome = work(draft, sight, held)
    if outcome.ended is None and outcome.placer.waiting:
        _queue(draft, outcome, is_held=bool(held))
    if outcome.ended is not None:
        return _end(
            draft,
            sight,
            outcome.tally,
            outcome.ended,
            outcome.reason,
            outcome.message,
            ops_nodes=outcome.ops_nodes,
        )
    outcome.placer.close()
    if not draft.waits and not draft.is_full:
        _say_idle(draft)
    if deadline is not None:
        draft.look_again(deadline)
    cleanup.tidy(draft, sight)
    done = status.with_finalizer(job).but(status=status.working(draft, outcome))
    reason = "Placed" if draft.create else "Accepted" if draft.accept else "Observed"
    said = "; ".join(filter(None, (_placed(draft), outcome.placer.explain())))
    return draft.finish(done, reason=reason, message=said)


def _placed(draft: Draft) -> str:
    """Which executions are new, for those who look for them once they are gone."""
    made = list(draft.create.values())
    names = [f"{e.name} on {e.spec.node}" for e in made[:_NAMED_MAX]]
    more = [f"{len(made) - _NAMED_MAX} more"] if len(made) > _NAMED_MAX else []
    return ", ".join([*names, *more])


def _queue(draft: Draft, outcome: Outcome, *, is_held: bool) -> None:
    """Wait for a place, for as long as the user allows, counted from the last one that was found."""
    job, now, placer = draft.job, draft.now, outcome.placer
    what = QUOTA if placer.quota else CAPACITY
    since = now if draft.create else status.waiting_since(job, what, now)
    deadline = status.queue_deadline(job, since) if _may_time_out(job, outcome) else None
    why = placer.explain()
    if deadline is not None and deadline <= now:
        seconds = job.spec.task.timeouts.queue_timeout
        outcome.ended, outcome.reason = JobPhase.FAILED, "QueueTimeout"
        outcome.message = f"no place within the queue timeout of {seconds} s: {why}"
        return
    # Whatever could help wakes the job; there is nothing to poll for, but for its turn.
    draft.wait(what, why, until=deadline, count=placer.waiting)
    if is_held:
        draft.look_again(now + timedelta(seconds=_TURN_SECONDS))


def _may_time_out(job: Job, outcome: Outcome) -> bool:
    """A service that had a place is not given up because more of it, a move or a restart finds
    none; a daemon waits for nodes by its nature."""
    match job.spec.type:
        case JobType.DAEMON:
            return False
        case JobType.SERVICE:
            return not outcome.tally.running and job.status.started_at is None
        case _:
            return True


def _end(
    draft: Draft,
    sight: Sight,
    tally: Tally,
    phase: JobPhase,
    reason: str,
    message: str,
    *,
    ops_nodes: tuple[str, ...] | None = None,
) -> Plan:
    """The job is over: say so, and stop what still runs. What does not fit into this plan is
    stopped by the next ones."""
    for execution in draft.create.values():
        sight.nodes.release((execution.metadata.namespace, execution.name))
    draft.create.clear()
    draft.verdicts = [v for v in draft.verdicts if not v.node]
    draft.wake_at = None
    draft.stop_all(draft.view.active(), f"Job{phase}")
    cleanup.tidy(draft, sight)
    said = status.over(draft, tally, phase, reason=reason, message=message, ops_nodes=ops_nodes)
    done = status.with_finalizer(draft.job).but(status=said)
    return draft.finish(done, reason=reason, message=message)


def _say_idle(draft: Draft) -> None:
    """Name a mover even where nothing is to be done for now."""
    spec = draft.job.spec
    if spec.type is JobType.DAEMON:
        draft.wait("Nodes", "every matching node has had its run; nodes that join follow")
    elif not spec.count:
        draft.wait("Scale", "count is 0; raise it to run something", mover="user")
    else:
        draft.wait("Work", "no slot needs anything now")


def _count_total(draft: Draft, tally: Tally) -> None:
    """How many slots there should be, where the work itself is not looked at."""
    job = draft.job
    wanted = job.spec.count
    if job.spec.type.is_per_node:
        wanted = job.status.slots.total if status.is_of_generation(job) else 0
    # A service that was scaled down has a few more for a while.
    tally.total = max(wanted, tally.succeeded + tally.failed + tally.running)
