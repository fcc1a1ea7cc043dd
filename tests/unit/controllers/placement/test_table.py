"""The node table: what it sets aside, what it learns, and that arrays and rules agree."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bacalhau_api.meta import Contact
from bacalhau_api.v1.execution import Desired, Execution, Phase
from bacalhau_api.v1.job import Constraint, Job, Resources
from bacalhau_api.v1.node import Capability, Membership, Node, Taint
from bacalhau_controllers.placement import (
    NodeTable,
    Request,
    Reservation,
    Search,
    amounts_of,
    describe,
    evaluate,
    place,
    shape_of,
    summarise,
)
from bacalhau_controllers.placement.resources import Amounts
from tests.support.job_world import make_node, make_spec, report_of
from tests.support.samples import at, execution
from tests.support.samples import job as sample_job

CPU = Amounts(100, 1 << 20, 0, 0, 1)


def table_of(*nodes: Node, **how: Any) -> NodeTable:
    table = NodeTable(**how)
    for node in nodes:
        table.apply(None, node, 0)
    table.take_improved()
    return table


def request_for(job: Job, **more: Any) -> Request:
    return Request(
        job.name,
        job.metadata.uid,
        shape_of(job),
        amounts_of(job.spec.task.resources),
        **more,
    )


def free_cpu(table: NodeTable, node: str) -> int:
    row = table.row(node)
    assert row is not None
    return table.free_on(row).cpu


def test_what_is_set_aside_is_gone_and_comes_back() -> None:
    table = table_of(make_node("a", cpu=1000))
    made = Reservation("a", "u", CPU)
    table.reserve(("ns", "e"), made)
    table.reserve(("ns", "e"), made)
    assert free_cpu(table, "a") == 900
    assert table.of_job("u") == {"a": 1}
    assert table.take_improved() == ()
    table.release(("ns", "e"))
    table.release(("ns", "e"))
    assert free_cpu(table, "a") == 1000
    assert table.of_job("u") == {}
    assert table.take_improved() == ("a",)


def test_an_execution_that_moves_is_counted_once() -> None:
    table = table_of(make_node("a"), make_node("b"))
    table.reserve(("ns", "e"), Reservation("a", "u", CPU))
    table.reserve(("ns", "e"), Reservation("b", "u", CPU))
    assert (free_cpu(table, "a"), free_cpu(table, "b")) == (1000, 900)


def test_executions_hold_their_place_until_they_are_over() -> None:
    table = table_of(make_node("n1", cpu=1000))
    job = sample_job(spec=make_spec())
    one = execution(job)
    table.apply(None, one, 0)
    assert free_cpu(table, "n1") == 900
    stopping = one.but(spec=one.spec.but(desired=Desired.STOP))
    lost = stopping.but(status=one.status.but(contact=Contact.LOST))
    for state in (stopping, lost):
        table.apply(one, state, 0)
        assert free_cpu(table, "n1") == 900, "it may well run there still"
    done = one.but(status=one.status.but(report=report_of(one, Phase.SUCCEEDED)))
    table.apply(lost, done, 0)
    assert free_cpu(table, "n1") == 1000
    table.apply(done, None, 0)
    assert free_cpu(table, "n1") == 1000


def test_a_deleted_execution_frees_its_place() -> None:
    table = table_of(make_node("n1"))
    one = execution(sample_job(spec=make_spec()))
    table.apply(None, one, 0)
    table.apply(one, None, 0)
    assert free_cpu(table, "n1") == 1000


def test_a_node_that_appears_after_its_executions_is_not_empty() -> None:
    table = NodeTable()
    table.apply(None, execution(sample_job(spec=make_spec())), 0)
    node = make_node("n1", cpu=1000)
    table.apply(None, node, 0)
    assert free_cpu(table, "n1") == 900
    table.apply(node, None, 0)
    assert table.row("n1") is None
    table.apply(None, node, 0)
    assert free_cpu(table, "n1") == 900


def test_a_node_that_shrinks_is_over_committed_and_takes_no_more() -> None:
    table = table_of(make_node("a", cpu=1000))
    for i in range(8):
        table.reserve(("ns", f"e{i}"), Reservation("a", "u", CPU))
    table.apply(make_node("a", cpu=1000), make_node("a", cpu=500), 0)
    assert free_cpu(table, "a") == -300
    job = sample_job(spec=make_spec())
    assert place(request_for(job), table, slot="0", now=at(0)).node == ""
    # What needs nothing of what is short can still go there.
    tiny = Request("j", "u", shape_of(job), Amounts(0, 1, 0, 0, 1))
    assert place(tiny, table, slot="0", now=at(0)).node == "a"


def test_rows_are_used_again_and_the_table_grows() -> None:
    table = NodeTable()
    job = sample_job(spec=make_spec(labels="zone=x"))
    request = request_for(job)
    for round_ in range(3):
        for i in range(150):
            table.apply(None, make_node(f"n{round_}-{i}", labels={"zone": "x" if i else "y"}), 0)
        assert Search(table, request, now=0).count() == 149
        for i in range(150):
            table.apply(make_node(f"n{round_}-{i}"), None, 0)
        assert Search(table, request, now=0).is_empty
    assert len(table) == 0
    assert len(table.names) <= 256


def test_a_burst_spreads_and_never_over_commits() -> None:
    table = table_of(*(make_node(f"n{i}", cpu=500) for i in range(10)))
    found = []
    for i in range(60):
        job = sample_job(f"j{i}", spec=make_spec(cpu=100))
        found.append(place(request_for(job), table, slot="0", now=at(0), key=("ns", f"e{i}")).node)
    assert Counter(found) == {"": 10} | {f"n{i}": 5 for i in range(10)}


def test_the_first_ten_of_a_burst_go_to_ten_nodes() -> None:
    table = table_of(*(make_node(f"n{i}") for i in range(10)))
    search = Search(table, request_for(sample_job(spec=make_spec())), now=0)
    found = set()
    for i in range(10):
        row = search.best()
        assert row is not None
        search.take(row, ("ns", f"e{i}"))
        found.add(table.names[row])
    assert len(found) == 10


def test_pack_fills_one_node_first() -> None:
    table = table_of(*(make_node(f"n{i}", cpu=500) for i in range(4)), strategy="pack")
    found = []
    for i in range(5):
        job = sample_job(f"j{i}", spec=make_spec(cpu=100))
        found.append(place(request_for(job), table, slot="0", now=at(0), key=("ns", f"e{i}")).node)
    assert len(set(found)) == 1


def test_equal_nodes_take_turns_and_the_order_of_joining_is_no_matter() -> None:
    nodes = [make_node(f"n{i}") for i in range(8)]
    jobs = [sample_job(f"j{i}", spec=make_spec()) for i in range(40)]

    def choices(table: NodeTable) -> list[str]:
        return [place(request_for(job), table, slot="0", now=at(0)).node for job in jobs]

    forward, backward = choices(table_of(*nodes)), choices(table_of(*reversed(nodes)))
    assert forward == backward
    assert len(set(forward)) >= 5


def test_the_avoided_node_is_used_only_if_no_other_fits() -> None:
    table = table_of(make_node("a"), make_node("b", cpu=200))
    request = request_for(sample_job(spec=make_spec()))
    assert place(request, table, slot="0", now=at(0), avoid=("a",)).node == "b"
    assert place(request, table, slot="0", now=at(0), avoid=("a", "b")).node in ("a", "b")
    small = table_of(make_node("a"))
    verdict = place(request, small, slot="0", now=at(0), avoid=("a",))
    assert verdict.node == "a"
    assert verdict.scores["avoided"] < 0


def test_refused_held_and_other_nodes_are_left_out() -> None:
    table = table_of(*(make_node(n) for n in "abcd"))
    job = sample_job(spec=make_spec())
    request = request_for(job, refused={"a": "no images from there"})
    held = {"b": "is kept for job ns/x"}
    search = Search(table, request, now=0, held=held)
    assert sorted(search.fitting()) == ["c", "d"]
    only = request_for(job, refused={"a": ""}, only=frozenset("ab"))
    verdict = describe(Search(table, only, now=0, held=held), "0", at(0), row=None)
    assert {(c.rule, c.nodes) for c in verdict.rejected} == {("Refused", 1), ("Turn", 1)}
    assert verdict.nodes_total == 2


def test_trouble_is_remembered_for_a_while() -> None:
    nodes = [make_node("a"), make_node("b")]
    table = table_of(*nodes)
    job = sample_job(spec=make_spec())
    one = execution(job, node="a")
    now = at(0).timestamp()
    table.apply(None, one, now)
    fault = report_of(one, Phase.FAILED, is_system_fault=True)
    table.apply(one, one.but(status=one.status.but(report=fault)), now)
    assert table.trouble_on("a", now) == 1
    for i in range(20):
        other = sample_job(f"x{i}", spec=make_spec())
        assert place(request_for(other), table, slot="0", now=at(0)).node == "b"
    assert table.trouble_on("a", now + 600) == pytest.approx(0.5)
    late = now + 86400
    table.refresh(late)
    assert table.trouble_on("a", late) < 0.001


def test_a_disconnect_counts_as_trouble() -> None:
    node = make_node("a")
    table = table_of(node)
    away = node.but(status=node.status.but(contact=Contact.UNKNOWN))
    table.apply(node, away, 5)
    assert table.trouble_on("a", 5) == 1


def test_rehearsals_leave_nothing_behind() -> None:
    table = table_of(make_node("a"))
    table.reserve(("ns", "old"), Reservation("a", "u", CPU))
    with table.rehearsal():
        table.reserve(("ns", "new"), Reservation("a", "u", CPU))
        table.reserve(("ns", "old"), Reservation("a", "u", Amounts(1, 1, 1, 1, 1)))
        assert free_cpu(table, "a") == 1000 - 100 - 1
    assert free_cpu(table, "a") == 900
    assert table.reserved_on("a") == (("ns", "old"),)
    assert table.take_improved() == ()


@pytest.mark.parametrize(
    ("change", "is_improved"),
    [
        ({"status": {"waiting": None}}, False),
        ({"spec": {"unschedulable": True}}, True),
        ({"info": {"labels": {"zone": "y"}}}, True),
        ({"info": {"capacity": Resources(cpu_millis=2000, memory_bytes=1 << 34)}}, True),
    ],
)
def test_changes_that_matter_are_noted(change: dict[str, Any], is_improved: bool) -> None:
    node = make_node("a", labels={"zone": "x"})
    table = table_of(node)
    Search(table, request_for(sample_job(spec=make_spec(labels="zone=y"))), now=0)
    new = node.but(spec=node.spec.but(**change.get("spec", {})))
    info = new.status.info.but(**change.get("info", {}))
    new = new.but(status=new.status.but(info=info, **change.get("status", {})))
    table.apply(node, new, 0)
    assert bool(table.take_improved()) is is_improved


# -- verdicts ------------------------------------------------------------------------------------


def test_verdict_counts_each_node_once_and_names_the_nearest() -> None:
    table = table_of(
        make_node("pending", membership=Membership.PENDING, contact=Contact.UNKNOWN),
        make_node("cordoned", unschedulable=True, labels={"zone": "y"}),
        make_node("small", cpu=50, labels={"zone": "x"}),
        make_node("elsewhere", cpu=50, labels={"zone": "y"}),
    )
    job = sample_job(spec=make_spec(labels="zone=x"))
    verdict = place(request_for(job), table, slot="3", now=at(7))
    assert {(c.rule, c.nodes) for c in verdict.rejected} == {
        ("Membership", 1),
        ("Schedulable", 1),
        ("Constraint", 1),
        ("Cpu", 1),
    }
    assert (verdict.slot, verdict.time, verdict.nodes_total) == ("3", at(7), 4)
    assert verdict.nearest == "small"
    assert "at most 50m CPU" in verdict.remedy
    text = summarise(verdict)
    assert "none of 4 nodes fits" in text
    assert "small" in text


def test_verdict_of_the_winner_has_its_score() -> None:
    table = table_of(make_node("a"), make_node("b", unschedulable=True))
    request = request_for(sample_job(spec=make_spec()))
    verdict = place(request, table, slot="0", now=at(0))
    assert verdict.node == "a"
    assert verdict.scores["capacity"] == pytest.approx(1.0)
    assert [(c.rule, c.nodes) for c in verdict.rejected] == [("Schedulable", 1)]
    assert summarise(verdict) == "placed on a"


def test_verdict_without_any_node() -> None:
    verdict = place(request_for(sample_job(spec=make_spec())), NodeTable(), slot="0", now=at(0))
    assert verdict.nodes_total == 0
    assert "bacalhau serve" in summarise(verdict)


# -- arrays and rules agree ----------------------------------------------------------------------

zones = st.sampled_from(["x", "y", "10", "2", None])


@st.composite
def any_nodes(draw: st.DrawFn) -> Node:
    zone = draw(zones)
    node = make_node(
        draw(st.sampled_from([f"n{i}" for i in range(6)])),
        cpu=draw(st.sampled_from([0, 100, 250, 1000])),
        labels={} if zone is None else {"zone": zone},
        membership=draw(st.sampled_from(Membership)),
        contact=draw(st.sampled_from(Contact)),
        unschedulable=draw(st.booleans()),
        drain=draw(st.booleans()),
        taints=draw(st.sampled_from([(), (Taint(key="zone", value="x"),), (Taint(key="gpu"),)])),
        executions_max=draw(st.sampled_from([0, 1, 9])),
    )
    engines = draw(
        st.sampled_from(
            [(), (Capability(name="noop"),), (Capability(name="noop", available=False),)]
        )
    )
    info = node.status.info.but(engines=engines)
    return node.but(status=node.status.but(info=info))


constraints = st.builds(
    lambda operator, values: Constraint(
        key="zone",
        operator=operator,
        values=() if operator in ("exists", "!") else tuple(values),
    ),
    st.sampled_from(["=", "!=", "in", "notin", "exists", "!", "gt", "lt", "future"]),
    st.lists(st.sampled_from(["x", "y", "5"]), min_size=1, max_size=2),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(any_nodes(), st.sampled_from([f"n{i}" for i in range(6)])), max_size=20),
    st.lists(
        st.tuples(st.lists(constraints, max_size=2), st.sampled_from([0, 100, 200])), max_size=4
    ),
)
def test_the_table_decides_as_the_rules_say(
    events: list[Node | str], asked: list[tuple[list[Constraint], int]]
) -> None:
    """After any history of nodes that come, change and go, searching the arrays and asking every
    rule about every node give the same answer; also for shapes that were asked for before."""
    table, there = NodeTable(), dict[str, Node]()
    jobs = [
        sample_job(f"j{i}", spec=make_spec(cpu=cpu, constraints=tuple(wanted)))
        for i, (wanted, cpu) in enumerate(asked)
    ]
    for event in events:
        name = event if isinstance(event, str) else event.name
        new = None if isinstance(event, str) else event
        table.apply(there.get(name), new, 0)
        if new is None:
            there.pop(name, None)
        else:
            there[name] = new
        for job in jobs:
            search = Search(table, request_for(job), now=0)
            fitting = {
                n for n, node in there.items() if all(f.is_ok for f in evaluate(job, node, table))
            }
            assert set(search.fitting()) == fitting
            row = search.best()
            verdict = describe(search, "0", at(0), row=row)
            assert (verdict.node in fitting) if fitting else verdict.node == ""
            rejected = sum(c.nodes for c in verdict.rejected)
            assert rejected == len(there) - len(fitting)
            for count in verdict.rejected:
                named = count.example.split(" ")[0]
                first = next(f.rule for f in evaluate(job, there[named], table) if not f.is_ok)
                assert first == count.rule
            if not fitting and there:
                assert verdict.nearest in there
                fails = {
                    n: sum(not f.is_ok for f in evaluate(job, node, table))
                    for n, node in there.items()
                }
                assert fails[verdict.nearest] == min(fails.values())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.booleans()), max_size=60))
def test_free_room_is_always_capacity_minus_what_is_there(
    events: list[tuple[int, int, bool]],
) -> None:
    table = table_of(*(make_node(f"n{i}", cpu=500) for i in range(4)))
    job = sample_job(spec=make_spec(cpu=70))
    held: dict[int, Execution] = {}
    for number, node, is_end in events:
        old = held.pop(number, None)
        if is_end or old is not None:
            table.apply(old, None, 0)
            continue
        held[number] = execution(job, partition=number, node=f"n{node}")
        table.apply(None, held[number], 0)
    for i in range(4):
        there = [e for e in held.values() if e.spec.node == f"n{i}"]
        assert free_cpu(table, f"n{i}") == 500 - 70 * len(there)
        assert len(table.reserved_on(f"n{i}")) == len(there)
    assert sum(table.of_job(job.metadata.uid).values()) == len(held)


def test_score_parts_add_up() -> None:
    table = table_of(make_node("a"), make_node("b", cpu=300))
    table.note_trouble("a", 0)
    job = sample_job(spec=make_spec())
    table.reserve(("ns", "e"), Reservation("a", job.metadata.uid, CPU))
    search = Search(table, request_for(job), now=0)
    for name in ("a", "b"):
        row = table.row(name)
        assert row is not None
        parts = search.parts(row)
        assert sum(parts.values()) == pytest.approx(float(search._score[row]), abs=1e-3)
