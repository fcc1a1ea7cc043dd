"""What must be true once the world has come to rest: faults are over, everybody is up."""

from typing import TYPE_CHECKING

from bacalhau_api.meta import Contact, Ref, Waiting
from bacalhau_api.v1.execution import Acceptance, Desired, Execution, Phase, Publication
from bacalhau_api.v1.job import Job, JobPhase, JobType
from bacalhau_api.v1.node import Node
from bacalhau_controllers.placement.resources import amounts_of, capacity_of
from bacalhau_controllers.runner.state import Stage, split_workload_id, workload_id
from tests.simulation.world.checker import reserved_on
from tests.simulation.world.users import can_fail

if TYPE_CHECKING:
    from tests.simulation.world.world import World


ENDS_SOON_SECONDS = 600.0


def unsettled(world: "World") -> list[str]:
    """Why the world is not at rest; empty if it is."""
    found: list[str] = []
    found += _nodes(world)
    found += _executions(world)
    found += _publications(world)
    found += _jobs(world)
    found += _runs(world)
    found += _unnoticed(world)
    return found


def wrong(world: "World") -> list[tuple[str, str, str]]:
    """Invariant, message and subject of whatever is at rest but wrong."""
    return [*_lost_jobs(world), *_results(world), *_reports(world), *_history(world)]


def _nodes(world: "World") -> list[str]:
    found = []
    for machine in world.machines:
        if machine.is_retired:
            continue
        node = world.store.peek(Ref("Node", "", machine.node))
        if not isinstance(node, Node):
            found.append(f"node {machine.node} is not enrolled")
        elif node.status.contact is not Contact.REACHABLE:
            found.append(f"node {machine.node} is {node.status.contact}")
        elif not all(engine.available for engine in node.status.info.engines):
            found.append(f"node {machine.node} does not trust its engine yet")
        if machine.agent is None or not machine.agent.is_welcome:
            said = machine.agent.snapshot().session_message if machine.agent else "not running"
            found.append(f"the agent on {machine} is not welcome: {said}")
        if machine.ledger.stored.facts:
            names = [fact.name for fact in machine.ledger.stored.facts.values()]
            found.append(f"{machine} has facts to tell of {', '.join(names[:3])}")
    return found


def _executions(world: "World") -> list[str]:
    found = []
    for thing in world.store.everything("Execution"):
        assert isinstance(thing, Execution)
        if thing.is_final and thing.status.contact is not Contact.LOST:
            continue
        is_serving = (
            not thing.spec.job_type.runs_to_completion
            and thing.phase is Phase.RUNNING
            and thing.spec.desired is Desired.RUN
            and thing.status.contact is Contact.REACHABLE
            and (waiting := thing.status.waiting) is not None
            and waiting.what in ("Workload", "StopRequest", "Completion")
        )
        if not is_serving:
            found.append(
                f"{thing.ref} on {thing.spec.node} is {thing.phase}, {thing.status.contact}, wanted "
                f"{thing.spec.desired}, waits for {thing.status.waiting}"
            )
    return found


def _publications(world: "World") -> list[str]:
    return [
        f"{thing.ref} is {thing.status.phase}, {thing.status.contact}: {thing.status.waiting}"
        for thing in world.store.everything("Publication")
        if isinstance(thing, Publication) and not thing.status.phase.is_final
    ]


def _jobs(world: "World") -> list[str]:
    found = []
    for job in world.store.everything("Job"):
        assert isinstance(job, Job)
        why = _unsettled_job(world, job)
        if why:
            found.append(f"{job.ref} ({job.spec.type}) is {job.status.phase}: {why}")
    return found


def _unsettled_job(world: "World", job: Job) -> str:
    status = job.status
    waiting = status.waiting
    if job.is_deleting:
        return "is being deleted"
    if status.observed_generation != job.metadata.generation:
        return "was not looked at"
    if status.phase.is_final:
        return ""
    if job.is_stopped:
        return "was asked to stop"
    if waiting is None:
        return "waits for nothing"
    if job.spec.suspend:
        return "" if waiting.what == "Resume" else f"is suspended and waits for {waiting.what}"
    if waiting.what == "Capacity":
        return _could_be_placed(world, job) or _ends_soon(world, waiting)
    if waiting.what in ("Scale", "Nodes"):
        return ""
    if job.spec.type.runs_to_completion:
        return f"waits for {waiting.what}: {waiting.message}"
    slots = status.slots
    running = sum(
        1
        for e in world.store.everything("Execution")
        if isinstance(e, Execution)
        and e.spec.job_uid == job.metadata.uid
        and e.phase is Phase.RUNNING
        and e.spec.desired is Desired.RUN
    )
    if (
        job.spec.type is JobType.SERVICE
        and running + slots.succeeded + slots.failed < job.spec.count
    ):
        return f"{running} of {job.spec.count} run; waits for {waiting.what}: {waiting.message}"
    if slots.running != running:
        return f"says that {slots.running} run; {running} do"
    return ""


