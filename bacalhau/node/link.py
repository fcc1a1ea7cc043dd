"""The node's line to the orchestrator over NATS: requests out, changes and reads in.

Everything the node receives must carry its own name and the session that the agent chose; the
rest is dropped, because NATS lets any node steer a reply to a subject of another.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Literal

from pydantic import ValidationError

from bacalhau.nats.subjects import agent_subject, node_subject
from bacalhau.nats.transport import Message, Subscription, Transport, has_field
from bacalhau.node.reader import OutputReader
from bacalhau.node.upload import Kind, UploadGate
from bacalhau.system import SystemClock
from bacalhau_api.errors import BacalhauError, TransientError, UnavailableError
from bacalhau_api.wire import (
    Ack,
    Applied,
    Beat,
    BeatReply,
    Changes,
    FactBatch,
    Hello,
    LogRead,
    OutputRead,
    OutputsList,
    PinReply,
    PinRequest,
    Refused,
    Welcome,
    WelcomePart,
)

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_SECONDS = 10.0
PIN_TIMEOUT_SECONDS = 20.0

READS_MAX = 64
"""Log and output reads served at once; beyond that the answer is that the node is busy."""

_REPLIES: dict[str, type[Welcome] | type[Ack] | type[BeatReply]] = {
    "hello": Welcome,
    "facts": Ack,
    "beat": BeatReply,
}

ChangesHandler = Callable[[Changes], Awaitable[Applied | None]]


class NatsLink:
    """One node's line. Opened before the agent runs, closed after it."""

    def __init__(
        self,
        node: str,
        nats: Transport,
        reader: OutputReader,
        gate: UploadGate | None = None,
    ) -> None:
        self._gate = gate or UploadGate(0, SystemClock())
        self._node = node
        self._nats = nats
        self._reader = reader
        self._session = ""
        self._on_changes: ChangesHandler | None = None
        self._unlisten: Callable[[], None] | None = None
        self._subscription: Subscription | None = None
        self._reads: set[asyncio.Task[None]] = set()
        self._changing: set[asyncio.Task[None]] = set()

    @property
    def is_up(self) -> bool:
        """True while connected to NATS."""
        return self._nats.is_connected

    async def open(self) -> None:
        """Subscribe; works while not connected, too."""
        self._subscription = await self._nats.subscribe(
            agent_subject(self._node, ">"), self._received
        )

    async def close(self) -> None:
        """Let go of the line; reads under way are dropped."""
        if self._unlisten:
            self._unlisten()
        if self._subscription:
            await self._subscription.close()
        for task in (*self._reads, *self._changing):
            task.cancel()
        await asyncio.gather(*self._reads, *self._changing, return_exceptions=True)

    def set_handlers(
        self,
        *,
        on_up: Callable[[], None],
        on_down: Callable[[], None],
        on_changes: ChangesHandler,
    ) -> None:
        """Say whom to call; see `runner.ports.Link`."""
        self._on_changes = on_changes
        self._unlisten = self._nats.listen(lambda is_up: on_up() if is_up else on_down())
        if self._nats.is_connected:
            on_up()

    async def request(
        self,
        kind: Literal["hello", "facts", "beat"],
        message: Hello | WelcomePart | FactBatch | Beat,
    ) -> Welcome | Ack | BeatReply | Refused:
        """Send one request and return its reply; see `runner.ports.Link`."""
        if isinstance(message, Hello):
            self._session = message.session
        try:
            data = message.encode()
            self._gate.spend(len(data))
            reply = await self._nats.request(
                node_subject(self._node, kind), data, timeout=REQUEST_TIMEOUT_SECONDS
            )
        except TransientError as error:
            raise UnavailableError(f"no answer to {kind}: {error.message}") from error
        try:
            answer = _decode_reply(kind, reply.data)
        except ValueError as error:
            raise UnavailableError(f"malformed answer to {kind}") from error
        if answer.node != message.node or answer.session != message.session:
            raise UnavailableError(f"the answer to {kind} is not for this session")
        return answer

    async def pin(self, ask: PinRequest) -> PinReply | Refused:
        """Ask about what an input is pinned to; see `bacalhau.node.pins`."""
        message = ask.but(node=self._node, session=self._session)
        try:
            reply = await self._nats.request(
                node_subject(self._node, "pins"), message.encode(), timeout=PIN_TIMEOUT_SECONDS
            )
            model = Refused if has_field(reply.data, "reason") else PinReply
            answer = model.decode(reply.data)
        except TransientError as error:
            raise UnavailableError(f"no answer about a manifest: {error.message}") from error
        except ValueError as error:
            raise UnavailableError("malformed answer about a manifest") from error
        if answer.node != message.node or answer.session != message.session:
            raise UnavailableError("the answer about a manifest is not for this session")
        return answer

    # -- from the orchestrator -------------------------------------------------------------------

    async def _received(self, msg: Message) -> None:
        verb = msg.subject.split(".", 2)[2]
        if verb == "changes":
            # Reads are not held up behind changes, which wait for the list that they follow: where
            # a full disk keeps that from being taken, what is on it can still be fetched.
            self._begin(self._changing, self._changes(msg))
        elif len(self._reads) >= READS_MAX:
            await self._answer(msg, b"", {"Error": "the node is busy; try again", "Busy": "1"})
        else:
            self._begin(self._reads, self._read(verb, msg))

    def _begin(self, group: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        group.add(task)
        task.add_done_callback(group.discard)

    async def _changes(self, msg: Message) -> None:
        changes = self._mine(Changes, msg)
        if changes is None or self._on_changes is None:
            return
        try:
            applied = await self._on_changes(changes)
        except BacalhauError as error:
            # Unanswered, the orchestrator gives this session up, and the next hello repairs it.
            logger.warning("Failed to apply changes", extra={"error": error.message})
            return
        except Exception:
            logger.exception("Failed to apply changes in an unforeseen way")
            return
        if applied is not None:
            await self._answer(msg, applied.encode())

    async def _read(self, verb: str, msg: Message) -> None:
        """Answer one read of a log or of outputs."""
        try:
            data = await self._serve(verb, msg)
        except (BacalhauError, OSError) as error:
            text = error.message if isinstance(error, BacalhauError) else str(error)
            headers = {"Error": " ".join(text.split())[:500]}
            if isinstance(error, TransientError):
                headers["Busy"] = "1"
            await self._answer(msg, b"", headers)
        else:
            if data is not None:
                await self._answer(msg, data)

    async def _serve(self, verb: str, msg: Message) -> bytes | None:
        if verb == "logs":
            log = self._mine(LogRead, msg)
            return None if log is None else await self._log(log)
        if verb == "outputs.list":
            ask = self._mine(OutputsList, msg)
            if ask is None:
                return None
            data = (await self._reader.list_outputs(ask)).encode()
            await self._gate.take(len(data), Kind.RESULT)
            return data
        if verb == "outputs.read":
            piece = self._mine(OutputRead, msg)
            return None if piece is None else await self._output(piece)
        logger.warning("Dropped an unknown message", extra={"subject": msg.subject})
        return None

    async def _log(self, ask: LogRead) -> bytes:
        size = self._gate.piece_bytes(ask.size_bytes_max)
        chunk = await self._reader.read_log(ask.but(size_bytes_max=size))
        data = chunk.encode()
        if chunk.pieces:
            await self._gate.take(len(data), Kind.LOG)
        else:
            self._gate.spend(len(data))
        return data

    async def _output(self, ask: OutputRead) -> bytes:
        """A piece, no larger than the upload limit has it: who asked goes on behind it."""
        size = self._gate.piece_bytes(ask.size_bytes_max)
        # Before it is read, so that what waits takes no memory.
        await self._gate.take(size, Kind.RESULT)
        data = b""
        try:
            data = await self._reader.read_output(ask.but(size_bytes_max=size))
        finally:
            self._gate.spend(len(data) - size)
        return data

    async def _answer(
        self, msg: Message, data: bytes, headers: dict[str, str] | None = None
    ) -> None:
        if msg.reply:
            try:
                await self._nats.publish(msg.reply, data, headers=headers)
            except UnavailableError as error:
                logger.info("Failed to answer", extra={"error": error.message})

    def _mine(self, model: Any, msg: Message) -> Any:
        """The decoded message if it is for this node's present session, else None."""
        try:
            message = model.decode(msg.data)
        except ValidationError:
            logger.warning("Dropped a malformed message", extra={"subject": msg.subject})
            return None
        if message.node != self._node or message.session != self._session:
            logger.warning("Dropped a message of another session", extra={"subject": msg.subject})
            return None
        return message


def _decode_reply(kind: str, data: bytes) -> Welcome | Ack | BeatReply | Refused:
    # Only a refusal has a reason of its own; a node's replies are few, so reading twice is cheap.
    model = Refused if has_field(data, "reason") else _REPLIES[kind]
    return model.decode(data)
