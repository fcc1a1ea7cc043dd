"""How far the store had come, kept beside it and compared at each start.

A NATS server that finds its files damaged, or none, goes on with what is left of them and says
nothing. Acknowledged jobs would be gone, and nodes would be told to end what only they still know of.
"""

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bacalhau.nats.keys import write_private
from bacalhau.store.follow import created_of
from bacalhau.store.stream import StreamInfo
from bacalhau_api.errors import TerminalError
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.store import Cursor

logger = logging.getLogger(__name__)

PAUSE_SECONDS: Final = 5.0
"""What was written in the last moments before a damage may be missed."""


@dataclass(frozen=True, slots=True)
class _Mark:
    """The last revision that was seen, of the stream that was created then."""

    created: str
    revision: int


class HighWaterMark:
    """The mark in one file, which only an operator deletes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: _Mark | None = None
        self._lock = threading.Lock()

    def check(self, info: StreamInfo) -> None:
        """Raises TerminalError if the store is not, or not any more, what it was."""
        self._kept = known = self._read()
        if known is None:
            return
        if known.created != info.created:
            found = "is a new one"
        elif info.sequence_last < known.revision:
            found = f"ends at revision {info.sequence_last}"
        else:
            return
        raise TerminalError(
            f"the store {found}, although it had come to revision {known.revision}: it is damaged, "
            "or an older copy",
            reason="StoreLost",
            hint="stop, and put a newer backup of the data directory back; or go on with what is "
            f"left: delete {self._path}. Jobs that the store does not know of are gone then, and "
            "nodes end what is left of them",
        )

    async def keep(self, position: Callable[[], Cursor | None], clock: Clock) -> None:
        """Write down how far the store has come, until cancelled, and then once more."""
        try:
            while True:
                await clock.sleep(PAUSE_SECONDS)
                await asyncio.to_thread(self._note, position())
        finally:
            self._note(position())

    def _note(self, cursor: Cursor | None) -> None:
        if cursor is None:
            return
        mark = _Mark(created_of(cursor.epoch), cursor.revision)
        with self._lock:  # the last one at the end may come while another is being written
            if mark == self._kept:
                return
            text = json.dumps({"created": mark.created, "revision": mark.revision})
            try:
                write_private(self._path, text + "\n")
            except OSError as error:
                logger.warning("Failed to note how far the store is", extra={"error": str(error)})
                return
            self._kept = mark

    def _read(self) -> _Mark | None:
        try:
            found = json.loads(self._path.read_text())
            return _Mark(str(found["created"]), int(found["revision"]))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            logger.warning(
                "Cannot tell how far the store had come",
                extra={"file": str(self._path), "error": str(error)},
            )
            return None
