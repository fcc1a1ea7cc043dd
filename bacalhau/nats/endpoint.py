"""The orchestrator's end of the lines to its nodes: serves `node.*`, sends to `agent.*`.

One object is all three things that need those lines: it feeds the gateway with requests, carries
the gateway's pushes (`Transport`), and reads logs and outputs for the API (`NodeReader`).
"""

import asyncio
import logging
from typing import TypeVar

from pydantic import ValidationError

from bacalhau.nats.subjects import agent_subject, decode_token, node_subject
from bacalhau.nats.transport import Message, Subscription, Transport, has_field
from bacalhau.server.ports import LogStream
from bacalhau_api.base import Model
from bacalhau_api.errors import (
    BacalhauError,
    NotFoundError,
    TransientError,
    UnavailableError,
)
from bacalhau_api.wire import (
    Applied,
    Beat,
    Changes,
    FactBatch,
    Hello,
    LogChunk,
    LogRead,
    OutputRead,
    OutputsList,
    OutputsPage,
    PinRequest,
    WelcomePart,
)
from bacalhau_controllers.gateway import Gateway
from bacalhau_controllers.manifest import PinDesk

logger = logging.getLogger(__name__)

REQUESTS_MAX = 512
"""Requests of nodes that wait for the store at once; NATS holds back the rest, and nodes ask
again."""

_FROM_MEMORY = (".hello", ".beat")

READ_TIMEOUT_SECONDS = 15.0

Answer = TypeVar("Answer", bound=Model)


