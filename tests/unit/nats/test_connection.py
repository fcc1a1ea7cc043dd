"""The quick parser of headers says the same as the client's own. And why there is no connection."""

import asyncio
import contextlib
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client

from bacalhau.nats.connection import SUBJECT_BYTES_MAX, Connection, Credentials, _Client
from bacalhau.nats.keys import new_seed
from bacalhau_api.errors import InvalidError, UnavailableError

NAMES = st.text("abcXYZ-", min_size=1, max_size=12)
VALUES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)


@given(st.lists(st.tuples(NAMES, VALUES), max_size=6), st.sampled_from([": ", ":", ":\t"]))
def test_headers(pairs: list[tuple[str, str]], separator: str) -> None:
    block = "".join(f"{name}{separator}{value}\r\n" for name, value in pairs) + "\r\n"
    raw = block.encode()
    assert _strip(_Client._parse_header_lines(raw)) == _strip(Client._parse_header_lines(raw))


def _strip(headers: dict[str, str]) -> dict[str, str]:
    # Of odd white space at the ends, the two do not strip the same; ours never is there.
    return {name: value.strip() for name, value in headers.items()}


def test_odd_blocks() -> None:
    for raw in (b"\r\n", b"", b"nothing\r\n\r\n", b": x\r\n\r\n", b"A: \xff\r\n\r\n"):
        assert _Client._parse_header_lines(raw) == {
            name: value for name, value in Client._parse_header_lines(raw).items() if name
        }


async def test_a_reset_does_not_hide_the_refusal_before_it() -> None:
    """A server that refuses somebody answers and hangs up; now and then only the end is heard."""
    calls = 0
    both = asyncio.Event()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        writer.write(b'INFO {"server_id":"x","version":"2.14.0","max_payload":1048576}\r\n')
        if calls == 1:
            await reader.readuntil(b"PING")
            writer.write(b"-ERR 'Authorization Violation'\r\n")
            await writer.drain()
        else:
            await reader.readuntil(b"CONNECT")
            linger = struct.pack("ii", 1, 0)  # close with a reset
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        if calls == 3:  # the second is over, and noted
            both.set()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        connection = Connection(f"nats://127.0.0.1:{port}")
        await connection.open(timeout=None)
        async with asyncio.timeout(20):
            await both.wait()
        with pytest.raises(UnavailableError, match="Authorization"):
            await connection.wait_connected(0.01)
        await connection.close()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"INFO\r\n", id="a line that ends too soon"),
        pytest.param(b"<html>" + b"x" * 200_000, id="something that has no lines"),
        pytest.param(b"INFO null\r\n", id="nothing"),
        pytest.param(b'INFO {"version":"2.14.0","nonce":5}\r\n', id="another type"),
        pytest.param(b"HTTP/1.1 503 Service Unavailable\r\n\r\n", id="HTTP"),
    ],
)
async def test_whatever_answers_another_try_is_made(answer: bytes) -> None:
    calls = 0
    again = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            again.set()
        with contextlib.suppress(OSError):
            writer.write(answer)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        connection = Connection(f"nats://127.0.0.1:{port}", Credentials(seed=new_seed()))
        await connection.open(timeout=None)
        async with asyncio.timeout(20):
            await again.wait()
        assert connection.last_error
        await connection.close()


async def test_a_subject_that_the_server_would_not_read_is_not_sent() -> None:
    async def handle(message: object) -> None:
        raise AssertionError("nothing comes")

    connection = Connection("nats://127.0.0.1:1")
    long = "o." + "x" * SUBJECT_BYTES_MAX
    with pytest.raises(InvalidError, match="subject: is too long"):
        await connection.publish(long)
    with pytest.raises(InvalidError, match="subject: is too long"):
        await connection.request(long)
    with pytest.raises(InvalidError, match="subject: is too long"):
        await connection.subscribe(long, handle)
    with pytest.raises(UnavailableError):
        await connection.publish(long[:SUBJECT_BYTES_MAX])
