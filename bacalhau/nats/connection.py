"""Connections to NATS: `connect` for a plain client of nats-py, `Connection` for one that is
dialled anew each time and fails what was under way, which is what the store builds on.

Left to others: what is said over them.
"""

import asyncio
import contextlib
import itertools
import logging
import random
import re
import secrets
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as ClientSubscription
from nats.errors import Error as NatsError
from nats.errors import NoServersError

from bacalhau.nats.transport import Handler, Listener
from bacalhau_api.errors import (
    InvalidError,
    OutcomeUnknownError,
    Problem,
    TransientError,
    UnavailableError,
)

logger = logging.getLogger(__name__)

SERVER_VERSION_MIN: Final = (2, 14)
"""Atomic batches with expectations, per-message TTLs in them, and the fixes of 2.14 are needed."""

SUBJECT_BYTES_MAX: Final = 2048
"""For a line of the protocol of more than 4096 bytes, which is a subject, where to reply, and
sizes, the server hangs up on everything that shares the connection."""

_RECONNECT_SECONDS = 0.2
_CONNECT_SECONDS = 2
_CLOSE_SECONDS = 0.5
_LOOK_SECONDS = 0.25
_PING_SECONDS = 5
_PINGS_MAX = 2
_DIAL_PAUSE_MIN = 0.05
_DIAL_PAUSE_MAX = 2.0
# Of one subscription, waiting for its handler; flow control keeps consumers far below.
_PENDING_MSGS_MAX = 1_000_000
_PENDING_BYTES_MAX = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to sign in: an NKey seed, or user and password, or a `.creds` file. All empty: not."""

    seed: str = field(default="", repr=False)
    user: str = ""
    password: str = field(default="", repr=False)
    file: str = ""

    def options(self) -> dict[str, Any]:
        """As arguments of nats-py's connect."""
        if self.seed:
            return {"nkeys_seed_str": self.seed}
        if self.user:
            return {"user": self.user, "password": self.password}
        return {"user_credentials": self.file} if self.file else {}


async def connect(
    url: str | Sequence[str],
    credentials: Credentials | None = None,
    inbox_prefix: str = "_INBOX",
    name: str = "bacalhau",
    *,
    tls: ssl.SSLContext | None = None,
    timeout: float = 10.0,
    **callbacks: Any,
) -> Client:
    """A connected client of nats-py that reconnects for ever and never buffers while it is down.

    `callbacks` are those of nats-py (`disconnected_cb`, `reconnected_cb`, `closed_cb`,
    `error_cb`). Raises UnavailableError if there is no connection within `timeout` seconds, and
    InvalidError if the server is too old.
    """
    client = Client()
    try:
        async with asyncio.timeout(timeout):
            await client.connect(
                **_options(url, credentials, inbox_prefix, name, tls),
                allow_reconnect=True,
                max_reconnect_attempts=-1,
                # Milliseconds apart; nats-py declares whole seconds and takes fractions.
                reconnect_time_wait=_RECONNECT_SECONDS,  # type: ignore[arg-type]
                **{"error_cb": _ignore_error} | callbacks,
            )
    except (NatsError, OSError, TimeoutError) as error:
        with contextlib.suppress(Exception):
            await client.close()
        raise _unreachable(url, client.last_error or error) from error
    # nats-py may return without an error and not connected, when authentication is down.
    if not client.is_connected:
        await client.close()
        raise _unreachable(url, client.last_error)
    try:
        check_version(client)
    except InvalidError:
        await client.close()
        raise
    return client


def check_version(client: Client) -> None:
    """Raises InvalidError if the server lacks what we build on."""
    version = client.connected_server_version
    if (version.major, version.minor) < SERVER_VERSION_MIN:
        needed = ".".join(map(str, SERVER_VERSION_MIN))
        problem = Problem(
            "nats", f"the server is too old, at least {needed} is needed", str(version)
        )
        raise InvalidError([problem], hint="upgrade the NATS server, or use the embedded one")


