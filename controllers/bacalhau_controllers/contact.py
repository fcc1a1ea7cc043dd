"""Whether an execution or publication can be expected to move, and what it waits for: pure.

An object that is not final waits for something. Here it is said for what, since when and until
when, and what the orchestrator infers (`Contact`) when the wait goes on for too long: from a node
that is silent, removed, came back with another ledger, or is there but does not do its part. An
inference never touches what was reported; acting on one is the job reconciler's business.

Lost is left only for a reason: the node is heard from again, or reports something new.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from bacalhau_api.meta import Condition, Contact, Waiting, set_condition
from bacalhau_api.v1.execution import ExecutionStatus
from bacalhau_api.v1.node import Membership, Node
from bacalhau_controllers.node.presence import Silence

CONTACT_CONDITION: Final = "Contact"

NEW_LEDGER_GRACE_SECONDS: Final = 60.0
"""A node that lost its ledger reports so itself; this is how long it may take."""

NODE_SILENT: Final = "NodeSilent"
"""Reason of the condition where nothing was heard from the node itself."""

NODE_REMOVED: Final = "NodeRemoved"
NODE_REJECTED: Final = "NodeRejected"
"""Reasons of the condition where an operator took the node away."""

_OVERDUE: Final = "Overdue"


@dataclass(frozen=True, slots=True)
class Want:
    """What the node should do next. `seconds` is how long it may take (None: as long as it likes);
    only `grace_seconds` later it counts as not in contact about this object."""

    what: str
    message: str
    mover: str
    seconds: float | None = None
    grace_seconds: float = 0.0


NODE_ACK_SECONDS: Final = 60.0
STOP_SECONDS: Final = 60.0
STOP_GRACE_SECONDS: Final = 60.0

TOLD_GRACE_SECONDS: Final = 120.0
"""A node keeps its own deadlines and reports that they have passed; this is how much later it is
taken to have forgotten."""


@dataclass(frozen=True, slots=True)
class Age:
    """For how long this process knows of a wait, by its monotonic clock. `is_whole`: it saw the
    wait begin, so that this is all of it."""

    seconds: float = 0.0
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """When silence makes an object Lost. None: never.

    `is_strict`: only this process's own measure of the silence counts, whatever the wall clock
    says, and a node that can be heard never makes it Lost: for the promise that two attempts never
    run at once.
    """

    seconds: float | None = None
    is_strict: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """All that the inference is made from. `contact` to `conditions` are what was stored before."""

    node_name: str
    node: Node | None
    silence: Silence
    limit: Limit
    want: Want
    is_new_want: bool
    """The want has just been told by the node, even if it reads like the one before."""
    age: Age
    """Of the stored wait."""
    incarnation: str
    """Of the ledger that made the last report; empty without one."""
    is_news: bool
    """The report has just changed."""
    contact: Contact
    contact_since: datetime | None
    waiting: Waiting | None
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is inferred. `waiting` is None exactly if `contact` is Lost. `look_again_seconds`: when
    time alone will change the verdict."""

    contact: Contact
    contact_since: datetime | None
    waiting: Waiting | None
    conditions: tuple[Condition, ...]
    look_again_seconds: float | None = None


def judge(case: Case, now: datetime) -> Verdict:
    """Infer contact and waiting."""
    node = case.node
    if node is None:
        return _removed(case, now, NODE_REMOVED, f"node {case.node_name} was removed")
    if node.spec.membership is Membership.REJECTED:
        return _removed(case, now, NODE_REJECTED, f"node {case.node_name} was rejected")
    if node.status.contact is not Contact.REACHABLE:
        return _silent(case, now)
    ledger = node.status.incarnation
    if case.incarnation and ledger and ledger != case.incarnation:
        return _forgotten(case, node, now)
    return _heard(case, node, now)


def told_want(told: Waiting) -> Want:
    """What the node itself says it waits for. Only the length of the wait is taken from its clock,
    which may be wrong."""
    seconds = None if told.until is None else max(0.0, (told.until - told.since).total_seconds())
    return Want(told.what, told.message, told.mover, seconds, TOLD_GRACE_SECONDS)


def is_told_anew(told: Waiting | None, before: Waiting | None) -> bool:
    """Whether the node speaks of another wait than it did in its last report."""
    return told is not None and (before is None or told.since != before.since)


def final_verdict(
    contact: Contact,
    contact_since: datetime | None,
    conditions: tuple[Condition, ...],
    now: datetime,
) -> Verdict:
    """For an object whose end was reported: whatever was inferred before is over."""
    if contact is Contact.REACHABLE:
        return Verdict(contact, contact_since, None, conditions)
    conditions = _with_condition(conditions, Contact.REACHABLE, "Reported", "", now)
    return Verdict(Contact.REACHABLE, now, None, conditions)


