"""Node: a machine that runs executions. The spec is the operator's, `status.info` the node's word,
the rest the node reconciler's."""

from enum import StrEnum
from typing import ClassVar, Final, Literal

from pydantic import Field

from bacalhau_api.base import Model, Timestamp
from bacalhau_api.meta import Condition, Contact, ObjectMeta, Resource, Waiting
from bacalhau_api.v1.job import Resources

LEDGER_FULL: Final = "LedgerFull"
"""Condition: the node's ledger cannot be written (full or read-only disk)."""

NOT_INSTALLED: Final = "not installed"
"""How the reason of a capability begins that was never there, so that nothing is wrong with it."""

OUTBOX_FULL: Final = "OutboxFull"
"""Condition: too much on the node waits to be handed over."""


class Membership(StrEnum):
    """Whether the operator lets this node take part."""

    PENDING = "Pending"
    APPROVED = "Approved"
    REJECTED = "Rejected"


class Taint(Model):
    """Keeps jobs away. Only `NoSchedule` exists."""

    key: str
    value: str = ""
    effect: Literal["NoSchedule"] = "NoSchedule"


class NodeSpec(Model):
    """Desired state, written by operators (and once by the enrolment)."""

    membership: Membership = Membership.PENDING
    unschedulable: bool = Field(default=False, description="Cordoned: no new executions.")
    drain: bool = Field(default=False, description="Move what runs here elsewhere.")
    taints: tuple[Taint, ...] = ()
    public_key: str = Field(default="", description="NKey (U...) the node signs in with.")


class Capability(Model):
    """One engine, storage or publisher of a node, with the reason if it cannot be used."""

    name: str
    available: bool = True
    reason: str = ""
    version: str = ""
    missing: tuple[str, ...] = Field(
        default=(), description="What of it cannot be used on this node, each with the reason."
    )


class HeldInput(Model):
    """How much of one input's contents a node holds. `key` is `bacalhau_api.locality.input_key`,
    `total_bytes` what the input had when the node last brought it."""

    key: str
    size_bytes: int
    total_bytes: int


HELD_INPUTS_MAX: Final = 64
"""Of one node: the largest ones are told."""


class NodeInfo(Model):
    """What a node says of itself in its hello, and again when it changes."""

    version: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    capacity: Resources = Resources()
    engines: tuple[Capability, ...] = ()
    storages: tuple[Capability, ...] = ()
    publishers: tuple[Capability, ...] = ()
    local_paths: tuple[str, ...] = Field(
        default=(), description="Allow-listed local path patterns, with `:ro` or `:rw`."
    )
    executions_max: int = 256
    held_inputs: tuple[HeldInput, ...] = Field(
        default=(), description="The largest inputs whose contents are here already."
    )
    conditions: tuple[Condition, ...] = Field(
        default=(), description="What is wrong with the node by its own word, while it is."
    )


class NodeStatus(Model):
    """Observed state. Written by the node reconciler only."""

    info: NodeInfo = NodeInfo()
    incarnation: str = ""
    contact: Contact = Contact.UNKNOWN
    contact_since: Timestamp | None = None
    connected_since: Timestamp | None = None
    waiting: Waiting | None = None
    conditions: tuple[Condition, ...] = ()


class Node(Resource):
    """A machine. Node labels used by constraints are `metadata.labels` over `status.info.labels`:
    the operator's word wins."""

    namespaced: ClassVar[bool] = False

    kind: Literal["Node"] = "Node"
    metadata: ObjectMeta
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()

    @property
    def labels(self) -> dict[str, str]:
        """The labels that constraints see."""
        return {**self.status.info.labels, **self.metadata.labels, "name": self.metadata.name}
