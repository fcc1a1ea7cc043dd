"""References that may come to mean something else, such as an image's tag, are resolved once for
each generation of a job: all attempts run the same thing.

A node resolves them, because only nodes may have the registries' credentials. So the first attempt
goes alone until its node has reported what it found; every other one is told that in its spec.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final

from bacalhau_api.meta import Contact
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import Job, Task
from bacalhau_controllers.job.slots import JobView

DIGEST = "sha256:"

SILENT_WAIT: Final = timedelta(minutes=5)
"""For how long the attempt that goes alone is waited for while its node is not heard from: the
others are not to stand still for as long as one node is away, which may be for ever."""


def needs_pins(task: Task) -> bool:
    """Whether what the task runs is named by something that can change its meaning."""
    image = task.engine.params.get("image")
    return task.engine.type == "docker" and isinstance(image, str) and DIGEST not in image


def known_pins(view: JobView) -> Mapping[str, str]:
    """What the references of the current generation were resolved to; empty if nobody has yet."""
    if view.current.pins:
        return view.current.pins
    job: Job = view.job
    is_observed = job.status.observed_generation == job.metadata.generation
    return job.status.pins if is_observed else {}


def resolver(view: JobView, now: datetime) -> Execution | None:
    """The attempt whose node is to resolve them, and that is waited for."""
    for execution in view.current.active():
        if execution.status.contact is Contact.LOST:
            continue
        until = waited_until(execution)
        # If the clock was set back since, nobody waits for it to catch up.
        if until is None or now < until <= now + SILENT_WAIT:
            return execution
    return None


def waited_until(execution: Execution) -> datetime | None:
    """How long the node of a resolver is waited for; None while it is there."""
    status = execution.status
    if status.contact is not Contact.UNKNOWN or status.contact_since is None:
        return None
    return status.contact_since + SILENT_WAIT
