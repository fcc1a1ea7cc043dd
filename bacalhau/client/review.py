"""Plans, sets of documents, and the past of objects: the part of the clients about reviewing
changes. The calls are shared; `Reviews` and `AsyncReviews` are mixed into the two clients.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Protocol, TypeVar

from pydantic import ValidationError

from bacalhau.client.calls import JSON, Call, names_of, tolerant
from bacalhau.kinds import API_ROOT, NODE
from bacalhau.replies import (
    DocumentText,
    Explanation,
    HistoryItem,
    HistoryList,
    RevisionDiff,
    RollbackRequest,
    RolledBack,
    SetRequest,
    SimulateRequest,
)
from bacalhau_api.base import Model
from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.meta import DEFAULT_NAMESPACE, Resource
from bacalhau_api.plans import AppliedSet, ChangePlan
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.node import Node

T = TypeVar("T")
M = TypeVar("M", bound=Model)
R = TypeVar("R", bound=Resource)

Documents = SetRequest | str | bytes
"""A request, or the text of a manifest."""


def as_set(documents: Documents) -> SetRequest:
    """A request from the text of manifests."""
    if isinstance(documents, SetRequest):
        return documents
    text = documents.decode() if isinstance(documents, bytes) else documents
    return SetRequest(documents=(DocumentText(text=text),))


def _post(path: str, body: Model, answer: type[M], *, is_repeatable: bool) -> Call[M]:
    text = body.model_dump_json(by_alias=True).encode()
    return Call("POST", path, tolerant(answer), {}, text, JSON, is_repeatable)


def _made(kind: type[M], **fields: object) -> M:
    """A request body. Raises InvalidError for values that no server would take."""
    try:
        return kind(**fields)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        problems = [Problem(".".join(str(part) for part in e["loc"]), e["msg"]) for e in found]
        raise InvalidError(problems) from error


def plan_call(documents: Documents) -> Call[ChangePlan]:
    """What would happen."""
    return _post(f"{API_ROOT}/plan", as_set(documents), ChangePlan, is_repeatable=True)


def apply_call(asked: SetRequest) -> Call[AppliedSet]:
    """Apply together. Not sent again by itself: the second try of a plan finds it outdated."""
    return _post(f"{API_ROOT}/apply", asked, AppliedSet, is_repeatable=not asked.token)


def simulate_call(without: Iterable[str]) -> Call[ChangePlan]:
    """What would happen without some nodes."""
    asked = _made(SimulateRequest, without=tuple(without))
    return _post(f"{API_ROOT}/simulate", asked, ChangePlan, is_repeatable=True)


def get_at_call(kind: type[R], name: str, namespace: str, at: datetime) -> Call[R]:
    """An object as it was."""
    path = names_of(kind).path(namespace, name)
    moment = at if at.tzinfo else at.replace(tzinfo=UTC)
    return Call("GET", path, tolerant(kind), {"at": moment.isoformat()}, is_repeatable=True)


def declared_call(kind: type[Resource], name: str, namespace: str, limit: int) -> Call[HistoryList]:
    """The changes of what users say."""
    path = names_of(kind).path(namespace, name, "history")
    params = {"limit": str(limit), "declared": "true"}
    return Call("GET", path, tolerant(HistoryList), params, is_repeatable=True)


def diff_call(
    kind: type[Resource], name: str, namespace: str, from_: str | int, to: str | int
) -> Call[RevisionDiff]:
    """What differs between two revisions."""
    path = names_of(kind).path(namespace, name, "diff")
    params = {"from": str(from_)} | ({"to": str(to)} if to else {})
    return Call("GET", path, tolerant(RevisionDiff), params, is_repeatable=True)


def rollback_call(
    kind: type[Resource], name: str, namespace: str, to: str | int, message: str
) -> Call[RolledBack]:
    """Back to a revision. Done twice, the second changes nothing."""
    path = names_of(kind).path(namespace, name, "rollback")
    asked = _made(RollbackRequest, to=str(to), message=message)
    return _post(path, asked, RolledBack, is_repeatable=True)


def explain_pair_call(node: str, job: str, namespace: str) -> Call[Explanation]:
    """Whether a job fits a node."""
    path = NODE.path(name=node, sub="explain")
    params = {"job": f"{namespace}/{job}"}
    return Call("GET", path, tolerant(Explanation), params, is_repeatable=True)


class _Sends(Protocol):
    def send(self, call: Call[T]) -> T: ...


class _SendsAsync(Protocol):
    async def send(self, call: Call[T]) -> T: ...


class Reviews:
    """Methods of `Client`."""

    def plan(self: _Sends, documents: Documents) -> ChangePlan:
        """What would happen if these documents were applied; nothing is stored. Its `token` goes
        into `SetRequest.token` for `apply_set`."""
        return self.send(plan_call(documents))

    def apply_set(self: _Sends, asked: SetRequest) -> AppliedSet:
        """Apply documents together, all or none. Raises ConflictError with the reason PlanOutdated
        if there is a token and the outcome would now be another."""
        return self.send(apply_call(asked))

    def simulate(self: _Sends, without: Iterable[str]) -> ChangePlan:
        """What would happen without some nodes (`node/NAME`). Nothing is stored or stopped."""
        return self.send(simulate_call(without))

    def get_at(
        self: _Sends, kind: type[R], name: str, at: datetime, namespace: str = DEFAULT_NAMESPACE
    ) -> R:
        """An object as it was at a time. Raises NotFoundError where history does not reach."""
        return self.send(get_at_call(kind, name, namespace, at))

    def changes(
        self: _Sends,
        kind: type[Resource],
        name: str,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        limit: int = 100,
    ) -> tuple[HistoryItem, ...]:
        """Of the history, what changed what users say of an object: who, why, from which file."""
        return self.send(declared_call(kind, name, namespace, limit)).items

    def diff(
        self: _Sends,
        kind: type[Resource],
        name: str,
        from_: str | int,
        to: str | int = "",
        namespace: str = DEFAULT_NAMESPACE,
    ) -> RevisionDiff:
        """What differs between two revisions (numbers, or `g2` for generation 2); `to` empty means
        the newest."""
        return self.send(diff_call(kind, name, namespace, from_, to))

    def rollback(
        self: _Sends,
        kind: type[Job] | type[Node],
        name: str,
        to: str | int,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        message: str = "",
    ) -> RolledBack:
        """Have an object be again what it was at a revision."""
        return self.send(rollback_call(kind, name, namespace, to, message))

    def explain_pair(
        self: _Sends, node: str, job: str, namespace: str = DEFAULT_NAMESPACE
    ) -> Explanation:
        """Whether one job fits one node, rule by rule."""
        return self.send(explain_pair_call(node, job, namespace))


class AsyncReviews:
    """Methods of `AsyncClient`."""

    async def plan(self: _SendsAsync, documents: Documents) -> ChangePlan:
        """As `Client.plan`."""
        return await self.send(plan_call(documents))

    async def apply_set(self: _SendsAsync, asked: SetRequest) -> AppliedSet:
        """As `Client.apply_set`."""
        return await self.send(apply_call(asked))

    async def simulate(self: _SendsAsync, without: Iterable[str]) -> ChangePlan:
        """As `Client.simulate`."""
        return await self.send(simulate_call(without))

    async def get_at(
        self: _SendsAsync,
        kind: type[R],
        name: str,
        at: datetime,
        namespace: str = DEFAULT_NAMESPACE,
    ) -> R:
        """As `Client.get_at`."""
        return await self.send(get_at_call(kind, name, namespace, at))

    async def changes(
        self: _SendsAsync,
        kind: type[Resource],
        name: str,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        limit: int = 100,
    ) -> tuple[HistoryItem, ...]:
        """As `Client.changes`."""
        return (await self.send(declared_call(kind, name, namespace, limit))).items

    async def diff(
        self: _SendsAsync,
        kind: type[Resource],
        name: str,
        from_: str | int,
        to: str | int = "",
        namespace: str = DEFAULT_NAMESPACE,
    ) -> RevisionDiff:
        """As `Client.diff`."""
        return await self.send(diff_call(kind, name, namespace, from_, to))

    async def rollback(
        self: _SendsAsync,
        kind: type[Job] | type[Node],
        name: str,
        to: str | int,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        message: str = "",
    ) -> RolledBack:
        """As `Client.rollback`."""
        return await self.send(rollback_call(kind, name, namespace, to, message))

    async def explain_pair(
        self: _SendsAsync, node: str, job: str, namespace: str = DEFAULT_NAMESPACE
    ) -> Explanation:
        """As `Client.explain_pair`."""
        return await self.send(explain_pair_call(node, job, namespace))
