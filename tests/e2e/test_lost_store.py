"""An orchestrator whose store is damaged says so, instead of going on with what is left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, ClusterError


def flip_bits(nats: Path) -> None:
    """In the middle of the objects' first block, which is read again without its index."""
    (block,) = nats.rglob("1.blk")
    data = bytearray(block.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 16] = bytes(byte ^ 0xFF for byte in data[middle : middle + 16])
    block.write_bytes(data)
    for index in nats.rglob("index.db"):
        index.unlink()


def truncate(nats: Path) -> None:
    (block,) = nats.rglob("1.blk")
    block.write_bytes(block.read_bytes()[: block.stat().st_size // 2])
    for index in nats.rglob("index.db"):
        index.unlink()


def lose_the_stream(nats: Path) -> None:
    """As if the description of the stream could not be read."""
    (streams,) = nats.rglob("streams")
    shutil.rmtree(streams)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_bits, "the store ends at revision "),
        (truncate, "the store ends at revision "),
        (lose_the_stream, "the store is a new one"),
    ],
)
def test_a_damaged_store_is_noticed_at_the_start(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    cluster = Cluster(tmp_path)
    cluster.start()
    for number in range(3):
        job = {
            "apiVersion": "bacalhau.org/v1",
            "kind": "Job",
            "metadata": {"name": f"j{number}"},
            "spec": {"type": "batch", "tasks": [{"name": "main", "engine": {"type": "noop"}}]},
        }
        file = tmp_path / "job.json"
        file.write_text(json.dumps(job))
        cluster.run("apply", "-f", str(file))
    hub = cluster.orchestrator
    hub.stop()
    hub.start()  # nothing is wrong with it
    hub.stop()
    damage(hub.data_dir / "nats")
    with pytest.raises(ClusterError, match="ended at start") as ended:
        hub.start()
    assert f"error: {said}" in str(ended.value)
    assert "Traceback" not in str(ended.value)
    mark = hub.data_dir / "store.mark"
    assert f"delete {mark}" in str(ended.value)
    mark.unlink()
    hub.start()
    assert cluster.close() == []
