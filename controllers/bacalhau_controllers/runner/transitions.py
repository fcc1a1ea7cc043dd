"""How one event changes the state of one execution: a function per kind of event.

Which of them applies in which stage is said by the table in `machine.py`, which also brings the
report up to date; so a function here need not think of `waiting` and `step`.
"""

from typing import Any

from bacalhau_api.v1.execution import Phase
from bacalhau_controllers.runner.duties import Case, seconds_until, timer
from bacalhau_controllers.runner.ports import DISCONNECTED, Collected, Observation, RunPhase
from bacalhau_controllers.runner.state import (
    LEDGER_LOST,
    AdmitFailed,
    Admitted,
    AgentStarted,
    Cleaned,
    CleanFailed,
    CollectDone,
    CollectFailed,
    Contradicted,
    CutOff,
    Denied,
    Disowned,
    End,
    EngineGone,
    Exited,
    Fetching,
    Halted,
    Instant,
    LinkUp,
    OutputsDropped,
    Prepared,
    PrepareFailed,
    Reassigned,
    Reserved,
    RunnerState,
    Stage,
    Started,
    StartFailed,
    StopDone,
    StopFailed,
    StopRequested,
    TimerDue,
    Unassigned,
    backoff_seconds,
    words,
)

# -- from assignment to start ----------------------------------------------------------------------


def admitted(case: Case, state: RunnerState, event: Admitted) -> RunnerState:
    report = state.report.but(phase=Phase.PREPARING)
    return _enter(case, state, Stage.QUEUED, report=report)


def denied(case: Case, state: RunnerState, event: Denied) -> RunnerState:
    phase = Phase.FAILED if event.is_system_fault else Phase.REJECTED
    end = End(
        phase=phase,
        reason=event.reason,
        message=words(event.message),
        is_system_fault=event.is_system_fault,
    )
    return _done(case, state, end)


def admit_failed(case: Case, state: RunnerState, event: AdmitFailed) -> RunnerState:
    if state.tries + 1 < case.limits.admit_tries_max:
        return _retry(case, state, event.message)
    end = _fault("AdmissionFault", f"the node could not decide whether to run it: {event.message}")
    return _done(case, state, end)


def reserved(case: Case, state: RunnerState, event: Reserved) -> RunnerState:
    return _enter(case, state, Stage.PREPARING)


def capacity_wait_over(case: Case, state: RunnerState, event: TimerDue) -> RunnerState:
    due = state.since.plus(case.limits.capacity_wait_seconds)
    if state.needs_contact or seconds_until(due, case.now) > 0:
        return state
    waited = f"{case.limits.capacity_wait_seconds:.0f} s"
    message = f"the node had not enough free capacity for {waited}"
    return _done(case, state, End(phase=Phase.REJECTED, reason="Capacity", message=message))


def prepared(case: Case, state: RunnerState, event: Prepared) -> RunnerState:
    pins = dict(event.pins)
    report = state.report.but(prepared_at=case.now.wall, pins=pins)
    return _start_next(case, state.but(inputs=event.inputs, pins=pins, report=report))


def fetching(case: Case, state: RunnerState, event: Fetching) -> RunnerState:
    return state.but(detail=event.message)


def prepare_failed(case: Case, state: RunnerState, event: PrepareFailed) -> RunnerState:
    if event.is_transient and state.tries + 1 < case.limits.prepare_tries_max:
        return _retry(case, state, event.message)
    end = End(
        phase=Phase.FAILED,
        reason=event.reason,
        message=words(event.message),
        is_system_fault=event.is_transient,
    )
    return _done(case, state, end)


def _start_next(case: Case, state: RunnerState, event: object = None) -> RunnerState:
    return _enter(case, state, Stage.STARTING, run=state.run + 1, must_look=False, run_since=None)


def started(case: Case, state: RunnerState, event: Started) -> RunnerState:
    return _mark_started(case, state) if event.run == state.run else state


def _mark_started(case: Case, state: RunnerState) -> RunnerState:
    report = state.report.but(
        phase=Phase.RUNNING,
        run=state.run,
        started_at=state.report.started_at or case.now.wall,
    )
    return _enter(case, state, Stage.RUNNING, must_look=False, run_since=case.now, report=report)


def start_failed(case: Case, state: RunnerState, event: StartFailed) -> RunnerState:
    if event.run != state.run:
        return state
    if not event.is_transient:
        end = End(
            phase=Phase.FAILED,
            reason=event.reason,
            message=words(event.message),
            finished_at=case.now.wall,
        )
        return _enter(case, state, Stage.COLLECTING, end=end)
    if state.tries + 1 < case.limits.start_tries_max:
        return _retry(case, state, event.message, must_look=True)
    # Nobody knows whether it runs: it is ended like one that does.
    end = _fault(event.reason, f"the engine did not start it: {event.message}")
    return _enter(case, state, Stage.STOPPING, end=end)


