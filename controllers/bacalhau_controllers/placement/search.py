"""One search for places: filters and scores over all nodes, for one job and any number of slots.

A search looks at the table once; each place taken afterwards touches one row. So 400 partitions
of one job cost little more than one.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bacalhau_controllers.placement.locality import NOWHERE, Near, locality_score
from bacalhau_controllers.placement.resources import Amounts, fits
from bacalhau_controllers.placement.rules import Shape
from bacalhau_controllers.placement.scores import AVOIDED, same_job_score
from bacalhau_controllers.placement.table import Key, NodeTable, Reservation, turn_hash

# So small that it decides among equals only.
_TIE_WEIGHT: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Request:
    """What one job asks for.

    job, job_uid  whose slots are to be placed; its other executions are spread out
    shape         all that is asked of a node apart from resources
    amounts       what one execution takes
    refused       nodes that refused this generation, with their words
    only          where not None: no other nodes
    """

    job: str
    job_uid: str
    shape: Shape
    amounts: Amounts
    refused: Mapping[str, str] = field(default_factory=dict)
    only: frozenset[str] | None = None


class Search:
    """The nodes that fit a request now, with their scores.

    `held` are nodes whose room is kept for jobs that go first, with the reason. The table must
    not be changed by others while a search is used: it lives within one synchronous decision.
    `now` is the wall clock in seconds.
    """

    def __init__(
        self,
        table: NodeTable,
        request: Request,
        *,
        now: float,
        held: Mapping[str, str] | None = None,
    ) -> None:
        self.table = table
        self.request = request
        self.held: Mapping[str, str] = held or {}
        self.now = now
        table.refresh(now)
        is_fit = table.matching.mask(request.shape).ok.copy()
        for dimension, need in enumerate(request.amounts):
            if need:
                is_fit &= table.free[dimension] >= need
        for row in self.rows([*request.refused, *self.held]):
            is_fit[row] = False
        if request.only is not None:
            is_named = np.zeros_like(is_fit)
            is_named[self.rows(request.only)] = True
            is_fit &= is_named
        # Equal nodes take turns: who comes first after the job's own point on the circle.
        turn = table.ties - turn_hash(request.job_uid)
        turn += turn < 0.0
        score = turn * -_TIE_WEIGHT
        score += table.base
        score[~is_fit] = -np.inf
        for node, count in table.of_job(request.job_uid).items():
            if (at := table.row(node)) is not None:
                score[at] += same_job_score(count)
        self._score = score
        self._near = NOWHERE
        self._near_rows: NDArray[np.intp] = np.zeros(0, np.intp)
        self._near_scores: NDArray[np.float64] = np.zeros(0)

    @property
    def is_empty(self) -> bool:
        """True if no node fits."""
        return not len(self._score) or bool(np.isneginf(self._score.max()))

    def count(self) -> int:
        """How many nodes fit."""
        return int(np.count_nonzero(~np.isneginf(self._score)))

    def fitting(self) -> tuple[str, ...]:
        """The names of the nodes that fit."""
        return tuple(self.table.names[row] for row in np.flatnonzero(~np.isneginf(self._score)))

    def best(self, avoid: Collection[str] = (), near: Near = NOWHERE) -> int | None:
        """The row of the best node, one of `avoid` only if no other fits; None if none does.
        `near` says where the slot's data is."""
        score = self._score
        self._look_near(near)
        avoided = self.rows(avoid)
        saved_near, saved = score[self._near_rows], score[avoided]
        score[self._near_rows] += self._near_scores
        score[avoided] += AVOIDED
        best = int(np.argmax(score))
        is_found = not np.isneginf(score[best])
        score[self._near_rows] = saved_near
        score[avoided] = saved
        return best if is_found else None

    def _look_near(self, near: Near) -> None:
        """Look the holders up, once for all slots that read the same."""
        if near is self._near:
            return
        found = [
            (row, size) for n, size in near.held.items() if (row := self.table.row(n)) is not None
        ]
        self._near = near
        self._near_rows = np.array([row for row, _ in found], np.intp)
        self._near_scores = np.array([locality_score(size) for _, size in found])

    def at(self, node: str) -> int | None:
        """The row of one node if it fits, else None."""
        row = self.table.row(node)
        return None if row is None or np.isneginf(self._score[row]) else row

    def parts(
        self, row: int, avoid: Collection[str] = (), near: Near = NOWHERE
    ) -> dict[str, float]:
        """What a node's score is made of. Parts that are zero are left out, but for capacity."""
        table, node = self.table, self.table.names[row]
        trouble = table.trouble_on(node, self.now)
        parts = {
            "capacity": table.capacity_part(row),
            "sameJob": same_job_score(table.of_job(self.request.job_uid).get(node, 0)),
            "trouble": float(table.base[row]) - table.capacity_part(row) if trouble else 0.0,
            "avoided": AVOIDED if node in avoid else 0.0,
            "locality": locality_score(near.held.get(node, 0)),
        }
        return {
            name: round(value, 4) for name, value in parts.items() if value or name == "capacity"
        }

    def take(self, row: int, key: Key) -> None:
        """Set the request aside on a node, for the execution `key`."""
        table, request = self.table, self.request
        node = table.names[row]
        count = table.of_job(request.job_uid).get(node, 0)
        before = table.base[row] + same_job_score(count)
        table.reserve(key, Reservation(node, request.job_uid, request.amounts))
        after = table.base[row] + same_job_score(count + 1)
        self._score[row] += after - before
        if not fits(request.amounts, table.free_on(row)):
            self._score[row] = -np.inf

    def rows(self, names: Collection[str]) -> list[int]:
        """The rows of those nodes that exist."""
        rows = (self.table.row(name) for name in names)
        return [row for row in rows if row is not None]
