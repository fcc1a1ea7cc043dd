"""Lives of processes: a life is everything that one start of an orchestrator or an agent does, and
can end between any two awaits.

Tasks inherit the life in whose context they were made. A crash cancels them all; since real
processes clean nothing up when they are killed, whatever a dying task still asks of the world (the
store, the network, the disk, the clock) is refused by cancelling it once more.
"""

import asyncio
from collections.abc import Coroutine
from contextvars import Context, ContextVar, copy_context
from datetime import datetime, timedelta
from typing import Any

from tests.support.simclock import EPOCH, SimLoop, SimTask

_LIFE: ContextVar["Life | None"] = ContextVar("life", default=None)
_ROUNDS_MAX = 100


class WorldLoop(SimLoop):
    """A loop that knows which life each task belongs to."""

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: object = None,
        context: Context | None = None,
        **options: Any,
    ) -> SimTask:
        """A task of this loop, and of the life of whoever makes it."""
        task = super().create_task(coro, name=name, context=context, **options)
        life = _LIFE.get() if context is None else context.get(_LIFE)
        if life is not None:
            life.adopt(task)
        return task


class Life:
    """One start of one process, until its end."""

    def __init__(self, loop: WorldLoop, name: str) -> None:
        self.name = name
        self.is_alive = True
        self._loop = loop
        self._tasks: dict[SimTask, None] = {}
        self._prune_at = 64
        context = copy_context()
        context.run(_LIFE.set, self)
        self.context = context

    def __repr__(self) -> str:
        return self.name

    def adopt(self, task: SimTask) -> None:
        """A task of this life was made."""
        self._tasks[task] = None
        if len(self._tasks) > self._prune_at:
            self._tasks = {one: None for one in self._tasks if not one.done()}
            self._prune_at = 2 * len(self._tasks) + 64

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> "asyncio.Task[Any]":
        """Begin a task of this life."""
        return self._loop.create_task(work, name=name, context=self.context)

    def check(self) -> None:
        """Raise CancelledError if this life is over: the dead do nothing."""
        if not self.is_alive:
            raise asyncio.CancelledError(f"{self.name} is dead")

    def kill(self) -> None:
        """End it here and now. Its tasks unwind within this moment, without any effect."""
        if self.is_alive:
            self.is_alive = False
            self._bury(0)

    @property
    def failures(self) -> list[BaseException]:
        """What its tasks ended with, if not by cancellation."""
        done = [task for task in self._tasks if task.done() and not task.cancelled()]
        return [error for task in done if (error := task.exception()) is not None]

    def _bury(self, rounds: int) -> None:
        left = [task for task in self._tasks if not task.done()]
        if not left:
            for task in self._tasks:
                if not task.cancelled():
                    task.exception()  # seen; it does not matter any more
            return
        if rounds > _ROUNDS_MAX:
            raise AssertionError(f"{self.name} does not die: {left[0]!r}")
        if rounds % 10 == 0:
            for task in left:
                task.cancel()
        self._loop.call_soon(self._bury, rounds + 1)


def current_life() -> Life | None:
    """The life that the running task belongs to; None for the world itself."""
    return _LIFE.get()


def check_alive() -> Life | None:
    """The current life. Raises CancelledError if it is over."""
    life = _LIFE.get()
    if life is not None:
        life.check()
    return life


class PartyClock:
    """The clocks of one machine; they go on when its processes die.

    `rate` is the speed of both clocks, `wall_rate` that of the wall clock on top, which an
    administrator or NTP also steps.
    """

    def __init__(self, loop: SimLoop, *, rate: float = 1.0, wall_rate: float = 1.0) -> None:
        self._loop = loop
        self._rate = rate
        self._wall_rate = rate * wall_rate
        self._skew = 0.0

    @property
    def skew(self) -> float:
        """Seconds by which the wall clock was stepped."""
        return self._skew

    def step(self, seconds: float) -> None:
        """Set the wall clock forward, or back."""
        self._skew += seconds

    def now(self) -> datetime:
        """The wall clock."""
        return EPOCH + timedelta(seconds=self._loop.time() * self._wall_rate + self._skew)

    def monotonic(self) -> float:
        """Seconds at this clock's own speed, never set."""
        return 1000.0 + self._loop.time() * self._rate

    async def sleep(self, seconds: float) -> None:
        """Return after so many of this clock's seconds. The dead do not wake up."""
        life = check_alive()
        await asyncio.sleep(max(seconds, 1e-6) / self._rate if seconds > 0 else 0)
        if life is not None:
            life.check()
