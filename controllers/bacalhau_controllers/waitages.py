"""How old the waits of objects are, by a clock that nobody can set.

Waits are stored with wall-clock times, for people and for the next leader. A step of that clock
must not end them, so the process that saw a wait begin measures it itself.
"""

from dataclasses import dataclass
from datetime import datetime

from bacalhau_api.meta import Ref, Waiting
from bacalhau_controllers.contact import Age
from bacalhau_controllers.contract import Clock


@dataclass(frozen=True, slots=True)
class _Watched:
    since: datetime
    what: str
    seen_at: float
    is_whole: bool


class WaitAges:
    """Ages of the stored waits, by the key of the object. Holds one small record for each object
    that waits."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._watched: dict[Ref, _Watched] = {}

    def clear(self) -> None:
        """Forget all: what happens between two terms of leading goes unseen."""
        self._watched.clear()

    def forget(self, ref: Ref) -> None:
        """The object is gone."""
        self._watched.pop(ref, None)

    def of(self, ref: Ref, stored: Waiting | None) -> Age:
        """The age of an object's stored wait. One that is seen for the first time is watched from
        now on."""
        if stored is None:
            self.forget(ref)
            return Age()
        watched = self._watched.get(ref)
        if watched is None or not _is_same(watched, stored):
            self._watch(ref, stored, is_whole=False)
            return Age()
        return Age(self._clock.monotonic() - watched.seen_at, watched.is_whole)

    def note(self, ref: Ref, before: Waiting | None, after: Waiting | None) -> None:
        """This process has just stored `after` in place of `before`."""
        if after is None:
            self.forget(ref)
        elif before is None or (before.since, before.what) != (after.since, after.what):
            self._watch(ref, after, is_whole=True)

    def _watch(self, ref: Ref, waiting: Waiting, *, is_whole: bool) -> None:
        now = self._clock.monotonic()
        self._watched[ref] = _Watched(waiting.since, waiting.what, now, is_whole)


def _is_same(watched: _Watched, waiting: Waiting) -> bool:
    return (watched.since, watched.what) == (waiting.since, waiting.what)
