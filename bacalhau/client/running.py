"""Waiting until something of a job really runs.

A job is Running from the moment in which its executions are placed; until then they may fetch inputs
and pull images for a long time. That one of them runs is told by the executions alone.
"""

import time
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from bacalhau.client.waiting import WatchUpdate
from bacalhau_api.meta import Contact
from bacalhau_api.v1.execution import Desired, Execution, Phase
from bacalhau_api.v1.job import Job

if TYPE_CHECKING:
    from bacalhau.client.aio import AsyncClient
    from bacalhau.client.sync import Client

LOOK_SECONDS = 2.0
"""How long executions are watched before the job itself is looked at again, which may have failed, or
have been stopped while it had none."""

OnExecution = Callable[[Execution], None]


def runs(execution: Execution, job: Job) -> bool:
    """Whether an execution of the job's present generation runs, or has run to a good end."""
    spec = execution.spec
    if spec.job_uid != job.metadata.uid or spec.slot.generation != job.metadata.generation:
        return False
    if execution.phase is Phase.SUCCEEDED:
        return job.spec.type.runs_to_completion
    is_wanted = spec.desired is Desired.RUN and execution.status.contact is Contact.REACHABLE
    return execution.phase is Phase.RUNNING and is_wanted


def wait_for_run(
    client: "Client", job: Job, deadline: float | None, on_execution: OnExecution
) -> bool:
    """Watch the executions of a job. True once one runs, False if the job is to be looked at again.
    `deadline` is by the monotonic clock."""
    for update in client.watch(
        Execution,
        namespace=job.ref.namespace,
        fields=f"job={job.name}",
        timeout_seconds=_seconds(deadline),
    ):
        if _runs_now(update, job, on_execution):
            return True
    return False


async def wait_for_run_async(
    client: "AsyncClient", job: Job, deadline: float | None, on_execution: OnExecution
) -> bool:
    """As `wait_for_run`."""
    updates = client.watch(
        Execution,
        namespace=job.ref.namespace,
        fields=f"job={job.name}",
        timeout_seconds=_seconds(deadline),
    )
    async with aclosing(updates):
        async for update in updates:
            if _runs_now(update, job, on_execution):
                return True
    return False


def _runs_now(update: WatchUpdate[Execution], job: Job, on_execution: OnExecution) -> bool:
    """Whether an update is of an execution that runs; of one that does not yet is told."""
    found = update.item
    if found is None or update.type == "DELETED":
        return False
    if runs(found, job):
        return True
    if not found.phase.is_final:
        on_execution(found)
    return False


def seconds_left(deadline: float | None) -> float | None:
    """Seconds to a deadline by the monotonic clock."""
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)


def _seconds(deadline: float | None) -> float:
    rest = seconds_left(deadline)
    return LOOK_SECONDS if rest is None else min(rest, LOOK_SECONDS)
