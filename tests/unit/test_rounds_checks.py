"""What the rounds of real processes look for is found if it is there."""

from datetime import timedelta
from typing import Any

import pytest

from bacalhau_api.meta import Contact
from bacalhau_api.v1.execution import Acceptance, Execution, Phase
from bacalhau_api.v1.job import Job, JobPhase, SlotCounts
from bacalhau_controllers.runner.state import Instant, Stage, new_state
from tests.e2e.rounds.checks import Findings, Sight, judge_ledger, judge_objects
from tests.e2e.rounds.work import Action, Order
from tests.support.api_objects import T0, make_acceptance, make_execution, make_node, stored_job

TICKS = 5
DONE = SlotCounts(total=1, succeeded=1, delivered=1)


def finished_job() -> Job:
    job = stored_job(phase=JobPhase.COMPLETED)
    return job.but(status=job.status.but(slots=DONE))


def attempt(job: Job, number: int = 0, phase: Phase = Phase.SUCCEEDED, **report: Any) -> Execution:
    made = make_execution(
        job, attempt=number, node=f"n{number + 1}", phase=phase, stdout_tail=f"tick {TICKS - 1}\n"
    )
    assert made.status.report is not None
    return made.but(status=made.status.but(report=made.status.report.but(**report)))


def sight(
    job: Job, *executions: Execution, accepted: tuple[Acceptance, ...] = (), **running: set[str]
) -> Sight:
    return Sight({job.name: job}, executions, accepted, (make_node("n1"),), running)


def judged(seen: Sight, job: Job, action: Action = "hold", *, restarts: bool = False) -> Findings:
    return judge_objects(seen, [Order(0.0, job, TICKS, action)], restarts=restarts)


def test_a_good_end_is_good() -> None:
    job = finished_job()
    won = attempt(job)
    assert judged(sight(job, won, accepted=(make_acceptance(won, job),)), job).is_clean


def test_a_job_that_is_gone() -> None:
    job, other = finished_job(), stored_job("b", phase=JobPhase.COMPLETED)
    assert judged(sight(other), job).lost == ["job a was acknowledged and is gone"]


def test_a_result_that_is_missing() -> None:
    job = finished_job()
    found = judged(sight(job, attempt(job)), job)
    assert any("0 results for 1 slots" in text for text in found.lost)
    assert any("succeeded, and was not accepted" in text for text in found.lost)


def test_output_that_was_lost() -> None:
    job = finished_job()
    won = attempt(job, stdout_tail="tick 1\n")
    found = judged(sight(job, won, accepted=(make_acceptance(won, job),)), job)
    assert any("has lost its output" in text for text in found.lost)


def test_two_results() -> None:
    job = finished_job()
    one, two = attempt(job), attempt(job, 1)
    accepted = (make_acceptance(one, job), make_acceptance(two, job))
    found = judged(sight(job, one, two, accepted=accepted), job)
    assert any("has 2 results" in text for text in found.doubled)
    found = judged(sight(job, one, two, accepted=accepted[:1]), job)
    assert any("succeeded beside the accepted one" in text for text in found.doubled)
    told = two.but(spec=two.spec.but(superseded=True))
    assert judged(sight(job, one, told, accepted=accepted[:1]), job).is_clean


@pytest.mark.parametrize("restarts", [False, True])
def test_a_second_run(*, restarts: bool) -> None:
    job = finished_job()
    won = attempt(job, run=2)
    found = judged(sight(job, won, accepted=(make_acceptance(won, job),)), job, restarts=restarts)
    assert found.is_clean is restarts


@pytest.mark.parametrize(("begun", "is_alone"), [(9, False), (10, True), (11, True)])
def test_two_at_once_under_stop(begun: int, *, is_alone: bool) -> None:
    job = finished_job()

    def at(seconds: int) -> Any:
        return T0 + timedelta(seconds=seconds)

    one = attempt(job, phase=Phase.STOPPED, started_at=at(0), finished_at=at(10))
    two = attempt(job, 1, started_at=at(begun), finished_at=at(20))
    seen = sight(job, one, two, accepted=(make_acceptance(two, job),))
    assert judged(seen, job, "stop").is_clean is is_alone
    assert judged(seen, job, "replace").is_clean


def test_a_run_that_nobody_wants() -> None:
    job = finished_job()
    won = attempt(job)
    accepted = (make_acceptance(won, job),)
    found = judged(sight(job, won, accepted=accepted, n1={f"{won.name}.1"}), job)
    assert found.orphans == [f"{won.name}.1 on n1 runs, and nobody wants it"]
    running = attempt(job, 1, phase=Phase.RUNNING)
    found = judged(sight(job, won, running, accepted=accepted, n1={f"{running.name}.1"}), job)
    assert found.orphans, "it is wanted on another node"


def test_what_is_stuck() -> None:
    job = stored_job(phase=JobPhase.RUNNING)
    running = attempt(job, phase=Phase.RUNNING)
    found = judged(sight(job, running), job)
    assert len(found.stuck) == 2
    silent = Sight({job.name: job}, (), (), (make_node("n1", contact=Contact.UNKNOWN),), {})
    assert "node n1 is Unknown" in judged(silent, job).stuck


def test_what_a_node_knows_better() -> None:
    job = finished_job()
    stored = attempt(job, phase=Phase.RUNNING)
    fresh = new_state("ledger", Instant(wall=T0, mono=0.0, boot="b"))
    ended = fresh.but(stage=Stage.DONE, report=fresh.report.but(phase=Phase.SUCCEEDED))
    found = Findings()
    judge_ledger("n1", {stored.metadata.uid: ended, "unknown": ended}, sight(job, stored), found)
    assert found.lost == [f"{stored.name} is Succeeded on n1, and stored as Running"]
