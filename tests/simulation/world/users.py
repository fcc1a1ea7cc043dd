"""Users and operators: they apply, change, stop, suspend, rerun and delete jobs, and look after
nodes, through the same actions as the HTTP API."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from bacalhau_api.admission import stop
from bacalhau_api.errors import BacalhauError, TransientError
from bacalhau_api.meta import ObjectMeta, Ref, Resource
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import (
    Constraint,
    DisconnectPolicy,
    InputSource,
    Job,
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
from bacalhau_api.v1.node import Membership, Node, Taint
from bacalhau_controllers.store import Put, Why
from tests.simulation.world.machines import ENGINE

if TYPE_CHECKING:
    from bacalhau.server.actions import Actions
    from tests.simulation.world.world import World

NAMES = ("ant", "bee", "cow", "dog", "eel")
CPU = 1000
"""Millicores of the largest request."""

QUEUE_TIMEOUT_SECONDS = 60
"""For those who ask for one."""


@dataclass(slots=True)
class Memory:
    """What users were promised about one job, by its uid.

    `may_go` is set before its deletion is asked for: from then on its absence is no loss.
    `may_fail` is set when anything but the system could make it fail.
    """

    ref: Ref
    generation: int = 1
    may_go: bool = False
    may_fail: bool = False


@dataclass(slots=True)
class Promises:
    """All that was acknowledged to users."""

    jobs: dict[str, Memory] = field(default_factory=dict)

    def acknowledge(self, job: Job) -> None:
        """The API said that this is stored."""
        memory = self.jobs.setdefault(job.metadata.uid, Memory(job.ref))
        memory.generation = max(memory.generation, job.metadata.generation)
        memory.may_fail = memory.may_fail or can_fail(job.spec)


class Users:
    """Everybody who uses the API. Each action goes to one orchestrator that answers just now."""

    def __init__(self, world: "World", rng: Random) -> None:
        self._world = world
        self._rng = rng
        self._count = 0
        self.promises = Promises()

    def act(self) -> None:
        """Somebody does something."""
        serving = [one for one in self._world.orchestrators if one.is_serving]
        if not serving:
            return
        at = self._rng.choice(serving)
        assert at.life is not None
        assert at.actions is not None
        at.life.spawn(self._act(at.actions), "user")

    def operate(self) -> None:
        """An operator does something to a node."""
        serving = [one for one in self._world.orchestrators if one.is_serving]
        if not serving:
            return
        at = self._rng.choice(serving)
        assert at.life is not None
        assert at.actions is not None
        at.life.spawn(self._operate(at.actions), "operator")

    async def repair(self) -> None:
        """An operator puts everything back in order: all nodes belong and may be used, and what
        ends and begins for ever by its nature is stopped."""
        for name in self._world.node_names:
            await self._insist(Ref("Node", "", name), _restored)
            if self._world.store.peek(Ref("Node", "", name)) is None:
                await self.enrol(name)
        for job in self._world.store.everything("Job"):
            if isinstance(job, Job) and self._goes_on_for_ever(job):
                self._forgive(job)
                await self._insist(job.ref, _stopped)

    def _goes_on_for_ever(self, job: Job) -> bool:
        """Also if only what is left of an earlier generation does."""
        left = [
            job.spec.but(tasks=(e.spec.task,), restart=e.spec.restart)
            for e in self._world.store.everything("Execution")
            if isinstance(e, Execution) and e.spec.job_uid == job.metadata.uid and not e.is_final
        ]
        return any(is_restless(spec) for spec in (job.spec, *left))

    async def enrol(self, name: str, membership: Membership = Membership.APPROVED) -> None:
        """A machine becomes a node."""
        meta = ObjectMeta(
            name=name,
            namespace="",
            uid=self._world.ids("node").uid(),
            generation=1,
            creation_timestamp=self._world.clock.now(),
        )
        node = Node(metadata=meta).but(spec=Node(metadata=meta).spec.but(membership=membership))
        try:
            await self._world.store.commit([Put(node, 0)], Why(f"node:{name}", "NodeJoined"))
        except TransientError:
            return

    async def _insist(self, ref: Ref, change: Callable[[Resource], Resource]) -> None:
        """Change what is stored, by the world's own hand."""
        for _ in range(20):
            found = self._world.store.peek(ref)
            if found is None or (changed := change(found)) == found:
                return
            put = Put(changed, found.metadata.resource_version)
            try:
                await self._world.store.commit([put], Why("user:operator", "Applied"))
            except TransientError:
                continue

    # -- jobs ------------------------------------------------------------------------------------

    async def _act(self, actions: "Actions") -> None:
        rng = self._rng
        name = rng.choice(NAMES)
        ref = Ref("Job", "default", name)
        dice = rng.random()
        stored = self._world.store.peek(ref)
        try:
            if not isinstance(stored, Job):
                await self._apply(actions, Job(metadata=ObjectMeta(name=name), spec=self.spec()))
            elif dice < 0.25:
                spec = self.spec(stored.spec.type)
                await self._apply(actions, Job(metadata=ObjectMeta(name=name), spec=spec))
            elif dice < 0.45:
                await self._apply(actions, self._changed(stored))
            elif dice < 0.55:
                self._forgive(stored)
                self._say("stop", name)
                await actions.stop_job(ref, "user:alice")
            elif dice < 0.65:
                nonce, failed = f"nonce-{rng.randrange(3)}", rng.random() < 0.5
                self._say("rerun-failed" if failed else "rerun", name, nonce)
                job = await actions.rerun_job(ref, "user:alice", nonce, only_failed=failed)
                self.promises.acknowledge(job)
            elif dice < 0.75:
                self._say("suspend", name)
                await actions.suspend_job(ref, "user:alice", suspend=not stored.spec.suspend)
            elif dice < 0.95:
                self._let_go(ref)
                self._say("delete", name)
                await actions.delete(ref, "user:alice", force=rng.random() < 0.1)
        except BacalhauError as error:
            self._say("refused", name, error.reason)

    async def _apply(self, actions: "Actions", job: Job) -> None:
        stored = self._world.store.peek(job.ref)
        if isinstance(stored, Job):
            self._forgive(stored, can_fail(job.spec))
        self._say("apply", job.name, job.spec.type)
        applied = await actions.apply_job(job, "user:alice")
        assert isinstance(applied.item, Job)
        self._say("applied", job.name, f"{applied.outcome} {applied.item.metadata.uid[:8]}")
        self.promises.acknowledge(applied.item)

    def _changed(self, job: Job) -> Job:
        rng, spec = self._rng, job.spec
        meta = ObjectMeta(name=job.name, labels=job.metadata.labels)
        match rng.randrange(5):
            case 0:
                meta = meta.but(labels={"mood": str(rng.randrange(3))})
            case 1:
                spec = spec.but(priority=rng.randrange(3))
            case 2 if not spec.type.is_per_node:
                spec = spec.but(count=rng.randint(0, 4))
            case 3:
                spec = spec.but(disconnect=self._disconnect())
            case _:
                env = {"VERSION": str(rng.randrange(100))}
                spec = spec.but(tasks=(spec.task.but(env=env),))
        return Job(metadata=meta, spec=spec.but(stop_generation=0, rerun_nonce="", retry_nonce=""))

    def spec(self, kind: JobType | None = None) -> JobSpec:
        """Some job."""
        rng = self._rng
        kind = kind or rng.choice(list(JobType))
        params: dict[str, Any] = {"exitCode": 0, "seconds": round(rng.uniform(0.2, 30), 1)}
        if rng.random() < 0.15:
            params["exitCode"] = rng.randint(1, 3)
        if not kind.runs_to_completion and rng.random() < 0.7:
            params["seconds"] = "for ever"
        inputs: tuple[InputSource, ...] = ()
        if rng.random() < 0.3:
            source = SpecConfig(type="fake", params={"path": "/data"})
            inputs = (InputSource(source=source, target="/in/0"),)
        task = Task(
            engine=SpecConfig(type=ENGINE, params=params),
            publisher=SpecConfig(type="fake") if rng.random() < 0.5 else None,
            input_sources=inputs,
            resources=Resources(cpu_millis=rng.choice([100, 300, CPU]), memory_bytes=1 << 20),
            timeouts=Timeouts(
                execution_timeout=rng.choice([0, 0, 0, 20]),
                queue_timeout=rng.choice([0, 0, 0, QUEUE_TIMEOUT_SECONDS]),
                total_timeout=0,
            ),
        )
        constraints: tuple[Constraint, ...] = ()
        if rng.random() < 0.2:
            constraints = (Constraint(key="zone", operator="=", values=("a",)),)
        return JobSpec(
            type=kind,
            count=1 if kind.is_per_node else rng.randint(1, 4),
            tasks=(task,),
            constraints=constraints,
            priority=rng.choice([0, 0, 1]),
            retry=RetryPolicy(
                attempts=rng.randint(1, 3), backoff_seconds=1.0, backoff_seconds_max=5.0
            ),
            restart=RestartPolicy(
                policy=rng.choice(["always", "always", "onFailure", "never"]),
                backoff_seconds=1.0,
                backoff_seconds_max=10.0,
                interrupted=rng.choice(["restart", "report"]),
            ),
            disconnect=self._disconnect(),
            update=UpdateStrategy(max_unavailable=rng.randint(1, 2)),
            suspend=rng.random() < 0.03,
        )

    def _disconnect(self) -> DisconnectPolicy:
        rng = self._rng
        return DisconnectPolicy(
            action=rng.choice([None, "hold", "replace", "stop", "stop"]),
            after_seconds=rng.choice([15, 30, 60]),
            reconcile=rng.choice([None, "firstAccepted", "keepOriginal", "keepReplacement"]),
        )

    def _forgive(self, job: Job, may_fail: bool = True) -> None:
        memory = self.promises.jobs.setdefault(job.metadata.uid, Memory(job.ref))
        memory.may_fail = memory.may_fail or may_fail

    def _let_go(self, ref: Ref) -> None:
        """A deletion by name may hit a successor that is being created at this moment."""
        for memory in self.promises.jobs.values():
            if memory.ref == ref:
                memory.may_go = True
        stored = self._world.store.peek(ref)
        if stored is not None:
            memory = self.promises.jobs.setdefault(stored.metadata.uid, Memory(ref))
            memory.may_go = True

    # -- nodes -----------------------------------------------------------------------------------

    async def _operate(self, actions: "Actions") -> None:
        rng = self._rng
        name = rng.choice(self._world.node_names)
        ref = Ref("Node", "", name)
        stored = self._world.store.peek(ref)
        who = "user:operator"
        try:
            if not isinstance(stored, Node):
                self._say("enrol", name)
                await self.enrol(name)
                return
            match rng.randrange(7):
                case 0:
                    self._say("cordon", name)
                    await actions.set_schedulable(name, who, unschedulable=True, drain=False)
                case 1:
                    self._say("drain", name)
                    await actions.set_schedulable(name, who, unschedulable=True, drain=True)
                case 2 | 3:
                    self._say("uncordon", name)
                    await actions.set_schedulable(name, who, unschedulable=False, drain=False)
                case 4:
                    accept = stored.spec.membership is not Membership.APPROVED
                    membership = Membership.APPROVED if accept else Membership.REJECTED
                    self._say(str(membership), name)
                    await actions.set_membership(name, who, membership)
                case 5:
                    taints = () if stored.spec.taints else (Taint(key="t"),)
                    labels = {"zone": rng.choice("ab")}
                    self._say("relabel", name, f"{labels} {len(taints)}")
                    changed = stored.but(spec=stored.spec.but(taints=taints))
                    await actions.apply_node(changed.with_meta(labels=labels), who)
                case _:
                    self._say("remove", name)
                    await actions.delete(ref, who, force=True)
        except BacalhauError as error:
            self._say("refused", name, error.reason)

    def _say(self, what: str, subject: str, text: object = "") -> None:
        self._world.note(f"user-{what}", subject, text)


def can_fail(spec: JobSpec) -> bool:
    """Whether a job can come to grief without a fault of the system."""
    task = spec.task
    limits = task.timeouts
    return bool(
        task.engine.params.get("exitCode")
        or limits.execution_timeout
        or limits.queue_timeout
        or limits.total_timeout
        or spec.type is not JobType.BATCH
    )


def is_restless(spec: JobSpec) -> bool:
    """Whether a job goes on ending and beginning for ever, by its nature."""
    params = spec.task.engine.params
    is_finite = (
        isinstance(params.get("seconds"), int | float) or spec.task.timeouts.execution_timeout
    )
    if spec.type.runs_to_completion or not is_finite:
        return False
    return spec.restart.policy == "always" or bool(
        params.get("exitCode") or spec.task.timeouts.execution_timeout
    )


def _restored(node: Resource) -> Resource:
    assert isinstance(node, Node)
    spec = node.spec.but(
        membership=Membership.APPROVED, unschedulable=False, drain=False, taints=()
    )
    return node.but(spec=spec)


def _stopped(job: Resource) -> Resource:
    assert isinstance(job, Job)
    return stop(job)
