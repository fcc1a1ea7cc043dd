"""Routes of executions: their logs and their outputs."""

from collections.abc import AsyncIterator
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from bacalhau.kinds import EXECUTION
from bacalhau.server.context import Context
from bacalhau.server.log_replies import LOG_RESPONSES, LogParameters, log_response
from bacalhau.server.outputs import find, list_page, parse_range, read_span, tar_stream
from bacalhau.server.reply import object_response
from bacalhau.server.routes_objects import READ_ERRORS, object_path, path_ref
from bacalhau.server.stream import Streamed, disposition
from bacalhau_api.v1.execution import Execution
from bacalhau_api.wire import OutputsPage

_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_TAGS: list[Any] = ["executions"]


def add_routes(router: APIRouter, context: Context) -> None:
    """Add the routes of executions."""

    @router.get(
        object_path(EXECUTION, "/logs"),
        operation_id="executionLogs",
        summary="The output of one execution",
        responses=LOG_RESPONSES,
        tags=_TAGS,
    )
    async def logs(request: Request, namespace: str, name: str, asked: LogParameters) -> Response:
        execution = context.find(Execution, path_ref("Execution", namespace, name))
        return await log_response(request, context.logs.of_execution(execution.ref, asked))

    @router.get(
        object_path(EXECUTION, "/outputs"),
        operation_id="listOutputs",
        summary="The files an execution left, by path",
        responses={200: {"model": OutputsPage}, **READ_ERRORS},
        tags=_TAGS,
    )
    async def outputs(
        namespace: str,
        name: str,
        after: Annotated[str, Query(description="The last path of the page before.")] = "",
    ) -> Response:
        execution = context.find(Execution, path_ref("Execution", namespace, name))
        return object_response(await list_page(context.services.nodes, execution, after))

    _add_archive(router, context)
    _add_file(router, context)


def _add_archive(router: APIRouter, context: Context) -> None:
    @router.get(
        object_path(EXECUTION, "/outputs/archive"),
        operation_id="outputsArchive",
        summary="All files of an execution as one tar",
        description="To go on after an interruption, read the missing files one by one.",
        responses={200: {"content": {"application/x-tar": {}}}, **READ_ERRORS},
        tags=_TAGS,
    )
    async def archive(namespace: str, name: str) -> Response:
        execution = context.find(Execution, path_ref("Execution", namespace, name))
        nodes = context.services.nodes
        await list_page(nodes, execution, "")  # what is not there is to be an ordinary error
        return Streamed(
            tar_stream(nodes, execution),
            media_type="application/x-tar",
            headers={"Content-Disposition": disposition(f"{name}.tar")},
        )


def _add_file(router: APIRouter, context: Context) -> None:
    @router.get(
        object_path(EXECUTION, "/outputs/file"),
        operation_id="outputsFile",
        summary="One file of an execution, or the rest of it from an offset",
        responses={
            200: {"description": "The file.", "content": _BYTES},
            206: {"description": "A part of it.", "content": _BYTES},
            416: {"description": "The file ends before the range."},
            **READ_ERRORS,
        },
        tags=_TAGS,
    )
    async def file(
        namespace: str,
        name: str,
        path: Annotated[str, Query(description="As the list of outputs gives it.")],
        offset: Annotated[int, Query(ge=0, le=2**62)] = 0,
        range_: Annotated[str, Header(alias="Range")] = "",
    ) -> Response:
        execution = context.find(Execution, path_ref("Execution", namespace, name))
        nodes = context.services.nodes
        found = await find(nodes, execution, path)
        span = parse_range(range_, offset, found.size_bytes)
        headers = {
            "Accept-Ranges": "bytes",
            "Content-Length": str(span.end - span.start),
            "Content-Disposition": disposition(path.rsplit("/", 1)[-1]),
            "ETag": f'"{quote(execution.metadata.uid)}-{found.size_bytes}"',
        }
        is_part = span.start > 0 or span.end < span.size
        if is_part:
            headers["Content-Range"] = f"bytes {span.start}-{span.end - 1}/{span.size}"
        body = read_span(nodes, execution, path, span) if span.end > span.start else _nothing()
        return Streamed(
            body,
            status=206 if is_part and span.end > span.start else 200,
            media_type="application/octet-stream",
            headers=headers,
        )


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""
