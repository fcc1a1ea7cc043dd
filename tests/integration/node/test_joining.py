"""A node and its token: joining, coming back after it was deleted, and starting while cut off."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bacalhau.client import Client
from bacalhau.nats.keys import new_seed, public_key
from bacalhau.serve import compute
from bacalhau.serve.compute import Compute
from bacalhau.settings import ServeSettings
from bacalhau.system import SystemClock, SystemIds
from bacalhau_api.errors import InvalidError
from bacalhau_api.meta import Ref
from tests.support.api_server import RunningServer, running_server

KEY = public_key(new_seed())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with running_server(tmp_path / "nodes") as running:
        yield running


def a_token(server: RunningServer) -> str:
    with Client(server.url) as client:
        return client.create_join_token().token


def the_nodes(server: RunningServer) -> list[str]:
    return [node.name for node in server.all("Node")]


async def enrol(root: Path, url: str, token: str) -> str:
    (root / "node").mkdir(exist_ok=True)
    settings = ServeSettings(role="compute", data_dir=root, orchestrator_url=url, join_token=token)
    node = Compute(settings, "edge", SystemClock(), SystemIds(), None, lambda *_: None)
    return await node._enrol(KEY)


async def test_a_deleted_node_comes_back_with_a_token(
    tmp_path: Path, server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="bacalhau")
    with pytest.raises(InvalidError, match="has not joined"):
        await enrol(tmp_path, server.url, "")
    await enrol(tmp_path, server.url, a_token(server))
    assert the_nodes(server) == ["edge"]
    server.drop(Ref("Node", "", "edge"))

    assert await enrol(tmp_path, server.url, "") == "nats://127.0.0.1:4222"
    assert the_nodes(server) == [], "without a token it is what it was"
    assert await enrol(tmp_path, server.url, a_token(server)) == "nats://127.0.0.1:4222"
    assert the_nodes(server) == ["edge"]
    assert "Joined again with the token" in caplog.messages


async def test_a_node_that_was_not_deleted_uses_up_no_token(
    tmp_path: Path, server: RunningServer
) -> None:
    await enrol(tmp_path, server.url, a_token(server))
    token = a_token(server)
    await enrol(tmp_path, server.url, token)
    assert len(server.all("JoinToken")) == 1


async def test_a_full_disk_keeps_no_node_from_starting(
    tmp_path: Path, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "node").mkdir()
    kept = tmp_path / "node" / "membership.json"
    kept.write_text(json.dumps({"name": "edge", "natsUrl": "nats://elsewhere:4222"}))
    monkeypatch.setattr(compute, "write_private", full)
    assert await enrol(tmp_path, server.url, a_token(server)) == "nats://elsewhere:4222"
    assert the_nodes(server) == ["edge"]


@pytest.mark.parametrize("is_up", [False, True])
async def test_a_token_that_does_not_help_keeps_no_work_waiting(
    tmp_path: Path, server: RunningServer, caplog: pytest.LogCaptureFixture, is_up: bool
) -> None:
    membership = {"name": "edge", "natsUrl": "nats://o:4222"}
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "membership.json").write_text(json.dumps(membership))
    url = server.url if is_up else "http://127.0.0.1:1"
    assert await enrol(tmp_path, url, "bjt-wrong") == "nats://o:4222"
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "earlier membership" in warning.message
