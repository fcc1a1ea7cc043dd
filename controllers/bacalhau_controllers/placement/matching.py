"""Which nodes meet a shape, for all nodes at once.

Each fact that rules look at is a column of small integers over the table's rows; each check is
asked once for each distinct fact. What a shape says of all rows is kept, and brought up to date
for just those rows that changed. So a label that changes on one of 10,000 nodes costs one row.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bacalhau_api.v1.job import Constraint
from bacalhau_api.v1.node import Node
from bacalhau_controllers.placement.rules import RULES, Check, Finding, Shape

Flags = NDArray[np.bool_]
Small = NDArray[np.int16]
Order = NDArray[np.float64]

# Bounds on what is kept for shapes, checks and label keys that users may invent without end.
_SHAPES_MAX: Final = 256
_CHECKS_MAX: Final = 4096
_COLUMNS_MAX: Final = 512
_STALE_FACTS_MAX: Final = 4096

# An equality can be met by its own values only, so that the others need not be asked: with
# `name=n-7` that is one fact instead of one for each node.
_EQUALITIES: Final = frozenset({"=", "==", "in"})


@dataclass(slots=True)
class _Column:
    """One fact of all nodes. Code 0 stands for rows without a node."""

    codes: NDArray[np.int32]
    facts: list[Hashable] = field(default_factory=lambda: [None])
    index: dict[Hashable, int] = field(default_factory=dict)

    def code(self, fact: Hashable) -> int:
        """The number of a fact, given on first sight."""
        known = self.index.get(fact)
        if known is None:
            known = self.index[fact] = len(self.facts)
            self.facts.append(fact)
        return known


@dataclass(slots=True)
class Mask:
    """What a shape says of all rows.

    `ok`: meets all checks. `first`: the position of the first check that failed, -1 for none.
    `fails`: how many failed.
    """

    version: int
    ok: Flags
    first: Small
    fails: Small
    counts: "tuple[Count, ...] | None" = None


class Count(NamedTuple):
    """How many nodes a rule turned down, and the row of one of them."""

    rule: str
    nodes: int
    row: int


class Matching:
    """The facts of all nodes, by row. `is_there` says which rows hold a node."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._nodes: list[Node | None] = [None] * size
        self.is_there = np.zeros(size, bool)
        self._columns: dict[tuple[str, str], _Column] = {}
        self._answers: dict[Check, Flags] = {}
        self._masks: OrderedDict[Shape, Mask] = OrderedDict()
        self._version = 0
        self._changed = np.zeros(size, np.int64)

    def resize(self, size: int) -> None:
        """Make room for more rows."""
        self._nodes += [None] * (size - self._size)
        more = size - self._size
        self.is_there = np.pad(self.is_there, (0, more))
        self._changed = np.pad(self._changed, (0, more))
        for column in self._columns.values():
            column.codes = np.pad(column.codes, (0, more))
        self._masks.clear()
        self._size = size

    def set(self, row: int, node: Node | None) -> bool:
        """Put a node (or nothing) into a row. True if that can change any answer."""
        is_changed = (self._nodes[row] is None) != (node is None)
        self._nodes[row] = node
        self.is_there[row] = node is not None
        for (rule, key), column in list(self._columns.items()):
            code = column.code(RULES[rule].fact(node, key)) if node is not None else 0
            if code != column.codes[row]:
                column.codes[row] = code
                is_changed = True
            if len(column.facts) > len(self._nodes) + _STALE_FACTS_MAX:
                self._forget_column(rule, key)
        if is_changed:
            self._version += 1
            self._changed[row] = self._version
        return is_changed

    def mask(self, shape: Shape) -> Mask:
        """What a shape says of all rows now. Not to be changed by the caller."""
        mask = self._masks.get(shape)
        if mask is None:
            size = self._size
            mask = Mask(
                -1, np.zeros(size, bool), np.zeros(size, np.int16), np.zeros(size, np.int16)
            )
            self._masks[shape] = mask
            if len(self._masks) > _SHAPES_MAX:
                self._masks.popitem(last=False)
        else:
            self._masks.move_to_end(shape)
        if mask.version != self._version:
            self._refresh(shape, mask)
        return mask

    def finding(self, check: Check, row: int) -> Finding:
        """What one check says of one row's node."""
        node = self._nodes[row]
        assert node is not None
        rule = RULES[check.rule]
        return rule.check(check.need, rule.fact(node, check.key)).about(node.name)

    def counts(self, shape: Shape, order: Order, scope: Flags | None = None) -> tuple[Count, ...]:
        """How many nodes (of those in scope) each rule turned down, each node under the first. The
        example is the first by `order`, so that it does not depend on who came first."""
        mask = self.mask(shape)
        if scope is not None:
            return _count(shape, np.where(scope, mask.first, -1), order)
        if mask.counts is None:
            mask.counts = _count(shape, mask.first, order)
        return mask.counts

    def _refresh(self, shape: Shape, mask: Mask) -> None:
        rows: slice | NDArray[np.intp] = slice(None)
        if mask.version >= 0:
            rows = np.flatnonzero(self._changed > mask.version)
        first = np.full(len(mask.first[rows]), -1, np.int16)
        fails = np.zeros(len(first), np.int16)
        for i, check in enumerate(shape):
            codes = self._column(check.rule, check.key).codes[rows]
            bad = ~self._answer(check)[codes]
            first[bad & (first < 0)] = i
            fails += bad
        nobody = ~self.is_there[rows]
        first[nobody] = -1
        fails[nobody] = np.iinfo(np.int16).max
        mask.first[rows], mask.fails[rows] = first, fails
        mask.ok[rows] = fails == 0
        mask.counts = None
        mask.version = self._version

    def _column(self, rule: str, key: str) -> _Column:
        column = self._columns.get((rule, key))
        if column is None:
            if len(self._columns) >= _COLUMNS_MAX:
                self._forget_all()
            column = self._columns[rule, key] = _Column(np.zeros(self._size, np.int32))
            fact = RULES[rule].fact
            for row, node in enumerate(self._nodes):
                if node is not None:
                    column.codes[row] = column.code(fact(node, key))
        return column

    def _answer(self, check: Check) -> Flags:
        """Whether a check is met, for each code of its column."""
        facts = self._column(check.rule, check.key).facts
        known = self._answers.get(check)
        start = 1 if known is None else len(known)
        if known is not None and start == len(facts):
            return known
        if len(self._answers) >= _CHECKS_MAX:
            self._answers.clear()
            known, start = None, 1
        answer = np.zeros(len(facts), bool)
        if known is not None:
            answer[:start] = known
        decide = RULES[check.rule].check
        for code in self._candidates(check, start):
            answer[code] = decide(check.need, facts[code]).is_ok
        self._answers[check] = answer
        return answer

    def _candidates(self, check: Check, start: int) -> Iterable[int]:
        """The codes from `start` on that may meet a check."""
        column = self._column(check.rule, check.key)
        need = check.need
        if isinstance(need, Constraint) and need.operator in _EQUALITIES:
            codes = (column.index.get(value, 0) for value in need.values)
            return [code for code in codes if code >= start]
        return range(start, len(column.facts))

    def _forget_column(self, rule: str, key: str) -> None:
        """Drop a column that remembers too many facts of the past; it is built again on use."""
        del self._columns[rule, key]
        for check in [c for c in self._answers if (c.rule, c.key) == (rule, key)]:
            del self._answers[check]

    def _forget_all(self) -> None:
        self._columns.clear()
        self._answers.clear()


def first_of(rows: Flags, order: Order) -> int:
    """The row that comes first by `order`; at least one is set."""
    return int(np.argmin(np.where(rows, order, np.inf)))


def _count(shape: Shape, first: Small, order: Order) -> tuple[Count, ...]:
    by_rule: dict[str, tuple[int, int]] = {}
    numbers = np.bincount(first[first >= 0], minlength=len(shape))
    for i in np.flatnonzero(numbers):
        rule = shape[i].rule
        count, row = by_rule.get(rule, (0, first_of(first == i, order)))
        by_rule[rule] = (count + int(numbers[i]), row)
    return tuple(Count(rule, count, row) for rule, (count, row) in by_rule.items())
