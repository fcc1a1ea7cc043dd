"""What a node can and cannot do with its credentials, against the real server.

Each test that something is impossible also shows that the same thing works for who may do it.
"""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from bacalhau.nats.config import TlsFiles
from bacalhau.nats.connection import Connection, Credentials, connect
from bacalhau.nats.keys import new_seed, public_key
from bacalhau.nats.server import EmbeddedNats, NodeUser
from bacalhau.nats.subjects import agent_subject, node_inbox, node_subject
from bacalhau.nats.transport import Message
from bacalhau_api.errors import OutcomeUnknownError, UnavailableError
from tests.support.nats import (
    WAIT_SECONDS,
    eventually,
    kill,
    open_connection,
    open_store,
    running_server,
)
from tests.support.stores import create, node

SEEDS = {name: new_seed() for name in ("a", "b.x")}
USERS = [NodeUser(name, public_key(seed)) for name, seed in SEEDS.items()]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedNats]:
    async with running_server(tmp_path) as running:
        await running.set_nodes(USERS)
        yield running


@asynccontextmanager
async def node_line(server: EmbeddedNats, name: str) -> AsyncIterator[Connection]:
    """A node's connection, as its agent makes it."""
    line = Connection(
        server.node_url, Credentials(seed=SEEDS[name]), inbox_prefix=node_inbox(name), name=name
    )
    await line.open()
    try:
        yield line
    finally:
        await line.close()


@asynccontextmanager
async def hostile(server: EmbeddedNats, name: str) -> AsyncIterator[tuple[Client, list[str]]]:
    """A client of a node that has been taken over, and the errors that the server sends it."""
    errors: list[str] = []

    async def note(error: Exception) -> None:
        errors.append(str(error))

    client = await connect(
        server.node_url, Credentials(seed=SEEDS[name]), node_inbox(name), name, error_cb=note
    )
    try:
        yield client, errors
    finally:
        await client.close()


async def denied(client: Client, errors: list[str], what: str) -> None:
    """Return once the server has refused `what` (nats-py puts its words in lower case)."""

    def is_refused() -> bool:
        return any("permissions" in error and what.lower() in error for error in errors)

    await client.flush()
    await eventually(is_refused, f"the refusal of {what}")


async def serve(line: Connection, subject: str, answer: bytes) -> list[Message]:
    """Answer requests; returns where they are noted."""
    got: list[Message] = []

    async def reply(message: Message) -> None:
        got.append(message)
        await line.publish(message.reply, answer)

    await line.subscribe(subject, reply)
    return got


