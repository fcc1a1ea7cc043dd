"""An engine behind deadlines. Engines are not to be trusted: one can answer every question and
yet hang for ever on each start.

Health is told by starts that return, not by questions that are answered. After a call that hung
the engine counts as unavailable; after a pause that grows with each relapse it may be tried once
more, if it calls itself healthy, and the first start that returns clears it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from bacalhau_api.errors import BacalhauError, UnavailableError
from bacalhau_api.v1.node import Capability
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.runner.ports import (
    Engine,
    Health,
    Observation,
    Publisher,
    RunPhase,
    Storage,
    Workload,
)
from bacalhau_controllers.runner.state import Limits

logger = logging.getLogger(__name__)

T = TypeVar("T")

ENGINE_FAULT = "EngineFault"
INTERNAL = "Internal"
HEALTH_SECONDS = 10.0
OPEN_SECONDS = 60.0
LOOK_SECONDS = 20.0
LIST_SECONDS = 30.0
REMOVE_SECONDS = 60.0
WATCH_SECONDS = 300.0
"""How long one `wait` is trusted before the engine is asked again."""
PAUSE_SECONDS = 60.0
PAUSE_SECONDS_MAX = 900.0


@contextlib.contextmanager
def foreseen(what: str) -> Iterator[None]:
    """Turn an error that is none of ours into UnavailableError (reason Internal). A plug that has no
    file descriptor left, or a bug, is to cost its own work for a while, not the agent.

    So is work of the plug's own that was cancelled, such as a download that several wait for: whoever
    waits was not, and would end without a word."""
    try:
        yield
    except (BacalhauError, TimeoutError):
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise UnavailableError(f"{what} was broken off", reason=INTERNAL) from error
    except Exception as error:
        logger.exception("Failed in an unforeseen way", extra={"at": what})
        raise UnavailableError(f"{what} failed: {error!r}", reason=INTERNAL) from error


async def within(seconds: float, what: str, call: Awaitable[T]) -> T:
    """The call's result. Raises UnavailableError if it takes longer (reason EngineFault)."""
    try:
        with foreseen(what):
            async with asyncio.timeout(seconds):
                return await call
    except TimeoutError as error:
        message = f"{what} did not return within {seconds:.0f} s"
        raise UnavailableError(message, reason=ENGINE_FAULT) from error


class GuardedEngine:
    """One engine of this node. All calls return in time, or raise UnavailableError."""

    def __init__(
        self, name: str, engine: Engine, clock: Clock, limits: Limits, starts_max: int
    ) -> None:
        self.name = name
        self._engine = engine
        self._clock = clock
        self._limits = limits
        self._starts = asyncio.Semaphore(starts_max)
        self._health = Health(is_available=False, reason="not opened yet")
        self._is_open = False
        self._fault = ""
        self._pause = PAUSE_SECONDS
        self._retry_at = 0.0

    @property
    def capability(self) -> Capability:
        """What the node says of it."""
        version = self._health.version
        if not self._health.is_available:
            return Capability(
                name=self.name, available=False, reason=self._health.reason, version=version
            )
        if self._fault and self._clock.monotonic() < self._retry_at:
            reason = f"{ENGINE_FAULT}: {self._fault}"
            return Capability(name=self.name, available=False, reason=reason, version=version)
        return Capability(name=self.name, version=version, missing=self._health.missing)

    async def check(self) -> None:
        """Open it if that has not worked yet, and ask for its health. Never raises but for
        bugs."""
        try:
            if not self._is_open:
                await within(OPEN_SECONDS, f"opening engine {self.name}", self._engine.open())
                self._is_open = True
            ask = self._engine.health()
            self._health = await within(HEALTH_SECONDS, f"engine {self.name}'s health", ask)
        except Exception as error:  # noqa: BLE001 whatever it is, the engine cannot be used
            self._health = Health(is_available=False, reason=str(error) or repr(error))

    async def admit(self, params: Mapping[str, object]) -> str:
        """See Engine.admit."""
        return await within(LOOK_SECONDS, f"engine {self.name}", self._engine.admit(params))

    async def prepare(
        self,
        params: Mapping[str, object],
        pins: Mapping[str, str],
        tell: Callable[[str], None],
    ) -> Mapping[str, str]:
        """See Engine.prepare. Its deadline is the caller's: what is brought may be large."""
        return await self._engine.prepare(params, pins, tell)

    async def start(self, workload: Workload) -> None:
        """See Engine.start. At most a few at a time; the deadline counts from the call itself.

        Raises UnavailableError at once while the engine is known to hang.
        """
        if self._fault and self._clock.monotonic() < self._retry_at:
            raise UnavailableError(self._fault, reason=ENGINE_FAULT)
        seconds = self._limits.start_try_seconds
        async with self._starts:
            try:
                await within(
                    seconds, f"starting in engine {self.name}", self._engine.start(workload)
                )
            except UnavailableError as error:
                if error.reason == ENGINE_FAULT:
                    self._failed(error.message)
                raise
        self._fault = ""
        self._pause = PAUSE_SECONDS

    async def observe(self, run: str) -> Observation:
        """See Engine.observe."""
        return await within(LOOK_SECONDS, f"engine {self.name}", self._engine.observe(run))

    async def wait(self, run: str) -> Observation:
        """See Engine.wait; returns RUNNING now and then, so that a wait that was lost in the
        engine costs minutes, not for ever."""
        try:
            with foreseen(f"waiting in engine {self.name}"):
                async with asyncio.timeout(WATCH_SECONDS):
                    return await self._engine.wait(run)
        except TimeoutError:
            return await self.observe(run)

    async def stop(self, run: str, grace_seconds: float) -> Observation:
        """See Engine.stop; returns what is left, which is not RUNNING."""
        seconds = grace_seconds + self._limits.stop_margin_seconds
        what = f"stopping in engine {self.name}"
        await within(seconds, what, self._engine.stop(run, grace_seconds))
        seen = await self.observe(run)
        if seen.phase is RunPhase.RUNNING:
            raise UnavailableError(f"engine {self.name} stopped it, yet it runs")
        return seen

    async def remove(self, run: str) -> None:
        """See Engine.remove."""
        what = f"removing from engine {self.name}"
        await within(REMOVE_SECONDS, what, self._engine.remove(run))

    async def list(self) -> Sequence[str]:
        """See Engine.list."""
        return await within(LIST_SECONDS, f"engine {self.name}", self._engine.list())

    async def close(self, *, keep_running: bool) -> None:
        """See Engine.close."""
        what = f"closing engine {self.name}"
        await within(OPEN_SECONDS, what, self._engine.close(keep_running=keep_running))

    def _failed(self, why: str) -> None:
        self._fault = why
        self._retry_at = self._clock.monotonic() + self._pause
        self._pause = min(self._pause * 2, PAUSE_SECONDS_MAX)


async def plug_capability(name: str, plug: Storage | Publisher) -> Capability:
    """What the node says of a storage or publisher. Never raises but for bugs."""
    try:
        health = await within(HEALTH_SECONDS, f"{name}'s health", plug.health())
    except Exception as error:  # noqa: BLE001 whatever it is, the plug cannot be used
        return Capability(name=name, available=False, reason=str(error) or repr(error))
    return Capability(
        name=name, available=health.is_available, reason=health.reason, version=health.version
    )
