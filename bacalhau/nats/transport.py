"""The few things that the store and the links need of a NATS client, so that another client can
take the place of nats-py. Implementation: `connection.Connection`."""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol


class Message(Protocol):
    """A message as received. `headers` is None if it has none; a `Status` header marks control
    messages of the server."""

    subject: str
    reply: str
    data: bytes
    headers: dict[str, str] | None


def has_field(data: bytes, name: str) -> bool:
    """Whether a message has a field of that name. Raises ValueError if it is not a JSON object."""
    try:
        found = json.loads(data)
    except RecursionError as error:
        raise ValueError("the message is nested too deeply") from error
    if isinstance(found, dict):
        return name in found
    raise ValueError("the message is not an object")


Handler = Callable[[Message], Awaitable[None]]
"""Called for the messages of one subscription, one after the other."""

Listener = Callable[[bool], None]
"""Called with True when a connection was made, with False when it was lost."""


class Subscription(Protocol):
    """Interest in a subject. Stays through reconnects, until closed."""

    async def close(self) -> None:
        """Stop. No handler is called afterwards; one under way is cancelled."""
        ...


class Transport(Protocol):
    """A connection that comes back by itself."""

    @property
    def is_connected(self) -> bool:
        """Whether it can be used right now."""
        ...

    @property
    def generation(self) -> int:
        """How many times a connection was made. Replies never cross from one to the next."""
        ...

    @property
    def payload_bytes_max(self) -> int:
        """The server's limit for one message, headers included."""
        ...

    def new_inbox(self) -> str:
        """A fresh, unguessable subject that this client may subscribe to."""
        ...

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send, without waiting. Raises UnavailableError at once while not connected, and
        InvalidError for a subject that is too long for the server, as `request` and `subscribe`."""
        ...

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 5.0,
    ) -> Message:
        """Send, and wait for one reply.

        Raises UnavailableError if it surely reached nobody (not connected, no responders), and
        OutcomeUnknownError if it was sent but the answer did not come.
        """
        ...

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Have `handler` called for each message. Works while not connected, too."""
        ...

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` on each change of `is_connected`; returns what ends that."""
        ...

    async def wait_connected(self, timeout: float) -> None:
        """Return once connected; raises UnavailableError after `timeout` seconds."""
        ...
