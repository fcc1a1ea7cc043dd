"""Whether this node lets an execution run: its own last word, whoever placed it here.

Pure: what plugs there are and what they say of the inputs comes in as arguments. The verdict is
the event for the runner's machine; a refusal names the rule, the value and the remedy.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bacalhau_api import names
from bacalhau_api.admission import DEFAULT_RESOURCES
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import NetworkType, Resources, Task
from bacalhau_api.v1.node import Capability
from bacalhau_controllers.runner.capacity import exceeds
from bacalhau_controllers.runner.state import Admitted, Denied

ENV_PREFIX = "env:"
PUBLISHER_NONE = ("", "noop")
"""Publisher types that need no publisher."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What this node lets jobs do. Closed by default: no network, none of its own variables.

    `env_allowed` are globs of the names of host variables that tasks may refer to by `env:NAME`.
    `defaults` replaces resources that a task leaves at 0.
    """

    capacity: Resources
    defaults: Resources = DEFAULT_RESOURCES
    executions_max: int = 256
    networks_allowed: frozenset[NetworkType] = frozenset({NetworkType.NONE})
    env_allowed: tuple[str, ...] = ()
    host_env: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Offers:
    """The plugs of this node, by type."""

    engines: Mapping[str, Capability]
    storages: Mapping[str, Capability]
    publishers: Mapping[str, Capability]


def resources_of(task: Task, policy: Policy) -> Resources:
    """What the task gets: what it asks for, or the node's default for what it leaves open."""
    asked, default = task.resources, policy.defaults
    return Resources(
        cpu_millis=asked.cpu_millis or default.cpu_millis,
        memory_bytes=asked.memory_bytes or default.memory_bytes,
        disk_bytes=asked.disk_bytes or default.disk_bytes,
        gpu=asked.gpu or default.gpu,
    )


def decide(
    execution: Execution, policy: Policy, offers: Offers, refusals: Sequence[str]
) -> Admitted | Denied:
    """The verdict. `refusals` has, for each input, why its storage refuses it, or ''."""
    task = execution.spec.task
    return (
        _plugs(task, offers)
        or _network(task, policy)
        or _env(task, policy)
        or _paths(task)
        or _resources(task, policy)
        or _sources(task, refusals)
        or Admitted()
    )


def _plugs(task: Task, offers: Offers) -> Denied | None:
    wanted = [("engine", task.engine.type, offers.engines)]
    wanted += [("input source", item.source.type, offers.storages) for item in task.input_sources]
    for what, type_name, there in wanted:
        found = there.get(type_name)
        reason = "EngineMissing" if what == "engine" else "StorageMissing"
        if found is None:
            has = ", ".join(sorted(there)) or "none"
            return Denied(reason, f"this node has no {what} {type_name!r}; it has: {has}")
        if not found.available:
            # A fault of the node that may pass; the job is not to blame, and another node may do.
            message = f"the {what} {type_name!r} cannot be used now: {found.reason}"
            return Denied(reason.replace("Missing", "Unavailable"), message, is_system_fault=True)
    target = task.publisher.type if task.publisher else ""
    if target not in PUBLISHER_NONE and target not in offers.publishers:
        has = ", ".join(sorted(offers.publishers)) or "none"
        return Denied("PublisherMissing", f"this node has no publisher {target!r}; it has: {has}")
    return None


def _network(task: Task, policy: Policy) -> Denied | None:
    asked = task.network.type
    effective = NetworkType.NONE if asked is NetworkType.DEFAULT else asked
    if effective in policy.networks_allowed:
        return None
    allowed = ", ".join(sorted(policy.networks_allowed)) or "none"
    return Denied(
        "NetworkRefused", f"this node does not allow network {asked}; it allows: {allowed}"
    )


def _env(task: Task, policy: Policy) -> Denied | None:
    for name, value in sorted(task.env.items()):
        if not value.startswith(ENV_PREFIX):
            continue
        host_name = value[len(ENV_PREFIX) :]
        if not any(fnmatch.fnmatchcase(host_name, glob) for glob in policy.env_allowed):
            return Denied(
                "EnvRefused",
                f"env {name} refers to the node's variable {host_name}, which this node does not "
                "give away; its operator can allow it",
            )
        if host_name not in policy.host_env:
            return Denied(
                "EnvRefused", f"env {name} refers to {host_name}, which is not set on this node"
            )
    return None


def _paths(task: Task) -> Denied | None:
    """Names and mount points become directories of the node: checked here again, because what is
    wrong with them could lead out of the execution's own directory."""
    taken: dict[str, str] = {}
    results: set[str] = set()
    try:
        for result in task.result_paths:
            names.check_result_name(result.name)
            if result.name.casefold() in results:
                return Denied("PathRefused", f"two results are named {result.name!r}")
            results.add(result.name.casefold())
        points = [(f"result {r.name!r}", r.path) for r in task.result_paths]
        points += [(f"input {i}", item.target) for i, item in enumerate(task.input_sources)]
        for what, path in points:
            clean = names.check_mount_path(path)
            if clean in taken:
                return Denied("PathRefused", f"{what} and {taken[clean]} are both at {clean}")
            taken[clean] = what
    except ValueError as error:
        return Denied("PathRefused", f"a name or path cannot be used: {error}")
    return None


def _resources(task: Task, policy: Policy) -> Denied | None:
    over = exceeds(resources_of(task, policy), policy.capacity)
    if not over:
        return None
    return Denied("Capacity", "this node is too small: " + "; ".join(over))


def _sources(task: Task, refusals: Sequence[str]) -> Denied | None:
    for number, (item, why) in enumerate(zip(task.input_sources, refusals, strict=True)):
        if why:
            return Denied("SourceRefused", f"input {number} ({item.source.type}): {why}")
    return None


def environment(execution: Execution, policy: Policy) -> dict[str, str]:
    """The workload's variables: the task's, with `env:NAME` resolved, then the system's."""
    spec = execution.spec
    own = {
        name: policy.host_env.get(value[len(ENV_PREFIX) :], "")
        if value.startswith(ENV_PREFIX)
        else value
        for name, value in spec.task.env.items()
    }
    return own | {
        "BACALHAU_ATTEMPT": str(spec.attempt),
        "BACALHAU_EXECUTION_ID": execution.name,
        "BACALHAU_JOB_ID": spec.job,
        "BACALHAU_JOB_NAMESPACE": execution.metadata.namespace,
        "BACALHAU_JOB_TYPE": spec.job_type.value,
        "BACALHAU_NODE_ID": spec.node,
        "BACALHAU_PARTITION_COUNT": str(spec.partition_count),
        "BACALHAU_PARTITION_INDEX": str(spec.slot.partition),
    }