# -- a run and its end -----------------------------------------------------------------------------


def exited(case: Case, state: RunnerState, event: Exited) -> RunnerState:
    if event.run != state.run:
        return state
    return _ended(case, state, event.observation)


def _ended(case: Case, state: RunnerState, seen: Observation) -> RunnerState:
    """A run that should be running is not."""
    if seen.phase is RunPhase.RUNNING:
        return state
    if state.stage is Stage.STARTING:
        state = _mark_started(case, state)
    if seen.phase is not RunPhase.EXITED:
        return _interrupted(case, state, seen)
    end = _end_of(seen, case.now)
    if end.phase is Phase.STOPPED:
        return _enter(case, state, Stage.COLLECTING, end=end)
    policy = case.spec.restart.policy
    is_failure = end.phase is not Phase.SUCCEEDED
    if case.is_long_running and (policy == "always" or (policy == "onFailure" and is_failure)):
        why = end.message or "it ended with exit code 0"
        return _restart(case, state, why)
    return _enter(case, state, Stage.COLLECTING, end=end)


def _interrupted(case: Case, state: RunnerState, seen: Observation) -> RunnerState:
    """The run is gone and nobody saw how it ended: reboot, killed engine, removed by hand."""
    why = "its run was cut short by a fault of the node"
    if seen.message:
        why += f": {seen.message}"
    if not case.is_long_running and case.spec.restart.interrupted == "restart":
        if state.interruptions >= case.limits.interruptions_max:
            why = f"interrupted {state.interruptions + 1} times; the last time {why}"
            end = _fault("Interrupted", why).but(finished_at=case.now.wall)
            return _enter(case, state, Stage.COLLECTING, end=end)
        state = state.but(interruptions=state.interruptions + 1)
    return _run_again_or_end(case, state, why)


def halted(case: Case, state: RunnerState, event: Halted) -> RunnerState:
    """Ended by an orderly shutdown: goes on after the next start, as often as that happens."""
    if state.stage is Stage.STARTING:
        state = _mark_started(case, state)
    return _run_again_or_end(case, state, "the node was shut down")


def _run_again_or_end(case: Case, state: RunnerState, why: str) -> RunnerState:
    policy = case.spec.restart
    may_restart = (
        policy.policy != "never" if case.is_long_running else policy.interrupted == "restart"
    )
    if may_restart:
        return _restart(case, state, why)
    end = _fault("Interrupted", why).but(finished_at=case.now.wall)
    return _enter(case, state, Stage.COLLECTING, end=end)


def _restart(case: Case, state: RunnerState, why: str) -> RunnerState:
    policy = case.spec.restart
    lasted = state.run_since.elapsed(case.now) if state.run_since else None
    is_stable = lasted is None or lasted >= max(
        case.limits.stable_seconds, policy.backoff_seconds_max
    )
    restarts = 1 if is_stable else state.restarts + 1
    wait = backoff_seconds(
        policy.backoff_seconds,
        policy.backoff_seconds_max,
        restarts,
        f"{case.execution.metadata.uid}/{state.run}",
    )
    state = _enter(case, state, Stage.RESTARTING, restarts=restarts, run_since=None)
    return state.but(due=case.now.plus(wait), detail=words(why))


def restart_due(case: Case, state: RunnerState, event: TimerDue) -> RunnerState:
    if state.due is not None and seconds_until(state.due, case.now) > 0:
        return state
    if state.needs_contact:  # `_link_up` goes on from here
        return state.but(due=None)
    return _start_next(case, state)


def timeout_due(case: Case, state: RunnerState, event: TimerDue) -> RunnerState:
    due = timer(case.execution, state, case.limits)
    if due is None or seconds_until(due, case.now) > 0:
        return state
    seconds = case.spec.task.timeouts.execution_timeout
    end = End(phase=Phase.FAILED, reason="Timeout", message=f"it ran longer than {seconds} s")
    return _enter(case, state, Stage.STOPPING, end=end)


def engine_gone(case: Case, state: RunnerState, event: EngineGone) -> RunnerState:
    return state.but(detail=words(event.message))


# -- being stopped ---------------------------------------------------------------------------------


def stop_requested(case: Case, state: RunnerState, event: StopRequested) -> RunnerState:
    return _stop(case, state, End(phase=Phase.STOPPED, reason=event.reason or "Stopped"))


def cut_off(case: Case, state: RunnerState, event: CutOff) -> RunnerState:
    end = End(phase=Phase.STOPPED, reason=DISCONNECTED, message=words(event.message))
    return _stop(case, state, end)


def disowned(case: Case, state: RunnerState, event: Disowned) -> RunnerState:
    report = state.report.but(step=max(state.report.step, event.step))
    end = _fault(
        LEDGER_LOST,
        "the node's ledger is an older copy: it had already gone further than it knows",
    )
    return _stop(case, state.but(report=report), end)


