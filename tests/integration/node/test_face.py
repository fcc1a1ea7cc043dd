"""The agent's own socket: a real agent, a real ledger and engine, and nobody else to be reached."""

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any, TypeVar, cast

import pytest

from bacalhau.cli import app as cli
from bacalhau.cli.plain import fetch
from bacalhau.client import Client
from bacalhau.engines.noop import NoopEngine
from bacalhau.kinds import STATUS_PATH
from bacalhau.localsocket import SOCKET_NAME, connect, listen, socket_path
from bacalhau.node.face import Face
from bacalhau.node.ledger import SqliteLedger
from bacalhau.node.reader import OutputReader
from bacalhau.node.status import AgentStatus, NodeView
from bacalhau.node.workspace import DiskWorkspace
from bacalhau.system import SystemClock, SystemIds
from bacalhau_api.errors import NotFoundError, UnavailableError
from bacalhau_api.v1.execution import Execution, Phase
from bacalhau_api.v1.job import JobType, SpecConfig
from bacalhau_api.v1.node import Node
from bacalhau_controllers.runner.admission import Policy
from bacalhau_controllers.runner.agent import Agent
from bacalhau_controllers.runner.fakes import MemoryLink
from bacalhau_controllers.runner.site import AgentSettings
from tests.support.runner import CAPACITY, NODE, Hub, execution
from tests.support.simclock import SimClock

T = TypeVar("T")
SECONDS = 60.0


def noop(
    name: str, *, job: str = "", seconds: float = 0.0, local_deadline: int | None = None
) -> Execution:
    """An execution that says hello and runs for so long."""
    one = execution(name, local_deadline=local_deadline)
    if seconds > 100:
        one = execution(name, local_deadline=local_deadline, job_type=JobType.SERVICE)
    params = {"durationSeconds": seconds, "stdout": f"hello of {name}\n", "stderr": "oh\n"}
    task = one.spec.task.but(engine=SpecConfig(type="noop", params=params))
    return one.but(spec=one.spec.but(task=task, job=job or name))


class Wire:
    """A line of which people can ask how it is."""

    address = "nats://orchestrator:4222"
    last_error = ""
    redial_seconds: float | None = None


