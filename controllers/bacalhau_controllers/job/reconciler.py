"""Carries plans out: reads the cache, plans, commits once, and keeps the node table and the queue.

All that decides is in `plan.py`. Several jobs are reconciled at the same time in one process; a
plan is made without a pause in between, so what it sets aside cannot be given out twice.
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from bacalhau_api.errors import ConflictError, InvalidError, TerminalError
from bacalhau_api.meta import Ref, Resource
from bacalhau_api.v1.execution import Acceptance, Execution, Phase, Publication
from bacalhau_api.v1.job import Job, JobType
from bacalhau_api.v1.namespace import Namespace
from bacalhau_api.v1.node import Node
from bacalhau_controllers.contract import Clock, Result
from bacalhau_controllers.controller import Watch, owners_of_kind
from bacalhau_controllers.job import status
from bacalhau_controllers.job.allowance import QUOTA, Allowance
from bacalhau_controllers.job.draft import Plan, Queued
from bacalhau_controllers.job.owned import Owned
from bacalhau_controllers.job.placing import CAPACITY, request_of, slot_keys
from bacalhau_controllers.job.plan import Inputs, plan
from bacalhau_controllers.job.queue import WAKES_MAX, Ranking, WaitQueue, rank_of
from bacalhau_controllers.job.settings import JobSettings
from bacalhau_controllers.lookup import ask_store
from bacalhau_controllers.placement import Key, NodeTable, RuleFinding, evaluate
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Put, Why
from bacalhau_controllers.waitages import WaitAges

logger = logging.getLogger(__name__)

_ACTOR = "job-reconciler"


@dataclass(frozen=True, slots=True)
class _Doubt:
    """A commit that was not answered: the job's revision that it expects, and what it creates."""

    job_version: int
    keys: tuple[Key, ...]


