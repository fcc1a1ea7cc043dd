"""The runner's state machine: its tables are complete, and each way through it ends as it should."""

from dataclasses import dataclass
from datetime import timedelta
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bacalhau_api.v1.execution import Execution, Outputs, Phase, merge_report
from bacalhau_api.v1.job import JobType, RestartPolicy
from bacalhau_controllers.runner import machine
from bacalhau_controllers.runner.duties import duty, seconds_until, timer
from bacalhau_controllers.runner.machine import IGNORED, TRANSITIONS, check, step
from bacalhau_controllers.runner.ports import Collected, Observation, RunPhase
from bacalhau_controllers.runner.state import (
    AdmitFailed,
    Admitted,
    AgentStarted,
    Cleaned,
    CleanFailed,
    Collect,
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
    InputMount,
    Instant,
    Limits,
    LinkUp,
    OutputsDropped,
    Prepared,
    PrepareFailed,
    Reassigned,
    Reserved,
    RunnerState,
    Stage,
    Start,
    Started,
    StartFailed,
    Stop,
    StopDone,
    StopFailed,
    StopRequested,
    TimerDue,
    Unassigned,
    Watch,
    backoff_seconds,
    new_state,
)
from tests.support.runner import execution
from tests.support.simclock import EPOCH

LIMITS = Limits()
EVENTS: tuple[type[Event], ...] = get_args(Event)
RUNNING = Observation(RunPhase.RUNNING)
ABSENT = Observation(RunPhase.ABSENT)
VANISHED = Observation(RunPhase.VANISHED)
COLLECTED = Collected(Outputs(files=1, size_bytes=2, digest="sha256:x"), stdout_tail="out")


def instant(seconds: float = 0.0, boot: str = "b1") -> Instant:
    return Instant(wall=EPOCH + timedelta(seconds=seconds), mono=1000.0 + seconds, boot=boot)


def exited(code: int | None = 0, reason: str = "", at: float | None = None) -> Observation:
    when = EPOCH + timedelta(seconds=at) if at is not None else None
    return Observation(RunPhase.EXITED, exit_code=code, reason=reason, finished_at=when)


@dataclass
class Case:
    """An execution driven by hand. Time is in seconds; soundness is checked at each step."""

    of: Execution
    state: RunnerState
    time: float = 0.0
    boot: str = "b1"

    def on(self, event: Event, *, after: float = 0.0) -> machine.Step:
        self.time += after
        got = step(self.of, self.state, event, instant(self.time, self.boot), LIMITS)
        assert check(got.state) == ()
        old, new = self.state.report, got.state.report
        assert new.step >= old.step
        if new != old:
            assert merge_report(old, new) == new
        self.state = got.state
        return got

    def run(self, *events: Event) -> machine.Step:
        for event in events:
            got = self.on(event)
        return got

    def due(self) -> float:
        """Seconds until the timer; lets it fire."""
        at = timer(self.of, self.state, LIMITS)
        assert at is not None
        seconds = seconds_until(at, instant(self.time, self.boot))
        self.on(TimerDue(), after=seconds)
        return seconds


def new_case(of: Execution | None = None) -> Case:
    return Case(of or execution(), new_state("ledger-1", instant()))


def started_case(of: Execution | None = None) -> Case:
    case = new_case(of)
    case.run(Admitted(), Reserved(), Prepared(), Started(1))
    return case


def at_stage(stage: Stage, of: Execution | None = None) -> Case:
    """An execution that has come to a stage by the shortest way."""
    ways: dict[Stage, tuple[Event, ...]] = {
        Stage.ADMITTING: (),
        Stage.QUEUED: (Admitted(),),
        Stage.PREPARING: (Admitted(), Reserved()),
        Stage.STARTING: (Admitted(), Reserved(), Prepared()),
        Stage.RUNNING: (Admitted(), Reserved(), Prepared(), Started(1)),
        Stage.RESTARTING: (Admitted(), Reserved(), Prepared(), Started(1), Exited(1, VANISHED)),
        Stage.STOPPING: (Admitted(), Reserved(), Prepared(), Started(1), StopRequested()),
        Stage.COLLECTING: (Admitted(), Reserved(), Prepared(), Started(1), Exited(1, exited())),
        Stage.DONE: (Denied("Capacity", "too small"),),
        Stage.CLEANING: (Unassigned(),),
        Stage.GONE: (Unassigned(), Cleaned()),
    }
    case = new_case(of)
    for event in ways[stage]:
        case.on(event)
    assert case.state.stage is stage
    return case


