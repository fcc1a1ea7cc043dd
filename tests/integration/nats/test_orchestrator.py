"""The orchestrator and the keys of its nodes: no entry in the store keeps it, or others, out."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from bacalhau.nats.connection import Connection, Credentials
from bacalhau.nats.keys import new_seed, public_key
from bacalhau.nats.server import EmbeddedNats, NodeUser
from bacalhau.serve.orchestrator import Orchestrator
from bacalhau.settings import ServeSettings
from bacalhau.system import SystemClock, SystemIds
from bacalhau_api.errors import InvalidError, UnavailableError
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.v1.node import Node, NodeSpec
from tests.support.nats import eventually, kill, open_store, running_server
from tests.support.stores import T0, create, uid

SEED = new_seed()
KEY = public_key(SEED)


@pytest.fixture
def failures() -> list[str]:
    return []


@asynccontextmanager
async def running(data_dir: Path, failures: list[str]) -> AsyncIterator[Orchestrator]:
    settings = ServeSettings(
        role="orchestrator", data_dir=data_dir, listen_port=0, nats_port=-1, insecure_lab=True
    )
    made = Orchestrator(
        settings, SystemClock(), SystemIds(), lambda part, error: failures.append(part)
    )
    async with made:
        yield made


def stored(name: str, key: str, minute: int) -> Node:
    created = T0 + timedelta(minutes=minute)
    meta = ObjectMeta(name=name, namespace="", uid=uid(), creation_timestamp=created)
    return Node(metadata=meta, spec=NodeSpec(public_key=key))


async def sign_in(made: Orchestrator, seed: str) -> None:
    """Raises UnavailableError if that cannot be done."""
    line = Connection(made.nats_url, Credentials(seed=seed))
    await line.open()
    await line.close()


async def test_bad_and_doubled_keys_keep_nobody_else_out(
    tmp_path: Path, failures: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As they may lie in a store: it starts, and the older of two with one key is the node."""
    other = new_seed()
    async with running_server(tmp_path / "nats") as server, open_store(server) as store:
        await create(
            store,
            stored("bad", "U" + "A" * 55, 0),
            stored("hub", public_key(server.credentials.seed), 0),
            stored("younger", KEY, 2),
            stored("zeta", KEY, 1),
            stored("other", public_key(other), 3),
        )
    async with running(tmp_path, failures) as made:
        await sign_in(made, SEED)
        await sign_in(made, other)
        await made.enrolment.ensure("zeta", KEY)
        with pytest.raises(InvalidError, match="belongs to node zeta"):
            await made.enrolment.ensure("younger", KEY)
    problems = {str(getattr(record, "problem", "")).partition(":")[0] for record in caplog.records}
    assert problems >= {"node bad", "node hub", "node younger"}
    assert not failures


async def test_a_data_directory_that_is_given_another_name(
    tmp_path: Path, failures: list[str]
) -> None:
    """The seed stays in it, so the key comes again under the other name: nothing is stored."""
    for name, refused in (("alpha", False), ("beta", True), ("alpha", False)):
        async with running(tmp_path, failures) as made:
            if refused:
                with pytest.raises(InvalidError, match=r"--name: .* belongs to node alpha") as got:
                    await made.enrolment.ensure(name, KEY)
                assert got.value.hint == "give that name, or another --data-dir"
            else:
                await made.enrolment.ensure(name, KEY)
                await sign_in(made, SEED)
            listed = await made.enrolment._state.store.list("Node")
            assert [node.name for node in listed.items] == ["alpha"]


async def test_users_that_the_server_does_not_take_are_told_again(
    tmp_path: Path, failures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, refusals = EmbeddedNats.set_nodes, 2

    async def refuse(self: EmbeddedNats, nodes: Sequence[NodeUser]) -> tuple[NodeUser, ...]:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise UnavailableError("the disk is full")
        return await original(self, nodes)

    monkeypatch.setattr("bacalhau.serve.orchestrator.USERS_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(EmbeddedNats, "set_nodes", refuse)
    async with running(tmp_path, failures) as made:
        await eventually(lambda: not refusals, "the second try")
        await made.enrolment.ensure("alpha", KEY)
        await sign_in(made, SEED)
    assert not failures


async def test_without_a_supervised_server_the_process_ends(
    tmp_path: Path, failures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: EmbeddedNats) -> str:
        raise RuntimeError("broken")

    async with running(tmp_path, failures) as made:
        monkeypatch.setattr(EmbeddedNats, "_log_tail", broken)
        assert made._embedded is not None
        kill(made._embedded)
        await eventually(lambda: "nats" in failures, "the report")
