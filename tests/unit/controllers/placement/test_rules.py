"""Each rule on its own, and each rule's words."""

import pytest

from bacalhau_api.meta import Contact
from bacalhau_api.v1.job import Constraint, InputSource, Job, Resources, SpecConfig
from bacalhau_api.v1.node import Capability, Membership, Node, Taint
from bacalhau_controllers.placement import NodeTable, evaluate
from bacalhau_controllers.placement.resources import (
    DIMENSIONS,
    UNLIMITED,
    Amounts,
    amounts_of,
    fitting,
)
from bacalhau_controllers.placement.rules import local_path, taints
from tests.support.job_world import make_node, make_spec
from tests.support.samples import job as sample_job


def needing(**spec: object) -> Job:
    """A job; `sources` are its inputs."""
    sources = spec.pop("sources", ())
    made = make_spec(**spec)  # type: ignore[arg-type]
    assert isinstance(sources, tuple)
    inputs = tuple(
        InputSource(source=source, target=f"/in/{i}") for i, source in enumerate(sources)
    )
    return sample_job(spec=made.but(tasks=(made.task.but(input_sources=inputs),)))


def failing(job: Job, node: Node, table: NodeTable | None = None) -> list[str]:
    return [f.rule for f in evaluate(job, node, table) if not f.is_ok]


def with_info(node: Node, **info: object) -> Node:
    return node.but(status=node.status.but(info=node.status.info.but(**info)))


def test_a_fitting_node_passes_everything_and_says_so() -> None:
    found = evaluate(needing(), make_node("a"))
    assert [f.rule for f in found if not f.is_ok] == []
    assert all(f.message for f in found)
    assert {"Membership", "Contact", "Schedulable", "Taints", "Engine", "Cpu"} <= {
        f.rule for f in found
    }


@pytest.mark.parametrize(
    ("node", "rule"),
    [
        pytest.param(make_node("a", membership=Membership.PENDING), "Membership", id="pending"),
        pytest.param(make_node("a", membership=Membership.REJECTED), "Membership", id="rejected"),
        pytest.param(make_node("a", contact=Contact.UNKNOWN), "Contact", id="silent"),
        pytest.param(make_node("a", unschedulable=True), "Schedulable", id="cordoned"),
        pytest.param(make_node("a", drain=True), "Schedulable", id="draining"),
        pytest.param(make_node("a", taints=(Taint(key="gpu"),)), "Taints", id="tainted"),
        pytest.param(with_info(make_node("a"), engines=()), "Engine", id="no engine"),
        pytest.param(make_node("a", cpu=50), "Cpu", id="small"),
        pytest.param(make_node("a", executions_max=0), "Executions", id="takes none"),
    ],
)
def test_one_thing_wrong_fails_one_rule(node: Node, rule: str) -> None:
    (miss,) = [f for f in evaluate(needing(), node) if not f.is_ok]
    assert miss.rule == rule
    assert miss.message
    assert miss.remedy
    assert "{node}" not in miss.message + miss.remedy


def test_a_broken_engine_names_its_reason() -> None:
    broken = Capability(name="noop", available=False, reason="daemon does not answer")
    node = with_info(make_node("a"), engines=(broken,))
    (miss,) = [f for f in evaluate(needing(), node) if not f.is_ok]
    assert "daemon does not answer" in miss.message


def test_names_of_plugs_are_matched_in_any_case() -> None:
    node = with_info(make_node("a"), engines=(Capability(name="NoOp"),))
    assert failing(needing(engine="noOP"), node) == []


def test_storage_of_every_input_and_the_publisher_are_needed() -> None:
    sources = (SpecConfig(type="s3"), SpecConfig(type="ipfs"), SpecConfig(type="s3"))
    job = needing(sources=sources, publisher="s3")
    assert failing(job, make_node("a")) == ["Storage", "Storage", "Publisher"]
    s3 = (Capability(name="s3"), Capability(name="ipfs"))
    assert failing(job, with_info(make_node("a"), storages=s3, publishers=s3)) == []
    assert failing(needing(publisher="noop"), make_node("a")) == []


