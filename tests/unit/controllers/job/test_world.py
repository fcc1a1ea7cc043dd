"""The job reconciler at work: every type of job converges, and then nothing is written any more."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bacalhau_api.meta import Contact, Ref
from bacalhau_api.v1.execution import Desired, Phase
from bacalhau_api.v1.job import (
    DisconnectPolicy,
    ExitRule,
    JobPhase,
    JobType,
    Network,
    NetworkType,
    Port,
    RestartPolicy,
    RetryPolicy,
    Timeouts,
    UpdateStrategy,
)
from bacalhau_api.v1.node import Membership
from bacalhau_controllers.job import FINALIZER, JobSettings
from tests.support.job_world import (
    World,
    fail,
    make_spec,
    reject,
    report_of,
    run_on,
    succeed,
    world,
)

BATCH, OPS, SERVICE, DAEMON = JobType.BATCH, JobType.OPS, JobType.SERVICE, JobType.DAEMON


@pytest.fixture
def w() -> Iterator[World]:
    with world() as made:
        yield made
        made.step()
        assert made.writes_while(600) == 0, "it went on writing after everything had settled"


def with_nodes(w: World, *names: str, **how: Any) -> World:
    for name in names:
        w.add_node(name, **how)
    return w


def nodes_of(w: World, job: str) -> list[str]:
    return sorted(e.spec.node for e in w.running(job))


def watch_lowest(w: World, job: str, watch: Callable[[], None] = lambda: None) -> int:
    """Let a change of a job run its course; the least number that ran at any time."""
    lowest: list[int] = []

    def look() -> None:
        watch()
        lowest.append(len(w.running(job)))

    w.settle(seconds=60, watch=look)
    return min(lowest)


# -- batch ---------------------------------------------------------------------------------------


def test_batch_completes_and_spreads(w: World) -> None:
    with_nodes(w, "a", "b")
    w.submit("j", make_spec(count=4))
    w.bench.loop.run_until_idle()
    assert Counter(e.spec.node for e in w.executions("j")) == {"a": 2, "b": 2}
    w.settle()
    status = w.job("j").status
    assert status.phase is JobPhase.COMPLETED
    assert (status.slots.total, status.slots.succeeded) == (4, 4)
    assert status.waiting is None
    assert len(w.acceptances("j")) == 4
    assert FINALIZER in w.job("j").metadata.finalizers


def test_a_job_of_one_takes_two_commits(w: World) -> None:
    with_nodes(w, "a")
    w.submit("j", make_spec(publisher="local"))
    w.bench.loop.run_until_idle()
    job = w.job("j")
    assert job.status.phase is JobPhase.RUNNING
    placed = job.metadata.resource_version
    (execution,) = w.executions("j")
    w.report(execution, report_of(execution, Phase.RUNNING))
    assert w.job("j").metadata.resource_version == placed, "a node's step is not the job's"
    (execution,) = w.executions("j")
    w.report(execution, report_of(execution, Phase.SUCCEEDED, exit_code=0))
    job = w.job("j")
    assert job.status.phase is JobPhase.COMPLETED
    (acceptance,) = w.acceptances("j")
    (publication,) = w.publications()
    written = sorted(x.metadata.resource_version for x in (job, acceptance, publication))
    assert written[2] - written[0] == 4, "not written together"
    assert w.bench.revisions(job) == 3, "submitted, placed, accepted"
    w.settle()


def test_completed_is_apart_from_delivered(w: World) -> None:
    with_nodes(w, "a")
    w.submit("j", make_spec(count=2, publisher="local"))
    w.step()
    w.bench.loop.run_until_idle()
    for execution in w.executions("j"):
        w.report(execution, report_of(execution, Phase.SUCCEEDED, exit_code=0))
    job = w.job("j")
    assert job.status.phase is JobPhase.COMPLETED
    delivered = {c.type: c for c in job.status.conditions}["Delivered"]
    assert (delivered.status, delivered.reason) == (False, "Delivering")
    w.settle()
    job = w.job("j")
    delivered = {c.type: c for c in job.status.conditions}["Delivered"]
    assert (delivered.status, delivered.reason) == (True, "Delivered")
    assert job.status.slots.delivered == 2


def test_noop_publisher_publishes_nothing(w: World) -> None:
    with_nodes(w, "a")
    w.submit("j", make_spec(publisher="noop"))
    w.settle()
    assert not w.publications()
    conditions = {c.type: c for c in w.job("j").status.conditions}
    assert conditions["Delivered"].reason == "NothingToDeliver"


@pytest.mark.parametrize(
    ("type", "phase"), [(BATCH, JobPhase.COMPLETED), (SERVICE, JobPhase.RUNNING)]
)
def test_count_zero_is_legal(w: World, type: JobType, phase: JobPhase) -> None:
    with_nodes(w, "a")
    w.submit("j", make_spec(type, 0))
    w.settle()
    assert w.job("j").status.phase is phase
    assert not w.executions("j")


def test_failures_are_retried_elsewhere_and_charged(w: World) -> None:
    with_nodes(w, "a", "b")
    w.behave(fail(3), attempt=0)
    w.submit("j", make_spec())
    w.settle(seconds=5)
    first, second = w.executions("j")
    assert first.spec.node != second.spec.node
    assert (first.spec.charged, second.spec.charged) == (0, 1)
    assert w.job("j").status.phase is JobPhase.COMPLETED


def test_a_retry_waits_for_its_pause_and_says_so(w: World) -> None:
    with_nodes(w, "a")
    w.behave(fail(3), attempt=0)
    w.submit("j", make_spec(retry=RetryPolicy(backoff_seconds=100, backoff_seconds_max=100)))
    w.settle()
    waiting = w.job("j").status.waiting
    assert waiting is not None
    assert (waiting.what, waiting.mover) == ("Retry", "job reconciler")
    assert waiting.until is not None
    assert 80 <= (waiting.until - w.bench.clock.now()).total_seconds() <= 120
    assert len(w.executions("j")) == 1
    w.pass_time(121)
    w.settle()
    assert w.job("j").status.phase is JobPhase.COMPLETED


def test_exhausted_budget_fails_the_job_and_stops_the_rest(w: World) -> None:
    with_nodes(w, "a")
    w.behave(run_on, partition=1)
    w.behave(fail(7, reason="Boom", message="it went wrong"), partition=0)
    w.submit("j", make_spec(count=2, retry=RetryPolicy(attempts=2)))
    w.settle(seconds=5)
    status = w.job("j").status
    assert (status.phase, status.reason) == (JobPhase.FAILED, "SlotFailed")
    for word in ("slot 0", "exit code 7", "node a", "it went wrong", "2 attempts"):
        assert word in status.message
    assert [e.phase for e in w.executions("j") if e.spec.slot.partition == 1] == [Phase.STOPPED]
    assert len([e for e in w.executions("j") if e.spec.slot.partition == 0]) == 2


def test_exit_rule_fails_at_once(w: World) -> None:
    with_nodes(w, "a")
    w.default = fail(42)
    rule = ExitRule(codes=(42,), action="fail")
    w.submit("j", make_spec(retry=RetryPolicy(attempts=9, exit_rules=(rule,))))
    w.settle(seconds=5)
    assert w.job("j").status.phase is JobPhase.FAILED
    assert len(w.executions("j")) == 1


def test_system_faults_are_not_charged_and_do_not_spin(w: World) -> None:
    with_nodes(w, "a")
    w.default = fail(1, is_system_fault=True)
    w.submit("j", make_spec(retry=RetryPolicy(attempts=1, backoff_seconds=0)))
    w.settle(seconds=60)
    assert w.job("j").status.phase is JobPhase.RUNNING
    numbers = [e.spec.attempt for e in w.executions("j")]
    assert max(numbers) <= 7, "pauses do not grow"
    assert all(e.spec.charged == 0 for e in w.executions("j"))
    w.default = succeed
    w.settle(seconds=120)
    assert w.job("j").status.phase is JobPhase.COMPLETED


def test_rejected_everywhere_is_queued_and_not_limbo(w: World) -> None:
    with_nodes(w, "a", "b")
    w.default = reject
    w.submit("j", make_spec())
    w.settle(seconds=5)
    status = w.job("j").status
    assert status.phase is JobPhase.QUEUED
    assert len(w.executions("j")) == 2, "each node is asked once"
    (verdict,) = [v for v in status.verdicts if not v.node]
    assert [(c.rule, c.nodes) for c in verdict.rejected] == [("Refused", 2)]
    assert "not on my machine" in verdict.rejected[0].example
    # A node that came back may have changed its mind.
    w.default = succeed
    w.silence("b")
    w.hear("b")
    w.settle(seconds=5)
    assert w.job("j").status.phase is JobPhase.COMPLETED


def test_more_refusals_than_attempts_are_kept_do_not_start_over(w: World) -> None:
    with_nodes(w, *(f"n{i}" for i in range(9)))
    w.default = reject
    w.submit("j", make_spec())
    w.settle(seconds=120)
    assert w.job("j").status.phase is JobPhase.QUEUED
    assert max(e.spec.attempt for e in w.executions("j")) == 8, "a node was asked twice"
    findings = {f.rule: f for f in w.reconciler.explain(w.job("j"), w.node("n3"))}
    assert not findings["Refused"].is_ok
    assert findings["Cpu"].is_ok


# -- waiting for capacity ------------------------------------------------------------------------


def test_no_node_queues_by_default_and_a_join_wakes(w: World) -> None:
    w.submit("j", make_spec())
    w.settle()
    status = w.job("j").status
    assert status.phase is JobPhase.QUEUED
    assert status.waiting is not None
    assert (status.waiting.what, status.waiting.until) == ("Capacity", None)
    w.add_node("a")
    assert w.executions("j"), "nobody woke it"
    w.settle()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"membership": Membership.APPROVED}, id="approval"),
        pytest.param({"unschedulable": False}, id="uncordon"),
    ],
)
def test_node_changes_wake(w: World, change: dict[str, object]) -> None:
    w.add_node("a")
    blocked = (
        {"membership": Membership.PENDING} if "membership" in change else {"unschedulable": True}
    )
    w.change_node("a", **blocked)
    w.submit("j", make_spec())
    w.settle()
    assert not w.executions("j")
    w.change_node("a", **change)
    assert w.executions("j")
    w.settle()


def test_label_and_capacity_changes_wake(w: World) -> None:
    w.add_node("a", cpu=100)
    w.submit("label", make_spec(labels="zone=x"))
    w.submit("large", make_spec(cpu=500))
    w.settle()
    assert not w.executions()
    w.add_node("a", cpu=100, labels={"zone": "x"})
    assert w.executions("label")
    w.settle()
    w.add_node("a", cpu=1000, labels={"zone": "x"})
    assert w.executions("large")
    w.settle()


def test_freed_room_goes_by_priority_then_age(w: World) -> None:
    w.add_node("a", cpu=100)
    w.behave(run_on, job="first")
    w.submit("first", make_spec(cpu=100))
    w.settle()
    for name, priority in (("low", 0), ("older", 5), ("newer", 5), ("high", 9)):
        w.pass_time(1)
        w.submit(name, make_spec(cpu=100, priority=priority))
    w.settle()
    assert not w.executions("high")
    w.stop("first")
    order: list[str] = []
    for _ in range(60):
        w.step()
        for execution in w.executions():
            if execution.spec.job not in [*order, "first"]:
                order.append(execution.spec.job)
    assert order == ["high", "older", "newer", "low"]


def test_a_lower_rank_does_not_overtake(w: World) -> None:
    w.add_node("a", cpu=100)
    w.behave(run_on, job="first")
    w.submit("first", make_spec(cpu=100))
    w.submit("waiting", make_spec(cpu=100, priority=5))
    w.settle()
    (execution,) = w.executions("first")
    # The room appears, and a newcomer is looked at before the one who was waiting for it.
    wake, w.reconciler._wake = w.reconciler._wake, None
    w.report(execution, report_of(execution, Phase.SUCCEEDED, exit_code=0))
    w.submit("newcomer", make_spec(cpu=100))
    assert not w.executions("newcomer")
    verdict = w.job("newcomer").status.verdicts[0]
    assert [c.rule for c in verdict.rejected] == ["Turn"]
    assert "default/waiting" in verdict.rejected[0].example
    w.reconciler._wake = wake
    assert wake is not None
    wake(w.job("waiting").ref)
    w.bench.loop.run_until_idle()
    assert w.executions("waiting")
    w.settle(seconds=10)
    assert w.job("newcomer").status.phase is JobPhase.COMPLETED


def test_a_stuck_job_does_not_block_the_line(w: World) -> None:
    """Room is kept for those who go first for seconds, not for ever."""
    w.add_node("a", cpu=100)
    w.behave(run_on, job="first")
    w.submit("first", make_spec(cpu=100))
    w.submit("waiting", make_spec(cpu=100, priority=5))
    w.settle()
    (execution,) = w.executions("first")
    wake, w.reconciler._wake = w.reconciler._wake, None
    w.report(execution, report_of(execution, Phase.SUCCEEDED, exit_code=0))
    w.submit("newcomer", make_spec(cpu=100))
    w.pass_time(7)
    assert w.executions("newcomer")
    w.reconciler._wake = wake
    w.settle(seconds=100)


def test_many_waiting_jobs_are_not_all_woken(w: World) -> None:
    w.add_node("a", cpu=100)
    w.behave(run_on, job="first")
    w.submit("first", make_spec(cpu=100))
    for i in range(30):
        w.submit(f"j{i}", make_spec(cpu=100))
    w.settle()
    runs = w.manager.controllers["job"].queue.stats.runs
    (execution,) = w.executions("first")
    w.report(execution, report_of(execution, Phase.SUCCEEDED, exit_code=0))
    assert w.manager.controllers["job"].queue.stats.runs - runs <= 6
    w.settle(seconds=5)
    assert all(w.job(f"j{i}").status.phase is JobPhase.COMPLETED for i in range(30))


def test_queue_timeout_fails_with_the_verdict(w: World) -> None:
    w.add_node("a", cpu=100)
    timeouts = Timeouts(queue_timeout=60)
    w.submit("j", make_spec(cpu=500, task={"timeouts": timeouts}))
    w.settle()
    waiting = w.job("j").status.waiting
    assert waiting is not None
    assert waiting.until is not None
    assert (waiting.until - waiting.since).total_seconds() == 60
    w.pass_time(59)
    assert w.job("j").status.phase is JobPhase.QUEUED
    w.pass_time(2)
    status = w.job("j").status
    assert (status.phase, status.reason) == (JobPhase.FAILED, "QueueTimeout")
    assert "nearest is a" in status.message
    assert "500m" in status.verdicts[0].rejected[0].example


def test_queue_timeout_does_not_take_a_running_service_down(w: World) -> None:
    w.add_node("a", cpu=200)
    timeouts = Timeouts(queue_timeout=60)
    w.submit("s", make_spec(SERVICE, 2, cpu=100, task={"timeouts": timeouts}))
    w.settle()
    w.edit("s", count=3)
    w.settle()
    w.pass_time(100)
    assert w.job("s").status.phase is JobPhase.RUNNING
    assert len(w.running("s")) == 2


def test_total_timeout_fails_and_stops(w: World) -> None:
    w.add_node("a")
    w.default = run_on
    w.submit("j", make_spec(task={"timeouts": Timeouts(total_timeout=30)}))
    w.settle()
    waiting = w.job("j").status.waiting
    assert waiting is not None
    assert waiting.until is not None
    w.pass_time(31)
    w.settle()
    assert (w.job("j").status.phase, w.job("j").status.reason) == (JobPhase.FAILED, "TotalTimeout")
    assert [e.phase for e in w.executions("j")] == [Phase.STOPPED]


def test_execution_timeout_backstop_is_charged(w: World) -> None:
    w.add_node("a")
    w.default = run_on
    task = {"timeouts": Timeouts(execution_timeout=10)}
    w.submit("j", make_spec(task=task, retry=RetryPolicy(attempts=1)))
    w.settle()
    w.pass_time(65)
    assert [e.spec.desired for e in w.executions("j")] == [Desired.RUN]
    w.pass_time(10)
    w.settle()
    (execution,) = w.executions("j")
    assert execution.spec.stop_reason == "ExecutionTimeout"
    assert w.job("j").status.phase is JobPhase.FAILED


def test_several_partitions_share_a_node_up_to_its_room(w: World) -> None:
    w.add_node("a", cpu=300)
    w.submit("j", make_spec(count=7, cpu=100))
    w.bench.loop.run_until_idle()
    status = w.job("j").status
    assert (status.phase, status.slots.running, status.slots.waiting) == (JobPhase.RUNNING, 3, 4)
    assert status.waiting is not None
    assert status.waiting.what == "Capacity"
    w.settle(seconds=5)
    assert w.job("j").status.phase is JobPhase.COMPLETED


# -- ops -----------------------------------------------------------------------------------------


def test_ops_runs_once_on_each_node_that_matches_now(w: World) -> None:
    for name, zone in (("a", "x"), ("b", "x"), ("c", "y")):
        w.add_node(name, labels={"zone": zone})
    w.behave(run_on, node="a")
    w.submit("j", make_spec(OPS, labels="zone=x"))
    w.settle()
    assert w.job("j").status.ops_nodes == ("a", "b")
    w.add_node("d", labels={"zone": "x"})
    w.behave(succeed, node="a")
    w.settle()
    assert sorted(e.spec.node for e in w.executions("j")) == ["a", "b"]
    assert w.job("j").status.phase is JobPhase.COMPLETED


def test_ops_does_not_retry_but_for_faults(w: World) -> None:
    with_nodes(w, "a", "b", "c")
    w.behave(fail(1), node="a")
    w.behave(fail(1, is_system_fault=True), node="b", attempt=0)
    w.submit("j", make_spec(OPS))
    w.settle(seconds=5)
    tries = Counter(e.spec.node for e in w.executions("j"))
    assert tries == {"a": 1, "b": 2, "c": 1}
    status = w.job("j").status
    assert (status.phase, status.slots.succeeded, status.slots.failed) == (JobPhase.FAILED, 2, 1)
    assert "1 of 3 nodes failed" in status.message


def test_ops_without_a_match_waits_for_one(w: World) -> None:
    w.add_node("a")
    w.submit("j", make_spec(OPS, labels="zone=x"))
    w.settle()
    assert w.job("j").status.phase is JobPhase.QUEUED
    w.add_node("b", labels={"zone": "x"})
    w.settle()
    assert w.job("j").status.phase is JobPhase.COMPLETED
    assert [e.spec.node for e in w.executions("j")] == ["b"]


def test_ops_waits_for_room_on_its_nodes(w: World) -> None:
    w.add_node("a", cpu=100)
    w.behave(run_on, job="first")
    w.submit("first", make_spec(cpu=100))
    w.settle()
    w.submit("j", make_spec(OPS, cpu=100))
    w.settle()
    assert w.job("j").status.ops_nodes == ("a",)
    assert not w.executions("j")
    w.stop("first")
    w.settle()
    assert w.job("j").status.phase is JobPhase.COMPLETED


def test_ops_slot_ends_with_its_node(w: World) -> None:
    with_nodes(w, "a", "b")
    w.behave(run_on, node="a")
    w.submit("j", make_spec(OPS))
    w.settle()
    w.silence("a", Contact.LOST)
    w.remove(Ref("Node", "", "a"))
    w.settle(seconds=5)
    status = w.job("j").status
    assert (status.phase, status.slots.failed) == (JobPhase.FAILED, 1)
    assert "node a was removed" in status.message


# -- services ------------------------------------------------------------------------------------


def test_service_scales_up_and_down_without_restarts(w: World) -> None:
    with_nodes(w, "a", "b")
    w.submit("s", make_spec(SERVICE, 2))
    w.settle()
    before = {e.name for e in w.running("s")}
    w.edit("s", count=4)
    w.settle()
    assert w.job("s").metadata.generation == 1
    assert before <= {e.name for e in w.running("s")}
    assert len(w.running("s")) == 4
    w.edit("s", count=1)
    w.settle()
    assert len(w.running("s")) == 1
    assert w.job("s").status.slots.total == 1


def test_service_starts_again_after_an_end(w: World) -> None:
    with_nodes(w, "a", "b")
    w.behave(succeed, attempt=0)
    w.submit("s", make_spec(SERVICE, 1))
    w.settle(seconds=5)
    assert [e.spec.attempt for e in w.running("s")] == [1]
    assert not w.acceptances("s")


def test_crash_loop_of_a_service_does_not_spin(w: World) -> None:
    with_nodes(w, "a", "b")
    w.default = fail(1)
    w.submit("s", make_spec(SERVICE, 1, retry=RetryPolicy(backoff_seconds=0)))
    w.settle(seconds=120)
    numbers = [e.spec.attempt for e in w.executions("s")]
    assert 4 <= max(numbers) <= 9
    assert len(numbers) <= 6, "old attempts stay for ever"
    w.default = run_on
    w.settle(seconds=60)
    assert len(w.running("s")) == 1


@pytest.mark.parametrize(
    ("policy", "behaviour", "phase", "attempts"),
    [
        pytest.param("never", succeed, JobPhase.COMPLETED, 1, id="never ends well"),
        pytest.param("never", fail(1), JobPhase.FAILED, 1, id="never ends badly"),
        pytest.param("onFailure", succeed, JobPhase.COMPLETED, 1, id="onFailure ends well"),
        pytest.param("onFailure", fail(1), JobPhase.RUNNING, 2, id="onFailure starts again"),
    ],
)
def test_restart_policy(
    w: World, policy: str, behaviour: object, phase: JobPhase, attempts: int
) -> None:
    w.add_node("a")
    w.behave(behaviour, attempt=0)  # type: ignore[arg-type]
    restart = RestartPolicy(policy=policy)  # type: ignore[arg-type]
    w.submit("s", make_spec(SERVICE, 1, restart=restart))
    w.settle(seconds=5)
    assert w.job("s").status.phase is phase
    assert len(w.executions("s")) == attempts


def test_rollout_replaces_one_after_the_other(w: World) -> None:
    with_nodes(w, "a", "b")
    w.submit("s", make_spec(SERVICE, 3))
    w.settle()
    w.edit("s", run_nonce="2")
    lowest = watch_lowest(w, "s")
    assert lowest == 3, "there was room for both, so none had to be missing"
    assert len(w.running("s", generation=2)) == 3
    assert not w.running("s", generation=1)
    starts = sorted(
        e.status.report.started_at
        for e in w.running("s")
        if e.status.report and e.status.report.started_at
    )
    assert len(starts) == 3


@pytest.mark.parametrize("wide", [1, 2])
def test_rollout_without_room_for_both_stops_the_old_first(w: World, wide: int) -> None:
    for name in ("a", "b", "c"):
        w.add_node(name, cpu=100)
    w.submit("s", make_spec(SERVICE, 3, cpu=100))
    w.settle()
    w.edit("s", run_nonce="2", update=UpdateStrategy(max_unavailable=wide))
    lowest = watch_lowest(w, "s")
    assert lowest == 3 - wide
    assert len(w.running("s", generation=2)) == 3


def test_rollout_with_fixed_ports_stops_the_old_first(w: World) -> None:
    with_nodes(w, "a")
    network = Network(type=NetworkType.HOST, ports=(Port(name="http", static=8080),))
    w.submit("s", make_spec(SERVICE, 1, task={"network": network}))
    w.settle()
    w.edit("s", run_nonce="2")

    def never_two() -> None:
        assert len([e for e in w.executions("s") if not e.phase.is_final]) <= 1

    w.settle(seconds=30, watch=never_two)
    assert len(w.running("s", generation=2)) == 1


def test_broken_generation_leaves_the_old_one_running(w: World) -> None:
    with_nodes(w, "a", "b")
    w.submit("s", make_spec(SERVICE, 3))
    w.settle()
    w.default = fail(1)
    w.behave(run_on, job="s")
    w.behaviours.insert(0, (lambda e: e.spec.slot.generation == 2, fail(1)))
    w.edit("s", run_nonce="2")
    w.settle(seconds=30)
    assert len(w.running("s", generation=1)) >= 2
    waiting = w.job("s").status.waiting
    assert waiting is not None
    w.behaviours.pop(0)
    w.settle(seconds=60)
    assert len(w.running("s", generation=2)) == 3


def test_impossible_generation_leaves_the_old_one_running(w: World) -> None:
    with_nodes(w, "a")
    w.submit("s", make_spec(SERVICE, 2))
    w.settle()
    w.submit("s", make_spec(SERVICE, 2, labels="zone=nowhere"))
    w.settle(seconds=5)
    assert len(w.running("s", generation=1)) == 2
    waiting = w.job("s").status.waiting
    assert waiting is not None
    assert waiting.what == "Capacity"


@pytest.mark.parametrize("reconcile", [None, "keepOriginal", "keepReplacement"])
def test_drain_moves_a_service_before_it_stops(w: World, reconcile: str | None) -> None:
    w.add_node("a")
    disconnect = DisconnectPolicy(reconcile=reconcile)  # type: ignore[arg-type]
    w.submit("s", make_spec(SERVICE, 1, disconnect=disconnect))
    w.settle()
    w.change_node("a", drain=True)
    w.settle()
    assert nodes_of(w, "s") == ["a"], "nowhere to go, so it stays"
    w.add_node("b")
    lowest = watch_lowest(w, "s")
    assert lowest == 1
    assert nodes_of(w, "s") == ["b"]


def test_drain_under_the_policy_stop_never_runs_two(w: World) -> None:
    w.add_node("a")
    w.submit("s", make_spec(SERVICE, 1, disconnect=DisconnectPolicy(action="stop")))
    w.settle()
    w.change_node("a", drain=True)
    w.settle()
    assert nodes_of(w, "s") == ["a"], "nowhere to go, so it stays"

    def never_two() -> None:
        assert len([e for e in w.executions("s") if not e.phase.is_final]) <= 1

    w.add_node("b")
    w.settle(watch=never_two)
    assert nodes_of(w, "s") == ["b"]


def test_drain_lets_batch_finish(w: World) -> None:
    w.add_node("a")
    w.default = run_on
    w.submit("j", make_spec())
    w.settle()
    w.change_node("a", drain=True)
    w.settle()
    assert [e.spec.desired for e in w.executions("j")] == [Desired.RUN]


# -- daemons -------------------------------------------------------------------------------------


def test_daemon_follows_nodes(w: World) -> None:
    w.add_node("a", labels={"zone": "x"})
    w.add_node("b")
    w.submit("d", make_spec(DAEMON, labels="zone=x"))
    w.settle()
    assert nodes_of(w, "d") == ["a"]
    w.add_node("c", labels={"zone": "x"})
    w.settle()
    assert nodes_of(w, "d") == ["a", "c"]
    w.add_node("a", labels={"zone": "y"})
    w.settle()
    assert nodes_of(w, "d") == ["c"]
    w.change_node("c", unschedulable=True)
    w.settle()
    assert nodes_of(w, "d") == ["c"], "a cordon removes nothing"
    w.change_node("c", drain=True)
    w.settle()
    assert nodes_of(w, "d") == []
    assert w.job("d").status.phase is JobPhase.QUEUED
    w.change_node("c", unschedulable=False, drain=False)
    w.settle()
    assert nodes_of(w, "d") == ["c"]
    assert w.job("d").status.phase is JobPhase.RUNNING


def test_daemon_rollout_is_one_node_at_a_time_and_never_two_on_one(w: World) -> None:
    with_nodes(w, "a", "b", "c")
    w.submit("d", make_spec(DAEMON))
    w.settle()
    w.edit("d", run_nonce="2")

    def never_two() -> None:
        alive = Counter(e.spec.node for e in w.executions("d") if not e.phase.is_final)
        assert max(alive.values(), default=0) <= 1

    assert watch_lowest(w, "d", never_two) == 2
    assert len(w.running("d", generation=2)) == 3


@pytest.mark.parametrize("type", [DAEMON, SERVICE])
def test_a_rollout_that_lacked_room_goes_on_once_there_is_some(w: World, type: JobType) -> None:
    """At once, not with the next sweep: with the room that becomes free and that of the old one."""
    w.add_node("a", cpu=1000)
    w.submit("d", make_spec(type, cpu=300))
    w.settle()
    w.submit("other", make_spec(BATCH, cpu=600))
    w.behave(run_on, job="other")
    w.settle()
    w.submit("d", make_spec(type, cpu=800))
    w.settle()
    (old,) = w.executions("d")
    assert old.spec.desired is Desired.RUN, "it stays where its successor would not fit"
    (other,) = w.executions("other")
    w.report(other, report_of(other, Phase.SUCCEEDED, exit_code=0))
    w.bench.loop.run_until_idle()
    assert w.executions("d")[0].spec.desired is Desired.STOP
    w.settle()
    assert len(w.running("d", generation=2)) == 1


def test_daemon_rollout_is_not_blocked_by_an_absent_node(w: World) -> None:
    with_nodes(w, "a", "b", "c")
    w.submit("d", make_spec(DAEMON))
    w.settle()
    w.silence("a")
    w.edit("d", run_nonce="2")
    w.settle(seconds=20)
    assert sorted(e.spec.node for e in w.running("d", generation=2)) == ["b", "c"]
    w.hear("a")
    w.settle(seconds=20)
    assert len(w.running("d", generation=2)) == 3


def test_daemon_that_was_refused_is_not_asked_over_and_over(w: World) -> None:
    with_nodes(w, "a", "b")
    w.behave(reject, node="a")
    w.submit("d", make_spec(DAEMON))
    w.settle(seconds=60)
    assert len(w.executions("d", node="a")) == 1
    assert nodes_of(w, "d") == ["b"]


# -- disconnects ---------------------------------------------------------------------------------


def test_unknown_is_waited_for_and_lost_is_replaced(w: World) -> None:
    with_nodes(w, "a", "b")
    w.default = run_on
    w.submit("j", make_spec())
    w.settle()
    (first,) = w.executions("j")
    w.silence(first.spec.node)
    w.settle()
    assert len(w.executions("j")) == 1
    waiting = w.job("j").status.waiting
    assert waiting is not None
    assert waiting.what == "Contact"
    assert waiting.until is not None
    w.lose(first.spec.node)
    w.settle()
    first, second = w.executions("j")
    assert second.spec.node != first.spec.node
    assert second.spec.charged == 0
    assert first.spec.desired is Desired.RUN, "its result still counts"


def late_success(w: World, reconcile: str) -> None:
    """An execution is lost and replaced, and then its node returns with its success."""
    with_nodes(w, "a", "b")
    w.default = run_on
    disconnect = DisconnectPolicy(action="replace", reconcile=reconcile)  # type: ignore[arg-type]
    w.submit("j", make_spec(disconnect=disconnect, publisher="local"))
    w.settle()
    (first,) = w.executions("j")
    w.silence(first.spec.node)
    w.lose(first.spec.node)
    w.settle()
    w.silent.clear()
    (first,) = w.executions("j", attempt=0)
    w.report(first, report_of(first, Phase.SUCCEEDED, exit_code=0))
    w.hear(first.spec.node)


@pytest.mark.parametrize("reconcile", ["firstAccepted", "keepOriginal"])
def test_late_success_of_the_original_counts(w: World, reconcile: str) -> None:
    late_success(w, reconcile)
    w.settle()
    assert [a.spec.execution[-1] for a in w.acceptances("j")] == ["0"]
    assert w.job("j").status.phase is JobPhase.COMPLETED
    (second,) = w.executions("j", attempt=1)
    assert (second.phase, second.spec.superseded) == (Phase.STOPPED, True)
    assert len(w.publications()) == 1


def test_late_success_loses_where_the_replacement_is_to_win(w: World) -> None:
    late_success(w, "keepReplacement")
    w.settle()
    assert not w.acceptances("j")
    (first,) = w.executions("j", attempt=0)
    assert first.spec.superseded
    w.default = succeed
    w.settle()
    assert [a.spec.execution[-1] for a in w.acceptances("j")] == ["1"]
    assert len(w.publications()) == 1


def test_late_success_counts_if_the_replacement_fails(w: World) -> None:
    late_success(w, "keepReplacement")
    w.default = fail(1)
    w.settle()
    assert [a.spec.execution[-1] for a in w.acceptances("j")] == ["0"]
    assert w.job("j").status.phase is JobPhase.COMPLETED


def test_replacement_goes_on_if_the_original_ended_while_it_was_away(w: World) -> None:
    """What is stored of it when its node comes back is old: it may have failed long since."""
    with_nodes(w, "a", "b")
    w.default = run_on
    disconnect = DisconnectPolicy(action="replace", reconcile="keepOriginal")
    w.submit("j", make_spec(disconnect=disconnect))
    w.settle()
    (first,) = w.executions("j")
    w.silence(first.spec.node)
    w.lose(first.spec.node)
    w.settle()
    w.hear(first.spec.node)
    w.settle()
    w.behave(fail(1), attempt=0)
    w.settle(seconds=w.settings.return_seconds + 1)
    first, second = w.executions("j")
    assert (first.phase, second.phase) == (Phase.FAILED, Phase.RUNNING)
    assert not second.spec.superseded


def test_original_that_returns_wins_where_it_is_to_be_kept(w: World) -> None:
    with_nodes(w, "a", "b")
    w.default = run_on
    disconnect = DisconnectPolicy(action="replace", reconcile="keepOriginal")
    w.submit("j", make_spec(disconnect=disconnect))
    w.settle()
    (first,) = w.executions("j")
    w.silence(first.spec.node)
    w.lose(first.spec.node)
    w.settle()
    w.hear(first.spec.node)
    w.settle()
    first, second = w.executions("j")
    assert second.spec.desired is Desired.RUN, "the original may be about to tell that it ended"
    w.settle(seconds=w.settings.return_seconds + 1)
    first, second = w.executions("j")
    assert (first.phase, second.phase) == (Phase.RUNNING, Phase.STOPPED)
    assert second.spec.superseded
    w.behave(fail(1), attempt=0)
    w.settle(seconds=5)
    assert max(e.spec.attempt for e in w.executions("j")) == 2, "the failed original is retried"


def test_service_that_returns_gives_way_to_its_running_replacement(w: World) -> None:
    with_nodes(w, "a", "b")
    w.submit("s", make_spec(SERVICE, 1))
    w.settle()
    (first,) = w.executions("s")
    w.silence(first.spec.node)
    w.lose(first.spec.node)
    w.settle()
    w.hear(first.spec.node)
    w.settle()
    assert [e.spec.attempt for e in w.running("s")] == [1]


def test_nothing_stays_on_a_rejected_node(w: World) -> None:
    with_nodes(w, "a", "b")
    w.default = run_on
    w.submit("j", make_spec())
    w.settle()
    (first,) = w.executions("j")
    w.change_node(first.spec.node, membership=Membership.REJECTED)
    w.lose(first.spec.node)
    w.settle()
    first, second = w.executions("j")
    assert (first.spec.desired, first.spec.stop_reason) == (Desired.STOP, "NodeRejected")
    assert second.spec.node != first.spec.node
    assert second.phase is Phase.RUNNING


# -- generations ---------------------------------------------------------------------------------


def test_unchanged_apply_does_nothing(w: World) -> None:
    with_nodes(w, "a")
    spec = make_spec(count=2)
    w.submit("j", spec)
    w.settle()
    before = w.revision()
    w.submit("j", spec)
    w.settle()
    assert w.revision() == before


def test_rerun_keeps_the_results_of_before(w: World) -> None:
    with_nodes(w, "a")
    w.submit("j", make_spec(count=2))
    w.settle()
    w.edit("j", run_nonce="again")
    w.settle()
    job = w.job("j")
    assert (job.metadata.generation, job.status.phase) == (2, JobPhase.COMPLETED)
    assert job.status.observed_generation == 2
    assert len(w.acceptances("j")) == 4


def test_new_generation_of_a_batch_job_stops_the_old(w: World) -> None:
    with_nodes(w, "a")
    w.default = run_on
    w.submit("j", make_spec())
    w.settle()
    w.edit("j", run_nonce="again")
    w.settle()
    (old,) = w.executions("j", generation=1)
    assert (old.phase, old.spec.stop_reason) == (Phase.STOPPED, "NewGeneration")
    assert len(w.running("j", generation=2)) == 1


def test_old_generations_are_bounded() -> None:
    with world(settings=JobSettings(generations_kept=2)) as w:
        w.add_node("a")
        w.submit("j", make_spec(publisher="local"))
        for number in range(4):
            w.settle()
            w.edit("j", run_nonce=str(number))
        w.settle()
        assert {e.spec.slot.generation for e in w.executions("j")} == {4, 5}
        assert {a.spec.slot.generation for a in w.acceptances("j")} == {4, 5}
        assert {p.spec.slot.generation for p in w.publications()} == {4, 5}
        assert w.writes_while(600) == 0


def test_what_an_old_generation_finished_counts_and_is_not_delivered(w: World) -> None:
    with_nodes(w, "a", "b")
    w.default = run_on
    w.submit("j", make_spec(publisher="local"))
    w.settle()
    (old,) = w.executions("j")
    w.silence(old.spec.node)
    w.edit("j", run_nonce="again")
    w.settle()
    (old,) = w.executions("j", generation=1)
    w.report(old, report_of(old, Phase.SUCCEEDED, exit_code=0))
    assert [a.spec.slot.generation for a in w.acceptances("j")] == [1]
    assert not w.publications()
    w.default = succeed
    w.settle()
    assert w.job("j").status.phase is JobPhase.COMPLETED


# -- suspend, stop, delete -----------------------------------------------------------------------


def test_suspend_and_resume(w: World) -> None:
    with_nodes(w, "a")
    w.behave(run_on, partition=1)
    w.submit("j", make_spec(count=2))
    w.settle()
    w.edit("j", suspend=True)
    w.settle()
    status = w.job("j").status
    assert (status.phase, status.reason) == (JobPhase.PENDING, "Suspended")
    assert status.waiting is not None
    assert (status.waiting.what, status.waiting.mover) == ("Resume", "user")
    assert status.slots.succeeded == 1
    w.behave(succeed, partition=1)
    w.edit("j", suspend=False)
    w.settle()
    assert w.job("j").status.phase is JobPhase.COMPLETED
    again = [e for e in w.executions("j") if e.spec.slot.partition == 1]
    assert [(e.spec.attempt, e.spec.charged) for e in again] == [(0, 0), (1, 0)]
    assert len(w.executions("j")) == 3, "what was accepted does not run again"


def test_suspended_job_is_not_placed(w: World) -> None:
    with_nodes(w, "a")
    w.submit("j", make_spec(suspend=True))
    w.settle()
    assert not w.executions("j")
    w.edit("j", suspend=False)
    w.settle()
    assert w.job("j").status.phase is JobPhase.COMPLETED


def test_stop(w: World) -> None:
    with_nodes(w, "a")
    w.default = run_on
    w.submit("j", make_spec(count=2))
    w.settle()
    w.stop("j")
    assert w.job("j").status.phase is JobPhase.RUNNING
    waiting = w.job("j").status.waiting
    assert waiting is not None
    assert (waiting.what, waiting.mover) == ("Stop", "node a")
    w.settle()
    assert w.job("j").status.phase is JobPhase.STOPPED
    assert [e.phase for e in w.executions("j")] == [Phase.STOPPED] * 2
    w.default = succeed
    w.edit("j", run_nonce="again")
    w.settle()
    assert w.job("j").status.phase is JobPhase.COMPLETED, "a later generation runs"


def test_stop_does_not_wait_for_a_silent_node(w: World) -> None:
    with_nodes(w, "a", "b")
    w.default = run_on
    w.submit("j", make_spec(count=2))
    w.settle()
    w.silence("a")
    w.stop("j")
    w.settle()
    status = w.job("j").status
    assert status.phase is JobPhase.STOPPED
    assert "told when they return" in status.message
    w.hear("a")
    w.settle()
    assert all(e.phase is Phase.STOPPED for e in w.executions("j"))


def test_success_while_stopping_is_kept(w: World) -> None:
    with_nodes(w, "a")
    w.default = run_on
    w.submit("j", make_spec())
    w.settle()
    w.stop("j")
    (execution,) = w.executions("j")
    w.report(execution, report_of(execution, Phase.SUCCEEDED, exit_code=0))
    assert len(w.acceptances("j")) == 1
    status = w.job("j").status
    assert (status.phase, status.slots.succeeded) == (JobPhase.STOPPED, 1)


def test_delete_waits_for_nodes_then_removes_everything(w: World) -> None:
    with_nodes(w, "a")
    w.behave(run_on, partition=1)
    w.submit("j", make_spec(count=2, publisher="local"))
    w.settle()
    w.delete("j")
    assert w.find(Ref("Job", "default", "j")) is not None
    assert all(e.spec.desired is Desired.STOP for e in w.executions("j") if not e.phase.is_final)
    waiting = w.job("j").status.waiting
    assert waiting is not None
    assert waiting.until is not None
    w.settle()
    for kind in ("Job", "Execution", "Acceptance", "Publication"):
        assert not w.bench.cache.list(kind), kind
    row = w.reconciler.nodes.row("a")
    assert row is not None
    assert w.reconciler.nodes.free_on(row).cpu == 1000


def test_delete_gives_up_on_a_node_that_does_not_answer(w: World) -> None:
    with_nodes(w, "a")
    w.default = run_on
    w.submit("j", make_spec())
    w.settle()
    w.silent.add("a")  # it seems to be there, and does nothing
    w.delete("j")
    w.pass_time(59)
    assert w.find(Ref("Job", "default", "j")) is not None
    w.pass_time(2)
    assert w.find(Ref("Job", "default", "j")) is None
    assert not w.executions()


def test_other_finalizers_are_respected(w: World) -> None:
    w.submit("j", make_spec())
    job = w.job("j")
    w.put(job.with_meta(finalizers=(*job.metadata.finalizers, "other")))
    w.delete("j")
    w.settle()
    assert w.job("j").metadata.finalizers == ("other",)


# -- size ----------------------------------------------------------------------------------------


def test_a_large_job_is_placed_in_bounded_commits(w: World) -> None:
    for i in range(20):
        w.add_node(f"n{i}", cpu=10_000)
    w.submit("j", make_spec(count=1500, cpu=100, publisher="local"))
    w.bench.loop.run_until_idle()
    assert len(w.executions("j")) == 1500
    w.settle(seconds=3)
    status = w.job("j").status
    assert (status.phase, status.slots.succeeded) == (JobPhase.COMPLETED, 1500)
    assert status.slots.delivered == 1500
    w.delete("j")
    w.settle()
    assert not w.bench.cache.list("Execution")


def test_a_heavy_job_is_placed_stopped_and_removed_in_commits_that_are_not_too_large(
    w: World,
) -> None:
    """All its executions together have more bytes than any commit may have."""
    with_nodes(w, "a", "b", cpu=100_000)
    w.default = run_on
    heavy = {f"KEY{i}": "x" * 60_000 for i in range(8)}
    w.submit("j", make_spec(count=100, task={"env": heavy}))
    w.bench.loop.run_until_idle()
    assert len(w.executions("j")) == 100
    w.settle()
    assert len(w.running("j")) == 100
    w.stop("j")
    w.settle()
    assert w.job("j").status.phase is JobPhase.STOPPED
    assert not [e for e in w.executions("j") if not e.phase.is_final]
    w.delete("j")
    w.settle()
    assert not w.bench.cache.list("Execution")


def test_results_with_heavy_labels_are_all_accepted(w: World) -> None:
    with_nodes(w, "a", "b", cpu=100_000)
    labels = {f"{i:0253}": "x" * 256 for i in range(256)}
    w.submit("j", make_spec(count=300, cpu=100, publisher="local"), labels=labels)
    w.settle(seconds=3)
    status = w.job("j").status
    assert (status.phase, status.slots.delivered) == (JobPhase.COMPLETED, 300)


@pytest.mark.parametrize(("after", "told"), [(1, 15), (15, 15), (16, 16), (None, 1800)])
def test_node_is_told_when_to_stop_but_not_before_it_can_know(
    w: World, after: int | None, told: int
) -> None:
    """A limit shorter than the time between two signs of life would stop nodes in contact."""
    with_nodes(w, "a")
    w.default = run_on
    policy = DisconnectPolicy(action="stop", after_seconds=after)
    w.submit("j", make_spec(disconnect=policy))
    w.settle()
    (made,) = w.executions("j")
    assert w.settings.stop_seconds_min == 15
    assert made.spec.local_deadline_seconds == told


def test_node_is_told_nothing_under_other_policies(w: World) -> None:
    with_nodes(w, "a")
    w.default = run_on
    w.submit("j", make_spec(disconnect=DisconnectPolicy(action="replace", after_seconds=60)))
    w.settle()
    assert w.executions("j")[0].spec.local_deadline_seconds is None
