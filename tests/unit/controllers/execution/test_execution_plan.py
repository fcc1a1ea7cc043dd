"""What an execution's status should be: tables, and properties over arbitrary histories."""

from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bacalhau_api.meta import Contact, Waiting
from bacalhau_api.v1.execution import Desired, Execution, Phase, Report
from bacalhau_api.v1.job import DisconnectPolicy, Job, JobType
from bacalhau_api.v1.node import Membership, Node
from bacalhau_controllers.contact import Age
from bacalhau_controllers.disconnect import effective_disconnect
from bacalhau_controllers.execution.plan import (
    ExecutionPlan,
    View,
    contact_for,
    plan,
    strict_seconds,
)
from bacalhau_controllers.node.presence import Silence
from tests.support.samples import at, execution, job, job_spec, node, report

HEARD = Silence(0, is_whole=True)
GONE = Contact.UNKNOWN


def silent(seconds: float, *, whole: bool = True, grace: float = 0) -> Silence:
    return Silence(seconds, is_whole=whole, grace_left_seconds=grace)


def policy_job(
    action: Literal["hold", "replace", "stop"] | None = None,
    after: int | None = None,
    type: JobType = JobType.BATCH,
    **spec: Any,
) -> Job:
    disconnect = DisconnectPolicy(action=action, after_seconds=after)
    return job(spec=job_spec(type, disconnect=disconnect, **spec))


def running(of: Job, step: int = 1, **more: Any) -> Execution:
    made = execution(of, **more)
    return made.but(status=made.status.but(report=report(Phase.RUNNING, step)))


def step(
    given: Execution,
    of: Job | None,
    on: Node | None,
    now: float,
    *reports: Report,
    silence: Silence = HEARD,
    age: Age | None = None,
) -> tuple[Execution, ExecutionPlan]:
    """Plan and apply. By default this process saw the stored wait begin."""
    if age is None:
        waiting = given.status.waiting
        age = Age((at(now) - waiting.since).total_seconds() if waiting else 0, is_whole=True)
    todo = plan(given, reports, View(on, of, silence, age), at(now))
    given = given.but(status=todo.status)
    if todo.stop:
        given = given.but(spec=given.spec.but(desired=Desired.STOP))
    return given, todo


# -- reports -------------------------------------------------------------------------------------


def test_all_waiting_reports_are_merged() -> None:
    of = job()
    made, _ = step(
        execution(of), of, node(), 1, report(Phase.RUNNING, 2), report(Phase.PREPARING, 1)
    )
    assert (made.phase, made.status.report) == (Phase.RUNNING, report(Phase.RUNNING, 2))
    made, _ = step(made, of, node(), 2, report(Phase.SUCCEEDED, 3), report(Phase.RUNNING, 2))
    assert made.phase is Phase.SUCCEEDED
    assert made.status.waiting is None
    made, _ = step(made, of, node(), 3, report(Phase.FAILED, 9))
    assert made.phase is Phase.SUCCEEDED  # a final word stands


def test_a_late_report_wins_over_an_inference() -> None:
    of = policy_job("replace", 60)
    lost, _ = step(running(of), of, node(contact=GONE), 100, silence=silent(61))
    assert lost.status.contact is Contact.LOST
    back, _ = step(lost, of, node(contact=GONE), 200, report(Phase.SUCCEEDED, 2), silence=HEARD)
    assert (back.phase, back.status.contact) == (Phase.SUCCEEDED, Contact.REACHABLE)
    assert back.status.waiting is None
    assert back.is_final


