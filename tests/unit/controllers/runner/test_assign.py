"""What a node makes of the lists it is sent."""

import pytest

from bacalhau_api.v1.execution import (
    Execution,
    ExecutionStatus,
    Phase,
    PublicationPhase,
    PublicationReport,
    PublicationStatus,
    Report,
)
from bacalhau_api.wire import Assignments, Fact, Gone
from bacalhau_controllers.runner.assign import Orders, changes, full_list
from bacalhau_controllers.runner.ledger import (
    Book,
    DropFact,
    Meta,
    PutContact,
    PutExecution,
    PutFact,
    PutPublication,
    PutPublicationState,
    PutState,
)
from bacalhau_controllers.runner.publishing import Behind, Wanted, Withdrawn
from bacalhau_controllers.runner.state import (
    Contradicted,
    Disowned,
    Instant,
    LinkUp,
    Reassigned,
    Stage,
    Unassigned,
    new_state,
)
from tests.support.runner import execution, publication, stopped
from tests.support.simclock import EPOCH

NOW = Instant(wall=EPOCH, mono=50.0, boot="b")
SENT = Instant(wall=EPOCH, mono=40.0, boot="b")


def book(*held: Execution, stage: Stage = Stage.RUNNING, step: int = 3) -> Book:
    one = Book(Meta(incarnation="mine"))
    for execution_ in held:
        state = new_state("mine", NOW).but(stage=stage)
        state = state.but(report=state.report.but(step=step))
        one.apply([PutExecution(execution_), PutState(execution_.metadata.uid, state)])
    return one


def reported(of: Execution, phase: Phase, incarnation: str = "other") -> Execution:
    report = Report(step=4, incarnation=incarnation, phase=phase, run=2)
    return of.but(status=ExecutionStatus(report=report))


def stored(of: Execution, on: Book) -> Execution:
    """With the report that its node has."""
    return of.but(status=ExecutionStatus(report=on.states[of.metadata.uid].report))


def listed(on: Book, *things: Execution, steps: dict[str, int] | None = None) -> Orders:
    return full_list(on, Assignments(executions=things), steps or {}, NOW, SENT)


def changed(on: Book, *things: Execution, gone: tuple[Gone, ...] = ()) -> Orders:
    return changes(on, Assignments(executions=things), gone, NOW, SENT)


def fact_of(of: Execution, step: int, seq: int = 1) -> Fact:
    report = Report(step=step, incarnation="mine", phase=Phase.SUCCEEDED)
    uid = of.metadata.uid
    return Fact(seq=seq, namespace="default", name=of.name, uid=uid, execution=report)


A, B = execution("a"), execution("b")


def test_new_executions_begin() -> None:
    orders = listed(book(), A)
    assert orders.entries == [
        PutContact(SENT), PutExecution(A), PutState("uid-a", new_state("mine", NOW)),
    ]  # fmt: skip
    assert orders.events == [("uid-a", None)]


def test_known_executions_are_left_alone_but_told_to_look() -> None:
    """The handler of an earlier message may have been cut off between storing and telling."""
    known = stored(A, book(A))
    assert listed(book(A), known).entries == [PutContact(SENT)]
    assert listed(book(A), known).events == [("uid-a", None)]
    assert listed(book(A, stage=Stage.DONE), known).events == []
    assert changed(book(A), A).events == []


def test_only_a_newer_version_replaces_one() -> None:
    newer = stopped(A, version=2)
    orders = changed(book(A), newer)
    assert PutExecution(newer) in orders.entries
    assert orders.events == [("uid-a", None)]
    for late in (A, stopped(A, version=1)):
        assert changed(book(newer), late).entries == [PutContact(SENT)]


def test_the_same_version_told_otherwise_counts() -> None:
    """So a node hears of its rejection, before anything is written about what it has."""
    otherwise = stopped(A, version=A.metadata.resource_version)
    orders = changed(book(A), otherwise)
    assert PutExecution(otherwise) in orders.entries
    assert orders.events == [("uid-a", None)]
    assert changed(book(A), A).entries == [PutContact(SENT)]


def test_beyond_the_full_list_nothing_is_wanted() -> None:
    known = stored(B, book(B))
    assert listed(book(A, B), known).events == [("uid-a", Unassigned()), ("uid-b", None)]
    assert changed(book(A, B), B).events == []


