"""The trace: what happened, in order, and its hash. Same seed, same hash."""

import hashlib
from collections import deque
from typing import NamedTuple

_KEPT = 20_000


class Event(NamedTuple):
    """One thing that happened. `subject` is an object, a node or a process."""

    at: float
    what: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.at:11.3f}  {self.what:<12} {self.subject}  {self.text}".rstrip()


class Trace:
    """What happened. Only the newest events are kept; all are in the hash."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._events: deque[Event] = deque(maxlen=_KEPT)
        self.count = 0

    def note(self, at: float, what: str, subject: object, text: object = "") -> None:
        """Something happened."""
        event = Event(at, what, str(subject), str(text))
        self.count += 1
        self._events.append(event)
        self._hash.update(f"{at!r}|{event.what}|{event.subject}|{event.text}\n".encode())

    @property
    def digest(self) -> str:
        """The hash of everything so far."""
        return self._hash.hexdigest()

    def about(self, words: tuple[str, ...], limit: int = 40) -> list[Event]:
        """The newest events that mention one of these words."""
        found = [
            event
            for event in self._events
            if any(word and (word in event.subject or word in event.text) for word in words)
        ]
        return found[-limit:]

    def last(self, limit: int = 40) -> list[Event]:
        """The newest events."""
        return list(self._events)[-limit:]