# -- the tables ------------------------------------------------------------------------------------


def test_every_pair_of_stage_and_event_is_defined_or_ignored() -> None:
    pairs = {(stage, event) for stage in Stage for event in EVENTS}
    assert set(TRANSITIONS) | IGNORED == pairs
    assert not set(TRANSITIONS) & IGNORED


@pytest.mark.parametrize("stage", Stage)
def test_ignored_events_change_nothing(stage: Stage) -> None:
    for event in samples(run=1):
        case = at_stage(stage)
        if (stage, type(event)) in IGNORED:
            before = case.state
            got = case.on(event)
            assert got.state is before
            assert got.instruction is None
            assert not got.has_news


@pytest.mark.parametrize("stage", Stage)
def test_every_defined_pair_leads_to_a_sound_state(stage: Stage) -> None:
    for event in samples(run=1):
        if (stage, type(event)) in TRANSITIONS:
            at_stage(stage).on(event, after=1.0)  # checks soundness


def samples(run: int) -> list[Event]:
    """At least one event of each kind."""
    events: list[Event] = [
        Admitted(), Denied("Capacity", "no"), Denied("EngineFault", "no", True),
        AdmitFailed("no answer"), Reserved(),
        Prepared((InputMount(source="/s", target="/t", read_only=True),)),
        PrepareFailed(True, "InputUnavailable", "later"), PrepareFailed(False, "NotFound", "no"),
        Started(run), StartFailed(run, True, "EngineFault", "hung"),
        StartFailed(run, False, "StartFailed", "bad"),
        Exited(run, exited()), Exited(run, exited(3)), Exited(run, VANISHED), Exited(run, ABSENT),
        Exited(run, exited(137, "OutOfMemory")), Exited(run, exited(None)),
        EngineGone("silent"), EngineGone(""), StopDone(run, exited(143)), StopDone(run, ABSENT),
        StopFailed(run, "hung"), CollectDone(COLLECTED), CollectFailed(True, "Disk", "full"),
        CollectFailed(False, "OutputLimit", "too much"), Cleaned(), CleanFailed("busy"),
        OutputsDropped(), TimerDue(), StopRequested("UserRequest"), Unassigned(), Reassigned(),
        Fetching("3 of 9 MiB"), CutOff("60 s"), LinkUp(), Disowned(9), Contradicted(9), Halted(), AgentStarted(), AgentStarted(RUNNING),
        AgentStarted(exited(1)), AgentStarted(VANISHED), AgentStarted(ABSENT),
    ]  # fmt: skip
    assert {type(event) for event in events} == set(EVENTS)
    return events


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_history_keeps_the_state_sound_and_the_report_monotonic(data: st.DataObject) -> None:
    job_type = data.draw(st.sampled_from(list(JobType)))
    of = execution(
        job_type=job_type,
        timeout=data.draw(st.sampled_from([0, 30])),
        local_deadline=data.draw(st.sampled_from([None, 60])),
        restart=RestartPolicy(
            policy=data.draw(st.sampled_from(["always", "onFailure", "never"])),
            interrupted=data.draw(st.sampled_from(["restart", "report"])),
        ),
    )
    case = new_case(of)
    for _ in range(40):
        run = max(case.state.run - data.draw(st.sampled_from([0, 0, 0, 1])), 0)
        was_final = case.state.report if case.state.report.phase.is_final else None
        before = case.state
        got = case.on(
            data.draw(st.sampled_from(samples(run))),
            after=data.draw(st.sampled_from([0.0, 0.1, 5.0, 700.0])),
        )
        assert got.state.run - before.run in (0, 1)
        assert was_final is None or got.state.report == was_final
        if got.is_intent:
            assert got.state.stage is not before.stage
        if isinstance(got.instruction, Start):
            assert got.state.stage is Stage.STARTING
            assert got.instruction.run == got.state.run
        if data.draw(st.integers(0, 20)) == 0:
            case.boot += "x"
    assert RunnerState.decode(case.state.encode()) == case.state