# -- contact by policy ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "silence_seconds", "contact", "until"),
    [
        pytest.param(policy_job("replace", 60), 59, Contact.UNKNOWN, 60, id="before the limit"),
        pytest.param(policy_job("replace", 60), 60, Contact.LOST, None, id="at the limit"),
        pytest.param(policy_job("hold"), 1e6, Contact.UNKNOWN, None, id="hold has no limit"),
        pytest.param(policy_job(), 1799, Contact.UNKNOWN, 1800, id="batch default"),
        pytest.param(policy_job(), 1800, Contact.LOST, None, id="batch default passed"),
        pytest.param(
            policy_job(type=JobType.SERVICE), 300, Contact.LOST, None, id="service default"
        ),
        pytest.param(policy_job(type=JobType.OPS), 1e6, Contact.UNKNOWN, None, id="ops holds"),
        pytest.param(
            policy_job(sources=("local",)), 1e6, Contact.UNKNOWN, None, id="local data holds"
        ),
    ],
)
def test_a_silent_node(of: Job, silence_seconds: float, contact: Contact, until: int) -> None:
    now = 10_000_000.0
    last_word = now - silence_seconds
    got, todo = step(running(of), of, node(contact=GONE), now, silence=silent(silence_seconds))
    assert got.status.contact is contact
    if contact is Contact.LOST:
        assert (got.status.waiting, todo.requeue_after) == (None, None)
        return
    assert got.status.contact_since == at(last_word)
    waiting = got.status.waiting
    assert waiting
    assert (waiting.what, waiting.mover, waiting.since) == ("Contact", "node n1", at(last_word))
    assert waiting.until == (None if until is None else at(last_word + until))
    assert todo.requeue_after == (None if until is None else until - silence_seconds)
    condition = got.status.conditions[0]
    assert (condition.type, condition.status, condition.reason) == ("Contact", False, "NodeSilent")


def test_a_node_that_returns_is_reachable_again() -> None:
    of = policy_job("replace", 60)
    unknown, _ = step(running(of), of, node(contact=GONE), 30, silence=silent(30))
    lost, _ = step(unknown, of, node(contact=GONE), 70, silence=silent(70))
    assert (unknown.status.contact, lost.status.contact) == (GONE, Contact.LOST)
    for before in (unknown, lost):
        back, _ = step(before, of, node(since=80), 80)
        assert back.status.contact is Contact.REACHABLE
        assert back.status.contact_since == at(80)
        assert back.status.waiting
        assert back.status.waiting.what == "Completion"
        assert back.status.conditions[0].status


def test_lost_stays_lost_while_the_node_is_silent_whatever_the_policy_becomes() -> None:
    of = policy_job("replace", 60)
    lost, _ = step(running(of), of, node(contact=GONE), 70, silence=silent(70))
    still, _ = step(lost, policy_job("hold"), node(contact=GONE), 80, silence=silent(80))
    assert still.status == lost.status


def test_stop_waits_for_the_nodes_own_clock() -> None:
    of = policy_job("stop", 60)
    made = running(of, local_deadline_seconds=90)
    for silence, contact in ((152, GONE), (153, Contact.LOST)):  # 90 s, clocks, margin
        got, _ = step(made, of, node(contact=GONE), silence, silence=silent(silence))
        assert got.status.contact is contact


def test_stop_does_not_trust_the_wall_clock() -> None:
    """A step of the clock, or a restart of the orchestrator, must not start a second attempt."""
    of = policy_job("stop", 60)
    made, _ = step(
        running(of, local_deadline_seconds=60), of, node(contact=GONE), 20, silence=silent(20)
    )
    jumped, _ = step(made, of, node(contact=GONE), 1e6, silence=silent(21))
    assert jumped.status.contact is GONE
    restarted, todo = step(made, of, node(contact=GONE), 1e6, silence=silent(5, whole=False))
    assert restarted.status.contact is GONE
    assert todo.requeue_after == strict_seconds(60) - 5


def test_stop_that_came_too_late_for_the_node_never_replaces() -> None:
    got, _ = step(
        running(policy_job()), policy_job("stop", 60), node(contact=GONE), 1e6, silence=silent(1e6)
    )
    assert got.status.contact is GONE


def test_a_clock_step_does_not_lose_what_this_leader_has_just_heard_of() -> None:
    of = policy_job("replace", 60)
    got, _ = step(running(of), of, node(contact=GONE), 20, silence=silent(20))
    jumped, _ = step(got, of, node(contact=GONE), 100_000, silence=silent(25))
    assert jumped.status.contact is GONE
    back_in_time, _ = step(got, of, node(contact=GONE), -100_000, silence=silent(60))
    assert back_in_time.status.contact is Contact.LOST


