"""A Docker Engine that hangs in every start, while it answers all questions: the node says so in time,
nothing more is placed there, what could not start runs elsewhere, and what runs there goes on."""

import json
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, left_over
from tests.e2e.test_docker import apply, executions, job, states, wait_until
from tests.support.docker_faults import FaultProxy, fault_proxy_beside
from tests.support.dockerd import Dockerd

STUCK, WELL = "wedge-stuck", "wedge-well"
START = r"POST .*/start"
NOTICED_SECONDS = 30.0


@pytest.fixture
def proxy(dockerd: Dockerd) -> Iterator[FaultProxy]:
    """Between the one node and the engine, behaving well so far."""
    with (
        tempfile.TemporaryDirectory(prefix="bp-", dir="/tmp") as directory,
        fault_proxy_beside(Path(directory) / "s", dockerd.socket) as made,
    ):
        yield made


@pytest.fixture
def cluster(dockerd: Dockerd, proxy: FaultProxy, tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes; only one of them sees the engine's other face."""
    fleet = Cluster(tmp_path)
    fleet.start()
    gate = ["--allow-path", f"{tmp_path}/gate", "--on-exit", "stop"]
    fleet.add_agent(STUCK, args=["--docker-host", proxy.host, "--label", "who=stuck", *gate])
    fleet.add_agent(WELL, args=["--docker-host", dockerd.host, *gate])
    yield fleet
    assert fleet.close() == []
    assert left_over(tmp_path) == []


def fault_of(cluster: Cluster) -> dict[str, Any]:
    """The node's condition EngineFault, empty while it has none."""
    found = json.loads(cluster.run("get", "nodes", "-o", "json").stdout)["items"]
    (node,) = [one for one in found if one["metadata"]["name"] == STUCK]
    conditions = node["status"].get("conditions", [])
    return next((c for c in conditions if c["type"] == "EngineFault" and c["status"]), {})


def test_a_wedged_engine_is_noticed_shown_and_avoided(
    cluster: Cluster, dockerd: Dockerd, proxy: FaultProxy, tmp_path: Path
) -> None:
    (tmp_path / "gate").mkdir()
    before = job("before", "until [ -e /gate/go ]; do sleep 0.1; done")
    before["spec"]["constraints"] = "who=stuck"
    source = {"type": "local", "params": {"sourcePath": f"{tmp_path}/gate"}}
    before["spec"]["tasks"][0]["inputSources"] = [{"source": source, "target": "/gate"}]
    apply(cluster, before)
    cluster.run("wait", "before", "--for", "running", "--timeout", "60")

    fault = proxy.add(START, "hang")
    apply(cluster, job("caught", "echo here", count=4))
    wait_until(lambda: fault.hits, "a start hangs")
    wait_until(lambda: fault_of(cluster), "the node says so")
    condition = fault_of(cluster)
    since = datetime.fromisoformat(condition["lastTransitionTime"]).timestamp()
    assert since - fault.first_hit < NOTICED_SECONDS
    told = cluster.run("describe", "node", STUCK).stdout
    assert "EngineFault" in told
    assert "did not return within" in told

    apply(cluster, job("after", "echo here", count=3))
    cluster.run("wait", "after", "--timeout", "60")
    assert {e["spec"]["node"] for e in executions(cluster, "after")} == {WELL}

    cluster.run("wait", "caught", "--timeout", "90")
    caught = executions(cluster, "caught")
    failed = [e for e in caught if e["spec"]["node"] == STUCK]
    assert failed, "placement had tried it"
    for execution in failed:
        report = execution["status"]["report"]
        assert (report["phase"], report["reason"]) == ("Failed", "EngineFault")
        assert report["isSystemFault"]
        assert "did not return within" in report["message"]
    assert sorted(
        e["spec"]["slot"]["partition"] for e in caught
        if e["spec"]["node"] == WELL and e["status"]["report"]["phase"] == "Succeeded"
    ) == [0, 1, 2, 3]  # fmt: skip

    (tmp_path / "gate" / "go").touch()
    cluster.run("wait", "before", "--timeout", "60")
    (execution,) = executions(cluster, "before")
    assert execution["status"]["report"]["run"] == 1
    names = ("before", "caught", "after")
    wait_until(lambda: not any(states(dockerd, name) for name in names), "all are removed")
