"""One push consumer on the stream, from its start until something is missed.

Delivers raw messages in order, without gap or repeat, or says that it cannot (FeedLostError); to
continue after that is up to `follow.py`. Flow control holds the server back while the reader is
slow: without it, a large store overruns the connection and messages are lost.
"""

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from bacalhau.nats.transport import Message, Subscription
from bacalhau.store.stream import Stream
from bacalhau_api.errors import TransientError, UnavailableError

HEARTBEAT_SECONDS: Final = 2.0
_SILENCE_SECONDS = 2.5 * HEARTBEAT_SECONDS
_INACTIVE_SECONDS = 30.0
_NANO = 1_000_000_000
# Buffered bytes above which the server is not told to go on.
_BUFFER_BYTES_MAX = 4 * 1024 * 1024

_names = itertools.count(1)
_prefix = f"w{secrets.token_hex(6)}"


class FeedLostError(TransientError):
    """The feed cannot go on: a gap, silence, a lost connection, a consumer that was removed."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as a consumer delivers it. `stored_at` is by the server's clock."""

    subject: str
    sequence: int
    stored_at: datetime
    data: bytes
    headers: Mapping[str, str] | None


class Feed:
    """See the module. `policy` is the consumer's deliver policy with its arguments."""

    def __init__(self, stream: Stream, subjects: str, policy: Mapping[str, object]) -> None:
        self._stream = stream
        self._transport = stream.transport
        self._subjects = subjects
        self._policy = policy
        self._name = f"{_prefix}-{next(_names)}"
        self._buffer: list[Delivery] = []
        self._buffered_bytes = 0
        self._delivered = 0
        self._pending: int | None = None
        self._owed = ""  # a flow control request that is to be answered when there is room
        self._heard = time.monotonic()
        self._filled = asyncio.Event()
        self._lost = ""
        self._subscription: Subscription | None = None
        self._unlisten = self._transport.listen(self._connection_changed)
        self.idle_at = 0.0
        """When the server last said that it had delivered everything (Unix time, by our clock)."""

    @property
    def is_current(self) -> bool:
        """Whether all that was there at some moment since the feed was opened has been read."""
        return self._pending == 0 and not self._buffer

    async def open(self) -> None:
        """Create the consumer. Raises UnavailableError, FeedLostError, StreamError."""
        inbox = self._transport.new_inbox()
        # A literal subscription of its own: the server does not deliver to a wildcard one.
        self._subscription = await self._transport.subscribe(inbox, self._received)
        config = {
            "name": self._name,
            "deliver_subject": inbox,
            "filter_subject": self._subjects,
            "ack_policy": "none",
            "max_deliver": 1,
            "replay_policy": "instant",
            "flow_control": True,
            "idle_heartbeat": int(HEARTBEAT_SECONDS * _NANO),
            "inactive_threshold": int(_INACTIVE_SECONDS * _NANO),
            "mem_storage": True,
            "num_replicas": 1,
            **self._policy,
        }
        made = await self._stream.api(
            f"$JS.API.CONSUMER.CREATE.{self._stream.name}.{self._name}.{self._subjects}",
            {"stream_name": self._stream.name, "config": config, "action": "create"},
        )
        # Once something was delivered, it says itself how much there is to come.
        if not self._delivered and not made["delivered"]["consumer_seq"]:
            self._pending = made["num_pending"]
        self._heard = time.monotonic()

    async def close(self) -> None:
        """Remove the consumer, if that can be done now; else the server does it by itself."""
        self._unlisten()
        self._set_lost("closed")
        if self._subscription is not None:
            await self._subscription.close()
            with contextlib.suppress(UnavailableError):
                await self._transport.publish(
                    f"$JS.API.CONSUMER.DELETE.{self._stream.name}.{self._name}"
                )

    async def read(self) -> list[Delivery]:
        """What came since the last call, at least one message, or none after a heartbeat's time
        in which nothing came. Raises FeedLostError."""
        if not self._buffer and not self._lost:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self._filled.wait()
        if self._owed:
            owed, self._owed = self._owed, ""
            with contextlib.suppress(UnavailableError):
                await self._transport.publish(owed)
        # From here on without a pause, so that `is_current` does not speak of what comes later.
        self._filled.clear()
        buffer, self._buffer = self._buffer, []
        self._buffered_bytes = 0
        if not buffer:
            if time.monotonic() - self._heard > _SILENCE_SECONDS:
                self._set_lost("no heartbeat")
            if self._lost:
                raise FeedLostError(f"the feed of {self._subjects} was lost: {self._lost}")
        return buffer

    async def _received(self, message: Message) -> None:
        self._heard = time.monotonic()
        if self._lost:
            return
        headers = message.headers
        if headers is not None and "Status" in headers and not message.data:
            await self._control(message, headers)
            return
        tokens = message.reply.split(".")
        # $JS.ACK.<stream>.<consumer>.<deliveries>.<sequence>.<delivered>.<time>.<pending>, or with
        # two more tokens (domain, account) before the stream.
        at = 5 if len(tokens) == 9 else 7
        if len(tokens) <= at + 3 or int(tokens[at + 1]) != self._delivered + 1:
            self._set_lost("a gap")
            return
        self._delivered += 1
        if self._pending != 0:
            self._pending = int(tokens[at + 3])
        stored_at = datetime.fromtimestamp(int(tokens[at + 2]) / 1e9, UTC)
        self._buffer.append(
            Delivery(message.subject, int(tokens[at]), stored_at, message.data, headers)
        )
        self._buffered_bytes += len(message.data)
        self._filled.set()

    async def _control(self, message: Message, headers: Mapping[str, str]) -> None:
        if headers["Status"] != "100":
            self._set_lost(f"{headers['Status']} {headers.get('Description', '')}".strip())
            return
        # A flow control request wants an empty reply; a heartbeat repeats one that is unanswered.
        owed = message.reply or headers.get("Nats-Consumer-Stalled", "")
        if owed and self._buffered_bytes <= _BUFFER_BYTES_MAX:
            with contextlib.suppress(UnavailableError):
                await self._transport.publish(owed)
        elif owed:
            self._owed = owed
        last = headers.get("Nats-Last-Consumer")
        if last is not None and int(last) != self._delivered:
            self._set_lost("messages were missed")
        elif last is not None and not owed:
            self.idle_at = time.time()

    def _connection_changed(self, is_connected: bool) -> None:
        if not is_connected:
            self._set_lost("the connection was lost")

    def _set_lost(self, cause: str) -> None:
        self._lost = self._lost or cause
        self._filled.set()
