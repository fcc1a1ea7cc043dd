"""References are resolved once for a generation: the first attempt goes alone."""

from typing import Any

from bacalhau_api.meta import Contact
from bacalhau_api.v1.execution import Execution, Phase, Report, Slot
from bacalhau_api.v1.job import Job, JobSpec, JobType, SpecConfig
from bacalhau_api.v1.node import Capability
from bacalhau_controllers.job.owned import Owned
from bacalhau_controllers.job.pins import known_pins, needs_pins, resolver
from bacalhau_controllers.job.slots import JobView, new_execution
from tests.support.job_world import make_node, make_spec, run_on, world
from tests.support.samples import at, job

PINS = {"image": "example.org/a@sha256:" + "a" * 64}
OTHER = {"image": "example.org/a@sha256:" + "b" * 64}


def docker_spec(image: str = "example.org/a:1") -> JobSpec:
    spec = make_spec(count=3)
    task = spec.task.but(engine=SpecConfig(type="docker", params={"image": image}))
    return spec.but(tasks=(task,))


def docker_job(image: str = "example.org/a:1") -> Job:
    return job(spec=docker_spec(image))


def attempt(job: Job, partition: int = 0, number: int = 0, **more: Any) -> Execution:
    slot = Slot(generation=job.metadata.generation, partition=partition)
    return new_execution(job, slot, number, node="n1", charged=0, now=at(number), **more)


def reported(execution: Execution, pins: dict[str, str], phase: Phase = Phase.RUNNING) -> Execution:
    report = Report(step=3, incarnation="i", phase=phase, pins=pins)
    return execution.but(status=execution.status.but(report=report))


def test_what_needs_to_be_resolved() -> None:
    assert needs_pins(docker_job().spec.task)
    assert needs_pins(docker_job("busybox").spec.task)
    assert not needs_pins(docker_job(PINS["image"]).spec.task)
    assert not needs_pins(docker_job("sha256:" + "a" * 64).spec.task)
    assert not needs_pins(make_spec().task)


def test_a_report_is_taken_up_and_what_was_told_stands() -> None:
    made = docker_job()
    first = attempt(made)
    assert known_pins(JobView(made, Owned.of([first]))) == {}
    told = reported(first, PINS)
    assert known_pins(JobView(made, Owned.of([told]))) == PINS
    second = attempt(made, 1, pins=PINS)
    late = reported(attempt(made, 2), OTHER)
    for order in ([late, second], [second, late]):
        assert known_pins(JobView(made, Owned.of(order))) == PINS


def test_the_status_remembers_when_no_execution_does() -> None:
    made = docker_job()
    status = made.status.but(observed_generation=made.metadata.generation, pins=PINS)
    made = made.but(status=status)
    assert known_pins(JobView(made, Owned())) == PINS
    older = made.but(status=status.but(observed_generation=made.metadata.generation - 1))
    assert known_pins(JobView(older, Owned())) == {}


def test_one_attempt_is_waited_for_unless_it_is_lost_or_over() -> None:
    made = docker_job()
    first = attempt(made)
    found = resolver(JobView(made, Owned.of([first])), at(0))
    assert found is not None
    assert found.name == first.name
    lost = first.but(status=first.status.but(contact=Contact.LOST))
    assert resolver(JobView(made, Owned.of([lost])), at(0)) is None
    over = reported(first, {}, Phase.FAILED)
    assert resolver(JobView(made, Owned.of([over])), at(0)) is None


def test_a_node_that_is_away_for_long_is_not_waited_for() -> None:
    """Nor are the slots of a daemon held back by one node that is cut off, which may be for ever."""
    with world() as w:
        w.behave(run_on)
        for name in ("a", "b", "c"):
            node = make_node(name)
            info = node.status.info.but(engines=(Capability(name="docker"),))
            w.put(node.but(status=node.status.but(info=info)))
        w.submit("d", make_spec(JobType.DAEMON).but(tasks=docker_spec().tasks))
        w.bench.loop.run_until_idle()
        (first,) = w.executions("d")
        w.silence(first.spec.node)
        w.settle(seconds=60)
        assert len(w.executions("d")) == 1
        waiting = w.job("d").status.waiting
        assert waiting is not None
        assert waiting.until is not None
        w.settle(seconds=300)
        (_, second) = w.executions("d")
        assert second.status.report is not None
        w.put(second.but(status=second.status.but(report=second.status.report.but(pins=PINS))))
        w.settle()
        assert len(w.executions("d")) == 3
        assert w.job("d").status.pins == PINS


def test_the_others_follow_once_the_first_has_told() -> None:
    with world() as w:
        w.behave(run_on)
        node = make_node("n1")
        info = node.status.info.but(engines=(Capability(name="docker"),))
        w.put(node.but(status=node.status.but(info=info)))
        w.submit("a", docker_spec())
        w.settle()
        (first,) = w.executions("a")
        assert first.spec.pins == {}
        waiting = w.job("a").status.waiting
        assert waiting is not None
        assert w.job("a").status.slots.waiting == 2
        assert first.status.report is not None
        w.put(first.but(status=first.status.but(report=first.status.report.but(pins=PINS))))
        w.settle()
        others = [e for e in w.executions("a") if e.name != first.name]
        assert [e.spec.pins for e in others] == [PINS, PINS]
        assert w.job("a").status.pins == PINS
