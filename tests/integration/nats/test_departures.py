"""The end of a node's connection is told at once, and a mere reconnection is not."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bacalhau.nats.connection import Connection, Credentials
from bacalhau.nats.departures import Departures
from bacalhau.nats.keys import new_seed, public_key
from bacalhau.nats.server import EmbeddedNats, NodeUser
from tests.support.nats import crash, eventually, running_server

SEEDS = {name: new_seed() for name in ("a", "b")}
KEYS = {name: public_key(seed) for name, seed in SEEDS.items()}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedNats]:
    async with running_server(tmp_path) as running:
        await running.set_nodes([NodeUser(name, key) for name, key in KEYS.items()])
        yield running


@asynccontextmanager
async def watching(
    server: EmbeddedNats, on_gone: Callable[[str], None], seconds: float
) -> AsyncIterator[Departures]:
    system = Connection(server.url, server.system_credentials, name="departures")
    await system.open()
    watch = Departures(system, on_gone, return_seconds=seconds)
    task = asyncio.create_task(watch.run())
    await asyncio.sleep(0)
    await system.request("$SYS.REQ.SERVER.PING.IDZ", b"", timeout=5)  # after the subscription
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await system.close()


async def node(server: EmbeddedNats, name: str) -> Connection:
    line = Connection(server.node_url, Credentials(seed=SEEDS[name]), name=name)
    await line.open()
    return line


async def test_only_the_end_of_the_last_connection_counts(server: EmbeddedNats) -> None:
    gone: list[str] = []
    async with watching(server, gone.append, 0.0):
        first, second, other = [await node(server, name) for name in ("a", "a", "b")]
        await first.close()
        await other.close()
        await eventually(lambda: KEYS["b"] in gone, "the end of b")
        assert gone == [KEYS["b"]]
        await second.close()
        await eventually(lambda: gone == [KEYS["b"], KEYS["a"]], "the end of a")


async def test_who_comes_back_in_time_was_not_gone(server: EmbeddedNats) -> None:
    gone: list[str] = []
    async with watching(server, gone.append, 5.0) as watch:
        line = await node(server, "a")
        await line.close()
        await eventually(lambda: KEYS["a"] in watch._leaving, "the end of the connection")
        again = await node(server, "a")
        await eventually(lambda: not watch._leaving, "the return")
        await again.close()
    assert gone == []


async def test_connections_of_before_are_left_to_the_beats(server: EmbeddedNats) -> None:
    gone: list[str] = []
    early = await node(server, "a")
    async with watching(server, gone.append, 0.0):
        late = await node(server, "b")
        await early.close()
        await late.close()
        await eventually(lambda: bool(gone), "the end of b")
    assert gone == [KEYS["b"]]


async def test_the_death_of_the_server_is_not_the_departure_of_all(server: EmbeddedNats) -> None:
    gone: list[str] = []
    async with watching(server, gone.append, 0.0) as watch:
        line = await node(server, "a")
        await eventually(lambda: bool(watch._open), "the connection")
        await crash(server)
        await line.wait_connected(20)
        assert gone == []
        await line.close()
