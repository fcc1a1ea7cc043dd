"""What a container is to be: the engine's `create` request for a workload. Pure.

The security profile is fixed here: no capabilities, no new privileges, the engine's default seccomp
filter, limits on memory (without swap), processes and CPU.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bacalhau_api.errors import TerminalError
from bacalhau_api.params import DockerParams
from bacalhau_controllers.runner.ports import Mount, Workload

LABEL_OWNER = "org.bacalhau.owner"
LABEL_RUN = "org.bacalhau.run"
LABEL_BOOT = "org.bacalhau.boot"
LABEL_GPUS = "org.bacalhau.gpus"

MEMORY_BYTES_MIN = 6 * 1024**2  # less is refused by the engine
_CPU_NANOS_MIN = 10_000_000  # as above: a hundredth of a processor
_TMP_BYTES_MAX = 256 * 1024**2
_LOG_FACTOR = 32  # each line of the engine's copy has a head, and there are two streams
_RUN_ID = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.]{0,239}")


@dataclass(frozen=True, slots=True)
class PortMapping:
    """One port of the host that leads to one of the container. `host_ip` empty: all addresses."""

    name: str
    host: int
    container: int
    host_ip: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """What the node chose for one container, beside what the job asked for.

    `network` is the engine's network mode; `user` is empty for the image's own; `gpus` are uuids;
    `boot` names the machine's present boot.
    """

    image: str
    owner: str
    network: str = "none"
    ports: tuple[PortMapping, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    gpus: tuple[str, ...] = ()
    pids_max: int = 1024
    has_init: bool = True
    hosts: tuple[str, ...] = ()
    boot: str = ""


def is_run_id(run: str) -> bool:
    """Whether it can be part of a container's name."""
    return _RUN_ID.fullmatch(run) is not None


def check_run_id(run: str) -> str:
    """The run id, which becomes part of a container's name. Raises TerminalError."""
    if not is_run_id(run):
        raise TerminalError(
            f"run id {run!r} must be 1-240 letters, digits, '-', '_' and '.'", reason="StartFailed"
        )
    return run


def container_name(owner: str, run: str) -> str:
    """The one name that a run's container can have: creating it twice is refused by the engine."""
    return f"bacalhau-{owner[:12]}-{run}"


def create_body(workload: Workload, params: DockerParams, place: Place) -> dict[str, Any]:
    """The request's JSON. Raises TerminalError for what no container can be given."""
    labels = {LABEL_OWNER: place.owner, LABEL_RUN: workload.id, LABEL_BOOT: place.boot}
    if place.gpus:
        labels[LABEL_GPUS] = ",".join(place.gpus)
    body: dict[str, Any] = {
        "Image": place.image,
        "Env": _environment(workload, params, place),
        "Labels": labels,
        "AttachStdin": False,
        "AttachStdout": False,
        "AttachStderr": False,
        "OpenStdin": False,
        "Tty": False,
        "HostConfig": _host_config(workload, params, place),
    }
    if params.entrypoint:
        body["Entrypoint"] = list(params.entrypoint)
    if params.parameters or params.entrypoint:
        # With an entrypoint of its own, the image's arguments are not meant.
        body["Cmd"] = list(params.parameters)
    if params.working_directory:
        body["WorkingDir"] = params.working_directory
    if place.user:
        body["User"] = place.user
    if place.ports:
        body["ExposedPorts"] = {f"{port.container}/tcp": {} for port in place.ports}
    return body


def _environment(workload: Workload, params: DockerParams, place: Place) -> list[str]:
    given = dict(text.split("=", 1) for text in params.environment_variables)
    merged = given | dict(workload.env) | dict(place.env)
    for name, value in merged.items():
        if not name or "=" in name or "\0" in name + value:
            raise TerminalError(
                f"env: {name!r} cannot be a variable; names have no '=', and nothing has a NUL",
                reason="StartFailed",
            )
    return [f"{name}={value}" for name, value in sorted(merged.items())]


def _host_config(workload: Workload, params: DockerParams, place: Place) -> dict[str, Any]:
    resources = workload.resources
    memory = max(resources.memory_bytes, MEMORY_BYTES_MIN) if resources.memory_bytes else 0
    config: dict[str, Any] = {
        "NetworkMode": place.network,
        "Mounts": [_mount(one) for one in workload.mounts],
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges:true"],
        "Privileged": False,
        "IpcMode": "private",
        "PidsLimit": place.pids_max,
        "ReadonlyRootfs": params.read_only_root,
        "Init": place.has_init,
        "AutoRemove": False,
        "RestartPolicy": {"Name": "no"},
        "OomKillDisable": False,
        # The driver `json-file` would replace what is not UTF-8. The engine's copy of the log is
        # bounded too; the node's copy, which counts, is cut long before this.
        "LogConfig": {
            "Type": "local",
            "Config": {
                "max-size": str(_LOG_FACTOR * workload.output_bytes_max),
                "max-file": "1",
                "compress": "false",
            },
        },
    }
    if memory:
        # The same number twice: no swap.
        config |= {"Memory": memory, "MemorySwap": memory}
    if resources.cpu_millis:
        config["NanoCpus"] = max(resources.cpu_millis * 1_000_000, _CPU_NANOS_MIN)
    if params.shm_bytes:
        config["ShmSize"] = params.shm_bytes
    if params.read_only_root:
        size = min(memory, _TMP_BYTES_MAX) if memory else _TMP_BYTES_MAX
        config["Tmpfs"] = {"/tmp": f"rw,nosuid,nodev,size={size},mode=1777"}
    if place.ports:
        bindings: dict[str, list[dict[str, str]]] = {}
        for port in place.ports:
            binding = {"HostIp": port.host_ip, "HostPort": str(port.host)}
            bindings.setdefault(f"{port.container}/tcp", []).append(binding)
        config["PortBindings"] = bindings
    if place.hosts:
        config["ExtraHosts"] = list(place.hosts)
    if place.gpus:
        config["DeviceRequests"] = [
            {"Driver": "nvidia", "DeviceIDs": list(place.gpus), "Capabilities": [["gpu"]]}
        ]
    return config


def _mount(mount: Mount) -> dict[str, Any]:
    # Of type bind in `Mounts`: a source that is missing is an error, where `Binds` would make a
    # directory on the host, owned by root.
    return {
        "Type": "bind",
        "Source": str(mount.source),
        "Target": mount.target,
        "ReadOnly": mount.read_only,
        "BindOptions": {"Propagation": "rprivate"},
    }
