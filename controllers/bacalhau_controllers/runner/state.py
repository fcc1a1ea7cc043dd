"""What the runner knows of one execution, what can happen to it, and what it may be asked to do.

`machine.py` holds the transitions between these states. The state is stored as JSON in the ledger,
so a field may be added with a default, but never renamed or given another meaning.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Final

from pydantic import Field

from bacalhau_api.base import Model, Timestamp
from bacalhau_api.v1.execution import Execution, Phase, Report
from bacalhau_controllers.runner.ports import Collected, Observation

LEDGER_LOST: Final = "LedgerLost"
"""Reason of an end that follows from a ledger that knows less than it once did."""

WORDS_MAX: Final = 1024
"""Characters of an error's words that go into a report; the rest is in the node's log."""


class Instant(Model):
    """One moment by both clocks. Elapsed time is told by the monotonic one, so that setting the
    wall clock makes no timeout early or late; it counts from the boot named by `boot`."""

    wall: Timestamp
    mono: float
    boot: str

    def elapsed(self, now: "Instant") -> float | None:
        """Seconds from this moment to `now`; None if the machine was booted in between."""
        return now.mono - self.mono if self.boot == now.boot else None

    def plus(self, seconds: float) -> "Instant":
        """The moment so many seconds later."""
        return Instant(
            wall=self.wall + timedelta(seconds=seconds), mono=self.mono + seconds, boot=self.boot
        )


class Stage(StrEnum):
    """Where an execution is on this node. Finer than Phase, which is what others are told."""

    ADMITTING = "Admitting"  # may it run here at all?
    QUEUED = "Queued"  # it may, once capacity is free
    PREPARING = "Preparing"  # inputs are being brought
    STARTING = "Starting"  # run `run` was decided upon; it may or may not exist in the engine
    RUNNING = "Running"  # the engine took run `run`
    RESTARTING = "Restarting"  # run `run` is over, another is due
    STOPPING = "Stopping"  # run `run` is being ended; `end` says why
    COLLECTING = "Collecting"  # no run exists; outputs are being summed up for `end`
    DONE = "Done"  # reported for good; outputs are kept
    CLEANING = "Cleaning"  # not wanted any more; everything is being removed
    GONE = "Gone"  # nothing is left: the record can be dropped

    @property
    def holds_capacity(self) -> bool:
        """True while it counts against what the node has."""
        return self in _HOLDING

    @property
    def may_run(self) -> bool:
        """True while run `run` may exist in the engine and is accounted for."""
        return self in (Stage.STARTING, Stage.RUNNING, Stage.STOPPING)

    @property
    def is_over(self) -> bool:
        """True once nothing runs or will run any more."""
        return self in _OVER


_HOLDING = frozenset(
    {Stage.PREPARING, Stage.STARTING, Stage.RUNNING, Stage.RESTARTING, Stage.STOPPING}
)
_OVER = frozenset({Stage.COLLECTING, Stage.DONE, Stage.CLEANING, Stage.GONE})


class InputMount(Model):
    """An input that is ready, so that a later run needs not bring it again."""

    source: str
    target: str
    read_only: bool


class End(Model):
    """How an execution ended or is to end."""

    phase: Phase
    reason: str = ""
    message: str = ""
    is_system_fault: bool = False
    exit_code: int | None = None
    finished_at: Timestamp | None = None


class RunnerState(Model):
    """All that must survive a crash of the agent, for one execution.

    `due` is set while it waits to try something again; `tries` counts what was tried in this
    stage and failed. `report` is the last word about it; its `step` grows with each change.
    """

    stage: Stage
    since: Instant
    due: Instant | None = None
    tries: int = 0
    detail: str = Field(default="", description="The last thing that went wrong in this stage.")
    run: int = Field(default=0, description="Runs decided upon, the present one included.")
    run_since: Instant | None = None
    must_look: bool = Field(default=False, description="The run may exist: look before starting.")
    restarts: int = Field(default=0, description="Ends of runs in a row that backoff counts.")
    interruptions: int = Field(default=0, description="Runs that were cut by a fault of the node.")
    inputs: tuple[InputMount, ...] = ()
    pins: dict[str, str] = Field(
        default_factory=dict, description="What the engine resolved references to, for every run."
    )
    end: End | None = None
    is_assigned: bool = True
    needs_contact: bool = Field(
        default=False, description="Must hear from the orchestrator before anything starts."
    )
    has_outputs: bool = True
    report: Report


@dataclass(frozen=True, slots=True)
class Limits:
    """How often and how long the runner tries, in seconds where it says so. A test may shrink
    them; an operator rarely has to."""

    admit_tries_max: int = 5
    capacity_wait_seconds: float = 600.0
    prepare_tries_max: int = 6
    prepare_try_seconds: float = 3600.0
    start_tries_max: int = 4
    start_try_seconds: float = 60.0
    stop_tries_max: int = 5
    stop_grace_seconds: float = 10.0
    stop_margin_seconds: float = 30.0
    collect_tries_max: int = 5
    collect_try_seconds: float = 6 * 3600.0
    """Outputs are read as a whole, and may be a terabyte on a slow disk."""
    interruptions_max: int = 3
    timeout_margin_seconds: float = 10.0
    """The engine enforces the execution's timeout; the runner steps in so much later."""
    retry_seconds: float = 1.0
    retry_seconds_max: float = 60.0
    stable_seconds: float = 60.0
    """A run that lasted longer makes the restart backoff begin anew (or the backoff's own cap,
    if that is longer)."""


