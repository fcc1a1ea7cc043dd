"""Docker jobs through the product: from `apply` to a downloaded result, and through kill -9 of the
agent and of the Docker Engine."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, left_over
from tests.support.dockerd import BUSYBOX, Dockerd, busybox_image, containers, running_dockerd

EXAMPLE = Path(__file__).parents[2] / "manifests" / "examples" / "docker-batch"
NODE = "docker-1"


@pytest.fixture(scope="module")
def engine() -> Iterator[Dockerd]:
    """An engine that may be killed. Its containers go on without it."""
    with running_dockerd(**{"live-restore": True}) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(engine: Dockerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An orchestrator and one agent on that engine; afterwards nothing of them may be left."""
    fleet = Cluster(tmp_path_factory.mktemp("fleet"))
    fleet.start(args=[])
    args = ["--docker-host", engine.host, "--allow-network", "bridge", "--on-exit", "stop"]
    fleet.add_agent(NODE, args=args)
    yield fleet
    assert fleet.close() == []
    assert left_over(fleet.root) == []


def job(name: str, script: str, *, count: int = 1, **spec: Any) -> dict[str, Any]:
    """A batch job: a shell script in busybox, with a result directory."""
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
                        "type": "docker",
                        "params": {
                            "image": BUSYBOX,
                            "entrypoint": ["/bin/sh", "-c"],
                            "parameters": [script],
                        },
                    },
                    "resultPaths": [{"name": "out", "path": "/outputs"}],
                    "publisher": {"type": "local"},
                    "resources": {"cpu": "100m", "memory": "64Mi"},
                }
            ],
        }
        | spec,
    }


def apply(cluster: Cluster, manifest: dict[str, Any]) -> None:
    """Declare it."""
    path = cluster.root / f"{manifest['metadata']['name']}.json"
    path.write_text(json.dumps(manifest))
    cluster.run("apply", "-f", str(path))


def executions(cluster: Cluster, name: str) -> list[dict[str, Any]]:
    """The executions of a job."""
    found = json.loads(cluster.run("get", "executions", "-o", "json").stdout)
    return [e for e in found["items"] if e["spec"]["job"] == name]


def states(engine: Dockerd, name: str) -> list[str]:
    """What the containers of a job do, asked behind the product's back."""
    return [c["State"] for c in containers(engine) if f"-{name}-" in c["Names"][0]]


def wait_for_text(cluster: Cluster, name: str, text: str) -> None:
    """Until a job's log has it."""
    deadline = time.monotonic() + 60
    while text not in cluster.run("logs", name, check=False).stdout:
        assert time.monotonic() < deadline, cluster.run("describe", "job", name).stdout
        time.sleep(0.1)


def test_a_job_from_apply_to_its_downloaded_result(cluster: Cluster, engine: Dockerd) -> None:
    script = "echo part $BACALHAU_PARTITION_INDEX; echo warn >&2; date > /outputs/when"
    apply(cluster, job("hello", script, count=3))
    cluster.run("wait", "hello", "--for", "delivered", "--timeout", "90")
    logs = cluster.run("logs", "hello").stdout
    assert sorted(line[-6:] for line in logs.splitlines() if "part" in line) == [
        "part 0", "part 1", "part 2",
    ]  # fmt: skip
    out = cluster.root / "out"
    cluster.run("download", "hello", "-o", str(out))
    assert len([p for p in out.rglob("when") if p.read_text()]) == 3
    for execution in executions(cluster, "hello"):
        pins = execution["status"]["report"]["pins"]
        assert pins["image"].startswith("sha256:"), "an image without a registry is pinned by id"
    wait_until(lambda: not states(engine, "hello"), "ended containers are removed")


def test_the_node_says_what_it_can_do(cluster: Cluster) -> None:
    text = cluster.run("describe", "node", NODE).stdout
    assert "docker" in text
    assert "gpu: " in text, "why there are none"
    node = json.loads(cluster.run("get", "nodes", "-o", "json").stdout)["items"][0]
    docker = next(e for e in node["status"]["info"]["engines"] if e["name"] == "docker")
    assert docker.get("available", True)
    assert docker["version"].startswith("Docker ")


def test_a_failure_is_told_with_its_exit_code_and_last_words(cluster: Cluster) -> None:
    apply(cluster, job("fails", "echo cannot go on >&2; exit 7", retry={"attempts": 1}))
    done = cluster.run("wait", "fails", "--timeout", "60", check=False)
    assert done.returncode == 3
    report = executions(cluster, "fails")[0]["status"]["report"]
    assert (report["phase"], report["exitCode"]) == ("Failed", 7)
    assert "cannot go on" in report["stderrTail"]


def test_what_the_node_does_not_allow_is_refused_with_the_reason(cluster: Cluster) -> None:
    manifest = job("outside", "true")
    manifest["spec"]["tasks"][0]["network"] = {"type": "Host"}
    apply(cluster, manifest)
    wait_until(
        lambda: "does not allow network Host" in cluster.run("explain", "job", "outside").stdout,
        "the refusal is shown",
    )
    cluster.run("delete", "job", "outside")


