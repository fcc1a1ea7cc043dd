"""Nodes that pin inputs through a desk over a memory store, without a network."""

from collections.abc import Awaitable, Callable

from bacalhau_api.errors import UnavailableError
from bacalhau_api.wire import PinReply, PinRequest, Refused
from bacalhau_controllers.manifest import PinDesk


class DirectLine:
    """One node's line to a desk. `cuts` makes the next answers get lost, after they were made."""

    def __init__(self, desk: PinDesk, node: str, session: str) -> None:
        self._desk = desk
        self._node = node
        self._session = session
        self.cuts = 0
        self.asked: list[str] = []
        self.before_make: Callable[[], Awaitable[None]] | None = None

    async def pin(self, ask: PinRequest) -> PinReply | Refused:
        """See PinLine."""
        self.asked.append(ask.action)
        if ask.action == "make" and self.before_make is not None:
            hook, self.before_make = self.before_make, None
            await hook()
        reply = await self._desk.answer(ask.but(node=self._node, session=self._session))
        if self.cuts:
            self.cuts -= 1
            raise UnavailableError("the answer was lost")
        return reply
