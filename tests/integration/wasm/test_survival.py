"""Runs survive agents and fork servers, are never taken for other processes, and leave nothing."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from bacalhau.engines.processes import ProcessId, boot_id, read_stat
from bacalhau.engines.wasm import WasmEngine, protocol, records
from bacalhau.engines.wasm import link as link_module
from bacalhau.engines.wasm.engine import WasmOptions
from bacalhau.engines.wasm.link import ZygoteLink
from bacalhau.engines.wasm.records import End, Started
from bacalhau.system import SystemClock
from bacalhau_api.errors import TransientError, UnavailableError
from bacalhau_controllers.runner.guard import ENGINE_FAULT
from bacalhau_controllers.runner.ports import Engine, Mount, Observation, RunPhase, Workload
from tests.support.engines import Bench, program

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path.resolve())


@pytest.fixture
async def engine(bench: Bench) -> AsyncIterator[WasmEngine]:
    engine = make(bench)
    await engine.open()
    yield engine
    await engine.close(keep_running=False)


def make(bench: Bench, *, idle_seconds: float = 60.0, spare_workers: int = 2) -> WasmEngine:
    options = WasmOptions(idle_seconds=idle_seconds, spare_workers=spare_workers)
    return WasmEngine(bench.state, SystemClock(), options=options)


def processes(bench: Bench) -> dict[int, str]:
    """Fork servers and workers of a bench, by number, with their states."""
    found: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        stat = read_stat(int(path.name))
        try:
            if stat and str(bench.state).encode() in (path / "cmdline").read_bytes():
                found[int(path.name)] = stat.state
        except OSError:
            continue
    return found


def zygote(bench: Bench, run: str) -> int:
    started = records.read_started(bench.state / "runs" / run)
    assert started is not None
    return started.zygote


def worker(bench: Bench, run: str) -> int:
    started = records.read_started(bench.state / "runs" / run)
    assert started is not None
    return started.process.pid


def is_gone(pid: int) -> bool:
    """True for zombies too: not every machine's first process reaps what it inherits soon."""
    stat = read_stat(pid)
    return stat is None or stat.state in "ZX"


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def children(pid: int) -> list[str]:
    """Zombies included."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def gated(bench: Bench) -> tuple[Workload, Path]:
    """A run that goes on until a file is there, however slow the machine is; and that file."""
    gates = bench.root / "gates"
    gates.mkdir()
    return bench.wasm("gate", "/gates/open", mounts=[Mount(gates, "/gates")]), gates / "open"


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 other processes make it true
            await asyncio.sleep(0.01)


async def end(engine: Engine, workload: Workload) -> Observation:
    return await asyncio.wait_for(engine.wait(workload.id), 30)


# The agent dies


AGENT = """
import asyncio, sys
from pathlib import Path
from bacalhau.engines.wasm import WasmEngine
from bacalhau.system import SystemClock
from tests.support.engines import Bench

