"""Watches and waits, without I/O: reading server-sent events, and deciding when a job is there.

`sync` and `aio` feed these with lines and jobs.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from pydantic import ValidationError

from bacalhau.client.errors import error_of, unreadable
from bacalhau.replies import ErrorModel, LogRecord
from bacalhau_api.meta import Resource
from bacalhau_api.v1.job import Job, JobPhase

R = TypeVar("R", bound=Resource)

Goal = Literal["complete", "delivered", "running"]

RETRY_SECONDS_MIN = 0.2
RETRY_SECONDS_MAX = 5.0


@dataclass(frozen=True, slots=True)
class WatchUpdate(Generic[R]):
    """One event of a watch. `item` is None for RESET (forget what you hold: everything that
    exists follows), SYNCED (everything that existed was told), and LOST (the server does not
    answer; the watch goes on by itself)."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "SYNCED", "RESET", "LOST"]
    item: R | None = None


@dataclass(frozen=True, slots=True)
class Waited:
    """The end of a wait: the job as it is, and whether it reached what was waited for."""

    job: Job
    is_reached: bool


class Lines:
    """Cuts bytes into lines at newlines only: JSON may hold other characters that count as line
    ends elsewhere, such as U+2028."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[str]:
        """Take some bytes; gives the lines that are complete now, without their ends."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace").removesuffix("\r")


class EventReader(Generic[R]):
    """Puts lines of a watch's answer together to updates, and remembers where to resume."""

    def __init__(self, kind: type[R]) -> None:
        self._kind = kind
        self.cursor = ""
        self._id = ""
        self._type = ""
        self._data = ""

    def feed(self, line: str) -> Iterator[WatchUpdate[R]]:
        """Take one line, without its end. Raises what an ERROR event says."""
        if line.startswith(":"):
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "id":
                self._id = value
            case "event":
                self._type = value
            case "data":
                self._data += value
            case "":
                yield from self._dispatch()

    def _dispatch(self) -> Iterator[WatchUpdate[R]]:
        kind, data, cursor = self._type, self._data, self._id
        self._type = self._data = self._id = ""
        if data:
            update = self._update(kind, data)
            if update is not None:
                yield update
        # Only now: who breaks off while handling the event gets it again.
        self.cursor = cursor or self.cursor

    def _update(self, kind: str, data: str) -> WatchUpdate[R] | None:
        try:
            body = json.loads(data)["object"]
            if kind == "ERROR":
                raise error_of(ErrorModel.model_validate_json(json.dumps(body)), 503)
            if kind in ("SYNCED", "RESET"):
                return WatchUpdate(kind)  # type: ignore[arg-type]
            if kind not in ("ADDED", "MODIFIED", "DELETED"):
                return None  # from a newer server
            item = self._kind.model_validate_json(json.dumps(body), extra="ignore")
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise unreadable("watch event", error) from error
        return WatchUpdate(kind, item)  # type: ignore[arg-type]


class Backoff:
    """Growing, jittered pauses between tries to get through to a server."""

    def __init__(self) -> None:
        self._seconds = RETRY_SECONDS_MIN

    def reset(self) -> None:
        """It went well."""
        self._seconds = RETRY_SECONDS_MIN

    def next(self) -> float:
        """Seconds to pause now."""
        seconds = self._seconds * random.uniform(0.75, 1.25)
        self._seconds = min(self._seconds * 2, RETRY_SECONDS_MAX)
        return seconds


def judge(job: Job, goal: Goal, generation: int) -> bool | None:
    """True once a job has reached the goal in this generation or a later one, False once it never
    will, None while it is open."""
    status = job.status
    if not job.is_observed or status.observed_generation < generation:
        return None
    if status.phase in (JobPhase.FAILED, JobPhase.STOPPED):
        return False
    if goal == "running":
        return True if status.phase in (JobPhase.RUNNING, JobPhase.COMPLETED) else None
    if status.phase is not JobPhase.COMPLETED:
        return None
    return True if goal == "complete" else _is_delivered(job)


def _is_delivered(job: Job) -> bool | None:
    publisher = job.spec.task.publisher
    if publisher is None or publisher.type == "noop":
        return True
    for condition in job.status.conditions:
        if condition.type == "Delivered":
            if condition.status:
                return True
            if condition.reason.endswith("Failed"):
                return False
    return None


def log_record(line: str) -> LogRecord:
    """One record of a log. Raises what an error record says."""
    try:
        record = LogRecord.model_validate_json(line)
    except ValidationError as error:
        raise unreadable("log", error) from error
    if record.error is not None:
        raise error_of(record.error, 503)
    return record
