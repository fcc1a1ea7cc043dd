"""What every ledger promises: all or nothing, in order, and the same content after opening again."""

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bacalhau.node.ledger import SqliteLedger
from bacalhau.system import SystemClock, SystemIds
from bacalhau_api.v1.execution import (
    Execution,
    ExecutionStatus,
    Phase,
    PublicationPhase,
    PublicationReport,
    PublicationStatus,
    Report,
)
from bacalhau_api.wire import Fact
from bacalhau_controllers.runner.ledger import (
    AckFacts,
    Book,
    DropFact,
    Entry,
    Forget,
    Ledger,
    LedgerBrokenError,
    LedgerHeldError,
    MemoryLedger,
    PublicationState,
    PutContact,
    PutExecution,
    PutFact,
    PutPublication,
    PutPublicationState,
    PutState,
)
from bacalhau_controllers.runner.state import (
    End,
    InputMount,
    Instant,
    RunnerState,
    Stage,
    new_state,
)
from tests.support.runner import execution, publication

NOW = Instant(wall=datetime(2026, 1, 1, tzinfo=UTC), mono=12.5, boot="b1")
MakeLedger = Callable[[], Ledger]


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> MakeLedger:
    """Makes ledgers on one and the same content, one to be open at a time."""
    if request.param == "sqlite":
        return lambda: SqliteLedger(tmp_path / "ledger.db", SystemClock(), SystemIds())
    memory = MemoryLedger("ledger-1")
    return lambda: memory


@pytest.fixture
async def ledger(make: MakeLedger) -> AsyncIterator[Ledger]:
    one = make()
    await one.open()
    yield one
    await one.close()


async def reopened(ledger: Ledger, make: MakeLedger) -> Book:
    """The content as the next agent finds it."""
    await ledger.close()
    again = make()
    book = await again.open()
    await again.close()
    await ledger.open()
    return book


def fact(seq: int, uid: str = "u", step: int = 1) -> Fact:
    report = Report(step=step, incarnation="i", phase=Phase.RUNNING, stdout_tail="\x00é\n")
    return Fact(seq=seq, namespace="default", name=f"n-{uid}", uid=uid, execution=report)


def full_state() -> RunnerState:
    """With nothing at its default."""
    state = new_state("ledger-1", NOW)
    return state.but(
        stage=Stage.STOPPING,
        due=NOW.plus(3),
        tries=2,
        detail="hung",
        run=3,
        run_since=NOW.plus(1),
        must_look=True,
        restarts=1,
        interruptions=1,
        inputs=(InputMount(source="/s", target="/t", read_only=False),),
        end=End(phase=Phase.STOPPED, reason="x", exit_code=1, finished_at=NOW.wall),
        is_assigned=False,
        needs_contact=True,
        has_outputs=False,
    )


async def test_a_new_ledger_has_an_incarnation_and_nothing_else(make: MakeLedger) -> None:
    ledger = make()
    book = await ledger.open()
    await ledger.close()
    assert book.meta.incarnation
    assert not book.executions
    assert not book.states
    assert not book.facts
    again = make()
    assert (await again.open()).meta.incarnation == book.meta.incarnation
    await again.close()


async def test_everything_comes_back(ledger: Ledger, make: MakeLedger) -> None:
    one = execution("a", inputs=("/x",), results=("r",), timeout=3, local_deadline=9)
    told = one.but(status=ExecutionStatus(report=fact(1).execution))
    wanted = publication(one)
    progress = PublicationState(
        since=NOW,
        due=NOW.plus(1),
        tries=3,
        report=PublicationReport(step=2, incarnation="i", phase=PublicationPhase.PUBLISHING),
    )
    await ledger.commit(
        [
            PutContact(NOW),
            PutExecution(told),
            PutState("uid-a", full_state()),
            PutPublication(wanted.but(status=PublicationStatus(report=progress.report))),
            PutPublicationState("pub-a", progress),
            PutFact(fact(7, "uid-a")),
        ]
    )
    book = await reopened(ledger, make)
    assert book.meta.contact == NOW
    assert book.meta.facts_seq == 7
    assert book.executions == {"uid-a": one}  # without its status
    assert book.states == {"uid-a": full_state()}
    assert book.publications == {"pub-a": wanted}
    assert book.publication_states == {"pub-a": progress}
    assert book.facts == {"uid-a": fact(7, "uid-a")}


async def test_of_each_object_only_the_newest_fact_waits(ledger: Ledger, make: MakeLedger) -> None:
    await ledger.commit([PutFact(fact(1, "a")), PutFact(fact(2, "b"))])
    await ledger.commit([PutFact(fact(3, "a", step=2))])
    book = await reopened(ledger, make)
    assert [(f.uid, f.seq) for f in book.facts.values()] == [("b", 2), ("a", 3)]
    await ledger.commit([AckFacts(2)])
    book = await reopened(ledger, make)
    assert [(f.uid, f.seq) for f in book.facts.values()] == [("a", 3)]
    assert (book.meta.facts_acked, book.meta.facts_seq) == (2, 3)
    await ledger.commit([AckFacts(3)])
    book = await reopened(ledger, make)
    assert not book.facts
    assert book.meta.facts_seq == 3  # numbers are never given twice


