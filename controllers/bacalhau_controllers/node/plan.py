"""What the status of a node should be: pure."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from bacalhau_api.meta import Condition, Contact, Waiting, set_condition
from bacalhau_api.v1.node import (
    LEDGER_FULL,
    NOT_INSTALLED,
    OUTBOX_FULL,
    Membership,
    Node,
    NodeInfo,
    NodeStatus,
)
from bacalhau_controllers.node.presence import Sighting, Silence

READY = "Ready"
DRAINED = "Drained"
ENGINE_FAULT = "EngineFault"


@dataclass(frozen=True, slots=True)
class View:
    """What a node is judged by. `executions_open` counts those on it that are not final."""

    sighting: Sighting | None
    silence: Silence
    executions_open: int


@dataclass(frozen=True, slots=True)
class NodePlan:
    """The status, and after how many seconds time alone changes it."""

    status: NodeStatus
    requeue_after: float | None = None


def plan(node: Node, view: View, now: datetime) -> NodePlan:
    """Infer contact, take over what the node says of itself, and sum it up in conditions."""
    old = node.status
    contact, again = _contact(old, view)
    sighting = view.sighting
    info = sighting.info if sighting else old.info
    incarnation = sighting.incarnation if sighting else old.incarnation
    status = old.but(
        info=info,
        incarnation=incarnation,
        contact=contact,
        contact_since=old.contact_since,
        connected_since=_connected_since(old, contact, incarnation, now),
    )
    if contact is not old.contact or old.contact_since is None:
        status = status.but(contact_since=_contact_since(contact, view, now))
    node = node.but(status=status)
    status = status.but(waiting=_waiting(node, view, now), conditions=_conditions(node, view, now))
    return NodePlan(status, again)


def _contact(old: NodeStatus, view: View) -> tuple[Contact, float | None]:
    """Reachable while heard from. A node in contact with an earlier leader stays so for a grace:
    after a restart of the orchestrator, nobody has said hello yet."""
    if view.sighting is not None:
        is_connected = view.sighting.is_connected
        return (Contact.REACHABLE if is_connected else Contact.UNKNOWN), None
    if old.contact is Contact.REACHABLE and view.silence.grace_left_seconds > 0:
        return Contact.REACHABLE, view.silence.grace_left_seconds
    return Contact.UNKNOWN, None


def _contact_since(contact: Contact, view: View, now: datetime) -> datetime:
    """Since when it is so: for a silence, since the last word."""
    if contact is Contact.UNKNOWN and view.silence.is_whole:
        return now - timedelta(seconds=view.silence.seconds)
    return now


def _connected_since(
    old: NodeStatus, contact: Contact, incarnation: str, now: datetime
) -> datetime | None:
    """The start of the present stretch of contact with the present ledger."""
    if contact is not Contact.REACHABLE:
        return None
    is_same = old.contact is Contact.REACHABLE and old.incarnation == incarnation
    return old.connected_since if is_same and old.connected_since else now


def _waiting(node: Node, view: View, now: datetime) -> Waiting | None:
    """What the node waits for, if anything: a node has no end to move towards."""
    status = node.status
    member = node.spec.membership
    if member is Membership.REJECTED:
        return None
    if member is Membership.PENDING:
        waiting = Waiting(
            what="Approval",
            message="an operator is to approve or reject the node",
            since=now,
            mover="operator",
        )
    elif status.contact is not Contact.REACHABLE:
        what, message = "Contact", "the node is not heard from"
        if not status.incarnation:
            what, message = "FirstContact", "the node has not been started yet"
        since = status.contact_since or now
        return Waiting(what=what, message=message, since=since, mover=f"node {node.name}")
    elif node.spec.drain and view.executions_open:
        waiting = Waiting(
            what="Drain",
            message="executions that run here are to end or to move",
            since=now,
            mover="job reconciler",
        )
    else:
        return None
    before = status.waiting
    if before is not None and before.what == waiting.what:
        return waiting.but(since=before.since)
    return waiting


def _conditions(node: Node, view: View, now: datetime) -> tuple[Condition, ...]:
    conditions = node.status.conditions
    found = [_ready(node, now)]
    if node.spec.drain:
        found.append(_drained(view.executions_open, now))
    else:
        conditions = tuple(c for c in conditions if c.type != DRAINED)
    fault = _engine_fault(node.status.info, now)
    if fault.status or any(c.type == ENGINE_FAULT for c in conditions):
        found.append(fault)
    found += _own_words(node, now)
    for condition in found:
        conditions = set_condition(conditions, condition)
    return conditions


def _own_words(node: Node, now: datetime) -> list[Condition]:
    """What the node says is wrong with it, and what it said before and does no more."""
    told = list(node.status.info.conditions)
    types = {condition.type for condition in told}
    passed = [
        held.but(status=False, reason="Passed", message="", last_transition_time=now)
        for held in node.status.conditions
        if held.type in (LEDGER_FULL, OUTBOX_FULL) and held.type not in types
    ]
    return told + passed


def _ready(node: Node, now: datetime) -> Condition:
    """Whether the node could run something, cordons aside."""

    def condition(status: bool, reason: str, message: str) -> Condition:
        return Condition(
            type=READY, status=status, reason=reason, message=message, last_transition_time=now
        )

    member = node.spec.membership
    if member is not Membership.APPROVED:
        return condition(False, f"Membership{member}", "the node is not approved")
    if node.status.contact is not Contact.REACHABLE:
        return condition(False, "NoContact", "the node is not heard from")
    engines = node.status.info.engines
    if engines and not any(engine.available for engine in engines):
        return condition(False, "NoEngine", "none of the node's engines can be used")
    return condition(True, "Ready", "")


def _drained(executions_open: int, now: datetime) -> Condition:
    is_drained = executions_open == 0
    return Condition(
        type=DRAINED,
        status=is_drained,
        reason="Empty" if is_drained else "Draining",
        message="" if is_drained else f"{executions_open} executions are left",
        last_transition_time=now,
    )


def _engine_fault(info: NodeInfo, now: datetime) -> Condition:
    """The node's own word on its engines."""
    faults = [
        f"{e.name}: {e.reason or 'unavailable'}"
        for e in info.engines
        if not e.available and not e.reason.startswith(NOT_INSTALLED)
    ]
    return Condition(
        type=ENGINE_FAULT,
        status=bool(faults),
        reason="EngineUnavailable" if faults else "Healthy",
        message="; ".join(faults),
        last_transition_time=now,
    )
