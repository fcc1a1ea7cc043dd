"""What a plan lists is what then happens: random states and random changes, planned on a copy, then
applied to the real controllers."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest

from bacalhau_api.meta import ObjectMeta, Ref
from bacalhau_api.plans import ChangePlan
from bacalhau_api.v1.execution import Desired, Execution
from bacalhau_api.v1.job import Job, JobSpec, JobType, SpecConfig
from bacalhau_api.v1.namespace import Namespace, NamespaceSpec, Quota
from bacalhau_api.v1.node import Node, NodeSpec, Taint
from bacalhau_controllers.forecast import Applier, ChangeSet, Owned, Wanted
from tests.support.job_world import World, make_spec, run_on
from tests.support.samples import Bench
from tests.support.simclock import SimLoop

JOBS = ("a", "b", "c", "d")
NODES = ("n1", "n2", "n3")
KINDS = tuple(JobType)
SETTLE_SECONDS = 65.0
"""Longer than a sweep takes, which finds what nobody was woken for."""


class Ids:
    """Counted identities."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def uid(self) -> str:
        """32 hex digits."""
        return f"{self._rng.getrandbits(128):032x}"


@contextmanager
def world_of(seed: int) -> Iterator[tuple[World, Applier, Random]]:
    """A world with nodes, whose executions run until they are stopped."""
    rng = Random(seed)
    with SimLoop() as loop:
        world = World(Bench(loop, seed=seed), default=run_on)
        for name in NODES:
            world.add_node(name, cpu=rng.choice((300, 500, 1000)), labels={"zone": name[-1]})
        yield world, Applier(world.bench.state, world.bench.clock, Ids(rng)), rng


def random_spec(rng: Random, kind: JobType) -> JobSpec:
    """A job that may or may not fit."""
    more: dict[str, Any] = {"priority": rng.choice((0, 0, 5))}
    if rng.random() < 0.3:
        more["labels"] = f"zone={rng.choice('123')}"
    count = 1 if kind.is_per_node else rng.randint(1, 4)
    spec = make_spec(kind, count, cpu=rng.choice((100, 200, 400)), **more)
    params = {"mode": rng.choice("xyz")}
    task = spec.task.but(engine=SpecConfig(type="noop"), meta=params)
    return spec.but(tasks=(task,))


def wanted_job(name: str, spec: JobSpec, **meta: Any) -> Wanted:
    """A document."""
    return Wanted(Job(metadata=ObjectMeta(name=name, **meta), spec=spec), f"{name}.yaml", 1)


def random_set(world: World, rng: Random) -> ChangeSet:
    """Some jobs new, changed or as they are; some pruned; perhaps a node changed."""
    wanted: list[Wanted] = []
    inventory: list[Owned] = []
    for name in rng.sample(JOBS, rng.randint(1, 3)):
        live = world.find(Ref("Job", "default", name))
        if not isinstance(live, Job):
            wanted.append(wanted_job(name, random_spec(rng, rng.choice(KINDS))))
            continue
        match rng.randrange(5):
            case 0:
                inventory.append(Owned(live.ref, live.metadata.uid))
            case 1:
                wanted.append(wanted_job(name, live.spec, labels={"edit": str(rng.random())}))
            case 2 if not live.spec.type.is_per_node:
                wanted.append(wanted_job(name, live.spec.but(count=rng.randint(1, 5))))
            case _:
                wanted.append(wanted_job(name, random_spec(rng, live.spec.type)))
    if rng.random() < 0.3:
        spec = rng.choice(
            (NodeSpec(unschedulable=True), NodeSpec(drain=True), NodeSpec(taints=(Taint(key="t"),)),
             NodeSpec(unschedulable=False, drain=False))
        )  # fmt: skip
        node = Node(metadata=ObjectMeta(name=rng.choice(NODES)), spec=spec)
        wanted.append(Wanted(node, "node.yaml", 1))
    if rng.random() < 0.3:
        quota = Quota(executions=rng.choice((None, 2, 4, 8)))
        spaces = NamespaceSpec(quota=quota)
        place = Namespace(metadata=ObjectMeta(name="default"), spec=spaces)
        wanted.insert(rng.randint(0, len(wanted)), Wanted(place, "namespace.yaml", 1))
    return ChangeSet(tuple(wanted), owner="", inventory=tuple(inventory), prune=True)


