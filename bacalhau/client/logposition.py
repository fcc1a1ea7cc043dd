"""How far a reader of logs has come, so that it goes on there over a new connection. Pure.

A record with an `offset` stands at a place from which the execution's log can be read on; those
between two such places are counted, and cut away when they come again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from bacalhau.replies import LogRecord

LOST = "the connection to the server is lost; the log goes on when it is back"
BACK = "the connection is back"
_GONE_WRONG = frozenset({"NodeAway"})


def can_go_on(reason: str) -> bool:
    """Whether a log that broke off for this reason can be read on by trying again."""
    return reason not in _GONE_WRONG


@dataclass(slots=True)
class _Place:
    """One execution. `offset` None: still to be told. `seen` are the characters since then, and
    `skip` those of them that come again, by stream. `held` waits for the first offset."""

    offset: int | None = None
    seen: dict[str, int] = field(default_factory=dict)
    skip: dict[str, int] = field(default_factory=dict)
    held: list[LogRecord] = field(default_factory=list)


class LogPosition:
    """Where the reading of one execution's log is, or of the logs of several. With `has_tail`, the
    first read begins at a place that is only told at its end: until then records are held back,
    because the end may have moved before they are read again."""

    def __init__(self, *, has_tail: bool) -> None:
        self._has_tail = has_tail
        self._places: dict[str, _Place] = {}

    @property
    def offsets(self) -> dict[str, int]:
        """Where to go on from, by execution; those that are not in it begin anew."""
        return {n: p.offset for n, p in self._places.items() if p.offset is not None}

    def take(self, record: LogRecord) -> Iterator[LogRecord]:
        """A record came; gives what of it (and of those held back) is new."""
        if not record.text:
            yield record
            return
        place = self._places.setdefault(record.execution, _Place())
        again = min(place.skip.get(record.stream, 0), len(record.text))
        place.skip[record.stream] = place.skip.get(record.stream, 0) - again
        place.seen[record.stream] = place.seen.get(record.stream, 0) + len(record.text) - again
        if record.offset is not None:
            place.offset = record.offset
            # What is still to come again lies behind this place, too.
            place.seen = dict(place.skip)
        fresh = record.but(text=record.text[again:])
        if self._has_tail and place.offset is None:
            place.held.append(fresh)
            return
        held, place.held = place.held, []
        yield from held
        if fresh.text:
            yield fresh

    def rest(self) -> Iterator[LogRecord]:
        """The end: what was still held back."""
        for place in self._places.values():
            held, place.held = place.held, []
            yield from held

    def broke(self) -> None:
        """The connection is gone: what came since the last offset will come again."""
        for place in self._places.values():
            if place.held:
                place.held, place.seen = [], {}
            place.skip = dict(place.seen)
