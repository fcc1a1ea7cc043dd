"""What an operator can say about the docker engine of a node, and where that engine is."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bacalhau_api.errors import InvalidError, Problem

DEFAULT_HOST = "unix:///var/run/docker.sock"
_UNIX = "unix://"


@dataclass(frozen=True, slots=True)
class DockerOptions:
    """Limits and policies of the engine on this node.

    host            `unix:///path` of the engine's socket; empty: DOCKER_HOST, else the usual place
    images_allowed  globs of image references, or digests; empty: all. `docker.io/library/` is
                    understood where a reference leaves it out
    registries_allowed  host[:port] of registries images may come from; empty: all
    pull            `missing` brings an image that is not here; `never` runs only what is here
    images_keep_bytes   of images this node pulled, the least recently used are removed beyond this
    images_keep_seconds and those that were not used for so long; 0: never for age
    config_dir      the directory of Docker's `config.json` with the registries' credentials
    starts_max      starts at a time; more only makes each slower
    start_seconds   after which a start that did not return shows that the engine is wedged
    call_seconds    the same for every other question
    pull_seconds    a pull that brings nothing new for so long has failed
    pids_max        processes and threads of one container
    http_jobs_max   containers with network HTTP at a time: an engine has about 30 networks
    port_first, port_last  of the host, for ports that the job leaves open
    """

    host: str = ""
    images_allowed: tuple[str, ...] = ()
    registries_allowed: tuple[str, ...] = ()
    pull: Literal["missing", "never"] = "missing"
    images_keep_bytes: int = 50 * 1024**3
    images_keep_seconds: float = 30 * 86400.0
    config_dir: Path | None = None
    starts_max: int = 3
    start_seconds: float = 20.0
    call_seconds: float = 20.0
    pull_seconds: float = 300.0
    pids_max: int = 1024
    http_jobs_max: int = 16
    port_first: int = 20000
    port_last: int = 32000


def engine_host(options: DockerOptions, environment: Mapping[str, str] | None = None) -> str:
    """The engine's address. Raises InvalidError for one that is not a socket of this machine:
    inputs and outputs are directories here, which an engine elsewhere cannot mount."""
    variables = os.environ if environment is None else environment
    host = options.host or variables.get("DOCKER_HOST", "") or DEFAULT_HOST
    if not host.startswith(_UNIX + "/"):
        raise InvalidError(
            [Problem("--docker-host", "must be a socket of this machine", host)],
            hint="write unix:///path/to/docker.sock; the engine mounts this node's directories, so "
            "it has to run on the same machine",
        )
    return host


def socket_path(host: str) -> str:
    """The path of a `unix://` address."""
    return host.removeprefix(_UNIX)
