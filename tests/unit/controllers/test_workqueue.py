"""The work queue, in virtual time."""

import asyncio
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bacalhau_api.meta import Ref
from bacalhau_controllers.workqueue import Backoff, Priority, WorkQueue
from tests.support.simclock import SimClock, SimLoop, simulate


def ref(name: str) -> Ref:
    return Ref("Job", "default", name)


A, B, C = ref("a"), ref("b"), ref("c")


def with_queue(
    body: Callable[[WorkQueue, SimClock], Coroutine[Any, Any, None]], **options: Any
) -> None:
    """Run `body` with a queue whose timers run beside it."""

    async def main(clock: SimClock) -> None:
        queue = WorkQueue(clock, Random(1), **options)
        timers = asyncio.create_task(queue.run())
        try:
            await body(queue, clock)
        finally:
            timers.cancel()
            await asyncio.wait({timers})

    simulate(main)


async def take(queue: WorkQueue) -> Ref | None:
    """Process one key at once."""
    key = await queue.get()
    if key is not None:
        queue.done(key)
    return key


def test_holds_each_key_once_and_in_order() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        for key in (A, B, A, C, B):
            assert queue.add(key)
        assert queue.depth == 3
        assert [await take(queue) for _ in range(3)] == [A, B, C]
        assert (queue.stats.adds, queue.stats.coalesced, queue.depth) == (5, 2, 0)

    with_queue(body)


def test_a_key_added_while_it_is_processed_runs_again_afterwards() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        queue.add(A)
        key = await queue.get()
        queue.add(A)
        queue.add(A)
        assert queue.depth == 0  # nobody else may take it now
        queue.done(A)
        assert (key, queue.depth) == (A, 1)
        assert await take(queue) == A
        assert queue.is_idle

    with_queue(body)


def test_workers_wait_for_keys_and_each_gets_one() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        workers = [asyncio.create_task(queue.get()) for _ in range(3)]
        await asyncio.sleep(0)
        for key in (A, B):
            queue.add(key)
        await asyncio.sleep(0)
        assert [w.result() for w in workers if w.done()] == [A, B]
        queue.close()
        assert await workers[2] is None
        assert await queue.get() is None

    with_queue(body)


def test_a_cancelled_worker_does_not_swallow_a_key() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        first, second = (asyncio.create_task(queue.get()) for _ in range(2))
        await asyncio.sleep(0)
        queue.add(A)  # chooses the first worker
        first.cancel()
        assert await asyncio.wait_for(second, 1) == A

    with_queue(body)


def test_delayed_keys_come_in_time_the_earliest_wish_counts() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        start = clock.monotonic()
        queue.add_after(A, 10)
        queue.add_after(B, 3)
        queue.add_after(A, 5)
        queue.add_after(A, 7)
        assert (queue.depth, queue.delayed) == (0, 2)
        seen = [(await take(queue), clock.monotonic() - start) for _ in range(2)]
        assert seen == [(B, 3.0), (A, 5.0)]
        await clock.sleep(20)
        assert queue.depth == 0  # the later wishes are gone

    with_queue(body)


def test_an_earlier_timer_is_not_held_up_by_a_later_one() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        start = clock.monotonic()
        queue.add_after(A, 10)
        await clock.sleep(1)  # the queue sleeps for A by now
        queue.add_after(B, 3)
        seen = [(await take(queue), round(clock.monotonic() - start, 6)) for _ in range(2)]
        assert seen == [(B, 4.0), (A, 10.0)]

    with_queue(body)


def test_a_change_overtakes_a_delay() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        queue.add_after(A, 10)
        queue.add(A)
        assert await take(queue) == A
        assert clock.monotonic() == 1000.0
        await clock.sleep(30)
        assert queue.depth == 0

    with_queue(body)


def test_a_delay_that_ends_while_the_key_is_processed_runs_it_again() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        queue.add(A)
        await queue.get()
        queue.add_after(A, 1)
        await clock.sleep(2)
        assert queue.depth == 0
        queue.done(A)
        assert await take(queue) == A

    with_queue(body)


def test_a_delay_too_short_to_be_added_to_the_time_does_not_spin() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        for seconds in (1e-15, 0.0, -5.0):
            before = clock.monotonic()
            queue.add_after(A, seconds)
            assert queue.depth == 0
            await take(queue)
            assert clock.monotonic() > before

    with_queue(body)


def test_timers_that_are_overtaken_do_not_pile_up() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        for _ in range(10_000):
            queue.add_after(A, 1800)
            queue.add(A)
            await take(queue)
        assert len(queue._timers) < 100

    with_queue(body)


def test_backoff_grows_is_jittered_capped_and_forgotten() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        delays = [queue.retry(A) for _ in range(12)]
        for n, delay in enumerate(delays):
            whole = min(8.0, 0.05 * 2**n)
            assert whole / 2 <= delay <= whole
        assert len(set(delays)) == 12
        assert queue.failures(A) == queue.stats.retries == 12
        queue.forget(A)
        assert queue.failures(A) == 0
        assert queue.retry(A) <= 0.05

    with_queue(body, backoff=Backoff(0.05, 8.0))


