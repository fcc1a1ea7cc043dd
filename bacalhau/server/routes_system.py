"""Routes about the server itself: health, version, metrics."""

import platform
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from bacalhau.replies import Health, Version
from bacalhau.server.context import Context
from bacalhau.server.metrics import CONTENT_TYPE
from bacalhau.server.problems import ApiError
from bacalhau.server.reply import object_response
from bacalhau.server.routes_objects import ERRORS

_TAGS: list[Any] = ["system"]


def add_routes(router: APIRouter, context: Context) -> None:
    """Add the routes about the server."""

    @router.get(
        "/healthz",
        operation_id="healthz",
        summary="The process answers",
        responses={200: {"model": Health}},
        tags=_TAGS,
    )
    async def healthz() -> Response:
        return object_response(Health())

    @router.get(
        "/readyz",
        operation_id="readyz",
        summary="The process can serve: its cache is filled, its parts run",
        responses={200: {"model": Health}, 503: ERRORS[503]},
        tags=_TAGS,
    )
    async def readyz() -> Response:
        context.cache  # noqa: B018 - refuses while the cache is being filled
        if not context.services.is_ready():
            raise ApiError(503, "NotReady", "not all parts of this server run yet")
        return object_response(Health())

    @router.get(
        "/version",
        operation_id="version",
        summary="Which version runs here",
        responses={200: {"model": Version}},
        tags=_TAGS,
    )
    async def version() -> Response:
        return object_response(
            Version(
                version=context.services.version,
                python=platform.python_version(),
                os=platform.system().lower(),
                arch=platform.machine(),
            )
        )

    @router.get(
        "/metrics",
        operation_id="metrics",
        summary="Prometheus metrics",
        responses={200: {"content": {"text/plain": {}}}},
        tags=_TAGS,
    )
    async def metrics() -> Response:
        return Response(context.metrics.render(), media_type=CONTENT_TYPE)
