"""Group commit: concurrent commits share atomic batches.

A batch costs the server the same few syncs to disk however many messages it holds. A lone commit
goes out at once; while batches are under way, what comes meanwhile gathers for the next one. When
the expectation of one commit does not hold, the server refuses the whole batch: the culprit is
found and answered (`settle.py`), the others are sent again. When an answer is lost, the same commit
is sent again, too: its expectations keep it from happening twice, and its history entry tells
afterwards whether the refusal came from itself.
"""

import asyncio
import itertools
import logging
import random
from collections import deque
from collections.abc import Sequence
from typing import Final

from bacalhau.store.batch import MESSAGES_MAX, RefusedError, Sender, Tip
from bacalhau.store.codec import is_tombstone
from bacalhau.store.pending import Change, Pending, conflict, revision_of
from bacalhau.store.settle import Settler
from bacalhau.store.stream import Stream
from bacalhau_api.errors import BacalhauError, OutcomeUnknownError, UnavailableError
from bacalhau_controllers.contract import Ids
from bacalhau_controllers.store import Fence

logger = logging.getLogger(__name__)

BATCH_MESSAGES_MAX: Final = 800
BATCH_BYTES_MAX: Final = 8 * 1024 * 1024
"""Of a batch that several commits share; a larger commit goes alone."""

WAITING_MESSAGES_MAX: Final = 40_000
WAITING_BYTES_MAX: Final = 128 * 1024 * 1024

_PAUSE_MIN = 0.02
_PAUSE_MAX = 1.0


