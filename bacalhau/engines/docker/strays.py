"""Processes of a container that the engine does not know of.

An engine that is killed while it starts a container may leave it running, and the next engine may
take it for one that was never started (with `live-restore`). Started again, there would be two. The
kernel knows: the container's id is in the names of its processes' cgroups.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from bacalhau_api.errors import UnavailableError

_GONE_SECONDS = 10.0
_LOOK_SECONDS = 0.02
_WHOLE_ID = re.compile("[0-9a-f]{64}")


def end_strays(container_id: str) -> int:
    """Kill them, and return how many there were once they are gone. May block for a moment. Raises
    UnavailableError if they cannot be killed. `container_id` is the whole id: 64 digits."""
    if not _WHOLE_ID.fullmatch(container_id):  # anything shorter could be in the name of others
        raise ValueError(f"{container_id!r} is not the whole id of a container")
    deadline = time.monotonic() + _GONE_SECONDS
    ended: set[int] = set()
    while pids := list(_processes(container_id)):
        if time.monotonic() > deadline:
            raise UnavailableError(f"processes {pids} of a container do not end, though killed")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                try:
                    os.kill(pid, signal.SIGKILL)
                except PermissionError as error:
                    raise UnavailableError(
                        f"process {pid} of a container runs, and the Docker Engine does not know; "
                        "stop it, or restart the engine"
                    ) from error
            ended.add(pid)
        time.sleep(_LOOK_SECONDS)
    return len(ended)


def _processes(container_id: str) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if container_id in (entry / "cgroup").read_text() and _lives(entry):
                    yield int(entry.name)


def _lives(entry: Path) -> bool:
    """Whether it is more than a zombie."""
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
