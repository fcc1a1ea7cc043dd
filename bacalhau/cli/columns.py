"""Tables of objects: which columns each kind has. Works on plain data as it is on the wire."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from bacalhau.cli.text import age, duration, parse_time, size

Item = Mapping[str, Any]
LOCAL_EXECUTION: Final = "LocalExecution"
"""An execution as its own node shows it, with more in the field `local`."""

Column = tuple[str, Callable[[Item, datetime], str]]


def dig(item: Any, path: str, default: Any = "") -> Any:
    """The value at a dotted path, or `default` where there is none."""
    for part in path.split("."):
        if not isinstance(item, Mapping) or part not in item:
            return default
        item = item[part]
    return default if item is None else item


def _at(path: str, default: str = "-") -> Callable[[Item, datetime], str]:
    return lambda item, now: str(dig(item, path, "") or default)


def _age(item: Item, now: datetime) -> str:
    return age(dig(item, "metadata.creationTimestamp"), now)


def _slots(item: Item, now: datetime) -> str:
    counts = dig(item, "status.slots", {})
    return f"{counts.get('succeeded', 0)}/{counts.get('total', 0)}"


def waits_for(item: Item) -> str:
    """What something waits for, such as how far its inputs are. Of what is lost, the last report
    tells nothing about now."""
    waiting = dig(item, "status.waiting", None) or {}
    if not waiting and dig(item, "status.contact") != "Lost":
        waiting = dig(item, "status.report.waiting", None) or {}
    return str(waiting.get("message") or waiting.get("what") or "-")


def published(item: Item) -> str:
    """How far the delivery of an execution's outputs is, where its publication was looked up."""
    report = dig(item, "publication.status.report", None)
    if report is None:
        return "Pending" if "publication" in item else "-"
    words = dig(report, "waiting.message") or dig(report, "message")
    return f"{report.get('phase')}{f': {words}' if words else ''}"


def slot_of(item: Item) -> str:
    """The slot of an execution, publication or acceptance, as it is written in names."""
    slot = dig(item, "spec.slot", {})
    return str(slot.get("node") or slot.get("partition", 0))


def execution_phase(item: Item) -> str:
    """The reported phase, and what the orchestrator infers where that differs."""
    phase = str(dig(item, "status.report.phase", "Pending"))
    contact = str(dig(item, "status.contact", "Reachable"))
    is_final = phase in ("Succeeded", "Failed", "Stopped", "Rejected")
    return phase if contact == "Reachable" or is_final else f"{phase}/{contact}"


def _exit_code(item: Item, now: datetime) -> str:
    return str(dig(item, "status.report.exitCode", "-"))


def _message(item: Item, now: datetime) -> str:
    report = dig(item, "status.report", {})
    return str(report.get("message") or report.get("reason") or "-")


def node_status(item: Item) -> str:
    """Membership and contact of a node in one word."""
    membership = dig(item, "spec.membership", "Pending")
    if membership != "Approved":
        return str(membership)
    contact = dig(item, "status.contact", "Unknown")
    words = ["Ready" if contact == "Reachable" else str(contact)]
    words += ["Draining"] if dig(item, "spec.drain", False) else []
    words += ["Cordoned"] if dig(item, "spec.unschedulable", False) and len(words) == 1 else []
    return ",".join(words)


def _engines(item: Item, now: datetime) -> str:
    engines = dig(item, "status.info.engines", ())
    return ",".join(e["name"] for e in engines if e.get("available", True)) or "-"


def _cpu(item: Item, now: datetime) -> str:
    millis = dig(item, "status.info.capacity.cpuMillis", 0)
    return f"{millis / 1000:g}" if millis else "-"


def _memory(item: Item, now: datetime) -> str:
    return size(dig(item, "status.info.capacity.memoryBytes", 0) or None)


def _quota_cpu(item: Item, now: datetime) -> str:
    millis = dig(item, "spec.quota.resources.cpuMillis", 0)
    return f"{millis / 1000:g}" if millis else "-"


def _quota_memory(item: Item, now: datetime) -> str:
    return size(dig(item, "spec.quota.resources.memoryBytes", 0) or None)


def _labels(item: Item, now: datetime) -> str:
    labels = {**dig(item, "status.info.labels", {}), **dig(item, "metadata.labels", {})}
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items())) or "-"


def _manifest_size(item: Item, now: datetime) -> str:
    return size(dig(item, "spec.sizeBytes", 0))


def _local_since(item: Item, now: datetime) -> str:
    return age(dig(item, "local.since"), now)


def _stops_in(item: Item, now: datetime) -> str:
    moment = parse_time(dig(item, "local.stopAt"))
    return "-" if moment is None else duration(moment - now)


def _unsent(item: Item, now: datetime) -> str:
    return size(dig(item, "local.unsentBytes", 0)) if dig(item, "local.unsentFacts", 0) else "-"


def _revision(item: Item) -> str:
    return str(dig(item, "status.revisionApplied", "") or "-")[:12]


