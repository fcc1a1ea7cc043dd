"""RetiredJob: what stays of a job that ended and left the live set.

Without it, applying the unchanged file of a job that has finished and was retired would run the job
again. It carries the run that ended, so that it can be recognised, shown, and run again on request.
"""

from typing import Literal

from bacalhau_api.base import Model, Timestamp
from bacalhau_api.meta import ObjectMeta, Resource
from bacalhau_api.v1.job import Job, JobPhase, JobSpec, JobStatus, SlotCounts


class RetiredJobSpec(Model):
    """The last generation of the job, and how it ended."""

    uid: str
    generation: int
    run_hash: str
    phase: JobPhase
    reason: str = ""
    message: str = ""
    slots: SlotCounts = SlotCounts()
    started_at: Timestamp | None = None
    finished_at: Timestamp | None = None
    retired_at: Timestamp
    job: JobSpec


class RetiredJob(Resource):
    """Named like the job; gone once a job of that name is created again."""

    kind: Literal["RetiredJob"] = "RetiredJob"
    metadata: ObjectMeta
    spec: RetiredJobSpec

    def as_job(self) -> Job:
        """The job as it was, without what it owned."""
        spec, meta = self.spec, self.metadata
        return Job(
            metadata=ObjectMeta(
                name=meta.name,
                namespace=meta.namespace,
                uid=spec.uid,
                labels=meta.labels,
                annotations=meta.annotations,
                generation=spec.generation,
                creation_timestamp=meta.creation_timestamp,
            ),
            spec=spec.job,
            status=JobStatus(
                observed_generation=spec.generation,
                observed_retry_nonce=spec.job.retry_nonce,
                phase=spec.phase,
                reason=spec.reason,
                message=spec.message,
                slots=spec.slots,
                started_at=spec.started_at,
                finished_at=spec.finished_at,
            ),
        )
