"""Policy `stop` with real containers: a run on a leash ends when the node was cut off for too long,
whether or not the agent lives."""

import asyncio
import threading
import time
from dataclasses import replace

from bacalhau.engines.docker import DockerEngine
from bacalhau.engines.leash import note
from bacalhau_controllers.runner.ports import Leash, RunPhase, Workload
from tests.support.docker_lab import SECONDS_MAX, Lab, until

BOOT = "this-boot"


def on_leash(lab: Lab, seconds: float) -> Workload:
    """A run that would go on for ever."""
    contact = time.clock_gettime(time.CLOCK_BOOTTIME)
    leash = Leash(seconds, contact, BOOT, lab.root / "contact")
    return replace(lab.workload("sleep 3600"), leash=leash)


async def test_ends_without_an_agent(lab: Lab, engine: DockerEngine) -> None:
    workload = on_leash(lab, 4.0)
    free = lab.workload("sleep 3600")
    began = time.monotonic()
    await engine.start(workload)
    await engine.start(free)
    await engine.close(keep_running=True)
    await until(lambda: lab.inspect(workload)["State"]["Status"] == "exited", "its end")
    assert time.monotonic() - began >= 4.0
    second = await lab.open()
    seen = await asyncio.wait_for(second.wait(workload.id), SECONDS_MAX)
    assert (seen.phase, seen.exit_code, seen.reason) == (RunPhase.EXITED, 137, "Disconnected")
    assert "cut off for more than 4 s" in seen.message
    assert (await second.observe(free.id)).phase is RunPhase.RUNNING


async def test_goes_on_while_contact_is_noted(lab: Lab, engine: DockerEngine) -> None:
    workload = on_leash(lab, 8.0)
    is_over = threading.Event()

    def keep_contact() -> None:
        while not is_over.wait(0.2):
            note(lab.root / "contact", BOOT, time.clock_gettime(time.CLOCK_BOOTTIME))

    contact = threading.Thread(target=keep_contact)
    contact.start()
    try:
        await engine.start(workload)
        await asyncio.sleep(9.0)
        assert (await engine.observe(workload.id)).phase is RunPhase.RUNNING
    finally:
        is_over.set()
        contact.join()