def test_last_words_come_before_the_end() -> None:
    on = book(A, stage=Stage.DONE)
    on.apply([PutFact(fact_of(A, 3))])
    orders = listed(on)
    assert orders.events == []
    assert orders.last_words == ["uid-a"]
    assert listed(book(A, stage=Stage.DONE)).events == [("uid-a", Unassigned())]


def test_what_is_stored_already_need_not_be_sent() -> None:
    on = book(A, stage=Stage.DONE)
    fact = fact_of(A, 3, seq=7)
    on.apply([PutFact(fact)])
    stored = A.but(status=ExecutionStatus(report=fact.execution))
    assert DropFact("uid-a", 7) in listed(on, stored, steps={"uid-a": 3}).entries
    assert DropFact("uid-a", 7) not in listed(on, stored, steps={"uid-a": 2}).entries


def test_an_end_that_is_not_stored_is_sent_whatever_the_steps_say() -> None:
    """A copy of this ledger may have used the same steps for something else."""
    on = book(A, stage=Stage.DONE)
    on.apply([PutFact(fact_of(A, 3, seq=7))])
    running = Report(step=3, incarnation="mine", phase=Phase.RUNNING)
    copy = A.but(status=ExecutionStatus(report=running))
    assert DropFact("uid-a", 7) not in listed(on, copy, steps={"uid-a": 3}).entries


def test_what_has_ended_for_everybody_else_ends_here() -> None:
    """The end was told from a copy of this ledger, by chance with the same step."""
    ended = Report(step=3, incarnation="mine", phase=Phase.FAILED)
    copy = A.but(status=ExecutionStatus(report=ended))
    assert ("uid-a", Disowned(3)) in listed(book(A), copy, steps={"uid-a": 3}).events


def test_what_is_stored_from_a_copy_of_this_ledger_is_contradicted() -> None:
    mine = book(A).states["uid-a"].report
    other = next(p for p in (Phase.PREPARING, Phase.RUNNING) if p is not mine.phase)
    twin = Report(step=mine.step, incarnation="mine", phase=other)
    for told, is_news in (
        (twin, True),
        (mine, False),
        (mine.but(step=mine.step + 1), False),
        (twin.but(incarnation="other"), False),
    ):
        copy = A.but(status=ExecutionStatus(report=told))
        events = listed(book(A), copy, steps={"uid-a": mine.step}).events
        assert (("uid-a", Contradicted(mine.step)) in events) is is_news


@pytest.mark.parametrize("step", [0, 1, 2])
def test_what_was_acknowledged_and_is_not_stored_any_more_is_told_again(step: int) -> None:
    """The store was restored to what it was before."""
    ended = book(A, stage=Stage.DONE)
    state = ended.states["uid-a"]
    ended.states["uid-a"] = state.but(report=state.report.but(phase=Phase.SUCCEEDED))
    for on in (ended, book(A)):
        mine = on.states["uid-a"].report
        old = A.but(status=ExecutionStatus(report=mine.but(step=step, phase=Phase.PENDING)))
        orders = listed(on, old if step else A, steps={"uid-a": step} if step else {})
        facts = [entry.fact for entry in orders.entries if isinstance(entry, PutFact)]
        told = [fact.execution for fact in facts]
        assert told == ([mine] if on is ended else [])
        assert (("uid-a", Contradicted(3)) in orders.events) is (on is not ended)
        on.apply([PutFact(fact_of(A, 3))])  # on its way
        orders = listed(on, old)
        assert orders.events == ([] if on is ended else [("uid-a", None)])
        assert not [entry for entry in orders.entries if isinstance(entry, PutFact)]


def test_publications_that_are_not_stored_any_more_are_told_again() -> None:
    wanted = publication(A)
    on = book(A)
    on.apply(full_list(on, Assignments(publications=(wanted,)), {}, NOW, SENT).entries)
    state = on.publication_states["pub-a"]
    mine = state.report.but(step=5, phase=PublicationPhase.DELIVERED)
    on.publication_states["pub-a"] = state.but(report=mine)
    for told, is_news in (
        (None, True),
        (mine.but(step=4, phase=PublicationPhase.PUBLISHING), True),
        (mine, False),
    ):
        old = wanted.but(status=PublicationStatus(report=told))
        orders = full_list(on, Assignments(publications=(old,)), {}, NOW, SENT)
        assert (("pub-a", Behind(5)) in orders.publications) is is_news


