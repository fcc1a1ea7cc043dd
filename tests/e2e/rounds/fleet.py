"""The processes of a lab: an orchestrator with its NATS server and some agents, each in a network
namespace of its own, each of which can be killed, stopped and started again.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final, TypeVar

from bacalhau.client import AsyncClient
from bacalhau_api.errors import TransientError
from bacalhau_controllers.runner.state import RunnerState
from tests.e2e.cluster import ClusterError, Process, nats_pid
from tests.e2e.rounds.lab import FAIR, Lab, Party
from tests.e2e.rounds.work import Program

T = TypeVar("T")

API_PORT, NATS_PORT = 1234, 4222
NODE_TIMEOUT_SECONDS = 3
AGENT_DISK_MEGABYTES = 64
HUB_DISK_MEGABYTES = 512
_BALLAST: Final = "ballast"
_STARTS_MAX = 3
_ANSWER_SECONDS = 60.0


@dataclass(slots=True)
class Station:
    """One party with the process that runs there. `busy` is held by the fault that is at it;
    `starting` by who starts it: another fault may have killed everything meanwhile."""

    party: Party
    process: Process
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        """Its own and its namespace's."""
        return self.party.name

    @property
    def pid(self) -> int:
        """Of the process, as long as it was not killed."""
        assert self.process.popen is not None
        return self.process.popen.pid

    @property
    def is_up(self) -> bool:
        """Whether its process lives."""
        popen = self.process.popen
        return popen is not None and popen.poll() is None

    def kill(self) -> None:
        """kill -9; its children are left to themselves."""
        if self.is_up:
            self.process.kill()

    async def start(self) -> None:
        """Start it, unless it runs. Raises ClusterError if that fails several times."""
        async with self.starting:
            for left in reversed(range(_STARTS_MAX)):
                if self.is_up:
                    return
                try:
                    await asyncio.to_thread(self.process.start)
                except ClusterError:
                    if not left:
                        raise

    # -- what is on its disk ---------------------------------------------------------------------

    def fork_servers(self) -> list[int]:
        """Process ids of the wasm engine's fork servers."""
        return [pid for pid, line in _processes() if "wasm.zygote" in line and self._is_mine(line)]

    def all_pids(self) -> list[int]:
        """Of the agent and everything that it started."""
        roots = {self.pid, *self.fork_servers()} if self.is_up else {*self.fork_servers()}
        return sorted(roots | {pid for pid, parent in _parents() if parent in roots})

    def ledger(self) -> dict[str, RunnerState]:
        """The states of executions in the agent's ledger, by uid. Raises sqlite3.Error."""
        path = self.process.data_dir / "node" / "ledger.db"
        with contextlib.closing(_open(path)) as database:
            query = "SELECT uid, body FROM objects WHERE kind = 'state'"
            return {uid: RunnerState.decode(body) for uid, body in database.execute(query)}

    def _is_mine(self, line: str) -> bool:
        return f"{self.process.data_dir}/" in line


