"""A plan in words: one line for each consequence, for terminals and for messages."""

from collections.abc import Iterator
from typing import Final

from bacalhau_api.compare import render
from bacalhau_api.plans import ChangePlan, ObjectPlan, PlannedExecution, PlanSummary

_HEADS: Final = {
    "create": "is created",
    "change": "is changed",
    "none": "stays as it is",
    "delete": "is deleted",
    "refused": "is refused",
    "affected": "feels the change",
}
_SIGNS: Final = {"create": "+", "change": "~", "delete": "-", "refused": "!", "affected": "*"}


def head_line(plan: ObjectPlan) -> str:
    """`~ job/a is changed and runs again as generation 3 (jobs/a.yaml:1)`."""
    text = f"{_SIGNS.get(plan.action, ' ')} {plan.ref_text} {_HEADS[plan.action]}"
    after = plan.generation_after
    match plan.run:
        case "first":
            text += " and runs"
        case "rerun":
            text += f" and runs again as generation {after}"
        case "update":
            text += f" and is rolled out as generation {after}"
        case "held":
            text += ": the new run is held until `bacalhau rerun`"
        case "ignored":
            text += ": the change of its execution is ignored"
        case "retired":
            text += ": this run ended and was retired"
    where = f"{plan.source}:{plan.line}" if plan.source and plan.line else plan.source
    return f"{text} ({where})" if where else text


def field_lines(plan: ObjectPlan) -> Iterator[str]:
    """`spec.priority: 0 -> 5`."""
    for field in plan.fields:
        mark = "  (runs again)" if field.runs and plan.run == "rerun" else ""
        yield f"{field.field}: {render(field.old)} -> {render(field.new)}{mark}"


def effect_lines(plan: ObjectPlan) -> Iterator[str]:
    """What starts, stops and waits."""
    for problem in plan.problems:
        text = f"{problem.field}: {problem.message}" if problem.field else problem.message
        yield f"{text}; {problem.hint}" if problem.hint else text
    for execution in plan.executions:
        yield execution_line(execution)
    if plan.executions_omitted:
        yield f"and {plan.executions_omitted} executions more"
    if plan.queued:
        one = plan.queued.slots == 1
        slots = "1 slot waits" if one else f"{plan.queued.slots} slots wait"
        yield f"{slots} ({plan.queued.what}): {plan.queued.message}"


def remark_lines(plan: ObjectPlan) -> Iterator[str]:
    """What holds besides."""
    if plan.disconnect:
        policy = plan.disconnect
        chosen = policy.action
        if policy.after_seconds is not None:
            chosen += f" after {policy.after_seconds} s, reconcile {policy.reconcile}"
        yield f"if its node is not heard from: {chosen} ({policy.why})"
    if plan.input_bytes:
        moved = plan.input_bytes
        unknown = f", and {moved.unknown} inputs of unknown size" if moved.unknown else ""
        yield f"input data to move: {moved.known} bytes{unknown}"
    if plan.results_kept:
        yield f"{plan.results_kept} accepted results of earlier generations are kept"
    if plan.results_removed:
        yield f"{plan.results_removed} accepted results leave the live set; the history keeps them"
    for verdict in plan.verdicts:
        scores = ", ".join(f"{k} {v:.2f}" for k, v in sorted(verdict.scores.items()))
        data = f"; {verdict.data}" if verdict.data else ""
        yield f"slot {verdict.slot} goes to {verdict.node}, of {verdict.nodes_total} ({scores}){data}"


def execution_line(told: PlannedExecution) -> str:
    """One execution that starts or stops."""
    match told.action:
        case "stop":
            return f"stop {told.execution} on {told.node} ({told.reason})"
        case "lose":
            after = f" after {told.after_seconds:.0f} s" if told.after_seconds else ""
            return f"give up {told.execution} on {told.node}{after}"
    text = f"{told.action} slot {told.slot} on {told.node}"
    if told.replaces:
        text += f", in place of {told.replaces} on {told.replaces_on}"
    return text


def consequence_lines(plan: ObjectPlan) -> list[str]:
    """All that is binding about one object."""
    return [head_line(plan)[2:], *field_lines(plan), *effect_lines(plan)]


def summary_line(plan: ChangePlan) -> str:
    """`1 to create, 2 to change, 0 to delete; executions: 3 start, 1 stop`."""
    counts = plan.summary
    objects = [
        f"{counts.create} to create",
        f"{counts.change} to change",
        f"{counts.delete} to delete",
        f"{counts.unchanged} unchanged",
    ]
    objects += [f"{counts.refused} refused"] if counts.refused else []
    objects += [f"{counts.affected} affected"] if counts.affected else []
    return f"{', '.join(objects)}; {_executions(counts)}"


def _executions(counts: PlanSummary) -> str:
    words = {
        "start": counts.start,
        "rerun": counts.rerun,
        "restart": counts.restart,
        "stop": counts.stop,
        "given up": counts.lose,
        "queued": counts.queued,
    }
    shown = [f"{count} {word}" for word, count in words.items() if count]
    return f"executions: {', '.join(shown)}" if shown else "no execution starts or stops"