def test_a_restarted_orchestrator_gives_nodes_their_grace() -> None:
    """Out of contact for long before the restart: no mass loss before nodes could say hello."""
    of = policy_job("replace", 60)
    before, _ = step(running(of), of, node(contact=GONE), 20, silence=silent(20))
    early = silent(1, whole=False, grace=29)
    waits, todo = step(before, of, node(contact=GONE), 100_000, silence=early)
    assert waits.status.contact is GONE
    assert todo.requeue_after == 29
    late, _ = step(before, of, node(contact=GONE), 100_030, silence=silent(30, whole=False))
    assert late.status.contact is Contact.LOST


@pytest.mark.parametrize("on", [None, node(membership=Membership.REJECTED)])
def test_a_removed_or_rejected_node_loses_its_executions_at_once(on: Node | None) -> None:
    of = policy_job("hold")
    got, _ = step(running(of), of, on, 5)
    assert got.status.contact is Contact.LOST
    assert got.status.conditions[0].reason == ("NodeRemoved" if on is None else "NodeRejected")


def test_even_a_removed_node_keeps_the_promise_of_stop() -> None:
    of = policy_job("stop", 60)
    made = running(of, local_deadline_seconds=60)
    early, todo = step(made, of, None, 5, silence=silent(5))
    assert early.status.contact is GONE
    assert early.status.waiting
    assert early.status.waiting.what == "LocalStop"
    assert todo.requeue_after == strict_seconds(60) - 5
    late, _ = step(early, of, None, 122, silence=silent(122))
    assert late.status.contact is Contact.LOST


def test_what_nobody_wants_any_more_is_not_waited_for_for_ever() -> None:
    of = policy_job("hold")
    made = running(of)
    stopping = made.but(spec=made.spec.but(desired=Desired.STOP))
    got, _ = step(stopping, of, node(contact=GONE), 299, silence=silent(299))
    assert got.status.contact is GONE
    got, _ = step(got, of, node(contact=GONE), 300, silence=silent(300))
    assert got.status.contact is Contact.LOST


def test_a_wiped_node_does_not_leave_limbo_behind() -> None:
    of = policy_job("hold")
    wiped = node(incarnation="ledger-2", since=100)
    waits, todo = step(running(of), of, wiped, 110)
    assert waits.status.contact is Contact.REACHABLE
    assert waits.status.waiting
    assert waits.status.waiting.what == "Recovery"
    assert waits.status.waiting.until == at(160)
    assert todo.requeue_after == 50
    lost, _ = step(waits, of, wiped, 160)
    assert lost.status.contact is Contact.LOST
    assert lost.status.conditions[0].reason == "LedgerReplaced"
    still, _ = step(lost, of, wiped, 1000)
    assert still.status == lost.status
    final = report(Phase.FAILED, 1, incarnation="ledger-2")
    told, _ = step(lost, of, wiped, 170, final)
    assert (told.phase, told.status.contact) == (Phase.FAILED, Contact.REACHABLE)


def test_a_wiped_node_that_has_not_reported_yet_just_runs_it() -> None:
    of = job()
    got, _ = step(execution(of), of, node(incarnation="ledger-2"), 10)
    assert got.status.contact is Contact.REACHABLE


def test_contact_for_is_the_same_inference() -> None:
    of = policy_job("replace", 60)
    made = running(of)
    policy = effective_disconnect(of.spec)
    verdict = contact_for(made, node(contact=GONE), policy, at(70), silent(70))
    assert verdict.contact is Contact.LOST


# -- waiting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "type", "timeout", "what", "until", "mover"),
    [
        (None, JobType.BATCH, 0, "NodeAck", 60, "node n1"),
        (Phase.PENDING, JobType.BATCH, 0, "NodeStart", None, "node n1"),
        (Phase.PREPARING, JobType.BATCH, 0, "Preparation", None, "node n1"),
        (Phase.PREPARING, JobType.BATCH, 30, "Preparation", 30, "node n1"),
        (Phase.RUNNING, JobType.BATCH, 0, "Completion", None, "node n1"),
        (Phase.RUNNING, JobType.OPS, 30, "Completion", 30, "node n1"),
        (Phase.RUNNING, JobType.SERVICE, 0, "StopRequest", None, "user"),
        (Phase.RUNNING, JobType.DAEMON, 0, "StopRequest", None, "user"),
    ],
)
def test_what_it_waits_for(
    phase: Phase | None, type: JobType, timeout: int, what: str, until: int | None, mover: str
) -> None:
    of = policy_job(type=type, execution_timeout=timeout)
    reports = [report(phase)] if phase else []
    got, _ = step(execution(of), of, node(), 0, *reports)
    waiting = got.status.waiting
    assert waiting
    assert (waiting.what, waiting.mover, waiting.since) == (what, mover, at(0))
    assert waiting.until == (None if until is None else at(until))
    later, _ = step(got, of, node(), 7)
    assert later.status == got.status  # the time it began is kept


def test_the_nodes_own_word_on_waiting_comes_first_by_our_clock() -> None:
    """The node's clock may be hours off; what counts is how long it wants to wait."""
    of = job()
    told = Waiting(what="Image", since=at(-5000), until=at(-4910), mover="node n1")
    got, todo = step(execution(of), of, node(), 7, report(Phase.PREPARING).but(waiting=told))
    assert got.status.waiting == told.but(since=at(7), until=at(97))
    assert todo.requeue_after == 90 + 120
    same, _ = step(got, of, node(), 9, report(Phase.PREPARING).but(waiting=told))
    assert same.status == got.status
    again = told.but(since=at(-4900), until=at(-4810))
    next_try = report(Phase.PREPARING, 2).but(waiting=again)
    more, _ = step(same, of, node(), 50, next_try)
    assert more.status.waiting
    assert more.status.waiting.since == at(50)


def test_a_node_that_forgets_its_own_deadline_counts_as_out_of_contact() -> None:
    of = policy_job("replace", 100)
    told = Waiting(what="Image", since=at(0), until=at(30), mover="node n1")
    got, _ = step(execution(of), of, node(), 0, report(Phase.PREPARING).but(waiting=told))
    late, _ = step(got, of, node(), 149)
    assert late.status.contact is Contact.REACHABLE
    late, _ = step(late, of, node(), 150)
    assert (late.status.contact, late.status.conditions[0].reason) == (GONE, "ImageOverdue")
    lost, _ = step(late, of, node(), 250)
    assert lost.status.contact is Contact.LOST


def test_waits_that_began_under_an_earlier_leader_lose_nothing_at_a_restart() -> None:
    """The orchestrator was away for hours; the node finished, and is about to say so."""
    of = policy_job("replace", 100, execution_timeout=60)
    made, _ = step(execution(of), of, node(), 0, report(Phase.RUNNING))
    begun = Silence(1, is_whole=False, grace_left_seconds=29)
    early, todo = step(made, of, node(), 9000, silence=begun, age=Age(1))
    assert early.status.contact is Contact.REACHABLE
    assert todo.requeue_after == 29
    later = Silence(30, is_whole=False)
    unknown, _ = step(early, of, node(), 9030, silence=later, age=Age(30))
    assert unknown.status.contact is GONE
    still, todo = step(unknown, of, node(), 9090, silence=later, age=Age(90))
    assert (still.status.contact, todo.requeue_after) == (GONE, 40)
    lost, _ = step(still, of, node(), 9130, silence=later, age=Age(130))
    assert lost.status.contact is Contact.LOST


def test_a_restart_on_the_node_begins_a_new_wait() -> None:
    of = policy_job(execution_timeout=30)
    first, _ = step(execution(of), of, node(), 0, report(Phase.RUNNING, 1, run=1))
    second, _ = step(first, of, node(), 20, report(Phase.RUNNING, 2, run=2))
    assert second.status.waiting
    assert second.status.waiting.since == at(20)


def test_being_stopped_is_waited_for_with_a_deadline() -> None:
    of = job()
    made = running(of)
    stopping = made.but(spec=made.spec.but(desired=Desired.STOP))
    got, todo = step(stopping, of, node(), 50)
    assert got.status.waiting
    assert (got.status.waiting.what, got.status.waiting.until) == ("Stop", at(110))
    assert todo.requeue_after == 120


