"""What the four types of job want: which slots there are, and who gets a new attempt.

A batch or ops job ends by itself; a service or daemon keeps its slots filled. How a new generation
of the latter takes over is in `rollout.py`.
"""

from collections.abc import Iterator, Mapping

from bacalhau_api.v1.job import JobPhase, JobType
from bacalhau_api.v1.node import Membership
from bacalhau_controllers.job import rollout
from bacalhau_controllers.job.draft import Draft
from bacalhau_controllers.job.look import Is, Look, Sight, look
from bacalhau_controllers.job.outcome import NEW_GENERATION, Outcome
from bacalhau_controllers.job.owned import SlotView
from bacalhau_controllers.job.placing import NOTHING, Placer
from bacalhau_controllers.job.tally import Tally, enforced
from bacalhau_controllers.placement import shape_of


def work(draft: Draft, sight: Sight, held: Mapping[str, str]) -> Outcome:
    """One round of work on a job that is neither over nor held."""
    match draft.job.spec.type:
        case JobType.BATCH:
            return _batch(draft, sight, held)
        case JobType.OPS:
            return _ops(draft, sight, held)
        case JobType.SERVICE:
            return rollout.service(draft, sight, held)
        case JobType.DAEMON:
            return rollout.daemon(draft, sight, held)


def _batch(draft: Draft, sight: Sight, held: Mapping[str, str]) -> Outcome:
    spec = draft.job.spec
    current = draft.view.current
    tally, needed = Tally(total=spec.count, succeeded=current.closed), list[tuple[SlotView, Look]]()
    draft.stop_all(draft.view.older_active(), NEW_GENERATION)
    for view in (enforced(open_, draft, sight) for open_ in current.open_views()):
        found = look(view, sight)
        if tally.settle(view, found, draft):
            needed.append((view, found))
    placer = Placer(draft, sight.nodes, held)
    outcome = Outcome(tally, placer)
    if tally.failed:
        outcome.ended, outcome.reason = JobPhase.FAILED, "SlotFailed"
        outcome.message = tally.failure
        tally.waiting += len(needed) + spec.count - len(current.slots)
        return outcome
    for view, found in needed:
        tally.add(placer.place(view, found), draft)
    if len(current.slots) < spec.count:
        new = (n for n in range(spec.count) if n not in current.slots)
        _begin(new, spec.count - len(current.slots), draft, tally, placer)
    if tally.is_settled and tally.succeeded == tally.total:
        outcome.ended, outcome.reason = JobPhase.COMPLETED, "AllSucceeded"
    return outcome


def _begin(new: Iterator[int], count: int, draft: Draft, tally: Tally, placer: Placer) -> None:
    """First attempts, as far as there are places and room in this plan."""
    for partition in new:
        placed = placer.place(draft.view.slot(partition), Look(Is.NEEDED))
        if not tally.add(placed, draft):
            tally.waiting += count - 1  # what one partition did not get, the others do not either
            placer.postpone(count - 1)
            return
        count -= 1


def _ops(draft: Draft, sight: Sight, held: Mapping[str, str]) -> Outcome:
    """Once on each node that matched when the generation was first placed."""
    draft.stop_all(draft.view.older_active(), NEW_GENERATION)
    nodes = _ops_nodes(draft, sight)
    if not nodes:
        placer = Placer(draft, sight.nodes, held, NOTHING)
        placer.wait_for_match()
        return Outcome(Tally(), placer)
    tally, needed = Tally(total=len(nodes)), list[tuple[SlotView, Look]]()
    for name in nodes:
        view = enforced(draft.view.slot(name), draft, sight)
        found = look(view, sight)
        if found.state is Is.NEEDED:
            found = _unless_gone(name, found, sight)
        if tally.settle(view, found, draft):
            needed.append((view, found))
    placer = Placer(draft, sight.nodes, held)
    for view, found in needed:
        tally.add(placer.place_on(view.slot.node, view, found), draft)
    outcome = Outcome(tally, placer, ops_nodes=nodes)
    if tally.is_settled and tally.succeeded + tally.failed == tally.total:
        outcome.ended, outcome.reason = JobPhase.COMPLETED, "AllSucceeded"
        if tally.failed:
            outcome.ended, outcome.reason = JobPhase.FAILED, "SlotFailed"
            outcome.message = f"{tally.failed} of {tally.total} nodes failed; {tally.failure}"
    return outcome


def _ops_nodes(draft: Draft, sight: Sight) -> tuple[str, ...]:
    """Fixed when the generation is first placed, and stored together with its first executions."""
    job, status = draft.job, draft.job.status
    if status.observed_generation == job.metadata.generation and status.ops_nodes:
        return status.ops_nodes
    known = [key for key in draft.view.current.slots if isinstance(key, str)]
    # If there are executions but no list, the status was lost: they are the list.
    return tuple(sorted(known)) or sight.nodes.matches(shape_of(job))


def _unless_gone(name: str, found: Look, sight: Sight) -> Look:
    """A slot of an ops job ends with its node."""
    node = sight.nodes.node(name)
    if node is None:
        return Look(Is.FAILED, why=f"node {name} was removed")
    if node.spec.membership is Membership.REJECTED:
        return Look(Is.FAILED, why=f"node {name} was rejected")
    return found
