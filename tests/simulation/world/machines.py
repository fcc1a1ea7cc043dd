"""The machines that run agents: disk, engine and clocks that outlive the processes on them."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, cast

from bacalhau.nats.transport import Transport
from bacalhau.node.link import ChangesHandler, NatsLink
from bacalhau.node.reader import OutputReader
from bacalhau.node.upload import UploadGate
from bacalhau_api.errors import BacalhauError, UnavailableError
from bacalhau_api.v1.execution import Publication
from bacalhau_api.v1.job import Resources, SpecConfig
from bacalhau_api.wire import Applied, Changes
from bacalhau_controllers.runner.admission import Policy
from bacalhau_controllers.runner.agent import Agent
from bacalhau_controllers.runner.fakes import (
    Boundary,
    FakeEngine,
    FakePublisher,
    FakeStorage,
    MemoryWorkspace,
)
from bacalhau_controllers.runner.ledger import AckFacts, Entry, LedgerBrokenError, MemoryLedger
from bacalhau_controllers.runner.ports import DISCONNECTED, Workload
from bacalhau_controllers.runner.site import AgentSettings
from bacalhau_controllers.runner.state import Limits
from tests.simulation.world.faults import Fault
from tests.simulation.world.life import Life, current_life
from tests.simulation.world.network import Client, Line

if TYPE_CHECKING:
    from tests.simulation.world.world import World

ENGINE = "fake"
LIMITS = Limits(
    capacity_wait_seconds=120.0,
    prepare_try_seconds=60.0,
    start_try_seconds=10.0,
    stop_grace_seconds=2.0,
    stop_margin_seconds=5.0,
    collect_try_seconds=10.0,
    retry_seconds_max=10.0,
    timeout_margin_seconds=5.0,
)
"""Shorter than real ones, so that a simulated minute holds more of what can happen."""


class WatchedEngine(FakeEngine):
    """Tells the world of every real start. `start_lies` makes starts fail that have happened.

    Leashes pull only where no agent has the engine: one that has it is to see to it by itself.
    """

    def __init__(self, machine: "Machine", boundary: Boundary) -> None:
        super().__init__(machine.clock, boundary=boundary, start_seconds=0.05)
        self._machine = machine
        self.start_lies = False
        self._opened_in: Life | None = None

    async def open(self) -> None:
        """See Engine."""
        await super().open()
        self._opened_in = self._machine.life

    def _end_all(self) -> None:
        super()._end_all()
        life = self._machine.life
        if life is not None and life is self._opened_in:
            return
        noted, now = self._machine.workspace.contact, self._machine.clock
        for run in self.runs.values():
            leash = run.workload.leash
            if run.ended is not None or leash is None:
                continue
            heard = leash.contact
            if noted is not None and noted[0] == leash.boot:
                heard = max(heard, noted[1])
            if now.monotonic() - heard > leash.seconds:
                run.ended = self._exited(run, now.now(), 137, DISCONNECTED)

    async def start(self, workload: Workload) -> None:
        """See Engine."""
        before = self.started.get(workload.id, 0)
        try:
            await super().start(workload)
        finally:
            if self.started.get(workload.id, 0) != before:
                self._machine.started(workload.id)
        if self.start_lies:
            raise UnavailableError("the engine says that it could not start it")


class WatchedLink(NatsLink):
    """Tells when changes are said to be applied, each time for the first time."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.on_applied: Callable[[Changes], None] = lambda changes: None

    def set_handlers(
        self,
        *,
        on_up: Callable[[], None],
        on_down: Callable[[], None],
        on_changes: ChangesHandler,
    ) -> None:
        """See Link."""
        told: set[tuple[str, int]] = set()

        async def watched(changes: Changes) -> Applied | None:
            applied = await on_changes(changes)
            if applied is not None and (changes.session, changes.number) not in told:
                told.add((changes.session, changes.number))
                self.on_applied(changes)
            return applied

        super().set_handlers(on_up=on_up, on_down=on_down, on_changes=watched)


