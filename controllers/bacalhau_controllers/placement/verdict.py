"""Why here, why not there: the scheduler's decisions in words.

A verdict is taken from the search that decided, before the place is taken: how many nodes each
rule turned down (each node is counted under the first rule it failed), the node that came nearest,
and the one change that would make it fit. `evaluate` says of one node what every rule says.
"""

from collections.abc import Collection
from datetime import datetime
from typing import NamedTuple

import numpy as np

from bacalhau_api.v1.job import Job, RuleCount, Verdict
from bacalhau_api.v1.node import Node
from bacalhau_controllers.placement.locality import NOWHERE, Near, data_words, holding
from bacalhau_controllers.placement.matching import Flags, first_of
from bacalhau_controllers.placement.resources import (
    DIMENSIONS,
    Amounts,
    amounts_of,
    capacity_of,
    fitting,
)
from bacalhau_controllers.placement.rules import RULES, shape_of
from bacalhau_controllers.placement.search import Request, Search
from bacalhau_controllers.placement.table import NodeTable

LOCALITY = "Locality"
"""In place of a rule's name: where the data is, which turns no node down."""

NO_NODES = "add a node: bacalhau serve --compute"


class RuleFinding(NamedTuple):
    """What one rule says of one node for one job."""

    rule: str
    is_ok: bool
    message: str
    remedy: str = ""


def describe(
    search: Search,
    slot: str,
    now: datetime,
    *,
    row: int | None,
    avoid: Collection[str] = (),
    near: Near = NOWHERE,
) -> Verdict:
    """The verdict of a search on one slot: `row` is the node chosen, None if there is none."""
    table, request = search.table, search.request
    scope = _scope(search)
    counts = _counts(search, scope)
    total = int(np.count_nonzero(scope))
    if row is not None:
        return Verdict(
            slot=slot,
            time=now,
            node=table.names[row],
            nodes_total=total,
            rejected=counts,
            scores=search.parts(row, avoid, near),
            data=data_words(near, table.names[row]),
        )
    if not total:
        remedy = NO_NODES
        if request.only is not None:
            remedy = f"bring back {', '.join(sorted(request.only)[:3])}"
        return Verdict(slot=slot, time=now, remedy=remedy)
    nearest = _nearest(search, scope)
    misses = [f for f in _findings(search, nearest) if not f.is_ok]
    remedy = misses[0].remedy if len(misses) == 1 else ""
    return Verdict(
        slot=slot,
        time=now,
        nodes_total=total,
        rejected=counts,
        nearest=table.names[nearest],
        remedy=remedy or "; ".join(m.remedy for m in misses if m.remedy),
    )


def summarise(verdict: Verdict) -> str:
    """One line for people: `no node of 12 fits: 7 Cpu, 5 Contact; n-3 would if ...`."""
    if verdict.node:
        return f"placed on {verdict.node}{f'; {verdict.data}' if verdict.data else ''}"
    if not verdict.nodes_total:
        return f"there is no node to run on; {verdict.remedy}"
    nodes = (
        "the only node does not fit"
        if verdict.nodes_total == 1
        else (f"none of {verdict.nodes_total} nodes fits")
    )
    rules = ", ".join(f"{c.rule} {c.nodes}" for c in verdict.rejected)
    remedy = f"; nearest is {verdict.nearest}: {verdict.remedy}" if verdict.remedy else ""
    return f"{nodes} ({rules}){remedy}"


def evaluate(
    job: Job,
    node: Node,
    table: NodeTable | None = None,
    *,
    request: Request | None = None,
    held: str = "",
    near: Near = NOWHERE,
) -> tuple[RuleFinding, ...]:
    """What each rule says of one node for one job, those that are fine included.

    With a table, room is judged by what is set aside there, else by the empty node. `request`
    adds refusals, `held` is why the node's room is kept for another job. `near` says where the
    job's data is, if anywhere: no rule, but a reason.
    """
    shape = request.shape if request else shape_of(job)
    amounts = (
        request.amounts
        if request
        else amounts_of(job.spec.task.resources, *([table.defaults] if table else []))
    )
    found: list[RuleFinding] = []
    for check in shape:
        rule = RULES[check.rule]
        finding = rule.check(check.need, rule.fact(node, check.key)).about(node.name)
        found.append(RuleFinding(check.rule, *finding))
    refusal = request.refused.get(node.name) if request else None
    found += _refusals(node.name, refusal, held)
    capacity = free = capacity_of(node)
    row = table.row(node.name) if table else None
    if table is not None and row is not None:
        capacity, free = table.capacity_on(row), table.free_on(row)
    found += _rooms(node.name, amounts, free, capacity)
    if near.held:
        found.append(RuleFinding(LOCALITY, True, holding(near, node.name)))
    return tuple(found)


