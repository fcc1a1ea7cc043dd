"""Settings of `bacalhau serve`: plain data, filled by the command line and read by the composition.

Nothing here reads files, environment or network, and nothing heavy is imported, so that the command
line can build it at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Role = Literal["orchestrator", "compute", "both"]

API_PORT = 1234
INPUT_CACHE_BYTES = 20 * 1024**3
IPFS_SECONDS = 60.0
NATS_PORT = 4222
NODE_TIMEOUT_SECONDS = 15.0
PROBE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class AllowedPath:
    """A local path pattern (a glob) that jobs may use as input; read-only unless `writable`."""

    pattern: str
    writable: bool = False

    def __str__(self) -> str:
        return f"{self.pattern}:{'rw' if self.writable else 'ro'}"


@dataclass(frozen=True, slots=True)
class CapacityOverrides:
    """What the node offers, where the operator knows better than detection. None: detect.

    Units: millicores, bytes, bytes, devices, executions at a time.
    """

    cpu_millis: int | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    gpu: int | None = None
    executions_max: int | None = None


@dataclass(frozen=True, slots=True)
class DockerSettings:
    """What the operator says about the docker engine; see bacalhau.engines.docker.options.

    host                empty: DOCKER_HOST, else /var/run/docker.sock
    images_allowed      globs of image references, or digests, that jobs may use; empty: all
    registries_allowed  host[:port] images may come from; empty: all
    pulls               whether images that are not on the node are brought
    images_keep_bytes   of pulled images, beyond which the least recently used are removed
    """

    host: str = ""
    images_allowed: tuple[str, ...] = ()
    registries_allowed: tuple[str, ...] = ()
    pulls: bool = True
    images_keep_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """Whom the node asks whether it may run an execution; see bacalhau.node.probes.

    command     for the shell, told on its standard input; empty: none
    url         of a web service, told by POST; empty: none
    seconds     how long either may take
    """

    command: str = ""
    url: str = field(default="", repr=False)
    seconds: float = PROBE_SECONDS


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """What a node may fetch and publish for jobs, and how much of it.

    cache_bytes     the input cache's bound
    input_bytes_max  one input may not be larger; 0: than the cache
    addresses       `ADDRESS[/BITS][:PORT]` that jobs may reach though they are not public
    allow_private   all private and loopback addresses are such
    s3_endpoints    S3 endpoints besides AWS that get this node's credentials
    ipfs_api        address of a Kubo RPC API, such as http://127.0.0.1:5001; empty: none
    ipfs_gateway    address of an IPFS gateway, used where there is no API; empty: none
    ipfs_seconds    how long a fetch from IPFS may go without a byte: what nobody has hangs
    protocols       fsspec protocols that inputs may name
    """

    cache_bytes: int = INPUT_CACHE_BYTES
    input_bytes_max: int = 0
    addresses: tuple[str, ...] = ()
    allow_private: bool = False
    s3_endpoints: tuple[str, ...] = ()
    ipfs_api: str = ""
    ipfs_gateway: str = ""
    ipfs_seconds: float = IPFS_SECONDS
    protocols: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Everything that `bacalhau serve` was told.

    role            which parts run in this process
    data_dir        the only directory written to; made if absent
    name            the node's name; empty: the host's name, kept in the data directory
    labels          the node's labels, on top of the detected ones
    listen_host     the API's address; anything but loopback needs tokens or `insecure_lab`
    listen_port     0: any free port
    api_token_file  digests of the API's bearer tokens; made with one fresh token if absent
    nats_host       where the embedded NATS server listens
    nats_port       -1: any free port
    nats_url        an existing NATS instead of the embedded one; with role compute, the address
                    of the orchestrator's NATS if the one it answers on joining is not reachable
    orchestrator_url  role compute: the orchestrator's API
    join_token      role compute: the single-use token to enrol with, needed the first time, and after the
                    node was deleted
    require_approval  nodes that joined wait for `bacalhau node approve`
    node_timeout_seconds  orchestrator: a node that was not heard from for so long is out of contact;
                    nodes say three times as often that they are there
    relaxed_durability  acknowledge writes before they are on disk
    allow_networks  networks jobs may ask for besides None: HTTP, Bridge, Host
    allow_env       globs of host variables that jobs may use by `env:NAME`
    upload_bytes_per_second  of logs and results through the orchestrator; 0: no limit
    outbox_bytes_max  what may wait to be handed over before new work is refused; None: half of the
                    disk offered, 0: no bound
    keep_outputs_seconds, keep_outputs_bytes  how long, and how much, of what was handed over is
                    kept on the node; 0: until its job is deleted
    transfers       what jobs may fetch from and publish to
    probes          who is asked besides whether an execution may run
    gitops          orchestrator: name and directory of each watched directory of manifests
    on_exit         what happens to running workloads when this process ends by a signal
    """

    role: Role = "both"
    data_dir: Path = Path.home() / ".bacalhau"
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    listen_host: str = "127.0.0.1"
    listen_port: int = API_PORT
    api_token_file: Path | None = None
    insecure_lab: bool = False
    nats_host: str = "127.0.0.1"
    nats_port: int = NATS_PORT
    nats_url: str = ""
    orchestrator_url: str = ""
    join_token: str = ""
    require_approval: bool = False
    allow_paths: tuple[AllowedPath, ...] = ()
    allow_env: tuple[str, ...] = ()
    allow_networks: tuple[str, ...] = ()
    transfers: TransferSettings = TransferSettings()
    docker: DockerSettings = DockerSettings()
    probes: ProbeSettings = ProbeSettings()
    capacity: CapacityOverrides = CapacityOverrides()
    node_timeout_seconds: float = NODE_TIMEOUT_SECONDS
    relaxed_durability: bool = False
    upload_bytes_per_second: int = 0
    outbox_bytes_max: int | None = None
    keep_outputs_seconds: float = 7 * 86400.0
    keep_outputs_bytes: int = 0
    gitops: tuple[tuple[str, Path], ...] = ()
    on_exit: Literal["keep", "stop"] = "keep"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    @property
    def allow_private_urls(self) -> bool:
        """True if jobs may reach private addresses."""
        return self.transfers.allow_private

    @property
    def is_orchestrator(self) -> bool:
        """True if the store, the reconcilers and the API run here."""
        return self.role in ("orchestrator", "both")

    @property
    def is_compute(self) -> bool:
        """True if executions run here."""
        return self.role in ("compute", "both")