class JobReconciler:
    """Moves jobs: slots to executions, results to acceptances and publications.

    `nodes` is the scheduler's view of all nodes, kept up to date by this reconciler from the
    moment it is made. `ages` are those that the execution reconciler of this process goes by. With
    `is_rehearsal` nothing is logged: what it does to a copy of the objects has not happened.
    """

    name = "job"

    def __init__(
        self,
        state: State,
        clock: Clock,
        *,
        settings: JobSettings | None = None,
        nodes: NodeTable | None = None,
        ages: WaitAges | None = None,
        is_rehearsal: bool = False,
    ) -> None:
        self._state = state
        self._clock = clock
        self._settings = settings or JobSettings()
        self._ages = ages
        self._is_rehearsal = is_rehearsal
        self.nodes = nodes if nodes is not None else NodeTable()
        self.queue = WaitQueue(self.nodes)
        self._wake: Callable[[Ref], None] | None = None
        # Places set aside by a plan whose commit ended in doubt, by job.
        self._in_doubt: dict[Ref, _Doubt] = {}
        owners = owners_of_kind("Job")
        self.watches: Mapping[str, Watch] = {
            "Execution": owners,
            "Acceptance": owners,
            "Publication": owners,
            "Node": self._of_node,
        }
        # Jobs that wait for room in their namespace, and bytes of outputs kept in each.
        self._over_quota: dict[str, Ranking] = {}
        self._stored: dict[str, int] = {}
        # Nodes on which the next generation of a job has no room, even without the present one.
        self._blocked: dict[Ref, frozenset[str]] = {}
        # Jobs that follow every node: kept apart, so that a node's change does not walk all jobs.
        self._daemons: dict[Ref, None] = {}
        # By the job's uid. The same objects as in the cache, grouped.
        self._owned: dict[str, Owned] = {}
        for kind in ("Namespace", "Node", "Execution", "Acceptance", "Publication", "Job"):
            for resource in state.cache.list(kind):
                self._observe(None, resource)
        state.cache.observe(self._observe)

    @asynccontextmanager
    async def term(self, wake: Callable[[Ref], None]) -> AsyncIterator[None]:
        """While this process leads, jobs that wait for a place are woken by what may help them."""
        self.queue.clear()
        self._over_quota.clear()
        self._blocked.clear()
        for resource in self._state.cache.list("Job"):
            self._enqueue_known(resource)
        self._wake = wake
        try:
            yield
        finally:
            self._wake = None

    def is_settled(self, resource: Resource) -> bool:
        """True for a job that is over."""
        return isinstance(resource, Job) and resource.is_over and not resource.is_deleting

    async def reconcile(self, ref: Ref) -> Result:
        """Plan one job and commit the plan."""
        await self._settle_doubt(ref)
        job = self._state.cache.get(ref)
        if not isinstance(job, Job):  # deleted since it was queued
            self._leave_queue(ref)
            return Result()
        try:
            todo = self._plan(job)
        except TerminalError:
            self._leave_queue(ref)
            raise
        await self._commit(job, todo)
        return Result(requeue_after=todo.requeue_after)

    def plan(self, job: Job) -> Plan:
        """What would be done about a job now: nothing is written, no place is kept."""
        with self.nodes.rehearsal():
            return plan(self._inputs(job))

    @property
    def has_waiting(self) -> bool:
        """Whether any job waits for room, on a node or in its namespace."""
        return bool(len(self.queue) or self._over_quota)

    def line_up(self, job: Job) -> None:
        """Have a job that waits stand in line, as if it had been looked at in this term; nothing
        is done about it."""
        todo, rank = self.plan(job), rank_of(job, self._clock.now())
        if todo.queued is not None:
            self.queue.put(job.ref, rank, todo.queued, self._clock.monotonic())
        if todo.is_over_quota:
            self._over_quota.setdefault(job.metadata.namespace, Ranking()).put(job.ref, rank)

    def explain(self, job: Job, node: Node) -> tuple[RuleFinding, ...]:
        """What each placement rule says of a job and a node now, those that are fine included."""
        owned = self._owned.get(job.metadata.uid) or Owned()
        generation = owned.groups.get(job.metadata.generation)
        rank = rank_of(job, self._clock.now())
        held = self.queue.held(job.ref, rank, self._clock.monotonic())
        request = request_of(job, generation, self.nodes)
        near = self.nodes.near(slot_keys(job))
        return evaluate(
            job, node, self.nodes, request=request, held=held.get(node.name, ""), near=near
        )

    def _inputs(self, job: Job) -> Inputs:
        now = self._clock.now()
        return Inputs(
            job=job,
            owned=self._owned.get(job.metadata.uid) or Owned(),
            nodes=self.nodes,
            now=now,
            held=self.queue.held(job.ref, rank_of(job, now), self._clock.monotonic()),
            allowance=self._allowance(job.metadata.namespace),
            settings=self._settings,
        )

    def _plan(self, job: Job) -> Plan:
        inputs = self._inputs(job)
        todo = plan(inputs)
        # At once, not after the commit: room that appears meanwhile has to find the job in line.
        rank = rank_of(job, inputs.now)
        if todo.queued is not None:
            self.queue.put(job.ref, rank, todo.queued, self._clock.monotonic())
        else:
            self._leave_queue(job.ref)
        if todo.is_over_quota:
            self._over_quota.setdefault(job.metadata.namespace, Ranking()).put(job.ref, rank)
        if todo.blocked_on:
            self._blocked[job.ref] = todo.blocked_on
        else:
            self._blocked.pop(job.ref, None)
        return todo

    async def _commit(self, job: Job, todo: Plan) -> None:
        writes = todo.writes()
        if not writes:
            return
        version = job.metadata.resource_version
        if todo.create and todo.job is None and todo.removes_job is None:
            writes += (Put(job, version),)  # see `_settle_doubt`
        # Should the answer get lost, the next reconcile of this job finds out what became of them.
        keys = tuple((e.metadata.namespace, e.name) for e in todo.create)
        self._in_doubt[job.ref] = _Doubt(version, keys)
        try:
            await self._state.commit(writes, Why(_ACTOR, todo.reason, todo.message))
        except (ConflictError, InvalidError):  # nothing written now, but perhaps by an earlier try
            await self._settle_doubt(job.ref, is_over=True)
            raise
        del self._in_doubt[job.ref]
        if self._ages is not None:
            for execution in todo.create:
                self._ages.note(execution.ref, None, execution.status.waiting)
        if not self._is_rehearsal:
            _log(job, todo)

    async def _settle_doubt(self, ref: Ref, *, is_over: bool = False) -> None:
        """Give back places whose executions were not stored after all.

        The store is asked, since the cache may not have heard yet: a place that is given back
        while its execution exists is given out twice. Nor may it come to exist later: a commit
        whose answer was lost can still be under way. It expects the job as it was, so writing the
        job once more settles the matter. With `is_over` it was answered.
        """
        doubt = self._in_doubt.get(ref)
        if doubt is None:
            return
        if doubt.keys and not is_over:
            job = await ask_store(self._state, ref, Job)
            if job is not None and job.metadata.resource_version == doubt.job_version:
                with suppress(ConflictError):  # or somebody else has written it
                    why = Why(_ACTOR, "Settled", "an earlier write was not answered")
                    await self._state.commit([Put(job, doubt.job_version)], why)
        for key in doubt.keys:
            execution = Ref("Execution", *key)
            is_known = self._state.cache.get(execution) is not None
            if not is_known and await ask_store(self._state, execution, Execution) is None:
                self.nodes.release(key)
        del self._in_doubt[ref]
        if doubt.keys:
            self._wake_waiting()

    def _allowance(self, namespace: str) -> Allowance | None:
        found = self._state.cache.get(Ref("Namespace", "", namespace))
        known = found if isinstance(found, Namespace) else None
        return Allowance.of(known, self._stored.get(namespace, 0))

    def _wake_namespace(self, namespace: str) -> None:
        """A namespace may have room now: the first in line are looked at, and those behind them
        when these have had their turn."""
        waiting = self._over_quota.get(namespace)
        if waiting is not None:
            self._wake_all(waiting.first(WAKES_MAX))

    def _leave_queue(self, ref: Ref) -> None:
        if (waiting := self._over_quota.get(ref.namespace)) is not None:
            waiting.remove(ref)
            if not waiting:
                del self._over_quota[ref.namespace]
        self._wake_all(self.queue.remove(ref))

    # -- what changes ----------------------------------------------------------------------------

    def _observe(self, old: Resource | None, new: Resource | None) -> None:
        changed = new or old
        if isinstance(changed, (Execution, Acceptance, Publication)):
            self._group(changed, is_there=new is not None)
        if isinstance(changed, (Node, Execution)):
            self.nodes.apply(old, new, self._now())
            self._wake_waiting()
        if isinstance(changed, Execution):
            self._note_usage(old, new, changed.metadata.namespace)
        elif isinstance(changed, Namespace):
            self._wake_namespace(changed.name)
        elif isinstance(changed, Job):
            if isinstance(new, Job) and _follows_nodes(new):
                self._daemons[new.ref] = None
            else:
                self._daemons.pop(changed.ref, None)
            if new is None:
                self._leave_queue(changed.ref)
                self._blocked.pop(changed.ref, None)

    def _note_usage(self, old: Resource | None, new: Resource | None, namespace: str) -> None:
        """Count the outputs that are kept, and wake who may go on where something ended."""
        more = _outputs_of(new) - _outputs_of(old)
        if more:
            self._stored[namespace] = self._stored.get(namespace, 0) + more
        was_open = isinstance(old, Execution) and not old.phase.is_final
        is_open = isinstance(new, Execution) and not new.phase.is_final
        if (was_open and not is_open) or more < 0:
            # Whose execution ended goes first: what was stopped to make room for its own successor
            # must not be given to somebody else.
            self._wake_all(self.watches["Execution"](old, new))
            self._wake_namespace(namespace)

    def _group(self, changed: Execution | Acceptance | Publication, *, is_there: bool) -> None:
        uid = changed.spec.job_uid
        owned = self._owned.setdefault(uid, Owned())
        if is_there:
            owned.put(changed)
            return
        owned.remove(changed)
        if owned.is_empty:
            del self._owned[uid]

    def _wake_waiting(self) -> None:
        improved = self.nodes.take_improved()
        if improved:
            self._wake_all(self.queue.improved(improved, self._clock.monotonic()))
            names = frozenset(improved)
            self._wake_all(ref for ref, on in tuple(self._blocked.items()) if on & names)

    def _wake_all(self, refs: Iterable[Ref]) -> None:
        if self._wake is not None:
            for ref in refs:
                self._wake(ref)

    def _of_node(self, old: Resource | None, new: Resource | None) -> Iterable[Ref]:
        """Daemons follow every node; other jobs only what concerns their own executions."""
        node = new or old
        if node is None or (
            isinstance(old, Node) and isinstance(new, Node) and _facts(old) == _facts(new)
        ):
            return
        yield from tuple(self._daemons)
        for execution in self._state.cache.on_node(node.name, "Execution"):
            is_open = isinstance(execution, Execution) and (
                not execution.phase.is_final or execution.phase is Phase.REJECTED
            )
            if is_open:
                yield from self.watches["Execution"](None, execution)

    def _enqueue_known(self, resource: Resource) -> None:
        """A job that was waiting under an earlier leader keeps its place in the line."""
        if not isinstance(resource, Job) or not status.is_of_generation(resource):
            return
        waiting = resource.status.waiting
        rank = rank_of(resource, self._clock.now())
        if waiting is not None and waiting.what == QUOTA:
            line = self._over_quota.setdefault(resource.metadata.namespace, Ranking())
            line.put(resource.ref, rank)
        is_partition = not resource.spec.type.is_per_node
        if waiting is None or waiting.what != CAPACITY or not is_partition:
            return
        owned = self._owned.get(resource.metadata.uid) or Owned()
        generation = owned.groups.get(resource.metadata.generation)
        request = request_of(resource, generation, self.nodes)
        queued = Queued(request, max(resource.status.slots.waiting, 1))
        self.queue.put(resource.ref, rank, queued, self._clock.monotonic())

    def _now(self) -> float:
        return self._clock.now().timestamp()


