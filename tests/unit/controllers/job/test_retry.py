"""What ends mean, and how long pauses are."""

import pytest

from bacalhau_api.v1.execution import Desired, Execution, Phase
from bacalhau_api.v1.job import ExitRule, RetryPolicy
from bacalhau_controllers.job import JobSettings
from bacalhau_controllers.job.retry import (
    End,
    end_of,
    is_charged,
    pause_seconds,
    pause_starts,
)
from tests.support.job_world import report_of
from tests.support.samples import at, execution, job

RULES = RetryPolicy(
    exit_rules=(
        ExitRule(codes=(3,), action="retry"),
        ExitRule(codes=(3, 4), action="fail"),
        ExitRule(codes=(5,), action="fail"),
    )
)


def ended(phase: Phase, *, stop: str = "", **report: object) -> Execution:
    one = execution(job())
    spec = one.spec.but(desired=Desired.STOP, stop_reason=stop) if stop else one.spec
    done = report_of(one, phase, **report)
    return one.but(spec=spec, status=one.status.but(report=done))


@pytest.mark.parametrize(
    ("given", "end", "charged"),
    [
        (ended(Phase.SUCCEEDED), End.SUCCEEDED, False),
        (ended(Phase.FAILED, exit_code=1), End.FAILED, True),
        (ended(Phase.FAILED), End.FAILED, True),
        (ended(Phase.FAILED, exit_code=3), End.FAILED, True),
        (ended(Phase.FAILED, exit_code=4), End.FAILED_FOR_GOOD, True),
        (ended(Phase.FAILED, exit_code=5, is_system_fault=True), End.FAULT, False),
        (ended(Phase.REJECTED), End.REJECTED, False),
        (ended(Phase.STOPPED), End.FAULT, False),
        (ended(Phase.STOPPED, stop="Suspended"), End.STOPPED, False),
        (ended(Phase.FAILED, stop="Suspended", exit_code=137), End.STOPPED, False),
        (ended(Phase.STOPPED, stop="ExecutionTimeout"), End.FAILED, True),
        (ended(Phase.SUCCEEDED, stop="Suspended"), End.SUCCEEDED, False),
    ],
)
def test_ends(given: Execution, end: End, charged: bool) -> None:
    assert end_of(given, RULES) is end
    assert is_charged(given, RULES) is charged


def pauses(end: End, policy: RetryPolicy, count: int = 12) -> list[float]:
    tuned = JobSettings()
    return [
        pause_seconds(end, charged=n, uncharged=n, retry=policy, settings=tuned, name=f"x-{n}")
        for n in range(1, count)
    ]


def test_pauses_grow_and_are_bounded_and_jittered() -> None:
    policy = RetryPolicy(backoff_seconds=1, backoff_seconds_max=60)
    found = pauses(End.FAILED, policy)
    for n, pause in enumerate(found):
        assert 0.8 * min(2**n, 60) <= pause <= 1.2 * min(2**n, 60)
    assert len({round(p / min(2**n, 60), 6) for n, p in enumerate(found)}) == len(found)
    assert found == pauses(End.FAILED, policy), "the same for everybody who asks"


def test_a_fault_pauses_even_where_the_user_wants_no_pause() -> None:
    policy = RetryPolicy(backoff_seconds=0, backoff_seconds_max=0)
    assert pauses(End.FAILED, policy) == [0.0] * 11
    faults = pauses(End.FAULT, policy)
    assert faults[0] >= 0.8
    assert 240 <= faults[-1] <= 360


def test_a_refusal_goes_elsewhere_at_once_and_later_ones_slow_down() -> None:
    found = pauses(End.REJECTED, RetryPolicy(), 20)
    assert found[0] == 0
    assert 0 < found[1] < 0.2
    assert found[-1] <= 12
    assert pauses(End.STOPPED, RetryPolicy()) == [0.0] * 11


def test_huge_counts_do_not_overflow() -> None:
    tuned, policy = JobSettings(), RetryPolicy()
    pause = pause_seconds(
        End.FAULT, charged=10**6, uncharged=10**6, retry=policy, settings=tuned, name="x"
    )
    assert pause <= 360


@pytest.mark.parametrize(
    ("finished", "start"),
    [
        pytest.param(50, 50, id="plausible"),
        pytest.param(None, 0, id="unknown"),
        pytest.param(-3600, 0, id="a clock that is behind"),
        pytest.param(86400 * 365, 0, id="a clock that is a year ahead"),
    ],
)
def test_a_wrong_clock_does_not_stretch_pauses(finished: float | None, start: float) -> None:
    time = None if finished is None else at(finished)
    assert pause_starts(ended(Phase.FAILED, finished_at=time), at(100)) == at(start)
