"""What passes between the agent, the zygote and its workers: JSON in SOCK_SEQPACKET messages.

agent to zygote: start, compile, drain, shutdown. zygote to agent: hello, started, refused, ended,
compiled. zygote to worker: the Start message. worker to zygote: one byte, STARTED or ENDED,
or an `End` that it could not write down, before it leaves.

Agent and zygote find each other by a name that contains `flavour()`, so that both always speak the
same version; a zygote of another version is only ever sent `drain`.
"""

import hashlib
import json
import platform
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypedDict

CACHE_FORMAT = 1
MESSAGE_BYTES_MAX = 160 * 1024  # below the kernel's default limit for one packet (208 KiB)
SOCKET_BUFFER_BYTES = 1024 * 1024

STARTED = b"S"
ENDED = b"E"

LEASHED = 76
"""Exit status of a worker whose leash ended and that could not record it."""


class Preopen(TypedDict):
    """A directory of the node that the guest sees as `guest`. `host` is a real path."""

    host: str
    guest: str
    writable: bool


class Code(TypedDict):
    """A compiled module: linked under `name` if it is an import module. `cached` is where the
    cache keeps it, to be dropped there if it turns out to be spoilt."""

    name: str
    path: str
    cached: str


class Leash(TypedDict):
    """See `bacalhau_controllers.runner.ports.Leash`; `noted` is a path."""

    seconds: float
    contact: float
    boot: str
    noted: str


class Start(TypedDict):
    """Run a module. Paths are absolute; `modules` are in the order in which to link them."""

    op: Literal["start"]
    id: str
    directory: str
    module: Code
    imports: list[Code]
    entrypoint: str
    argv: list[str]
    env: dict[str, str]
    preopens: list[Preopen]
    stdout: str
    stderr: str
    log_index: str
    timeout_seconds: float | None
    memory_bytes_max: int
    output_bytes_max: int
    file_bytes_max: int
    leash: Leash | None


class Compile(TypedDict):
    """Compile the file `source`, if its SHA-256 is `digest`, to `target`."""

    op: Literal["compile"]
    key: str
    source: str
    digest: str
    target: str
    timeout_seconds: float
    cpu_seconds_max: int
    memory_bytes_max: int


Message = dict[str, Any]


def encode(message: Start | Compile | Message) -> bytes:
    """The bytes of one packet."""
    return json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", "surrogateescape"
    )


def decode(data: bytes) -> Message:
    """The reverse of `encode`."""
    message: Message = json.loads(data.decode("utf-8", "surrogateescape"))
    return message


@cache
def flavour() -> str:
    """Identifies code and environment of zygote and worker: 16 hex digits.

    Compiled modules depend on wasmtime and the processor, the protocol on this package's files.
    """
    known = hashlib.sha256()
    here = Path(__file__).parent
    shared = [here.parent / f"{name}.py" for name in ("leash", "logwriter", "processes")]
    for path in (*sorted(here.glob("*.py")), *shared):
        known.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for part in (sys.version, sys.executable, metadata.version("wasmtime"), platform.machine()):
        known.update(part.encode() + b"\0")
    return known.hexdigest()[:16]


@cache
def cache_flavour() -> str:
    """Identifies what compiled code depends on beside the module: 16 hex digits."""
    features = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            features = line
            break
    version = metadata.version("wasmtime")
    known = f"{CACHE_FORMAT}\0{version}\0{platform.machine()}\0{features}"
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def socket_name(name: str) -> str:
    """The zygote's socket in the engine's directory, for a flavour."""
    return f"zygote.{name}.sock"
