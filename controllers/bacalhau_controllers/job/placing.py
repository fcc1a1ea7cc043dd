"""Finds places for the attempts that slots need, and remembers the verdicts."""

from collections.abc import Iterable, Mapping
from datetime import datetime

from bacalhau_api.locality import input_keys
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import Job, Verdict
from bacalhau_controllers.job.draft import Draft, Queued
from bacalhau_controllers.job.look import Look, is_forgiven
from bacalhau_controllers.job.owned import Group, SlotView
from bacalhau_controllers.job.pins import known_pins, needs_pins, resolver, waited_until
from bacalhau_controllers.job.slots import new_execution
from bacalhau_controllers.placement import (
    NOWHERE,
    Amounts,
    Near,
    NodeTable,
    Request,
    Search,
    amounts_of,
    describe,
    shape_of,
    summarise,
)

NOTHING = Amounts(0, 0, 0, 0, 0)
"""For jobs of which only the matching nodes are asked for."""

CAPACITY = "Capacity"
ANY_SLOT = "*"


def request_of(
    job: Job,
    generation: Group | None,
    nodes: NodeTable,
    *,
    amounts: Amounts | None = None,
) -> Request:
    """What a job asks for. `generation` is the current one, None if refusals do not matter."""
    if amounts is None:
        amounts = amounts_of(job.spec.task.resources, nodes.defaults)
    return Request(
        job=f"{job.metadata.namespace}/{job.name}",
        job_uid=job.metadata.uid,
        shape=shape_of(job),
        amounts=amounts,
        refused=refused_nodes(job, generation, nodes) if generation else {},
    )


def slot_keys(job: Job, partition: int = 0) -> tuple[str, ...]:
    """The keys of what one slot of a job reads."""
    spec = job.spec
    partitions = 1 if spec.type.is_per_node else spec.count
    return input_keys(spec.task.input_sources, partition, partitions)


def refused_nodes(job: Job, generation: Group, nodes: NodeTable) -> dict[str, str]:
    """The nodes that refused this generation, with their words.

    A refusal counts for as long as the node stays connected: one that came back since may have
    been given another configuration, and is asked again, once for each time. So is everybody once
    the user has it tried anew.
    """
    refused: dict[str, str] = {}
    for execution in generation.refusals.values():
        if is_forgiven(execution, job):
            continue
        report = execution.status.report
        node = nodes.node(execution.spec.node)
        made = execution.metadata.creation_timestamp
        since = node.status.connected_since if node else None
        if since is None or made is None or since <= made:
            refused[execution.spec.node] = (report.message or report.reason) if report else ""
    return refused


