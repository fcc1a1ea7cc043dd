"""The noop engine's own parameters, and its runs across agents and reboots."""

import asyncio
import json
from pathlib import Path

import pytest

from bacalhau.engines import noop
from bacalhau.engines.noop import NoopEngine
from bacalhau.system import SystemClock
from bacalhau_controllers.runner.ports import Mount, RunPhase
from tests.support.engines import Bench
from tests.support.simclock import SimClock, simulate


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path.resolve())


async def opened(bench: Bench) -> NoopEngine:
    engine = NoopEngine(bench.state, SystemClock())
    await engine.open()
    return engine


@pytest.mark.parametrize(
    ("params", "attempt", "code"),
    [
        ({}, "0", 0),
        ({"exitCode": 7}, "3", 7),
        ({"failOnAttempts": [0, 1]}, "0", 1),
        ({"failOnAttempts": [0, 1]}, "1", 1),
        ({"failOnAttempts": [0, 1]}, "2", 0),
        ({"failOnAttempts": [0], "exitCode": 9}, "0", 9),
        ({"failOnAttempts": [0], "exitCode": 9}, "1", 0),
    ],
)
async def test_exit_codes_by_attempt(
    bench: Bench, params: dict[str, object], attempt: str, code: int
) -> None:
    engine = await opened(bench)
    workload = bench.workload(params, env={"BACALHAU_ATTEMPT": attempt})
    await engine.start(workload)
    assert (await engine.wait(workload.id)).exit_code == code
    await engine.close(keep_running=False)


async def test_output(bench: Bench) -> None:
    engine = await opened(bench)
    outputs = bench.root / "outputs"
    outputs.mkdir()
    workload = bench.workload(
        {"stdout": "out\n", "stderr": "err\n", "outputBytes": 5000},
        mounts=[Mount(bench.root, "/in"), Mount(outputs, "/outputs", read_only=False)],
    )
    await engine.start(workload)
    assert workload.stdout.read_text() == "out\n"
    assert workload.stderr.read_text() == "err\n"
    assert (outputs / "output.bin").stat().st_size == 5000
    plain = bench.workload({"outputBytes": 100_000})
    await engine.start(plain)
    assert plain.stdout.stat().st_size == 100_000
    await engine.close(keep_running=False)


def test_thousands_at_once_in_simulated_time(bench: Bench) -> None:
    async def main(clock: SimClock) -> None:
        engine = NoopEngine(bench.state, clock)
        await engine.open()
        workloads = [bench.workload({"durationSeconds": n % 100 + 1}) for n in range(3000)]
        for workload in workloads:
            await engine.start(workload)
        began = clock.monotonic()
        seen = await asyncio.gather(*(engine.wait(w.id) for w in workloads))
        assert {s.phase for s in seen} == {RunPhase.EXITED}
        assert 100 <= clock.monotonic() - began < 101
        for one in seen:
            assert one.started_at is not None
            assert one.finished_at is not None
        await engine.close(keep_running=False)

    simulate(main)


async def test_run_ends_while_no_agent_was_there(bench: Bench) -> None:
    first = await opened(bench)
    workload = bench.workload({"durationSeconds": 0.05, "exitCode": 4})
    await first.start(workload)
    await first.close(keep_running=True)
    second = await opened(bench)
    seen = await second.wait(workload.id)
    assert (seen.phase, seen.exit_code) == (RunPhase.EXITED, 4)
    await second.close(keep_running=False)


async def test_run_is_cut_by_a_reboot(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await opened(bench)
    cut, ended = bench.workload({"durationSeconds": 3600}), bench.workload({"exitCode": 3})
    await first.start(cut)
    await first.start(ended)
    await first.close(keep_running=True)
    monkeypatch.setattr(noop, "boot_id", lambda: "the next boot")
    second = await opened(bench)
    assert (await second.wait(cut.id)).phase is RunPhase.VANISHED
    assert (await second.observe(ended.id)).exit_code == 3
    await second.remove(cut.id)
    await second.close(keep_running=False)


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"boot": "x"})])
async def test_spoilt_file_is_a_run_that_vanished(bench: Bench, text: str) -> None:
    first = await opened(bench)
    await first.close(keep_running=True)
    (bench.state / "runs" / "spoilt.json").write_text(text)
    second = await opened(bench)
    assert (await second.observe("spoilt")).phase is RunPhase.VANISHED
    await second.stop("spoilt", 0)
    await second.remove("spoilt")
    assert list(await second.list()) == []
    await second.close(keep_running=False)
