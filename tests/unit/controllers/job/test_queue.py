"""The line of waiting jobs: who is woken, and what is kept for whom."""

from datetime import timedelta
from typing import Any

import pytest

from bacalhau_api.meta import Ref
from bacalhau_api.v1.job import Job
from bacalhau_controllers.job import Queued, WaitQueue
from bacalhau_controllers.job.placing import request_of
from bacalhau_controllers.job.queue import HOLD_SECONDS, WAKES_MAX, Rank, Ranking
from bacalhau_controllers.placement import NodeTable, Reservation
from bacalhau_controllers.placement.resources import Amounts
from tests.support.job_world import make_node, make_spec
from tests.support.samples import at
from tests.support.samples import job as sample_job


def full_table(*names: str, cpu: int = 300) -> NodeTable:
    """Nodes with nothing left."""
    table = NodeTable()
    for name in names:
        table.apply(None, make_node(name, cpu=cpu), 0)
        table.reserve(("ns", name), Reservation(name, "x", Amounts(cpu, 0, 0, 0, 1)))
    table.take_improved()
    return table


def free(table: NodeTable, name: str) -> tuple[str, ...]:
    table.release(("ns", name))
    return table.take_improved()


def ref(name: str) -> Ref:
    return Ref("Job", "default", name)


class Line:
    """A queue and the jobs in it."""

    def __init__(self, table: NodeTable) -> None:
        self.table = table
        self.queue = WaitQueue(table)
        self.jobs: dict[str, Job] = {}

    def rank(self, name: str, priority: int = 0, since: float = 0) -> Rank:
        return Rank(-priority, at(0) + timedelta(seconds=since), "default", name)

    def put(
        self, name: str, *, priority: int = 0, since: float = 0, slots: int = 1, **spec: Any
    ) -> None:
        job = sample_job(name, spec=make_spec(**spec))
        request = request_of(job, None, self.table)
        self.queue.put(ref(name), self.rank(name, priority, since), Queued(request, slots), 0)

    def improved(self, nodes: tuple[str, ...], now: float = 0) -> list[str]:
        return [r.name for r in self.queue.improved(nodes, now)]


def test_priority_then_age_then_name() -> None:
    line = Line(full_table("a", cpu=1000))
    line.put("young", since=9)
    line.put("old", since=1)
    line.put("urgent", priority=3, since=99)
    line.put("b-equal", since=5)
    line.put("a-equal", since=5)
    woken = line.improved(free(line.table, "a"))
    assert woken == ["urgent", "old", "a-equal", "b-equal", "young"]


def test_no_more_are_woken_than_there_is_room_for() -> None:
    line = Line(full_table("a", cpu=300))
    for i in range(9):
        line.put(f"j{i}", since=i)
    assert line.improved(free(line.table, "a")) == ["j0", "j1", "j2"]


def test_a_job_with_many_slots_uses_the_room_alone() -> None:
    line = Line(full_table("a", cpu=300))
    line.put("many", slots=50)
    line.put("other", since=1)
    assert line.improved(free(line.table, "a")) == ["many"]


def test_a_small_job_behind_a_large_one_that_does_not_fit_is_woken() -> None:
    line = Line(full_table("a", cpu=300))
    line.put("large", cpu=5000, priority=9)
    line.put("elsewhere", labels="zone=x", priority=8)
    line.put("small", since=1)
    assert line.improved(free(line.table, "a")) == ["small"]
    assert line.queue.held(ref("small"), line.rank("small", 0, 1), 0) == {}


def test_wakes_are_bounded() -> None:
    line = Line(full_table("a", cpu=10**6))
    for i in range(300):
        line.put(f"j{i}", cpu=1)
    assert len(line.improved(free(line.table, "a"))) == WAKES_MAX


