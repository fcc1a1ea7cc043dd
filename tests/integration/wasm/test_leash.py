"""Policy `stop` with real workers: a run on a leash ends by itself when the node was cut off for too
long, whoever of agent and fork server is still alive."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bacalhau.engines.leash import note
from bacalhau.engines.processes import ProcessId
from bacalhau.engines.wasm import WasmEngine, records
from bacalhau.system import SystemClock
from bacalhau_controllers.runner.ports import Leash, Observation, RunPhase
from tests.support.engines import Bench

BOOT = "this-boot"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A place for runs."""
    return Bench(tmp_path.resolve())


@pytest.fixture
async def engine(bench: Bench) -> AsyncIterator[WasmEngine]:
    """An open engine; afterwards nothing of it runs."""
    made = WasmEngine(bench.state, SystemClock())
    await made.open()
    yield made
    with contextlib.suppress(Exception):
        await made.close(keep_running=False)


def now() -> float:
    """By the clock of leashes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def leash(bench: Bench, seconds: float) -> Leash:
    """From now on."""
    return Leash(seconds, now(), BOOT, bench.root / "contact")


def started(bench: Bench, run: str) -> records.Started:
    """Who runs it."""
    found = records.read_started(bench.state / "runs" / run)
    assert found is not None
    return found


async def end(engine: WasmEngine, run: str) -> Observation:
    """How it ends."""
    return await asyncio.wait_for(engine.wait(run), 30)


async def warm_up(engine: WasmEngine, bench: Bench) -> None:
    """Have the module compiled: a leash counts from before the start."""
    first = bench.wasm("hello")
    await engine.start(first)
    assert (await end(engine, first.id)).exit_code == 0


@pytest.mark.parametrize("program", ["loop", "hello"])
async def test_ends_when_nothing_is_heard(engine: WasmEngine, bench: Bench, program: str) -> None:
    """A guest that computes, and one that sleeps."""
    began = now()
    made = bench.wasm(program, "--tick", "10000", leash=leash(bench, 2.0))
    await engine.start(made)
    seen = await end(engine, made.id)
    assert (seen.phase, seen.reason) == (RunPhase.EXITED, "Disconnected")
    assert not seen.is_system_fault
    assert seen.exit_code == 137
    assert "cut off for more than 2 s" in seen.message
    assert now() - began >= 2.0


async def test_goes_on_while_contact_is_noted(engine: WasmEngine, bench: Bench) -> None:
    made = bench.wasm("hello", "--tick", "120", leash=leash(bench, 4.0))  # about six seconds

    async def run() -> Observation:
        await engine.start(made)
        return await end(engine, made.id)

    # Also while it starts, which takes a busy machine some seconds.
    waiting = asyncio.create_task(run())
    while not waiting.done():
        note(bench.root / "contact", BOOT, now())
        await asyncio.wait([waiting], timeout=0.3)
    assert (await waiting).exit_code == 0


async def test_contacts_of_another_boot_do_not_count(engine: WasmEngine, bench: Bench) -> None:
    note(bench.root / "contact", "another-boot", now() + 1000)
    made = bench.wasm("loop", leash=leash(bench, 1.0))
    await engine.start(made)
    assert (await end(engine, made.id)).reason == "Disconnected"


async def test_ends_without_agent_and_fork_server(engine: WasmEngine, bench: Bench) -> None:
    made = bench.wasm("loop", leash=leash(bench, 2.0))
    await engine.start(made)
    os.kill(started(bench, made.id).zygote, signal.SIGKILL)
    await engine.close(keep_running=True)  # nobody is left who could end it
    worker = started(bench, made.id).process
    deadline = time.monotonic() + 30
    while _runs(worker):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    successor = WasmEngine(bench.state, SystemClock())
    await successor.open()
    try:
        assert (await successor.observe(made.id)).reason == "Disconnected"
    finally:
        await successor.close(keep_running=False)


async def test_suspended_worker_ends_soon_after_it_wakes(engine: WasmEngine, bench: Bench) -> None:
    await warm_up(engine, bench)
    made = bench.wasm("hello", "--tick", "10000", leash=leash(bench, 3.0))
    await engine.start(made)
    worker = started(bench, made.id).process
    os.kill(worker.pid, signal.SIGSTOP)
    await asyncio.sleep(4.0)
    assert (await engine.observe(made.id)).phase is RunPhase.RUNNING
    os.kill(worker.pid, signal.SIGCONT)
    assert (await end(engine, made.id)).reason == "Disconnected"


async def test_ends_although_nothing_can_be_written(engine: WasmEngine, bench: Bench) -> None:
    """As on a full disk: the guest ends, and the fork server writes down why once it can."""
    made = bench.wasm("loop", leash=leash(bench, 1.0))
    await engine.start(made)
    worker = started(bench, made.id).process
    directory = bench.state / "runs" / made.id
    (directory / f".exit.json.{worker.pid}").mkdir()  # in the way of the record
    seen = await end(engine, made.id)
    assert (seen.phase, seen.reason) == (RunPhase.EXITED, "Disconnected")


async def test_what_ended_before_keeps_its_end(engine: WasmEngine, bench: Bench) -> None:
    await warm_up(engine, bench)
    made = bench.wasm("hello", "--exit", "3", leash=leash(bench, 3.0))
    await engine.start(made)
    assert (await end(engine, made.id)).exit_code == 3
    await asyncio.sleep(3.5)
    assert (await engine.observe(made.id)).exit_code == 3


def _runs(process: ProcessId) -> bool:
    stat = process.stat()
    return stat is not None and stat.state not in "ZX"
