"""The manager: stands for election, and runs all reconcilers while this process leads.

How one reconciler is run is in `controller.py`, how the lease is held in `leader.py`.
"""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, TypeVar

from bacalhau_api.errors import TransientError, UnavailableError
from bacalhau_api.meta import Ref, Resource
from bacalhau_controllers.cache import Informer
from bacalhau_controllers.contract import Clock, Reconciler
from bacalhau_controllers.controller import Controller, ControllerSettings, HasTerm, Watch
from bacalhau_controllers.leader import Elector
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Fence, Restarted, Synced

logger = logging.getLogger(__name__)

T = TypeVar("T")

Callback = Callable[[], Awaitable[None] | None]


@dataclass(frozen=True, slots=True)
class ManagerSettings:
    """Times are seconds. `controllers` is the default of each reconciler."""

    lease_name: str = "orchestrator"
    lease_ttl_seconds: float = 12.0
    stop_grace_seconds: float = 5.0
    callback_timeout_seconds: float = 15.0
    catch_up_timeout_seconds: float = 30.0
    controllers: ControllerSettings = field(default_factory=ControllerSettings)


class Manager:
    """Reconcilers under one lease.

    `holder` names this process in the lease; two processes need two names. `informer` is run
    beside everything else if given, else whoever made the cache keeps it. The callbacks are called
    in each term once its sources are open, and once its workers have stopped.

    While leading, and after, `state.fence` is the fence of the last term: a write that comes too
    late is refused. Writers that do not depend on leading, such as an API, need a State of their
    own.
    """

    def __init__(
        self,
        state: State,
        clock: Clock,
        rng: Random,
        *,
        holder: str = "orchestrator",
        informer: Informer | None = None,
        settings: ManagerSettings | None = None,
        on_started_leading: Callback | None = None,
        on_stopped_leading: Callback | None = None,
    ) -> None:
        self._state = state
        self._clock = clock
        self._rng = rng
        self._informer = informer
        self._settings = settings or ManagerSettings()
        self._on_started = on_started_leading
        self._on_stopped = on_stopped_leading
        self._elector = Elector(
            state.store,
            clock,
            rng,
            name=self._settings.lease_name,
            holder=holder,
            ttl_seconds=self._settings.lease_ttl_seconds,
        )
        self._controllers: dict[str, Controller] = {}
        self._closing = asyncio.Event()
        self._ended = asyncio.Event()
        self._is_started = False
        self.is_leader = asyncio.Event()

    @property
    def controllers(self) -> Mapping[str, Controller]:
        """What was added, by the reconciler's name: for metrics and tests."""
        return self._controllers

    @property
    def is_idle(self) -> bool:
        """True if no key is ready or being worked on; delayed ones may remain."""
        return all(controller.queue.is_idle for controller in self._controllers.values())

    def add(
        self,
        reconciler: Reconciler,
        kind: str,
        watches: Mapping[str, Watch] | None = None,
        *,
        workers: int | None = None,
        key: Callable[[Resource], Ref] | None = None,
    ) -> Controller:
        """Have `reconciler` called for objects of `kind` when they change, and within each sweep.

        `watches` maps changes of other kinds to keys of this one; by default the reconciler's
        own attribute of that name, if it has one; so it is with `workers`, how many keys are looked
        at at the same time, and `deadline_seconds` (of the attribute alone), how long one look may
        take. `key` names what is reconciled for an object of `kind`, by default itself.
        """
        if self._is_started:
            raise RuntimeError("reconcilers are added before the manager runs")
        if reconciler.name in self._controllers:
            raise ValueError(f"a reconciler named {reconciler.name!r} was added already")
        own: Mapping[str, Watch] = getattr(reconciler, "watches", {})
        own_workers: int | None = getattr(reconciler, "workers", None)
        own_deadline: float | None = getattr(reconciler, "deadline_seconds", None)
        defaults = self._settings.controllers
        controller = Controller(
            reconciler,
            kind,
            own if watches is None else watches,
            key or _itself,
            self._state,
            self._clock,
            self._rng,
            replace(
                defaults,
                workers=workers or own_workers or defaults.workers,
                deadline_seconds=own_deadline or defaults.deadline_seconds,
            ),
            self.is_leader.clear,
        )
        self._controllers[reconciler.name] = controller
        self._state.cache.observe(controller.observe)
        return controller

    async def run(self) -> None:
        """Stand for election and lead, again and again, until closed or cancelled.

        A lost lease, an unreachable store, a failing reconcile end a term or a reconcile, not the
        run. Anything else that is raised is a bug and ends it.
        """
        self._is_started = True
        try:
            async with asyncio.TaskGroup() as tasks:
                beside = []
                if self._informer is not None:
                    beside.append(tasks.create_task(self._informer.run(), name="informer"))
                await self._campaign()
                for task in beside:
                    task.cancel()
        finally:
            self._ended.set()

    async def close(self) -> None:
        """Step down cleanly: let workers finish what they have, release the lease. Returns when
        `run` has ended."""
        self._closing.set()
        if self._is_started:
            await self._ended.wait()

    async def _campaign(self) -> None:
        while not self._closing.is_set():
            # A candidate whose own view is incomplete would keep better ones from leading.
            await self._unless_closing(self._state.cache.wait_synced())
            lease = await self._unless_closing(self._elector.acquire())
            if lease is None:
                return
            self._state.fence = Fence(lease.name, lease.token)
            try:
                was_done = await self._elector.serve(lease, self._term, self.is_leader.clear)
            except* TransientError as group:
                was_done = False
                logger.warning("Term could not begin", extra={"error": str(group.exceptions[0])})
            if not was_done:
                await self._unless_closing(self._elector.pause())

    async def _term(self) -> None:
        """Lead until closed, or cancelled because the lease was lost."""
        try:
            async with asyncio.timeout(self._settings.catch_up_timeout_seconds):
                await self._unless_closing(self._catch_up())
        except TimeoutError as error:
            raise UnavailableError("the cache did not catch up with the store in time") from error
        if self._closing.is_set():
            return
        try:
            async with AsyncExitStack() as sources:
                await self._open(sources)
                await self._work()
        finally:
            self.is_leader.clear()
            for controller in self._controllers.values():
                controller.end()
            await self._tell_stopped()

    async def _open(self, sources: AsyncExitStack) -> None:
        for controller in self._controllers.values():
            controller.begin()
        for controller in self._controllers.values():
            if isinstance(controller.reconciler, HasTerm):
                await sources.enter_async_context(controller.reconciler.term(controller.wake))

    async def _work(self) -> None:
        workers: list[asyncio.Task[None]] = []
        beside: list[asyncio.Task[None]] = []
        async with asyncio.TaskGroup() as tasks:
            for controller in self._controllers.values():
                more_workers, more_beside = controller.start(tasks)
                workers += more_workers
                beside += more_beside
            self.is_leader.set()
            await self._tell_started()
            await self._closing.wait()
            self.is_leader.clear()
            for controller in self._controllers.values():
                controller.end()
            if workers:
                await asyncio.wait(workers, timeout=self._settings.stop_grace_seconds)
            for task in (*workers, *beside):
                task.cancel()

    async def _catch_up(self) -> None:
        """Learn all that earlier leaders wrote. Nobody can write under their fences any more, so
        after this the cache holds their last word, such as what they placed on which node."""
        cache = self._state.cache
        await cache.wait_synced()
        async with self._state.store.watch(cache.cursor) as events:
            async for event in events:
                if isinstance(event, Synced):
                    return
                if isinstance(event, Restarted):
                    raise UnavailableError("the store was re-created; its content is read anew")
                cache.apply(event)

    async def _tell_started(self) -> None:
        try:
            await self._call(self._on_started)
        except TimeoutError as error:
            raise UnavailableError("what begins with leading did not begin in time") from error

    async def _tell_stopped(self) -> None:
        try:
            await self._call(self._on_stopped)
        except Exception:
            logger.exception("Stop callback failed")

    async def _call(self, callback: Callback | None) -> None:
        if callback is None:
            return
        async with asyncio.timeout(self._settings.callback_timeout_seconds):
            pending = callback()
            if inspect.isawaitable(pending):
                await pending

    async def _unless_closing(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`; None, with `work` cancelled, if closing comes first."""
        task = asyncio.create_task(work, name="manager step")
        closing = asyncio.create_task(self._closing.wait(), name="manager close")
        try:
            await asyncio.wait({task, closing}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for each in (task, closing):
                each.cancel()
            await asyncio.wait({task, closing})


def _itself(resource: Resource) -> Ref:
    return resource.ref
