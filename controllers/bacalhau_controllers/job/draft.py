"""A plan in the making: what is to be written, and what is waited for. Bounded.

One commit takes a limited number of writes, and of bytes. What does not fit is left for the next
reconcile, which follows at once; since plans are made from what is stored, nothing is forgotten.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime

from bacalhau_api.meta import Ref, Waiting
from bacalhau_api.v1.execution import Acceptance, Execution, Publication
from bacalhau_api.v1.job import Job, Verdict
from bacalhau_controllers.job.allowance import Allowance
from bacalhau_controllers.job.owned import SlotView
from bacalhau_controllers.job.settings import JobSettings
from bacalhau_controllers.job.slots import (
    JobView,
    new_acceptance,
    new_publication,
    stopped,
)
from bacalhau_controllers.placement import Request
from bacalhau_controllers.store import Delete, Put, Write

JOB_RECONCILER = "job reconciler"


@dataclass(frozen=True, slots=True)
class Queued:
    """The job waits for a place: what it asks for, and for how many slots."""

    request: Request
    slots: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done about one job. An empty plan means that all is as it should be.

    `job` is the job with its new status (and finalizers), None if unchanged; with `removes_job` it
    is deleted instead. `is_over_quota`: it waits for room in its namespace. `blocked_on`: nodes on
    which a new generation lacks room even where the old one is. `requeue_after` is in seconds.
    """

    job: Job | None = None
    removes_job: Job | None = None
    create: tuple[Execution, ...] = ()
    update: tuple[Execution, ...] = ()
    accept: tuple[Acceptance, ...] = ()
    publish: tuple[Publication, ...] = ()
    delete: tuple[Execution | Acceptance | Publication, ...] = ()
    queued: Queued | None = None
    is_over_quota: bool = False
    blocked_on: frozenset[str] = frozenset()
    requeue_after: float | None = None
    reason: str = ""
    message: str = ""

    def writes(self) -> tuple[Write, ...]:
        """All of it as one commit."""
        writes: list[Write] = [Put(item, 0) for item in (*self.create, *self.accept, *self.publish)]
        writes += [Put(e, e.metadata.resource_version) for e in self.update]
        writes += [Delete(d.ref, d.metadata.resource_version) for d in self.delete]
        if self.job is not None:
            writes.append(Put(self.job, self.job.metadata.resource_version))
        if self.removes_job is not None:
            gone = self.removes_job
            writes.append(Delete(gone.ref, gone.metadata.resource_version))
        return tuple(writes)


# Of several waits the job's status names the one that most needs attention.
_URGENCY = ("Quota", "Capacity", "Contact", "Stop", "Rollout", "Retry", "Executions")


# What is said of several at once, where their order is no matter.
_PLURAL = {"Executions": "executions are under way"}


@dataclass(slots=True)
class _Wait:
    count: int
    until: datetime | None
    message: str
    mover: str


