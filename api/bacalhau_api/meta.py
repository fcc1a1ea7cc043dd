"""What every stored object has: identity, ownership, conditions, and what it waits for."""

import re
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field

from bacalhau_api.base import Model, Timestamp

NAME_LENGTH_MAX = 63
LABEL_VALUE_LENGTH_MAX = 256
_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")

API_VERSION: Final = "bacalhau.org/v1"
DEFAULT_NAMESPACE = "default"


def check_name(value: str) -> str:
    """A name users give: 1-63 of letters, digits, `-`, `_`, `.`, starting and ending with a letter
    or digit. Raises ValueError."""
    if len(value) > NAME_LENGTH_MAX:
        raise ValueError(f"a name has at most {NAME_LENGTH_MAX} characters, this has {len(value)}")
    if not _NAME.fullmatch(value):
        raise ValueError(
            "a name is made of letters, digits, '-', '_' and '.', "
            "and starts and ends with a letter or digit"
        )
    return value


Name = Annotated[str, AfterValidator(check_name)]


class Ref(NamedTuple):
    """Names an object. `namespace` is empty for kinds that live outside namespaces (Node)."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        where = f"{self.namespace}/" if self.namespace else ""
        return f"{self.kind} {where}{self.name}"


class OwnerReference(Model):
    """Points from a child to the object it was made for."""

    kind: str
    name: str
    uid: str


class ObjectMeta(Model):
    """Identity and bookkeeping. Users give name, namespace, labels and annotations."""

    name: str = ""
    namespace: str = DEFAULT_NAMESPACE
    uid: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    generation: int = Field(default=0, ge=0, description="Counts changes of what affects a run.")
    resource_version: int = Field(default=0, ge=0, description="Counts writes; guards updates.")
    creation_timestamp: Timestamp | None = None
    deletion_timestamp: Timestamp | None = None
    finalizers: tuple[str, ...] = ()
    owner_references: tuple[OwnerReference, ...] = ()


class Condition(Model):
    """One named aspect of an object's state."""

    type: str
    status: bool
    reason: str = ""
    message: str = ""
    last_transition_time: Timestamp


class Waiting(Model):
    """Why something that is not final is not moving by itself right now.

    `until` is None only where the user chose to wait without a deadline; `mover` names who or what
    moves it next, such as `job reconciler`, `node edge-1`, `user`.
    """

    what: str = Field(description="What it waits for, one CamelCase word, such as Capacity.")
    message: str = ""
    since: Timestamp
    until: Timestamp | None = None
    mover: str


class Contact(StrEnum):
    """What the orchestrator infers about a node it may not hear from. Never overrides a report."""

    REACHABLE = "Reachable"
    UNKNOWN = "Unknown"
    LOST = "Lost"


class Resource(Model):
    """A stored object. Subclasses add `kind`, `spec` and `status`."""

    namespaced: ClassVar[bool] = True

    api_version: Literal["bacalhau.org/v1"] = API_VERSION
    kind: str
    metadata: ObjectMeta

    @property
    def ref(self) -> Ref:
        """The key under which this object is stored."""
        return Ref(self.kind, self.metadata.namespace if self.namespaced else "", self.name)

    @property
    def name(self) -> str:
        """Shorthand for metadata.name."""
        return self.metadata.name

    @property
    def is_deleting(self) -> bool:
        """True once deletion was asked for; finalizers may keep the object for a while."""
        return self.metadata.deletion_timestamp is not None

    def with_meta(self, **changes: object) -> Self:
        """A copy with some metadata fields (by Python name) replaced."""
        return self.but(metadata=self.metadata.but(**changes))

    def encode(self) -> bytes:
        """As `Model.encode`, with `apiVersion` and `kind` always present and first."""
        body = self.model_dump_json(by_alias=True, exclude_defaults=True)
        return f'{{"apiVersion":"{self.api_version}","kind":"{self.kind}",{body[1:]}'.encode()

    def wire(self) -> dict[str, Any]:
        """As `Model.wire`, with `apiVersion` and `kind` always present and first."""
        return {"apiVersion": self.api_version, "kind": self.kind} | super().wire()


def set_condition(conditions: tuple[Condition, ...], new: Condition) -> tuple[Condition, ...]:
    """Replace or add one condition; an unchanged status keeps its transition time."""
    out: list[Condition] = []
    found = False
    for old in conditions:
        if old.type != new.type:
            out.append(old)
            continue
        found = True
        same = old.status == new.status
        out.append(new.but(last_transition_time=old.last_transition_time) if same else new)
    if not found:
        out.append(new)
    return tuple(out)
