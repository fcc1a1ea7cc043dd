"""Virtual time: an event loop whose clock jumps to the next timer whenever nothing is ready.

A simulated hour takes as long as the work in it. Everything is deterministic: no sockets, no
threads, no wall clock, and sets of tasks are walked in the order of their making. `SimClock` is the
Clock of such a loop; several may exist on one loop, each with a wall clock of its own that can jump.

Drive a loop from outside:

    with SimLoop() as loop:
        loop.create_task(manager.run())
        loop.run_until_idle()          # no time passes
        loop.advance(60)               # one minute passes
        loop.run_until(lambda: ..., seconds_max=600)

or from inside with `simulate(main)`, where awaiting a sleep lets time pass.
"""

import asyncio
import itertools
from asyncio import events
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)

STEPS_MAX = 1_000_000
"""Passes of the loop at one instant, after which it is taken to spin for ever."""


class DeadlockError(Exception):
    """Nothing is ready, and no timer will ever fire. The message lists who waits where."""


class LivelockError(Exception):
    """Something keeps the loop busy without any time passing."""


class SimTimeoutError(Exception):
    """What was waited for did not happen within the simulated time."""


class SimTask(asyncio.Task[T]):
    """A task with a reproducible hash: TaskGroup and asyncio.wait walk sets of tasks."""

    _numbers = itertools.count()

    def __init__(self, coro: Coroutine[Any, Any, T], **options: Any) -> None:
        self._sim_number = 0
        super().__init__(coro, **options)

    def number(self, value: int) -> None:
        """Set before anything can hash the task."""
        self._sim_number = value

    def __hash__(self) -> int:
        return self._sim_number

    __eq__ = object.__eq__
