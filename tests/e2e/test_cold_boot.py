"""A machine loses its power while it is cut off, and starts again with no orchestrator to ask: what
runs on it comes back by itself, and what it finished is delivered once when there is one again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bacalhau.cli.plain import fetch
from bacalhau.client import Client
from bacalhau.kinds import EXECUTION, STATUS_PATH
from bacalhau.localsocket import SOCKET_NAME
from bacalhau_api.errors import UnavailableError
from bacalhau_api.v1.execution import Acceptance, Execution, Phase
from tests.e2e.cluster import BACALHAU, Cluster, Process, environment, left_over
from tests.e2e.test_thread import PROGRAMS

REBOOTED = Path(__file__).parent / "rebooted.py"
FAILING = Path(__file__).parent / "failing.py"
ROOT = Path(__file__).parent.parent.parent
PATIENCE_SECONDS = 60.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    fleet = Cluster(tmp_path)
    gates = tmp_path / "gates"
    gates.mkdir()
    paths = ["--allow-path", f"{PROGRAMS}/**", "--allow-path", f"{gates}/**"]
    fleet.start(["edge-1"], args=[*paths, "--allow-path", str(gates), "--on-exit", "stop"])
    yield fleet
    fleet.close()


def local(node: Process, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """One command on the node's machine, where no orchestrator can be reached."""
    done = subprocess.run(
        [*BACALHAU, *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={
            **environment(),
            "BACALHAU_NODE_DIR": str(node.data_dir),
            "BACALHAU_SERVER": "http://127.0.0.1:9",
        },
    )
    assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}\n{node.tail()}"
    return done


def asked(node: Process, path: str) -> dict[str, Any]:
    """What the node's own socket answers."""
    server = f"unix:{node.data_dir / 'node' / SOCKET_NAME}"
    found: dict[str, Any] = json.loads(fetch(server, path, {}, ""))
    return found


def here(node: Process) -> dict[str, Any]:
    """The executions on the node by job, each job having one."""
    told = asked(node, EXECUTION.path())
    return {item["spec"]["job"]: item for item in told["items"]}


def status(node: Process) -> dict[str, Any]:
    return asked(node, STATUS_PATH)


def phase(item: dict[str, Any]) -> str:
    return str(item["status"]["report"]["phase"])


def run(item: dict[str, Any]) -> int:
    return int(item["status"]["report"]["run"])


def runs(item: dict[str, Any]) -> bool:
    return phase(item) == "Running"


