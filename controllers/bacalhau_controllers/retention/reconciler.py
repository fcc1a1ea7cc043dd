"""Asks for the deletion of finished jobs that were kept for long enough.

The rules speak of all finished jobs of a namespace, so the key is the namespace, and one pass looks
at all of them. Nothing hangs on when exactly: passes are spaced out, however many jobs finish.
Cleaning up after a deleted job is the job reconciler's business. That the run has ended is written
down in the same commit (RetiredJob), so that applying its file again does not run it again.
"""

import logging
from dataclasses import replace

from bacalhau_api.admission import retire
from bacalhau_api.errors import ConflictError
from bacalhau_api.meta import Contact, Ref, Resource
from bacalhau_api.v1.execution import Publication
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.namespace import Namespace
from bacalhau_api.v1.retired import RetiredJob
from bacalhau_controllers.contract import Clock, Result
from bacalhau_controllers.retention.plan import Expired, RetentionSettings, forgotten, plan
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Delete, Put, Why

logger = logging.getLogger(__name__)

PASS_SECONDS = 30.0
"""Least time between two passes over one namespace."""


def namespace_key(resource: Resource) -> Ref:
    """The key under which a job's namespace is looked after; for `Manager.add(key=…)`."""
    return Ref("Namespace", "", resource.metadata.namespace)


class RetentionReconciler:
    """Looks after the finished jobs of one namespace at a time. Its keys are `namespace_key`s."""

    name = "retention"

    def __init__(
        self, state: State, clock: Clock, settings: RetentionSettings | None = None
    ) -> None:
        self._state = state
        self._clock = clock
        self._settings = settings or RetentionSettings()
        self._passed_at: dict[str, float] = {}

    async def reconcile(self, ref: Ref) -> Result:
        """One pass over a namespace, unless the last one was just now."""
        now = self._clock.monotonic()
        since = now - self._passed_at.get(ref.name, now - PASS_SECONDS)
        if since < PASS_SECONDS:
            return Result(requeue_after=PASS_SECONDS - since)
        jobs = [j for j in self._state.cache.list("Job", ref.name) if isinstance(j, Job)]
        if not jobs and not self._retired(ref.name):
            self._passed_at.pop(ref.name, None)
            return Result()
        self._passed_at[ref.name] = now
        settings = self._settings_of(ref.name)
        todo = plan(jobs, self._publishing(ref.name), settings, self._clock.now())
        for expired in todo.expired:
            await self._delete(expired)
        for old in forgotten(self._retired(ref.name), self._settings, self._clock.now()):
            await self._forget(old)
        if todo.has_more:
            return Result(requeue_after=PASS_SECONDS)
        return Result()

    def _settings_of(self, namespace: str) -> RetentionSettings:
        """The server's, with what the namespace says of its own."""
        found = self._state.cache.get(Ref("Namespace", "", namespace))
        if not isinstance(found, Namespace):
            return self._settings
        own = found.spec.retention
        seconds, most = own.finished_seconds, own.finished_max
        return replace(
            self._settings,
            finished_seconds=self._settings.finished_seconds if seconds is None else seconds,
            finished_max=self._settings.finished_max if most is None else most,
        )

    def _retired(self, namespace: str) -> list[RetiredJob]:
        found = self._state.cache.list("RetiredJob", namespace)
        return [item for item in found if isinstance(item, RetiredJob)]

    async def _forget(self, retired: RetiredJob) -> None:
        try:
            await self._state.commit(
                [Delete(retired.ref, retired.metadata.resource_version)],
                Why("retention-reconciler", "Forgotten"),
            )
        except ConflictError:
            logger.debug("Record changed while it expired", extra={"job": str(retired.ref)})

    def _publishing(self, namespace: str) -> set[str]:
        """The uids of jobs with outputs on their way. Those on a node that is gone for good are not
        on their way any more."""
        return {
            item.spec.job_uid
            for item in self._state.cache.list("Publication", namespace)
            if isinstance(item, Publication)
            and not item.status.phase.is_final
            and item.status.contact is not Contact.LOST
        }

    async def _delete(self, expired: Expired) -> None:
        """Mark one job as to be deleted. One that was changed meanwhile is left for later."""
        job = expired.job
        marked = job.with_meta(deletion_timestamp=self._clock.now())
        record = retire(job, self._clock.now())
        known = self._state.cache.get(record.ref)
        version = known.metadata.resource_version if known else 0
        try:
            await self._state.commit(
                [Put(marked, job.metadata.resource_version), Put(record, version)],
                Why("retention-reconciler", expired.reason),
            )
        except ConflictError:
            logger.debug("Job changed while it expired", extra={"job": str(job.ref)})
            return
        logger.info("Expired job", extra={"job": str(job.ref), "reason": expired.reason})