def test_an_image_that_is_nowhere_fails_with_the_reason(cluster: Cluster) -> None:
    manifest = job("nowhere", "true", retry={"attempts": 1})
    params = manifest["spec"]["tasks"][0]["engine"]["params"]
    params["image"] = "sha256:" + "0" * 64
    apply(cluster, manifest)
    assert cluster.run("wait", "nowhere", "--timeout", "90", check=False).returncode == 3
    report = executions(cluster, "nowhere")[0]["status"]["report"]
    assert report["reason"].startswith("Image")


def test_kill9_of_the_agent(cluster: Cluster) -> None:
    """The container goes on; its log has no hole and no line twice; its end is the true one."""
    script = "for i in $(seq 40); do echo line $i; sleep 0.1; done; echo > /outputs/x; exit 0"
    apply(cluster, job("survives", script))
    wait_for_text(cluster, "survives", "line 3\n")
    agent = cluster.agents[NODE]
    agent.kill()
    agent.start()
    cluster.run("wait", "survives", "--for", "delivered", "--timeout", "90")
    lines = [line for line in cluster.run("logs", "survives").stdout.splitlines() if "line" in line]
    assert [line.rpartition(" ")[2] for line in lines] == [str(n) for n in range(1, 41)]
    found = executions(cluster, "survives")
    assert [e["status"]["report"]["run"] for e in found] == [1]


def test_an_end_while_the_agent_was_down(cluster: Cluster, engine: Dockerd) -> None:
    script = "echo begin; until [ -e /outputs/go ]; do sleep 0.1; done; echo end; exit 5"
    apply(cluster, job("alone", script, retry={"attempts": 1}))
    wait_for_text(cluster, "alone", "begin")
    agent = cluster.agents[NODE]
    agent.kill()
    (gate,) = cluster.root.glob(f"{NODE}/node/executions/*/alone-*/outputs/out")
    (gate / "go").touch()
    try:
        wait_until(lambda: states(engine, "alone") == ["exited"], "its end")
    finally:
        agent.start()
    assert cluster.run("wait", "alone", "--timeout", "90", check=False).returncode == 3
    assert executions(cluster, "alone")[0]["status"]["report"]["exitCode"] == 5
    assert cluster.run("logs", "alone").stdout.count("end") == 1


def test_kill9_of_the_engine(cluster: Cluster, engine: Dockerd) -> None:
    """With live-restore the container does not notice; nor does the job."""
    script = "for i in $(seq 60); do echo line $i; sleep 0.1; done"
    apply(cluster, job("restored", script))
    wait_for_text(cluster, "restored", "line 3\n")
    engine.kill()
    engine.start()
    cluster.run("wait", "restored", "--for", "delivered", "--timeout", "90")
    lines = [line for line in cluster.run("logs", "restored").stdout.splitlines() if "line" in line]
    assert [line.rpartition(" ")[2] for line in lines] == [str(n) for n in range(1, 61)]
    found = executions(cluster, "restored")
    assert [e["status"]["report"]["run"] for e in found] == [1]


def test_stop_and_delete_leave_nothing(cluster: Cluster, engine: Dockerd) -> None:
    apply(cluster, job("long", "exec sleep 3600"))
    cluster.run("wait", "long", "--for", "running", "--timeout", "60")
    assert states(engine, "long") == ["running"]
    cluster.run("stop", "long")
    cluster.run("delete", "job", "long")
    wait_until(lambda: not states(engine, "long"), "its container is removed")


def test_the_same_image_for_all_partitions_and_attempts(cluster: Cluster, engine: Dockerd) -> None:
    """The tag is moved between two attempts; the second runs what the first resolved."""
    tag = "test/moving:1"
    engine.load(busybox_image(tag, Env=["PATH=/bin", "V=old"]))
    script = "echo image $V; sleep 1; exit 1"
    manifest = job("pinned", script, retry={"attempts": 2, "backoffSeconds": 2})
    manifest["spec"]["tasks"][0]["engine"]["params"]["image"] = tag
    apply(cluster, manifest)
    wait_for_text(cluster, "pinned", "image old")
    engine.load(busybox_image(tag, Env=["PATH=/bin", "V=new"]))
    cluster.run("wait", "pinned", "--timeout", "90", check=False)
    found = sorted(executions(cluster, "pinned"), key=lambda e: e["spec"].get("attempt", 0))
    assert len(found) == 2
    assert found[1]["spec"]["pins"] == found[0]["status"]["report"]["pins"]
    assert "image old" in found[1]["status"]["report"]["stdoutTail"]


def wait_until(check: Any, what: str, seconds: float = 60) -> None:
    """Until `check` gives something true."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not so: {what}"
        time.sleep(0.1)


def test_the_example_runs_from_its_file_alone(cluster: Cluster, engine: Dockerd) -> None:
    engine.load(busybox_image("busybox:1.36"))
    cluster.run("apply", "-f", str(EXAMPLE / "job.yaml"))
    cluster.run("wait", "docker-batch", "--for", "delivered", "--timeout", "100")
    results = cluster.root / "primes"
    cluster.run("download", "docker-batch", "-o", str(results))
    found = [int(n) for path in results.rglob("primes-*.txt") for n in path.read_text().split()]
    assert len(found) == len(set(found)) == 6057
    assert (min(found), max(found)) == (2, 59999)
