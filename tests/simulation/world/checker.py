"""The invariants, checked at every write, start, delivery and acknowledgement.

What can only be judged at rest is in `rest.py`. Numbers are those of the list in the architecture:
I1 nothing acknowledged is lost, I2 one result per slot, I3 phases never go back, I4 what finished
arrives, I5 nothing runs unasked, I6 whatever is not final says what it waits for, I7 history folds
to what is stored, I8 one fenced writer per status, I9 it comes to rest, I10 no over-commitment,
I11 nothing runs where it was refused, I12 the policy `stop` never has two attempts run.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bacalhau_api.meta import Contact, Ref, Resource
from bacalhau_api.v1.execution import (
    Acceptance,
    Execution,
    Phase,
    Publication,
    Slot,
    merge_report,
)
from bacalhau_api.v1.job import Job, Resources
from bacalhau_api.v1.node import Membership, Node
from bacalhau_api.wire import Changes, Fact
from bacalhau_controllers.manager import Manager
from bacalhau_controllers.placement.resources import amounts_of, capacity_of
from bacalhau_controllers.runner.state import split_workload_id
from bacalhau_controllers.store import Delete, Put, Why, Write
from tests.simulation.world.storage import TrueStore

if TYPE_CHECKING:
    from tests.simulation.world.machines import Machine
    from tests.simulation.world.world import World

_ORDER = {Phase.PENDING: 0, Phase.PREPARING: 1, Phase.RUNNING: 2}
_WRITERS = {
    "Job": "job-reconciler",
    "Execution": "execution-reconciler",
    "Publication": "publishing-reconciler",
    "Node": "node-reconciler",
}
STALE_SECONDS = 90.0
"""For so long a scheduler may not know of an operator's word yet."""

SlotKey = tuple[str, int, int, str]


class Violation(AssertionError):
    """An invariant does not hold. `subjects` are names to look for in the trace."""

    def __init__(self, invariant: str, message: str, *subjects: object) -> None:
        super().__init__(f"{invariant}: {message}")
        self.invariant = invariant
        self.subjects = tuple(str(subject) for subject in subjects)


