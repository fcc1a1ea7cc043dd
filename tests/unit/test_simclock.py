"""The virtual-time loop itself: simulations are worth no more than it is."""

import asyncio
import random
from datetime import timedelta

import pytest

from tests.support.simclock import (
    EPOCH,
    DeadlockError,
    LivelockError,
    SimClock,
    SimLoop,
    SimTimeoutError,
    simulate,
)


def test_a_day_of_sleeps_takes_no_time() -> None:
    async def main(clock: SimClock) -> float:
        for _ in range(24):
            await clock.sleep(3600)
        return clock.monotonic()

    assert simulate(main) == 1000.0 + 86400.0


def test_timers_fire_in_order_of_time_then_of_making() -> None:
    seen: list[str] = []

    async def after(clock: SimClock, seconds: float, name: str) -> None:
        await clock.sleep(seconds)
        seen.append(name)

    async def main(clock: SimClock) -> None:
        async with asyncio.TaskGroup() as tasks:
            for name, seconds in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("a2", 1.0)):
                tasks.create_task(after(clock, seconds, name))

    simulate(main)
    assert seen == ["a", "a2", "b", "c"]


def test_run_until_idle_lets_no_time_pass() -> None:
    seen: list[float] = []

    async def work(loop: SimLoop) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
            seen.append(loop.time())
        await asyncio.sleep(1)
        seen.append(loop.time())

    with SimLoop() as loop:
        loop.create_task(work(loop))
        loop.run_until_idle()
        assert seen == [0.0, 0.0, 0.0]
        loop.advance(0.5)
        assert (len(seen), loop.time()) == (3, 0.5)
        loop.advance(0.5)  # what is due at its end is run
        assert seen[3:] == [1.0]


def test_advance_passes_through_every_timer() -> None:
    ticks: list[float] = []

    async def tick(loop: SimLoop) -> None:
        while True:
            await asyncio.sleep(0.25)
            ticks.append(loop.time())

    with SimLoop() as loop:
        loop.create_task(tick(loop))
        loop.advance(1.1)
        assert ticks == [0.25, 0.5, 0.75, 1.0]
        assert loop.time() == 1.1
        with pytest.raises(ValueError, match="backwards"):
            loop.advance(-1)


def test_run_until_stops_at_the_first_instant_that_fits() -> None:
    async def work(into: list[int]) -> None:
        for i in range(10):
            await asyncio.sleep(10)
            into.append(i)

    with SimLoop() as loop:
        done: list[int] = []
        loop.create_task(work(done))
        assert loop.run_until(lambda: len(done) == 3) == 30.0
        with pytest.raises(SimTimeoutError):
            loop.run_until(lambda: len(done) == 9, seconds_max=20)


def test_deadlock_is_found_and_named() -> None:
    async def stuck(clock: SimClock) -> None:
        await asyncio.create_task(asyncio.Event().wait(), name="the stuck one")

    with pytest.raises(DeadlockError, match="the stuck one"):
        simulate(stuck)


def test_run_until_finds_deadlock() -> None:
    with SimLoop() as loop:
        loop.create_task(asyncio.Event().wait(), name="waits for ever")
        with pytest.raises(DeadlockError, match="waits for ever"):
            loop.run_until(lambda: False)


def test_livelock_is_found() -> None:
    with SimLoop(steps_max=1000) as loop:

        def spin() -> None:
            loop.call_soon(spin)

        loop.call_soon(spin)
        with pytest.raises(LivelockError):
            loop.run_until_idle()


def test_time_limit() -> None:
    async def slow(clock: SimClock) -> None:
        await clock.sleep(100)

    with pytest.raises(SimTimeoutError):
        simulate(slow, seconds_max=99)
    simulate(slow, seconds_max=101)


def test_asyncio_timeouts_run_on_virtual_time() -> None:
    async def main(clock: SimClock) -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.Event().wait()
        return clock.monotonic() - 1000.0

    assert simulate(main) == 30.0


def test_wall_clock_can_jump_and_monotonic_cannot() -> None:
    async def main(clock: SimClock) -> None:
        clock.set_forward(3600)
        assert clock.now() == EPOCH + timedelta(hours=1)
        assert clock.monotonic() == 1000.0
        clock.set_forward(-7200)
        await clock.sleep(1)
        assert clock.now() == EPOCH - timedelta(seconds=3599)
        assert clock.monotonic() == 1001.0

    simulate(main)


def test_a_fast_clock_sleeps_less() -> None:
    with SimLoop() as loop:
        fast = SimClock(loop, rate=2.0)
        task = loop.create_task(fast.sleep(10))
        loop.advance(4.9)
        assert not task.done()
        loop.advance(0.1)
        assert task.done()
        assert fast.monotonic() == 1010.0
        assert fast.now() == EPOCH + timedelta(seconds=10)


def test_sleeping_for_what_is_left_ends() -> None:
    """Deadlines are sums of floats: what is left of one may be too little to add to the time."""

    async def main(clock: SimClock) -> int:
        due, looks = clock.monotonic() + 0.1 + 0.2, 0
        await clock.sleep(0.1)
        while (left := due - clock.monotonic()) > 0:
            looks += 1
            await clock.sleep(min(left, 0.0049))
        return looks

    assert 40 < simulate(main) < 45


def test_threads_are_run_in_place() -> None:
    absent: dict[str, int] = {}

    async def main(clock: SimClock) -> int:
        with pytest.raises(KeyError):
            await asyncio.to_thread(absent.__getitem__, "x")
        return await asyncio.to_thread(sum, [1, 2, 3])

    assert simulate(main) == 6


def test_unretrieved_errors_are_raised_at_the_end() -> None:
    async def main(clock: SimClock) -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 // 0)
        await clock.sleep(1)

    with pytest.raises(ExceptionGroup) as caught:
        simulate(main)
    assert isinstance(caught.value.exceptions[0], ZeroDivisionError)


def test_leftover_tasks_are_ended() -> None:
    ended: list[str] = []

    async def background() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            ended.append("cleaned up")

    with SimLoop() as loop:
        loop.create_task(background())
        loop.run_until_idle()
    assert ended == ["cleaned up"]


def test_a_task_that_fails_while_ending_is_reported() -> None:
    async def background() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            raise ValueError("could not clean up")

    loop = SimLoop()
    loop.create_task(background())
    loop.run_until_idle()
    loop.shut_down()
    with pytest.raises(ExceptionGroup, match="failed at the end"):
        loop.raise_errors()


def _trace(seed: int) -> list[tuple[float, str]]:
    """A run with cancelled task groups, whose order the standard hash would leave to chance."""
    seen: list[tuple[float, str]] = []
    rng = random.Random(seed)

    async def child(clock: SimClock, name: str) -> None:
        try:
            await clock.sleep(rng.uniform(50, 100))
        except asyncio.CancelledError:
            seen.append((clock.monotonic(), name))
            raise

    async def main(clock: SimClock) -> None:
        for round_number in range(5):
            try:
                async with asyncio.timeout(rng.uniform(1, 10)), asyncio.TaskGroup() as tasks:
                    for i in range(40):
                        tasks.create_task(child(clock, f"{round_number}-{i}"))
            except TimeoutError:
                seen.append((clock.monotonic(), "timeout"))

    simulate(main)
    return seen


def test_same_seed_same_trace() -> None:
    first = _trace(1)
    garbage = [object() for _ in range(12345)]  # other memory addresses the second time
    assert _trace(1) == first
    assert _trace(2) != first
    assert garbage
