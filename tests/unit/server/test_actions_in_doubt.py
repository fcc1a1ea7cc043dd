"""A user's change whose answer got lost is tried again, but never on another object of that name."""

from collections.abc import Iterator, Sequence
from typing import cast

import pytest

from bacalhau.server.actions import Actions
from bacalhau.server.ports import Enrolment, NodeReader, Services
from bacalhau_api.errors import OutcomeUnknownError
from bacalhau_api.meta import Resource
from bacalhau_api.v1.job import Job
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.contract import Ids
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Delete, Put, Synced, Why, Write
from tests.support.runner import CountingIds
from tests.support.samples import job as sample_job
from tests.support.simclock import SimClock, SimLoop


class LosesAnswers(State):
    """After its next commit somebody deletes the job and makes another, if there is to be a
    successor, and the answer is lost."""

    def __init__(self, store: MemoryStore, cache: Cache) -> None:
        super().__init__(store, cache)
        self.is_armed = True
        self.successor: Job | None = SUCCESSOR
        self.lost: Resource | None = None

    async def commit(self, writes: Sequence[Write], why: Why) -> tuple[Resource | None, ...]:
        results = await self.store.commit(writes, why)
        if not self.is_armed:
            return results
        self.is_armed = False
        self.lost = left = results[0]
        if left is not None:
            await self.store.commit([Delete(left.ref, left.metadata.resource_version)], why)
        if self.successor is not None:
            await self.store.commit([Put(self.successor, 0)], why)
        raise OutcomeUnknownError("no answer")


FIRST = sample_job("j").with_meta(uid="1" * 32)
SUCCESSOR = sample_job("j").with_meta(uid="2" * 32)


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    with SimLoop() as made:
        yield made


def actions(loop: SimLoop) -> tuple[Actions, MemoryStore]:
    clock = SimClock(loop)
    store, cache = MemoryStore(clock), Cache()
    cache.apply(Synced(loop.run_until_complete(store.list()).cursor))
    state = State(store, cache)
    loop.run_until_complete(state.commit([Put(FIRST, 0)], Why("test", "Test")))
    # Nothing here asks a node, enrols one or makes an identity.
    nodes, enrolment, ids = cast(NodeReader, None), cast(Enrolment, None), cast(Ids, None)
    services = Services(LosesAnswers(store, cache), nodes, enrolment, clock, ids)
    return Actions(services), store


def stored(loop: SimLoop, store: MemoryStore) -> Job:
    (found,) = loop.run_until_complete(store.list("Job")).items
    assert isinstance(found, Job)
    return found


def test_a_delete_spares_the_successor(loop: SimLoop) -> None:
    served, store = actions(loop)
    done = loop.run_until_complete(served.delete(FIRST.ref, "user:a", force=True))
    assert done is None
    assert stored(loop, store).metadata.uid == SUCCESSOR.metadata.uid


def test_a_change_spares_the_successor(loop: SimLoop) -> None:
    served, store = actions(loop)
    with pytest.raises(OutcomeUnknownError):
        loop.run_until_complete(served.suspend_job(FIRST.ref, "user:a", suspend=True))
    assert not stored(loop, store).spec.suspend


def test_a_job_that_was_deleted_meanwhile_is_made_as_another(loop: SimLoop) -> None:
    """Its executions would bear the names of those that had been there."""
    clock = SimClock(loop)
    store, cache = MemoryStore(clock), Cache()
    cache.apply(Synced(loop.run_until_complete(store.list()).cursor))
    state = LosesAnswers(store, cache)
    state.successor = None
    nodes, enrolment = cast(NodeReader, None), cast(Enrolment, None)
    served = Actions(Services(state, nodes, enrolment, clock, CountingIds("uid")))
    applied = loop.run_until_complete(served.apply_job(sample_job("j"), "user:a"))
    assert applied.outcome == "created"
    assert state.lost is not None
    assert stored(loop, store).metadata.uid != state.lost.metadata.uid
