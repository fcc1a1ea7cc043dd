"""Group commit: concurrent commits share atomic batches.

A batch costs the server the same few syncs to disk however many messages it holds. A lone commit
goes out at once; while batches are under way, what comes meanwhile gathers for the next one. When
the expectation of one commit does not hold, the server refuses the whole batch: the culprit is
found and answered, the others are sent again. When an answer is lost, the same commit is sent
again, too: its expectations keep it from happening twice, and its history entry tells afterwards
whether the refusal came from itself.
"""

import asyncio
import itertools
import logging
import random
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from bacalhau.store.batch import MESSAGES_MAX, BatchSender, RefusedError
from bacalhau.store.codec import COMMIT, EXPECT, EXPECT_OF, Out, fence_subject, is_tombstone
from bacalhau.store.stream import Stored, Stream
from bacalhau_api.errors import (
    BacalhauError,
    ConflictError,
    FencedError,
    OutcomeUnknownError,
    UnavailableError,
)
from bacalhau_api.meta import Ref
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
_READS_AT_ONCE = 16


@dataclass(slots=True)
class Change:
    """One object of a commit: two messages, the object and its history entry.

    `expect` is what the caller expects; `expect_sent` what the server is told, which is the
    tombstone's sequence where an object is created over one. `history_prefix` lacks only the
    previous revision.
    """

    ref: Ref
    subject: str
    history_prefix: str
    expect: int
    data: bytes
    object_headers: Mapping[str, str]
    history_headers: Mapping[str, str]
    expect_sent: int = -1

    def __post_init__(self) -> None:
        if self.expect_sent < 0:
            self.expect_sent = self.expect

    @property
    def history_subject(self) -> str:
        """Where the history entry goes."""
        return f"{self.history_prefix}.{self.expect_sent}"


@dataclass(slots=True, eq=False)
class _Waiting:
    id: str
    changes: Sequence[Change]
    fence: Fence | None
    done: asyncio.Future[int]
    size_bytes: int
    is_under_way: bool = False
    may_have_happened: bool = False
    tried: set[str] = field(default_factory=set)

    def messages(self) -> Iterable[Out]:
        """Object and history entry of each change; the first entry carries the fence."""
        fence = self.fence
        for change in self.changes:
            expect = {EXPECT: str(change.expect_sent)}
            yield Out(change.subject, change.data, {**expect, **change.object_headers})
            headers = {**change.history_headers, COMMIT: self.id}
            if fence is not None:
                headers |= {EXPECT: str(fence.token), EXPECT_OF: fence_subject(fence.name)}
                fence = None
            yield Out(change.history_subject, change.data, headers)

    def guards(self) -> Iterable[tuple[str, int]]:
        """The subjects whose sequence the commit depends on, and what it expects there."""
        for change in self.changes:
            yield change.subject, change.expect_sent
        if self.fence is not None:
            yield fence_subject(self.fence.name), self.fence.token


