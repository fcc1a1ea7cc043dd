"""What one slot needs now: a pure look at its attempts.

The outcome is one of a few states; acting on it (placing, stopping, accepting) is for the plan.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum, auto

from bacalhau_api.meta import Contact
from bacalhau_api.v1.execution import Desired, Execution, Phase, execution_name
from bacalhau_api.v1.job import Job, JobType
from bacalhau_api.v1.node import Node
from bacalhau_controllers.contact import is_back
from bacalhau_controllers.disconnect import EffectiveDisconnect, effective_disconnect
from bacalhau_controllers.job.owned import SlotView
from bacalhau_controllers.job.retry import (
    End,
    end_of,
    is_charged,
    pause_seconds,
    pause_starts,
    run_time,
)
from bacalhau_controllers.job.settings import JobSettings
from bacalhau_controllers.placement import NodeTable


class Is(Enum):
    """The state of a slot."""

    ACCEPTED = auto()  # holds its result
    DONE = auto()  # `execution` has the result; it is to be accepted
    LIVE = auto()  # `execution` is there, or on its way
    ABSENT = auto()  # as LIVE, but its node is not heard from
    STOPPING = auto()  # `execution` must end before anything else
    PAUSED = auto()  # the next attempt may start at `until`
    NEEDED = auto()  # the next attempt may start now
    FAILED = auto()  # no further attempt: `execution` was the last


@dataclass(slots=True)
class Look:
    """The state of a slot, and what follows from it.

    `losers` lost to another attempt and are to be stopped; `retires` will, once the next attempt
    is there. `charged` and `avoid` belong to the
    next attempt. `until` is when the state ends by itself. `is_moving` is set where a live
    execution should move to another node (its own is being drained).
    """

    state: Is
    execution: Execution | None = None
    losers: list[Execution] = field(default_factory=list)
    retires: list[Execution] = field(default_factory=list)
    charged: int = 0
    avoid: tuple[str, ...] = ()
    until: datetime | None = None
    why: str = ""
    end: End | None = None
    is_moving: bool = False


@dataclass(frozen=True, slots=True)
class Sight:
    """What a look needs to know beside the slot."""

    job: Job
    nodes: NodeTable
    settings: JobSettings
    now: datetime
    policy: EffectiveDisconnect

    @staticmethod
    def of(job: Job, nodes: NodeTable, settings: JobSettings, now: datetime) -> "Sight":
        """The sight of one job at one moment."""
        return Sight(job, nodes, settings, now, effective_disconnect(job.spec))

    def node(self, execution: Execution) -> Node | None:
        """The node of an execution."""
        return self.nodes.node(execution.spec.node)

    def is_gone(self, execution: Execution) -> bool:
        """Whether an execution that did not end may be replaced. When that is so under which
        policy is for the execution reconciler to say, which measures silence: by `Lost`.

        If its node has just come back, what it has to tell counts, and comes in a moment."""
        status = execution.status
        return status.contact is Contact.LOST and not is_back(status, self.node(execution))

    def is_heard(self, execution: Execution) -> bool:
        """Whether an execution that is not gone has its node there, or just back."""
        return execution.status.contact is not Contact.UNKNOWN

    def settles_at(self, execution: Execution) -> datetime | None:
        """Until when an execution whose node has just come back may yet report how it ended; None
        if that is over, or its node was never away."""
        status = execution.status
        if status.contact is Contact.LOST:
            return self.now + timedelta(seconds=self.settings.return_seconds)
        since = status.contact_since
        if since is None or status.contact is not Contact.REACHABLE or since > self.now:
            return None
        until = since + timedelta(seconds=self.settings.return_seconds)
        return until if until > self.now else None

    def is_running(self, execution: Execution) -> bool:
        """Whether an execution is known to serve."""
        return (
            execution.phase is Phase.RUNNING
            and execution.status.contact is Contact.REACHABLE
            and execution.spec.desired is Desired.RUN
        )

    def is_draining(self, execution: Execution) -> bool:
        """Whether an execution's node is being emptied."""
        node = self.node(execution)
        return node is not None and node.spec.drain


