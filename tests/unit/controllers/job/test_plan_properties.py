"""Properties of the planner over arbitrary worlds: whatever a job owns, in whatever state, one plan is
enough, it is the same each time, and it breaks no promise."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st

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
    Slot,
)
from bacalhau_api.v1.job import (
    Constraint,
    DisconnectPolicy,
    ExitRule,
    Job,
    JobPhase,
    JobSpec,
    JobType,
    Resources,
    RestartPolicy,
    RetryPolicy,
    SpecConfig,
    Task,
    Timeouts,
    UpdateStrategy,
)
from bacalhau_api.v1.node import Membership, Node
from bacalhau_controllers.job import FINALIZER, Inputs, JobSettings, Owned, Plan, plan
from bacalhau_controllers.job.slots import new_acceptance, new_execution, new_publication
from bacalhau_controllers.placement import NodeTable
from bacalhau_controllers.store import Delete, Put
from tests.support.job_world import make_node
from tests.support.samples import LEDGER, at

NODES = ("a", "b", "c", "gone")
ROUNDS_MAX = 12


@dataclass(repr=False)
class Objects:
    """All objects of a world, as a store would hold them."""

    job: Job | None
    objects: dict[Ref, Resource] = field(default_factory=dict)
    version: int = 100

    def __repr__(self) -> str:
        return in_short(self)

    def of(self, kind: type[Any]) -> list[Any]:
        return [o for o in self.objects.values() if isinstance(o, kind)]

    def add(self, resource: Resource) -> None:
        self.version += 2
        self.objects[resource.ref] = resource.with_meta(resource_version=self.version)

    def carry_out(self, todo: Plan) -> None:
        """Commit a plan, with every expectation checked."""
        writes = todo.writes()
        refs = [w.resource.ref if isinstance(w, Put) else w.ref for w in writes]
        assert len(refs) == len(set(refs)), "an object is written twice in one commit"
        for write in writes:
            ref = write.resource.ref if isinstance(write, Put) else write.ref
            found = self.job if ref.kind == "Job" else self.objects.get(ref)
            assert (found.metadata.resource_version if found else 0) == write.expect
            if isinstance(write, Delete):
                if ref.kind == "Job":
                    self.job = None
                else:
                    del self.objects[ref]
            elif isinstance(write.resource, Job):
                self.version += 2
                self.job = write.resource.with_meta(resource_version=self.version)
            else:
                self.add(write.resource)


def table_of(world: Objects) -> NodeTable:
    table = NodeTable()
    for kind in (Node, Execution):
        for resource in world.of(kind):
            table.apply(None, resource, 0.0)
    return table


def inputs_of(world: Objects, table: NodeTable, now: datetime, tuned: JobSettings) -> Inputs:
    assert world.job is not None
    owned = Owned.of(world.of(Execution), world.of(Acceptance), world.of(Publication))
    return Inputs(job=world.job, owned=owned, nodes=table, now=now, settings=tuned)


specs = st.builds(
    JobSpec,
    type=st.sampled_from(JobType),
    count=st.integers(0, 4),
    tasks=st.builds(
        lambda publisher, timeouts, cpu: (
            Task(
                engine=SpecConfig(type="noop"),
                publisher=publisher,
                timeouts=timeouts,
                resources=Resources(cpu_millis=cpu, memory_bytes=1),
            ),
        ),
        st.sampled_from([None, SpecConfig(type="local")]),
        st.builds(
            Timeouts,
            execution_timeout=st.sampled_from([0, 0, 10]),
            queue_timeout=st.sampled_from([0, 0, 20]),
            total_timeout=st.sampled_from([0, 0, 0, 500]),
        ),
        st.sampled_from([100, 400]),
    ),
    constraints=st.sampled_from([(), (Constraint(key="zone", operator="=", values=("x",)),)]),
    retry=st.builds(
        RetryPolicy,
        attempts=st.integers(1, 4),
        backoff_seconds=st.sampled_from([0.0, 1.0, 50.0]),
        exit_rules=st.sampled_from([(), (ExitRule(codes=(2,), action="fail"),)]),
    ),
    restart=st.builds(
        lambda policy: RestartPolicy(policy=policy),
        st.sampled_from(["always", "onFailure", "never"]),
    ),
    disconnect=st.builds(
        lambda action, reconcile: DisconnectPolicy(action=action, reconcile=reconcile),
        st.sampled_from([None, "hold", "replace", "stop"]),
        st.sampled_from([None, "firstAccepted", "keepOriginal", "keepReplacement"]),
    ),
    update=st.builds(UpdateStrategy, max_unavailable=st.integers(1, 2)),
    suspend=st.sampled_from([False] * 5 + [True]),
)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Objects, datetime, JobSettings]:
    """A job in some generation, nodes in some states, and executions in any."""
    spec = draw(specs)
    generation = draw(st.integers(1, 5))
    if draw(st.integers(0, 7)) == 0:
        spec = spec.but(stop_generation=generation)
    meta = ObjectMeta(
        name="j",
        uid="f" * 32,
        generation=generation,
        resource_version=50,
        creation_timestamp=at(0),
        finalizers=(FINALIZER,),
        deletion_timestamp=draw(st.sampled_from([None] * 7 + [at(900)])),
    )
    world = Objects(Job(metadata=meta, spec=spec))
    for name in NODES[:3]:
        if draw(st.integers(0, 4)):
            world.add(draw(node_states(name)))
    now = at(1000)
    job = world.job
    assert job is not None
    for number in range(max(1, generation - 3), generation + 1):
        # The count of a batch job is part of its generation; a service may have been larger.
        most = spec.count - 1 if spec.type is JobType.BATCH else 3
        for key in draw(st.sets(st.integers(0, max(most, 0)), max_size=max(most + 1, 0))):
            _fill_slot(draw, world, job, number, key)
    tuned = JobSettings(
        writes_max=draw(st.sampled_from([400, 400, 4])),
        bytes_max=draw(st.sampled_from([1 << 20, 1 << 20, 1])),
        generations_kept=draw(st.integers(1, 3)),
        attempts_kept=draw(st.sampled_from([1, 2, 5])),
    )
    return world, now, tuned


@st.composite
def node_states(draw: st.DrawFn, name: str) -> Node:
    made = make_node(
        name,
        cpu=draw(st.sampled_from([300, 1000, 4000])),
        labels=draw(st.sampled_from([{}, {"zone": "x"}])),
        membership=draw(st.sampled_from([Membership.APPROVED] * 5 + [Membership.REJECTED])),
        contact=draw(st.sampled_from([Contact.REACHABLE] * 4 + [Contact.UNKNOWN])),
        unschedulable=draw(st.sampled_from([False] * 5 + [True])),
        drain=draw(st.sampled_from([False] * 5 + [True])),
    )
    status = made.status.but(connected_since=draw(st.sampled_from([at(0), at(995)])))
    return made.but(status=status)


def _fill_slot(draw: st.DrawFn, world: Objects, job: Job, generation: int, key: int) -> None:
    is_per_node = job.spec.type.is_per_node
    node = NODES[key]
    slot = (
        Slot(generation=generation, node=node)
        if is_per_node
        else Slot(generation=generation, partition=key)
    )
    count = draw(st.integers(1, 3))
    attempts: list[Execution] = []
    for attempt in range(count):
        where = node if is_per_node else draw(st.sampled_from(NODES))
        made = new_execution(
            job, slot, attempt, node=where, charged=draw(st.integers(0, attempt)), now=at(attempt)
        )
        made = _in_some_state(draw, made)
        attempts.append(made)
        world.add(made)
    done = [e for e in attempts if e.phase is Phase.SUCCEEDED]
    is_accepted = draw(st.booleans())
    if done and is_accepted:
        accepted: Execution = draw(st.sampled_from(done))
        world.add(new_acceptance(job, accepted, at(10)))
        publication = new_publication(job, accepted, at(10))
        if publication is not None and draw(st.booleans()):
            phase = draw(st.sampled_from(PublicationPhase))
            report = PublicationReport(step=1, incarnation=LEDGER, phase=phase)
            world.add(publication.but(status=publication.status.but(report=report)))


def _in_some_state(draw: st.DrawFn, made: Execution) -> Execution:
    phase = draw(st.sampled_from(Phase))
    report = None
    if phase is not Phase.PENDING:
        report = Report(
            step=1,
            incarnation=LEDGER,
            phase=phase,
            exit_code=draw(st.sampled_from([None, 1, 2])),
            is_system_fault=draw(st.booleans()),
            started_at=draw(st.sampled_from([None, at(5), at(950), at(5000)])),
            finished_at=draw(st.sampled_from([None, at(6), at(999), at(5000)])),
        )
    is_stopped = draw(st.integers(0, 3)) == 0
    spec = made.spec
    if is_stopped:
        reason = draw(st.sampled_from(["Suspended", "ExecutionTimeout", "Superseded"]))
        spec = spec.but(desired=Desired.STOP, stop_reason=reason, superseded=reason == "Superseded")
    contact = Contact.REACHABLE
    if report is None or not phase.is_final:
        contact = draw(st.sampled_from([Contact.REACHABLE] * 3 + [Contact.UNKNOWN, Contact.LOST]))
    waiting = None
    if contact is Contact.UNKNOWN:
        until = draw(st.sampled_from([None, at(2000)]))
        waiting = Waiting(what="Contact", message="silent", since=at(20), until=until, mover="node")
    status = made.status.but(report=report, contact=contact, contact_since=at(20), waiting=waiting)
    return made.but(spec=spec, status=status)


def check_promises(world: Objects, table: NodeTable, before: Objects, todo: Plan) -> None:
    """What holds after any plan."""
    job = world.job
    slots = [(a.spec.slot.generation, str(a.spec.slot)) for a in world.of(Acceptance)]
    assert len(slots) == len(set(slots))
    for acceptance in todo.accept:
        taken = before.objects[Ref("Execution", "default", acceptance.spec.execution)]
        assert isinstance(taken, Execution)
        assert taken.phase is Phase.SUCCEEDED
    for publication in todo.publish:
        assert publication.name in {a.spec.execution for a in todo.accept}
        assert job is not None
        assert publication.spec.slot.generation == job.metadata.generation
    for execution in todo.create:
        assert job is not None
        assert execution.spec.slot.generation == job.metadata.generation
        node = before.objects.get(Ref("Node", "", execution.spec.node))
        assert isinstance(node, Node)
        assert node.spec.membership is Membership.APPROVED
        assert node.status.contact is Contact.REACHABLE
        assert not node.spec.unschedulable
        assert not node.spec.drain
        assert not job.spec.suspend
        assert not job.is_stopped
        _check_alone(job, execution, world)
    for node in world.of(Node):
        row = table.row(node.name)
        assert row is not None
        made_here = any(e.spec.node == node.name for e in todo.create)
        assert not made_here or table.free_on(row).cpu >= 0, "over-committed by this plan"
    if job is not None and job.status.observed_generation == job.metadata.generation:
        assert job.status.phase.is_final or job.status.waiting is not None
        counts = job.status.slots
        assert counts.running + counts.waiting + counts.succeeded + counts.failed <= counts.total


def _check_alone(job: Job, new: Execution, world: Objects) -> None:
    """A new attempt starts only where no earlier one is there and may go on; under `stop`, none
    that is not surely at its end. A service that leaves a draining node is the exception."""
    for other in world.of(Execution):
        same = other.spec.slot == new.spec.slot and other.name != new.name
        if not same or other.phase.is_final or other.status.contact is Contact.LOST:
            continue
        node = world.objects.get(Ref("Node", "", other.spec.node))
        is_moving = isinstance(node, Node) and node.spec.drain and job.spec.type is JobType.SERVICE
        assert is_moving, f"{other.name} is still there"


def in_short(world: Objects) -> str:
    """A world for people."""
    if world.job is None:
        return "no job"
    spec, meta = world.job.spec, world.job.metadata
    lines = [
        f"{spec.type} x{spec.count} generation {meta.generation} stop {spec.stop_generation}",
        f"  suspend {spec.suspend} deleting {world.job.is_deleting} restart {spec.restart.policy}",
        f"  {spec.disconnect.action} {spec.disconnect.reconcile} {spec.task.timeouts}",
        f"  {[c.key for c in spec.constraints]} cpu {spec.task.resources.cpu_millis}",
    ]
    for node in world.of(Node):
        info = node.status.info
        lines.append(
            f"  {node.name} {info.capacity.cpu_millis} {info.labels} {node.spec.membership} "
            f"{node.status.contact} cordon {node.spec.unschedulable} drain {node.spec.drain}"
        )
    for e in sorted(world.of(Execution), key=lambda e: str(e.name)):
        lines.append(
            f"  {e.name} on {e.spec.node} {e.phase} {e.spec.desired} {e.spec.stop_reason} "
            f"charged {e.spec.charged} {e.status.contact}"
        )
    lines += [f"  accepted {a.name}: {a.spec.execution}" for a in world.of(Acceptance)]
    return "\n".join(lines)


def differences(world: Objects, todo: Plan) -> list[str]:
    """What a plan would change, in words."""
    found = [f"create {e.name}" for e in todo.create]
    for new in todo.update:
        old = world.objects[new.ref]
        assert isinstance(old, Execution)
        found.append(f"{new.name}: {old.spec.desired} to {new.spec.desired} {new.spec.stop_reason}")
    found += [f"accept {a.name}" for a in todo.accept] + [f"delete {d.ref}" for d in todo.delete]
    if todo.job is not None and world.job is not None:
        for key in type(todo.job.status).model_fields:
            mine, other = getattr(world.job.status, key), getattr(todo.job.status, key)
            if mine != other:
                found.append(f"{key}: {mine} becomes {other}")
    found += ["remove the job"] * (todo.removes_job is not None)
    assert found or not todo.writes()
    return found


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds())
def test_one_plan_is_enough(drawn: tuple[Objects, datetime, JobSettings]) -> None:
    """Planning again after carrying a plan out writes nothing, unless the plan said that it was cut
    short; then a few more rounds are enough."""
    world, now, tuned = drawn
    note(in_short(world))
    table = table_of(world)
    for _ in range(ROUNDS_MAX * 4):
        before = Objects(world.job, dict(world.objects), world.version)
        todo = plan(inputs_of(world, table, now, tuned))
        note(f"plan: {differences(world, todo)}")
        assert len(todo.writes()) <= tuned.writes_max
        world.carry_out(todo)
        for execution in (*todo.create, *todo.update):
            stored = world.objects.get(execution.ref)
            if stored is not None:
                table.apply(None, stored, 0.0)
        for gone in todo.delete:
            table.apply(gone, None, 0.0)
        check_promises(world, table, before, todo)
        if world.job is None:
            assert not world.of(Execution), "executions outlived their job"
            event("deleted")
            return
        # What became too old through this plan is deleted by the next, and frees its room.
        if todo.requeue_after == 0 or todo.delete:
            continue
        again = plan(inputs_of(world, table, now, tuned))
        assert not again.create
        if again.delete and len(again.writes()) == len(again.delete):
            continue
        assert differences(world, again) == []
        event(f"{world.job.spec.type} {world.job.status.phase}")
        return
    raise AssertionError("it never came to an end")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds())
def test_plans_are_deterministic(drawn: tuple[Objects, datetime, JobSettings]) -> None:
    world, now, tuned = drawn
    note(in_short(world))
    one = plan(inputs_of(world, table_of(world), now, tuned))
    # The order in which a cache lists objects is no matter.
    reverse = Objects(world.job, dict(reversed(world.objects.items())), world.version)
    other = plan(inputs_of(reverse, table_of(reverse), now, tuned))
    assert {w.resource.ref if isinstance(w, Put) else w.ref for w in one.writes()} == {
        w.resource.ref if isinstance(w, Put) else w.ref for w in other.writes()
    }
    assert sorted(differences(world, one)) == sorted(differences(world, other))
    assert one.job == other.job
    assert sorted(one.create, key=lambda e: e.name) == sorted(other.create, key=lambda e: e.name)
    assert one.requeue_after == other.requeue_after


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds())
def test_a_rehearsal_leaves_no_trace(drawn: tuple[Objects, datetime, JobSettings]) -> None:
    world, now, tuned = drawn
    table = table_of(world)
    free = table.free.copy()
    with table.rehearsal():
        plan(inputs_of(world, table, now, tuned))
    assert (table.free == free).all()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds(), st.integers(1, 4000))
def test_what_is_over_stays_over(
    drawn: tuple[Objects, datetime, JobSettings], seconds: int
) -> None:
    world, now, tuned = drawn
    table = table_of(world)
    phases: list[JobPhase] = []
    for late in (0, seconds, seconds * 2):
        if world.job is None or world.job.is_deleting:
            return
        todo = plan(inputs_of(world, table, now + timedelta(seconds=late), tuned))
        world.carry_out(todo)
        for execution in (*todo.create, *todo.update):
            if execution.ref in world.objects:
                table.apply(None, world.objects[execution.ref], 0.0)
        assert world.job is not None
        phases.append(world.job.status.phase)
    for earlier, later in pairwise(phases):
        assert not earlier.is_final or earlier is later