# -- events: what happened ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Admitted:
    """The node's policy lets it run."""


@dataclass(frozen=True, slots=True)
class Denied:
    """The node's policy does not (Rejected), or the node cannot now (`is_system_fault`)."""

    reason: str
    message: str
    is_system_fault: bool = False


@dataclass(frozen=True, slots=True)
class AdmitFailed:
    """The policy could not be asked."""

    message: str


@dataclass(frozen=True, slots=True)
class Reserved:
    """Capacity was set aside."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """All inputs are here."""

    inputs: tuple[InputMount, ...] = ()
    pins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fetching:
    """The inputs are on their way; `message` says how far."""

    message: str


@dataclass(frozen=True, slots=True)
class PrepareFailed:
    """An input is not here; worth another try if `is_transient`."""

    is_transient: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Started:
    """The engine took the run."""

    run: int


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The engine did not take the run, or nobody knows (`is_transient`)."""

    run: int
    is_transient: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Exited:
    """The run is not running: it ended, vanished, or is unknown to the engine."""

    run: int
    observation: Observation


@dataclass(frozen=True, slots=True)
class EngineGone:
    """The engine does not answer about a run. It may well go on."""

    message: str


@dataclass(frozen=True, slots=True)
class StopDone:
    """The run was ended, by us or before."""

    run: int
    observation: Observation


@dataclass(frozen=True, slots=True)
class StopFailed:
    """The run could not be ended, or nobody knows."""

    run: int
    message: str


@dataclass(frozen=True, slots=True)
class CollectDone:
    """The outputs are summed up."""

    collected: Collected


@dataclass(frozen=True, slots=True)
class CollectFailed:
    """The outputs could not be summed up; worth another try if `is_transient`."""

    is_transient: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Cleaned:
    """Nothing of it is left on the node."""


@dataclass(frozen=True, slots=True)
class CleanFailed:
    """Something of it is left on the node."""

    message: str


@dataclass(frozen=True, slots=True)
class OutputsDropped:
    """Retention removed the outputs."""


@dataclass(frozen=True, slots=True)
class TimerDue:
    """The moment named by `machine.timer` has come."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The orchestrator wants it stopped."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Unassigned:
    """Nobody wants it any more: stop it, report nothing, remove everything."""


@dataclass(frozen=True, slots=True)
class Reassigned:
    """It is wanted after all."""


@dataclass(frozen=True, slots=True)
class CutOff:
    """The node was cut off for longer than the execution's disconnect policy allows."""

    message: str = ""


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The orchestrator was heard, and still wants it."""


@dataclass(frozen=True, slots=True)
class Disowned:
    """The orchestrator holds a newer report (number `step`) from this very ledger: the ledger is
    an old copy, and what it says of this execution is not true any more."""

    step: int


@dataclass(frozen=True, slots=True)
class Contradicted:
    """The orchestrator holds another report with the number of the present one, `step`: for a while
    two agents went on from one ledger. What this one says is to be told as something newer."""

    step: int


@dataclass(frozen=True, slots=True)
class Halted:
    """The node is being shut down, and what runs on it is about to be ended with it."""


@dataclass(frozen=True, slots=True)
class AgentStarted:
    """The agent began to run, from what the ledger holds. `found` is what the engine says of the
    present run; None if it was not asked or did not answer."""

    found: Observation | None = None


Event = (
    Admitted | Denied | AdmitFailed | Reserved | Prepared | PrepareFailed | Started | StartFailed
    | Exited | EngineGone | StopDone | StopFailed | CollectDone | CollectFailed | Cleaned
    | CleanFailed | OutputsDropped | TimerDue | StopRequested | Unassigned | Reassigned | CutOff
    | LinkUp | Disowned | Contradicted | Halted | AgentStarted | Fetching
)  # fmt: skip


# -- instructions: what to do ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Admit:
    """Ask the node's policy. `tries` makes a repeated instruction a new one, here and below."""

    tries: int = 0