@pytest.mark.parametrize("stage", Stage)
def test_an_agent_that_was_killed_goes_on_with_the_same_duty(stage: Stage) -> None:
    case = at_stage(stage)
    todo = duty(case.state, LIMITS)
    got = case.on(AgentStarted())
    if isinstance(todo, Start):
        assert got.instruction == Start(todo.run, must_look=True)
    else:
        assert got.instruction == todo


# -- the usual way ---------------------------------------------------------------------------------


def test_batch_runs_to_success() -> None:
    case = new_case(execution(results=("r",)))
    assert case.on(Admitted()).has_news
    assert case.on(Reserved()).state.stage is Stage.PREPARING
    mount = InputMount(source="/s", target="/t", read_only=True)
    got = case.on(Prepared((mount,)))
    assert got.instruction == Start(1, must_look=False)
    assert got.is_intent
    assert got.state.inputs == (mount,)
    got = case.on(Started(1), after=1)
    assert got.instruction == Watch(1)
    assert got.state.report.phase is Phase.RUNNING
    assert got.state.report.run == 1
    got = case.on(Exited(1, exited(0)), after=5)
    assert got.instruction == Collect(0)
    got = case.on(CollectDone(COLLECTED))
    assert got.is_intent
    assert got.instruction is None
    report = got.state.report
    assert report.phase is Phase.SUCCEEDED
    assert report.exit_code == 0
    assert report.outputs == COLLECTED.outputs
    assert report.stdout_tail == "out"
    assert report.waiting is None
    assert report.started_at == EPOCH + timedelta(seconds=1)
    assert report.finished_at == EPOCH + timedelta(seconds=6)


@pytest.mark.parametrize(
    ("seen", "reason", "is_system_fault"),
    [
        pytest.param(exited(3), "ExitCode", False, id="exit code"),
        pytest.param(exited(137, "OutOfMemory"), "OutOfMemory", False, id="out of memory"),
        pytest.param(exited(0, "OutOfMemory"), "OutOfMemory", False, id="a child's, code 0"),
        pytest.param(exited(None), "EngineFault", True, id="unknown"),
        pytest.param(
            Observation(RunPhase.EXITED, None, "EngineFault", "", True), "EngineFault", True,
            id="engine",
        ),
    ],
)  # fmt: skip
def test_batch_fails(seen: Observation, reason: str, is_system_fault: bool) -> None:
    case = started_case()
    case.run(Exited(1, seen), CollectDone(COLLECTED))
    report = case.state.report
    assert report.phase is Phase.FAILED
    assert report.reason == reason
    assert report.is_system_fault is is_system_fault
    assert report.outputs is not None
    assert report.exit_code == seen.exit_code


def test_refusal_is_rejected_and_a_fault_of_the_node_is_not_charged() -> None:
    case = new_case()
    case.on(Denied("NetworkRefused", "no network here"))
    assert case.state.report.phase is Phase.REJECTED
    assert case.state.report.reason == "NetworkRefused"
    case = new_case()
    case.on(Denied("EngineUnavailable", "down", is_system_fault=True))
    assert case.state.report.phase is Phase.FAILED
    assert case.state.report.is_system_fault


def test_capacity_is_waited_for_within_bounds() -> None:
    case = at_stage(Stage.QUEUED)
    waiting = case.state.report.waiting
    assert waiting is not None
    assert waiting.what == "Capacity"
    assert waiting.until == EPOCH + timedelta(seconds=LIMITS.capacity_wait_seconds)
    case.on(TimerDue(), after=1)
    assert case.state.stage is Stage.QUEUED
    case.due()
    assert case.state.report.phase is Phase.REJECTED
    assert case.state.report.reason == "Capacity"


def test_inputs_are_tried_again_within_bounds() -> None:
    case = at_stage(Stage.PREPARING)
    waits: list[float] = []
    while case.state.stage is Stage.PREPARING:
        got = case.on(PrepareFailed(True, "InputUnavailable", "no answer"))
        if case.state.stage is Stage.PREPARING:
            assert got.instruction is None
            assert case.state.report.waiting is not None
            assert case.state.report.waiting.message == "no answer"
            waits.append(case.due())
    assert len(waits) == LIMITS.prepare_tries_max - 1
    assert waits[-1] > waits[0]
    assert case.state.report.phase is Phase.FAILED
    assert case.state.report.is_system_fault
    case = at_stage(Stage.PREPARING)
    case.on(PrepareFailed(False, "InputFailed", "no such file"))
    assert case.state.report.phase is Phase.FAILED
    assert not case.state.report.is_system_fault