class WatchedLedger(MemoryLedger):
    """Tells the world which facts the agent takes to be stored. A write whose flush fails may be on
    the disk all the same."""

    on_ack: Callable[[list[Any]], None] | None = None
    fails: Callable[[], bool] = staticmethod(lambda: False)
    is_written: Callable[[], bool] = staticmethod(lambda: False)

    async def commit(self, entries: Any) -> None:
        """See Ledger."""
        if self.on_ack is not None:
            for entry in cast(list[Entry], entries):
                if isinstance(entry, AckFacts):
                    self.on_ack([f for f in self._book.facts.values() if f.seq <= entry.seq])
        does_fail = self.fails()
        if not does_fail or self.is_written():
            await super().commit(entries)
        if does_fail:
            raise LedgerBrokenError("the disk did not confirm a write")

    def clone(self, boundary: Boundary) -> "WatchedLedger":
        """A copy of the disk."""
        twin = WatchedLedger(self._book.meta.incarnation, boundary=boundary)
        twin._book = self._book.copy()
        return twin


class WatchedPublisher(FakePublisher):
    """Tells the world of every delivery, and fails while it is told to."""

    is_failing = False
    on_delivery: Callable[[Publication], None]

    async def publish(self, publication: Publication, outputs: Path) -> SpecConfig:
        """See Publisher."""
        if self.is_failing:
            raise UnavailableError("the target is not reachable")
        self.on_delivery(publication)
        return await super().publish(publication, outputs)


class FlakyStorage(FakeStorage):
    """Fails while it is told to."""

    is_failing = False

    async def fetch(self, item: Any, into: Path, use: Any) -> Any:
        """See Storage."""
        if self.is_failing:
            raise UnavailableError("the source is not reachable")
        return await super().fetch(item, into, use)


class FlakyWorkspace(MemoryWorkspace):
    """Fails to sum up outputs while it is told to."""

    is_failing = False

    async def collect(self, layout: Any, exit_code: int | None) -> Any:
        """See Workspace."""
        if self.is_failing:
            raise UnavailableError("the disk cannot be read now")
        return await super().collect(layout, exit_code)


