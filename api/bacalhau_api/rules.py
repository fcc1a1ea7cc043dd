"""The rules of a job and of a node that types alone cannot say: names, uniqueness, what goes with
what. Each `settle_*` returns the object in its canonical form and reports what is wrong.

Types are lenient, so that whatever was once stored can always be read; these rules stand at the
door, where objects come in. Defaults that depend on nothing but the object are `admission`'s.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, Final, Protocol

from bacalhau_api.meta import DEFAULT_NAMESPACE, ObjectMeta, check_name
from bacalhau_api.names import (
    check_domain,
    check_env_name,
    check_env_value,
    check_ip,
    check_label_key,
    check_label_value,
    check_long_text,
    check_mount_path,
    check_port_name,
    check_printable,
    check_result_name,
)
from bacalhau_api.quantity import CPU_MILLIS_MAX, INT64_MAX
from bacalhau_api.selectors import CONSTRAINTS_MAX, canonical_operator, check_constraint
from bacalhau_api.tree import shorten
from bacalhau_api.v1.job import (
    Constraint,
    ExitRule,
    InputSource,
    Job,
    JobSpec,
    Network,
    NetworkType,
    Port,
    Resources,
    ResultPath,
    Task,
    Timeouts,
)
from bacalhau_api.v1.namespace import Namespace
from bacalhau_api.v1.node import Node

JOB_BYTES_MAX: Final = 512 * 1024
"""A job, encoded. It travels to nodes within messages of at most 1 MiB."""

KEYS_MAX: Final = 256
"""Labels, annotations, `meta` entries of one object."""

ENTRIES_MAX: Final = 1000
"""Variables, inputs, results, ports, domains of one task."""

AFTER_SECONDS_MAX: Final = 10 * 365 * 86400
"""Of silence, until an execution is given up. Not a bound of the type: jobs that were stored before
it can still be read."""

Loc = tuple[str | int, ...]


class Report(Protocol):
    """Takes one problem. `loc` is a path of wire names; `value` the offending value, if it may be
    shown; `is_relation` says that the problem lies between several values, not in one."""

    def __call__(
        self,
        loc: Loc,
        message: str,
        *,
        value: str = "",
        hint: str = "",
        is_relation: bool = False,
    ) -> None: ...


class _Checks:
    """Small checks that report instead of raising."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def value(
        self, loc: Loc, value: str, check: Callable[[str], str], *, is_secret: bool = False
    ) -> str:
        """The canonical form of a value, or the value itself if it is wrong."""
        try:
            return check(value)
        except ValueError as error:
            self.report(loc, str(error), value="" if is_secret else shorten(value))
            return value

    def count(self, loc: Loc, entries: "Mapping[str, Any] | tuple[Any, ...]", most: int) -> bool:
        """Whether there are few enough entries to look at each."""
        if len(entries) > most:
            self.report(loc, f"has {len(entries)} entries, at most {most} are allowed")
            return False
        return True

    def unique(self, items: Iterable[tuple[Loc, object]], what: str) -> None:
        """Report each value that was given before; empty values and 0 do not count."""
        seen: set[object] = set()
        for loc, value in items:
            if value and value in seen:
                self.report(loc, f"{what} is used twice", value=shorten(str(value)))
            seen.add(value)

    def keys(self, loc: Loc, entries: Mapping[str, str], check: Callable[[str], str]) -> None:
        """Check the keys and values of labels, annotations or meta."""
        if self.count(loc, entries, KEYS_MAX):
            for key, value in entries.items():
                self.value((*loc, key), key, check_label_key)
                self.value((*loc, key), value, check)


# --- Metadata and Node ----------------------------------------------------------------------------


def _settle_meta(meta: ObjectMeta, checks: _Checks, *, is_namespaced: bool) -> ObjectMeta:
    loc: Loc = ("metadata",)
    if meta.name:
        checks.value((*loc, "name"), meta.name, check_name)
    else:
        hint = "a name identifies the object when it is applied again; give one, such as my-job"
        checks.report((*loc, "name"), "is missing", hint=hint)
    namespace = meta.namespace or DEFAULT_NAMESPACE
    if is_namespaced:
        checks.value((*loc, "namespace"), namespace, check_name)
    checks.keys((*loc, "labels"), meta.labels, check_label_value)
    checks.keys((*loc, "annotations"), meta.annotations, check_long_text)
    return meta.but(namespace=namespace) if is_namespaced else meta


