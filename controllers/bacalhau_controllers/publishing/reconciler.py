"""Stores what nodes report about publications, and keeps their contact, waits and orphans in
order. Publishing itself happens on the node."""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

from bacalhau_api.meta import Ref, Resource
from bacalhau_api.v1.execution import Desired, Execution, Publication
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.node import Node
from bacalhau_controllers.contract import Clock, Result
from bacalhau_controllers.controller import Watch
from bacalhau_controllers.inbox import FactInbox, Offer, split_offers
from bacalhau_controllers.lookup import ask_store, surely_job_of, surely_node_named
from bacalhau_controllers.node.presence import Presence
from bacalhau_controllers.publishing.plan import PublicationPlan, View, plan
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Delete, Put, Why
from bacalhau_controllers.waitages import WaitAges

logger = logging.getLogger(__name__)

_ACTOR = "publishing-reconciler"


class PublishingReconciler:
    """Moves the status of publications. Reads `inbox` for facts about them."""

    name = "publishing"
    workers = 32  # commits under way together share batches in the store

    def __init__(self, state: State, clock: Clock, inbox: FactInbox, presence: Presence) -> None:
        self._state = state
        self._clock = clock
        self._inbox = inbox
        self._presence = presence
        self._ages = WaitAges(clock)
        self.watches: Mapping[str, Watch] = {
            "Node": self._of_node,
            "Job": self._of_job,
            "Execution": _of_execution,
        }

    @asynccontextmanager
    async def term(self, wake: Callable[[Ref], None]) -> AsyncIterator[None]:
        """Accept facts while this process leads."""
        self._ages.clear()
        self._inbox.open("Publication", wake)
        try:
            yield
        finally:
            self._inbox.close("Publication")

    def is_settled(self, resource: Resource) -> bool:
        """True once the node has reported the end."""
        return isinstance(resource, Publication) and resource.status.phase.is_final

    async def reconcile(self, ref: Ref) -> Result:
        """Store waiting facts, infer the rest."""
        offers = self._inbox.waiting(ref)
        publication = await self._find(ref, offers)
        if publication is None:
            self._inbox.drop(offers, "the publication does not exist")
            self._ages.forget(ref)
            return Result()
        node = publication.spec.node
        mine, others = split_offers(offers, publication.metadata.uid, node)
        self._inbox.drop(others, f"the publication is another one, or not of this node: {node}")
        reports = [o.fact.publication for o in mine if o.fact.publication is not None]
        todo = plan(publication, reports, await self._view(publication), self._clock.now())
        await self._apply(publication, todo)
        self._inbox.settle(mine)
        return Result(requeue_after=todo.requeue_after)

    async def _find(self, ref: Ref, offers: Sequence[Offer]) -> Publication | None:
        """The publication. A fact that seems to speak of nothing is checked against the store."""
        cached = self._state.cache.get(ref)
        publication = cached if isinstance(cached, Publication) else None
        uid = publication.metadata.uid if publication else ""
        if any(offer.fact.uid != uid for offer in offers):
            return await ask_store(self._state, ref, Publication)
        return publication

    async def _view(self, publication: Publication) -> View:
        spec, namespace = publication.spec, publication.metadata.namespace
        return View(
            node=await surely_node_named(self._state, spec.node),
            has_job=await surely_job_of(self._state, namespace, spec.job, spec.job_uid) is not None,
            has_execution=await self._has_execution(publication),
            silence=self._presence.silence(spec.node),
            age=self._ages.of(publication.ref, publication.status.waiting),
        )

    async def _has_execution(self, publication: Publication) -> bool:
        spec = publication.spec
        ref = Ref("Execution", publication.metadata.namespace, spec.execution)
        found: Resource | None = self._state.cache.get(ref)
        if found is None:
            found = await ask_store(self._state, ref, Execution)
        return found is not None and found.metadata.uid == spec.execution_uid

    async def _apply(self, publication: Publication, todo: PublicationPlan) -> None:
        """One commit, or none if nothing changes."""
        version = publication.metadata.resource_version
        if todo.delete:
            why = Why(_ACTOR, "JobGone", f"its job {publication.spec.job} does not exist")
            await self._state.commit([Delete(publication.ref, version)], why)
            logger.info("Deleted orphan", extra={"publication": str(publication.ref)})
            self._ages.forget(publication.ref)
            return
        changed = publication
        if todo.status != publication.status:
            changed = changed.but(status=todo.status)
        if todo.stop:
            changed = changed.but(spec=publication.spec.but(desired=Desired.STOP))
        if changed is not publication:
            await self._state.commit([Put(changed, version)], _why(publication, changed))
            before, after = publication.status.waiting, todo.status.waiting
            self._ages.note(publication.ref, before, after)

    def _of_node(self, old: Resource | None, new: Resource | None) -> Iterable[Ref]:
        if isinstance(old, Node) and isinstance(new, Node) and _view_of(old) == _view_of(new):
            return
        node = new or old
        if node is not None:
            yield from self._open(self._state.cache.on_node(node.name, "Publication"))

    def _of_job(self, old: Resource | None, new: Resource | None) -> Iterable[Ref]:
        """A job that went leaves orphans, final ones too."""
        if isinstance(old, Job) and (new is None or new.metadata.uid != old.metadata.uid):
            for publication in self._state.cache.owned_by(old.metadata.uid, "Publication"):
                yield publication.ref

    def _open(self, publications: Iterable[Resource]) -> Iterable[Ref]:
        return [p.ref for p in publications if not self.is_settled(p)]


def _of_execution(old: Resource | None, new: Resource | None) -> Iterable[Ref]:
    """An execution that went takes its outputs along. A publication has its name."""
    if isinstance(old, Execution) and new is None:
        yield Ref("Publication", old.metadata.namespace, old.name)


def _view_of(node: Node) -> tuple[object, ...]:
    """What of a node matters to what it publishes."""
    status = node.status
    return (node.spec.membership, status.contact, status.incarnation, status.connected_since)


def _why(old: Publication, new: Publication) -> Why:
    """For the history: the node's word if it reported, else what is inferred."""
    report = new.status.report
    if report is not None and report != old.status.report:
        words = " ".join(word for word in (report.reason, report.message) if word)
        return Why(f"node:{new.spec.node}", str(report.phase), words)
    if new.status.contact is not old.status.contact:
        return Why(_ACTOR, f"Contact{new.status.contact}")
    if new.spec != old.spec:
        return Why(_ACTOR, "OutputsGone", "its job or its execution does not exist")
    return Why(_ACTOR, "Waiting", new.status.waiting.what if new.status.waiting else "")
