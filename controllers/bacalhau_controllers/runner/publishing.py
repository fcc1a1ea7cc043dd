"""How far one publication is, as a pure state machine: outputs of an accepted execution on their
way to one target.

Publishing is idempotent, so there is no intent to write down: an attempt that a crash cut short is
made again. A failed one is tried again, ever more rarely, until it is delivered, ordered to stop
or too old. It never makes the execution fail.
"""

from dataclasses import dataclass
from typing import Any

from bacalhau_api.meta import Waiting
from bacalhau_api.v1.execution import Publication, PublicationPhase
from bacalhau_api.v1.job import SpecConfig
from bacalhau_controllers.runner.ledger import PublicationState
from bacalhau_controllers.runner.state import Instant, backoff_seconds, words


@dataclass(frozen=True, slots=True)
class PublishLimits:
    """In seconds: how long one attempt may take, the waits between attempts, and how old a
    publication may get."""

    try_seconds: float
    retry_seconds: float
    retry_seconds_max: float
    age_seconds_max: float


@dataclass(frozen=True, slots=True)
class Begun:
    """An attempt begins."""


@dataclass(frozen=True, slots=True)
class Sending:
    """How far the attempt is, in words."""

    text: str


@dataclass(frozen=True, slots=True)
class Delivered:
    """The outputs are at the target."""

    location: SpecConfig
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PublishFailed:
    """An attempt failed; another may help if `is_transient`."""

    is_transient: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Called:
    """The orchestrator does not want it delivered any more."""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The orchestrator does not know it any more: forget it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """It is known after all."""


@dataclass(frozen=True, slots=True)
class Behind:
    """The orchestrator holds report number `step` already: the ledger is an old copy."""

    step: int


@dataclass(frozen=True, slots=True)
class Woken:
    """The agent started, or the wait for the next attempt is over."""


PublicationEvent = (
    Begun | Sending | Delivered | PublishFailed | Called | Withdrawn | Wanted | Behind | Woken
)


def advance(
    publication: Publication,
    state: PublicationState,
    event: PublicationEvent,
    now: Instant,
    limits: PublishLimits,
) -> PublicationState:
    """Apply one event. What is final stays so."""
    match event:
        case Withdrawn():
            return state.but(is_assigned=False)
        case Wanted():
            return state.but(is_assigned=True)
        case Behind(step):
            report = state.report.but(step=max(state.report.step, step) + 1)
            return state.but(report=report)
    if state.report.phase.is_final:
        return state
    if state.since.boot != now.boot:  # moments of another boot cannot be compared
        state = state.but(since=now, due=now if state.due else None)
    match event:
        case Begun():
            attempts = state.report.attempts + 1
            waiting = _waiting(publication, now, "Upload", "", now.plus(limits.try_seconds))
            return _told(
                state.but(due=None),
                phase=PublicationPhase.PUBLISHING,
                attempts=attempts,
                waiting=waiting,
            )
        case Sending(text):
            upload = state.report.waiting
            if state.due is not None or upload is None or upload.message == text:
                return state
            return _told(state, waiting=upload.but(message=text))
        case Delivered(location, size_bytes):
            return _told(
                state.but(due=None, detail=""),
                phase=PublicationPhase.DELIVERED,
                location=location,
                size_bytes=size_bytes,
                reason="",
                message="",
                finished_at=now.wall,
                waiting=None,
            )
        case PublishFailed():
            return _failed(publication, state, event, now, limits)
        case Called():
            why = PublishFailed(False, "Stopped", "it was stopped before it was delivered")
            return _failed(publication, state, why, now, limits)
        case Woken():
            return state


def _failed(
    publication: Publication,
    state: PublicationState,
    event: PublishFailed,
    now: Instant,
    limits: PublishLimits,
) -> PublicationState:
    age = state.since.elapsed(now) or 0.0
    if event.is_transient and age < limits.age_seconds_max:
        tries = state.tries + 1
        key = publication.metadata.uid
        wait = backoff_seconds(limits.retry_seconds, limits.retry_seconds_max, tries, key)
        due = now.plus(wait)
        message = words(event.message)
        waiting = _waiting(publication, now, "Retry", message, due)
        state = state.but(due=due, tries=tries, detail=message)
        return _told(state, phase=PublicationPhase.PUBLISHING, reason=event.reason, waiting=waiting)
    return _told(
        state.but(due=None),
        phase=PublicationPhase.FAILED,
        reason=event.reason,
        message=words(event.message),
        finished_at=now.wall,
        waiting=None,
    )


def _waiting(
    publication: Publication, now: Instant, what: str, message: str, until: Instant
) -> Waiting:
    return Waiting(
        what=what,
        message=message,
        since=now.wall,
        until=until.wall,
        mover=f"node {publication.spec.node}",
    )


def _told(state: PublicationState, **report: Any) -> PublicationState:
    return state.but(report=state.report.but(step=state.report.step + 1, **report))
