"""The examples, each from its job file as it stands, on two nodes with disks of their own.

A node's `/srv` is a directory of the test, mounted there in a mount namespace of the agent: so the
files need no changes, and the nodes have different data.
"""

import csv
import gzip
import io
import json
import os
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, Process

EXAMPLES = Path(__file__).parents[2] / "manifests" / "examples"
STORMS = EXAMPLES / "hurricanes" / "data" / "storms.csv"
NODES = ("edge-1", "edge-2")
SECONDS = 60.0

_MOUNT = 'mkdir -p "$0/examples" && mount --bind "$1" "$0/examples" && mount --rbind "$0" /srv'


class Fleet(Cluster):
    """Nodes that each have a `/srv` of their own."""

    def srv(self, node: str) -> Path:
        """What is at `/srv` on a node."""
        return self.root / f"{node}-srv"

    def join(self, node: str) -> None:
        """Enrol and start one."""
        for name in ("data", "logs", "inbox"):
            (self.srv(node) / name).mkdir(parents=True)
        token = self.run("node", "token").stdout.strip().splitlines()[-1]
        script = f'{_MOUNT} && shift && exec "$@"'
        agent = Process(
            node,
            self.root / node,
            ["--role", "compute", "--orchestrator", self.server, "--token", token,
             "--name", node, "--allow-path", "/srv/**:rw", "--on-exit", "stop"],
            wrap=("unshare", "--mount", "sh", "-c", script, str(self.srv(node)), str(EXAMPLES)),
        )  # fmt: skip
        agent.data_dir.mkdir()
        agent.start()
        self.agents[node] = agent
        self.until_heard(node)

    def apply(self, example: str) -> None:
        """As its README says."""
        self.run("apply", "-f", str(EXAMPLES / example / "job.yaml"))

    def wait(self, job: str, goal: str = "complete") -> None:
        """Until the job is there."""
        self.run("wait", job, "--for", goal, "--timeout", str(SECONDS))

    def executions(self, job: str) -> list[dict[str, Any]]:
        """All executions of a job, by creation."""
        words = ("--field-selector", f"job={job}", "--sort", "created", "-o", "json")
        found: list[dict[str, Any]] = json.loads(self.run("get", "executions", *words).stdout)[
            "items"
        ]
        return found


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """An orchestrator and two nodes; afterwards nothing of them is left."""
    if os.geteuid() != 0:
        pytest.fail("these tests make mount namespaces: run them as root")
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    made.start()
    for node in NODES:
        made.join(node)
    yield made
    assert made.close() == []


def until(check: Callable[[], Any], what: str) -> Any:
    """Wait until something is there; return it."""
    deadline = time.monotonic() + SECONDS
    while not (found := check()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.05)
    return found


def test_retry_goes_by_the_exit_code(fleet: Fleet) -> None:
    fleet.apply("retry")
    fleet.wait("retry")
    codes = [e["status"]["report"]["exitCode"] for e in fleet.executions("retry")]
    assert codes == [75, 75, 0]
    bad = (EXAMPLES / "retry" / "job.yaml").read_text().replace('["2"]', "[bad]")
    file = fleet.root / "bad.yaml"
    file.write_text(bad.replace("name: retry", "name: retry-bad"))
    fleet.run("apply", "-f", str(file))
    assert fleet.run("wait", "retry-bad", "--timeout", str(SECONDS), check=False).returncode == 3
    codes = [e["status"]["report"]["exitCode"] for e in fleet.executions("retry-bad")]
    assert codes == [65], "it is not tried again"


def test_inventory_answers_from_all_nodes(fleet: Fleet) -> None:
    for number, node in enumerate(NODES, 1):
        directory = fleet.srv(node) / "data" / "inventory"
        directory.mkdir()
        for i in range(number):
            (directory / f"{i}.bin").write_bytes(bytes(100 * (i + 1)))
    fleet.apply("inventory")
    fleet.wait("inventory")
    lines = sorted(fleet.run("logs", "inventory").stdout.splitlines())
    assert lines == [
        "[edge-1] edge-1: 1 files, 100 bytes, largest /data/inventory/0.bin",
        "[edge-2] edge-2: 2 files, 300 bytes, largest /data/inventory/1.bin",
    ]


def test_query_runs_where_the_data_lies(fleet: Fleet) -> None:
    head, *rows = STORMS.read_text().splitlines(keepends=True)
    for row in rows:
        year = row[:4]
        file = fleet.srv(NODES[year >= "2000"]) / "data" / f"{year}.csv"
        new = "" if file.exists() else head
        with file.open("a") as out:
            out.write(new + row)
    fleet.apply("query")
    fleet.wait("query")
    found: dict[str, tuple[int, float]] = {}
    for line in fleet.run("logs", "query", "--no-prefix", "--stream", "stdout").stdout.splitlines():
        name, count, _, _, strongest = line.split(",")
        before = found.get(name, (0, 0.0))
        found[name] = (before[0] + int(count), max(before[1], float(strongest)))
    wanted: dict[str, tuple[int, float]] = {}
    for item in csv.DictReader(STORMS.read_text().splitlines()):
        if float(item["wind"]) > 63:
            before = wanted.get(item["name"], (0, 0.0))
            wanted[item["name"]] = (before[0] + 1, max(before[1], float(item["wind"])))
    assert found == wanted
    assert len(found) > 100


