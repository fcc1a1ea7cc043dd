"""The Unix socket of a node's agent: where it is, how it is made, and how it is reached.

Only who may enter the node's data directory can reach it: directory 0700, socket 0600. Imports
nothing that takes time, because the command line looks for sockets before it knows whether it
needs one.
"""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

SOCKET_NAME: Final = "agent.sock"
BACKLOG: Final = 64
ANSWER_SECONDS: Final = 0.5
_PATH_BYTES_MAX: Final = 107
"""What fits into a socket address on Linux."""

SYSTEM_DATA: Final = Path("/var/lib/bacalhau")
"""Where agents that run as a service of the system usually keep their data."""


def socket_path(data_dir: Path) -> Path:
    """The socket of the agent that serves with this `--data-dir` (its `node` directory will do,
    too)."""
    direct = data_dir / SOCKET_NAME
    return direct if is_socket(direct) else data_dir / "node" / SOCKET_NAME


def places(environ: Mapping[str, str]) -> list[Path]:
    """Where the agent of this machine may have its socket, the likeliest first."""
    given = environ.get("BACALHAU_NODE_DIR") or environ.get("BACALHAU_DIR")
    if given:
        return [socket_path(Path(given).expanduser())]
    return [socket_path(Path("~/.bacalhau").expanduser()), socket_path(SYSTEM_DATA)]


def find_socket(environ: Mapping[str, str]) -> Path | None:
    """The socket of this machine's agent, if there is one that this user can see."""
    return next((path for path in places(environ) if is_socket(path)), None)


def is_socket(path: Path) -> bool:
    """Whether there is a socket; false also where one may not look."""
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False


def is_answered(path: Path) -> bool:
    """Whether somebody listens there: a socket outlives an agent that was killed."""
    try:
        connect(path, ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def short_address(path: Path) -> Iterator[str]:
    """An address by which the socket can be bound or reached, however long its path is."""
    address = str(path)
    if len(os.fsencode(address)) <= _PATH_BYTES_MAX:
        yield address
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen(path: Path) -> socket.socket:
    """Make the socket and listen on it. What an earlier agent left there is replaced: there is no
    other, since the caller holds the data directory. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short_address(path) as address:
            sock.bind(address)
        # Before anybody could connect; and only its owner can enter the directory.
        os.chmod(path, 0o600)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(path: Path, timeout_seconds: float) -> socket.socket:
    """A connection to the agent. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_seconds)
        with short_address(path) as address:
            sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock
