"""A NATS server and lines to it that lose, double, delay and reorder messages, and are cut.

`Line` is the wire of one machine, whose state the world sets. `Client` is one process on it and
implements `bacalhau.nats.transport.Transport`, so that the real endpoints and links run over it.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from random import Random

from bacalhau.nats.transport import Handler, Listener
from bacalhau.nats.transport import Message as MessageLike
from bacalhau_api.errors import OutcomeUnknownError, UnavailableError
from tests.simulation.world.faults import Fault, Faults
from tests.simulation.world.life import Life, WorldLoop, check_alive

_LATENCY = (0.0005, 0.005)
_DELAY = (0.05, 8.0)


@dataclass(slots=True)
class Message:
    """See `bacalhau.nats.transport.Message`."""

    subject: str
    reply: str
    data: bytes
    headers: dict[str, str] | None = None


class Line:
    """One machine's way to the server. `up` carries what it sends, `down` what it receives;
    `is_connected` is what its client believes, which may be wrong for a while."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.up = True
        self.down = True
        self.is_connected = True
        self.clients: list[Client] = []

    def set_connected(self, is_connected: bool) -> None:
        """The client notices."""
        if is_connected == self.is_connected:
            return
        self.is_connected = is_connected
        for client in list(self.clients):
            client.connection_changed()


class Server:
    """Routes messages. `faults` says what may happen to each on a faulty line."""

    def __init__(self, loop: WorldLoop, rng: Random, faults: Faults) -> None:
        self.loop = loop
        self.rng = rng
        self.faults = faults
        self.messages = 0
        self._subscriptions: dict[str, list[_Subscription]] = {}
        self._context = copy_context()

    def send(self, line: Line, message: Message) -> None:
        """A message leaves a machine."""
        self.messages += 1
        if not line.up:
            return
        for delay in self._fate():
            self.loop.call_later(delay, self._arrive, message, context=self._context)

    def interested(self, subject: str) -> "list[_Subscription]":
        """Who listens to a subject."""
        first, _, _rest = subject.partition(".")
        found = []
        for one in self._subscriptions.get(first, ()):
            if one.matches(subject):
                found.append(one)
        return found

    def add(self, one: "_Subscription") -> None:
        """Somebody listens."""
        self._subscriptions.setdefault(one.subject.partition(".")[0], []).append(one)

    def remove(self, one: "_Subscription") -> None:
        """Somebody listens no more."""
        group = self._subscriptions[one.subject.partition(".")[0]]
        if one in group:
            group.remove(one)

    def _fate(self) -> tuple[float, ...]:
        rng, faults = self.rng, self.faults
        delay = rng.uniform(*_LATENCY)
        if not faults.rates:
            return (delay,)
        if rng.random() < faults.rate(Fault.NET_LOSS):
            return ()
        if rng.random() < faults.rate(Fault.NET_DELAY):
            delay += rng.uniform(*_DELAY)
        if rng.random() < faults.rate(Fault.NET_DOUBLE):
            return (delay, delay + rng.uniform(*_DELAY))
        return (delay,)

    def _arrive(self, message: Message) -> None:
        found = self.interested(message.subject)
        if not found and message.reply:
            none = Message(message.reply, "", b"", {"Status": "503"})
            found, message = self.interested(message.reply), none
        for one in found:
            if one.client.line.down:
                one.client.life.context.run(one.receive, message)


