"""Taking jobs down: stop, suspend, delete; and keeping the live set of objects bounded."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final

from bacalhau_api.meta import Contact
from bacalhau_api.v1.execution import Execution
from bacalhau_controllers.job.draft import Draft
from bacalhau_controllers.job.look import Is, Sight, look, takes_results
from bacalhau_controllers.job.owned import Group, SlotView
from bacalhau_controllers.job.slots import names
from bacalhau_controllers.job.tally import Tally

_REFUSALS_KEPT_MAX: Final = 100


def take_results(draft: Draft, sight: Sight) -> Tally:
    """Accept what succeeded in the meantime, whatever became of the job; count the slots."""
    current = draft.view.current
    tally = Tally(succeeded=current.closed)
    for view in current.open_views():
        found = look(draft.seen(view), sight)
        if found.state is Is.DONE:
            assert found.execution is not None
            tally.succeeded += draft.take_result(found.execution, publishes=True)
        elif found.state is Is.ACCEPTED:
            tally.succeeded += 1
        elif found.state is Is.FAILED:
            tally.failed += 1
        elif found.state in (Is.LIVE, Is.ABSENT, Is.STOPPING):
            tally.running += 1
        if found.state in (Is.DONE, Is.ACCEPTED):
            for loser in found.losers:
                draft.stop(loser, "Superseded", superseded=True)
    return tally


def tidy(draft: Draft, sight: Sight) -> None:
    """What is left to do about earlier generations, and about what is too old."""
    _take_older_results(draft, sight)
    _prune(draft, sight)


def _take_older_results(draft: Draft, sight: Sight) -> None:
    """What an earlier generation finished counts for it, and is not delivered any more: that
    could overwrite what the current one delivered."""
    if not takes_results(draft.job):
        return
    for generation in _kept(draft):
        for view in draft.view.older[generation].open_views():
            if view.acceptance is None:
                found = look(draft.seen(view), sight)
                if found.state is Is.DONE and found.execution is not None:
                    draft.take_result(found.execution, publishes=False)


def reachable(executions: Iterable[Execution]) -> list[Execution]:
    """Those whose node answers, so that it can be waited for. The others learn when they return,
    from the full list of what they are to do."""
    return [e for e in executions if e.status.contact is Contact.REACHABLE]


def wait_for_stops(
    executions: Iterable[Execution], draft: Draft, *, until: datetime | None = None
) -> bool:
    """Note that stops are waited for, if there are any that can be."""
    waited = reachable(executions)
    if not waited:
        return False
    nodes = sorted({e.spec.node for e in waited})
    mover = f"node {nodes[0]}" if len(nodes) == 1 else "nodes"
    if until is None:  # a node that answers and does not stop it is taken as silent after a while
        known = (e.status.waiting.until for e in waited if e.status.waiting)
        until = min(filter(None, known), default=None)
        draft.wait("Stop", f"{names(waited)} to stop", mover=mover, until=until, wakes=False)
    else:
        draft.wait("Stop", f"{names(waited)} to stop", mover=mover, until=until)
    return True


def is_ready_for_removal(draft: Draft) -> bool:
    """Stop everything of a job that is being deleted. True once nobody has to be waited for."""
    active = draft.view.active()
    draft.stop_all(active, "JobDeleted")
    asked_at = draft.job.metadata.deletion_timestamp
    assert asked_at is not None
    until = asked_at + timedelta(seconds=draft.settings.delete_patience_seconds)
    return draft.now >= until or not wait_for_stops(active, draft, until=until)


def remove_everything(draft: Draft) -> None:
    """Delete all that a job owns, as far as one plan can."""
    for group in (draft.view.current, *draft.view.older.values()):
        for view in group.views():
            if draft.is_full:
                return
            _remove_slot(view, draft)
    for publication in draft.view.publications.values():
        draft.remove(publication)


def _prune(draft: Draft, sight: Sight) -> None:
    """Delete what is too old for the live set; the history keeps it. Never the accepted attempt
    or the newest one, and nothing that has not ended and is not given up."""
    kept = _kept(draft)
    refusals = _refusals_kept(draft.view.current)
    for view in draft.view.current.retried_views():
        _prune_attempts(view, draft, refusals)
    for number in kept:
        for view in draft.view.older[number].retried_views():
            _prune_attempts(view, draft, set())
    for number in sorted(draft.view.older):
        if number not in kept:
            for view in draft.view.older[number].views():
                if not _is_in_use(view, draft, sight):
                    _remove_slot(view, draft)


def _kept(draft: Draft) -> list[int]:
    """The earlier generations whose objects stay."""
    count = max(draft.settings.generations_kept - 1, 0)
    return sorted(draft.view.older, reverse=True)[:count]


def _is_in_use(view: SlotView, draft: Draft, sight: Sight) -> bool:
    if any(e.status.contact is not Contact.LOST for e in view.active):
        return True
    publications = (draft.view.publications.get(e.name) for e in view.attempts)
    return any(
        p is not None
        and not p.status.phase.is_final
        and p.status.contact is Contact.REACHABLE
        and sight.nodes.node(p.spec.node) is not None
        for p in publications
    )


def _refusals_kept(group: Group) -> set[str]:
    """The newest refusal of each node: who forgot it would ask again and again."""
    newest: dict[str, Execution] = {}
    for execution in sorted(group.refusals.values(), key=_made):
        newest[execution.spec.node] = execution
    return {e.name for e in sorted(newest.values(), key=_made)[-_REFUSALS_KEPT_MAX:]}


def _made(execution: Execution) -> tuple[str, int, str]:
    made = execution.metadata.creation_timestamp
    return (made.isoformat() if made else "", execution.spec.attempt, execution.name)


def _prune_attempts(view: SlotView, draft: Draft, refusals: set[str]) -> None:
    surplus = len(view.attempts) - draft.settings.attempts_kept
    if surplus <= 0:
        return
    kept = refusals | {a.spec.execution for a in draft.accept}
    if view.acceptance is not None:
        kept.add(view.acceptance.spec.execution)
    for execution in view.attempts[:surplus]:
        if execution.phase.is_final and execution.name not in kept:
            draft.remove(execution)


def _remove_slot(view: SlotView, draft: Draft) -> None:
    for execution in view.attempts:
        draft.remove(execution)
        if execution.ref not in draft.delete:  # no room: the rest follows in the next plan
            return
        publication = draft.view.publications.get(execution.name)
        if publication is not None:
            draft.remove(publication)
    if view.acceptance is not None:
        draft.remove(view.acceptance)
