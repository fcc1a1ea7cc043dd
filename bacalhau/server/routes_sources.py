"""Routes of sources: what operators say of them, and what a runner does that is not in this
process. The objects that a runner applies go through the same admission as all others."""

import json
from collections.abc import Sequence
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from bacalhau.gitops.operate import SourceActions
from bacalhau.gitops.runner import lease_name
from bacalhau.gitops.wire import (
    ApproveRequest,
    DoneAnswer,
    DoneItem,
    LeaseAnswer,
    LeaseRequest,
    LetGoRequest,
    ObjectName,
    OrderItem,
    OrdersRequest,
    ProblemItem,
    ReportRequest,
    Restored,
    SourceRequest,
    SuspendRequest,
)
from bacalhau.kinds import SOURCE
from bacalhau.server.bodies import json_body, read_json
from bacalhau.server.context import Context, actor_of
from bacalhau.server.reply import object_response
from bacalhau.server.routes_objects import WRITE_ERRORS, object_path, path_ref
from bacalhau_api.base import Model
from bacalhau_api.errors import ConflictError, FencedError, InvalidError, Problem
from bacalhau_api.jobfile import parse_manifests
from bacalhau_api.meta import DEFAULT_NAMESPACE
from bacalhau_api.v1 import KINDS
from bacalhau_api.v1.source import Claim, Source
from bacalhau_controllers.gitops import Declared, Done, Order, StoreObjects
from bacalhau_controllers.store import Fence, Lease

_TAGS: Final[list[Any]] = ["sources"]


def add_routes(router: APIRouter, context: Context) -> None:
    """Add the routes of sources."""
    services = context.services
    actions = SourceActions(services.state, services.clock, services.ids)
    _add_spec(router, context, actions)
    _add_verbs(router, context, actions)
    _add_lease(router, context)
    _add_runner(router, context)


def _words(operation: str, summary: str, body: type[Model] | None, answer: Any) -> dict[str, Any]:
    words: dict[str, Any] = {
        "operation_id": operation,
        "summary": summary,
        "responses": {200: {"model": answer}, **WRITE_ERRORS},
        "tags": _TAGS,
    }
    if body is not None:
        words["openapi_extra"] = json_body(body.model_json_schema(by_alias=True), required=True)
    return words


def _add_spec(router: APIRouter, context: Context, actions: SourceActions) -> None:
    @router.put(
        object_path(SOURCE),
        **_words("applySource", "Create a source, or change some of it", SourceRequest, Source),
    )
    async def put(request: Request, name: str) -> Response:
        context.cache  # noqa: B018 - refuses while the cache is being filled
        path_ref("Source", "", name)
        asked = await read_json(request, SourceRequest)
        given = {
            key: value
            for key in asked.model_fields_set
            if (value := getattr(asked, key)) is not None
        }
        return object_response(await actions.ensure(name, actor_of(request), **given))


def _add_verbs(router: APIRouter, context: Context, actions: SourceActions) -> None:
    @router.post(
        object_path(SOURCE, "/approve"),
        **_words("approveSource", "Let deletions go that are held back", ApproveRequest, Source),
    )
    async def approve(request: Request, name: str) -> Response:
        path_ref("Source", "", name)
        asked = await read_json(request, ApproveRequest)
        return object_response(await actions.approve(name, actor_of(request), asked.digest))

    @router.post(
        object_path(SOURCE, "/suspend"),
        **_words("suspendSource", "Apply nothing for a while", SuspendRequest, Source),
    )
    async def suspend(request: Request, name: str) -> Response:
        path_ref("Source", "", name)
        asked = await read_json(request, SuspendRequest)
        source = await actions.suspend(name, actor_of(request), asked.seconds, asked.reason)
        return object_response(source)

    @router.post(
        object_path(SOURCE, "/resume"),
        **_words("resumeSource", "End a suspension", None, Source),
    )
    async def resume(request: Request, name: str) -> Response:
        path_ref("Source", "", name)
        return object_response(await actions.resume(name, actor_of(request)))

    @router.post(
        object_path(SOURCE, "/restore"),
        **_words("restoreObject", "Bring back what was pruned within a day", ObjectName, Restored),
    )
    async def restore(request: Request, name: str) -> Response:
        path_ref("Source", "", name)
        asked = await read_json(request, ObjectName)
        kind = KINDS.get(asked.kind)
        if kind is None:
            raise InvalidError([Problem("kind", "is not a known kind", asked.kind[:80])])
        where = (asked.namespace or DEFAULT_NAMESPACE) if kind.namespaced else ""
        ref = path_ref(asked.kind, where, asked.name)
        item = await actions.restore(name, actor_of(request), ref)
        meta = item.metadata
        return object_response(
            Restored(kind=ref.kind, namespace=ref.namespace, name=ref.name, uid=meta.uid)
        )


