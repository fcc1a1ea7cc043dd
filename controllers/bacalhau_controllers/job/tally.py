"""Counts the slots of a job, and acts on what a look at each of them found."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from bacalhau_api.v1.execution import Desired, Execution, Phase
from bacalhau_api.v1.node import Membership
from bacalhau_controllers.job.draft import JOB_RECONCILER, Draft
from bacalhau_controllers.job.look import Is, Look, Sight, reason_of
from bacalhau_controllers.job.owned import SlotView
from bacalhau_controllers.job.retry import STOP_EXECUTION_TIMEOUT, End


@dataclass(slots=True)
class Tally:
    """How many slots are in which state. `failure` is the first that failed, in words."""

    total: int = 0
    waiting: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    failure: str = ""
    is_fatal: bool = False
    """An exit rule says that the whole job failed."""
    is_settled: bool = True
    """False while results are known that did not fit into this plan."""

    def settle(self, view: SlotView, found: Look, draft: Draft) -> bool:
        """Count one slot and do what is due about it. True if it needs a new attempt now."""
        for loser in found.losers:
            draft.stop(loser, "Superseded", superseded=True)
        match found.state:
            case Is.ACCEPTED:
                self.succeeded += 1
            case Is.DONE:
                assert found.execution is not None
                if draft.take_result(found.execution, publishes=True):
                    self.succeeded += 1
                else:
                    self.running += 1
                    self.is_settled = False
            case Is.LIVE:
                assert found.execution is not None
                self.running += 1
                if found.until is not None:
                    draft.look_again(found.until)
                _wait_for_end(found.execution, draft)
            case Is.ABSENT:
                self.running += 1
                _wait_for_contact(found, draft)
            case Is.STOPPING:
                assert found.execution is not None
                self.waiting += 1
                node = found.execution.spec.node
                draft.wait("Stop", found.why, mover=f"node {node}", until=found.until, wakes=False)
            case Is.PAUSED:
                self.waiting += 1
                draft.wait("Retry", f"slot {view.slot}: {found.why}", until=found.until)
            case Is.FAILED:
                self.failed += 1
                self.is_fatal |= found.end is End.FAILED_FOR_GOOD
                if not self.failure:
                    self.failure = describe_failure(view, found)
            case Is.NEEDED:
                return True
        return False

    def add(self, placed: Execution | None, draft: Draft) -> bool:
        """Count a slot that needed an attempt: it was placed, or has to wait."""
        if placed is None:
            self.waiting += 1
            return False
        self.running += 1
        _wait_for_end(placed, draft)
        return True


def describe_failure(view: SlotView, found: Look) -> str:
    """Slot, how it ended, where, and what the node said."""
    last = found.execution
    if last is None:
        return f"slot {view.slot}: {found.why}"
    tries = f" after {found.charged} attempts" if found.charged > 1 else ""
    return f"slot {view.slot} on node {last.spec.node}: {reason_of(last)}{tries}"


def _wait_for_end(execution: Execution, draft: Draft) -> None:
    # The same words from placement to end: a job's status is not written for each step of a node.
    node = execution.spec.node
    draft.wait("Executions", f"{execution.name} is on {node}", mover=f"node {node}")


def started_at(execution: Execution, now: datetime) -> datetime:
    """When it started, by the node's clock if that can be right, else when it was made."""
    made = execution.metadata.creation_timestamp or now
    report = execution.status.report
    started = report.started_at if report else None
    return started if started is not None and made <= started <= now else made


def _wait_for_contact(found: Look, draft: Draft) -> None:
    execution = found.execution
    assert execution is not None
    node = execution.spec.node
    # When that is over, the execution changes, and with it the job is looked at again.
    mover = f"node {node}" if found.until is None else JOB_RECONCILER
    draft.wait("Contact", found.why, mover=mover, until=found.until, wakes=False)


def enforced(view: SlotView, draft: Draft, sight: Sight) -> SlotView:
    """The slot as it is once what must not go on was told to stop: what is on a node that was
    rejected or removed, and what runs for too long. Both are the node's part first, so these are
    backstops."""
    for execution in view.attempts:
        if execution.phase.is_final or execution.spec.desired is Desired.STOP:
            continue
        if reason := _must_stop(execution, draft, sight):
            draft.stop(execution, reason)
    return draft.seen(view)


def _must_stop(execution: Execution, draft: Draft, sight: Sight) -> str:
    node = sight.node(execution)
    if node is None:
        return "NodeRemoved"
    if node.spec.membership is Membership.REJECTED:
        return "NodeRejected"
    timeout = execution.spec.task.timeouts.execution_timeout
    # A service's timeout is that of one run; the node ends it and begins the next.
    is_one_run = execution.spec.job_type.runs_to_completion
    if timeout and is_one_run and execution.phase is Phase.RUNNING:
        grace = sight.settings.timeout_grace_seconds
        until = started_at(execution, sight.now) + timedelta(seconds=timeout + grace)
        if until <= sight.now:
            return STOP_EXECUTION_TIMEOUT
        draft.look_again(until)
    return ""
