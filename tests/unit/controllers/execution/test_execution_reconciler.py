"""The execution reconciler on a real store: acknowledgement, obsolete facts, races, throughput."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from bacalhau_api.errors import (
    ConflictError,
    InvalidError,
    OutcomeUnknownError,
    Problem,
    UnavailableError,
)
from bacalhau_api.meta import Contact, Resource
from bacalhau_api.v1.execution import Desired, Execution, Phase, Report
from bacalhau_api.wire import Fact
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.contract import Result
from bacalhau_controllers.execution import ExecutionReconciler, FactInbox
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.node import Presence
from bacalhau_controllers.store import Delete, Put, Why, Write
from tests.support.samples import Bench, execution, job, node, report
from tests.support.simclock import SimLoop


class FailingStore(MemoryStore):
    """Refuses everything, or what is large."""

    failure: Exception | None = None
    bytes_max: int | None = None

    async def commit(self, writes: Sequence[Write], why: Why) -> tuple[Resource | None, ...]:
        if self.failure:
            raise self.failure
        if self.bytes_max and any(
            isinstance(write, Put) and len(write.resource.encode()) > self.bytes_max
            for write in writes
        ):
            raise InvalidError([Problem("", "too large")])
        return await super().commit(writes, why)


class Desk:
    """A reconciler with an open inbox, on a bench with a job, its node and one execution."""

    def __init__(self, loop: SimLoop, store_type: type[MemoryStore] = FailingStore) -> None:
        self.loop = loop
        self.bench = Bench(loop, store_type)
        self.inbox = FactInbox()
        self.presence = Presence(self.bench.clock)
        self.reconciler = ExecutionReconciler(
            self.bench.state, self.bench.clock, self.inbox, self.presence
        )
        self.inbox.open("Execution", lambda ref: None)
        self.job = job()
        self.execution = execution(self.job)
        self.bench.put(self.job, node("n1"), node("n2"), self.execution)

    def offer(self, said: Report, *, node: str = "n1", **fields: Any) -> asyncio.Task[None]:
        meta = self.execution.metadata
        values = {"namespace": meta.namespace, "name": meta.name, "uid": meta.uid} | fields
        fact = Fact(seq=1, execution=said, **values)
        task = self.loop.create_task(self.inbox.offer(node, "ledger-1", fact))
        self.loop.run_until_idle()
        return task

    def reconcile(self) -> Result:
        result = self.loop.run_until_complete(self.reconciler.reconcile(self.execution.ref))
        self.loop.run_until_idle()
        assert isinstance(result, Result)
        return result

    @property
    def stored(self) -> Execution:
        found = self.bench.stored(self.execution)
        assert isinstance(found, Execution)
        return found


def test_facts_are_acknowledged_after_the_commit_and_all_at_once() -> None:
    with SimLoop() as loop:
        desk = Desk(loop)
        offers = [desk.offer(report(p, i)) for i, p in enumerate([Phase.PREPARING, Phase.RUNNING])]
        assert not any(o.done() for o in offers)
        before = desk.bench.revisions(desk.execution)
        desk.reconcile()
        assert all(o.done() and o.exception() is None for o in offers)
        assert desk.stored.phase is Phase.RUNNING
        assert desk.bench.revisions(desk.execution) == before + 1
        history = loop.run_until_complete(desk.bench.store.history(desk.execution.ref))
        assert (history[-1].actor, history[-1].reason) == ("node:n1", "Running")


def test_a_fact_that_is_stored_already_is_acknowledged_without_a_write() -> None:
    with SimLoop() as loop:
        desk = Desk(loop)
        desk.offer(report(Phase.SUCCEEDED, 5))
        desk.reconcile()
        before = desk.bench.revisions(desk.execution)
        again = [desk.offer(report(Phase.SUCCEEDED, 5)), desk.offer(report(Phase.RUNNING, 4))]
        desk.reconcile()
        assert all(o.done() and o.exception() is None for o in again)
        assert desk.bench.revisions(desk.execution) == before


def test_a_write_that_fails_leaves_the_fact_waiting() -> None:
    with SimLoop() as loop:
        desk = Desk(loop)
        store = desk.bench.store
        assert isinstance(store, FailingStore)
        offer = desk.offer(report(Phase.SUCCEEDED))
        store.failure = UnavailableError("down")
        with pytest.raises(UnavailableError):
            desk.reconcile()
        assert not offer.done()
        store.failure = None
        desk.reconcile()
        assert offer.done()
        assert desk.stored.phase is Phase.SUCCEEDED


@pytest.mark.parametrize(
    ("node_name", "fields"),
    [
        pytest.param("n1", {"uid": "an earlier one"}, id="another uid"),
        pytest.param("n2", {}, id="not its node"),
    ],
)
def test_facts_that_are_not_about_it_are_never_applied(
    node_name: str, fields: dict[str, str]
) -> None:
    with SimLoop() as loop:
        desk = Desk(loop)
        offer = desk.offer(report(Phase.SUCCEEDED), node=node_name, **fields)
        desk.reconcile()
        assert offer.done()
        assert offer.exception() is None
        assert desk.inbox.obsolete == 1
        assert desk.stored.phase is Phase.PENDING


def test_facts_about_what_is_gone_are_obsolete() -> None:
    with SimLoop() as loop:
        desk = Desk(loop)
        delete = Delete(desk.execution.ref, desk.stored.metadata.resource_version)
        loop.run_until_complete(desk.bench.store.commit([delete], Why("user", "Test")))
        loop.run_until_idle()
        offer = desk.offer(report(Phase.SUCCEEDED))
        desk.reconcile()
        assert offer.done()
        assert offer.exception() is None


def test_a_view_that_lags_does_not_make_a_result_obsolete() -> None:
    """A finished execution that the cache has not seen yet: the store is asked."""
    with SimLoop() as loop:
        desk = Desk(loop)
        desk.bench.state.cache = Cache()  # knows nothing
        loop.run_until_complete(desk.bench.state.commit([], Why("test", "Nothing")))
        offer = desk.offer(report(Phase.SUCCEEDED))
        desk.reconcile()
        assert offer.done()
        assert desk.stored.phase is Phase.SUCCEEDED
        assert desk.stored.status.contact is Contact.REACHABLE  # its node is not gone either
        assert desk.stored.spec.desired is Desired.RUN  # nor is its job


def test_the_end_is_stored_even_if_its_words_do_not_fit() -> None:
    with SimLoop() as loop:
        desk = Desk(loop)
        store = desk.bench.store
        assert isinstance(store, FailingStore)
        store.bytes_max = 4000
        words = report(Phase.FAILED).but(stderr_tail="x" * 5000, message="y" * 5000, exit_code=3)
        offer = desk.offer(words)
        desk.reconcile()
        assert offer.done()
        stored = desk.stored.status.report
        assert stored
        assert (stored.phase, stored.exit_code, stored.stderr_tail) == (Phase.FAILED, 3, "")


def test_orphans_end() -> None:
    with SimLoop() as loop:
        desk = Desk(loop)
        desk.offer(report(Phase.RUNNING))
        desk.reconcile()
        gone = desk.bench.stored(desk.job)
        assert gone
        delete = Delete(gone.ref, gone.metadata.resource_version)
        loop.run_until_complete(desk.bench.store.commit([delete], Why("user", "Test")))
        loop.run_until_idle()
        desk.reconcile()
        assert (desk.stored.spec.desired, desk.stored.spec.stop_reason) == (Desired.STOP, "JobGone")
        desk.offer(report(Phase.STOPPED, 2))
        desk.reconcile()
        assert desk.bench.stored(desk.execution) is None


def test_another_job_of_the_same_name_does_not_adopt() -> None:
    with SimLoop() as loop:
        desk = Desk(loop)
        desk.bench.put(job(uid="the next one"))
        desk.reconcile()
        assert desk.stored.spec.desired is Desired.STOP


def test_a_write_in_between_is_not_overwritten() -> None:
    """The job reconciler asks it to stop while a report is being stored."""
    with SimLoop() as loop:
        desk = Desk(loop)
        offer = desk.offer(report(Phase.RUNNING))
        current = desk.stored
        stopped = current.but(spec=current.spec.but(desired=Desired.STOP))
        put = Put(stopped, current.metadata.resource_version)
        # Straight to the store, so that the cache does not know yet.
        writing = loop.create_task(desk.bench.store.commit([put], Why("job", "Stop")))
        reconciling = loop.create_task(desk.reconciler.reconcile(desk.execution.ref))
        loop.run_until_idle()
        assert writing.done()
        assert isinstance(reconciling.exception(), ConflictError)
        assert not offer.done()
        desk.reconcile()
        assert offer.done()
        assert (desk.stored.phase, desk.stored.spec.desired) == (Phase.RUNNING, Desired.STOP)


def test_what_is_to_be_lost_is_given_up_before_that_is_stored() -> None:
    """Its node may come back meanwhile, and ask what it has to do."""
    with SimLoop() as loop:
        desk = Desk(loop)
        store, ref = desk.bench.store, desk.execution.ref
        assert isinstance(store, FailingStore)
        desk.reconcile()
        assert not desk.presence.is_given_up(ref)
        (gone,) = [item for item in desk.bench.cache.list("Node") if item.name == "n1"]
        delete = Delete(gone.ref, gone.metadata.resource_version)
        loop.run_until_complete(desk.bench.state.commit([delete], Why("test", "Test")))
        store.failure = OutcomeUnknownError("no answer")
        with pytest.raises(OutcomeUnknownError):
            desk.reconcile()
        assert desk.presence.is_given_up(ref)
        store.failure = None
        desk.reconcile()
        assert desk.stored.status.contact is Contact.LOST
        desk.offer(report(Phase.STOPPED))
        desk.reconcile()
        assert not desk.presence.is_given_up(ref)


def test_which_changes_concern_an_execution() -> None:
    with SimLoop() as loop:
        desk = Desk(loop)
        of_node = desk.reconciler.watches["Node"]
        of_job = desk.reconciler.watches["Job"]
        here, ref = node("n1"), desk.execution.ref
        info = here.but(status=here.status.but(info=here.status.info.but(version="2")))
        silent = node("n1", contact=Contact.UNKNOWN)
        assert list(of_node(here, info)) == []
        assert list(of_node(here, silent)) == [ref]
        assert list(of_node(here, None)) == [ref]
        assert list(of_node(node("n2"), None)) == []
        spec = desk.job.spec
        held = desk.job.but(spec=spec.but(disconnect=spec.disconnect.but(action="hold")))
        assert list(of_job(desk.job, desk.job.with_meta(labels={"a": "b"}))) == []
        assert list(of_job(desk.job, held)) == [ref]
        assert list(of_job(desk.job, None)) == [ref]
        desk.offer(report(Phase.SUCCEEDED))
        desk.reconcile()
        assert list(of_node(here, silent)) == []  # nothing more can happen to it
        assert list(of_job(desk.job, None)) == [ref]  # but it is to be cleaned up
        assert desk.reconciler.is_settled(desk.stored)
        assert not desk.reconciler.is_settled(desk.execution)


def test_a_step_of_the_clock_ends_no_wait() -> None:
    with SimLoop() as loop:
        desk = Desk(loop)
        desk.reconcile()
        assert desk.stored.status.waiting
        before = desk.bench.revisions(desk.execution)
        desk.bench.clock.set_forward(86_400)
        result = desk.reconcile()
        assert result.requeue_after == pytest.approx(60)
        assert desk.bench.revisions(desk.execution) == before
        loop.advance(61)
        desk.reconcile()
        assert desk.stored.status.contact is Contact.UNKNOWN  # by its own clock, it is due


def test_leaving_office_sends_facts_back() -> None:
    with SimLoop() as loop:
        desk = Desk(loop)

        async def term() -> asyncio.Task[None]:
            async with AsyncExitStack() as sources:
                await sources.enter_async_context(desk.reconciler.term(lambda ref: None))
                fact = Fact(
                    seq=1, namespace="d", name="x", uid="u", execution=report(Phase.RUNNING)
                )
                offer = asyncio.create_task(desk.inbox.offer("n1", "i", fact))
                await asyncio.sleep(0)
            await asyncio.wait({offer})
            return offer

        offer = loop.run_until_complete(term())
        assert isinstance(offer.exception(), UnavailableError)


def test_facts_of_many_executions_are_committed_side_by_side() -> None:
    """So that the store can put them into one batch."""
    peak = under_way = 0

    class SlowStore(MemoryStore):
        async def commit(self, writes: Sequence[Write], why: Why) -> tuple[Resource | None, ...]:
            nonlocal peak, under_way
            under_way += 1
            peak = max(peak, under_way)
            await asyncio.sleep(0.01)
            under_way -= 1
            return await super().commit(writes, why)

    with SimLoop() as loop:
        desk = Desk(loop, SlowStore)
        many = [execution(desk.job, partition=i) for i in range(1, 33)]
        desk.bench.put(*many)
        peak = 0
        offers = [desk.offer(report(Phase.RUNNING), name=e.name, uid=e.metadata.uid) for e in many]
        for each in many:
            loop.create_task(desk.reconciler.reconcile(each.ref))
        loop.advance(0.02)
        assert all(o.done() for o in offers)
        assert peak == 32