class Machine:
    """One node, with its agent and its socket."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.root = root
        self.data = root / "node"
        self.data.mkdir(mode=0o700, parents=True)
        clock = SystemClock()
        workspace = DiskWorkspace(self.data, clock)
        self.reader = OutputReader(workspace, clock)
        self.hub = Hub(cast(SimClock, clock))
        self.link = MemoryLink(self.hub.serve)
        self.hub.link = self.link
        self.ledger = SqliteLedger(self.data / "ledger.db", clock, SystemIds())
        self.agent = Agent(
            NODE,
            self.ledger,
            {"noop": NoopEngine(self.data / "engine", clock)},
            {},
            {},
            workspace,
            self.link,
            clock,
            Random(1),
            SystemIds(),
            AgentSettings(
                boot="b",
                policy=Policy(capacity=CAPACITY),
                version="1.2.3",
                health_seconds=0.1,
                calm_seconds=0.5,
                **settings,
            ),
        )
        self.reader.bind(self.agent)
        self.wire = Wire()
        self.view = NodeView(self.agent, self.ledger, self.wire, clock, self.data)
        self.face = Face(self.view, self.reader, self.data / SOCKET_NAME)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self.face.open()
        self._tasks = [
            asyncio.create_task(self.agent.run()),
            asyncio.create_task(self.face.run()),
        ]
        self.link.set_up(True)
        await self.until(lambda: self.agent.is_welcome)

    async def stop(self) -> None:
        self.face.close()
        await asyncio.wait([self._tasks[1]], timeout=SECONDS)
        self._tasks[0].cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.agent.close(keep_running=False)

    def cut(self, why: str = "no route to host") -> None:
        self.link.set_up(False)
        self.wire.last_error, self.wire.redial_seconds = why, 1.5

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(SECONDS):
            while not is_so():  # noqa: ASYNC110 - what is awaited has no event
                await asyncio.sleep(0.01)

    async def until_phase(self, name: str, phase: Phase) -> None:
        def is_so() -> bool:
            state = self.agent.state_of(f"uid-{name}")
            return state is not None and state.report.phase is phase

        await self.until(is_so)

    async def ask(self, question: Callable[[Client], T]) -> T:
        """Ask as a client would, from outside of the loop."""

        def go() -> T:
            with Client(f"unix:{self.data / SOCKET_NAME}") as client:
                return question(client)

        return await asyncio.to_thread(go)

    async def status(self) -> AgentStatus:
        def go(client: Client) -> AgentStatus:
            from bacalhau.client.calls import raw

            return AgentStatus.model_validate_json(client.send(raw(STATUS_PATH)))

        return await self.ask(go)

    async def cli(self, *words: str) -> int:
        """One command on this machine."""
        return await asyncio.to_thread(cli.run, [*words, "--node-dir", str(self.root)])


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    one = Machine(tmp_path)
    await one.start()
    yield one
    await one.stop()


def is_connected(status: AgentStatus) -> bool:
    return status.connection.connected


async def test_a_connected_node_says_so(machine: Machine) -> None:
    await machine.hub.assign(noop("a"))
    await machine.until_phase("a", Phase.SUCCEEDED)
    await machine.until(lambda: not machine.agent.site.book.facts)
    status = await machine.status()
    assert is_connected(status)
    assert (status.node, status.version) == (NODE, "1.2.3")
    assert status.incarnation == machine.agent.site.book.meta.incarnation
    assert status.connection.approved
    assert status.connection.last_error == ""
    assert status.executions == {"Succeeded": 1}
    assert (status.outbox.facts, status.outbox.results) == (0, 0)
    assert status.ledger.healthy
    assert status.ledger.size_bytes > 0
    assert 0 < status.disk.free_bytes <= status.disk.total_bytes
    assert status.capacity == CAPACITY


async def test_a_node_that_is_cut_off_says_since_when_and_what_waits(machine: Machine) -> None:
    await machine.hub.assign(noop("long", seconds=1000, local_deadline=600))
    await machine.until_phase("long", Phase.RUNNING)
    await machine.hub.assign(noop("short", seconds=2.0))
    machine.cut()
    await machine.until_phase("short", Phase.SUCCEEDED)
    status = await machine.status()
    assert not is_connected(status)
    assert status.connection.since == status.connection.last_contact
    assert status.connection.last_error == "no route to host"
    assert status.connection.next_try is not None
    assert status.connection.orchestrator == "nats://orchestrator:4222"
    assert status.outbox.facts >= 1
    assert status.outbox.facts_bytes > 100
    assert status.outbox.facts_oldest is not None
    assert status.outbox.results == 1
    (stopping,) = status.stopping
    assert stopping.name == "long"
    assert 590 < (stopping.at - status.time).total_seconds() <= 600

    found = await machine.ask(lambda client: client.get(Execution, "long"))
    assert found.phase is Phase.RUNNING
    assert found.status.waiting is not None
    assert found.status.waiting.until is not None
    assert abs((found.status.waiting.until - stopping.at).total_seconds()) < 1

    machine.wire.last_error, machine.wire.redial_seconds = "", None
    machine.link.set_up(True)
    await machine.until(lambda: machine.agent.is_welcome)
    status = await machine.status()
    assert is_connected(status)
    assert not status.stopping


async def test_a_node_that_is_refused_says_so(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.cut("nats: 'Authorization Violation'")
    assert (await machine.status()).connection.refused
    assert await machine.cli("node", "status") == 0
    told = capsys.readouterr().out
    assert "refused: this orchestrator does not know this node (any more)" in told
    machine.cut()
    assert not (await machine.status()).connection.refused


async def test_an_orchestrator_that_does_not_answer_is_no_connection(machine: Machine) -> None:
    """The line is up, and nobody speaks on it."""
    standing = machine.agent.standing
    assert standing.is_linked
    machine.hub.is_deaf = True
    contact = machine.agent.contact
    assert contact is not None
    machine.agent.contact = contact.plus(-1000)
    status = await machine.status()
    assert not is_connected(status)
    assert "no answer for" in status.connection.last_error


async def test_a_ledger_that_cannot_be_written_is_said_and_passes(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    await machine.hub.assign(noop("before", seconds=0.5))
    await machine.until_phase("before", Phase.RUNNING)
    database = machine.ledger._database
    assert database is not None
    database.execute("PRAGMA max_page_count = 1")
    # Enough that it does not fit into pages that are there.
    more = [noop(f"more-{number}") for number in range(60)]
    assert await machine.hub.assign(*more) is None, "new work is not taken on"
    status = await machine.status()
    assert not status.ledger.healthy
    assert "the disk is full" in status.ledger.message
    assert [condition.type for condition in status.conditions] == ["LedgerFull"]
    assert await machine.cli("node", "status") == 0
    assert "NOT WRITABLE" in capsys.readouterr().out
    assert not machine.agent.info().engines[0].available, "placement looks elsewhere"

    database.execute("PRAGMA max_page_count = 1000000")
    await machine.until_phase("more-59", Phase.SUCCEEDED)
    await machine.until_phase("before", Phase.SUCCEEDED)
    status = await machine.status()
    assert status.ledger.healthy
    assert not status.conditions


async def test_a_full_outbox_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Machine(tmp_path, outbox_bytes_max=10)
    await one.start()
    await one.hub.assign(noop("a", seconds=2.0))
    one.cut()
    await one.until_phase("a", Phase.SUCCEEDED)
    await one.until(lambda: bool(one.agent.info().conditions))
    status = await one.status()
    assert status.outbox.full
    assert status.outbox.bytes_max == 10
    assert [condition.type for condition in status.conditions] == ["OutboxFull"]
    assert await one.cli("node", "status") == 0
    assert "full: no new work is taken on" in capsys.readouterr().out
    one.link.set_up(True)
    await one.until(lambda: not one.agent.info().conditions)
    assert not (await one.status()).outbox.full
    await one.stop()


async def test_lists_are_those_of_the_api(machine: Machine) -> None:
    await machine.hub.assign(noop("a"), noop("b", job="other"))
    await machine.until_phase("a", Phase.SUCCEEDED)
    await machine.until_phase("b", Phase.SUCCEEDED)
    every = await machine.ask(lambda client: list(client.list(Execution, namespace=None)))
    assert [one.name for one in every] == ["a", "b"]
    some = await machine.ask(lambda client: list(client.list(Execution, fields="job=other")))
    assert [one.name for one in some] == ["b"]
    none = await machine.ask(lambda client: list(client.list(Execution, namespace="elsewhere")))
    assert none == []
    (node,) = await machine.ask(lambda client: list(client.list(Node)))
    assert node.name == NODE
    assert node.status.info.engines[0].name == "noop"
    with pytest.raises(NotFoundError, match="has no execution c"):
        await machine.ask(lambda client: client.get(Execution, "c"))


async def test_logs_and_outputs_need_nobody_else(machine: Machine, tmp_path: Path) -> None:
    machine.cut()
    machine.link.set_up(True)
    await machine.until(lambda: machine.agent.is_welcome)
    await machine.hub.assign(noop("a", job="pair", seconds=0.5), noop("b", job="pair"))
    machine.cut()
    followed = await machine.ask(
        lambda client: "".join(r.text for r in client.job_logs("pair", follow=True))
    )
    assert sorted(followed.splitlines()) == ["hello of a", "hello of b", "oh", "oh"]
    assert machine.agent.is_over("default", "a"), "it was followed to its end"
    one = await machine.ask(lambda client: client.get(Execution, "a"))
    records = await machine.ask(lambda client: list(client.logs(one, stream="stdout", tail=1)))
    assert "".join(record.text for record in records) == "hello of a\n"
    assert await machine.cli("download", "execution/a", "-o", str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / "stdout").read_text() == "hello of a\n"
    with pytest.raises(NotFoundError, match="no execution of job nothing"):
        await machine.ask(lambda client: list(client.job_logs("nothing")))


async def test_commands(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    await machine.hub.assign(noop("a", seconds=1000, local_deadline=7200))
    await machine.until_phase("a", Phase.RUNNING)
    machine.cut()

    async def says(*words: str) -> str:
        assert await machine.cli(*words) == 0, capsys.readouterr()
        return capsys.readouterr().out

    status = await says("node", "status")
    assert "cut off since" in status
    assert "Last error:" in status
    assert "default/a in 1h" in status
    assert json.loads(await says("node", "status", "-o", "json"))["kind"] == "AgentStatus"
    assert "kind: AgentStatus" in await says("node", "status", "-o", "yaml")
    table = (await says("get", "executions")).splitlines()
    assert table[0].split() == [
        "NAME", "PHASE", "RUN", "SINCE", "STOPS", "IN", "UNSENT", "EXIT", "AGE",
    ]  # fmt: skip
    assert table[1].split()[:3] == ["a", "Running", "1"]
    assert "STAGE" in await says("get", "executions", "-o", "wide")
    assert "execution/a" in await says("get", "executions", "-o", "name")
    assert "hello of a" in await says("logs", "a")
    described = await says("describe", "execution", "a")
    assert "Stops at:" in described
    assert "kept by the orchestrator" in described
    assert "attempt 0" in await says("explain", "execution", "a")
    assert "1.2.3" in await says("version")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["get", "jobs"], 5, "does not know about jobs"),
        (["stop", "a"], 5, "does not know about jobs"),
        (["get", "executions", "-w"], 1, "watch"),
        (["get", "executions", "--field-selector", "no=1"], 1, "cannot be selected on"),
        (["logs", "nothing"], 5, "nothing of nothing"),
        (["get", "executions", "--server", "http://other:1"], 2, "give one of the two"),
    ],
)
async def test_what_it_cannot_do_is_said(
    machine: Machine,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    said: str,
) -> None:
    assert await machine.cli(*words) == code
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


async def test_only_its_owner_can_reach_it(machine: Machine) -> None:
    path = machine.data / SOCKET_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(machine.data.stat().st_mode) == 0o700


async def test_it_is_read_only(machine: Machine) -> None:
    import httpx

    def go() -> list[int]:
        transport = httpx.HTTPTransport(uds=str(machine.data / SOCKET_NAME))
        with httpx.Client(transport=transport, base_url="http://agent") as http:
            path = "/apis/bacalhau.org/v1/namespaces/default/executions/a"
            return [http.request(verb, path).status_code for verb in ("PUT", "DELETE", "POST")]

    assert await asyncio.to_thread(go) == [405, 405, 405]


async def test_the_socket_of_a_killed_agent_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    dead = listen(tmp_path / "node" / SOCKET_NAME)
    dead.close()
    with pytest.raises(ConnectionRefusedError):
        connect(tmp_path / "node" / SOCKET_NAME, 1.0)
    (tmp_path / "node").rename(tmp_path / "was")
    one = Machine(tmp_path)
    (tmp_path / "was" / SOCKET_NAME).rename(one.data / SOCKET_NAME)
    await one.start()
    assert is_connected(await one.status())
    await one.stop()
    assert not (one.data / SOCKET_NAME).exists(), "and it goes with its agent"


async def test_a_path_of_any_length_will_do(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["a-rather-long-name-of-a-directory"] * 5)
    one = Machine(deep)
    await one.start()
    assert len(os.fsencode(one.data / SOCKET_NAME)) > 200
    assert is_connected(await one.status())
    assert await one.cli("node", "status") == 0
    await one.stop()


async def test_nobody_there_is_said_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await asyncio.to_thread(cli.run, ["node", "status", "--node-dir", str(tmp_path)]) == 6
    told = capsys.readouterr().err
    assert f"no agent can be asked at {socket_path(tmp_path)}" in told
    assert "--node-dir" in told
    listen_and_leave = tmp_path / "node"
    listen_and_leave.mkdir()
    listen(listen_and_leave / SOCKET_NAME).close()
    assert await asyncio.to_thread(cli.run, ["node", "status", "--node-dir", str(tmp_path)]) == 6
    assert "the agent does not run" in capsys.readouterr().err


async def test_without_an_orchestrator_the_agent_is_pointed_at(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACALHAU_NODE_DIR", str(machine.root))
    words = ["get", "jobs", "--server", "http://127.0.0.1:9"]
    assert await asyncio.to_thread(cli.run, words) == 6
    assert "see `bacalhau node status`" in capsys.readouterr().err
    dead = machine.root / "dead"
    (dead / "node").mkdir(parents=True)
    listen(dead / "node" / SOCKET_NAME).close()
    for place in (machine.root / "nowhere", dead):
        monkeypatch.setenv("BACALHAU_NODE_DIR", str(place))
        assert await asyncio.to_thread(cli.run, words) == 6
        assert "node status" not in capsys.readouterr().err


async def test_what_only_the_orchestrator_has_is_said(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    await machine.hub.assign(noop("a"))
    await machine.until_phase("a", Phase.SUCCEEDED)
    assert await machine.cli("history", "execution/a") == 5
    assert "does not have the history of executions" in capsys.readouterr().err
    assert await machine.cli("node", "cordon", NODE) == 1
    told = capsys.readouterr().err
    assert "can only be read" in told
    assert "changes are made at the orchestrator" in told


async def test_clients_that_hang_hold_up_nobody(machine: Machine) -> None:
    path = machine.data / SOCKET_NAME
    held: list[Any] = [connect(path, 5.0) for _ in range(10)]
    held[0].sendall(b"GET /apis/bacalhau.org/v1/agent/status HTTP/1.1\r\nHost: a")
    assert is_connected(await machine.status())
    for sock in held:
        sock.close()


async def test_an_agent_that_ends_is_not_waited_for(machine: Machine) -> None:
    """A log that is followed breaks off; what comes later finds nobody."""
    await machine.hub.assign(noop("a", seconds=1000))
    await machine.until_phase("a", Phase.RUNNING)
    server = f"unix:{machine.data / SOCKET_NAME}"

    def follow(client: Client) -> None:
        for record in client.job_logs("a", follow=True):
            if record.text:
                machine.face.close()

    with pytest.raises(UnavailableError):
        await machine.ask(follow)
    with pytest.raises(UnavailableError, match="no agent answers"):
        await asyncio.to_thread(fetch, server, STATUS_PATH, {}, "")
