"""Who waits for a place, and in which order: priority first, then age.

Two things follow from the order. When room appears on a node, those are woken that can use it, the
first in line first, and no more than it has room for. And until the first have been looked at, the
room is kept: a job further behind that happens to be looked at earlier does not get it. It is kept
for a short time only, so that one job that cannot be worked on does not hold up the others.

Jobs that ask for the same are one *class*; whether a class fits a node is asked once. The queue is
derived from what jobs wait for, and is made again by looking at them.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, NamedTuple

from bacalhau_api.meta import Ref
from bacalhau_api.v1.job import Job
from bacalhau_controllers.job.draft import Queued
from bacalhau_controllers.job.status import admitted_at
from bacalhau_controllers.placement import Amounts, NodeTable, Request, Search

HOLD_SECONDS: Final = 5.0
"""How long room is kept for those who go first."""

WAKES_MAX: Final = 64
"""How many jobs one event wakes; they wake the next when they leave the queue."""

_LOOKS_MAX: Final = 512


class Rank(NamedTuple):
    """A place in the line; the smaller goes first."""

    urgency: int
    since: datetime
    namespace: str
    name: str


def rank_of(job: Job, now: datetime) -> Rank:
    """Where a job stands: by priority, then by when its generation was admitted."""
    return Rank(-job.spec.priority, admitted_at(job, now), job.metadata.namespace, job.name)


class Ranking:
    """Jobs by rank."""

    def __init__(self) -> None:
        self._ranks: dict[Ref, Rank] = {}
        self._order: list[tuple[Rank, Ref]] = []

    def __len__(self) -> int:
        return len(self._order)

    def put(self, ref: Ref, rank: Rank) -> None:
        """Stand in line, or stand elsewhere in it."""
        if self._ranks.get(ref) == rank:
            return
        self.remove(ref)
        self._ranks[ref] = rank
        insort(self._order, (rank, ref))

    def remove(self, ref: Ref) -> None:
        """Leave the line; no error if it is not there."""
        rank = self._ranks.pop(ref, None)
        if rank is not None:
            del self._order[bisect_left(self._order, (rank, ref))]

    def first(self, count: int) -> tuple[Ref, ...]:
        """So many, in order."""
        return tuple(ref for _, ref in self._order[:count])


_ClassKey = tuple[object, ...]


@dataclass(slots=True)
class _Class:
    """Waiting jobs that ask for the same. `open` holds the nodes that have room for one of them
    now, with the time until which that is kept."""

    request: Request
    members: list[tuple[Rank, Ref]] = field(default_factory=list)
    open: dict[str, float] = field(default_factory=dict)


class _Waiter(NamedTuple):
    rank: Rank
    key: _ClassKey
    slots: int


class WaitQueue:
    """The line of jobs that wait for a place on the nodes of one table. Times are seconds of a
    monotonic clock."""

    def __init__(self, table: NodeTable) -> None:
        self._table = table
        self._classes: dict[_ClassKey, _Class] = {}
        self._waiters: dict[Ref, _Waiter] = {}

    def __len__(self) -> int:
        return len(self._waiters)

    def __contains__(self, ref: object) -> bool:
        return ref in self._waiters

    def clear(self) -> None:
        """Forget everybody."""
        self._classes.clear()
        self._waiters.clear()

    def put(self, ref: Ref, rank: Rank, queued: Queued, now: float) -> None:
        """Stand in line, or stand elsewhere in it."""
        key = _key(queued.request)
        known = self._waiters.get(ref)
        waiter = _Waiter(rank, key, queued.slots)
        if known == waiter:
            return
        if known is not None and (known.rank, known.key) != (rank, key):
            self._drop(ref, known)
            known = None
        group = self._classes.get(key)
        if group is None:
            group = self._classes[key] = _Class(queued.request)
            fitting = Search(self._table, queued.request, now=0.0).fitting()
            group.open = dict.fromkeys(fitting, now + HOLD_SECONDS)
        if known is None:
            insort(group.members, (rank, ref))
        self._waiters[ref] = waiter

    def remove(self, ref: Ref) -> tuple[Ref, ...]:
        """Leave the line. Returns those whose turn it is now on nodes that were kept."""
        known = self._waiters.pop(ref, None)
        if known is None:
            return ()
        nodes = self._classes[known.key].open.copy()
        self._drop(ref, known)
        return self._next(nodes)

    def held(self, ref: Ref, rank: Rank, now: float) -> dict[str, str]:
        """The nodes that a job with this rank must leave alone, with the reason."""
        held: dict[str, str] = {}
        for group in self._classes.values():
            if not group.open:
                continue
            self._expire(group, now)
            first = next((m for m in group.members[:2] if m[1] != ref), None)
            if first is None or first[0] > rank:
                continue
            name = f"{first[1].namespace}/{first[1].name}"
            for node in group.open:
                held.setdefault(node, f"is kept for job {name}, which goes first")
        return held

    def improved(self, nodes: Iterable[str], now: float) -> tuple[Ref, ...]:
        """Something became possible on these nodes. Returns those to look at, in their order."""
        found: dict[str, None] = {}
        for node in nodes:
            row = self._table.row(node)
            if row is None:
                continue
            for group in self._classes.values():
                if self._fits(group, node, row):
                    group.open[node] = now + HOLD_SECONDS
                    found[node] = None
        return self._next(found)

    def _next(self, nodes: Iterable[str]) -> tuple[Ref, ...]:
        """The first in line who can use these nodes, as many as there is room for."""
        woken: dict[Ref, None] = {}
        for node in nodes:
            row = self._table.row(node)
            if row is None:
                continue
            left = list(self._table.free_on(row))
            groups = [g for g in self._classes.values() if self._fits(g, node, row)]
            for ref, group in _in_order(groups):
                if len(woken) >= WAKES_MAX:
                    return tuple(woken)
                need = group.request.amounts
                room = _room(need, left)
                if room < 1:
                    continue
                woken[ref] = None
                times = min(room, self._waiters[ref].slots)
                left = [have - n * times for have, n in zip(left, need, strict=True)]
        return tuple(woken)

    def _fits(self, group: _Class, node: str, row: int) -> bool:
        request = group.request
        if request.only is not None and node not in request.only:
            return False
        if node in request.refused:
            return False
        return self._table.is_fitting(request.shape, request.amounts, row)

    def _expire(self, group: _Class, now: float) -> None:
        for node, until in list(group.open.items()):
            row = self._table.row(node)
            if until <= now or row is None or not self._fits(group, node, row):
                del group.open[node]

    def _drop(self, ref: Ref, waiter: _Waiter) -> None:
        group = self._classes[waiter.key]
        at = bisect_left(group.members, (waiter.rank, ref))
        del group.members[at]
        if not group.members:
            del self._classes[waiter.key]


def _key(request: Request) -> _ClassKey:
    return request.shape, request.amounts, frozenset(request.refused), request.only


def _room(need: Amounts, left: list[int]) -> int:
    """How many times something fits."""
    return min((have // n for have, n in zip(left, need, strict=True) if n), default=1)


def _in_order(groups: list[_Class]) -> Iterator[tuple[Ref, _Class]]:
    """The members of several classes by rank; no more than can matter."""
    lines = [((rank, ref, i) for rank, ref in group.members) for i, group in enumerate(groups)]
    for count, (_, ref, i) in enumerate(heapq.merge(*lines)):
        if count >= _LOOKS_MAX:
            return
        yield ref, groups[i]
