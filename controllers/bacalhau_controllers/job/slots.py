"""One job with what is in its slots; and the objects that go there, by derived names."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from datetime import datetime

from bacalhau_api.meta import ObjectMeta, OwnerReference
from bacalhau_api.v1.execution import (
    Acceptance,
    AcceptanceSpec,
    Desired,
    Execution,
    ExecutionSpec,
    Publication,
    PublicationSpec,
    Slot,
    acceptance_name,
    execution_name,
)
from bacalhau_api.v1.job import Job
from bacalhau_controllers.disconnect import EffectiveDisconnect, effective_disconnect
from bacalhau_controllers.execution.plan import as_made
from bacalhau_controllers.job.owned import Group, Owned, SlotKey, SlotView
from bacalhau_controllers.placement import delivery


class JobView:
    """A job and what it owns: the current generation, and the earlier ones."""

    def __init__(self, job: Job, owned: Owned) -> None:
        self.job = job
        self.generation = job.metadata.generation
        self.current = owned.groups.get(self.generation) or Group()
        self.older = {n: owned.groups[n] for n in sorted(owned.groups) if n != self.generation}
        self.publications = owned.publications

    def slot(self, key: SlotKey) -> SlotView:
        """One slot of the current generation, empty if nothing was ever in it."""
        view = self.current.slots.get(key)
        if view is not None:
            return view
        if isinstance(key, str):
            return SlotView(Slot(generation=self.generation, node=key))
        return SlotView(Slot(generation=self.generation, partition=key))

    def older_active(self) -> list[Execution]:
        """What earlier generations have not ended yet."""
        return [e for number in sorted(self.older) for e in self.older[number].active()]

    def active(self) -> list[Execution]:
        """What has not ended yet, of all generations."""
        return self.current.active() + self.older_active()


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
    job: Job,
    slot: Slot,
    attempt: int,
    *,
    node: str,
    charged: int,
    now: datetime,
    pins: Mapping[str, str] | None = None,
    stop_seconds_min: float = 0.0,
) -> Execution:
    """One attempt at a slot on a node, with all that the node needs."""
    spec, uid = job.spec, job.metadata.uid
    policy = effective_disconnect(spec)
    made = Execution(
        metadata=_meta(job, execution_name(job.name, uid, slot, attempt), now),
        spec=ExecutionSpec(
            job=job.name,
            job_uid=uid,
            job_type=spec.type,
            slot=slot,
            attempt=attempt,
            charged=charged,
            partition_count=1 if spec.type.is_per_node else spec.count,
            retry_nonce=spec.retry_nonce,
            node=node,
            task=spec.task,
            pins=dict(pins or {}),
            retry=spec.retry,
            restart=spec.restart,
            local_deadline_seconds=_local_deadline(policy, stop_seconds_min),
        ),
    )
    return as_made(made, now)


def _local_deadline(policy: EffectiveDisconnect, seconds_min: float) -> int | None:
    """When the node stops the work by its own clock; not before it can know that it is cut off."""
    if policy.action != "stop" or policy.after_seconds is None:
        return None
    return max(policy.after_seconds, math.ceil(seconds_min))


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
