"""The runner as a pure state machine: one execution, from its assignment until nothing is left.

`step` takes what happened and says what is true now and what is to be done about it. Every pair
of stage and event is either in `TRANSITIONS` or in `IGNORED`. Doing it, and telling the
orchestrator, are left to `worker.py` and `agent.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from bacalhau_api.v1.execution import Execution, Phase
from bacalhau_controllers.runner import transitions as on
from bacalhau_controllers.runner.duties import Case, duty
from bacalhau_controllers.runner.reporting import with_report
from bacalhau_controllers.runner.state import (
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
    EngineGone,
    Event,
    Exited,
    Fetching,
    Halted,
    Instant,
    Instruction,
    Limits,
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
)

Handler = Callable[[Case, RunnerState, Any], RunnerState]


@dataclass(frozen=True, slots=True)
class Step:
    """What an event led to. `instruction` is set where there is something new to do; what was
    being done before is to be given up. With `is_intent` the state must be in the ledger before
    the instruction is begun. `has_news` says that the report changed and is to be told."""

    state: RunnerState
    instruction: Instruction | None
    is_intent: bool
    has_news: bool


def step(
    execution: Execution, state: RunnerState, event: Event, now: Instant, limits: Limits
) -> Step:
    """Apply one event."""
    handler = TRANSITIONS.get((state.stage, type(event)))
    if handler is None:
        return Step(state, None, is_intent=False, has_news=False)
    case = Case(execution, now, limits)
    new = with_report(case, state, handler(case, state, event))
    todo = duty(new, limits)
    is_resumed = isinstance(event, AgentStarted)
    return Step(
        state=new,
        instruction=todo if is_resumed or todo != duty(state, limits) else None,
        is_intent=new.stage is not state.stage and new.stage in _INTENTS,
        has_news=new.report != state.report and new.is_assigned,
    )


# What is done in these stages cannot be taken back, or could not be explained by what a restarted
# agent would find: it is written down before it is begun.
_INTENTS: Final = frozenset({Stage.STARTING, Stage.STOPPING, Stage.DONE, Stage.CLEANING})


def check(state: RunnerState) -> tuple[str, ...]:
    """What must never be true, and is. Empty if the state is sound."""
    stage, report = state.stage, state.report
    is_leaving = stage in (Stage.CLEANING, Stage.GONE)
    rules = {
        "a finished execution has a final report": stage is not Stage.DONE or report.phase.is_final,
        "a final report belongs to a finished execution": not report.phase.is_final
        or stage is Stage.DONE
        or is_leaving,
        "a report that is told and not final says what it waits for": report.phase.is_final
        or report.phase is Phase.PENDING
        or is_leaving
        or report.waiting is not None,
        "a final report waits for nothing and says when": not report.phase.is_final
        or (report.waiting is None and report.finished_at is not None),
        "whatever may run has a number": not stage.may_run or state.run > 0,
        "a running execution is reported so": stage is not Stage.RUNNING
        or (report.phase is Phase.RUNNING and state.run_since is not None),
        "a stop or a collection has its reason": (state.end is not None)
        == (stage in (Stage.STOPPING, Stage.COLLECTING)),
        "no more runs are reported than were decided upon": report.run <= state.run
        or report.reason == "LedgerLost",
        "an execution that nobody wants is on its way out": state.is_assigned
        or stage in (Stage.STOPPING, Stage.CLEANING, Stage.GONE),
        "what is over waits for nobody": not (stage.is_over and state.needs_contact),
    }
    return tuple(rule for rule, holds in rules.items() if not holds)


# -- the tables ------------------------------------------------------------------------------------

_S = Stage
_UNTIL_OVER: Final = (
    _S.ADMITTING, _S.QUEUED, _S.PREPARING, _S.STARTING, _S.RUNNING, _S.RESTARTING,
)  # fmt: skip

TRANSITIONS: Final[dict[tuple[Stage, type[Event]], Handler]] = {
    (_S.ADMITTING, Admitted): on.admitted,
    (_S.ADMITTING, Denied): on.denied,
    (_S.ADMITTING, AdmitFailed): on.admit_failed,
    (_S.QUEUED, Reserved): on.reserved,
    (_S.QUEUED, TimerDue): on.capacity_wait_over,
    (_S.PREPARING, Prepared): on.prepared,
    (_S.PREPARING, PrepareFailed): on.prepare_failed,
    (_S.PREPARING, Fetching): on.fetching,
    (_S.STARTING, Started): on.started,
    (_S.STARTING, StartFailed): on.start_failed,
    (_S.STARTING, Exited): on.exited,
    (_S.RUNNING, Exited): on.exited,
    (_S.RUNNING, EngineGone): on.engine_gone,
    (_S.RUNNING, TimerDue): on.timeout_due,
    (_S.STARTING, Halted): on.halted,
    (_S.RUNNING, Halted): on.halted,
    (_S.RESTARTING, TimerDue): on.restart_due,
    (_S.STOPPING, StopDone): on.stop_done,
    (_S.STOPPING, Exited): on.stop_done,
    (_S.STOPPING, StopFailed): on.stop_failed,
    (_S.STOPPING, Reassigned): on.reassigned,
    (_S.COLLECTING, CollectDone): on.collect_done,
    (_S.COLLECTING, CollectFailed): on.collect_failed,
    (_S.DONE, OutputsDropped): on.outputs_dropped,
    (_S.CLEANING, Cleaned): on.cleaned,
    (_S.CLEANING, CleanFailed): on.clean_failed,
    **{(stage, StopRequested): on.stop_requested for stage in _UNTIL_OVER},
    **{(stage, CutOff): on.cut_off for stage in _UNTIL_OVER},
    **{(stage, Disowned): on.disowned for stage in _UNTIL_OVER},
    **{(stage, LinkUp): on.link_up for stage in _UNTIL_OVER},
    **{
        (stage, Contradicted): on.contradicted
        for stage in (*_UNTIL_OVER, _S.STOPPING, _S.COLLECTING)
    },
    **{
        (stage, Unassigned): on.unassigned
        for stage in (*_UNTIL_OVER, _S.STOPPING, _S.COLLECTING, _S.DONE)
    },
    **{
        (stage, TimerDue): on.retry_due
        for stage in (
            _S.ADMITTING, _S.PREPARING, _S.STARTING, _S.STOPPING, _S.COLLECTING, _S.CLEANING,
        )
    },
    **{(stage, AgentStarted): on.agent_started for stage in _S if stage is not _S.GONE},
}  # fmt: skip

# An answer that comes when the execution has moved on says nothing any more; orders that were
# obeyed before need no second obedience; and what is gone stays gone.
_LATE_ANSWERS: Final[dict[type[Event], tuple[Stage, ...]]] = {
    Admitted: (_S.ADMITTING,),
    Denied: (_S.ADMITTING,),
    AdmitFailed: (_S.ADMITTING,),
    Reserved: (_S.QUEUED,),
    Prepared: (_S.PREPARING,),
    PrepareFailed: (_S.PREPARING,),
    Fetching: (_S.PREPARING,),
    Started: (_S.STARTING,),
    StartFailed: (_S.STARTING,),
    Exited: (_S.STARTING, _S.RUNNING, _S.STOPPING),
    EngineGone: (_S.RUNNING,),
    StopDone: (_S.STOPPING,),
    StopFailed: (_S.STOPPING,),
    CollectDone: (_S.COLLECTING,),
    CollectFailed: (_S.COLLECTING,),
    Cleaned: (_S.CLEANING,),
    CleanFailed: (_S.CLEANING,),
    OutputsDropped: (_S.DONE,),
    Reassigned: (_S.STOPPING,),
    Halted: (_S.STARTING, _S.RUNNING),
}
IGNORED: Final[frozenset[tuple[Stage, type[Event]]]] = frozenset(
    [(stage, event) for event, own in _LATE_ANSWERS.items() for stage in _S if stage not in own]
    + [
        (stage, event)
        for event in (StopRequested, CutOff, Disowned, LinkUp)
        for stage in (_S.STOPPING, _S.COLLECTING, _S.DONE, _S.CLEANING, _S.GONE)
    ]
    + [(stage, Contradicted) for stage in (_S.DONE, _S.CLEANING, _S.GONE)]
    + [(stage, Unassigned) for stage in (_S.CLEANING, _S.GONE)]
    + [(stage, TimerDue) for stage in (_S.DONE, _S.GONE)]
    + [(_S.GONE, AgentStarted)]
)
