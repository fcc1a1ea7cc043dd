"""Orchestrator processes, composed as `bacalhau serve` composes them, over the simulated world."""

import asyncio
from random import Random
from typing import TYPE_CHECKING, cast

from bacalhau.nats.endpoint import NodeEndpoint
from bacalhau.nats.transport import Transport
from bacalhau.server.actions import Actions
from bacalhau.server.ports import Enrolment, Services
from bacalhau_controllers.cache import Cache, Informer
from bacalhau_controllers.execution import ExecutionReconciler, FactInbox
from bacalhau_controllers.gateway import Gateway
from bacalhau_controllers.job import JobReconciler, JobSettings
from bacalhau_controllers.manager import Manager
from bacalhau_controllers.node import NodeReconciler
from bacalhau_controllers.node.presence import Presence
from bacalhau_controllers.publishing import PublishingReconciler
from bacalhau_controllers.retention import RetentionReconciler, namespace_key
from bacalhau_controllers.state import State
from bacalhau_controllers.waitages import WaitAges
from tests.simulation.world.faults import Fault
from tests.simulation.world.life import Life, current_life
from tests.simulation.world.network import Client, Line
from tests.simulation.world.storage import StoreClient

if TYPE_CHECKING:
    from tests.simulation.world.world import World

WORKERS = 4
"""Of each reconciler. More would only stand by: there are few objects."""


class Orchestrator:
    """One orchestrator's place: its clocks and its line; processes come and go in it."""

    def __init__(self, world: "World", name: str, rng: Random) -> None:
        self.world = world
        self.name = name
        self.rng = rng
        self.clock = world.new_clock(rng)
        self.line = Line(name)
        self.lives = 0
        self.life: Life | None = None
        self.store: StoreClient | None = None
        self.manager: Manager | None = None
        self.cache: Cache | None = None
        self.actions: Actions | None = None
        self._client: Client | None = None

    def __repr__(self) -> str:
        return self.name

    @property
    def is_serving(self) -> bool:
        """Whether users can use its API."""
        return self.life is not None and self.cache is not None and self.cache.is_synced

    @property
    def leads(self) -> bool:
        """Whether it takes itself for the leader."""
        return self.manager is not None and self.manager.is_leader.is_set()

    def start(self) -> None:
        """Start a process, unless one runs."""
        if self.life is not None:
            return
        world = self.world
        self.lives += 1
        life = self.life = Life(world.loop, f"{self.name}.{self.lives}")
        faults = world.faults if not world.is_healed else world.no_faults
        rng = Random(self.rng.getrandbits(64))
        store = self.store = StoreClient(
            world.store, world.loop, self.clock, rng, faults, self._boundary
        )
        self._client = Client(world.server, self.line, life)
        world.note("orchestrator-start", self.name)
        life.context.run(self._compose, store, self._client, life)

    def _compose(self, store: StoreClient, client: Client, life: Life) -> None:
        world, clock = self.world, self.clock
        cache = self.cache = Cache()
        own, shared = State(store, cache), State(store, cache)
        endpoint = NodeEndpoint(cast(Transport, client))
        presence, inbox = Presence(clock), FactInbox()
        gateway = Gateway(cache, inbox, presence, endpoint, clock)

        async def lead() -> None:
            gateway.open()
            await endpoint.open(gateway)
            world.note("leads", life.name)

        async def follow() -> None:
            await endpoint.close()
            await gateway.close()
            world.note("follows", life.name)

        manager = self.manager = Manager(
            own,
            clock,
            Random(self.rng.getrandbits(64)),
            holder=life.name,
            informer=Informer(store, cache, clock, Random(self.rng.getrandbits(64))),
            on_started_leading=lead,
            on_stopped_leading=follow,
        )
        settings = JobSettings(
            fault_backoff_seconds_max=20.0,
            ready_seconds=2.0,
            verdict_seconds=20.0,
            # Small, so that many plans are cut short and go on in the next.
            bytes_max=self.rng.choice((1, 2000, 1 << 20)),
        )
        ages = WaitAges(clock)
        jobs = JobReconciler(own, clock, settings=settings, ages=ages)
        manager.add(jobs, "Job", workers=WORKERS)
        executions = ExecutionReconciler(own, clock, inbox, presence, ages)
        manager.add(executions, "Execution", workers=WORKERS)
        publications = PublishingReconciler(own, clock, inbox, presence)
        manager.add(publications, "Publication", workers=WORKERS)
        manager.add(NodeReconciler(own, clock, presence), "Node", workers=WORKERS)
        manager.add(RetentionReconciler(own, clock), "Job", workers=1, key=namespace_key)
        # Users ask for no logs and enrol nobody through this API.
        services = Services(
            shared, endpoint, cast(Enrolment, None), clock, world.ids(f"u-{life.name}")
        )
        self.actions = Actions(services)
        life.spawn(manager.run(), f"manager {life.name}")

    def kill(self) -> None:
        """The process dies, wherever it is."""
        if self.life is None:
            return
        self.world.note("orchestrator-kill", self.name)
        if self.manager is not None:
            self.world.checker.buried(self.name, self.manager)
        life, self.life = self.life, None
        self.manager = self.cache = self.actions = self.store = None
        if self._client is not None:
            self._client.disconnect()
        life.kill()

    async def _boundary(self, what: str) -> None:
        """Each write passes here, before and after: either may be the last moment of the process."""
        life = current_life()
        if life is None or life is not self.life:
            raise asyncio.CancelledError("the orchestrator is dead")
        if self.world.on_write is not None:
            self.world.on_write(self, what)
        if self.world.happens(Fault.CRASH_AT_WRITE, self.rng):
            self.crash(what)
        if not life.is_alive:
            raise asyncio.CancelledError("the orchestrator died here")

    def crash(self, what: str) -> None:
        """The process dies at this point, and is started again after a while."""
        self.world.note("crash-at", self.name, what)
        self.kill()
        self.world.later(self.rng.uniform(0.1, 15), self.start)
