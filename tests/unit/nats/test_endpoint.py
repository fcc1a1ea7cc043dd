"""The orchestrator's end of the lines to nodes, without a line."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

from bacalhau.nats.endpoint import REQUESTS_MAX, NodeEndpoint
from bacalhau.nats.transport import Handler, Transport
from bacalhau_api.wire import Ack, Beat, BeatReply, FactBatch
from bacalhau_controllers.gateway import Gateway


@dataclass
class Request:
    """A message of a node."""

    subject: str
    data: bytes
    reply: str
    headers: dict[str, str] | None = None


@dataclass
class Wire:
    """Hands messages over one after the other, as a client does for each subscription."""

    handlers: dict[str, Handler] = field(default_factory=dict)
    replies: list[str] = field(default_factory=list)

    async def subscribe(self, subject: str, handler: Handler, **_: Any) -> "Wire":
        self.handlers[subject.rpartition(".")[2]] = handler
        return self

    async def publish(self, subject: str, payload: bytes = b"", **_: Any) -> None:
        self.replies.append(subject)

    async def close(self) -> None:
        self.handlers.clear()


class Stuck:
    """Facts wait for a store that does not answer; beats are answered from memory."""

    async def facts(self, batch: FactBatch) -> Ack:
        await asyncio.Event().wait()
        raise AssertionError

    def beat(self, beat: Beat) -> BeatReply:
        return BeatReply(node=beat.node, session=beat.session)


async def test_beats_do_not_wait_behind_facts() -> None:
    wire = Wire()
    endpoint = NodeEndpoint(cast(Transport, wire))
    await endpoint.open(cast(Gateway, Stuck()))
    batch = FactBatch(node="n", session="s", incarnation="i", facts=()).encode()
    beat = Beat(node="n", session="s", changes_seen=0).encode()
    for number in range(REQUESTS_MAX):
        await wire.handlers["facts"](Request("node.n.facts", batch, f"facts{number}"))
    async with asyncio.timeout(5):
        await wire.handlers["beat"](Request("node.n.beat", beat, "beat"))
    assert wire.replies == ["beat"]
    await endpoint.close()