def settle_namespace(namespace: Namespace, report: Report) -> Namespace:
    """Check a Namespace manifest."""
    checks = _Checks(report)
    meta = _settle_meta(namespace.metadata, checks, is_namespaced=False)
    spec = namespace.spec
    _check_resources(spec.defaults.resources, ("spec", "defaults", "resources"), checks)
    limits, asked = spec.quota.resources, spec.defaults.resources
    for name in ("cpu_millis", "memory_bytes", "disk_bytes", "gpu"):
        most = getattr(limits, name)
        if most and getattr(asked, name) > most:
            short = name.split("_")[0]
            hint = "lower the default, or raise the quota"
            report(
                ("spec", "defaults", "resources", short),
                "is more than the quota allows",
                hint=hint,
                is_relation=True,
            )
    return namespace.but(metadata=meta)


def settle_node(node: Node, report: Report) -> Node:
    """Check a Node manifest."""
    checks = _Checks(report)
    meta = _settle_meta(node.metadata, checks, is_namespaced=False)
    spec: Loc = ("spec",)
    if checks.count((*spec, "taints"), node.spec.taints, KEYS_MAX):
        for index, taint in enumerate(node.spec.taints):
            checks.value((*spec, "taints", index, "key"), taint.key, check_label_key)
            checks.value((*spec, "taints", index, "value"), taint.value, check_label_value)
        keys = [
            ((*spec, "taints", i, "key"), (t.key, t.value)) for i, t in enumerate(node.spec.taints)
        ]
        checks.unique(keys, "the taint")
    key = node.spec.public_key
    if key and not re.fullmatch(r"U[A-Z2-7]{55}", key):
        hint = "it is printed when the node first starts"
        report((*spec, "publicKey"), "is not the public NKey of a user (U…)", hint=hint)
    return node.but(metadata=meta)


# --- Job ------------------------------------------------------------------------------------------


def settle_job(job: Job, report: Report) -> Job:
    """Check a job, and return it in its canonical form."""
    checks = _Checks(report)
    spec, loc = job.spec, ("spec",)
    checks.keys((*loc, "meta"), spec.meta, check_long_text)
    checks.value((*loc, "runNonce"), spec.run_nonce, check_label_value)
    _check_policies(spec, checks)
    settled = job.but(
        metadata=_settle_meta(job.metadata, checks, is_namespaced=True),
        spec=spec.but(
            count=_settle_count(spec, report),
            constraints=_settle_constraints(spec.constraints, checks),
            tasks=tuple(
                _settle_task(t, (*loc, "tasks", i), checks) for i, t in enumerate(spec.tasks)
            ),
        ),
    )
    _check_size(settled, report)
    return settled


def _check_size(job: Job, report: Report) -> None:
    try:
        size = len(job.encode())
    except ValueError:  # text that has no UTF-8 form: reported where it stands
        return
    if size > JOB_BYTES_MAX:
        hint = "put large data into an input source instead of the job"
        report((), f"the job has {size} bytes, at most {JOB_BYTES_MAX} are allowed", hint=hint)


def _settle_count(spec: JobSpec, report: Report) -> int:
    """ops and daemon jobs run on every matching node: 0, 1 and no count mean the same there, and
    are stored as the default, 1."""
    if not spec.type.is_per_node:
        return spec.count
    if spec.count > 1:
        hint = f"leave it out: a job of type {spec.type} runs once on each matching node"
        report(
            ("spec", "count"), "must be 0 or 1", value=str(spec.count), hint=hint, is_relation=True
        )
    return 1


def _settle_constraints(
    constraints: tuple[Constraint, ...], checks: _Checks
) -> tuple[Constraint, ...]:
    loc = ("spec", "constraints")
    if not checks.count(loc, constraints, CONSTRAINTS_MAX):
        return constraints
    settled = tuple(c.but(operator=canonical_operator(c.operator)) for c in constraints)
    for index, constraint in enumerate(settled):
        if problem := check_constraint(constraint):
            checks.report((*loc, index), problem)
    return settled


