"""What the status of a publication should be: pure.

The outputs lie on one node only, so a silent node makes it wait and nothing can replace it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from bacalhau_api.meta import Contact, Waiting
from bacalhau_api.v1.execution import (
    Desired,
    Publication,
    PublicationPhase,
    PublicationReport,
    PublicationStatus,
)
from bacalhau_api.v1.node import Node
from bacalhau_controllers.contact import (
    NODE_ACK_SECONDS,
    STOP_GRACE_SECONDS,
    STOP_SECONDS,
    Age,
    Case,
    Limit,
    Want,
    final_verdict,
    is_told_anew,
    judge,
    told_want,
)
from bacalhau_controllers.node.presence import Silence

_ORDER: Final = {PublicationPhase.PENDING: 0, PublicationPhase.PUBLISHING: 1}


@dataclass(frozen=True, slots=True)
class View:
    """What a publication is judged by. `has_execution`: the execution whose outputs it carries is
    still there; `age` is that of its stored wait."""

    node: Node | None
    has_job: bool
    has_execution: bool
    silence: Silence
    age: Age = field(default_factory=Age)


@dataclass(frozen=True, slots=True)
class PublicationPlan:
    """`delete` it, or `stop` it (desired Stop), because what it belongs to is gone."""

    status: PublicationStatus
    delete: bool = False
    stop: bool = False
    requeue_after: float | None = None


def merge_publication_report(
    old: PublicationReport | None, new: PublicationReport
) -> PublicationReport:
    """The join of two reports: idempotent, never backwards, a final one stands for ever."""
    if old is None:
        return new
    if old.phase.is_final or new.phase.is_final:
        return old if old.phase.is_final else new
    mine, theirs = (_ORDER[old.phase], old.step), (_ORDER[new.phase], new.step)
    return new if theirs > mine else old


def plan(
    publication: Publication, reports: Iterable[PublicationReport], view: View, now: datetime
) -> PublicationPlan:
    """Merge what was reported, infer the rest, and see to it that orphans go away."""
    old = publication.status
    report = old.report
    for new in reports:
        report = merge_publication_report(report, new)
    is_over = report is not None and report.phase.is_final
    is_wanted = publication.spec.desired is Desired.RUN
    stop = is_wanted and not is_over and not (view.has_job and view.has_execution)
    if stop:
        publication = publication.but(spec=publication.spec.but(desired=Desired.STOP))
    if is_over:
        verdict = final_verdict(old.contact, None, old.conditions, now)
    else:
        verdict = judge(_case(publication, report, view), now)
    waiting = verdict.waiting
    if not is_over and waiting is None:
        waiting = _waiting_for_operator(publication, old.waiting, now)
    status = old.but(
        report=report, contact=verdict.contact, waiting=waiting, conditions=verdict.conditions
    )
    is_within_reach = verdict.contact is Contact.REACHABLE and view.node is not None
    delete = not view.has_job and (is_over or not is_within_reach)
    return PublicationPlan(
        status,
        delete=delete,
        stop=stop and not delete,
        requeue_after=None if delete else verdict.look_again_seconds,
    )


def want_of(publication: Publication, report: PublicationReport | None) -> Want:
    """What the node should do next about a publication that is not final."""
    node = f"node {publication.spec.node}"
    if publication.spec.desired is Desired.STOP:
        message = "the node is to stop publishing and say so"
        return Want("Stop", message, node, STOP_SECONDS, STOP_GRACE_SECONDS)
    if report is None:
        return Want("NodeAck", "the node is to confirm that it has it", node, NODE_ACK_SECONDS)
    if report.waiting is not None:
        return told_want(report.waiting)
    return Want("Delivery", "the node brings the outputs to their target", node)


def _case(publication: Publication, report: PublicationReport | None, view: View) -> Case:
    old = publication.status
    told, told_before = (r.waiting if r else None for r in (report, old.report))
    return Case(
        node_name=publication.spec.node,
        node=view.node,
        silence=view.silence,
        limit=Limit(None),
        want=want_of(publication, report),
        is_new_want=publication.spec.desired is Desired.RUN and is_told_anew(told, told_before),
        age=view.age,
        incarnation=report.incarnation if report else "",
        is_news=report != old.report,
        contact=old.contact,
        contact_since=_since(old),
        waiting=old.waiting,
        conditions=old.conditions,
    )


def _since(old: PublicationStatus) -> datetime | None:
    """Publications do not store since when contact is as it is; the wait for contact does."""
    if old.contact is Contact.REACHABLE or old.waiting is None:
        return None
    return old.waiting.since


def _waiting_for_operator(
    publication: Publication, before: Waiting | None, now: datetime
) -> Waiting:
    """The only copy of the outputs is out of reach for good, unless somebody brings it back."""
    waiting = Waiting(
        what="Node",
        message="the outputs lie on a node that is gone; bring it back, or delete the job",
        since=now,
        mover="operator",
    )
    if before is not None and before.what == waiting.what:
        return waiting.but(since=before.since)
    return waiting
