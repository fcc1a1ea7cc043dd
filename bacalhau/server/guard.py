"""The door of the API: size and time limits, Host and Origin checks, tokens, safe headers.

Plain ASGI around the application, so that it also holds for unknown routes and streams, and so
that nothing is parsed before it has been let in.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bacalhau.kinds import API_ROOT
from bacalhau.server.access import Access, is_loopback
from bacalhau.server.problems import ApiError, error_response, render

BODY_BYTES_MAX = 2 * 1024 * 1024
BODY_SECONDS_MAX = 30.0
LINGER_SECONDS_MAX = 10.0
LINGER_IDLE_SECONDS_MAX = 2.0
REQUESTS_MAX = 2000

# What a load balancer and a node that has no API token may ask; a join carries its own token.
_OPEN_PATHS = frozenset({"/healthz", "/readyz", "/version", f"{API_ROOT}/nodes/join"})

_SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class Guard:
    """Wraps an ASGI application; see the module."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        *,
        requests_max: int = REQUESTS_MAX,
        count: Callable[[str, int], None] = lambda method, status: None,
    ) -> None:
        self._app = app
        self._count = count
        self._access = access
        self._requests_max = requests_max
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's worth of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(Headers(scope=scope), receive)
        safe_send = self._with_safe_headers(scope["method"], body.lingering(send))
        try:
            self._admit(scope)
        except ApiError as error:
            await error_response(error)(scope, body.receive, safe_send)
            return
        self._requests += 1
        try:
            await self._app(scope, body.receive, safe_send)
        finally:
            self._requests -= 1

    def _with_safe_headers(self, method: str, send: Send) -> Send:
        async def safe_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(method, message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in _SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        return safe_send

    def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        _check_host(headers, self._access)
        _check_origin(headers, scope["method"])
        scope["bacalhau.actor"] = self._actor(headers, scope["path"])
        if self._requests >= self._requests_max:
            message = f"the server is busy with {self._requests} requests"
            raise ApiError(429, "TooManyRequests", message, hint="try again in a moment")
        _check_body(headers)

    def _actor(self, headers: Headers, path: str) -> str:
        if not self._access.tokens:
            return "user:local"
        user = self._access.user_of(headers.get("authorization", ""))
        if user is not None:
            return f"user:{user}"
        if path in _OPEN_PATHS:
            return "user:anonymous"
        given = "not a known one" if "authorization" in headers else "missing"
        raise ApiError(
            401,
            "Unauthorized",
            f"this server asks for a token, and the one given is {given}",
            hint="set BACALHAU_TOKEN, or send the header `Authorization: Bearer TOKEN`",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _check_host(headers: Headers, access: Access) -> None:
    hosts = headers.getlist("host")
    if len(hosts) != 1:
        raise ApiError(400, "BadRequest", "a request needs exactly one Host header")
    if access.loopback_hosts_only and not is_loopback(_without_port(hosts[0])):
        raise ApiError(
            403,
            "Forbidden",
            f"this server listens on loopback and is not called {render(hosts[0])}",
            hint="use http://127.0.0.1 or http://localhost with its port",
        )


def _check_origin(headers: Headers, method: str) -> None:
    """Web pages of other sites may not use the API through somebody's browser."""
    origin = headers.get("origin")
    is_foreign = origin is not None and urlsplit(origin).netloc != headers["host"]
    site = headers.get("sec-fetch-site", "none")
    if is_foreign or (site not in ("none", "same-origin") and method not in ("GET", "HEAD")):
        message = "requests from web pages of other origins are refused"
        raise ApiError(403, "Forbidden", message)


def _check_body(headers: Headers) -> None:
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise ApiError(400, "BadRequest", "Content-Length is not a number")
    if len(length) > 18 or int(length) > BODY_BYTES_MAX:
        raise _too_large()
    if headers.get("content-encoding", "identity") != "identity":
        encoding = render(headers["content-encoding"])
        message = f"bodies with Content-Encoding {encoding} are not accepted"
        raise ApiError(415, "UnsupportedMediaType", message, hint="send the body as it is")


def _too_large() -> ApiError:
    message = f"the body is larger than {BODY_BYTES_MAX} bytes"
    hint = "keep data out of job files: refer to it as an input"
    return ApiError(413, "PayloadTooLarge", message, hint=hint, headers={"Connection": "close"})


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].split("]")[0]
    return host.split(":")[0]


class _Body:
    """The body of one request as it comes in: its bytes and seconds counted, whatever its
    Content-Length said."""

    def __init__(self, headers: Headers, receive: Receive) -> None:
        self._receive = receive
        self._seen = 0
        self._is_complete = (
            headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        )

    async def receive(self) -> Message:
        """The next part. Raises ApiError (408, 413) if it is late or too much."""
        if self._is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout(BODY_SECONDS_MAX):
                message = await self._next()
        except TimeoutError:
            text = f"no part of the body came for {BODY_SECONDS_MAX:.0f} s"
            raise ApiError(408, "RequestTimeout", text) from None
        if self._seen > BODY_BYTES_MAX:
            raise _too_large()
        return message

    def lingering(self, send: Send) -> Send:
        """`send` that ends an answer once the body is in, though nobody wants it: closing a
        connection with bytes unread resets it, and a reset takes the answer from who still sends.
        """

        async def lingering(message: Message) -> None:
            is_last = message["type"] == "http.response.body" and not message.get("more_body")
            if not is_last or self._is_complete:
                await send(message)
                return
            await send({**message, "more_body": True})
            await self._drop_rest()
            await send({"type": "http.response.body", "body": b""})

        return lingering

    async def _drop_rest(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS_MAX):
                while not self._is_complete:
                    async with asyncio.timeout(LINGER_IDLE_SECONDS_MAX):
                        await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        return message
