"""Namespace: what the jobs in it are given by default, and how much they may take together.

Objects may be in a namespace that has no Namespace object: then nothing is limited there.
"""

from typing import ClassVar, Final, Literal

from pydantic import Field

from bacalhau_api.base import Model
from bacalhau_api.meta import ObjectMeta, Resource
from bacalhau_api.v1.job import Resources

HISTORY_SECONDS_MAX: Final = 10 * 366 * 86400

QUOTA_WAIT: Final = "Quota"
"""What a job waits for whose namespace has no room left."""


class NamespaceDefaults(Model):
    """Given to tasks that do not say. A change of it reaches jobs that are created from then on:
    those that exist keep what they were given."""

    resources: Resources = Resources()


class Quota(Model):
    """The most that all jobs of the namespace take together; what is not given is not limited.
    Lowering it stops nothing that runs."""

    executions: int | None = Field(default=None, ge=0, description="At a time.")
    resources: Resources = Field(
        default=Resources(), description="Sums over all executions; 0: no limit."
    )
    stored_results: int = Field(
        default=0, ge=0, description="Bytes of outputs kept for jobs that still exist; 0: no limit."
    )


class Retention(Model):
    """How long finished jobs stay in the live set, and how long the history of the namespace's
    objects is kept; None: as the server is set."""

    finished_seconds: float | None = Field(default=None, ge=0)
    finished_max: int | None = Field(default=None, ge=0, description="Jobs; the oldest go first.")
    history_seconds: int | None = Field(
        default=None,
        ge=3600,
        le=HISTORY_SECONDS_MAX,
        description="Changes that are older are forgotten, with the results, the ends of the logs "
        "and the verdicts that they tell of.",
    )
    history_bytes: int = Field(
        default=0,
        ge=0,
        description="The oldest changes go when there are more; those of the last hour stay. "
        "0: no limit.",
    )


class NamespaceSpec(Model):
    """Desired state, written by operators."""

    defaults: NamespaceDefaults = NamespaceDefaults()
    quota: Quota = Quota()
    retention: Retention = Retention()


class Namespace(Resource):
    """Named like the namespace that it is about."""

    namespaced: ClassVar[bool] = False

    kind: Literal["Namespace"] = "Namespace"
    metadata: ObjectMeta
    spec: NamespaceSpec = NamespaceSpec()
