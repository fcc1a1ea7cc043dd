"""After a refusal: whose expectation was it that did not hold?

The server refuses a batch as a whole, and says at most which sequence it found.
"""

import asyncio
from collections.abc import Mapping, Sequence

from bacalhau.store.codec import COMMIT, fence_subject, is_tombstone
from bacalhau.store.history import happened
from bacalhau.store.pending import Pending, conflict, fenced
from bacalhau.store.stream import Stored, Stream

_READS_AT_ONCE = 16


class Settler:
    """Answers those commits of a refused batch that are to blame."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def settle(
        self, batch: Sequence[Pending], found: int | None
    ) -> tuple[list[Pending], Mapping[str, Stored | None]]:
        """The commits to be sent again, and what was found elsewhere than expected.

        Raises UnavailableError; then all are to be sent again.
        """
        changed = await self._find_changed(batch, found)
        again = [
            pending
            for pending in batch
            if not any(subject in changed for subject, _ in pending.guards())
            or not await self._answer(pending, changed)
        ]
        return again, changed

    async def _find_changed(
        self, batch: Sequence[Pending], found: int | None
    ) -> dict[str, Stored | None]:
        """The guarded subjects whose newest message is not the expected one, with that message."""
        guards = {subject: expect for pending in batch for subject, expect in pending.guards()}
        if found:
            # The server says what it found, not where. Most often the message is still there.
            message = await self._stream.at(found)
            if message is not None and guards.get(message.subject, found) != found:
                return {message.subject: message}
        suspects = [s for s, expect in guards.items() if found != 0 or expect != 0]
        slots = asyncio.Semaphore(_READS_AT_ONCE)

        async def read(subject: str) -> Stored | None:
            async with slots:
                return await self._stream.last(subject)

        newest = await asyncio.gather(*map(read, suspects))
        return {
            subject: message
            for subject, message in zip(suspects, newest, strict=True)
            if (message.sequence if message else 0) != guards[subject]
        }

    async def _answer(self, pending: Pending, changed: Mapping[str, Stored | None]) -> bool:
        """Answer a commit whose expectation did not hold; False if it is to be sent again."""
        if pending.may_have_happened and await self._find_own(pending):
            return True
        if pending.fence is not None and fence_subject(pending.fence.name) in changed:
            pending.fail(fenced(pending.fence))
            return True
        is_refused = False
        for change in pending.changes:
            if change.subject not in changed:
                continue
            message = changed[change.subject]
            is_absent = message is None or is_tombstone(message.headers)
            if change.expect == 0 and is_absent:  # created over a tombstone
                change.expect_sent = message.sequence if message else 0
                continue
            found = message.sequence if message and not is_absent else 0
            pending.fail(conflict(change.ref, change.expect, found))
            is_refused = True
        return is_refused

    async def _find_own(self, pending: Pending) -> bool:
        """Whether an earlier attempt went through, its answer lost: its history entry tells."""
        for subject in pending.tried:
            entry = await self._stream.last(subject)
            if entry is None or entry.headers.get(COMMIT) != pending.id:
                continue
            if await happened(self._stream, entry):
                pending.succeed(entry.sequence)
                return True
        return False
