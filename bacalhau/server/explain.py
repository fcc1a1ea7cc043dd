"""Why something is as it is, in words: what it waits for, who moves it next, what would help.

Pure functions over objects that are stored anyway; the words for placement come from the stored
verdicts, so that they are those of the decision itself. Used by nodes, too: nothing here needs the
scheduler (`fit.py` does).
"""

from collections import Counter
from collections.abc import Sequence

from bacalhau.replies import Explanation, SlotWords
from bacalhau_api.meta import Contact, Waiting
from bacalhau_api.v1.execution import Acceptance, Execution, Phase, Publication, Slot
from bacalhau_api.v1.job import Job, JobPhase, Verdict
from bacalhau_api.v1.manifest import Manifest
from bacalhau_api.v1.namespace import QUOTA_WAIT, Namespace
from bacalhau_api.v1.node import Membership, Node
from bacalhau_api.v1.retired import RetiredJob
from bacalhau_controllers.contact import (
    CONTACT_CONDITION,
    NODE_REJECTED,
    NODE_REMOVED,
    NODE_SILENT,
)
from bacalhau_controllers.disconnect import describe_disconnect

SLOTS_MAX = 50


def explain_job(
    job: Job, executions: Sequence[Execution], acceptances: Sequence[Acceptance]
) -> Explanation:
    """Explain a job by its present generation."""
    status, name = job.status, job.name
    generation = job.metadata.generation
    current = [e for e in executions if e.spec.slot.generation == generation]
    accepted = {a.spec.slot: a for a in acceptances if a.spec.slot.generation == generation}
    slots = _slots(current, accepted)
    remedies = [v.remedy for v in status.verdicts if v.remedy and not v.node]
    if job.spec.suspend:
        remedies.insert(0, f"let it go on: bacalhau resume {name}")
    if status.waiting is not None and status.waiting.what == QUOTA_WAIT:
        space = job.ref.namespace
        remedies.append(f"raise the quota of namespace {space}, or stop something in it")
    if status.phase in (JobPhase.FAILED, JobPhase.STOPPED):
        if job.spec.type.runs_to_completion and status.slots.total > 1:
            remedies.append(f"run only what has no result: bacalhau rerun --failed {name}")
        remedies.append(f"run it again: bacalhau rerun {name}")
    return Explanation(
        kind="Job",
        namespace=job.ref.namespace,
        name=name,
        phase=str(status.phase),
        headline=_job_headline(job),
        waiting=status.waiting,
        because=tuple(_job_facts(job, current)),
        remedies=tuple(dict.fromkeys(remedies)),
        slots=tuple(slots[:SLOTS_MAX]),
        verdicts=status.verdicts,
    )


def _job_headline(job: Job) -> str:
    status, counts = job.status, job.status.slots
    why = status.message or status.reason
    if not job.is_observed:
        return "the job was changed a moment ago; its reconciler has not looked at it yet"
    if job.spec.suspend and not status.phase.is_final:
        return "the job is suspended by its user: nothing new is started"
    match status.phase:
        case JobPhase.COMPLETED:
            return f"all {counts.total} slots have an accepted result"
        case JobPhase.FAILED:
            return f"it failed: {why or 'no reason was recorded'}"
        case JobPhase.STOPPED:
            return f"it was stopped{f': {why}' if why else ' by its user'}"
        case JobPhase.QUEUED:
            waiting = status.waiting
            return f"it is queued: {(waiting and waiting.message) or why or 'nothing fits now'}"
        case JobPhase.RUNNING:
            return f"{counts.running} of {counts.total} slots run, {counts.succeeded} are done"
    return why or "it has not been placed yet"


