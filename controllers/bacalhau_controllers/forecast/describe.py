"""Says what a forecast came to: the plan of each object, from what was decided about it and from
what the reconciler then did."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bacalhau_api.meta import Ref, Resource
from bacalhau_api.plans import (
    ObjectPlan,
    PlannedBytes,
    PlannedDisconnect,
    PlannedExecution,
    PlannedField,
    PlannedQueue,
    PlanProblem,
    PlanSummary,
)
from bacalhau_api.v1.execution import Acceptance, Execution
from bacalhau_api.v1.job import InputSource, Job
from bacalhau_controllers.disconnect import effective_disconnect
from bacalhau_controllers.forecast.changes import Change
from bacalhau_controllers.forecast.world import Outcome, World
from bacalhau_controllers.job.allowance import QUOTA
from bacalhau_controllers.job.placing import CAPACITY

EXECUTIONS_MAX: Final = 200
"""Of one object; more are only counted."""

QUEUED: Final = (CAPACITY, QUOTA)


@dataclass(frozen=True, slots=True)
class Before:
    """What there was of jobs before the change: executions and results, by the job's uid."""

    executions: Mapping[str, Sequence[Execution]]
    results: Mapping[str, Sequence[Acceptance]]

    @staticmethod
    def of(objects: Iterable[Resource]) -> "Before":
        """From all objects."""
        executions: dict[str, list[Execution]] = {}
        results: dict[str, list[Acceptance]] = {}
        for item in objects:
            if isinstance(item, Execution):
                executions.setdefault(item.spec.job_uid, []).append(item)
            elif isinstance(item, Acceptance):
                results.setdefault(item.spec.job_uid, []).append(item)
        return Before(executions, results)


def describe(
    changes: Sequence[Change],
    before: Before,
    world: World,
    outcome: Outcome,
    *,
    after_seconds: Mapping[str, float] | None = None,
) -> tuple[ObjectPlan, ...]:
    """The plan of each changed object in order, then of the jobs that feel it, by name.

    `after_seconds` says when lost executions are given up, by their names.
    """
    told = _Told(before, world, outcome, after_seconds or {})
    plans = [told.changed(change) for change in changes]
    known = {change.ref for change in changes}
    others = [ref for ref in outcome.touched if ref not in known]
    plans += filter(None, (told.affected(ref) for ref in sorted(others)))
    return tuple(plans)


def summarise(plans: Iterable[ObjectPlan]) -> PlanSummary:
    """Counts."""
    actions: Counter[str] = Counter()
    executions: Counter[str] = Counter()
    queued = 0
    for item in plans:
        actions["unchanged" if item.action == "none" else item.action] += 1
        executions.update(e.action for e in item.executions)
        if item.executions_omitted and item.executions:
            executions[item.executions[-1].action] += item.executions_omitted
        queued += item.queued.slots if item.queued else 0
    return PlanSummary(**actions, **executions, queued=queued)


class _Told:
    def __init__(
        self, before: Before, world: World, outcome: Outcome, after_seconds: Mapping[str, float]
    ) -> None:
        self._before = before
        self._world = world
        self._after_seconds = after_seconds
        self._started = _by_job(outcome.started)
        self._stopped = _by_job(outcome.stopped)
        self._lost = _by_job(outcome.lost)

    def changed(self, change: Change) -> ObjectPlan:
        """One object of the set."""
        plan = ObjectPlan(
            action=change.action,
            kind=change.ref.kind,
            namespace=change.ref.namespace,
            name=change.ref.name,
            source=change.source,
            line=change.line,
            run=change.run,
            why=_why(change),
            fields=tuple(
                PlannedField(field=d.field, old=d.old, new=d.new, runs=d.runs)
                for d in change.fields
            ),
            warnings=change.warnings,
            problems=tuple(
                PlanProblem(field=p.field, message=p.message, value=p.value, hint=p.hint,
                            where=p.where)
                for p in change.problems
            ),
        )  # fmt: skip
        plan = plan.but(generation=change.old.metadata.generation if change.old else 0)
        if not isinstance(change.new or change.old, Job) or change.action == "refused":
            return plan
        return self._job(plan, change)

    def affected(self, ref: Ref) -> ObjectPlan | None:
        """A job that nobody changes; None if nothing happens to it."""
        found = self._world.cache.get(ref)
        if not isinstance(found, Job):
            return None
        executions = self._executions(found.metadata.uid, found)
        if not executions:
            return None
        plan = ObjectPlan(
            action="affected",
            kind=ref.kind,
            namespace=ref.namespace,
            name=ref.name,
            why="nobody changes it, and it feels the change",
            generation=found.metadata.generation,
            generation_after=found.metadata.generation,
        )
        return self._with_consequences(plan, found, executions)

    def _job(self, plan: ObjectPlan, change: Change) -> ObjectPlan:
        stored = self._world.cache.get(change.ref)
        job = stored if isinstance(stored, Job) else change.new or change.old
        assert isinstance(job, Job)
        old = change.old
        uid = job.metadata.uid
        results = len(self._before.results.get(uid, ()))
        if change.action == "delete":
            plan = plan.but(results_removed=results)
            return self._with_consequences(plan, job, self._executions(uid, job))
        plan = plan.but(generation_after=job.metadata.generation)
        if old is not None and job.metadata.generation > old.metadata.generation:
            plan = plan.but(results_kept=results)
        plan = self._with_consequences(plan, job, self._executions(uid, job))
        if change.action in ("create", "change"):
            plan = plan.but(disconnect=disconnect_of(job))
        return plan

    def _with_consequences(
        self, plan: ObjectPlan, job: Job, executions: Sequence[PlannedExecution]
    ) -> ObjectPlan:
        begun = sum(e.action in ("start", "rerun", "restart") for e in executions)
        return plan.but(
            executions=tuple(executions[:EXECUTIONS_MAX]),
            executions_omitted=max(len(executions) - EXECUTIONS_MAX, 0),
            queued=_queued(job) if plan.action != "delete" else None,
            input_bytes=_input_bytes(job, begun) if begun else None,
            verdicts=tuple(v for v in job.status.verdicts if v.node) if begun else (),
        )

    def _executions(self, uid: str, job: Job) -> list[PlannedExecution]:
        """What starts and stops, net: what did both within the forecast is left out."""
        before = self._before.executions.get(uid, ())
        known = {e.name for e in before}
        by_slot: dict[str, list[Execution]] = {}
        for execution in before:
            by_slot.setdefault(str(execution.spec.slot), []).append(execution)
        stopped = {e.name: e for e in self._stopped.get(uid, ()) if e.name in known}
        gone = {e.name for e in self._stopped.get(uid, ())} - known
        told: list[PlannedExecution] = []
        for execution in self._started.get(uid, ()):
            if execution.name not in gone:
                told.append(_start(execution, by_slot, stopped))
        told += [
            _ended(e, "stop", reason=e.spec.stop_reason)
            for e in stopped.values()
            if not any(t.replaces == e.name for t in told)
        ]
        for e in self._lost.get(uid, ()):
            told.append(_ended(e, "lose", after=self._after_seconds.get(e.name, 0.0)))
        return told


