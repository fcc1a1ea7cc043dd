"""Runs forecasts in a thread, in an event loop of their own: what costs a second there must not
hold up requests here. One at a time, since they compete for the same processor anyway."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from bacalhau_api.errors import UnavailableError

T = TypeVar("T")

SECONDS_MAX = 60.0
WAITING_MAX = 16


class InThread:
    """See the module. Forecasts are bounded by counts; `SECONDS_MAX` is for what nobody foresaw."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)
        self._waiting = 0

    async def __call__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Raises UnavailableError when too many wait, or it takes too long."""
        if self._waiting >= WAITING_MAX:
            raise UnavailableError("too many plans are being made", hint="try again in a moment")
        self._waiting += 1
        try:
            async with asyncio.timeout(SECONDS_MAX), self._turn:
                return await asyncio.to_thread(lambda: asyncio.run(work()))
        except TimeoutError:
            raise UnavailableError(
                f"the plan was not made within {SECONDS_MAX:g} s", hint="plan fewer documents"
            ) from None
        finally:
            self._waiting -= 1
