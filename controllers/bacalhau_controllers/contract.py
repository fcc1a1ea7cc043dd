"""What a reconciler is, and the few things it is given instead of reaching for them."""

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from bacalhau_api.meta import Ref


class Clock(Protocol):
    """Time as an argument. `now` may jump (it is a wall clock); `monotonic` never does."""

    def now(self) -> datetime:
        """The present moment, in UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds from an arbitrary start, never backwards."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after so many seconds."""
        ...


class Ids(Protocol):
    """Randomness that becomes part of objects."""

    def uid(self) -> str:
        """A new identity: 32 lower-case hex digits."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one reconcile: done, or look again after `requeue_after` seconds."""

    requeue_after: float | None = None


class Reconciler(Protocol):
    """Moves the actual state of one object towards its desired state.

    It is given a key, never an event. TransientError is retried with backoff; TerminalError waits
    until the object changes; anything else is a bug and is logged with its traceback.
    """

    @property
    def name(self) -> str:
        """The reconciler's name, such as `job`: the actor in history and the mover in waits."""
        ...

    async def reconcile(self, ref: Ref) -> Result:
        """Look at one object and do what is due."""
        ...
