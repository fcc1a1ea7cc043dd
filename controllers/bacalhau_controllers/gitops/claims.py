"""Looks after claims that outlived what they are about: those of deleted sources, and the records
of pruned objects after a day.

A deleted source lets its objects go. They stay: deleting a declaration of a directory is no wish to
delete everything in it.
"""

import logging
from collections.abc import Iterable
from datetime import timedelta

from bacalhau_api.meta import Ref, Resource
from bacalhau_api.provenance import OWNER, owner_of
from bacalhau_api.v1.source import PRUNED_KEPT_SECONDS, Claim, ClaimPhase, Source
from bacalhau_controllers.contract import Clock, Result
from bacalhau_controllers.controller import Watch
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Delete, Put, Why, Write

logger = logging.getLogger(__name__)


class ClaimReconciler:
    """Its keys are claims."""

    name = "claim"

    def __init__(self, state: State, clock: Clock) -> None:
        self._state = state
        self._clock = clock

    @property
    def watches(self) -> dict[str, Watch]:
        """A source that goes concerns all of its claims."""
        return {"Source": self._on_source}

    def is_settled(self, resource: Resource) -> bool:
        """Whether no time that passes changes anything."""
        return isinstance(resource, Claim) and resource.is_held

    async def reconcile(self, ref: Ref) -> Result:
        """Remove one claim if its time is over."""
        claim = self._state.cache.get(ref)
        if not isinstance(claim, Claim):
            return Result()
        if await self._is_orphan(claim):
            await self._release(claim)
            return Result()
        left = self._left_seconds(claim)
        if left is None:
            return Result()
        if left > 0:
            return Result(requeue_after=left)
        why = Why("claim-reconciler", "Expired", "can no longer be restored")
        await self._state.commit([Delete(ref, claim.metadata.resource_version)], why)
        return Result()

    def _left_seconds(self, claim: Claim) -> float | None:
        """How long a record is still kept; None: not by time."""
        phase = claim.status.phase
        if phase is ClaimPhase.RESTORED and self._state.cache.get(claim.spec.object_ref) is None:
            phase = ClaimPhase.PRUNED  # brought back, and deleted again by its user
        if phase is not ClaimPhase.PRUNED:
            return None
        end = (claim.status.at or self._clock.now()) + timedelta(seconds=PRUNED_KEPT_SECONDS)
        return (end - self._clock.now()).total_seconds()

    async def _is_orphan(self, claim: Claim) -> bool:
        """Whether the source is gone, by the word of the store."""
        ref = Ref("Source", "", claim.spec.source)
        known = self._state.cache.get(ref)
        if known is not None and known.metadata.uid == claim.spec.source_uid:
            return False
        found = await self._state.store.get(ref)
        return not isinstance(found, Source) or found.metadata.uid != claim.spec.source_uid

    async def _release(self, claim: Claim) -> None:
        writes: list[Write] = [Delete(claim.ref, claim.metadata.resource_version)]
        live = self._state.cache.get(claim.spec.object_ref)
        if live is not None and owner_of(live) == f"source/{claim.spec.source}":
            notes = {k: v for k, v in live.metadata.annotations.items() if k != OWNER}
            writes.append(Put(live.with_meta(annotations=notes), live.metadata.resource_version))
        why = Why("claim-reconciler", "Released", f"source {claim.spec.source} was deleted")
        await self._state.commit(writes, why)
        logger.info("Released object", extra={"object": str(claim.spec.object_ref)})

    def _on_source(self, old: Resource | None, new: Resource | None) -> Iterable[Ref]:
        if old is None or (new is not None and new.metadata.uid == old.metadata.uid):
            return ()
        return [c.ref for c in self._state.cache.owned_by(old.metadata.uid, "Claim")]
