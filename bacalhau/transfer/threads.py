"""Threads for transfers: their own, because one of them may be busy for hours."""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from bacalhau.transfer.progress import CancelledTransferError, Transfer

T = TypeVar("T")

THREADS_MAX = 16
LET_GO_SECONDS = 5.0
WRITER_LET_GO_SECONDS = 60.0
"""A thread that writes ends at its next piece. One that waits longer than this hangs in its source,
and looks whether it was given up before it writes again."""


class TransferThreads:
    """Runs blocking transfers of one kind."""

    def __init__(self, threads_max: int = THREADS_MAX) -> None:
        self._pool = ThreadPoolExecutor(threads_max, thread_name_prefix="transfer")
        # Quick work on the disk is not held up behind transfers.
        self._quick = ThreadPoolExecutor(4, thread_name_prefix="cache")

    async def run(
        self,
        transfer: Transfer,
        function: Callable[..., T],
        *args: object,
        patience_seconds: float = LET_GO_SECONDS,
    ) -> T:
        """Run a transfer in a thread. Cancelling it waits until the thread has let go, but not
        longer than `patience_seconds`: long where it writes, since nobody else may write there."""
        begun = self._pool.submit(function, *args)
        work = asyncio.wrap_future(begun)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            transfer.cancel()
            # Of the two, only this one knows whether it has begun: the other would count as
            # cancelled while the thread goes on.
            if not begun.cancel():
                work.add_done_callback(_seen)
                await asyncio.wait([work], timeout=patience_seconds)
            raise
        except CancelledTransferError:
            raise asyncio.CancelledError from None

    async def quick(self, function: Callable[..., T], *args: object) -> T:
        """Run something short in a thread."""
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._quick, functools.partial(function, *args))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            if not work.cancelled():
                work.exception()
            raise

    def close(self) -> None:
        """No new work; what is under way is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._quick.shutdown(wait=False, cancel_futures=True)


def _seen(work: asyncio.Future[Any]) -> None:
    if not work.cancelled():
        work.exception()
