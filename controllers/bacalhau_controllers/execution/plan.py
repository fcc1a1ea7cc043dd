"""What the status of an execution should be: pure.

Reports merge and are never overwritten; contact and waiting are inferred beside them
(`contact.py`). Replacing, retrying and accepting are the job reconciler's business.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from bacalhau_api.meta import Contact, Waiting
from bacalhau_api.v1.execution import (
    Desired,
    Execution,
    ExecutionStatus,
    Phase,
    Report,
    merge_report,
)
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.node import Node
from bacalhau_controllers.contact import (
    NODE_ACK_SECONDS,
    STOP_GRACE_SECONDS,
    STOP_SECONDS,
    Age,
    Case,
    Limit,
    Verdict,
    Want,
    final_verdict,
    is_told_anew,
    judge,
    told_want,
)
from bacalhau_controllers.disconnect import EffectiveDisconnect, effective_disconnect
from bacalhau_controllers.node.presence import Silence

TIMEOUT_GRACE_SECONDS: Final = 120.0

STOPPING_LOST_SECONDS: Final = 300.0
"""An execution that nobody wants any more is not waited for longer than this, whatever the policy
of its job: nothing is going to replace it, and its node is told to stop it when it returns."""

CLOCK_RATE_ERROR_MAX: Final = 0.01
"""By how much the monotonic clock of any machine may go too fast or too slow, for the policy `stop`
to keep its promise: one in a hundred, where NTP allows one in two thousand."""

LOCAL_STOP_MARGIN_SECONDS: Final = 60.0
"""Policy `stop`: how much later than the node's own deadline, clocks aside, a replacement may start.
Covers what stopping takes there (a look at the time each second, the engine's grace of 10 s), and an
orchestrator that answers a node although another one leads already (the lease lasts 12 s)."""

JOB_GONE: Final = "JobGone"


@dataclass(frozen=True, slots=True)
class View:
    """What an execution is judged by. `job` is None if the job that it was made for is gone; `age`
    is that of its stored wait."""

    node: Node | None
    job: Job | None
    silence: Silence
    age: Age = field(default_factory=Age)


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """`is_orphan`: the job is gone. Then either `delete` it, or `stop` it first (desired Stop)."""

    status: ExecutionStatus
    is_orphan: bool = False
    delete: bool = False
    stop: bool = False
    requeue_after: float | None = None


def plan(
    execution: Execution, reports: Iterable[Report], view: View, now: datetime
) -> ExecutionPlan:
    """Merge what was reported, infer the rest, and see to it that orphans go away."""
    old = execution.status
    report = old.report
    for new in reports:
        report = merge_report(report, new)
    is_orphan = view.job is None
    is_wanted = execution.spec.desired is Desired.RUN
    stop = is_orphan and is_wanted
    if stop:
        execution = execution.but(spec=execution.spec.but(desired=Desired.STOP))
    verdict = _verdict(execution, report, view, now)
    status = old.but(
        report=report,
        contact=verdict.contact,
        contact_since=verdict.contact_since,
        waiting=verdict.waiting,
        conditions=verdict.conditions,
    )
    is_over = report is not None and report.phase.is_final
    is_within_reach = verdict.contact is Contact.REACHABLE and view.node is not None
    delete = is_orphan and (is_over or not is_within_reach)
    return ExecutionPlan(
        status,
        is_orphan=is_orphan,
        delete=delete,
        stop=stop and not delete,
        requeue_after=None if delete else verdict.look_again_seconds,
    )


def as_made(execution: Execution, now: datetime) -> Execution:
    """A new execution with the status that it begins with: its node is to confirm it. It is what
    `plan` would say at once, so that need not be stored a moment later."""
    want = want_of(execution, None)
    until = None if want.seconds is None else now + timedelta(seconds=want.seconds)
    waiting = Waiting(
        what=want.what, message=want.message, since=now, until=until, mover=want.mover
    )
    return execution.but(status=execution.status.but(waiting=waiting))


def contact_for(
    execution: Execution,
    node: Node | None,
    policy: EffectiveDisconnect,
    now: datetime,
    silence: Silence,
    age: Age | None = None,
) -> Verdict:
    """What to infer about an execution's contact under its job's policy."""
    view = View(node, None, silence, age or Age())
    return _contact(execution, execution.status.report, view, limit_for(execution, policy), now)


def limit_for(execution: Execution, policy: EffectiveDisconnect) -> Limit:
    """When silence makes this execution Lost.

    Under `stop`, the node was told its deadline when the execution was made. If the policy became
    `stop` only later, the node has no deadline, will not stop by itself, and nothing may ever be
    started in its place.
    """
    if policy.action == "stop":
        local = execution.spec.local_deadline_seconds
        if local is None:
            return Limit(None, is_strict=True)
        return Limit(strict_seconds(max(policy.after_seconds or 0, local)), is_strict=True)
    if execution.spec.desired is Desired.STOP:
        return Limit(min(STOPPING_LOST_SECONDS, policy.after_seconds or STOPPING_LOST_SECONDS))
    return Limit(None if policy.after_seconds is None else float(policy.after_seconds))


def strict_seconds(local: float) -> float:
    """How long the orchestrator waits, by its own clock, until an execution has certainly ended that
    its node stops `local` seconds after the last contact, by the node's clock: should the one
    clock be as fast, and the other as slow, as clocks may be."""
    true_seconds = local / (1 - CLOCK_RATE_ERROR_MAX) + LOCAL_STOP_MARGIN_SECONDS
    return true_seconds * (1 + CLOCK_RATE_ERROR_MAX)


def want_of(execution: Execution, report: Report | None) -> Want:
    """What the node should do next about an execution that is not final."""
    spec = execution.spec
    node = f"node {spec.node}"
    phase = report.phase if report else Phase.PENDING
    if spec.desired is Desired.STOP:
        message = "the node is to stop it and say how it ended"
        return Want("Stop", message, node, STOP_SECONDS, STOP_GRACE_SECONDS)
    if report is None:
        return Want("NodeAck", "the node is to confirm that it has it", node, NODE_ACK_SECONDS)
    if report.waiting is not None:
        return told_want(report.waiting)
    timeout = spec.task.timeouts.execution_timeout
    seconds, grace = (float(timeout), TIMEOUT_GRACE_SECONDS) if timeout else (None, 0.0)
    if phase is Phase.PENDING:
        return Want("NodeStart", "the node has it and is to start it", node)
    if phase is Phase.PREPARING:
        return Want("Preparation", "the node gets inputs and engine ready", node, seconds, grace)
    run = f"run {report.run}" if report.run > 1 else "it"
    if spec.job_type.runs_to_completion:
        return Want("Completion", f"{run} is running", node, seconds, grace)
    return Want("StopRequest", f"{run} is running until it is stopped", "user", seconds, grace)


def _verdict(execution: Execution, report: Report | None, view: View, now: datetime) -> Verdict:
    old = execution.status
    if report is not None and report.phase.is_final:
        return final_verdict(old.contact, old.contact_since, old.conditions, now)
    if view.job is None:
        limit = Limit(None)
    else:
        limit = limit_for(execution, effective_disconnect(view.job.spec))
    return _contact(execution, report, view, limit, now)


def _contact(
    execution: Execution, report: Report | None, view: View, limit: Limit, now: datetime
) -> Verdict:
    old = execution.status
    told, told_before = (r.waiting if r else None for r in (report, old.report))
    case = Case(
        node_name=execution.spec.node,
        node=view.node,
        silence=view.silence,
        limit=limit,
        want=want_of(execution, report),
        is_new_want=execution.spec.desired is Desired.RUN and is_told_anew(told, told_before),
        age=view.age,
        incarnation=report.incarnation if report else "",
        is_news=report != old.report,
        contact=old.contact,
        contact_since=old.contact_since,
        waiting=old.waiting,
        conditions=old.conditions,
    )
    return judge(case, now)