def _refusals(node: str, refusal: str | None, held: str) -> list[RuleFinding]:
    found: list[RuleFinding] = []
    if refusal is not None:
        message = f"refused this job: {refusal or 'no reason given'}"
        found.append(
            RuleFinding("Refused", False, message, f"change what {node} refuses, or the job")
        )
    if held:
        found.append(RuleFinding("Turn", False, held, "wait for its turn, or raise its priority"))
    return found


def _rooms(node: str, amounts: Amounts, free: Amounts, capacity: Amounts) -> list[RuleFinding]:
    return [
        RuleFinding(name, *fitting(i, amounts, free, capacity).about(node))
        for i, name in enumerate(DIMENSIONS)
        if amounts[i]
    ]


def _findings(search: Search, row: int) -> list[RuleFinding]:
    """All that a search's rules say of one row."""
    table, request = search.table, search.request
    node = table.names[row]
    found = [
        RuleFinding(check.rule, *table.matching.finding(check, row)) for check in request.shape
    ]
    found += _refusals(node, request.refused.get(node), search.held.get(node, ""))
    free, capacity = table.free_on(row), table.capacity_on(row)
    return found + _rooms(node, request.amounts, free, capacity)


def _scope(search: Search) -> Flags:
    """The rows that are candidates at all."""
    scope = search.table.matching.is_there
    if search.request.only is None:
        return scope
    named = np.zeros_like(scope)
    named[search.rows(search.request.only)] = True
    return scope & named


def _dynamic(search: Search) -> list[tuple[str, Flags]]:
    """What the rules that are not part of the shape turn down: name and rows."""
    table, request = search.table, search.request
    found: list[tuple[str, Flags]] = []
    for name, nodes in (("Refused", request.refused), ("Turn", search.held)):
        if nodes:
            bad = np.zeros_like(table.matching.is_there)
            bad[search.rows(nodes)] = True
            found.append((name, bad))
    for i, name in enumerate(DIMENSIONS):
        if request.amounts[i]:
            found.append((name, table.free[i] < request.amounts[i]))
    return found


def _counts(search: Search, scope: Flags) -> tuple[RuleCount, ...]:
    table, request = search.table, search.request
    counts: list[RuleCount] = []
    mask = table.matching.mask(request.shape)
    if request.only is None:
        by_rule = table.matching.counts(request.shape, table.ties)
    else:
        by_rule = table.matching.counts(request.shape, table.ties, scope)
    for rule, number, row in by_rule:
        counts.append(RuleCount(rule=rule, nodes=number, example=_example(search, rule, row)))
    left = mask.ok & scope
    for name, bad in _dynamic(search):
        turned_down = left & bad
        number = int(np.count_nonzero(turned_down))
        if number:
            row = first_of(turned_down, table.ties)
            counts.append(RuleCount(rule=name, nodes=number, example=_example(search, name, row)))
            left &= ~bad
    return tuple(counts)


def _example(search: Search, rule: str, row: int) -> str:
    for finding in _findings(search, row):
        if finding.rule == rule and not finding.is_ok:
            return f"{search.table.names[row]} {finding.message}"
    return ""


def _nearest(search: Search, scope: Flags) -> int:
    """The candidate that fails the fewest rules; of equals the better one, then by the table's order."""
    table = search.table
    fails = table.matching.mask(search.request.shape).fails.astype(np.int32)
    for _, bad in _dynamic(search):
        fails += bad
    fails[~scope] = np.iinfo(np.int32).max
    rows = np.flatnonzero(fails == fails.min())
    best = rows[table.base[rows] == table.base[rows].max()]
    return int(best[np.argmin(table.ties[best])])