class NodeEndpoint:
    """Serves nodes over one NATS connection of the controllers' account."""

    def __init__(self, nats: Transport) -> None:
        self._nats = nats
        self._gateway: Gateway | None = None
        self._desk: PinDesk | None = None
        self._slots = asyncio.Semaphore(REQUESTS_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscriptions: list[Subscription] = []

    async def open(self, gateway: Gateway, desk: PinDesk | None = None) -> None:
        """Begin to answer nodes."""
        self._gateway, self._desk = gateway, desk
        for verb in ("hello", "facts", "beat", "pins"):
            self._subscriptions.append(
                await self._nats.subscribe(node_subject("*", verb), self._received)
            )

    async def close(self) -> None:
        """Stop answering; requests under way are dropped, and asked again by their nodes."""
        for subscription in self._subscriptions:
            await subscription.close()
        self._subscriptions.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- from nodes ----------------------------------------------------------------------------

    async def _received(self, msg: Message) -> None:
        """What is answered from memory does not wait for a slot: while a slow store holds all of
        them with facts, nodes whose beats are not heard would count as silent."""
        if msg.subject.endswith(_FROM_MEMORY):
            await asyncio.wait({self._begin(msg)})
            return
        await self._slots.acquire()
        self._begin(msg).add_done_callback(lambda _: self._slots.release())

    def _begin(self, msg: Message) -> asyncio.Task[None]:
        task = asyncio.create_task(self._serve(msg))
        self._tasks.add(task)
        task.add_done_callback(self._served)
        return task

    def _served(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("Failed to answer a node", exc_info=task.exception())

    async def _serve(self, msg: Message) -> None:
        """Answer one request. What is malformed gets no answer: only a broken or hostile node
        sends it, and the log says which."""
        assert self._gateway is not None
        _, token, verb = msg.subject.split(".", 2)
        handler = {
            "hello": self._hello,
            "facts": self._facts,
            "beat": self._beat,
            "pins": self._pins,
        }[verb]
        try:
            reply = await handler(decode_token(token), msg.data)
        except (ValidationError, ValueError) as error:
            logger.warning(
                "Dropped a malformed message of a node",
                extra={"subject": msg.subject, "error": str(error)[:500]},
            )
            return
        except BacalhauError as error:
            # No answer: the node sends it again.
            logger.warning(
                "Failed to serve a node", extra={"subject": msg.subject, "error": error.message}
            )
            return
        if msg.reply:
            try:
                await self._nats.publish(msg.reply, reply.encode())
            except UnavailableError as error:
                logger.info("Failed to answer a node", extra={"error": error.message})

    async def _hello(self, node: str, data: bytes) -> Model:
        assert self._gateway is not None
        if has_field(data, "part"):
            ask = _named(WelcomePart.decode(data), node)
            return self._gateway.welcome_part(ask)
        return self._gateway.hello(_named(Hello.decode(data), node))

    async def _facts(self, node: str, data: bytes) -> Model:
        assert self._gateway is not None
        return await self._gateway.facts(_named(FactBatch.decode(data), node))

    async def _beat(self, node: str, data: bytes) -> Model:
        assert self._gateway is not None
        return self._gateway.beat(_named(Beat.decode(data), node))

    async def _pins(self, node: str, data: bytes) -> Model:
        if self._desk is None:
            raise UnavailableError("manifests are not served here")
        return await self._desk.answer(_named(PinRequest.decode(data), node))

    # -- to nodes: Transport -------------------------------------------------------------------

    async def push(self, changes: Changes, timeout_seconds: float) -> None:
        """Deliver changes; see `gateway.Transport`."""
        data = await self._ask(changes.node, "changes", changes, timeout_seconds)
        applied = _decoded(Applied, data)
        if applied.number != changes.number or applied.session != changes.session:
            raise UnavailableError(f"node {changes.node} answered for another session")

    # -- to nodes: NodeReader ------------------------------------------------------------------

    async def read_log(
        self,
        node: str,
        namespace: str,
        execution: str,
        stream: LogStream,
        offset: int | None,
        tail_lines: int | None,
        wait_seconds: float,
    ) -> LogChunk:
        """See `bacalhau.server.ports.NodeReader`."""
        ask = LogRead(
            node=node,
            session=self._session(node),
            namespace=namespace,
            execution=execution,
            stream=stream,
            offset=offset,
            tail_lines=tail_lines,
            wait_seconds=wait_seconds,
        )
        data = await self._ask(node, "logs", ask, READ_TIMEOUT_SECONDS + wait_seconds)
        chunk = _decoded(LogChunk, data)
        if chunk.error:
            raise NotFoundError(chunk.error)
        return chunk

    async def list_outputs(
        self, node: str, namespace: str, execution: str, after: str
    ) -> OutputsPage:
        """See `bacalhau.server.ports.NodeReader`."""
        ask = OutputsList(
            node=node,
            session=self._session(node),
            namespace=namespace,
            execution=execution,
            after=after,
        )
        page = _decoded(
            OutputsPage, await self._ask(node, "outputs.list", ask, READ_TIMEOUT_SECONDS)
        )
        if page.error:
            raise NotFoundError(page.error)
        return page

    async def read_output(
        self, node: str, namespace: str, execution: str, path: str, offset: int, size: int
    ) -> bytes:
        """See `bacalhau.server.ports.NodeReader`."""
        ask = OutputRead(
            node=node,
            session=self._session(node),
            namespace=namespace,
            execution=execution,
            path=path,
            offset=offset,
            size_bytes_max=size,
        )
        return await self._ask(node, "outputs.read", ask, READ_TIMEOUT_SECONDS)

    def _session(self, node: str) -> str:
        session = self._gateway.session_of(node) if self._gateway else None
        if session is None:
            raise UnavailableError(
                f"node {node} is not connected",
                hint="what it holds can be read when it is back; see: bacalhau get nodes",
            )
        return session

    async def _ask(self, node: str, verb: str, message: Model, timeout_seconds: float) -> bytes:
        try:
            reply = await self._nats.request(
                agent_subject(node, verb), message.encode(), timeout=timeout_seconds
            )
        except TransientError as error:
            raise UnavailableError(f"node {node} did not answer: {error.message}") from error
        failure = (reply.headers or {}).get("Error")
        if failure:
            busy = (reply.headers or {}).get("Busy")
            raise UnavailableError(failure) if busy else NotFoundError(failure)
        return bytes(reply.data)


Named = TypeVar("Named", Hello, WelcomePart, PinRequest, FactBatch, Beat)


def _named(message: Named, node: str) -> Named:
    """NATS vouches for the name in the subject; the one in the message must be the same."""
    if message.node != node:
        raise ValueError(f"node {node} speaks in the name of {message.node}")
    return message


def _decoded(model: type[Answer], data: bytes) -> Answer:
    try:
        return model.decode(data)
    except ValidationError as error:
        raise UnavailableError("a node sent a malformed answer") from error
