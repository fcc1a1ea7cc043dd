"""Routes of nodes: what operators decide about them, and how machines become nodes."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from bacalhau.kinds import API_ROOT, NODE
from bacalhau.replies import JoinAnswer, JoinRequest, NodeApplied, TokenAnswer, TokenRequest
from bacalhau.server.bodies import json_body, manifest_body, read_json, read_manifest
from bacalhau.server.context import Context, actor_of
from bacalhau.server.origin import Origin
from bacalhau.server.reply import object_response
from bacalhau.server.routes_objects import ERRORS, WRITE_ERRORS, object_path, path_ref
from bacalhau_api.v1.node import Membership, Node

_TAGS: list[Any] = ["nodes"]


def add_routes(router: APIRouter, context: Context) -> None:
    """Add the routes of nodes."""
    _add_join(router, context)
    _add_apply(router, context)
    for word, words in (
        ("approve", "Let a node take part"),
        ("reject", "Let a node take part no longer"),
        ("cordon", "Give a node no new executions"),
        ("uncordon", "Give a node executions again"),
        ("drain", "Give a node no new executions and move away those it has"),
    ):
        _add_verb(router, context, word, words)


def _add_verb(router: APIRouter, context: Context, word: str, words: str) -> None:
    @router.post(
        object_path(NODE, f"/{word}"),
        operation_id=f"{word}Node",
        summary=words,
        responses={200: {"model": Node}, **WRITE_ERRORS},
        tags=_TAGS,
    )
    async def verb(request: Request, name: str) -> Response:
        context.cache  # noqa: B018 - refuses while the cache is being filled
        path_ref("Node", "", name)
        actions, actor = context.actions, actor_of(request)
        if word in ("approve", "reject"):
            wanted = Membership.APPROVED if word == "approve" else Membership.REJECTED
            return object_response(await actions.set_membership(name, actor, wanted))
        node = await actions.set_schedulable(
            name, actor, unschedulable=word != "uncordon", drain=word == "drain"
        )
        return object_response(node)


def _add_apply(router: APIRouter, context: Context) -> None:
    async def apply(request: Request, name: str, origin: Origin, dryRun: bool = False) -> Response:
        context.cache  # noqa: B018 - refuses while the cache is being filled
        path_ref("Node", "", name)
        node, warnings = await read_manifest(request, Node, namespace=None, name=name)
        applied = await context.actions.apply_node(
            node, actor_of(request), dry_run=dryRun, provenance=origin
        )
        assert isinstance(applied.item, Node)
        return object_response(
            NodeApplied(outcome=applied.outcome, warnings=warnings, node=applied.item)
        )

    for method in ("PUT", "PATCH"):
        router.add_api_route(
            object_path(NODE),
            apply,
            methods=[method],
            operation_id=f"{'apply' if method == 'PUT' else 'patch'}Node",
            summary="Change a node's labels, annotations, taints and the like",
            description="Nodes come into being by joining, not by apply.",
            responses={200: {"model": NodeApplied}, **WRITE_ERRORS},
            openapi_extra=manifest_body("Node"),
            tags=_TAGS,
        )


def _add_join(router: APIRouter, context: Context) -> None:
    @router.post(
        f"{API_ROOT}/nodes/join",
        operation_id="joinNode",
        summary="Enrol a machine as a node, with a single-use token",
        responses={200: {"model": JoinAnswer}, 403: ERRORS_403, **WRITE_ERRORS},
        openapi_extra=json_body(JoinRequest.model_json_schema(), required=True),
        tags=_TAGS,
    )
    async def join(request: Request) -> Response:
        asked = await read_json(request, JoinRequest)
        reply = await context.services.enrolment.join(asked.token, asked.node, asked.public_key)
        return object_response(
            JoinAnswer(node=reply.node, nats_url=reply.nats_url, is_approved=reply.is_approved)
        )

    @router.post(
        f"{API_ROOT}/tokens/join",
        operation_id="createJoinToken",
        summary="Make a single-use token that enrols a node",
        status_code=201,
        responses={201: {"model": TokenAnswer}, **WRITE_ERRORS},
        openapi_extra=json_body(TokenRequest.model_json_schema(), required=False),
        tags=_TAGS,
    )
    async def create_token(request: Request) -> Response:
        asked = await read_json(request, TokenRequest, required=False)
        token = await context.services.enrolment.create_token(
            node=asked.node, ttl_seconds=asked.ttl_seconds, actor=actor_of(request)
        )
        return object_response(TokenAnswer(token=token, ttl_seconds=asked.ttl_seconds), 201)


ERRORS_403: dict[str, Any] = ERRORS[404] | {"description": "The token is not valid."}
