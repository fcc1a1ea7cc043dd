"""What has yet to be handed over: how it is counted, and what a full outbox means."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest

from bacalhau_api.errors import UnavailableError
from bacalhau_api.meta import Condition
from bacalhau_api.v1.execution import Phase
from bacalhau_api.v1.job import JobType
from bacalhau_api.v1.node import LEDGER_FULL, OUTBOX_FULL, Node
from bacalhau_controllers.node.plan import View, plan
from bacalhau_controllers.node.presence import Sighting, Silence
from bacalhau_controllers.runner.commit import GroupCommit
from bacalhau_controllers.runner.ledger import (
    Book,
    Entry,
    LedgerFullError,
    MemoryLedger,
    Meta,
    PutFact,
)
from bacalhau_controllers.runner.outbox import Outbox, Room, measure, news_since
from bacalhau_controllers.runner.reporting import execution_fact
from bacalhau_controllers.runner.state import Instant, new_state
from tests.support.runner import EPOCH, World, execution, publication
from tests.support.samples import node
from tests.support.simclock import SimClock, SimLoop


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    with SimLoop() as loop:
        yield loop


def world(loop: SimLoop, **options: Any) -> World:
    one = World(loop, **options)
    one.start()
    loop.run_until_idle()
    return one


def cut(w: World, *, is_up: bool) -> None:
    assert w.hub.link is not None
    w.hub.link.set_up(is_up)
    w.loop.run_until_idle()


def test_nothing_waits_at_first() -> None:
    assert measure(Book(Meta(incarnation="i"))) == Outbox()


def test_what_ends_while_cut_off_is_counted_with_its_age(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=5), execution("b", seconds=500)))
    cut(w, is_up=False)
    loop.advance(60)
    held = measure(w.live.site.book)
    assert (held.facts, held.results) == (1, 1)
    fact = w.live.site.book.facts["uid-a"]
    assert held.facts_bytes == len(fact.encode())
    assert held.results_bytes > 0
    assert held.size_bytes == held.facts_bytes + held.results_bytes
    assert fact.execution is not None
    assert held.facts_since == held.results_since == fact.execution.finished_at == news_since(fact)
    assert timedelta(seconds=4) < news_since(fact) - EPOCH < timedelta(seconds=7)  # type: ignore[operator]
    cut(w, is_up=True)
    loop.advance(5)
    assert measure(w.live.site.book) == Outbox()


def test_a_restarting_service_takes_no_more_room_than_one_fact(loop: SimLoop) -> None:
    """Progress is superseded by later progress of the same execution; the end is never."""
    w = world(loop)
    w.do(w.hub.assign(execution("s", job_type=JobType.SERVICE, seconds=2)))
    w.do(w.hub.assign(execution("done", seconds=1)))
    cut(w, is_up=False)
    loop.advance(3600)
    facts = w.live.site.book.facts
    assert set(facts) <= {"uid-s", "uid-done"}
    assert w.live.state_of("uid-s").run > 5  # type: ignore[union-attr]
    assert measure(w.live.site.book).facts_bytes < 20_000
    cut(w, is_up=True)
    loop.advance(60)
    assert w.hub.report("done").phase is Phase.SUCCEEDED
    assert w.hub.problems == []


def test_results_wait_until_they_are_delivered(loop: SimLoop) -> None:
    w = world(loop)
    one = execution("a", seconds=1)
    w.do(w.hub.assign(one))
    w.until_final("a")
    loop.advance(2)
    assert measure(w.live.site.book) == Outbox()
    w.publisher.errors = [UnavailableError("no route")] * 3
    w.do(w.hub.assign(publication(one)))
    loop.advance(1)
    assert measure(w.live.site.book).results == 1
    w.until(lambda: measure(w.live.site.book) == Outbox(), seconds_max=600)


def test_a_full_outbox_refuses_new_work_keeps_old_and_passes(loop: SimLoop) -> None:
    w = world(loop, outbox_bytes_max=1)
    one = execution("a", seconds=1)
    w.do(w.hub.assign(one))
    w.until_final("a")
    w.publisher.errors = [UnavailableError("no route")] * 20
    w.do(w.hub.assign(publication(one)))
    loop.advance(21)  # so that it was looked at
    info = w.hub.beats[-1].info or next(b.info for b in reversed(w.hub.beats) if b.info)
    assert [c.type for c in info.conditions] == [OUTBOX_FULL]
    assert all(OUTBOX_FULL in engine.reason for engine in info.engines if not engine.available)
    assert not any(engine.available for engine in info.engines), "placement looks elsewhere"
    loop.advance(600)
    told = [beat.info for beat in w.hub.beats if beat.info]
    assert all(one == told[0] for one in told), "it is the same trouble, since the same moment"
    assert len(told) < len(w.hub.beats) / 5, "and not told with each beat"

    w.do(w.hub.assign(execution("b", seconds=1)))
    (refused,) = w.until_final("b")
    assert (refused.phase, refused.reason, refused.is_system_fault) == (
        Phase.FAILED,
        OUTBOX_FULL,
        True,
    )
    assert "takes on no new work" in refused.message
    assert w.live.keeps_outputs("default", "a"), "nothing that is finished went for it"

    w.until(lambda: not w.publisher.errors, seconds_max=7200)
    w.until(lambda: bool(w.hub.beats[-1].info and not w.hub.beats[-1].info.conditions), 7200)
    w.do(w.hub.assign(execution("c", seconds=1)))
    assert w.until_final("c")[0].phase is Phase.SUCCEEDED


def test_a_full_ledger_is_a_condition_until_there_is_room(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=5)))
    assert isinstance(w.ledger, MemoryLedger)
    w.ledger.is_full = True
    loop.advance(30)
    told = next(b.info for b in reversed(w.hub.beats) if b.info)
    assert [c.type for c in told.conditions] == [LEDGER_FULL]
    assert "disk is full" in told.conditions[0].message
    assert not any(engine.available for engine in told.engines)
    w.ledger.is_full = False
    w.until(lambda: bool(w.hub.beats[-1].info and not w.hub.beats[-1].info.conditions), 120)
    assert w.until_final("a")[0].phase is Phase.SUCCEEDED, "what was finished is not lost"


class FlakyLedger(MemoryLedger):
    """Full for large commits only, as a disk with a few blocks left."""

    room = 1

    async def commit(self, entries: Sequence[Entry]) -> None:
        """See Ledger."""
        if len(entries) > self.room:
            raise LedgerFullError("the disk is full")
        await super().commit(entries)


def test_a_ledger_that_takes_small_things_only_is_full_all_the_time(loop: SimLoop) -> None:
    ledger = FlakyLedger("ledger-1")
    ledger.room = 1000
    w = world(loop, ledger=ledger)
    ledger.room = 1
    assert w.do(w.hub.assign(execution("a"))) is None
    loop.advance(20)
    (first,) = w.live.info().conditions
    for _ in range(30):
        loop.advance(10)
        assert w.live.info().conditions == (first,), "it is the same trouble, since the same moment"
    ledger.room = 1000
    w.until(lambda: not w.live.info().conditions, 120)
    assert w.until_final("a")[0].phase is Phase.SUCCEEDED


def room_of(loop: SimLoop, book: Book, bytes_max: int) -> Room:
    ledger = MemoryLedger("i")
    return Room(GroupCommit(ledger, book), SimClock(loop), bytes_max, 30.0)


def test_no_bound_never_refuses(loop: SimLoop) -> None:
    one = execution("a")
    book = Book(Meta(incarnation="i"))
    state = new_state("i", Instant(wall=EPOCH, mono=0.0, boot="b"))
    book.apply([PutFact(execution_fact(one, state).but(seq=1))])
    for bytes_max, is_full in ((0, False), (1, True), (1_000_000, False)):
        room = room_of(loop, book, bytes_max)
        room.look()
        assert room.outbox.facts == 1
        assert bool(room.overflow) is is_full
        assert bool(room.conditions()) is is_full


def test_the_orchestrator_shows_it_as_a_condition_of_the_node() -> None:
    told = Condition(
        type=LEDGER_FULL, status=True, message="the disk is full", last_transition_time=EPOCH
    )

    def seen(node_: Node, conditions: tuple[Condition, ...]) -> Node:
        info = node_.status.info.but(conditions=conditions)
        sighting = Sighting(incarnation="i", session="s", info=info)
        view = View(sighting, Silence(0.0, is_whole=True), executions_open=0)
        return node_.but(status=plan(node_, view, EPOCH + timedelta(minutes=1)).status)

    one = seen(node("n1"), (told,))
    found = {c.type: c for c in one.status.conditions}
    assert found[LEDGER_FULL] == told
    one = seen(one, ())
    found = {c.type: c for c in one.status.conditions}
    assert not found[LEDGER_FULL].status
    assert found[LEDGER_FULL].last_transition_time == EPOCH + timedelta(minutes=1)
