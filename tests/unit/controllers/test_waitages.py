"""Ages of waits, by a clock that nobody can set."""

from bacalhau_api.meta import Ref, Waiting
from bacalhau_controllers.contact import Age
from bacalhau_controllers.waitages import WaitAges
from tests.support.samples import at
from tests.support.simclock import SimClock, SimLoop

REF = Ref("Execution", "d", "x")


def wait(since: float, *, what: str = "NodeAck", until: float | None = None) -> Waiting:
    return Waiting(
        what=what, since=at(since), until=None if until is None else at(until), mover="node n1"
    )


def test_a_wait_that_was_seen_to_begin_is_measured_whole() -> None:
    with SimLoop() as loop:
        clock = SimClock(loop)
        ages = WaitAges(clock)
        ages.note(REF, None, wait(0))
        clock.set_forward(1e6)
        loop.advance(30)
        assert ages.of(REF, wait(0)) == Age(30, is_whole=True)
        assert ages.of(REF, wait(0, until=60)) == Age(30, is_whole=True)  # still the same wait


def test_a_wait_found_in_the_store_is_measured_from_now_on() -> None:
    with SimLoop() as loop:
        ages = WaitAges(SimClock(loop))
        assert ages.of(REF, wait(-500)) == Age(0, is_whole=False)
        loop.advance(20)
        assert ages.of(REF, wait(-500)) == Age(20, is_whole=False)


def test_another_wait_begins_anew() -> None:
    with SimLoop() as loop:
        ages = WaitAges(SimClock(loop))
        ages.note(REF, None, wait(0))
        loop.advance(10)
        ages.note(REF, wait(0), wait(10, what="Completion"))
        loop.advance(5)
        assert ages.of(REF, wait(10, what="Completion")) == Age(5, is_whole=True)
        ages.note(REF, wait(10, what="Completion"), wait(10, what="Completion", until=99))
        assert ages.of(REF, wait(10, what="Completion")) == Age(5, is_whole=True)


def test_nothing_is_kept_of_what_does_not_wait() -> None:
    with SimLoop() as loop:
        ages = WaitAges(SimClock(loop))
        for end in (
            lambda: ages.note(REF, wait(0), None),
            lambda: ages.forget(REF),
            ages.clear,
            lambda: ages.of(REF, None),
        ):
            ages.note(REF, None, wait(0))
            end()
            assert ages._watched == {}
