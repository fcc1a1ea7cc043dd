"""Manifest: what one input of a job's generation was when it was first looked at, shared out among
the partitions. Created once, by name, never updated: the store itself refuses a second.

The listing itself lies in ManifestParts, because it may be long. They are written first.
"""

from typing import Literal

from pydantic import Field

from bacalhau_api.base import Model, Timestamp
from bacalhau_api.meta import ObjectMeta, Resource


class PartRange(Model):
    """The partitions that one part of a listing speaks of, both included; -1: of all."""

    first: int
    last: int


class ManifestSpec(Model):
    """The sums of a listing. `digest` is over its lines; `parts` are in the order of the lines."""

    job: str
    job_uid: str
    generation: int
    input: int = Field(description="Number of the input in the task, from 0.")
    source_type: str = ""
    digest: str
    objects: int = 0
    size_bytes: int = 0
    partitions: int = 1
    partitions_empty: int = Field(default=0, description="Partitions that get nothing.")
    objects_max: int = Field(default=0, description="Of the partition with most objects.")
    size_bytes_max: int = Field(default=0, description="Of the partition with most bytes.")
    parts: tuple[PartRange, ...] = ()
    execution: str = Field(default="", description="The execution that listed it.")
    node: str = ""
    time: Timestamp | None = None


class Manifest(Resource):
    """A pinned listing."""

    kind: Literal["Manifest"] = "Manifest"
    metadata: ObjectMeta
    spec: ManifestSpec


class ManifestPartSpec(Model):
    """Some lines of a listing: base64 of their packed form, which only nodes read."""

    job: str
    job_uid: str
    generation: int
    input: int
    digest: str
    number: int
    data: str


class ManifestPart(Resource):
    """A piece of a pinned listing, or of one that came too late to be pinned."""

    kind: Literal["ManifestPart"] = "ManifestPart"
    metadata: ObjectMeta
    spec: ManifestPartSpec


def manifest_name(job: str, job_uid: str, generation: int, number: int) -> str:
    """The derived name: one for each input of each generation."""
    return f"{job}-{job_uid[:8]}-{generation}-input{number}"


def manifest_part_name(manifest: str, digest: str, number: int) -> str:
    """The derived name of part `number` of the listing with that digest."""
    return f"{manifest}-{digest.removeprefix('sha256:')[:12]}-{number}"
