"""What has to be done in a state, and when to look at it again: functions of the state alone.

Because of that, an agent that was killed goes on by reading its ledger and doing the duties of
what it finds there.
"""

from dataclasses import dataclass

from bacalhau_api.v1.execution import Execution, ExecutionSpec
from bacalhau_controllers.runner.state import (
    Admit,
    Clean,
    Collect,
    Instant,
    Instruction,
    Limits,
    Prepare,
    Reserve,
    RunnerState,
    Stage,
    Start,
    Stop,
    Watch,
)


@dataclass(frozen=True, slots=True)
class Case:
    """What a transition may look at besides state and event."""

    execution: Execution
    now: Instant
    limits: Limits

    @property
    def spec(self) -> ExecutionSpec:
        """Shorthand."""
        return self.execution.spec

    @property
    def is_long_running(self) -> bool:
        """True for services and daemons, which are to run for ever."""
        return not self.spec.job_type.runs_to_completion


def duty(state: RunnerState, limits: Limits) -> Instruction | None:
    """What is to be done in this state; None if it only waits."""
    if state.due is not None or (state.needs_contact and not state.stage.is_over):
        return None
    match state.stage:
        case Stage.ADMITTING:
            return Admit(state.tries)
        case Stage.QUEUED:
            return Reserve()
        case Stage.PREPARING:
            return Prepare(state.tries)
        case Stage.STARTING:
            return Start(state.run, state.must_look, state.tries)
        case Stage.RUNNING:
            return Watch(state.run)
        case Stage.STOPPING:
            return Stop(state.run, limits.stop_grace_seconds, state.tries)
        case Stage.COLLECTING:
            return Collect(state.end.exit_code if state.end else None, state.tries)
        case Stage.CLEANING:
            return Clean(state.tries)
        case _:
            return None


def timer(execution: Execution, state: RunnerState, limits: Limits) -> Instant | None:
    """When `TimerDue` is to be sent; None for never."""
    if state.due is not None:
        return state.due
    if state.stage is Stage.QUEUED and not state.needs_contact:
        return state.since.plus(limits.capacity_wait_seconds)
    timeout = execution.spec.task.timeouts.execution_timeout
    if state.stage is Stage.RUNNING and state.run_since is not None and timeout:
        return state.run_since.plus(timeout + limits.timeout_margin_seconds)
    return None


def seconds_until(due: Instant, now: Instant) -> float:
    """How long until `due`, not below 0; 0 if the machine was booted since it was set."""
    return max(0.0, due.mono - now.mono) if due.boot == now.boot else 0.0
