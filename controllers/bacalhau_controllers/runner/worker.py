"""Moves one execution: feeds the machine with events one by one, writes down what it says, and has
its instructions done.

An instruction that could not be taken back is begun only once the ledger holds that it will be.
Other progress is acted upon at once and written soon, together with what comes next.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from bacalhau_api.v1.execution import Desired, Execution
from bacalhau_controllers.runner import machine
from bacalhau_controllers.runner.duties import duty, seconds_until, timer
from bacalhau_controllers.runner.ledger import (
    DropFact,
    Entry,
    Forget,
    LedgerFullError,
    PutFact,
    PutState,
)
from bacalhau_controllers.runner.perform import broken, forget_run, perform
from bacalhau_controllers.runner.reporting import execution_fact
from bacalhau_controllers.runner.site import Site
from bacalhau_controllers.runner.state import (
    Event,
    Instruction,
    RunnerState,
    Stage,
    StopRequested,
    TimerDue,
)

logger = logging.getLogger(__name__)

WAIT_SECONDS_MAX = 60.0
"""Between two looks at a timer: the loop's own clock may stand still while the machine sleeps."""

_LAZY = frozenset({Stage.QUEUED, Stage.PREPARING, Stage.COLLECTING})


class Worker:
    """One execution that is not at rest. Ends by itself when there is nothing left to do; `retire`
    is called then, in the same step, so that no event falls between two workers."""

    def __init__(self, site: Site, uid: str, retire: Callable[["Worker"], None]) -> None:
        self.uid = uid
        self.state: RunnerState = site.book.states[uid]
        execution = site.book.executions[uid]
        self.key = (execution.metadata.namespace, execution.name)
        self.execution_deadline_seconds = execution.spec.local_deadline_seconds
        self._site = site
        self._retire = retire
        self._events: deque[Event] = deque()
        self._wake = asyncio.Event()
        self._duty: asyncio.Task[None] | None = None
        self._is_dirty = False
        self._has_news = False
        self._pause = 0.0

    @property
    def execution(self) -> Execution:
        """As assigned, the newest version."""
        return self._site.book.executions[self.uid]

    def post(self, event: Event) -> None:
        """Tell what happened. What is waiting already is not told twice."""
        if event not in self._events:
            self._events.append(event)
        self._wake.set()

    def nudge(self) -> None:
        """The execution's spec may have changed."""
        self._wake.set()

    async def run(self) -> None:
        """Work until everything is at rest."""
        try:
            while True:
                if self._is_at_rest:
                    self._retire(self)
                    return
                event = self._next_event()
                if event is not None:
                    await self._handle(event)
                else:
                    await self._wait()
        finally:
            await self._end_duty()

    # -- events --------------------------------------------------------------------------------

    def _next_event(self) -> Event | None:
        if self._events:
            return self._events.popleft()
        spec = self.execution.spec
        # Desired state is a level, not an event: it is looked at each time.
        if (
            spec.desired is Desired.STOP
            and (self.state.stage, StopRequested) in machine.TRANSITIONS
        ):
            return StopRequested("Superseded" if spec.superseded else spec.stop_reason)
        due = timer(self.execution, self.state, self._site.limits)
        if due is not None and seconds_until(due, self._site.now()) <= 0:
            return TimerDue()
        return None

    @property
    def _is_at_rest(self) -> bool:
        if self._is_dirty or (self._duty is not None and not self._duty.done()):
            return False
        stage = self.state.stage
        return stage is Stage.GONE or (stage is Stage.DONE and not self._events)

    async def _wait(self) -> None:
        """Until something happens, a timer is due, or progress is to be written."""
        if self._duty is None and (todo := duty(self.state, self._site.limits)) is not None:
            self._begin(self._do(todo))  # newly assigned: nothing was begun yet
        self._wake.clear()
        due = timer(self.execution, self.state, self._site.limits)
        seconds = WAIT_SECONDS_MAX
        if due is not None:
            seconds = min(seconds, seconds_until(due, self._site.now()))
        if self._is_dirty:
            seconds = min(seconds, self._pause or self._site.settings.flush_seconds)
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            if self._is_dirty:
                await self._store(self.state)

    async def _handle(self, event: Event) -> None:
        step = machine.step(self.execution, self.state, event, self._site.now(), self._site.limits)
        if step.state == self.state and step.instruction is None:
            return
        before = self.state.stage
        has_changed = step.state != self.state
        self._has_news |= step.has_news
        after = step.state.stage
        if step.is_intent:
            # A stop is not held up by a full disk: what must not run any more is worse than a
            # stop that nobody can explain after one more fault.
            while not await self._store(step.state) and after is not Stage.STOPPING:
                await self._site.clock.sleep(self._pause)
        self.state = step.state
        if not (after.holds_capacity or after is Stage.QUEUED):
            self._site.allocator.give_back(self.uid)
        if step.instruction is not None:
            await self._end_duty()
            self._begin(self._do(step.instruction))
        elif duty(self.state, self._site.limits) is None:
            await self._end_duty()
        if after is not before:
            logger.info(
                "Moved execution",
                extra={"execution": self.execution.name, "stage": after, "run": step.state.run},
            )
            if after is Stage.DONE and self.state.run:
                self._begin(forget_run(self._site, self.execution, self.state.run))
        if step.is_intent or not has_changed:
            return
        if after in _LAZY:
            self._is_dirty = True
        else:
            await self._store(self.state)

    # -- the ledger ----------------------------------------------------------------------------

    async def _store(self, state: RunnerState) -> bool:
        """Write the state, and the news about it. False if the disk is full; then it is tried
        again after a pause."""
        try:
            await self._site.writer.commit(self._entries(state))
        except LedgerFullError as error:
            logger.error(
                "Failed to write the ledger; work waits for room on the disk",
                extra={"execution": self.execution.name, "error": error.message},
            )
            limits = self._site.limits
            self._pause = min(max(self._pause * 2, limits.retry_seconds), limits.retry_seconds_max)
            self._is_dirty = True
            return False
        self._is_dirty = self._has_news = False
        self._pause = 0.0
        return True

    def _entries(self, state: RunnerState) -> list[Entry]:
        if state.stage is Stage.GONE:
            return [Forget(self.uid)]
        entries: list[Entry] = [PutState(self.uid, state)]
        if not state.is_assigned:
            entries.append(DropFact(self.uid))
        elif self._has_news:
            entries.append(PutFact(execution_fact(self.execution, state)))
        return entries

    # -- duties --------------------------------------------------------------------------------

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._duty = asyncio.create_task(work, name=f"{self.execution.name}: {self.state.stage}")
        self._duty.add_done_callback(lambda _: self._wake.set())

    async def _end_duty(self) -> None:
        """Give up what is being done. Its late answer, if it got to give one, is ignored by the
        machine."""
        duty, self._duty = self._duty, None
        if duty is not None and not duty.done():
            duty.cancel()
            await asyncio.gather(duty, return_exceptions=True)

    async def _do(self, todo: Instruction) -> None:
        try:
            event = await perform(self._site, self.execution, self.state, todo, self.post)
        except Exception as error:
            logger.exception(
                "Failed at an instruction",
                extra={"execution": self.execution.name, "instruction": type(todo).__name__},
            )
            event = broken(todo, error)
        self.post(event)