@dataclass(frozen=True, slots=True)
class Reserve:
    """Set capacity aside, as soon as there is some."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """Bring the inputs."""

    tries: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """Start run `run`. If `must_look`, it may exist already."""

    run: int
    must_look: bool
    tries: int = 0


@dataclass(frozen=True, slots=True)
class Watch:
    """Tell when run `run` is not running any more."""

    run: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End run `run`; under the policy `stop` also any after it that this ledger does not know."""

    run: int
    grace_seconds: float
    tries: int = 0


@dataclass(frozen=True, slots=True)
class Collect:
    """Sum up the outputs."""

    exit_code: int | None
    tries: int = 0


@dataclass(frozen=True, slots=True)
class Clean:
    """Remove everything from engine and disk."""

    tries: int = 0


Instruction = Admit | Reserve | Prepare | Start | Watch | Stop | Collect | Clean


# -- small parts -----------------------------------------------------------------------------------


def workload_id(execution: Execution, run: int) -> str:
    """What the engine knows a run by."""
    return f"{execution.name}.{run}"


def split_workload_id(run_id: str) -> tuple[str, int] | None:
    """Execution name and run number; None if it is no id of ours."""
    name, dot, number = run_id.rpartition(".")
    return (name, int(number)) if dot and number.isascii() and number.isdigit() else None


def backoff_seconds(base: float, cap: float, attempt: int, key: str) -> float:
    """The wait before try `attempt` (from 1): doubled each time up to `cap`, spread by a quarter
    to both sides by a hash of `key`, so that equal failures do not come back in step and a
    simulation repeats itself."""
    if base <= 0:
        return 0.0
    digest = hashlib.sha256(f"{key}/{attempt}".encode()).digest()
    spread = 0.75 + int.from_bytes(digest[:4], "big") / 2**33
    return min(cap, base * 2.0 ** min(attempt - 1, 40) * spread)


def words(text: str) -> str:
    """An error's words, short enough for a report."""
    return text if len(text) <= WORDS_MAX else text[: WORDS_MAX - 1] + "…"


def new_state(incarnation: str, now: Instant) -> RunnerState:
    """The state of an execution that was just assigned."""
    report = Report(step=0, incarnation=incarnation, phase=Phase.PENDING)
    return RunnerState(stage=Stage.ADMITTING, since=now, report=report)


_LEDGER_LOST_MESSAGE: Final = (
    "the node lost its ledger (wiped, replaced or restored from an old copy) after it had begun "
    "this execution"
)


def lost_state(execution: Execution, incarnation: str, now: Instant) -> RunnerState:
    """The state of an execution that an earlier ledger of this node reported about: what became
    of it is not known, so it is not started again here.

    What may still run of it is removed in time. Under the policy `stop` its end is not reported
    before that, since another attempt follows.
    """
    told = execution.status.report
    if told is not None and execution.spec.local_deadline_seconds is not None:
        run = max(told.run, 1)
        return RunnerState(
            stage=Stage.STOPPING,
            since=now,
            run=run,
            end=End(
                phase=Phase.FAILED,
                reason=LEDGER_LOST,
                message=_LEDGER_LOST_MESSAGE,
                is_system_fault=True,
            ),
            report=told.but(incarnation=incarnation, step=told.step + 1),
        )
    report = Report(
        step=told.step + 1 if told else 1,
        incarnation=incarnation,
        phase=Phase.FAILED,
        run=told.run if told else 0,
        reason=LEDGER_LOST,
        message=_LEDGER_LOST_MESSAGE,
        is_system_fault=True,
        prepared_at=told.prepared_at if told else None,
        started_at=told.started_at if told else None,
        finished_at=now.wall,
    )
    return RunnerState(stage=Stage.DONE, since=now, has_outputs=False, report=report)