def _removed(case: Case, now: datetime, reason: str, message: str) -> Verdict:
    """The operator's word. Under a strict limit even that does not make work on a machine end
    sooner than its own clock does."""
    if case.contact is Contact.LOST:
        return _still_lost(case, now)
    seconds = case.limit.seconds
    if not case.limit.is_strict or seconds is None:
        return _verdict(case, now, Contact.LOST, reason, message)
    return _out_of_contact(case, now, seconds, reason, message, "LocalStop")


def _silent(case: Case, now: datetime) -> Verdict:
    if case.contact is Contact.LOST:
        return _still_lost(case, now)
    message = f"node {case.node_name} is not heard from"
    return _out_of_contact(case, now, case.limit.seconds, NODE_SILENT, message, "Contact")


def _out_of_contact(
    case: Case, now: datetime, seconds: float | None, reason: str, message: str, what: str
) -> Verdict:
    """Unknown until the limit, Lost after it."""
    since = _unknown_since(case, now)
    waiting = Waiting(what=what, message=message, since=since, mover=f"node {case.node_name}")
    if seconds is None:
        return _verdict(case, now, Contact.UNKNOWN, reason, message, since=since, waiting=waiting)
    left = _seconds_left(case, seconds, since, now)
    if left <= 0:
        message = f"{message} for longer than its job allows"
        return _verdict(case, now, Contact.LOST, reason, message)
    waiting = waiting.but(until=since + timedelta(seconds=seconds))
    return _verdict(
        case, now, Contact.UNKNOWN, reason, message, since=since, waiting=waiting, again=left
    )


def _unknown_since(case: Case, now: datetime) -> datetime:
    """The moment of the last word, as far as this process knows it."""
    is_known = case.contact is Contact.UNKNOWN and not _reason(case).endswith(_OVERDUE)
    if is_known and case.contact_since is not None:
        return case.contact_since
    return now - timedelta(seconds=case.silence.seconds) if case.silence.is_whole else now


def _seconds_left(case: Case, seconds: float, since: datetime, now: datetime) -> float:
    """How much silence is missing to the limit.

    A silence that began under this leader is measured by its monotonic clock, which nobody can set.
    One that began earlier goes by the stored time, but never ends before nodes have had a chance to
    say hello to this leader: else every restart would lose what had been out of contact before it.
    """
    silence = case.silence
    if case.limit.is_strict or silence.is_whole:
        return seconds - silence.seconds
    elapsed = max(silence.seconds, (now - since).total_seconds())
    return max(seconds - elapsed, silence.grace_left_seconds)


def _forgotten(case: Case, node: Node, now: datetime) -> Verdict:
    """The node came back with another ledger and does not know of this object's past."""
    message = f"node {case.node_name} came back without its ledger"
    status = node.status
    since = status.connected_since or status.contact_since or now
    until = since + timedelta(seconds=NEW_LEDGER_GRACE_SECONDS)
    if case.contact is Contact.LOST:
        return _still_lost(case, now)
    if now >= until:
        return _verdict(case, now, Contact.LOST, "LedgerReplaced", message)
    waiting = Waiting(
        what="Recovery", message=message, since=since, until=until, mover=f"node {case.node_name}"
    )
    again = (until - now).total_seconds()
    return _verdict(case, now, Contact.REACHABLE, "Reachable", "", waiting=waiting, again=again)


def _heard(case: Case, node: Node, now: datetime) -> Verdict:
    """The node is there. What is left to ask is whether it does its part in time."""
    if _is_given_up(case, node):
        return _still_lost(case, now)
    want = case.want
    waiting = _continued(case, now)
    if want.seconds is None:
        return _verdict(case, now, Contact.REACHABLE, "Reachable", "", waiting=waiting)
    until = waiting.since + timedelta(seconds=want.seconds)
    age = _seconds_waited(case, waiting, now)
    over = age - want.seconds - want.grace_seconds
    # What began under an earlier leader may be over long since, and about to be reported.
    grace = 0.0 if case.age.is_whole else case.silence.grace_left_seconds
    if over >= 0 and grace <= 0:
        return _overdue(case, waiting, now, over_seconds=over)
    waiting = waiting.but(until=until)
    again = max(-over, grace)
    return _verdict(case, now, Contact.REACHABLE, "Reachable", "", waiting=waiting, again=again)


