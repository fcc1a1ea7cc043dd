"""What is said over HTTP about sources: by operators, and by a runner that is not the orchestrator.

The calls are plain data for the clients; the routes are in `bacalhau.server.routes_sources`.
"""

from typing import Any, Final, Literal

from pydantic import Field

from bacalhau.client.calls import JSON, Call, tolerant
from bacalhau.kinds import SOURCE
from bacalhau.replies import Reply
from bacalhau_api.base import Model
from bacalhau_api.v1.source import PruneRule, Source, SourceStatus

ORDERS_MAX: Final = 100
BODY_BYTES: Final = 1_500_000
"""Aimed at for one request; the server takes a little more."""


class SourceRequest(Model):
    """What an operator says of a source. What is left out stays as it is."""

    mode: Literal["enforce", "detect", "off"] | None = None
    prune: PruneRule | None = None
    max_prune_percent: int | None = Field(default=None, ge=0, le=100)
    view: Literal["auto", "git", "files"] | None = None
    settle_seconds: float | None = Field(default=None, ge=0.1, le=60)
    namespace: str | None = Field(default=None, max_length=63)
    ignore: tuple[str, ...] | None = Field(default=None, max_length=200)


class SuspendRequest(Model):
    """Apply nothing for so long."""

    seconds: float = Field(gt=0, le=90 * 86400)
    reason: str = Field(default="", max_length=500)


class ApproveRequest(Model):
    """Let the deletions go that `status.freeze.digest` names."""

    digest: str = Field(max_length=64)


class ObjectName(Model):
    """One object."""

    kind: str = Field(default="Job", max_length=63)
    namespace: str = Field(default="", max_length=63)
    name: str = Field(max_length=253)


class Restored(Reply):
    """What was brought back."""

    kind: str
    namespace: str
    name: str
    uid: str


class LeaseRequest(Model):
    """Take, renew (with `token`) or give back (`ttlSeconds` 0) the right to run a source."""

    holder: str = Field(max_length=253)
    token: int = 0
    ttl_seconds: float = Field(default=0, ge=0, le=300)


class LeaseAnswer(Reply):
    """`token` 0: another holds it."""

    token: int = 0


class OrderItem(Model):
    """One declared object; `manifest` as in a manifest."""

    manifest: dict[str, Any]
    file: str = Field(max_length=4096)
    line: int = 0


class OrdersRequest(Model):
    """Bring objects to what is declared."""

    token: int
    commit: str = Field(default="", max_length=256)
    orders: tuple[OrderItem, ...] = Field(max_length=ORDERS_MAX)


class LetGoRequest(Model):
    """Delete objects, or only the claims on them. Claims by namespace and name, with the uid of the
    claimed object."""

    token: int
    action: Literal["prune", "release"]
    commit: str = Field(default="", max_length=256)
    why: str = Field(default="", max_length=500)
    claims: tuple[tuple[str, str, str], ...] = Field(max_length=ORDERS_MAX)


class ProblemItem(Reply):
    """One thing wrong with an object."""

    field: str = ""
    message: str = ""
    hint: str = ""


class DoneItem(Reply):
    """What became of one object. `reason` empty: all went well."""

    kind: str
    namespace: str = ""
    name: str
    outcome: str = ""
    versions: tuple[int, int] = (0, 0)
    reason: str = ""
    message: str = ""
    hint: str = ""
    is_conflict: bool = False
    problems: tuple[ProblemItem, ...] = ()


class DoneAnswer(Reply):
    """In the order of what was asked."""

    items: tuple[DoneItem, ...] = ()


class ReportRequest(Model):
    """The status of a source, as of `resourceVersion`."""

    token: int
    resource_version: int
    status: SourceStatus


def put(name: str, asked: SourceRequest) -> Call[Source]:
    """Create or change a source."""
    body = asked.model_dump_json(by_alias=True, exclude_none=True).encode()
    return Call("PUT", SOURCE.path(name=name), tolerant(Source), {}, body, JSON, True)


def verb(name: str, word: str, body: Model | None = None) -> Call[Source]:
    """approve, suspend, resume."""
    text = body.model_dump_json(by_alias=True).encode() if body else None
    path = SOURCE.path(name=name, sub=word)
    return Call("POST", path, tolerant(Source), {}, text, JSON if body else "", True)


def restore(name: str, what: ObjectName) -> Call[Restored]:
    """Bring a pruned object back."""
    body = what.model_dump_json(by_alias=True).encode()
    return Call("POST", SOURCE.path(name=name, sub="restore"), tolerant(Restored), {}, body, JSON)


def lease(name: str, asked: LeaseRequest) -> Call[LeaseAnswer]:
    """The lease of a source."""
    body = asked.model_dump_json(by_alias=True).encode()
    path = SOURCE.path(name=name, sub="runner/lease")
    return Call("POST", path, tolerant(LeaseAnswer), {}, body, JSON, True)


def orders(name: str, asked: OrdersRequest) -> Call[DoneAnswer]:
    """Apply objects."""
    body = asked.model_dump_json(by_alias=True).encode()
    path = SOURCE.path(name=name, sub="runner/apply")
    return Call("POST", path, tolerant(DoneAnswer), {}, body, JSON, True)


def let_go(name: str, asked: LetGoRequest) -> Call[DoneAnswer]:
    """Delete or release objects."""
    body = asked.model_dump_json(by_alias=True).encode()
    path = SOURCE.path(name=name, sub="runner/let-go")
    return Call("POST", path, tolerant(DoneAnswer), {}, body, JSON, True)


def report(name: str, asked: ReportRequest) -> Call[Source]:
    """Store the status."""
    body = asked.model_dump_json(by_alias=True).encode()
    path = SOURCE.path(name=name, sub="runner/status")
    return Call("PUT", path, tolerant(Source), {}, body, JSON)


__all__ = [
    "ApproveRequest",
    "DoneAnswer",
    "DoneItem",
    "LeaseAnswer",
    "LeaseRequest",
    "LetGoRequest",
    "ObjectName",
    "OrderItem",
    "OrdersRequest",
    "ReportRequest",
    "Restored",
    "SourceRequest",
    "SuspendRequest",
]
