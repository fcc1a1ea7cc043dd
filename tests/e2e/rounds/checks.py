"""What must be true once the faults of a round are over: everything settles, nothing that was
finished is lost, no slot has two results, nothing runs that nobody wants.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from bacalhau.client import AsyncClient
from bacalhau.engines.docker.ends import LOG_LOST
from bacalhau_api.meta import Contact
from bacalhau_api.v1.execution import Acceptance, Desired, Execution, Phase
from bacalhau_api.v1.job import Job, JobPhase, JobType
from bacalhau_api.v1.node import Node
from bacalhau_controllers.runner.state import RunnerState, Stage, split_workload_id
from tests.e2e.rounds.fleet import Fleet, insist
from tests.e2e.rounds.work import Order


@dataclass(frozen=True, slots=True)
class Sight:
    """All objects at about one moment, and what really runs, by station."""

    jobs: dict[str, Job]
    executions: tuple[Execution, ...]
    acceptances: tuple[Acceptance, ...]
    nodes: tuple[Node, ...]
    running: dict[str, set[str]]

    def of(self, job: str) -> list[Execution]:
        """The executions of a job."""
        return [e for e in self.executions if e.spec.job == job]


@dataclass(slots=True)
class Findings:
    """What was not as it should be, in words."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether there was nothing."""
        return not (self.lost or self.doubled or self.orphans or self.stuck)

    def lines(self) -> list[str]:
        """One for each."""
        return [
            f"{name}: {text}"
            for name in ("lost", "doubled", "orphans", "stuck")
            for text in getattr(self, name)
        ]


async def look(fleet: Fleet, client: AsyncClient) -> Sight:
    """See for oneself."""

    async def jobs() -> list[Job]:
        return [one async for one in client.list(Job)]

    async def executions() -> list[Execution]:
        return [one async for one in client.list(Execution)]

    async def acceptances() -> list[Acceptance]:
        return [one async for one in client.list(Acceptance)]

    async def nodes() -> list[Node]:
        return [one async for one in client.list(Node)]

    return Sight(
        {job.name: job for job in await insist(jobs)},
        tuple(await insist(executions)),
        tuple(await insist(acceptances)),
        tuple(await insist(nodes)),
        fleet.running(),
    )


def unsettled(sight: Sight, orders: Iterable[Order]) -> list[str]:
    """What has yet to come to its end, or to rest."""
    found = [f"node {n.name} is {n.status.contact}" for n in sight.nodes if not _is_heard(n)]
    for order in orders:
        job = sight.jobs.get(order.job.name)
        if job is None:
            continue  # lost, not unsettled
        slots = job.status.slots
        if not job.status.phase.is_final:
            found.append(f"job {job.name} is {job.status.phase}: {job.status.waiting}")
        elif job.status.phase is JobPhase.COMPLETED and slots.delivered < slots.total:
            found.append(f"job {job.name}: {slots.delivered} of {slots.total} are delivered")
    for job in sight.jobs.values():
        if not job.spec.type.runs_to_completion:
            found += _unfilled(job, sight)
    for execution in sight.executions:
        job = sight.jobs.get(execution.spec.job)
        is_standing = job is not None and not job.spec.type.runs_to_completion
        if not execution.is_final and not (is_standing and _serves(execution)):
            status = execution.status
            found.append(
                f"{execution.name} is {execution.phase}/{status.contact}: {status.waiting}"
            )
    found += [f"{text} runs, and nobody wants it" for text in _orphans(sight)]
    return found


def judge(fleet: Fleet, sight: Sight, orders: list[Order], *, restarts: bool) -> Findings:
    """The verdict on a round that has settled, or did not. `restarts`: whether its faults may have
    cut runs short, so that a second one is right."""
    found = judge_objects(sight, orders, restarts=restarts)
    for edge in fleet.edges.values():
        try:
            judge_ledger(edge.name, edge.ledger(), sight, found)
        except sqlite3.Error as error:
            found.stuck.append(f"the ledger of {edge.name} cannot be read: {error}")
    return found


def judge_objects(sight: Sight, orders: list[Order], *, restarts: bool) -> Findings:
    """The verdict on what is stored and what runs."""
    found = Findings()
    for text in unsettled(sight, orders):
        (found.orphans if text.endswith("nobody wants it") else found.stuck).append(text)
    accepted: Counter[str] = Counter()
    for one in sight.acceptances:
        accepted[f"{one.spec.job_uid}/{one.spec.slot}"] += 1
    found.doubled += [f"slot {slot} has {n} results" for slot, n in accepted.items() if n > 1]
    for order in orders:
        _judge_job(order, sight, found, restarts=restarts)
    return found


