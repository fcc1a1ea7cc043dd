"""The smaller parts of the agent: capacity, group commit, the outbox, guards, publications."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from bacalhau_api.errors import UnavailableError
from bacalhau_api.v1.execution import (
    Phase,
    Publication,
    PublicationPhase,
    PublicationReport,
    Report,
)
from bacalhau_api.v1.job import Network, Resources, SpecConfig
from bacalhau_api.wire import Fact
from bacalhau_controllers.runner.capacity import Allocator
from bacalhau_controllers.runner.commit import GroupCommit
from bacalhau_controllers.runner.fakes import FakeEngine
from bacalhau_controllers.runner.guard import PAUSE_SECONDS, WATCH_SECONDS, GuardedEngine
from bacalhau_controllers.runner.ledger import (
    Entry,
    Forget,
    LedgerBrokenError,
    LedgerFullError,
    MemoryLedger,
    PublicationState,
    PutExecution,
    PutFact,
)
from bacalhau_controllers.runner.ports import Observation, RunPhase, Workload
from bacalhau_controllers.runner.publishing import (
    Begun,
    Behind,
    Called,
    Delivered,
    PublicationEvent,
    PublishFailed,
    PublishLimits,
    Withdrawn,
    advance,
)
from bacalhau_controllers.runner.session import FACTS_BYTES_MAX, FACTS_MAX, next_batch
from bacalhau_controllers.runner.state import Instant, Limits
from tests.support.runner import execution, publication
from tests.support.simclock import EPOCH, SimClock, simulate

NOW = Instant(wall=EPOCH, mono=10.0, boot="b")
ONE = Resources(cpu_millis=1000)


# -- capacity --------------------------------------------------------------------------------------


def test_capacity_goes_to_who_came_first() -> None:
    async def main(clock: SimClock) -> None:
        allocator = Allocator(Resources(cpu_millis=2000), 10)
        order: list[str] = []

        async def take(uid: str, cpu: int) -> None:
            await allocator.take(uid, Resources(cpu_millis=cpu))
            order.append(uid)

        await take("a", 1500)
        tasks = [asyncio.create_task(take(*one)) for one in (("b", 2000), ("c", 100), ("d", 100))]
        await clock.sleep(1)
        assert order == ["a"]  # c and d would fit, but b came first
        allocator.give_back("a")
        await clock.sleep(1)
        assert order == ["a", "b"]
        allocator.give_back("b")
        await asyncio.gather(*tasks)
        assert order == ["a", "b", "c", "d"]
        assert allocator.allocated.cpu_millis == 200

    simulate(main)


def test_who_leaves_the_queue_holds_up_nobody() -> None:
    async def main(clock: SimClock) -> None:
        allocator = Allocator(Resources(cpu_millis=1000), 10)
        await allocator.take("a", Resources(cpu_millis=500))
        big = asyncio.create_task(allocator.take("b", ONE))
        await clock.sleep(1)
        small = asyncio.create_task(allocator.take("c", Resources(cpu_millis=500)))
        await clock.sleep(1)
        assert not small.done()
        big.cancel()
        await clock.sleep(1)
        assert small.done()
        assert set(allocator.held) == {"a", "c"}
        assert allocator.waiting == 0

    simulate(main)


def test_capacity_is_asked_for_once_and_given_back_once() -> None:
    async def main(clock: SimClock) -> None:
        allocator = Allocator(Resources(cpu_millis=1000), 1)
        await allocator.take("a", ONE)
        await allocator.take("a", ONE)
        allocator.give_back("a")
        allocator.give_back("a")
        assert allocator.allocated == Resources()
        allocator.hold("x", Resources(cpu_millis=5000))  # ran before the capacity was lowered
        waiting = asyncio.create_task(allocator.take("b", Resources()))
        await clock.sleep(1)
        assert not waiting.done()  # as many as may run do
        allocator.give_back("x")
        await waiting

    simulate(main)


# -- group commit ----------------------------------------------------------------------------------


class SlowLedger(MemoryLedger):
    """Each commit takes a second, however much it holds. `error` is raised by the next."""

    def __init__(self, clock: SimClock) -> None:
        super().__init__("ledger-1")
        self._clock = clock
        self.error: Exception | None = None

    async def commit(self, entries: Sequence[Entry]) -> None:
        await self._clock.sleep(1)
        error, self.error = self.error, None
        if error is not None:
            raise error
        await super().commit(entries)


def fact(uid: str, tail: str = "") -> Fact:
    report = Report(step=1, incarnation="i", phase=Phase.RUNNING, stdout_tail=tail)
    return Fact(seq=0, namespace="default", name=uid, uid=uid, execution=report)


def test_what_comes_together_is_flushed_together() -> None:
    async def main(clock: SimClock) -> None:
        ledger = SlowLedger(clock)
        writer = GroupCommit(ledger, await ledger.open())
        run = asyncio.create_task(writer.run())
        began = clock.monotonic()
        await asyncio.gather(*(writer.commit([PutFact(fact(f"u{n}"))]) for n in range(1000)))
        assert clock.monotonic() - began <= 2.1
        assert [f.seq for f in ledger.stored.facts.values()] == list(range(1, 1001))
        assert writer.book.facts == ledger.stored.facts
        assert writer.fact_stored.is_set()
        run.cancel()

    simulate(main)


def test_nobody_waits_for_a_ledger_that_is_given_up() -> None:
    async def main(clock: SimClock) -> None:
        ledger = SlowLedger(clock)
        writer = GroupCommit(ledger, await ledger.open())
        run = asyncio.create_task(writer.run())
        ledger.error = LedgerBrokenError("the disk did not confirm")
        for _ in range(2):  # while it breaks, and after it
            with pytest.raises(LedgerBrokenError):
                await writer.commit([PutFact(fact("a"))])
        with pytest.raises(LedgerBrokenError):
            await run

    simulate(main)


def test_a_full_disk_fails_all_of_a_batch_and_gives_no_number_away() -> None:
    async def main(clock: SimClock) -> None:
        ledger = SlowLedger(clock)
        writer = GroupCommit(ledger, await ledger.open())
        run = asyncio.create_task(writer.run())
        ledger.error = LedgerFullError("the disk is full")
        commits = [writer.commit([PutExecution(execution("a")), PutFact(fact("a"))])]
        results = await asyncio.gather(*commits, return_exceptions=True)
        assert isinstance(results[0], LedgerFullError)
        assert writer.full is not None
        assert not writer.book.executions
        assert writer.book.meta.facts_seq == 0
        await writer.commit([PutFact(fact("a"))])
        assert writer.full is None
        assert [f.seq for f in writer.book.facts.values()] == [1]
        run.cancel()

    simulate(main)


@pytest.mark.parametrize("error", [LedgerBrokenError("EIO"), ValueError("a bug")])
def test_a_broken_ledger_ends_everything(error: Exception) -> None:
    async def main(clock: SimClock) -> None:
        ledger = SlowLedger(clock)
        writer = GroupCommit(ledger, await ledger.open())
        run = asyncio.create_task(writer.run())
        ledger.error = error
        with pytest.raises(LedgerBrokenError):
            await writer.commit([Forget("a")])
        with pytest.raises(type(error)):
            await run

    simulate(main)


# -- the outbox ------------------------------------------------------------------------------------


def test_batches_are_bounded_in_number_and_size() -> None:
    many = {f"u{n}": fact(f"u{n}") for n in range(FACTS_MAX + 10)}
    assert len(next_batch(many)) == FACTS_MAX
    large = {f"u{n}": fact(f"u{n}", "x" * 2000) for n in range(FACTS_MAX)}
    batch = next_batch(large)
    assert 0 < len(batch) < FACTS_MAX
    assert sum(len(one.encode()) + 1 for one in batch) <= FACTS_BYTES_MAX
    huge = {"u": fact("u", "x" * (2 * FACTS_BYTES_MAX))}
    assert len(next_batch(huge)) == 1  # it would wait for ever otherwise
    assert next_batch({}) == ()


# -- guards ----------------------------------------------------------------------------------------


def workload(run_id: str = "a.1") -> Workload:
    here = Path("/node")
    return Workload(
        id=run_id, params={"seconds": None}, env={}, mounts=(), resources=Resources(),
        network=Network(), directory=here, stdout=here, stderr=here, log_index=here,
    )  # fmt: skip


def test_an_engine_that_hangs_is_unavailable_until_a_start_returns() -> None:
    async def main(clock: SimClock) -> None:
        engine = FakeEngine(clock)
        guarded = GuardedEngine("fake", engine, clock, Limits(), 2)
        await guarded.check()
        assert guarded.capability.available
        engine.starts_hang = True
        for pause in (PAUSE_SECONDS, 2 * PAUSE_SECONDS, 4 * PAUSE_SECONDS):
            with pytest.raises(UnavailableError, match="did not return"):
                await guarded.start(workload())
            await guarded.check()  # it answers, and is not believed
            assert guarded.capability.reason.startswith("EngineFault")
            await clock.sleep(pause - 1)
            assert not guarded.capability.available
            await clock.sleep(2)
            assert guarded.capability.available  # it may be tried once more
        engine.starts_hang = False
        await guarded.start(workload())
        assert guarded.capability.available
        engine.starts_hang = True
        with pytest.raises(UnavailableError):
            await guarded.start(workload("a.2"))
        await clock.sleep(PAUSE_SECONDS + 1)
        assert guarded.capability.available  # the pause began anew

    simulate(main)


def test_starts_are_a_few_at_a_time_and_queueing_is_no_fault() -> None:
    async def main(clock: SimClock) -> None:
        engine = FakeEngine(clock, start_seconds=50)
        guarded = GuardedEngine("fake", engine, clock, Limits(start_try_seconds=60), 2)
        await guarded.check()
        began = clock.monotonic()
        await asyncio.gather(*(guarded.start(workload(f"x.{n}")) for n in range(6)))
        assert clock.monotonic() - began == pytest.approx(150)
        assert guarded.capability.available

    simulate(main)


def test_a_wait_that_the_engine_lost_is_found_out() -> None:
    class Forgetful(FakeEngine):
        async def wait(self, run: str) -> Observation:
            await asyncio.Event().wait()
            raise AssertionError

    async def main(clock: SimClock) -> None:
        engine = Forgetful(clock)
        guarded = GuardedEngine("fake", engine, clock, Limits(), 2)
        await guarded.start(workload())
        engine.end("a.1", 3)
        began = clock.monotonic()
        seen = await guarded.wait("a.1")
        assert (seen.phase, seen.exit_code) == (RunPhase.EXITED, 3)
        assert clock.monotonic() - began == pytest.approx(WATCH_SECONDS)

    simulate(main)


# -- publications ----------------------------------------------------------------------------------

LIMITS = PublishLimits(try_seconds=100, retry_seconds=1, retry_seconds_max=60, age_seconds_max=1000)


def publishing(
    *events: tuple[float, PublicationEvent], of: Publication | None = None
) -> PublicationState:
    """The state after events, each so many seconds after the one before."""
    report = PublicationReport(step=0, incarnation="i", phase=PublicationPhase.PENDING)
    state, now = PublicationState(since=NOW, report=report), NOW
    for after, event in events:
        now = now.plus(after)
        before = state
        state = advance(of or publication(execution()), state, event, now, LIMITS)
        changed = state.report != before.report
        assert state.report.step == before.report.step + 1 if changed else True
        if not state.report.phase.is_final and state.report.step:
            assert state.report.waiting is not None
            assert state.report.waiting.until is not None
    return state


FAILED = PublishFailed(True, "PublisherUnavailable", "no route")
DONE = Delivered(SpecConfig(type="s3"), 5)


def test_a_publication_is_delivered() -> None:
    state = publishing((0, Begun()), (1, FAILED), (1, Begun()), (1, DONE))
    assert state.report.phase is PublicationPhase.DELIVERED
    assert (state.report.attempts, state.report.size_bytes, state.report.reason) == (2, 5, "")
    assert state.due is None


def test_publishing_is_given_up_when_it_cannot_help_or_is_too_old() -> None:
    refused = PublishFailed(False, "AccessDenied", "no such bucket")
    assert publishing((0, Begun()), (1, refused)).report.reason == "AccessDenied"
    late = publishing((0, Begun()), (1, FAILED), (2000, Begun()), (1, FAILED))
    assert late.report.phase is PublicationPhase.FAILED
    assert publishing((0, Begun()), (1, Called())).report.reason == "Stopped"


def test_what_is_final_stays_final() -> None:
    final = publishing((0, Begun()), (1, DONE))
    after = publishing((0, Begun()), (1, DONE), (1, FAILED), (1, Called()), (1, Begun()))
    assert after.report == final.report
    assert not publishing((0, Begun()), (1, DONE), (1, Withdrawn())).is_assigned


def test_waits_grow_and_an_old_copy_of_the_ledger_catches_up() -> None:
    events: list[tuple[float, PublicationEvent]] = [(0, Begun())]
    waits: list[float] = []
    for _ in range(8):
        state = publishing(*events, (0, FAILED))
        assert state.due is not None
        waits.append(state.due.mono - NOW.mono)
        events += [(0, FAILED), (0, Begun())]
    assert waits == sorted(waits)
    assert waits[-1] <= 60
    report = PublicationReport(step=3, incarnation="i", phase=PublicationPhase.PENDING)
    old = PublicationState(since=NOW, report=report)
    assert advance(publication(execution()), old, Behind(9), NOW, LIMITS).report.step == 10