async def main():
    bench = Bench(Path(sys.argv[1]))
    engine = WasmEngine(bench.state, SystemClock())
    await engine.open()
    await engine.start(bench.wasm("hello", "--tick", "20", run="ticking"))
    await engine.start(bench.wasm("loop", run="looping"))
    print("up", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


async def test_killed_agent_leaves_its_runs_to_the_next(bench: Bench) -> None:
    root = ROOT
    path = os.pathsep.join([str(root), *filter(None, sys.path)])
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AGENT, str(bench.root),
        cwd=root, env={**os.environ, "PYTHONPATH": path}, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert agent.stdout is not None
    assert await asyncio.wait_for(agent.stdout.readline(), 60) == b"up\n"
    agent.kill()
    await agent.wait()

    engine = make(bench)
    await engine.open()
    try:
        assert sorted(await engine.list()) == ["looping", "ticking"]
        assert (await engine.observe("looping")).phase is RunPhase.RUNNING
        seen = await asyncio.wait_for(engine.wait("ticking"), 30)
        assert (seen.phase, seen.exit_code) == (RunPhase.EXITED, 0)
        stdout = bench.root / "executions" / "ticking" / "stdout"
        assert stdout.read_text().count("\ntick ") == 20
        # The fork server is the one that the killed agent had started.
        workload = bench.wasm("hello")
        await engine.start(workload)
        await end(engine, workload)
        assert zygote(bench, workload.id) == zygote(bench, "ticking")
    finally:
        await engine.close(keep_running=False)
    await until(lambda: not processes(bench))


async def test_end_while_no_agent_was_there(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("hello", "--tick", "5", timeout_seconds=20)
    looping = bench.wasm("loop", timeout_seconds=0.5)
    await engine.start(workload)
    await engine.start(looping)
    await engine.close(keep_running=True)
    for one in (workload, looping):
        await until(lambda one=one: (bench.state / "runs" / one.id / "exit.json").exists())  # type: ignore[misc]
    await engine.open()
    assert (await engine.observe(workload.id)).exit_code == 0
    assert (await engine.observe(looping.id)).reason == "Timeout"


# The fork server dies


async def test_killed_zygote_does_not_touch_its_runs(engine: WasmEngine, bench: Bench) -> None:
    workload, gate = gated(bench)
    await engine.start(workload)
    waiting = asyncio.create_task(engine.wait(workload.id))
    await asyncio.sleep(0)
    first = zygote(bench, workload.id)
    os.kill(first, signal.SIGKILL)
    await until(lambda: is_gone(first))
    assert (await engine.observe(workload.id)).phase is RunPhase.RUNNING

    other = bench.wasm("hello")
    await engine.start(other)
    assert (await end(engine, other)).exit_code == 0
    assert zygote(bench, other.id) != first

    gate.touch()
    seen = await asyncio.wait_for(waiting, 30)
    assert (seen.phase, seen.exit_code) == (RunPhase.EXITED, 0)
    assert workload.stdout.read_text() == "waiting\nthrough\n"


async def test_orphan_keeps_its_time_limit(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("loop", timeout_seconds=1.0)
    await engine.start(workload)
    os.kill(zygote(bench, workload.id), signal.SIGKILL)
    seen = await end(engine, workload)
    assert (seen.phase, seen.reason) == (RunPhase.EXITED, "Timeout")


async def test_orphan_can_be_stopped(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("loop")
    await engine.start(workload)
    os.kill(zygote(bench, workload.id), signal.SIGKILL)
    pid = worker(bench, workload.id)
    await engine.stop(workload.id, 0)
    seen = await engine.observe(workload.id)
    assert (seen.phase, seen.reason) == (RunPhase.EXITED, "Killed")
    await until(lambda: is_gone(pid))


async def test_killed_worker_is_a_fault_of_the_system(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("loop")
    await engine.start(workload)
    os.kill(worker(bench, workload.id), signal.SIGKILL)
    seen = await end(engine, workload)
    assert (seen.phase, seen.exit_code, seen.reason) == (RunPhase.EXITED, 137, "Killed")
    assert seen.is_system_fault


async def test_an_end_that_cannot_be_written_down_for_a_while(
    engine: WasmEngine, bench: Bench
) -> None:
    """As on a full disk. The fork server goes on trying, and serves others meanwhile."""
    workload = bench.wasm("loop")
    await engine.start(workload)
    server = zygote(bench, workload.id)
    directory = bench.state / "runs" / workload.id
    obstacle = directory / f".{records.EXIT}.{server}"
    obstacle.mkdir()
    os.kill(worker(bench, workload.id), signal.SIGKILL)
    await asyncio.sleep(3.5)
    other = bench.wasm("hello")
    await engine.start(other)
    assert (await end(engine, other)).exit_code == 0
    assert zygote(bench, other.id) == server
    assert (await engine.observe(workload.id)).phase is RunPhase.RUNNING
    obstacle.rmdir()
    seen = await end(engine, workload)
    assert (seen.reason, seen.is_system_fault) == ("Killed", True)


async def test_crashed_worker_is_a_fault_of_the_engine(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("loop")
    await engine.start(workload)
    os.kill(worker(bench, workload.id), signal.SIGABRT)
    seen = await end(engine, workload)
    assert (seen.phase, seen.reason, seen.is_system_fault) == (
        RunPhase.EXITED, "EngineFault", True,
    )  # fmt: skip


async def test_run_vanishes_if_nobody_saw_its_end(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("loop")
    await engine.start(workload)
    waiting = asyncio.create_task(engine.wait(workload.id))
    await asyncio.sleep(0)
    server, pid = zygote(bench, workload.id), worker(bench, workload.id)
    os.kill(server, signal.SIGKILL)
    await until(lambda: is_gone(server))
    os.kill(pid, signal.SIGKILL)
    seen = await asyncio.wait_for(waiting, 30)
    assert (seen.phase, seen.exit_code, seen.is_system_fault) == (RunPhase.VANISHED, None, True)
    await engine.stop(workload.id, 0)
    assert await engine.observe(workload.id) == seen
    await engine.remove(workload.id)
    assert list(await engine.list()) == []


# Numbers that were given out again


@pytest.mark.parametrize("what", ["other start", "other boot", "spoilt file"])
async def test_another_process_is_never_taken_for_a_run(
    engine: WasmEngine, bench: Bench, what: str
) -> None:
    bystander = await asyncio.create_subprocess_exec("sleep", "600")
    try:
        me = ProcessId.of(bystander.pid)
        assert me is not None
        if what == "other start":
            me = ProcessId(me.pid, me.start_ticks - 1, me.boot_id)
        elif what == "other boot":
            me = ProcessId(me.pid, me.start_ticks, "another boot")
        directory = bench.state / "runs" / "old"
        directory.mkdir()
        assert records.write_started(directory, Started(me, zygote=1, time=1.0))
        if what == "spoilt file":
            (directory / "run.json").write_text('{"process": {"pi')
        assert (await engine.observe("old")).phase is RunPhase.VANISHED
        await engine.stop("old", 0)
        assert bystander.returncode is None
        assert read_stat(bystander.pid) is not None
        assert me.kill() is (what == "spoilt file")
    finally:
        if bystander.returncode is None:
            bystander.kill()
        await bystander.wait()


def test_same_process_is_recognised() -> None:
    me = ProcessId.of(os.getpid())
    assert me is not None
    assert me.boot_id == boot_id()
    assert me.stat() is not None
    fd = me.open()
    assert fd is not None
    os.close(fd)


# Several versions


async def test_zygote_of_another_version_is_drained(
    engine: WasmEngine, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await engine.close(keep_running=False)
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "flavour", lambda: "0" * 16)
        await engine.open()
        workload, gate = gated(bench)
        killed = bench.wasm("loop")
        await engine.start(workload)
        await engine.start(killed)
        await engine.close(keep_running=True)
    old = zygote(bench, workload.id)
    await engine.open()
    other = bench.wasm("hello")
    await engine.start(other)
    assert zygote(bench, other.id) != old
    assert (await engine.observe(workload.id)).phase is RunPhase.RUNNING
    await engine.stop(killed.id, 0)
    assert (await engine.observe(killed.id)).reason == "Killed"
    gate.touch()
    assert (await end(engine, workload)).exit_code == 0
    await until(lambda: is_gone(old))


# Leaving nothing


async def test_close_leaves_no_process(engine: WasmEngine, bench: Bench) -> None:
    for _ in range(3):
        await engine.start(bench.wasm("loop"))
    assert len(processes(bench)) >= 4
    await engine.close(keep_running=False)
    await until(lambda: not processes(bench))


async def test_idle_zygote_ends_by_itself(bench: Bench) -> None:
    engine = make(bench, idle_seconds=0.5)
    await engine.open()
    await engine.close(keep_running=True)
    await until(lambda: not processes(bench))


async def test_zygote_stays_for_its_runs(bench: Bench) -> None:
    engine = make(bench, idle_seconds=0.2)
    await engine.open()
    workload = bench.wasm("hello", "--tick", "30")
    await engine.start(workload)
    server = zygote(bench, workload.id)
    await engine.close(keep_running=True)
    exit_file = bench.state / "runs" / workload.id / "exit.json"
    while not exit_file.exists():
        assert read_stat(server) is not None
        await asyncio.sleep(0.02)
    assert json.loads(exit_file.read_text())["exit_code"] == 0
    await until(lambda: not processes(bench))


async def test_many_runs_leave_neither_zombies_nor_descriptors(bench: Bench) -> None:
    engine = make(bench, spare_workers=0)
    await engine.open()

    async def one() -> int:
        workload = bench.wasm("hello")
        await engine.start(workload)
        assert (await end(engine, workload)).exit_code == 0
        server = zygote(bench, workload.id)
        await engine.remove(workload.id)
        return server

    try:
        server = await one()
        await until(lambda: not children(server))
        before, ours = descriptors(server), descriptors(os.getpid())
        await asyncio.gather(*(one() for _ in range(40)))
        await until(lambda: not children(server))
        await until(lambda: descriptors(server) <= before)
        # Fewer where the collector closes what an earlier test has left.
        await until(lambda: descriptors(os.getpid()) <= ours)
        assert os.listdir(bench.state / "runs") == []
    finally:
        await engine.close(keep_running=False)


def test_only_one_worker_can_claim_a_run(tmp_path: Path) -> None:
    me = ProcessId.of(os.getpid())
    assert me is not None
    assert records.write_started(tmp_path, Started(me, 1, 1.0))
    assert not records.write_started(tmp_path, Started(ProcessId(1, 1, "x"), 1, 2.0))
    found = records.read_started(tmp_path)
    assert found is not None
    assert found.process == me


def test_first_recorded_end_stands(tmp_path: Path) -> None:
    assert records.write_end(tmp_path, End(exit_code=0, time=1.0))
    assert not records.write_end(tmp_path, End(exit_code=137, time=2.0, reason="Killed"))
    assert records.read_end(tmp_path) == End(exit_code=0, time=1.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exit.json"]


async def test_worker_whose_directory_was_deleted_does_not_stay(
    engine: WasmEngine, bench: Bench
) -> None:
    workload = bench.wasm("hello", "--tick", "5")
    await engine.start(workload)
    pid = worker(bench, workload.id)
    shutil.rmtree(bench.state / "runs" / workload.id)
    await until(lambda: is_gone(pid))
    assert (await engine.observe(workload.id)).phase is RunPhase.ABSENT


async def test_what_a_cut_off_start_left_is_no_run(engine: WasmEngine, bench: Bench) -> None:
    workload = bench.wasm("hello")
    left = bench.state / "runs" / workload.id
    (left / "mounts" / "0").mkdir(parents=True)
    assert list(await engine.list()) == []
    await engine.start(workload)
    assert (await end(engine, workload)).exit_code == 0
    old = bench.state / "runs" / "old"
    old.mkdir()
    os.utime(old, (1, 1))
    await engine.close(keep_running=True)
    await engine.open()
    assert not old.exists()
    assert list(await engine.list()) == [workload.id]


async def test_long_directory_names(bench: Bench) -> None:
    deep = Bench(bench.root.joinpath(*["d" * 60] * 4))
    deep.root.mkdir(parents=True)
    engine = make(deep)
    await engine.open()
    try:
        workload = deep.wasm("hello")
        await engine.start(workload)
        assert (await end(engine, workload)).exit_code == 0
    finally:
        await engine.close(keep_running=False)


async def test_stop_during_a_long_compilation(engine: WasmEngine, bench: Bench) -> None:
    """The run is not to begin once the compilation is through."""
    workload = bench.wasm(program("hello"))
    starting = asyncio.create_task(engine.start(workload))
    runs = bench.state / "runs" / workload.id
    await until(runs.is_dir)
    await engine.stop(workload.id, 0)
    await starting
    seen = await engine.observe(workload.id)
    assert (seen.phase, seen.reason) == (RunPhase.EXITED, "Killed")


async def test_a_start_that_was_stopped_on_its_way_to_a_worker_runs_nothing(
    engine: WasmEngine, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker may find the run only after everybody was told that it is over."""
    workload = bench.wasm("hello", "--tick", "3600")
    send = ZygoteLink.start

    async def late(link: ZygoteLink, message: protocol.Start) -> None:
        records.write_end(Path(message["directory"]), records.stopped_end(1.0))
        with contextlib.suppress(TransientError):
            await send(link, message)

    monkeypatch.setattr(ZygoteLink, "start", late)
    await engine.start(workload)
    await until(lambda: is_gone(worker(bench, workload.id)))
    assert not workload.stdout.exists()
    assert (await engine.observe(workload.id)).message == "stopped"


async def test_a_run_that_is_over_is_not_killed_while_it_flushes(
    engine: WasmEngine, bench: Bench
) -> None:
    """What has ended well in time counts, however long the disk takes."""
    workload = bench.wasm("hello", "--tick", "20")
    await engine.start(workload)
    (bench.state / "runs" / workload.id / records.OVER).touch()
    await engine.stop(workload.id, 0)
    seen = await engine.observe(workload.id)
    assert (seen.phase, seen.exit_code) == (RunPhase.EXITED, 0)
    other, endless = bench.wasm("hello"), bench.wasm("loop")
    await engine.start(other)
    await end(engine, other)
    assert (bench.state / "runs" / other.id / records.OVER).exists(), "it says so itself"
    await engine.start(endless)
    await engine.stop(endless.id, 0)
    assert not (bench.state / "runs" / endless.id / records.OVER).exists()


@pytest.mark.parametrize("call", ["stop", "remove"])
async def test_no_process_is_left_behind_an_end(
    engine: WasmEngine, bench: Bench, call: str
) -> None:
    """The end was written by who thought that there was no worker yet."""
    workload = bench.wasm("hello", "--tick", "3600")
    await engine.start(workload)
    records.write_end(bench.state / "runs" / workload.id, records.stopped_end(1.0))
    pid = worker(bench, workload.id)
    assert not is_gone(pid)
    await (engine.stop(workload.id, 0) if call == "stop" else engine.remove(workload.id))
    assert is_gone(pid)


async def test_a_fork_server_that_hangs_is_told_apart_from_a_refusal(
    engine: WasmEngine, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its reason the guard knows that the engine is not to be offered for a while."""
    first = bench.wasm("hello")
    await engine.start(first)
    await end(engine, first)
    server = zygote(bench, first.id)
    monkeypatch.setattr(link_module, "_START_SECONDS_MAX", 0.5)
    os.kill(server, signal.SIGSTOP)
    try:
        with pytest.raises(UnavailableError) as caught:
            await engine.start(bench.wasm("hello"))
    finally:
        os.kill(server, signal.SIGCONT)
    assert caught.value.reason == ENGINE_FAULT


FILL = """
import resource, sys
from pathlib import Path
from bacalhau.engines.wasm import records
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
end = records.End(134, 0.0, "Trap", "x" * 1000)
try:
    records.write_end(Path(sys.argv[1]), end)
except OSError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    records.write_end(Path(sys.argv[1]), end)
"""


def test_half_a_record_of_an_end_is_not_left_by_a_disk_that_becomes_full(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FILL, str(tmp_path)], check=True, timeout=60)
    end = records.read_end(tmp_path)
    assert end is not None
    assert (end.reason, len(end.message)) == ("Trap", 1000)


@pytest.mark.parametrize("what", ["a directory", "not JSON", "\udcff"])
async def test_a_spoilt_record_of_an_end_is_none(
    engine: WasmEngine, bench: Bench, what: str
) -> None:
    workload = bench.wasm("hello")
    await engine.start(workload)
    await end(engine, workload)
    pid = worker(bench, workload.id)
    await until(lambda: read_stat(pid) is None)
    record = bench.state / "runs" / workload.id / records.EXIT
    record.unlink()
    if what == "a directory":
        record.mkdir()
    else:
        record.write_bytes(os.fsencode(what))
    seen = await engine.observe(workload.id)
    assert (seen.phase, seen.is_system_fault) == (RunPhase.VANISHED, True)
    assert list(await engine.list()) == [workload.id]
    await engine.remove(workload.id)
    assert not record.exists()
