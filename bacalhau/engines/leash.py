"""The file by which workloads know when the orchestrator was last heard, whether or not an agent
lives: written by the agent's workspace, read by whatever keeps a workload on its leash.

One small record, written over in place, so that it can be written on a full disk too. Standard
library only: wasm workers use it.
"""

import contextlib
import os
import time
import zlib
from pathlib import Path

_RECORD_BYTES = 128
_TRIES = 3


def note(path: Path, boot: str, contact: float) -> None:
    """Write down the last contact: seconds by CLOCK_BOOTTIME in the boot named `boot`."""
    text = f"{boot} {contact:.6f}"
    record = f"{text} {zlib.crc32(text.encode()):08x}".ljust(_RECORD_BYTES - 1) + "\n"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.pwrite(fd, record.encode(), 0)
    finally:
        os.close(fd)


def read(path: Path) -> tuple[str, float] | None:
    """Boot and moment of the last contact; None if nothing that makes sense was written down."""
    for _ in range(_TRIES):  # it may be half written at this moment
        with contextlib.suppress(OSError, ValueError):
            boot, contact, checksum = path.read_bytes().decode().split()
            if zlib.crc32(f"{boot} {contact}".encode()) == int(checksum, 16):
                return boot, float(contact)
    return None


class Watch:
    """How much is left of one leash."""

    def __init__(self, noted: Path, *, boot: str, contact: float, seconds: float) -> None:
        self._noted = noted
        self._boot = boot
        self._contact = contact
        self._seconds = seconds

    def seconds_left(self) -> float:
        """Until it ends, if nothing more is heard; 0 or less once it has ended."""
        found = read(self._noted)
        if found is not None and found[0] == self._boot:
            self._contact = max(self._contact, found[1])
        return self._contact + self._seconds - time.clock_gettime(time.CLOCK_BOOTTIME)
