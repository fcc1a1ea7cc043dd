"""An engine that misbehaves: hangs, refuses, lies. Through a proxy on a real engine's socket."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from bacalhau.engines.docker.client import EngineClient
from bacalhau.system import SystemClock
from bacalhau_api.errors import TransientError, UnavailableError
from bacalhau_controllers.runner.guard import ENGINE_FAULT, GuardedEngine
from bacalhau_controllers.runner.ports import RunPhase
from bacalhau_controllers.runner.state import Limits
from tests.support.docker_faults import FaultProxy, fault_proxy
from tests.support.docker_lab import SECONDS_MAX, Lab, be_patient, output, run, until
from tests.support.dockerd import Dockerd

START = r"POST .*/start"
INSPECT = r"GET .*/containers/[^/]+/json"
LIST = r"GET .*/containers/json"
EVENTS = r"GET .*/events"
LOGS = r"GET .*/logs"
LONG, SHORT = 20.0, 5.0


@pytest.fixture
async def proxy(lab: Lab) -> AsyncIterator[FaultProxy]:
    """A proxy on the engine's socket, behaving well so far."""
    with tempfile.TemporaryDirectory(prefix="bp-", dir="/tmp") as directory:
        async with fault_proxy(Path(directory) / "s", lab.dockerd.socket) as made:
            yield made


async def test_a_wedged_engine_is_noticed_while_it_still_answers(
    lab: Lab, proxy: FaultProxy
) -> None:
    """Starts hang, questions are answered. What runs is not harmed; the node says what is wrong;
    and when the engine is well again, the very same run starts, once."""
    engine = await lab.open(proxy.host)
    guard = GuardedEngine("docker", engine, SystemClock(), Limits(), starts_max=4)
    await guard.check()
    running = lab.workload("sleep 3600")
    await guard.start(running)
    fault = proxy.add(START, "hang")
    be_patient(engine, SHORT)
    stuck = lab.workload("echo once")
    with pytest.raises(UnavailableError) as caught:
        await asyncio.wait_for(guard.start(stuck), SECONDS_MAX)
    assert caught.value.reason == ENGINE_FAULT
    await guard.check()
    assert (await engine.health()).is_available, "it answers questions, and so seems well"
    assert not guard.capability.available
    assert guard.capability.reason.startswith(ENGINE_FAULT)
    with pytest.raises(UnavailableError):  # others need not hang as well
        await guard.start(lab.workload("true"))
    assert fault.hits == 1
    assert (await guard.observe(running.id)).phase is RunPhase.RUNNING
    assert (await guard.observe(stuck.id)).phase is RunPhase.ABSENT
    assert (await guard.stop(running.id, 0.0)).reason == "Killed"
    proxy.heal()
    be_patient(engine, LONG)
    assert (await run(engine, stuck)).exit_code == 0
    assert output(stuck) == "once\n"


async def test_an_engine_that_is_replaced_by_a_newer_one_is_spoken_to_in_its_version(
    lab: Lab, proxy: FaultProxy
) -> None:
    """What runs goes on (live-restore), and so does the agent, which spoke the old one's API."""
    older = proxy.add(r"GET /version", "lie", body={"ApiVersion": "1.40"})
    engine = await lab.open(proxy.host)
    running = lab.workload("echo begun; sleep 5; exit 3")
    await engine.start(running)
    assert proxy.count(r"/v1\.40/")
    older.count = 0
    words = "client version 1.40 is too old. Minimum supported API version is 1.41"
    proxy.add(r"/v1\.40/", "error", status=400, body={"message": words})
    assert (await run(engine, lab.workload("exit 4"))).exit_code == 4
    assert (await asyncio.wait_for(engine.wait(running.id), SECONDS_MAX)).exit_code == 3
    assert output(running) == "begun\n"
    assert (await engine.health()).is_available


