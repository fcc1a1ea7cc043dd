"""The inbox: acknowledged only when settled, bounded, closed with the term."""

import asyncio

import pytest

from bacalhau_api.errors import TransientError, UnavailableError
from bacalhau_api.meta import Ref
from bacalhau_api.v1.execution import Phase, PublicationPhase
from bacalhau_api.wire import Fact
from bacalhau_controllers.inbox import FactInbox
from tests.support.samples import publication_report, report
from tests.support.simclock import SimLoop


def fact(name: str = "x", *, seq: int = 1) -> Fact:
    return Fact(seq=seq, namespace="d", name=name, uid="u", execution=report(Phase.RUNNING, seq))


X = Ref("Execution", "d", "x")


def opened(**bounds: int) -> tuple[FactInbox, list[Ref]]:
    inbox, woken = FactInbox(**bounds), list[Ref]()
    inbox.open("Execution", woken.append)
    return inbox, woken


def test_an_offer_returns_only_when_it_is_settled() -> None:
    with SimLoop() as loop:
        inbox, woken = opened()
        offers = [loop.create_task(inbox.offer("n1", "i", fact(seq=s))) for s in (1, 2)]
        loop.run_until_idle()
        assert woken == [X, X]
        waiting = inbox.waiting(X)
        assert [o.fact.seq for o in waiting] == [1, 2]
        inbox.settle(waiting[:1])
        loop.run_until_idle()
        assert [o.done() for o in offers] == [True, False]
        inbox.settle(waiting[1:])
        loop.run_until_idle()
        assert offers[1].done()
        assert (inbox.depth, inbox.waiting(X)) == (0, ())


def test_facts_are_refused_while_not_leading_and_sent_back_when_leading_ends() -> None:
    with SimLoop() as loop:
        inbox = FactInbox()
        with pytest.raises(TransientError, match="does not lead"):
            loop.run_until_complete(inbox.offer("n1", "i", fact()))
        inbox.open("Execution", lambda ref: None)
        offer = loop.create_task(inbox.offer("n1", "i", fact()))
        loop.run_until_idle()
        inbox.close("Execution")
        loop.run_until_idle()
        assert isinstance(offer.exception(), UnavailableError)
        assert inbox.depth == 0


def test_bounds_per_node_and_in_total() -> None:
    with SimLoop() as loop:
        inbox, _ = opened(per_node_max=2, total_max=3)
        held = [loop.create_task(inbox.offer("n1", "i", fact(seq=s))) for s in (1, 2)]
        loop.run_until_idle()
        with pytest.raises(UnavailableError, match="n1"):
            loop.run_until_complete(inbox.offer("n1", "i", fact(seq=3)))
        held.append(loop.create_task(inbox.offer("n2", "i", fact(seq=1))))
        loop.run_until_idle()
        with pytest.raises(UnavailableError, match="3 facts"):
            loop.run_until_complete(inbox.offer("n3", "i", fact(seq=1)))
        assert inbox.refused == 2
        inbox.settle(inbox.waiting(X))
        loop.run_until_complete(asyncio.wait(held))
        again = loop.create_task(inbox.offer("n1", "i", fact(seq=3)))  # there is room again
        loop.run_until_idle()
        assert inbox.depth == 1
        again.cancel()
        loop.run_until_idle()
        assert inbox.depth == 0  # whoever gives up takes its fact along


def test_an_offer_that_nobody_settles_times_out() -> None:
    with SimLoop() as loop:
        inbox, _ = opened()
        with pytest.raises(UnavailableError, match="not stored within"):
            loop.run_until_complete(inbox.offer("n1", "i", fact()))
        assert (loop.time(), inbox.depth) == (8.0, 0)


def test_dropped_facts_are_acknowledged_and_counted() -> None:
    with SimLoop() as loop:
        inbox, _ = opened()
        offer = loop.create_task(inbox.offer("n1", "i", fact()))
        loop.run_until_idle()
        inbox.drop(inbox.waiting(X), "gone")
        loop.run_until_idle()
        assert offer.exception() is None
        assert inbox.obsolete == 1


@pytest.mark.parametrize("reports", [0, 2])
def test_a_fact_without_exactly_one_report_is_obsolete(reports: int) -> None:
    bad = Fact(seq=1, namespace="d", name="x", uid="u")
    if reports:
        bad = bad.but(
            execution=report(Phase.RUNNING),
            publication=publication_report(PublicationPhase.PENDING),
        )
    with SimLoop() as loop:
        inbox, woken = opened()
        loop.run_until_complete(inbox.offer("n1", "i", bad))
        assert (inbox.obsolete, woken) == (1, [])