def test_fan_out_takes_each_file_once(fleet: Fleet) -> None:
    files = {f"file-{i:02}.bin": os.urandom(i * 997) for i in range(23)}
    for node in NODES:  # whichever node a partition gets, it finds the same
        for old in (fleet.srv(node) / "data").glob("*.csv"):
            old.unlink()
        for name, data in files.items():
            (fleet.srv(node) / "data" / name).write_bytes(data)
    fleet.apply("fan-out")
    fleet.wait("fan-out")
    into = fleet.root / "fan-out"
    fleet.run("download", "fan-out", "-o", str(into))
    parts = sorted((into / "checksums").iterdir())
    assert [part.name for part in parts] == [f"part-{i:03}.txt" for i in range(4)]
    lines = [line.split(" ") for part in parts for line in part.read_text().splitlines()]
    assert len(lines) == len(files)
    assert {name: (crc, int(size)) for crc, size, name in lines} == {
        name: (f"{zlib.crc32(data):08x}", len(data)) for name, data in files.items()
    }


def unpacked(archive: Path, log: str) -> bytes:
    """All pieces of a log, put together by where they begin; each must be whole."""
    if not archive.exists():
        return b""
    pieces = [path for path in archive.iterdir() if path.name.startswith(f"{log}.")]
    spans: list[tuple[int, int, Path]] = []
    for path in pieces:
        start, end = path.name.removesuffix(".gz").rpartition(".")[2].split("-")
        spans.append((int(start), int(end), path))
    whole = b""
    for first, last, path in sorted(spans):
        assert first == len(whole)
        whole += gzip.GzipFile(fileobj=io.BytesIO(path.read_bytes())).read()
        assert last == len(whole)
    return whole


def test_a_daemon_compresses_growing_logs_on_each_node(fleet: Fleet) -> None:
    for node in NODES:
        (fleet.srv(node) / "logs" / "app.log").touch()
    fleet.apply("compress-logs")
    fleet.wait("compress-logs", "running")
    texts = {
        node: b"".join(b"%06d %s line of a log\n" % (i, node.encode()) for i in range(10_000))
        for node in NODES
    }
    for node, text in texts.items():
        with (fleet.srv(node) / "logs" / "app.log").open("ab") as log:
            for at in range(0, len(text), 40_000):
                log.write(text[at : at + 40_000])
                log.flush()
    for node, text in texts.items():
        archive = fleet.srv(node) / "archive"

        def is_kept(archive: Path = archive, text: bytes = text) -> bool:
            # What has less than a piece more stays in the log alone.
            return len(unpacked(archive, "app.log")) > len(text) - 65536

        until(is_kept, f"the archive of {node}")
        kept = unpacked(archive, "app.log")
        assert text.startswith(kept)
        assert kept.endswith(b"\n")
        packed = sum(path.stat().st_size for path in archive.glob("app.log.*"))
        assert packed < len(kept) / 3
    # A node that restarts goes on where it was.
    agent = fleet.agents[NODES[0]]
    agent.kill()
    agent.start()
    more = b"".join(b"%06d after the restart\n" % i for i in range(10_000))
    with (fleet.srv(NODES[0]) / "logs" / "app.log").open("ab") as log:
        log.write(more)
    whole = texts[NODES[0]] + more
    archive = fleet.srv(NODES[0]) / "archive"
    until(lambda: len(unpacked(archive, "app.log")) > len(whole) - 65536, "the rest")
    assert whole.startswith(unpacked(archive, "app.log"))
    fleet.run("delete", "job", "compress-logs", "--timeout", "60")


def test_a_service_falls_over_and_goes_on(fleet: Fleet) -> None:
    fleet.apply("worker")
    fleet.wait("worker", "running")
    (execution,) = fleet.executions("worker")
    srv = fleet.srv(execution["spec"]["node"])

    def give(name: str, text: str) -> None:
        draft = srv / "inbox" / f".{name}"
        draft.write_text(text)
        draft.rename(srv / "inbox" / name)

    give("one", "hello")
    until((srv / "done" / "one").exists, "the first piece of work")
    give("poison-1", "")
    give("two", "again")
    until((srv / "done" / "two").exists, "work after the fall")
    assert [(srv / "done" / name).read_text() for name in ("one", "two")] == ["HELLO", "AGAIN"]
    (after,) = fleet.executions("worker")
    assert after["metadata"]["name"] == execution["metadata"]["name"], "its node restarted it"
    assert "indigestible" in fleet.run("logs", "worker").stderr
    fleet.run("stop", "worker")
    fleet.run("delete", "job", "worker", "--timeout", "60")


@pytest.mark.parametrize("example", sorted(p.parent.name for p in EXAMPLES.glob("*/job.yaml")))
def test_every_example_is_listed_and_described(example: str) -> None:
    assert (EXAMPLES / example / "README.md").exists()
    assert f"[{example}]({example})" in (EXAMPLES / "README.md").read_text()


def test_the_merging_line_of_the_query_example_is_right(tmp_path: Path) -> None:
    """The awk program in its README puts the answers of nodes together."""
    text = (EXAMPLES / "query" / "README.md").read_text()
    (line,) = [line for line in text.splitlines() if "awk" in line]
    program = line[line.index("awk") :]
    told = subprocess.run(
        ["sh", "-c", program], input="A,2,10,4,6\nB,1,9,9,9\nA,1,7,7,7\n",
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.splitlines() == ["B 1 9", "A 3 7"]
