"""From a tree, or from an object that a program built, to a checked object in canonical form.

Every way in ends here: job files, API requests, the Python client, and admission once more. So
there is one place where quantities become numbers, parameters of known types are checked, and the
rules are applied; and what is stored has one spelling for one meaning.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from bacalhau_api.errors import InvalidError
from bacalhau_api.mend import mend
from bacalhau_api.meta import Resource
from bacalhau_api.params import Role, shape_config
from bacalhau_api.quantity import parse_bytes, parse_cpu, parse_gpu, parse_seconds
from bacalhau_api.rules import Report, settle_job, settle_namespace, settle_node
from bacalhau_api.selectors import parse_selector
from bacalhau_api.shape import Findings, Loc, Shaper, Special, fields_of, nearest, shape_of
from bacalhau_api.tree import Fields, Items, Node, Scalar, from_plain, is_null, shown
from bacalhau_api.v1 import Node as NodeResource
from bacalhau_api.v1.job import (
    DisconnectPolicy,
    InputSource,
    Job,
    JobSpec,
    Network,
    NetworkType,
    Resources,
    SpecConfig,
    Task,
)
from bacalhau_api.v1.namespace import Namespace, Quota, Retention

_AMOUNTS: Final[Mapping[str, tuple[str, Callable[[str], int] | None]]] = {
    "cpu": ("cpuMillis", parse_cpu),
    "memory": ("memoryBytes", parse_bytes),
    "disk": ("diskBytes", parse_bytes),
    "gpu": ("gpu", parse_gpu),
    "cpuMillis": ("cpuMillis", None),
    "memoryBytes": ("memoryBytes", None),
    "diskBytes": ("diskBytes", None),
}
"""Written name to stored name, and how to read the text of a quantity."""


def _resources(shaper: Shaper, node: Node, loc: Loc) -> Any:
    """Resources, each as a quantity (`cpu: 500m`) or as stored (`cpuMillis: 500`)."""
    if not isinstance(node, Fields):
        return shaper.plain(node, loc)
    names = {(k.lower() if shaper.ignore_case else k): k for k in _AMOUNTS}
    found: dict[str, Any] = {}
    for key, value in node.entries.items():
        name = names.get(key.lower() if shaper.ignore_case else key)
        if name is None:
            hint = "" if shaper.findings.is_full else nearest(key, ("cpu", "memory", "disk", "gpu"))
            shaper.findings.add(value, "is not a known field", hint=hint)
            continue
        wire, parse = _AMOUNTS[name]
        at = (*loc, wire)
        shaper.origins[at] = value
        if wire in found:
            shaper.refuse(value, at, f"is given twice: also as {wire}")
        elif not is_null(value):
            found[wire] = _amount(shaper, value, at, parse)
    return {k: v for k, v in found.items() if v is not None}


def _amount(shaper: Shaper, node: Node, loc: Loc, parse: Callable[[str], int] | None) -> Any:
    if parse is None or not isinstance(node, Scalar) or isinstance(node.value, bool):
        return shaper.plain(node, loc)
    try:
        return parse(node.text)
    except ValueError as error:
        shaper.refuse(node, loc, str(error), value=shown(node))
        return None


def _bytes(shaper: Shaper, node: Node, loc: Loc) -> Any:
    """A number of bytes, or a quantity (`10Gi`)."""
    return _amount(shaper, node, loc, parse_bytes)


def _disconnect(shaper: Shaper, node: Node, loc: Loc) -> Any:
    """The limit as a duration (`after: 5m`) or as stored (`afterSeconds: 300`)."""
    if not isinstance(node, Fields):
        return shaper.plain(node, loc)
    rest = Fields(node.line)
    rest.entries = dict(node.entries)
    names = [k for k in rest.entries if (k.lower() if shaper.ignore_case else k) == "after"]
    given = [rest.entries.pop(name) for name in names]
    found = shaper.shape_model(rest, DisconnectPolicy, loc)
    shaper.origins[loc] = node
    for value in given:
        at = (*loc, "afterSeconds")
        if is_null(value):
            continue
        if "afterSeconds" in found or at in shaper.origins:
            shaper.refuse(value, at, "is given twice: also as afterSeconds")
            continue
        shaper.origins[at] = value
        seconds = _amount(shaper, value, at, _whole_seconds)
        found |= {} if seconds is None else {"afterSeconds": seconds}
    return found


def _whole_seconds(text: str) -> int:
    seconds = parse_seconds(text)
    if seconds.denominator != 1:
        raise ValueError("must be whole seconds")
    return int(seconds)


def _network_type(shaper: Shaper, node: Node, loc: Loc) -> Any:
    """In any letter case."""
    if not isinstance(node, Scalar):
        return shaper.plain(node, loc)
    spellings = {x.lower(): x.value for x in NetworkType}
    return spellings.get(node.text.strip().lower(), node.text)


def _constraints(shaper: Shaper, node: Node, loc: Loc) -> Any:
    """A list, or the text form of a selector."""
    if not isinstance(node, Scalar) or not isinstance(node.value, str):
        return shaper.shape(node, fields_of(JobSpec)["constraints"], loc)
    try:
        return [c.wire() for c in parse_selector(node.text)]
    except InvalidError as error:
        problem = error.problems[0]
        shaper.refuse(node, loc, problem.message, value=problem.value)
        return None


def _tasks(shaper: Shaper, node: Node, loc: Loc) -> Any:
    """Exactly one, for now: said here in words that help."""
    if isinstance(node, Items) and len(node.items) != 1:
        message = f"has {len(node.items)} tasks, a job has exactly one"
        shaper.refuse(node, loc, message, hint="write one job for each task")
        return None
    return shaper.shape(node, fields_of(JobSpec)["tasks"], loc)


def _config(role: Role) -> Special:
    return lambda shaper, node, loc: shape_config(role, shaper, node, loc)


_SPECIAL: Final[Mapping[object, Special]] = {
    (Task, "engine"): _config(Role.ENGINE),
    (Task, "publisher"): _config(Role.PUBLISHER),
    (InputSource, "source"): _config(Role.SOURCE),
    (SpecConfig, "params"): lambda shaper, node, loc: None,  # `shape_config` takes them
    (Network, "type"): _network_type,
    (JobSpec, "constraints"): _constraints,
    (JobSpec, "tasks"): _tasks,
    (Quota, "storedResults"): _bytes,
    (Retention, "historyBytes"): _bytes,
    Resources: _resources,
    DisconnectPolicy: _disconnect,
}


def settle(
    root: Node,
    model: type[Resource],
    findings: Findings,
    *,
    is_flat: bool = False,
    misspelt: frozenset[Loc] = frozenset(),
) -> Resource | None:
    """Build, check and canonicalise one object. None, with problems in `findings`, if it is wrong.

    `is_flat` matches keys in any letter case and names missing fields as the flat form does; `misspelt`
    are places of fields that were already reported under a wrong name.
    """
    before = findings.count
    shaper = Shaper(findings, is_flat, is_flat, _SPECIAL, misspelt=set(misspelt))
    data = shaper.shape(root, shape_of(model))
    resource = shaper.validate(data, model)
    looked_at, mended = resource, frozenset[Loc]()
    if resource is None and not findings.is_full:
        looked_at, mended = mend(data, model)
    is_sound = findings.count == before

    def report(
        loc: Loc, message: str, *, value: str = "", hint: str = "", is_relation: bool = False
    ) -> None:
        """What relates several values says nothing while one of them may be a placeholder."""
        placeholders = mended | shaper.refused
        if not is_sound and (
            is_relation
            or loc in shaper.misspelt
            or any(loc[:end] in placeholders for end in range(len(loc) + 1))
        ):
            return
        node, rest = shaper.node_at(loc)
        findings.add(node, message, value=value, hint=hint, below=shaper.name_of(rest))

    settled = _apply_rules(looked_at, report) if looked_at else None
    return settled if findings.count == before else None


def _apply_rules(resource: Resource, report: Report) -> Resource:
    if isinstance(resource, Job):
        return settle_job(resource, report)
    if isinstance(resource, NodeResource):
        return settle_node(resource, report)
    if isinstance(resource, Namespace):
        return settle_namespace(resource, report)
    return resource


def canonical_job(job: Job) -> Job:
    """The canonical form of a job that a program built, its status left out of account.

    Idempotent. Raises InvalidError with all that is wrong.
    """
    findings = Findings()
    # Not `wire`, which silently repairs what is to be refused: infinities, broken Unicode.
    plain = job.model_dump(by_alias=True, exclude_defaults=True, exclude={"status"})
    settled = settle(from_plain(plain), Job, findings)
    findings.check()
    assert isinstance(settled, Job)
    return settled.but(status=job.status)