_NAME: Final[Column] = ("NAME", _at("metadata.name"))
_AGE: Final[Column] = ("AGE", _age)

_NARROW: Final[dict[str, tuple[Column, ...]]] = {
    "Job": (_NAME, ("TYPE", _at("spec.type")), ("PHASE", _at("status.phase", "Pending")),
            ("DONE", _slots), _AGE),
    "Execution": (_NAME, ("NODE", _at("spec.node")),
                  ("PHASE", lambda item, now: execution_phase(item)), ("EXIT", _exit_code), _AGE),
    "Node": (_NAME, ("STATUS", lambda item, now: node_status(item)), ("CPU", _cpu),
             ("MEMORY", _memory), ("ENGINES", _engines), _AGE),
    "Publication": (_NAME, ("NODE", _at("spec.node")), ("TARGET", _at("spec.publisher.type")),
                    ("PHASE", _at("status.report.phase", "Pending")), _AGE),
    "Acceptance": (_NAME, ("EXECUTION", _at("spec.execution")), ("NODE", _at("spec.node"))),
    "Manifest": (_NAME, ("OBJECTS", _at("spec.objects", "0")), ("SIZE", _manifest_size),
                 ("PARTITIONS", _at("spec.partitions", "1")),
                 ("LARGEST", _at("spec.objectsMax", "0")), ("EMPTY", _at("spec.partitionsEmpty", "0")),
                 _AGE),
    "Source": (_NAME, ("MODE", _at("spec.mode", "enforce")), ("PHASE", _at("status.phase", "Pending")),
               ("OBJECTS", _at("status.counts.objects", "0")),
               ("FAILED", _at("status.counts.failed", "0")),
               ("APPLIED", lambda item, now: _revision(item)), _AGE),
    "Namespace": (_NAME, ("EXECUTIONS", _at("spec.quota.executions")),
                  ("CPU", _quota_cpu), ("MEMORY", _quota_memory),
                  ("GPU", _at("spec.quota.resources.gpu")), _AGE),
    "RetiredJob": (_NAME, ("PHASE", _at("spec.phase")), ("GENERATION", _at("spec.generation")),
                   ("FINISHED", _at("spec.finishedAt")), _AGE),
    "Claim": (_NAME, ("SOURCE", _at("spec.source")), ("PHASE", _at("status.phase", "Held")),
              ("FILE", _at("spec.file")), ("OUTCOME", _at("status.outcome"))),
    LOCAL_EXECUTION: (_NAME, ("PHASE", lambda item, now: execution_phase(item)),
                      ("RUN", _at("local.run", "0")), ("SINCE", _local_since),
                      ("STOPS IN", _stops_in), ("UNSENT", _unsent), ("EXIT", _exit_code), _AGE),
}  # fmt: skip
_WIDE: Final[dict[str, tuple[Column, ...]]] = {
    "Job": (("GENERATION", _at("metadata.generation", "0")),
            ("PRIORITY", _at("spec.priority", "0")), ("WAITS FOR", lambda item, now: waits_for(item))),
    "Execution": (("JOB", _at("spec.job")), ("SLOT", lambda item, now: slot_of(item)),
                  ("ATTEMPT", _at("spec.attempt", "0")), ("WAITS FOR", lambda item, now: waits_for(item)),
                  ("PUBLISHED", lambda item, now: published(item)), ("MESSAGE", _message)),
    "Node": (("VERSION", _at("status.info.version")), ("LABELS", _labels)),
    "Publication": (("JOB", _at("spec.job")), ("WAITS FOR", lambda item, now: waits_for(item)), ("MESSAGE", _message)),
    "Acceptance": (("JOB", _at("spec.job")), ("SLOT", lambda item, now: slot_of(item))),
    "Source": (("PATH", _at("status.path")), ("MESSAGE", _at("status.message"))),
    "Namespace": (("RESULTS", _at("spec.quota.storedResults")),),
    "RetiredJob": (("RETIRED", _at("spec.retiredAt")), ("MESSAGE", _at("spec.message"))),
    "Claim": (("COMMIT", _at("spec.commit")), ("UID", _at("spec.uid"))),
    LOCAL_EXECUTION: (("JOB", _at("spec.job")), ("STAGE", _at("local.stage")),
                      ("WAITS FOR", lambda item, now: waits_for(item)), ("MESSAGE", _message)),
}  # fmt: skip


def columns_of(kind: str, *, wide: bool, with_namespace: bool) -> tuple[Column, ...]:
    """The columns of a kind's table."""
    columns = _NARROW[kind] + (_WIDE[kind] if wide else ())
    return (
        (("NAMESPACE", _at("metadata.namespace", "default")), *columns)
        if with_namespace
        else columns
    )


def rows(columns: Sequence[Column], items: Sequence[Item], now: datetime) -> list[list[str]]:
    """The cells of a table."""
    return [[read(item, now) for _, read in columns] for item in items]