async def ask(line: Connection, subject: str, *, timeout: float = 5.0) -> Message:
    """A request, repeated while the other side is not subscribed yet."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            try:
                return await line.request(subject, b"hi", timeout=timeout)
            except UnavailableError:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("name", list(SEEDS))
async def test_requests_go_both_ways(server: EmbeddedNats, name: str) -> None:
    async with open_connection(server) as hub, node_line(server, name) as line:
        got = await serve(hub, node_subject("*", "hello"), b"welcome")
        assert (await ask(line, node_subject(name, "hello"))).data == b"welcome"
        assert [message.subject for message in got] == [node_subject(name, "hello")]
        await serve(line, agent_subject(name, ">"), b"applied")
        assert (await ask(hub, agent_subject(name, "outputs.read"))).data == b"applied"


async def test_large_answers_pass(server: EmbeddedNats) -> None:
    piece = b"x" * 600_000
    async with open_connection(server) as hub, node_line(server, "a") as line:
        await serve(line, agent_subject("a", "outputs.read"), piece)
        assert (await ask(hub, agent_subject("a", "outputs.read"))).data == piece


async def test_a_node_cannot_speak_for_another(server: EmbeddedNats) -> None:
    async with open_connection(server) as hub, hostile(server, "a") as (client, errors):
        got = await serve(hub, node_subject("*", ">"), b"ok")
        for subject in ("node.b=2Ex.facts", "node.facts", "agent.b=2Ex.changes", "agent.a.logs"):
            await client.publish(subject, b"forged")
            await denied(client, errors, f'"{subject}"')
        await client.publish("node.a.facts", b"own")
        await eventually(lambda: bool(got))
        assert [message.data for message in got] == [b"own"]


@pytest.mark.parametrize(
    "subject",
    [
        "agent.b=2Ex.>", "agent.>", "agent.*.changes", ">", "node.>", "_INBOX_b=2Ex.>", "_INBOX.>",
        "_R_.>", "$SYS.>", "$JS.>", "o.>", "h.>",
    ],
)  # fmt: skip
async def test_a_node_cannot_listen_to_others(server: EmbeddedNats, subject: str) -> None:
    async with hostile(server, "a") as (client, errors):

        async def heard(message: Message) -> None:
            raise AssertionError(f"heard {message.subject}")

        await client.subscribe(subject, cb=heard)
        await denied(client, errors, f'"{subject}"')


@pytest.mark.parametrize(
    "subject",
    [
        "$JS.API.INFO",
        "$JS.API.STREAM.INFO.BACALHAU",
        "$JS.API.STREAM.MSG.GET.BACALHAU",
        "$JS.API.DIRECT.GET.BACALHAU.o.Node.=.victim",
        "$JS.API.STREAM.PURGE.BACALHAU",
        "$JS.API.CONSUMER.CREATE.BACALHAU.x.o.>",
        "o.Node.=.victim",
        "h.Node.=.victim.u.1",
        "f.leader",
        "l.leader",
        "$KV.x.y",
        "$SYS.REQ.SERVER.PING",
        "$SYS.REQ.ACCOUNT.CP.CONNZ",
    ],
)
async def test_a_node_cannot_reach_the_store(server: EmbeddedNats, subject: str) -> None:
    async with open_store(server) as store, hostile(server, "a") as (client, errors):
        await create(store, node("victim"))
        before = await store.list()
        await client.publish(subject, b"{}", reply=client.new_inbox())
        await denied(client, errors, f'"{subject}"')
        assert await store.list() == before


async def test_a_reply_cannot_be_steered_into_the_store(server: EmbeddedNats) -> None:
    """Replies are not checked by permissions. In one shared account a node could name an object
    as its reply subject, and the controllers' own answer would be written there."""
    async with open_store(server) as store, open_connection(server) as hub:
        await create(store, node("victim"))
        before = await store.list()
        got = await serve(hub, node_subject("*", ">"), b'{"forged":true}')
        async with hostile(server, "a") as (client, _):
            for target in (
                "o.Node.=.victim",
                "o.Node.=.new",
                "h.Node.=.victim.u.0",
                "f.leader",
                "$JS.API.STREAM.PURGE.BACALHAU",
            ):
                await client.publish("node.a.hello", b"hi", reply=target)
            await eventually(lambda: len(got) == 5)
        # The hub sees a subject of the server's making instead of what the node asked for.
        assert all(message.reply.startswith("_R_.") for message in got)
        await asyncio.sleep(0.1)
        assert await store.list() == before
        # Such a write does work for who owns the store: the subject is one that could be hit.
        await hub.request("o.Node.=.new", b"{}")
        assert (await hub.request("$JS.API.STREAM.MSG.GET.BACALHAU",
                b'{"last_by_subj":"o.Node.=.new"}')).data  # fmt: skip


async def test_a_node_answers_only_what_it_was_asked(server: EmbeddedNats) -> None:
    """The right to answer is for one message, to the subject of the request."""
    async with open_connection(server) as hub, hostile(server, "a") as (client, errors):
        replies: list[str] = []

        async def answer(message: Message) -> None:
            replies.append(message.reply)
            await client.publish(message.reply, b"one")
            await client.publish(message.reply, b"two")

        await client.subscribe(agent_subject("a", ">"), cb=answer)
        assert (await ask(hub, agent_subject("a", "logs"))).data == b"one"
        await denied(client, errors, replies[0])