def test_bad_params_fail_at_once_and_outputs_are_collected() -> None:
    case = at_stage(Stage.STARTING)
    got = case.on(StartFailed(1, False, "CompileFailed", "not a module"))
    assert got.instruction == Collect(None)
    case.on(CollectDone(COLLECTED))
    assert case.state.report.reason == "CompileFailed"
    assert not case.state.report.is_system_fault


def test_a_start_that_hangs_is_looked_at_and_in_the_end_stopped() -> None:
    case = at_stage(Stage.STARTING)
    for _ in range(LIMITS.start_tries_max - 1):
        case.on(StartFailed(1, True, "EngineFault", "did not return"))
        case.due()
        assert duty(case.state, LIMITS) == Start(1, must_look=True, tries=case.state.tries)
    got = case.on(StartFailed(1, True, "EngineFault", "did not return"))
    assert got.instruction == Stop(1, LIMITS.stop_grace_seconds)
    case.run(StopDone(1, ABSENT), CollectDone(COLLECTED))
    assert case.state.report.phase is Phase.FAILED
    assert case.state.report.reason == "EngineFault"
    assert case.state.report.is_system_fault


def test_failing_to_sum_up_a_success_is_no_success() -> None:
    case = at_stage(Stage.COLLECTING)
    case.on(CollectFailed(False, "OutputLimit", "100001 files"))
    assert case.state.report.phase is Phase.FAILED
    assert case.state.report.reason == "OutputLimit"
    case = at_stage(Stage.COLLECTING)
    case.on(CollectFailed(True, "Disk", "full"))
    assert case.state.stage is Stage.COLLECTING
    case.due()
    case.on(CollectDone(COLLECTED))
    assert case.state.report.phase is Phase.SUCCEEDED


# -- restarts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "code", "stage"),
    [
        ("always", 0, Stage.RESTARTING),
        ("always", 1, Stage.RESTARTING),
        ("onFailure", 0, Stage.COLLECTING),
        ("onFailure", 1, Stage.RESTARTING),
        ("never", 0, Stage.COLLECTING),
        ("never", 1, Stage.COLLECTING),
    ],
)
@pytest.mark.parametrize("job_type", [JobType.SERVICE, JobType.DAEMON])
def test_services_restart_by_policy(
    job_type: JobType, policy: str, code: int, stage: Stage
) -> None:
    restart = RestartPolicy.decode(f'{{"policy":"{policy}"}}')
    case = started_case(execution(job_type=job_type, restart=restart))
    case.on(Exited(1, exited(code)))
    assert case.state.stage is stage
    assert case.state.report.phase is Phase.RUNNING
    if stage is Stage.RESTARTING:
        assert case.state.report.waiting is not None
        assert case.state.report.waiting.what == "Restart"
        case.due()
        assert duty(case.state, LIMITS) == Start(2, must_look=False)
        case.on(Started(2))
        assert case.state.report.run == 2


def test_restart_backoff_grows_to_its_cap_and_begins_anew_after_a_stable_run() -> None:
    restart = RestartPolicy(backoff_seconds=2, backoff_seconds_max=50)
    case = started_case(execution(job_type=JobType.SERVICE, restart=restart))
    waits: list[float] = []
    for run in range(1, 12):
        case.on(Exited(run, exited(1)), after=1)
        waits.append(case.due())
        case.on(Started(run + 1))
    assert waits[0] < 3
    assert max(waits) <= 50
    assert waits[-1] > 30
    case.on(Exited(12, exited(1)), after=61)
    assert case.due() < 3


def test_backoff_is_repeatable_spread_and_bounded() -> None:
    series = [backoff_seconds(1, 300, n, "a") for n in range(1, 2000)]
    assert series == [backoff_seconds(1, 300, n, "a") for n in range(1, 2000)]
    assert series != [backoff_seconds(1, 300, n, "b") for n in range(1, 2000)]
    assert all(0.75 <= series[0] <= 1.25 for _ in series)
    assert max(series) == 300
    assert backoff_seconds(0, 300, 5, "a") == 0


