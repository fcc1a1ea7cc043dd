"""Quotas: a namespace takes no more than it may, what does not fit waits and says so, and goes on when
there is room."""

from typing import Any

import pytest

from bacalhau_api.meta import ObjectMeta, Ref
from bacalhau_api.v1.execution import Outputs, Phase
from bacalhau_api.v1.job import JobPhase, JobType, Resources, Timeouts
from bacalhau_api.v1.namespace import Namespace, NamespaceSpec, Quota
from bacalhau_controllers.job import JobReconciler
from bacalhau_controllers.job.allowance import Allowance
from bacalhau_controllers.placement import Amounts
from tests.support.job_world import World, make_spec, report_of, run_on, world


def limit(w: World, **quota: Any) -> None:
    """Set the quota of the namespace default."""
    spec = NamespaceSpec(quota=Quota(**quota))
    w.put(Namespace(metadata=ObjectMeta(name="default", namespace="", uid="ns"), spec=spec))


def open_count(w: World) -> int:
    """Executions that have not ended."""
    return sum(not e.phase.is_final for e in w.executions())


def test_a_job_over_quota_waits_and_says_for_what() -> None:
    with world() as w:
        w.add_node("n1")
        limit(w, executions=2)
        w.submit("j", make_spec(count=5))
        w.bench.loop.run_until_idle()
        job = w.job("j")
        assert open_count(w) == 2
        assert job.status.waiting is not None
        assert job.status.waiting.what == "Quota"
        assert "namespace default uses 2 of its quota of 2 executions" in job.status.waiting.message
        assert job.status.slots.waiting == 3


def test_a_job_that_gets_nothing_is_queued_over_quota() -> None:
    with world() as w:
        w.add_node("n1")
        limit(w, executions=0)
        w.submit("j", make_spec())
        w.bench.loop.run_until_idle()
        assert (w.job("j").status.phase, w.job("j").status.reason) == (JobPhase.QUEUED, "OverQuota")


def test_what_ends_lets_the_next_start_and_all_gets_done() -> None:
    with world() as w:
        w.add_node("n1")
        limit(w, executions=2)
        seen = 0
        for name in ("a", "b", "c"):
            w.submit(name, make_spec(count=3))

        def watch() -> None:
            nonlocal seen
            seen = max(seen, open_count(w))

        w.settle(watch=watch)
        assert seen == 2
        for name in ("a", "b", "c"):
            assert w.job(name).status.phase is JobPhase.COMPLETED


@pytest.mark.parametrize(
    ("quota", "most"),
    [
        pytest.param({"resources": Resources(cpu_millis=250)}, 2, id="cpu"),
        pytest.param({"resources": Resources(memory_bytes=3 << 20)}, 3, id="memory"),
        pytest.param({"executions": 4, "resources": Resources(cpu_millis=150)}, 1, id="the least"),
        pytest.param({"resources": Resources(gpu=1)}, 5, id="what is not asked for"),
        pytest.param({}, 5, id="no limit"),
    ],
)
def test_every_dimension_is_limited(quota: dict[str, Any], most: int) -> None:
    with world(default=run_on) as w:
        w.add_node("n1")
        limit(w, **quota)
        w.submit("j", make_spec(count=5, cpu=100))
        w.settle()
        assert open_count(w) == most


def test_a_raised_quota_lets_jobs_go_on_and_a_lowered_one_stops_nothing() -> None:
    with world(default=run_on) as w:
        w.add_node("n1")
        limit(w, executions=1)
        w.submit("j", make_spec(count=3))
        w.settle()
        limit(w, executions=3)
        w.settle()
        assert open_count(w) == 3
        limit(w, executions=1)
        w.settle(seconds=70)
        assert open_count(w) == 3
        w.remove(Ref("Namespace", "", "default"))
        w.submit("k", make_spec(count=2))
        w.settle()
        assert open_count(w) == 5