def test_a_newer_report_than_the_ledgers_disowns_it() -> None:
    known = stored(A, book(A))
    assert listed(book(A), known, steps={"uid-a": 9}).events[0] == ("uid-a", Disowned(9))
    assert listed(book(A), known, steps={"uid-a": 3}).events == [("uid-a", None)]


def test_what_an_earlier_ledger_began_is_reported_lost() -> None:
    for incarnation in ("other", "mine"):  # wiped, or an old copy
        orders = listed(book(), reported(A, Phase.RUNNING, incarnation))
        (state,) = [entry.state for entry in orders.entries if isinstance(entry, PutState)]
        assert state.stage is Stage.DONE
        assert (state.report.phase, state.report.reason) == (Phase.FAILED, "LedgerLost")
        assert state.report.step > 4
        assert state.report.run == 2
        (fact,) = [entry.fact for entry in orders.entries if isinstance(entry, PutFact)]
        assert fact.execution == state.report


def test_what_an_earlier_ledger_finished_is_finished() -> None:
    assert listed(book(), reported(A, Phase.SUCCEEDED)).entries == [PutContact(SENT)]


def test_gone_goes_by_identity_not_by_name() -> None:
    other = Gone(kind="Execution", namespace="default", name="a", uid="another")
    assert changed(book(A), gone=(other,)).events == []
    mine = Gone(kind="Execution", namespace="default", name="a", uid="uid-a")
    assert changed(book(A), gone=(mine,)).events == [("uid-a", Unassigned())]
    again = execution("a", uid="second")
    orders = changed(book(A), again, gone=(mine,))
    assert orders.events == [("uid-a", Unassigned()), ("second", None)]


def test_being_heard_is_told_to_those_who_wait_for_it() -> None:
    on = book(A, execution("w", local_deadline=60))
    known, waits = stored(A, on), stored(execution("w", local_deadline=60), on)
    assert listed(on, known, waits).events == [("uid-a", None), ("uid-w", LinkUp())]
    assert listed(book(waits, stage=Stage.DONE), waits).events == []


def test_wanted_again() -> None:
    on = book(A, stage=Stage.STOPPING)
    on.states["uid-a"] = on.states["uid-a"].but(is_assigned=False)
    known = stored(A, on)
    assert listed(on, known).events == [("uid-a", Reassigned()), ("uid-a", None)]
    on.states["uid-a"] = on.states["uid-a"].but(stage=Stage.CLEANING)
    assert listed(on, A).must_ask_again == ["uid-a"]


def test_publications_come_change_and_go() -> None:
    wanted = publication(A)
    on = book(A)
    orders = full_list(on, Assignments(publications=(wanted,)), {}, NOW, SENT)
    assert PutPublication(wanted) in orders.entries
    assert orders.publications == [("pub-a", None)]
    on.apply(orders.entries)
    again = full_list(on, Assignments(publications=(wanted,)), {"pub-a": 5}, NOW, SENT)
    assert again.publications == [("pub-a", Behind(5)), ("pub-a", None)]
    assert not any(isinstance(entry, PutPublicationState) for entry in again.entries)
    assert full_list(on, Assignments(), {}, NOW, SENT).publications == [("pub-a", Withdrawn())]
    gone = Gone(kind="Publication", namespace="default", name="a", uid="pub-a")
    assert changed(on, gone=(gone,)).publications == [("pub-a", Withdrawn())]
    on.publication_states["pub-a"] = on.publication_states["pub-a"].but(is_assigned=False)
    back = full_list(on, Assignments(publications=(wanted,)), {}, NOW, SENT)
    assert back.publications == [("pub-a", Wanted()), ("pub-a", None)]


def test_publications_of_an_earlier_ledger_are_done_again_unless_final() -> None:
    report = PublicationReport(
        step=6, incarnation="other", phase=PublicationPhase.PUBLISHING, attempts=2
    )
    begun = publication(A).but(status=PublicationStatus(report=report))
    orders = full_list(book(), Assignments(publications=(begun,)), {}, NOW, SENT)
    (state,) = [entry.state for entry in orders.entries if isinstance(entry, PutPublicationState)]
    assert (state.report.step, state.report.attempts, state.report.incarnation) == (6, 2, "mine")
    final = report.but(phase=PublicationPhase.DELIVERED)
    done = publication(A).but(status=PublicationStatus(report=final))
    assert full_list(book(), Assignments(publications=(done,)), {}, NOW, SENT).publications == []
