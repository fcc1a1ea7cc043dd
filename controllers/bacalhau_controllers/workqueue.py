"""The work queue: which keys are to be looked at, and when.

It holds each key once, hands a key to one worker at a time, and runs again after its end a key
that was added meanwhile. Keys may come with a delay, and come back with a growing one after
failures. A queue is a cache of what is to be done and never the truth: what it refuses when it is
full, or forgets with its process, the manager's sweep finds again.

Single-threaded: all calls come from one event loop. All waiting goes through the Clock.
"""

import asyncio
import heapq
from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import IntEnum
from random import Random
from typing import Final

from bacalhau_api.meta import Ref
from bacalhau_controllers.contract import Clock

# With both kinds of keys waiting, every so many keys the sweep has its turn: a storm of changes
# slows sweeps down and never stops them.
_SWEEP_TURN: Final = 8

DELAY_SECONDS_MIN: Final = 0.001
"""The shortest delay. What rounding leaves of a deadline can be too little to be added to the time;
a key that asked for it would come back at once, again and again."""


class Priority(IntEnum):
    """What goes first. Sweeps come behind changes, so that a sweep over many keys delays none."""

    CHANGE = 0
    SWEEP = 1


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delay after the n-th failure in a row: `seconds` doubled each time, up to `seconds_max`,
    then jittered between one half and the whole of it."""

    seconds: float = 0.05
    seconds_max: float = 60.0

    def delay(self, failures: int, rng: Random) -> float:
        """Seconds to wait after so many failures in a row (1 or more)."""
        # The exponent is capped, or a long outage would overflow the float.
        whole = min(self.seconds_max, self.seconds * 2.0 ** min(failures - 1, 63))
        return whole * rng.uniform(0.5, 1.0)


@dataclass(slots=True)
class QueueStats:
    """Counters since the start. Sums are seconds; `waits` and `runs` are their divisors."""

    adds: int = 0
    coalesced: int = 0
    dropped: int = 0
    retries: int = 0
    waits: int = 0
    wait_seconds_sum: float = 0.0
    runs: int = 0
    run_seconds_sum: float = 0.0


class WorkQueue:
    """Keys to be processed, each held once.

    At most `size_max` keys are held (ready, delayed and being processed together). When it is
    full a new key is refused and counted in `stats.dropped`; keys already held are never lost.
    """

    def __init__(
        self,
        clock: Clock,
        rng: Random,
        *,
        backoff: Backoff | None = None,
        size_max: int = 1_000_000,
    ) -> None:
        self._clock = clock
        self._rng = rng
        self._backoff = backoff or Backoff()
        self._size_max = size_max
        # Ready keys in order of arrival, with the time of it; one line for each priority.
        self._ready: dict[Priority, OrderedDict[Ref, float]] = {p: OrderedDict() for p in Priority}
        self._running: dict[Ref, float] = {}
        self._again: dict[Ref, Priority] = {}  # added while running
        # The timer that counts for each delayed key, as time and number. The heap may hold outdated
        # ones beside it, which are skipped.
        self._due: dict[Ref, tuple[float, int]] = {}
        self._timers: list[tuple[float, int, Ref]] = []
        self._timer_count = 0
        self._failures: dict[Ref, int] = {}
        self._getters: deque[asyncio.Future[None]] = deque()
        self._sleeper: asyncio.Task[None] | None = None
        self._sleeps_until = 0.0
        self._timer_added = asyncio.Event()
        self._turn = 0
        self._is_closed = False
        self.stats = QueueStats()

    @property
    def depth(self) -> int:
        """Keys that are ready and wait for a worker."""
        return sum(len(line) for line in self._ready.values())

    @property
    def delayed(self) -> int:
        """Keys that wait for their time."""
        return len(self._due)

    @property
    def running(self) -> int:
        """Keys with a worker."""
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """True if nothing is ready or running; delayed keys may remain."""
        return not self.depth and not self._running

    def add(self, ref: Ref, priority: Priority = Priority.CHANGE) -> bool:
        """Have a key processed as soon as possible. False if it was refused."""
        if self._is_closed:
            return False
        self.stats.adds += 1
        if ref in self._running:
            if ref in self._again:
                self.stats.coalesced += 1
            self._again[ref] = min(priority, self._again.get(ref, priority))
            return True
        line = self._line_of(ref)
        if line is not None:
            self.stats.coalesced += 1
            if priority < line:
                self._ready[priority][ref] = self._ready[line].pop(ref)
            return True
        if not self._has_room(ref):
            return False
        self._due.pop(ref, None)  # it runs now, and then decides again when to be looked at
        self._make_ready(ref, priority)
        return True

    def add_after(self, ref: Ref, seconds: float) -> bool:
        """Have a key processed after a while; of several such wishes the earliest counts. False if
        it was refused."""
        if self._is_closed:
            return False
        self.stats.adds += 1
        due = self._clock.monotonic() + max(seconds, DELAY_SECONDS_MIN)
        held = self._due.get(ref)
        if self._line_of(ref) is not None or (held is not None and held[0] <= due):
            self.stats.coalesced += 1
            return True
        if not self._has_room(ref):
            return False
        self._timer_count += 1
        self._due[ref] = (due, self._timer_count)
        heapq.heappush(self._timers, (due, self._timer_count, ref))
        self._drop_outdated_timers()
        self._timer_added.set()
        if self._sleeper is not None and due < self._sleeps_until:
            self._sleeper.cancel()
        return True

    def retry(self, ref: Ref) -> float:
        """Have a key processed again after a failure; returns the delay in seconds."""
        self._failures[ref] = self.failures(ref) + 1
        self.stats.retries += 1
        seconds = self._backoff.delay(self._failures[ref], self._rng)
        self.add_after(ref, seconds)
        return seconds

    def failures(self, ref: Ref) -> int:
        """Failures of a key in a row."""
        return self._failures.get(ref, 0)

    def forget(self, ref: Ref) -> None:
        """Clear the backoff of a key, after success."""
        self._failures.pop(ref, None)

    async def get(self) -> Ref | None:
        """The next key, as soon as there is one. Give it back with `done`. None once closed."""
        while not self._is_closed:
            ref = self._pop()
            if ref is not None:
                return ref
            getter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._getters.append(getter)
            try:
                await getter
            except asyncio.CancelledError:
                # It may have been chosen already: then the next one must take the key.
                if getter.done() and not getter.cancelled():
                    self._wake_one()
                elif getter in self._getters:
                    self._getters.remove(getter)
                raise
        return None

    def done(self, ref: Ref) -> None:
        """A worker is finished with a key."""
        started = self._running.pop(ref)
        self.stats.runs += 1
        self.stats.run_seconds_sum += self._clock.monotonic() - started
        again = self._again.pop(ref, None)
        if again is not None and not self._is_closed:
            self._due.pop(ref, None)
            self._make_ready(ref, again)

    def close(self) -> None:
        """Hand out nothing more: workers finish what they have, and end."""
        self._is_closed = True
        self._wake_all()

    def reset(self) -> None:
        """Forget everything but the counters, and open again. No worker may hold a key."""
        if self._running:
            raise RuntimeError("a work queue cannot be reset while workers hold keys")
        for line in self._ready.values():
            line.clear()
        for table in (self._again, self._due, self._failures):
            table.clear()
        self._timers.clear()
        self._is_closed = False

    async def run(self) -> None:
        """Make delayed keys ready when their time comes. To be run beside the workers, for ever."""
        while True:
            self._promote()
            if not self._due:
                self._timer_added.clear()
                await self._timer_added.wait()
                continue
            self._sleeps_until = self._timers[0][0]
            left = self._sleeps_until - self._clock.monotonic()
            self._sleeper = asyncio.create_task(
                self._clock.sleep(max(left, 0.0)), name="work queue timer"
            )
            try:
                await asyncio.wait({self._sleeper})
            finally:
                sleeper, self._sleeper = self._sleeper, None
                sleeper.cancel()
                await asyncio.wait({sleeper})
            if not sleeper.cancelled():  # an earlier timer cancels the sleep
                sleeper.result()

    def _has_room(self, ref: Ref) -> bool:
        held = self.depth + len(self._due) + len(self._running)
        if held < self._size_max or ref in self._due or ref in self._running:
            return True
        self.stats.dropped += 1
        return False

    def _line_of(self, ref: Ref) -> Priority | None:
        for priority, line in self._ready.items():
            if ref in line:
                return priority
        return None

    def _make_ready(self, ref: Ref, priority: Priority) -> None:
        self._ready[priority][ref] = self._clock.monotonic()
        self._wake_one()

    def _drop_outdated_timers(self) -> None:
        """Keep the heap in proportion to the delayed keys: one that is often added at once leaves
        a timer behind each time."""
        if len(self._timers) > 2 * len(self._due) + 64:
            self._timers = [timer for timer in self._timers if self._due.get(timer[2]) == timer[:2]]
            heapq.heapify(self._timers)

    def _promote(self) -> None:
        """Move what is due to the ready keys, and drop outdated timers from the top."""
        now = self._clock.monotonic()
        while self._timers:
            due, number, ref = self._timers[0]
            if self._due.get(ref) != (due, number):
                heapq.heappop(self._timers)
                continue
            if due > now:
                return
            heapq.heappop(self._timers)
            del self._due[ref]
            if ref in self._running:
                self._again.setdefault(ref, Priority.CHANGE)
            else:
                self._make_ready(ref, Priority.CHANGE)

    def _pop(self) -> Ref | None:
        first, second = self._ready[Priority.CHANGE], self._ready[Priority.SWEEP]
        self._turn = (self._turn + 1) % _SWEEP_TURN
        line = second if second and (not first or self._turn == 0) else first
        if not line:
            return None
        ref, added = line.popitem(last=False)
        now = self._clock.monotonic()
        self.stats.waits += 1
        self.stats.wait_seconds_sum += now - added
        self._running[ref] = now
        return ref

    def _wake_one(self) -> None:
        while self._getters:
            getter = self._getters.popleft()
            if not getter.done():
                getter.set_result(None)
                return

    def _wake_all(self) -> None:
        while self._getters:
            self._wake_one()
