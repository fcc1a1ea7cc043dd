"""The slots of a job and what is in them; and the objects that go there, by derived names."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from bacalhau_api.meta import ObjectMeta, OwnerReference
from bacalhau_api.v1.execution import (
    Acceptance,
    AcceptanceSpec,
    Desired,
    Execution,
    ExecutionSpec,
    Publication,
    PublicationPhase,
    PublicationSpec,
    Slot,
    acceptance_name,
    execution_name,
)
from bacalhau_api.v1.job import Job
from bacalhau_controllers.disconnect import effective_disconnect
from bacalhau_controllers.placement import delivery

SlotKey = int | str
"""A partition, or for ops and daemon jobs a node."""


def key_of(slot: Slot) -> SlotKey:
    """The key of a slot within its generation."""
    return slot.node or slot.partition


@dataclass(slots=True)
class SlotView:
    """What is in one slot: its attempts in order, and the accepted result."""

    slot: Slot
    attempts: list[Execution] = field(default_factory=list)
    acceptance: Acceptance | None = None

    @property
    def next_attempt(self) -> int:
        """The number that a new attempt gets."""
        return self.attempts[-1].spec.attempt + 1 if self.attempts else 0

    @property
    def active(self) -> list[Execution]:
        """The attempts whose end was not reported."""
        return [e for e in self.attempts if not e.phase.is_final]


class JobView:
    """All that a job owns, by generation and slot."""

    def __init__(
        self,
        job: Job,
        executions: Iterable[Execution],
        acceptances: Iterable[Acceptance],
        publications: Iterable[Publication],
    ) -> None:
        self.job = job
        self.generation = job.metadata.generation
        self.slots: dict[SlotKey, SlotView] = {}
        self.older: dict[int, dict[SlotKey, SlotView]] = {}
        self.publications: dict[str, Publication] = {p.name: p for p in publications}
        for execution in executions:
            self._view(execution.spec.slot).attempts.append(execution)
        for acceptance in acceptances:
            self._view(acceptance.spec.slot).acceptance = acceptance
        for slots in (self.slots, *self.older.values()):
            for view in slots.values():
                if len(view.attempts) > 1:
                    view.attempts.sort(key=lambda e: e.spec.attempt)

    def slot(self, key: SlotKey) -> SlotView:
        """One slot of the current generation, empty if nothing was ever in it."""
        view = self.slots.get(key)
        if view is not None:
            return view
        if isinstance(key, str):
            return SlotView(Slot(generation=self.generation, node=key))
        return SlotView(Slot(generation=self.generation, partition=key))

    def older_active(self) -> list[Execution]:
        """What earlier generations have not ended yet."""
        return [e for slots in self.older.values() for v in slots.values() for e in v.active]

    def active(self) -> list[Execution]:
        """What has not ended yet, of all generations."""
        return [e for v in self.slots.values() for e in v.active] + self.older_active()

    def count_delivered(self) -> int:
        """How many publications of the current generation arrived."""
        return sum(
            p.spec.slot.generation == self.generation
            and p.status.phase is PublicationPhase.DELIVERED
            for p in self.publications.values()
        )

    def _view(self, slot: Slot) -> SlotView:
        slots = self.slots
        if slot.generation != self.generation:
            slots = self.older.setdefault(slot.generation, {})
        key = slot.node or slot.partition
        view = slots.get(key)
        if view is None:
            view = slots[key] = SlotView(slot)
        return view


def _meta(job: Job, name: str, now: datetime) -> ObjectMeta:
    # A name may come back after its object was deleted (a daemon's node that left and returned);
    # the identity must not. The time of creation makes it new, without randomness.
    identity = f"{job.metadata.uid}/{name}/{now.isoformat()}"
    return ObjectMeta(
        name=name,
        namespace=job.metadata.namespace,
        uid=hashlib.sha256(identity.encode()).hexdigest()[:32],
        labels=job.metadata.labels,
        creation_timestamp=now,
        owner_references=(OwnerReference(kind=job.kind, name=job.name, uid=job.metadata.uid),),
    )


def new_execution(
    job: Job, slot: Slot, attempt: int, *, node: str, charged: int, now: datetime
) -> Execution:
    """One attempt at a slot on a node, with all that the node needs."""
    spec, uid = job.spec, job.metadata.uid
    policy = effective_disconnect(spec)
    return Execution(
        metadata=_meta(job, execution_name(job.name, uid, slot, attempt), now),
        spec=ExecutionSpec(
            job=job.name,
            job_uid=uid,
            job_type=spec.type,
            slot=slot,
            attempt=attempt,
            charged=charged,
            partition_count=1 if spec.type.is_per_node else spec.count,
            node=node,
            task=spec.task,
            retry=spec.retry,
            restart=spec.restart,
            local_deadline_seconds=policy.after_seconds if policy.action == "stop" else None,
        ),
    )


def new_acceptance(job: Job, execution: Execution, now: datetime) -> Acceptance:
    """The claim of one execution's result to its slot."""
    spec = execution.spec
    return Acceptance(
        metadata=_meta(job, acceptance_name(spec.job, spec.job_uid, spec.slot), now),
        spec=AcceptanceSpec(
            job=spec.job,
            job_uid=spec.job_uid,
            slot=spec.slot,
            execution=execution.name,
            execution_uid=execution.metadata.uid,
            node=spec.node,
            time=now,
        ),
    )


def new_publication(job: Job, execution: Execution, now: datetime) -> Publication | None:
    """The delivery of an accepted result; None if the task has nowhere to deliver to."""
    spec = execution.spec
    target = delivery(spec.task)
    if target is None:
        return None
    return Publication(
        metadata=_meta(job, execution.name, now),
        spec=PublicationSpec(
            job=spec.job,
            job_uid=spec.job_uid,
            execution=execution.name,
            execution_uid=execution.metadata.uid,
            node=spec.node,
            slot=spec.slot,
            publisher=target,
        ),
    )


def stopped(execution: Execution, reason: str, *, superseded: bool) -> Execution:
    """The same execution with the wish that it stops. The first reason stands."""
    spec = execution.spec
    if spec.desired is Desired.RUN:
        spec = spec.but(desired=Desired.STOP, stop_reason=reason)
    if superseded and not spec.superseded:
        spec = spec.but(superseded=True)
    return execution.but(spec=spec)


def names(executions: Sequence[Execution]) -> str:
    """Up to three names, for messages."""
    shown = ", ".join(e.name for e in executions[:3])
    return f"{shown} and {len(executions) - 3} more" if len(executions) > 3 else shown