async def test_threads_that_hang_are_bounded_and_hold_up_nothing_else(
    lab: Lab, proxy: FaultProxy
) -> None:
    engine = await lab.open(proxy.host, starts_max=2)
    ended = lab.workload("exit 4")
    assert (await run(engine, ended)).exit_code == 4
    fault = proxy.add(START, "hang")
    be_patient(engine, 2.0)
    starts = [asyncio.create_task(engine.start(lab.workload("true"))) for _ in range(5)]
    done = await asyncio.wait_for(asyncio.gather(*starts, return_exceptions=True), SECONDS_MAX)
    assert all(isinstance(error, UnavailableError) for error in done)
    assert fault.peak <= 2
    be_patient(engine, LONG)
    assert (await asyncio.wait_for(engine.observe(ended.id), SECONDS_MAX)).exit_code == 4
    assert (await engine.health()).is_available


async def test_many_streams_leave_room_for_calls(dockerd: Dockerd) -> None:
    """A log for each of many containers, and a stop gets through all the same."""
    client = EngineClient(dockerd.host, starts_max=2, call_seconds=20.0, start_seconds=20.0)
    async with AsyncExitStack() as streams:
        streams.push_async_callback(client.close)
        for _ in range(150):
            await streams.enter_async_context(client.stream("/events", {}))
        raw = [client.raw("/events", {}, may_pause=True) for _ in range(150)]
        reading = [asyncio.create_task(anext(one)) for one in raw]
        try:
            assert (await client.ask("info"))["OSType"] == "linux"
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
            for one in raw:
                await one.aclose()


async def test_a_start_whose_answer_is_lost_is_found_and_not_repeated(
    lab: Lab, proxy: FaultProxy
) -> None:
    engine = await lab.open(proxy.host)
    workload = lab.workload("echo once; sleep 3600")
    proxy.add(START, "late")
    be_patient(engine, SHORT)
    with pytest.raises(UnavailableError):
        await engine.start(workload)
    be_patient(engine, LONG)
    await until(lambda: lab.inspect(workload)["State"]["Status"] == "running", "its begin")
    assert (await engine.observe(workload.id)).phase is RunPhase.RUNNING
    await engine.start(workload)
    await until(lambda: output(workload) == "once\n", "its log")
    assert proxy.count(START) == 1


async def test_a_create_whose_answer_is_lost(lab: Lab, proxy: FaultProxy) -> None:
    engine = await lab.open(proxy.host)
    workload = lab.workload("echo once")
    proxy.add(r"POST .*/containers/create", "late", count=1)
    be_patient(engine, SHORT)
    with pytest.raises(UnavailableError):
        await engine.start(workload)
    be_patient(engine, LONG)
    assert (await engine.observe(workload.id)).phase is RunPhase.ABSENT
    assert (await run(engine, workload)).exit_code == 0
    assert output(workload) == "once\n"


async def test_an_engine_that_refuses_is_tried_again(lab: Lab, proxy: FaultProxy) -> None:
    engine = await lab.open(proxy.host)
    for pattern in (START, r"POST .*/containers/create"):
        workload = lab.workload("echo once")
        proxy.add(pattern, "error", count=1)
        with pytest.raises(TransientError, match="it went wrong"):
            await engine.start(workload)
        assert (await run(engine, workload)).exit_code == 0
        assert output(workload) == "once\n"


async def test_lies_are_not_believed(lab: Lab, proxy: FaultProxy) -> None:
    """One wrong answer is not enough for an end: what runs goes on, and its end is the true one."""
    engine = await lab.open(proxy.host)
    workload = lab.workload("sleep 2; echo end; exit 3")
    await engine.start(workload)
    fault = proxy.add(INSPECT, "lie", body={"State": {}})
    with pytest.raises(TransientError):
        await engine.observe(workload.id)
    proxy.faults.remove(fault)
    proxy.add(INSPECT, "error", status=404, count=3)
    proxy.add(LIST, "lie", body=[], count=1)
    await engine.start(workload)
    await engine.stop("job-of-another-0.0", 0.0)
    seen = await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX)
    assert (seen.phase, seen.exit_code) == (RunPhase.EXITED, 3)
    assert output(workload) == "end\n"


async def test_a_container_that_the_engine_lost_sight_of_does_not_run_beside_its_successor(
    lab: Lab, proxy: FaultProxy
) -> None:
    """An engine that is killed while it starts a container may leave it running, and say later that
    it was never started."""
    engine = await lab.open(proxy.host)
    workload = lab.workload("echo begin; exec sleep 3600")
    await engine.start(workload)
    await until(lambda: output(workload) == "begin\n")
    await engine.close(keep_running=True)
    found = lab.inspect(workload)
    zero = "0001-01-01T00:00:00Z"
    unborn = {"Status": "created", "StartedAt": zero, "FinishedAt": zero}
    (lab.bench.state / "runs" / workload.id / "started").unlink()
    listed = {"Labels": found["Config"]["Labels"], "State": "created"}
    faults = [
        proxy.add(LIST, "lie", body=[listed]),
        proxy.add(INSPECT, "lie", body=found | {"State": unborn}),
    ]
    second = await lab.open(proxy.host)
    process = Path(f"/proc/{found['State']['Pid']}")
    await until(process.exists)
    assert (await second.observe(workload.id)).phase is RunPhase.ABSENT
    await until(lambda: not process.exists(), "its end")
    for fault in faults:
        proxy.faults.remove(fault)
    await second.remove(workload.id)
    await second.start(workload)
    after = lab.inspect(workload)
    assert after["Id"] != found["Id"]
    assert (await second.observe(workload.id)).phase is RunPhase.RUNNING


async def test_an_answer_that_is_no_json(lab: Lab, proxy: FaultProxy) -> None:
    engine = await lab.open(proxy.host)
    workload = lab.workload("sleep 3600")
    await engine.start(workload)
    # For all who ask: the watch over the run may ask at the same time.
    fault = proxy.add(INSPECT, "lie", body=b"<html>")
    with pytest.raises(TransientError):
        await engine.observe(workload.id)
    proxy.faults.remove(fault)
    assert (await engine.observe(workload.id)).phase is RunPhase.RUNNING


async def test_an_end_is_heard_of_without_events_and_logs_have_no_hole(
    lab: Lab, proxy: FaultProxy
) -> None:
    proxy.add(EVENTS, "hang")
    proxy.add(LOGS, "cut", count=3)
    engine = await lab.open(proxy.host)
    workload = lab.workload("seq 1000; exit 6")
    seen = await run(engine, workload)
    assert seen.exit_code == 6
    assert output(workload).split() == [str(n) for n in range(1, 1001)]


async def test_a_log_that_hangs_does_not_hold_up_the_end(lab: Lab, proxy: FaultProxy) -> None:
    """The end is the true one, and says what is missing."""
    proxy.add(LOGS, "hang")
    engine = await lab.open(proxy.host, call_seconds=3.0)
    workload = lab.workload("seq 10; exit 6")
    seen = await run(engine, workload)
    assert (seen.phase, seen.exit_code, seen.reason) == (RunPhase.EXITED, 6, "")
    assert seen.message.startswith("exit code 6; its log could not be read to its end: ")


async def test_a_stop_that_hangs_is_said_and_repeated(lab: Lab, proxy: FaultProxy) -> None:
    engine = await lab.open(proxy.host)
    workload = lab.workload("sleep 3600")
    await engine.start(workload)
    proxy.add(r"POST .*/kill", "hang")
    be_patient(engine, SHORT)
    with pytest.raises(UnavailableError):
        await engine.stop(workload.id, 0.0)
    be_patient(engine, LONG)
    assert (await engine.observe(workload.id)).phase is RunPhase.RUNNING
    proxy.heal()
    await engine.stop(workload.id, 0.0)
    seen = await engine.observe(workload.id)
    assert (seen.exit_code, seen.reason) == (137, "Killed")


async def test_no_engine_at_all_is_said_with_the_remedy(lab: Lab) -> None:
    guard = GuardedEngine(
        "docker", lab.engine("unix:///nowhere/docker.sock"), SystemClock(), Limits(), starts_max=1
    )
    await guard.check()
    assert not guard.capability.available
    assert guard.capability.reason.startswith("not installed")
    assert "--docker-host" in guard.capability.reason
    lab.engines.clear()
