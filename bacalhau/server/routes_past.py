"""Routes of the past: what differs between two revisions, and back to an old one."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from bacalhau.kinds import ALL, KindNames
from bacalhau.replies import FieldDifference, RevisionDiff, RollbackRequest, RolledBack
from bacalhau.server import past
from bacalhau.server.bodies import json_body, read_json
from bacalhau.server.context import Context, actor_of
from bacalhau.server.reply import object_response
from bacalhau.server.routes_objects import (
    READ_ERRORS,
    WRITE_ERRORS,
    history_of,
    object_path,
    path_parameters,
    path_ref,
)
from bacalhau_api.compare import compare
from bacalhau_api.meta import Ref

_ROLLED_BACK = ("Job", "Node")


def add_routes(router: APIRouter, context: Context) -> None:
    """Add the routes of the past of every kind."""
    for names in ALL:
        _add_diff(router, context, names)
        if names.kind in _ROLLED_BACK:
            _add_rollback(router, context, names)


def _ref_of(request: Request, names: KindNames) -> Ref:
    params = request.path_params
    return path_ref(names.kind, params.get("namespace", ""), params["name"])


def _add_diff(router: APIRouter, context: Context, names: KindNames) -> None:
    @router.get(
        object_path(names, "/diff"),
        operation_id=f"diff{names.kind}",
        summary=f"What differs between two revisions of one of the {names.plural}",
        description="Field by field, on canonical forms: spec, labels and annotations.",
        responses={200: {"model": RevisionDiff}, **READ_ERRORS},
        openapi_extra=path_parameters(names),
        tags=[names.plural],
    )
    async def diff(
        request: Request,
        from_: Annotated[str, Query(alias="from", description="A revision, or gN: generation N.")],
        to: Annotated[str, Query(description="The same; absent: the newest.")] = "",
    ) -> Response:
        ref = _ref_of(request, names)
        entries = await history_of(context, ref)
        old = past.at_revision(entries, ref, from_, "from")
        newest = str(entries[-1].revision)
        new = past.at_revision(entries, ref, to or newest, "to")
        assert old.resource is not None
        assert new.resource is not None
        fields = tuple(
            FieldDifference(field=d.field, old=d.old, new=d.new, runs=d.runs)
            for d in compare(old.resource, new.resource)
        )
        return object_response(
            RevisionDiff(
                kind=ref.kind,
                namespace=ref.namespace,
                name=ref.name,
                from_=old.revision,
                to=new.revision,
                fields=fields,
            )
        )


def _add_rollback(router: APIRouter, context: Context, names: KindNames) -> None:
    @router.post(
        object_path(names, "/rollback"),
        operation_id=f"rollback{names.kind}",
        summary=f"Back to an old revision of one of the {names.plural}",
        description="The old spec becomes a new change, with a generation of its own if it affects "
        "execution; nothing is taken out of the history. A job that is gone is made again.",
        responses={200: {"model": RolledBack}, **WRITE_ERRORS},
        openapi_extra=path_parameters(names)
        | json_body(RollbackRequest.model_json_schema(by_alias=True), required=True),
        tags=[names.plural],
    )
    async def rollback(request: Request) -> Response:
        context.cache  # noqa: B018 - refuses while the cache is being filled
        ref = _ref_of(request, names)
        asked = await read_json(request, RollbackRequest)
        entries = await history_of(context, ref)
        old = past.at_revision(entries, ref, asked.to, "to")
        assert old.resource is not None
        done = await context.actions.roll_back(
            old.resource, old.revision, actor_of(request), message=asked.message
        )
        meta = done.item.metadata
        return object_response(
            RolledBack(
                kind=ref.kind,
                namespace=ref.namespace,
                name=ref.name,
                outcome=done.outcome,
                revision=meta.resource_version,
                generation=meta.generation,
                warnings=done.warnings,
            )
        )
