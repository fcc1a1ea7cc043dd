"""What a node may believe of a container after the power failed, and what it does about a full or
broken disk and a clock that is set."""

import asyncio
import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from bacalhau.engines.docker import DockerEngine, watch
from bacalhau.flush import flush_tree
from bacalhau.node import machine
from bacalhau.system import SystemClock
from bacalhau_controllers.runner.ports import Mount, RunPhase
from tests.support.docker_lab import SECONDS_MAX, Lab, output, run, until


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A directory on another file system than that of the tests."""
    with tempfile.TemporaryDirectory(prefix="bp-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """Gives the machine's present boot a name; it is `first-boot` before."""
    path = tmp_path / "boot_id"
    path.write_text("first-boot")
    monkeypatch.setattr(machine, "_BOOT_ID", path)
    return path.write_text


def refuse_flush(path: Path) -> None:
    """A disk that is broken."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


async def test_what_a_container_wrote_is_on_the_disk_before_its_end(
    lab: Lab, engine: DockerEngine, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = lab.workload(
        "echo x > /outputs/r/file; chmod 0 /outputs/r",
        results=("r",),
        mounts=(Mount(elsewhere, "/data", read_only=False), Mount(Path("/proc"), "/host")),
    )
    flushed: dict[Path, bool] = {}

    def flush(path: Path) -> None:
        flushed[path] = (lab.bench.state / "runs" / workload.id / "end.json").exists()
        flush_tree(path)

    monkeypatch.setattr(watch, "flush_tree", flush)
    assert (await run(engine, workload)).exit_code == 0
    (results,) = (m.source for m in workload.mounts if m.target == "/outputs/r")
    assert flushed == {results.parent: False}, "what is shared with others is not waited for"


@pytest.mark.parametrize(
    ("next_boot", "phase"),
    [("first-boot", RunPhase.EXITED), ("second-boot", RunPhase.VANISHED)],
)
async def test_a_success_whose_results_do_not_get_to_the_disk_does_not_outlast_the_boot(
    lab: Lab,
    boot: Callable[[str], object],
    monkeypatch: pytest.MonkeyPatch,
    next_boot: str,
    phase: RunPhase,
) -> None:
    workload = lab.workload("echo x > /outputs/r/file", results=("r",))
    engine = await lab.open()
    with monkeypatch.context() as patch:
        patch.setattr(watch, "flush_tree", refuse_flush)
        assert (await run(engine, workload)).exit_code == 0
        await engine.close(keep_running=True)
    boot(next_boot)
    seen = await asyncio.wait_for((await lab.open()).wait(workload.id), SECONDS_MAX)
    assert seen.phase is phase


@pytest.mark.parametrize(
    ("next_boot", "phase"),
    [("first-boot", RunPhase.EXITED), ("second-boot", RunPhase.VANISHED)],
)
async def test_an_end_that_nobody_wrote_down_is_in_doubt_after_a_reboot(
    lab: Lab, boot: Callable[[str], object], next_boot: str, phase: RunPhase
) -> None:
    """What it wrote may have been lost with the power; without a reboot it cannot have been."""
    engine = await lab.open()
    known = lab.workload("exit 0")
    gate = lab.root / "gate"
    gate.mkdir()
    script = "until [ -e /gate/go ]; do sleep 0.05; done; echo end > /outputs/r/file"
    unknown = lab.workload(script, results=("r",), mounts=(Mount(gate, "/gate"),))
    await run(engine, known)
    await engine.start(unknown)
    await engine.close(keep_running=True)
    (gate / "go").touch()
    await until(lambda: lab.inspect(unknown)["State"]["Status"] == "exited", "its end")
    boot(next_boot)
    second = await lab.open()
    seen = await asyncio.wait_for(second.wait(unknown.id), SECONDS_MAX)
    assert (seen.phase, seen.is_system_fault) == (phase, phase is RunPhase.VANISHED)
    assert (await second.observe(known.id)).exit_code == 0, "its end was on the disk"


async def test_a_run_whose_record_cannot_be_read_for_a_while_is_watched_again(lab: Lab) -> None:
    engine = await lab.open()
    gate = lab.root / "gate"
    gate.mkdir()
    script = "echo begin; until [ -e /gate/go ]; do sleep 0.05; done; echo end"
    workload = lab.workload(script, mounts=(Mount(gate, "/gate"),))
    await engine.start(workload)
    await engine.close(keep_running=True)
    record = lab.bench.state / "runs" / workload.id / "run.json"
    record.rename(record.with_suffix(".away"))
    second = await lab.open()
    assert (await second.observe(workload.id)).phase is RunPhase.RUNNING
    record.with_suffix(".away").rename(record)
    assert (await second.observe(workload.id)).phase is RunPhase.RUNNING
    (gate / "go").touch()
    assert (await asyncio.wait_for(second.wait(workload.id), SECONDS_MAX)).exit_code == 0
    assert output(workload) == "begin\nend\n"


@pytest.mark.parametrize("hours", [2, -2])
async def test_a_clock_that_is_set_makes_no_limit_of_time_early_or_late(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    engine = await lab.open()
    long = lab.workload("sleep 3600", timeout_seconds=600.0)
    short = lab.workload("sleep 3600", timeout_seconds=20.0)
    await engine.start(long)
    began = time.monotonic()  # not after the start: its answer may come long after it
    await engine.start(short)
    await engine.close(keep_running=True)
    await asyncio.sleep(15.0)
    real = SystemClock.now

    def now(clock: SystemClock) -> datetime:
        return real(clock) + timedelta(hours=hours)

    monkeypatch.setattr(SystemClock, "now", now)
    second = await lab.open()
    await asyncio.wait_for(second.wait(short.id), SECONDS_MAX)
    assert 19.5 < time.monotonic() - began < 32.0
    assert (await second.observe(long.id)).phase is RunPhase.RUNNING


async def test_a_log_that_a_full_disk_does_not_take_holds_up_no_end(
    lab: Lab, engine: DockerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "UNKEPT_SECONDS", 1.0)
    workload = replace(lab.workload("echo x; exit 4"), stdout=Path("/dev/full"))
    await engine.start(workload)
    await until(lambda: lab.inspect(workload)["State"]["Status"] == "exited", "its end")
    await asyncio.wait_for(engine.stop(workload.id, 0.0), SECONDS_MAX / 3)
    seen = await engine.observe(workload.id)
    assert (seen.phase, seen.exit_code, seen.reason) == (RunPhase.EXITED, 4, "")
    assert seen.message.startswith("exit code 4; its log could not be kept to its end: ")


async def test_an_end_that_a_full_disk_does_not_take_is_told_all_the_same(lab: Lab) -> None:
    engine = await lab.open()
    workload = lab.workload("sleep 1; exit 5")
    await engine.start(workload)
    fresh = lab.bench.state / "runs" / workload.id / "end.json.new"
    fresh.symlink_to("/dev/full")
    seen = await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX / 3)
    assert seen.exit_code == 5
    fresh.unlink()
    await engine.close(keep_running=True)
    second = await lab.open()
    assert await asyncio.wait_for(second.wait(workload.id), SECONDS_MAX) == seen