def _could_be_placed(world: "World", job: Job) -> str:
    """Why a job that waits for a place should not have to."""
    generation = job.metadata.generation
    mine = [
        e
        for e in world.store.everything("Execution")
        if isinstance(e, Execution) and e.spec.job_uid == job.metadata.uid
    ]
    refused = {
        e.spec.node
        for e in mine
        if e.phase is Phase.REJECTED and e.spec.slot.generation == generation
    }
    asked = amounts_of(job.spec.task.resources)
    for node in world.store.everything("Node"):
        assert isinstance(node, Node)
        if node.name in refused or (job.spec.type.is_per_node):
            continue
        if any(node.labels.get(c.key) not in c.values for c in job.spec.constraints):
            continue
        taken = reserved_on(world.store, node.name)
        free = [a - b for a, b in zip(capacity_of(node), taken, strict=True)]
        if all(a <= b for a, b in zip(asked, free, strict=True)):
            return f"waits for a place, and {node.name} has {free} free: {job.status.message}"
    return ""


def _ends_soon(world: "World", waiting: Waiting) -> str:
    """A wait with a limit is over before long, and that will be written: by the leader's clock, which
    may run at another speed than the world. One whose limit has passed is not at rest either."""
    leader = next((one for one in world.orchestrators if one.leads), None)
    if waiting.until is None or leader is None:
        return ""
    left = (waiting.until - leader.clock.now()).total_seconds()
    return f"waits for {left:.0f} s more" if left < ENDS_SOON_SECONDS else ""


def _runs(world: "World") -> list[str]:
    """I5: what runs is what should."""
    wanted = {
        (thing.spec.node, thing.name)
        for thing in world.store.everything("Execution")
        if isinstance(thing, Execution)
        and not thing.phase.is_final
        and thing.spec.desired is Desired.RUN
    }
    found = []
    for machine in world.machines:
        names = set()
        for run_id in machine.engine.running():
            parts = split_workload_id(run_id)
            assert parts is not None
            names.add(parts[0])
            if machine.is_retired or (machine.node, parts[0]) not in wanted:
                found.append(f"{run_id} runs on {machine} and nobody asked for it")
        if len(names) != len(machine.engine.running()):
            found.append(f"{machine} runs something twice: {machine.engine.running()}")
    return found


def _unnoticed(world: "World") -> list[str]:
    """Runs that ended, which nobody has noticed yet: an engine that forgets a run may say so only
    when it is asked again, and until then all looks quiet."""
    found = []
    for machine in world.machines:
        if machine.is_retired or machine.agent is None:
            continue
        running = set(machine.engine.running())
        book = machine.ledger.stored
        for uid, state in book.states.items():
            execution = book.executions[uid]
            if state.stage is Stage.RUNNING and workload_id(execution, state.run) not in running:
                found.append(
                    f"{execution.ref} runs on {machine} for all that is known, and does not"
                )
    return found


def _lost_jobs(world: "World") -> list[tuple[str, str, str]]:
    """I1."""
    found = []
    for uid, memory in world.users.promises.jobs.items():
        stored = world.store.peek(memory.ref)
        if memory.may_go:
            continue
        if not isinstance(stored, Job) or stored.metadata.uid != uid:
            found.append(("I1", f"{memory.ref} ({uid[:8]}) was acknowledged and is gone", ""))
        elif stored.metadata.generation < memory.generation:
            found.append(("I1", f"{memory.ref} lost generation {memory.generation}", ""))
    return found


def _results(world: "World") -> list[tuple[str, str, str]]:
    """I2: a job that is done has a result in each slot, and no job fails for the system's fault."""
    found = []
    for job in world.store.everything("Job"):
        assert isinstance(job, Job)
        memory = world.users.promises.jobs.get(job.metadata.uid)
        is_forgiven = memory is None or memory.may_fail or can_fail(job.spec)
        if job.status.phase is JobPhase.FAILED and not is_forgiven:
            message = f"{job.ref} failed, and only the system can be to blame: {job.status.message}"
            found.append(("I2", message, job.name))
        if job.status.phase is JobPhase.COMPLETED and job.spec.type is JobType.BATCH:
            held = {
                a.spec.slot.partition
                for a in world.store.everything("Acceptance")
                if isinstance(a, Acceptance)
                and a.spec.job_uid == job.metadata.uid
                and a.spec.slot.generation == job.metadata.generation
            }
            if held != set(range(job.spec.count)):
                found.append(("I2", f"{job.ref} is Completed with results of {held}", job.name))
    return found


def _reports(world: "World") -> list[tuple[str, str, str]]:
    """I4: what a node with a whole ledger finished is what the store says."""
    found = []
    for machine in world.machines:
        if machine.is_tampered:
            continue
        book = machine.ledger.stored
        for uid, state in book.states.items():
            execution = book.executions[uid]
            stored = world.store.peek(execution.ref)
            if not isinstance(stored, Execution) or stored.metadata.uid != uid:
                found.append(("I5", f"{machine} still holds {execution.ref}", execution.name))
                continue
            told = stored.status.report
            is_done = state.stage is Stage.DONE
            if is_done and (told is None or told.phase is not state.report.phase):
                message = f"{execution.ref} is {state.report.phase} on {machine}, stored: {told}"
                found.append(("I4", message, execution.name))
    return found


def _history(world: "World") -> list[tuple[str, str, str]]:
    """I7."""
    found = []
    for ref, entries in world.store.all_history().items():
        revisions = [entry.revision for entry in entries]
        if revisions != sorted(set(revisions)):
            found.append(("I7", f"the history of {ref} is out of order", ref.name))
        if entries and entries[-1].resource != world.store.peek(ref):
            found.append(("I7", f"the history of {ref} does not end in what is stored", ref.name))
    return found
