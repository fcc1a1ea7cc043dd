"""The policy `stop`, with an agent that is dead when the time has come."""

import os
import time
from pathlib import Path

from bacalhau.engines.wasm import records
from tests.e2e.cluster import Cluster, left_over
from tests.e2e.test_thread import PROGRAMS, apply, objects, wasm_job

AFTER_SECONDS, NODE_TIMEOUT_SECONDS = 1, 3
"""A limit below the timeout of nodes counts as that."""


def _worker(root: Path) -> int:
    """The process id of the one worker that runs below a data directory."""
    (directory,) = (root / "node" / "engines" / "wasm" / "runs").iterdir()
    started = records.read_started(directory)
    assert started is not None
    return started.process.pid


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_work_ends_in_time_without_its_agent(tmp_path: Path) -> None:
    """Nobody is left to end the worker, so it ends itself; and is begun anew once its agent is
    back."""
    fleet = Cluster(tmp_path)
    fleet.orchestrator.args += ["--node-timeout", str(NODE_TIMEOUT_SECONDS)]
    fleet.start(["edge-1"], args=["--allow-path", f"{PROGRAMS}/**", "--on-exit", "stop"])
    try:
        job = wasm_job("counted", "--tick", "100000", count=1)
        job["spec"]["disconnect"] = {"action": "stop", "afterSeconds": AFTER_SECONDS}
        apply(fleet, job)
        fleet.run("wait", "counted", "--for", "running", "--timeout", "60")
        agent = fleet.agents["edge-1"]
        pid = _worker(agent.data_dir)
        os.kill(pid, 0)
        time.sleep(2 * NODE_TIMEOUT_SECONDS)  # with its agent alive it goes on, however long
        assert _is_alive(pid)
        agent.kill()
        killed = time.monotonic()
        while _is_alive(pid):
            assert time.monotonic() - killed < 30
            time.sleep(0.05)
        assert objects(fleet, "executions", "counted")[0]["status"]["report"]["phase"] == "Running"
        agent.start()
        deadline = time.monotonic() + 60
        while len(found := objects(fleet, "executions", "counted")) < 2:
            assert time.monotonic() < deadline, found
        first = min(found, key=lambda e: e["spec"].get("attempt", 0))["status"]["report"]
        assert (first["phase"], first["reason"]) == ("Stopped", "Disconnected")
        fleet.run("delete", "job", "counted")
    finally:
        fleet.close()
    assert left_over(tmp_path) == []
