"""A node for tests of the agent: the real agent over fakes that outlive it, and a stand-in for the
orchestrator that speaks the wire protocol."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from random import Random
from typing import Any

from bacalhau_api.errors import UnavailableError
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.v1.execution import (
    Desired,
    Execution,
    ExecutionSpec,
    ExecutionStatus,
    Publication,
    PublicationReport,
    PublicationSpec,
    PublicationStatus,
    Report,
    Slot,
    merge_report,
)
from bacalhau_api.v1.job import (
    InputSource,
    JobType,
    Resources,
    RestartPolicy,
    ResultPath,
    SpecConfig,
    Task,
    Timeouts,
)
from bacalhau_api.wire import (
    Ack,
    Applied,
    Assignments,
    Beat,
    BeatReply,
    Changes,
    Fact,
    FactBatch,
    Gone,
    Hello,
    Refused,
    Welcome,
    WelcomePart,
)
from bacalhau_controllers.runner.admission import Policy
from bacalhau_controllers.runner.agent import Agent
from bacalhau_controllers.runner.fakes import (
    Boundary,
    FakeEngine,
    FakePublisher,
    FakeStorage,
    MemoryLink,
    MemoryWorkspace,
    Reply,
    Request,
    no_boundary,
)
from bacalhau_controllers.runner.ledger import Ledger, MemoryLedger
from bacalhau_controllers.runner.ports import Inventory, Layout
from bacalhau_controllers.runner.site import AgentSettings
from bacalhau_controllers.runner.state import Limits
from tests.support.simclock import EPOCH, SimClock, SimLoop

NODE = "n1"
CAPACITY = Resources(cpu_millis=4000, memory_bytes=1 << 30, disk_bytes=1 << 30)


def execution(
    name: str = "job-1",
    *,
    job_type: JobType = JobType.BATCH,
    seconds: float | None = 1.0,
    exit_code: int = 0,
    restart: RestartPolicy | None = None,
    timeout: int = 0,
    local_deadline: int | None = None,
    inputs: tuple[str, ...] = (),
    results: tuple[str, ...] = (),
    resources: Resources | None = None,
    engine: str = "fake",
    version: int = 1,
    uid: str = "",
    **task: Any,
) -> Execution:
    """An execution assigned to the node. `seconds` None runs until stopped."""
    params: dict[str, Any] = {"exitCode": exit_code}
    params["seconds"] = "for ever" if seconds is None else seconds
    return Execution(
        metadata=ObjectMeta(name=name, uid=uid or f"uid-{name}", resource_version=version),
        spec=ExecutionSpec(
            job="job",
            job_uid="job-uid",
            job_type=job_type,
            slot=Slot(generation=1),
            node=NODE,
            restart=restart or RestartPolicy(),
            local_deadline_seconds=local_deadline,
            task=Task(
                engine=SpecConfig(type=engine, params=params),
                input_sources=tuple(
                    InputSource(
                        source=SpecConfig(type="fake", params={"path": path}), target=f"/in/{i}"
                    )
                    for i, path in enumerate(inputs)
                ),
                result_paths=tuple(ResultPath(name=r, path=f"/out/{r}") for r in results),
                resources=resources or Resources(),
                timeouts=Timeouts(execution_timeout=timeout),
                **task,
            ),
        ),
    )


def stopped(of: Execution, reason: str = "UserRequest", *, version: int = 2) -> Execution:
    """The same execution, wanted stopped."""
    spec = of.spec.but(desired=Desired.STOP, stop_reason=reason)
    return of.with_meta(resource_version=version).but(spec=spec)


def publication(of: Execution, *, version: int = 1, target: str = "fake") -> Publication:
    """The outputs of an execution on their way."""
    return Publication(
        metadata=ObjectMeta(name=of.name, uid=f"pub-{of.name}", resource_version=version),
        spec=PublicationSpec(
            job=of.spec.job,
            job_uid=of.spec.job_uid,
            execution=of.name,
            execution_uid=of.metadata.uid,
            node=NODE,
            slot=of.spec.slot,
            publisher=SpecConfig(type=target),
        ),
    )


class CountingIds:
    """Identities in order."""

    def __init__(self, prefix: str = "id") -> None:
        self._prefix = prefix
        self._count = 0

    def uid(self) -> str:
        """The next one."""
        self._count += 1
        return f"{self._prefix}-{self._count}"


class Hub:
    """Stands in for the orchestrator: holds what the node is to do and what it reported, merged as
    the real one merges, and checks that no report ever goes backwards."""

    def __init__(self, clock: SimClock) -> None:
        self._clock = clock
        self.executions: dict[str, Execution] = {}
        self.publications: dict[str, Publication] = {}
        self.reports: dict[str, Report] = {}
        self.publication_reports: dict[str, PublicationReport] = {}
        self.facts: list[Fact] = []
        self.hellos: list[Hello] = []
        self.beats: list[Beat] = []
        self.link: MemoryLink | None = None
        self.number = 0
        self.is_approved = True
        self.refuse: Refused | None = None
        self.part_size = 1000
        self.lose_acks = 0
        self.list_id = 1
        self.relists = 0  # as often the list is replaced while it is read
        """So many answers to facts are lost after the facts were stored."""
        self.heard_at = 0.0
        """When (by the loop) the last request was answered."""
        self.is_deaf = False
        """No request is answered."""
        self.problems: list[str] = []

    @property
    def session(self) -> str:
        """The newest session."""
        return self.hellos[-1].session if self.hellos else ""

    def report(self, name: str) -> Report:
        """What the node said of an execution."""
        return self.reports[f"uid-{name}"]

    async def serve(self, request: Request) -> Reply:
        """Answer one request of the node."""
        if self.is_deaf:
            await asyncio.Event().wait()
        if self.refuse is None:
            self.heard_at = asyncio.get_running_loop().time()
        if self.refuse is not None:
            return self.refuse.but(node=request.node, session=request.session)
        match request:
            case Hello():
                self.hellos.append(request)
                self.number = 0
                return self._welcome(request.session, 0)
            case WelcomePart():
                if self.relists:
                    self.relists -= 1
                    self.list_id += 1
                return self._welcome(request.session, request.part)
            case Beat():
                self.beats.append(request)
                is_stale = request.session != self.session
                return BeatReply(node=NODE, session=request.session, hello_again=is_stale)
            case FactBatch():
                return self._store(request)

    async def assign(self, *things: Execution | Publication) -> Applied | None:
        """Assign or change, and push it if the node is connected."""
        for thing in things:
            self._keep(thing)
        return await self._push(self._assignments(things), ())

    def keep(self, *things: Execution | Publication) -> None:
        """Assign or change without telling: the next full list has it."""
        for thing in things:
            self._keep(thing)

    async def drop(self, *things: Execution | Publication) -> Applied | None:
        """Withdraw."""
        gone: list[Gone] = []
        for thing in things:
            uid = thing.metadata.uid
            kind = thing.kind
            self.executions.pop(uid, None)
            self.publications.pop(uid, None)
            gone.append(Gone(kind=kind, namespace="default", name=thing.name, uid=uid))
        return await self._push(Assignments(), tuple(gone))

    def _keep(self, thing: Execution | Publication) -> None:
        if isinstance(thing, Execution):
            self.executions[thing.metadata.uid] = thing
        else:
            self.publications[thing.metadata.uid] = thing

    def _assignments(self, things: tuple[Execution | Publication, ...]) -> Assignments:
        return Assignments(
            executions=tuple(self._told(t) for t in things if isinstance(t, Execution)),
            publications=tuple(t for t in things if isinstance(t, Publication)),
        )

    def _told(self, thing: Execution) -> Execution:
        report = self.reports.get(thing.metadata.uid)
        return thing.but(status=ExecutionStatus(report=report)) if report else thing

    async def _push(self, assignments: Assignments, gone: tuple[Gone, ...]) -> Applied | None:
        if self.link is None or not self.link.is_up or not self.hellos:
            return None
        self.number += 1
        return await self.link.push(
            Changes(
                node=NODE,
                session=self.session,
                number=self.number,
                assignments=assignments,
                gone=gone,
            )
        )

    def _welcome(self, session: str, part: int) -> Welcome:
        executions = [self._told(one) for one in self.executions.values()]
        publications = [
            one.but(status=PublicationStatus(report=self.publication_reports.get(uid)))
            for uid, one in self.publications.items()
        ]
        begin, end = part * self.part_size, (part + 1) * self.part_size
        mine = self.hellos[-1].incarnation
        steps = {u: r.step for u, r in self.reports.items() if r.incarnation == mine}
        steps |= {u: r.step for u, r in self.publication_reports.items() if r.incarnation == mine}
        return Welcome(
            node=NODE,
            session=session,
            is_approved=self.is_approved,
            message="" if self.is_approved else "wait for approval",
            time=self._clock.now(),
            beat_seconds=5.0,
            assignments=Assignments(
                executions=tuple(executions[begin:end]),
                publications=tuple(publications) if part == 0 else (),
            ),
            steps=steps,
            list_id=str(self.list_id),
            next_part=part + 1 if end < len(executions) else None,
        )

    def _store(self, batch: FactBatch) -> Ack:
        for fact in batch.facts:
            self.facts.append(fact)
            if fact.execution is not None and fact.uid in self.executions:
                old = self.reports.get(fact.uid)
                self._check(fact, old)
                self.reports[fact.uid] = merge_report(old, fact.execution)
            elif fact.publication is not None and fact.uid in self.publications:
                before = self.publication_reports.get(fact.uid)
                if before is None or fact.publication.step > before.step:
                    self.publication_reports[fact.uid] = fact.publication
        if self.lose_acks:
            self.lose_acks -= 1
            raise UnavailableError("the answer was lost")
        return Ack(node=NODE, session=batch.session, seq=batch.facts[-1].seq)

    def _check(self, fact: Fact, old: Report | None) -> None:
        new = fact.execution
        if old is None or new is None or old.incarnation != new.incarnation:
            return
        if new.step > old.step and merge_report(old, new) != new:
            self.problems.append(f"{fact.name} went from {old} to {new}")
        if new.run < old.run and new.step > old.step:
            self.problems.append(f"{fact.name} counts runs backwards")


class CheckedWorkspace(MemoryWorkspace):
    """Notes when directories are pulled from under a run."""

    def __init__(self, engine: FakeEngine, *, boundary: Boundary) -> None:
        super().__init__(boundary=boundary)
        self._engine = engine
        self.problems: list[str] = []

    async def begin_run(
        self, layout: Layout, run: int, results: Sequence[str], *, reset: bool
    ) -> None:
        """See Workspace."""
        self._check(layout, "reset" if reset else "prepared")
        await super().begin_run(layout, run, results, reset=reset)

    async def drop_outputs(self, layout: Layout) -> None:
        """See Workspace."""
        self._check(layout, "emptied")
        await super().drop_outputs(layout)

    async def remove(self, layout: Layout) -> None:
        """See Workspace."""
        self._check(layout, "removed")
        await super().remove(layout)

    def _check(self, layout: Layout, what: str) -> None:
        for run_id in self._engine.running():
            if run_id.rpartition(".")[0] == layout.root.name:
                self.problems.append(f"the directory of {run_id} was {what} while it ran")


class World:
    """A node's surroundings, and the agent in it, which may die and come back."""

    def __init__(
        self,
        loop: SimLoop,
        *,
        boundary: Boundary = no_boundary,
        ledger: Ledger | None = None,
        policy: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        **settings: Any,
    ) -> None:
        self.loop = loop
        self.clock = SimClock(loop)
        self.boot = 1
        self.ledger = ledger or MemoryLedger("ledger-1", boundary=boundary)
        self.engine = FakeEngine(self.clock, boundary=boundary)
        self.storage = FakeStorage(boundary=boundary)
        self.publisher = FakePublisher(boundary=boundary)
        self.workspace = CheckedWorkspace(self.engine, boundary=boundary)
        self.hub = Hub(self.clock)
        self.ids = CountingIds("session")
        self._policy = dict(policy or {})
        self._limits = limits or Limits()
        self._settings = settings
        self._task: asyncio.Task[None] | None = None
        self.inventory: Inventory | None = None
        self.agent: Agent | None = None

    @property
    def live(self) -> Agent:
        """The agent, which must be there."""
        assert self.agent is not None
        return self.agent

    @property
    def task(self) -> "asyncio.Task[None]":
        """The agent's life."""
        assert self._task is not None
        return self._task

    def start(self, *, is_up: bool = True) -> Agent:
        """Start an agent. Does not wait."""
        link = MemoryLink(self.hub.serve)
        self.hub.link = link
        self.agent = Agent(
            NODE,
            self.ledger,
            {"fake": self.engine},
            {"fake": self.storage},
            {"fake": self.publisher},
            self.workspace,
            link,
            self.clock,
            Random(1),
            self.ids,
            AgentSettings(
                boot=f"boot-{self.boot}",
                policy=Policy(**({"capacity": CAPACITY} | self._policy)),
                limits=self._limits,
                **self._settings,
            ),
            self.inventory,
        )
        link.set_up(is_up)
        self._task = self.loop.create_task(self.agent.run(), name="agent")
        return self.agent

    def kill(self) -> None:
        """The agent dies, wherever it is."""
        if self._task is not None:
            self._task.cancel()
            self.loop.run_until_idle()
        self._task = self.agent = None
        if isinstance(self.ledger, MemoryLedger):
            self.ledger.crash()

    def reboot(self) -> None:
        """The machine loses its power."""
        self.kill()
        self.boot += 1
        self.engine.reboot()

    def do(self, what: Awaitable[Any]) -> Any:
        """Let one thing be done; time passes as needed."""
        result = self.loop.run_until_complete(asyncio.ensure_future(what, loop=self.loop))
        self.loop.run_until_idle()
        return result

    def until(self, is_true: Callable[[], bool], seconds_max: float = 600.0) -> float:
        """Let time pass until something holds."""
        return self.loop.run_until(is_true, seconds_max=seconds_max)

    def until_final(self, *names: str, seconds_max: float = 600.0) -> list[Report]:
        """Until the hub holds final reports."""
        uids = [f"uid-{name}" for name in names]

        def are_final() -> bool:
            return all(u in self.hub.reports and self.hub.reports[u].phase.is_final for u in uids)

        self.until(are_final, seconds_max)
        return [self.hub.reports[uid] for uid in uids]


__all__ = [
    "CAPACITY", "EPOCH", "NODE", "CountingIds", "Hub", "World", "execution", "publication",
    "stopped",
]  # fmt: skip
