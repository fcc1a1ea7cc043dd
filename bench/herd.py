"""Many nodes come back at once: how long until all are served, and who waits meanwhile.

    python bench/herd.py [--nodes 1000] [--away 40]

A real orchestrator with its embedded, durable NATS server, and so many real agents over connections
of their own; only their engines, disks and ledgers are made up, and they share one process. An ops
job runs on all of them. The orchestrator and its NATS server are killed with kill -9; the work ends
while nobody listens; then they are started again, and all agents come at once. Measured:

- join      nodes a second that are enrolled and welcomed
- idle      processor time of orchestrator and NATS server with all nodes connected
- back      ready again to every agent welcomed, and to the job, whose ends all nodes report, complete
- API       answers to one user who submits and reads meanwhile ÷ the same with all nodes connected
"""

import argparse
import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import aclosing
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bacalhau.client import AsyncClient
from bacalhau.nats.connection import Connection, Credentials
from bacalhau.nats.keys import new_seed, public_key
from bacalhau.nats.subjects import node_inbox
from bacalhau.node.link import NatsLink
from bacalhau.node.reader import OutputReader
from bacalhau.node.upload import UploadGate
from bacalhau.node.workspace import DiskWorkspace
from bacalhau.system import SystemClock, SystemIds
from bacalhau_api.errors import BacalhauError
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.v1.job import Job, JobPhase, JobSpec, JobType, Resources, SpecConfig, Task
from bacalhau_controllers.runner.admission import Policy
from bacalhau_controllers.runner.agent import Agent
from bacalhau_controllers.runner.fakes import Behaviour, FakeEngine, MemoryWorkspace
from bacalhau_controllers.runner.ledger import MemoryLedger
from bacalhau_controllers.runner.ports import Workload
from bacalhau_controllers.runner.site import AgentSettings
from tests.e2e.cluster import Cluster, ClusterError, nats_pid

JOINS_AT_ONCE = 16
LIMIT_SECONDS = 600.0


# -- the herd: a process of its own ----------------------------------------------------------------


async def herd(server: str, root: Path, count: int) -> None:
    """Join and run `count` agents until killed. Prints `TIME COUNT` on each change of how many are
    welcomed; times are of the machine's monotonic clock, in seconds."""
    gate = asyncio.Semaphore(JOINS_AT_ONCE)
    agents: list[Agent] = []
    async with AsyncClient(server) as client, asyncio.TaskGroup() as tasks:

        async def join(number: int) -> None:
            async with gate:
                name, seed = f"node-{number:04}", new_seed()
                token = await client.create_join_token()
                reply = await client.join(token.token, name, public_key(seed))
            agent = await made(name, seed, reply.nats_url, root)
            agents.append(agent)
            tasks.create_task(agent.run())

        for number in range(count):
            tasks.create_task(join(number))
        told = -1
        while True:
            welcome = sum(agent.is_welcome for agent in agents)
            if welcome != told:
                print(time.monotonic(), welcome, flush=True)
                told = welcome
            await asyncio.sleep(0.05)


async def made(name: str, seed: str, url: str, root: Path) -> Agent:
    """One agent, connected as real ones are."""
    clock, ids = SystemClock(), SystemIds()
    connection = Connection(
        url, Credentials(seed=seed), inbox_prefix=node_inbox(name), name=f"node {name}"
    )
    await connection.open(timeout=None)
    reader = OutputReader(DiskWorkspace(root / name, clock), clock)
    link = NatsLink(name, connection, reader, UploadGate(0, clock))
    await link.open()
    return Agent(
        name,
        MemoryLedger(ids.uid()),
        {"noop": FakeEngine(clock, behave=by_duration)},
        {},
        {},
        MemoryWorkspace(),
        link,
        clock,
        random.Random(),
        ids,
        AgentSettings(
            boot="herd",
            policy=Policy(capacity=Resources(cpu_millis=1000, memory_bytes=1 << 30)),
            version="1",
        ),
    )


def by_duration(workload: Workload) -> Behaviour:
    """As the noop engine takes it."""
    return Behaviour(seconds=float(str(workload.params.get("durationSeconds", 0))))


# -- the measurement -------------------------------------------------------------------------------


class Watch:
    """Reads what the herd prints."""

    def __init__(self, log: Path) -> None:
        self._log = log

    async def until(self, count: int, since: float = 0.0) -> float:
        """When `count` were welcomed first, after the moment `since`."""
        began = time.monotonic()
        while time.monotonic() - began < LIMIT_SECONDS:
            for line in self._log.read_text().splitlines():
                at, welcome = line.split()
                if float(at) > since and int(welcome) == count:
                    return float(at)
            await asyncio.sleep(0.1)
        raise TimeoutError(f"{count} agents were not welcomed: {self._log.read_text()[-200:]}")


