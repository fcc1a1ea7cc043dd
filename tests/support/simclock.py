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
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextvars import Context, copy_context
from datetime import UTC, datetime, timedelta
from heapq import heapify, heappop, heappush
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

    _sim_number = 0

    def __hash__(self) -> int:
        return self._sim_number or _number(self)

    __eq__ = object.__eq__


class SimFuture(asyncio.Future[Any]):
    """A future with a reproducible hash."""

    _sim_number = 0

    def __hash__(self) -> int:
        return self._sim_number or _number(self)

    __eq__ = object.__eq__


def _number(one: SimTask | SimFuture) -> int:
    """Tasks and futures are numbered in the order in which somebody first asks for the hash."""
    loop = cast(SimLoop, one.get_loop())
    loop.numbered += 1
    one._sim_number = loop.numbered
    return loop.numbered


class _Handle(asyncio.Handle):
    """A callback that is ready. As asyncio's own, without what only debugging needs: a good part of
    a simulation is spent here."""

    __slots__ = ()

    _callback: Callable[..., object]
    _args: tuple[Any, ...]
    _cancelled: bool
    _context: Context

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None
    ) -> None:
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._context = copy_context() if context is None else context

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._callback!r}>"

    def cancel(self) -> None:
        """See Handle."""
        self._cancelled = True
        self._args = ()

    def cancelled(self) -> bool:
        """See Handle."""
        return self._cancelled


class _Timer(_Handle):
    """A callback that is due at some time."""

    __slots__ = ("_due", "_sim")

    def __init__(
        self,
        due: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context | None,
        loop: "SimLoop",
    ) -> None:
        super().__init__(callback, args, context)
        self._due = due
        self._sim: SimLoop | None = loop

    def cancel(self) -> None:
        """See Handle."""
        if not self._cancelled:
            super().cancel()
            if self._sim is not None:
                self._sim.timer_cancelled()
            self._sim = None

    def when(self) -> float:
        """See TimerHandle."""
        return self._due


class SimLoop(asyncio.BaseEventLoop):
    """See the module. `errors` collects what was reported to the loop's exception handler, such as
    exceptions that nobody retrieved; `close` raises them."""

    # Of BaseEventLoop; stable since Python 3.4.
    _ready: deque[asyncio.Handle]
    _stopping: bool

    def __init__(self, *, steps_max: int = STEPS_MAX) -> None:
        super().__init__()
        self._timers: list[tuple[float, int, _Timer]] = []
        self._timers_made = 0
        self._timers_cancelled = 0
        self._sim_time = 0.0
        self._limit = _STOP_ON_IDLE
        self._steps_max = steps_max
        self.numbered = 0
        """How many tasks and futures have a number, see `SimTask`."""
        self.errors: list[dict[str, Any]] = []
        self.set_debug(False)
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
        self._drop_cancelled()
        return self._timers[0][0] if self._timers else None

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

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """See BaseEventLoop."""
        handle = _Handle(callback, args, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """See BaseEventLoop. Timers of one instant fire in the order of their making."""
        timer = _Timer(when, callback, args, context, self)
        self._timers_made += 1
        heappush(self._timers, (when, self._timers_made, timer))
        return cast(asyncio.TimerHandle, timer)

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """See BaseEventLoop."""
        return self.call_at(self._sim_time + delay, callback, *args, context=context)

    def create_future(self) -> "asyncio.Future[Any]":
        """A future of this loop."""
        return SimFuture(loop=self)

    def create_task(
        self,
        coro: Any,
        *,
        name: object = None,
        context: Context | None = None,
        **options: Any,
    ) -> SimTask:
        """A task of this loop."""
        return SimTask(coro, loop=self, name=cast(Any, name), context=context, **options)

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

    def timer_cancelled(self) -> None:
        """Once most timers are cancelled ones, forget those."""
        self._timers_cancelled += 1
        if self._timers_cancelled > 100 and self._timers_cancelled * 2 > len(self._timers):
            self._timers = [entry for entry in self._timers if not entry[2]._cancelled]
            heapify(self._timers)
            self._timers_cancelled = 0

    def close(self) -> None:
        """See BaseEventLoop."""
        super().close()
        self._timers.clear()

    def _run_once(self) -> None:
        """Run until somebody stops the loop: all that is ready, pass by pass, and when nothing is,
        jump to the next timer, or stop at the limit."""
        ready = self._ready
        popleft, append = ready.popleft, ready.append
        steps = 0
        while not self._stopping:
            timers = self._timers  # another list after `timer_cancelled`
            while timers and (timers[0][0] <= self._sim_time or timers[0][2]._cancelled):
                timer = heappop(timers)[2]
                if timer._cancelled:
                    self._timers_cancelled -= 1
                else:
                    timer._sim = None  # it is not in the heap any more
                    append(timer)
            if not ready:
                if not timers:
                    if self._limit == inf:
                        raise DeadlockError(self._describe("nothing is left that could happen"))
                    self.stop()
                elif timers[0][0] > self._limit:
                    self.stop()
                else:
                    self._sim_time = timers[0][0]
                steps = 0
                continue
            steps += 1
            if steps > self._steps_max:
                raise LivelockError(self._describe(f"busy for {self._steps_max} steps"))
            for _ in range(len(ready)):
                handle = cast(_Handle, popleft())
                if handle._cancelled:
                    continue
                try:
                    handle._context.run(handle._callback, *handle._args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:  # noqa: BLE001 as BaseEventLoop does
                    problem = {"message": f"Exception in {handle}", "exception": error}
                    self.call_exception_handler(problem)

    def _drop_cancelled(self) -> None:
        while self._timers and self._timers[0][2]._cancelled:
            heappop(self._timers)
            self._timers_cancelled -= 1

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
