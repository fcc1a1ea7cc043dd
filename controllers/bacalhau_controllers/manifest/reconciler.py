"""Removes manifests, and parts of listings, that belong to no job or to generations long past."""

import logging
from collections.abc import Iterable, Mapping
from typing import Final

from bacalhau_api.errors import ConflictError
from bacalhau_api.meta import Ref, Resource
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.manifest import Manifest, ManifestPart, manifest_name
from bacalhau_controllers.contract import Result
from bacalhau_controllers.controller import Watch
from bacalhau_controllers.lookup import ask_store, surely_job_of
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Delete, Why

logger = logging.getLogger(__name__)

GENERATIONS_KEPT: Final = 3
"""The current one included, as of executions."""

KINDS: Final = ("Manifest", "ManifestPart")


class ManifestReconciler:
    """Looks after the objects of one of KINDS."""

    def __init__(self, state: State, kind: str) -> None:
        self.name = kind.lower()
        self._state = state
        self._kind = kind
        self.watches: Mapping[str, Watch] = {"Job": self._of_job}

    async def reconcile(self, ref: Ref) -> Result:
        """Delete it if nothing needs it."""
        found = self._state.cache.get(ref)
        if isinstance(found, Manifest | ManifestPart) and await self._is_over(found):
            try:
                await self._state.commit(
                    [Delete(found.ref, found.metadata.resource_version)],
                    Why(f"{self.name}-reconciler", "NotNeeded"),
                )
            except ConflictError:
                logger.debug("Manifest changed while it was deleted", extra={"ref": str(ref)})
        return Result()

    async def _is_over(self, found: Manifest | ManifestPart) -> bool:
        spec, namespace = found.spec, found.metadata.namespace
        job = await surely_job_of(self._state, namespace, spec.job, spec.job_uid)
        if job is None or spec.generation <= job.metadata.generation - GENERATIONS_KEPT:
            return True
        if isinstance(found, Manifest):
            return False
        # Parts of a proposal that was not taken. Of one that may still be, there is no manifest.
        name = manifest_name(spec.job, spec.job_uid, spec.generation, spec.input)
        ref = Ref("Manifest", namespace, name)
        pinned = self._state.cache.get(ref) or await ask_store(self._state, ref, Manifest)
        return isinstance(pinned, Manifest) and pinned.spec.digest != spec.digest

    def _of_job(self, old: Resource | None, new: Resource | None) -> Iterable[Ref]:
        """A job that went, or began a generation, leaves some behind."""
        if not isinstance(old, Job):
            return
        is_same = (
            isinstance(new, Job)
            and new.metadata.uid == old.metadata.uid
            and new.metadata.generation == old.metadata.generation
        )
        if not is_same:
            for child in self._state.cache.owned_by(old.metadata.uid, self._kind):
                yield child.ref