@pytest.mark.parametrize("seen", [VANISHED, ABSENT])
def test_interrupted_batch_runs_again_a_few_times(seen: Observation) -> None:
    case = started_case()
    for run in range(1, LIMITS.interruptions_max + 1):
        case.on(Exited(run, seen))
        assert case.state.stage is Stage.RESTARTING
        case.due()
        case.on(Started(run + 1))
    case.run(Exited(LIMITS.interruptions_max + 1, seen), CollectDone(COLLECTED))
    assert case.state.report.phase is Phase.FAILED
    assert case.state.report.reason == "Interrupted"
    assert case.state.report.is_system_fault


def test_an_orderly_shutdown_is_no_interruption() -> None:
    case = started_case()
    for run in range(1, 3 * LIMITS.interruptions_max):
        case.on(Halted())
        assert case.state.stage is Stage.RESTARTING
        case.boot += "+"
        case.on(AgentStarted(ABSENT))
        case.due()
        assert duty(case.state, LIMITS) == Start(run + 1, must_look=False)
        case.on(Started(run + 1))
    case = started_case(execution(restart=RestartPolicy(interrupted="report")))
    case.run(Halted(), CollectDone(COLLECTED))
    assert (case.state.report.reason, case.state.report.is_system_fault) == ("Interrupted", True)


def test_interrupted_work_is_reported_if_so_wished() -> None:
    restart = RestartPolicy(interrupted="report")
    case = started_case(execution(restart=restart))
    case.run(Exited(1, VANISHED), CollectDone(COLLECTED))
    assert case.state.report.reason == "Interrupted"
    assert case.state.report.is_system_fault
    never = RestartPolicy(policy="never")
    case = started_case(execution(job_type=JobType.SERVICE, restart=never))
    case.on(Exited(1, VANISHED))
    assert case.state.stage is Stage.COLLECTING


def test_words_about_another_run_are_ignored() -> None:
    case = started_case(execution(job_type=JobType.SERVICE))
    case.on(Exited(1, exited(1)))
    case.due()
    case.on(Started(2))
    for event in (Exited(1, exited(1)), Started(1), StopDone(1, ABSENT)):
        case.on(event)
        assert case.state.stage is Stage.RUNNING


# -- after a restart of the agent or the machine ---------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "seen", "after"),
    [
        (Stage.STARTING, ABSENT, Stage.STARTING),
        (Stage.STARTING, RUNNING, Stage.RUNNING),
        (Stage.STARTING, exited(0), Stage.COLLECTING),
        (Stage.STARTING, VANISHED, Stage.RESTARTING),
        (Stage.RUNNING, RUNNING, Stage.RUNNING),
        (Stage.RUNNING, exited(0), Stage.COLLECTING),
        (Stage.RUNNING, VANISHED, Stage.RESTARTING),
        (Stage.RUNNING, ABSENT, Stage.RESTARTING),
        (Stage.STOPPING, RUNNING, Stage.STOPPING),
        (Stage.STOPPING, ABSENT, Stage.COLLECTING),
        (Stage.STOPPING, exited(143), Stage.COLLECTING),
    ],
)
def test_what_is_found_decides(stage: Stage, seen: Observation, after: Stage) -> None:
    case = at_stage(stage)
    case.on(AgentStarted(seen))
    assert case.state.stage is after


def test_no_run_is_started_twice_though_the_engine_is_silent() -> None:
    case = at_stage(Stage.STARTING)
    got = case.on(AgentStarted(None))
    assert got.instruction == Start(1, must_look=True)


def test_waits_begin_anew_after_a_reboot() -> None:
    case = started_case(execution(job_type=JobType.SERVICE))
    case.on(Exited(1, exited(1)))
    case.boot, case.time = "b2", -5000.0  # a wall clock without battery, a monotonic from 0
    case.on(AgentStarted())
    assert case.due() == 0
    assert case.state.stage is Stage.STARTING


def test_power_that_fails_each_night_makes_no_service_wait_ever_longer() -> None:
    case = started_case(execution(job_type=JobType.SERVICE))
    for night in range(1, 20):
        case.on(Exited(2 * night - 1, exited(1)), after=1)  # it does fail now and then
        case.due()
        case.on(Started(2 * night))
        case.time += 50_000
        case.boot += "+"
        case.on(AgentStarted(VANISHED))
        assert case.state.stage is Stage.RESTARTING
        assert case.due() < 2
        case.on(Started(2 * night + 1))


