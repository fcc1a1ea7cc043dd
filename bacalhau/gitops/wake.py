"""Notices that something in a directory has changed. A hint only: what is missed is found by the
sweep, so that trouble here costs seconds and is never an error."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from watchfiles import awatch

from bacalhau_controllers.contract import Clock

logger = logging.getLogger(__name__)

AGAIN_SECONDS: Final = 2.0
DEBOUNCE_MS: Final = 50


async def watch(
    paths: Sequence[Path],
    wake: Callable[[], None],
    clock: Clock,
    *,
    recursive: bool,
    stop: asyncio.Event,
) -> None:
    """Call `wake` after each burst of changes until `stop` is set. Directories that are not there
    (yet, or any more) are looked for again."""
    is_quiet = False
    wake()  # what has changed until now was seen by nobody
    while not stop.is_set():
        there = [path for path in paths if path.exists()]
        try:
            if there:
                async for _ in awatch(
                    *there,
                    watch_filter=None,
                    debounce=1000,
                    step=DEBOUNCE_MS,
                    recursive=recursive,
                    stop_event=stop,
                    ignore_permission_denied=True,
                ):
                    wake()
                    if any(not path.exists() for path in there):
                        break  # what was watched is gone: watch anew what takes its place
        except (OSError, RuntimeError) as error:
            if not is_quiet:
                hint = "changes are found by the sweep; see fs.inotify.max_user_watches"
                logger.warning(
                    "Directory cannot be watched", extra={"error": str(error)[:300], "hint": hint}
                )
            is_quiet = True
        if not stop.is_set():
            await clock.sleep(AGAIN_SECONDS)
            wake()
