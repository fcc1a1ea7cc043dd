"""The examples with inputs from elsewhere, from their files alone, against real servers."""

import functools
import http.server
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bacalhau.storages.partition import fnv1a
from tests.e2e.cluster import Cluster
from tests.support.s3 import ADMIN, S3Server

EXAMPLES = Path(__file__).parents[2] / "manifests" / "examples"
STOP = ["--on-exit", "stop"]
TEXTS = {
    "a.txt": "one fish two fish",
    "sub/b.txt": "red fish\nBLUE fish",
    "sub/c.txt": "fisch Fisch fish",
    "d.txt": "two",
    "not-a-text.csv": "fish fish fish",
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    try:
        yield cluster
    finally:
        left = cluster.close()
    assert left == []


@pytest.mark.timeout(300)
def test_words_from_s3_to_s3(
    cluster: Cluster, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ADMIN[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ADMIN[1])
    here = EXAMPLES / "s3-wordcount"
    s3.put("programs/wordcount.wasm", (here / "wordcount.wasm").read_bytes())
    for name, text in TEXTS.items():
        s3.put(f"texts/{name}", text.encode())
    cluster.start(["one", "two"], args=STOP)
    cluster.run("apply", "-f", str(here / "job.yaml"))
    cluster.run("wait", "s3-wordcount", "--for", "delivered", "--timeout", "90")
    counts: Counter[str] = Counter()
    for partition in range(4):
        table = s3.get(f"results/s3-wordcount/{partition}/counts/counts.tsv").decode()
        for line in table.splitlines():
            number, word = line.split("\t")
            counts[word] += int(number)
    expected = Counter(
        word
        for name, text in TEXTS.items()
        if name.endswith(".txt")
        for word in text.lower().split()
    )
    assert counts == expected, "each text is in exactly one partition"
    manifests = json.loads(cluster.run("get", "manifests", "-o", "json").stdout)
    pinned = {m["spec"]["input"]: m["spec"] for m in manifests["items"]}
    assert pinned[1]["objects"] == 4
    assert pinned[1]["partitions"] == 4
    _goes_where_the_data_is(cluster, s3)
    everything = cluster.run(
        "get", "jobs,executions,publications,manifests", "-o", "json", check=False
    )
    logs = "".join(path.read_text() for path in cluster.root.glob("*.log"))
    assert ADMIN[1] not in everything.stdout + logs
    cluster.run("delete", "job", "s3-wordcount")


@pytest.mark.timeout(300)
def test_what_failed_runs_again_with_the_same_objects(
    cluster: Cluster, s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ADMIN[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ADMIN[1])
    names = [f"shared/{number}" for number in range(20)]
    little = next(name for name in names if fnv1a(name) % 2 == 0)
    large, late = [name for name in names if fnv1a(name) % 2 == 1][:2]
    s3.put(little, b"x")
    s3.put(large, b"x" * 2 * 1024 * 1024)
    (tmp_path / "job.yaml").write_text("""
apiVersion: bacalhau.org/v1
kind: Job
metadata: {name: shared}
spec:
  type: batch
  count: 2
  retry: {attempts: 2, backoffSeconds: 2}
  tasks:
    - engine: {type: noop}
      publisher: {type: local}
      inputSources:
        - target: /in
          source: {type: s3, params: {bucket: data, key: shared/, partition: {type: object}}}
""")
    cluster.start(["weak"], args=[*STOP, "--input-max-size", "1Mi"])
    cluster.run("apply", "-f", str(tmp_path / "job.yaml"))
    waited = cluster.run("wait", "shared", "--timeout", "60", check=False)
    assert waited.returncode == 3
    assert "this node takes at most" in waited.stderr
    told = cluster.run("explain", "job", "shared").stdout
    assert "bacalhau rerun --failed shared" in told

    def state() -> tuple[str, set[str]]:
        manifests = json.loads(cluster.run("get", "manifests", "-o", "json").stdout)["items"]
        accepted = json.loads(cluster.run("get", "acceptances", "-o", "json").stdout)["items"]
        (manifest,) = (m["spec"]["digest"] for m in manifests)
        return manifest, {a["spec"]["execution"] for a in accepted}

    digest, accepted = state()
    s3.put(late, b"came later, and is no part of this run")
    cluster.run("node", "cordon", "weak")
    cluster.add_agent("strong", args=STOP)
    again = cluster.run("rerun", "--failed", "shared", "--wait", "--timeout", "60")
    assert "job/shared runs " in again.stdout
    assert "shared complete" in again.stdout
    after, both = state()
    assert after == digest
    assert accepted <= both, "results are kept"
    assert len(both) == 2
    cluster.run("download", "shared", "--output", str(tmp_path / "results"))
    kept = tmp_path / "results" / "partitions"
    assert sorted(path.name for path in kept.iterdir()) == ["0", "1"]


def _goes_where_the_data_is(cluster: Cluster, s3: S3Server) -> None:
    """Jobs that read what a node has brought for another one go to that node, and say why."""
    s3.put("large/data.bin", b"x" * 8 * 1024 * 1024)
    text = """
apiVersion: bacalhau.org/v1
kind: Job
metadata: {name: NAME}
spec:
  type: batch
  tasks:
    - engine: {type: noop}
      inputSources: [{target: /in, source: {type: s3, params: {bucket: data, key: large/}}}]
"""
    node = ""
    for name in ("first", "second"):
        (cluster.root / f"{name}.yaml").write_text(text.replace("NAME", name))
        cluster.run("apply", "-f", str(cluster.root / f"{name}.yaml"))
        cluster.run("wait", name, "--timeout", "60")
        told = cluster.run("explain", "job", name).stdout
        if not node:
            place = json.loads(cluster.run("get", "acceptances", "-o", "json").stdout)["items"]
            (node,) = (a["spec"]["node"] for a in place if a["spec"]["job"] == name)
            _until_held(cluster, node)
        else:
            assert f"{node} already holds 8.0 MiB of 8.0 MiB" in told
            assert f"was placed on {node} " in told


def test_words_over_http(cluster: Cluster, tmp_path: Path) -> None:
    handler = functools.partial(_Quiet, directory=str(EXAMPLES))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        address = f"127.0.0.1:{server.server_address[1]}"
        text = (EXAMPLES / "http-inputs" / "job.yaml").read_text()
        (tmp_path / "job.yaml").write_text(text.replace("127.0.0.1:8000", address))
        cluster.start(["closed"], args=STOP)
        cluster.run("apply", "-f", str(tmp_path / "job.yaml"))
        # A node refuses to connect to loopback for a job; the job waits for one that does not.
        told = _until_told(cluster, "--allow-address")
        assert f"--allow-address {address}" in told
        cluster.add_agent("open", args=[*STOP, "--allow-address", address])
        cluster.run("wait", "http-inputs", "--timeout", "60")
        cluster.run("download", "http-inputs", "--output", str(tmp_path / "results"))
        table = (tmp_path / "results" / "counts" / "counts.tsv").read_text()
        words = {word: count for count, word in (line.split("\t") for line in table.splitlines())}
        assert int(words["hurricanes"]) >= 3
        assert int(words["the"]) > int(words["noaa"])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _until_held(cluster: Cluster, node: str) -> None:
    """Until a node has said that it holds the input."""
    deadline = time.monotonic() + 60
    while "8.0 MiB of 1 input" not in (told := cluster.run("describe", "node", node).stdout):
        assert time.monotonic() < deadline, told
        time.sleep(0.2)


def _until_told(cluster: Cluster, words: str) -> str:
    """What the executions say, once it has these words."""
    deadline = time.monotonic() + 60
    while True:
        told = cluster.run("get", "executions", "-o", "json").stdout
        if words in told or time.monotonic() > deadline:
            return told
        time.sleep(0.2)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""
