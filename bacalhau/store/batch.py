"""Sending one atomic batch, and telling how it ended. Which writes share a batch is decided in
`committer.py`."""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Final

from bacalhau.nats.transport import Transport
from bacalhau.store.codec import BATCH, BATCH_COMMIT, BATCH_SEQUENCE, Out
from bacalhau.store.stream import StreamError, checked
from bacalhau_api.errors import BacalhauError, OutcomeUnknownError, UnavailableError
from bacalhau_controllers.contract import Ids

MESSAGES_MAX: Final = 1000
"""The server's limit for one batch."""

BATCH_SECONDS: Final = 5.0

_WRONG_SEQUENCE = 10071
_WRONG_SEQUENCE_IN_PROCESS = 10164
# Refused for now, and nothing was stored: the cluster has no leader or another one, resources are
# short, too many requests or batches are under way, a part of the batch was lost or late.
_PASSING = frozenset({10008, 10009, 10023, 10167, 10176, 10210})
_FULL = frozenset({10028, 10047})
_STORE_FAILED = 10077
_FOUND = re.compile(r"wrong last sequence: (\d+)")


class RefusedError(BacalhauError):
    """An expectation of the batch did not hold; nothing was stored. `found` is the sequence that
    the server found instead (0 for none), or None where it does not say."""

    def __init__(self, found: int | None) -> None:
        super().__init__(f"an expectation did not hold, found {found}")
        self.found = found


class BatchSender:
    """Sends batches over one transport."""

    def __init__(self, transport: Transport, ids: Ids) -> None:
        self._transport = transport
        self._prefix = ids.uid()[:12]
        self._numbers = itertools.count(1)

    async def send(self, messages: Sequence[Out], timeout: float = BATCH_SECONDS) -> int:
        """Store all messages or none; return the sequence of the first, the others follow it.

        Raises RefusedError, UnavailableError (nothing was stored), OutcomeUnknownError, and
        StreamError for what only an operator can mend.
        """
        batch = f"{self._prefix}{next(self._numbers):x}"
        generation = self._transport.generation
        *body, last = enumerate(messages, start=1)
        for number, message in body:
            headers = {**message.headers, BATCH: batch, BATCH_SEQUENCE: str(number)}
            await self._transport.publish(message.subject, message.data, headers=headers)
        if self._transport.generation != generation:
            raise UnavailableError("the connection was lost in the middle of a batch")
        number, message = last
        headers = {
            **message.headers,
            BATCH: batch,
            BATCH_SEQUENCE: str(number),
            BATCH_COMMIT: "1",
        }
        reply = await self._transport.request(
            message.subject, message.data, headers=headers, timeout=timeout
        )
        return _first_sequence(reply.data, len(messages))


def _first_sequence(data: bytes, count: int) -> int:
    try:
        answer = checked(json.loads(data))
    except StreamError as error:
        if error.code in (_WRONG_SEQUENCE, _WRONG_SEQUENCE_IN_PROCESS):
            found = _FOUND.search(error.description)
            raise RefusedError(int(found[1]) if found else None) from None
        if error.code in _PASSING:
            raise UnavailableError(f"the store is busy: {error.description}") from error
        is_limit = error.code == _STORE_FAILED and "maximum" in error.description
        if error.code in _FULL or is_limit:
            raise UnavailableError(
                f"the store is full: {error.description}",
                hint="free disk space, raise the JetStream limits, or shorten the retention",
            ) from error
        if error.code == _STORE_FAILED:  # a fault of the disk: what was written is not known
            raise OutcomeUnknownError(f"the store failed: {error.description}") from error
        raise
    if answer.get("count") != count:
        raise StreamError(0, f"a batch of {count} was answered with {answer}")
    return int(answer["seq"]) - count + 1