def test_room_is_kept_for_those_in_front_for_a_while() -> None:
    line = Line(full_table("a", "b"))
    line.put("first", priority=5)
    behind, before = line.rank("new", 0), line.rank("new", 9)
    assert line.queue.held(ref("new"), behind, 0) == {}
    line.improved(free(line.table, "a"))
    held = line.queue.held(ref("new"), behind, 1)
    assert set(held) == {"a"}
    assert "default/first" in held["a"]
    assert line.queue.held(ref("new"), before, 1) == {}, "who goes first takes what it wants"
    assert line.queue.held(ref("first"), line.rank("first", 5), 1) == {}, "nobody blocks itself"
    assert line.queue.held(ref("new"), behind, HOLD_SECONDS) == {}


def test_room_that_was_taken_is_not_kept() -> None:
    line = Line(full_table("a"))
    line.put("first", priority=5)
    line.improved(free(line.table, "a"))
    line.table.reserve(("ns", "a"), Reservation("a", "x", Amounts(300, 0, 0, 0, 1)))
    assert line.queue.held(ref("new"), line.rank("new"), 1) == {}


def test_who_leaves_wakes_the_next() -> None:
    line = Line(full_table("a", cpu=100))
    line.put("first", priority=5)
    line.put("second")
    assert line.improved(free(line.table, "a")) == ["first"]
    assert [r.name for r in line.queue.remove(ref("first"))] == ["second"]
    assert ref("first") not in line.queue
    assert line.queue.remove(ref("first")) == ()


def test_a_job_that_refuses_itself_a_node_does_not_keep_it() -> None:
    line = Line(full_table("a"))
    job = sample_job("first", spec=make_spec())
    request = request_of(job, None, line.table)
    refusing = type(request)(
        request.job, request.job_uid, request.shape, request.amounts, {"a": "no"}
    )
    line.queue.put(ref("first"), line.rank("first", 5), Queued(refusing, 1), 0)
    assert line.improved(free(line.table, "a")) == []
    assert line.queue.held(ref("new"), line.rank("new"), 0) == {}


def test_rank_and_request_may_change() -> None:
    line = Line(full_table("a", cpu=100))
    line.put("one", since=1)
    line.put("two", since=2)
    line.put("two", priority=4, since=2)
    line.put("one", since=1, cpu=90)
    assert line.improved(free(line.table, "a")) == ["two"]
    line.queue.remove(ref("two"))
    line.queue.remove(ref("one"))
    assert len(line.queue) == 0


def test_a_queue_that_is_made_anew_knows_what_is_open() -> None:
    """After a restart nobody has told of improvements, and yet the order holds."""
    table = NodeTable()
    table.apply(None, make_node("a", cpu=100), 0)
    line = Line(table)
    line.put("first", priority=5)
    assert set(line.queue.held(ref("new"), line.rank("new"), 1)) == {"a"}


@pytest.mark.parametrize("gone", [True, False])
def test_nodes_that_left_are_forgotten(gone: bool) -> None:
    line = Line(full_table("a"))
    line.put("first", priority=5)
    line.improved(free(line.table, "a"))
    node = line.table.node("a")
    assert node is not None
    line.table.apply(node, None if gone else make_node("a", unschedulable=True), 0)
    assert line.queue.held(ref("new"), line.rank("new"), 1) == {}
    assert line.improved(("a",)) == []


def test_a_ranking_is_in_order_whoever_comes_and_goes() -> None:
    ranking, refs = Ranking(), {name: Ref("Job", "default", name) for name in "abc"}

    def rank(name: str, urgency: int = 0) -> Rank:
        return Rank(urgency, at(0), "default", name)

    for name in "cab":
        ranking.put(refs[name], rank(name))
    ranking.put(refs["c"], rank("c", -1))
    ranking.put(refs["c"], rank("c", -1))
    assert ranking.first(2) == (refs["c"], refs["a"])
    ranking.remove(refs["a"])
    ranking.remove(refs["a"])
    assert (ranking.first(9), len(ranking)) == ((refs["c"], refs["b"]), 2)
