"""`describe`: everything about one object, for people."""

import json
from contextlib import suppress
from typing import Any

import typer

from bacalhau.cli.columns import (
    columns_of,
    dig,
    execution_phase,
    node_status,
    published,
    rows,
    waits_for,
)
from bacalhau.cli.commands.explain import explanation_lines, history_lines
from bacalhau.cli.commands.get import fetch_all
from bacalhau.cli.options import Namespace, Words, session_of
from bacalhau.cli.session import Session
from bacalhau.cli.targets import Target, parse_named
from bacalhau.cli.text import age, clean, clean_lines, now, size, table
from bacalhau.kinds import EXECUTION, PUBLICATION

HISTORY_LINES = 10
EXECUTION_LINES = 50
TAIL_LINES = 10

_Pairs = list[tuple[str, Any]]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def describe(context: typer.Context, words: Words, namespace: Namespace = "default") -> None:
        """Show all about objects: state, reasons, executions, recent history."""
        session = session_of(context)
        for number, target in enumerate(parse_named(words)):
            if number:
                print()
            for line in describe_lines(session, target, namespace):
                print(line)


def describe_lines(session: Session, target: Target, namespace: str) -> list[str]:
    """All lines about one object."""
    path = target.kind.path(namespace, target.name)
    item = session.fetch(path)
    if item["kind"] == "Execution" and not session.is_local:
        _add_publication(session, item, namespace)
    told = session.fetch(f"{path}/explain")
    lines = _pairs(_common(item) + _special(item))
    lines += ["", "State:", *(f"  {line}" for line in explanation_lines(told))]
    lines += _conditions(item)
    if item["kind"] == "Job":
        lines += _children(session, item, namespace)
    if item["kind"] == "Execution":
        lines += _tails(item)
    if session.is_local:
        return [*lines, "", "History: kept by the orchestrator"]
    past = session.fetch(f"{path}/history", {"limit": str(HISTORY_LINES)})
    lines += ["", "History:", *(f"  {line}" for line in history_lines(past["items"]))]
    return lines


def _add_publication(session: Session, item: Any, namespace: str) -> None:
    from bacalhau_api.errors import NotFoundError

    if dig(item, "spec.task.publisher", None):
        with suppress(NotFoundError):
            path = PUBLICATION.path(namespace, item["metadata"]["name"])
            item["publication"] = session.fetch(path)


def _pairs(pairs: _Pairs) -> list[str]:
    width = max(len(name) for name, _ in pairs) + 1
    return [f"{name + ':':<{width}}  {clean(value)}" for name, value in pairs if value != ""]


def _common(item: Any) -> _Pairs:
    meta = item["metadata"]
    labels = ", ".join(f"{key}={value}" for key, value in sorted(meta.get("labels", {}).items()))
    created = meta.get("creationTimestamp", "")
    pairs: _Pairs = [("Kind", item["kind"]), ("Name", meta["name"])]
    if item["kind"] != "Node":
        pairs.append(("Namespace", meta.get("namespace", "")))
    pairs += [("UID", meta.get("uid", "")), ("Labels", labels)]
    if created:
        pairs.append(("Created", f"{created} ({age(created, now())} ago)"))
    if "deletionTimestamp" in meta:
        held = ", ".join(meta.get("finalizers", ()))
        pairs.append(("Deleting", f"since {meta['deletionTimestamp']}, waits for {held}"))
    return pairs


def _special(item: Any) -> _Pairs:
    match item["kind"]:
        case "Job":
            return _job(item)
        case "Execution":
            return _execution(item)
        case "Node":
            return _node(item)
        case "Publication":
            return [
                ("Job", dig(item, "spec.job")),
                ("Execution", dig(item, "spec.execution")),
                ("Node", dig(item, "spec.node")),
                ("Target", dig(item, "spec.publisher.type")),
                ("Phase", dig(item, "status.report.phase", "Pending")),
                ("Message", dig(item, "status.report.message")),
                ("Location", dig(item, "status.report.location")),
            ]
    return [("Execution", dig(item, "spec.execution")), ("Node", dig(item, "spec.node"))]


def _job(item: Any) -> _Pairs:
    task = item["spec"]["tasks"][0]
    counts = dig(item, "status.slots", {})
    resources = task.get("resources", {})
    names = ("total", "waiting", "running", "succeeded", "failed", "delivered")
    return [
        ("Type", dig(item, "spec.type")),
        ("Phase", dig(item, "status.phase", "Pending")),
        ("Generation", dig(item, "metadata.generation", 0)),
        ("Priority", dig(item, "spec.priority", 0)),
        ("Suspended", "yes" if dig(item, "spec.suspend", False) else ""),
        ("Engine", task["engine"]["type"]),
        ("Publisher", dig(task, "publisher.type")),
        (
            "Resources",
            (
                f"{resources.get('cpuMillis', 0) / 1000:g} CPU, "
                f"{size(resources.get('memoryBytes', 0))} memory"
            ),
        ),
        ("Slots", ", ".join(f"{counts.get(name, 0)} {name}" for name in names)),
        ("If cut off", _policy(item)),
        ("Started", dig(item, "status.startedAt")),
        ("Finished", dig(item, "status.finishedAt")),
    ]


def _policy(item: Any) -> str:
    """What happens when a node of the job is not heard from."""
    from bacalhau_api.v1.job import JobSpec
    from bacalhau_controllers.disconnect import describe_disconnect

    try:
        return describe_disconnect(JobSpec.decode(json.dumps(item["spec"])))
    except ValueError:
        return ""  # of a newer server, whose fields this version does not know


