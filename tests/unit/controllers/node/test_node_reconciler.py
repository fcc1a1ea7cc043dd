"""The node reconciler under a manager, in virtual time."""

from bacalhau_api.meta import Contact
from bacalhau_api.v1.execution import Phase
from bacalhau_api.v1.node import Node, NodeInfo
from bacalhau_controllers.manager import Manager
from bacalhau_controllers.node import NodeReconciler, Presence
from bacalhau_controllers.store import Delete, Why
from tests.support.samples import Bench, at, execution, job, node, report
from tests.support.simclock import SimLoop

INFO = NodeInfo(version="1")


class Office:
    """A manager with the node reconciler, leading."""

    def __init__(self, loop: SimLoop, *nodes: Node) -> None:
        self.loop = loop
        self.bench = Bench(loop)
        self.bench.put(*nodes)
        self.presence = Presence(self.bench.clock)
        self.lead()

    def lead(self) -> None:
        self.manager = Manager(self.bench.state, self.bench.clock, self.bench.rng)
        reconciler = NodeReconciler(self.bench.state, self.bench.clock, self.presence)
        self.manager.add(reconciler, "Node")
        self.loop.create_task(self.manager.run(), name="manager")
        self.loop.run_until(self.manager.is_leader.is_set)
        self.loop.run_until_idle()

    def retire(self) -> None:
        self.loop.run_until_complete(self.manager.close())

    def node(self, name: str = "n1") -> Node:
        found = self.bench.stored(node(name))
        assert isinstance(found, Node)
        return found

    def beat(self, seconds: float, *names: str) -> None:
        """Nodes beat every five seconds for a while."""
        for _ in range(int(seconds / 5)):
            self.loop.advance(5)
            for name in names:
                assert self.presence.heard(name, self.bench.clock.monotonic())
            self.loop.run_until_idle()


def test_an_hour_of_heartbeats_writes_nothing() -> None:
    with SimLoop() as loop:
        office = Office(loop, node("n1", contact=Contact.UNKNOWN))
        office.presence.hello("n1", "ledger-1", INFO, "s")
        loop.run_until_idle()
        assert office.node().status.contact is Contact.REACHABLE
        assert office.node().status.info == INFO
        before = office.bench.revisions(office.node())
        office.beat(3600, "n1")
        assert office.bench.revisions(office.node()) == before
        office.retire()


def test_silence_and_return() -> None:
    with SimLoop() as loop:
        office = Office(loop, node("n1"), node("n2"))
        for name in ("n1", "n2"):
            office.presence.hello(name, "ledger-1", INFO, "s")
        office.beat(60, "n1", "n2")
        office.beat(14, "n2")
        assert office.node("n1").status.contact is Contact.REACHABLE
        office.beat(10, "n2")
        lost = office.node("n1").status
        assert (lost.contact, lost.contact_since) == (Contact.UNKNOWN, at(60))
        assert office.node("n2").status.contact is Contact.REACHABLE
        office.beat(5, "n1", "n2")
        assert office.node("n1").status.contact is Contact.REACHABLE
        office.retire()


def test_a_disconnect_is_seen_at_once() -> None:
    with SimLoop() as loop:
        office = Office(loop, node("n1"))
        office.presence.hello("n1", "ledger-1", INFO, "s")
        loop.run_until_idle()
        office.presence.gone("n1")
        loop.run_until_idle()
        assert office.node().status.contact is Contact.UNKNOWN
        office.retire()


def test_a_new_leader_gives_all_nodes_a_fresh_grace() -> None:
    """Mass loss of healthy nodes in the minutes after a restart is the trap here."""
    with SimLoop() as loop:
        office = Office(loop, node("n1"), node("n2"))
        for name in ("n1", "n2"):
            office.presence.hello(name, "ledger-1", INFO, "s")
        office.beat(60, "n1", "n2")
        office.retire()
        loop.advance(3600)  # nobody leads for an hour
        office.lead()
        before = office.bench.revisions(office.node("n1"))
        loop.advance(20)
        office.presence.hello("n1", "ledger-1", INFO, "another session")
        loop.advance(9)
        assert office.node("n2").status.contact is Contact.REACHABLE
        office.beat(5, "n1")
        assert office.node("n2").status.contact is Contact.UNKNOWN
        assert office.node("n1").status.contact is Contact.REACHABLE
        assert office.bench.revisions(office.node("n1")) == before
        office.retire()


def test_a_drain_is_followed_to_its_end() -> None:
    with SimLoop() as loop:
        office = Office(loop, node("n1", drain=True))
        office.presence.hello("n1", "ledger-1", INFO, "s")
        made = execution(job())
        office.bench.put(made)
        drained = {c.type: c.status for c in office.node().status.conditions}["Drained"]
        assert not drained
        office.bench.put(made.but(status=made.status.but(report=report(Phase.SUCCEEDED))))
        drained = {c.type: c.status for c in office.node().status.conditions}["Drained"]
        assert drained
        office.retire()


def test_a_deleted_node_is_forgotten() -> None:
    with SimLoop() as loop:
        office = Office(loop, node("n1"))
        office.presence.hello("n1", "ledger-1", INFO, "s")
        loop.run_until_idle()
        stored = office.node()
        delete = Delete(stored.ref, stored.metadata.resource_version)
        loop.run_until_complete(office.bench.store.commit([delete], Why("user", "Test")))
        loop.run_until_idle()
        assert office.presence.sighting("n1") is None
        office.retire()
