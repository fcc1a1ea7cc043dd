"""Docker jobs through the product, from `apply` to a downloaded result. What becomes of them when the
agent or the Docker Engine is killed is in test_docker_kills.py."""

import csv
import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, left_over
from tests.support import duckdb
from tests.support.dockerd import BUSYBOX, Dockerd, busybox_image, containers, running_dockerd

EXAMPLES = Path(__file__).parents[2] / "manifests" / "examples"
NODE = "docker-1"
GATE = """! grep -q '"GREEDY"' || { echo this node feeds nobody >&2; exit 1; }"""
"""A command that refuses jobs with a variable of that name."""


@contextmanager
def gatekeeper() -> Iterator[str]:
    """A web service that refuses jobs of one name; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            is_refused = told["job"]["name"] == "unasked"
            body = json.dumps({"allow": not is_refused, "reason": "nobody asked for it"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/admit"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def srv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is at `/srv` for the engine and for one of the nodes, in mount namespaces of theirs."""
    return tmp_path_factory.mktemp("srv")


def with_srv(srv: Path) -> tuple[str, ...]:
    """Words before a command that is to see it there."""
    return ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /srv && exec "$@"', str(srv))


@pytest.fixture(scope="module")
def engine(srv: Path) -> Iterator[Dockerd]:
    """An engine of this module's own, which may be seen to be empty."""
    with running_dockerd(*with_srv(srv)) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(engine: Dockerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An orchestrator and one agent on that engine; afterwards nothing of them may be left."""
    fleet = Cluster(tmp_path_factory.mktemp("fleet"))
    fleet.start(args=[])
    args = ["--docker-host", engine.host, "--allow-network", "bridge", "--on-exit", "stop"]
    with gatekeeper() as url:
        fleet.add_agent(NODE, args=[*args, "--probe-exec", GATE, "--probe-http", url])
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
    for missing in ("gpu: ", "disk limit: "):
        assert missing in text, "and why"
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
    """By its rules, by its operator's command, and by the operator's web service."""
    refused = {
        "outside": "does not allow network Host",
        "greedy": "the node's admission command refuses it: this node feeds nobody",
        "unasked": "the node's admission service refuses it: nobody asked for it",
    }
    manifests = {name: job(name, "true") for name in refused}
    manifests["outside"]["spec"]["tasks"][0]["network"] = {"type": "Host"}
    manifests["greedy"]["spec"]["tasks"][0]["env"] = {"GREEDY": "1"}
    for name, why in refused.items():
        apply(cluster, manifests[name])
        wait_until(
            lambda name=name, why=why: why in cluster.run("explain", "job", name).stdout,
            f"the refusal of {name} is shown",
        )
        cluster.run("delete", "job", name)


def test_an_image_that_is_nowhere_fails_with_the_reason(cluster: Cluster) -> None:
    manifest = job("nowhere", "true", retry={"attempts": 1})
    params = manifest["spec"]["tasks"][0]["engine"]["params"]
    params["image"] = "sha256:" + "0" * 64
    apply(cluster, manifest)
    assert cluster.run("wait", "nowhere", "--timeout", "90", check=False).returncode == 3
    report = executions(cluster, "nowhere")[0]["status"]["report"]
    assert report["reason"].startswith("Image")


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
    cluster.run("apply", "-f", str(EXAMPLES / "docker-batch" / "job.yaml"))
    cluster.run("wait", "docker-batch", "--for", "delivered", "--timeout", "100")
    results = cluster.root / "primes"
    cluster.run("download", "docker-batch", "-o", str(results))
    found = [int(n) for path in results.rglob("primes-*.txt") for n in path.read_text().split()]
    assert len(found) == len(set(found)) == 6057
    assert (min(found), max(found)) == (2, 59999)


def test_sql_over_partitioned_parquet_where_it_lies(
    cluster: Cluster, engine: Dockerd, srv: Path
) -> None:
    """The example, from its file alone, on two nodes of which one has the files."""
    storms = EXAMPLES / "hurricanes" / "data" / "storms.csv"
    (srv / "data").mkdir()
    duckdb.query(
        f"COPY (FROM '{storms}') TO '{srv}/data/storms' (FORMAT parquet, PARTITION_BY (year))"
    )
    engine.load(duckdb.image("duckdb/duckdb:1.5.6"))
    cluster.add_agent(
        "docker-2",
        args=["--docker-host", engine.host, "--allow-path", "/srv/data/**", "--on-exit", "stop"],
        wrap=with_srv(srv),
    )
    cluster.run("apply", "-f", str(EXAMPLES / "duckdb" / "job.yaml"))
    cluster.run("wait", "duckdb", "--for", "delivered", "--timeout", "100")
    assert {e["spec"]["node"] for e in executions(cluster, "duckdb")} == {"docker-2"}
    results = cluster.root / "storms"
    cluster.run("download", "duckdb", "--output", str(results))
    found = duckdb.query(f"SELECT * FROM '{results}/seasons/*.parquet' ORDER BY year")

    expected: dict[str, tuple[set[str], list[int]]] = {}
    with storms.open() as file:
        for row in csv.DictReader(file):
            names, winds = expected.setdefault(row["year"], (set(), [0]))
            names.add(row["name"])
            winds[0] = max(winds[0], int(row["wind"]))
            if int(row["wind"]) >= 64 and int(row["hour"]) % 6 == 0:
                winds.append(int(row["wind"]))
    assert found == [
        {
            "year": year,
            "storms": str(len(names)),
            "strongest": str(winds[0]),
            "hurricane_days": str((len(winds) - 1) / 4),
        }
        for year, (names, winds) in sorted(expected.items())
    ]
    assert len(found) == 48
