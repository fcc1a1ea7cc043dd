"""A node that the orchestrator does not let in, because it was deleted there or never joined: how that
is recognised, and told once. Its work goes on as in any other silence."""

import logging
from typing import Final, Protocol

from bacalhau_controllers.contract import Clock

logger = logging.getLogger(__name__)

LOOK_SECONDS: Final = 10.0


class Refusable(Protocol):
    """A line to the orchestrator that may be refused."""

    @property
    def address(self) -> str:
        """Where it dials."""
        ...

    @property
    def last_error(self) -> str:
        """Why it is down; empty if it is not."""
        ...


def is_refused(line: Refusable) -> bool:
    """Whether the server answered that it does not know our key."""
    return "authorization" in line.last_error.lower()


async def tell_refusals(line: Refusable, node: str, clock: Clock) -> None:
    """Log each time that the node is shut out, for ever. Only if two looks in a row find it so: an
    orchestrator that was just started lets nobody in until it has read its store."""
    looks = 0
    while True:
        await clock.sleep(LOOK_SECONDS)
        looks = looks + 1 if is_refused(line) else 0
        if looks == 2:
            logger.warning(
                "Orchestrator refuses this node, which it does not know (any more); its work goes "
                "on. To come back, start it with --orchestrator and a new --token",
                extra={"node": node, "orchestrator": line.address, "error": line.last_error},
            )
