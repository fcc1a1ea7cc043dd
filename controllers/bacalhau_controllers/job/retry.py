"""What the end of one attempt means, and when the next may start.

Failures of the workload are charged to the user's budget of attempts; faults of the system
(engine broken, node lost, node refused) are not, but their pauses grow too, so that nothing spins.
The jitter of a pause is derived from the name of the attempt that it precedes: the same for every
reader, different for every attempt.
"""

from datetime import datetime, timedelta
from enum import Enum, auto
from typing import Final

from bacalhau_api.v1.execution import Desired, Execution, Phase
from bacalhau_api.v1.job import RetryPolicy
from bacalhau_controllers.job.settings import JobSettings
from bacalhau_controllers.placement.table import unit_hash

STOP_EXECUTION_TIMEOUT: Final = "ExecutionTimeout"
"""The one reason for a stop that is the workload's own fault."""

_REJECTED_PAUSE_SECONDS_MAX: Final = 10.0
_REJECTED_MANY: Final = 100
_DOUBLINGS_MAX: Final = 32
_PAUSE_SECONDS_MAX: Final = 2 * 86400.0
"""Longer than any pause: the longest backoff that a spec may ask for is a day, before jitter."""


class End(Enum):
    """How a reported end is taken."""

    SUCCEEDED = auto()
    FAILED = auto()  # by the workload; charged
    FAILED_FOR_GOOD = auto()  # an exit rule says that retrying is useless
    FAULT = auto()  # by the system; not charged
    REJECTED = auto()  # the node refused; not charged, and not asked again
    STOPPED = auto()  # because it was asked to; not charged


def end_of(execution: Execution, retry: RetryPolicy) -> End:
    """Classify a final attempt."""
    report, spec = execution.status.report, execution.spec
    assert report is not None
    assert report.phase.is_final
    if report.phase is Phase.SUCCEEDED:
        return End.SUCCEEDED
    if report.phase is Phase.REJECTED:
        return End.REJECTED
    if spec.desired is Desired.STOP:
        return End.FAILED if spec.stop_reason == STOP_EXECUTION_TIMEOUT else End.STOPPED
    if report.is_system_fault or report.phase is Phase.STOPPED:
        return End.FAULT
    for rule in retry.exit_rules:
        if report.exit_code is not None and report.exit_code in rule.codes:
            return End.FAILED_FOR_GOOD if rule.action == "fail" else End.FAILED
    return End.FAILED


def is_charged(execution: Execution, retry: RetryPolicy) -> bool:
    """Whether an attempt counts against the user's budget."""
    if not execution.phase.is_final:
        return False
    return end_of(execution, retry) in (End.FAILED, End.FAILED_FOR_GOOD)


def pause_seconds(
    end: End, *, charged: int, uncharged: int, retry: RetryPolicy, settings: JobSettings, name: str
) -> float:
    """How long to wait before the attempt `name`. `charged` and `uncharged` count the attempts of
    the slot so far, the one that ended included."""
    if end is End.STOPPED:
        return 0.0
    if end is End.REJECTED:
        # Each refusal takes one node out, so the first costs nothing.
        most = _REJECTED_PAUSE_SECONDS_MAX
        if uncharged > _REJECTED_MANY:
            most = settings.fault_backoff_seconds_max
        pause = 0.0 if uncharged <= 1 else _doubled(0.1, uncharged - 1, most)
    elif end is End.FAULT:
        least = max(retry.backoff_seconds, settings.fault_backoff_seconds)
        most = max(retry.backoff_seconds_max, settings.fault_backoff_seconds_max)
        pause = _doubled(least, uncharged, most)
    else:
        pause = _doubled(retry.backoff_seconds, charged, retry.backoff_seconds_max)
    return pause * (0.8 + 0.4 * unit_hash(name))


def pause_starts(execution: Execution, now: datetime) -> datetime:
    """From when a pause is counted: the end as the node tells it, unless the node's clock is
    plainly wrong; then from when the attempt was made."""
    made = execution.metadata.creation_timestamp or now
    if made > now:
        # The clock of the orchestrator was set back since, by who knows how much: better too short
        # a pause, once, than one of hours.
        return now - timedelta(seconds=_PAUSE_SECONDS_MAX)
    report = execution.status.report
    ended = report.finished_at if report else None
    return ended if ended is not None and made <= ended <= now else made


def run_time(execution: Execution) -> timedelta:
    """How long an attempt ran, by its node's own clock."""
    report = execution.status.report
    if report is None or report.started_at is None or report.finished_at is None:
        return timedelta(0)
    return max(report.finished_at - report.started_at, timedelta(0))


def _doubled(first: float, count: int, most: float) -> float:
    return min(first * 2.0 ** min(max(count - 1, 0), _DOUBLINGS_MAX), most)
