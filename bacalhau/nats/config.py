"""What the embedded server is told: its settings, and from them its configuration. Pure.

Three accounts. CP owns JetStream and belongs to the controllers. Nodes sign in to NODES, which has
no JetStream, and reaches CP only through one service: `node.>`. The way back is the service
`agent.>`. Each node may use its own subjects only. In one shared account this would not hold:
replies are not checked, so a node could have the server itself write its data under any subject.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bacalhau.nats.keys import check_public_key
from bacalhau.nats.subjects import (
    ALL_READS,
    ALL_REQUESTS,
    agent_subject,
    node_inbox,
    node_subject,
)
from bacalhau_api.errors import InvalidError, Problem

LOOPBACK: Final = "127.0.0.1"
NODES_ACCOUNT: Final = "NODES"
RELAXED_SYNC: Final = "1s"
# How long a node may take to answer a request; it covers log reads that wait for something new.
_RESPONSE_WINDOW = "5m"
_MEBIBYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class NodeUser:
    """A node that may sign in: its name, and the public NKey (`U…`) of its seed."""

    name: str
    public_key: str


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. With `ca_file`, nodes must show a certificate that it signed."""

    cert_file: Path
    key_file: Path
    ca_file: Path | None = None


@dataclass(frozen=True, slots=True)
class NatsSettings:
    """How to run the embedded server.

    `data_dir` belongs to it alone. `host` and `port` are where clients connect, nodes included;
    port 0 takes a free one. `advertise` is the host name told to nodes where `host` is a wildcard.
    `relaxed` acknowledges writes before they are on disk: a power failure loses the last second.
    """

    data_dir: Path
    host: str = LOOPBACK
    port: int = 0
    advertise: str = ""
    relaxed: bool = False
    tls: TlsFiles | None = None
    server_name: str = "bacalhau"
    binary: Path | None = None
    payload_bytes_max: int = _MEBIBYTE
    disk_bytes_max: int | None = None
    start_seconds_max: float = 60.0

    @property
    def store_dir(self) -> Path:
        """Where JetStream keeps its files."""
        return self.data_dir / "jetstream"

    @property
    def log_file(self) -> Path:
        """What the server logs; rotated, two old ones are kept."""
        return self.data_dir / "nats-server.log"


@dataclass(frozen=True, slots=True)
class Runtime:
    """What is only known when the server starts: ports, and who the controllers are."""

    port: int
    monitor_port: int
    controller_key: str
    system_key: str


def render_config(settings: NatsSettings, runtime: Runtime, nodes: Sequence[NodeUser] = ()) -> str:
    """The server's configuration file (JSON, which it reads). Raises InvalidError unless the nodes
    are what `sift_nodes` leaves."""
    jetstream: dict[str, Any] = {
        "store_dir": str(settings.store_dir),
        "sync_interval": RELAXED_SYNC if settings.relaxed else "always",
        "max_mem": 64 * _MEBIBYTE,
        "limits": {"default_max_consumers": 5000},
    }
    if settings.disk_bytes_max is not None:
        jetstream["max_file"] = settings.disk_bytes_max
    config: dict[str, Any] = {
        "server_name": settings.server_name,
        "host": settings.host,
        "port": runtime.port,
        "http": f"{LOOPBACK}:{runtime.monitor_port}",
        "ping_interval": "10s",
        "ping_max": 2,
        "max_payload": settings.payload_bytes_max,
        # Many nodes may return at once, and each signs a challenge.
        "authorization": {"timeout": 10},
        "log_file": str(settings.log_file),
        "log_size_limit": 10 * _MEBIBYTE,
        "logfile_max_num": 3,
        # With the longer acknowledgement subjects, other clients of the server may fail.
        "feature_flags": {"js_ack_fc_v2": False},
        "jetstream": jetstream,
        "system_account": "SYS",
        "accounts": _accounts(runtime, nodes),
    }
    if settings.tls is not None:
        config["tls"] = _tls(settings.tls)
    return json.dumps(config, indent=1)


def sift_nodes(nodes: Iterable[NodeUser], runtime: Runtime) -> tuple[list[NodeUser], list[Problem]]:
    """Those that may sign in, and what is wrong with the others: for one bad key, or one that two
    users share, the server would refuse the file as a whole. Of such two the first is left."""
    names: set[str] = set()
    keys = {runtime.controller_key: "the controllers", runtime.system_key: "the system account"}
    good: list[NodeUser] = []
    problems: list[Problem] = []
    for node in nodes:
        try:
            check_public_key(node.public_key)
            if node.name in names:
                raise ValueError("is the second one of that name")
            if (other := keys.get(node.public_key)) is not None:
                raise ValueError(f"is the key of {other} already")
        except ValueError as error:
            problems.append(Problem(f"node {node.name}: publicKey", str(error), node.public_key))
            continue
        names.add(node.name)
        keys[node.public_key] = f"node {node.name}"
        good.append(node)
    return good, problems


def _accounts(runtime: Runtime, nodes: Sequence[NodeUser]) -> dict[str, Any]:
    good, problems = sift_nodes(nodes, runtime)
    if problems:
        raise InvalidError(problems)
    return {
        "SYS": {"users": [{"nkey": runtime.system_key}]},
        "CP": {
            "jetstream": "enabled",
            "users": [{"nkey": runtime.controller_key}],
            "exports": [{"service": ALL_REQUESTS}],
            "imports": [{"service": {"account": NODES_ACCOUNT, "subject": ALL_READS}}],
        },
        NODES_ACCOUNT: {
            "users": [_node_user(node) for node in good],
            "exports": [{"service": ALL_READS}],
            "imports": [{"service": {"account": "CP", "subject": ALL_REQUESTS}}],
        },
    }


def _node_user(node: NodeUser) -> dict[str, Any]:
    return {
        "nkey": node.public_key,
        "permissions": {
            "publish": [node_subject(node.name, ">")],
            "subscribe": [agent_subject(node.name, ">"), f"{node_inbox(node.name)}.>"],
            "allow_responses": {"max": 1, "expires": _RESPONSE_WINDOW},
        },
    }


def _tls(files: TlsFiles) -> dict[str, Any]:
    tls: dict[str, Any] = {
        "cert_file": str(files.cert_file),
        "key_file": str(files.key_file),
        "timeout": 10,
    }
    if files.ca_file is not None:
        tls |= {"ca_file": str(files.ca_file), "verify": True}
    return tls