def test_a_node_that_answers_but_does_not_acknowledge_counts_as_out_of_contact() -> None:
    """Else a broken agent with a healthy heartbeat would hold a slot for ever."""
    of = policy_job("replace", 100)
    waits, todo = step(execution(of), of, node(), 0)
    assert todo.requeue_after == 60
    unknown, _ = step(waits, of, node(), 60)
    assert unknown.status.contact is GONE
    assert unknown.status.waiting
    assert unknown.status.waiting.what == "NodeAck"
    assert unknown.status.waiting.until == at(160)
    assert unknown.status.conditions[0].reason == "NodeAckOverdue"
    lost, _ = step(unknown, of, node(), 160)
    assert lost.status.contact is Contact.LOST
    still, _ = step(lost, of, node(), 200)
    assert still.status == lost.status  # and not back and forth
    # Each of these is a reason to hope again: a word about it, or the node coming back.
    told, _ = step(lost, of, node(), 210, report(Phase.RUNNING))
    assert told.status.contact is Contact.REACHABLE
    back, _ = step(lost, of, node(since=205), 210)
    assert back.status.contact is Contact.REACHABLE


def test_a_wait_that_begins_at_the_moment_of_another_is_not_as_old() -> None:
    of = job()
    waits, _ = step(execution(of), of, node(), 0)
    stopping = waits.but(spec=waits.spec.but(desired=Desired.STOP))
    got, todo = step(stopping, of, node(), 0, age=Age(1000, is_whole=False))
    assert got.status.contact is Contact.REACHABLE
    assert todo.requeue_after == 120


def test_overdue_work_is_never_lost_under_stop_while_the_node_is_there() -> None:
    of = policy_job("stop", 60)
    waits, _ = step(execution(of, local_deadline_seconds=60), of, node(), 0)
    unknown, _ = step(waits, of, node(), 61)
    later, _ = step(unknown, of, node(), 1e6)
    assert later.status.contact is GONE


def test_a_step_of_the_clock_makes_nothing_overdue() -> None:
    of = policy_job("replace", 100)
    waits, _ = step(execution(of), of, node(), 0)
    jumped, _ = step(waits, of, node(), 100_000, age=Age(30, is_whole=True))
    assert jumped.status == waits.status
    back_in_time, _ = step(waits, of, node(), -100_000, age=Age(60, is_whole=True))
    assert back_in_time.status.contact is GONE


# -- orphans -------------------------------------------------------------------------------------


def test_orphans_are_stopped_first_and_deleted_once_final() -> None:
    of = job()
    stopping, todo = step(running(of), None, node(), 1)
    assert (todo.is_orphan, todo.stop, todo.delete) == (True, True, False)
    assert stopping.status.waiting
    assert stopping.status.waiting.what == "Stop"
    stopping, todo = step(stopping, None, node(), 2)
    assert (todo.stop, todo.delete) == (False, False)
    _, todo = step(stopping, None, node(), 3, report(Phase.STOPPED, 2))
    assert todo.delete


@pytest.mark.parametrize("on", [None, node(contact=GONE)])
def test_orphans_that_cannot_be_reached_are_deleted_at_once(on: Node | None) -> None:
    _, todo = step(running(job()), None, on, 1, silence=silent(20))
    assert (todo.delete, todo.stop) == (True, False)


# -- properties ----------------------------------------------------------------------------------

JOBS = st.sampled_from(
    [
        policy_job("hold"),
        policy_job("replace", 60),
        policy_job("stop", 60),
        policy_job(type=JobType.SERVICE),
        policy_job(type=JobType.DAEMON),
        policy_job(execution_timeout=100),
        None,
    ]
)
TOLD = st.sampled_from(
    [
        None,
        Waiting(what="Image", since=at(0), until=at(50), mover="node n1"),
        Waiting(what="Image", since=at(9), until=at(59), mover="node n1"),
        Waiting(what="Capacity", since=at(3), mover="node n1"),
    ]
)


def told_report(phase: Phase, step: int, told: Waiting | None, **more: Any) -> Report:
    return report(phase, step, **more).but(waiting=None if phase.is_final else told)


