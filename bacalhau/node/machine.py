"""What machine this is: which boot, and how much of it jobs may use."""

import os
from dataclasses import dataclass
from pathlib import Path

from bacalhau.settings import CapacityOverrides
from bacalhau_api.v1.job import Resources

EXECUTIONS_MAX = 256
MEMORY_RESERVE_BYTES = 256 * 1024 * 1024
"""Left to the agent and the system, or a tenth of all, whichever is less."""

DISK_SHARE = 0.8
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Detected:
    """What an engine knows of its machine: millicores, bytes, devices. 0: not known, or none."""

    cpu_millis: int = 0
    memory_bytes: int = 0
    gpus: int = 0


def boot_id() -> str:
    """Names the present boot; moments of the monotonic clock compare only within one."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        # Without a name, every start of the agent counts as a boot: timeouts begin anew.
        return f"unknown-{os.getpid()}"


def detect_capacity(
    data_dir: Path,
    overrides: CapacityOverrides,
    *,
    engine: Detected | None = None,
    cgroup: Path = _CGROUP,
) -> tuple[Resources, int]:
    """What jobs may use on this machine, and how many executions at a time.

    The limits of the control group, and what `engine` has, count where they are below the
    machine's. Disk is a share of what is free where the data lies; GPUs are those that the engine
    can give to workloads.
    """
    there = engine or Detected()
    total, cpu_millis = _memory_bytes(cgroup), _cpu_millis(cgroup)
    total = min(total, there.memory_bytes or total)
    cpu_millis = min(cpu_millis, there.cpu_millis or cpu_millis)
    reserve = min(MEMORY_RESERVE_BYTES, total // 10)
    detected = Resources(
        cpu_millis=cpu_millis,
        memory_bytes=total - reserve,
        disk_bytes=_disk(data_dir),
        gpu=there.gpus,
    )
    given = {
        name: value
        for name in ("cpu_millis", "memory_bytes", "disk_bytes", "gpu")
        if (value := getattr(overrides, name)) is not None
    }
    executions_max = overrides.executions_max
    return (
        detected.but(**given),
        EXECUTIONS_MAX if executions_max is None else executions_max,
    )


def _cpu_millis(cgroup: Path) -> int:
    """Processors this process may run on, less what the control group takes away."""
    millis = len(os.sched_getaffinity(0)) * 1000
    quota = _words(cgroup / "cpu.max")  # version 2: "<quota or max> <period>"
    if not quota:
        quota = _words(cgroup / "cpu" / "cpu.cfs_quota_us")
        quota += _words(cgroup / "cpu" / "cpu.cfs_period_us")
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
        millis = min(millis, int(quota[0]) * 1000 // int(quota[1]))
    return max(millis, 1)


def _memory_bytes(cgroup: Path) -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = _words(cgroup / name)
        if limit and limit[0].isdigit():
            total = min(total, int(limit[0]))
    return total


def _disk(data_dir: Path) -> int:
    place = data_dir
    while not place.exists():
        place = place.parent
    status = os.statvfs(place)
    return int(status.f_bavail * status.f_frsize * DISK_SHARE)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []
