"""The proxy of network HTTP: over real sockets, with names that a test resolves."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from bacalhau.engines.docker.proxy import Proxy, is_listed, is_public

WHERE = {"allowed.test": ["127.0.0.1"], "www.site.test": ["127.0.0.1"], "inside.test": ["10.0.0.7"]}


async def lookup(host: str, port: int) -> Sequence[str]:
    return WHERE.get(host, [host])


@asynccontextmanager
async def server() -> AsyncIterator[tuple[int, list[bytes]]]:
    """An HTTP server that answers everything with `hello`; its port, and what it was asked."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        await writer.drain()
        writer.close()

    made = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield made.sockets[0].getsockname()[1], asked
    finally:
        made.close()


@asynccontextmanager
async def proxy(*domains: str, allows_private: bool = True) -> AsyncIterator[int]:
    made = Proxy(domains, allows_private=allows_private, resolve=lookup)
    port = await made.open("127.0.0.1", 0)
    try:
        yield port
    finally:
        await made.close()


async def ask(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(65536), 10)
    finally:
        writer.close()


async def test_a_listed_domain_is_reached_and_the_request_is_made_plain() -> None:
    async with server() as (port, asked), proxy("allowed.test") as via:
        request = (
            f"GET http://allowed.test:{port}/a?b=c HTTP/1.1\r\nHost: allowed.test\r\n"
            "Proxy-Authorization: Basic secret\r\nProxy-Connection: keep-alive\r\n"
            "Connection: keep-alive\r\n\r\n"
        )
        assert (await ask(via, request.encode())).endswith(b"hello")
    assert asked[0].startswith(b"GET /a?b=c HTTP/1.1\r\n")
    assert b"secret" not in asked[0]
    assert b"Connection: close" in asked[0]


async def test_a_tunnel_to_a_listed_domain() -> None:
    async with server() as (port, _), proxy("allowed.test") as via:
        reader, writer = await asyncio.open_connection("127.0.0.1", via)
        writer.write(f"CONNECT allowed.test:{port} HTTP/1.1\r\n\r\n".encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(4096), 10)).endswith(b"hello")
        writer.close()


@pytest.mark.parametrize(
    "request_line",
    [
        "GET http://other.test:{port}/ HTTP/1.1", "CONNECT other.test:443 HTTP/1.1",
        "GET http://127.0.0.1:{port}/ HTTP/1.1", "GET http://allowed.test:22/ HTTP/1.1",
        "CONNECT allowed.test:25 HTTP/1.1", "GET http://allowed.test.evil.test/ HTTP/1.1",
        "GET http://evil-allowed.test/ HTTP/1.1",
    ],
)  # fmt: skip
async def test_everything_else_is_refused(request_line: str) -> None:
    async with server() as (port, asked), proxy("allowed.test") as via:
        answer = await ask(via, f"{request_line.format(port=port)}\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 403")
    assert asked == []


@pytest.mark.parametrize(
    "line", ["GET / HTTP/1.1", "nonsense", "CONNECT :1 HTTP/1.1", "GET  x y z"]
)
async def test_what_is_no_request_to_a_proxy(line: str) -> None:
    async with proxy("allowed.test") as via:
        assert (await ask(via, f"{line}\r\n\r\n".encode())).startswith(b"HTTP/1.1 400")


async def test_a_listed_domain_may_not_lead_into_the_nodes_network() -> None:
    async with server() as (port, asked), proxy("allowed.test", allows_private=False) as via:
        answer = await ask(via, f"GET http://allowed.test:{port}/ HTTP/1.1\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 403")
        assert b"private" in answer
    assert asked == []


async def test_a_server_that_is_not_there() -> None:
    async with server() as (port, _):
        pass
    async with proxy("allowed.test") as via:
        answer = await ask(via, f"GET http://allowed.test:{port}/ HTTP/1.1\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 502")


def test_domains() -> None:
    listed = ("example.org", ".sub.org", "*.wild.org", "Upper.ORG.")
    for host in ("example.org", "EXAMPLE.org.", "a.sub.org", "a.b.wild.org", "upper.org"):
        assert is_listed(host, listed), host
    for host in ("www.example.org", "sub.org", "wild.org", "xexample.org", "", "org"):
        assert not is_listed(host, listed), host


def test_public_addresses() -> None:
    for address in ("93.184.216.34", "2606:2800:220:1::1"):
        assert is_public(address)
    for address in (
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "::1", "fe80::1%eth0", "0.0.0.0",
        "::ffff:10.0.0.1", "224.0.0.1", "100.64.0.1", "fd00::1", "no address", "2002:a00:1::",
    ):  # fmt: skip
        assert not is_public(address), address