REPORTS = st.lists(
    st.builds(
        told_report,
        st.sampled_from(Phase),
        st.integers(0, 9),
        TOLD,
        incarnation=st.sampled_from(["ledger-1", "ledger-2"]),
        run=st.integers(0, 3),
    ),
    max_size=2,
)
NODES = st.one_of(
    st.none(),
    st.builds(
        node,
        contact=st.sampled_from([Contact.REACHABLE, Contact.UNKNOWN]),
        membership=st.sampled_from(Membership),
        incarnation=st.sampled_from(["ledger-1", "ledger-2", ""]),
        since=st.integers(-100, 100),
    ),
)
SILENCES = st.builds(
    Silence,
    st.floats(0, 10_000),
    is_whole=st.booleans(),
    grace_left_seconds=st.sampled_from([0.0, 10.0]),
)
STEPS = st.lists(
    st.tuples(
        st.floats(-1000, 3000),  # wall clock steps back too
        REPORTS,
        NODES,
        JOBS,
        SILENCES,
        st.booleans(),  # asked to stop
        st.builds(Age, st.floats(0, 5000), is_whole=st.booleans()),
    ),
    min_size=1,
    max_size=8,
)
ORDER = [Phase.PENDING, Phase.PREPARING, Phase.RUNNING]


@settings(max_examples=400, deadline=None)
@given(steps=STEPS, local=st.sampled_from([None, 60]))
def test_properties_of_every_history(steps: list[tuple[Any, ...]], local: int | None) -> None:
    given = execution(policy_job(), local_deadline_seconds=local)
    now = 0.0
    for passed, reports, on, of, silence, asked_to_stop, age in steps:
        now += passed
        if asked_to_stop:
            given = given.but(spec=given.spec.but(desired=Desired.STOP))
        before = given
        given, todo = step(given, of, on, now, *reports, silence=silence, age=age)

        # A reported phase never moves backwards (I3), a final report is never replaced.
        if before.phase.is_final:
            assert given.status.report == before.status.report
        elif not given.phase.is_final:
            assert ORDER.index(given.phase) >= ORDER.index(before.phase)
        # No limbo (I6): what is not final waits for something, by somebody.
        waiting = given.status.waiting
        assert (waiting is None) == given.is_final
        if waiting is not None:
            assert waiting.what
            assert waiting.mover
        # What was reported to be over is in no doubt.
        if given.phase.is_final:
            assert given.status.contact is Contact.REACHABLE
        # Lost is left only for a sign of life.
        if before.status.contact is Contact.LOST and given.status.contact is Contact.UNKNOWN:
            raise AssertionError("Lost became Unknown")
        # Planning again changes nothing, not even with the same reports once more (I9).
        was = before.status.waiting
        if waiting and (was is None or (was.since, was.what) != (waiting.since, waiting.what)):
            age = Age(0, is_whole=True)  # a wait that has just begun
        again = plan(given, reports, View(on, of, silence, age), at(now))
        assert again.status == given.status
        assert not again.stop
        assert again.delete == todo.delete
        # A timer is in the future.
        assert todo.requeue_after is None or todo.requeue_after > 0
        if todo.delete:
            return


@settings(max_examples=200, deadline=None)
@given(
    on=NODES,
    of=JOBS.filter(lambda j: j is not None),
    now=st.floats(0, 5000),
    silence=st.floats(0, 10_000),
    is_acked=st.booleans(),
)
def test_waiting_by_its_timers_alone_leads_somewhere(
    on: Node | None, of: Job, now: float, silence: float, is_acked: bool
) -> None:
    """Following requeue_after, an execution settles within a few looks: it is Lost, or waits for
    something without a deadline, and then time changes nothing any more."""
    given = running(of) if is_acked else execution(of)
    whole = Silence(silence, is_whole=True)
    for _ in range(8):
        given, todo = step(given, of, on, now, silence=whole)
        if todo.requeue_after is None:
            break
        now += todo.requeue_after + 1e-3
        # A node that is heard stays heard; a silent one grows more silent.
        if on is None or on.status.contact is GONE:
            whole = Silence(whole.seconds + todo.requeue_after + 1e-3, is_whole=True)
    assert todo.requeue_after is None
    waiting = given.status.waiting
    assert waiting is None or waiting.until is None