def test_policy_stop_starts_nothing_unheard_after_a_reboot() -> None:
    case = started_case(execution(local_deadline=60))
    case.boot = "b2"
    case.on(AgentStarted(VANISHED))
    assert case.state.stage is Stage.RESTARTING
    assert case.state.report.waiting is not None
    assert case.state.report.waiting.what == "Contact"
    case.due()
    assert case.state.stage is Stage.RESTARTING
    assert duty(case.state, LIMITS) is None
    got = case.on(LinkUp())
    assert got.instruction == Start(2, must_look=False)


def test_policy_stop_goes_on_after_a_mere_restart_of_the_agent() -> None:
    case = started_case(execution(local_deadline=60))
    case.on(AgentStarted(RUNNING))
    assert not case.state.needs_contact
    assert duty(case.state, LIMITS) == Watch(1)


# -- stops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [Stage.ADMITTING, Stage.QUEUED, Stage.PREPARING])
def test_stop_before_any_run_is_done_at_once(stage: Stage) -> None:
    case = at_stage(stage)
    case.on(StopRequested("UserRequest"))
    assert case.state.stage is Stage.DONE
    assert case.state.report.phase is Phase.STOPPED
    assert case.state.report.reason == "UserRequest"


@pytest.mark.parametrize("stage", [Stage.STARTING, Stage.RUNNING])
def test_stop_is_written_down_before_it_is_done(stage: Stage) -> None:
    case = at_stage(stage)
    got = case.on(StopRequested("UserRequest"))
    assert got.is_intent
    assert got.instruction == Stop(1, LIMITS.stop_grace_seconds)
    case.run(StopDone(1, exited(143, at=9)), CollectDone(COLLECTED))
    report = case.state.report
    assert (report.phase, report.reason, report.exit_code) == (Phase.STOPPED, "UserRequest", 143)


def test_a_result_from_before_the_stop_counts() -> None:
    case = started_case()
    case.on(StopRequested(), after=10)
    case.run(StopDone(1, exited(0, at=8)), CollectDone(COLLECTED))
    assert case.state.report.phase is Phase.SUCCEEDED
    case = started_case()
    case.on(StopRequested(), after=10)
    case.run(StopDone(1, exited(0, at=11)), CollectDone(COLLECTED))
    assert case.state.report.phase is Phase.STOPPED


def test_a_stop_that_fails_is_given_up_but_for_the_policy_stop() -> None:
    case = at_stage(Stage.STOPPING)
    for _ in range(LIMITS.stop_tries_max - 1):
        case.on(StopFailed(1, "hung"))
        case.due()
    case.run(StopFailed(1, "hung"), CollectDone(COLLECTED))
    assert case.state.report.phase is Phase.STOPPED
    assert "did not confirm" in case.state.report.message
    case = started_case(execution(local_deadline=60))
    case.on(CutOff("too long"))
    for _ in range(LIMITS.stop_tries_max * 3):
        case.on(StopFailed(1, "hung"))
        case.due()
        assert case.state.stage is Stage.STOPPING
    case.run(StopDone(1, exited(137, at=9999)), CollectDone(COLLECTED))
    assert case.state.report.reason == "Disconnected"


def test_timeout_is_enforced_even_if_the_engine_does_not() -> None:
    case = started_case(execution(timeout=30))
    case.on(TimerDue(), after=30)
    assert case.state.stage is Stage.RUNNING  # the engine's turn
    assert case.due() == LIMITS.timeout_margin_seconds
    case.run(StopDone(1, exited(137, at=99)), CollectDone(COLLECTED))
    assert (case.state.report.phase, case.state.report.reason) == (Phase.FAILED, "Timeout")


def test_timeout_survives_the_agent_but_not_a_jump_of_the_wall_clock() -> None:
    case = started_case(execution(timeout=30))
    later = Instant(wall=EPOCH + timedelta(days=365), mono=1020.0, boot="b1")
    got = step(case.of, case.state, AgentStarted(RUNNING), later, LIMITS)
    due = timer(case.of, got.state, LIMITS)
    assert due is not None
    assert seconds_until(due, later) == pytest.approx(10 + LIMITS.timeout_margin_seconds)


