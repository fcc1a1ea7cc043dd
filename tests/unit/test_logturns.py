"""Attempts of a slot are read one after the other."""

from bacalhau.logturns import in_turn
from bacalhau_api.v1.execution import Execution, Phase
from tests.support.api_objects import make_execution, stored_job


def now(executions: list[Execution], *read: Execution) -> list[Execution]:
    return list(in_turn(executions, lambda execution: execution in read))


def test_an_attempt_waits_for_the_earlier_ones() -> None:
    job = stored_job(count=2)
    first, second, third = (make_execution(job, attempt=i, phase=Phase.FAILED) for i in range(3))
    other = make_execution(job, 1, phase=Phase.SUCCEEDED)
    mixed = [third, other, second, first]
    assert now(mixed) == [first, other]
    assert now(mixed, first) == [first, second, other]
    assert now(mixed, first, second) == [first, second, third, other]
    assert now(mixed, second) == [first, other], "in the order of attempts, whatever was read"


def test_one_that_still_runs_holds_up_nobody() -> None:
    job = stored_job()
    cut_off = make_execution(job, phase=Phase.RUNNING)
    replacement = make_execution(job, attempt=1, phase=Phase.RUNNING)
    assert now([replacement, cut_off]) == [cut_off, replacement]
