"""Blocking transfers that nobody waits for any more."""

import asyncio
import threading

import pytest

from bacalhau.transfer.progress import Transfer
from bacalhau.transfer.threads import TransferThreads


@pytest.mark.parametrize("patience_seconds", [20.0, 0.05])
async def test_cancelling_waits_until_the_thread_has_let_go(
    patience_seconds: float,
) -> None:
    threads = TransferThreads()
    has_begun, may_end, has_ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        has_begun.set()
        may_end.wait(20)
        has_ended.set()

    run = threads.run(Transfer(), work, patience_seconds=patience_seconds)
    task = asyncio.create_task(run)
    await asyncio.to_thread(has_begun.wait)
    task.cancel()
    await asyncio.wait([task], timeout=0.5)
    assert task.done() is (patience_seconds < 1)
    may_end.set()
    await asyncio.wait([task])
    assert task.cancelled()
    assert await asyncio.to_thread(has_ended.wait, 20)
    threads.close()


async def test_what_has_not_begun_is_not_waited_for() -> None:
    threads = TransferThreads(threads_max=1)
    may_end = threading.Event()
    first = asyncio.create_task(threads.run(Transfer(), may_end.wait, 20))
    await asyncio.sleep(0)
    second = asyncio.create_task(threads.run(Transfer(), may_end.set, patience_seconds=20))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait([second], timeout=5)
    assert second.cancelled()
    assert not may_end.is_set()
    may_end.set()
    await first
    threads.close()
