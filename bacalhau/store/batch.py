"""Storing messages together: as one atomic batch, or as a pair in quick succession. And telling how
it ended. Which writes go together is decided in `committer.py`.

The server makes an atomic batch safe by staging it in files of its own, with about nine syncs to
disk, however many messages it holds. A pair costs two. It is used for a lone change, where the
order of its messages (history entry first) leaves nothing to repair but an entry of a change that
did not happen, which readers recognise (`history.py`).
"""

import asyncio
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any, Final

from bacalhau.nats.transport import Transport
from bacalhau.store.codec import (
    BATCH,
    BATCH_COMMIT,
    BATCH_SEQUENCE,
    EXPECT,
    EXPECT_LAST,
    EXPECT_LAST_ID,
    ID,
    Out,
)
from bacalhau.store.stream import StreamError, checked
from bacalhau_api.errors import BacalhauError, OutcomeUnknownError, UnavailableError
from bacalhau_controllers.contract import Ids

MESSAGES_MAX: Final = 1000
"""The server's limit for one batch."""

BATCH_SECONDS: Final = 5.0

_WRONG_ID = 10070
_WRONG_SEQUENCE = 10071
_WRONG_SEQUENCE_IN_PROCESS = 10164
# Refused for now, and nothing was stored: the cluster has no leader or another one, resources are
# short, too many requests or batches are under way, a part of the batch was lost or late.
_PASSING = frozenset({10008, 10009, 10023, 10167, 10176, 10210})
_FULL = frozenset({10028, 10047})
_STORE_FAILED = 10077
_FOUND = re.compile(r"wrong last sequence: (\d+)")


class RefusedError(BacalhauError):
    """An expectation did not hold; nothing was stored. `found` is the sequence that the server
    found instead (0 for none), or None where it does not say."""

    def __init__(self, found: int | None) -> None:
        super().__init__(f"an expectation did not hold, found {found}")
        self.found = found


class Tip:
    """The end of the stream, as far as this process knows it.

    While each message that it stores follows directly on the one before, nobody else has written
    anything in between. Then what it knew of the stream still holds, such as which fencing tokens
    are the newest. The server checks the sequence itself, so to be wrong here costs time only.
    """

    def __init__(self) -> None:
        self.sequence: int | None = None
        self.fences: dict[str, int] = {}

    def extend(self, first: int, count: int) -> None:
        """Messages were stored from `first` on."""
        if self.sequence is None or first != self.sequence + 1:
            self.fences.clear()
        self.sequence = first + count - 1

    def lose(self) -> None:
        """What was stored last is not known any more."""
        self.sequence = None
        self.fences.clear()


class Sender:
    """Stores messages over one transport."""

    def __init__(self, transport: Transport, ids: Ids, tip: Tip) -> None:
        self._transport = transport
        self._tip = tip
        self._prefix = ids.uid()[:12]
        self._numbers = itertools.count(1)

    async def batch(self, messages: Sequence[Out], timeout: float = BATCH_SECONDS) -> int:
        """Store all messages or none; return the sequence of the first, the others follow it.

        Raises RefusedError, UnavailableError (nothing was stored), OutcomeUnknownError, and
        StreamError for what only an operator can mend.
        """
        name = self._name()
        generation = self._transport.generation
        *body, last = enumerate(messages, start=1)
        for number, message in body:
            headers = {**message.headers, BATCH: name, BATCH_SEQUENCE: str(number)}
            await self._transport.publish(message.subject, message.data, headers=headers)
        if self._transport.generation != generation:
            raise UnavailableError("the connection was lost in the middle of a batch")
        number, message = last
        headers = {
            **message.headers,
            BATCH: name,
            BATCH_SEQUENCE: str(number),
            BATCH_COMMIT: "1",
        }
        try:
            answer = await self._stored(Out(message.subject, message.data, headers), timeout)
        except OutcomeUnknownError:
            self._tip.lose()
            raise
        if answer.get("count") != len(messages):
            raise StreamError(0, f"a batch of {len(messages)} was answered with {answer}")
        first = int(answer["seq"]) - len(messages) + 1
        self._tip.extend(first, len(messages))
        return first

    async def pair(self, entry: Out, value: Out, timeout: float = BATCH_SECONDS) -> int:
        """Store `entry`, and directly after it `value`; return the sequence of `entry`.

        Only if nobody has written anything since the tip, and nothing lies at the entry's subject
        yet; `value` may have an expectation of its own. Neither is stored without the one before;
        the entry may be stored alone, and then RefusedError or OutcomeUnknownError is raised, too.
        """
        assert self._tip.sequence is not None
        name = self._name()
        expected = {EXPECT_LAST: str(self._tip.sequence), EXPECT: "0", ID: name}
        first = Out(entry.subject, entry.data, {**entry.headers, **expected})
        # The last message of the stream must be the entry, or else it was refused.
        second = Out(value.subject, value.data, {**value.headers, EXPECT_LAST_ID: name})
        answers = await asyncio.gather(
            self._stored(first, timeout), self._stored(second, timeout), return_exceptions=True
        )
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if failures:
            self._tip.lose()
            for failure in failures:  # one lost answer leaves the whole open
                if isinstance(failure, OutcomeUnknownError):
                    raise failure
            raise failures[0]
        sequence = int(answers[0]["seq"])  # type: ignore[index]
        self._tip.extend(sequence, 2)
        return sequence

    def _name(self) -> str:
        return f"{self._prefix}{next(self._numbers):x}"

    async def _stored(self, message: Out, timeout: float) -> dict[str, Any]:
        reply = await self._transport.request(
            message.subject, message.data, headers=message.headers, timeout=timeout
        )
        try:
            return checked(json.loads(reply.data))
        except StreamError as error:
            raise _translated(error) from error


def _translated(error: StreamError) -> BacalhauError:
    if error.code in (_WRONG_SEQUENCE, _WRONG_SEQUENCE_IN_PROCESS, _WRONG_ID):
        found = _FOUND.search(error.description)
        return RefusedError(int(found[1]) if found else None)
    if error.code in _PASSING:
        return UnavailableError(f"the store is busy: {error.description}")
    is_limit = error.code == _STORE_FAILED and "maximum" in error.description
    if error.code in _FULL or is_limit:
        return UnavailableError(
            f"the store is full: {error.description}",
            hint="free disk space, raise the JetStream limits, or shorten the retention",
        )
    if error.code == _STORE_FAILED:  # a fault of the disk: what was written is not known
        return OutcomeUnknownError(f"the store failed: {error.description}")
    return error
