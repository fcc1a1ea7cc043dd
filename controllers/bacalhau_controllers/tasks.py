"""Several coroutines at once, where a failure of one is the end of all.

A TaskGroup loses a cancellation from outside that comes while it ends for a failure: whoever catches
the failure then goes on for ever. Here the cancellation comes first.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any

logger = logging.getLogger(__name__)


async def until_first(**works: Coroutine[Any, Any, None]) -> None:
    """Run all, by the names of their tasks, until one ends; then cancel the others, and return
    when they have ended. What was raised first is raised; what is raised later is logged.
    """
    tasks = [asyncio.create_task(work, name=name) for name, work in works.items()]
    await _wait(tasks, asyncio.FIRST_COMPLETED)


async def until_all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all until they have ended, or one fails: that cancels the others, as above."""
    await _wait([asyncio.create_task(work) for work in works], asyncio.FIRST_EXCEPTION)


async def _wait(tasks: list[asyncio.Task[None]], return_when: str) -> None:
    if not tasks:
        return
    try:
        done, _ = await asyncio.wait(tasks, return_when=return_when)
    finally:
        await _end(tasks)
    first: BaseException | None = None
    for task in sorted(tasks, key=lambda task: task not in done):
        error = None if task.cancelled() else task.exception()
        if error is not None and first is None and task in done:
            first = error
        elif error is not None:
            extra = {"task": task.get_name(), "error": repr(error)}
            logger.warning("Failed while it ended", extra=extra)
    if first is not None:
        raise first


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel them, and wait for their ends, also when this is cancelled meanwhile."""
    for task in tasks:
        task.cancel()
    is_cancelled = False
    while left := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(left)
        except asyncio.CancelledError:
            is_cancelled = True
    if is_cancelled:
        raise asyncio.CancelledError