def test_backoff_survives_an_endless_outage() -> None:
    assert Backoff(0.05, 60).delay(100_000, Random(1)) <= 60


def test_failed_keys_come_back_after_their_backoff() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        queue.add(A)
        await queue.get()
        delay = queue.retry(A)
        queue.done(A)
        before = clock.monotonic()
        assert await take(queue) == A
        assert clock.monotonic() - before == pytest.approx(delay)

    with_queue(body)


def test_changes_go_before_sweeps_but_do_not_starve_them() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        sweep = [ref(f"s{i}") for i in range(2)]
        for key in sweep:
            queue.add(key, Priority.SWEEP)
        queue.add(A)
        order = [await take(queue)]
        for i in range(40):  # changes without end
            queue.add(ref(f"c{i}"))
            order.append(await take(queue))
        assert order[0] == A
        assert set(sweep) <= set(order)

    with_queue(body)


def test_a_change_lifts_a_key_out_of_the_sweep() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        queue.add(A, Priority.SWEEP)
        queue.add(B, Priority.SWEEP)
        queue.add(B, Priority.CHANGE)
        assert [await take(queue), await take(queue)] == [B, A]

    with_queue(body)


def test_a_full_queue_refuses_new_keys_and_keeps_the_old() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        assert queue.add(A)
        assert queue.add_after(B, 5)
        assert not queue.add(C)
        assert not queue.add_after(C, 1)
        assert queue.stats.dropped == 2
        assert queue.add(A)  # held already
        assert queue.add(B)
        await queue.get()
        assert queue.retry(A) > 0  # a key that is being processed always has a place
        queue.done(A)
        assert (queue.depth, queue.delayed) == (1, 1)

    with_queue(body, size_max=2)


def test_measures_waits_and_runs() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        queue.add(A)
        await clock.sleep(2)
        await queue.get()
        await clock.sleep(3)
        queue.done(A)
        stats = queue.stats
        assert (stats.waits, stats.wait_seconds_sum) == (1, 2.0)
        assert (stats.runs, stats.run_seconds_sum) == (1, 3.0)

    with_queue(body)


def test_reset_forgets_keys_and_opens_again() -> None:
    async def body(queue: WorkQueue, clock: SimClock) -> None:
        queue.add(A)
        queue.add_after(B, 1)
        queue.close()
        assert not queue.add(C)
        queue.reset()
        assert (queue.depth, queue.delayed) == (0, 0)
        queue.add(C)
        assert await take(queue) == C
        queue.add(A)
        await queue.get()
        with pytest.raises(RuntimeError, match="hold keys"):
            queue.reset()

    with_queue(body)


def test_a_failing_clock_is_not_hidden() -> None:
    class BrokenClock(SimClock):
        async def sleep(self, seconds: float) -> None:
            raise ValueError("no such thing as time")

    with SimLoop() as loop:
        queue = WorkQueue(BrokenClock(loop), Random(1))
        timers = loop.create_task(queue.run())
        queue.add_after(A, 1)
        with pytest.raises(ValueError, match="no such thing"):
            loop.run_until_complete(timers)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    workers=st.integers(1, 5),
    plan=st.lists(
        st.tuples(
            st.integers(0, 6),  # key
            st.sampled_from(["add", "sweep", "after", "fail"]),
            st.floats(0, 5),  # delay
            st.floats(0, 2),  # pause before the next one
        ),
        max_size=40,
    ),
)
def test_no_key_is_lost_or_in_two_hands(
    seed: int, workers: int, plan: list[tuple[int, str, float, float]]
) -> None:
    """Whatever was asked for last is followed by a run that begins after it."""
    asked: dict[Ref, float] = {}
    began: dict[Ref, float] = {}
    held: set[Ref] = set()
    failing: set[Ref] = set()
    rng = Random(seed)

    async def work(queue: WorkQueue, clock: SimClock) -> None:
        while (key := await queue.get()) is not None:
            assert key not in held
            held.add(key)
            began[key] = clock.monotonic()
            await clock.sleep(rng.uniform(0, 1))
            held.discard(key)
            if key in failing:
                failing.discard(key)
                queue.retry(key)
            else:
                queue.forget(key)
            queue.done(key)

    async def main(clock: SimClock) -> None:
        queue = WorkQueue(clock, rng)
        tasks = [asyncio.create_task(queue.run())]
        crew = [asyncio.create_task(work(queue, clock)) for _ in range(workers)]
        for number, how, delay, pause in plan:
            key = ref(str(number))
            asked[key] = clock.monotonic()
            if how == "after":
                queue.add_after(key, delay)
            else:
                queue.add(key, Priority.SWEEP if how == "sweep" else Priority.CHANGE)
            if how == "fail":
                failing.add(key)
            await clock.sleep(pause)
        await clock.sleep(100)
        assert queue.is_idle
        assert not queue.delayed
        assert not failing
        for key, when in asked.items():
            assert began[key] >= when
        queue.close()
        await asyncio.wait(crew)
        for task in crew:
            task.result()
        tasks[0].cancel()
        await asyncio.wait(tasks)

    simulate(main)
