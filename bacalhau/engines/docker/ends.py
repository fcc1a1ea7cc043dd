"""What the engine's word about a container means: an Observation. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from bacalhau.engines.docker.records import Stop
from bacalhau_controllers.runner.ports import Observation, RunPhase

_MOMENT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)")
_INIT_FAILED = "[FATAL tini"
_NEVER = 2000  # the engine's zero time is of the year 1
_BEFORE_SECONDS = 60.0  # an engine's orderly end and its next start are not further apart
_AFTER_SECONDS = 30.0  # within which a new engine has looked at all containers
_LISTENS_SECONDS = 3.0  # by then a new engine listens to the containers that it took over
LOG_LOST = "what it wrote meanwhile is not in its log"


def is_over(state: Mapping[str, Any]) -> bool:
    """Whether the container ran and does not run any more.

    One whose start was cut off by the engine's death, and which the next engine found running, is
    again only `created` when it has ended; the moment of its end tells it from one that never ran.
    """
    is_late = state.get("Status") == "created" and moment(state.get("FinishedAt")) is not None
    return is_late or state.get("Status") in ("exited", "dead")


def is_unborn(state: Mapping[str, Any]) -> bool:
    """Whether the container was made, and never started as far as the engine knows."""
    return state.get("Status") == "created" and not is_over(state)


def moment(text: object) -> datetime | None:
    """A time as the engine writes it (nanoseconds); None for its zero."""
    match = _MOMENT.fullmatch(str(text))
    if match is None:
        return None
    whole, fraction, zone = match.groups()
    zone = "+00:00" if zone == "Z" else zone
    found = datetime.fromisoformat(f"{whole}.{(fraction or '0')[:6]:0<6}{zone}").astimezone(UTC)
    return found if found.year > _NEVER else None


def running(state: Mapping[str, Any]) -> Observation:
    """It runs."""
    return Observation(RunPhase.RUNNING, started_at=moment(state.get("StartedAt")))


def vanished(stop: Stop | None, why: str, now: datetime) -> Observation:
    """The container is gone. If we were about to end it, that is its end."""
    if stop is not None:
        return Observation(RunPhase.EXITED, 137, stop.reason, stop.message, finished_at=now)
    return Observation(RunPhase.VANISHED, message=why, is_system_fault=True)


@dataclass(frozen=True, slots=True)
class EngineLife:
    """Since when the engine runs (seconds since the epoch; 0: not known), whether containers go on
    without it (`live-restore`), and in which boot of the machine."""

    began: float = 0.0
    keeps_containers: bool = False
    boot: str = ""

    def cut(self, code: int, started: datetime | None, finished: datetime | None) -> str:
        """Why the engine's own end was this container's end, or '' if it was not.

        An engine that stops sends SIGTERM, then SIGKILL; of what ended without it, it says 255.
        """
        if not self.began or code not in (137, 143, 255) or finished is None:
            return ""
        if started is None:
            return "the Docker engine was killed while it started it"
        since = finished.timestamp() - self.began
        if started.timestamp() >= self.began or since < -_BEFORE_SECONDS:
            return ""
        if self.keeps_containers and (code != 255 or since > _AFTER_SECONDS):
            return ""
        return "the Docker engine, or the machine, was started again while it ran"

    def outlasted(self, boot: object) -> str:
        """Why nobody knows whether what a container made in that boot wrote is on the disk, or ''.
        An end is written down after the results are; the engine's word alone says nothing of them
        if the power may have failed since."""
        if not boot or not self.boot or boot == self.boot:
            return ""
        return "the machine was started again before its results were known to be on the disk"

    def missed(self, started: datetime | None, finished: datetime | None) -> str:
        """What the log of a container may lack, or ''. The engine takes down what containers
        write; what one has written without an engine waits for the next in a pipe, which goes
        with the container."""
        if not self.began or finished is None:
            return ""
        if started is None:
            return f"the Docker Engine was killed while it started it; {LOG_LOST}"
        is_alone = finished.timestamp() < self.began + _LISTENS_SECONDS
        if started.timestamp() >= self.began or not is_alone:
            return ""
        return f"it ended while the Docker engine was away; {LOG_LOST}"


_UNKNOWN = EngineLife()


def ended(
    state: Mapping[str, Any],
    stop: Stop | None = None,
    *,
    stderr_tail: str = "",
    foreign: str = "",
    life: EngineLife = _UNKNOWN,
) -> Observation:
    """How a container ended; `state` as `Watch.look` gives it.

    `foreign` says who else ended it, if it was not the workload and not us: then nobody knows
    whether it was done, as after an end of the engine itself.
    """
    code = int(state.get("ExitCode") or 0)
    started, finished = moment(state.get("StartedAt")), moment(state.get("FinishedAt"))
    if started and finished:
        # The engine notes the start of what ends at once after its end.
        started = min(started, finished)

    def end(reason: str = "", message: str = "", **more: Any) -> Observation:
        return Observation(
            RunPhase.EXITED, code, reason, message, started_at=started, finished_at=finished, **more
        )

    if stop is not None and (finished is None or finished.timestamp() >= stop.at):
        return end(stop.reason, stop.message)
    outlasted = life.outlasted(state.get("Boot"))
    if state.get("OOMKilled") and not outlasted:
        if code:
            return end("OutOfMemory", "it needed more memory than it may have")
        return end(message="a process in it was killed, because it needed too much memory")
    foreign = foreign if code else ""
    if foreign := foreign or life.cut(code, started, finished) or outlasted:
        return Observation(
            RunPhase.VANISHED,
            message=foreign,
            is_system_fault=True,
            started_at=started,
            finished_at=finished,
        )
    if code in (126, 127) and _INIT_FAILED in stderr_tail:
        words = stderr_tail[stderr_tail.rindex(_INIT_FAILED) :].partition("] ")[2]
        return end("StartFailed", f"the command cannot be run: {words.strip()}"[:500])
    if state.get("Error"):
        return end("StartFailed", str(state["Error"])[:500])
    missed = life.missed(started, finished)
    return end(message=f"exit code {code}; {missed}" if missed and code else missed)