class _Subscription:
    """One interest of one client. Its handler is called for one message after the other."""

    def __init__(self, server: Server, client: "Client", subject: str, handler: Handler) -> None:
        self.subject = subject
        self.client = client
        self._server = server
        self._handler = handler
        self._tokens = subject.split(".")
        self._waiting: deque[Message] = deque()
        self._worker: asyncio.Task[None] | None = None
        server.add(self)

    def matches(self, subject: str) -> bool:
        """Whether a subject is meant; `*` is one token, `>` the rest."""
        if subject == self.subject:
            return True
        tokens = subject.split(".")
        for mine, theirs in zip(self._tokens, tokens, strict=False):
            if mine == ">":
                return True
            if mine not in ("*", theirs):
                return False
        return len(tokens) == len(self._tokens)

    def receive(self, message: Message) -> None:
        """A message has arrived."""
        if not self.client.life.is_alive:
            return
        self._waiting.append(message)
        if self._worker is None or self._worker.done():
            self._worker = self.client.life.spawn(self._work(), f"messages {self.subject}")

    async def close(self) -> None:
        """See Subscription."""
        self._server.remove(self)
        self._waiting.clear()
        worker = self._worker
        if worker is not None and worker is not asyncio.current_task():
            worker.cancel()

    async def _work(self) -> None:
        while self._waiting:
            message: MessageLike = self._waiting.popleft()
            await self._handler(message)


class Client:
    """One process's connection. See `bacalhau.nats.transport.Transport`."""

    payload_bytes_max = 1024 * 1024

    def __init__(self, server: Server, line: Line, life: Life) -> None:
        self.line = line
        self.life = life
        self._server = server
        self._listeners: list[Listener] = []
        self._inboxes = 0
        self._generation = 1
        self._pending: dict[str, asyncio.Future[Message]] = {}
        self._inbox = f"_INBOX_{life.name}.{id_of(life)}"
        line.clients.append(self)
        _Subscription(server, self, f"{self._inbox}.>", self._answered)

    @property
    def is_connected(self) -> bool:
        """See Transport."""
        return self.line.is_connected

    @property
    def generation(self) -> int:
        """See Transport."""
        return self._generation

    def new_inbox(self) -> str:
        """See Transport."""
        self._inboxes += 1
        return f"{self._inbox}.{self._inboxes}"

    def disconnect(self) -> None:
        """The process is gone: the server forgets it."""
        if self in self.line.clients:
            self.line.clients.remove(self)
        for group in list(self._server._subscriptions.values()):
            for one in [s for s in group if s.client is self]:
                group.remove(one)

    def connection_changed(self) -> None:
        """The line says so."""
        if not self.life.is_alive:
            return
        if self.is_connected:
            self._generation += 1
        else:
            pending, self._pending = self._pending, {}
            for waiting in pending.values():
                if not waiting.done():
                    waiting.set_exception(OutcomeUnknownError("the connection was lost"))
        for listener in list(self._listeners):
            self.life.context.run(listener, self.is_connected)

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """See Transport."""
        check_alive()
        if not self.is_connected:
            raise UnavailableError("not connected")
        message = Message(subject, reply, payload, dict(headers) if headers else None)
        self._server.send(self.line, message)

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 5.0,
    ) -> Message:
        """See Transport."""
        inbox = self.new_inbox()
        waiting: asyncio.Future[Message] = self._server.loop.create_future()
        self._pending[inbox] = waiting
        try:
            await self.publish(subject, payload, reply=inbox, headers=headers)
            async with asyncio.timeout(timeout):
                answer = await waiting
        except TimeoutError as error:
            raise OutcomeUnknownError("no answer in time") from error
        finally:
            self._pending.pop(inbox, None)
            if not waiting.done():
                waiting.cancel()
        check_alive()
        if (answer.headers or {}).get("Status") == "503":
            raise UnavailableError("nobody listens")
        return answer

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> _Subscription:
        """See Transport."""
        check_alive()
        return _Subscription(self._server, self, subject, handler)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """See Transport."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def wait_connected(self, timeout: float) -> None:
        """See Transport."""
        if not self.is_connected:
            raise UnavailableError("not connected")

    async def _answered(self, message: MessageLike) -> None:
        waiting = self._pending.get(message.subject)
        if waiting is not None and not waiting.done():
            waiting.set_result(
                Message(message.subject, message.reply, message.data, message.headers)
            )


def id_of(life: Life) -> str:
    """A word for a subject: the life's own name, without what subjects may not hold."""
    return life.name.replace(".", "-").replace(" ", "-")