class Committer:
    """Gathers commits into batches; at most `batches_max` are under way.

    With `use_pairs`, a lone change skips the batch where that is safe (see `batch.py`).
    """

    def __init__(
        self,
        stream: Stream,
        ids: Ids,
        tip: Tip,
        *,
        batches_max: int,
        use_pairs: bool,
        deadline: float,
    ) -> None:
        self._sender = Sender(stream.transport, ids, tip)
        self._settler = Settler(stream)
        self._tip = tip
        self._batches_max = batches_max
        self._use_pairs = use_pairs
        self._deadline = deadline
        self._queue: deque[Pending] = deque()
        self._queued_messages = 0
        self._queued_bytes = 0
        self._busy: set[str] = set()  # object subjects in batches under way
        # Seen by the last `_take`, by the object subject that was not free.
        self._held_back: dict[str, list[Pending]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pause = 0.0
        self._trouble = ""
        self._wake: asyncio.TimerHandle | None = None
        self._is_scheduled = False
        self._is_closed = False
        self._prefix = ids.uid()[:12]
        self._numbers = itertools.count(1)
        self._unlisten = stream.transport.listen(self._connection_changed)

    async def commit(self, changes: Sequence[Change], fence: Fence | None) -> int:
        """Store all changes or none; return the sequence of the first message (see
        `pending.revision_of`). For errors see Store.commit."""
        pending = Pending(
            id=f"{self._prefix}-{next(self._numbers):x}",
            changes=changes,
            fence=fence,
            done=asyncio.get_running_loop().create_future(),
            size_bytes=2 * sum(len(change.data) for change in changes),
        )
        self._admit(pending)
        try:
            async with asyncio.timeout(self._deadline):
                return await pending.done
        except TimeoutError:
            if pending.is_under_way or pending.may_have_happened:
                raise OutcomeUnknownError(
                    f"the store did not confirm a write within {self._deadline:g} s"
                    + self._trouble,
                    hint="read the object again before writing",
                ) from None
            raise UnavailableError(
                f"the store took no write within {self._deadline:g} s" + self._trouble,
                hint="check that the NATS server runs and has a leader for the stream",
            ) from None

    async def close(self) -> None:
        """Refuse what waits, and wait for what is under way."""
        self._is_closed = True
        self._unlisten()
        if self._wake is not None:
            self._wake.cancel()
        for pending in self._queue:
            pending.fail(UnavailableError("the store is closing"))
        self._queue.clear()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._deadline)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _admit(self, pending: Pending) -> None:
        if self._is_closed:
            raise UnavailableError("the store is closed")
        if self._queue and (
            self._queued_messages + pending.messages_count > WAITING_MESSAGES_MAX
            or self._queued_bytes + pending.size_bytes > WAITING_BYTES_MAX
        ):
            raise UnavailableError(
                f"{self._queued_messages // 2} writes wait for the store already",
                hint="try again later, or write less at a time",
            )
        self._enqueue(pending)
        self._schedule()

    def _enqueue(self, pending: Pending, *, is_front: bool = False) -> None:
        if is_front:
            self._queue.appendleft(pending)
        else:
            self._queue.append(pending)
        self._queued_messages += pending.messages_count
        self._queued_bytes += pending.size_bytes

    def _forget(self, pending: Pending) -> None:
        self._queued_messages -= pending.messages_count
        self._queued_bytes -= pending.size_bytes

    # -- when to send --------------------------------------------------------------------------

    def _schedule(self) -> None:
        # On the next turn of the loop, so that commits made in the same turn share a batch.
        if not self._is_scheduled and self._wake is None:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _woken(self) -> None:
        self._wake = None
        self._pump()

    def _connection_changed(self, is_connected: bool) -> None:
        self._tip.lose()
        if is_connected and self._wake is not None:
            self._wake.cancel()
            self._pause = 0.0
            self._woken()

    def _back_off(self, error: BacalhauError) -> None:
        if self._wake is not None or self._is_closed:
            return
        if not self._pause:
            logger.warning("Store did not take a batch", extra={"error": str(error)})
        self._trouble = f": {error}"
        self._pause = min(max(self._pause * 2, _PAUSE_MIN), _PAUSE_MAX)
        delay = self._pause * random.uniform(0.5, 1.0)
        self._wake = asyncio.get_running_loop().call_later(delay, self._woken)

    def _pump(self) -> None:
        self._is_scheduled = False
        while self._queue and len(self._tasks) < self._batches_max and not self._is_closed:
            batch = self._take()
            if not batch:
                return
            task = asyncio.create_task(self._run(batch), name="store batch")
            self._tasks.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._schedule()

    def _take(self) -> list[Pending]:
        """The next batch, in order of arrival. A commit that shares an object with one before it
        is held back: together, one of the two would have the batch refused."""
        batch: list[Pending] = []
        kept: deque[Pending] = deque()
        subjects = set(self._busy)
        fences: dict[str, int] = {}
        messages = size = 0
        self._held_back.clear()
        while self._queue:
            pending = self._queue.popleft()
            if pending.done.done():  # given up by its caller
                self._forget(pending)
                continue
            fits = not batch or (
                messages + pending.messages_count <= BATCH_MESSAGES_MAX
                and size + pending.size_bytes <= BATCH_BYTES_MAX
            )
            own = {change.subject for change in pending.changes}
            shared = own & subjects
            subjects |= own  # also where it is held back: the order per object stays
            fence = pending.fence
            is_compatible = fence is None or fences.get(fence.name, fence.token) == fence.token
            if not fits or shared or not is_compatible:
                kept.append(pending)
                for subject in shared:
                    self._held_back.setdefault(subject, []).append(pending)
                if not fits:
                    break
                continue
            if fence is not None:
                fences[fence.name] = fence.token
            self._forget(pending)
            batch.append(pending)
            messages += pending.messages_count
            size += pending.size_bytes
        kept.extend(self._queue)
        self._queue = kept
        return batch

    # -- sending -------------------------------------------------------------------------------

    async def _run(self, batch: list[Pending]) -> None:
        subjects = [change.subject for pending in batch for change in pending.changes]
        self._busy.update(subjects)
        for pending in batch:
            pending.is_under_way = True
            pending.tried.add(pending.changes[0].history_subject)
        again: list[Pending] = []
        try:
            again = await self._attempt(batch)
        except Exception as error:
            logger.exception("Failed to commit a batch")
            for pending in batch:
                pending.fail(error)
        finally:
            self._busy.difference_update(subjects)
            for pending in batch:
                pending.is_under_way = False
            for pending in reversed(again):
                if not pending.done.done():
                    self._enqueue(pending, is_front=True)

    async def _attempt(self, batch: list[Pending]) -> list[Pending]:
        """Send one batch and answer its commits; return those to be sent again."""
        is_pair = self._may_pair(batch)
        try:
            if is_pair:
                first = await self._sender.pair(*batch[0].pair())
            else:
                first = await self._sender.batch([m for p in batch for m in p.messages()])
        except RefusedError as refusal:
            if is_pair:  # as a batch it will be told what is wrong, or nothing is
                batch[0].was_refused = True
                return batch
            return await self._settle(batch, refusal)
        except OutcomeUnknownError as error:
            for pending in batch:
                pending.may_have_happened = True
            self._back_off(error)
            return batch
        except UnavailableError as error:
            self._back_off(error)
            return batch
        except BacalhauError as error:  # only an operator can mend it
            for pending in batch:
                pending.fail(UnavailableError(f"{error}"))
            return []
        self._pause, self._trouble = 0.0, ""
        for pending in batch:
            pending.succeed(first)
            for index, change in enumerate(pending.changes):
                is_absent = change.is_removal
                self._tell_held_back(change.subject, revision_of(first, index), is_absent)
            first += pending.messages_count
            if pending.fence is not None:
                self._tip.fences[pending.fence.name] = pending.fence.token
        return []

    def _tell_held_back(self, subject: str, sequence: int, is_absent: bool) -> None:
        """An object is now at `sequence`: what was decided on an earlier revision, and waits to be
        sent, is refused here already, where it disturbs nobody else's batch."""
        for pending in self._held_back.pop(subject, ()):
            if pending.may_have_happened:
                # Perhaps this is what came of it, or what somebody made of that: to be created over
                # its own removal would bring it back. It is settled once the server refuses it.
                continue
            for change in pending.changes:
                if change.subject != subject or change.expect_sent >= sequence:
                    continue
                if is_absent and change.expect == 0:
                    change.expect_sent = sequence
                else:
                    found = 0 if is_absent else sequence
                    pending.fail(conflict(change.ref, change.expect, found))

    def _may_pair(self, batch: list[Pending]) -> bool:
        """Whether a batch may go out as a pair: a lone change, alone on its way, under a fence
        that is known to hold at the tip. (Two are never refused for each other's sake.)"""
        if not self._use_pairs or self._tip.sequence is None or len(self._tasks) > 1:
            return False
        if len(batch) > 1 or len(batch[0].changes) > 1:
            return False
        (pending,) = batch
        fence = pending.fence
        return (
            not pending.was_refused
            and not pending.may_have_happened
            and not pending.changes[0].is_removal
            and (fence is None or self._tip.fences.get(fence.name) == fence.token)
        )

    async def _settle(self, batch: list[Pending], refusal: RefusedError) -> list[Pending]:
        try:
            again, changed = await self._settler.settle(batch, refusal.found)
        except UnavailableError as error:
            self._back_off(error)
            return batch
        for subject, message in changed.items():
            if message is not None:
                self._tell_held_back(subject, message.sequence, is_tombstone(message.headers))
        if not changed:  # it has changed again, or the cluster was not done with the last
            self._back_off(refusal)
        return again


assert BATCH_MESSAGES_MAX <= MESSAGES_MAX
