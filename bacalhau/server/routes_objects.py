"""Routes that every kind has: list, watch, get, history, explain; and delete where users may."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import GenericAlias
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from pydantic import create_model
from starlette.responses import Response

from bacalhau.gitops.explain import explain_claim, explain_source
from bacalhau.kinds import ALL, API_ROOT, KindNames
from bacalhau.replies import Deleted, ErrorModel, Explanation, HistoryList, ListMeta
from bacalhau.server import past
from bacalhau.server.actions import not_found
from bacalhau.server.context import Context, actor_of
from bacalhau.server.explain import (
    explain_acceptance,
    explain_execution,
    explain_job,
    explain_manifest,
    explain_namespace,
    explain_node,
    explain_publication,
    explain_retired,
)
from bacalhau.server.fit import explain_pair
from bacalhau.server.pages import PAGE_ITEMS_MAX
from bacalhau.server.problems import render
from bacalhau.server.query import parse_cursor, select
from bacalhau.server.reply import full_json, list_response, object_response
from bacalhau.server.stream import EVENT_STREAM
from bacalhau.server.watch import watch_response
from bacalhau_api.base import Model
from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.meta import DEFAULT_NAMESPACE, Ref, Resource
from bacalhau_api.v1 import KINDS
from bacalhau_api.v1.execution import Acceptance, Execution, Publication, acceptance_name
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.manifest import Manifest
from bacalhau_api.v1.namespace import Namespace
from bacalhau_api.v1.node import Node
from bacalhau_api.v1.retired import RetiredJob
from bacalhau_api.v1.source import Claim, Source
from bacalhau_api.wire import OBJECT_NAME_LENGTH_MAX, UID_LENGTH_MAX
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.store import HistoryEntry

HISTORY_ENTRIES_MAX: Final = 1000
_DELETABLE: Final = frozenset({"Job", "Node", "RetiredJob", "Source", "Namespace"})

_LIST_WORDS: Final = (
    "Answers a list. With `watch=true` the answer is a stream of server-sent events instead, each "
    "`{type, object}`: first RESET (only if the cursor given can no longer be continued: forget "
    "what you hold), DELETED and ADDED for what exists or has changed since, SYNCED, then ADDED, "
    "MODIFIED and DELETED as things happen. The `id` of an event is where to resume from, as "
    "`resourceVersion` or Last-Event-ID. An ERROR event ends a stream that the client read too "
    "slowly."
)


_EVENTS: Final[dict[str, Any]] = {EVENT_STREAM: {}}


@dataclass(frozen=True, slots=True)
class _ListQuery:
    labels: str
    fields: str
    limit: int | None
    token: str
    sort: str
    watch: bool
    since: str
    timeout_seconds: float | None


def _list_query(
    labels: Annotated[
        str, Query(alias="labelSelector", description="Such as `team=data,tier in (a,b),!old`.")
    ] = "",
    fields: Annotated[
        str, Query(alias="fieldSelector", description="Such as `phase=Running,node!=edge-1`.")
    ] = "",
    limit: Annotated[
        int | None, Query(ge=1, le=PAGE_ITEMS_MAX, description="Objects per page; absent: all.")
    ] = None,
    token: Annotated[
        str, Query(alias="continue", description="`metadata.continue` of the page before.")
    ] = "",
    sort: Annotated[
        Literal["name", "-name", "created", "-created"], Query(description="`-`: the other way.")
    ] = "name",
    watch: Annotated[bool, Query(description="Stream changes instead.")] = False,
    since: Annotated[
        str, Query(alias="resourceVersion", description="Watch: what changed after this cursor.")
    ] = "",
    timeout_seconds: Annotated[
        float | None, Query(alias="timeoutSeconds", gt=0, description="Watch: end after so long.")
    ] = None,
    last_event_id: Annotated[str, Header(description="Watch: as resourceVersion, wins.")] = "",
) -> _ListQuery:
    since = last_event_id or since
    return _ListQuery(labels, fields, limit, token, sort, watch, since, timeout_seconds)


_Asked = Annotated[_ListQuery, Depends(_list_query)]


Responses = dict[int | str, dict[str, Any]]

ERRORS: Responses = {
    status: {"model": ErrorModel, "description": words}
    for status, words in (
        (400, "The request is not valid; `problems` has one entry for each thing that is wrong."),
        (404, "There is no such object."),
        (409, "It changed meanwhile, or exists already."),
        (413, "The body is too large."),
        (415, "The content type is not understood."),
        (429, "Too much at once; see Retry-After."),
        (503, "The store or the node cannot be reached now; see Retry-After."),
        # Also keeps FastAPI from describing a 422 of its own, which is never sent.
        ("default", "Any other error."),
    )
}
READ_ERRORS: Responses = {status: ERRORS[status] for status in (400, 404, 429, 503, "default")}
WRITE_ERRORS: Responses = READ_ERRORS | {status: ERRORS[status] for status in (409, 413, 415)}


def add_routes(router: APIRouter, context: Context) -> None:
    """Add the routes of every kind."""
    for names in ALL:
        _add_lists(router, context, names)
        _add_get(router, context, names)
        _add_history(router, context, names)
        _add_explain(router, context, names)
        if names.kind in _DELETABLE:
            _add_delete(router, context, names)


def path_ref(kind: str, namespace: str, name: str) -> Ref:
    """A Ref from the parts of a path. Names that no object can have raise NotFoundError before
    they reach a store, which may give some characters a meaning."""
    if not is_possible(namespace or "-") or not is_possible(name):
        raise not_found(Ref(kind, render(namespace)[:80], render(name)[:80]))
    return Ref(kind, namespace, name)


def is_possible(name: str) -> bool:
    """Whether any object or namespace could have that name."""
    is_short = 0 < len(name) <= OBJECT_NAME_LENGTH_MAX
    return is_short and name.isascii() and name.isprintable() and not set(name) & set(" */>")


def object_path(names: KindNames, sub: str = "") -> str:
    """The route of one object of a kind, or of a subresource."""
    where = "/namespaces/{namespace}" if names.namespaced else ""
    return f"{API_ROOT}{where}/{names.plural}/{{name}}{sub}"


def _namespace_of(request: Request) -> str:
    # Not a parameter of the route functions: those of Node have none.
    namespace: str = request.path_params.get("namespace", "")
    return namespace


def _ref_of(request: Request, names: KindNames) -> Ref:
    return path_ref(names.kind, _namespace_of(request), request.path_params["name"])


def path_parameters(names: KindNames) -> dict[str, Any]:
    """The OpenAPI description of the parts of an object's path."""
    parts = ["namespace", "name"] if names.namespaced else ["name"]
    return {
        "parameters": [
            {"name": part, "in": "path", "required": True, "schema": {"type": "string"}}
            for part in parts
        ]
    }


