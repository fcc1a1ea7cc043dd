"""A real NATS server for tests, and a line to it that can be cut.

async with running_server(tmp_path) as server:
    async with open_store(server) as store: ...
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from bacalhau.nats.connection import Connection
from bacalhau.nats.server import EmbeddedNats, NatsSettings
from bacalhau.store.jetstream import JetStreamStore
from bacalhau.store.stream import STREAM
from bacalhau.system import SystemClock, SystemIds

WAIT_SECONDS = 20.0


@asynccontextmanager
async def running_server(data_dir: Path, **settings: Any) -> AsyncIterator[EmbeddedNats]:
    """An embedded server on `data_dir`, stopped at the end."""
    async with EmbeddedNats(NatsSettings(data_dir, **settings)) as server:
        yield server


@asynccontextmanager
async def open_connection(server: EmbeddedNats, url: str = "") -> AsyncIterator[Connection]:
    """A connection with the controllers' credentials."""
    connection = Connection(url or server.url, server.credentials, name="test")
    await connection.open()
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def open_store(
    server: EmbeddedNats, url: str = "", **options: Any
) -> AsyncIterator[JetStreamStore]:
    """A store on the server, with a connection of its own; `url` leads through a proxy."""
    async with open_connection(server, url) as connection:
        store = JetStreamStore(connection, SystemClock(), SystemIds(), **options)
        async with store:
            yield store


def kill(server: EmbeddedNats) -> None:
    """kill -9. The server's supervisor starts it again."""
    os.kill(server.pid, signal.SIGKILL)


async def crash(server: EmbeddedNats) -> None:
    """kill -9, and wait until it has been started again."""
    killed = server.pid
    kill(server)
    await eventually(lambda: server.is_running and server.pid != killed, "the restart")


async def delete_stream(server: EmbeddedNats) -> None:
    """Lose everything, as when a disk was replaced."""
    async with open_connection(server) as connection:
        await connection.request(f"$JS.API.STREAM.DELETE.{STREAM}", b"{}")


async def eventually(holds: Callable[[], bool], what: str = "it") -> None:
    """Return once `holds()`: for what happens in another process, which has no event for us."""
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                if holds():
                    return
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{what} did not happen within {WAIT_SECONDS:g} s") from None


class Proxy:
    """A TCP proxy in front of a server, whose connections can be cut, and kept cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._lines: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.is_open = True
        self.port = 0

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._lines, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> None:
        """Reset all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self.is_open:
                await self._join(reader, writer)
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            return
        self._writers.add(back)
        ways = [asyncio.create_task(_copy(reader, back)), asyncio.create_task(_copy(there, writer))]
        self._lines.update(ways)
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._lines.difference_update(ways)
            self._writers.discard(back)
            back.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
