"""The real clock and the real randomness, given to everything that takes them as arguments."""

import asyncio
import time
import uuid
from datetime import UTC, datetime

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class SystemClock:
    """The machine's wall and monotonic clocks."""

    def now(self) -> datetime:
        """The present moment, in UTC, as the machine believes."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds since the machine started, where the system tells. Goes on through changes of
        the wall clock and while the machine sleeps, and all processes agree on it."""
        return time.clock_gettime(_CLOCK)

    async def sleep(self, seconds: float) -> None:
        """Return after so many seconds."""
        await asyncio.sleep(seconds)


class SystemIds:
    """Random identities."""

    def uid(self) -> str:
        """32 lower-case hex digits."""
        return uuid.uuid4().hex