async def test_adding_a_node_disturbs_nobody(server: EmbeddedNats) -> None:
    seed = new_seed()
    async with node_line(server, "a") as line, open_connection(server) as hub:
        newcomer = Connection(server.node_url, Credentials(seed=seed))
        with pytest.raises(UnavailableError, match="uthorization"):
            await newcomer.open(
                timeout=3
            )  # the server's answer may be lost in a reset, now and then
        await server.set_nodes([*USERS, NodeUser("c", public_key(seed))])
        await newcomer.open()
        assert line.generation == hub.generation == newcomer.generation == 1
        assert line.is_connected
        assert hub.is_connected
        await newcomer.close()


async def test_removing_a_node_cuts_it_off(server: EmbeddedNats) -> None:
    async with node_line(server, "a") as kept, node_line(server, "b.x") as removed:
        lost = asyncio.Event()
        removed.listen(lambda is_connected: lost.set() if not is_connected else None)
        await server.set_nodes([USERS[0]])
        async with asyncio.timeout(WAIT_SECONDS):
            await lost.wait()
        with pytest.raises(UnavailableError):
            await removed.wait_connected(1)
        assert kept.is_connected
        await server.set_nodes(USERS)
        await removed.wait_connected(WAIT_SECONDS)


async def test_nodes_are_kept_through_a_crash_of_the_server(server: EmbeddedNats) -> None:
    async with node_line(server, "a") as line:
        kill(server)
        await eventually(lambda: line.generation > 1 and line.is_connected)


async def test_setting_nodes_often_at_once(server: EmbeddedNats) -> None:
    many = [NodeUser(f"n{i}", public_key(new_seed())) for i in range(20)]
    await asyncio.gather(*(server.set_nodes([*USERS, *many[:i]]) for i in range(20)))
    async with node_line(server, "a"):
        pass
    config = json.loads((server._settings.data_dir / "nats-server.conf").read_text())
    assert len(config["accounts"]["NODES"]["users"]) == len(USERS) + 19


async def test_without_credentials_nobody_gets_in(server: EmbeddedNats) -> None:
    for credentials in (None, Credentials(user="sys", password="x"), Credentials(seed=new_seed())):
        with pytest.raises((UnavailableError, NatsError)):
            await connect(server.url, credentials, timeout=1)


async def test_unanswered_requests(server: EmbeddedNats) -> None:
    async with open_connection(server) as hub, node_line(server, "a") as line:
        with pytest.raises(UnavailableError, match="nobody answers"):
            await line.request(node_subject("a", "hello"))
        silent = asyncio.Event()

        async def ignore(message: Message) -> None:
            silent.set()

        await hub.subscribe(node_subject("*", "hello"), ignore)
        with pytest.raises(OutcomeUnknownError, match="no answer"):
            await ask(line, node_subject("a", "hello"), timeout=0.2)
        await eventually(silent.is_set, "the request")


async def test_the_plain_client_meets_the_same_server(server: EmbeddedNats) -> None:
    client = await connect(server.url, server.credentials, "_INBOX", "plain")
    try:
        with pytest.raises(NoRespondersError):
            await client.request("nothing.there", timeout=1)
    finally:
        await client.close()


async def test_tls(tmp_path: Path) -> None:
    """With certificates, nobody gets in without; the controllers trust exactly the server's."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    await asyncio.to_thread(
        subprocess.run,
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=hub"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    async with running_server(tmp_path / "data", tls=TlsFiles(cert, key)) as running:
        assert running.url.startswith("tls://")
        trusting = Connection(running.url, running.credentials, tls=running.tls)
        await trusting.open()
        await trusting.request("$JS.API.INFO")
        await trusting.close()
        doubting = Connection(running.url, running.credentials)
        with pytest.raises(UnavailableError, match=r"(?i)certificate"):
            await doubting.open(timeout=2)
