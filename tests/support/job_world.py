"""A small world for the job reconciler: the real store, cache, manager and reconciler in virtual time,
and nodes that walk executions through their phases.

The nodes write the status of executions themselves, in place of the execution reconciler and the
gateway. What becomes of an execution is said by `behave`; by default batch and ops succeed, and
services and daemons run until they are stopped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from bacalhau_api.admission import admit_job
from bacalhau_api.admission import stop as stop_job
from bacalhau_api.meta import Contact, ObjectMeta, Ref, Resource, Waiting
from bacalhau_api.v1.execution import (
    Acceptance,
    Desired,
    Execution,
    Phase,
    Publication,
    PublicationPhase,
    PublicationReport,
    Report,
)
from bacalhau_api.v1.job import Constraint, Job, JobSpec, JobType, Resources, SpecConfig, Task
from bacalhau_api.v1.node import Capability, Membership, Node, NodeInfo, NodeSpec, NodeStatus
from bacalhau_controllers.job import JobReconciler, JobSettings
from bacalhau_controllers.manager import Manager
from bacalhau_controllers.store import Delete, Put, Why, Write
from tests.support.samples import LEDGER, Bench
from tests.support.simclock import EPOCH, SimLoop

STEPS_MAX = 400
REPORTS_IN_ONE_COMMIT = 50
Behaviour = Callable[[Execution], Report | None]


def report_of(execution: Execution, phase: Phase, **more: Any) -> Report:
    """The next report of an execution."""
    old = execution.status.report
    step = old.step + 1 if old else 1
    return Report(step=step, incarnation=LEDGER, phase=phase, **more)


def succeed(execution: Execution) -> Report | None:
    """Every run ends well."""
    return report_of(execution, Phase.SUCCEEDED, exit_code=0)


def fail(code: int = 1, **more: Any) -> Behaviour:
    """Every run ends with this code."""
    return lambda execution: report_of(execution, Phase.FAILED, exit_code=code, **more)


def run_on(execution: Execution) -> Report | None:
    """Runs until it is stopped."""
    return None


def reject(execution: Execution) -> Report | None:
    """The node refuses it."""
    return report_of(execution, Phase.REJECTED, reason="NotAllowed", message="not on my machine")


def make_spec(
    type: JobType = JobType.BATCH,
    count: int = 1,
    *,
    cpu: int = 100,
    engine: str = "noop",
    publisher: str = "",
    labels: str = "",
    task: dict[str, Any] | None = None,
    **spec: Any,
) -> JobSpec:
    """A spec that asks for little. `labels` is such as `zone=a`."""
    target = SpecConfig(type=publisher) if publisher else None
    made = Task(
        engine=SpecConfig(type=engine),
        publisher=target,
        resources=Resources(cpu_millis=cpu, memory_bytes=1 << 20),
        **(task or {}),
    )
    if labels:
        key, _, value = labels.partition("=")
        spec["constraints"] = (Constraint(key=key, operator="=", values=(value,)),)
    return JobSpec(type=type, count=count, tasks=(made,), **spec)


def make_node(
    name: str,
    *,
    cpu: int = 1000,
    labels: dict[str, str] | None = None,
    membership: Membership = Membership.APPROVED,
    contact: Contact = Contact.REACHABLE,
    executions_max: int = 256,
    **spec: Any,
) -> Node:
    """A node with the noop engine and the local publisher."""
    info = NodeInfo(
        labels=labels or {},
        capacity=Resources(cpu_millis=cpu, memory_bytes=1 << 34),
        engines=(Capability(name="noop"),),
        storages=(Capability(name="local"),),
        publishers=(Capability(name="local"),),
        executions_max=executions_max,
    )
    status = NodeStatus(
        info=info,
        incarnation=LEDGER,
        contact=contact,
        contact_since=EPOCH,
        connected_since=EPOCH if contact is Contact.REACHABLE else None,
    )
    return Node(
        metadata=ObjectMeta(name=name, namespace="", uid=f"uid-of-{name}"),
        spec=NodeSpec(membership=membership, **spec),
        status=status,
    )


@dataclass
class World:
    """See the module. Everything is looked up anew, so nothing here is ever stale."""

    bench: Bench
    settings: JobSettings = field(default_factory=JobSettings)
    default: Behaviour | None = None
    behaviours: list[tuple[Callable[[Execution], bool], Behaviour]] = field(default_factory=list)
    silent: set[str] = field(default_factory=set)
    uids: int = 0

    def __post_init__(self) -> None:
        self.reconciler = JobReconciler(self.bench.state, self.bench.clock, settings=self.settings)
        self.manager = Manager(self.bench.state, self.bench.clock, self.bench.rng)
        self.manager.add(self.reconciler, "Job")
        self.bench.loop.create_task(self.manager.run(), name="manager")
        self.bench.loop.run_until(self.manager.is_leader.is_set)

    # -- what users and operators do -------------------------------------------------------------

    def submit(self, name: str, spec: JobSpec, **meta: Any) -> Job:
        """Apply a job."""
        submitted = Job(metadata=ObjectMeta(name=name, **meta), spec=spec)
        existing = self.find(Ref("Job", "default", name))
        assert existing is None or isinstance(existing, Job)
        self.uids += 1
        admitted = admit_job(
            existing, submitted, now=self.bench.clock.now(), uid=f"{self.uids:08x}" + "0" * 24
        )
        if admitted.outcome != "unchanged":
            self.put(admitted.job)
        return self.job(name)

    def edit(self, name: str, **changes: Any) -> Job:
        """Apply a job with some fields of its spec replaced."""
        return self.submit(name, self.job(name).spec.but(**changes))

    def stop(self, name: str) -> None:
        """`bacalhau stop`."""
        self.put(stop_job(self.job(name)))

    def delete(self, name: str) -> None:
        """`bacalhau delete`."""
        job = self.job(name)
        self.put(job.with_meta(deletion_timestamp=self.bench.clock.now()))

    def add_node(self, name: str, **how: Any) -> None:
        """A node joins, or comes back changed."""
        made = make_node(name, **how)
        old = self.find(made.ref)
        since = self.bench.clock.now()
        if isinstance(old, Node) and old.status.connected_since is not None:
            since = old.status.connected_since
        if made.status.connected_since is not None:
            made = made.but(status=made.status.but(connected_since=since))
        self.put(made)

    def change_node(self, name: str, **spec: Any) -> None:
        """Change a node's spec."""
        node = self.node(name)
        self.put(node.but(spec=node.spec.but(**spec)))

    def enlarge(self, name: str, *, cpu: int) -> None:
        """A node gets more CPU."""
        node = self.node(name)
        capacity = node.status.info.capacity.but(cpu_millis=cpu)
        info = node.status.info.but(capacity=capacity)
        self.put(node.but(status=node.status.but(info=info)))

    def silence(self, name: str, contact: Contact = Contact.UNKNOWN) -> None:
        """A node is not heard from any more: it goes on, and what it reports arrives later."""
        self.silent.add(name)
        self._contact(name, contact)

    def lose(self, name: str) -> None:
        """What is on a silent node is given up."""
        self._contact(name, Contact.LOST)

    def hear(self, name: str) -> None:
        """A node is heard again."""
        self.silent.discard(name)
        self._contact(name, Contact.REACHABLE)

    def behave(self, behaviour: Behaviour, **where: Any) -> None:
        """Say how executions end whose spec has these values; the newest word counts."""

        def fits(execution: Execution) -> bool:
            return all(
                getattr(execution.spec.slot if key == "partition" else execution.spec, key) == value
                for key, value in where.items()
            )

        self.behaviours.insert(0, (fits, behaviour))

    # -- time ------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Let the reconciler finish, then every node move each execution on by one phase. False if
        no node had anything to do."""
        self.bench.loop.run_until_idle()
        self.check()
        moves = [put for e in self.executions() if (put := self._advance(e))]
        moves += [put for p in self.publications() if (put := self._publish(p))]
        for begin in range(0, len(moves), REPORTS_IN_ONE_COMMIT):
            self.write(*moves[begin : begin + REPORTS_IN_ONE_COMMIT])
        self.bench.loop.run_until_idle()
        self.check()
        return bool(moves)

    def settle(self, *, seconds: float = 0.0, watch: Callable[[], object] = lambda: None) -> None:
        """Step until nothing moves, letting time pass where only time is missing. `watch` is called
        at each rest of the reconciler."""
        waited = 0.0
        for _ in range(STEPS_MAX):
            self.bench.loop.run_until_idle()
            watch()
            if self.step():
                continue
            if waited >= seconds:
                return
            self.bench.loop.advance(1.0)
            waited += 1.0
        raise AssertionError(f"no rest after {STEPS_MAX} steps")

    def pass_time(self, seconds: float) -> None:
        """Let time pass; nodes do nothing."""
        self.bench.loop.advance(seconds)

    def writes_while(self, seconds: float) -> int:
        """How many revisions time alone brings about."""
        before = self.revision()
        self.pass_time(seconds)
        return self.revision() - before

    def revision(self) -> int:
        """The store's newest revision."""
        listing = self.bench.loop.run_until_complete(self.bench.store.list("None"))
        revision: int = listing.cursor.revision
        return revision

    # -- looking ---------------------------------------------------------------------------------

    def find(self, ref: Ref) -> Resource | None:
        """An object."""
        return self.bench.cache.get(ref)

    def job(self, name: str) -> Job:
        """A job that exists."""
        found = self.find(Ref("Job", "default", name))
        assert isinstance(found, Job), f"no job {name}"
        return found

    def node(self, name: str) -> Node:
        """A node that exists."""
        found = self.find(Ref("Node", "", name))
        assert isinstance(found, Node), f"no node {name}"
        return found

    def executions(self, job: str = "", **where: Any) -> list[Execution]:
        """Executions (of one job) whose spec has these values, by name."""
        found = [e for e in self.bench.cache.list("Execution") if isinstance(e, Execution)]
        found = [e for e in found if job in ("", e.spec.job)]
        for key, value in where.items():
            if key == "phase":
                found = [e for e in found if e.phase is value]
            elif key == "generation":
                found = [e for e in found if e.spec.slot.generation == value]
            else:
                found = [e for e in found if getattr(e.spec, key) == value]
        return sorted(
            found, key=lambda e: (e.spec.slot.generation, str(e.spec.slot), e.spec.attempt)
        )

    def running(self, job: str, **where: Any) -> list[Execution]:
        """Executions that run and may go on."""
        return self.executions(job, phase=Phase.RUNNING, desired=Desired.RUN, **where)

    def acceptances(self, job: str = "") -> list[Acceptance]:
        """Accepted results."""
        found = [a for a in self.bench.cache.list("Acceptance") if isinstance(a, Acceptance)]
        return [a for a in found if job in ("", a.spec.job)]

    def publications(self) -> list[Publication]:
        """Deliveries."""
        return [p for p in self.bench.cache.list("Publication") if isinstance(p, Publication)]

    def check(self) -> None:
        """What holds at every moment."""
        self._check_capacity()
        accepted = [
            (a.spec.job_uid, str(a.spec.slot), a.spec.slot.generation) for a in self.acceptances()
        ]
        assert len(accepted) == len(set(accepted)), "a slot accepted two results"
        for job in self.bench.cache.list("Job"):
            assert isinstance(job, Job)
            if job.status.observed_generation != job.metadata.generation:
                continue
            is_final = job.status.phase.is_final
            assert is_final or job.status.waiting, f"{job.name} waits for nothing"
            counts = job.status.slots
            assert (
                counts.running + counts.waiting + counts.succeeded + counts.failed <= counts.total
            )
            assert not any(
                v.nodes_total < sum(c.nodes for c in v.rejected) for v in job.status.verdicts
            )

    def _check_capacity(self) -> None:
        for node in self.bench.cache.list("Node"):
            assert isinstance(node, Node)
            held = [e for e in self.executions(node=node.name) if not e.phase.is_final]
            cpu = sum(e.spec.task.resources.cpu_millis for e in held)
            capacity = node.status.info.capacity.cpu_millis
            assert cpu <= capacity, f"{node.name} is over-committed: {cpu} of {capacity}"
            row = self.reconciler.nodes.row(node.name)
            assert row is not None
            assert self.reconciler.nodes.free_on(row).cpu == capacity - cpu

    # -- the nodes -------------------------------------------------------------------------------

    def put(self, *resources: Resource) -> None:
        """Write objects, over whatever version is stored."""
        self.bench.put(*resources)

    def write(self, *writes: Write) -> None:
        """Commit."""
        self.bench.loop.run_until_complete(self.bench.store.commit(writes, Why("test", "Test")))
        self.bench.loop.run_until_idle()

    def remove(self, ref: Ref) -> None:
        """Remove an object outright."""
        found = self.find(ref)
        assert found is not None
        self.write(Delete(ref, found.metadata.resource_version))

    def report(self, execution: Execution, report: Report) -> None:
        """A node's word arrives."""
        self.write(self._with(execution, report))

    def _with(self, execution: Execution, report: Report) -> Put:
        status = execution.status.but(
            report=report, contact=Contact.REACHABLE, contact_since=None, waiting=None
        )
        return Put(execution.but(status=status), execution.metadata.resource_version)

    def _advance(self, execution: Execution) -> Put | None:
        node = self.find(Ref("Node", "", execution.spec.node))
        if execution.phase.is_final or node is None or execution.spec.node in self.silent:
            return None
        assert isinstance(node, Node)
        if node.spec.membership is not Membership.APPROVED:
            return None
        report = self._next_report(execution)
        return None if report is None else self._with(execution, report)

    def _next_report(self, execution: Execution) -> Report | None:
        if execution.spec.desired is Desired.STOP:
            return report_of(execution, Phase.STOPPED)
        if execution.phase is Phase.PENDING and self._behaviour(execution) is reject:
            return reject(execution)
        if execution.phase is not Phase.RUNNING:
            return report_of(execution, Phase.RUNNING, started_at=self.bench.clock.now())
        end = self._behaviour(execution)(execution)
        if end is None or not end.phase.is_final:
            return None
        started = execution.status.report.started_at if execution.status.report else None
        return end.but(started_at=started, finished_at=self.bench.clock.now())

    def _behaviour(self, execution: Execution) -> Behaviour:
        for fits, behaviour in self.behaviours:
            if fits(execution):
                return behaviour
        if self.default is not None:
            return self.default
        return succeed if execution.spec.job_type.runs_to_completion else run_on

    def _publish(self, publication: Publication) -> Put | None:
        if publication.status.phase.is_final or publication.spec.node in self.silent:
            return None
        report = PublicationReport(
            step=1, incarnation=LEDGER, phase=PublicationPhase.DELIVERED, attempts=1
        )
        new = publication.but(status=publication.status.but(report=report))
        return Put(new, publication.metadata.resource_version)

    def _contact(self, name: str, contact: Contact) -> None:
        now = self.bench.clock.now()
        node = self.node(name)
        is_reachable = contact is Contact.REACHABLE
        seen = contact if is_reachable else Contact.UNKNOWN
        status = node.status.but(contact=seen, contact_since=now)
        if is_reachable and node.status.contact is not Contact.REACHABLE:
            status = status.but(connected_since=now)
        self.put(node.but(status=status))
        for execution in self.executions(node=name):
            if execution.phase.is_final:
                continue
            waiting = None
            if contact is Contact.UNKNOWN:
                waiting = Waiting(
                    what="Contact",
                    message=f"node {name} is not heard from",
                    since=now,
                    until=now + timedelta(minutes=30),
                    mover=f"node {name}",
                )
            status_now = execution.status.but(contact=contact, contact_since=now, waiting=waiting)
            self.put(execution.but(status=status_now))


@contextmanager
def world(**how: Any) -> Iterator[World]:
    """A world without nodes or jobs."""
    with SimLoop() as loop:
        yield World(Bench(loop), **how)