def _list_model(kind: str) -> type[Model]:
    items: Any = (GenericAlias(tuple, (KINDS[kind], ...)), ())
    return create_model(
        f"{kind}List",
        __base__=Model,
        api_version=(str, ""),
        kind=(str, ""),
        metadata=(ListMeta, ListMeta()),
        items=items,
    )


def _add_lists(router: APIRouter, context: Context, names: KindNames) -> None:
    kind = names.kind

    def answer(namespace: str | None, asked: _ListQuery) -> Response:
        cache = context.cache
        selection = select(kind, namespace, asked.labels, asked.fields)
        if asked.watch:
            since = parse_cursor(asked.since, cache.cursor)
            return watch_response(context.hub, selection, since, asked.timeout_seconds)
        page = context.pager.page(selection, asked.sort, asked.limit, asked.token)
        return list_response(
            kind, page.items, page.resource_version, page.next_token, page.remaining
        )

    words: dict[str, Any] = {
        "responses": {200: {"model": _list_model(kind), "content": _EVENTS}, **READ_ERRORS},
        "summary": f"List or watch {names.plural}",
        "description": _LIST_WORDS,
        "tags": [names.plural],
    }
    if names.namespaced:

        @router.get(
            f"{API_ROOT}/namespaces/{{namespace}}/{names.plural}",
            operation_id=f"list{kind}sInNamespace",
            **words,
        )
        async def list_in_namespace(namespace: str, asked: _Asked) -> Response:
            return answer(namespace, asked)

    @router.get(f"{API_ROOT}/{names.plural}", operation_id=f"list{kind}s", **words)
    async def list_all(asked: _Asked) -> Response:
        return answer(None, asked)


