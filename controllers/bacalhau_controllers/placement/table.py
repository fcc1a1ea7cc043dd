"""The scheduler's own view of all nodes, as arrays: what they are, what they have, what is taken.

What an execution takes is set aside at the moment of the decision and given back when the node
reports an end or the object is gone, so that a burst of decisions never over-commits a node. An
execution that is only thought lost still holds its place: its node cannot be used anyway, and
when it returns the work may well be running there.

The table is derived from Node and Execution objects alone, through `apply`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from bacalhau_api.meta import Contact, Resource
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import Resources
from bacalhau_api.v1.node import HeldInput, Node
from bacalhau_controllers.placement.locality import NOWHERE, Near
from bacalhau_controllers.placement.matching import Matching
from bacalhau_controllers.placement.resources import (
    DEFAULTS,
    DIMENSIONS,
    Amounts,
    amounts_of,
    capacity_of,
    fits,
)
from bacalhau_controllers.placement.rules import Shape
from bacalhau_controllers.placement.scores import Strategy, capacity_score, trouble_score

K = TypeVar("K")
V = TypeVar("V")

Key = tuple[str, str]
"""Namespace and name of an execution."""

_SIZE_MIN: Final = 64
_TROUBLE_REFRESH_SECONDS: Final = 10.0
_TROUBLE_HALF_LIFE_SECONDS: Final = 600.0


class Reservation(NamedTuple):
    """What one execution takes on one node."""

    node: str
    job_uid: str
    amounts: Amounts


@dataclass(slots=True)
class _Trouble:
    """Recent faults of one node: a level that halves with time. Seconds of the wall clock."""

    level: float
    at: float

    def level_at(self, now: float) -> float:
        age = max(now - self.at, 0.0)
        return float(self.level * 0.5 ** (age / _TROUBLE_HALF_LIFE_SECONDS))


def unit_hash(text: str) -> float:
    """A number from 0 to 1 that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def turn_hash(job_uid: str) -> float:
    """The point from 0 to 1 at which a job begins among equal nodes. It depends on the second half
    of the uid alone, so that a plan that is applied again can be placed alike."""
    return unit_hash(job_uid[len(job_uid) // 2 :])


class NodeTable:
    """All nodes and all reservations. Not thread-safe; every call is quick.

    `defaults` is what is set aside for executions that ask for nothing. With the strategy `spread`
    the emptier node wins, with `pack` the fuller one.
    """

    def __init__(self, *, defaults: Resources = DEFAULTS, strategy: Strategy = "spread") -> None:
        self.defaults = defaults
        self.strategy: Strategy = strategy
        self.matching = Matching(_SIZE_MIN)
        self.names: list[str] = [""] * _SIZE_MIN
        # Row by dimension. Rows without a node have nothing.
        self.capacity: NDArray[np.int64] = np.zeros((len(DIMENSIONS), _SIZE_MIN), np.int64)
        self.free: NDArray[np.int64] = np.zeros_like(self.capacity)
        # The part of a node's score that does not depend on who asks.
        self.base: NDArray[np.float64] = np.zeros(_SIZE_MIN)
        self.ties: NDArray[np.float64] = np.zeros(_SIZE_MIN)
        self._rows: dict[str, int] = {}
        self._unused: list[int] = list(range(_SIZE_MIN - 1, -1, -1))
        self._nodes: dict[str, Node] = {}
        self._reservations: dict[Key, Reservation] = {}
        self._on_node: dict[str, dict[Key, Reservation]] = {}
        self._of_job: dict[str, dict[str, int]] = {}
        # What the executions of each namespace take together.
        self._in_namespace: dict[str, list[int]] = {}
        # Who holds which inputs, by their keys.
        self._holders: dict[str, dict[str, HeldInput]] = {}
        self._trouble: dict[str, _Trouble] = {}
        self._trouble_seen = 0.0
        self._improved: dict[str, None] = {}
        self._journal: list[Callable[[], None]] | None = None

    # -- what it knows ---------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._nodes)

    def node(self, name: str) -> Node | None:
        """A node by name."""
        return self._nodes.get(name)

    def row(self, name: str) -> int | None:
        """The row of a node."""
        return self._rows.get(name)

    def free_on(self, row: int) -> Amounts:
        """What is left on a node; negative where it shrank below what is taken."""
        return Amounts(*(int(v) for v in self.free[:, row]))

    def capacity_on(self, row: int) -> Amounts:
        """What a node has in all."""
        return Amounts(*(int(v) for v in self.capacity[:, row]))

    def reservation(self, key: Key) -> Reservation | None:
        """What is set aside for an execution."""
        return self._reservations.get(key)

    def reserved_on(self, node: str) -> tuple[Key, ...]:
        """The executions that something is set aside for on a node."""
        return tuple(self._on_node.get(node, ()))

    def of_job(self, job_uid: str) -> dict[str, int]:
        """How many reservations a job has on each node. Not to be changed by the caller."""
        return self._of_job.get(job_uid, {})

    def used_in(self, namespace: str) -> Amounts:
        """What all executions of a namespace take together."""
        sums = self._in_namespace.get(namespace)
        return Amounts(*sums) if sums else Amounts(0, 0, 0, 0, 0)

    @property
    def knows_data(self) -> bool:
        """Whether any node holds any input, so that it is worth asking."""
        return bool(self._holders)

    def near(self, keys: Iterable[str]) -> Near:
        """Which nodes hold how much of the inputs with these keys."""
        held: dict[str, int] = {}
        total: int | None = 0
        for key in keys:
            holders = self._holders.get(key)
            if holders is None:
                total = None
                continue
            for name, one in holders.items():
                held[name] = held.get(name, 0) + one.size_bytes
            if total is not None:
                total += max(one.total_bytes for one in holders.values())
        return Near(held, total) if held else NOWHERE

    def capacity_part(self, row: int) -> float:
        """The part of a node's score that comes from free room."""
        return capacity_score(self.free_on(row), self.capacity_on(row), self.strategy)

    def trouble_on(self, node: str, now: float) -> float:
        """The level of recent faults of a node: about one for each, halving in ten minutes."""
        trouble = self._trouble.get(node)
        return trouble.level_at(now) if trouble else 0.0

    def matches(self, shape: Shape) -> tuple[str, ...]:
        """The names of all nodes that meet a shape, sorted; resources are not looked at."""
        return tuple(
            sorted(self.names[row] for row in np.flatnonzero(self.matching.mask(shape).ok))
        )

    def is_fitting(self, shape: Shape, amounts: Amounts, row: int) -> bool:
        """Whether one node meets a shape and has room."""
        return bool(self.matching.mask(shape).ok[row]) and fits(amounts, self.free_on(row))

    def take_improved(self) -> tuple[str, ...]:
        """The nodes on which something became possible since the last call: more room, or a
        changed fact."""
        names = tuple(self._improved)
        self._improved.clear()
        return names

    # -- what it learns --------------------------------------------------------------------------

    def apply(self, old: Resource | None, new: Resource | None, now: float) -> None:
        """Take in one change of the cache. `now` is the wall clock in seconds. Idempotent."""
        match new or old:
            case Node():
                self._apply_node(old, new, now)
            case Execution():
                self._apply_execution(old, new, now)
            case _:
                return

    def note_trouble(self, node: str, now: float) -> None:
        """Count one fault against a node: a disconnect, a broken engine, a lost execution."""
        self._trouble[node] = _Trouble(self.trouble_on(node, now) + 1.0, now)
        if (row := self._rows.get(node)) is not None:
            self._score(row, now)

    def refresh(self, now: float) -> None:
        """Let the memory of faults fade. Cheap; called before decisions."""
        if 0.0 <= now - self._trouble_seen < _TROUBLE_REFRESH_SECONDS:
            return
        self._trouble_seen = now
        for node, trouble in list(self._trouble.items()):
            if trouble.level_at(now) < 0.01:
                del self._trouble[node]
            if (row := self._rows.get(node)) is not None:
                self._score(row, now)

    # -- what is set aside -----------------------------------------------------------------------

    def reserve(self, key: Key, reservation: Reservation) -> None:
        """Set something aside. Doing it twice changes nothing; another node moves it."""
        old = self._reservations.get(key)
        if old == reservation:
            return
        if old is not None:
            self._remove(key, old)
        self._add(key, reservation)
        if self._journal is not None:
            self._journal.append(lambda: self._undo(key, old))

    def release(self, key: Key) -> None:
        """Give back what was set aside for an execution. No error if there is nothing."""
        old = self._reservations.get(key)
        if old is not None:
            self._remove(key, old)
            self._improved[old.node] = None

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """All reservations made inside are undone at its end: for `what if`."""
        assert self._journal is None, "rehearsals do not nest"
        self._journal = []
        try:
            yield
        finally:
            journal, self._journal = self._journal, None
            for undo in reversed(journal):
                undo()

    def _undo(self, key: Key, old: Reservation | None) -> None:
        if (made := self._reservations.get(key)) is not None:
            self._remove(key, made)
        if old is not None:
            self._add(key, old)

    def _add(self, key: Key, made: Reservation) -> None:
        self._reservations[key] = made
        self._on_node.setdefault(made.node, {})[key] = made
        counts = self._of_job.setdefault(made.job_uid, {})
        counts[made.node] = counts.get(made.node, 0) + 1
        self._take(made, -1)
        self._sum(key, made, 1)

    def _remove(self, key: Key, made: Reservation) -> None:
        del self._reservations[key]
        _drop(self._on_node, made.node, key)
        counts = self._of_job[made.job_uid]
        counts[made.node] -= 1
        if not counts[made.node]:
            _drop(self._of_job, made.job_uid, made.node)
        self._take(made, 1)
        self._sum(key, made, -1)

    def _sum(self, key: Key, made: Reservation, sign: int) -> None:
        sums = self._in_namespace.setdefault(key[0], [0] * len(DIMENSIONS))
        for dimension, amount in enumerate(made.amounts):
            sums[dimension] += sign * amount
        if not any(sums):
            del self._in_namespace[key[0]]

    def _take(self, made: Reservation, sign: int) -> None:
        row = self._rows.get(made.node)
        if row is not None:
            for dimension, amount in enumerate(made.amounts):
                self.free[dimension, row] += sign * amount
            self._score(row, self._trouble_seen)

    # -- rows ------------------------------------------------------------------------------------

    def _apply_node(self, old: Resource | None, new: Resource | None, now: float) -> None:
        if not isinstance(new, Node):
            if old is not None:
                self._remove_row(old.name)
            return
        row = self._rows.get(new.name)
        if row is None:
            row = self._new_row(new.name)
        before = self._nodes.get(new.name)
        self._nodes[new.name] = new
        if before is new:
            return
        self._note_held(before, new)
        if before and _was_cut_off(before, new):
            self.note_trouble(new.name, now)
        capacity = np.array(capacity_of(new), np.int64)
        is_larger = bool((capacity > self.capacity[:, row]).any())
        if not (capacity == self.capacity[:, row]).all():
            self.capacity[:, row] = capacity
            self.free[:, row] = capacity
            for made in self._on_node.get(new.name, {}).values():
                self.free[:, row] -= np.array(made.amounts, np.int64)
            self._score(row, now)
        if self.matching.set(row, new) or is_larger or _has_reconnected(before, new):
            self._improved[new.name] = None

    def _apply_execution(self, old: Resource | None, new: Resource | None, now: float) -> None:
        execution = new or old
        assert isinstance(execution, Execution)
        key = (execution.metadata.namespace, execution.name)
        if new is None or execution.phase.is_final:
            if _is_fault(old, new):
                self.note_trouble(execution.spec.node, now)
            self.release(key)
            return
        spec = execution.spec
        amounts = amounts_of(spec.task.resources, self.defaults)
        self.reserve(key, Reservation(spec.node, spec.job_uid, amounts))

    def _new_row(self, name: str) -> int:
        if not self._unused:
            self._grow()
        row = self._unused.pop()
        self._rows[name] = row
        self.names[row] = name
        self.ties[row] = unit_hash(name)
        return row

    def _remove_row(self, name: str) -> None:
        row = self._rows.pop(name, None)
        if row is None:
            return
        self._note_held(self._nodes.pop(name), None)
        self.names[row] = ""
        self.capacity[:, row] = 0
        self.free[:, row] = 0
        self.matching.set(row, None)
        self._unused.append(row)
        self._improved.pop(name, None)

    def _note_held(self, old: Node | None, new: Node | None) -> None:
        """What a node says it holds takes the place of what it said before."""
        before = old.status.info.held_inputs if old is not None else ()
        after = new.status.info.held_inputs if new is not None else ()
        if before == after:
            return
        if old is not None:
            for key in {one.key for one in before}:
                _drop(self._holders, key, old.name)
        if new is not None:
            for one in after:
                self._holders.setdefault(one.key, {})[new.name] = one

    def _grow(self) -> None:
        size = len(self.names)
        self.names += [""] * size
        self.capacity = np.pad(self.capacity, ((0, 0), (0, size)))
        self.free = np.pad(self.free, ((0, 0), (0, size)))
        self.base = np.pad(self.base, (0, size))
        self.ties = np.pad(self.ties, (0, size))
        self.matching.resize(2 * size)
        self._unused = list(range(2 * size - 1, size - 1, -1))

    def _score(self, row: int, now: float) -> None:
        self.base[row] = self.capacity_part(row) + trouble_score(
            self.trouble_on(self.names[row], now)
        )


def _drop(groups: dict[str, dict[K, V]], group: str, item: K) -> None:
    del groups[group][item]
    if not groups[group]:
        del groups[group]


def _was_cut_off(old: Node, new: Node) -> bool:
    return old.status.contact is Contact.REACHABLE and new.status.contact is not Contact.REACHABLE


def _has_reconnected(old: Node | None, new: Node) -> bool:
    """A node that came back may have another configuration, and is asked again for what it
    refused."""
    return old is None or old.status.connected_since != new.status.connected_since


def _is_fault(old: Resource | None, new: Resource | None) -> bool:
    if not isinstance(new, Execution) or new.status.report is None:
        return False
    was_final = isinstance(old, Execution) and old.phase.is_final
    return new.status.report.is_system_fault and not was_final
