"""Notices at once when a node's connection ends, where silence would take its time to tell.

The server tells its system account of each connection that begins and ends. That is only a short
cut: whatever is missed here, the missing beats show.
"""

import asyncio
import json
import logging
from collections.abc import Callable

from bacalhau.nats.config import NODES_ACCOUNT
from bacalhau.nats.transport import Message, Transport

logger = logging.getLogger(__name__)

RETURN_SECONDS = 3.0
"""A node whose connection broke mostly dials again at once; every status that says so is a write."""

_Connection = tuple[str, int]  # server id, client id


class Departures:
    """Watches the connections of the nodes' account.

    `on_gone(public_key)` is called for a user whose last connection ended `return_seconds` ago.
    `system` is a connection with the system account's credentials.
    """

    def __init__(
        self,
        system: Transport,
        on_gone: Callable[[str], None],
        *,
        return_seconds: float = RETURN_SECONDS,
    ) -> None:
        self._system = system
        self._on_gone = on_gone
        self._return_seconds = return_seconds
        self._open: dict[str, set[_Connection]] = {}
        self._leaving: dict[str, asyncio.TimerHandle] = {}

    async def run(self) -> None:
        """Watch, until cancelled."""
        unlisten = self._system.listen(self._on_link)
        subscription = await self._system.subscribe(
            f"$SYS.ACCOUNT.{NODES_ACCOUNT}.*", self._received
        )
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            unlisten()
            await subscription.close()
            self._forget()

    def _on_link(self, connected: bool) -> None:
        # What happened meanwhile is not told later.
        if not connected:
            self._forget()

    def _forget(self) -> None:
        self._open.clear()
        for timer in self._leaving.values():
            timer.cancel()
        self._leaving.clear()

    async def _received(self, message: Message) -> None:
        try:
            event = json.loads(message.data)
            user = str(event["client"]["user"])
            connection = (str(event["server"]["id"]), int(event["client"]["id"]))
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("Unreadable event of the server", extra={"error": repr(error)})
            return
        if message.subject.endswith(".CONNECT"):
            self._open.setdefault(user, set()).add(connection)
            if (timer := self._leaving.pop(user, None)) is not None:
                timer.cancel()
        elif message.subject.endswith(".DISCONNECT"):
            self._ended(user, connection)

    def _ended(self, user: str, connection: _Connection) -> None:
        still = self._open.get(user, set())
        if connection not in still:  # began before this watch: there may be others like it
            return
        still.discard(connection)
        if still:
            return
        del self._open[user]
        loop = asyncio.get_running_loop()
        self._leaving[user] = loop.call_later(self._return_seconds, self._gone, user)

    def _gone(self, user: str) -> None:
        self._leaving.pop(user, None)
        self._on_gone(user)
