"""What every engine must do, whatever it runs. Add an engine by giving it a rig."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bacalhau.engines.logfile import LogReader
from bacalhau_api.errors import TerminalError, TransientError
from bacalhau_controllers.runner.ports import Engine, RunPhase, Workload
from tests.support.dockerd import Dockerd
from tests.support.engines import RIGS, Bench, DockerRig, Rig

SECONDS_MAX = 30.0


@pytest.fixture(params=RIGS)
def rig(request: pytest.FixtureRequest) -> Rig:
    rig = RIGS[request.param]
    if isinstance(rig, DockerRig):
        engine: Dockerd = request.getfixturevalue("dockerd")
        rig.host = engine.host
    return rig


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path.resolve())


@pytest.fixture
async def engine(rig: Rig, bench: Bench) -> AsyncIterator[Engine]:
    engine = rig.engine(bench)
    await engine.open()
    yield engine
    await engine.close(keep_running=False)


def text(workload: Workload) -> str:
    reader = LogReader(workload.stdout, workload.stderr, workload.log_index)
    return "".join(p.text for p in reader.read("stdout", is_final=True).pieces)


async def test_open_engine_is_well(engine: Engine) -> None:
    assert (await engine.health()).is_available


async def test_run_to_its_end(engine: Engine, rig: Rig, bench: Bench) -> None:
    before = datetime.now(UTC)
    workload = rig.quick(bench)
    await engine.start(workload)
    seen = await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX)
    assert (seen.phase, seen.exit_code, seen.reason) == (RunPhase.EXITED, 0, "")
    assert text(workload).startswith("hello")
    assert await engine.observe(workload.id) == seen
    assert seen.started_at is not None
    assert seen.finished_at is not None
    assert before - timedelta(seconds=1) <= seen.started_at <= seen.finished_at
    assert list(await engine.list()) == [workload.id]


async def test_exit_code_is_an_observation(engine: Engine, rig: Rig, bench: Bench) -> None:
    workload = rig.quick(bench, exit_code=42)
    await engine.start(workload)
    seen = await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX)
    assert (seen.phase, seen.exit_code, seen.is_system_fault) == (RunPhase.EXITED, 42, False)


async def test_unknown_run_is_absent(engine: Engine) -> None:
    assert (await engine.observe("job-x-1-0-0.0")).phase is RunPhase.ABSENT
    assert (await engine.wait("job-x-1-0-0.0")).phase is RunPhase.ABSENT
    await engine.stop("job-x-1-0-0.0", 0.0)
    await engine.remove("job-x-1-0-0.0")
    assert list(await engine.list()) == []


async def test_start_again_leaves_a_running_run_alone(
    engine: Engine, rig: Rig, bench: Bench
) -> None:
    workload = rig.endless(bench)
    await engine.start(workload)
    first = await engine.observe(workload.id)
    await engine.start(workload)
    assert await engine.observe(workload.id) == first
    assert first.phase is RunPhase.RUNNING


async def test_start_again_leaves_an_ended_run_alone(
    engine: Engine, rig: Rig, bench: Bench
) -> None:
    workload = rig.quick(bench, exit_code=3)
    await engine.start(workload)
    first = await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX)
    output = text(workload)
    await engine.start(workload)
    assert await engine.observe(workload.id) == first
    assert text(workload) == output


async def test_start_twice_at_once_runs_once(engine: Engine, rig: Rig, bench: Bench) -> None:
    workload = rig.quick(bench)
    await asyncio.gather(*(engine.start(workload) for _ in range(5)))
    await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX)
    assert text(workload).count("hello") == 1


async def test_stop_ends_a_run_for_good(engine: Engine, rig: Rig, bench: Bench) -> None:
    workload = rig.endless(bench)
    await engine.start(workload)
    waiting = asyncio.create_task(engine.wait(workload.id))
    await asyncio.wait_for(engine.stop(workload.id, 0.0), SECONDS_MAX)
    seen = await engine.observe(workload.id)
    assert (seen.phase, seen.exit_code, seen.reason) == (RunPhase.EXITED, 137, "Killed")
    assert await asyncio.wait_for(waiting, SECONDS_MAX) == seen
    await engine.stop(workload.id, 0.0)
    assert await engine.observe(workload.id) == seen


async def test_stop_leaves_an_ended_run_as_it_was(engine: Engine, rig: Rig, bench: Bench) -> None:
    workload = rig.quick(bench, exit_code=3)
    await engine.start(workload)
    first = await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX)
    await engine.stop(workload.id, 0.0)
    assert await engine.observe(workload.id) == first


async def test_time_limit(engine: Engine, rig: Rig, bench: Bench) -> None:
    workload = rig.endless(bench, timeout_seconds=0.5)
    await engine.start(workload)
    seen = await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX)
    assert (seen.phase, seen.exit_code, seen.reason) == (RunPhase.EXITED, 137, "Timeout")
    assert "0.5 s" in seen.message
    assert not seen.is_system_fault


async def test_output_limit(engine: Engine, rig: Rig, bench: Bench) -> None:
    workload = rig.flood(bench, output_bytes_max=100_000)
    await engine.start(workload)
    seen = await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX)
    assert (seen.phase, seen.reason) == (RunPhase.EXITED, "OutputLimit")
    assert workload.stdout.stat().st_size == 100_000


async def test_wrong_parameters(engine: Engine, rig: Rig, bench: Bench) -> None:
    workload = rig.wrong(bench)
    with pytest.raises(TerminalError) as caught:
        await engine.start(workload)
    assert caught.value.reason == "StartFailed"
    assert (await engine.observe(workload.id)).phase is RunPhase.ABSENT
    assert list(await engine.list()) == []


async def test_remove_forgets(engine: Engine, rig: Rig, bench: Bench) -> None:
    workload = rig.quick(bench)
    await engine.start(workload)
    await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX)
    await engine.remove(workload.id)
    assert (await engine.observe(workload.id)).phase is RunPhase.ABSENT
    assert list(await engine.list()) == []
    await engine.remove(workload.id)


async def test_remove_refuses_a_running_run(engine: Engine, rig: Rig, bench: Bench) -> None:
    workload = rig.endless(bench)
    await engine.start(workload)
    with pytest.raises(TransientError):
        await engine.remove(workload.id)
    assert (await engine.observe(workload.id)).phase is RunPhase.RUNNING


async def test_new_agent_finds_what_runs_and_what_ended(
    engine: Engine, rig: Rig, bench: Bench
) -> None:
    running, ended = rig.endless(bench), rig.quick(bench, exit_code=5)
    await engine.start(running)
    await engine.start(ended)
    end = await asyncio.wait_for(engine.wait(ended.id), SECONDS_MAX)
    await engine.close(keep_running=True)
    second = rig.engine(bench)
    await second.open()
    try:
        assert sorted(await second.list()) == sorted([running.id, ended.id])
        assert (await second.observe(running.id)).phase is RunPhase.RUNNING
        assert await second.observe(ended.id) == end
        waiting = asyncio.create_task(second.wait(running.id))
        await second.stop(running.id, 0.0)
        assert (await asyncio.wait_for(waiting, SECONDS_MAX)).reason == "Killed"
    finally:
        await second.close(keep_running=False)


async def test_close_without_keeping_stops_everything(
    engine: Engine, rig: Rig, bench: Bench
) -> None:
    workloads = [rig.endless(bench) for _ in range(3)]
    for workload in workloads:
        await engine.start(workload)
    await engine.close(keep_running=False)
    second = rig.engine(bench)
    await second.open()
    try:
        for workload in workloads:
            assert (await second.observe(workload.id)).phase is RunPhase.EXITED
    finally:
        await second.close(keep_running=False)


async def test_many_at_once(engine: Engine, rig: Rig, bench: Bench) -> None:
    workloads = [rig.quick(bench, exit_code=n % 7) for n in range(32)]
    await asyncio.gather(*(engine.start(w) for w in workloads))
    seen = await asyncio.gather(
        *(asyncio.wait_for(engine.wait(w.id), SECONDS_MAX) for w in workloads)
    )
    assert [s.exit_code for s in seen] == [n % 7 for n in range(32)]
    assert all(text(w).startswith("hello") for w in workloads)


async def test_every_waiter_hears_of_the_end(engine: Engine, rig: Rig, bench: Bench) -> None:
    workload = rig.endless(bench, timeout_seconds=0.3)
    await engine.start(workload)
    seen = await asyncio.gather(
        *(asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX) for _ in range(10))
    )
    assert {s.reason for s in seen} == {"Timeout"}


async def test_cancelled_wait_leaves_the_run_alone(engine: Engine, rig: Rig, bench: Bench) -> None:
    workload = rig.endless(bench)
    await engine.start(workload)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.wait(workload.id), 0.05)
    assert (await engine.observe(workload.id)).phase is RunPhase.RUNNING
