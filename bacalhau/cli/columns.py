"""Tables of objects: which columns each kind has. Works on plain data as it is on the wire."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from bacalhau.cli.text import age, size

Item = Mapping[str, Any]
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


def _waiting(item: Item, now: datetime) -> str:
    waiting = dig(item, "status.waiting", None) or dig(item, "status.report.waiting", None) or {}
    return str(waiting.get("message") or waiting.get("what") or "-")


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


def _labels(item: Item, now: datetime) -> str:
    labels = {**dig(item, "status.info.labels", {}), **dig(item, "metadata.labels", {})}
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items())) or "-"


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
}  # fmt: skip
_WIDE: Final[dict[str, tuple[Column, ...]]] = {
    "Job": (("GENERATION", _at("metadata.generation", "0")),
            ("PRIORITY", _at("spec.priority", "0")), ("WAITS FOR", _waiting)),
    "Execution": (("JOB", _at("spec.job")), ("SLOT", lambda item, now: slot_of(item)),
                  ("ATTEMPT", _at("spec.attempt", "0")), ("WAITS FOR", _waiting),
                  ("MESSAGE", _message)),
    "Node": (("VERSION", _at("status.info.version")), ("LABELS", _labels)),
    "Publication": (("JOB", _at("spec.job")), ("WAITS FOR", _waiting), ("MESSAGE", _message)),
    "Acceptance": (("JOB", _at("spec.job")), ("SLOT", lambda item, now: slot_of(item))),
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
