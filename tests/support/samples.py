"""Objects and an environment for tests of reconcilers."""

from datetime import datetime, timedelta
from random import Random

from bacalhau_api.meta import Contact, ObjectMeta, OwnerReference, Resource
from bacalhau_api.v1.execution import (
    Execution,
    ExecutionSpec,
    Phase,
    Publication,
    PublicationPhase,
    PublicationReport,
    PublicationSpec,
    Report,
    Slot,
    execution_name,
)
from bacalhau_api.v1.job import (
    DisconnectPolicy,
    InputSource,
    Job,
    JobSpec,
    JobType,
    SpecConfig,
    Task,
    Timeouts,
)
from bacalhau_api.v1.node import Membership, Node, NodeSpec, NodeStatus
from bacalhau_controllers.cache import Cache, Informer
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Put, Why
from tests.support.simclock import EPOCH, SimClock, SimLoop

LEDGER = "ledger-1"


def at(seconds: float) -> datetime:
    """A moment of simulated time, so many seconds after its start."""
    return EPOCH + timedelta(seconds=seconds)


def job_spec(
    type: JobType = JobType.BATCH,
    *,
    disconnect: DisconnectPolicy | None = None,
    sources: tuple[str, ...] = (),
    execution_timeout: int = 0,
) -> JobSpec:
    """A spec with one task that reads inputs of the given source types."""
    inputs = tuple(
        InputSource(source=SpecConfig(type=source), target=f"/in/{i}")
        for i, source in enumerate(sources)
    )
    task = Task(
        engine=SpecConfig(type="noop"),
        input_sources=inputs,
        timeouts=Timeouts(execution_timeout=execution_timeout),
    )
    return JobSpec(type=type, tasks=(task,), disconnect=disconnect or DisconnectPolicy())


def job(name: str = "j", spec: JobSpec | None = None, *, uid: str = "") -> Job:
    """A job as it is stored."""
    meta = ObjectMeta(name=name, uid=uid or f"uid-of-{name}", generation=1)
    return Job(metadata=meta.but(creation_timestamp=at(0)), spec=spec or job_spec())


def node(
    name: str = "n1",
    *,
    contact: Contact = Contact.REACHABLE,
    membership: Membership = Membership.APPROVED,
    incarnation: str = LEDGER,
    since: float = 0,
    drain: bool = False,
) -> Node:
    """A node whose contact is as it is since `since`."""
    is_reachable = contact is Contact.REACHABLE
    status = NodeStatus(
        incarnation=incarnation,
        contact=contact,
        contact_since=at(since),
        connected_since=at(since) if is_reachable else None,
    )
    return Node(
        metadata=ObjectMeta(name=name, namespace="", uid=f"uid-of-{name}"),
        spec=NodeSpec(membership=membership, drain=drain),
        status=status,
    )


def execution(
    of: Job,
    *,
    partition: int = 0,
    attempt: int = 0,
    node: str = "n1",
    local_deadline_seconds: int | None = None,
) -> Execution:
    """An attempt as the job reconciler makes it."""
    slot = Slot(generation=of.metadata.generation, partition=partition)
    name = execution_name(of.name, of.metadata.uid, slot, attempt)
    owner = OwnerReference(kind="Job", name=of.name, uid=of.metadata.uid)
    return Execution(
        metadata=ObjectMeta(
            name=name,
            uid=f"uid-of-{name}",
            owner_references=(owner,),
            creation_timestamp=at(0),
        ),
        spec=ExecutionSpec(
            job=of.name,
            job_uid=of.metadata.uid,
            job_type=of.spec.type,
            slot=slot,
            attempt=attempt,
            node=node,
            task=of.spec.task,
            local_deadline_seconds=local_deadline_seconds,
        ),
    )


def publication(of: Execution) -> Publication:
    """The outputs of an execution on their way."""
    spec = of.spec
    return Publication(
        metadata=ObjectMeta(
            name=of.name, uid=f"pub-{of.name}", owner_references=of.metadata.owner_references
        ),
        spec=PublicationSpec(
            job=spec.job,
            job_uid=spec.job_uid,
            execution=of.name,
            execution_uid=of.metadata.uid,
            node=spec.node,
            slot=spec.slot,
            publisher=SpecConfig(type="local"),
        ),
    )


def report(phase: Phase, step: int = 1, *, incarnation: str = LEDGER, run: int = 0) -> Report:
    """A node's word on an execution."""
    return Report(step=step, incarnation=incarnation, phase=phase, run=run)


def publication_report(
    phase: PublicationPhase, step: int = 1, *, incarnation: str = LEDGER
) -> PublicationReport:
    """A node's word on a publication."""
    return PublicationReport(step=step, incarnation=incarnation, phase=phase)


class Bench:
    """A store, a cache and its informer in virtual time."""

    def __init__(
        self, loop: SimLoop, store_type: type[MemoryStore] = MemoryStore, *, seed: int = 1
    ) -> None:
        self.loop = loop
        self.clock = SimClock(loop)
        self.rng = Random(seed)
        self.store = store_type(self.clock, strict=True)
        self.cache = Cache()
        self.state = State(self.store, self.cache)
        self.informer = loop.create_task(
            Informer(self.store, self.cache, self.clock).run(), name="informer"
        )
        loop.run_until_idle()

    def put(self, *resources: Resource) -> None:
        """Write objects as a user would: whatever version is stored."""
        for resource in resources:
            self.loop.run_until_complete(self._put(resource))
        self.loop.run_until_idle()

    async def _put(self, resource: Resource) -> None:
        found = await self.store.get(resource.ref)
        expect = found.metadata.resource_version if found else 0
        await self.store.commit([Put(resource, expect)], Why("user:test", "Test"))

    def revisions(self, resource: Resource) -> int:
        """How often an object was written."""
        history = self.loop.run_until_complete(self.store.history(resource.ref))
        return len(history)

    def stored(self, resource: Resource) -> Resource | None:
        """An object as the store has it."""
        return self.loop.run_until_complete(self.store.get(resource.ref))  # type: ignore[no-any-return]
