"""Filters: may this job run on that node at all? One small pure function for each rule.

A rule looks at one *fact* of the node (its contact, one label, its engines) and one *need* of the
job, and says whether they go together, in words that users read. The node table asks each rule
once for each pair of need and distinct fact, however many nodes share the fact; `evaluate` asks it
for one node. So the scheduler and its explanations cannot disagree.

Resources are counted, not matched: they are in `resources.py`.
"""

import posixpath
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple

from bacalhau_api import selectors
from bacalhau_api.meta import Contact
from bacalhau_api.v1.job import Constraint, InputSource, Job, SpecConfig, Task
from bacalhau_api.v1.node import Capability, Membership, Node, Taint

NODE = "{node}"
"""Stands for the node's name in a finding's texts; facts are shared by many nodes."""


class Finding(NamedTuple):
    """What a rule says. `remedy` is the one change that would turn a no into a yes."""

    is_ok: bool
    message: str
    remedy: str = ""

    def about(self, node: str) -> "Finding":
        """The same with the node's name filled in."""
        return Finding(
            self.is_ok, self.message.replace(NODE, node), self.remedy.replace(NODE, node)
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """`fact(node, key)` is what the rule looks at, `check(need, fact)` its decision."""

    name: str
    fact: Callable[[Node, str], Hashable]
    check: Callable[[Any, Any], Finding]


class Check(NamedTuple):
    """A rule bound to what a job needs. `key` selects one fact of several (a label's key)."""

    rule: str
    key: str
    need: Hashable


Shape = tuple[Check, ...]
"""All that a job asks of a node apart from resources. Equal for jobs that fit the same nodes."""


def membership(_need: None, fact: Membership) -> Finding:
    """Only approved nodes take part."""
    if fact is Membership.APPROVED:
        return Finding(True, "is approved")
    if fact is Membership.PENDING:
        return Finding(False, "waits for approval", "approve it: bacalhau node approve {node}")
    return Finding(False, "was rejected", "approve it: bacalhau node approve {node}")


def contact(_need: None, fact: Contact) -> Finding:
    """Work is given only to nodes that are heard from."""
    if fact is Contact.REACHABLE:
        return Finding(True, "is reachable")
    return Finding(False, "is not heard from", "bring {node} back, or check its link")


def schedulable(_need: None, fact: tuple[bool, bool]) -> Finding:
    """Cordoned and draining nodes take no new work."""
    is_cordoned, is_draining = fact
    if is_draining:
        return Finding(False, "is being drained", "end the drain: bacalhau node uncordon {node}")
    if is_cordoned:
        return Finding(False, "is cordoned", "uncordon it: bacalhau node uncordon {node}")
    return Finding(True, "takes new work")


def taints(need: frozenset[tuple[str, tuple[str, ...]]], fact: tuple[Taint, ...]) -> Finding:
    """A tainted node is for jobs only that ask for it: a constraint names the taint's key (and
    its value, if both have one)."""
    for taint in fact:
        if not any(
            key == taint.key and (not values or not taint.value or taint.value in values)
            for key, values in need
        ):
            text = f"{taint.key}={taint.value}" if taint.value else taint.key
            return Finding(
                False, f"is kept for jobs that ask for {text}", f"add the constraint {text}"
            )
    return Finding(True, "has no taint in the way")


def _capability(what: str, need: str, fact: tuple[Capability, ...]) -> Finding:
    for item in fact:
        if item.name.lower() != need:
            continue
        if item.available:
            version = f" {item.version}" if item.version else ""
            return Finding(True, f"has {what} {need}{version}")
        why = item.reason or "no reason given"
        return Finding(
            False, f"cannot use {what} {need} now: {why}", f"repair {what} {need} on {{node}}"
        )
    return Finding(False, f"has no {what} {need}", f"enable {what} {need} on {{node}}")


def engine(need: str, fact: tuple[Capability, ...]) -> Finding:
    """The engine is there and works."""
    return _capability("engine", need, fact)


def storage(need: str, fact: tuple[Capability, ...]) -> Finding:
    """The storage of one input type is there and works."""
    return _capability("storage", need, fact)


def publisher(need: str, fact: tuple[Capability, ...]) -> Finding:
    """The publisher is there and works."""
    return _capability("publisher", need, fact)


def constraint(need: Constraint, fact: str | None) -> Finding:
    """One constraint on one label. `fact` is the label's value, None if the node has none."""
    labels = {} if fact is None else {need.key: fact}
    has = f"has {need.key}={fact}" if fact is not None else f"has no label {need.key}"
    text = selectors.describe(need)
    if selectors.unmet((need,), labels):
        return Finding(False, f"{has}, asked for: {text}", f"relax {text}, or relabel {{node}}")
    return Finding(True, f"meets {text}")


def local_path(need: tuple[str, bool], fact: tuple[str, ...]) -> Finding:
    """Some pattern of the node's allow-list may cover a local input. Generous on purpose: the
    node decides again, with links resolved; a wrong no here would hide a node for ever."""
    path, is_writable = need
    for entry in fact:
        pattern, _, mode = entry.rpartition(":")
        if mode not in ("ro", "rw"):
            pattern, mode = entry, "ro"
        if is_writable and mode != "rw":
            continue
        literal = pattern
        for wildcard in "*?[":
            literal = literal.split(wildcard, 1)[0]
        folder = literal.rstrip("/") + "/"
        if fnmatchcase(path, pattern) or f"{path}/".startswith(folder):
            return Finding(True, f"allows local path {path}")
    how = " for writing" if is_writable else ""
    return Finding(
        False, f"does not allow local path {path}{how}", f"allow {path} on {{node}}{how}"
    )


RULES: Final = {
    rule.name: rule
    for rule in (
        Rule("Membership", lambda node, _: node.spec.membership, membership),
        Rule("Contact", lambda node, _: node.status.contact, contact),
        Rule(
            "Schedulable", lambda node, _: (node.spec.unschedulable, node.spec.drain), schedulable
        ),
        Rule("Taints", lambda node, _: node.spec.taints, taints),
        Rule("Engine", lambda node, _: node.status.info.engines, engine),
        Rule("Storage", lambda node, _: node.status.info.storages, storage),
        Rule("Publisher", lambda node, _: node.status.info.publishers, publisher),
        Rule("Constraint", lambda node, key: node.labels.get(key), constraint),
        Rule("LocalPath", lambda node, _: node.status.info.local_paths, local_path),
    )
}
"""By name, in the order in which they are asked."""

_POSITIVE = frozenset({"=", "==", "in", "exists"})
_LOCAL = frozenset({"local", "localdirectory"})


def shape_of(job: Job) -> Shape:
    """What a job asks of a node, as checks in the order of RULES."""
    task = job.spec.task
    asked = frozenset((c.key, c.values) for c in job.spec.constraints if c.operator in _POSITIVE)
    checks = [
        Check("Membership", "", None),
        Check("Contact", "", None),
        Check("Schedulable", "", None),
        Check("Taints", "", asked),
        Check("Engine", "", task.engine.type.lower()),
    ]
    types = dict.fromkeys(item.source.type.lower() for item in task.input_sources)
    checks += [Check("Storage", "", name) for name in types]
    target = delivery(task)
    if target is not None:
        checks.append(Check("Publisher", "", target.type.lower()))
    checks += [Check("Constraint", c.key, c) for c in dict.fromkeys(job.spec.constraints)]
    paths = dict.fromkeys(filter(None, map(_local_source, task.input_sources)))
    checks += [Check("LocalPath", "", path) for path in paths]
    return tuple(checks)


def delivery(task: Task) -> SpecConfig | None:
    """The publisher that delivers a task's outputs; None if they stay where they are."""
    target = task.publisher
    return None if target is None or target.type.lower() in ("", "noop") else target


def _local_source(item: InputSource) -> tuple[str, bool] | None:
    if item.source.type.lower() not in _LOCAL:
        return None
    params = {key.lower(): value for key, value in item.source.params.items()}
    path = params.get("sourcepath") or params.get("path")
    if not isinstance(path, str):
        return None
    return posixpath.normpath(path), params.get("readwrite") is True