def _add_lease(router: APIRouter, context: Context) -> None:
    @router.post(
        object_path(SOURCE, "/runner/lease"),
        **_words("leaseSource", "Be the one that runs a source", LeaseRequest, LeaseAnswer),
    )
    async def lease(request: Request, name: str) -> Response:
        path_ref("Source", "", name)
        asked = await read_json(request, LeaseRequest)
        store, key = context.services.state.store, lease_name(name)
        held = Lease(key, asked.holder, asked.token, 0.0)
        found: Lease | None = None
        if asked.ttl_seconds == 0:
            await store.release_lease(held)
        elif asked.token:
            try:
                found = await store.renew_lease(held, asked.ttl_seconds)
            except FencedError:
                found = None
        else:
            found = await store.acquire_lease(key, asked.holder, asked.ttl_seconds)
        return object_response(LeaseAnswer(token=found.token if found else 0))


def _add_runner(router: APIRouter, context: Context) -> None:
    services = context.services

    def hands(name: str, token: int) -> tuple[Source, StoreObjects]:
        source = context.find(Source, path_ref("Source", "", name))
        fence = Fence(lease_name(name), token)
        return source, StoreObjects(services.state, services.clock, services.ids, fence)

    @router.post(
        object_path(SOURCE, "/runner/apply"),
        **_words("applySourceObjects", "Apply declared objects", OrdersRequest, DoneAnswer),
    )
    async def apply(request: Request, name: str) -> Response:
        asked = await read_json(request, OrdersRequest)
        source, objects = hands(name, asked.token)
        orders = [Order(_declared(item), asked.commit) for item in asked.orders]
        return _answer(await _unfenced(objects.apply(source, orders)))

    @router.post(
        object_path(SOURCE, "/runner/let-go"),
        **_words("pruneSourceObjects", "Delete or release objects", LetGoRequest, DoneAnswer),
    )
    async def let_go(request: Request, name: str) -> Response:
        asked = await read_json(request, LetGoRequest)
        source, objects = hands(name, asked.token)
        claims = []
        for namespace, claim_name, uid in asked.claims:
            found = context.cache.get(path_ref("Claim", namespace, claim_name))
            if (
                isinstance(found, Claim)
                and found.spec.source_uid == source.metadata.uid
                and found.spec.uid == uid
            ):
                claims.append(found)
        if asked.action == "prune":
            return _answer(await _unfenced(objects.prune(source, claims, asked.commit)))
        return _answer(await _unfenced(objects.release(source, claims, asked.why)))

    @router.put(
        object_path(SOURCE, "/runner/status"),
        **_words("reportSource", "Store the status of a source", ReportRequest, Source),
    )
    async def report(request: Request, name: str) -> Response:
        asked = await read_json(request, ReportRequest)
        source, objects = hands(name, asked.token)
        if source.metadata.resource_version != asked.resource_version:
            raise ConflictError("the source was changed meanwhile", hint="read it again")
        return object_response(await _unfenced(objects.report(source, asked.status)))


async def _unfenced(work: Any) -> Any:
    """A runner that lost its lease is told so: not that this server had lost its own."""
    try:
        return await work
    except FencedError as error:
        raise ConflictError(
            "another process runs this source now", reason="LeaseLost", hint="take the lease anew"
        ) from error


def _declared(item: OrderItem) -> Declared:
    documents = parse_manifests(json.dumps(item.manifest), source=item.file)
    if len(documents) != 1:
        raise InvalidError([Problem("manifest", "is not one object", hint="send them one by one")])
    return Declared(documents[0].resource, item.file, item.line, documents[0].warnings)


def _answer(done: Sequence[Done]) -> Response:
    return object_response(DoneAnswer(items=tuple(_item(d) for d in done)))


def _item(done: Done) -> DoneItem:
    ref, error = done.ref, done.error
    if error is None:
        return DoneItem(kind=ref.kind, namespace=ref.namespace, name=ref.name, outcome=done.outcome)
    problems = error.problems if isinstance(error, InvalidError) else ()
    return DoneItem(
        kind=ref.kind,
        namespace=ref.namespace,
        name=ref.name,
        reason=error.reason,
        message=error.message,
        hint=error.hint,
        is_conflict=isinstance(error, ConflictError),
        problems=tuple(
            ProblemItem(field=p.field, message=p.message, hint=p.hint) for p in problems[:20]
        ),
    )
