"""Routes of plans: what would happen, and making it happen together."""

import json
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from bacalhau.kinds import API_ROOT
from bacalhau.replies import DocumentText, SetRequest, SimulateRequest
from bacalhau.server.bodies import MANIFEST_TYPES, json_body, read_json
from bacalhau.server.context import Context, actor_of
from bacalhau.server.reply import object_response
from bacalhau.server.routes_objects import READ_ERRORS, WRITE_ERRORS, is_possible
from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.jobfile import Document, parse_manifests
from bacalhau_api.meta import DEFAULT_NAMESPACE, check_name
from bacalhau_api.plans import AppliedSet, ChangePlan
from bacalhau_api.v1 import KINDS
from bacalhau_controllers.forecast import ChangeSet, Wanted, inventory_of

_TAGS: list[Any] = ["plans"]
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/SetRequest"}},
            "application/yaml": {"schema": {"type": "string"}},
        },
    }
}
_SET_WORDS = (
    "The body is a JSON object of documents and what goes with them, or plain manifests as YAML. "
)


def add_routes(router: APIRouter, context: Context) -> None:
    """Add the routes of plans."""

    @router.post(
        f"{API_ROOT}/plan",
        operation_id="plan",
        summary="What would happen if these documents were applied",
        description=_SET_WORDS + "Nothing is stored. The answer ends in a token for apply.",
        responses={200: {"model": ChangePlan}, **WRITE_ERRORS},
        openapi_extra=_BODY,
        tags=_TAGS,
    )
    async def plan(request: Request) -> Response:
        asked = await _read_set(request)
        return object_response(await context.applier.plan(_changes(asked)))

    @router.post(
        f"{API_ROOT}/apply",
        operation_id="applySet",
        summary="Apply documents together, all or none",
        description=_SET_WORDS + "With the token of a plan it is refused (409, PlanOutdated) if "
        "the outcome would now be another; then the documents may be left out if the server still "
        "remembers the plan.",
        responses={200: {"model": AppliedSet}, **WRITE_ERRORS},
        openapi_extra=_BODY,
        tags=_TAGS,
    )
    async def apply(request: Request) -> Response:
        context.cache  # noqa: B018 - refuses while the cache is being filled
        asked = await _read_set(request)
        is_token_alone = bool(asked.token) and not asked.documents and not asked.inventory
        if not is_token_alone and not asked.documents and not asked.inventory:
            raise InvalidError([Problem("documents", "holds nothing to apply")])
        done = await context.applier.apply(
            None if is_token_alone else _changes(asked),
            actor_of(request),
            token=asked.token,
            any_place=asked.any_place,
        )
        return object_response(done)

    @router.post(
        f"{API_ROOT}/simulate",
        operation_id="simulate",
        summary="What would happen without some nodes",
        description="Nothing is stored or stopped.",
        responses={200: {"model": ChangePlan}, **READ_ERRORS},
        openapi_extra=json_body(SimulateRequest.model_json_schema(by_alias=True), required=True),
        tags=_TAGS,
    )
    async def simulate(request: Request) -> Response:
        asked = await read_json(request, SimulateRequest)
        names = [_node_name(word) for word in asked.without]
        return object_response(await context.applier.without_nodes(names))


def _node_name(word: str) -> str:
    kind, slash, name = word.partition("/")
    if not slash or kind.lower() not in ("node", "nodes", "no", "n") or not name:
        hint = "write node/NAME"
        raise InvalidError([Problem("without", "is not a node", word[:80], hint)])
    return name


async def _read_set(request: Request) -> SetRequest:
    """The envelope, or one made of plain manifests."""
    given = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if given == "application/json" or given not in MANIFEST_TYPES:
        body = await request.body()
        if given != "application/json" or not _is_manifest(body):
            return await read_json(request, SetRequest)
    text = (await request.body()).decode("utf-8", "surrogateescape")
    return SetRequest(documents=(DocumentText(text=text, source="<body>"),))


def _is_manifest(body: bytes) -> bool:
    """Whether a JSON body is a manifest or a flat job rather than an envelope."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return False
    keys = {str(key).lower() for key in data} if isinstance(data, dict) else set()
    return bool(keys & {"kind", "apiversion", "tasks", "job"})


def _changes(asked: SetRequest) -> ChangeSet:
    documents: list[Document] = []
    problems: list[Problem] = []
    for number, each in enumerate(asked.documents):
        source = each.source or f"documents[{number}]"
        try:
            text = each.text.encode("utf-8", "surrogateescape")
            documents += parse_manifests(text, source=source)
        except InvalidError as error:
            problems += error.problems
        except UnicodeEncodeError:
            problems.append(Problem(source, "is not valid Unicode"))
    try:
        provenance = asked.provenance.cleaned()
    except ValueError as error:
        problems.append(Problem("provenance", str(error)))
    if asked.namespace:
        try:
            check_name(asked.namespace)
        except ValueError as error:
            problems.append(Problem("namespace", str(error), asked.namespace[:80]))
    for number, entry in enumerate(asked.inventory):
        if (
            entry.kind not in KINDS
            or not is_possible(entry.namespace or "-")
            or not is_possible(entry.name)
        ):
            problems.append(Problem(f"inventory[{number}]", "is not the name of an object"))
    if asked.prune and not asked.owner:
        hint = "name who owns the inventory, such as source/prod"
        problems.append(Problem("owner", "is missing, so nothing can be pruned", hint=hint))
    if problems:
        raise InvalidError(problems)
    return ChangeSet(
        wanted=tuple(_wanted(document, asked.namespace) for document in documents),
        owner=asked.owner,
        inventory=inventory_of(asked.inventory),
        prune=asked.prune,
        provenance=provenance,
    )


def _wanted(document: Document, namespace: str) -> Wanted:
    item = document.resource
    if namespace and item.namespaced and item.metadata.namespace == DEFAULT_NAMESPACE:
        item = item.with_meta(namespace=namespace)
    return Wanted(item, document.source, document.line, document.warnings)
