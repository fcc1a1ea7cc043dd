"""Random walks: whatever users, operators, nodes and links do, every promise holds at each step, and
once they leave it alone everything comes to rest."""

import random

import pytest

from bacalhau_api.meta import Contact, Ref
from bacalhau_api.v1.execution import Desired, Execution, Phase, Report
from bacalhau_api.v1.job import (
    DisconnectPolicy,
    Job,
    JobPhase,
    JobType,
    RestartPolicy,
    RetryPolicy,
    Timeouts,
    UpdateStrategy,
)
from bacalhau_api.v1.node import Node
from tests.support.job_world import (
    World,
    fail,
    make_spec,
    reject,
    report_of,
    run_on,
    succeed,
    world,
)

STEPS = 60
JOBS = [f"j{i}" for i in range(5)]
NODES = [f"n{i}" for i in range(5)]


class Walk:
    """One random walk through a world."""

    def __init__(self, w: World, seed: int) -> None:
        self.w = w
        self.rng = random.Random(seed)
        self.results: dict[tuple[str, str], str] = {}
        w.default = self.behave

    def behave(self, execution: Execution) -> Report | None:
        """What becomes of a running execution at this moment."""
        how = self.rng.choices(
            [run_on, succeed, fail(1), fail(1, is_system_fault=True), fail(9)],
            [5, 4, 1, 1, 0.2],
        )[0]
        return how(execution)

    def step(self) -> None:
        """One thing happens, and nodes go on."""
        actions = [
            (self.submit, 4),
            (self.edit, 2),
            (self.stop, 0.5),
            (self.delete, 0.5),
            (self.join, 2),
            (self.leave, 0.3),
            (self.silence, 1),
            (self.hear, 2),
            (self.cordon, 1),
            (self.refuse, 0.3),
            (self.wait, 3),
        ]
        self.rng.choices([a for a, _ in actions], [weight for _, weight in actions])[0]()
        if self.rng.random() < 0.7:
            self.w.step()
        self.w.check()
        self.check()

    def check(self) -> None:
        """Promises of a walk: what was accepted stays, and what is over stays over."""
        for acceptance in self.w.acceptances():
            key = (acceptance.spec.job_uid, acceptance.name)
            known = self.results.setdefault(key, acceptance.spec.execution_uid)
            assert known == acceptance.spec.execution_uid, "an accepted result was replaced"
        for execution in self.w.executions():
            if execution.phase.is_final or execution.status.contact is not Contact.REACHABLE:
                continue
            job = self.w.find(Ref("Job", "default", execution.spec.job))
            assert job is None or isinstance(job, Job)
            if job is None or job.metadata.uid != execution.spec.job_uid:
                continue
            if job.is_stopped or job.spec.suspend:
                assert execution.spec.desired is Desired.STOP

    def submit(self) -> None:
        name = self.rng.choice(JOBS)
        if self.w.find(Ref("Job", "default", name)) is not None:
            return
        choose = self.rng.choice
        kind = choose(list(JobType))
        self.w.submit(
            name,
            make_spec(
                kind,
                choose([0, 1, 2, 5]) if not kind.is_per_node else 1,
                cpu=choose([100, 300, 900]),
                publisher=choose(["", "local"]),
                labels=choose(["", "", "zone=x"]),
                priority=choose([0, 0, 5]),
                retry=RetryPolicy(attempts=choose([1, 3]), backoff_seconds=choose([0, 1, 20])),
                restart=RestartPolicy(policy=choose(["always", "always", "never", "onFailure"])),
                disconnect=DisconnectPolicy(
                    action=choose([None, "hold", "replace", "stop"]),
                    reconcile=choose([None, "keepOriginal", "keepReplacement"]),
                ),
                update=UpdateStrategy(max_unavailable=choose([1, 2])),
                task={
                    "timeouts": Timeouts(
                        queue_timeout=choose([0, 0, 30]), execution_timeout=choose([0, 0, 60])
                    )
                },
            ),
        )

    def edit(self) -> None:
        job = self._some_job()
        if job is None:
            return
        change = self.rng.choice(["count", "nonce", "suspend", "resume", "priority"])
        if change == "count" and not job.spec.type.is_per_node:
            self.w.edit(job.name, count=self.rng.choice([0, 1, 3]))
        elif change == "nonce":
            self.w.edit(job.name, run_nonce=str(self.rng.random()))
        elif change == "priority":
            self.w.edit(job.name, priority=self.rng.randint(-5, 5))
        else:
            self.w.edit(job.name, suspend=change == "suspend")

    def stop(self) -> None:
        if (job := self._some_job()) is not None:
            self.w.stop(job.name)

    def delete(self) -> None:
        if (job := self._some_job()) is not None:
            self.w.delete(job.name)

    def join(self) -> None:
        name = self.rng.choice(NODES)
        if self.w.find(Ref("Node", "", name)) is None:
            labels = self.rng.choice([{}, {"zone": "x"}])
            self.w.add_node(name, cpu=1000, labels=labels)

    def leave(self) -> None:
        if (node := self._some_node()) is not None:
            self.w.silence(node.name, Contact.LOST)
            self.w.remove(node.ref)
            self.w.silent.discard(node.name)

    def silence(self) -> None:
        node = self._some_node()
        if node is None:
            return
        if node.name in self.w.silent:
            self.w.lose(node.name)
        else:
            self.w.silence(node.name)

    def hear(self) -> None:
        """A node returns, often with news of what ended meanwhile."""
        node = self._some_node()
        if node is None or node.name not in self.w.silent:
            return
        self.w.hear(node.name)
        for known in self.w.executions(node=node.name):
            execution = self.w.find(known.ref)  # the last report may have changed it
            if not isinstance(execution, Execution) or execution.phase.is_final:
                continue
            if self.rng.random() < 0.5:
                self.w.report(execution, report_of(execution, Phase.SUCCEEDED, exit_code=0))

    def cordon(self) -> None:
        if (node := self._some_node()) is not None:
            field = self.rng.choice(["unschedulable", "drain"])
            self.w.change_node(node.name, **{field: self.rng.random() < 0.5})

    def refuse(self) -> None:
        if (node := self._some_node()) is not None:
            self.w.behave(reject, node=node.name)

    def wait(self) -> None:
        self.w.pass_time(self.rng.choice([1, 5, 40]))

    def heal(self) -> None:
        """Everybody leaves it alone: nodes are back, and workloads end well."""
        self.w.behaviours.clear()
        self.w.default = None
        self.w.pass_time(1)
        for name in NODES:
            node = self.w.find(Ref("Node", "", name))
            if node is None:
                self.w.add_node(name, cpu=9000, labels={"zone": "x"})
                continue
            self.w.silence(name)  # what a node refused, it is asked again when it comes back
            self.w.hear(name)
            self.w.change_node(name, unschedulable=False, drain=False)
            self.w.enlarge(name, cpu=9000)
            self.w.put(self.w.node(name).with_meta(labels={"zone": "x"}))
        for job in [j for j in self.w.bench.cache.list("Job") if isinstance(j, Job)]:
            if job.spec.suspend and not job.is_deleting:
                self.w.edit(job.name, suspend=False)

    def _some_job(self) -> Job | None:
        jobs = [j for j in self.w.bench.cache.list("Job") if isinstance(j, Job)]
        jobs = [j for j in jobs if not j.is_deleting]
        return self.rng.choice(jobs) if jobs else None

    def _some_node(self) -> Node | None:
        nodes = [n for n in self.w.bench.cache.list("Node") if isinstance(n, Node)]
        return self.rng.choice(nodes) if nodes else None