class Committer:
    """Gathers commits into batches; at most `batches_max` are under way."""

    def __init__(
        self, stream: Stream, ids: Ids, *, batches_max: int = 2, deadline: float = 10.0
    ) -> None:
        self._stream = stream
        self._sender = BatchSender(stream.transport, ids)
        self._batches_max = batches_max
        self._deadline = deadline
        self._queue: deque[_Waiting] = deque()
        self._queued_messages = 0
        self._queued_bytes = 0
        self._busy: set[str] = set()  # object subjects in batches under way
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
        """Store all changes or none; return the sequence of the first, where change number k has
        the revision `first + 2 * k`. For errors see Store.commit."""
        waiting = _Waiting(
            id=f"{self._prefix}-{next(self._numbers):x}",
            changes=changes,
            fence=fence,
            done=asyncio.get_running_loop().create_future(),
            size_bytes=2 * sum(len(change.data) for change in changes),
        )
        self._admit(waiting)
        try:
            async with asyncio.timeout(self._deadline):
                return await waiting.done
        except TimeoutError:
            if waiting.is_under_way or waiting.may_have_happened:
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
        for waiting in self._queue:
            _fail(waiting, UnavailableError("the store is closing"))
        self._queue.clear()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._deadline)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _admit(self, waiting: _Waiting) -> None:
        if self._is_closed:
            raise UnavailableError("the store is closed")
        messages = 2 * len(waiting.changes)
        if (
            self._queued_messages + messages > WAITING_MESSAGES_MAX
            or self._queued_bytes + waiting.size_bytes > WAITING_BYTES_MAX
        ) and self._queue:
            raise UnavailableError(
                f"{self._queued_messages // 2} writes wait for the store already",
                hint="try again later, or write less at a time",
            )
        self._enqueue(waiting)
        self._schedule()

    def _enqueue(self, waiting: _Waiting, *, is_front: bool = False) -> None:
        if is_front:
            self._queue.appendleft(waiting)
        else:
            self._queue.append(waiting)
        self._queued_messages += 2 * len(waiting.changes)
        self._queued_bytes += waiting.size_bytes

    def _schedule(self) -> None:
        # On the next turn of the loop, so that commits made in the same turn share a batch.
        if not self._is_scheduled and self._wake is None:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _woken(self) -> None:
        self._wake = None
        self._pump()

    def _connection_changed(self, is_connected: bool) -> None:
        if is_connected and self._wake is not None:
            self._wake.cancel()
            self._pause = 0.0
            self._woken()

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

    def _take(self) -> list[_Waiting]:
        """The next batch, in order of arrival. A commit that shares an object with one before it
        is held back: together, one of the two would have the batch refused."""
        batch: list[_Waiting] = []
        kept: deque[_Waiting] = deque()
        subjects = set(self._busy)
        fences: dict[str, int] = {}
        messages = size = 0
        while self._queue:
            waiting = self._queue.popleft()
            count = 2 * len(waiting.changes)
            if waiting.done.done():  # given up by its caller
                self._unqueue(waiting)
                continue
            own = [change.subject for change in waiting.changes]
            fence = waiting.fence
            fits = not batch or (
                messages + count <= BATCH_MESSAGES_MAX
                and size + waiting.size_bytes <= BATCH_BYTES_MAX
            )
            is_compatible = fence is None or fences.get(fence.name, fence.token) == fence.token
            is_free = subjects.isdisjoint(own)
            subjects.update(own)  # also where it is held back: the order per object stays
            if not (fits and is_free and is_compatible):
                kept.append(waiting)
                if not fits:
                    break
                continue
            if fence is not None:
                fences[fence.name] = fence.token
            self._unqueue(waiting)
            batch.append(waiting)
            messages += count
            size += waiting.size_bytes
        kept.extend(self._queue)
        self._queue = kept
        return batch

    def _unqueue(self, waiting: _Waiting) -> None:
        self._queued_messages -= 2 * len(waiting.changes)
        self._queued_bytes -= waiting.size_bytes

    async def _run(self, batch: list[_Waiting]) -> None:
        subjects = [change.subject for waiting in batch for change in waiting.changes]
        self._busy.update(subjects)
        for waiting in batch:
            waiting.is_under_way = True
            waiting.tried.add(waiting.changes[0].history_subject)
        again: list[_Waiting] = []
        try:
            again = await self._attempt(batch)
        except Exception as error:
            logger.exception("Failed to commit a batch")
            for waiting in batch:
                _fail(waiting, error)
        finally:
            self._busy.difference_update(subjects)
            for waiting in batch:
                waiting.is_under_way = False
            for waiting in reversed(again):
                if not waiting.done.done():
                    self._enqueue(waiting, is_front=True)

    async def _attempt(self, batch: list[_Waiting]) -> list[_Waiting]:
        """Send one batch and answer its commits; return those to be sent again."""
        try:
            first = await self._sender.send([m for w in batch for m in w.messages()])
        except RefusedError as refusal:
            return await self._settle(batch, refusal)
        except OutcomeUnknownError as error:
            for waiting in batch:
                waiting.may_have_happened = True
            self._back_off(error)
            return batch
        except UnavailableError as error:
            self._back_off(error)
            return batch
        except BacalhauError as error:  # only an operator can mend it
            for waiting in batch:
                _fail(waiting, UnavailableError(f"{error}"))
            return []
        self._pause, self._trouble = 0.0, ""
        for waiting in batch:
            _succeed(waiting, first)
            first += 2 * len(waiting.changes)
        return []

    def _back_off(self, error: BacalhauError) -> None:
        if self._wake is not None or self._is_closed:
            return
        if not self._pause:
            logger.warning("Store did not take a batch", extra={"error": str(error)})
        self._trouble = f": {error}"
        self._pause = min(max(self._pause * 2, _PAUSE_MIN), _PAUSE_MAX)
        delay = self._pause * random.uniform(0.5, 1.0)
        self._wake = asyncio.get_running_loop().call_later(delay, self._woken)

    # -- after a refusal -----------------------------------------------------------------------

    async def _settle(self, batch: list[_Waiting], refusal: RefusedError) -> list[_Waiting]:
        try:
            changed = await self._find_changed(batch, refusal.found)
            culprits = {w: s for w in batch for s, _ in w.guards() if s in changed}
            if not culprits:  # it has changed again, or the cluster was not done with the last
                self._back_off(refusal)
            again = []
            for waiting in batch:
                if waiting not in culprits or not await self._refuse(waiting, changed):
                    again.append(waiting)
            return again
        except UnavailableError as error:
            self._back_off(error)
            return batch

    async def _find_changed(
        self, batch: list[_Waiting], found: int | None
    ) -> dict[str, Stored | None]:
        """The guarded subjects whose newest message is not the expected one, with that message."""
        guards = {subject: expect for w in batch for subject, expect in w.guards()}
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

    async def _refuse(self, waiting: _Waiting, changed: Mapping[str, Stored | None]) -> bool:
        """Answer a commit whose expectation did not hold; False if it is to be sent again."""
        if waiting.may_have_happened and await self._find_own(waiting):
            return True
        if waiting.fence is not None and fence_subject(waiting.fence.name) in changed:
            _fail(waiting, fenced(waiting.fence))
            return True
        is_refused = False
        for change in waiting.changes:
            if change.subject not in changed:
                continue
            message = changed[change.subject]
            is_absent = message is None or is_tombstone(message.headers)
            if change.expect == 0 and is_absent:  # created over a tombstone
                change.expect_sent = message.sequence if message else 0
                continue
            found = message.sequence if message and not is_absent else 0
            _fail(waiting, conflict(change.ref, change.expect, found))
            is_refused = True
        return is_refused

    async def _find_own(self, waiting: _Waiting) -> bool:
        """Whether an earlier attempt went through, its answer lost: its history entry tells."""
        for subject in waiting.tried:
            entry = await self._stream.last(subject)
            if entry is not None and entry.headers.get(COMMIT) == waiting.id:
                _succeed(waiting, entry.sequence - 1)
                return True
        return False


def fenced(fence: Fence) -> FencedError:
    """The error for a fence that is outdated."""
    return FencedError(f"the lease {fence.name!r} was taken by another since token {fence.token}")


def conflict(ref: Ref, expect: int, found: int) -> ConflictError:
    """The error for an object that is not at the revision expected; 0 stands for absent."""
    return ConflictError(
        f"{ref} was expected at revision {expect} and is at {found}", hint="read it again"
    )


def _succeed(waiting: _Waiting, first: int) -> None:
    if not waiting.done.done():
        waiting.done.set_result(first)


def _fail(waiting: _Waiting, error: BaseException) -> None:
    if not waiting.done.done():
        waiting.done.set_exception(error)


assert BATCH_MESSAGES_MAX <= MESSAGES_MAX