def _execution(item: Any) -> _Pairs:
    outputs = dig(item, "status.report.outputs", {})
    return [
        ("Job", dig(item, "spec.job")),
        ("Node", dig(item, "spec.node")),
        ("Attempt", dig(item, "spec.attempt", 0)),
        ("Phase", execution_phase(item)),
        ("Exit code", dig(item, "status.report.exitCode")),
        ("Message", dig(item, "status.report.message") or dig(item, "status.report.reason")),
        ("Started", dig(item, "status.report.startedAt")),
        ("Finished", dig(item, "status.report.finishedAt")),
        ("Published", published(item).removeprefix("-")),
        (
            "Outputs",
            f"{outputs.get('files', 0)} files, {size(outputs.get('sizeBytes', 0))}"
            if outputs
            else "",
        ),
        *_local(item),
    ]


def _local(item: Any) -> _Pairs:
    """What only the node itself says of an execution."""
    local = dig(item, "local", {})
    if not local:
        return []
    stop = local.get("stopAt", "")
    unsent = (
        f"{size(local['unsentBytes'])} not acknowledged yet" if local["unsentFacts"] else "none"
    )
    return [
        ("Stage", f"{local['stage']} (for {age(local['since'], now())})"),
        ("Run", local.get("run", 0)),
        ("Detail", local.get("detail", "")),
        ("Stops at", f"{stop}, unless the orchestrator is heard before" if stop else ""),
        ("Unsent facts", unsent),
    ]


def _node(item: Any) -> _Pairs:
    capacity = dig(item, "status.info.capacity", {})
    labels = dig(item, "status.info.labels", {})

    def plugs(name: str) -> str:
        return ", ".join(
            plug["name"]
            if plug.get("available", True)
            else f"{plug['name']} (unavailable: {plug.get('reason') or 'no reason given'})"
            for plug in dig(item, f"status.info.{name}", ())
        )

    lacks = [
        (f"No {plug['name']}" if number == 0 else "", text)
        for plug in dig(item, "status.info.engines", ())
        for number, text in enumerate(plug.get("missing", ()))
    ]

    return [
        ("Status", node_status(item)),
        ("Version", dig(item, "status.info.version")),
        ("Node labels", ", ".join(f"{k}={v}" for k, v in sorted(labels.items()))),
        (
            "Capacity",
            (
                f"{capacity.get('cpuMillis', 0) / 1000:g} CPU, "
                f"{size(capacity.get('memoryBytes', 0))} memory, "
                f"{size(capacity.get('diskBytes', 0))} disk, {capacity.get('gpu', 0)} GPU"
            ),
        ),
        ("Engines", plugs("engines")),
        *lacks,
        ("Storages", plugs("storages")),
        ("Publishers", plugs("publishers")),
        ("Local paths", ", ".join(dig(item, "status.info.localPaths", ()))),
        ("Inputs held", _held(item)),
        ("Connected since", dig(item, "status.connectedSince")),
    ]


def _held(item: Any) -> str:
    """How much of jobs' inputs is on a node already."""
    held = dig(item, "status.info.heldInputs", ())
    total = sum(one.get("sizeBytes", 0) for one in held)
    return f"{size(total)} of {len(held)} input{'s' if len(held) > 1 else ''}" if held else ""


def _conditions(item: Any) -> list[str]:
    conditions = dig(item, "status.conditions", ())
    if not conditions:
        return []
    cells = [
        [c["type"], "True" if c["status"] else "False", c.get("reason", ""),
         age(c["lastTransitionTime"], now()), c.get("message", "")]
        for c in conditions
    ]  # fmt: skip
    header = ["TYPE", "STATUS", "REASON", "AGE", "MESSAGE"]
    return ["", "Conditions:", *(f"  {line}" for line in table(header, cells))]


def _children(session: Session, item: Any, namespace: str) -> list[str]:
    name, uid = item["metadata"]["name"], item["metadata"].get("uid")
    lines = []
    for kind in (EXECUTION, PUBLICATION):
        found = fetch_all(session, kind, namespace, {"fieldSelector": f"job={name}"})
        mine = [child for child in found if dig(child, "spec.jobUid") == uid]
        if not mine:
            continue
        # The newest generation and attempt of each slot are what people look for.
        mine.sort(
            key=lambda child: (
                -dig(child, "spec.slot.generation", 0),
                dig(child, "spec.slot.partition", 0),
                dig(child, "spec.slot.node"),
                -dig(child, "spec.attempt", 0),
            )
        )
        columns = columns_of(kind.kind, wide=False, with_namespace=False)
        if any(waits_for(child) != "-" for child in mine[:EXECUTION_LINES]):
            columns = (*columns, ("WAITS FOR", lambda child, _: waits_for(child)))
        cells = rows(columns, mine[:EXECUTION_LINES], now())
        lines += ["", f"{kind.plural.capitalize()}:"]
        lines += [f"  {line}" for line in table([header for header, _ in columns], cells)]
        if len(mine) > EXECUTION_LINES:
            lines.append(f"  and {len(mine) - EXECUTION_LINES} more: bacalhau get {kind.plural}")
    return lines


def _tails(item: Any) -> list[str]:
    lines = []
    for stream in ("stdout", "stderr"):
        tail = clean_lines(str(dig(item, f"status.report.{stream}Tail")))
        if tail:
            lines += ["", f"End of {stream}:"]
            lines += [f"  {line}" for line in tail.splitlines()[-TAIL_LINES:]]
    return lines