def noop(name: str, kind: JobType, seconds: float) -> Job:
    """A job that takes so long, on nodes that are busy with nothing."""
    engine = SpecConfig(type="noop", params={"durationSeconds": seconds})
    task = Task(engine=engine, resources=Resources(cpu_millis=1, memory_bytes=1 << 20))
    return Job(metadata=ObjectMeta(name=name), spec=JobSpec(type=kind, tasks=(task,)))


async def ask(client: AsyncClient, prefix: str, until: asyncio.Event) -> list[float]:
    """Milliseconds of each answer to one user."""
    took: list[float] = []
    number = 0
    while not until.is_set():
        start = time.perf_counter()
        try:
            if number % 2:
                await client.get(Job, f"{prefix}-{number - 1}")
            else:
                await client.apply(noop(f"{prefix}-{number}", JobType.BATCH, 0))
            took.append((time.perf_counter() - start) * 1e3)
        except BacalhauError as error:
            print(f"  refused: {error.message}")
        number += 1
        await asyncio.sleep(0.05)
    return took


async def ended(client: AsyncClient, name: str) -> float:
    """When a job was seen to be over."""
    async with aclosing(client.watch(Job)) as updates:
        async for update in updates:
            one = update.item
            if one is not None and one.name == name and one.status.phase.is_final:
                assert one.status.phase is JobPhase.COMPLETED, one.status.message
                return time.monotonic()
    raise AssertionError("the watch ended")


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def centile(values: list[float], part: float) -> float:
    """The value that `part` of all are not above."""
    return sorted(values)[min(int(len(values) * part), len(values) - 1)]


def row(name: str, value: float, unit: str, note: str = "") -> None:
    """Print one line."""
    print(f"{name:52} {value:9.1f} {unit:6} {note}", flush=True)


async def calm(client: AsyncClient, prefix: str, seconds: float) -> list[float]:
    """Milliseconds of answers while nothing else happens."""
    over = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, over.set)
    return await ask(client, prefix, over)


async def measure(cluster: Cluster, watch: Watch, began: float, nodes: int, away: float) -> None:
    """Everything, once the herd is under way."""
    row("join: nodes a second", nodes / (await watch.until(nodes) - began), "/s")
    hub, data = cluster.orchestrator, cluster.orchestrator.data_dir
    assert hub.popen is not None
    async with AsyncClient(cluster.server) as client:
        await asyncio.sleep(10)
        pids = (hub.popen.pid, nats_pid(data))
        before = [cpu_seconds(pid) for pid in pids]
        await asyncio.sleep(20)
        idle = [(cpu_seconds(pid) - b) / 0.2 for pid, b in zip(pids, before, strict=True)]
        row("idle: orchestrator", idle[0], "%", "of one processor")
        row("idle: NATS server", idle[1], "%", "of one processor")
        quiet = await calm(client, "calm", 10)
        start = time.monotonic()
        await client.apply(noop("warm", JobType.OPS, 0))
        row("an ops job on all nodes", await ended(client, "warm") - start, "s")
        await client.apply(noop("wave", JobType.OPS, away / 2))
        await asyncio.sleep(away / 4)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    hub.popen.wait(10)
    await asyncio.sleep(away)
    hub.start()
    ready = time.monotonic()
    async with AsyncClient(cluster.server) as client:
        over = asyncio.Event()
        asking = asyncio.create_task(ask(client, "storm", over))
        async with asyncio.timeout(LIMIT_SECONDS):
            back, done = await asyncio.gather(watch.until(nodes, ready), ended(client, "wave"))
        over.set()
        storm = await asking
    row("back: all agents welcomed", back - ready, "s", "after ready")
    row("back: their job complete", done - ready, "s", "after ready")
    row("API while all come back, median", statistics.median(storm), "ms")
    row("API while all come back, 99 %", centile(storm, 0.99), "ms", f"of {len(storm)}")
    row("API with all connected, median", statistics.median(quiet), "ms")
    ratio = centile(storm, 0.99) / centile(quiet, 0.99)
    row("API with all connected, 99 %", centile(quiet, 0.99), "ms", f"storm ÷ calm = {ratio:.1f}")


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--away", type=float, default=40.0, help="seconds that the hub is away")
    parser.add_argument("--herd-of", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if asked.herd_of:
            asyncio.run(herd(asked.herd_of, root, asked.nodes))
        cluster = Cluster(root / "fleet")
        cluster.start()
        log = root / "herd.log"
        words = [sys.executable, __file__, "--nodes", str(asked.nodes)]
        began = time.monotonic()
        with log.open("wb") as out:
            running = subprocess.Popen([*words, "--herd-of", cluster.server], stdout=out)
        try:
            asyncio.run(measure(cluster, Watch(log), began, asked.nodes, asked.away))
        except (TimeoutError, ClusterError):
            print(cluster.orchestrator.tail())
            raise
        finally:
            running.kill()
            running.wait(10)
            cluster.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
