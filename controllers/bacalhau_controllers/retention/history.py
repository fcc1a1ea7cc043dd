"""Forgets the history of a namespace that is older, or more, than the namespace keeps.

How long each change is remembered is fixed when it is written, by the store, from the namespace as
it is then. This is for limits that were lowered since, and for those of size. Nothing hangs on when
exactly it is done, so passes are far apart.
"""

import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from bacalhau_api.meta import Ref, Resource
from bacalhau_api.v1.namespace import Namespace, Retention
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.contract import Clock, Result
from bacalhau_controllers.state import State
from bacalhau_controllers.store import HistoryKeeper

logger = logging.getLogger(__name__)

PASS_SECONDS: Final = 600.0
YOUNG_SECONDS: Final = 3600.0
"""What is younger stays, however much it is: a burst does not take the traces of itself away."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """The last pass over a namespace: when, and under which limits."""

    at: float
    limits: Retention


class HistoryReconciler:
    """Its keys are namespaces."""

    name = "history"
    deadline_seconds = 300.0  # the sizes of all changes are asked for, millions of them

    def __init__(self, state: State, clock: Clock, keeper: HistoryKeeper) -> None:
        self._state = state
        self._clock = clock
        self._keeper = keeper
        self._passes: dict[str, _Pass] = {}

    def is_settled(self, resource: Resource) -> bool:
        """Whether there is nothing to be looked at by and by."""
        return not (isinstance(resource, Namespace) and _has_limit(resource.spec.retention))

    async def reconcile(self, ref: Ref) -> Result:
        """One pass over a namespace, at once after its limits were changed."""
        found = self._state.cache.get(ref)
        if not isinstance(found, Namespace) or not _has_limit(found.spec.retention):
            self._passes.pop(ref.name, None)
            return Result()
        limits, now = found.spec.retention, self._clock.monotonic()
        last = self._passes.get(ref.name)
        if last is not None and last.limits == limits and now - last.at < PASS_SECONDS:
            return Result(requeue_after=PASS_SECONDS - (now - last.at))
        await self._trim(ref.name, limits)
        self._passes[ref.name] = _Pass(now, limits)
        return Result(requeue_after=PASS_SECONDS)

    async def _trim(self, namespace: str, limits: Retention) -> None:
        now = self._clock.now()
        age = limits.history_seconds
        left = await self._keeper.trim_history(
            namespace,
            oldest=now - timedelta(seconds=age) if age is not None else None,
            bytes_max=limits.history_bytes or None,
            young=now - timedelta(seconds=YOUNG_SECONDS),
        )
        if limits.history_bytes and left > limits.history_bytes:
            logger.warning(
                "History of the last hour is larger than its limit",
                extra={"namespace": namespace, "bytes": left, "limit": limits.history_bytes},
            )


def history_seconds(cache: Cache, namespace: str) -> int | None:
    """How long a namespace says that changes in it are remembered; None: as the server is set."""
    found = cache.get(Ref("Namespace", "", namespace))
    return found.spec.retention.history_seconds if isinstance(found, Namespace) else None


def _has_limit(limits: Retention) -> bool:
    return limits.history_seconds is not None or limits.history_bytes > 0