def _judge_job(order: Order, sight: Sight, found: Findings, *, restarts: bool) -> None:
    job = sight.jobs.get(order.job.name)
    if job is None:
        found.lost.append(f"job {order.job.name} was acknowledged and is gone")
        return
    if job.status.phase.is_final and job.status.phase is not JobPhase.COMPLETED:
        found.lost.append(f"job {job.name} is {job.status.phase}: {job.status.message}")
    attempts = sight.of(job.name)
    winners = {a.spec.execution for a in sight.acceptances if a.spec.job_uid == job.metadata.uid}
    if job.status.phase is JobPhase.COMPLETED:
        slots = (
            job.spec.count if job.spec.type is JobType.BATCH else len(job.status.ops_nodes or ())
        )
        if len(winners) != slots:
            found.lost.append(f"job {job.name}: {len(winners)} results for {slots} slots")
    for execution in attempts:
        _judge_attempt(order, execution, winners, found, restarts=restarts)
    if order.action == "stop":
        _judge_alone(attempts, found)


def _judge_attempt(
    order: Order, execution: Execution, winners: set[str], found: Findings, *, restarts: bool
) -> None:
    report = execution.status.report
    if execution.phase is Phase.SUCCEEDED and execution.name not in winners:
        if not winners:
            found.lost.append(f"{execution.name} succeeded, and was not accepted")
        elif not execution.spec.superseded:
            found.doubled.append(f"{execution.name} succeeded beside the accepted one")
    if execution.phase is Phase.FAILED and report is not None and not report.is_system_fault:
        found.lost.append(f"{execution.name} failed: {report.reason} {report.message}")
    if execution.name in winners and report is not None:
        is_told = LOG_LOST in report.message  # the engine's loss, not ours, if it is said
        if f"tick {order.ticks - 1}\n" not in report.stdout_tail and not is_told:
            found.lost.append(f"{execution.name} has lost its output: {report.stdout_tail[-60:]!r}")
        if report.run > 1 and not restarts:
            found.doubled.append(f"{execution.name} was run {report.run} times")


def _judge_alone(attempts: list[Execution], found: Findings) -> None:
    """Under the policy `stop`, no two at one instant. The parties share the machine's clock."""
    spans = []
    for execution in attempts:
        report = execution.status.report
        if report is not None and report.started_at and report.finished_at:
            spans.append((execution, report.started_at, report.finished_at))
    for i, (one, begin, end) in enumerate(spans):
        for other, since, until in spans[i + 1 :]:
            overlap = min(end, until) - max(begin, since)
            if one.spec.slot == other.spec.slot and overlap > timedelta(0):
                found.doubled.append(f"{one.name} and {other.name} ran together for {overlap}")


def judge_ledger(
    node: str, states: Mapping[str, RunnerState], sight: Sight, found: Findings
) -> None:
    """What a node has written down as finished is finished for everybody."""
    stored = {e.metadata.uid: e for e in sight.executions}
    for uid, state in states.items():
        execution, phase = stored.get(uid), state.report.phase
        if execution is None or state.stage is not Stage.DONE:
            continue
        if phase is not execution.phase:
            found.lost.append(
                f"{execution.name} is {phase} on {node}, and stored as {execution.phase}"
            )


def _unfilled(job: Job, sight: Sight) -> list[str]:
    serving = [e for e in sight.of(job.name) if _serves(e)]
    if job.spec.type is JobType.DAEMON:
        wanted = {node.name for node in sight.nodes}
        missing = wanted - {e.spec.node for e in serving}
        return [f"job {job.name} does not run on {node}" for node in sorted(missing)]
    slots = {e.spec.slot.partition for e in serving}
    if len(slots) == len(serving) == job.spec.count:
        return []
    return [f"job {job.name} has {len(serving)} in {len(slots)} of {job.spec.count} slots"]


def _serves(execution: Execution) -> bool:
    return (
        execution.phase is Phase.RUNNING
        and execution.spec.desired is Desired.RUN
        and execution.status.contact is Contact.REACHABLE
    )


def _is_heard(node: Node) -> bool:
    return node.status.contact is Contact.REACHABLE


def _orphans(sight: Sight) -> list[str]:
    wanted = {(e.name, e.spec.node) for e in sight.executions if not e.is_final}
    found = []
    for node, runs in sight.running.items():
        for run in sorted(runs):
            parts = split_workload_id(run)
            if parts is None or (parts[0], node) not in wanted:
                found.append(f"{run} on {node}")
    return found