def _job_facts(job: Job, executions: Sequence[Execution]) -> list[str]:
    facts = []
    for condition in job.status.conditions:
        if condition.message:
            is_true = "" if condition.status else "not "
            facts.append(f"{is_true}{condition.type}: {condition.message}")
    unheard = [e for e in executions if _is_unheard(e)]
    absent = Counter(
        (_absence(e)[1], "lost" if e.status.contact is Contact.LOST else "open") for e in unheard
    )
    facts += [
        f"{why}, {count} of its executions {'is' if count == 1 else 'are'} {state}"
        for (why, state), count in sorted(absent.items())
    ]
    if any(not _is_given_up(e) for e in unheard):
        facts.append(f"the job's disconnect policy is {describe_disconnect(job.spec)}")
    failed = [e for e in executions if e.phase in (Phase.FAILED, Phase.REJECTED)]
    words = Counter(_execution_words(e) for e in failed)
    for text, count in words.most_common(5):
        facts.append(f"{count} attempt{'s' if count > 1 else ''} ended so: {text}")
    for verdict in job.status.verdicts[:3]:
        facts += verdict_lines(verdict)
    return facts


def verdict_lines(verdict: Verdict) -> list[str]:
    """A placement decision in words."""
    if verdict.node:
        scores = ", ".join(f"{k} {v:.2f}" for k, v in sorted(verdict.scores.items()))
        placed = f"slot {verdict.slot} was placed on {verdict.node}"
        lines = [f"{placed}{f' ({scores})' if scores else ''}"]
        return [*lines, f"slot {verdict.slot}: {verdict.data}"] if verdict.data else lines
    lines = [f"slot {verdict.slot}: none of {verdict.nodes_total} nodes fits"]
    for rule in verdict.rejected:
        example = f", such as: {rule.example}" if rule.example else ""
        lines.append(f"slot {verdict.slot}: {rule.rule} turned down {rule.nodes}{example}")
    if verdict.nearest:
        lines.append(f"slot {verdict.slot}: the nearest miss was {verdict.nearest}")
    return lines


def _slots(executions: Sequence[Execution], accepted: dict[Slot, Acceptance]) -> list[SlotWords]:
    newest: dict[Slot, Execution] = {}
    attempts: Counter[Slot] = Counter()
    for execution in executions:
        slot = execution.spec.slot
        attempts[slot] += 1
        if slot not in newest or _standing(execution) > _standing(newest[slot]):
            newest[slot] = execution
    words = []
    for slot, execution in newest.items():
        won = accepted.get(slot)
        words.append(
            SlotWords(
                slot=str(slot),
                state="Accepted" if won else _state(execution),
                execution=won.spec.execution if won else execution.name,
                node=won.spec.node if won else execution.spec.node,
                attempts=attempts[slot],
                message="" if won else _execution_words(execution),
            )
        )

    def order(item: SlotWords) -> tuple[bool, int, str]:
        return (item.state == "Accepted", int(item.slot) if item.slot.isdecimal() else 0, item.slot)

    return sorted(words, key=order)


def _standing(execution: Execution) -> tuple[bool, int]:
    """Of the attempts of a slot, the newest that was not superseded speaks for it."""
    return not execution.spec.superseded, execution.spec.attempt


def _state(execution: Execution) -> str:
    if execution.status.contact is not Contact.REACHABLE and not execution.phase.is_final:
        return f"{execution.phase}/{execution.status.contact}"
    return str(execution.phase)


def _is_unheard(execution: Execution) -> bool:
    return execution.status.contact is not Contact.REACHABLE and not execution.phase.is_final


def _absence(execution: Execution) -> tuple[str, str]:
    """Why its node is out of contact about it: the reason, and words."""
    for condition in execution.status.conditions:
        if condition.type == CONTACT_CONDITION and condition.message:
            return condition.reason, condition.message
    return NODE_SILENT, f"node {execution.spec.node} is not heard from"


def _is_given_up(execution: Execution) -> bool:
    """Whether its node was taken away from it, so that no policy decides any more."""
    is_lost = execution.status.contact is Contact.LOST
    return is_lost and _absence(execution)[0] in (NODE_REMOVED, NODE_REJECTED)


def _waiting(execution: Execution) -> Waiting | None:
    """What it waits for. What a node said before it was lost is no news of it any more."""
    status = execution.status
    if status.waiting is not None or status.report is None or status.contact is Contact.LOST:
        return status.waiting
    return status.report.waiting


