"""The API server put together: `create_app`, and how to serve it.

Reads come from the cache, writes go through the state with compare-and-set; everything else is
behind `Services`.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp

from bacalhau.server import (
    problems,
    routes_executions,
    routes_jobs,
    routes_links,
    routes_nodes,
    routes_objects,
    routes_past,
    routes_plans,
    routes_sources,
    routes_system,
)
from bacalhau.server.access import Access
from bacalhau.server.context import Context, make_context
from bacalhau.server.guard import Guard
from bacalhau.server.ports import Services
from bacalhau_api.errors import InvalidError, Problem

KEEP_ALIVE_SECONDS = 30
SHUTDOWN_SECONDS = 3
LISTEN_BACKLOG = 2048

_DESCRIPTION = (
    "Objects are declared, stored, and moved towards what was declared. Errors of every kind have "
    "one shape: `{reason, message, field, value, hint, problems}`."
)


class ApiApp(FastAPI):
    """The application, with its context for those who embed it."""

    context: Context


def create_app(services: Services, access: Access | None = None) -> ApiApp:
    """Build the application. `access` defaults to loopback callers without tokens.

    Build it before the cache is filled or right after, so that it sees every change.
    """
    app = ApiApp(
        title="Bacalhau API",
        version="v1",
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
        redirect_slashes=False,
    )
    app.context = make_context(services)
    problems.install(app)
    router = APIRouter()
    # Fixed paths before those with a name in them.
    routes_system.add_routes(router, app.context)
    routes_plans.add_routes(router, app.context)
    routes_nodes.add_routes(router, app.context)
    routes_sources.add_routes(router, app.context)
    routes_jobs.add_routes(router, app.context)
    routes_executions.add_routes(router, app.context)
    routes_links.add_routes(router, app.context)
    routes_past.add_routes(router, app.context)
    routes_objects.add_routes(router, app.context)
    app.include_router(router)
    app.add_middleware(_GuardMiddleware, access=access or Access(), context=app.context)
    return app


class _GuardMiddleware(Guard):
    def __init__(self, app: ASGIApp, access: Access, context: Context) -> None:
        super().__init__(app, access, count=context.metrics.count_request)


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, as served at /openapi.json."""
    return app.openapi()


class ApiServer(uvicorn.Server):
    """uvicorn that ends watches and followed logs when it is told to stop, instead of waiting
    for clients to go away; that leaves signals to whoever runs it; and that raises an error when
    it cannot listen, instead of ending the process. Set `should_exit` to stop it."""

    def __init__(self, app: ApiApp, host: str, port: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
                lifespan="off",
                ws="none",
            )
        )
        self._app = app
        self._socket: socket.socket | None = None

    def bind(self) -> int:
        """Take the address; returns the port, of interest where 0 was asked for.

        Raises InvalidError with a remedy if the address cannot be had.
        """
        host, port = self.config.host.strip("[]"), self.config.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            # Only so that a server can start again at once; a living listener is still an error.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(LISTEN_BACKLOG)
        except (OSError, OverflowError) as error:
            sock.close()
            hint = "another server may run there: stop it, or give --port"
            raise InvalidError(
                [Problem("--host/--port", f"cannot listen: {error}", f"{host}:{port}", hint)]
            ) from error
        self._socket = sock
        number: int = sock.getsockname()[1]
        return number

    async def run_until_told(self) -> None:
        """Serve until `should_exit` is set."""
        if self._socket is None:
            self.bind()
        assert self._socket is not None
        await self.serve(sockets=[self._socket])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none: the process has one place that handles signals."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End streams, then everything else."""
        self._app.context.close()
        await super().shutdown(sockets)
