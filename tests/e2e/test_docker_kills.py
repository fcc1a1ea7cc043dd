"""kill -9 of the Docker Engine, of the agent and of both in the middle of Docker jobs whose results go
to S3: each job ends in exactly one result, accepted and delivered, and nothing else is left.

One kill strikes three jobs at once: one whose image is half pulled, one that runs, in a network of its
own, and one whose result is half uploaded. The lines to the registry and to the bucket are held just
there, so that it is no matter of luck.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bacalhau.client import Client
from bacalhau_api.v1.execution import Acceptance, Execution, Publication
from tests.e2e.cluster import Cluster, left_over
from tests.e2e.test_docker import job, wait_until
from tests.e2e.test_docker_networks import networks, rules
from tests.support.dockerd import Dockerd, busybox_image, containers, running_dockerd
from tests.support.line import Line, open_line
from tests.support.outputs import read_archive
from tests.support.registry import running_registry
from tests.support.s3 import ADMIN, BUCKET, S3Server

NODE = "kills-1"
REGISTRY_PORT = 5003
MIB = 1024 * 1024
WAIT_SECONDS = 90
SCRIPT = """
i=0
while i=$((i + 1)); echo tick $i; [ ! -e /gate/{gate} ]; do sleep 0.1; done
echo $i > /outputs/ticks
head -c {size} /dev/urandom > /outputs/data
sha256sum < /outputs/data | cut -c-64 > /outputs/digest
"""


@dataclass
class Field:
    """What a test plays on."""

    engine: Dockerd
    cluster: Cluster
    client: Client
    s3: S3Server
    to_s3: Line
    to_registry: Line

    def job(self, name: str, size: int) -> dict[str, Any]:
        """Counts until its gate is opened, then writes `size` bytes and their digest."""
        made = job(name, SCRIPT.format(gate=name, size=size))
        (task,) = made["spec"]["tasks"]
        source = {"type": "local", "params": {"sourcePath": str(self.cluster.root / "gate")}}
        task["inputSources"] = [{"source": source, "target": "/gate"}]
        task["publisher"] = {
            "type": "s3",
            "params": {
                "bucket": BUCKET,
                "key": f"{name}/{{executionID}}",
                "endpoint": f"http://127.0.0.1:{self.to_s3.port}",
            },
        }
        return made

    def open_gate(self, name: str) -> None:
        """Let a job come to its end."""
        (self.cluster.root / "gate" / name).touch()

    def push_image(self, name: str) -> str:
        """A new image with 4 MiB of its own, which is in the registry only; its reference."""
        self.engine.load(busybox_image("test/new:1", files={"ballast": os.urandom(4 * MIB)}))
        tag = f"127.0.0.1:{self.to_registry.port}/{name}"
        with self.engine.api() as api:
            api.tag("test/new:1", tag, "1")
            for line in api.push(tag, "1", stream=True, decode=True):
                assert "error" not in line, line
            api.remove_image(f"{tag}:1")
            api.remove_image("test/new:1")
        return f"{tag}:1"

    def ticks(self, name: str) -> int:
        """How far the node's copy of a job's output is."""
        found = self.cluster.root.glob(f"{NODE}/node/executions/*/{name}-*/outputs/stdout")
        return sum(path.read_text().count("\n") for path in found)


@pytest.fixture(scope="module")
def field(running_s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """An orchestrator and an agent, in the network namespace of an engine that may be killed."""
    root = tmp_path_factory.mktemp("kills")
    (root / "gate").mkdir()
    with pytest.MonkeyPatch.context() as patch, running_dockerd(**{"live-restore": True}) as engine:
        patch.setenv("AWS_ACCESS_KEY_ID", ADMIN[0])
        patch.setenv("AWS_SECRET_ACCESS_KEY", ADMIN[1])
        inside = Path(f"/run/netns/{engine.name}")
        with (
            running_registry(engine, root / "registry", REGISTRY_PORT),
            open_line(int(running_s3.url.rpartition(":")[2]), inside=inside) as to_s3,
            open_line(REGISTRY_PORT, inside=inside, beyond=inside) as to_registry,
        ):
            cluster = Cluster(root / "fleet", wrap=engine.inside)
            (cluster.root / "gate").mkdir(parents=True)
            cluster.start()
            cluster.add_agent(
                NODE,
                args=[
                    "--docker-host", engine.host, "--allow-network", "http",
                    "--allow-path", f"{cluster.root}/gate",
                    "--s3-endpoint", f"http://127.0.0.1:{to_s3.port}", "--on-exit", "stop",
                ],
            )  # fmt: skip
            port = int(cluster.server.rpartition(":")[2])
            with (
                open_line(port, beyond=inside) as to_api,
                Client(f"http://127.0.0.1:{to_api.port}") as client,
            ):
                yield Field(engine, cluster, client, running_s3, to_s3, to_registry)
            assert cluster.close() == []
        assert left_over(root) == []


@pytest.mark.parametrize(
    ("victims", "keeps_containers"),
    [
        pytest.param(["agent"], True, id="agent"),
        pytest.param(["engine"], True, id="engine"),
        pytest.param(["agent", "engine"], True, id="both"),
        pytest.param(["agent", "engine"], False, id="both, and the containers with them"),
    ],
)
def test_one_result_and_nothing_left(
    field: Field, request: pytest.FixtureRequest, victims: list[str], keeps_containers: bool
) -> None:
    number = request.node.callspec.indices["victims"]
    pulled, running, sent = names = [f"{word}-{number}" for word in ("pulled", "running", "sent")]
    field.s3.clear()
    restart_engine(field.engine, {"live-restore": keeps_containers})
    jobs = [field.job(pulled, MIB), field.job(running, MIB), field.job(sent, 20 * MIB)]
    params = jobs[0]["spec"]["tasks"][0]["engine"]["params"]
    params["image"] = field.push_image(pulled)
    jobs[1]["spec"]["tasks"][0]["network"] = {"type": "HTTP", "domains": ["example.org"]}
    field.to_registry.hold(2 * MIB)
    field.to_s3.hold(8 * MIB)
    field.open_gate(pulled)
    field.open_gate(sent)
    for one in jobs:
        field.client.create(json.dumps(one))
    field.to_registry.wait_held()
    field.to_s3.wait_held()
    wait_until(lambda: field.ticks(running) > 2, "it runs")
    assert len(networks(field.engine)) == 1

    kill_and_start(field, victims)
    field.to_registry.let_go()
    field.to_s3.let_go()
    if keeps_containers:
        seen = field.ticks(running)
        wait_until(lambda: field.ticks(running) > seen, "its log goes on")
    field.open_gate(running)
    for name in names:
        waited = field.client.wait(name, goal="delivered", timeout_seconds=WAIT_SECONDS)
        assert waited.is_reached, waited.job.status

    for name in names:
        (execution,) = [e for e in field.client.list(Execution) if e.spec.job == name]
        (acceptance,) = [a for a in field.client.list(Acceptance) if a.spec.job == name]
        (publication,) = [p for p in field.client.list(Publication) if p.spec.job == name]
        assert acceptance.spec.execution == publication.spec.execution == execution.name
        was_cut = name == running and not keeps_containers
        assert execution.status.report is not None
        assert execution.status.report.run == (2 if was_cut else 1)
        key = f"{name}/{execution.name}.tar.gz"
        assert field.s3.keys(f"{name}/") == [key]
        assert_whole(read_archive(field.s3.get(key)))
    uploads = field.s3.admin.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    assert uploads == [], "the upload went on, and did not begin anew beside the first"
    wait_until(lambda: not containers(field.engine), "containers are removed")
    wait_until(lambda: not networks(field.engine) and not rules(field.engine), "networks, too")


def assert_whole(files: dict[str, bytes]) -> None:
    """A result of one run from its begin to its end, and its log with no hole and no line twice."""
    data = files["out/data"]
    assert files["out/digest"].decode().strip() == hashlib.sha256(data).hexdigest()
    ticks = range(1, int(files["out/ticks"]) + 1)
    assert files["stdout"].decode() == "".join(f"tick {n}\n" for n in ticks)


def restart_engine(engine: Dockerd, config: dict[str, Any]) -> None:
    """Have it run with this configuration."""
    if engine.config != config:
        engine.config = config
        engine.end()
        engine.start()


def kill_and_start(field: Field, victims: list[str]) -> None:
    """All at once, and again at once: what is up first has to wait for the other."""
    agent, engine = field.cluster.agents[NODE], field.engine
    deeds = {"agent": (agent.kill, agent.start), "engine": (engine.kill, engine.start)}
    for which in (0, 1):
        threads = [threading.Thread(target=deeds[name][which]) for name in victims]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
