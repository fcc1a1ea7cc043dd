"""What machine the node is."""

import os
from pathlib import Path

import pytest

from bacalhau.node.machine import boot_id, detect_capacity
from bacalhau.settings import CapacityOverrides


def cgroup(place: Path, **files: str) -> Path:
    for name, text in files.items():
        path = place / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return place


def test_boot_has_one_name() -> None:
    assert boot_id() == boot_id() != ""


def test_the_machine_is_what_counts_without_limits(tmp_path: Path) -> None:
    capacity, executions_max = detect_capacity(tmp_path, CapacityOverrides(), cgroup=tmp_path)
    assert capacity.cpu_millis == len(os.sched_getaffinity(0)) * 1000
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0.85 * total < capacity.memory_bytes < total
    assert capacity.disk_bytes > 0
    assert executions_max > 0


@pytest.mark.parametrize(
    "files",
    [
        {"cpu_dot_max": "50000 100000\n", "memory_dot_max": "1073741824\n"},
        {
            "cpu__cpu_dot_cfs_quota_us": "50000\n",
            "cpu__cpu_dot_cfs_period_us": "100000\n",
            "memory__memory_dot_limit_in_bytes": "1073741824\n",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_limits_of_the_control_group_count(tmp_path: Path, files: dict[str, str]) -> None:
    limited = cgroup(tmp_path, **files)
    capacity, _ = detect_capacity(tmp_path, CapacityOverrides(), cgroup=limited)
    assert capacity.cpu_millis == 500
    assert capacity.memory_bytes == 1073741824 - 1073741824 // 10


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    free = cgroup(tmp_path, cpu_dot_max="max 100000\n", memory_dot_max="max\n")
    capacity, _ = detect_capacity(tmp_path, CapacityOverrides(), cgroup=free)
    assert capacity.cpu_millis == len(os.sched_getaffinity(0)) * 1000


def test_the_operator_knows_better(tmp_path: Path) -> None:
    given = CapacityOverrides(cpu_millis=1, memory_bytes=2, disk_bytes=3, gpu=4, executions_max=5)
    capacity, executions_max = detect_capacity(tmp_path / "not" / "there", given, cgroup=tmp_path)
    assert (capacity.cpu_millis, capacity.memory_bytes, capacity.disk_bytes, capacity.gpu) == (
        1, 2, 3, 4,
    )  # fmt: skip
    assert executions_max == 5
