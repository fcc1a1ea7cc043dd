"""The words of `node status`: plain data of an agent as lines for people."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from bacalhau.cli.columns import dig
from bacalhau.cli.text import age, clean, duration, parse_time, size

_Pairs = list[tuple[str, str]]


def status_lines(told: Mapping[str, Any], now: datetime) -> list[str]:
    """All lines, most important first."""
    pairs = [
        ("Node", f"{told['node']} (incarnation {told['incarnation'] or 'none yet'})"),
        ("Agent", _agent(told, now)),
        *_connection(dig(told, "connection", {}), now),
        ("Executions", _counts(dig(told, "executions", {}))),
        *_stopping(told, now),
        ("Facts to send", _waits(told, "facts", now)),
        ("Results to deliver", _waits(told, "results", now)),
        ("Outbox", _bound(dig(told, "outbox", {}))),
        ("Publications", _counts(dig(told, "publications", {}))),
        *_ledger(dig(told, "ledger", {}), now),
        ("Disk", _disk(dig(told, "disk", {}))),
        ("Capacity", _capacity(told)),
        *((f"{c['type']}", str(c.get("message", ""))) for c in told.get("conditions", ())),
    ]
    width = max(len(name) for name, _ in pairs) + 1
    return [f"{name + ':':<{width}}  {clean(value)}" for name, value in pairs if value]


def _agent(told: Mapping[str, Any], now: datetime) -> str:
    text = f"version {told['version'] or 'unknown'}, up for {age(told['started'], now)}"
    return f"{text}, still taking up what an earlier life left" if told.get("recovering") else text


def _connection(connection: Mapping[str, Any], now: datetime) -> _Pairs:
    since = connection.get("since", "")
    where = connection.get("orchestrator", "")
    if connection.get("connected"):
        text = f"connected to {where} since {_moment(since, now)}"
        if not connection.get("approved"):
            text += "; not approved: it gets no work"
        return [("Orchestrator", text)]
    text = f"cut off since {_moment(since, now)}" if since else "never heard"
    text += f", from {where}"
    if connection.get("refused"):
        text += "; refused: this orchestrator does not know this node (any more); its work goes on"
    pairs = [
        ("Orchestrator", text),
        ("Last contact", _moment(connection.get("lastContact", ""), now) or "never"),
        ("Last error", str(connection.get("lastError", ""))),
    ]
    again = parse_time(connection.get("nextTry", ""))
    when = "now" if again is None or again <= now else f"in {duration(again - now)}"
    return [*pairs, ("Next try", when)]


def _moment(text: object, now: datetime) -> str:
    moment = parse_time(text)
    if moment is None:
        return ""
    return f"{moment.strftime('%Y-%m-%dT%H:%M:%SZ')} ({duration(now - moment)} ago)"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {phase}" for phase, count in sorted(counts.items())) or "none"


def _stopping(told: Mapping[str, Any], now: datetime) -> _Pairs:
    pairs = []
    for one in told.get("stopping", ()):
        at = parse_time(one["at"])
        left = duration(at - now) if at else "?"
        name = f"{one['namespace']}/{one['name']}"
        pairs.append(("Stops", f"{name} in {left}, unless the orchestrator is heard before"))
    return pairs


def _waits(told: Mapping[str, Any], what: str, now: datetime) -> str:
    outbox = dig(told, "outbox", {})
    count = outbox.get(what, 0)
    if not count:
        return "none"
    oldest = outbox.get(f"{what}Oldest")
    text = f"{count}, {size(outbox.get(f'{what}Bytes', 0))}"
    return f"{text}, the oldest for {age(oldest, now)}" if oldest else text


def _bound(outbox: Mapping[str, Any]) -> str:
    bound, held = outbox.get("bytesMax", 0), outbox.get("factsBytes", 0)
    held += outbox.get("resultsBytes", 0)
    text = f"{size(held)} of {size(bound)}" if bound else f"{size(held)}, without bound"
    if outbox.get("full"):
        text += "; full: no new work is taken on"
    limit = outbox.get("uploadBytesPerSecond", 0)
    return f"{text}; uploads at most {size(limit)}/s" if limit else text


def _ledger(ledger: Mapping[str, Any], now: datetime) -> _Pairs:
    state = "healthy" if ledger.get("healthy", True) else f"NOT WRITABLE: {ledger['message']}"
    made = f", begun {_moment(ledger.get('created'), now)}" if ledger.get("created") else ""
    schema = ledger.get("schemaVersion", 0)
    text = f"{state}, {size(ledger.get('sizeBytes', 0))}, schema {schema}{made}"
    pairs = [("Ledger", f"{text}, {ledger.get('path', '')}")]
    damaged = ledger.get("setAside", ())
    if damaged:
        pairs.append(("Damaged ledgers", f"{', '.join(damaged)} (kept beside the ledger)"))
    return pairs


def _disk(disk: Mapping[str, Any]) -> str:
    total, free = disk.get("totalBytes", 0), disk.get("freeBytes", 0)
    share = f" ({free / total:.0%})" if total else ""
    return f"{size(free)} of {size(total)} free{share}, {disk.get('path', '')}"


def _capacity(told: Mapping[str, Any]) -> str:
    def of(name: str, text: str) -> str:
        held, total = dig(told, f"allocated.{name}", 0), dig(told, f"capacity.{name}", 0)
        if text == "CPU":
            return f"{held / 1000:g} of {total / 1000:g} CPU"
        return f"{size(held)} of {size(total)} {text}"

    parts = [of("cpuMillis", "CPU"), of("memoryBytes", "memory"), of("diskBytes", "disk")]
    return f"{', '.join(parts)} in use"