def in_order(execution: Execution) -> tuple[int, str, int, str]:
    """Who is heard first, where it matters: as a forecast assumes."""
    spec = execution.spec
    return spec.slot.generation, str(spec.slot), spec.attempt, execution.name


def settle(world: World, *, seconds: float = SETTLE_SECONDS) -> None:
    """Let nodes do what they are told, one word at a time in a fixed order, as a forecast assumes;
    and time pass where only time is missing."""
    waited = 0.0
    while True:
        world.bench.loop.run_until_idle()
        world.check()
        order = sorted(world.executions(), key=in_order)
        moves = [put for e in order if (put := world._advance(e)) is not None]
        if moves:
            world.write(moves[0])
            waited = 0.0
        elif waited >= seconds:
            return
        else:
            world.bench.loop.advance(1.0)
            waited += 1.0


Facts = set[tuple[str, str, str]]


def told(plan: ChangePlan) -> tuple[Facts, Facts, dict[str, int]]:
    """What a plan says: (job, execution, node) that start, that stop, and slots that wait."""
    starts, stops, waits = set(), set(), {}
    for item in plan.objects:
        assert item.executions_omitted == 0
        for e in item.executions:
            if e.action == "stop":
                stops.add((item.name, e.execution, e.node))
                continue
            starts.add((item.name, e.execution, e.node))
            if e.replaces:
                stops.add((item.name, e.replaces, e.replaces_on))
        if item.kind == "Job" and item.action not in ("delete", "affected"):
            waits[item.name] = item.queued.slots if item.queued else 0
    return starts, stops, waits


def places(starts: Facts) -> Counter[tuple[str, str]]:
    """How many executions of each job start on each node."""
    return Counter((job, node) for job, _, node in starts)


class Seen:
    """What really starts and stops, by watching the cache."""

    def __init__(self, world: World) -> None:
        self.before = {e.name for e in world.executions()}
        self.started: dict[str, Execution] = {}
        self.stopped: dict[str, Execution] = {}
        world.bench.cache.observe(self._observe)

    def _observe(self, old: object, new: object) -> None:
        if not isinstance(new, Execution):
            return
        if old is None:
            self.started[new.name] = new
        elif (
            isinstance(old, Execution)
            and old.spec.desired is Desired.RUN
            and new.spec.desired is Desired.STOP
        ):
            self.stopped[new.name] = new

    def facts(self) -> tuple[Facts, Facts]:
        """Net, as the plan tells it: what both began and ended in between is left out."""
        starts = {n: e for n, e in self.started.items() if n not in self.stopped}
        stops = {n: e for n, e in self.stopped.items() if n in self.before}
        return (
            {(e.spec.job, e.name, e.spec.node) for e in starts.values()},
            {(e.spec.job, e.name, e.spec.node) for e in stops.values()},
        )


def queued_slots(world: World, name: str) -> int:
    """How many slots of a job wait for a place; 1 where no node matches, so there is no slot."""
    job = world.job(name)
    waiting = job.status.waiting
    return (
        max(job.status.slots.waiting, 1) if waiting and waiting.what in ("Capacity", "Quota") else 0
    )


@pytest.mark.parametrize("seed", range(40))
def test_what_a_plan_lists_is_what_happens(seed: int) -> None:
    with world_of(seed) as (world, applier, rng):
        for _ in range(4):
            settle(world)
            changes = random_set(world, rng)
            run = world.bench.loop.run_until_complete
            revision = world.revision()
            plan: ChangePlan = run(applier.plan(changes))
            assert world.revision() == revision, "planning changed something"
            assert plan.complete
            assert plan.token
            expected_starts, expected_stops, waits = told(plan)
            seen = Seen(world)
            run(applier.apply(changes, "user:test", token=plan.token))
            settle(world)
            starts, stops = seen.facts()
            assert stops == expected_stops
            assert {(job, name) for job, name, _ in starts} == {
                (job, name) for job, name, _ in expected_starts
            }
            # Which of several slots of one job gets which of its places is a matter of who is
            # heard first; how many go where is not.
            assert places(starts) == places(expected_starts)
            assert {name: queued_slots(world, name) for name in waits} == waits
            has_effect = bool(seen.started or seen.stopped)
            if not plan.changes:
                assert not has_effect