@dataclass(slots=True)
class Draft:
    """Collects the parts of a Plan for one job."""

    view: JobView
    settings: JobSettings
    now: datetime
    allowance: Allowance | None = None
    create: dict[str, Execution] = field(default_factory=dict)
    update: dict[str, Execution] = field(default_factory=dict)
    accept: list[Acceptance] = field(default_factory=list)
    publish: list[Publication] = field(default_factory=list)
    delete: dict[Ref, Execution | Acceptance | Publication] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    queued: Queued | None = None
    is_over_quota: bool = False
    blocked_on: set[str] = field(default_factory=set)
    is_full: bool = False
    wake_at: datetime | None = None
    waits: dict[str, _Wait] = field(default_factory=dict)
    _used: int = 1  # the job's own status
    _bytes: int = 0
    _bytes_each: int = 0

    @property
    def job(self) -> Job:
        """The job as it is stored."""
        return self.view.job

    def has_room(self, writes: int = 1) -> bool:
        """Whether so many writes still fit; if not, the rest has to follow in another plan."""
        is_heavy = self._bytes >= self.settings.bytes_max
        if is_heavy or self._used + writes > self.settings.writes_max:
            self.is_full = True
        return not self.is_full

    def add(self, execution: Execution) -> None:
        """Create an execution. Call after `has_room`."""
        self._used += 1
        if not self.create:  # the others are as large as the first, give or take a name
            self._bytes_each = len(execution.encode())
        self._bytes += self._bytes_each
        self.create[execution.name] = execution

    def stop(
        self,
        execution: Execution,
        reason: str,
        *,
        superseded: bool = False,
        is_sure: bool = False,
    ) -> None:
        """Have an execution stop, unless it was told so before. `is_sure`: `has_room` was asked."""
        old = self.update.get(execution.name, execution)
        new = stopped(old, reason, superseded=superseded)
        if new == old:
            return
        if execution.name not in self.update:
            if not is_sure and not self.has_room():
                return
            self._used += 1
            self._bytes += len(new.encode())
        self.update[execution.name] = new

    def seen(self, view: SlotView) -> SlotView:
        """A slot as it is once this plan's stops are told."""
        if not any(e.name in self.update for e in view.attempts):
            return view
        attempts = [self.update.get(e.name, e) for e in view.attempts]
        return SlotView(view.slot, attempts, view.acceptance)

    def stop_all(self, executions: Iterable[Execution], reason: str) -> None:
        """Have several stop."""
        for execution in executions:
            self.stop(execution, reason)

    def take_result(self, execution: Execution, *, publishes: bool) -> bool:
        """Accept an execution's result and have it delivered. False if it has to wait."""
        if not self.has_room(2):
            return False
        self._used += 2
        acceptance = new_acceptance(self.job, execution, self.now)
        self._bytes += len(acceptance.encode())  # it has the job's labels
        self.accept.append(acceptance)
        publication = new_publication(self.job, execution, self.now) if publishes else None
        if publication is not None and publication.name not in self.view.publications:
            self._bytes += len(publication.encode())
            self.publish.append(publication)
        return True

    def remove(self, item: Execution | Acceptance | Publication) -> None:
        """Delete an object."""
        if item.ref in self.delete or not self.has_room():
            return
        if self.update.pop(item.name, None) is None:
            self._used += 1
        self.delete[item.ref] = item

    def wait(
        self,
        what: str,
        message: str,
        *,
        mover: str = JOB_RECONCILER,
        until: datetime | None = None,
        wakes: bool = True,
        count: int = 1,
    ) -> None:
        """Note that something is waited for. With `wakes` the job is looked at when it is over."""
        if wakes and until is not None:
            self.look_again(until)
        known = self.waits.get(what)
        if known is None:
            self.waits[what] = _Wait(count, until, message, mover)
            return
        known.count += count
        known.until = min(filter(None, (known.until, until)), default=None)

    def look_again(self, at: datetime) -> None:
        """Have the job looked at again at a time."""
        self.wake_at = at if self.wake_at is None else min(at, self.wake_at)

    def waiting(self, *, since: datetime) -> Waiting | None:
        """The most urgent wait; `since` is when it began, if it is a new one."""
        for what in sorted(self.waits, key=_urgency):
            wait = self.waits[what]
            message, mover = wait.message, wait.mover
            if wait.count > 1 and what in _PLURAL:
                message, mover = f"{wait.count} {_PLURAL[what]}", "nodes"
            elif wait.count > 1:
                message += f" (and {wait.count - 1} more)"
            return Waiting(what=what, message=message, since=since, until=wait.until, mover=mover)
        if self.is_full:
            text = "there is more to do than fits into one commit; it goes on at once"
            return Waiting(what="Work", message=text, since=since, mover=JOB_RECONCILER)
        return None

    def finish(self, job: Job, *, reason: str, message: str = "") -> Plan:
        """The plan, with the job as it should be stored."""
        requeue: float | None = None
        if self.is_full:
            requeue = 0.0
        elif self.wake_at is not None:
            requeue = max((self.wake_at - self.now).total_seconds(), 0.0)
        return Plan(
            job=job if job != self.job else None,
            create=tuple(self.create.values()),
            update=tuple(self.update.values()),
            accept=tuple(self.accept),
            publish=tuple(self.publish),
            delete=tuple(self.delete.values()),
            queued=self.queued,
            is_over_quota=self.is_over_quota,
            blocked_on=frozenset(self.blocked_on),
            requeue_after=requeue,
            reason=reason,
            message=message,
        )


def _urgency(what: str) -> int:
    return _URGENCY.index(what) if what in _URGENCY else len(_URGENCY)


def without_job(plan: Plan, job: Job) -> Plan:
    """The same plan, with the job itself removed."""
    return replace(plan, job=None, removes_job=job)