def contradicted(case: Case, state: RunnerState, event: Contradicted) -> RunnerState:
    if state.report.step > event.step:
        return state  # it has something newer to say by now
    return state.but(report=state.report.but(step=event.step + 1))


def unassigned(case: Case, state: RunnerState, event: Unassigned) -> RunnerState:
    if state.stage in (Stage.STARTING, Stage.RUNNING):
        end = End(phase=Phase.STOPPED, reason="Unassigned")
        return _enter(case, state, Stage.STOPPING, end=end, is_assigned=False)
    if state.stage is Stage.STOPPING:
        return state.but(is_assigned=False)
    return _enter(case, state, Stage.CLEANING, end=None, is_assigned=False)


def reassigned(case: Case, state: RunnerState, event: Reassigned) -> RunnerState:
    return state.but(is_assigned=True)


def _stop(case: Case, state: RunnerState, end: End) -> RunnerState:
    """End it, wherever it is on its way."""
    if state.stage in (Stage.STARTING, Stage.RUNNING):
        return _enter(case, state, Stage.STOPPING, end=end)
    if case.spec.local_deadline_seconds is not None:
        # Another attempt may follow at once, and the ledger may be an old copy that knows of less
        # than was started: the engine has the last word on what runs.
        return _enter(case, state, Stage.STOPPING, end=end, run=max(state.run, 1))
    end = end.but(finished_at=case.now.wall)
    if state.stage is Stage.RESTARTING:
        return _enter(case, state, Stage.COLLECTING, end=end)
    return _done(case, state, end)


def stop_done(case: Case, state: RunnerState, event: StopDone | Exited) -> RunnerState:
    return _over(case, state, event.observation) if event.run == state.run else state


def _over(case: Case, state: RunnerState, seen: Observation) -> RunnerState:
    """The run that was to be stopped does not run."""
    if seen.phase is RunPhase.RUNNING:
        return state
    if not state.is_assigned:
        return _enter(case, state, Stage.CLEANING, end=None)
    end = state.end or End(phase=Phase.STOPPED, reason="Stopped")
    end = end.but(exit_code=seen.exit_code, finished_at=seen.finished_at or case.now.wall)
    if seen.phase is RunPhase.ABSENT and not state.report.run:
        return _done(case, state, end)  # nothing ever ran, so there is nothing to sum up
    if (
        not case.is_long_running
        and seen.phase is RunPhase.EXITED
        and seen.finished_at is not None
        and seen.finished_at < state.since.wall
        and end.reason != LEDGER_LOST
    ):
        # It had ended by itself before anybody asked for a stop: what is finished counts.
        end = _end_of(seen, case.now)
    return _enter(case, state, Stage.COLLECTING, end=end)


def stop_failed(case: Case, state: RunnerState, event: StopFailed) -> RunnerState:
    if event.run != state.run:
        return state
    # The policy `stop` promises that no second attempt runs at the same time, so that a stop
    # that was not confirmed may not be reported as one. Nor is there a hurry without a report.
    is_strict = case.spec.local_deadline_seconds is not None or not state.is_assigned
    if is_strict or state.tries + 1 < case.limits.stop_tries_max or state.end is None:
        return _retry(case, state, event.message)
    note = f"the engine did not confirm that it stopped: {event.message}"
    message = f"{state.end.message}; {note}" if state.end.message else note
    end = state.end.but(message=words(message), finished_at=case.now.wall)
    return _enter(case, state, Stage.COLLECTING, end=end)


# -- after the last run ----------------------------------------------------------------------------


def collect_done(case: Case, state: RunnerState, event: CollectDone) -> RunnerState:
    end = state.end or _fault("Internal", "it ended without a reason")
    return _done(case, state, end, event.collected)


def collect_failed(case: Case, state: RunnerState, event: CollectFailed) -> RunnerState:
    if event.is_transient and state.tries + 1 < case.limits.collect_tries_max:
        return _retry(case, state, event.message)
    end = state.end or _fault("Internal", "it ended without a reason")
    if end.phase is Phase.SUCCEEDED:
        end = end.but(
            phase=Phase.FAILED,
            reason=event.reason,
            message=words(event.message),
            is_system_fault=event.is_transient,
        )
    else:
        note = f"its outputs could not be summed up: {event.message}"
        end = end.but(message=words(f"{end.message}; {note}" if end.message else note))
    return _done(case, state, end).but(has_outputs=True)


def cleaned(case: Case, state: RunnerState, event: Cleaned) -> RunnerState:
    return _enter(case, state, Stage.GONE)


def clean_failed(case: Case, state: RunnerState, event: CleanFailed) -> RunnerState:
    return _retry(case, state, event.message)