def _add_get(router: APIRouter, context: Context, names: KindNames) -> None:
    @router.get(
        object_path(names),
        operation_id=f"get{names.kind}",
        summary=f"Get one of the {names.plural}",
        responses={200: {"model": KINDS[names.kind]}, **READ_ERRORS},
        openapi_extra=path_parameters(names),
        tags=[names.plural],
    )
    async def get(
        request: Request,
        at: Annotated[
            datetime | None, Query(description="As it was then, by its history. RFC 3339.")
        ] = None,
    ) -> Response:
        ref = _ref_of(request, names)
        if at is None:
            return object_response(context.find(Resource, ref))
        moment = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        found = past.at_time(await history_of(context, ref), ref, moment).resource
        assert found is not None
        return object_response(found)


def _add_delete(router: APIRouter, context: Context, names: KindNames) -> None:
    @router.delete(
        object_path(names),
        operation_id=f"delete{names.kind}",
        summary=f"Delete one of the {names.plural}",
        description="Finalizers keep the object until it is cleaned up, and a node that was not "
        "rejected is kept while it has open executions; `force` minds neither.",
        responses={200: {"model": Deleted}, **READ_ERRORS, 409: ERRORS[409]},
        openapi_extra=path_parameters(names),
        tags=[names.plural],
    )
    async def delete(request: Request, force: bool = False) -> Response:
        ref = _ref_of(request, names)
        left = await context.actions.delete(ref, actor_of(request), force=force)
        pending = left.metadata.finalizers if left else ()
        return object_response(
            Deleted(kind=ref.kind, name=ref.name, deleted=left is None, pending=pending)
        )


def _add_history(router: APIRouter, context: Context, names: KindNames) -> None:
    @router.get(
        object_path(names, "/history"),
        operation_id=f"history{names.kind}",
        summary=f"What happened to one of the {names.plural}",
        description="Goes on to answer after the object was deleted, while its history is kept.",
        responses={200: {"model": HistoryList}, **READ_ERRORS},
        openapi_extra=path_parameters(names),
        tags=[names.plural],
    )
    async def history(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=HISTORY_ENTRIES_MAX)] = 100,
        uid: Annotated[
            str,
            # It becomes part of a subject, and too long a one ends the store's connection.
            Query(
                max_length=UID_LENGTH_MAX,
                pattern="^[A-Za-z0-9_.-]*$",
                description="One incarnation of the name only.",
            ),
        ] = "",
        objects: Annotated[bool, Query(description="With the object as it was.")] = False,
        declared: Annotated[
            bool, Query(description="Only what changed what users say: spec, labels, annotations.")
        ] = False,
    ) -> Response:
        ref = _ref_of(request, names)
        entries = await history_of(context, ref, uid=uid or None)
        # One more than asked for: the first is compared with the one before it.
        kept = entries if declared else entries[-(limit + 1) :]
        items = [
            (item, entry)
            for item, entry in zip(past.items(kept), kept, strict=True)
            if item.declared or item.removed or not declared
        ]
        told = tuple(
            item.but(object=json.loads(full_json(entry.resource)))
            if objects and entry.resource is not None
            else item
            for item, entry in items[-limit:]
        )
        return object_response(HistoryList(items=told))


