"""`serve --nats-url`: a NATS server that somebody else runs."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bacalhau.nats.binary import find_server
from tests.e2e.cluster import BACALHAU, ClusterError, Process, environment, left_over
from tests.e2e.test_thread import PROGRAMS, wasm_job

START_SECONDS = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def nats(*args: str) -> Iterator[str]:
    """The address of a nats-server that runs with these arguments."""
    port = free_port()
    command = [str(find_server()), "-a", "127.0.0.1", "-p", str(port), *args]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not answers(port):
                assert time.monotonic() < deadline, "nats-server did not start"
                time.sleep(0.05)
            yield f"nats://127.0.0.1:{port}"
        finally:
            server.terminate()


def serve(root: Path, url: str) -> Process:
    """Orchestrator and node in one, on that server."""
    data_dir = root / "all"
    data_dir.mkdir()
    args = ["--port", "0", "--nats-url", url, "--allow-path", f"{PROGRAMS}/**", "--on-exit", "stop"]
    return Process("all", data_dir, args)


def test_a_job_runs_on_a_server_of_ones_own(tmp_path: Path) -> None:
    with nats("-js", "-sd", str(tmp_path / "jetstream")) as url:
        process = serve(tmp_path, url)
        process.start()
        try:
            file = tmp_path / "hello.json"
            file.write_text(json.dumps(wasm_job("hello", "there", count=1)))
            for words in (("apply", "-f", str(file)), ("wait", "hello"), ("logs", "hello")):
                done = subprocess.run(
                    [*BACALHAU, *words],
                    env=environment() | {"BACALHAU_SERVER": process.address["api"]},
                    capture_output=True,
                    text=True,
                    check=True,
                    timeout=60,
                )
            assert "hello there" in done.stdout
        finally:
            assert process.stop() == 0
        assert "Durability of the NATS server is not known" in process.tail()
    assert left_over(tmp_path) == []


def test_a_server_without_jetstream_is_refused_by_name(tmp_path: Path) -> None:
    with nats() as url:
        process = serve(tmp_path, url)
        with pytest.raises(ClusterError, match="ended at start"):
            process.start()
    said = process.tail()
    assert "error: --nats-url: JetStream is not enabled for this account" in said
    assert "hint: " in said
    assert "Traceback" not in said
    assert process.popen is not None
    assert process.popen.wait(10) == 1
