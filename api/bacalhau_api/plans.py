"""What a plan says: the consequences of a change before it is made. The stable form for programs;
docs/reference/plan.md explains every field.

Unknown fields are ignored on reading, so that an older client understands a newer server.
"""

from typing import Any, Final, Literal

from pydantic import ConfigDict, Field

from bacalhau_api.base import Model, Timestamp
from bacalhau_api.v1.job import Verdict

PLAN_VERSION: Final = "bacalhau.org/plan-v1"


class Told(Model):
    """The base of what is answered."""

    model_config = ConfigDict(extra="ignore")


class PlannedField(Told):
    """One field that changes; `old` or `new` null: it is absent. `runs`: it affects execution."""

    field: str
    old: Any = None
    new: Any = None
    runs: bool = False


class PlannedExecution(Told):
    """One execution that starts or stops.

    start    a slot gets an execution
    rerun    the same, and the slot was run before by an earlier generation
    restart  the same, in place of `replaces`, which serves until then
    stop     an execution is told to stop, for `reason`
    lose     an execution is given up with its node, `after_seconds` later
    """

    action: Literal["start", "rerun", "restart", "stop", "lose"]
    slot: str
    execution: str
    node: str
    replaces: str = ""
    replaces_on: str = Field(default="", description="The node of `replaces`.")
    reason: str = ""
    after_seconds: float | None = None


class PlannedQueue(Told):
    """Slots that find no place now."""

    slots: int
    what: str = Field(description="What is waited for, such as Capacity or Quota.")
    message: str
    verdict: Verdict | None = None


class PlannedDisconnect(Told):
    """What holds when a node is not heard from; null seconds: no limit."""

    action: str
    after_seconds: int | None = None
    reconcile: str
    why: str


class PlannedBytes(Told):
    """Input data that nodes have to get, over all executions that start. `known` counts bytes;
    `unknown` counts inputs whose size nobody knows yet."""

    known: int = 0
    unknown: int = 0


class PlanProblem(Told):
    """Why a document is refused."""

    field: str = ""
    message: str
    value: str = ""
    hint: str = ""
    where: str = ""


class ObjectPlan(Told):
    """What happens to one object.

    `action`: create, change, none, delete, refused; or affected, for a job that nobody changes and
    that feels it. `run`: what it means for runs: first, rerun, update, held (`onChange: manual`),
    ignored (`onChange: ignore`), retired (has run and was retired), ends; empty: nothing runs anew.
    """

    action: Literal["create", "change", "none", "delete", "refused", "affected"]
    kind: str
    namespace: str = ""
    name: str
    source: str = ""
    line: int = 0
    run: str = ""
    why: str = ""
    generation: int = Field(default=0, description="Before; 0 if it is new.")
    generation_after: int = 0
    fields: tuple[PlannedField, ...] = ()
    executions: tuple[PlannedExecution, ...] = ()
    executions_omitted: int = Field(default=0, description="More than are listed.")
    queued: PlannedQueue | None = None
    disconnect: PlannedDisconnect | None = None
    input_bytes: PlannedBytes | None = None
    results_kept: int = Field(default=0, description="Accepted results of earlier generations.")
    results_removed: int = 0
    verdicts: tuple[Verdict, ...] = Field(default=(), description="Why there; the first few.")
    warnings: tuple[str, ...] = ()
    problems: tuple[PlanProblem, ...] = ()

    @property
    def ref_text(self) -> str:
        """Such as `job/a`, or `job/a (namespace b)`."""
        where = f" (namespace {self.namespace})" if self.namespace not in ("", "default") else ""
        return f"{self.kind.lower()}/{self.name}{where}"


class PlanSummary(Told):
    """Counts over the whole plan."""

    create: int = 0
    change: int = 0
    unchanged: int = 0
    delete: int = 0
    refused: int = 0
    affected: int = 0
    start: int = 0
    rerun: int = 0
    restart: int = 0
    stop: int = 0
    lose: int = 0
    queued: int = 0


class ChangePlan(Told):
    """All consequences of a set of documents at one moment.

    `complete` is false where there is so much to follow that the forecast was cut off: what it
    lists happens, and more of the same.
    """

    version: str = PLAN_VERSION
    token: str = Field(default="", description="For apply; empty if something is refused.")
    time: Timestamp
    revision: str = Field(default="", description="The moment of the store that it is about.")
    changes: bool = Field(description="Whether there is anything to do.")
    complete: bool = True
    summary: PlanSummary = PlanSummary()
    objects: tuple[ObjectPlan, ...] = ()


class AppliedObject(Told):
    """What became of one object: created, configured, unchanged, deleted (or going)."""

    kind: str
    namespace: str = ""
    name: str
    uid: str = ""
    outcome: Literal["created", "configured", "unchanged", "deleted"]
    run: str = ""
    generation: int = 0
    resource_version: int = 0
    source: str = ""
    warnings: tuple[str, ...] = ()


class InventoryEntry(Told):
    """An object that belongs to an owner."""

    kind: str
    namespace: str = ""
    name: str
    uid: str


class AppliedSet(Told):
    """What became of a set. `inventory` is what the owner has to bring next time."""

    objects: tuple[AppliedObject, ...] = ()
    inventory: tuple[InventoryEntry, ...] = ()
