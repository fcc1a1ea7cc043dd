"""The thread from `apply` to a downloaded result, with real processes, and through kill -9."""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bacalhau.client import AsyncClient
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.v1.job import (
    Job,
    JobPhase,
    JobSpec,
    JobType,
    Resources,
    RetryPolicy,
    SpecConfig,
    Task,
)
from tests.e2e.cluster import Cluster, left_over, nats_pid

PROGRAMS = Path(__file__).parent.parent / "programs"
PARTITIONS = 4
AGENTS = ("edge-1", "edge-2")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An orchestrator and two agents; afterwards nothing of them may be left."""
    fleet = Cluster(tmp_path_factory.mktemp("fleet"))
    fleet.start(AGENTS, args=["--allow-path", f"{PROGRAMS}/**", "--on-exit", "stop"])
    yield fleet
    assert fleet.close() == []


def wasm_job(name: str, *arguments: str, count: int = PARTITIONS) -> dict[str, Any]:
    """A batch job of the hello program."""
    return {
        "apiVersion": "bacalhau.org/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "type": "batch",
            "count": count,
            "tasks": [
                {
                    "name": "main",
                    "engine": {
                        "type": "wasm",
                        "params": {"entryModule": "/app/hello.wasm", "parameters": arguments},
                    },
                    "inputSources": [
                        {
                            "source": {
                                "type": "local",
                                "params": {"sourcePath": str(PROGRAMS / "hello.wasm")},
                            },
                            "target": "/app/hello.wasm",
                        }
                    ],
                    "publisher": {"type": "local"},
                }
            ],
        },
    }


def apply(cluster: Cluster, job: dict[str, Any]) -> None:
    """Submit, as a file."""
    file = cluster.root / f"{job['metadata']['name']}.json"
    file.write_text(json.dumps(job))
    cluster.run("apply", "-f", str(file))


def objects(cluster: Cluster, kind: str, job: str) -> list[dict[str, Any]]:
    """The objects of one kind that belong to a job."""
    found: dict[str, Any] = json.loads(cluster.run("get", kind, "-o", "json").stdout)
    return [item for item in found["items"] if item["spec"]["job"] == job]


def test_job_to_downloaded_result(cluster: Cluster) -> None:
    apply(cluster, wasm_job("hello", "one", "two"))
    cluster.run("wait", "hello", "--for", "delivered", "--timeout", "60")
    executions = objects(cluster, "executions", "hello")
    assert {e["spec"]["slot"].get("partition", 0) for e in executions} == set(range(PARTITIONS))
    assert {e["spec"]["node"] for e in executions} == set(AGENTS), "work is spread"
    out = cluster.root / "out"
    cluster.run("download", "hello", "-o", str(out))
    text = "".join(p.read_text() for p in out.rglob("stdout"))
    assert text.count("hello one two") >= PARTITIONS
    assert cluster.run("logs", "hello").stdout.count("hello one two") == PARTITIONS


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("victim", ["orchestrator", "nats", "agent", "everything"])
def test_kill9_at_a_random_moment(cluster: Cluster, victim: str, seed: int) -> None:
    """Whatever is killed in the middle of a job, the same results are accepted after a restart,
    and no attempt is made twice."""
    name = f"ticks-{victim}-{seed}"
    apply(cluster, wasm_job(name, "--tick", "10"))  # about one second each
    time.sleep(random.Random(f"{victim}-{seed}").uniform(0, 1.2))
    agent = cluster.agents["edge-1"]
    if victim in ("orchestrator", "everything"):
        cluster.orchestrator.kill()
    if victim == "nats":
        os.kill(nats_pid(cluster.root), signal.SIGKILL)
    if victim in ("agent", "everything"):
        agent.kill()
    if victim in ("orchestrator", "everything"):
        cluster.orchestrator.start()
    if victim in ("agent", "everything"):
        agent.start()
    cluster.run("wait", name, "--for", "delivered", "--timeout", "90")
    acceptances = objects(cluster, "acceptances", name)
    slots = sorted(a["spec"]["slot"].get("partition", 0) for a in acceptances)
    assert slots == list(range(PARTITIONS)), "one accepted result for each partition"
    executions = objects(cluster, "executions", name)
    assert len(executions) == PARTITIONS, "no second attempt was needed"
    runs = {e["metadata"]["name"]: e["status"]["report"]["run"] for e in executions}
    assert set(runs.values()) == {1}, f"something was run twice: {runs}"
    # Followed, it waits for nodes that have yet to come back.
    logs = cluster.run("logs", "--follow", name).stdout
    assert logs.count("tick 9") == PARTITIONS, logs


def test_a_failing_job_is_not_exit_0(cluster: Cluster) -> None:
    job = wasm_job("fails", "--exit", "3", count=1)
    job["spec"]["retry"] = {"attempts": 1}
    apply(cluster, job)
    done = cluster.run("wait", "fails", "--timeout", "60", check=False)
    assert done.returncode == 3
    explained = cluster.run("explain", "job", "fails").stdout
    assert "exit" in explained
    assert "3" in explained


def test_nothing_is_left_when_an_agent_was_killed(tmp_path: Path) -> None:
    fleet = Cluster(tmp_path)
    fleet.start(["edge-1"], args=["--allow-path", f"{PROGRAMS}/**", "--on-exit", "stop"])
    try:
        apply(fleet, wasm_job("long", "--tick", "600", count=2))
        fleet.run("wait", "long", "--for", "running", "--timeout", "60")
        fleet.agents["edge-1"].kill()
        fleet.agents["edge-1"].start()
        fleet.run("stop", "long")
        fleet.run("delete", "job", "long")
        assert objects(fleet, "executions", "long") == []
    finally:
        fleet.close()
    assert left_over(tmp_path) == []


def noop_job(number: int) -> Job:
    """Every tenth fails on purpose."""
    code = 1 if number % 10 == 0 else 0
    engine = SpecConfig(type="noop", params={"durationSeconds": 0.01, "exitCode": code})
    return Job(
        metadata=ObjectMeta(name=f"noop-{number}"),
        spec=JobSpec(
            type=JobType.BATCH,
            tasks=(Task(engine=engine, resources=Resources(cpu_millis=1, memory_bytes=1 << 20)),),
            retry=RetryPolicy(attempts=1),
        ),
    )


async def test_a_thousand_jobs_at_once(cluster: Cluster) -> None:
    """All end, and those that failed on purpose, and only they, are reported as failed."""
    jobs = [noop_job(number) for number in range(1000)]
    gate = asyncio.Semaphore(64)
    async with AsyncClient(cluster.server) as client:

        async def submit(job: Job) -> None:
            async with gate:
                await client.apply(job)

        await asyncio.gather(*(submit(job) for job in jobs))
        deadline = time.monotonic() + 90
        while True:
            found = [j async for j in client.list(Job) if j.name.startswith("noop-")]
            if len(found) == 1000 and all(j.status.phase.is_final for j in found):
                break
            assert time.monotonic() < deadline, "not all jobs ended"
            await asyncio.sleep(0.2)
    failed = {j.name for j in found if j.status.phase is JobPhase.FAILED}
    assert failed == {f"noop-{number}" for number in range(0, 1000, 10)}
    assert all(j.status.phase is JobPhase.COMPLETED for j in found if j.name not in failed)
    assert all("exit code 1" in j.status.message for j in found if j.name in failed)
