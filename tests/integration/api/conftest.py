"""A running server for each test."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bacalhau.cli.app import run
from bacalhau.client.sync import Client
from tests.support.api_server import RunningServer, Shell, running_server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    """A server with an empty store."""
    with running_server(tmp_path / "nodes") as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    """A client of it."""
    with Client(server.url) as made:
        yield made


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    """Plain HTTP to it."""
    with httpx.Client(base_url=server.url, trust_env=False, timeout=20) as made:
        yield made


@pytest.fixture
def shell(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    """Run a command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("BACALHAU_SERVER", server.url)
    monkeypatch.delenv("BACALHAU_TOKEN", raising=False)

    def run_line(*words: str) -> tuple[int, str, str]:
        code = run(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_line