def test_of_those_who_wait_the_first_in_line_goes_on() -> None:
    with world(default=run_on) as w:
        w.add_node("n1")
        limit(w, executions=1)
        w.submit("now", make_spec())
        w.settle()
        for name, priority in (("old", 0), ("urgent", 5), ("new", 0)):
            w.submit(name, make_spec(priority=priority))
            w.pass_time(1.0)
        for name in ("urgent", "old", "new"):
            running = next(e for e in w.executions() if not e.phase.is_final)
            w.report(running, report_of(running, Phase.SUCCEEDED, exit_code=0))
            w.settle()
            assert [e.spec.job for e in w.executions() if not e.phase.is_final] == [name]


def test_a_namespace_is_limited_for_itself() -> None:
    with world(default=run_on) as w:
        w.add_node("n1")
        limit(w, executions=0)
        w.submit("j", make_spec())
        elsewhere = w.job("j").with_meta(namespace="other", resource_version=0, uid="f" * 32)
        w.put(elsewhere)
        w.settle()
        assert [e.metadata.namespace for e in w.executions()] == ["other"]


def test_a_service_is_not_taken_down_for_a_generation_that_is_not_allowed() -> None:
    with world() as w:
        w.add_node("n1")
        limit(w, resources=Resources(cpu_millis=100))
        for kind in (JobType.SERVICE, JobType.DAEMON):
            w.submit("s", make_spec(kind, cpu=100))
            w.settle()
            w.submit("s", make_spec(kind, cpu=200))
            w.settle(seconds=70)
            assert len(w.running("s")) == 1
            assert w.running("s", generation=1)
            w.delete("s")
            w.settle(seconds=70)


def test_a_service_within_its_quota_is_replaced_one_for_one() -> None:
    with world() as w:
        w.add_node("n1")
        limit(w, executions=2)
        w.submit("s", make_spec(JobType.SERVICE, count=2))
        w.settle()
        w.submit("s", make_spec(JobType.SERVICE, count=2, cpu=150))
        w.settle(seconds=90, watch=lambda: _at_most(w, 2))
        assert len(w.running("s", generation=2)) == 2


def _at_most(w: World, count: int) -> None:
    assert open_count(w) <= count


def test_stored_results_count_until_their_job_is_gone() -> None:
    with world() as w:
        w.add_node("n1")
        limit(w, stored_results=1000)
        outputs = Outputs(files=1, size_bytes=1000)
        w.behave(lambda e: report_of(e, Phase.SUCCEEDED, exit_code=0, outputs=outputs), job="first")
        w.submit("first", make_spec())
        w.settle()
        w.submit("second", make_spec())
        w.settle()
        waiting = w.job("second").status.waiting
        assert waiting is not None
        assert waiting.what == "Quota"
        assert "results" in waiting.message
        w.delete("first")
        w.settle(seconds=70)
        assert w.job("second").status.phase is JobPhase.COMPLETED


def test_a_queue_timeout_ends_the_wait_for_a_quota() -> None:
    with world() as w:
        w.add_node("n1")
        limit(w, executions=0)
        w.submit("j", make_spec(task={"timeouts": Timeouts(queue_timeout=30)}))
        w.settle(seconds=40)
        assert w.job("j").status.phase is JobPhase.FAILED
        assert "quota" in w.job("j").status.message


def test_a_new_leader_knows_who_waits() -> None:
    with world(default=run_on) as w:
        w.add_node("n1")
        limit(w, executions=1)
        w.submit("a", make_spec())
        w.settle()
        w.submit("b", make_spec())
        w.settle()
        fresh = JobReconciler(w.bench.state, w.bench.clock)
        woken: list[Ref] = []

        async def lead() -> None:
            async with fresh.term(woken.append):
                fresh._wake_namespace("default")

        w.bench.loop.run_until_complete(lead())
        assert woken == [w.job("b").ref]


def test_nothing_is_limited_without_a_quota() -> None:
    assert Allowance.of(None, 5) is None
    empty = Namespace(metadata=ObjectMeta(name="a"), spec=NamespaceSpec())
    assert Allowance.of(empty, 5) is None
    allowance = Allowance("a", Quota(executions=1))
    assert allowance.refusal(Amounts(0, 0, 0, 0, 0), Amounts(9, 9, 9, 9, 1)) == ""
    assert allowance.refusal(Amounts(0, 0, 0, 0, 1), Amounts(9, 9, 9, 9, 1))
