"""Services and daemons: keep slots filled, and let a new generation take over piece by piece.

A slot is available while an execution of any generation is known to run there. At most
`maxUnavailable` slots are without one, or about to be, because of the change. A service starts the
new execution beside the old one and stops the old once the new runs; where there is no room for
both, the old one goes first. A daemon never runs twice on a node: the old one goes first.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from bacalhau_api.meta import Contact
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import JobPhase
from bacalhau_api.v1.node import Membership, Node
from bacalhau_controllers.job.draft import Draft
from bacalhau_controllers.job.look import Is, Look, Sight, look
from bacalhau_controllers.job.outcome import Outcome
from bacalhau_controllers.job.owned import SlotKey, SlotView
from bacalhau_controllers.job.placing import NOTHING, Placer
from bacalhau_controllers.job.tally import Tally, enforced, started_at
from bacalhau_controllers.placement import Request, fits, shape_of
from bacalhau_controllers.placement.resources import Amounts
from bacalhau_controllers.placement.rules import RULES

SCALED_DOWN = "ScaledDown"
REPLACED = "Replaced"
DRAINED = "Drained"
NO_MATCH = "NoLongerMatches"


@dataclass(slots=True)
class _Place:
    """One slot in a rollout: what is new there, and what earlier generations still have."""

    view: SlotView
    found: Look
    old: list[Execution]
    is_needed: bool = False

    def is_new_ready(self, sight: Sight) -> bool:
        """Whether the new generation serves here, and did not just begin to."""
        if self.found.state in (Is.ACCEPTED, Is.DONE):
            return True
        ready_at = self.ready_at(sight)
        return ready_at is not None and ready_at <= sight.now

    def ready_at(self, sight: Sight) -> datetime | None:
        """From when the new execution counts; None if it does not run."""
        found = self.found.execution
        if self.found.state is not Is.LIVE or found is None or not sight.is_running(found):
            return None
        started = started_at(found, sight.now)
        if started > sight.now:  # the clock was set back since; nobody waits for it to catch up
            return sight.now
        return started + timedelta(seconds=sight.settings.ready_seconds)

    def is_old_running(self, sight: Sight) -> bool:
        """Whether an earlier generation serves here, and was not told to stop."""
        return any(sight.is_running(e) for e in self.old)

    def is_unsettled(self, sight: Sight) -> bool:
        """Whether the change is under way here: nothing serves, or the new one has begun."""
        if self.is_new_ready(sight):
            return False
        return not self.is_old_running(sight) or bool(self.view.attempts)


def service(draft: Draft, sight: Sight, held: Mapping[str, str]) -> Outcome:
    """Keep `count` executions running."""
    count = draft.job.spec.count
    tally = Tally(total=count)
    old = _by_key(draft.view.older_active())
    _scale_down(draft, sight, count, old)
    placer = Placer(draft, sight.nodes, held)
    places: list[_Place] = []
    for partition in range(count):
        view = enforced(draft.view.slot(partition), draft, sight)
        found = look(view, sight)
        if found.is_moving and sight.policy.action == "stop":
            found = _stop_before_move(view, found, draft, sight, placer)
        place = _Place(view, found, old.get(partition, []))
        place.is_needed = tally.settle(view, place.found, draft)
        places.append(place)
    _wait_until_ready(places, draft, sight)
    unsettled = sum(place.is_unsettled(sight) for place in places)
    left = max(draft.job.spec.update.max_unavailable - unsettled, 0)
    for place in places:
        left -= _advance_service(place, draft, sight, tally, placer, left)
    for place in places:
        if place.found.is_moving:
            placer.try_move(place.view, place.found)
    return _ended(Outcome(tally, placer), draft)


def _stop_before_move(
    view: SlotView, found: Look, draft: Draft, sight: Sight, placer: Placer
) -> Look:
    """Under the policy `stop` there are never two at once: if there is a place elsewhere, what is
    on a draining node ends first, and the next follows its end."""
    found.is_moving = False
    if found.execution is not None and placer.can_move(view, found):
        draft.stop(found.execution, DRAINED)
        found = look(draft.seen(view), sight)
    return found


def _wait_until_ready(places: Iterable[_Place], draft: Draft, sight: Sight) -> None:
    """While a change is under way, look again when new executions have proved themselves."""
    places = list(places)
    if any(place.old for place in places):
        times = (place.ready_at(sight) for place in places)
        for at in times:
            if at is not None and at > sight.now:
                draft.look_again(at)


def _scale_down(
    draft: Draft, sight: Sight, count: int, old: dict[SlotKey, list[Execution]]
) -> None:
    """Stop what is beyond the count. What ended there counts, like everything that was finished."""
    for view in draft.view.current.open_views():
        if view.slot.partition < count:
            continue
        draft.stop_all(view.active, SCALED_DOWN)
        found = look(draft.seen(view), sight)
        if found.state is Is.DONE and found.execution is not None:
            draft.take_result(found.execution, publishes=True)
    for key, executions in old.items():
        if not isinstance(key, int) or key >= count:
            draft.stop_all(executions, SCALED_DOWN)


def _advance_service(
    place: _Place, draft: Draft, sight: Sight, tally: Tally, placer: Placer, left: int
) -> int:
    """Move one slot on. Returns 1 if that made it unsettled."""
    if place.is_new_ready(sight):
        draft.stop_all(place.old, REPLACED)
        return 0
    if not place.is_needed:
        return 0
    is_exclusive = any(port.static for port in draft.job.spec.task.network.ports)
    if not place.is_old_running(sight):
        # Nothing serves here, so nothing is lost by going on.
        draft.stop_all(place.old, REPLACED)
        if is_exclusive and any(e.status.contact is Contact.REACHABLE for e in place.old):
            tally.waiting += 1
            draft.wait("Rollout", f"slot {place.view.slot}: the old execution is to end first")
            return 0
        tally.add(placer.place(place.view, place.found), draft)
        return 0
    has_begun = bool(place.view.attempts)  # then it is among the unsettled already
    if left < 1 and not has_begun:
        tally.running += 1
        draft.wait("Rollout", "the next slots follow once the new ones run")
        return 0
    if is_exclusive:  # two of them cannot share a fixed port
        draft.stop_all(place.old, REPLACED)
        tally.waiting += 1
        draft.wait("Rollout", f"slot {place.view.slot}: the old execution is to end first")
        return not has_begun
    if tally.add(placer.place(place.view, place.found), draft):
        return not has_begun
    if draft.is_full:
        return 0
    if not _frees_a_place(place.old, placer.request, sight):
        draft.blocked_on |= {e.spec.node for e in place.old}
        return 0
    if not placer.is_allowed(freeing=place.old):
        draft.is_over_quota = True
        return 0
    draft.stop_all(place.old, REPLACED)
    return not has_begun


def _frees_a_place(old: list[Execution], request: Request, sight: Sight) -> bool:
    """Whether the new execution fits where an old one is, once that is gone. If not, the old one
    is left alone: a service is not taken down for something that cannot run."""
    nodes = sight.nodes
    for execution in old:
        row = nodes.row(execution.spec.node)
        made = nodes.reservation((execution.metadata.namespace, execution.name))
        if row is None or made is None or execution.spec.node in request.refused:
            continue
        sums = zip(nodes.free_on(row), made.amounts, strict=True)
        free = Amounts(*(have + more for have, more in sums))
        if nodes.matching.mask(request.shape).ok[row] and fits(request.amounts, free):
            return True
    return False


def daemon(draft: Draft, sight: Sight, held: Mapping[str, str]) -> Outcome:
    """Keep one execution on each matching node, those that join later included."""
    job, nodes = draft.job, sight.nodes
    old = _by_node(draft.view.older_active())
    targets = {
        name for name in {*draft.view.current.slots, *old} if _stays(str(name), draft, sight)
    }
    targets |= set(nodes.matches(shape_of(job)))
    _leave(draft, sight, old, targets)
    tally, places = Tally(total=len(targets)), list[_Place]()
    for name in sorted(str(target) for target in targets):
        view = enforced(draft.view.slot(name), draft, sight)
        place = _Place(view, look(view, sight), old.get(name, []))
        place.is_needed = tally.settle(view, place.found, draft)
        places.append(place)
    placer = Placer(draft, nodes, held, None if targets else NOTHING)
    if not targets:
        placer.wait_for_match()
    # A node that cannot be reached neither blocks the others nor counts as changed.
    reached = [p for p in places if _is_reached(p, sight)]
    _wait_until_ready(places, draft, sight)
    unsettled = sum(p.is_unsettled(sight) for p in reached)
    left = max(job.spec.update.max_unavailable - unsettled, 0)
    for place in places:
        left -= _advance_daemon(place, draft, sight, tally, placer, left)
    return Outcome(tally, placer)


def _advance_daemon(
    place: _Place, draft: Draft, sight: Sight, tally: Tally, placer: Placer, left: int
) -> int:
    if not place.is_needed:
        draft.stop_all(place.old, REPLACED)
        return 0
    node = place.view.slot.node
    old = [e for e in place.old if not sight.is_gone(e)]
    if not old:
        draft.stop_all(place.old, REPLACED)
        tally.add(placer.place_on(node, place.view, place.found), draft)
        return 0
    left_used, tally_as = 0, "running"
    if not _is_reached(place, sight):
        what, why = "Contact", "is to come back before it gets the new generation"
    elif not place.is_old_running(sight):
        draft.stop_all(place.old, REPLACED)
        tally_as, what, why = "waiting", "Rollout", "is to end the old execution first"
    elif not _frees_a_place(old, placer.request, sight):
        draft.blocked_on.add(node)
        what, why = "Rollout", "does not take the new generation now; the old one stays"
    elif not placer.is_allowed(freeing=old):
        draft.is_over_quota = True
        what, why = "Rollout", "keeps the old one: its namespace has no room for the new generation"
    elif left < 1:
        what, why = "Rollout", "follows once others run the new generation"
    else:
        draft.stop_all(place.old, REPLACED)
        tally_as, what, why = "waiting", "Rollout", "is to end the old execution first"
        left_used = 1
    tally.running += tally_as == "running"
    tally.waiting += tally_as == "waiting"
    draft.wait(what, f"node {node} {why}", mover=f"node {node}")
    return left_used


def _is_reached(place: _Place, sight: Sight) -> bool:
    node = sight.nodes.node(place.view.slot.node)
    return node is not None and node.status.contact is Contact.REACHABLE


def _leave(
    draft: Draft, sight: Sight, old: dict[str, list[Execution]], targets: set[SlotKey]
) -> None:
    """Stop what is on nodes where the daemon has no business any more."""
    leaving = [
        e for v in draft.view.current.open_views() if v.slot.node not in targets for e in v.active
    ]
    leaving += [e for name, found in old.items() if name not in targets for e in found]
    for execution in leaving:
        draft.stop(execution, DRAINED if sight.is_draining(execution) else NO_MATCH)


def _stays(name: str, draft: Draft, sight: Sight) -> bool:
    """Whether what is on a node may stay there. A cordon, a taint, a lost contact or an engine
    that is broken for the moment keep new work away and do not remove what is there."""
    node = sight.nodes.node(name)
    if node is None or node.spec.drain or node.spec.membership is Membership.REJECTED:
        return False
    has_work = any(not sight.is_gone(e) for view in _views(name, draft) for e in view.active)
    return has_work and _meets_constraints(draft, node)


def _views(name: str, draft: Draft) -> Iterable[SlotView]:
    for group in (draft.view.current, *draft.view.older.values()):
        if (view := group.slots.get(name)) is not None:
            yield view


def _meets_constraints(draft: Draft, node: Node) -> bool:
    rule = RULES["Constraint"]
    return all(
        rule.check(check.need, rule.fact(node, check.key)).is_ok
        for check in shape_of(draft.job)
        if check.rule == rule.name
    )


def _by_key(executions: Iterable[Execution]) -> dict[SlotKey, list[Execution]]:
    groups: dict[SlotKey, list[Execution]] = {}
    for execution in executions:
        slot = execution.spec.slot
        groups.setdefault(slot.node or slot.partition, []).append(execution)
    return groups


def _by_node(executions: Iterable[Execution]) -> dict[str, list[Execution]]:
    groups: dict[str, list[Execution]] = {}
    for execution in executions:
        groups.setdefault(execution.spec.node, []).append(execution)
    return groups


def _ended(outcome: Outcome, draft: Draft) -> Outcome:
    """A service whose restart policy lets it end is over once every slot ended."""
    tally = outcome.tally
    if tally.is_fatal:
        outcome.ended, outcome.reason = JobPhase.FAILED, "SlotFailed"
        outcome.message = tally.failure
        return outcome
    if draft.job.spec.restart.policy == "always" or not tally.total or not tally.is_settled:
        return outcome
    if tally.succeeded + tally.failed < tally.total:
        return outcome
    outcome.ended, outcome.reason = JobPhase.COMPLETED, "AllEnded"
    if tally.failed:
        outcome.ended, outcome.reason = JobPhase.FAILED, "SlotFailed"
        outcome.message = tally.failure
    return outcome