def _options(
    url: str | Sequence[str],
    credentials: Credentials | None,
    inbox_prefix: str,
    name: str,
    tls: ssl.SSLContext | None,
) -> dict[str, Any]:
    return {
        "servers": url if isinstance(url, str) else list(url),
        "name": name,
        "inbox_prefix": inbox_prefix,
        "connect_timeout": _CONNECT_SECONDS,
        "ping_interval": _PING_SECONDS,
        "max_outstanding_pings": _PINGS_MAX,
        "pending_size": 0,
        **({"tls": tls} if tls else {}),
        **(credentials or Credentials()).options(),
    }


async def _ignore_error(error: Exception) -> None:
    logger.debug("NATS client reported an error", extra={"error": repr(error)})


def _check_subject(subject: str) -> None:
    size = len(subject.encode())
    if size > SUBJECT_BYTES_MAX:
        message = f"is too long for NATS: {size} bytes, at most {SUBJECT_BYTES_MAX} are allowed"
        raise InvalidError([Problem("subject", message, subject[:80] + "…", "use shorter names")])


def _unreachable(url: str | Sequence[str], error: BaseException | None) -> UnavailableError:
    where = url if isinstance(url, str) else ", ".join(url)
    cause = f": {error or type(error).__name__}" if error is not None else ""
    return UnavailableError(
        f"no connection to NATS at {where}{cause}",
        hint="check the address, that the server runs, and the credentials",
    )


class _Client(Client):
    """nats-py with a quicker parser of headers: its own looks at each character of each name, which
    is a fifth of the time it takes to load a large store. Should a later version parse elsewhere,
    this is not called any more."""

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        headers: dict[str, str] = {}
        for line in raw.decode(errors="replace").split("\r\n"):
            name, separator, value = line.partition(":")
            if separator and name and not name[0].isspace():
                headers[name] = value.strip()
        return headers