def until(node: Process, is_so: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
    """Ask the node's own socket until it is so."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so(found := here(node)):
        assert time.monotonic() < deadline, f"{what}: {json.dumps(found, indent=1)}\n{node.tail()}"
        time.sleep(0.1)
    return found


def until_answers(node: Process) -> dict[str, Any]:
    """The executions on a node whose agent is just starting."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return here(node)
        except UnavailableError:
            assert time.monotonic() < deadline, node.tail()
            time.sleep(0.1)


def until_written(node: Process, job: str, text: str) -> None:
    """What runs has not written anything yet, perhaps."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (found := local(node, "logs", job, "--local").stdout) != text:
        assert text.startswith(found), found
        assert time.monotonic() < deadline, (found, node.tail())
        time.sleep(0.1)


def cut_power(node: Process) -> None:
    """Not one process of the agent, its engines or its workloads is left."""
    node.kill()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _is_of(entry, node.data_dir):
            with contextlib.suppress(ProcessLookupError):  # it went with another
                os.kill(int(entry.name), signal.SIGKILL)
    assert left_over(node.data_dir) == []


def _is_of(process: Path, data_dir: Path) -> bool:
    try:
        return str(data_dir).encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False


def boot(node: Process, name: str) -> None:
    """Start the agent as after a reboot."""
    node.wrap = (sys.executable, str(REBOOTED), name)
    with imports_from_here():
        node.start()


@contextlib.contextmanager
def imports_from_here() -> Iterator[None]:
    """What is started finds the packages of this checkout, also if it is a script elsewhere."""
    path = os.pathsep.join(str(ROOT / part) for part in (".", "api", "controllers"))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path if before is None else f"{path}{os.pathsep}{before}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def gate_job(name: str, gates: Path, kind: str = "batch", **spec: Any) -> dict[str, Any]:
    """A job that waits until its gate, a file of its name, is opened."""

    def local_input(path: Path, target: str) -> dict[str, Any]:
        source = {"type": "local", "params": {"sourcePath": str(path)}}
        return {"source": source, "target": target}

    task = {
        "name": "main",
        "engine": {
            "type": "wasm",
            "params": {"entryModule": "/app/gate.wasm", "parameters": [f"/gates/{name}"]},
        },
        "inputSources": [
            local_input(PROGRAMS / "gate.wasm", "/app/gate.wasm"),
            local_input(gates, "/gates"),
        ],
        "publisher": {"type": "local"},
        "resources": {"cpu": "100m", "memory": "64MiB"},
    }
    return {
        "apiVersion": "bacalhau.org/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"type": kind, "tasks": [task], **spec},
    }


def jobs(gates: Path) -> list[dict[str, Any]]:
    """One of each kind of work that a reboot can cut."""
    stop = {"action": "stop", "afterSeconds": 3600}
    return [
        gate_job("service", gates, "service"),
        gate_job("daemon", gates, "daemon"),
        gate_job("strict", gates, "service", disconnect=stop),
        gate_job("again", gates),
        gate_job(
            "reported", gates, restart={"interrupted": "report"}, retry={"attempts": 1}
        ),
        gate_job("finished", gates),
    ]  # fmt: skip


def test_a_machine_that_boots_alone(cluster: Cluster) -> None:
    node = cluster.agents["edge-1"]
    gates = cluster.root / "gates"
    file = cluster.root / "jobs.yaml"
    file.write_text("\n---\n".join(json.dumps(job) for job in jobs(gates)))
    cluster.run("apply", "-f", str(file))
    names = {job["metadata"]["name"] for job in jobs(gates)}
    until(node, lambda found: len(found) == len(names) and all(map(runs, found.values())), "start")
    incarnation = status(node)["incarnation"]

    # Cut off: work goes on, and what ends is kept.
    cluster.orchestrator.kill()
    (gates / "finished").touch()
    before = until(node, lambda found: phase(found["finished"]) == "Succeeded", "it finishes")
    assert before["finished"]["local"]["unsentFacts"] == 1
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (told := status(node))["connection"]["connected"]:  # the server ends with its parent
        assert time.monotonic() < deadline, told
        time.sleep(0.1)
    assert told["connection"]["lastContact"] == told["connection"]["since"]
    assert told["connection"]["lastError"]
    assert told["outbox"]["facts"] >= 1
    assert [one["name"].rsplit("-", 4)[0] for one in told["stopping"]] == ["strict"]
    words = local(node, "node", "status").stdout
    assert "cut off since" in words
    assert "strict" in words
    refused = local(node, "get", "jobs", check=False)
    assert refused.returncode == 6
    assert "bacalhau node status" in refused.stderr, "it says that an agent can be asked"
    until_written(node, "service", "waiting\n")
    assert local(node, "logs", "finished", "--local", "-f").stdout == "waiting\nthrough\n"

    # The power fails, and comes back; nobody else does.
    cut_power(node)
    boot(node, "second-boot")
    until(
        node,
        lambda found: (
            all(run(found[name]) == 2 for name in ("service", "daemon", "again"))
            and phase(found["reported"]) == "Failed"
        ),
        "everything is taken up",
    )
    (gates / "again").touch()
    after = until(node, lambda found: phase(found["again"]) == "Succeeded", "it ends")
    assert set(after) == names
    assert {phase(after[name]) for name in ("service", "daemon")} == {"Running"}
    assert {name: run(after[name]) for name in ("service", "daemon", "again", "finished")} == {
        "service": 2,
        "daemon": 2,
        "again": 2,
        "finished": 1,
    }
    assert after["reported"]["status"]["report"]["reason"] == "Interrupted"
    assert after["strict"]["status"]["report"]["waiting"]["what"] == "Contact", (
        "it may be running elsewhere by now: it waits for word"
    )
    assert status(node)["incarnation"] == incarnation
    until_written(node, "service", "waiting\nwaiting\n")
    described = local(
        node, "describe", f"execution/{after['again']['metadata']['name']}", "--local"
    )
    assert "not acknowledged yet" in described.stdout

    # The orchestrator is back: everything is delivered, and nothing of it twice.
    cluster.orchestrator.start()
    for name in ("finished", "again"):
        cluster.run("wait", name, "--for", "delivered", "--timeout", "60")
    until(node, lambda found: runs(found["strict"]), "the strict one runs again")
    with Client(cluster.server) as client:
        acceptances = list(client.list(Acceptance))
        executions = list(client.list(Execution))
    for name in ("finished", "again"):
        (accepted,) = (one for one in acceptances if one.spec.job == name)
        (execution,) = (one for one in executions if one.spec.job == name)
        assert accepted.spec.execution == execution.name
        assert execution.status.report is not None
        assert execution.status.report.run == run(after[name])
    assert cluster.run("logs", "again").stdout == "waiting\nthrough\n", "of the run that counts"
    for name in ("service", "daemon", "strict"):
        mine = [one for one in executions if one.spec.job == name]
        assert len(mine) == 1, [str(one.status.report) for one in mine]
        assert mine[0].status.report is not None
        assert mine[0].status.report.run == 2, "the one before the power failed, and one after"
    first = min(
        (one for one in executions if one.spec.job == "reported"), key=lambda one: one.spec.attempt
    )
    assert first.status.report is not None
    assert (first.phase, first.status.report.run) == (Phase.FAILED, 1)
    until(
        node, lambda found: not any(one["local"]["unsentFacts"] for one in found.values()), "sent"
    )
    assert status(node)["connection"]["connected"]


def test_a_failure_of_the_agent_ends_no_work(cluster: Cluster) -> None:
    """Told to stop its workloads when it ends, it does so when it is asked to end, not when
    something breaks. The next agent starts although the disk is too full for its address file."""
    node = cluster.agents["edge-1"]
    gates = cluster.root / "gates"
    node.stop()
    node.wrap = (sys.executable, str(FAILING))
    with imports_from_here():
        node.start()
    file = cluster.root / "job.yaml"
    file.write_text(json.dumps(gate_job("kept", gates)))
    cluster.run("apply", "-f", str(file))
    until(node, lambda found: "kept" in found and runs(found["kept"]), "start")

    assert node.popen is not None
    node.popen.send_signal(signal.SIGUSR1)
    assert node.popen.wait(20) == 1, node.tail()
    assert "Part of the process failed" in node.tail()

    node.wrap = ()
    (node.data_dir / "serve.tmp").symlink_to("/dev/full")
    node.launch()
    found = until_answers(node)
    assert (phase(found["kept"]), run(found["kept"])) == ("Running", 1)
    (gates / "kept").touch()
    cluster.run("wait", "kept", "--for", "delivered", "--timeout", "60")
    assert cluster.run("logs", "kept").stdout == "waiting\nthrough\n", "one run, from end to end"
    assert "Failed to leave the addresses" in node.tail()
    assert node.stop() == 0
    assert left_over(node.data_dir) == []
