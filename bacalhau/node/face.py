"""The agent's own face on a Unix socket: what a node has and how it is, with nobody else reachable.

The paths and shapes are those of the orchestrator's API, as far as a node knows the answer, and
read-only: the same commands work against either. Beyond them there is `/agent/status`.
"""

import contextlib
import logging
import platform
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Final, Literal, TypeVar, cast

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bacalhau.kinds import (
    ALL,
    API_ROOT,
    EXECUTION,
    JOB,
    NODE,
    PUBLICATION,
    STATUS_PATH,
    KindNames,
)
from bacalhau.localsocket import listen
from bacalhau.node.follow import LogQuery, Record, read_all, read_one
from bacalhau.node.reader import OutputReader
from bacalhau.node.status import LocalExecution, NodeView
from bacalhau.replies import Explanation, Health, Version
from bacalhau.server.explain import explain_execution, explain_node, explain_publication
from bacalhau.server.outputs import check_output_path, parse_range
from bacalhau.server.problems import ApiError, body_of, error_response
from bacalhau.server.query import select, select_sorted
from bacalhau.server.reply import full_json, list_response, object_response
from bacalhau.server.stream import NDJSON, Streamed, disposition, json_line
from bacalhau_api.errors import BacalhauError, InvalidError, NotFoundError, Problem
from bacalhau_api.meta import Resource
from bacalhau_api.v1.execution import Execution, Publication
from bacalhau_api.v1.node import Node
from bacalhau_api.wire import OutputRead, OutputsList

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS: Final = 1
CONNECTIONS_MAX: Final = 64
PIECE_BYTES: Final = 256 * 1024
_STREAMS: Final = ("stdout", "stderr", "all")
R = TypeVar("R", bound=Resource)