async def history_of(
    context: Context, ref: Ref, *, uid: str | None = None
) -> Sequence[HistoryEntry]:
    """All that is known of an object's past. Raises NotFoundError if there never was one."""
    store = context.services.state.store
    entries = await store.history(ref, limit=past.ENTRIES_MAX, uid=uid)
    if not entries:
        context.find(Resource, ref)
    return entries


def _add_explain(router: APIRouter, context: Context, names: KindNames) -> None:
    @router.get(
        object_path(names, "/explain"),
        operation_id=f"explain{names.kind}",
        summary="Why it is as it is, what it waits for, and what would help",
        responses={200: {"model": Explanation}, **READ_ERRORS},
        openapi_extra=path_parameters(names),
        tags=[names.plural],
    )
    async def explain(
        request: Request,
        job: Annotated[
            str, Query(description="Of a node: whether this job, NAME or NAMESPACE/NAME, fits.")
        ] = "",
        node: Annotated[str, Query(description="Of a job: whether it fits this node.")] = "",
    ) -> Response:
        item = context.find(Resource, _ref_of(request, names))
        if job or node:
            return object_response(await _explain_pair(context, item, job, node))
        return object_response(explanation_of(context, item))


async def _explain_pair(context: Context, item: Resource, job: str, node: str) -> Explanation:
    """Whether one job could run on one node, rule by rule."""
    if isinstance(item, Node) and job and not node:
        namespace, slash, name = job.rpartition("/")
        where = namespace if slash else DEFAULT_NAMESPACE
        the_job, the_node = context.find(Job, path_ref("Job", where, name)), item
    elif isinstance(item, Job) and node and not job:
        the_job, the_node = item, context.find(Node, path_ref("Node", "", node))
    else:
        hint = "ask a node with job=NAME, or a job with node=NAME"
        field = "job" if job else "node"
        raise InvalidError([Problem(field, f"cannot be asked of a {item.kind}", hint=hint)])
    findings = await context.applier.explain_pair(the_job, the_node)
    return explain_pair(the_job, the_node, findings)


def explanation_of(context: Context, item: Resource) -> Explanation:
    """Gather what belongs to an object, and explain it."""
    cache = context.cache
    match item:
        case Job():
            executions = cache.owned_by(item.metadata.uid, "Execution")
            acceptances = cache.owned_by(item.metadata.uid, "Acceptance")
            return explain_job(
                item,
                [e for e in executions if isinstance(e, Execution)],
                [a for a in acceptances if isinstance(a, Acceptance)],
            )
        case Execution():
            name = acceptance_name(item.spec.job, item.spec.job_uid, item.spec.slot)
            acceptance = cache.get(Ref("Acceptance", item.ref.namespace, name))
            return explain_execution(
                item,
                acceptance if isinstance(acceptance, Acceptance) else None,
                _job_of(cache, item),
            )
        case Node():
            executions = cache.on_node(item.name, "Execution")
            return explain_node(item, [e for e in executions if isinstance(e, Execution)])
        case Publication():
            return explain_publication(item)
        case Acceptance():
            return explain_acceptance(item)
        case Manifest():
            return explain_manifest(item)
        case RetiredJob():
            return explain_retired(item)
        case Namespace():
            jobs = [j for j in cache.list("Job", item.name) if isinstance(j, Job)]
            open_ = [
                e
                for e in cache.list("Execution", item.name)
                if isinstance(e, Execution) and not e.phase.is_final
            ]
            return explain_namespace(item, jobs, open_)
        case Source():
            return explain_source(item)
        case Claim():
            return explain_claim(item)
    raise not_found(item.ref)


def _job_of(cache: Cache, execution: Execution) -> Job | None:
    job = cache.get(Ref("Job", execution.ref.namespace, execution.spec.job))
    return job if isinstance(job, Job) and job.metadata.uid == execution.spec.job_uid else None
