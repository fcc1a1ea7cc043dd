"""What would follow from a change: the job reconciler itself, run on a copy of all objects.

Nothing is decided here. The reconciler plans and commits as always, into a store in memory that
ends with the forecast. What nodes would do is assumed: a node that can be reached does as it is told
at once, what runs to completion goes on running, a service is there when it has started. Time passes
only while it brings the change further (a rollout that waits for new executions to prove
themselves), so what would have happened anyway is not part of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from bacalhau_api.errors import ConflictError, TerminalError
from bacalhau_api.meta import Contact, Ref, Resource
from bacalhau_api.v1.execution import Desired, Execution, Phase, Report
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.node import Node
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.job import JobReconciler, JobSettings
from bacalhau_controllers.job.allowance import QUOTA
from bacalhau_controllers.job.pins import needs_pins
from bacalhau_controllers.job.placing import CAPACITY
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.placement import RuleFinding
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Changed, Cursor, Put, Synced, Why, Write

_WHY = Why("forecast", "Assumed")
_WRITES_MAX = 200

ROLLOUT: Final = "Rollout"
"""What a job waits for while a new generation takes over."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a forecast looks. Counts, so that it does not depend on the machine."""

    reconciles_max: int = 2000
    executions_max: int = 3000


class Moment:
    """A clock that stands still until it is moved."""

    def __init__(self, now: datetime, monotonic: float = 0.0) -> None:
        self._now = now
        self._monotonic = monotonic

    def now(self) -> datetime:
        """The present moment of the forecast."""
        return self._now

    def monotonic(self) -> float:
        """Seconds."""
        return self._monotonic

    async def sleep(self, seconds: float) -> None:
        """Time passes at once."""
        self.move(seconds)

    def move(self, seconds: float) -> None:
        """Let time pass."""
        self._now += timedelta(seconds=seconds)
        self._monotonic += seconds


@dataclass(slots=True)
class Outcome:
    """What followed.

    `started` and `stopped` are executions in the order of events, `stopped` as they were told to;
    `lost` were given up with their node. `touched` are the jobs that were looked at. `cut`: there is
    more, but the forecast ended.
    """

    started: list[Execution] = field(default_factory=list)
    stopped: list[Execution] = field(default_factory=list)
    lost: list[Execution] = field(default_factory=list)
    touched: dict[Ref, None] = field(default_factory=dict)
    cut: bool = False


