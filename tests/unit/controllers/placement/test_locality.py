"""Work goes where its data is: keys of inputs, who holds them, and what that is worth."""

import pytest

from bacalhau_api.locality import input_key, input_keys, shown_bytes
from bacalhau_api.v1.job import InputSource, JobSpec, SpecConfig
from bacalhau_api.v1.node import HeldInput, Node
from bacalhau_controllers.placement import NOWHERE, NodeTable, Search, place
from bacalhau_controllers.placement.locality import Near, data_words, locality_score
from tests.support.job_world import make_node, make_spec, run_on, world
from tests.support.samples import at
from tests.support.samples import job as sample_job
from tests.unit.controllers.placement.test_table import request_for, table_of

MIB, GIB = 1 << 20, 1 << 30
LOGS = SpecConfig(type="s3", params={"bucket": "data", "key": "logs/"})
SHARED_OUT = SpecConfig(type="s3", params={**LOGS.params, "partition": {"type": "object"}})


def reading(*sources: SpecConfig, **more: object) -> JobSpec:
    """A job that reads these."""
    items = tuple(InputSource(source=s, target=f"/in{n}") for n, s in enumerate(sources))
    return make_spec(task={"input_sources": items}, **more)  # type: ignore[arg-type]


def holding(node: Node, *held: HeldInput) -> Node:
    """A node that brings from S3, and says that it holds these."""
    info = node.status.info
    info = info.but(
        storages=(info.storages[0].but(name="s3"), info.storages[0].but(name="urlDownload")),
        held_inputs=held,
    )
    return node.but(status=node.status.but(info=info))


def held(source: SpecConfig, size: int, total: int, partition: int = 0, of: int = 1) -> HeldInput:
    return HeldInput(key=input_key(source, partition, of), size_bytes=size, total_bytes=total)


@pytest.mark.parametrize(
    ("a", "b", "is_same"),
    [
        (input_key(LOGS), input_key(LOGS.but()), True),
        (input_key(LOGS, 1, 4), input_key(LOGS, 2, 4), True),
        (input_key(SHARED_OUT, 1, 4), input_key(SHARED_OUT, 2, 4), False),
        (input_key(SHARED_OUT, 1, 4), input_key(SHARED_OUT, 1, 5), False),
        (input_key(SHARED_OUT, 1, 4), input_key(SHARED_OUT, 1, 4), True),
        (input_key(LOGS), input_key(LOGS.but(type="S3")), True),
        (input_key(LOGS), input_key(LOGS.but(params={"bucket": "data", "key": "other/"})), False),
    ],
)
def test_whoever_reads_the_same_has_the_same_key(a: str, b: str, is_same: bool) -> None:
    assert (a == b) is is_same
    assert len(a) == len(b) == 16


def test_what_is_not_fetched_has_no_key() -> None:
    sources = (
        SpecConfig(type="local", params={"sourcePath": "/data"}),
        SpecConfig(type="inline", params={"url": "data:,x"}),
    )
    items = tuple(InputSource(source=source, target="/in") for source in sources)
    assert input_keys(items) == ()


def test_the_node_with_most_bytes_wins_and_the_verdict_says_so() -> None:
    total = int(1.5 * GIB)
    table = table_of(
        make_node("n1"),
        holding(make_node("n2", cpu=300), held(LOGS, int(1.2 * GIB), total)),
        holding(make_node("n3"), held(LOGS, 300 * MIB, total)),
        holding(make_node("n4")),
    )
    job = sample_job(spec=reading(LOGS))
    near = table.near([input_key(LOGS)])
    verdict = place(request_for(job), table, slot="0", now=at(0), near=near)
    assert verdict.node == "n2"
    assert verdict.data == "n2 already holds 1.2 GiB of 1.5 GiB"
    assert verdict.scores["locality"] == pytest.approx(locality_score(int(1.2 * GIB)), abs=1e-4)
    # Where the best one cannot be had, the next best, and the verdict says what was given up.
    verdict = place(request_for(job, refused={"n2": "no"}), table, slot="0", now=at(0), near=near)
    assert verdict.node == "n3"
    assert verdict.data == (
        "n3 already holds 300.0 MiB of 1.5 GiB, though n2 holds 1.2 GiB of 1.5 GiB"
    )
    verdict = place(
        request_for(job, refused={"n2": "no", "n3": "no"}), table, slot="0", now=at(0), near=near
    )
    assert verdict.node == "n4"
    assert verdict.data.startswith("n4 holds nothing of 1.5 GiB, though n2 holds 1.2 GiB")


