"""The publishing reconciler on a real store."""

from bacalhau_api.meta import Resource
from bacalhau_api.v1.execution import Desired, Publication, PublicationPhase
from bacalhau_api.wire import Fact
from bacalhau_controllers.inbox import FactInbox
from bacalhau_controllers.manager import Manager
from bacalhau_controllers.node import Presence
from bacalhau_controllers.publishing import PublishingReconciler
from bacalhau_controllers.store import Delete, Why
from tests.support.samples import (
    Bench,
    execution,
    job,
    node,
    publication,
    publication_report,
)
from tests.support.simclock import SimLoop


class Office:
    """A manager with the publishing reconciler, leading; a job, its execution, its publication."""

    def __init__(self, loop: SimLoop) -> None:
        self.loop = loop
        self.bench = Bench(loop)
        self.inbox = FactInbox()
        presence = Presence(self.bench.clock)
        self.job = job()
        self.execution = execution(self.job)
        self.publication = publication(self.execution)
        self.bench.put(self.job, node("n1"), self.execution, self.publication)
        self.manager = Manager(self.bench.state, self.bench.clock, self.bench.rng)
        reconciler = PublishingReconciler(self.bench.state, self.bench.clock, self.inbox, presence)
        self.manager.add(reconciler, "Publication")
        loop.create_task(self.manager.run(), name="manager")
        loop.run_until(self.manager.is_leader.is_set)
        loop.run_until_idle()

    def tell(self, phase: PublicationPhase, *, node: str = "n1", uid: str = "") -> None:
        meta = self.publication.metadata
        fact = Fact(
            seq=1,
            namespace=meta.namespace,
            name=meta.name,
            uid=uid or meta.uid,
            publication=publication_report(phase),
        )
        self.loop.run_until_complete(self.inbox.offer(node, "ledger-1", fact))
        self.loop.run_until_idle()

    def delete(self, thing: Resource) -> None:
        stored = self.bench.stored(thing)
        assert stored
        delete = Delete(stored.ref, stored.metadata.resource_version)
        self.loop.run_until_complete(self.bench.store.commit([delete], Why("user", "Test")))
        self.loop.run_until_idle()

    @property
    def stored(self) -> Publication:
        found = self.bench.stored(self.publication)
        assert isinstance(found, Publication)
        return found

    def retire(self) -> None:
        self.loop.run_until_complete(self.manager.close())


def test_a_delivery_is_stored_before_it_is_acknowledged() -> None:
    with SimLoop() as loop:
        office = Office(loop)
        assert office.stored.status.waiting
        office.tell(PublicationPhase.DELIVERED)
        assert office.stored.status.phase is PublicationPhase.DELIVERED
        assert office.stored.status.waiting is None
        office.retire()


def test_facts_of_strangers_are_not_applied() -> None:
    with SimLoop() as loop:
        office = Office(loop)
        office.tell(PublicationPhase.DELIVERED, node="n2")
        office.tell(PublicationPhase.DELIVERED, uid="an earlier one")
        assert office.inbox.obsolete == 2
        assert office.stored.status.phase is PublicationPhase.PENDING
        office.retire()


def test_it_stops_when_its_execution_goes_and_goes_with_its_job() -> None:
    with SimLoop() as loop:
        office = Office(loop)
        office.delete(office.execution)
        assert office.stored.spec.desired is Desired.STOP
        office.tell(PublicationPhase.FAILED)
        assert office.stored.status.phase is PublicationPhase.FAILED
        office.delete(office.job)
        assert office.bench.stored(office.publication) is None
        office.retire()