def _execution_words(execution: Execution) -> str:
    report = execution.status.report
    waiting = _waiting(execution)
    if waiting is not None:
        return waiting.message or waiting.what
    if _is_unheard(execution):
        reason, why = _absence(execution)
        why = f"node {execution.spec.node} is lost" if reason == NODE_SILENT else why
        return f"{why}; a late report still counts"
    if report is None:
        return "its node has not reported on it yet"
    words = report.message or report.reason
    if report.exit_code and words != f"exit code {report.exit_code}":
        words = f"exit code {report.exit_code}{f': {words}' if words else ''}"
    return words


def explain_execution(
    execution: Execution, acceptance: Acceptance | None, job: Job | None = None
) -> Explanation:
    """Explain one attempt; `job` adds why it is where it is."""
    status, spec = execution.status, execution.spec
    report = status.report
    because = []
    if status.contact is not Contact.REACHABLE:
        because.append(f"node {spec.node} is {status.contact}: what it does now is not known")
    if spec.desired == "Stop":
        because.append(f"it was asked to stop: {spec.stop_reason or 'by its job'}")
    if spec.superseded:
        is_accepted = acceptance is not None
        what = "'s result was accepted" if is_accepted else " was kept"
        because.append(f"another attempt{what} for its slot")
    if acceptance is not None and acceptance.spec.execution_uid == execution.metadata.uid:
        because.append("its result is the accepted one of its slot")
    if report is not None and report.is_system_fault:
        because.append("its end is the system's fault and not charged to the job's attempts")
    if report is not None and report.run > 1:
        because.append(f"it was started {report.run} times on its node")
    placed = _placement(execution, job)
    for verdict in placed:
        because += [*verdict_lines(verdict), *_others(verdict)]
    where = f"attempt {spec.attempt} of slot {spec.slot} on node {spec.node}"
    words = _execution_words(execution)
    return Explanation(
        kind="Execution",
        namespace=execution.metadata.namespace,
        name=execution.name,
        phase=_state(execution),
        headline=f"{where} is {_state(execution)}{f': {words}' if words else ''}",
        waiting=_waiting(execution),
        because=tuple(because),
        verdicts=placed,
    )


def _placement(execution: Execution, job: Job | None) -> tuple[Verdict, ...]:
    """The decision that put an execution where it is, as far as the job still has it."""
    made = execution.metadata.creation_timestamp
    known = job.status.verdicts if job is not None else ()
    return tuple(
        v
        for v in known
        if (v.slot, v.node, v.time) == (str(execution.spec.slot), execution.spec.node, made)
    )


def _others(verdict: Verdict) -> list[str]:
    """Why the other nodes were not chosen."""
    turned_down = sum(rule.nodes for rule in verdict.rejected)
    left = verdict.nodes_total - turned_down
    lines = [f"{left} of {verdict.nodes_total} nodes fitted, and it was the best of them"]
    for rule in verdict.rejected:
        example = f", such as: {rule.example}" if rule.example else ""
        lines.append(f"{rule.rule} turned down {rule.nodes}{example}")
    return lines


def explain_namespace(
    namespace: Namespace, jobs: Sequence[Job], executions: Sequence[Execution]
) -> Explanation:
    """Explain what a namespace allows and what of it is in use. `executions` are the open ones."""
    quota, asked = namespace.spec.quota, [e.spec.task.resources for e in executions]
    used = {
        "executions": (len(executions), quota.executions),
        "millicores": (sum(r.cpu_millis for r in asked), quota.resources.cpu_millis or None),
        "bytes of memory": (
            sum(r.memory_bytes for r in asked),
            quota.resources.memory_bytes or None,
        ),
        "bytes of disk": (sum(r.disk_bytes for r in asked), quota.resources.disk_bytes or None),
        "GPUs": (sum(r.gpu for r in asked), quota.resources.gpu or None),
    }
    because = [
        f"{n} of {most} {what} in use" for what, (n, most) in used.items() if most is not None
    ]
    if quota.stored_results:
        because.append(f"at most {quota.stored_results} bytes of results are kept")
    waiting = [j for j in jobs if j.status.waiting and j.status.waiting.what == QUOTA_WAIT]
    open_jobs = sum(not j.status.phase.is_final for j in jobs)
    return Explanation(
        kind="Namespace",
        name=namespace.name,
        headline=f"{open_jobs} jobs are open, {len(waiting)} of them wait for the quota",
        because=tuple(because) or ("nothing is limited",),
        remedies=("raise its quota, or stop something in it",) if waiting else (),
    )