class World:
    """A copy of all objects, with a job reconciler of its own. Not for use by two tasks at once."""

    def __init__(
        self,
        objects: Iterable[Resource],
        now: datetime,
        *,
        settings: JobSettings | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.clock = Moment(now)
        self.settings = settings or JobSettings()
        self._limits = limits or Limits()
        held = tuple(objects)
        self.store = MemoryStore(self.clock, epoch="forecast", objects=held)
        self.cache = Cache()
        for item in held:
            self.cache.apply(Changed(item))
        # One revision below the next write, so that the cache takes what is written from here on.
        newest = max((item.metadata.resource_version for item in held), default=0)
        self.cache.apply(Synced(Cursor("forecast", newest)))
        self.state = State(self.store, self.cache)
        self.reconciler = JobReconciler(
            self.state, self.clock, settings=self.settings, is_rehearsal=True
        )
        self.outcome = Outcome()
        self._due: dict[Ref, float] = {}
        self._todo: dict[Ref, None] = {}
        self._reconciles = 0
        self._moved_at = self.clock.monotonic()
        self._events = self._swept = 0
        self.cache.observe(self._observe)

    async def explain(self, job: Job, node: Node) -> tuple[RuleFinding, ...]:
        """What each placement rule says of a job and a node now."""
        async with self.reconciler.term(self._wake):
            self._line_up()
            return self.reconciler.explain(job, node)

    async def commit(self, writes: Sequence[Write]) -> None:
        """Make a change. Raises ConflictError if the copy is of another moment."""
        for begin in range(0, len(writes), _WRITES_MAX):
            await self.state.commit(writes[begin : begin + _WRITES_MAX], _WHY)

    async def run(self, writes: Sequence[Write], also: Iterable[Ref] = ()) -> Outcome:
        """Make a change, and see what follows. `also` are jobs to look at besides."""
        async with self.reconciler.term(self._wake):
            self._line_up()
            await self.commit(writes)
            for ref in also:
                self._wake(ref)
            while await self._step():
                pass
        return self.outcome

    def _line_up(self) -> None:
        """Have jobs stand in line that a term alone does not know of: there, each is looked at
        when it begins."""
        for job in self.cache.list("Job"):
            if not isinstance(job, Job):
                continue
            is_in_line = _waits(job, CAPACITY) and not job.spec.type.is_per_node
            if not is_in_line and any(_waits(job, what) for what in (CAPACITY, QUOTA, ROLLOUT)):
                self.reconciler.line_up(job)

    async def _step(self) -> bool:
        """Let the reconciler finish, then nodes act, then time pass. False at the end."""
        while self._todo:
            if self._is_beyond():
                self.outcome.cut = True
                return False
            ref = next(iter(self._todo))
            del self._todo[ref]
            await self._reconcile(ref)
        return await self._nodes_act() or self._sweep() or self._pass_time()

    async def _reconcile(self, ref: Ref) -> None:
        self._reconciles += 1
        self.outcome.touched[ref] = None
        self._due.pop(ref, None)
        try:
            result = await self.reconciler.reconcile(ref)
        except ConflictError:
            self._todo[ref] = None
            return
        except TerminalError:  # said of the job by whoever reads its status; it does not move
            return
        if result.requeue_after is not None:
            if result.requeue_after <= 0:
                self._todo[ref] = None
            self._due[ref] = self.clock.monotonic() + result.requeue_after

    def _is_beyond(self) -> bool:
        limits = self._limits
        return (
            self._reconciles >= limits.reconciles_max
            or len(self.outcome.started) >= limits.executions_max
        )

    # -- what nodes are assumed to do ------------------------------------------------------------

    async def _nodes_act(self) -> bool:
        moves = sorted(self._moves(), key=_order)
        # While jobs wait for room it matters who learns of it first: then one word at a time.
        if self.reconciler.has_waiting:
            moves = moves[:1]
        writes = [Put(e, e.metadata.resource_version) for e in moves]
        await self.commit(writes)
        return bool(writes)

    def _moves(self) -> Iterator[Execution]:
        for ref in self.outcome.touched:
            for execution in self._executions_of(ref):
                node = self.cache.get(Ref("Node", "", execution.spec.node))
                can_hear = isinstance(node, Node) and node.status.contact is Contact.REACHABLE
                is_there = execution.status.contact is Contact.REACHABLE
                if not (can_hear and is_there) or execution.phase.is_final:
                    continue
                if execution.spec.desired is Desired.STOP:
                    yield self._reported(execution, Phase.STOPPED)
                elif (
                    not execution.spec.job_type.runs_to_completion
                    and execution.phase is not Phase.RUNNING
                ):
                    yield self._reported(execution, Phase.RUNNING)
                elif execution.phase is Phase.PENDING and needs_pins(execution.spec.task):
                    yield self._reported(execution, Phase.PREPARING)

    def _executions_of(self, ref: Ref) -> Iterator[Execution]:
        job = self.cache.get(ref)
        if isinstance(job, Job):
            for item in self.cache.owned_by(job.metadata.uid, "Execution"):
                if isinstance(item, Execution):
                    yield item

    def _reported(self, execution: Execution, phase: Phase) -> Execution:
        old, now = execution.status.report, self.clock.now()
        report = Report(
            step=old.step + 1 if old else 1,
            incarnation=old.incarnation if old else "forecast",
            phase=phase,
            started_at=old.started_at if old and old.started_at else now,
            finished_at=now if phase.is_final else None,
            pins=_pins(execution),
        )
        return execution.but(status=execution.status.but(report=report, waiting=None))

    def _sweep(self) -> bool:
        """Look again at rollouts that may have waited for room which is free now: nobody wakes
        them, but the sweep finds them. Once for everything that happened."""
        if self._swept == self._events:
            return False
        self._swept = self._events
        ended = [*self.outcome.stopped, *self.outcome.lost]
        nodes = dict.fromkeys(e.spec.node for e in ended)
        for node in nodes:
            for execution in self.cache.on_node(node, "Execution"):
                if isinstance(execution, Execution) and not execution.phase.is_final:
                    ref = Ref("Job", execution.ref.namespace, execution.spec.job)
                    job = self.cache.get(ref)
                    if isinstance(job, Job) and _waits(job, ROLLOUT):
                        self._wake(ref)
        return bool(self._todo)

    def _pass_time(self) -> bool:
        """Move on to the next moment at which something is due, if it still belongs together."""
        patience = self.settings.ready_seconds + 1.0
        due = min(self._due.values(), default=None)
        if due is None or due > self._moved_at + patience:
            return False
        self.clock.move(max(due - self.clock.monotonic(), 0.0))
        for ref, at in list(self._due.items()):
            if at <= self.clock.monotonic():
                del self._due[ref]
                self._todo[ref] = None
        return True

    # -- what happens ----------------------------------------------------------------------------

    def _wake(self, ref: Ref) -> None:
        self._todo[ref] = None

    def _observe(self, old: Resource | None, new: Resource | None) -> None:
        changed = new or old
        assert changed is not None
        if isinstance(changed, Job):
            self._wake(changed.ref)
        elif (watch := self.reconciler.watches.get(changed.kind)) is not None:
            for ref in watch(old, new):
                self._wake(ref)
        if isinstance(new, Execution):
            self._note(old if isinstance(old, Execution) else None, new)

    def _note(self, old: Execution | None, new: Execution) -> None:
        if old is None:
            self.outcome.started.append(new)
        elif old.spec.desired is Desired.RUN and new.spec.desired is Desired.STOP:
            self.outcome.stopped.append(new)
        elif old.status.contact is not Contact.LOST and new.status.contact is Contact.LOST:
            self.outcome.lost.append(new)
        else:
            return
        self._moved_at = self.clock.monotonic()
        self._events += 1


def _order(execution: Execution) -> tuple[int, str, int, str]:
    """A fixed one: which node is faster nobody knows."""
    spec = execution.spec
    return spec.slot.generation, str(spec.slot), spec.attempt, execution.name


def _pins(execution: Execution) -> dict[str, str]:
    """What a node would find out about the image: that it means something."""
    if not needs_pins(execution.spec.task):
        return {}
    image = str(execution.spec.task.engine.params.get("image"))
    return {image: f"{image}@sha256:{'0' * 64}"}


def _waits(job: Job, what: str) -> bool:
    """Whether a job waits for this."""
    waiting = job.status.waiting
    return job.is_observed and waiting is not None and waiting.what == what
