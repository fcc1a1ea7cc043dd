"""Source: a directory whose manifests are kept applied. Claim: one object that a Source owns.

Claims are the inventory of a source. There is at most one for each object, named after it and
written in the same commit as the object itself, with its uid: so two sources cannot own one object,
and an object of the same name that somebody else made is never mistaken for one's own.
"""

from enum import StrEnum
from typing import ClassVar, Final, Literal

from pydantic import Field

from bacalhau_api.base import Model, Timestamp
from bacalhau_api.meta import DEFAULT_NAMESPACE, ObjectMeta, OwnerReference, Ref, Resource, Waiting
from bacalhau_api.names import RESERVED_KEY_PREFIX

PRUNE: Final = f"{RESERVED_KEY_PREFIX}prune"
"""Annotation, in manifests: `retain` keeps the object when its file is gone."""

ADOPT: Final = f"{RESERVED_KEY_PREFIX}adopt"
"""Annotation, in manifests: `true` takes over an object that somebody else made."""

PRUNED_KEPT_SECONDS: Final = 86400.0
"""For so long a pruned object can be restored."""

LISTED_MAX: Final = 100
"""Most problems and differences that a status lists."""

PruneRule = Literal["delete", "retain"]


class Suspension(Model):
    """Nothing is applied until then. There is always an end, so that it cannot be forgotten."""

    until: Timestamp
    by: str = ""
    reason: str = ""


class Approval(Model):
    """Leave to delete what `status.freeze` named under this digest."""

    digest: str
    by: str = ""
    at: Timestamp


class SourceSpec(Model):
    """Desired state, written by operators."""

    mode: Literal["enforce", "detect", "off"] = Field(
        default="enforce", description="detect: report what differs, change nothing."
    )
    prune: PruneRule = Field(
        default="delete", description="What happens to objects whose file is gone."
    )
    max_prune_percent: int = Field(
        default=20,
        ge=0,
        le=100,
        description="More deletions than this share of the objects (but at least 1) wait for "
        "`bacalhau gitops approve`.",
    )
    view: Literal["auto", "git", "files"] = Field(
        default="auto", description="git: the commit at HEAD; files: the files as they lie there."
    )
    settle_seconds: float = Field(
        default=2.0, ge=0.1, le=60, description="files: nothing may have changed for so long."
    )
    namespace: str = Field(
        default=DEFAULT_NAMESPACE, description="For manifests that name no namespace."
    )
    ignore: tuple[str, ...] = Field(
        default=(), max_length=200, description="Patterns as in .gitignore, on top of that of "
        "the file .bacalhauignore.",
    )  # fmt: skip
    suspension: Suspension | None = None
    approval: Approval | None = None


class SourcePhase(StrEnum):
    """Summary of a source."""

    PENDING = "Pending"  # not looked at yet
    SYNCED = "Synced"  # everything is as the directory says
    PROGRESSING = "Progressing"  # changes are being applied, or wait for something
    DRIFTED = "Drifted"  # mode detect: something differs
    DEGRADED = "Degraded"  # something cannot be read or applied
    FROZEN = "Frozen"  # deletions are held back
    SUSPENDED = "Suspended"
    OFF = "Off"


class SourceProblem(Model):
    """Why one file, or one object of it, is not applied. `line` 0: not known."""

    file: str = ""
    line: int = 0
    object: str = Field(default="", description="Such as `Job default/a`.")
    reason: str = Field(description="One CamelCase word.")
    message: str
    hint: str = ""


class Drift(Model):
    """One object that differs from its file (mode detect)."""

    object: str
    action: Literal["create", "change", "delete"]
    file: str = ""
    line: int = 0
    fields: tuple[str, ...] = ()


class Freeze(Model):
    """Deletions that are held back. `count` objects; the first few are named."""

    reason: Literal["Broken", "Missing", "Emptied", "Unmounted", "TooMany"]
    message: str
    since: Timestamp
    count: int = 0
    objects: tuple[str, ...] = ()
    digest: str = Field(default="", description="What an approval names; empty: there is none.")