class Placer:
    """Places slots of one job, one after the other, in one plan. `amounts` replaces what the job
    asks for."""

    def __init__(
        self,
        draft: Draft,
        nodes: NodeTable,
        held: Mapping[str, str],
        amounts: Amounts | None = None,
    ) -> None:
        self._draft = draft
        self._nodes = nodes
        self._held = held
        self._amounts = amounts
        self._request: Request | None = None
        self._search: Search | None = None
        self._is_exhausted = False
        self._waiting: list[str] = []
        self._waiting_nodes: list[str] = []
        self._postponed = 0
        self._nearby: tuple[tuple[str, ...], Near] = ((), NOWHERE)
        self._resolver: str | None = None  # who resolves references; empty: nobody needs to
        self._resolver_until: datetime | None = None
        self.created = 0
        self.quota = ""
        """Why something has to wait for its namespace rather than for a node."""

    @property
    def request(self) -> Request:
        """What the job asks for; made on first use, since most plans place nothing."""
        if self._request is None:
            view = self._draft.view
            self._request = request_of(view.job, view.current, self._nodes, amounts=self._amounts)
        return self._request

    @property
    def waiting(self) -> int:
        """How many slots found no place."""
        return len(self._waiting) + (self._postponed if self._waiting else 0)

    def place(self, view: SlotView, found: Look) -> Execution | None:
        """Create the next attempt on the best node. None if there is none, or no more room in
        this plan."""
        if not self._may_begin(view, found):
            return None
        search = self._open()
        row = None if self._is_exhausted else search.best(found.avoid, self._near(view))
        if row is None:
            self._wait(search, view)
            self._is_exhausted = True
            return None
        return self._create(search, view, found, row)

    def try_move(self, view: SlotView, found: Look) -> Execution | None:
        """As `place`, but never on a node in `avoid`."""
        if not self._may_begin(view, found):
            return None
        if not self.can_move(view, found):
            return None
        search = self._open()
        row = search.best(found.avoid, self._near(view))
        assert row is not None
        return self._create(search, view, found, row)

    def can_move(self, view: SlotView, found: Look) -> bool:
        """Whether there is a place on a node that is not in `avoid`. If not, it is waited for."""
        search = self._open()
        row = None if self._is_exhausted else search.best(found.avoid, self._near(view))
        if row is None or self._nodes.names[row] in found.avoid:
            self._wait(search, view)
            return False
        return True

    def place_on(self, node: str, view: SlotView, found: Look) -> Execution | None:
        """Create the next attempt on one node, if it fits there."""
        if not self._may_begin(view, found):
            return None
        search = self._open()
        row = search.at(node)
        if row is None:
            self._waiting_nodes.append(node)
            self._wait(search, view)
            return None
        return self._create(search, view, found, row)

    def postpone(self, count: int) -> None:
        """So many more slots need a place, and were not asked for."""
        if not self._waits_for_pins():
            self._postponed += count

    def wait_for_match(self) -> None:
        """No node matches the job at all: wait for one."""
        search = self._open()
        self._wait(search, None)

    def close(self) -> None:
        """Put the job into the queue if something found no place, or comes in the next plan."""
        if not self._waiting and not self._postponed:
            return
        if self.quota:
            self._draft.is_over_quota = True
            return
        request = self.request
        if self._waiting_nodes and not self._postponed:
            request = Request(
                request.job,
                request.job_uid,
                request.shape,
                request.amounts,
                request.refused,
                frozenset(self._waiting_nodes),
            )
        self._draft.queued = Queued(request, len(self._waiting) + self._postponed)

    def is_allowed(self, *, freeing: Iterable[Execution] = ()) -> bool:
        """Whether the namespace lets one more execution start, once these are gone."""
        allowance = self._draft.allowance
        if allowance is None:
            return True
        nodes, job = self._nodes, self._draft.job
        used = nodes.used_in(job.metadata.namespace)
        for execution in freeing:
            made = nodes.reservation((execution.metadata.namespace, execution.name))
            if made is not None:
                used = Amounts(*(u - m for u, m in zip(used, made.amounts, strict=True)))
        return not allowance.refusal(used, self.request.amounts)

    def _may_begin(self, view: SlotView, found: Look) -> bool:
        """Whether nothing but a place is in the way of one more execution."""
        # Those that it replaces are told so in the same commit, or not at all.
        has_room = self._has_room(1 + len(found.retires))
        return has_room and not self._waits_for_pins() and not self._is_over_quota(view)

    def _is_over_quota(self, view: SlotView) -> bool:
        """Whether the namespace has no room for one more. Then the slot waits, and says so."""
        allowance = self._draft.allowance
        if allowance is None:
            return False
        used = self._nodes.used_in(self._draft.job.metadata.namespace)
        refusal = allowance.refusal(used, self.request.amounts)
        if not refusal:
            return False
        self._waiting.append(str(view.slot))
        self.quota = self.quota or refusal
        return True

    def _has_room(self, writes: int) -> bool:
        if self._draft.has_room(writes):
            return True
        self._postponed += 1
        return False

    def _waits_for_pins(self) -> bool:
        """Whether another attempt is to find out first what the job's references mean."""
        if self._resolver is None:
            view = self._draft.view
            if not needs_pins(view.job.spec.task) or known_pins(view):
                self._resolver = ""
            elif (first := resolver(view, self._draft.now)) is not None:
                self._resolver = f"node {first.spec.node}"
                self._resolver_until = waited_until(first)
            elif self.created:
                self._resolver = "the node of the first attempt"
            else:
                return False
        if self._resolver:
            what = "it is to find out which image the job's reference means"
            until = self._resolver_until
            self._draft.wait("Image", what, mover=self._resolver, until=until, count=0)
        return bool(self._resolver)

    def _open(self) -> Search:
        if self._search is None:
            now = self._draft.now.timestamp()
            self._search = Search(self._nodes, self.request, now=now, held=self._held)
        return self._search

    def _near(self, view: SlotView) -> Near:
        """Where what a slot reads is. Most slots read the same as the one before."""
        if not self._nodes.knows_data:
            return NOWHERE
        keys = slot_keys(self._draft.job, view.slot.partition)
        if keys != self._nearby[0]:
            self._nearby = (keys, self._nodes.near(keys))
        return self._nearby[1]

    def _create(self, search: Search, view: SlotView, found: Look, row: int) -> Execution:
        draft, slot = self._draft, view.slot
        if len(draft.verdicts) < draft.settings.verdicts_kept:
            near = self._near(view)
            draft.verdicts.append(
                describe(search, str(slot), draft.now, row=row, avoid=found.avoid, near=near)
            )
        execution = new_execution(
            draft.job,
            slot,
            view.next_attempt,
            node=self._nodes.names[row],
            charged=found.charged,
            now=draft.now,
            pins=known_pins(draft.view),
            stop_seconds_min=draft.settings.stop_seconds_min,
        )
        search.take(row, (execution.metadata.namespace, execution.name))
        draft.add(execution)
        for old in found.retires:
            draft.stop(old, "Superseded", superseded=True, is_sure=True)
        self.created += 1
        return execution

    def _wait(self, search: Search, view: SlotView | None) -> None:
        name = str(view.slot) if view is not None else ANY_SLOT
        self._waiting.append(name)
        if len(self._waiting) > 1:
            return
        verdict = self._verdict(search, view)
        # The verdict that says why not is kept, whatever else there is to say.
        kept = self._draft.settings.verdicts_kept
        self._draft.verdicts = [verdict, *self._draft.verdicts][:kept]

    def _verdict(self, search: Search, view: SlotView | None) -> Verdict:
        """Why there is no place. Where only numbers changed since the last time it was written
        down, the words of that time stand for a while: else every sweep would write."""
        draft = self._draft
        name = str(view.slot) if view is not None else ANY_SLOT
        if view is not None and view.slot.node:
            request = self.request
            pinned = Request(
                request.job,
                request.job_uid,
                request.shape,
                request.amounts,
                request.refused,
                frozenset((view.slot.node,)),
            )
            search = Search(self._nodes, pinned, now=search.now, held=self._held)
        new = describe(search, name, draft.now, row=None)
        for old in draft.job.status.verdicts:
            if old.slot == name and not old.node:
                age = (draft.now - old.time).total_seconds()
                is_same = _gist(old) == _gist(new) and age < draft.settings.verdict_seconds
                if is_same or old.but(time=new.time) == new:
                    return old
        return new

    def explain(self) -> str:
        """Why the first slot that waits found no place, in one line."""
        if self.quota:
            return self.quota
        for verdict in self._draft.verdicts:
            if not verdict.node:
                return summarise(verdict)
        return ""


def _gist(verdict: Verdict) -> tuple[int, tuple[str, ...]]:
    return verdict.nodes_total, tuple(c.rule for c in verdict.rejected)