def _outputs_of(resource: Resource | None) -> int:
    """Bytes that an execution left on its node."""
    report = resource.status.report if isinstance(resource, Execution) else None
    return report.outputs.size_bytes if report is not None and report.outputs is not None else 0


def _follows_nodes(job: Job) -> bool:
    is_daemon = job.spec.type is JobType.DAEMON
    return is_daemon and not job.is_over


def _facts(node: Node) -> tuple[object, ...]:
    """What of a node matters to the jobs on it."""
    info = node.status.info
    return (
        node.spec.membership,
        node.spec.unschedulable,
        node.spec.drain,
        node.spec.taints,
        node.status.contact,
        node.status.connected_since,
        node.labels,
        # What is held comes and goes, and only matters when something is placed.
        info.but(held_inputs=()) if info.held_inputs else info,
    )


def _log(job: Job, todo: Plan) -> None:
    fields = {"job": str(job.ref), "reason": todo.reason}
    for execution in todo.create:
        placed = {"execution": execution.name, "node": execution.spec.node}
        logger.info("Created execution", extra=fields | placed)
    for acceptance in todo.accept:
        logger.info("Accepted result", extra=fields | {"execution": acceptance.spec.execution})
    for execution in todo.update:
        stop = {"execution": execution.name, "why": execution.spec.stop_reason}
        logger.info("Asked execution to stop", extra=fields | stop)
    if todo.job is not None and todo.job.status.phase is not job.status.phase:
        logger.info("Changed job phase", extra=fields | {"phase": str(todo.job.status.phase)})
