"""Messages that are none: cut off anywhere, of another version, not of our kind. Neither end is
harmed, and each says what it dropped."""

import asyncio
import contextlib
import random
from typing import Any, cast

import pytest

from bacalhau.nats.endpoint import NodeEndpoint
from bacalhau.nats.transport import Transport
from bacalhau.node.link import NatsLink
from bacalhau.node.reader import OutputReader
from bacalhau_api.errors import UnavailableError
from bacalhau_api.v1.node import NodeInfo
from bacalhau_api.wire import (
    Ack,
    Applied,
    Beat,
    BeatReply,
    Changes,
    FactBatch,
    Hello,
    Refused,
    Welcome,
    WelcomePart,
)
from bacalhau_controllers.gateway import Gateway
from tests.support.simclock import EPOCH

IDS: dict[str, Any] = {"node": "n1", "session": "s"}
NO_MESSAGES = [
    b"", b"{", b"null", b"5", b"true", b"[]", b'"reason"', b'["part", "reason"]', b"\xff\xfe\x00",
    b"[" * 100_000, b'{"node": "n1", "session": "s", "later": 1}', b'{"node": 5, "session": []}',
]  # fmt: skip
REQUESTS = {
    "hello": Hello(incarnation="i", info=NodeInfo(), **IDS),
    "facts": FactBatch(incarnation="i", facts=(), **IDS),
    "beat": Beat(changes_seen=0, **IDS),
}
REPLIES = {
    "hello": Welcome(time=EPOCH, **IDS),
    "facts": Ack(seq=1, **IDS),
    "beat": BeatReply(**IDS),
}


def harmed(whole: bytes) -> list[bytes]:
    """A message cut off at each length, and with bytes changed."""
    rng = random.Random(5)
    found = [whole[:size] for size in range(len(whole))]
    for _ in range(50):
        data = bytearray(whole)
        data[rng.randrange(len(data))] = rng.randrange(256)
        found.append(bytes(data))
    return found


class Line:
    """Stands in for NATS: what is answered is given."""

    def __init__(self) -> None:
        self.answer = b""
        self.published: list[bytes] = []

    async def request(self, subject: str, payload: bytes, **_: Any) -> Any:
        return Message("", self.answer)

    async def publish(self, subject: str, payload: bytes = b"", **_: Any) -> None:
        self.published.append(payload)


class Message:
    headers: dict[str, str] | None = None

    def __init__(self, subject: str, data: bytes) -> None:
        self.subject, self.reply, self.data = subject, "reply", data


class Served:
    """In the place of the gateway: has an answer to whatever is a message."""

    def hello(self, hello: Hello) -> Refused:
        return Refused(reason="No", message="no", **IDS)

    def welcome_part(self, ask: WelcomePart) -> Refused:
        return Refused(reason="No", message="no", **IDS)

    async def facts(self, batch: FactBatch) -> Ack:
        return Ack(seq=0, **IDS)

    def beat(self, beat: Beat) -> BeatReply:
        return BeatReply(**IDS)


@pytest.mark.parametrize("verb", REQUESTS)
async def test_the_orchestrator_drops_what_is_no_message(
    verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    line = Line()
    endpoint = NodeEndpoint(cast(Transport, line))
    endpoint._gateway = cast(Gateway, Served())
    for data in NO_MESSAGES:
        await endpoint._serve(Message(f"node.n1.{verb}", data))
    assert not line.published
    assert caplog.text.count("Dropped a malformed message of a node") == len(NO_MESSAGES)
    for data in harmed(REQUESTS[verb].encode()):
        await endpoint._serve(Message(f"node.n1.{verb}", data))
    await endpoint._serve(Message(f"node.n1.{verb}", REQUESTS[verb].encode()))
    assert line.published


@pytest.mark.parametrize("verb", REPLIES)
async def test_a_node_takes_no_answer_that_is_none(verb: Any) -> None:
    line = Line()
    link = NatsLink("n1", cast(Transport, line), cast(OutputReader, None))
    link._session = "s"
    for data in NO_MESSAGES:
        line.answer = data
        with pytest.raises(UnavailableError, match="malformed answer"):
            await link.request(verb, cast(Any, REQUESTS[verb]))
    for data in harmed(REPLIES[verb].encode()):
        line.answer = data
        with contextlib.suppress(UnavailableError):
            await link.request(verb, cast(Any, REQUESTS[verb]))
    line.answer = REPLIES[verb].encode()
    assert await link.request(verb, cast(Any, REQUESTS[verb])) == REPLIES[verb]


async def test_a_node_applies_no_changes_that_are_none(caplog: pytest.LogCaptureFixture) -> None:
    line = Line()
    link = NatsLink("n1", cast(Transport, line), cast(OutputReader, None))
    link._session = "s"
    applied: list[Changes] = []

    async def apply(changes: Changes) -> Applied:
        applied.append(changes)
        return Applied(number=changes.number, **IDS)

    link._on_changes = apply

    async def receive(data: bytes) -> None:
        await link._received(Message("agent.n1.changes", data))
        await asyncio.gather(*link._changing)

    for data in NO_MESSAGES:
        await receive(data)
    assert not applied
    assert caplog.text.count("Dropped a malformed message") == len(NO_MESSAGES)
    whole = Changes(number=1, **IDS).encode()
    for size in range(len(whole)):
        await receive(whole[:size])
    assert not applied
    await receive(whole)
    assert len(applied) == 1