def _check_policies(spec: JobSpec, checks: _Checks) -> None:
    for name, policy in (("retry", spec.retry), ("restart", spec.restart)):
        if policy.backoff_seconds > policy.backoff_seconds_max:
            message = f"must be at least backoffSeconds, {policy.backoff_seconds:g}"
            value = f"{policy.backoff_seconds_max:g}"
            checks.report(
                ("spec", name, "backoffSecondsMax"), message, value=value, is_relation=True
            )
    _check_exit_rules(spec.retry.exit_rules, ("spec", "retry", "exitRules"), checks)
    after = spec.disconnect.after_seconds
    if after is not None and after > AFTER_SECONDS_MAX:
        hint = "at most 10 years are allowed; to wait for ever, leave it out and set action: hold"
        loc = ("spec", "disconnect", "afterSeconds")
        checks.report(loc, "is too long a time", value=f"{after} s"[:40], hint=hint)
    if spec.on_change != "rerun" and not spec.type.runs_to_completion:
        hint = f"leave it out: a {spec.type} is updated in place"
        message = "is for batch and ops jobs"
        checks.report(
            ("spec", "onChange"), message, value=spec.on_change, hint=hint, is_relation=True
        )


def _check_exit_rules(rules: tuple[ExitRule, ...], loc: Loc, checks: _Checks) -> None:
    if not checks.count(loc, rules, KEYS_MAX):
        return
    codes = [
        ((*loc, i, "codes", n), code)
        for i, rule in enumerate(rules) for n, code in enumerate(rule.codes[:KEYS_MAX])
    ]  # fmt: skip
    for at, code in codes:
        if not 1 <= code <= 255:
            checks.report(at, "must be an exit code from 1 to 255", value=str(code)[:40])
    checks.unique(codes, "the exit code")


def _settle_task(task: Task, loc: Loc, checks: _Checks) -> Task:
    if not task.name.strip():
        checks.report((*loc, "name"), "must not be blank", hint="name the task, such as main")
    checks.value((*loc, "name"), task.name, check_label_value)
    _check_env(task.env, (*loc, "env"), checks)
    checks.keys((*loc, "meta"), task.meta, check_long_text)
    _check_resources(task.resources, (*loc, "resources"), checks)
    _check_timeouts(task.timeouts, (*loc, "timeouts"), checks)
    settled = task.but(
        input_sources=_settle_inputs(task.input_sources, (*loc, "inputSources"), checks),
        result_paths=_settle_results(task.result_paths, (*loc, "resultPaths"), checks),
        network=_settle_network(task.network, (*loc, "network"), checks),
    )
    _check_mounts(settled, loc, checks)
    _check_wasm_modules(settled, (*loc, "engine", "params"), checks)
    return settled


def _check_env(env: Mapping[str, str], loc: Loc, checks: _Checks) -> None:
    if checks.count(loc, env, ENTRIES_MAX):
        for name, value in env.items():
            checks.value((*loc, name), name, check_env_name)
            checks.value((*loc, name), value, check_env_value, is_secret=True)


def _check_resources(resources: Resources, loc: Loc, checks: _Checks) -> None:
    limits = (
        ("cpu", resources.cpu_millis, CPU_MILLIS_MAX),
        ("memory", resources.memory_bytes, INT64_MAX),
        ("disk", resources.disk_bytes, INT64_MAX),
        ("gpu", resources.gpu, 10**6),
    )
    for name, value, most in limits:
        if value > most:
            checks.report((*loc, name), "is more than any machine has")


def _check_timeouts(timeouts: Timeouts, loc: Loc, checks: _Checks) -> None:
    for name in ("execution_timeout", "queue_timeout", "total_timeout"):
        if getattr(timeouts, name) > INT64_MAX // 10**9:
            head, _, tail = name.partition("_")
            checks.report((*loc, head + tail.capitalize()), "is too long a time")
    both = timeouts.execution_timeout + timeouts.queue_timeout
    if 0 < timeouts.total_timeout < both:
        message = f"is less than executionTimeout and queueTimeout together ({both} seconds)"
        hint = "raise it, or lower the other two"
        checks.report(
            (*loc, "totalTimeout"),
            message,
            value=str(timeouts.total_timeout),
            hint=hint,
            is_relation=True,
        )


