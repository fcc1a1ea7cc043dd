"""The node's memory: what it was given to do, how far each is, and what it has yet to tell.

`Ledger` is the durable side (`bacalhau.node.ledger.SqliteLedger`, `MemoryLedger` here), `Book` its
content. Whatever belongs together goes into one `commit`, which is stored whole or not at all.
Facts are coalesced: of each object only the newest waits, so that the outbox is never longer than
the number of objects, however long a node is cut off.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bacalhau_api.base import Model, Timestamp
from bacalhau_api.errors import TerminalError, UnavailableError
from bacalhau_api.v1.execution import Execution, Publication, PublicationReport
from bacalhau_api.wire import Fact
from bacalhau_controllers.runner.state import Instant, RunnerState


class LedgerFullError(UnavailableError):
    """There is no room to write (disk full, quota). Nothing was changed; works again once there
    is room."""

    reason = "LedgerFull"


class LedgerBrokenError(TerminalError):
    """The ledger cannot be read or written. The agent must end, and look at it anew."""

    reason = "LedgerBroken"


class LedgerHeldError(TerminalError):
    """Another agent runs on this ledger."""

    reason = "LedgerHeld"


class Meta(Model):
    """The one record about the node itself.

    `incarnation` is made with the ledger, so that a wiped or replaced one is noticed. `facts_seq`
    is the highest number ever given to a fact, `facts_acked` the highest known to be stored.
    `contact` is when the last request was *sent* that the orchestrator answered.
    """

    incarnation: str
    facts_seq: int = 0
    facts_acked: int = 0
    contact: Instant | None = None
    created: Timestamp | None = None


class PublicationState(Model):
    """How far one publication is on this node."""

    due: Instant | None = None
    tries: int = 0
    since: Instant
    is_assigned: bool = True
    detail: str = ""
    report: PublicationReport


class Record(Model):
    """One execution: as assigned (without its status), and the runner's state."""

    execution: Execution
    state: RunnerState


class PublicationRecord(Model):
    """One publication: as assigned (without its status), and how far it is."""

    publication: Publication
    state: PublicationState


# -- entries of a commit ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PutMeta:
    """Replace the record about the node."""

    meta: Meta


@dataclass(frozen=True, slots=True)
class PutRecord:
    """Create or replace an execution's record, by uid."""

    record: Record


@dataclass(frozen=True, slots=True)
class DropRecord:
    """Forget an execution, and what was yet to be told of it."""

    uid: str


@dataclass(frozen=True, slots=True)
class PutPublication:
    """Create or replace a publication's record, by uid."""

    record: PublicationRecord


@dataclass(frozen=True, slots=True)
class DropPublication:
    """Forget a publication, and what was yet to be told of it."""

    uid: str


@dataclass(frozen=True, slots=True)
class PutFact:
    """Add a fact to the outbox, in place of an older one of the same object. `seq` must be above
    every earlier one; `Meta.facts_seq` follows it."""

    fact: Fact


@dataclass(frozen=True, slots=True)
class AckFacts:
    """Drop the facts up to `seq`; `Meta.facts_acked` follows it."""

    seq: int


@dataclass(frozen=True, slots=True)
class DropFact:
    """Drop the fact of one object: it is stored already, or nobody wants it."""

    uid: str


Entry = (
    PutMeta | PutRecord | DropRecord | PutPublication | DropPublication | PutFact | AckFacts
    | DropFact
)  # fmt: skip


@dataclass(slots=True)
class Book:
    """A ledger's content in memory. Dictionaries are by uid; `facts` is in order of `seq`."""

    meta: Meta
    records: dict[str, Record] = field(default_factory=dict)
    publications: dict[str, PublicationRecord] = field(default_factory=dict)
    facts: dict[str, Fact] = field(default_factory=dict)

    def apply(self, entries: Sequence[Entry]) -> None:
        """Make the changes of one commit. This is what a commit means, for every ledger."""
        for entry in entries:
            match entry:
                case PutMeta(meta):
                    self.meta = meta
                case PutRecord(record):
                    self.records[record.execution.metadata.uid] = record
                case DropRecord(uid):
                    self.records.pop(uid, None)
                    self.facts.pop(uid, None)
                case PutPublication(publication):
                    self.publications[publication.publication.metadata.uid] = publication
                case DropPublication(uid):
                    self.publications.pop(uid, None)
                    self.facts.pop(uid, None)
                case PutFact(fact):
                    self.facts.pop(fact.uid, None)  # so that the newest is last
                    self.facts[fact.uid] = fact
                    self.meta = self.meta.but(facts_seq=max(self.meta.facts_seq, fact.seq))
                case AckFacts(seq):
                    for uid in [uid for uid, fact in self.facts.items() if fact.seq <= seq]:
                        del self.facts[uid]
                    self.meta = self.meta.but(facts_acked=max(self.meta.facts_acked, seq))
                case DropFact(uid):
                    self.facts.pop(uid, None)

    def copy(self) -> "Book":
        """A copy that later commits do not change. What it holds is immutable."""
        return Book(self.meta, dict(self.records), dict(self.publications), dict(self.facts))


class Ledger(Protocol):
    """Durable storage of one Book. One agent at a time; one call at a time."""

    async def open(self) -> Book:
        """Read everything; make a new ledger with a new incarnation where there is none (or none
        that can be read: that one is set aside).

        Raises LedgerHeldError, LedgerBrokenError.
        """
        ...

    async def commit(self, entries: Sequence[Entry]) -> None:
        """Store all entries, in order, or none. They survive a power failure once this returns.

        Raises LedgerFullError (nothing was changed) or LedgerBrokenError.
        """
        ...

    async def close(self) -> None:
        """Let go, so that another agent may open it."""
        ...


class MemoryLedger:
    """A ledger for tests and simulations. It outlives the agent that uses it, as a disk would.

    `boundary`, if given, is awaited before and after each commit with the words `ledger.commit`
    and `ledger.committed`: a simulation crashes the agent there. `is_full` makes commits fail.
    """

    def __init__(
        self,
        incarnation: str,
        *,
        boundary: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._book = Book(Meta(incarnation=incarnation))
        self._boundary = boundary
        self._is_open = False
        self.is_full = False
        self.commits = 0

    @property
    def stored(self) -> Book:
        """What would survive now."""
        return self._book.copy()

    async def open(self) -> Book:
        """See Ledger."""
        if self._is_open:
            raise LedgerHeldError("another agent runs on this ledger; stop it first")
        self._is_open = True
        return self._book.copy()

    async def commit(self, entries: Sequence[Entry]) -> None:
        """See Ledger."""
        if not self._is_open:
            raise LedgerBrokenError("the ledger is not open")
        if self._boundary:
            await self._boundary("ledger.commit")
        if self.is_full:
            raise LedgerFullError("the disk is full")
        # Through JSON, as on a disk: what does not survive that shows at once.
        self._book.apply([_through_json(entry) for entry in entries])
        self.commits += 1
        if self._boundary:
            await self._boundary("ledger.committed")

    async def close(self) -> None:
        """See Ledger."""
        self._is_open = False

    def crash(self) -> None:
        """The agent is gone without closing."""
        self._is_open = False


def _through_json(entry: Entry) -> Entry:
    match entry:
        case PutMeta(meta):
            return PutMeta(Meta.decode(meta.encode()))
        case PutRecord(record):
            return PutRecord(Record.decode(record.encode()))
        case PutPublication(publication):
            return PutPublication(PublicationRecord.decode(publication.encode()))
        case PutFact(fact):
            return PutFact(Fact.decode(fact.encode()))
        case _:
            return entry
