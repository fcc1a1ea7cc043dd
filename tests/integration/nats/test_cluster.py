"""The store on a cluster of three servers (R3): expectations while others are in process, fences
in a crowd, and the death of the stream's leader."""

import asyncio
import json
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from bacalhau.nats.binary import find_server
from bacalhau.nats.connection import Connection
from bacalhau.store.jetstream import JetStreamStore
from bacalhau.store.stream import STREAM, Stream
from bacalhau.system import SystemClock, SystemIds
from bacalhau_api.errors import ConflictError, FencedError, TransientError
from bacalhau_api.meta import Ref
from bacalhau_controllers.store import Fence, Put, Why
from tests.support.stores import WHY, create, node, watching

NAMES = ("one", "two", "three")


@contextmanager
def cluster(data_dir: Path) -> Iterator[dict[str, tuple[str, subprocess.Popen[bytes]]]]:
    """Three servers; by name, their addresses and processes."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(6)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in probes]
    routes = [f"nats://127.0.0.1:{port}" for port in ports[3:]]
    servers: dict[str, tuple[str, subprocess.Popen[bytes]]] = {}
    try:
        for i, name in enumerate(NAMES):
            config = {
                "server_name": name,
                "listen": f"127.0.0.1:{ports[i]}",
                "cluster": {
                    "name": "c", "listen": f"127.0.0.1:{ports[3 + i]}", "routes": routes,
                },
                "jetstream": {"store_dir": str(data_dir / name), "sync_interval": "always"},
                "log_file": str(data_dir / f"{name}.log"),
            }  # fmt: skip
            path = data_dir / f"{name}.conf"
            path.write_text(json.dumps(config))
            process = subprocess.Popen([find_server(), "-c", path])
            servers[name] = (f"nats://127.0.0.1:{ports[i]}", process)
        yield servers
    finally:
        for _, process in servers.values():
            process.kill()
        for _, process in servers.values():
            process.wait()


Servers = dict[str, tuple[str, subprocess.Popen[bytes]]]
Parts = tuple[JetStreamStore, Connection, Servers]


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Parts]:
    with cluster(tmp_path) as servers:
        connection = Connection([url for url, _ in servers.values()], name="test")
        await connection.open()
        store = JetStreamStore(
            connection, SystemClock(), SystemIds(), replicas=3, commit_seconds=30
        )
        try:
            async with asyncio.timeout(60):
                while True:  # the cluster has to find its leader first
                    try:
                        await store.open()
                        break
                    except TransientError:
                        await asyncio.sleep(0.1)
            yield store, connection, servers
        finally:
            await store.close()
            await connection.close()


async def leader_of(connection: Connection) -> str:
    answer = await Stream(connection).api(f"$JS.API.STREAM.INFO.{STREAM}", {})
    return str(answer["cluster"]["leader"])


async def test_crowds_conflicts_and_fences(parts: Parts) -> None:
    store, _, _ = parts
    old = await store.acquire_lease("leader", "a", 30)
    new = await store.acquire_lease("leader", "a", 30)
    assert old is not None
    assert new is not None
    await create(store, *(node(f"taken{i}") for i in range(10)))

    def write(name: str, token: int) -> asyncio.Task[object]:
        why = Why("test", "Testing", fence=Fence("leader", token))
        return asyncio.create_task(store.commit([Put(node(name), 0)], why))

    good = [write(f"n{i}", new.token) for i in range(300)]
    late = [write(f"late{i}", old.token) for i in range(10)]
    bad = [write(f"taken{i}", new.token) for i in range(10)]
    results = await asyncio.gather(*good, *late, *bad, return_exceptions=True)
    assert all(isinstance(result, tuple) for result in results[:300])
    assert all(isinstance(result, FencedError) for result in results[300:310])
    assert all(isinstance(result, ConflictError) for result in results[310:])
    assert len((await store.list()).items) == 310


async def test_the_death_of_the_leader(parts: Parts) -> None:
    """kill -9 of the server that leads the stream, under load: nothing acknowledged is lost, the
    watch goes on without gap, and a lease of 12 s outlives it."""
    store, connection, servers = parts
    lease = await store.acquire_lease("leader", "a", 12)
    assert lease is not None
    why = Why("test", "Testing", fence=Fence("leader", lease.token))
    expected: dict[Ref, int] = {}

    async def write(name: str, times: int) -> None:
        ref, at = Ref("Node", "", name), 0
        for i in range(times):
            while True:
                try:
                    (stored,) = await store.commit([Put(node(name, drain=i % 2 == 0), at)], why)
                except TransientError:
                    found = await store.get(ref)
                    at = found.metadata.resource_version if found else 0
                    continue
                break
            assert stored is not None
            at = expected[ref] = stored.metadata.resource_version

    async with watching(store, keep_events=False) as view:
        await view.synced()
        async with asyncio.TaskGroup() as tasks:
            for i in range(5):
                tasks.create_task(write(f"n{i}", 60))
            await view.seen(Ref("Node", "", "n0"))
            leader = await leader_of(connection)
            servers[leader][1].send_signal(signal.SIGKILL)
        await view.until(expected, seconds=40)
        assert view.restarts == 0
    assert await leader_of(connection) != leader
    for i in range(5):
        entries = await store.history(Ref("Node", "", f"n{i}"))
        assert entries[-1].revision == expected[Ref("Node", "", f"n{i}")]
        assert len(entries) >= 60
    assert (await store.renew_lease(lease, 12)).token == lease.token


async def test_reads_after_writes_are_not_stale(parts: Parts) -> None:
    store, _, _ = parts
    at = 0
    for i in range(100):
        (stored,) = await store.commit([Put(node("n", drain=i % 2 == 0), at)], WHY)
        assert stored is not None
        at = stored.metadata.resource_version
        assert await store.get(stored.ref) == stored
        (listed,) = (await store.list("Node")).items
        assert listed == stored
