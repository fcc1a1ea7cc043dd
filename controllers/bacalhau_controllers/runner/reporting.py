"""What others are told of an execution: its report, derived from the runner's state."""

from bacalhau_api.meta import Waiting
from bacalhau_api.v1.execution import Execution, Phase
from bacalhau_api.wire import Fact
from bacalhau_controllers.runner.duties import Case, timer
from bacalhau_controllers.runner.state import RunnerState, Stage


def with_report(case: Case, old: RunnerState, new: RunnerState) -> RunnerState:
    """Bring the report's `waiting` and `step` up to date."""
    if new.stage in (Stage.CLEANING, Stage.GONE):
        return new
    report = new.report
    if report.phase is not Phase.PENDING:
        report = report.but(waiting=None if report.phase.is_final else waiting_of(case, new))
    if report == old.report:
        return new
    return new.but(report=report.but(step=max(report.step, old.report.step) + 1))


def waiting_of(case: Case, state: RunnerState) -> Waiting:
    """Why it is not further, and until when."""
    limits, spec = case.limits, case.spec
    mover = f"node {spec.node}"

    def waiting(what: str, message: str = "", seconds: float | None = None) -> Waiting:
        until = None if seconds is None else state.since.plus(seconds).wall
        return Waiting(
            what=what,
            message=state.detail or message,
            since=state.since.wall,
            until=until,
            mover=mover,
        )

    if state.needs_contact and not state.stage.is_over:
        message = "after a reboot, its disconnect policy `stop` forbids to start it unheard"
        seconds = spec.local_deadline_seconds
        return waiting("Contact", message, seconds).but(mover="orchestrator")
    match state.stage:
        case Stage.ADMITTING:
            each = limits.start_try_seconds + limits.retry_seconds_max
            return waiting("Admission", seconds=limits.admit_tries_max * each)
        case Stage.QUEUED:
            return waiting("Capacity", "other executions use it", limits.capacity_wait_seconds)
        case Stage.PREPARING:
            each = limits.prepare_try_seconds + limits.retry_seconds_max
            return waiting("Inputs", seconds=limits.prepare_tries_max * each)
        case Stage.STARTING:
            each = 2 * limits.start_try_seconds + limits.retry_seconds_max
            return waiting("Start", seconds=limits.start_tries_max * each)
        case Stage.RESTARTING:
            until = state.due.wall if state.due else None
            return waiting("Restart").but(until=until)
        case Stage.STOPPING:
            each = limits.stop_grace_seconds + limits.stop_margin_seconds
            each += limits.retry_seconds_max
            return waiting("Stop", seconds=limits.stop_tries_max * each)
        case Stage.COLLECTING:
            each = limits.collect_try_seconds + limits.retry_seconds_max
            return waiting("Outputs", seconds=limits.collect_tries_max * each)
    if state.detail:
        return waiting("Engine")
    timeout = spec.task.timeouts.execution_timeout
    due = timer(case.execution, state, limits) if timeout else None
    return waiting("Workload").but(mover="workload", until=due.wall if due else None)


def execution_fact(execution: Execution, state: RunnerState) -> Fact:
    """The news of an execution, to be numbered by the writer."""
    return Fact(
        seq=0,
        namespace=execution.metadata.namespace,
        name=execution.name,
        uid=execution.metadata.uid,
        execution=state.report,
    )
