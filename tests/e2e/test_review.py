"""Plans, rollbacks and quotas with real processes: what was planned is what the nodes then run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bacalhau.client.sync import Client
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import Job
from tests.e2e.cluster import Cluster

JOB = """
apiVersion: bacalhau.org/v1
kind: Job
metadata: {name: %(name)s}
spec:
  type: %(type)s
  count: %(count)s
  tasks: [{name: main, engine: {type: noop, params: {durationSeconds: %(duration)s}}, env: {MODE: %(mode)s}}]
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An orchestrator and two nodes."""
    made = Cluster(tmp_path_factory.mktemp("fleet"))
    made.start(["edge-1", "edge-2"], args=["--on-exit", "stop"])
    yield made
    assert made.close() == []


def write(cluster: Cluster, name: str, **more: Any) -> str:
    """A manifest in a file."""
    values = {"name": name, "type": "batch", "count": 2, "duration": 0, "mode": "x"} | more
    path = Path(cluster.root) / f"{name}.yaml"
    path.write_text(JOB % values)
    return str(path)


def get(cluster: Cluster, what: str, *words: str) -> Any:
    return json.loads(cluster.run("get", what, *words, "-o", "json").stdout)


def executions(cluster: Cluster, job: str) -> list[Any]:
    """The executions of a job."""
    found: list[Any] = get(cluster, "executions", "--field-selector", f"job={job}")["items"]
    return found


def test_what_is_planned_runs_where_it_was_planned(cluster: Cluster) -> None:
    file = write(cluster, "planned")
    planned = cluster.run("plan", "-f", file, "-o", "json", check=False)
    assert planned.returncode == 2, planned.stderr
    plan = json.loads(planned.stdout)
    (item,) = plan["objects"]
    expected = {e["execution"]: e["node"] for e in item["executions"]}
    assert len(expected) == 2
    assert cluster.run("apply", "--plan", plan["token"]).stdout == "job/planned created\n"
    cluster.run("wait", "planned", "--timeout", "60")
    real = {e["metadata"]["name"]: e["spec"]["node"] for e in executions(cluster, "planned")}
    assert real == expected
    assert cluster.run("plan", "-f", file, check=False).returncode == 0


def test_only_what_affects_execution_runs_again_and_rollback_brings_it_back(
    cluster: Cluster,
) -> None:
    file = write(cluster, "again")
    cluster.run("apply", "-f", file, "--wait", "--timeout", "60")
    labelled = Path(file).read_text().replace("{name: again}", "{name: again, labels: {a: b}}")
    Path(file).write_text(labelled)
    cluster.run("apply", "-f", file, "--wait", "--timeout", "60")
    assert len(executions(cluster, "again")) == 2
    Path(file).write_text(labelled.replace("MODE: x", "MODE: y"))
    cluster.run("apply", "-f", file, "--wait", "--timeout", "60")
    assert get(cluster, "job/again")["metadata"]["generation"] == 2
    assert len(executions(cluster, "again")) == 4
    done = cluster.run("rollback", "job/again", "--to", "g1", "-m", "y is wrong")
    assert "generation 3" in done.stdout
    cluster.run("wait", "again", "--timeout", "60")
    assert get(cluster, "job/again")["spec"]["tasks"][0]["env"] == {"MODE": "x"}
    told = cluster.run("history", "job/again", "--changes").stdout
    assert [line.split()[5] for line in told.splitlines()[1:]] == [
        "Created", "Applied", "Applied", "RolledBack",
    ]  # fmt: skip
    assert "y is wrong" in told
    diff = cluster.run("diff", "job/again", "--from", "g2", "--to", "g3", check=False)
    assert diff.returncode == 2
    assert "spec.tasks[main].env.MODE: y -> x" in diff.stdout


def test_a_service_is_planned_to_move_when_its_node_is_lost(cluster: Cluster) -> None:
    file = write(cluster, "steady", type="service", count=1, duration=3600)
    cluster.run("apply", "-f", file, "--wait", "--timeout", "60")
    (execution,) = executions(cluster, "steady")
    node = execution["spec"]["node"]
    (other,) = {"edge-1", "edge-2"} - {node}
    done = cluster.run("simulate", "--without", f"node/{node}", check=False)
    assert done.returncode == 2
    assert f"give up {execution['metadata']['name']} on {node} after 300 s" in done.stdout
    assert f"start slot 0 on {other}" in done.stdout
    assert len(executions(cluster, "steady")) == 1, "nothing happens"
    told = cluster.run("explain", "node", other, "--job", "steady").stdout
    assert f"job steady fits node {other}" in told
    cluster.run("delete", "job", "steady")


def test_a_quota_holds_jobs_back_until_there_is_room(cluster: Cluster) -> None:
    space = Path(cluster.root) / "space.yaml"
    space.write_text(
        "apiVersion: bacalhau.org/v1\nkind: Namespace\nmetadata: {name: small}\n"
        "spec: {quota: {executions: 1}}\n"
    )
    assert cluster.run("apply", "-f", str(space)).stdout == "namespace/small created\n"
    file = write(cluster, "many", count=3)
    planned = cluster.run("plan", "-f", file, "-n", "small", check=False).stdout
    assert "2 slots wait (Quota): namespace small uses 1 of its quota of 1 executions" in planned
    cluster.run("apply", "-f", file, "-n", "small", "--wait", "--timeout", "60")
    assert get(cluster, "job/many", "-n", "small")["status"]["slots"]["succeeded"] == 3


def test_what_a_job_left_outlives_it(cluster: Cluster) -> None:
    """Its result, the end of its log and why it ran there, for as long as the history is kept."""
    text = JOB % {"name": "gone", "type": "batch", "count": 1, "duration": 0, "mode": "x"}
    with Client(cluster.server) as client:
        client.create(text.replace("durationSeconds: 0", "stdout: last words, exitCode: 0"))
        client.wait("gone", timeout_seconds=60)
        (ran,) = client.list(Execution, fields="job=gone")
        client.delete(Job, "gone")
        for kind, name in ((Job, "gone"), (Execution, ran.name)):
            for update in client.watch(kind, fields=f"name={name}", timeout_seconds=60):
                if update.type in ("SYNCED", "DELETED") and not list(
                    client.list(kind, fields=f"name={name}")
                ):
                    break
        told = client.history(Execution, ran.name)
        assert told[-1].removed
        (ended, *_) = [item for item in told if item.phase == "Succeeded"]
        (over, *_) = [
            i for i in client.history(Job, "gone", objects=True) if i.phase == "Completed"
        ]
    then = get(cluster, f"execution/{ran.name}", "--at", ended.time.isoformat())
    report = then["status"]["report"]
    assert (report["exitCode"], report["stdoutTail"]) == (0, "last words")
    assert over.object is not None
    assert over.object["status"]["slots"]["succeeded"] == 1
    (verdict,) = over.object["status"]["verdicts"]
    assert verdict["node"] == ran.spec.node