def test_operators_labels_win() -> None:
    job = needing(labels="zone=x")
    node = make_node("a", labels={"zone": "y"})
    assert failing(job, node) == ["Constraint"]
    relabelled = node.with_meta(labels={"zone": "x"})
    assert failing(job, relabelled) == []
    by_name = needing(constraints=(Constraint(key="name", operator="in", values=("a", "b")),))
    assert failing(by_name, node) == []


@pytest.mark.parametrize(
    ("asked", "taint", "is_ok"),
    [
        ([], Taint(key="gpu"), False),
        ([("gpu", ())], Taint(key="gpu"), True),
        ([("gpu", ("a100",))], Taint(key="gpu", value="a100"), True),
        ([("gpu", ("t4",))], Taint(key="gpu", value="a100"), False),
        ([("gpu", ())], Taint(key="gpu", value="a100"), True),
        ([("zone", ("gpu",))], Taint(key="gpu"), False),
    ],
)
def test_a_taint_is_tolerated_by_asking_for_it(
    asked: list[tuple[str, tuple[str, ...]]], taint: Taint, is_ok: bool
) -> None:
    assert taints(frozenset(asked), (taint,)).is_ok is is_ok


def test_not_asking_for_a_label_tolerates_nothing() -> None:
    job = needing(constraints=(Constraint(key="gpu", operator="!=", values=("t4",)),))
    assert failing(job, make_node("a", taints=(Taint(key="gpu"),))) == ["Taints"]


@pytest.mark.parametrize(
    ("path", "is_writable", "allowed", "is_ok"),
    [
        ("/data/x", False, (), False),
        ("/data/x", False, ("/data:ro",), True),
        ("/data/x", False, ("/data/**:ro",), True),
        ("/data/x.csv", False, ("/data/*.csv:rw",), True),
        ("/data/x", True, ("/data:ro",), False),
        ("/data/x", True, ("/data:rw",), True),
        ("/data", False, ("/data",), True),
        ("/database", False, ("/data:ro",), False),
        ("/etc/shadow", False, ("/data/**",), False),
    ],
)
def test_local_paths(path: str, is_writable: bool, allowed: tuple[str, ...], is_ok: bool) -> None:
    assert local_path((path, is_writable), allowed).is_ok is is_ok


def test_local_inputs_are_checked_against_the_nodes_list() -> None:
    local = SpecConfig(type="local", params={"sourcePath": "/data/../etc/x"})
    job = needing(sources=(local,))
    node = with_info(make_node("a"), local_paths=("/data/**:ro",))
    assert failing(job, node) == ["LocalPath"], "`..` does not leave the allowed folder"
    assert failing(job, with_info(node, local_paths=("/etc:ro",))) == []


def test_undeclared_capacity_is_not_limited_but_gpus_are() -> None:
    node = with_info(make_node("a"), capacity=Resources())
    assert failing(needing(cpu=10**6), node) == []
    task = needing().spec.task
    job = sample_job(spec=make_spec().but(tasks=(task.but(resources=Resources(gpu=1)),)))
    assert failing(job, node) == ["Gpu"]


def test_absurd_amounts_fit_nowhere() -> None:
    asked = amounts_of(Resources(memory_bytes=10**40))
    node = with_info(make_node("a"), capacity=Resources())
    table = NodeTable()
    table.apply(None, node, 0)
    assert asked.memory > UNLIMITED
    job = sample_job(
        spec=make_spec().but(
            tasks=(make_spec().task.but(resources=Resources(memory_bytes=10**40)),)
        )
    )
    assert failing(job, node, table) == ["Memory"]


def test_a_shortage_says_how_much() -> None:
    asked, free, capacity = (
        Amounts(500, 0, 0, 0, 1),
        Amounts(200, 0, 0, 0, 5),
        Amounts(1000, 0, 0, 0, 9),
    )
    finding = fitting(DIMENSIONS.index("Cpu"), asked, free, capacity)
    assert "200m of 1 CPU free" in finding.message
    assert "300m" in finding.remedy
    too_much = fitting(0, Amounts(5000, 0, 0, 0, 1), free, capacity)
    assert "at most 1 CPU" in too_much.remedy