def _settle_inputs(
    inputs: tuple[InputSource, ...], loc: Loc, checks: _Checks
) -> tuple[InputSource, ...]:
    if not checks.count(loc, inputs, ENTRIES_MAX):
        return inputs
    settled = tuple(
        item.but(target=checks.value((*loc, i, "target"), item.target, check_mount_path))
        for i, item in enumerate(inputs)
    )
    for i, item in enumerate(inputs):
        checks.value((*loc, i, "alias"), item.alias, check_printable)
    checks.unique((((*loc, i, "alias"), x.alias) for i, x in enumerate(settled)), "the alias")
    return settled


def _settle_results(
    results: tuple[ResultPath, ...], loc: Loc, checks: _Checks
) -> tuple[ResultPath, ...]:
    if not checks.count(loc, results, ENTRIES_MAX):
        return results
    settled = tuple(
        result.but(path=checks.value((*loc, i, "path"), result.path, check_mount_path))
        for i, result in enumerate(results)
    )
    for i, result in enumerate(settled):
        checks.value((*loc, i, "name"), result.name, check_result_name)
    # Two names that differ only in case are one directory on some file systems.
    names = (((*loc, i, "name"), x.name.casefold()) for i, x in enumerate(settled))
    checks.unique(names, "the result name")
    return settled


def _check_mounts(task: Task, loc: Loc, checks: _Checks) -> None:
    """Inputs and results share the workload's file system."""
    inputs = (
        ((*loc, "inputSources", i, "target"), x.target) for i, x in enumerate(task.input_sources)
    )
    results = (((*loc, "resultPaths", i, "path"), x.path) for i, x in enumerate(task.result_paths))
    checks.unique(chain(inputs, results), "the path")


def _check_wasm_modules(task: Task, loc: Loc, checks: _Checks) -> None:
    """A module is where an input source puts it: at a target, or below one."""
    if task.engine.type != "wasm":
        return
    targets = tuple(x.target for x in task.input_sources)
    params = task.engine.params
    modules = [((*loc, "entryModule"), params.get("entryModule"))]
    modules += [
        ((*loc, "importModules", i), m) for i, m in enumerate(params.get("importModules", ()))
    ]
    for at, module in modules:
        if isinstance(module, str) and not any(
            module == t or module.startswith(f"{t}/") for t in targets
        ):
            message, hint = "is not the target of an input source", "add one with this target"
            checks.report(at, message, value=shorten(module), hint=hint, is_relation=True)


_WITH_PORTS: Final = (NetworkType.HOST, NetworkType.FULL, NetworkType.BRIDGE)


def _settle_network(network: Network, loc: Loc, checks: _Checks) -> Network:
    domains = network.domains
    message = f"cannot be used with network type {network.type}"
    if domains and network.type is not NetworkType.HTTP:
        hint = "set type: HTTP, or leave the domains out"
        checks.report((*loc, "domains"), message, hint=hint, is_relation=True)
    elif checks.count((*loc, "domains"), domains, ENTRIES_MAX):
        domains = tuple(
            checks.value((*loc, "domains", i), d, check_domain) for i, d in enumerate(domains)
        )
    if network.ports and network.type not in _WITH_PORTS:
        hint = f"set type: {', '.join(_WITH_PORTS)}, or leave the ports out"
        checks.report((*loc, "ports"), message, hint=hint, is_relation=True)
    elif checks.count((*loc, "ports"), network.ports, ENTRIES_MAX):
        _check_ports(network, (*loc, "ports"), checks)
    return network.but(domains=domains)


def _check_ports(network: Network, loc: Loc, checks: _Checks) -> None:
    for index, port in enumerate(network.ports):
        _check_port(port, network.type, (*loc, index), checks)
    for name in ("name", "static", "target"):
        given = (((*loc, i, name), getattr(p, name)) for i, p in enumerate(network.ports))
        checks.unique(given, f"the port's {name}" if name == "name" else f"the {name} port")


def _check_port(port: Port, network: NetworkType, loc: Loc, checks: _Checks) -> None:
    checks.value((*loc, "name"), port.name, check_port_name)
    if 0 < port.static < 1024:
        hint = "leave it out to have one chosen"
        checks.report((*loc, "static"), "must be 1024-65535", value=str(port.static), hint=hint)
    if port.target and network is not NetworkType.BRIDGE:
        message = f"cannot be used with network type {network}, where the workload has the host's"
        checks.report(
            (*loc, "target"),
            message,
            value=str(port.target),
            hint="set type: Bridge",
            is_relation=True,
        )
    if port.host_network:
        checks.value((*loc, "hostNetwork"), port.host_network, check_ip)
