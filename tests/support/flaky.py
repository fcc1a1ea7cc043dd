"""A transport that loses what it is told to lose, over a real one."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal

from bacalhau.nats.transport import Handler, Listener, Message, Subscription, Transport
from bacalhau_api.errors import OutcomeUnknownError

Fault = Literal["", "lose request", "lose reply"]


class FlakyTransport:
    """Passes everything on. Each request whose subject begins with one of `prefixes` meets the next
    of `faults` first; without any left, all is well."""

    def __init__(self, inner: Transport, *prefixes: str) -> None:
        self._inner = inner
        self._prefixes = prefixes
        self.faults: deque[Fault] = deque()
        self.requests: list[str] = []

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 5.0,
    ) -> Message:
        """See Transport."""
        fault: Fault = ""
        if subject.startswith(self._prefixes):
            self.requests.append(subject)
            fault = self.faults.popleft() if self.faults else ""
        if fault == "lose request":
            raise OutcomeUnknownError("the request was lost")
        reply = await self._inner.request(subject, payload, headers=headers, timeout=timeout)
        if fault == "lose reply":
            raise OutcomeUnknownError("the reply was lost")
        return reply

    @property
    def is_connected(self) -> bool:
        """See Transport."""
        return self._inner.is_connected

    @property
    def generation(self) -> int:
        """See Transport."""
        return self._inner.generation

    @property
    def payload_bytes_max(self) -> int:
        """See Transport."""
        return self._inner.payload_bytes_max

    def new_inbox(self) -> str:
        """See Transport."""
        return self._inner.new_inbox()

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """See Transport."""
        await self._inner.publish(subject, payload, reply=reply, headers=headers)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """See Transport."""
        return await self._inner.subscribe(subject, handler, queue=queue)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """See Transport."""
        return self._inner.listen(listener)

    async def wait_connected(self, timeout: float) -> None:
        """See Transport."""
        await self._inner.wait_connected(timeout)
