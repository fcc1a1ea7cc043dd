"""`bacalhau gitops run`: one source in a process of its own, next to its directory."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bacalhau.client.aio import AsyncClient
from bacalhau.gitops.remote import RemoteObjects, RemoteStore
from bacalhau.gitops.runner import source_manager
from bacalhau.gitops.tree import DirectoryTree
from bacalhau.gitops.wire import SourceRequest, put
from bacalhau.system import SystemClock, SystemIds
from bacalhau_api.meta import Ref
from bacalhau_api.v1.source import Source, SourcePhase
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.manager import Manager
from bacalhau_controllers.state import State

logger = logging.getLogger(__name__)

STOP_SECONDS: Final = 15.0


async def run(
    client: AsyncClient,
    name: str,
    root: Path,
    changes: SourceRequest,
    *,
    once: bool = False,
    timeout_seconds: float | None = None,
    sweep_seconds: float = 60.0,
    on_source: Callable[[Source], None] = lambda source: None,
) -> Source | None:
    """Keep a source applied until SIGINT or SIGTERM; with `once` until the present state of the
    directory was looked at. `on_source` is told of each change of the source.

    Returns the source as it was last; raises UnavailableError if the server cannot be reached at
    the start, TimeoutError where `once` takes longer than `timeout_seconds`.
    """
    created = await client.send(put(name, changes))
    clock = SystemClock()
    cache = Cache()
    store: Any = RemoteStore(client, clock, name)
    state = State(store, cache)
    where = f"{socket.gethostname()}:{os.getpid()}"
    holder = f"{where}:{SystemIds().uid()[:8]}"
    manager = source_manager(
        state,
        clock,
        DirectoryTree(root, clock),
        RemoteObjects(client, state),
        name,
        holder=holder,
        runner=where,
        sweep_seconds=sweep_seconds,
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    last: list[Source] = []

    def observe(old: object, new: object) -> None:
        if isinstance(new, Source) and new.name == name:
            last[:] = [new]
            on_source(new)

    cache.observe(observe)
    try:
        await _until(manager, store, cache, created, stop, once, timeout_seconds)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    return last[0] if last else None


async def _until(
    manager: Manager,
    store: RemoteStore,
    cache: Cache,
    created: Source,
    stop: asyncio.Event,
    once: bool,
    timeout_seconds: float | None,
) -> None:
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(store.follow(cache), name="follow")
        running = tasks.create_task(manager.run(), name="source")
        try:
            async with asyncio.timeout(timeout_seconds):
                if once:
                    await _looked_at(manager, cache, created, stop)
                else:
                    await stop.wait()
        finally:
            following.cancel()
            closing = asyncio.create_task(manager.close())
            await asyncio.wait([closing], timeout=STOP_SECONDS)
            closing.cancel()
            running.cancel()


async def _looked_at(manager: Manager, cache: Cache, created: Source, stop: asyncio.Event) -> None:
    """Return once a pass has ended with nothing left to be done by it."""
    controller = manager.controllers["source"]
    while not stop.is_set():
        found = cache.get(Ref("Source", "", created.name))
        is_idle = controller.outcomes.done > 0 and controller.queue.is_idle
        if is_idle and isinstance(found, Source) and _is_told(found, controller.queue.delayed):
            return
        await asyncio.sleep(0.05)


def _is_told(source: Source, delayed: int) -> bool:
    """Whether the status is the last word: no further pass is due soon, or only one that waits for
    somebody else."""
    phase = source.status.phase
    if phase is SourcePhase.PENDING:
        return False
    return not delayed or phase not in (SourcePhase.SYNCED, SourcePhase.PROGRESSING)
