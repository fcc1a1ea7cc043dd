"""Which finished jobs go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_api.v1.job import Job, JobPhase
from bacalhau_controllers.retention.plan import RetentionSettings, plan
from tests.support.samples import at, job

DAY = 86400.0


def finished(name: str, ended: float, phase: JobPhase = JobPhase.COMPLETED) -> Job:
    made = job(name)
    status = made.status.but(phase=phase, finished_at=at(ended), observed_generation=1)
    return made.but(status=status)


def names(jobs: list[Job], now: float, *, publishing: tuple[str, ...] = (), **limits: int) -> str:
    todo = plan(jobs, publishing, RetentionSettings(**limits), at(now))
    return " ".join(expired.job.name for expired in todo.expired)


@pytest.mark.parametrize("phase", [JobPhase.COMPLETED, JobPhase.FAILED, JobPhase.STOPPED])
def test_finished_jobs_go_after_their_time_the_oldest_first(phase: JobPhase) -> None:
    jobs = [finished("young", 2 * DAY, phase), finished("b", DAY, phase), finished("a", 0, phase)]
    assert names(jobs, 6.9 * DAY) == ""
    assert names(jobs, 7 * DAY) == "a"
    assert names(jobs, 8 * DAY) == "a b"


def test_surplus_goes_the_oldest_first() -> None:
    jobs = [finished(f"j{i}", i) for i in range(5)]
    assert names(jobs, 10, finished_max=3) == "j0 j1"
    assert names(jobs, 10, finished_max=5) == ""
    todo = plan(jobs, (), RetentionSettings(finished_max=4), at(10))
    assert todo.expired[0].reason == "RetentionCount"


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param(job("x"), id="not finished"),
        pytest.param(finished("x", 0).with_meta(deletion_timestamp=at(1)), id="going already"),
        pytest.param(finished("x", 0).with_meta(generation=2), id="to run again"),
        pytest.param(
            finished("x", 0).but(status=job("x").status.but(phase=JobPhase.COMPLETED)),
            id="no time of its end",
        ),
    ],
)
def test_what_is_kept(kept: Job) -> None:
    assert names([kept], 1000 * DAY, finished_max=0) == ""


def test_a_job_whose_outputs_are_on_their_way_stays_however_old() -> None:
    jobs = [finished("a", 0), finished("b", 1)]
    publishing = (jobs[0].metadata.uid,)
    assert names(jobs, 1000 * DAY, publishing=publishing) == "b"
    assert names(jobs, 10, publishing=publishing, finished_max=1) == ""  # nor does it count


def test_one_pass_is_bounded() -> None:
    jobs = [finished(f"j{i}", i) for i in range(5)]
    todo = plan(jobs, (), RetentionSettings(finished_max=0, deletions_max=2), at(10))
    assert [e.job.name for e in todo.expired] == ["j0", "j1"]
    assert todo.has_more


@given(
    st.lists(st.integers(0, 20), max_size=30),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(0, 40),
)
def test_what_is_left_obeys_both_rules_and_is_the_youngest(
    ends: list[int], finished_max: int, seconds: int, now: int
) -> None:
    jobs = [finished(f"j{i}", end) for i, end in enumerate(ends)]
    limits = RetentionSettings(finished_seconds=seconds, finished_max=finished_max)
    gone = {e.job.name for e in plan(jobs, (), limits, at(now)).expired}
    left = [end for i, end in enumerate(ends) if f"j{i}" not in gone]
    lost = [end for i, end in enumerate(ends) if f"j{i}" in gone]
    assert len(left) <= finished_max
    assert all(now - end < seconds for end in left)
    if left and lost:
        assert max(lost) <= min(left)
    # Nothing goes without need.
    too_old = sum(1 for end in ends if now - end >= seconds)
    assert len(gone) == max(too_old, len(ends) - finished_max)
    again = [j for j in jobs if j.name not in gone]
    assert plan(again, (), limits, at(now)).expired == ()