def look(view: SlotView, sight: Sight) -> Look:
    """The state of one slot of the current generation."""
    if view.acceptance is not None:
        accepted = view.acceptance.spec.execution
        others = [e for e in view.attempts if e.name != accepted]
        return Look(Is.ACCEPTED, losers=[e for e in others if _counts(e)])
    winner = _winner(view, sight)
    if winner is not None:
        others = [e for e in view.attempts if e is not winner]
        return Look(Is.DONE, winner, losers=[e for e in others if _counts(e)])
    active = view.active
    there = [e for e in active if e.spec.desired is Desired.RUN and not sight.is_gone(e)]
    if there:
        return _alive(there, active, view, sight)
    for execution in active:
        if execution.spec.desired is Desired.STOP and not sight.is_gone(execution):
            return _stopping(execution)
    found = _ended(view, sight)
    # Under `stop` what was replaced must not begin after all when its node comes back, not even in
    # the moment until somebody tells it: it is told in the commit that replaces it.
    if sight.policy.reconcile == "keepReplacement" or sight.policy.action == "stop":
        found.retires = active
    return found


def _counts(execution: Execution) -> bool:
    """Whether an attempt that lost has to be told so: it runs, or has a result of its own."""
    return not execution.phase.is_final or execution.phase is Phase.SUCCEEDED


def charged_so_far(view: SlotView, job: Job) -> int:
    """Attempts of a slot that count against the user's budget. Attempts that were deleted since
    are in the counts of those that followed them."""
    retry = job.spec.retry
    counted = (e for e in view.attempts if not is_forgiven(e, job))
    return max((e.spec.charged + is_charged(e, retry) for e in counted), default=0)


def is_forgiven(execution: Execution, job: Job) -> bool:
    """Whether how an attempt ended does not matter any more: the slot is tried anew since."""
    return execution.spec.retry_nonce != job.spec.retry_nonce


def _winner(view: SlotView, sight: Sight) -> Execution | None:
    """The attempt whose result the slot takes, if there is one to take."""
    if not takes_results(sight.job):
        return None
    done = [e for e in view.attempts if e.phase is Phase.SUCCEEDED]
    if not done:
        return None
    if sight.policy.reconcile != "keepReplacement":
        return done[0]
    later = [e for e in view.active if e.spec.attempt > done[-1].spec.attempt]
    if any(e.spec.desired is Desired.RUN and not sight.is_gone(e) for e in later):
        return None  # the replacement has its chance first; if it fails, the original counts
    return done[-1]


def takes_results(job: Job) -> bool:
    """Whether an execution that succeeds ends its slot. One that must always run never does."""
    return job.spec.type.runs_to_completion or job.spec.restart.policy != "always"


def _alive(there: list[Execution], active: list[Execution], view: SlotView, sight: Sight) -> Look:
    keep, losers = _rivals(there, active, sight)
    is_service = sight.job.spec.type is JobType.SERVICE
    found = Look(Is.LIVE, keep, losers, charged=charged_so_far(view, sight.job))
    if keep.status.contact is not Contact.REACHABLE:
        found.state = Is.ABSENT
        found.until, found.why = _silence(keep)
    elif len(there) > 1:
        found.until = sight.settles_at(keep)
    elif is_service and sight.is_draining(keep):
        _move(found, keep, view, sight)
    return found


def _move(found: Look, keep: Execution, view: SlotView, sight: Sight) -> None:
    """A service leaves a draining node: its next attempt starts elsewhere before this one is
    stopped. Should attempts elsewhere fail, the pauses between them grow as usual."""
    found.avoid = (keep.spec.node,)
    if view.attempts[-1] is keep:
        found.is_moving = True
    elif view.attempts[-1].phase.is_final:
        after = _ended(view, sight)
        found.charged, found.until = after.charged, after.until
        found.is_moving = after.state is Is.NEEDED
        found.avoid += after.avoid


def _rivals(
    there: list[Execution], active: list[Execution], sight: Sight
) -> tuple[Execution, list[Execution]]:
    """Of several attempts that are there, the one that speaks for the slot, and those that lost
    already. Both may go on: then the first accepted result decides."""
    rule, newest = sight.policy.reconcile, there[-1]
    ends = sight.job.spec.type.runs_to_completion
    if not ends and any(sight.is_draining(e) for e in there):
        return _running_rivals(there, sight)  # it moves house; nobody was cut off
    if rule == "keepReplacement":
        return newest, [e for e in active if e.spec.attempt < newest.spec.attempt]
    if len(there) == 1:
        return newest, []
    if rule == "keepOriginal":
        keep = next((e for e in there if sight.is_heard(e)), there[0])
        is_sure = sight.settles_at(keep) is None
        if is_sure and (ends or sight.is_running(keep)):
            return keep, [e for e in there if e is not keep]
        return keep, []
    return (newest, []) if ends else _running_rivals(there, sight)


