"""A node that is not heard from: may its execution be replaced, and from when?

Lost is not Failed: nothing here changes what was reported, and a late report always counts.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from bacalhau_api.meta import Contact
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.node import Membership, Node
from bacalhau_controllers.disconnect import EffectiveDisconnect
from bacalhau_controllers.job.settings import JobSettings


@dataclass(frozen=True, slots=True)
class Absence:
    """An execution whose node cannot be asked.

    `replaceable_at` is when a new attempt may start, None if never by itself.
    """

    replaceable_at: datetime | None
    why: str

    def is_replaceable(self, now: datetime) -> bool:
        """Whether a new attempt may start now."""
        return self.replaceable_at is not None and self.replaceable_at <= now


def absence_of(
    execution: Execution,
    node: Node | None,
    policy: EffectiveDisconnect,
    settings: JobSettings,
    now: datetime,
) -> Absence | None:
    """None while the node is heard from. `node` is None if its object was deleted."""
    status = execution.status
    since = status.contact_since or execution.metadata.creation_timestamp or now
    name = execution.spec.node
    if policy.action == "stop":
        # Never two at once: whatever else is known, the node must have had its own time to stop.
        if status.contact is Contact.REACHABLE:
            return None
        limit = (execution.spec.local_deadline_seconds or 0) or policy.after_seconds or 0
        stopped_at = since + timedelta(seconds=limit + settings.stop_margin_seconds)
        return Absence(
            stopped_at,
            f"node {name} is not heard from; it stops the execution by its own clock",
        )
    if node is None:
        return Absence(since, f"node {name} was removed")
    if node.spec.membership is Membership.REJECTED:
        return Absence(since, f"node {name} was rejected")
    if status.contact is Contact.REACHABLE:
        return None
    if status.contact is Contact.LOST:
        return Absence(since, f"node {name} is lost")
    if policy.after_seconds is None:
        return Absence(
            None, f"node {name} is not heard from; its work is kept for it (policy hold)"
        )
    at = since + timedelta(seconds=policy.after_seconds)
    return Absence(at, f"node {name} is not heard from; its work is replaced after that time")
