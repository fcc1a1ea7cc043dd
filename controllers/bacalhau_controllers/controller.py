"""One reconciler at work: its queue, its workers, its sweep, and what becomes of each outcome.

Keys come from changes in the cache, from the reconciler's own sources, and from the sweep, which
looks at every object again within a bounded time, so that a lost event costs seconds and never
more. Who leads, and for how long, is the manager's business.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from random import Random
from typing import Protocol, runtime_checkable
from zlib import crc32

from bacalhau_api.errors import FencedError, TerminalError, TransientError
from bacalhau_api.meta import Ref, Resource
from bacalhau_controllers.contract import Clock, Reconciler, Result
from bacalhau_controllers.leader import LeadershipLostError
from bacalhau_controllers.state import State
from bacalhau_controllers.workqueue import Backoff, Priority, WorkQueue

logger = logging.getLogger(__name__)

Watch = Callable[[Resource | None, Resource | None], Iterable[Ref]]
"""From a change (old, new; None stands for absent) to the keys that it concerns."""

SWEEP_TICKS = 60
"""Into how many small bursts a sweep is spread."""

SETTLED_ROUNDS = 30
"""Objects that are settled for good are looked at in every so many sweeps only."""


@runtime_checkable
class HasTerm(Protocol):
    """A reconciler that has sources of its own beside the cache, such as an inbox."""

    def term(self, wake: Callable[[Ref], None]) -> AbstractAsyncContextManager[None]:
        """Open for as long as this process leads; `wake` asks for a key to be reconciled."""
        ...


@runtime_checkable
class HasSettled(Protocol):
    """A reconciler that can tell which objects need no more care."""

    def is_settled(self, resource: Resource) -> bool:
        """True if nothing is left to do for an object, however much time passes."""
        ...


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """How one reconciler is run. Times are seconds. `workers` is how many keys it looks at at the
    same time."""

    workers: int = 8
    sweep_seconds: float = 60.0
    deadline_seconds: float = 30.0
    queue_size_max: int = 1_000_000
    backoff: Backoff = field(default_factory=Backoff)


@dataclass(slots=True)
class Outcomes:
    """How reconciles ended, counted since the start."""

    done: int = 0
    transient: int = 0
    terminal: int = 0
    deadline: int = 0
    bugs: int = 0


class Controller:
    """One reconciler with its queue, workers and sweep. Made by `Manager.add`."""

    def __init__(
        self,
        reconciler: Reconciler,
        kind: str,
        watches: Mapping[str, Watch],
        key: Callable[[Resource], Ref],
        state: State,
        clock: Clock,
        rng: Random,
        settings: ControllerSettings,
        on_fenced: Callable[[], None],
    ) -> None:
        self.reconciler = reconciler
        self.kind = kind
        self.queue = WorkQueue(
            clock, rng, backoff=settings.backoff, size_max=settings.queue_size_max
        )
        self.outcomes = Outcomes()
        self._watches = watches
        self._key = key
        self._state = state
        self._clock = clock
        self._rng = rng
        self._settings = settings
        self._on_fenced = on_fenced
        self._is_settled = (
            reconciler.is_settled if isinstance(reconciler, HasSettled) else _never_settled
        )
        self._is_working = False
        self._buckets: list[dict[Ref, None]] = []
        # Keys that ended in a TerminalError: they wait for a change, and skip most sweeps.
        self._stuck: set[Ref] = set()

    # -- where keys come from --------------------------------------------------------------------

    def begin(self) -> None:
        """Start to collect keys, beginning with every object there is."""
        self.queue.reset()
        self._stuck.clear()
        self._buckets = [{} for _ in range(SWEEP_TICKS)]
        self._is_working = True
        for resource in self._state.cache.list(self.kind):
            self._bucket_of(resource.ref)[resource.ref] = None
            self.queue.add(self._key(resource), Priority.SWEEP)

    def end(self) -> None:
        """Collect no more keys, and hand out none."""
        self._is_working = False
        self.queue.close()

    def wake(self, ref: Ref) -> None:
        """Have a key reconciled."""
        if self._is_working:
            self._stuck.discard(ref)
            self.queue.add(ref)

    def observe(self, old: Resource | None, new: Resource | None) -> None:
        """Note the keys that a change concerns."""
        changed = new or old
        if not self._is_working or changed is None:
            return
        if changed.kind == self.kind:
            bucket = self._bucket_of(changed.ref)
            if new is not None:
                bucket[changed.ref] = None
            else:
                bucket.pop(changed.ref, None)
            self.wake(self._key(changed))
        watch = self._watches.get(changed.kind)
        if watch is not None:
            for ref in watch(old, new):
                self.wake(ref)

    async def sweep(self) -> None:
        """For ever, look at every object again: each has its own place in the round, so that
        between two looks lies one interval, give or take a tick. Jitter is within the tick."""
        tick_seconds = self._settings.sweep_seconds / SWEEP_TICKS
        tick = self._rng.randrange(SWEEP_TICKS)
        began = self._clock.monotonic()
        passed = 0
        while True:
            due = began + (passed + self._rng.random()) * tick_seconds
            await self._clock.sleep(max(0.0, due - self._clock.monotonic()))
            number, place = divmod(tick + passed, SWEEP_TICKS)
            self._sweep_bucket(number, self._buckets[place])
            passed += 1
            if self._clock.monotonic() - began > (passed + SWEEP_TICKS) * tick_seconds:
                # The process stood still for a whole interval. Go on from here, not in a burst.
                began = self._clock.monotonic() - passed * tick_seconds

    def _sweep_bucket(self, number: int, bucket: dict[Ref, None]) -> None:
        for ref in bucket:
            resource = self._state.cache.get(ref)
            if resource is None:
                continue
            key = self._key(resource)
            is_rare = key in self._stuck or self._is_settled(resource)
            if not is_rare or (number + _hash(ref) // SWEEP_TICKS) % SETTLED_ROUNDS == 0:
                self.queue.add(key, Priority.SWEEP)

    def _bucket_of(self, ref: Ref) -> dict[Ref, None]:
        return self._buckets[_hash(ref) % SWEEP_TICKS]

    # -- where keys go ---------------------------------------------------------------------------

    def start(self, tasks: asyncio.TaskGroup) -> tuple[list[asyncio.Task[None]], ...]:
        """Start the workers, and what runs beside them. Workers end by themselves after `end`."""
        name = self.reconciler.name
        beside = [
            tasks.create_task(self.queue.run(), name=f"{name} timers"),
            tasks.create_task(self.sweep(), name=f"{name} sweep"),
        ]
        workers = [
            tasks.create_task(self._work(), name=f"{name} worker {i}")
            for i in range(self._settings.workers)
        ]
        return workers, beside

    async def _work(self) -> None:
        while (ref := await self.queue.get()) is not None:
            try:
                await self._process(ref)
            finally:
                self.queue.done(ref)

    async def _process(self, ref: Ref) -> None:
        """One reconcile, and what its outcome means for the key."""
        if not self._state.cache.is_synced:  # half a view makes things look gone
            await self._state.cache.wait_synced()
        deadline = asyncio.timeout(self._settings.deadline_seconds)
        try:
            async with deadline:
                result = await self.reconciler.reconcile(ref)
            self._succeed(ref, result)
        except FencedError as error:
            self._on_fenced()
            raise LeadershipLostError(error.message) from error
        except TransientError as error:
            self.outcomes.transient += 1
            self._retry(ref, f"{error.reason}: {error.message}")
        except TerminalError as error:
            self.outcomes.terminal += 1
            self.queue.forget(ref)
            self._stuck.add(ref)
            logger.warning(
                "Reconcile refused", extra=self._fields(ref, f"{error.reason}: {error.message}")
            )
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self._fail(ref)  # something inside was cancelled, not this worker
        except Exception:  # noqa: BLE001 a bug of one object must not stop the others
            if deadline.expired():
                self.outcomes.deadline += 1
                self._retry(ref, f"not done within {self._settings.deadline_seconds} s")
            else:
                self._fail(ref)

    def _succeed(self, ref: Ref, result: Result) -> None:
        self.outcomes.done += 1
        self.queue.forget(ref)
        self._stuck.discard(ref)
        if result.requeue_after is not None:
            self.queue.add_after(ref, result.requeue_after)

    def _retry(self, ref: Ref, why: str) -> None:
        """Come back after a backoff. Only the first failure in a row is worth a warning."""
        level = logging.DEBUG if self.queue.failures(ref) else logging.WARNING
        seconds = self.queue.retry(ref)
        logger.log(level, "Reconcile failed", extra=self._fields(ref, why, retry_in=seconds))

    def _fail(self, ref: Ref) -> None:
        self.outcomes.bugs += 1
        seconds = self.queue.retry(ref)
        logger.exception("Reconcile raised", extra=self._fields(ref, "bug", retry_in=seconds))

    def _fields(self, ref: Ref, error: str, **more: object) -> dict[str, object]:
        return {"reconciler": self.reconciler.name, "object": str(ref), "error": error, **more}


def owners_of_kind(kind: str) -> Watch:
    """A watch: from an object to its owners of one kind, in its own namespace."""

    def watch(old: Resource | None, new: Resource | None) -> Iterable[Ref]:
        changed = new or old
        if changed is None:
            return
        for owner in changed.metadata.owner_references:
            if owner.kind == kind:
                yield Ref(kind, changed.metadata.namespace, owner.name)

    return watch


def _never_settled(resource: Resource) -> bool:
    return False


def _hash(ref: Ref) -> int:
    """The same in every process, unlike `hash`."""
    return crc32(str(ref).encode())
