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
from bacalhau_api.v1.execution import (
    Execution,
    ExecutionStatus,
    Publication,
    PublicationReport,
    PublicationStatus,
)
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


# -- entries of a commit ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PutContact:
    """Note when the orchestrator was last heard."""

    contact: Instant


@dataclass(frozen=True, slots=True)
class PutExecution:
    """Create or replace an execution as assigned. Its status is not kept."""

    execution: Execution


@dataclass(frozen=True, slots=True)
class PutState:
    """Create or replace the runner's state of an execution."""

    uid: str
    state: RunnerState


@dataclass(frozen=True, slots=True)
class PutPublication:
    """Create or replace a publication as assigned. Its status is not kept."""

    publication: Publication


@dataclass(frozen=True, slots=True)
class PutPublicationState:
    """Create or replace how far a publication is."""

    uid: str
    state: PublicationState


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop an execution or a publication, its state, and what was yet to be told of it."""

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
    """Drop the fact of one object: it is stored already, or nobody wants it. With `seq`, only if
    it is still that one."""

    uid: str
    seq: int | None = None


Entry = (
    PutContact | PutExecution | PutState | PutPublication | PutPublicationState | Forget | PutFact
    | AckFacts | DropFact
)  # fmt: skip


@dataclass(slots=True)
class Book:
    """A ledger's content in memory. Dictionaries are by uid; `facts` is in order of `seq`."""

    meta: Meta
    executions: dict[str, Execution] = field(default_factory=dict)
    states: dict[str, RunnerState] = field(default_factory=dict)
    publications: dict[str, Publication] = field(default_factory=dict)
    publication_states: dict[str, PublicationState] = field(default_factory=dict)
    facts: dict[str, Fact] = field(default_factory=dict)

    @classmethod
    def empty(cls) -> "Book":
        """Of no ledger: stands in until one is opened."""
        return cls(Meta(incarnation=""))

    def apply(self, entries: Sequence[Entry]) -> None:
        """Make the changes of one commit. This is what a commit means, for every ledger."""
        for entry in entries:
            match entry:
                case PutContact(contact):
                    self.meta = self.meta.but(contact=contact)
                case PutExecution(execution):
                    bare = execution.but(status=ExecutionStatus())
                    self.executions[execution.metadata.uid] = bare
                case PutState(uid, state):
                    self.states[uid] = state
                case PutPublication(publication):
                    bare_one = publication.but(status=PublicationStatus())
                    self.publications[publication.metadata.uid] = bare_one
                case PutPublicationState(uid, progress):
                    self.publication_states[uid] = progress
                case Forget(uid):
                    self.executions.pop(uid, None)
                    self.states.pop(uid, None)
                    self.publications.pop(uid, None)
                    self.publication_states.pop(uid, None)
                    self.facts.pop(uid, None)
                case PutFact(fact):
                    self.facts.pop(fact.uid, None)  # so that the newest is last
                    self.facts[fact.uid] = fact
                    self.meta = self.meta.but(facts_seq=max(self.meta.facts_seq, fact.seq))
                case AckFacts(seq):
                    for uid in [uid for uid, fact in self.facts.items() if fact.seq <= seq]:
                        del self.facts[uid]
                    self.meta = self.meta.but(facts_acked=max(self.meta.facts_acked, seq))
                case DropFact(uid, seq):
                    held = self.facts.get(uid)
                    if held is not None and seq in (None, held.seq):
                        del self.facts[uid]

    def copy(self) -> "Book":
        """A copy that later commits do not change. What it holds is immutable."""
        return Book(
            self.meta,
            dict(self.executions),
            dict(self.states),
            dict(self.publications),
            dict(self.publication_states),
            dict(self.facts),
        )


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
        case PutContact(contact):
            return PutContact(Instant.decode(contact.encode()))
        case PutExecution(execution):
            return PutExecution(Execution.decode(execution.encode()))
        case PutState(uid, state):
            return PutState(uid, RunnerState.decode(state.encode()))
        case PutPublication(publication):
            return PutPublication(Publication.decode(publication.encode()))
        case PutPublicationState(uid, progress):
            return PutPublicationState(uid, PublicationState.decode(progress.encode()))
        case PutFact(fact):
            return PutFact(Fact.decode(fact.encode()))
        case _:
            return entry