class SourceCounts(Model):
    """How many files were read and objects found, and how those stand."""

    files: int = 0
    objects: int = 0
    synced: int = 0
    waiting: int = 0
    failed: int = 0
    drifted: int = 0


class SourceStatus(Model):
    """Observed state. Written by whoever holds the lease of the source."""

    observed_generation: int = 0
    phase: SourcePhase = SourcePhase.PENDING
    message: str = ""
    waiting: Waiting | None = None
    runner: str = Field(default="", description="Who looks after the directory.")
    path: str = Field(default="", description="The directory, on the runner's machine.")
    revision_seen: str = Field(
        default="", description="The commit, or a digest of the files, that was read last."
    )
    revision_applied: str = Field(default="", description="The last one that was applied whole.")
    applied_at: Timestamp | None = None
    counts: SourceCounts = SourceCounts()
    problems: tuple[SourceProblem, ...] = Field(default=(), description="The first 100.")
    problems_total: int = 0
    drift: tuple[Drift, ...] = Field(default=(), description="The first 100.")
    freeze: Freeze | None = None
    approved: tuple[str, ...] = Field(
        default=(), description="Beginnings of the uids whose deletion was approved."
    )
    mounts: tuple[str, ...] = Field(
        default=(), description="Directories in it that are disks of their own; `.` is itself."
    )


class Source(Resource):
    """A watched directory of manifests."""

    namespaced: ClassVar[bool] = False

    kind: Literal["Source"] = "Source"
    metadata: ObjectMeta
    spec: SourceSpec = SourceSpec()
    status: SourceStatus = SourceStatus()

    @property
    def owner(self) -> str:
        """How the source is named as an owner and as an actor."""
        return f"source/{self.metadata.name}"


class ClaimPhase(StrEnum):
    """What became of a claimed object."""

    HELD = "Held"  # applied from the source, deleted when its file is gone
    PRUNED = "Pruned"  # deleted; can be restored for a day
    RESTORED = "Restored"  # brought back by a user; stays, whatever the directory says


class ClaimSpec(Model):
    """Which object, and which source. `commit` is that of the object's last change."""

    source: str
    source_uid: str
    kind: str
    namespace: str = ""
    name: str
    uid: str = Field(default="", description="Of the object. Empty: its run is over and retired.")
    file: str = ""
    commit: str = ""
    prune: PruneRule = "delete"

    @property
    def object_ref(self) -> Ref:
        """The claimed object's key."""
        return Ref(self.kind, self.namespace, self.name)


class ClaimStatus(Model):
    """What was done last."""

    phase: ClaimPhase = ClaimPhase.HELD
    outcome: str = Field(default="", description="created, configured, adopted, pruned, …")
    at: Timestamp | None = None


class Claim(Resource):
    """One entry of a source's inventory."""

    kind: Literal["Claim"] = "Claim"
    metadata: ObjectMeta
    spec: ClaimSpec
    status: ClaimStatus = ClaimStatus()

    @property
    def is_held(self) -> bool:
        """True while the object belongs to the source."""
        return self.status.phase is ClaimPhase.HELD


def claim_ref(ref: Ref) -> Ref:
    """The key of the claim on an object. Claims on objects without a namespace lie in `default`;
    the kind in the name keeps them apart."""
    return Ref("Claim", ref.namespace or DEFAULT_NAMESPACE, f"{ref.kind.lower()}.{ref.name}")


def new_claim(ref: Ref, source: Source, uid: str, *, claim_uid: str, at: Timestamp) -> Claim:
    """A claim that was not there before."""
    where = claim_ref(ref)
    owner = OwnerReference(kind="Source", name=source.name, uid=source.metadata.uid)
    return Claim(
        metadata=ObjectMeta(
            name=where.name,
            namespace=where.namespace,
            uid=claim_uid,
            creation_timestamp=at,
            owner_references=(owner,),
        ),
        spec=ClaimSpec(
            source=source.name,
            source_uid=source.metadata.uid,
            kind=ref.kind,
            namespace=ref.namespace,
            name=ref.name,
            uid=uid,
        ),
    )
