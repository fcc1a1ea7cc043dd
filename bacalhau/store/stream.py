"""The stream under the store: its settings, and reads of single messages from its leader.

Only requests of the JetStream API in JSON; what the messages mean is in `codec.py`.
"""

import asyncio
import base64
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from bacalhau.nats.transport import Transport
from bacalhau_api.errors import (
    BacalhauError,
    InvalidError,
    OutcomeUnknownError,
    Problem,
    UnavailableError,
)

STREAM: Final = "BACALHAU"
SUBJECTS: Final = ("o.>", "h.>", "l.>", "f.>")
READ_SECONDS: Final = 5.0
API_LEVEL_MIN: Final = 2
"""The level of the JetStream API at which atomic batches exist."""

_NOT_FOUND = 10037
_STREAM_NOT_FOUND = 10059
_RETRY_SECONDS = 0.05
_REQUEST_SECONDS = 2.0


class StreamError(BacalhauError):
    """The server refused an API request; `code` is its err_code."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"JetStream refused: {description} ({code})")
        self.code = code
        self.description = description


@dataclass(frozen=True, slots=True)
class Stored:
    """One message of the stream."""

    subject: str
    sequence: int
    time: datetime
    data: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """`created` tells one stream from another of the same name; `now` is the server's clock."""

    created: str
    sequence_last: int
    now: datetime
    replicas: int


class Stream:
    """Reads and administration. Every read is answered by the stream's leader, hence not stale."""

    def __init__(self, transport: Transport, name: str = STREAM) -> None:
        self.transport = transport
        self.name = name

    async def ensure(self, *, replicas: int = 1, consumers_max: int = 5000) -> StreamInfo:
        """Create the stream if it is not there; bring its settings up to date if it is.

        Raises InvalidError if the server cannot do what the store needs.
        """
        account = await self.api("$JS.API.INFO", {})
        level = int(account.get("api", {}).get("level", 0))
        if level < API_LEVEL_MIN:
            problem = Problem(
                "nats", f"its JetStream API has level {level}, {API_LEVEL_MIN} is needed"
            )
            raise InvalidError([problem], hint="upgrade the NATS server to 2.14 or later")
        wanted = stream_config(self.name, replicas, consumers_max)
        try:
            found = await self.api(f"$JS.API.STREAM.INFO.{self.name}", {})
        except StreamError as error:
            if error.code != _STREAM_NOT_FOUND:
                raise
            found = await self.api(f"$JS.API.STREAM.CREATE.{self.name}", wanted)
        # More replicas are taken up; fewer would be a mistake of one orchestrator among several.
        wanted["num_replicas"] = max(replicas, found["config"]["num_replicas"])
        if any(found["config"].get(key) != value for key, value in wanted.items()):
            found = await self.api(
                f"$JS.API.STREAM.UPDATE.{self.name}", {**found["config"], **wanted}
            )
        return _info(found)

    async def info(self) -> StreamInfo:
        """The stream's identity and last sequence."""
        return _info(await self.api(f"$JS.API.STREAM.INFO.{self.name}", {}))

    async def last(self, subject: str) -> Stored | None:
        """The newest message of a subject, which may hold wildcards."""
        return await self._message({"last_by_subj": subject})

    async def at(self, sequence: int) -> Stored | None:
        """The message with that sequence, or None if it was replaced or removed."""
        return await self._message({"seq": sequence})

    async def first_since(self, moment: datetime, subjects: str) -> Stored | None:
        """The oldest message under `subjects` stored at `moment` or later that is still there."""
        return await self._message({"start_time": moment.isoformat(), "next_by_subj": subjects})

    async def _message(self, query: dict[str, object]) -> Stored | None:
        try:
            answer = await self.api(f"$JS.API.STREAM.MSG.GET.{self.name}", query)
        except StreamError as error:
            if error.code == _NOT_FOUND:
                return None
            raise
        message = answer["message"]
        return Stored(
            subject=message["subject"],
            sequence=message["seq"],
            time=parse_time(message["time"]),
            data=base64.b64decode(message.get("data", "")),
            headers=parse_headers(base64.b64decode(message.get("hdrs", ""))),
        )

    async def api(self, subject: str, body: Mapping[str, object]) -> dict[str, Any]:
        """One idempotent request. It is repeated until the deadline while nobody answers.

        Raises StreamError if it is refused, UnavailableError if there is no answer.
        """
        payload = json.dumps(body).encode()
        deadline = time.monotonic() + READ_SECONDS
        while True:
            left = deadline - time.monotonic()
            try:
                if not self.transport.is_connected:
                    await self.transport.wait_connected(max(left, 0.001))
                reply = await self.transport.request(
                    subject, payload, timeout=max(min(left, _REQUEST_SECONDS), 0.001)
                )
                return checked(json.loads(reply.data))
            except (UnavailableError, OutcomeUnknownError) as error:
                if time.monotonic() + _RETRY_SECONDS >= deadline:
                    raise UnavailableError(
                        f"the store did not answer within {READ_SECONDS:g} s: {error}",
                        hint="check that the NATS server runs and JetStream is enabled",
                    ) from error
                await asyncio.sleep(_RETRY_SECONDS * random.uniform(0.5, 1.5))


def stream_config(name: str, replicas: int, consumers_max: int) -> dict[str, object]:
    """The settings of the stream.

    One message per subject is what makes it a table. No markers are left for expired messages
    (`subject_delete_marker_ttl`): a removed object leaves a tombstone that we write ourselves,
    and expiring history would otherwise write one marker for each entry.
    """
    return {
        "name": name,
        "subjects": list(SUBJECTS),
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "max_msgs_per_subject": 1,
        "max_consumers": consumers_max,
        # Message ids tell only whether the last message is ours; none is sent twice.
        "duplicate_window": 1_000_000_000,
        "num_replicas": replicas,
        "deny_delete": True,
        "allow_direct": True,
        "allow_rollup_hdrs": True,
        "allow_msg_ttl": True,
        "allow_atomic": True,
    }


def checked(answer: dict[str, Any]) -> dict[str, Any]:
    """Raises StreamError, or UnavailableError where it is one of passing trouble."""
    error = answer.get("error")
    if error is None:
        return answer
    code, description = int(error.get("err_code", 0)), str(error.get("description", ""))
    if error.get("code") == 503:
        raise UnavailableError(f"JetStream cannot serve now: {description} ({code})")
    raise StreamError(code, description)


def parse_headers(block: bytes) -> dict[str, str]:
    """The headers of a message as JetStream stores them."""
    lines = block.decode().split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {key: value.strip() for key, _, value in pairs}


def parse_time(text: str) -> datetime:
    """A time as Go writes it, with up to nine decimals; ours have six."""
    head, _, fraction = text.removesuffix("Z").partition(".")
    return datetime.fromisoformat(f"{head}.{fraction[:6]:0<6}+00:00")


def _info(answer: dict[str, Any]) -> StreamInfo:
    return StreamInfo(
        created=answer["created"],
        sequence_last=answer["state"]["last_seq"],
        now=parse_time(answer["ts"]),
        replicas=answer["config"]["num_replicas"],
    )