class Fleet:
    """An orchestrator and agents in a lab, on data below `root`, which run one program."""

    def __init__(self, lab: Lab, root: Path, agents: int, program: Program, rng: Random) -> None:
        self.lab = lab
        self.program = program
        self.root = root
        orchestrator = lab.parties.get("hub") or lab.join("hub")
        self.server = f"http://{orchestrator.address}:{API_PORT}"
        self.nats = f"nats://{orchestrator.address}:{NATS_PORT}"
        self.hub = Station(
            orchestrator,
            Process(
                "hub",
                root / "hub",
                [
                    "--role", "orchestrator", "--host", orchestrator.address,
                    "--port", str(API_PORT), "--nats-host", orchestrator.address,
                    "--nats-port", str(NATS_PORT), "--insecure-lab",
                    "--node-timeout", str(NODE_TIMEOUT_SECONDS),
                ],
                wrap=orchestrator.wrap,
            ),
        )  # fmt: skip
        self.edges: dict[str, Station] = {}
        for number in range(agents):
            name = f"edge-{number + 1}"
            mtu = rng.choice([1280, 1400, 1500])
            party = lab.parties.get(name) or lab.join(name, mtu)
            self.edges[name] = Station(party, Process(name, root / name, [], wrap=party.wrap))

    @property
    def stations(self) -> list[Station]:
        """All of them."""
        return [self.hub, *self.edges.values()]

    def running(self) -> dict[str, set[str]]:
        """What really runs: ids of runs, by agent."""
        return {
            e.name: self.program.running(e.name, e.process.data_dir) for e in self.edges.values()
        }

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        """To its API."""
        async with AsyncClient(self.server) as client:
            yield client

    async def start(self, allow_path: str) -> None:
        """Start the orchestrator, then enrol and start the agents."""
        self.lab.small_disk(self.hub.process.data_dir, HUB_DISK_MEGABYTES)
        await asyncio.to_thread(self.program.begin, list(self.edges))
        await self.hub.start()
        async with self.client() as client:
            for edge in self.edges.values():
                self.lab.small_disk(edge.process.data_dir, AGENT_DISK_MEGABYTES)
                token = (await client.create_join_token(node=edge.name)).token
                edge.process.args = [
                    "--role", "compute", "--orchestrator", self.server, "--token", token,
                    "--name", edge.name, "--allow-path", allow_path, "--on-exit", "stop",
                    "--cpu", "8", "--memory", "4GB", "--disk", "1GB",
                    *self.program.options(edge.name),
                ]  # fmt: skip
                await edge.start()

    async def heal(self) -> None:
        """Nothing is cut, stopped, full or dead any more."""
        for station in self.stations:
            station.party.set(FAIR)
            if station.is_up:
                os.kill(station.pid, signal.SIGCONT)
        for station in self.stations:
            empty(station)
        for edge in self.edges.values():
            for pid in self.all_pids(edge):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        with contextlib.suppress(ClusterError):
            os.kill(self.nats_pid(), signal.SIGCONT)
        await asyncio.to_thread(self.program.heal)
        await asyncio.gather(*(station.start() for station in self.stations))

    def all_pids(self, edge: Station) -> list[int]:
        """Of everything on a node: agent, engine, workloads."""
        return sorted({*edge.all_pids(), *self.program.pids(edge.name)})

    def nats_pid(self) -> int:
        """Of the NATS server. Raises ClusterError while none runs."""
        return nats_pid(self.hub.process.data_dir)

    async def close(self) -> list[str]:
        """Stop everything in order; command lines of what is left over."""
        for station in (*self.edges.values(), self.hub):
            if station.is_up:
                with contextlib.suppress(ClusterError):
                    await asyncio.to_thread(station.process.stop)
        for _ in range(100):
            left = [line for _, line in _processes() if f"{self.root}/" in line]
            if not left:
                break
            await asyncio.sleep(0.1)
        return left + await asyncio.to_thread(self.program.leftovers)

    def destroy(self) -> None:
        """Kill what is left, and unmount the disks."""
        self.program.end()
        for pid, line in list(_processes()):
            if f"{self.root}/" in line and pid not in (1, os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for station in self.stations:
            if os.path.ismount(station.process.data_dir):
                self.lab.drop_disk(station.process.data_dir)

    def keep(self, into: Path) -> None:
        """Copy what is on the small disks to where it lasts."""
        for station in self.stations:
            with contextlib.suppress(shutil.Error, OSError):
                shutil.copytree(
                    station.process.data_dir,
                    into / station.name,
                    ignore=shutil.ignore_patterns("cache", "*.cwasm", "*.sock", _BALLAST),
                    dirs_exist_ok=True,
                )


def fill(station: Station) -> None:
    """Leave no room on its disk."""
    path = station.process.data_dir / _BALLAST
    with contextlib.suppress(OSError), path.open("ab") as file:
        while True:
            file.write(bytes(64 * 1024))
            file.flush()


def empty(station: Station) -> None:
    """Give the room back."""
    (station.process.data_dir / _BALLAST).unlink(missing_ok=True)


async def insist(work: Callable[[], Awaitable[T]]) -> T:
    """Try until there is an answer, however often nobody answers."""
    async with asyncio.timeout(_ANSWER_SECONDS):
        while True:
            try:
                return await work()
            except TransientError:
                await asyncio.sleep(0.2)


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=2.0)


def _processes() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
                if line:
                    yield int(entry.name), line.replace("\0", " ")


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                text = (entry / "stat").read_text()
                yield int(entry.name), int(text[text.rindex(")") + 2 :].split()[1])
