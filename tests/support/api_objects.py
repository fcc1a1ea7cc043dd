"""Objects for tests of the API, its client and the command line."""

from datetime import UTC, datetime

from bacalhau_api.meta import Contact, ObjectMeta, OwnerReference
from bacalhau_api.v1.execution import (
    Acceptance,
    AcceptanceSpec,
    Execution,
    ExecutionSpec,
    ExecutionStatus,
    Outputs,
    Phase,
    Report,
    Slot,
    acceptance_name,
    execution_name,
)
from bacalhau_api.v1.job import Job, JobPhase, JobSpec, JobStatus, JobType, SpecConfig, Task
from bacalhau_api.v1.node import Membership, Node, NodeSpec, NodeStatus

T0 = datetime(2026, 1, 31, 12, tzinfo=UTC)


def make_job(name: str = "a", *, count: int = 1, labels: dict[str, str] | None = None) -> Job:
    """A batch job as a user writes it."""
    task = Task(engine=SpecConfig(type="noop"))
    spec = JobSpec(type=JobType.BATCH, count=count, tasks=(task,))
    return Job(metadata=ObjectMeta(name=name, labels=labels or {}), spec=spec)


def stored_job(name: str = "a", *, count: int = 1, phase: JobPhase = JobPhase.PENDING) -> Job:
    """A job as it is stored, looked at by its reconciler."""
    job = make_job(name, count=count)
    status = JobStatus(observed_generation=1, phase=phase)
    return job.but(status=status).with_meta(
        uid=f"{name:0>8}".encode().hex(), generation=1, creation_timestamp=T0
    )


def owner_of(job: Job) -> OwnerReference:
    """A reference to a job."""
    return OwnerReference(kind="Job", name=job.name, uid=job.metadata.uid)


def make_execution(
    job: Job,
    partition: int = 0,
    *,
    attempt: int = 0,
    node: str = "n1",
    phase: Phase = Phase.PENDING,
    exit_code: int | None = None,
    outputs: Outputs | None = None,
    stdout_tail: str = "",
) -> Execution:
    """One attempt of a partition."""
    slot = Slot(generation=job.metadata.generation, partition=partition)
    name = execution_name(job.name, job.metadata.uid, slot, attempt)
    spec = ExecutionSpec(
        job=job.name,
        job_uid=job.metadata.uid,
        job_type=job.spec.type,
        slot=slot,
        attempt=attempt,
        node=node,
        task=job.spec.task,
    )
    report = Report(
        step=1,
        incarnation="i",
        phase=phase,
        exit_code=exit_code,
        outputs=outputs,
        stdout_tail=stdout_tail,
        started_at=T0,
    )
    return Execution(
        metadata=ObjectMeta(
            name=name, uid=f"uid-{name}", creation_timestamp=T0, owner_references=(owner_of(job),)
        ),
        spec=spec,
        status=ExecutionStatus(report=None if phase is Phase.PENDING else report),
    )


def make_acceptance(execution: Execution, job: Job) -> Acceptance:
    """The acceptance of an execution's result."""
    slot = execution.spec.slot
    spec = AcceptanceSpec(
        job=job.name,
        job_uid=job.metadata.uid,
        slot=slot,
        execution=execution.name,
        execution_uid=execution.metadata.uid,
        node=execution.spec.node,
        time=T0,
    )
    name = acceptance_name(job.name, job.metadata.uid, slot)
    meta = ObjectMeta(name=name, uid=f"uid-{name}", owner_references=(owner_of(job),))
    return Acceptance(metadata=meta, spec=spec)


def make_node(name: str = "n1", *, contact: Contact = Contact.REACHABLE) -> Node:
    """An approved node."""
    return Node(
        metadata=ObjectMeta(name=name, namespace="", uid=f"uid-{name}", creation_timestamp=T0),
        spec=NodeSpec(membership=Membership.APPROVED, public_key="U" + "A" * 55),
        status=NodeStatus(contact=contact, contact_since=T0),
    )