class Face:
    """Serves one node's view on its socket. `open` it, then `run` until told to end by `close`."""

    def __init__(self, view: NodeView, reader: OutputReader, path: Path) -> None:
        self._view = view
        self._reader = reader
        self._path = path
        self._socket: socket | None = None
        self._server = _Server(
            uvicorn.Config(
                Starlette(
                    routes=_Routes(view, reader).all(),
                    exception_handlers={
                        BacalhauError: _on_error,
                        HTTPException: _on_http,
                        Exception: _on_bug,
                    },
                ),
                log_config=None,
                access_log=False,
                server_header=False,
                http="h11",
                loop="none",
                ws="none",
                lifespan="off",
                limit_concurrency=CONNECTIONS_MAX,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )

    def open(self) -> None:
        """Make the socket. Raises OSError."""
        self._socket = listen(self._path)

    async def run(self) -> None:
        """Serve until `close`."""
        assert self._socket is not None
        await self._server.serve(sockets=[self._socket])

    def close(self) -> None:
        """End soon: followed logs break off. The socket goes away at once."""
        self._server.should_exit = True
        with contextlib.suppress(OSError):
            self._path.unlink()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none: the process has one place that handles signals."""
        yield


@dataclass(frozen=True, slots=True)
class _Routes:
    """The answers, each made from what the agent says at that moment."""

    view: NodeView
    reader: OutputReader

    def all(self) -> list[Route]:
        """Every path, fixed ones first."""
        found = [
            Route("/healthz", self.health),
            Route("/version", self.version),
            Route(STATUS_PATH, self.status),
            Route(_one(JOB, "/logs"), self.job_logs),
            Route(_one(EXECUTION, "/logs"), self.logs),
            Route(_one(EXECUTION, "/outputs"), self.outputs),
            Route(_one(EXECUTION, "/outputs/file"), self.output_file),
        ]
        for kind in (EXECUTION, PUBLICATION, NODE):
            found.append(Route(_one(kind, "/explain"), self._explaining(kind)))
            found.append(Route(_one(kind), self._getting(kind)))
            found.append(Route(f"{API_ROOT}/{kind.plural}", self._listing(kind)))
            if kind.namespaced:
                where = f"{API_ROOT}/namespaces/{{namespace}}/{kind.plural}"
                found.append(Route(where, self._listing(kind)))
        return found

    async def health(self, request: Request) -> Response:
        return object_response(Health())

    async def version(self, request: Request) -> Response:
        return object_response(
            Version(
                version=self.view.status().version,
                python=platform.python_version(),
                os=platform.system().lower(),
                arch=platform.machine(),
            )
        )

    async def status(self, request: Request) -> Response:
        return object_response(self.view.status())

    # -- objects ---------------------------------------------------------------------------------

    def _listing(self, kind: KindNames) -> Callable[[Request], object]:
        async def answer(request: Request) -> Response:
            asked = request.query_params
            if asked.get("watch"):
                hint = "ask again instead, or watch at the orchestrator"
                problem = Problem("watch", "is not possible on a node's own socket", "", hint)
                raise InvalidError([problem])
            selection = select(
                kind.kind,
                request.path_params.get("namespace"),
                asked.get("labelSelector", ""),
                asked.get("fieldSelector", ""),
            )
            chosen = [item for item in self._items(kind) if selection.holds(item)]
            items = select_sorted(chosen, selection, asked.get("sort", "name"))
            return list_response(kind.kind, items, "", "", 0)

        return answer

    def _getting(self, kind: KindNames) -> Callable[[Request], object]:
        async def answer(request: Request) -> Response:
            return object_response(self._find(kind, request))

        return answer

    def _explaining(self, kind: KindNames) -> Callable[[Request], object]:
        async def answer(request: Request) -> Response:
            return object_response(self._explain(self._find(kind, request)))

        return answer

    def _explain(self, item: Resource) -> Explanation:
        match item:
            case Execution():
                return explain_execution(item, None)
            case Publication():
                return explain_publication(item)
            case Node():
                return explain_node(item, list(self.view.executions()))
        raise AssertionError(f"{item.kind} is not served")

    def _items(self, kind: KindNames) -> Iterable[Resource]:
        if kind is EXECUTION:
            return self.view.executions()
        return self.view.publications() if kind is PUBLICATION else self.view.nodes()

    def _find(self, kind: KindNames, request: Request) -> Resource:
        name, namespace = request.path_params["name"], request.path_params.get("namespace", "")
        for item in self._items(kind):
            if item.name == name and item.ref.namespace == namespace:
                return item
        where = f" in namespace {namespace}" if namespace else ""
        raise NotFoundError(
            f"node {self.view.node} has no {kind.singular} {name}{where}",
            hint="others are known to the orchestrator; see what is here: bacalhau get "
            f"{kind.plural} --local -A",
        )

    def _execution(self, request: Request) -> LocalExecution:
        return cast(LocalExecution, self._find(EXECUTION, request))

    # -- logs ------------------------------------------------------------------------------------

    async def logs(self, request: Request) -> Response:
        query = _log_query(request)
        records = read_one(self.reader, self.view.node, self._execution(request), query)
        return Streamed(_lines(records), media_type=NDJSON)

    async def job_logs(self, request: Request) -> Response:
        """Of all executions of a job that are on this node."""
        job, namespace = request.path_params["name"], request.path_params["namespace"]

        def find() -> list[LocalExecution]:
            return [
                one
                for one in self.view.executions()
                if one.spec.job == job and one.ref.namespace == namespace
            ]

        if not find():
            raise NotFoundError(f"node {self.view.node} has no execution of job {job}")
        records = read_all(self.reader, self.view.node, find, _log_query(request))
        return Streamed(_lines(records), media_type=NDJSON)

    # -- outputs ---------------------------------------------------------------------------------

    async def outputs(self, request: Request) -> Response:
        execution = self._execution(request)
        ask = OutputsList(
            node=self.view.node,
            session="",
            namespace=execution.metadata.namespace,
            execution=execution.name,
            after=request.query_params.get("after", ""),
        )
        page = await self.reader.list_outputs(ask)
        if page.error:
            raise NotFoundError(page.error)
        return object_response(page)

    async def output_file(self, request: Request) -> Response:
        execution, path = self._execution(request), request.query_params.get("path", "")
        check_output_path(path)
        size = await self._size_of(execution, path)
        offset = _number(request, "offset", 0)
        span = parse_range(request.headers.get("range", ""), offset or 0, size)
        headers = {
            "Content-Length": str(span.end - span.start),
            "Content-Disposition": disposition(path.rsplit("/", 1)[-1]),
            "Content-Range": f"bytes {span.start}-{span.end - 1}/{span.size}",
        }
        is_part = 0 < span.end - span.start < span.size
        if not is_part:
            del headers["Content-Range"]
        return Streamed(
            self._bytes_of(execution, path, span.start, span.end),
            status=206 if is_part else 200,
            media_type="application/octet-stream",
            headers=headers,
        )

    async def _size_of(self, execution: Execution, path: str) -> int:
        after = ""
        while True:
            page = await self.reader.list_outputs(
                OutputsList(
                    node=self.view.node,
                    session="",
                    namespace=execution.metadata.namespace,
                    execution=execution.name,
                    after=after,
                )
            )
            if page.error:
                raise NotFoundError(page.error)
            for file in page.files:
                if file.path == path:
                    return file.size_bytes
            if page.is_last or not page.files:
                raise NotFoundError(f"execution {execution.name} has no output {path!r}")
            after = page.files[-1].path

    async def _bytes_of(
        self, execution: Execution, path: str, start: int, end: int
    ) -> AsyncIterator[bytes]:
        at = start
        while at < end:
            piece = await self.reader.read_output(
                OutputRead(
                    node=self.view.node,
                    session="",
                    namespace=execution.metadata.namespace,
                    execution=execution.name,
                    path=path,
                    offset=at,
                    size_bytes_max=min(PIECE_BYTES, end - at),
                )
            )
            if not piece:
                raise NotFoundError(f"output {path} ended at {at} of {end} bytes")
            at += len(piece)
            yield piece


def _one(kind: KindNames, sub: str = "") -> str:
    where = "/namespaces/{namespace}" if kind.namespaced else ""
    return f"{API_ROOT}{where}/{kind.plural}/{{name}}{sub}"


def _log_query(request: Request) -> LogQuery:
    asked = request.query_params
    stream = asked.get("stream", "all")
    if stream not in _STREAMS:
        raise InvalidError([Problem("stream", f"is not one of {', '.join(_STREAMS)}", stream[:40])])
    return LogQuery(
        stream=cast(Literal["stdout", "stderr", "all"], stream),
        offset=_number(request, "offset", 0) or 0,
        tail=_number(request, "tail", None),
        follow=asked.get("follow", "").lower() in ("true", "1"),
    )


def _number(request: Request, name: str, default: int | None) -> int | None:
    text = request.query_params.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InvalidError([Problem(name, "is not a number of 0 or more", text[:40])])
    return int(text)


async def _lines(records: AsyncGenerator[Record | None, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(records) as source:
        try:
            async for record in source:
                yield b"\n" if record is None else json_line(record) + b"\n"
        except BacalhauError as error:
            yield b'{"error":%s}\n' % full_json(body_of(error))
            return
        yield b'{"end": true}\n'


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, BacalhauError)
    return error_response(error)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    here = [kind.plural for kind in (EXECUTION, PUBLICATION, NODE)]
    known = {kind.plural for kind in ALL}
    *_, last = parts = request.url.path.split("/")
    asked = next((part for part in reversed(parts) if part in known), "this")
    is_read = request.method in ("GET", "HEAD")
    if error.status_code == 405 or (asked in here and not is_read):
        message = "a node's own socket can only be read"
        hint = "changes are made at the orchestrator"
        return error_response(ApiError(405, "MethodNotAllowed", message, hint=hint))
    what = f"have the {last} of" if asked in here else "know about"
    message = f"a node's own socket does not {what} {asked}"
    hint = f"it has {', '.join(here)}, their logs and outputs; ask the orchestrator for the rest"
    return error_response(ApiError(error.status_code, "NotFound", message, hint=hint))


async def _on_bug(request: Request, error: Exception) -> Response:
    message = "the agent failed in a way it was not written for"
    hint = "this is a bug; the agent's log has the details"
    return error_response(ApiError(500, "InternalError", message, hint=hint))