def _running_rivals(there: list[Execution], sight: Sight) -> tuple[Execution, list[Execution]]:
    """A service's results are not accepted, so who runs first stays, and of two that run the
    newer one; what is on a node that is being drained serves only until another one does."""
    running = [e for e in reversed(there) if sight.is_running(e)]
    staying = [e for e in running if not sight.is_draining(e)]
    if staying:
        return staying[0], [e for e in there if e is not staying[0]]
    return (running or there)[0], []


def _stopping(execution: Execution) -> Look:
    if execution.status.contact is not Contact.REACHABLE:
        until, why = _silence(execution)
        return Look(Is.ABSENT, execution, until=until, why=why)
    waiting = execution.status.waiting
    why = f"node {execution.spec.node} is to confirm the stop"
    return Look(Is.STOPPING, execution, until=waiting.until if waiting else None, why=why)


def _silence(execution: Execution) -> tuple[datetime | None, str]:
    """Until when a silent node is waited for, and why; in the execution reconciler's words."""
    waiting = execution.status.waiting
    if waiting is None:
        return None, f"node {execution.spec.node} is not heard from"
    what = "is replaced after that" if waiting.until else "its work is kept for it"
    return waiting.until, f"{waiting.message}; {what}"


def _ended(view: SlotView, sight: Sight) -> Look:
    """Nothing of the slot is there: what follows the last attempt?"""
    job, retry = sight.job, sight.job.spec.retry
    charged = charged_so_far(view, job)
    mattering = [e for e in view.attempts if not e.spec.superseded] or view.attempts
    if not mattering:
        return Look(Is.NEEDED)
    last = mattering[-1]
    avoid = () if job.spec.type.is_per_node else (last.spec.node,)
    if not last.phase.is_final or is_forgiven(last, job):
        return Look(Is.NEEDED, last, charged=charged, avoid=avoid)
    end = end_of(last, retry)
    if end is End.STOPPED:
        return Look(Is.NEEDED, last, charged=charged)
    if _is_last(last, end, charged, job):
        return Look(Is.FAILED, last, charged=charged, end=end)
    before = max((e.spec.attempt + 1 for e in view.attempts if is_forgiven(e, job)), default=0)
    uncharged = last.spec.attempt + 1 - before - charged
    if not job.spec.type.runs_to_completion:
        # The node restarts a service by itself; that it gave up counts like a failure, and a
        # long run before it starts the row of failures anew.
        is_long = run_time(last).total_seconds() >= sight.settings.long_run_seconds
        charged = uncharged = 1 if is_long else last.spec.charged + 1
        end = End.FAULT if end is not End.REJECTED else end
    name = execution_name(job.name, job.metadata.uid, view.slot, view.next_attempt)
    pause = pause_seconds(
        end,
        charged=charged,
        uncharged=uncharged,
        retry=retry,
        settings=sight.settings,
        name=name,
    )
    until = pause_starts(last, sight.now) + timedelta(seconds=pause)
    state = Is.PAUSED if until > sight.now else Is.NEEDED
    why = f"attempt {last.spec.attempt} ended as {reason_of(last)}; the next follows after a pause"
    return Look(state, last, charged=charged, avoid=avoid, until=until, why=why, end=end)


def _is_last(last: Execution, end: End, charged: int, job: Job) -> bool:
    """Whether a slot gets no further attempt after this end."""
    spec = job.spec
    if end is End.FAULT:
        return False
    if end is End.REJECTED:
        # The slot of an ops job is this very node. A daemon's node may change its mind later.
        return spec.type is JobType.OPS
    if end is End.FAILED_FOR_GOOD:
        return True
    match spec.type:
        case JobType.BATCH:
            return charged >= spec.retry.attempts
        case JobType.OPS:
            return True
        case _:
            return end is End.FAILED and spec.restart.policy == "never"


def reason_of(execution: Execution) -> str:
    """How an attempt ended, in few words: `Failed, exit code 3 (OutOfMemory: ...)`."""
    report = execution.status.report
    if report is None:
        return "unknown"
    text = str(report.phase)
    if report.exit_code is not None:
        text += f", exit code {report.exit_code}"
    # A program that just ended has no more to be said of it than its exit code.
    if report.message == f"exit code {report.exit_code}":
        return text
    if report.reason or report.message:
        text += f" ({': '.join(filter(None, (report.reason, report.message)))})"
    return text
