"""Results over a line that is limited and breaks: pulled within the limit, and never twice."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bacalhau.client import Client
from bacalhau.client.download import Progress, download
from bacalhau_api.errors import UnavailableError
from bacalhau_api.v1.execution import Outputs
from tests.e2e.cluster import Cluster

RATE = 512 * 1024
SIZE = 2 * 1024 * 1024


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    fleet = Cluster(tmp_path)
    fleet.start(["edge-1"], args=["--upload-limit", "512KiB/s", "--on-exit", "stop"])
    yield fleet
    assert fleet.close() == []


def test_a_broken_pull_goes_on_where_it_was(cluster: Cluster, tmp_path: Path) -> None:
    job = {
        "apiVersion": "bacalhau.org/v1",
        "kind": "Job",
        "metadata": {"name": "big"},
        "spec": {
            "type": "batch",
            "tasks": [{"engine": {"type": "noop", "params": {"outputBytes": SIZE}}}],
        },
    }
    file = tmp_path / "big.json"
    file.write_text(json.dumps(job))
    cluster.run("apply", "-f", str(file), "--wait", "--timeout", "60")
    node = cluster.agents["edge-1"]
    told = cluster.run("node", "status", "--node-dir", str(node.data_dir), "-o", "json").stdout
    assert json.loads(told)["outbox"]["uploadBytesPerSecond"] == RATE

    def die(progress: Progress) -> None:
        if progress.done_bytes > SIZE // 4 and node.popen and node.popen.poll() is None:
            node.kill()

    with Client(cluster.server) as client:
        items = client.results("big").items
        with pytest.raises(UnavailableError):
            download(client, items, "default", tmp_path / "out", on_progress=die)
        assert not (tmp_path / "out").exists()
        node.start()
        last: list[Progress] = []
        began = time.monotonic()
        done = _when_back(client, items, tmp_path / "out", last)
        took = time.monotonic() - began
    assert last[-1].resumed_bytes >= SIZE // 4
    assert done == {"stdout": SIZE, "stderr": 0, "exitCode": 1}
    outputs = items[0].outputs
    assert isinstance(outputs, Outputs)
    assert outputs.digest, "what was pulled was compared with it"
    rest = SIZE - last[-1].resumed_bytes
    # One second's worth may have been saved up, and one piece may be owed.
    assert took >= (rest - RATE - RATE // 2) / RATE


def _when_back(client: Client, items: object, into: Path, last: list[Progress]) -> dict[str, int]:
    """Download as soon as the node is heard again."""
    deadline = time.monotonic() + 60
    while True:
        last.clear()
        try:
            done = download(client, items, "default", into, on_progress=last.append)  # type: ignore[arg-type]
        except UnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return {path.name: path.stat().st_size for path in done.path.iterdir()}
