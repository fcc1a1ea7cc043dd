"""Stores what nodes report about executions, and keeps their contact, waits and orphans in order.

Facts come through the inbox and are acknowledged only once stored. What to store is decided in
`plan.py`.
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

from bacalhau_api.errors import InvalidError
from bacalhau_api.meta import Contact, Ref, Resource
from bacalhau_api.v1.execution import Desired, Execution, Report
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.node import Node
from bacalhau_controllers.contract import Clock, Result
from bacalhau_controllers.controller import Watch
from bacalhau_controllers.execution.plan import JOB_GONE, ExecutionPlan, View, plan
from bacalhau_controllers.inbox import FactInbox, Offer, split_offers
from bacalhau_controllers.lookup import ask_store, node_named, surely_job_of, surely_node_named
from bacalhau_controllers.node.presence import Presence
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Delete, Put, Why
from bacalhau_controllers.waitages import WaitAges

logger = logging.getLogger(__name__)

_ACTOR = "execution-reconciler"


class ExecutionReconciler:
    """Moves the status of executions. Reads `inbox` for facts about them."""

    name = "execution"
    workers = 64  # commits under way together share batches in the store

    def __init__(
        self,
        state: State,
        clock: Clock,
        inbox: FactInbox,
        presence: Presence,
        ages: WaitAges | None = None,
    ) -> None:
        self._state = state
        self._clock = clock
        self._inbox = inbox
        self._presence = presence
        self._ages = ages or WaitAges(clock)
        self.watches: Mapping[str, Watch] = {"Node": self._of_node, "Job": self._of_job}

    @asynccontextmanager
    async def term(self, wake: Callable[[Ref], None]) -> AsyncIterator[None]:
        """Accept facts while this process leads."""
        self._ages.clear()
        self._inbox.open("Execution", wake)
        try:
            yield
        finally:
            self._inbox.close("Execution")

    def is_settled(self, resource: Resource) -> bool:
        """True once the node has reported the end."""
        return isinstance(resource, Execution) and resource.phase.is_final

    async def reconcile(self, ref: Ref) -> Result:
        """Store waiting facts, infer the rest."""
        offers = self._inbox.waiting(ref)
        execution = await self._find(ref, offers)
        if execution is None:
            self._inbox.drop(offers, "the execution does not exist")
            self._forget(ref)
            return Result()
        spec = execution.spec
        mine, others = split_offers(offers, execution.metadata.uid, spec.node)
        self._inbox.drop(others, f"the execution is another one, or not of this node: {spec.node}")
        view = View(
            node=await self._node(execution),
            job=await surely_job_of(
                self._state, execution.metadata.namespace, spec.job, spec.job_uid
            ),
            silence=self._presence.silence(spec.node),
            age=self._ages.of(execution.ref, execution.status.waiting),
        )
        reports = [o.fact.execution for o in mine if o.fact.execution is not None]
        todo = plan(execution, reports, view, self._clock.now())
        try:
            await self._apply(execution, todo)
        except InvalidError:
            # Too large to be stored. The end of an execution matters more than its last words.
            reports = [_without_words(report) for report in reports]
            if not reports:
                raise
            todo = plan(execution, reports, view, self._clock.now())
            await self._apply(execution, todo)
        self._inbox.settle(mine)
        return Result(requeue_after=todo.requeue_after)

    async def _find(self, ref: Ref, offers: Sequence[Offer]) -> Execution | None:
        """The execution. A fact that seems to speak of nothing is checked against the store."""
        cached = self._state.cache.get(ref)
        execution = cached if isinstance(cached, Execution) else None
        uid = execution.metadata.uid if execution else ""
        if any(offer.fact.uid != uid for offer in offers):
            return await ask_store(self._state, ref, Execution)
        return execution

    async def _node(self, execution: Execution) -> Node | None:
        """The node. That it is gone for good has to be certain before anything is called Lost."""
        name = execution.spec.node
        if execution.status.contact is Contact.LOST:
            return self._as_heard(node_named(self._state, name))
        return self._as_heard(await surely_node_named(self._state, name))

    def _as_heard(self, node: Node | None) -> Node | None:
        """The node with the ledger that it speaks from now. Its object may not say so yet, and what
        the new ledger reports is not what the old one has forgotten."""
        sighting = self._presence.sighting(node.name) if node is not None else None
        if node is None or sighting is None or sighting.incarnation == node.status.incarnation:
            return node
        now = self._clock.now()
        status = node.status.but(incarnation=sighting.incarnation, connected_since=now)
        return node.but(status=status)

    async def _apply(self, execution: Execution, todo: ExecutionPlan) -> None:
        """One commit, or none if nothing changes."""
        version = execution.metadata.resource_version
        if todo.delete:
            why = Why(_ACTOR, JOB_GONE, f"its job {execution.spec.job} does not exist")
            await self._state.commit([Delete(execution.ref, version)], why)
            logger.info("Deleted orphan", extra={"execution": str(execution.ref)})
            self._forget(execution.ref)
            return
        if todo.status.contact is Contact.LOST:
            self._presence.give_up(execution.ref)
        elif todo.status.phase.is_final:
            self._presence.settle(execution.ref)
        changed = execution
        if todo.status != execution.status:
            changed = changed.but(status=todo.status)
        if todo.stop:
            spec = execution.spec.but(desired=Desired.STOP, stop_reason=JOB_GONE)
            changed = changed.but(spec=spec)
        if changed is not execution:
            await self._state.commit([Put(changed, version)], _why(execution, changed))
            before, after = execution.status.waiting, todo.status.waiting
            self._ages.note(execution.ref, before, after)

    def _forget(self, ref: Ref) -> None:
        self._ages.forget(ref)
        self._presence.settle(ref)

    def _of_node(self, old: Resource | None, new: Resource | None) -> Iterable[Ref]:
        """A node's contact, membership or ledger changed: all that runs there is concerned."""
        if isinstance(old, Node) and isinstance(new, Node) and _view(old) == _view(new):
            return
        node = new or old
        if node is not None:
            for execution in self._state.cache.on_node(node.name, "Execution"):
                if not self.is_settled(execution):
                    yield execution.ref

    def _of_job(self, old: Resource | None, new: Resource | None) -> Iterable[Ref]:
        """A job came, went, or changed what it wants done about silence."""
        if isinstance(old, Job) and isinstance(new, Job):
            is_same = old.spec.disconnect == new.spec.disconnect
            if is_same and old.metadata.uid == new.metadata.uid:
                return
        for uid in dict.fromkeys(job.metadata.uid for job in (old, new) if job is not None):
            for execution in self._state.cache.owned_by(uid, "Execution"):
                yield execution.ref


def _view(node: Node) -> tuple[object, ...]:
    """What of a node matters to what runs there."""
    status = node.status
    return (node.spec.membership, status.contact, status.incarnation, status.connected_since)


def _without_words(report: Report) -> Report:
    """The same report without what makes it long."""
    return report.but(stdout_tail="", stderr_tail="", message=report.message[:200], waiting=None)


def _why(old: Execution, new: Execution) -> Why:
    """For the history: the node's word if it reported, else what is inferred."""
    report = new.status.report
    if report is not None and report != old.status.report:
        words = " ".join(word for word in (report.reason, report.message) if word)
        return Why(f"node:{new.spec.node}", str(report.phase), words)
    if new.status.contact is not old.status.contact:
        return Why(_ACTOR, f"Contact{new.status.contact}")
    if new.spec != old.spec:
        return Why(_ACTOR, JOB_GONE, f"its job {new.spec.job} does not exist")
    return Why(_ACTOR, "Waiting", new.status.waiting.what if new.status.waiting else "")
