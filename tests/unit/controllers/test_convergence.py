"""All reconcilers but the job one, two processes, nodes, and everything that goes wrong between.

Nodes work through what is assigned to them and report until acknowledged. Writes are refused, or
done and their answer lost; nodes are cut off; leaders die; users write in between. When the faults
end, what nodes finished is what the store says, and then nothing is written any more.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from random import Random

import pytest

from bacalhau_api.errors import OutcomeUnknownError, TransientError, UnavailableError
from bacalhau_api.meta import Contact, Ref, Resource
from bacalhau_api.v1.execution import (
    Desired,
    Execution,
    Phase,
    Publication,
    PublicationPhase,
    PublicationReport,
    Report,
)
from bacalhau_api.v1.job import DisconnectPolicy, Job
from bacalhau_api.v1.node import Node, NodeInfo
from bacalhau_api.wire import Fact
from bacalhau_controllers.cache import Cache, Informer
from bacalhau_controllers.execution import ExecutionReconciler, FactInbox
from bacalhau_controllers.manager import Manager
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.node import NodeReconciler, Presence
from bacalhau_controllers.publishing import PublishingReconciler
from bacalhau_controllers.retention import RetentionReconciler, namespace_key
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Delete, Put, Why, Write
from tests.support.samples import execution, job, job_spec, node, publication
from tests.support.simclock import SimClock, SimLoop

ORDER = [Phase.PENDING, Phase.PREPARING, Phase.RUNNING]


class FaultyStore(MemoryStore):
    """Loses writes, before or after doing them, and takes its time."""

    def __init__(self, clock: SimClock, rng: Random) -> None:
        super().__init__(clock, strict=True)
        self._rng = rng
        self.fault_rate = 0.0

    async def commit(self, writes: Sequence[Write], why: Why) -> tuple[Resource | None, ...]:
        await asyncio.sleep(self._rng.uniform(0, 0.02))
        if self._rng.random() < self.fault_rate:
            raise UnavailableError("refused before it was done")
        results = await super().commit(writes, why)
        if self._rng.random() < self.fault_rate:
            raise OutcomeUnknownError("done, and the answer was lost")
        return results


class Process:
    """One orchestrator."""

    def __init__(self, loop: SimLoop, store: MemoryStore, clock: SimClock, name: str) -> None:
        rng = Random(name)
        self.loop = loop
        self.state = State(store, Cache())
        self.inbox = FactInbox()
        self.presence = Presence(clock)
        self.manager = Manager(
            self.state,
            clock,
            rng,
            holder=name,
            informer=Informer(store, self.state.cache, clock, rng),
        )
        with_facts = (self.state, clock, self.inbox, self.presence)
        self.manager.add(ExecutionReconciler(*with_facts), "Execution")
        self.manager.add(PublishingReconciler(*with_facts), "Publication")
        self.manager.add(NodeReconciler(self.state, clock, self.presence), "Node")
        self.manager.add(RetentionReconciler(self.state, clock), "Job", key=namespace_key)
        self.task = loop.create_task(self.manager.run(), name=f"manager {name}")

    @property
    def leads(self) -> bool:
        return self.manager.is_leader.is_set()


class Agent:
    """A node: does what is assigned to it, and reports until it is acknowledged."""

    def __init__(self, world: "World", name: str, seed: int) -> None:
        self.world = world
        self.name = name
        self.rng = Random(seed)
        self.is_cut_off = False
        self.truth: dict[str, Report] = {}
        self.published: dict[str, PublicationReport] = {}
        self.outbox: dict[int, Fact] = {}
        self.seq = 0
        self.said_hello_to: object = None

    async def run(self) -> None:
        while True:
            await self.world.clock.sleep(self.rng.uniform(0.5, 2))
            self.work()
            leader = self.world.leader
            if leader is None or self.is_cut_off:
                continue
            if self.said_hello_to is not leader or not leader.presence.heard(
                self.name, self.world.clock.monotonic()
            ):
                leader.presence.hello(self.name, "ledger-1", NodeInfo(version="1"), "s")
                self.said_hello_to = leader
            facts = list(self.outbox.values())
            self.rng.shuffle(facts)
            await asyncio.gather(*(self.send(leader, fact) for fact in facts[:20]))

    async def send(self, leader: Process, fact: Fact) -> None:
        with suppress(TransientError):
            await leader.inbox.offer(self.name, "ledger-1", fact)
            if not self.is_cut_off and self.rng.random() > 0.1:  # else the answer was lost
                self.outbox.pop(fact.seq, None)

    def work(self) -> None:
        """Move each assignment on by itself, whether or not anybody listens."""
        if not self.is_cut_off:
            self.assigned = self.world.assigned(self.name)
        for thing in self.assigned:
            if isinstance(thing, Execution) and self.rng.random() < 0.5:
                self.move_execution(thing)
            elif isinstance(thing, Publication) and self.rng.random() < 0.5:
                self.move_publication(thing)

    assigned: Sequence[Resource] = ()

    def move_execution(self, thing: Execution) -> None:
        old = self.truth.get(thing.metadata.uid)
        if old is not None and old.phase.is_final:
            return
        if thing.spec.desired is Desired.STOP:
            phase = Phase.STOPPED
        elif old is None:
            phase = Phase.PREPARING
        elif old.phase is Phase.PREPARING:
            phase = Phase.RUNNING
        else:
            phase = self.rng.choice([Phase.RUNNING, Phase.SUCCEEDED, Phase.FAILED])
        new = Report(step=old.step + 1 if old else 0, incarnation="ledger-1", phase=phase)
        self.truth[thing.metadata.uid] = new
        self.tell(thing, execution=new)

    def move_publication(self, thing: Publication) -> None:
        old = self.published.get(thing.metadata.uid)
        if old is not None and old.phase.is_final:
            return
        phase = PublicationPhase.DELIVERED if old else PublicationPhase.PUBLISHING
        if thing.spec.desired is Desired.STOP:
            phase = PublicationPhase.FAILED
        new = PublicationReport(
            step=old.step + 1 if old else 0, incarnation="ledger-1", phase=phase
        )
        self.published[thing.metadata.uid] = new
        self.tell(thing, publication=new)

    def tell(
        self,
        thing: Resource,
        execution: Report | None = None,
        publication: PublicationReport | None = None,
    ) -> None:
        self.seq += 1
        self.outbox[self.seq] = Fact(
            seq=self.seq,
            namespace=thing.metadata.namespace,
            name=thing.name,
            uid=thing.metadata.uid,
            execution=execution,
            publication=publication,
        )


class World:
    """Two orchestrators, some nodes, one store; faults by the seed."""

    def __init__(self, loop: SimLoop, seed: int) -> None:
        self.loop = loop
        self.rng = Random(seed)
        self.clock = SimClock(loop)
        self.store = FaultyStore(self.clock, Random(seed + 1))
        self.agents = [Agent(self, f"n{i}", seed * 100 + i) for i in range(3)]
        self.jobs: list[Job] = []
        self.processes: list[Process] = []
        self.started = 0

    @property
    def leader(self) -> Process | None:
        return next((p for p in self.processes if p.leads), None)

    def objects(self, kind: str) -> list[Resource]:
        return [r for ref, r in self.store._objects.items() if ref.kind == kind]

    def assigned(self, name: str) -> list[Resource]:
        things = self.objects("Execution") + self.objects("Publication")
        return [t for t in things if isinstance(t, Execution | Publication) and t.spec.node == name]

    def add_process(self) -> None:
        self.started += 1
        self.processes.append(Process(self.loop, self.store, self.clock, f"p{self.started}"))

    def start(self) -> None:
        for agent in self.agents:
            self.write(node(agent.name, contact=Contact.UNKNOWN, incarnation=""))
        for i in range(4):
            # Nothing is replaced here: there is no job reconciler. Lost must not hurt anyway.
            spec = job_spec(disconnect=DisconnectPolicy(action="replace", after_seconds=40))
            made = job(f"j{i}", spec)
            self.jobs.append(made)
            self.write(made)
            for partition in range(4):
                on = self.rng.choice(self.agents).name
                attempt = execution(made, partition=partition, node=on)
                self.write(attempt)
                if partition == 0:
                    self.write(publication(attempt))
        for _ in range(2):
            self.add_process()
        for agent in self.agents:
            self.loop.create_task(agent.run(), name=agent.name)

    def write(self, resource: Resource) -> None:
        put = Put(resource, 0)
        self.loop.run_until_complete(MemoryStore.commit(self.store, [put], Why("user", "Test")))

    def fault(self) -> None:
        """One of the things that go wrong."""
        match self.rng.randrange(7):
            case 0:
                agent = self.rng.choice(self.agents)
                agent.is_cut_off = not agent.is_cut_off
            case 1 if self.leader is not None:
                self.leader.presence.gone(self.rng.choice(self.agents).name)
            case 2:
                dead = self.rng.choice(self.processes)  # its lease may or may not be released
                dead.task.cancel()
                self.loop.run_until(dead.task.done)
                self.processes.remove(dead)
                self.add_process()
            case 3 if self.jobs:
                gone = self.jobs.pop()
                self.touch(gone.ref, delete=True)
            case 4:
                things = self.objects("Execution") + self.objects("Node")
                self.touch(self.rng.choice(things).ref)
            case 5:
                self.clock.set_forward(self.rng.choice([-7200, -5, 5, 7200]))
            case _:
                self.store.fault_rate = self.rng.choice([0.0, 0.2, 0.6])

    def touch(self, ref: Ref, *, delete: bool = False) -> None:
        """A user writes in between."""
        found = self.store._objects.get(ref)
        if found is None:
            return
        version = found.metadata.resource_version
        change: Write = Delete(ref, version)
        if not delete:
            change = Put(found.with_meta(labels={"touched": str(self.rng.random())}), version)
        self.loop.run_until_complete(MemoryStore.commit(self.store, [change], Why("user", "Test")))

    def heal(self) -> None:
        self.store.fault_rate = 0.0
        for agent in self.agents:
            agent.is_cut_off = False

    @property
    def is_settled(self) -> bool:
        """Everything that nodes know is stored, orphans are gone, and all are in contact."""
        if any(agent.outbox for agent in self.agents) or self.leader is None:
            return False
        live = {j.metadata.uid for j in self.jobs}
        for thing in self.objects("Execution"):
            assert isinstance(thing, Execution)
            if thing.spec.job_uid not in live or not thing.phase.is_final:
                return False
        for pub in self.objects("Publication"):
            assert isinstance(pub, Publication)
            if pub.spec.job_uid not in live or not pub.status.phase.is_final:
                return False
        nodes = [n for n in self.objects("Node") if isinstance(n, Node)]
        return all(n.status.contact is Contact.REACHABLE for n in nodes)

    def check_truth(self) -> None:
        """What each node finished is what the store says, and all of it is there."""
        truth = {uid: r for agent in self.agents for uid, r in agent.truth.items()}
        stored = self.objects("Execution")
        assert len(stored) == 4 * len(self.jobs)
        for thing in stored:
            assert isinstance(thing, Execution)
            assert thing.status.report == truth[thing.metadata.uid]
            assert (thing.status.contact, thing.status.waiting) == (Contact.REACHABLE, None)

    def check_history(self) -> None:
        """Reported phases never moved backwards; nothing unfinished was without a wait."""
        for ref in [ref for ref in self.store._history if ref.kind == "Execution"]:
            before = 0
            for entry in self.store._history[ref]:
                thing = entry.resource
                if not isinstance(thing, Execution):
                    continue
                place = len(ORDER) if thing.phase.is_final else ORDER.index(thing.phase)
                assert place >= before, (ref, entry.revision)
                before = place
                if not entry.actor.startswith("user"):
                    assert (thing.status.waiting is None) == thing.is_final

    @property
    def writes(self) -> int:
        return sum(len(entries) for entries in self.store._history.values())

    def check_no_bugs(self) -> None:
        for process in self.processes:
            for controller in process.manager.controllers.values():
                assert controller.outcomes.bugs == 0
                assert controller.outcomes.deadline == 0


def run(seed: int, faults: int) -> tuple[float, int]:
    """One simulation; returns when it settled and how many writes that took."""
    with SimLoop() as loop:
        world = World(loop, seed)
        world.start()
        for _ in range(faults):
            loop.advance(world.rng.uniform(0, 15))
            world.fault()
            world.check_no_bugs()
        world.heal()
        loop.advance(5)  # the last fault takes its effect
        loop.run_until(lambda: world.is_settled, seconds_max=300)
        settled, writes = loop.time(), world.writes
        world.check_truth()
        world.check_history()
        loop.advance(600)
        assert world.writes == writes, "something is still being written"
        world.check_no_bugs()
        for process in world.processes:
            loop.run_until_complete(process.manager.close())
        return settled, writes


@pytest.mark.parametrize("seed", range(25))
def test_converges_and_then_writes_nothing(seed: int) -> None:
    run(seed, faults=12)


def test_without_faults_it_takes_few_writes() -> None:
    settled, writes = run(7, faults=0)
    # 3 nodes, 4 jobs, 16 executions, 4 publications are created; then each node is seen, each
    # execution acknowledged, moved on three or four times, each publication three times.
    assert settled < 60
    assert writes < 27 + 3 * 3 + 16 * 6 + 4 * 4


def test_same_seed_same_run() -> None:
    assert run(3, faults=10) == run(3, faults=10)