def walk(seed: int, steps: int = STEPS) -> World:
    """A whole walk; returns its world at rest."""
    with world() as w:
        walker = Walk(w, seed)
        for _ in range(steps):
            walker.step()
        walker.heal()
        for _ in range(8):
            w.settle(seconds=10)
            w.pass_time(360)  # longer than any pause
        walker.check()
        for job in [j for j in w.bench.cache.list("Job") if isinstance(j, Job)]:
            assert not job.is_deleting, f"{job.name} was never deleted"
            status = job.status
            assert status.observed_generation == job.metadata.generation
            if job.spec.type.runs_to_completion:
                assert status.phase.is_final, f"{job.name} {status.phase} {status.waiting}"
            elif not status.phase.is_final:
                _check_filled(w, job)
        before = w.revision()
        w.settle(seconds=1)
        w.pass_time(900)
        assert w.revision() == before, "it never comes to rest"
        return w


def _check_filled(w: World, job: Job) -> None:
    """A service or daemon has what it wants: everything of one generation, and no more."""
    running = w.running(job.name)
    generations = {e.spec.slot.generation for e in running}
    assert generations <= {job.metadata.generation}
    ended = job.status.slots.succeeded + job.status.slots.failed
    assert len(running) + ended == job.status.slots.total, f"{job.name} {job.status}"
    if job.spec.type is JobType.SERVICE:
        assert job.status.slots.total == job.spec.count
    assert job.status.phase is JobPhase.RUNNING or not job.status.slots.total


@pytest.mark.parametrize("seed", range(40))
def test_every_walk_comes_to_rest(seed: int) -> None:
    walk(seed)


def test_the_same_seed_is_the_same_walk() -> None:
    def trace() -> list[tuple[str, int]]:
        w = walk(7, steps=40)
        kinds = ("Job", "Execution", "Acceptance", "Publication")
        return [
            (str(item.ref), item.metadata.resource_version)
            for kind in kinds
            for item in w.bench.cache.list(kind)
        ]

    assert trace() == trace()