def test_a_little_data_does_not_fill_a_node_up() -> None:
    full = make_node("full", cpu=1000)
    table = table_of(holding(full, held(LOGS, 2 * MIB, 2 * MIB)), holding(make_node("empty")))
    spec = reading(LOGS, cpu=600)
    near = table.near([input_key(LOGS)])
    first = place(
        request_for(sample_job(spec=spec)), table, slot="0", now=at(0), near=near, key=("x", "1")
    )
    assert first.node == "full", "of equals the one with the data"
    other = sample_job("other", spec=reading(LOGS, cpu=300))
    assert place(request_for(other), table, slot="0", now=at(0), near=near).node == "empty"


def test_several_inputs_add_up_and_unknown_ones_leave_the_total_open() -> None:
    url = SpecConfig(type="urlDownload", params={"url": "http://x/y"})
    table = table_of(
        holding(make_node("a"), held(LOGS, GIB, GIB), held(url, GIB, GIB)),
        holding(make_node("b"), held(LOGS, GIB, 2 * GIB)),
    )
    both = table.near([input_key(LOGS), input_key(url)])
    assert dict(both.held) == {"a": 2 * GIB, "b": GIB}
    assert both.total_bytes == 3 * GIB
    more = table.near([input_key(LOGS), "f" * 16])
    assert data_words(more, "b") == "b already holds 1.0 GiB"
    assert table.near(["f" * 16]) is NOWHERE


def test_what_a_node_said_last_counts_and_goes_with_it() -> None:
    table = NodeTable()
    old = holding(make_node("a"), held(LOGS, GIB, GIB))
    table.apply(None, old, 0)
    table.take_improved()
    less = holding(make_node("a"), held(LOGS, MIB, GIB))
    table.apply(old, less, 0)
    assert dict(table.near([input_key(LOGS)]).held) == {"a": MIB}
    assert table.take_improved() == (), "nothing became possible that was not"
    table.apply(less, None, 0)
    assert table.near([input_key(LOGS)]) is NOWHERE
    table.apply(None, old, 0)
    gone = holding(make_node("a"))
    table.apply(old, gone, 0)
    assert table.near([input_key(LOGS)]) is NOWHERE


def test_a_search_is_as_it_was_after_each_look() -> None:
    table = table_of(make_node("a"), make_node("b"), make_node("c"))
    search = Search(table, request_for(sample_job(spec=reading())), now=0)
    plain = search.best()
    near = Near({"a": GIB, "c": 2 * GIB, "gone": GIB}, 2 * GIB)
    assert table.names[search.best((), near) or 0] == "c"
    assert table.names[search.best(("c",), near) or 0] == "a", "both at once"
    assert search.best() == plain


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (int(1.2 * GIB), "1.2 GiB")],
)
def test_bytes_for_people(size: int, text: str) -> None:
    assert shown_bytes(size) == text


def test_each_partition_goes_where_its_share_is() -> None:
    """The whole reconciler: four partitions, whose shares lie on four nodes of six."""
    places = {0: "n3", 1: "n0", 2: "n5", 3: "n1"}
    with world() as w:
        for number in range(6):
            mine = [p for p, node in places.items() if node == f"n{number}"]
            shares = (held(SHARED_OUT, GIB, GIB, p, 4) for p in mine)
            w.put(holding(make_node(f"n{number}"), *shares))
        w.default = run_on
        w.submit("j", reading(SHARED_OUT, count=4))
        w.settle()
        assert {e.spec.slot.partition: e.spec.node for e in w.executions()} == places
        (verdict, *_) = w.job("j").status.verdicts
        assert verdict.data.endswith("already holds 1.0 GiB of 1.0 GiB")
        # What a node holds changes all the time, and nobody is woken by that.
        before = w.reconciler.nodes.near([input_key(SHARED_OUT, 0, 4)])
        node = w.node("n3")
        revision = w.job("j").metadata.resource_version
        w.put(holding(node, held(SHARED_OUT, MIB, GIB, 0, 4)))
        w.settle()
        after = w.reconciler.nodes.near([input_key(SHARED_OUT, 0, 4)])
        assert (before.held["n3"], after.held["n3"]) == (GIB, MIB)
        assert w.job("j").metadata.resource_version == revision
