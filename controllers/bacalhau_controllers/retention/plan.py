"""Which finished jobs of a namespace have been kept for long enough: pure."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime

from bacalhau_api.v1.job import Job
from bacalhau_api.v1.retired import RetiredJob


@dataclass(frozen=True, slots=True)
class RetentionSettings:
    """How long finished jobs are kept. `finished_max` counts them per namespace; beyond it the
    oldest go first. `deletions_max` bounds one pass. `retired_*` are about what stays of them: for
    so long an unchanged file does not run again."""

    finished_seconds: float = 7 * 86400.0
    finished_max: int = 10_000
    deletions_max: int = 200
    retired_seconds: float = 400 * 86400.0
    retired_max: int = 10_000


@dataclass(frozen=True, slots=True)
class Expired:
    """A job whose time is over, and why."""

    job: Job
    reason: str


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """`expired` in order, the oldest first. `has_more`: the pass was cut short."""

    expired: tuple[Expired, ...]
    has_more: bool = False


def plan(
    jobs: Iterable[Job],
    publishing: Collection[str],
    settings: RetentionSettings,
    now: datetime,
) -> RetentionPlan:
    """Choose among the jobs of one namespace. `publishing` are the uids of jobs whose outputs are
    still on their way: those stay, however old they are, and do not count."""
    finished = [
        (ended, job)
        for job in jobs
        if (ended := _ended(job)) is not None and job.metadata.uid not in publishing
    ]
    finished.sort(key=lambda pair: (pair[0], pair[1].name))
    surplus = max(0, len(finished) - settings.finished_max)
    expired: list[Expired] = []
    for place, (ended, job) in enumerate(finished):
        if (now - ended).total_seconds() >= settings.finished_seconds:  # which may be ages
            expired.append(Expired(job, "RetentionTime"))
        elif place < surplus:
            expired.append(Expired(job, "RetentionCount"))
        else:
            break
    cut = expired[: settings.deletions_max]
    return RetentionPlan(tuple(cut), has_more=len(cut) < len(expired))


def forgotten(
    retired: Iterable[RetiredJob], settings: RetentionSettings, now: datetime
) -> tuple[RetiredJob, ...]:
    """Of what stays of the jobs of one namespace, that which has stayed for long enough."""
    found = sorted(retired, key=lambda item: (item.spec.retired_at, item.name))
    surplus = max(0, len(found) - settings.retired_max)
    gone = [
        item
        for place, item in enumerate(found)
        if place < surplus
        or (now - item.spec.retired_at).total_seconds() >= settings.retired_seconds
    ]
    return tuple(gone[: settings.deletions_max])


def _ended(job: Job) -> datetime | None:
    """When a job finished; None if it has not, or is to run again, or is being deleted already."""
    return job.status.finished_at if job.is_over and not job.is_deleting else None
