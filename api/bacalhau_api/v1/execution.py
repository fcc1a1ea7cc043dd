"""Execution: one attempt at one slot of a job on one node.

The spec is written by the job reconciler. `status.report` is what the node said, merged by
`merge_report`; contact and waiting are the orchestrator's own words and never overwrite it.
"""

from enum import StrEnum
from typing import Literal

from pydantic import Field

from bacalhau_api.base import Model, Timestamp
from bacalhau_api.meta import Condition, Contact, ObjectMeta, Resource, Waiting
from bacalhau_api.v1.job import JobType, RestartPolicy, RetryPolicy, SpecConfig, Task


class Phase(StrEnum):
    """How far an execution is, as reported by its node only."""

    PENDING = "Pending"  # not reported yet
    PREPARING = "Preparing"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    STOPPED = "Stopped"
    REJECTED = "Rejected"

    @property
    def is_final(self) -> bool:
        """True for phases that an execution never leaves."""
        return self in _FINAL


_FINAL = frozenset({Phase.SUCCEEDED, Phase.FAILED, Phase.STOPPED, Phase.REJECTED})
_ORDER = {Phase.PENDING: 0, Phase.PREPARING: 1, Phase.RUNNING: 2}


class Desired(StrEnum):
    """What the node should do about an execution."""

    RUN = "Run"
    STOP = "Stop"


class Slot(Model):
    """The place for exactly one result: a partition (batch, service) or a node (ops, daemon)."""

    generation: int
    partition: int = 0
    node: str = Field(default="", description="Set for ops and daemon jobs.")

    def __str__(self) -> str:
        return self.node or str(self.partition)


class ExecutionSpec(Model):
    """All that the node needs, so that it never has to ask. Immutable but for the last three."""

    job: str
    job_uid: str
    job_type: JobType
    slot: Slot
    attempt: int = Field(default=0, ge=0)
    charged: int = Field(default=0, ge=0, description="Earlier attempts charged to the user.")
    partition_count: int = 1
    retry_nonce: str = Field(
        default="", description="The job's when it was made; others' failures are forgiven."
    )
    node: str
    task: Task
    pins: dict[str, str] = Field(
        default_factory=dict,
        description="What an earlier attempt of this generation resolved references to.",
    )
    retry: RetryPolicy = RetryPolicy()
    restart: RestartPolicy = RestartPolicy()
    local_deadline_seconds: int | None = Field(
        default=None,
        description="disconnect policy `stop`: the node stops it when cut off for so long.",
    )
    desired: Desired = Desired.RUN
    stop_reason: str = ""
    superseded: bool = Field(default=False, description="Another attempt's result was accepted.")


class OutputFile(Model):
    """One file among the outputs. `path` is relative to the execution's output root."""

    path: str
    size_bytes: int = 0


class Outputs(Model):
    """What an execution left on its node: totals, and a digest over paths and contents."""

    files: int = 0
    size_bytes: int = 0
    digest: str = ""


class Report(Model):
    """All that a node knows of one execution; cumulative, so that the newest says everything.

    `step` counts the changes of this report on its node. Reports of one incarnation are ordered
    by it; a final report is never replaced.
    """

    step: int = Field(ge=0)
    incarnation: str
    phase: Phase
    run: int = Field(default=0, ge=0, description="Starts on the node, restarts included.")
    reason: str = ""
    message: str = ""
    is_system_fault: bool = Field(default=False, description="Not charged to the user's budget.")
    exit_code: int | None = None
    pins: dict[str, str] = Field(
        default_factory=dict,
        description="What references of the engine's params were resolved to: `image`.",
    )
    prepared_at: Timestamp | None = None
    started_at: Timestamp | None = None
    finished_at: Timestamp | None = None
    outputs: Outputs | None = None
    stdout_tail: str = ""
    stderr_tail: str = ""
    waiting: Waiting | None = None