def explain_retired(retired: RetiredJob) -> Explanation:
    """Explain what is left of a job."""
    spec = retired.spec
    headline = f"generation {spec.generation} of the job ended as {spec.phase} and was retired"
    return Explanation(
        kind="RetiredJob",
        namespace=retired.ref.namespace,
        name=retired.name,
        phase=str(spec.phase),
        headline=f"{headline}; applying its file again does not run it again",
        because=(f"{spec.slots.succeeded} of {spec.slots.total} slots succeeded",),
        remedies=(f"run it again: bacalhau rerun {retired.name}",),
    )


def explain_node(node: Node, executions: Sequence[Execution]) -> Explanation:
    """Explain whether and why a node gets work."""
    spec, status = node.spec, node.status
    because, remedies = [], []
    open_count = sum(not e.is_final for e in executions)
    if spec.membership is not Membership.APPROVED:
        because.append(f"it is {spec.membership}: it gets no executions")
        remedies.append(f"bacalhau node approve {node.name}")
    if spec.unschedulable or spec.drain:
        word = "drained" if spec.drain else "cordoned"
        because.append(f"it is {word}: it gets no new executions")
        remedies.append(f"bacalhau node uncordon {node.name}")
    because += [f"taint {t.key}={t.value} keeps jobs away" for t in spec.taints]
    for sort, plugs in (
        ("engine", status.info.engines),
        ("storage", status.info.storages),
        ("publisher", status.info.publishers),
    ):
        because += [
            f"{sort} {plug.name} cannot be used: {plug.reason}"
            for plug in plugs
            if not plug.available
        ]
    because += [
        f"{'' if c.status else 'not '}{c.type}: {c.message}" for c in status.conditions if c.message
    ]
    takes = "takes new work" if not because and status.contact is Contact.REACHABLE else ""
    headline = f"node {node.name} is {status.contact}, {open_count} executions are open on it"
    return Explanation(
        kind="Node",
        name=node.name,
        phase=str(status.contact),
        headline=f"{headline}; it {takes}" if takes else headline,
        waiting=status.waiting,
        because=tuple(because),
        remedies=tuple(remedies),
    )


def explain_publication(publication: Publication) -> Explanation:
    """Explain how far a delivery is."""
    status, spec = publication.status, publication.spec
    report = status.report
    words = (report.message or report.reason) if report else "its node has not reported on it yet"
    because = [f"it was tried {report.attempts} times"] if report and report.attempts > 1 else []
    if status.contact is not Contact.REACHABLE:
        because.append(f"node {spec.node}, which has the outputs, is {status.contact}")
    headline = f"outputs of slot {spec.slot} to {spec.publisher.type}: {status.phase}"
    return Explanation(
        kind="Publication",
        namespace=publication.metadata.namespace,
        name=publication.name,
        phase=str(status.phase),
        headline=f"{headline}{f': {words}' if words else ''}",
        waiting=status.waiting or (report.waiting if report else None),
        because=tuple(because),
    )


def explain_manifest(manifest: Manifest) -> Explanation:
    """Explain what an input was pinned to, and how it is shared out."""
    spec = manifest.spec
    return Explanation(
        kind="Manifest",
        namespace=manifest.metadata.namespace,
        name=manifest.name,
        headline=f"input {spec.input} of job {spec.job}, generation {spec.generation}, is pinned "
        f"to {spec.objects} objects with {spec.size_bytes} bytes, shared out among "
        f"{spec.partitions} partitions: at most {spec.objects_max} objects and "
        f"{spec.size_bytes_max} bytes in one, {spec.partitions_empty} with none",
    )


def explain_acceptance(acceptance: Acceptance) -> Explanation:
    """Explain which result a slot holds."""
    spec = acceptance.spec
    return Explanation(
        kind="Acceptance",
        namespace=acceptance.metadata.namespace,
        name=acceptance.name,
        headline=f"slot {spec.slot} of job {spec.job} holds the result of {spec.execution}, "
        f"which ran on node {spec.node}",
    )
