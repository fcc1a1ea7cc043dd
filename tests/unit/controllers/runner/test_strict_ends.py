"""Under the policy `stop` nothing is reported as ended before the engine confirms it, whatever an
older copy of the ledger believes."""

import pytest

from bacalhau_api.v1.execution import Execution, Phase, Report
from bacalhau_controllers.runner import machine
from bacalhau_controllers.runner.ports import Observation, RunPhase
from bacalhau_controllers.runner.state import (
    CutOff,
    Disowned,
    Event,
    Instant,
    Limits,
    Stage,
    Stop,
    StopDone,
    StopRequested,
    lost_state,
    new_state,
)
from tests.support.runner import execution
from tests.support.simclock import EPOCH

NOW = Instant(wall=EPOCH, boot="b", mono=5.0)


def strict(**status: object) -> Execution:
    made = execution("a")
    return made.but(spec=made.spec.but(local_deadline_seconds=15), status=made.status.but(**status))


@pytest.mark.parametrize("event", [CutOff("60 s"), StopRequested("User"), Disowned(9)])
def test_an_older_ledger_asks_the_engine_before_it_reports_an_end(event: Event) -> None:
    one = strict()
    step = machine.step(one, new_state("ledger", NOW), event, NOW, Limits())
    assert step.state.stage is Stage.STOPPING
    assert isinstance(step.instruction, Stop)
    assert not step.state.report.phase.is_final
    absent = StopDone(step.state.run, Observation(RunPhase.ABSENT))
    after = machine.step(one, step.state, absent, NOW, Limits())
    assert after.state.stage is Stage.DONE


def test_a_lost_ledger_reports_no_end_before_the_run_is_gone() -> None:
    told = Report(step=7, incarnation="old", phase=Phase.PREPARING, run=3)
    state = lost_state(strict(report=told), "new", NOW)
    assert (state.stage, state.run, state.report.phase) == (Stage.STOPPING, 3, Phase.PREPARING)
    assert state.end is not None
    assert state.end.reason == "LedgerLost"
