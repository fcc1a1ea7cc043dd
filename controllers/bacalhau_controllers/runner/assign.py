"""What a node makes of the lists that the orchestrator sends: pure, entries for one commit and
events for the executions.

Older versions of an object never override newer ones, whichever message carries them. What an
earlier ledger of this node had begun is not begun again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bacalhau_api.v1.execution import (
    Execution,
    Publication,
    PublicationPhase,
    PublicationReport,
    Report,
    merge_report,
)
from bacalhau_api.wire import Assignments, Fact, Gone
from bacalhau_controllers.runner.ledger import (
    Book,
    DropFact,
    Entry,
    PublicationState,
    PutContact,
    PutExecution,
    PutFact,
    PutPublication,
    PutPublicationState,
    PutState,
)
from bacalhau_controllers.runner.publishing import Behind, PublicationEvent, Wanted, Withdrawn
from bacalhau_controllers.runner.reporting import execution_fact
from bacalhau_controllers.runner.state import (
    Contradicted,
    Disowned,
    Event,
    Instant,
    LinkUp,
    Reassigned,
    Stage,
    Unassigned,
    lost_state,
    new_state,
)


@dataclass(slots=True)
class Orders:
    """`entries` are to be stored together; then `events` told, in order, to the executions they
    name (None: just look), and `publications` to publications. `must_ask_again` names executions that are wanted again
    while they are being removed: once they are gone, the full list is needed anew. `last_words` names what nobody
    wants any more, but is finished and not yet told: it goes once it was told."""

    entries: list[Entry] = field(default_factory=list)
    events: list[tuple[str, Event | None]] = field(default_factory=list)
    publications: list[tuple[str, PublicationEvent | None]] = field(default_factory=list)
    must_ask_again: list[str] = field(default_factory=list)
    last_words: list[str] = field(default_factory=list)


def full_list(
    book: Book, assignments: Assignments, steps: Mapping[str, int], now: Instant, contact: Instant
) -> Orders:
    """The welcome: what is held beyond it is not wanted any more.

    `contact` is when the orchestrator was last heard (when what it answered was sent).
    `steps` has the step of the report that is stored, per uid, where it is of this incarnation.
    """
    orders = Orders()
    # Before anything else is made of the list: an older copy of a ledger may take for stopped what
    # runs, and would say so if it was to stop it.
    for uid, step in steps.items():
        state = book.states.get(uid)
        if state is not None and state.report.step < step:
            orders.events.append((uid, Disowned(step)))
    _changed(orders, book, assignments, now, contact)
    _tell_again(orders, book, assignments)
    ended = {one.metadata.uid for one in assignments.executions if one.status.phase.is_final}
    for uid, step in steps.items():
        fact = book.facts.get(uid)
        # In a copied ledger the same step may say something else. The end must arrive in any case.
        is_end = fact is not None and fact.execution is not None and fact.execution.phase.is_final
        is_stored = not is_end or uid in ended
        if fact is not None and _step_of(fact) <= step and is_stored:
            orders.entries.append(DropFact(uid, fact.seq))
        progress = book.publication_states.get(uid)
        if progress is not None and progress.report.step < step:
            orders.publications.append((uid, Behind(step)))
    listed = {one.metadata.uid for one in assignments.executions}
    for uid, state in book.states.items():
        if uid in listed:
            # Whether it waits for this is its worker's to know: the ledger may lag behind. In any
            # case it is to look: the line may have broken when an earlier message was stored, and
            # with it the message's handler, before the worker was told.
            needs_contact = book.executions[uid].spec.local_deadline_seconds is not None
            if state.stage is not Stage.DONE:
                orders.events.append((uid, LinkUp() if needs_contact else None))
        elif state.stage is Stage.DONE and uid in book.facts:
            # A fact that nobody wants is acknowledged as well.
            orders.last_words.append(uid)
        else:
            orders.events.append((uid, Unassigned()))
    listed = {one.metadata.uid for one in assignments.publications}
    for uid in book.publications:
        progress = book.publication_states.get(uid)
        if uid not in listed:
            orders.publications.append((uid, Withdrawn()))
        elif progress is not None and not progress.report.phase.is_final:
            orders.publications.append((uid, None))
    return orders


def _tell_again(orders: Orders, book: Book, assignments: Assignments) -> None:
    """What was acknowledged and is not stored any more: the store lost its end, such as when a
    backup of it was restored."""
    for execution in assignments.executions:
        uid, told = execution.metadata.uid, execution.status.report
        state = book.states.get(uid)
        if state is None or uid in book.facts or not state.report.step:
            continue
        if merge_report(told, state.report) == told:
            continue
        if state.stage is Stage.DONE:  # it does not change any more
            orders.entries.append(PutFact(execution_fact(execution, state)))
        else:
            orders.events.append((uid, Contradicted(state.report.step)))
    for publication in assignments.publications:
        uid, known = publication.metadata.uid, publication.status.report
        progress = book.publication_states.get(uid)
        if progress is None or uid in book.facts or not progress.report.step:
            continue
        mine = progress.report
        is_mine = known is None or known.incarnation == mine.incarnation
        if is_mine and (known is None or (not known.phase.is_final and known.step < mine.step)):
            orders.publications.append((uid, Behind(mine.step)))


def changes(
    book: Book, assignments: Assignments, gone: Iterable[Gone], now: Instant, contact: Instant
) -> Orders:
    """What changed since the full list."""
    orders = Orders()
    for one in gone:
        if one.kind == "Execution" and one.uid in book.states:
            orders.events.append((one.uid, Unassigned()))
        elif one.kind == "Publication" and one.uid in book.publications:
            orders.publications.append((one.uid, Withdrawn()))
    _changed(orders, book, assignments, now, contact)
    return orders


def _changed(
    orders: Orders, book: Book, assignments: Assignments, now: Instant, contact: Instant
) -> None:
    orders.entries.append(PutContact(contact))
    for execution in assignments.executions:
        _execution(book, execution, now, orders)
    for publication in assignments.publications:
        _publication(book, publication, now, orders)


def _execution(book: Book, execution: Execution, now: Instant, orders: Orders) -> None:
    uid = execution.metadata.uid
    held = book.executions.get(uid) if uid in book.states else None
    told = execution.status.report
    if held is None:
        if told is not None and told.phase.is_final:
            return  # finished by an earlier ledger of this node; nothing is left to do
        state = new_state(book.meta.incarnation, now)
        orders.entries.append(PutExecution(execution))
        if told is not None:
            state = lost_state(execution, book.meta.incarnation, now)
            orders.entries.append(PutFact(execution_fact(execution, state)))
        orders.entries.append(PutState(uid, state))
        orders.events.append((uid, None))
        return
    if _is_news(execution, held):
        orders.entries.append(PutExecution(execution))
        orders.events.append((uid, None))
    state = book.states[uid]
    if told is not None and told.phase.is_final and not state.report.phase.is_final:
        # Ended long ago for everybody else: this ledger is a copy, or an older one, whatever its
        # steps look like.
        orders.events.append((uid, Disowned(told.step)))
    elif told is not None and _contradicts(told, state.report):
        orders.events.append((uid, Contradicted(told.step)))
    if not state.is_assigned:
        orders.events.append((uid, Reassigned()))
        if state.stage is Stage.CLEANING:
            orders.must_ask_again.append(uid)


def _is_news(told: Execution | Publication, held: Execution | Publication) -> bool:
    """Whether it is a newer version, or the same one told otherwise: a rejected node hears that all
    is to stop before anything is written about it."""
    new, old = told.metadata.resource_version, held.metadata.resource_version
    return new > old or (new == old and told.spec != held.spec)


def _contradicts(told: Report, mine: Report) -> bool:
    """Whether what is stored is of this very ledger, and says something else under one number."""
    is_same = (told.incarnation, told.step) == (mine.incarnation, mine.step)
    return is_same and told.phase is not mine.phase


def _publication(book: Book, publication: Publication, now: Instant, orders: Orders) -> None:
    uid = publication.metadata.uid
    held = book.publications.get(uid) if uid in book.publication_states else None
    if held is None:
        told = publication.status.report
        if told is not None and told.phase.is_final:
            return
        # Publishing is idempotent: what an earlier ledger had begun is simply done again.
        report = PublicationReport(
            step=told.step if told else 0,
            incarnation=book.meta.incarnation,
            phase=PublicationPhase.PENDING,
            attempts=told.attempts if told else 0,
        )
        orders.entries.append(PutPublication(publication))
        orders.entries.append(PutPublicationState(uid, PublicationState(since=now, report=report)))
        orders.publications.append((uid, None))
        return
    if _is_news(publication, held):
        orders.entries.append(PutPublication(publication))
        orders.publications.append((uid, None))
    if not book.publication_states[uid].is_assigned:
        orders.publications.append((uid, Wanted()))


def _step_of(fact: Fact) -> int:
    report = fact.execution or fact.publication
    return report.step if report else 0
