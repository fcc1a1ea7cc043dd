"""Placement: filter, then score. Which node runs a slot, and why, and why not the others.

`rules` and `resources` filter, `scores` and `locality` rank, `table` holds all nodes as arrays, `search` decides,
`verdict` explains from the same functions. Nothing here knows about phases or retries.
"""

from collections.abc import Collection, Mapping
from datetime import datetime

from bacalhau_api.v1.job import Verdict
from bacalhau_controllers.placement.locality import NOWHERE, Near
from bacalhau_controllers.placement.resources import DEFAULTS, Amounts, amounts_of, fits
from bacalhau_controllers.placement.rules import delivery, shape_of
from bacalhau_controllers.placement.search import Request, Search
from bacalhau_controllers.placement.table import Key, NodeTable, Reservation
from bacalhau_controllers.placement.verdict import (
    LOCALITY,
    RuleFinding,
    describe,
    evaluate,
    summarise,
)


def place(
    request: Request,
    table: NodeTable,
    *,
    slot: str,
    now: datetime,
    key: Key | None = None,
    avoid: Collection[str] = (),
    held: Mapping[str, str] | None = None,
    near: Near = NOWHERE,
) -> Verdict:
    """Decide on one slot; `verdict.node` is the node chosen, empty if none fits.

    With `key` (the execution's) the place is taken at once.
    """
    search = Search(table, request, now=now.timestamp(), held=held)
    row = search.best(avoid, near)
    verdict = describe(search, slot, now, row=row, avoid=avoid, near=near)
    if key is not None and row is not None:
        search.take(row, key)
    return verdict


__all__ = [
    "DEFAULTS",
    "LOCALITY",
    "NOWHERE",
    "Amounts",
    "Key",
    "Near",
    "NodeTable",
    "Request",
    "Reservation",
    "RuleFinding",
    "Search",
    "amounts_of",
    "delivery",
    "describe",
    "evaluate",
    "fits",
    "place",
    "shape_of",
    "summarise",
]
