"""Group commit: what many executions have to write down at the same time shares one flush.

A ledger's commit costs one flush of the disk however much it holds. So while one is under way,
what else is to be written is gathered, and goes out together as the next.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from bacalhau_api.errors import BacalhauError
from bacalhau_controllers.runner.ledger import (
    Book,
    Entry,
    Ledger,
    LedgerBrokenError,
    LedgerFullError,
    PutFact,
)

ENTRIES_MAX = 4000
"""In one commit. Bounds how long one can take, and what a failed one holds up."""


@dataclass(slots=True)
class _Waiting:
    entries: tuple[Entry, ...]
    done: asyncio.Future[None]


class GroupCommit:
    """Writes to the ledger for all others, and keeps `book`, its content in memory, in step.

    Facts are numbered here, in the order in which they are stored; their `seq` is ignored.
    `fact_stored` is set whenever the outbox has something new. The queue is bounded by its users:
    each waits for its own commit.
    """

    def __init__(self, ledger: Ledger, book: Book) -> None:
        self._ledger = ledger
        self._queue: list[_Waiting] = []
        self._wake = asyncio.Event()
        self._is_over = False
        self.book = book
        self.fact_stored = asyncio.Event()
        self.full: LedgerFullError | None = None
        """Why the last commit failed; None once one succeeded."""
        self.refused = 0
        """How many commits failed for want of room; the newest by `refusal`."""
        self.refusal: LedgerFullError | None = None

    async def commit(self, entries: Sequence[Entry]) -> None:
        """Return once the entries are on disk and in `book`, all together.

        Raises LedgerFullError if nothing was written, LedgerBrokenError if the agent has to end.
        """
        if not entries:
            return
        if self._is_over:
            raise LedgerBrokenError("the ledger is not written any more")
        waiting = _Waiting(tuple(entries), asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._wake.set()
        await waiting.done

    async def run(self) -> None:
        """Write until cancelled. Raises LedgerBrokenError."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._queue:
                    await self._write_some()
        finally:
            self._is_over = True  # nobody would ever be answered
            for waiting in self._queue:
                waiting.done.cancel()

    async def _write_some(self) -> None:
        batch: list[_Waiting] = []
        size = 0
        while self._queue and (not batch or size + len(self._queue[0].entries) <= ENTRIES_MAX):
            size += len(self._queue[0].entries)
            batch.append(self._queue.pop(0))
        entries = self._numbered([entry for waiting in batch for entry in waiting.entries])
        try:
            await self._ledger.commit(entries)
        except LedgerFullError as error:
            self.full = self.refusal = error
            self.refused += 1
            _fail(batch, error)
            return
        except LedgerBrokenError as error:
            _fail(batch, error)
            raise
        except asyncio.CancelledError:
            for waiting in batch:
                waiting.done.cancel()
            raise
        except Exception as error:
            # Not an answer that a ledger gives: nobody knows what was written.
            cause = LedgerBrokenError(f"the ledger failed: {error!r}")
            _fail(batch, cause)
            raise
        self.full = None
        self.book.apply(entries)
        for waiting in batch:
            if not waiting.done.done():
                waiting.done.set_result(None)
        if any(isinstance(entry, PutFact) for entry in entries):
            self.fact_stored.set()

    def _numbered(self, entries: Sequence[Entry]) -> list[Entry]:
        seq = self.book.meta.facts_seq
        numbered: list[Entry] = []
        for entry in entries:
            if isinstance(entry, PutFact):
                seq += 1
                entry = PutFact(entry.fact.but(seq=seq))
            numbered.append(entry)
        return numbered


def _fail(batch: Sequence[_Waiting], error: BacalhauError) -> None:
    for waiting in batch:
        if not waiting.done.done():
            waiting.done.set_exception(error)
            with contextlib.suppress(BaseException):
                waiting.done.exception()  # whoever still waits gets it; the others need not
