"""Where a change comes from: file, commit, person. Recorded on the object with the change itself,
and only with a change: applying what is there already from another commit writes nothing.
"""

from collections.abc import Mapping
from typing import Final, TypeVar

from pydantic import Field

from bacalhau_api.base import Model
from bacalhau_api.meta import Resource
from bacalhau_api.names import RESERVED_KEY_PREFIX, check_printable

SOURCE: Final = f"{RESERVED_KEY_PREFIX}source"
COMMIT: Final = f"{RESERVED_KEY_PREFIX}commit"
APPLIED_BY: Final = f"{RESERVED_KEY_PREFIX}applied-by"
OWNER: Final = f"{RESERVED_KEY_PREFIX}owner"
"""Who applies the object from a directory and may prune it, such as `source/prod`. For people and
to refuse a second owner; what is pruned is decided by the owner's own inventory, with uids."""

LENGTH_MAX: Final = 1024

R = TypeVar("R", bound=Resource)


class Provenance(Model):
    """Who asks for a change, on which ground. All as the asking side tells it; the server adds
    whose credentials were used."""

    source: str = Field(default="", description="The file, such as jobs/a.yaml.")
    commit: str = Field(default="", description="The git commit that it lies in.")
    by: str = Field(default="", description="Such as alice@laptop.")
    message: str = Field(default="", description="Why.")

    def words(self) -> str:
        """All of it on one line, for the history."""
        parts = [self.message]
        if self.source:
            at = f" at {self.commit[:12]}" if self.commit else ""
            parts.append(f"from {self.source}{at}")
        if self.by:
            parts.append(f"by {self.by}")
        return " ".join(filter(None, parts))

    def cleaned(self) -> "Provenance":
        """With texts of bounded length. Raises ValueError for control characters."""
        texts = {name: getattr(self, name) for name in ("source", "commit", "by", "message")}
        return Provenance(**{k: check_printable(v)[:LENGTH_MAX] for k, v in texts.items()})


def stamped(resource: R, provenance: Provenance, *, owner: str = "") -> R:
    """The object with the origin of its newest change. An owner stays until another takes over."""
    notes = dict(resource.metadata.annotations)
    marks = {
        SOURCE: provenance.source,
        COMMIT: provenance.commit,
        APPLIED_BY: provenance.by,
        OWNER: owner or notes.get(OWNER, ""),
    }
    for key, value in marks.items():
        notes.pop(key, None)
        if value:
            notes[key] = value
    return resource.with_meta(annotations=notes)


def provenance_of(resource: Resource) -> Provenance:
    """The origin of an object's newest change, as far as it was told."""
    notes = resource.metadata.annotations
    return Provenance(
        source=notes.get(SOURCE, ""), commit=notes.get(COMMIT, ""), by=notes.get(APPLIED_BY, "")
    )


def owner_of(resource: Resource) -> str:
    """Who applies the object from a directory; empty if nobody does."""
    return resource.metadata.annotations.get(OWNER, "")


def without_reserved(annotations: Mapping[str, str]) -> dict[str, str]:
    """The annotations that users may write."""
    return {k: v for k, v in annotations.items() if not k.startswith(RESERVED_KEY_PREFIX)}