class Machine:
    """One machine, with at most one agent at a time. `node` is the name it goes by; two machines
    with one name are a cloned disk."""

    def __init__(
        self,
        world: "World",
        name: str,
        node: str,
        capacity: Resources,
        labels: dict[str, str],
        rng: Random,
    ) -> None:
        self.world = world
        self.name = name
        self.node = node
        self.capacity = capacity
        self.labels = labels
        self.rng = rng
        self.clock = world.new_clock(rng)
        self.line = Line(name)
        self.boot = 1
        self.lives = 0
        self.ledgers = 0
        self.is_tampered = False
        """Whether its disk was ever wiped, restored or cloned."""
        self.is_cloned = False
        """Whether two machines ever had this disk at the same time."""
        self.is_retired = False
        """Whether it was switched off for good."""
        self.ledger = self._new_ledger()
        self.copies = [self.ledger.clone(self.boundary)]
        self.engine = WatchedEngine(self, self.boundary)
        self.storage = FlakyStorage(boundary=self.boundary)
        self.publisher = WatchedPublisher(boundary=self.boundary)
        self.publisher.on_delivery = lambda p: world.checker.delivered(self, p)
        self.workspace = FlakyWorkspace(boundary=self.boundary)
        self.life: Life | None = None
        self.agent: Agent | None = None
        self._client: Client | None = None

    def __repr__(self) -> str:
        return self.name

    @property
    def is_up(self) -> bool:
        """Whether an agent runs."""
        return self.life is not None

    # -- the agent's life ------------------------------------------------------------------------

    def start(self) -> None:
        """Start an agent, unless one runs or the machine is retired."""
        if self.life is not None or self.is_retired:
            return
        world = self.world
        self.lives += 1
        life = Life(world.loop, f"{self.name}.{self.lives}")
        self.life = life
        self._client = Client(world.server, self.line, life)
        # Logs and outputs are not read here; nothing asks the reader.
        link = WatchedLink(
            self.node,
            cast(Transport, self._client),
            cast(OutputReader, None),
            UploadGate(0, self.clock),
        )
        link.on_applied = lambda changes: self.world.checker.applied(self, changes)
        self.agent = Agent(
            self.node,
            self.ledger,
            {ENGINE: self.engine},
            {"fake": self.storage},
            {"fake": self.publisher},
            self.workspace,
            link,
            self.clock,
            Random(self.rng.getrandbits(64)),
            world.ids(f"s-{life.name}"),
            AgentSettings(
                boot=f"{self.name}-boot-{self.boot}",
                policy=Policy(capacity=self.capacity, executions_max=64),
                limits=LIMITS,
                version="1",
                labels=self.labels,
            ),
        )
        world.note("agent-start", self.name)
        life.spawn(self._run(link, self.agent, life), f"agent {life.name}")

    async def _run(self, link: WatchedLink, agent: Agent, life: Life) -> None:
        await link.open()
        try:
            await agent.run()
        except BacalhauError as error:
            self.world.note("agent-end", self.name, error.reason)
            self.kill()
            self.world.later(self.rng.uniform(1, 10), self.start)

    def kill(self) -> None:
        """The agent dies, wherever it is. What it runs goes on."""
        if self.life is None:
            return
        self.world.note("agent-kill", self.name)
        life, self.life, self.agent = self.life, None, None
        if self._client is not None:
            self._client.disconnect()
        self.ledger.crash()
        life.kill()

    def reboot(self) -> None:
        """The machine loses its power: everything on it ends, unseen."""
        self.kill()
        self.boot += 1
        self.engine.reboot()
        self.world.note("reboot", self.name)

    def wipe(self) -> None:
        """The disk is replaced, while workloads may go on."""
        self.kill()
        self.is_tampered = True
        self.ledger = self._new_ledger()
        if self.rng.random() < 0.5:
            self.workspace.directories.clear()
        if self.rng.random() < 0.5:
            self.engine.reboot()
            self.engine.runs.clear()
        self.world.note("wipe", self.name)

    def remember(self) -> None:
        """Take a copy of the disk, for later."""
        self.copies = [*self.copies[-3:], self.ledger.clone(self.boundary)]

    def restore(self) -> None:
        """The disk is restored from an old copy."""
        self.kill()
        self.is_tampered = True
        old = self.rng.choice(self.copies)
        self.ledger = old.clone(self.boundary)
        self._wire(self.ledger)
        self.world.note("restore", self.name)

    def take_disk_of(self, other: "Machine") -> None:
        """This machine was made from a copy of another's disk."""
        self.is_tampered = other.is_tampered = True
        self.is_cloned = other.is_cloned = True
        self.ledger = other.ledger.clone(self.boundary)
        self._wire(self.ledger)

    def heal(self) -> None:
        """Nothing of it is broken any more."""
        self.ledger.is_full = False
        engine = self.engine
        engine.starts_hang = engine.is_silent = engine.stops_fail = engine.start_lies = False
        self.storage.is_failing = self.publisher.is_failing = self.workspace.is_failing = False

    # -- its boundaries --------------------------------------------------------------------------

    async def boundary(self, what: str) -> None:
        """Whatever an agent does to its world passes here: it takes a moment, and may be the last
        thing that the agent did."""
        life = current_life()
        if life is None or life is not self.life:
            raise asyncio.CancelledError("the agent is dead")
        if what == "ledger.commit" and self.world.happens(Fault.DISK_SLOW, self.rng):
            await asyncio.sleep(self.rng.uniform(0.01, self.rng.choice((2.0, 2.0, 2.0, 15.0))))
        else:
            await self.world.moment()
        if life is not self.life:
            raise asyncio.CancelledError("the agent has died")
        if self.world.on_boundary is not None:
            self.world.on_boundary(self, what)
        if self.world.happens(Fault.CRASH_AT_LEDGER, self.rng):
            self.crash(what)
        if life is not self.life:
            raise asyncio.CancelledError("the agent died here")

    def crash(self, what: str) -> None:
        """The agent dies at this point, and is started again after a while."""
        self.world.note("crash-at", self.name, what)
        self.kill()
        self.world.later(self.rng.uniform(0.1, 20), self.start)

    def started(self, run_id: str) -> None:
        """The engine really began a run."""
        self.world.note("run", self.name, run_id)
        self.world.checker.started(self, run_id)

    def _new_ledger(self) -> WatchedLedger:
        self.ledgers += 1
        ledger = WatchedLedger(f"{self.name}-ledger-{self.ledgers}", boundary=self.boundary)
        self._wire(ledger)
        return ledger

    def _wire(self, ledger: WatchedLedger) -> None:
        ledger.on_ack = lambda facts: self.world.checker.acknowledged(self, facts)
        ledger.fails = lambda: self.world.happens(Fault.FSYNC_FAILS, self.rng)
        ledger.is_written = lambda: self.rng.random() < 0.5