def merge_report(old: Report | None, new: Report) -> Report:
    """The join of two reports: commutative on one incarnation, idempotent, never backwards.

    A final report stands for ever. Otherwise a final one wins, then the further phase, then the
    later step.
    """
    if old is None:
        return new
    if old.phase.is_final or new.phase.is_final:
        # Two final reports can only differ through a fault (a cloned disk): the first stands.
        return old if old.phase.is_final else new
    mine, theirs = (_ORDER[old.phase], old.step), (_ORDER[new.phase], new.step)
    return new if theirs > mine else old


class ExecutionStatus(Model):
    """Observed state. Written by the execution reconciler only."""

    report: Report | None = None
    contact: Contact = Contact.REACHABLE
    contact_since: Timestamp | None = None
    waiting: Waiting | None = None
    conditions: tuple[Condition, ...] = ()

    @property
    def phase(self) -> Phase:
        """The reported phase; Pending while nothing was reported."""
        return self.report.phase if self.report else Phase.PENDING


class Execution(Resource):
    """One attempt."""

    kind: Literal["Execution"] = "Execution"
    metadata: ObjectMeta
    spec: ExecutionSpec
    status: ExecutionStatus = ExecutionStatus()

    @property
    def phase(self) -> Phase:
        """Shorthand for status.phase."""
        return self.status.phase

    @property
    def is_final(self) -> bool:
        """True once the node reported an end, or the node itself is lost for good."""
        return self.status.phase.is_final or self.status.contact is Contact.LOST


def execution_name(job: str, job_uid: str, slot: Slot, attempt: int) -> str:
    """The derived name: asking for the same attempt twice names the same object."""
    return f"{job}-{job_uid[:8]}-{slot.generation}-{slot}-{attempt}"


class AcceptanceSpec(Model):
    """Which execution's result the slot holds."""

    job: str
    job_uid: str
    slot: Slot
    execution: str
    execution_uid: str
    node: str
    time: Timestamp


class Acceptance(Resource):
    """The one accepted result of a slot. Created once, by name, never updated: the store itself
    refuses a second. Deleted together with its job, or with its generation."""

    kind: Literal["Acceptance"] = "Acceptance"
    metadata: ObjectMeta
    spec: AcceptanceSpec


def acceptance_name(job: str, job_uid: str, slot: Slot) -> str:
    """The derived name of a slot's acceptance."""
    return f"{job}-{job_uid[:8]}-{slot.generation}-{slot}"


class PublicationPhase(StrEnum):
    """How far outputs are on their way to a target."""

    PENDING = "Pending"
    PUBLISHING = "Publishing"
    DELIVERED = "Delivered"
    FAILED = "Failed"

    @property
    def is_final(self) -> bool:
        """True for phases that a publication never leaves."""
        return self in (PublicationPhase.DELIVERED, PublicationPhase.FAILED)


class PublicationSpec(Model):
    """Which outputs go where."""

    job: str
    job_uid: str
    execution: str
    execution_uid: str
    node: str
    slot: Slot
    publisher: SpecConfig
    desired: Desired = Desired.RUN


class PublicationReport(Model):
    """All that the node knows of one publication; cumulative, ordered by `step`."""

    step: int = Field(ge=0)
    incarnation: str
    phase: PublicationPhase
    attempts: int = 0
    reason: str = ""
    message: str = ""
    location: SpecConfig | None = Field(default=None, description="Where the outputs are now.")
    size_bytes: int = 0
    finished_at: Timestamp | None = None
    waiting: Waiting | None = None


class PublicationStatus(Model):
    """Observed state. Written by the publishing reconciler only."""

    report: PublicationReport | None = None
    contact: Contact = Contact.REACHABLE
    waiting: Waiting | None = None
    conditions: tuple[Condition, ...] = ()

    @property
    def phase(self) -> PublicationPhase:
        """The reported phase; Pending while nothing was reported."""
        return self.report.phase if self.report else PublicationPhase.PENDING


class Publication(Resource):
    """One accepted execution's outputs on their way to one target. Named like the execution."""

    kind: Literal["Publication"] = "Publication"
    metadata: ObjectMeta
    spec: PublicationSpec
    status: PublicationStatus = PublicationStatus()