class _Subscription:
    """Interest that is renewed on each connection."""

    def __init__(self, owner: "Connection", subject: str, handler: Handler, queue: str) -> None:
        self._owner = owner
        self._subject = subject
        self._handler = handler
        self._queue = queue
        self._current: ClientSubscription | None = None
        self._is_closed = False
        self.client: Client | None = None

    async def open_on(self, client: Client) -> None:
        self.client = client
        self._current = await client.subscribe(
            self._subject,
            queue=self._queue,
            cb=self._handler,
            pending_msgs_limit=_PENDING_MSGS_MAX,
            pending_bytes_limit=_PENDING_BYTES_MAX,
        )
        if self._is_closed:  # meanwhile
            await self._end()

    async def close(self) -> None:
        """See transport.Subscription."""
        self._is_closed = True
        self._owner.forget(self)
        await self._end()

    async def _end(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            with contextlib.suppress(NatsError, OSError):
                await current.unsubscribe()


class Connection:
    """See `transport.Transport`.

    Each time the line is lost, a new client is made. So nothing that was queued for the old
    connection can be sent on the next one, late and out of its context, and an error on which
    nats-py closes for good is one more lost line.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        credentials: Credentials | None = None,
        *,
        inbox_prefix: str = "_INBOX",
        name: str = "bacalhau",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._urls = [url] if isinstance(url, str) else list(url)
        self._credentials = credentials
        self._inbox_prefix = f"{inbox_prefix}.{secrets.token_hex(12)}"
        self._name = name
        self._tls = tls
        self._client: Client | None = None
        self._generation = 0
        self._payload_bytes_max = 1024 * 1024
        self._numbers = itertools.count(1)
        self._replies: dict[str, asyncio.Future[Msg]] = {}
        self._subscriptions: dict[_Subscription, None] = {}
        self._listeners: dict[object, Listener] = {}
        self._connected = asyncio.Event()
        self._lost = asyncio.Event()
        self._dialled = asyncio.Event()
        self._last_error: BaseException | None = None
        self._redial_at: float | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def is_connected(self) -> bool:
        """See Transport."""
        return self._connected.is_set()

    @property
    def generation(self) -> int:
        """See Transport."""
        return self._generation

    @property
    def payload_bytes_max(self) -> int:
        """See Transport."""
        return self._payload_bytes_max

    @property
    def address(self) -> str:
        """Where it dials, for people; without what may be secret in it."""
        return ", ".join(re.sub(r"//[^/@]*@", "//", url) for url in self._urls)

    @property
    def last_error(self) -> str:
        """Why there is no connection, in words; empty if there is one, or nothing failed yet."""
        error = self._last_error
        if error is None or self.is_connected:
            return ""
        return getattr(error, "message", "") or str(error) or type(error).__name__

    @property
    def redial_seconds(self) -> float | None:
        """How long until the next try; None while connected, or in the middle of one."""
        if self._redial_at is None:
            return None
        return max(0.0, self._redial_at - asyncio.get_running_loop().time())

    @property
    def server_version(self) -> str:
        """The version of the server connected to, or empty."""
        return str(self._client.connected_server_version) if self._client else ""

    async def open(self, timeout: float | None = 10.0) -> None:
        """Begin to dial; with a `timeout` also wait for the connection.

        Raises UnavailableError (then nothing is left open) if it does not come about in time.
        """
        self._task = asyncio.create_task(self._keep_connected(), name=f"nats {self._name}")
        if timeout is None:
            return
        try:
            await self.wait_connected(timeout)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Let go. What waits for an answer fails."""
        task, self._task = self._task, None
        if task is not None:
            # A client cancelled in the middle of connecting may leave its socket behind.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._dialled.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def wait_connected(self, timeout: float) -> None:
        """See Transport."""
        try:
            async with asyncio.timeout(timeout):
                await self._connected.wait()
        except TimeoutError:
            raise _unreachable(self._urls, self._last_error) from self._last_error

    def new_inbox(self) -> str:
        """See Transport."""
        return f"{self._inbox_prefix}.{next(self._numbers)}"

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """See Transport."""
        _check_subject(subject)
        client = self._client
        if client is None or not self._connected.is_set():
            raise _unreachable(self._urls, self._last_error)
        try:
            await client.publish(subject, payload, reply, None if headers is None else {**headers})
        except (NatsError, OSError) as error:
            if not client.is_connected:
                self._lost.set()
            raise _unreachable(self._urls, error) from error

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 5.0,
    ) -> Msg:
        """See Transport."""
        token = str(next(self._numbers))
        inbox = f"{self._inbox_prefix}.r.{self._generation}.{token}"
        reply: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._replies[token] = reply
        try:
            await self.publish(subject, payload, reply=inbox, headers=headers)
            async with asyncio.timeout(timeout):
                message = await reply
        except TimeoutError:
            raise OutcomeUnknownError(f"no answer on {subject} within {timeout:g} s") from None
        finally:
            del self._replies[token]
        if message.headers and message.headers.get("Status") == "503":
            raise UnavailableError(f"nobody answers on {subject}")
        return message

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> _Subscription:
        """See Transport."""
        _check_subject(subject)
        subscription = _Subscription(self, subject, handler, queue)
        self._subscriptions[subscription] = None
        if self._client is not None and self._connected.is_set():
            try:
                await subscription.open_on(self._client)
            except (NatsError, OSError) as error:  # lost meanwhile: renewed on the next one
                logger.debug("Failed to subscribe", extra={"error": repr(error)})
        return subscription

    def forget(self, subscription: _Subscription) -> None:
        """Do not renew a subscription any more."""
        self._subscriptions.pop(subscription, None)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """See Transport."""
        key = object()
        self._listeners[key] = listener
        return lambda: self._listeners.pop(key, None) and None

    async def _keep_connected(self) -> None:
        pause = _DIAL_PAUSE_MIN
        try:
            while True:
                try:
                    self._dialled.clear()
                    try:
                        await self._dial()
                    finally:
                        self._dialled.set()
                    pause = _DIAL_PAUSE_MIN
                    await self._until_lost()
                except (NatsError, OSError, TimeoutError, TransientError, InvalidError) as error:
                    # nats-py says "no servers", and keeps to itself what is wrong with the one.
                    cause = self._client.last_error if self._client else None
                    self._note(cause if cause and isinstance(error, NoServersError) else error)
                except Exception as error:
                    # What answers need not be NATS, and nats-py trips over some of what it is told.
                    # Whatever it was, another try may meet a server.
                    if repr(error) != repr(self._last_error):
                        logger.exception("Failed to connect in an unforeseen way")
                    self._note(error)
                finally:
                    await self._hang_up()
                seconds = pause * random.uniform(0.5, 1.0)
                self._redial_at = asyncio.get_running_loop().time() + seconds
                await asyncio.sleep(seconds)
                self._redial_at = None
                pause = min(pause * 2, _DIAL_PAUSE_MAX)
        finally:
            self._fail_replies()

    async def _until_lost(self) -> None:
        # nats-py may close without telling: when what it still had to send meets a dead line, the
        # error ends its closing before its callbacks. So it is looked at, too.
        while not self._lost.is_set() and self._client is not None and self._client.is_connected:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._lost.wait()

    async def _dial(self) -> None:
        self._lost.clear()
        client = _Client()
        self._client = client

        async def lost() -> None:
            if self._client is client:
                self._lost.set()
                self._set_connected(False)
                self._fail_replies()

        # One at a time: with reconnection off, nats-py gives up at the first that fails.
        url = random.choice(self._urls)
        async with asyncio.timeout(_CONNECT_SECONDS * 2):
            await client.connect(
                **_options(url, self._credentials, self._inbox_prefix, self._name, self._tls),
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,  # else it pauses for 2 s before it gives up
                disconnected_cb=lost,
                closed_cb=lost,
                error_cb=self._note_error,
            )
        if not client.is_connected:
            raise _unreachable(url, client.last_error)
        check_version(client)
        self._generation += 1
        self._payload_bytes_max = client.max_payload
        await client.subscribe(
            f"{self._inbox_prefix}.r.{self._generation}.*",
            cb=self._received_reply,
            pending_msgs_limit=_PENDING_MSGS_MAX,
            pending_bytes_limit=_PENDING_BYTES_MAX,
        )
        await self._renew_subscriptions(client)
        await client.flush(timeout=_CONNECT_SECONDS)
        await self._renew_subscriptions(client)  # those made meanwhile
        if not self._lost.is_set():
            self._last_error = None
            self._set_connected(True)

    async def _renew_subscriptions(self, client: Client) -> None:
        while missing := [each for each in self._subscriptions if each.client is not client]:
            for subscription in missing:
                await subscription.open_on(client)

    async def _hang_up(self) -> None:
        client, self._client = self._client, None
        self._set_connected(False)
        self._fail_replies()
        if client is not None:
            try:
                # Of a client that stopped half-way, closing may fail in ways of its own.
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(_CONNECT_SECONDS):
                        await client.close()
            finally:
                # For the same reason its socket may still be open (see _until_lost).
                socket = getattr(client, "_transport", None)
                if socket is not None:
                    socket.close()

    def _note(self, error: BaseException) -> None:
        # A server that refuses us says why and hangs up, and the one may overtake the other: a
        # reset says less than the answer to an earlier try.
        if isinstance(error, ConnectionResetError) and isinstance(self._last_error, NatsError):
            return
        self._last_error = error

    async def _note_error(self, error: Exception) -> None:
        self._note(error)
        logger.debug("NATS client reported an error", extra={"error": repr(error)})

    async def _received_reply(self, message: Msg) -> None:
        reply = self._replies.get(message.subject.rpartition(".")[2])
        if reply is not None and not reply.done():
            reply.set_result(message)

    def _fail_replies(self) -> None:
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(
                    OutcomeUnknownError("the connection to NATS was lost before the answer came")
                )

    def _set_connected(self, connected: bool) -> None:
        if connected == self._connected.is_set():
            return
        if connected:
            self._connected.set()
        else:
            self._connected.clear()
        for listener in tuple(self._listeners.values()):
            try:
                listener(connected)
            except Exception:
                logger.exception("Connection listener failed")