def _overdue(case: Case, waiting: Waiting, now: datetime, *, over_seconds: float) -> Verdict:
    """A node that answers but does not move this object counts as out of contact about it."""
    reason = waiting.what + _OVERDUE
    message = f"node {case.node_name} is there, but {waiting.what} is overdue"
    since = case.contact_since if case.contact is Contact.UNKNOWN else None
    since = since or now
    seconds = None if case.limit.is_strict else case.limit.seconds
    if seconds is None:
        waiting = waiting.but(until=None)
        return _verdict(case, now, Contact.UNKNOWN, reason, message, since=since, waiting=waiting)
    # However long ago it began, and whatever the clock says: first it is Unknown, and then this
    # process itself must have waited for as long as the limit.
    left = seconds - min(over_seconds, case.age.seconds, (now - since).total_seconds())
    if left <= 0:
        return _verdict(case, now, Contact.LOST, reason, message)
    return _verdict(
        case,
        now,
        Contact.UNKNOWN,
        reason,
        message,
        since=since,
        waiting=waiting.but(until=since + timedelta(seconds=seconds)),
        again=left,
    )


def _still_lost(case: Case, now: datetime) -> Verdict:
    """Whatever made it so: the first reason stays."""
    condition = _condition(case)
    reason, message = (condition.reason, condition.message) if condition else ("", "")
    return _verdict(case, now, Contact.LOST, reason, message)


def _is_given_up(case: Case, node: Node) -> bool:
    """Lost although the node was there all the time, and nothing has happened since."""
    if case.contact is not Contact.LOST or case.is_news or not _reason(case).endswith(_OVERDUE):
        return False
    back_at, lost_at = node.status.connected_since, case.contact_since
    return back_at is None or lost_at is None or back_at <= lost_at


def _continued(case: Case, now: datetime) -> Waiting:
    """The wait for what is wanted; the same want keeps the time at which it began.

    That time is this side's: a node's clock may be wrong, and what it tells may have come late.
    """
    want, before = case.want, case.waiting
    waiting = Waiting(what=want.what, message=want.message, since=now, mover=want.mover)
    if before is None or case.is_new_want:
        return waiting
    same = (before.what, before.message, before.mover) == (want.what, want.message, want.mover)
    return waiting.but(since=before.since) if same else waiting


def _seconds_waited(case: Case, waiting: Waiting, now: datetime) -> float:
    """How long the wait has lasted. One that this process saw begin is measured by its monotonic
    clock, which nobody can set."""
    before = case.waiting
    if before is None or (before.since, before.what) != (waiting.since, waiting.what):
        return 0.0
    if case.age.is_whole:
        return case.age.seconds
    return max(case.age.seconds, (now - waiting.since).total_seconds())


def _verdict(
    case: Case,
    now: datetime,
    contact: Contact,
    reason: str,
    message: str,
    *,
    since: datetime | None = None,
    waiting: Waiting | None = None,
    again: float | None = None,
) -> Verdict:
    if since is None:
        since = case.contact_since if contact is case.contact else now
    conditions = _with_condition(case.conditions, contact, reason, message, now)
    return Verdict(contact, since, waiting, conditions, again)


def _with_condition(
    conditions: tuple[Condition, ...], contact: Contact, reason: str, message: str, now: datetime
) -> tuple[Condition, ...]:
    """Say why contact is as it is. An object that was never out of contact carries no condition."""
    is_in_contact = contact is Contact.REACHABLE
    if is_in_contact and all(c.type != CONTACT_CONDITION for c in conditions):
        return conditions
    condition = Condition(
        type=CONTACT_CONDITION,
        status=is_in_contact,
        reason=reason,
        message=message,
        last_transition_time=now,
    )
    return set_condition(conditions, condition)


def is_back(status: ExecutionStatus, node: Node | None) -> bool:
    """Whether an execution is Lost by the silence of its node alone, and the node is there again,
    with its ledger: it will be judged anew in a moment, and may be about to report."""
    if status.contact is not Contact.LOST or node is None:
        return False
    is_heard = node.status.contact is Contact.REACHABLE
    if not is_heard or node.spec.membership is Membership.REJECTED:
        return False
    ledger = status.report.incarnation if status.report else ""
    if ledger and ledger != node.status.incarnation:
        return False
    return any(c.type == CONTACT_CONDITION and c.reason == NODE_SILENT for c in status.conditions)


def _condition(case: Case) -> Condition | None:
    return next((c for c in case.conditions if c.type == CONTACT_CONDITION), None)


def _reason(case: Case) -> str:
    condition = _condition(case)
    return condition.reason if condition else ""
