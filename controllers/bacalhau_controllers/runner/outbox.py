"""What a node has yet to hand over: facts that are not stored yet, and results that wait for their
delivery. Pure.

Facts of one object supersede each other, so there are never more than objects; final ones stay
until they are acknowledged, whatever happens. Results stay on the node's disk until they are
delivered. Both count against one bound. When it is reached, or the ledger cannot be written, the
node takes on no new work, keeps what is finished, and says so in its conditions.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from bacalhau_api.meta import Condition
from bacalhau_api.v1.node import LEDGER_FULL, OUTBOX_FULL
from bacalhau_api.wire import Fact
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.runner.commit import GroupCommit
from bacalhau_controllers.runner.ledger import Book, LedgerFullError
from bacalhau_controllers.runner.state import Stage

REMEDY: Final = "it is emptied by contact with the orchestrator; see `bacalhau node status`"


@dataclass(frozen=True, slots=True)
class Outbox:
    """Counts, bytes, and the age of the oldest. `results_*` are about outputs of finished
    executions whose report is not stored, or that a publication still has to deliver."""

    facts: int = 0
    facts_bytes: int = 0
    facts_since: datetime | None = None
    results: int = 0
    results_bytes: int = 0
    results_since: datetime | None = None

    @property
    def size_bytes(self) -> int:
        """What counts against the bound."""
        return self.facts_bytes + self.results_bytes


def measure(book: Book) -> Outbox:
    """Look at everything. Takes about 10 µs a fact."""
    wanted = {
        publication.spec.execution_uid
        for uid, publication in book.publications.items()
        if uid in book.publication_states and not book.publication_states[uid].report.phase.is_final
    }
    waiting = [
        state.report
        for uid, state in book.states.items()
        if state.stage is Stage.DONE and state.has_outputs and (uid in book.facts or uid in wanted)
    ]
    ages = [when for fact in book.facts.values() if (when := news_since(fact)) is not None]
    ends = [report.finished_at for report in waiting if report.finished_at is not None]
    return Outbox(
        facts=len(book.facts),
        facts_bytes=sum(len(fact.encode()) for fact in book.facts.values()),
        facts_since=min(ages, default=None),
        results=len(waiting),
        results_bytes=sum(one.outputs.size_bytes for one in waiting if one.outputs),
        results_since=min(ends, default=None),
    )


def news_since(fact: Fact) -> datetime | None:
    """Since when what a fact says has been so, by the node's wall clock; None if it does not
    tell."""
    report = fact.execution or fact.publication
    if report is None:
        return None
    return report.finished_at or (report.waiting.since if report.waiting else None)


class Room:
    """Whether this node can take on more. `bytes_max` 0 means without bound.

    On a full disk, small commits still succeed now and then. So the ledger counts as full until
    none was refused for `calm_seconds`.
    """

    def __init__(
        self, writer: GroupCommit, clock: Clock, bytes_max: int, calm_seconds: float
    ) -> None:
        self.bytes_max = bytes_max
        self.outbox = Outbox()
        self._writer = writer
        self._clock = clock
        self._calm_seconds = calm_seconds
        self._refused = 0
        self._refused_at = 0.0
        self._trouble: LedgerFullError | None = None
        self._since: dict[str, Condition] = {}

    @property
    def ledger_trouble(self) -> LedgerFullError | None:
        """Why the ledger counts as full; None if it does not."""
        writer, now = self._writer, self._clock.monotonic()
        if writer.refused != self._refused:
            self._refused, self._refused_at = writer.refused, now
            self._trouble = writer.refusal
        if writer.full is None and now - self._refused_at >= self._calm_seconds:
            self._trouble = None
        return self._trouble

    def look(self) -> None:
        """Measure anew."""
        self.outbox = measure(self._writer.book)

    @property
    def overflow(self) -> str:
        """Words for an outbox that is full; empty if it is not."""
        held = self.outbox.size_bytes
        if self.bytes_max and held >= self.bytes_max:
            return f"{held} of {self.bytes_max} bytes wait to be handed over; {REMEDY}"
        return ""

    def conditions(self) -> tuple[Condition, ...]:
        """What is wrong now, since it became so. Words that change with each byte are left out, so
        that nothing is told anew while nothing else has changed."""
        ledger = self.ledger_trouble
        if ledger is None and not self.overflow:
            self._since.clear()
            return ()
        kind = LEDGER_FULL if ledger is not None else OUTBOX_FULL
        held = self._since.get(kind)
        if held is None:
            message = (
                ledger.message
                if ledger is not None
                else f"{self.bytes_max} bytes or more wait to be handed over; {REMEDY}"
            )
            held = Condition(
                type=kind,
                status=True,
                reason="NoRoom",
                message=f"no new work is taken on, what is finished is kept: {message}",
                last_transition_time=self._clock.now(),
            )
            self._since = {kind: held}
        return (held,)
