"""Who a process is, so that a number that was given out again is never taken for it.

A process is named by its number, its start time in clock ticks and the id of the boot. Standard
library only: wasm workers use it too.
"""

import os
import signal
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self


@cache
def boot_id() -> str:
    """The kernel's id of this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True, slots=True)
class Stat:
    """What /proc/<pid>/stat says: state letter, parent, start time in ticks since boot."""

    state: str
    parent: int
    start_ticks: int


def read_stat(pid: int) -> Stat | None:
    """None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may itself contain blanks and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    return Stat(state=fields[0], parent=int(fields[1]), start_ticks=int(fields[19]))


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process for ever, across reuse of its number and reboots."""

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Name a process by its number now; None if there is none."""
        stat = read_stat(pid)
        return None if stat is None else cls(pid, stat.start_ticks, boot_id())

    def stat(self) -> Stat | None:
        """Its present state; None once it is gone and reaped."""
        if self.boot_id != boot_id():
            return None
        stat = read_stat(self.pid)
        return stat if stat is not None and stat.start_ticks == self.start_ticks else None

    def open(self) -> int | None:
        """A pidfd, readable once the process has ended; None if it is gone. The caller closes."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        # The number may have changed hands between; the check is valid once the fd is held.
        if self.stat() is None:
            os.close(fd)
            return None
        return fd

    def kill(self) -> bool:
        """SIGKILL, to this process only. False if it was gone."""
        fd = self.open()
        if fd is None:
            return False
        try:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True
