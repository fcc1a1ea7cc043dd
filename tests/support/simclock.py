"""Virtual time: an event loop whose clock jumps to the next timer whenever nothing is ready.

A simulated hour takes as long as the work in it. Everything is deterministic: no sockets, no
threads, no wall clock, and sets of tasks are walked in the order of their making. `SimClock` is the
Clock of such a loop; several may exist on one loop, each with a wall clock of its own that can jump
and a rate at which it drifts.

Drive a loop from outside:

    with SimLoop() as loop:
        loop.create_task(manager.run())
        loop.run_until_idle()          # no time passes
        loop.advance(60)               # one minute passes
        loop.run_until(lambda: ..., seconds_max=600)

or from inside with `simulate(main)`, where awaiting a sleep lets time pass.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor
from datetime import UTC, datetime, timedelta
from math import inf
from types import TracebackType
from typing import Any, Self, TypeVar, cast

T = TypeVar("T")

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)

STEPS_MAX = 1_000_000
"""Passes of the loop at one instant, after which it is taken to spin for ever."""

TICK_SECONDS = 1e-6
"""The shortest sleep."""

_STOP_ON_IDLE = -1.0


class DeadlockError(Exception):
    """Nothing is ready, and no timer will ever fire. The message lists who waits where."""


class LivelockError(Exception):
    """Something keeps the loop busy without any time passing."""


class SimTimeoutError(Exception):
    """What was waited for did not happen within the simulated time."""


class SimTask(asyncio.Task[Any]):
    """A task with a reproducible hash: TaskGroup and asyncio.wait walk sets of tasks, which
    otherwise go by memory addresses."""

    def __init__(self, number: int, coro: Coroutine[Any, Any, Any], **options: Any) -> None:
        self._sim_number = number  # before anything puts the task into a set
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._sim_number

    __eq__ = object.__eq__


class SimFuture(asyncio.Future[Any]):
    """A future with a reproducible hash."""

    _sim_number = 0

    def __hash__(self) -> int:
        return self._sim_number

    __eq__ = object.__eq__


class _Selector:
    """Stands in for the operating system: asked to wait, it lets the loop's time pass."""

    def __init__(self, loop: "SimLoop") -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> Sequence[object]:
        """Called once in each pass of the loop; there never is any input."""
        self._loop.pass_by(timeout)
        return ()