def outputs_dropped(case: Case, state: RunnerState, event: OutputsDropped) -> RunnerState:
    return state.but(has_outputs=False)


# -- the agent's own life --------------------------------------------------------------------------


def retry_due(case: Case, state: RunnerState, event: TimerDue) -> RunnerState:
    if state.due is None or seconds_until(state.due, case.now) > 0:
        return state
    return state.but(due=None)


def link_up(case: Case, state: RunnerState, event: LinkUp) -> RunnerState:
    state = state.but(needs_contact=False)
    if state.stage is Stage.RESTARTING and state.due is None:
        return _start_next(case, state)
    return state


def agent_started(case: Case, state: RunnerState, event: AgentStarted) -> RunnerState:
    if state.since.boot != case.now.boot:
        state = _after_boot(case, state)
    seen = event.found
    if state.stage is Stage.STOPPING:
        return state if seen is None else _over(case, state, seen)
    if state.stage is Stage.STARTING:
        if seen is None or seen.phase is RunPhase.ABSENT:
            return state.but(must_look=seen is None)
        if seen.phase is RunPhase.RUNNING:
            return _mark_started(case, state)
    if state.stage in (Stage.STARTING, Stage.RUNNING):
        return state if seen is None else _ended(case, state.but(detail=""), seen)
    return state


def _after_boot(case: Case, state: RunnerState) -> RunnerState:
    """Moments of an earlier boot cannot be compared with present ones: waits begin anew, retries
    are due now. How long the node was off is not known either (a clock without battery forgets),
    so with the policy `stop` nothing starts again before the orchestrator has been heard. Nor is it
    known how long a run lasted: that the power failed is not held against it."""
    is_stopping = state.stage is Stage.STOPPING  # when that was decided says what ended before it
    return state.but(
        since=state.since if is_stopping else case.now,
        due=case.now if state.due is not None else None,
        run_since=case.now if state.run_since is not None else None,
        restarts=state.restarts if state.run_since is None else 0,
        needs_contact=case.spec.local_deadline_seconds is not None
        and not state.stage.is_over
        and not is_stopping,
    )


# -- small parts -----------------------------------------------------------------------------------


def _enter(case: Case, state: RunnerState, stage: Stage, **changes: Any) -> RunnerState:
    fresh = {"stage": stage, "since": case.now, "due": None, "tries": 0, "detail": ""}
    if stage.is_over or stage is Stage.STOPPING:
        fresh["needs_contact"] = False
    return state.but(**fresh, **changes)


def _retry(case: Case, state: RunnerState, why: str, **changes: Any) -> RunnerState:
    tries = state.tries + 1
    key = f"{case.execution.metadata.uid}/{state.stage}/{state.run}"
    wait = backoff_seconds(case.limits.retry_seconds, case.limits.retry_seconds_max, tries, key)
    return state.but(tries=tries, due=case.now.plus(wait), detail=words(why), **changes)


def _fault(reason: str, message: str) -> End:
    return End(phase=Phase.FAILED, reason=reason, message=words(message), is_system_fault=True)


def _end_of(seen: Observation, now: Instant) -> End:
    """How a run that ended by itself ended. One that was on a leash was stopped by it."""
    if seen.reason == DISCONNECTED:
        return End(
            phase=Phase.STOPPED,
            reason=DISCONNECTED,
            message=words(seen.message),
            exit_code=seen.exit_code,
            finished_at=seen.finished_at or now.wall,
        )
    is_success = seen.exit_code == 0 and not seen.reason
    if is_success:
        reason = ""
    elif seen.reason:
        reason = seen.reason
    else:
        reason = "EngineFault" if seen.exit_code is None else "ExitCode"
    message = seen.message
    if not message and not is_success:
        message = (
            "the engine does not know its exit code"
            if seen.exit_code is None
            else f"exit code {seen.exit_code}"
        )
    return End(
        phase=Phase.SUCCEEDED if is_success else Phase.FAILED,
        reason=reason,
        message=words(message),
        is_system_fault=seen.is_system_fault or (not seen.reason and seen.exit_code is None),
        exit_code=seen.exit_code,
        finished_at=seen.finished_at or now.wall,
    )


def _done(
    case: Case, state: RunnerState, end: End, collected: Collected | None = None
) -> RunnerState:
    report = state.report.but(
        phase=end.phase,
        reason=end.reason,
        message=end.message,
        is_system_fault=end.is_system_fault,
        exit_code=end.exit_code,
        finished_at=end.finished_at or case.now.wall,
        outputs=collected.outputs if collected else None,
        stdout_tail=collected.stdout_tail if collected else "",
        stderr_tail=collected.stderr_tail if collected else "",
    )
    return _enter(
        case, state, Stage.DONE, end=None, has_outputs=collected is not None, report=report
    )
