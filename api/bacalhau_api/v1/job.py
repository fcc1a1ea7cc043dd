"""Job: what a user asks for. The spec is the user's, the status the job reconciler's."""

import hashlib
import json
from enum import StrEnum
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic.alias_generators import to_camel

from bacalhau_api.base import Model, Timestamp
from bacalhau_api.meta import Condition, ObjectMeta, Resource, Waiting
from bacalhau_api.quantity import from_quantities


class JobType(StrEnum):
    """How many executions there are, where, and when the job is done."""

    BATCH = "batch"  # `count` partitions, each to one success
    OPS = "ops"  # once on each node that matches now
    SERVICE = "service"  # keep `count` running
    DAEMON = "daemon"  # keep one running on each matching node, later ones included

    @property
    def runs_to_completion(self) -> bool:
        """True for batch and ops, which end by themselves."""
        return self in (JobType.BATCH, JobType.OPS)

    @property
    def is_per_node(self) -> bool:
        """True for ops and daemon, whose slots are nodes rather than partitions."""
        return self in (JobType.OPS, JobType.DAEMON)


class SpecConfig(Model):
    """Selects an implementation (engine, storage, publisher) by type, with its parameters."""

    type: str
    params: dict[str, Any] = Field(default_factory=dict)


class InputSource(Model):
    """Data made visible to the workload at `target`."""

    source: SpecConfig
    alias: str = ""
    target: str


class ResultPath(Model):
    """A directory in the workload whose content is kept as a result under `name`."""

    name: str
    path: str


class Resources(Model):
    """Limits of one execution. Units: millicores, bytes, bytes, devices. 0 means the default.

    May also be given as quantities: `cpu: 500m, memory: 512Mi, disk: 1Gi, gpu: 1`.
    """

    cpu_millis: int = Field(default=0, ge=0)
    memory_bytes: int = Field(default=0, ge=0)
    disk_bytes: int = Field(default=0, ge=0)
    gpu: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _read_quantities(cls, data: Any) -> Any:
        return from_quantities(data) if isinstance(data, dict) else data


class NetworkType(StrEnum):
    """What the workload may reach. Default leaves it to the engine, which chooses None."""

    DEFAULT = "Default"
    NONE = "None"
    HOST = "Host"
    FULL = "Full"
    HTTP = "HTTP"
    BRIDGE = "Bridge"


class Port(Model):
    """A port the workload listens on. `static` and `target` 0 mean: chosen by the node."""

    name: str
    static: int = Field(default=0, ge=0, le=65535)
    target: int = Field(default=0, ge=0, le=65535)
    host_network: str = ""


class Network(Model):
    """Network access of one execution."""

    type: NetworkType = NetworkType.DEFAULT
    domains: tuple[str, ...] = ()
    ports: tuple[Port, ...] = ()


class Timeouts(Model):
    """Whole seconds; 0 means none."""

    execution_timeout: int = Field(default=0, ge=0, description="One execution, seconds.")
    queue_timeout: int = Field(default=0, ge=0, description="Waiting for a node, seconds.")
    total_timeout: int = Field(default=0, ge=0, description="The job as a whole, seconds.")


class Task(Model):
    """The workload of a job."""

    name: str = "main"
    engine: SpecConfig
    publisher: SpecConfig | None = None
    env: dict[str, str] = Field(default_factory=dict)
    meta: dict[str, str] = Field(default_factory=dict)
    input_sources: tuple[InputSource, ...] = ()
    result_paths: tuple[ResultPath, ...] = ()
    resources: Resources = Resources()
    network: Network = Network()
    timeouts: Timeouts = Timeouts()


class Constraint(Model):
    """One requirement on a node's labels. `operator` is one of
    `=`, `==`, `!=`, `in`, `notin`, `exists`, `!`, `gt`, `lt`."""

    key: str
    operator: str
    values: tuple[str, ...] = ()


class ExitRule(Model):
    """What a non-zero exit code means: `retry` (the default for every code) or `fail` at once."""

    codes: tuple[int, ...]
    action: Literal["retry", "fail"]


class RetryPolicy(Model):
    """New attempts after failures of the workload. Faults of the system are not counted."""

    attempts: int = Field(default=3, ge=1, le=100, description="Tries per slot, first included.")
    backoff_seconds: float = Field(default=1.0, ge=0, le=86400, description="Before the second.")
    backoff_seconds_max: float = Field(default=300.0, ge=0, le=86400)
    exit_rules: tuple[ExitRule, ...] = ()


class RestartPolicy(Model):
    """Restarts on the same node, by the node alone, for service and daemon jobs. For batch and
    ops jobs `interrupted` says what happens to work that was cut by a reboot of its node."""

    policy: Literal["always", "onFailure", "never"] = "always"
    backoff_seconds: float = Field(default=1.0, ge=0, le=86400)
    backoff_seconds_max: float = Field(default=300.0, ge=0, le=86400)
    interrupted: Literal["restart", "report"] = "restart"


class DisconnectPolicy(Model):
    """What happens when the node of an execution is not heard from for `after_seconds`.
    None fields take the default of the job's type; see docs/architecture.md."""

    after_seconds: int | None = Field(default=None, ge=1)
    action: Literal["hold", "replace", "stop"] | None = None
    reconcile: Literal["firstAccepted", "keepOriginal", "keepReplacement"] | None = None


class UpdateStrategy(Model):
    """How a new generation takes over from the old one, for service and daemon jobs."""

    max_unavailable: int = Field(default=1, ge=1, description="Slots replaced at a time.")


