"""`rerun --failed`: only the slots without a result run again, in the same generation."""

from collections.abc import Iterator

import pytest

from bacalhau_api.admission import rerun, rerun_failed, retire, stop
from bacalhau_api.errors import ConflictError
from bacalhau_api.v1.execution import Execution, Phase
from bacalhau_api.v1.job import Job, JobPhase, JobType, RetryPolicy, Timeouts
from tests.support.job_world import World, fail, make_spec, reject, run_on, succeed, world

QUICK = RetryPolicy(attempts=2, backoff_seconds=0)


@pytest.fixture
def w() -> Iterator[World]:
    with world() as made:
        yield made


def again(w: World, name: str = "j", nonce: str = "n1") -> None:
    w.put(rerun_failed(w.job(name), nonce))


def by_slot(executions: list[Execution]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for execution in executions:
        found.setdefault(str(execution.spec.slot), []).append(execution.spec.attempt)
    return found


def failed(w: World, count: int = 4) -> Job:
    """A job whose partition 2 failed after its two attempts; the others have results."""
    w.add_node("a")
    w.add_node("b")
    w.behave(fail(), partition=2)
    w.submit("j", make_spec(count=count, retry=QUICK, publisher="local"))
    w.settle(seconds=30)
    job = w.job("j")
    assert job.status.phase is JobPhase.FAILED
    assert job.status.slots.succeeded == 3
    return job


def test_only_what_failed_runs_again_and_the_rest_is_kept(w: World) -> None:
    before = failed(w)
    kept = {a.name: a.metadata.uid for a in w.acceptances("j")}
    was = by_slot(w.executions("j"))
    assert was == {"0": [0], "1": [0], "2": [0, 1], "3": [0]}
    w.behave(succeed, partition=2)
    w.pass_time(100)
    again(w)
    w.settle(seconds=5)
    job = w.job("j")
    assert job.status.phase is JobPhase.COMPLETED
    assert job.metadata.generation == before.metadata.generation, "so its pinned inputs stay"
    assert by_slot(w.executions("j")) == {**was, "2": [0, 1, 2]}
    now = {a.name: a.metadata.uid for a in w.acceptances("j")}
    assert len(now) == 4
    assert kept.items() <= now.items()
    assert len(w.publications()) == 4, "what was delivered is not delivered again"
    assert before.status.finished_at is not None
    assert job.status.finished_at is not None
    assert job.status.finished_at > before.status.finished_at
    assert job.status.slots.succeeded == job.status.slots.total == 4
    assert job.status.slots.failed == 0


def test_it_has_all_its_attempts_again_and_pauses_begin_anew(w: World) -> None:
    failed(w)
    again(w)
    w.settle(seconds=30)
    assert w.job("j").status.phase is JobPhase.FAILED
    assert by_slot(w.executions("j"))["2"] == [0, 1, 2, 3]
    assert [e.spec.charged for e in w.executions("j") if e.spec.slot.partition == 2] == [0, 1, 0, 1]
    again(w, nonce="n1")
    w.settle(seconds=30)
    assert len(w.executions("j")) == 7, "the same nonce asks for it once"
    w.behave(fail(is_system_fault=True), partition=2)
    again(w, nonce="n2")
    w.step()
    w.step()
    w.settle(seconds=10)
    assert by_slot(w.executions("j"))["2"][-1] >= 6, "faults of before do not lengthen pauses"


def test_what_was_stopped_because_of_a_failure_runs_as_well(w: World) -> None:
    w.add_node("a")
    w.default = run_on
    w.behave(fail(), partition=1)
    w.submit("j", make_spec(count=3, retry=RetryPolicy(attempts=1)))
    w.settle(seconds=5)
    assert w.job("j").status.phase is JobPhase.FAILED
    assert not w.acceptances("j")
    w.behave(succeed)
    again(w)
    w.settle(seconds=5)
    assert w.job("j").status.phase is JobPhase.COMPLETED
    assert {a.spec.execution.rsplit("-", 1)[1] for a in w.acceptances("j")} == {"1"}


def test_a_stopped_job_goes_on_with_the_rest(w: World) -> None:
    w.add_node("a")
    w.behave(run_on, partition=1)
    w.submit("j", make_spec(count=3))
    w.settle(seconds=5)
    w.stop("j")
    w.settle(seconds=5)
    assert w.job("j").status.phase is JobPhase.STOPPED
    w.behave(succeed, partition=1)
    again(w)
    assert not w.job("j").is_stopped
    w.settle(seconds=5)
    job = w.job("j")
    assert job.status.phase is JobPhase.COMPLETED
    assert by_slot(w.executions("j")) == {"0": [0], "1": [0, 1], "2": [0]}
    # Stopping goes on to work for it.
    assert stop(job) is job


def test_a_job_that_goes_on_can_be_stopped_again(w: World) -> None:
    failed(w)
    w.behave(run_on, partition=2)
    again(w)
    w.step()
    assert w.job("j").status.phase is JobPhase.RUNNING
    assert w.job("j").status.finished_at is None
    w.stop("j")
    w.step()
    w.settle(seconds=5)
    assert w.job("j").status.phase is JobPhase.STOPPED
    assert len(w.acceptances("j")) == 3


def test_a_time_limit_of_the_job_begins_anew(w: World) -> None:
    w.add_node("a")
    w.default = run_on
    w.submit("j", make_spec(count=1, task={"timeouts": Timeouts(total_timeout=60)}))
    w.step()
    w.pass_time(70)
    w.settle(seconds=5)
    assert w.job("j").status.reason == "TotalTimeout"
    again(w)
    w.step()
    w.pass_time(30)
    assert w.job("j").status.phase is JobPhase.RUNNING
    w.behave(succeed)
    w.settle(seconds=5)
    assert w.job("j").status.phase is JobPhase.COMPLETED


def test_an_ops_job_runs_again_where_it_failed_also_where_it_was_refused(w: World) -> None:
    for name in "abc":
        w.add_node(name)
    w.behave(fail(), node="b")
    w.behave(reject, node="c")
    w.submit("j", make_spec(JobType.OPS))
    w.settle(seconds=5)
    assert w.job("j").status.slots.failed == 2
    w.add_node("d")
    w.behave(succeed)
    again(w)
    w.settle(seconds=5)
    job = w.job("j")
    assert job.status.phase is JobPhase.COMPLETED
    assert by_slot(w.executions("j")) == {"a": [0], "b": [0, 1], "c": [0, 1]}


def test_a_batch_job_asks_nodes_again_that_refused_it(w: World) -> None:
    w.add_node("a")
    w.behave(reject)
    w.submit("j", make_spec(task={"timeouts": Timeouts(queue_timeout=5)}))
    w.settle(seconds=30)
    assert w.job("j").status.phase is JobPhase.FAILED
    w.behave(succeed)
    again(w)
    w.settle(seconds=30)
    assert w.job("j").status.phase is JobPhase.COMPLETED


def test_when_there_is_nothing_to_run_again(w: World) -> None:
    w.add_node("a")
    w.behave(run_on, job="open")
    w.submit("done", make_spec())
    w.submit("service", make_spec(JobType.SERVICE))
    w.submit("open", make_spec())
    w.settle(seconds=5)
    for name, words in (
        ("done", "all of its slots hold a result"),
        ("service", "filled again by themselves"),
        ("open", "is not over"),
    ):
        with pytest.raises(ConflictError, match=words) as caught:
            rerun_failed(w.job(name), "n")
        assert caught.value.hint.endswith(name)


def test_it_outlives_the_next_apply_and_ends_with_a_new_generation(w: World) -> None:
    failed(w)
    w.behave(run_on, partition=2)
    again(w)
    w.step()
    spec = w.job("j").spec
    assert w.submit("j", spec.but(retry_nonce="")).spec.retry_nonce == "n1"
    assert w.job("j").metadata.generation == 1
    w.put(rerun(w.job("j"), "all"))
    w.behave(succeed)
    w.settle(seconds=30)
    job = w.job("j")
    assert (job.metadata.generation, job.status.phase) == (2, JobPhase.COMPLETED)
    assert len(w.executions("j", generation=2)) == 4
    record = retire(job, w.bench.clock.now()).as_job()
    assert record.is_over
    assert w.executions("j", generation=1, phase=Phase.SUCCEEDED)