class Checker:
    """Sees everything, and complains."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._accepted: dict[SlotKey, str] = {}
        self._refused_at: dict[str, float] = {}
        self._rejected_at: dict[str, float] = {}
        self._before: dict[Ref, Resource] = {}
        self.writes = 0
        self.rewordings = 0
        """Writes that only put the reason of an unchanged wait in other words or numbers."""
        self.last_write_at = 0.0
        self.accepted = 0
        self.runs = 0

    def fail(self, invariant: str, message: str, *subjects: object) -> None:
        """An invariant does not hold: the world ends here."""
        self._world.fail(Violation(invariant, message, *subjects))

    # -- writes ----------------------------------------------------------------------------------

    def before_commit(self, writes: Sequence[Write]) -> None:
        """Remember what was there."""
        self._before.clear()
        for write in writes:
            ref = write.resource.ref if isinstance(write, Put) else write.ref
            found = self._world.store.peek(ref)
            if found is not None:
                self._before[ref] = found

    def committed(
        self, writes: Sequence[Write], why: Why, results: Sequence[Resource | None]
    ) -> None:
        """Something was written."""
        world = self._world
        self.writes += 1
        if self._only_rewords(results):
            self.rewordings += 1
        else:
            self.last_write_at = world.now
        for write, new in zip(writes, results, strict=True):
            ref = write.resource.ref if isinstance(write, Put) else write.ref
            old = self._before.get(ref)
            world.note_write(ref, why, new)
            self._check_writer(ref, old, new, why)
            match new:
                case Execution():
                    self._execution(old if isinstance(old, Execution) else None, new, why)
                case Acceptance():
                    self._acceptance(old, new)
                case Job():
                    self._job(old if isinstance(old, Job) else None, new, why)
                case Publication():
                    self._publication(old if isinstance(old, Publication) else None, new, why)
                case Node():
                    self._node(new)
                case None if isinstance(old, Job) and isinstance(write, Delete):
                    self._job_removed(old)
                case None if isinstance(old, Node):
                    self._rejected_at.pop(old.name, None)  # nobody can tell it any more
                case _:
                    pass
        self._check_room([r for r in results if isinstance(r, Execution)])

    def _only_rewords(self, results: Sequence[Resource | None]) -> bool:
        def gist(job: Job) -> object:
            status, waiting = job.status, job.status.waiting
            plain = waiting.but(message="") if waiting else None
            return job.spec, status.but(verdicts=(), message="", waiting=plain)

        for new in results:
            old = self._before.get(new.ref) if new is not None else None
            if not isinstance(new, Job) or not isinstance(old, Job) or gist(old) != gist(new):
                return False
            if new.metadata.deletion_timestamp != old.metadata.deletion_timestamp:
                return False
        return True

    def _check_writer(self, ref: Ref, old: Resource | None, new: Resource | None, why: Why) -> None:
        """I8: a status is written by its reconciler, under the present lease."""
        is_user = why.actor.startswith("user:") or why.reason == "NodeJoined"
        if is_user:
            if (
                old is not None
                and new is not None
                and getattr(old, "status", None) != getattr(new, "status", None)
                and old.metadata.uid == new.metadata.uid
            ):
                self.fail("I8", f"a user wrote the status of {ref}", ref.name)
            return
        if why.fence is None:
            self.fail("I8", f"{why.actor} wrote {ref} without a fence", ref.name)
        if old is None or new is None or old.metadata.uid != new.metadata.uid:
            return
        if getattr(old, "status", None) == getattr(new, "status", None):
            return
        mine = _WRITERS.get(ref.kind, "")
        by_node = why.actor.startswith("node:") and ref.kind in ("Execution", "Publication")
        by_source = why.actor.startswith("source/") and ref.kind in ("Source", "Claim")
        if why.actor != mine and not (by_node or by_source):
            self.fail("I8", f"{why.actor} wrote the status of {ref}", ref.name)

    def _execution(self, old: Execution | None, new: Execution, why: Why) -> None:
        told = new.status.report
        if old is None or old.metadata.uid != new.metadata.uid:
            if told is not None:
                self.fail("I3", f"{new.ref} was created with a report", new.name)
            self._check_node_wanted(new)
        else:
            before = old.status.report
            if before is not None:
                self._check_forward(old, new)
            if told != before and why.actor not in (f"node:{new.spec.node}",):
                self.fail("I8", f"{why.actor} changed what was reported of {new.ref}", new.name)
        is_mine = old is not None and not why.actor.startswith(("user:", "job-reconciler"))
        if is_mine and (new.status.waiting is None) != new.is_final:
            self.fail("I6", f"{new.ref} is {new.phase} and waits: {new.status.waiting}", new.name)

    def _check_forward(self, old: Execution, new: Execution) -> None:
        """I3."""
        before, after = old.status.report, new.status.report
        assert before is not None
        if after is None:
            self.fail("I3", f"{new.ref} lost its report", new.name)
            return
        if before.phase.is_final:
            if before != after:
                self.fail("I3", f"{new.ref} had ended as {before.phase}, now {after}", new.name)
            return
        if not after.phase.is_final and _ORDER[after.phase] < _ORDER[before.phase]:
            self.fail("I3", f"{new.ref} went from {before.phase} to {after.phase}", new.name)

    def _acceptance(self, old: Resource | None, new: Acceptance) -> None:
        """I2."""
        spec = new.spec
        key = slot_key(spec.job_uid, spec.slot)
        known = self._accepted.get(key)
        if known is not None and known != spec.execution_uid:
            self.fail("I2", f"{new.ref} is a second result of its slot", new.name)
        if old is not None and old != new:
            self.fail("I2", f"{new.ref} was changed", new.name)
        execution = self._world.store.peek(Ref("Execution", new.ref.namespace, spec.execution))
        if (
            not isinstance(execution, Execution)
            or execution.metadata.uid != spec.execution_uid
            or execution.phase is not Phase.SUCCEEDED
            or execution.spec.slot != spec.slot
            or execution.spec.job_uid != spec.job_uid
        ):
            self.fail("I2", f"{new.ref} accepts {execution}", new.name, spec.execution)
        self._accepted[key] = spec.execution_uid
        self.accepted += 1

    def _job(self, old: Job | None, new: Job, why: Why) -> None:
        if old is None or old.metadata.uid != new.metadata.uid:
            return
        was, now = old.status, new.status
        # An end is for good, but for a new generation or a `rerun --failed`.
        is_same_run = (was.observed_generation, was.observed_retry_nonce) == (
            now.observed_generation,
            now.observed_retry_nonce,
        )
        if was.phase.is_final and is_same_run and now.phase is not was.phase:
            self.fail("I3", f"{new.ref} was {was.phase} and became {now.phase}", new.name)
        if why.actor == "job-reconciler" and now.observed_generation == new.metadata.generation:
            is_waiting = now.waiting is not None
            if not now.phase.is_final and not is_waiting and not new.is_deleting:
                self.fail("I6", f"{new.ref} is {now.phase} and waits for nothing", new.name)
        if why.actor == "job-reconciler" and old.spec != new.spec:
            self.fail("I8", f"the job reconciler changed the spec of {new.ref}", new.name)

    def _publication(self, old: Publication | None, new: Publication, why: Why) -> None:
        if old is None or old.metadata.uid != new.metadata.uid:
            return
        before, after = old.status.report, new.status.report
        if before is not None and before.phase.is_final and before != after:
            self.fail("I3", f"{new.ref} had ended as {before.phase}, now {after}", new.name)
        if why.actor in ("publishing-reconciler", f"node:{new.spec.node}"):
            is_open = not new.status.phase.is_final
            if is_open and new.status.waiting is None and new.status.contact != "Lost":
                self.fail("I6", f"{new.ref} is {new.status.phase}, waits for nothing", new.name)

    def _node(self, new: Node) -> None:
        is_wanted = new.spec.membership is Membership.APPROVED and not new.spec.unschedulable
        if is_wanted:
            self._refused_at.pop(new.name, None)
        else:
            self._refused_at.setdefault(new.name, self._world.now)

        if new.spec.membership is Membership.REJECTED and new.status.contact is Contact.REACHABLE:
            self._rejected_at.setdefault(new.name, self._world.now)
        else:
            self._rejected_at.pop(new.name, None)

    def _job_removed(self, old: Job) -> None:
        """I1."""
        memory = self._world.users.promises.jobs.get(old.metadata.uid)
        if memory is not None and not memory.may_go:
            self.fail("I1", f"{old.ref} was removed, and nobody asked for that", old.name)

    def _check_node_wanted(self, new: Execution) -> None:
        """I11, the scheduler's part: no new work where the operator said so long ago."""
        since = self._refused_at.get(new.spec.node)
        if since is not None and self._world.now - since > STALE_SECONDS:
            self.fail(
                "I11",
                f"{new.ref} was placed on {new.spec.node}, closed for {self._world.now - since:.0f} s",
                new.name,
                new.spec.node,
            )

    def _check_room(self, written: list[Execution]) -> None:
        """I10: what is placed on a node never exceeds what the node has."""
        fresh = dict.fromkeys(e.spec.node for e in written if e.ref not in self._before)
        for name in fresh:
            node = self._world.store.peek(Ref("Node", "", name))
            if not isinstance(node, Node):
                continue
            total = reserved_on(self._world.store, name)
            capacity = capacity_of(node)
            if any(a > b for a, b in zip(total, capacity, strict=True)):
                self.fail("I10", f"{name} has {capacity}, {total} is placed there", name)

    # -- what nodes do ---------------------------------------------------------------------------

    def started(self, machine: "Machine", run_id: str) -> None:
        """A run really began."""
        self.runs += 1
        if machine.engine.started[run_id] > 1 and not machine.is_tampered:
            self.fail("I5", f"{run_id} was started twice on {machine}", machine, run_id)
        parts = split_workload_id(run_id)
        assert parts is not None
        book = machine.ledger.stored
        mine = next((e for e in book.executions.values() if e.name == parts[0]), None)
        if mine is None:
            self.fail("I5", f"{run_id} began on {machine}, whose ledger does not know it", run_id)
            return
        state = book.states.get(mine.metadata.uid)
        if state is None or state.run < parts[1] or not state.stage.may_run:
            self.fail("I5", f"{run_id} began before it was written down: {state}", run_id)
            return
        stored = self._world.store.peek(mine.ref)
        is_refused = isinstance(stored, Execution) and stored.phase is Phase.REJECTED
        is_same = stored is not None and stored.metadata.uid == mine.metadata.uid
        if is_refused and is_same and not machine.is_tampered:
            self.fail("I11", f"{run_id} began on {machine}, which had refused it", run_id)
        since = self._rejected_at.get(machine.node)
        is_old = since is not None and self._world.now - since > STALE_SECONDS
        if is_old and not machine.is_cloned and _can_know(machine):
            self.fail("I11", f"{run_id} began on {machine}, which was rejected", run_id, machine)
        if mine.spec.local_deadline_seconds is not None:
            self._check_alone(machine, mine, run_id)

    def _check_alone(self, machine: "Machine", mine: Execution, run_id: str) -> None:
        """I12."""
        for other in self._world.machines:
            if other.is_cloned or machine.is_cloned:
                continue  # two agents with one ledger and one name: each takes the other's orders
            for running in other.engine.running():
                if running == run_id and other is machine:
                    continue
                parts = split_workload_id(running)
                assert parts is not None
                theirs = next(
                    (e for e in other.ledger.stored.executions.values() if e.name == parts[0]),
                    None,
                )
                if theirs is None or theirs.spec.local_deadline_seconds is None:
                    continue
                key = slot_key(mine.spec.job_uid, mine.spec.slot)
                if slot_key(theirs.spec.job_uid, theirs.spec.slot) == key:
                    self.fail(
                        "I12",
                        f"{run_id} began on {machine} while {running} runs on {other}",
                        mine.name,
                        theirs.name,
                        machine,
                        other,
                    )

    def delivered(self, machine: "Machine", publication: Publication) -> None:
        """Outputs are about to leave a node: only those of an accepted result may."""
        spec = publication.spec
        key = slot_key(spec.job_uid, spec.slot)
        if self._accepted.get(key) != spec.execution_uid:
            self.fail("I2", f"{publication.ref} delivers what was not accepted", publication.name)

    def acknowledged(self, machine: "Machine", facts: list[Fact]) -> None:
        """An agent takes these facts to be stored: they must be."""
        for fact in facts:
            kind = "Execution" if fact.execution else "Publication"
            stored = self._world.store.peek(Ref(kind, fact.namespace, fact.name))
            if stored is None or stored.metadata.uid != fact.uid:
                continue
            if isinstance(stored, Execution) and fact.execution is not None:
                if stored.spec.node != machine.node:
                    continue
                held = stored.status.report
                is_whole = held is not None and merge_report(held, fact.execution) == held
                # Without its long words, a report is still the same.
                if not is_whole and (held is None or held.step < fact.execution.step):
                    self.fail(
                        "I4",
                        f"{machine} was told that step {fact.execution.step} of {stored.ref} "
                        f"is stored; it is not: {held}",
                        fact.name,
                    )

    def applied(self, machine: "Machine", changes: Changes) -> None:
        """An agent says that it took these changes in: it must know what they assign."""
        if machine.agent is None:
            return
        book = machine.agent.site.book
        for execution in changes.assignments.executions:
            told, uid = execution.status.report, execution.metadata.uid
            held = book.executions.get(uid)
            if held is None and told is not None and told.phase.is_final:
                continue  # finished before this ledger: nothing is left to do
            version = execution.metadata.resource_version
            if held is None or held.metadata.resource_version < version:
                self.fail(
                    "I1",
                    f"{machine} says that it applied changes {changes.number} of "
                    f"{changes.session}; it does not know version {version} of {execution.ref}",
                    execution.name,
                )

    def blame_workload(self, run_id: str) -> None:
        """A run is made to fail as if it were its own fault."""
        parts = split_workload_id(run_id)
        for thing in self._world.store.everything("Execution"):
            if isinstance(thing, Execution) and parts is not None and thing.name == parts[0]:
                memory = self._world.users.promises.jobs.get(thing.spec.job_uid)
                if memory is not None:
                    memory.may_fail = True

    def buried(self, name: str, manager: Manager) -> None:
        """An orchestrator is about to go: look at how its reconciles ended."""
        for controller in manager.controllers.values():
            if controller.outcomes.bugs:
                self.fail("bug", f"{controller.reconciler.name} raised in {name}", name)


def reserved_on(store: TrueStore, node: str) -> list[int]:
    """What is placed on a node and has not ended, summed up."""
    total = [0] * len(amounts_of(Resources()))
    for thing in store.everything("Execution"):
        is_here = isinstance(thing, Execution) and thing.spec.node == node
        if isinstance(thing, Execution) and is_here and not thing.phase.is_final:
            asked = amounts_of(thing.spec.task.resources)
            total = [a + b for a, b in zip(total, asked, strict=True)]
    return total


def slot_key(job_uid: str, slot: Slot) -> SlotKey:
    """What makes a slot unique."""
    return job_uid, slot.generation, slot.partition, slot.node


def _can_know(machine: "Machine") -> bool:
    """Whether an agent can know what was said to its node: it has taken the list of this session.
    With a full disk it cannot, says so, and asks again half a minute later. (One that was told, and
    is not on the line any more, has it in its ledger: what is to stop may not begin.)"""
    return machine.agent is not None and machine.agent.standing.is_welcome