class SimLoop(asyncio.BaseEventLoop):
    """See the module. `errors` collects what was reported to the loop's exception handler, such as
    exceptions that nobody retrieved; `close` raises them."""

    # Of BaseEventLoop, which runs the callbacks; stable since Python 3.4.
    _scheduled: list[asyncio.TimerHandle]
    _ready: deque[asyncio.Handle]
    _clock_resolution: float

    def __init__(self, *, steps_max: int = STEPS_MAX) -> None:
        super().__init__()
        self._selector = _Selector(self)
        self._clock_resolution = 1e-9
        self._sim_time = 0.0
        self._limit = _STOP_ON_IDLE
        self._steps = 0
        self._steps_max = steps_max
        self._count = 0
        self.errors: list[dict[str, Any]] = []
        self.set_debug(False)
        self.set_task_factory(cast(Any, self._make_task))
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    # -- driving from outside --------------------------------------------------------------------

    def run_until_idle(self) -> None:
        """Run all that is ready, and what that makes ready. No time passes."""
        self._drive(_STOP_ON_IDLE)

    def advance(self, seconds: float) -> None:
        """Let exactly so much time pass, running what becomes due, up to and including its end."""
        if seconds < 0:
            raise ValueError("time does not run backwards")
        end = self._sim_time + seconds
        self._drive(end)
        self._sim_time = end

    def run_until(self, is_true: Callable[[], bool], *, seconds_max: float = 3600.0) -> float:
        """Let time pass until a condition holds; return the seconds that it took.

        The condition is looked at whenever nothing is ready. Raises SimTimeoutError, or
        DeadlockError if no timer is left that could make it true.
        """
        began = self._sim_time
        while True:
            self.run_until_idle()
            if is_true():
                return self._sim_time - began
            due = self.next_timer()
            if due is None:
                raise DeadlockError(self._describe("the condition can never become true"))
            if due > began + seconds_max:
                raise SimTimeoutError(self._describe(f"not true within {seconds_max} s"))
            self._sim_time = max(self._sim_time, due)

    def run_until_complete(self, future: Any) -> Any:
        """As in asyncio; time passes as needed. Raises DeadlockError if it cannot complete."""
        limit, self._limit = self._limit, inf
        try:
            return super().run_until_complete(future)
        finally:
            self._limit = limit

    def next_timer(self) -> float | None:
        """When the next timer fires, in the loop's time; None if there is none."""
        if self._scheduled and not self._scheduled[0].cancelled():
            return self._scheduled[0].when()  # the usual case; it is a heap
        return min((h.when() for h in self._scheduled if not h.cancelled()), default=None)

    # -- life ------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.shut_down()
        if error is None:
            self.raise_errors()

    def shut_down(self) -> None:
        """Cancel what still runs, wait for it, and close the loop."""
        if self.is_closed():
            return
        tasks = sorted(asyncio.all_tasks(self), key=hash)
        for task in tasks:
            task.cancel()
        if tasks:
            gathered = asyncio.gather(*tasks, return_exceptions=True)
            self.run_until_complete(gathered)
            for task in tasks:
                if not task.cancelled() and (failure := task.exception()) is not None:
                    self.errors.append({"message": "failed at the end", "exception": failure})
        self.run_until_complete(self.shutdown_asyncgens())
        self.close()

    def raise_errors(self) -> None:
        """Raise what the loop's exception handler was told, if anything."""
        if self.errors:
            failures = [
                failure
                for context in self.errors
                if isinstance(failure := context.get("exception"), Exception)
            ]
            message = "; ".join(str(context.get("message")) for context in self.errors)
            if failures:
                raise ExceptionGroup(message, failures)
            raise RuntimeError(message)

    # -- what BaseEventLoop asks of a loop -------------------------------------------------------

    def time(self) -> float:
        """Simulated seconds since the loop was made."""
        return self._sim_time

    def create_future(self) -> "asyncio.Future[Any]":
        """A future of this loop."""
        future = SimFuture(loop=self)
        self._count += 1
        future._sim_number = self._count
        return future

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        """Run `func` here and now instead of in a thread, whose timing could not be repeated."""
        future = self.create_future()

        def finish(done: Callable[[Any], None], value: object) -> None:
            if not future.done():
                done(value)

        try:
            self.call_soon(finish, future.set_result, func(*args))
        except Exception as error:  # noqa: BLE001 whoever awaits the future gets it
            self.call_soon(finish, future.set_exception, error)
        return future

    def pass_by(self, timeout: float | None) -> None:
        """Asked by the loop's every pass: nothing to do if something is ready (timeout 0), else
        jump to the next timer, or stop at the limit."""
        if timeout == 0:
            self._steps += 1
            if self._steps > self._steps_max:
                self._steps = 0
                raise LivelockError(self._describe(f"busy for {self._steps_max} steps"))
            return
        self._steps = 0
        if timeout is None:
            if self._limit == inf:
                raise DeadlockError(self._describe("nothing is left that could happen"))
            self.stop()
            return
        # Cancelled timers at the top of the heap are gone already: the loop has just looked.
        due = self._scheduled[0].when()
        if due > self._limit:
            self.stop()
        else:
            self._sim_time = max(self._sim_time, due)

    def _process_events(self, event_list: Sequence[object]) -> None:
        """There is no input."""

    def _write_to_self(self) -> None:
        """Nothing ever has to be woken from another thread."""

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any
    ) -> SimTask:
        self._count += 1
        return SimTask(self._count, coro, loop=loop, **options)

    def _drive(self, limit: float) -> None:
        before, self._limit = self._limit, limit
        try:
            self.run_forever()
        finally:
            self._limit = before

    def _describe(self, problem: str) -> str:
        """The problem, the time, and where each task stands."""
        lines = [f"{problem} (simulated time {self._sim_time:.6f} s)"]
        for handle in list(self._ready)[:5]:
            owner = getattr(getattr(handle, "_callback", None), "__self__", None)
            lines.append(f"  ready: {owner.get_name() if isinstance(owner, SimTask) else handle}")
        lines.append("tasks:")
        for task in sorted(asyncio.all_tasks(self), key=hash):
            frames = task.get_stack()
            where = "not started"
            if frames:
                code = frames[-1].f_code
                where = f"{code.co_qualname} at {code.co_filename}:{frames[-1].f_lineno}"
            lines.append(f"  {task.get_name()}: {where}")
        return "\n".join(lines)


class SimClock:
    """A `bacalhau_controllers.contract.Clock` of a SimLoop.

    `rate` is how fast it runs compared with true time: 1.001 gains a millisecond each second.
    """

    def __init__(
        self,
        loop: SimLoop,
        *,
        start: datetime = EPOCH,
        monotonic_start: float = 1000.0,
        rate: float = 1.0,
    ) -> None:
        self._loop = loop
        self._start = start
        self._monotonic_start = monotonic_start
        self._rate = rate
        self._skew = 0.0

    def now(self) -> datetime:
        """The wall clock: may have been set."""
        return self._start + timedelta(seconds=self._loop.time() * self._rate + self._skew)

    def monotonic(self) -> float:
        """Seconds by this clock's own rate, never set."""
        return self._monotonic_start + self._loop.time() * self._rate

    async def sleep(self, seconds: float) -> None:
        """Return after so many seconds by this clock, if any then at least one tick: whoever
        sleeps for what rounding left over must see time pass, as on a real machine."""
        await asyncio.sleep(max(seconds, TICK_SECONDS) / self._rate if seconds > 0 else 0)

    def set_forward(self, seconds: float) -> None:
        """Step the wall clock, as an administrator or NTP does; negative steps it back."""
        self._skew += seconds


def simulate(main: Callable[[SimClock], Coroutine[Any, Any, T]], *, seconds_max: float = inf) -> T:
    """Run `main(clock)` in virtual time and return what it returns.

    Raises SimTimeoutError when it takes longer than `seconds_max` of simulated time.
    """

    async def bounded() -> T:
        if seconds_max == inf:
            return await main(clock)
        bound = asyncio.timeout(seconds_max)
        try:
            async with bound:
                return await main(clock)
        except TimeoutError as error:
            if bound.expired():
                raise SimTimeoutError(f"not done within {seconds_max} simulated s") from error
            raise

    with SimLoop() as loop:
        clock = SimClock(loop)
        return cast(T, loop.run_until_complete(bounded()))