def disconnect_of(job: Job) -> PlannedDisconnect:
    """The policy that applies to a job."""
    policy = effective_disconnect(job.spec)
    return PlannedDisconnect(
        action=policy.action,
        after_seconds=policy.after_seconds,
        reconcile=policy.reconcile,
        why=policy.why,
    )


def _start(
    new: Execution, by_slot: Mapping[str, Sequence[Execution]], stopped: Mapping[str, Execution]
) -> PlannedExecution:
    earlier = by_slot.get(str(new.spec.slot), ())
    replaced = [e for e in earlier if e.name in stopped]
    is_again = any(e.spec.slot.generation < new.spec.slot.generation for e in earlier)
    told = PlannedExecution(
        action="rerun" if is_again else "start",
        slot=str(new.spec.slot),
        execution=new.name,
        node=new.spec.node,
    )
    if not replaced:
        return told
    last = replaced[-1]
    if not new.spec.job_type.runs_to_completion:
        told = told.but(action="restart")
    return told.but(replaces=last.name, replaces_on=last.spec.node, reason=last.spec.stop_reason)


def _ended(
    execution: Execution, action: str, *, reason: str = "", after: float | None = None
) -> PlannedExecution:
    return PlannedExecution.model_validate(
        {
            "action": action,
            "slot": str(execution.spec.slot),
            "execution": execution.name,
            "node": execution.spec.node,
            "reason": reason,
            "after_seconds": after,
        }
    )


def _queued(job: Job) -> PlannedQueue | None:
    waiting = job.status.waiting
    if waiting is None or waiting.what not in QUEUED or job.status.phase.is_final:
        return None
    verdict = next((v for v in job.status.verdicts if not v.node), None)
    slots = max(job.status.slots.waiting, 1)
    return PlannedQueue(slots=slots, what=waiting.what, message=waiting.message, verdict=verdict)


def _input_bytes(job: Job, executions: int) -> PlannedBytes | None:
    """What is known before anything moves: data that travels with the job itself. Local data does
    not move at all."""
    sizes = [size_of(item) for item in job.spec.task.input_sources]
    if not sizes:
        return None
    known = sum(size for size in sizes if size is not None)
    unknown = sum(size is None for size in sizes)
    return PlannedBytes(known=known * executions, unknown=unknown * executions)


def size_of(item: InputSource) -> int | None:
    """Bytes of an input that have to come to the node; None: nobody knows."""
    kind = item.source.type.lower()
    if kind in ("local", "localdirectory"):
        return 0
    if kind != "inline":
        return None
    params = {key.lower(): value for key, value in item.source.params.items()}
    url = params.get("url")
    return len(url) if isinstance(url, str) else None


def _why(change: Change) -> str:
    """One sentence on what the change means for runs."""
    runs = [d.field for d in change.fields if d.runs]
    shown = ", ".join(runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")
    match change.run:
        case "first":
            return "it is new"
        case "rerun":
            return f"{shown} affects execution: it runs again; earlier results are kept"
        case "update":
            return f"{shown} affects execution: what runs is replaced piece by piece"
        case "held":
            return "what changed is kept back until `bacalhau rerun` (onChange: manual)"
        case "ignored":
            return "what changed of its execution is ignored (onChange: ignore)"
        case "retired":
            return "this run has ended and was retired; it is not started again"
        case "ends":
            return "it is deleted, with what it owns; its history stays"
    match change.action:
        case "none":
            return "it is as declared"
        case "change":
            return "nothing of it affects execution: nothing runs again"
        case "delete":
            return "it is deleted; its history stays"
    return ""


def _by_job(executions: Iterable[Execution]) -> dict[str, list[Execution]]:
    groups: dict[str, list[Execution]] = {}
    for execution in executions:
        groups.setdefault(execution.spec.job_uid, []).append(execution)
    return groups
