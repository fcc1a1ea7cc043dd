"""Tasks that run beside everything else for the life of a process."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

OnFailure = Callable[[str, BaseException], None]
"""Told that the named part failed. Half a process is worse than one that is started again, so the
process ends."""


def run_beside(
    parts: AsyncExitStack, name: str, work: Coroutine[Any, Any, None], on_failure: OnFailure
) -> asyncio.Task[None]:
    """Run `work` until the parts are closed."""
    task = asyncio.create_task(work, name=name)

    def ended(done: asyncio.Task[None]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None:
            on_failure(name, error)

    async def stop() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    task.add_done_callback(ended)
    parts.push_async_callback(stop)
    return task