async def test_forget_takes_everything_of_one_object(ledger: Ledger, make: MakeLedger) -> None:
    a, b = execution("a"), execution("b")
    state = new_state("ledger-1", NOW)
    for one in (a, b):
        uid = one.metadata.uid
        await ledger.commit([PutExecution(one), PutState(uid, state)])
    await ledger.commit([PutFact(fact(1, "uid-a")), PutFact(fact(2, "uid-b"))])
    await ledger.commit([Forget("uid-a"), Forget("never-there"), DropFact("uid-b")])
    book = await reopened(ledger, make)
    assert set(book.executions) == set(book.states) == {"uid-b"}
    assert not book.facts


async def test_a_newer_fact_is_not_dropped_for_an_older(ledger: Ledger, make: MakeLedger) -> None:
    await ledger.commit([PutFact(fact(1, "a"))])
    await ledger.commit([PutFact(fact(2, "a", step=2))])
    await ledger.commit([DropFact("a", 1)])
    assert [f.seq for f in (await reopened(ledger, make)).facts.values()] == [2]
    await ledger.commit([DropFact("a", 2)])
    assert not (await reopened(ledger, make)).facts


async def test_executions_come_back_in_order_of_arrival(ledger: Ledger, make: MakeLedger) -> None:
    names = ["z", "a", "m"]
    for name in names:
        await ledger.commit([PutExecution(execution(name))])
    await ledger.commit([PutExecution(execution("z", version=2))])
    book = await reopened(ledger, make)
    assert [one.name for one in book.executions.values()] == names


async def test_one_agent_at_a_time(ledger: Ledger, make: MakeLedger) -> None:
    with pytest.raises(LedgerHeldError):
        await make().open()
    await ledger.commit([PutContact(NOW)])  # the first is not disturbed


async def test_nothing_is_written_unopened(make: MakeLedger) -> None:
    with pytest.raises(LedgerBrokenError):
        await make().commit([PutContact(NOW)])


def _entries() -> st.SearchStrategy[Entry]:
    uids = st.sampled_from(["a", "b", "c"])
    states = st.integers(0, 5).map(lambda n: new_state(f"i{n}", NOW.plus(n)))
    executions = st.builds(
        lambda uid, n: execution(uid, uid=uid, version=n), uids, st.integers(1, 9)
    )
    return st.one_of(
        st.integers(0, 9).map(lambda n: PutContact(NOW.plus(n))),
        executions.map(PutExecution),
        st.builds(PutState, uids, states),
        st.builds(lambda uid: PutPublication(publication(execution(uid))), uids),
        st.builds(Forget, uids),
        uids.map(lambda uid: PutFact(fact(0, uid))),
        st.integers(0, 30).map(AckFacts),
        st.builds(DropFact, uids, st.none() | st.integers(0, 30)),
    )


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(commits=st.lists(st.lists(_entries(), min_size=1, max_size=6), max_size=8))
async def test_a_commit_means_the_same_everywhere(
    make: MakeLedger, commits: list[list[Entry]]
) -> None:
    ledger = make()
    book = await ledger.open()
    for commit in commits:
        numbered: list[Entry] = []
        for entry in commit:
            if isinstance(entry, PutFact):
                seq = book.meta.facts_seq + 1 + sum(isinstance(e, PutFact) for e in numbered)
                entry = PutFact(entry.fact.but(seq=seq))
            numbered.append(entry)
        await ledger.commit(numbered)
        book.apply(numbered)
    await ledger.close()
    again = make()
    found = await again.open()
    await again.commit([Forget(uid) for uid in (*found.executions, *found.states, *found.facts)])
    await again.commit([Forget(uid) for uid in found.publications])
    await again.close()
    assert found.meta == book.meta
    assert found.executions == book.executions
    assert found.states == book.states
    assert found.publications == book.publications
    assert list(found.facts.items()) == list(book.facts.items())


def test_elapsed_time_is_told_within_one_boot_only() -> None:
    later = Instant(wall=NOW.wall - timedelta(days=1), mono=20.0, boot="b1")
    assert NOW.elapsed(later) == 7.5
    assert NOW.elapsed(later.but(boot="b2")) is None


def test_states_of_an_older_version_can_be_read() -> None:
    """Fields that came later have defaults."""
    text = new_state("i", NOW).encode()
    assert RunnerState.decode(text) == new_state("i", NOW)
    assert Execution.decode(execution().encode()) == execution()
