"""Runs and their logs through the ends of everything else: agent, engine, containers."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bacalhau.engines.docker import DockerEngine
from bacalhau_api.errors import TransientError
from bacalhau_api.v1.job import Resources
from bacalhau_controllers.runner.ports import Mount, Observation, RunPhase
from tests.support.docker_faults import fault_proxy
from tests.support.docker_lab import SECONDS_MAX, Lab, be_patient, output, until
from tests.support.dockerd import Dockerd, running_dockerd

TICKS = "i=0; while [ $i -lt %d ]; do i=$((i+1)); echo line $i; echo err $i >&2; sleep 0.05; done"


@pytest.fixture(scope="module")
def mortal() -> Iterator[Dockerd]:
    """An engine that takes its containers with it."""
    with running_dockerd() as engine:
        yield engine


@pytest.fixture
async def mortal_lab(mortal: Dockerd, tmp_path: Path) -> AsyncIterator[Lab]:
    """A place on it."""
    lab = Lab(tmp_path, mortal)
    yield lab
    await lab.close()


async def ended(engine: DockerEngine, run: str) -> Observation:
    """How a run ended, asked until the engine has an answer."""
    async with asyncio.timeout(SECONDS_MAX):
        while True:
            with contextlib.suppress(TransientError):
                seen = await engine.wait(run)
                if seen.phase is not RunPhase.RUNNING:
                    return seen
            await asyncio.sleep(0.1)


def numbers(count: int, word: str = "line") -> str:
    """What TICKS writes."""
    return "".join(f"{word} {n}\n" for n in range(1, count + 1))


async def test_a_log_goes_on_where_it_was_whoever_reads_it(lab: Lab) -> None:
    """Five agents after each other, each gone in the middle of it."""
    workload = lab.workload(TICKS % 60)
    engine = await lab.open()
    await engine.start(workload)
    for part in range(5):
        wanted = f"line {8 * (part + 1)}\n"
        await until(lambda wanted=wanted: wanted in output(workload), wanted)  # type: ignore[misc]
        await engine.close(keep_running=True)
        engine = await lab.open()
    seen = await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX)
    assert seen.exit_code == 0
    assert output(workload) == numbers(60)
    assert output(workload, "stderr") == numbers(60, "err")


async def test_an_end_that_nobody_saw(lab: Lab) -> None:
    engine = await lab.open()
    gate = lab.root / "gate"
    gate.mkdir()
    script = "echo before; until [ -e /gate/go ]; do sleep 0.05; done; echo after; exit 9"
    workload = lab.workload(script, mounts=(Mount(gate, "/gate"),))
    await engine.start(workload)
    await until(lambda: output(workload) == "before\n")
    await engine.close(keep_running=True)
    (gate / "go").touch()
    await until(lambda: lab.inspect(workload)["State"]["Status"] == "exited")
    second = await lab.open()
    seen = await second.observe(workload.id)
    assert (seen.phase, seen.exit_code, seen.reason) == (RunPhase.EXITED, 9, "")
    assert output(workload) == "before\nafter\n"
    assert seen.finished_at is not None


async def test_limits_hold_over_a_restart_of_the_agent(lab: Lab) -> None:
    engine = await lab.open()
    timed = lab.workload("sleep 3600", timeout_seconds=2.0)
    long = lab.workload("while :; do echo 0123456789; sleep 0.01; done", output_bytes_max=1100)
    await engine.start(timed)
    await engine.start(long)
    await until(lambda: len(output(long)) > 100)
    await engine.close(keep_running=True)
    second = await lab.open()
    ends = await asyncio.wait_for(
        asyncio.gather(second.wait(timed.id), second.wait(long.id)), SECONDS_MAX
    )
    assert [end.reason for end in ends] == ["Timeout", "OutputLimit"]
    assert output(long) == "0123456789\n" * 100


async def test_a_crash_between_create_and_start(lab: Lab) -> None:
    """The container is there, and never ran: it is begun anew, not taken for ended."""
    engine = await lab.open()
    workload = lab.workload("echo once")
    created = asyncio.Event()
    original = engine._opened().client.ask_start

    async def crash(method: str, *args: object, **more: object) -> object:
        if method == "start":
            created.set()
            await asyncio.Event().wait()
        return await original(method, *args, **more)

    engine._opened().client.ask_start = crash  # type: ignore[method-assign]
    starting = asyncio.create_task(engine.start(workload))
    await asyncio.wait_for(created.wait(), SECONDS_MAX)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await engine.close(keep_running=True)
    second = await lab.open()
    assert (await second.observe(workload.id)).phase is RunPhase.ABSENT
    assert list(await second.list()) == [workload.id], "so that it is removed if nobody wants it"
    await second.start(workload)
    assert (await asyncio.wait_for(second.wait(workload.id), SECONDS_MAX)).exit_code == 0
    assert output(workload) == "once\n"


async def test_a_node_that_lost_its_data_finds_what_it_left_running(lab: Lab) -> None:
    engine = await lab.open()
    workload = lab.workload("sleep 3600")
    await engine.start(workload)
    await engine.close(keep_running=True)
    for path in sorted(lab.bench.state.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    second = await lab.open()
    assert list(await second.list()) == [workload.id]
    assert (await second.observe(workload.id)).phase is RunPhase.RUNNING
    await second.stop(workload.id, 0.0)
    assert (await second.observe(workload.id)).phase is RunPhase.EXITED
    await second.remove(workload.id)
    assert list(await second.list()) == []


async def test_a_container_that_somebody_removed(lab: Lab) -> None:
    engine = await lab.open()
    workload = lab.workload("echo x; sleep 3600")
    await engine.start(workload)
    await until(lambda: output(workload) == "x\n")
    name = lab.inspect(workload)["Id"]
    with lab.dockerd.api() as api:
        await asyncio.to_thread(api.remove_container, name, force=True)
    seen = await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX)
    assert (seen.phase, seen.is_system_fault) == (RunPhase.VANISHED, True)


async def test_a_container_that_somebody_stopped_is_not_the_workloads_failure(lab: Lab) -> None:
    engine = await lab.open()
    workload = lab.workload("echo x; exec sleep 3600")
    await engine.start(workload)
    await until(lambda: output(workload) == "x\n")
    name = lab.inspect(workload)["Id"]
    with lab.dockerd.api() as api:
        await asyncio.to_thread(api.stop, name, timeout=5)
    seen = await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX)
    assert (seen.phase, seen.is_system_fault) == (RunPhase.VANISHED, True)
    assert "somebody else" in seen.message


async def test_a_container_that_somebody_started_again_does_not_run_beside_the_next(
    lab: Lab,
) -> None:
    engine = await lab.open()
    restarted, begun = lab.workload("exec sleep 3600"), lab.workload("sleep 1; exec sleep 3600")
    await engine.start(restarted)
    name = lab.inspect(restarted)["Id"]
    with lab.dockerd.api() as api:
        await asyncio.to_thread(api.restart, name, timeout=5)
        assert (await ended(engine, restarted.id)).phase is RunPhase.VANISHED
        assert lab.inspect(restarted)["State"]["Running"]
        await engine.stop(restarted.id, 0.0)
        assert not lab.inspect(restarted)["State"]["Running"]
        await engine.start(begun)
        await engine.stop(begun.id, 0.0)
        await asyncio.to_thread(api.start, lab.inspect(begun)["Id"])
    await engine.remove(begun.id)
    await engine.remove(restarted.id)
    assert await engine.list() == []
    with lab.dockerd.api() as api:
        assert not api.containers(all=True, filters={"id": name})


@pytest.mark.parametrize("how", ["kill", "terminate"])
async def test_an_engine_that_takes_its_containers_along(mortal_lab: Lab, how: str) -> None:
    """What was cut is told as interrupted, not as failed; what had ended before keeps its end."""
    lab = mortal_lab
    engine = await lab.open()
    ended, cut = lab.workload("exit 3"), lab.workload(TICKS % 100_000)
    await engine.start(ended)
    await engine.start(cut)
    assert (await asyncio.wait_for(engine.wait(ended.id), SECONDS_MAX)).exit_code == 3
    await until(lambda: "line 5\n" in output(cut))
    waiting = asyncio.create_task(engine.wait(cut.id))
    if how == "kill":
        await asyncio.to_thread(lab.dockerd.kill)
    else:
        await asyncio.to_thread(lab.dockerd.end)
    await asyncio.to_thread(lab.dockerd.start)
    waited = (await asyncio.gather(waiting, return_exceptions=True))[0]
    seen = waited
    while isinstance(seen, BaseException) or seen.phase is RunPhase.RUNNING:
        await asyncio.sleep(0.1)
        seen = (await asyncio.gather(engine.observe(cut.id), return_exceptions=True))[0]
    assert (seen.phase, seen.is_system_fault) == (RunPhase.VANISHED, True)
    assert (await engine.observe(ended.id)).exit_code == 3
    lines = output(cut).splitlines()
    assert lines == numbers(len(lines)).splitlines(), "the log has no hole and no line twice"
    again = lab.workload("echo well")
    await engine.start(again)
    assert (await asyncio.wait_for(engine.wait(again.id), SECONDS_MAX)).exit_code == 0


async def test_what_an_engine_took_along_is_interrupted_also_if_its_record_is_spoilt(
    mortal_lab: Lab,
) -> None:
    lab = mortal_lab
    engine = await lab.open()
    workload = lab.workload("sleep 3600")
    await engine.start(workload)
    await engine.close(keep_running=True)
    (lab.bench.state / "runs" / workload.id / "run.json").write_text("")
    await asyncio.to_thread(lab.dockerd.kill)
    await asyncio.to_thread(lab.dockerd.start)
    second = await lab.open()
    seen = await ended(second, workload.id)
    assert (seen.phase, seen.is_system_fault) == (RunPhase.VANISHED, True)


@pytest.mark.parametrize("has_agent", [True, False])
async def test_what_an_engine_took_along_for_which_somebody_else_listens(
    mortal_lab: Lab, *, has_agent: bool
) -> None:
    """As systemd does by Docker's own unit: the process at the socket's other end is as old as the
    machine, and says nothing of the engine."""
    lab = mortal_lab
    with tempfile.TemporaryDirectory(prefix="bp-", dir="/tmp") as directory:
        async with fault_proxy(Path(directory) / "s", lab.dockerd.socket) as proxy:
            engine = await lab.open(proxy.host)
            workload = lab.workload("echo x; sleep 3600")
            await engine.start(workload)
            await until(lambda: output(workload) == "x\n")
            if not has_agent:
                await engine.close(keep_running=True)
            await asyncio.to_thread(lab.dockerd.kill)
            await asyncio.to_thread(lab.dockerd.start)
            if not has_agent:
                engine = await lab.open(proxy.host)
            seen = await ended(engine, workload.id)
            assert (seen.phase, seen.is_system_fault) == (RunPhase.VANISHED, True)
            await engine.close(keep_running=True)


async def test_an_engine_that_stands_still_for_a_while(mortal_lab: Lab) -> None:
    """It answers nobody, then goes on: nothing is lost, nothing is taken for ended."""
    lab = mortal_lab
    engine = await lab.open()
    workload = lab.workload(TICKS % 40, resources=Resources(memory_bytes=1 << 26))
    await engine.start(workload)
    await until(lambda: "line 2\n" in output(workload))
    lab.dockerd.pause()
    be_patient(engine, 1.0)
    try:
        assert not (await engine.health()).is_available
    finally:
        be_patient(engine, 20.0)
        lab.dockerd.resume()
    seen = await engine.observe(workload.id)
    while seen.phase is RunPhase.RUNNING:
        seen = await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX)
    assert seen.exit_code == 0
    assert output(workload) == numbers(40)


async def test_an_end_while_the_engine_was_away_is_true_and_says_what_the_log_lacks(
    mortal_lab: Lab,
) -> None:
    """What a container wrote while there was no engine goes with its pipe."""
    lab = mortal_lab
    lab.dockerd.config = {"live-restore": True}
    await asyncio.to_thread(lab.dockerd.end)
    await asyncio.to_thread(lab.dockerd.start)
    gate = lab.root / "gate"
    gate.mkdir()
    script = "echo before; until [ -e /gate/go ]; do sleep 0.05; done; echo after; touch /gate/end"
    engine = await lab.open()
    mounts = (Mount(gate, "/gate", read_only=False),)
    alone = lab.workload(f"{script}; exit 3", mounts=mounts)
    goes_on = lab.workload("until [ -e /gate/on ]; do sleep 0.05; done; echo end", mounts=mounts)
    await engine.start(alone)
    await engine.start(goes_on)
    await until(lambda: output(alone) == "before\n")
    process = Path(f"/proc/{lab.inspect(alone)['State']['Pid']}")
    await asyncio.to_thread(lab.dockerd.kill)
    try:
        (gate / "go").touch()
        await until((gate / "end").exists)
        await until(lambda: not process.exists())
    finally:
        await asyncio.to_thread(lab.dockerd.start)
        lab.dockerd.config = {}
    seen = await ended(engine, alone.id)
    assert (seen.phase, seen.exit_code, seen.reason) == (RunPhase.EXITED, 3, "")
    assert seen.message.startswith("exit code 3; it ended while the Docker engine was away; ")
    (gate / "on").touch()
    seen = await ended(engine, goes_on.id)
    assert seen.exit_code == 0
    assert output(goes_on) == "end\n"
