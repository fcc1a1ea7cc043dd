"""Leadership: one process at a time moves objects, by a lease in the store.

Holding the lease is an optimisation and its token the guarantee: whoever lost the lease without
noticing is refused by the store, commit by commit. So a paused process can do no harm, and the
deadlines here only have to be good, not perfect.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

from bacalhau_api.errors import FencedError, TransientError
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.store import Lease, Store
from bacalhau_controllers.tasks import until_first

logger = logging.getLogger(__name__)

_RELEASE_TIMEOUT_SECONDS = 2.0


class LeadershipLostError(Exception):
    """Ends a term. Raised by the elector when the lease is lost, and by whoever learns of it first
    (such as a worker whose commit was fenced off)."""


class Elector:
    """Stands for election under one lease, and runs one term after another."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        rng: Random,
        *,
        name: str,
        holder: str,
        ttl_seconds: float = 12.0,
    ) -> None:
        self._store = store
        self._clock = clock
        self._rng = rng
        self._name = name
        self._holder = holder
        self._ttl = ttl_seconds
        self._step = ttl_seconds / 4

    async def acquire(self) -> Lease:
        """Wait for the lease for as long as it takes."""
        is_quiet = False
        while True:
            try:
                async with asyncio.timeout(self._step):
                    lease = await self._store.acquire_lease(self._name, self._holder, self._ttl)
                if lease is not None:
                    return lease
                is_quiet = False
            except (TransientError, TimeoutError) as error:
                if not is_quiet:
                    logger.warning("Lease request failed", extra=self._fields(error=str(error)))
                is_quiet = True
            await self.pause()

    async def pause(self) -> None:
        """The time between two attempts, jittered so that candidates do not march in step."""
        await self._clock.sleep(self._step * self._rng.uniform(0.5, 1.0))

    async def serve(
        self,
        lease: Lease,
        term: Callable[[], Coroutine[Any, Any, None]],
        on_lost: Callable[[], None],
    ) -> bool:
        """Run `term` under the lease, and give the lease back after it.

        When the lease is lost, `on_lost` is called at once, then the term is cancelled. Returns
        True if the term ended by itself, False if leadership was lost. What else the term raises
        is passed on.
        """
        logger.info("Started leading", extra=self._fields(token=lease.token))
        is_lost = False
        try:
            await until_first(lease_renewal=self._hold(lease, on_lost), term=term())
        except* LeadershipLostError as group:
            is_lost = True
            on_lost()
            logger.warning("Lost leadership", extra=self._fields(error=_first_line(group)))
        finally:
            await self._release(lease)
        return not is_lost

    async def _hold(self, lease: Lease, on_lost: Callable[[], None]) -> None:
        """Renew until cancelled. Raises LeadershipLostError, at the latest at the deadline."""
        pause = self._step
        while True:
            left = lease.deadline - self._clock.monotonic()
            await self._clock.sleep(max(0.0, min(pause, left)))
            left = lease.deadline - self._clock.monotonic()
            if left <= 0:
                on_lost()
                raise LeadershipLostError("the lease could not be renewed in time")
            try:
                async with asyncio.timeout(min(self._step, left)):
                    lease = await self._store.renew_lease(lease, self._ttl)
                pause = self._step
            except FencedError as error:
                on_lost()
                raise LeadershipLostError(error.message) from error
            except (TransientError, TimeoutError) as error:
                pause = self._step / 4
                logger.warning("Lease renewal failed", extra=self._fields(error=str(error)))

    async def _release(self, lease: Lease) -> None:
        """Let the next one begin at once. Without an answer the lease runs out by itself."""
        try:
            async with asyncio.timeout(_RELEASE_TIMEOUT_SECONDS):
                await self._store.release_lease(lease)
        except (TransientError, TimeoutError, FencedError) as error:
            logger.info("Left lease to expire", extra=self._fields(error=str(error)))

    def _fields(self, **more: object) -> dict[str, object]:
        return {"lease": self._name, "holder": self._holder, **more}


def _first_line(group: BaseExceptionGroup[LeadershipLostError]) -> str:
    """The words of the first leaf."""
    leaf: BaseException = group
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return str(leaf)
