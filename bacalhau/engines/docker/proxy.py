"""A forward proxy for one job: HTTP and HTTPS to listed domains, and nothing else.

The name is resolved here, and the address that is really connected to is checked: a listed domain
that leads to a private address of the node's network is refused, unless the operator allowed that.
"""

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

PORT = 3128
_HEAD_BYTES_MAX = 32 * 1024
_HEAD_SECONDS = 30.0
_CONNECT_SECONDS = 15.0
_CONNECTIONS_MAX = 128
_BLOCK_BYTES = 64 * 1024
_PLAIN_PORTS = (80, 443)
_HIDDEN = ("connection", "proxy-connection", "proxy-authorization", "keep-alive")

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, as the node sees it."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def is_listed(host: str, domains: Sequence[str]) -> bool:
    """Whether a host is one of the domains, or below one that is written `.name` or `*.name`."""
    host = host.rstrip(".").lower()
    for domain in domains:
        wanted = domain.strip().rstrip(".").lower().removeprefix("*")
        if wanted.startswith("."):
            if host.endswith(wanted) and len(host) > len(wanted):
                return True
        elif host == wanted:
            return True
    return False


def is_public(address: str) -> bool:
    """Whether an address belongs to the internet at large."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    found = mapped or found
    return found.is_global and not found.is_multicast


class _RefusedError(Exception):
    """The proxy's no: status and words for the client."""

    def __init__(self, status: str, words: str) -> None:
        super().__init__(words)
        self.status = status


class Proxy:
    """Listens on one address for one job."""

    def __init__(
        self, domains: Sequence[str], *, allows_private: bool, resolve: Resolve = resolve
    ) -> None:
        self._domains = tuple(domains)
        self._allows_private = allows_private
        self._resolve = resolve
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, host: str, port: int = PORT) -> int:
        """Listen; returns the port. Raises OSError."""
        self._server = await asyncio.start_server(
            self._accept, host, port, limit=_HEAD_BYTES_MAX, backlog=64
        )
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Cut all connections."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if len(self._tasks) > _CONNECTIONS_MAX:
                raise _RefusedError("503 Service Unavailable", "too many connections")
            await self._serve(reader, writer)
        except _RefusedError as error:
            with contextlib.suppress(OSError):
                writer.write(_answer(error.status, f"{error}\n"))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(_HEAD_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
        first, *headers = head.decode("latin-1").split("\r\n")[:-2]
        words = first.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            raise _RefusedError("400 Bad Request", "not an HTTP request")
        method, target, version = words
        is_tunnel = method == "CONNECT"
        host, port, path = _destination(target, is_tunnel=is_tunnel)
        upstream_reader, upstream = await self._connect(host, port, is_tunnel=is_tunnel)
        try:
            if is_tunnel:
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                # One request for each connection, so that the next one is looked at again.
                kept = [h for h in headers if h.partition(":")[0].strip().lower() not in _HIDDEN]
                lines = [f"{method} {path} {version}", *kept, "Connection: close", "", ""]
                upstream.write("\r\n".join(lines).encode("latin-1"))
            await _join(reader, upstream, upstream_reader, writer)
        finally:
            upstream.close()

    async def _connect(
        self, host: str, port: int, *, is_tunnel: bool
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if not is_listed(host, self._domains):
            raise _RefusedError("403 Forbidden", f"{host} is not among the domains of this job")
        if (port not in _PLAIN_PORTS and port < 1024) or (is_tunnel and port == 80):
            raise _RefusedError("403 Forbidden", f"port {port} is not for HTTP")
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                addresses = await self._resolve(host, port)
                if not self._allows_private:
                    addresses = [address for address in addresses if is_public(address)]
                if not addresses:
                    words = f"{host} has no address outside private networks"
                    raise _RefusedError("403 Forbidden", words)
                return await asyncio.open_connection(addresses[0], port)
        except TimeoutError:
            raise _RefusedError("504 Gateway Timeout", f"{host} does not answer") from None
        except OSError as error:
            words = f"{host} cannot be reached: {error.strerror or error}"
            raise _RefusedError("502 Bad Gateway", words) from error


def _destination(target: str, *, is_tunnel: bool) -> tuple[str, int, str]:
    """Host, port and path of a request's target."""
    try:
        parts = urlsplit(f"//{target}" if is_tunnel else target)
        port = parts.port or (443 if is_tunnel else 80)
        host = parts.hostname or ""
    except ValueError:
        host, port, parts = "", 0, urlsplit("")
    if not host or (not is_tunnel and parts.scheme.lower() != "http"):
        raise _RefusedError("400 Bad Request", "write http://host/path or CONNECT host:port")
    path = parts.path or "/"
    return host, port, f"{path}?{parts.query}" if parts.query else path


async def _join(
    reader: asyncio.StreamReader,
    upstream: asyncio.StreamWriter,
    upstream_reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Both ways, until both sides are done."""

    async def pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(_BLOCK_BYTES):
            sink.write(data)
            await sink.drain()
        if sink.can_write_eof():
            sink.write_eof()

    tasks = [
        asyncio.ensure_future(pipe(reader, upstream)),
        asyncio.ensure_future(pipe(upstream_reader, writer)),
    ]
    try:
        # Once the other side is done, there is no more to say to it.
        await tasks[1]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _answer(status: str, text: str) -> bytes:
    body = text.encode()
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    ).encode("latin-1") + body
