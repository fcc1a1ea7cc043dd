"""Plans: the consequences of a set of documents, of objects that go, of nodes that fail."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from bacalhau_api.errors import InvalidError, NotFoundError, Problem
from bacalhau_api.meta import Contact, Ref, Resource
from bacalhau_api.plans import ChangePlan, ObjectPlan
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.node import Node
from bacalhau_controllers.disconnect import effective_disconnect
from bacalhau_controllers.execution.plan import limit_for
from bacalhau_controllers.forecast.changes import Change, ChangeSet, Deciding, decide
from bacalhau_controllers.forecast.describe import Before, describe, disconnect_of, summarise
from bacalhau_controllers.forecast.token import Token, digest_of_set, digests_of, uid_for
from bacalhau_controllers.forecast.world import Limits, World
from bacalhau_controllers.job import JobSettings
from bacalhau_controllers.store import Put, Write


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All objects at one moment. `revision` names the moment for people and programs."""

    objects: tuple[Resource, ...]
    now: datetime
    revision: str = ""
    settings: JobSettings = field(default_factory=JobSettings)
    limits: Limits = field(default_factory=Limits)

    def world(self) -> World:
        """A copy in which things may happen."""
        return World(self.objects, self.now, settings=self.settings, limits=self.limits)


@dataclass(frozen=True, slots=True)
class Foreseen:
    """A plan, and the decisions that it is about."""

    plan: ChangePlan
    changes: tuple[Change, ...]


async def foresee(snapshot: Snapshot, changes: ChangeSet, seed: str) -> Foreseen:
    """The consequences of a set of documents. `seed` (16 hex digits) makes the uids of new objects.

    What is refused is left out of what follows, and said. Raises InvalidError for a set that is
    wrong as such.
    """
    world = snapshot.world()
    given = Deciding(world.cache.get, snapshot.now, lambda ref: uid_for(seed, ref))
    decided = decide(changes, given)
    writes = tuple(write for change in decided for write in change.writes)
    outcome = await world.run(writes)
    before = Before.of(snapshot.objects)
    objects = describe(decided, before, world, outcome)
    summary = summarise(objects)
    token = ""
    if not summary.refused:
        token = Token(seed, digest_of_set(changes), digests_of(objects)).text()
    plan = ChangePlan(
        token=token,
        time=snapshot.now,
        revision=snapshot.revision,
        changes=bool(summary.create or summary.change or summary.delete),
        complete=not outcome.cut,
        summary=summary,
        objects=objects,
    )
    return Foreseen(plan, decided)


async def without_nodes(snapshot: Snapshot, names: Collection[str]) -> ChangePlan:
    """What would happen if these nodes were not heard from again: after the time that each job
    allows, what is on them is given up and replaced, or held.

    Raises NotFoundError for a node that does not exist.
    """
    world = snapshot.world()
    wanted = frozenset(names)
    if not wanted:
        raise InvalidError([Problem("without", "names no node", hint="such as node/edge-1")])
    writes: list[Write] = []
    after: dict[str, float] = {}
    jobs: dict[Ref, None] = {}
    kept: dict[Ref, None] = {}
    for name in sorted(wanted):
        node = world.cache.get(Ref("Node", "", name))
        if not isinstance(node, Node):
            raise NotFoundError(f"there is no node {name}", hint="see: bacalhau get nodes")
        gone = node.but(status=node.status.but(contact=Contact.UNKNOWN, connected_since=None))
        writes.append(Put(gone, node.metadata.resource_version))
        for execution in world.cache.on_node(name, "Execution"):
            # What is lost was given up before: it is replaced already, or not wanted any more.
            if isinstance(execution, Execution) and not execution.is_final:
                job = world.cache.get(Ref("Job", execution.ref.namespace, execution.spec.job))
                seconds = _patience_seconds(execution, job)
                writes.append(_out_of_contact(execution, is_lost=seconds is not None))
                if seconds is not None:
                    after[execution.name] = seconds
                if isinstance(job, Job):
                    jobs[job.ref] = None
                    if seconds is None:
                        kept[job.ref] = None
    outcome = await world.run(writes, also=jobs)
    objects = describe((), Before.of(snapshot.objects), world, outcome, after_seconds=after)
    told = {(item.namespace, item.name) for item in objects}
    held = [ref for ref in sorted(kept) if (ref.namespace, ref.name) not in told]
    objects += tuple(_held(job) for ref in held if isinstance(job := world.cache.get(ref), Job))
    return ChangePlan(
        time=snapshot.now,
        revision=snapshot.revision,
        changes=bool(objects),
        complete=not outcome.cut,
        summary=summarise(objects),
        objects=objects,
    )


def _held(job: Job) -> ObjectPlan:
    """A job of which nothing moves, since its policy keeps what it has for its node."""
    policy = disconnect_of(job)
    return ObjectPlan(
        action="affected",
        kind=job.kind,
        namespace=job.ref.namespace,
        name=job.name,
        why=f"what it has there is kept for its node: {policy.why}",
        generation=job.metadata.generation,
        generation_after=job.metadata.generation,
        disconnect=policy,
    )


def _patience_seconds(execution: Execution, job: Resource | None) -> float | None:
    """After how much silence of its node an execution is given up; None: never."""
    if not isinstance(job, Job) or job.metadata.uid != execution.spec.job_uid:
        return None
    return limit_for(execution, effective_disconnect(job.spec)).seconds


def _out_of_contact(execution: Execution, *, is_lost: bool) -> Put:
    """An execution once its node has been silent for as long as its job allows."""
    status = execution.status.but(contact=Contact.LOST if is_lost else Contact.UNKNOWN)
    return Put(execution.but(status=status), execution.metadata.resource_version)


def differing(
    expected: Token, changes: ChangeSet, now: Foreseen
) -> tuple[Sequence[str], Sequence[str]]:
    """What is not as it was when the token was made: objects to which something else happens, and
    objects that go elsewhere only. Raises InvalidError if the token is about other documents."""
    if digest_of_set(changes) != expected.set:
        hint = "give the same files, in the same order, or plan again"
        raise InvalidError([Problem("token", "is about other documents", hint=hint)])
    found = digests_of(now.plan.objects)
    names = [plan.ref_text for plan in now.plan.objects]
    what = [
        name for name, mine, theirs in zip(names, found, expected.outcomes, strict=False)
        if mine[0] != theirs[0]
    ]  # fmt: skip
    where = [
        name for name, mine, theirs in zip(names, found, expected.outcomes, strict=False)
        if mine[0] == theirs[0] and mine[1] != theirs[1]
    ]  # fmt: skip
    if len(found) > len(expected.outcomes):
        what += names[len(expected.outcomes) :]
    elif len(found) < len(expected.outcomes) and not what:
        what.append("a job that nobody changes is no longer affected")
    return what, where
