"""What a node sends beside the conversation itself, kept within a limit and in an order: facts
before logs, logs before results.

Facts and beats never wait here. They are counted, so that what can wait makes room for them.
"""

import asyncio
import heapq
import itertools
from enum import IntEnum
from typing import Final

from bacalhau_api.errors import UnavailableError
from bacalhau_controllers.contract import Clock

PIECE_BYTES_MIN: Final = 4 * 1024
PIECE_SECONDS: Final = 0.5
"""A piece is no larger than what the limit lets through in so long, so that facts, which go over
the same line, are not held up behind it."""

PATIENCE_SECONDS: Final = 10.0
"""Whoever asked gives up after a while; what is sent later is sent for nothing."""


class Kind(IntEnum):
    """What is sent, most urgent first."""

    LOG = 1
    RESULT = 2


class UploadGate:
    """A bucket of tokens (bytes) with an orderly queue. `bytes_per_second` 0 means no limit."""

    def __init__(self, bytes_per_second: int, clock: Clock) -> None:
        self.bytes_per_second = bytes_per_second
        self._clock = clock
        self._tokens = 0.0
        self._filled_at = clock.monotonic()
        self._numbers = itertools.count()
        self._queue: list[tuple[Kind, int]] = []
        self._moved = asyncio.Event()

    def piece_bytes(self, asked: int) -> int:
        """How large a piece may be that was asked for with this size."""
        if not self.bytes_per_second:
            return asked
        return min(asked, max(PIECE_BYTES_MIN, int(self.bytes_per_second * PIECE_SECONDS)))

    def spend(self, size: int) -> None:
        """So much was sent without asking; below 0: so much of what was taken was not."""
        if self.bytes_per_second:
            self._fill()
            self._tokens -= size

    async def take(self, size: int, kind: Kind) -> None:
        """Return once so many bytes may be sent. Raises UnavailableError if that takes longer than
        anybody waits for it; then nothing was taken."""
        if not self.bytes_per_second:
            return
        ticket = (kind, next(self._numbers))
        heapq.heappush(self._queue, ticket)
        deadline = self._clock.monotonic() + PATIENCE_SECONDS
        try:
            while True:
                seconds = self._wait_seconds(ticket)
                if seconds <= 0:
                    self._tokens -= size
                    return
                left = deadline - self._clock.monotonic()
                if left <= 0:
                    raise UnavailableError(
                        "the node's upload limit is used up; try again in a moment",
                        reason="UploadLimit",
                    )
                await self._pause(min(seconds, left))
        finally:
            self._queue.remove(ticket)
            heapq.heapify(self._queue)
            self._wake_others()

    def _wait_seconds(self, ticket: tuple[Kind, int]) -> float:
        """Until there are tokens; for ever, in effect, while somebody is ahead in the queue."""
        if self._queue[0] != ticket:
            return PATIENCE_SECONDS
        self._fill()
        return -self._tokens / self.bytes_per_second if self._tokens <= 0 else 0.0

    def _fill(self) -> None:
        now = self._clock.monotonic()
        grown = (now - self._filled_at) * self.bytes_per_second
        # What was not used in a quiet time is not saved up for longer than one second.
        self._tokens = min(self._tokens + grown, float(self.bytes_per_second))
        self._filled_at = now

    async def _pause(self, seconds: float) -> None:
        moved = self._moved
        sleeping = asyncio.ensure_future(self._clock.sleep(seconds))
        waiting = asyncio.ensure_future(moved.wait())
        try:
            await asyncio.wait({sleeping, waiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sleeping, waiting):
                task.cancel()
            await asyncio.gather(sleeping, waiting, return_exceptions=True)

    def _wake_others(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
