"""Following subjects of the stream through everything that may happen to it: reconnects, restarts
of the server, a stream that was made anew. Feeds come and go; the position is kept.

What the deliveries mean is left to `jetstream.py`.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final, Self

from bacalhau.store.feed import Delivery, Feed, FeedLostError
from bacalhau.store.stream import Stream, StreamError, StreamInfo
from bacalhau_api.errors import BacalhauError, TransientError
from bacalhau_controllers.store import Cursor, Restarted, Synced

logger = logging.getLogger(__name__)

LAST_PER_SUBJECT: Final[Mapping[str, object]] = {"deliver_policy": "last_per_subject"}
_PAUSE_MIN = 0.05
_PAUSE_MAX = 2.0
_CONNECT_SECONDS = 5.0
# After so many items in a row the event loop gets its turn.
_ITEMS_PER_TURN = 64

# In an epoch, between the time at which the stream was created and that at which it was found to
# have lost its end.
_SHORTENED: Final = "~"

Item = Delivery | Restarted | Synced


class Current:
    """When the watches of a store last missed nothing, for those that begin where one has been."""

    def __init__(self) -> None:
        self._cursor = Cursor("", 0)
        self._moment = 0.0

    def note(self, cursor: Cursor, moment: float) -> None:
        """At that moment (Unix time) nothing was stored beyond the cursor."""
        if moment >= self._moment:
            self._cursor, self._moment = cursor, moment

    def moment_of(self, cursor: Cursor) -> float:
        """The latest moment at which surely nothing was stored beyond the cursor; else 0."""
        known = self._cursor
        is_known = known.epoch == cursor.epoch and known.revision <= cursor.revision
        return self._moment if is_known else 0.0


class Follow(AsyncIterator[Item]):
    """All messages under `subjects`, one by one; Synced once everything there was came.

    `tombstone_seconds` is how long removals can be seen: a position older than that cannot be
    continued. `is_listing` and `floor` say whether a delivery belongs to a first list, in which
    tombstones at or below `floor` tell of nothing that was delivered. `current` is shared with
    other watches of the same subjects.
    """

    def __init__(
        self,
        stream: Stream,
        subjects: str,
        since: Cursor | None,
        tombstone_seconds: float,
        current: Current | None = None,
    ) -> None:
        self._stream = stream
        self._subjects = subjects
        self._since = since
        self._tombstones = timedelta(seconds=tombstone_seconds)
        self._epoch: str | None = None
        self._position = 0
        self._position_time: datetime | None = None
        self._current = current or Current()
        # When no removal was missing up to the position: in Unix time, by which the server counts
        # the time of tombstones, too, and which also passes while the machine sleeps.
        self._current_at = 0.0
        self._is_synced = False
        self._ready: deque[Item] = deque()
        self._feed: Feed | None = None
        self._taken = 0
        self._pause = 0.0
        self.is_listing = False
        self.floor = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._drop_feed()

    async def __anext__(self) -> Item:
        while not self._ready:
            await self._advance()
        self._taken += 1
        if self._taken % _ITEMS_PER_TURN == 0:
            await asyncio.sleep(0)
        item = self._ready.popleft()
        if isinstance(item, Synced):
            self.is_listing = False
        return item

    async def _advance(self) -> None:
        try:
            if self._feed is None:
                self._feed = await self._open()
            else:
                delivered = await self._feed.read()
                self._take(delivered)
                if self._feed.idle_at > self._current_at:
                    self._current_at = self._feed.idle_at
                    self._current.note(self._cursor(), self._current_at)
                self._pause = 0.0
                # Silence: what the server still had to deliver may have expired.
                if not (delivered or self._is_synced) and self._position >= await self._newest():
                    self._set_synced()
            if self._feed.is_current and not self._is_synced:
                self._set_synced()
        except (TransientError, StreamError) as error:
            await self._drop_feed()
            await self._back_off(error)

    def _set_synced(self) -> None:
        self._is_synced = True
        self._ready.append(Synced(self._cursor()))
        self._current.note(self._cursor(), self._current_at)

    def _cursor(self) -> Cursor:
        return Cursor(self._epoch or "", self._position)

    def _take(self, delivered: Sequence[Delivery]) -> None:
        if delivered:
            self._ready.extend(delivered)
            self._position = delivered[-1].sequence
            self._position_time = delivered[-1].stored_at

    async def _open(self) -> Feed:
        """A feed from the position, or from the start if that cannot be continued."""
        transport = self._stream.transport
        if not transport.is_connected:
            await transport.wait_connected(_CONNECT_SECONDS)
        info = await self._stream.info()
        if self._epoch is None and self._since is not None:
            self._epoch, self._position = self._since.epoch, self._since.revision
            self._current_at = self._current.moment_of(self._since)
        if self._epoch is None:
            self._start_list(info, info.created)
        elif not await self._can_continue(info):
            logger.info("Store cannot continue a watch", extra={"position": self._position})
            epoch = self._epoch_after(info)
            self._ready.clear()
            self._ready.append(Restarted(epoch))
            self._start_list(info, epoch)
        policy: Mapping[str, object] = LAST_PER_SUBJECT
        if self._position or not self.is_listing:
            policy = {
                "deliver_policy": "by_start_sequence",
                "opt_start_seq": self._position + 1,
            }
        feed = Feed(self._stream, self._subjects, policy)
        try:
            await feed.open()
            if (await self._stream.info()).created != info.created:
                raise FeedLostError("the stream was made anew meanwhile")
        except BaseException:
            await feed.close()
            raise
        return feed

    def _epoch_after(self, info: StreamInfo) -> str:
        """A stream that is shorter than it was has lost its end, such as by a power failure or by a
        backup that was restored. It gives the same revisions out again, so that they cannot be
        compared any more: it counts as another one."""
        if self._epoch is None or created_of(self._epoch) != info.created:
            return info.created
        if self._position <= info.sequence_last:
            return self._epoch
        return f"{info.created}{_SHORTENED}{info.now.timestamp():.6f}"

    def _start_list(self, info: StreamInfo, epoch: str) -> None:
        self._epoch = epoch
        self._position = 0
        self._position_time = None
        self._current_at = time.time()
        self._is_synced = False
        self.floor = info.sequence_last
        self.is_listing = True

    async def _can_continue(self, info: StreamInfo) -> bool:
        """Whether nothing was lost between the position and now.

        A stream of the same name that is another one, or shorter, delivers nothing without any
        error. Tombstones that expired are gone without a trace, so it must not be longer ago than
        they are kept that nothing was missing. When that was is known of where a watch of this
        store has been; of another position we know only which messages are younger.
        """
        is_same = self._epoch is not None and info.created == created_of(self._epoch)
        if not is_same or self._position > info.sequence_last:
            return False
        if self._position == info.sequence_last:
            return True  # nothing was written since, so nothing was removed
        if time.time() - self._current_at < self._tombstones.total_seconds():
            return True
        stored_at = self._position_time
        if stored_at is not None and info.now - stored_at < self._tombstones:
            return True
        oldest = await self._stream.first_since(info.now - self._tombstones, self._subjects)
        return oldest is not None and self._position >= oldest.sequence - 1

    async def _newest(self) -> int:
        """The newest sequence under the subjects; 0 if there is none."""
        newest = await self._stream.last(self._subjects)
        return newest.sequence if newest else 0

    async def _drop_feed(self) -> None:
        feed, self._feed = self._feed, None
        if feed is not None:
            await feed.close()

    async def _back_off(self, error: BacalhauError) -> None:
        if not self._pause:
            logger.info("Store lost a watch", extra={"error": str(error)})
        self._pause = min(max(self._pause * 2, _PAUSE_MIN), _PAUSE_MAX)
        started = time.monotonic()
        await asyncio.sleep(self._pause * random.uniform(0.5, 1.0))
        logger.debug("Watch resumes", extra={"after": time.monotonic() - started})


def created_of(epoch: str) -> str:
    """When the stream of an epoch was created."""
    return epoch.partition(_SHORTENED)[0]
