"""Keeps containers on their leash (disconnect policy `stop`) whether or not the agent lives.

    python -m bacalhau.engines.docker.guard RUNS_DIR SOCKET OWNER

A process of its own, one for each node, there while a run on a leash has not ended. It ends a run
whose node was cut off for too long, and writes down why; the agent, when there is one again, finds
the end like any other.
"""

import contextlib
import fcntl
import http.client
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from bacalhau.engines.docker.body import container_name
from bacalhau.engines.docker.records import Record, Shelf, Stop
from bacalhau.engines.leash import Watch

LOOK_SECONDS = 0.25
CALL_SECONDS = 10.0
IDLE_SECONDS = 5.0
SPAWN_SECONDS = 20.0
_LOCK = "guard.lock"


class _Connection(http.client.HTTPConnection):
    """HTTP over a socket of this machine."""

    def __init__(self, path: str) -> None:
        super().__init__("docker", timeout=CALL_SECONDS)
        self._path = path

    def connect(self) -> None:
        """See HTTPConnection."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CALL_SECONDS)
        self.sock.connect(self._path)


def spawn(runs: Path, socket_path: str, owner: str) -> None:
    """Start a guard that outlives this process; if there is one already, the new one ends at
    once. Returns when it is there. Raises OSError or subprocess.SubprocessError if it is not."""
    subprocess.run(
        [sys.executable, "-m", "bacalhau.engines.docker.guard", str(runs), socket_path, owner],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
        timeout=SPAWN_SECONDS,
        cwd="/",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def leashed(shelf: Shelf) -> list[Record]:
    """The runs on a leash that have not ended."""
    found = []
    for name in shelf.names():
        record = shelf.read(name)
        if record is not None and record.leash_noted and not shelf.has_end(name):
            found.append(record)
    return found


def main(runs: Path, socket_path: str, owner: str) -> None:
    """Hold until nothing is on a leash any more; return at once if another guard does."""
    lock = os.open(runs / _LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not _take(lock):
        return
    if os.fork():
        os._exit(0)  # whoever started it need not wait for more; the lock goes to the child
    shelf = Shelf(runs)
    while True:
        _hold(shelf, socket_path, owner)
        fcntl.flock(lock, fcntl.LOCK_UN)
        # Whoever found the lock taken just now had written its record before.
        if not leashed(shelf) or not _take(lock):
            return


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _hold(shelf: Shelf, socket_path: str, owner: str) -> None:
    """Until nothing has been on a leash for a while."""
    watches: dict[str, Watch] = {}
    idle_since = time.monotonic()
    while time.monotonic() - idle_since < IDLE_SECONDS:
        for record in leashed(shelf):
            idle_since = time.monotonic()
            held = watches.setdefault(record.run, _watch(record))
            if held.seconds_left() <= 0:
                words = f"the node was cut off for more than {record.leash_seconds:g} s"
                shelf.mark_stop(record.run, Stop("Disconnected", words, time.time()))
                _kill(socket_path, container_name(owner, record.run))
        time.sleep(LOOK_SECONDS)


def _watch(record: Record) -> Watch:
    return Watch(
        Path(record.leash_noted),
        boot=record.leash_boot,
        contact=record.leash_contact,
        seconds=record.leash_seconds,
    )


def _kill(socket_path: str, container: str) -> None:
    """Again and again until it has ended: an engine may be away for a moment."""
    connection = _Connection(socket_path)
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
        connection.request("POST", f"/containers/{container}/kill")
        connection.getresponse().read()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
