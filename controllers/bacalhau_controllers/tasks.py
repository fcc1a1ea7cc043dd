"""Several coroutines at once, where the end of one is the end of all."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


async def until_first(**works: Coroutine[Any, Any, None]) -> None:
    """Run all, by the names of their tasks, until one ends; then cancel the others, and return
    when they have ended. What was raised first is raised; what is raised later is logged.

    A TaskGroup loses a cancellation from outside that comes while it ends for a failure: whoever
    catches the failure then goes on for ever. Here the cancellation comes first.
    """
    tasks = [asyncio.create_task(work, name=name) for name, work in works.items()]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _end(tasks)
    for task in tasks:
        if task not in done and not task.cancelled() and (error := task.exception()) is not None:
            logger.warning(
                "Failed while it ended", extra={"task": task.get_name(), "error": repr(error)}
            )
    for task in tasks:  # if some ended together, in the order in which they were given
        if task in done:
            task.result()


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