class JobSpec(Model):
    """Desired state. Written by users (through the API), never by controllers."""

    type: JobType
    count: int = Field(default=1, ge=0, le=100_000, description="Partitions, or instances.")
    priority: int = Field(default=0, ge=-1_000_000, le=1_000_000, description="Higher goes first.")
    tasks: tuple[Task, ...] = Field(min_length=1, max_length=1)
    constraints: tuple[Constraint, ...] = ()
    meta: dict[str, str] = Field(default_factory=dict)
    retry: RetryPolicy = RetryPolicy()
    restart: RestartPolicy = RestartPolicy()
    disconnect: DisconnectPolicy = DisconnectPolicy()
    update: UpdateStrategy = UpdateStrategy()
    suspend: bool = False
    on_change: Literal["rerun", "ignore", "manual"] = Field(
        default="rerun",
        description="batch and ops: what an edit that affects execution does. `manual` keeps it "
        "until `rerun`, `ignore` drops it; a changed runNonce always runs.",
    )
    run_nonce: str = Field(default="", description="Change it to run an unchanged job again.")
    rerun_nonce: str = Field(
        default="", description="As runNonce, but set by `rerun`, so that applying a file keeps it."
    )
    retry_nonce: str = Field(
        default="",
        description="Changed by `rerun --failed`: the slots of this generation that hold no result "
        "are tried anew, with all their attempts.",
    )
    stop_generation: int = Field(
        default=0, ge=0, description="The newest generation that was stopped; set by `stop`."
    )

    @property
    def task(self) -> Task:
        """The one task."""
        return self.tasks[0]


# What can change without running anything again: who goes first, what to do about failures and
# lost nodes, and whether the job is held or stopped.
_NOT_PART_OF_A_RUN = {
    "priority", "suspend", "stop_generation", "retry", "disconnect", "update", "meta", "on_change",
    "retry_nonce",
}  # fmt: skip


def without_run(spec: JobSpec) -> dict[str, Any]:
    """The fields (by Python name) of a spec that can change without running anything again."""
    skip = _NOT_PART_OF_A_RUN | ({"count"} if spec.type is JobType.SERVICE else set())
    return {name: getattr(spec, name) for name in sorted(skip)}


def is_part_of_run(field: str, type: JobType) -> bool:
    """Whether a field of a spec (by wire name, such as `tasks`) affects execution."""
    names = {to_camel(name) for name in _NOT_PART_OF_A_RUN}
    return field not in names and not (field == "count" and type is JobType.SERVICE)


def run_hash(spec: JobSpec) -> str:
    """Identity of a run: 16 hex digits over the canonical form of all that affects execution.

    The count of a service is not part of it, so that scaling leaves running instances alone.
    """
    skip = _NOT_PART_OF_A_RUN | ({"count"} if spec.type is JobType.SERVICE else set())
    data = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=skip)
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class JobPhase(StrEnum):
    """Summary of a job."""

    PENDING = "Pending"  # not looked at yet, or suspended
    QUEUED = "Queued"  # something has no place to run
    RUNNING = "Running"
    COMPLETED = "Completed"
    FAILED = "Failed"
    STOPPED = "Stopped"

    @property
    def is_final(self) -> bool:
        """True for phases that a generation never leaves."""
        return self in (JobPhase.COMPLETED, JobPhase.FAILED, JobPhase.STOPPED)


class RuleCount(Model):
    """How many nodes one placement rule turned down, with one example's words."""

    rule: str
    nodes: int
    example: str = ""


class Verdict(Model):
    """The last placement decision for one slot, as `explain` prints it."""

    slot: str
    time: Timestamp
    node: str = Field(default="", description="The node chosen; empty if none fits.")
    nodes_total: int = 0
    rejected: tuple[RuleCount, ...] = ()
    nearest: str = Field(default="", description="The node that failed the fewest rules.")
    remedy: str = Field(default="", description="The one change that would make it fit.")
    scores: dict[str, float] = Field(default_factory=dict)
    data: str = Field(default="", description="Which nodes hold how much of the inputs already.")


class SlotCounts(Model):
    """How many slots of the current generation are in each state."""

    total: int = 0
    waiting: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    delivered: int = 0


class JobStatus(Model):
    """Observed state. Written by the job reconciler only; can be rebuilt from scratch."""

    observed_generation: int = 0
    observed_retry_nonce: str = ""
    phase: JobPhase = JobPhase.PENDING
    reason: str = ""
    message: str = ""
    started_at: Timestamp | None = None
    finished_at: Timestamp | None = None
    slots: SlotCounts = SlotCounts()
    ops_nodes: tuple[str, ...] | None = Field(
        default=None, description="ops: the nodes that matched when this generation was placed."
    )
    pins: dict[str, str] = Field(
        default_factory=dict,
        description="What the engine's references (`image`) mean in this generation.",
    )
    verdicts: tuple[Verdict, ...] = Field(default=(), description="Bounded to the newest few.")
    waiting: Waiting | None = None
    conditions: tuple[Condition, ...] = ()


class Job(Resource):
    """A declared job."""

    kind: Literal["Job"] = "Job"
    metadata: ObjectMeta
    spec: JobSpec
    status: JobStatus = JobStatus()

    @property
    def is_observed(self) -> bool:
        """Whether the status speaks of the present generation, and of its last `rerun --failed`."""
        status = self.status
        is_current = status.observed_generation >= self.metadata.generation
        return is_current and status.observed_retry_nonce == self.spec.retry_nonce

    @property
    def is_over(self) -> bool:
        """Whether the present generation has ended, for all that is known."""
        return self.is_observed and self.status.phase.is_final

    @property
    def is_stopped(self) -> bool:
        """True if the current generation was asked to stop."""
        return self.spec.stop_generation >= max(self.metadata.generation, 1)