@pytest.mark.parametrize("stage", [s for s in Stage if (s, CutOff) in TRANSITIONS])
def test_cut_off_ends_in_stopped(stage: Stage) -> None:
    case = at_stage(stage, execution(local_deadline=60))
    case.on(CutOff("the node was cut off"))
    if case.state.stage is Stage.STOPPING:
        case.on(StopDone(1, exited(143, at=99)))
    if case.state.stage is Stage.COLLECTING:
        case.on(CollectDone(COLLECTED))
    assert (case.state.report.phase, case.state.report.reason) == (Phase.STOPPED, "Disconnected")


@pytest.mark.parametrize("kind", list(JobType))
@pytest.mark.parametrize("how", ["seen", "found", "stopping"])
def test_a_run_that_its_leash_ended_was_stopped(kind: JobType, how: str) -> None:
    """Not failed, and not to be started again: neither where the agent saw it, nor where the next
    agent finds it, nor where the agent was about to stop it."""
    case = started_case(execution(job_type=kind, local_deadline=60))
    ended = exited(137, "Disconnected", at=70)
    if how == "seen":
        case.on(Exited(1, ended), after=70)
    elif how == "found":
        case.on(AgentStarted(ended), after=900)
    else:
        case.on(CutOff("the node was cut off"), after=71)
        case.on(StopDone(1, ended))
    assert case.state.stage is Stage.COLLECTING
    case.on(CollectDone(COLLECTED))
    report = case.state.report
    assert (report.phase, report.reason) == (Phase.STOPPED, "Disconnected")
    assert not report.is_system_fault


@pytest.mark.parametrize("stage", [s for s in Stage if (s, Unassigned) in TRANSITIONS])
def test_what_nobody_wants_is_stopped_and_removed_without_a_word(stage: Stage) -> None:
    case = at_stage(stage)
    got = case.on(Unassigned())
    assert not got.has_news
    if case.state.stage is Stage.STOPPING:
        got = case.on(StopDone(1, exited(143)))
        assert not got.has_news
    assert case.state.stage == Stage.CLEANING
    case.on(CleanFailed("busy"))
    case.due()
    assert case.on(Cleaned()).state.stage is Stage.GONE


def test_wanted_again_while_it_is_being_stopped() -> None:
    case = started_case()
    case.run(Unassigned(), Reassigned(), StopDone(1, exited(143, at=99)), CollectDone(COLLECTED))
    assert (case.state.report.phase, case.state.report.reason) == (Phase.STOPPED, "Unassigned")


def test_an_old_copy_of_the_ledger_is_not_believed() -> None:
    case = started_case()
    case.on(Disowned(40))
    case.run(StopDone(1, exited(143, at=99)), CollectDone(COLLECTED))
    report = case.state.report
    assert (report.phase, report.reason, report.is_system_fault) == (
        Phase.FAILED,
        "LedgerLost",
        True,
    )
    assert report.step > 40


def test_what_another_contradicted_is_told_as_newer() -> None:
    case = started_case()
    before = case.state.report
    assert not case.on(Contradicted(before.step - 1)).has_news
    got = case.on(Contradicted(before.step))
    assert got.has_news
    assert got.instruction is None
    after = case.state.report
    assert after.step > before.step
    assert after.but(step=0) == before.but(step=0)


def test_engine_silence_is_told_and_taken_back() -> None:
    case = started_case()
    got = case.on(EngineGone("does not answer"))
    assert got.has_news
    assert got.state.report.waiting is not None
    assert got.state.report.waiting.what == "Engine"
    got = case.on(EngineGone(""))
    assert got.state.report.waiting is not None
    assert got.state.report.waiting.what == "Workload"


def test_running_says_until_when() -> None:
    case = started_case(execution(timeout=30))
    assert case.state.report.waiting is not None
    assert case.state.report.waiting.until is not None
    case = started_case(execution())
    assert case.state.report.waiting is not None
    assert case.state.report.waiting.until is None


def test_how_far_inputs_are_is_told_and_changes_nothing_else() -> None:
    case = at_stage(Stage.PREPARING)
    before = case.state.report.step
    got = case.on(Fetching("3 of 9 MiB, 1.0 MiB/s"))
    assert got.instruction is None
    assert got.has_news
    assert case.state.stage is Stage.PREPARING
    assert case.state.report.step > before
    assert case.state.report.waiting is not None
    assert case.state.report.waiting.message == "3 of 9 MiB, 1.0 MiB/s"
    case.on(Prepared())
    told = case.state
    case.on(Fetching("late"))
    assert case.state == told
