"""The node's side of the conversation with the orchestrator: hello, full list, changes, beats, and
the outbox of facts, sent in order until acknowledged.

A session begins with a hello and ends with the link, a gap in the changes, or a word of the
orchestrator; then another begins. What a message means is left to the `Desk`, which is the agent.
"""

import asyncio
import hmac
import itertools
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from bacalhau_api.errors import UnavailableError
from bacalhau_api.v1.node import NodeInfo
from bacalhau_api.wire import (
    Ack,
    Applied,
    Assignments,
    Beat,
    BeatReply,
    Changes,
    Fact,
    FactBatch,
    Gone,
    Hello,
    Known,
    Refused,
    Welcome,
    WelcomePart,
)
from bacalhau_controllers.contract import Clock, Ids
from bacalhau_controllers.runner.commit import GroupCommit
from bacalhau_controllers.runner.guard import within
from bacalhau_controllers.runner.ledger import AckFacts, LedgerFullError
from bacalhau_controllers.runner.ports import Link
from bacalhau_controllers.runner.state import Instant
from bacalhau_controllers.tasks import until_first

logger = logging.getLogger(__name__)

FACTS_MAX = 500
FACTS_BYTES_MAX = 512 * 1024
HELD_BYTES_MAX = 256 * 1024
PARTS_MAX = 10_000
WELCOME_SECONDS = 60.0
"""How long changes wait for the full list that they follow."""

INFO_BEATS: Final = 12
"""What the node is goes with one beat of so many also if it did not change: a late copy of an older
beat may have said something else."""
BEAT_SECONDS_MAX = 60.0
PAUSE_SECONDS = 0.2
PAUSE_SECONDS_MAX = 30.0
ASK_AGAIN_SECONDS = 30.0
"""Between hellos while the node is not approved, or its ledger cannot be written."""

SHORT_SECONDS = 10.0
"""A session shorter than this makes the next one over the same line wait longer."""


class Desk(Protocol):
    """What the session knows and tells of the node."""

    def now(self) -> Instant:
        """The present moment."""
        ...

    def info(self) -> NodeInfo:
        """What the node says of itself."""
        ...

    def held(self) -> tuple[Known, ...]:
        """The executions in the ledger, live ones first."""
        ...

    def heard(self, sent: Instant) -> None:
        """A request sent then was answered in this session."""
        ...

    def told(self) -> None:
        """Facts were acknowledged and are dropped."""
        ...

    async def parted(self) -> None:
        """A session has ended."""
        ...

    async def take_list(
        self, assignments: Assignments, steps: Mapping[str, int], sent: Instant
    ) -> None:
        """The full list. Returns once it is in the ledger. Raises LedgerFullError."""
        ...

    async def take_changes(self, assignments: Assignments, gone: tuple[Gone, ...]) -> None:
        """Changes to it. Returns once they are in the ledger. Raises LedgerFullError."""
        ...


class SessionOver(Exception):
    """This session has ended; another may begin after a pause."""

    def __init__(self, reason: str, again_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.again_seconds = again_seconds


@dataclass(slots=True)
class Standing:
    """How the node stands with the orchestrator, for people to read."""

    is_linked: bool = False
    is_welcome: bool = False
    is_approved: bool = False
    message: str = "not connected yet"
    since: Instant | None = None
    beat_seconds: float = 5.0
    again: Instant | None = None
    """When the next session is tried, while there is none and the line is up."""


class Session:
    """All sessions of one agent, one after another."""

    def __init__(
        self,
        node: str,
        link: Link,
        desk: Desk,
        writer: GroupCommit,
        clock: Clock,
        rng: random.Random,
        ids: Ids,
        request_seconds: float,
    ) -> None:
        self._node = node
        self._link = link
        self._desk = desk
        self._writer = writer
        self._clock = clock
        self._rng = rng
        self._ids = ids
        self._request_seconds = request_seconds
        self._up = asyncio.Event()
        self._is_broken = asyncio.Event()
        self._over = asyncio.Event()
        self._over_reason = ""
        self._welcomed = asyncio.Event()
        self._in_turn = asyncio.Lock()
        self._seen = 0
        self._info: NodeInfo | None = None
        self.id = ""
        self.standing = Standing()

    def is_current(self, node: str, session: str) -> bool:
        """Whether a message carries this node's name and its secret session id."""
        is_mine = hmac.compare_digest(session.encode(), self.id.encode())
        return bool(self.id) and node == self._node and is_mine

    def hello_again(self, reason: str) -> None:
        """End this session, so that another brings the full list anew."""
        if not self._over.is_set():
            self._over_reason = reason
            self._over.set()

    async def run(self) -> None:
        """Keep a session open whenever the link is up, for ever."""
        self._link.set_handlers(
            on_up=self._on_up, on_down=self._on_down, on_changes=self._on_changes
        )
        pause = PAUSE_SECONDS
        while True:
            await self._up.wait()
            if self._is_broken.is_set():
                self._is_broken.clear()
                pause = PAUSE_SECONDS  # how the last line did says nothing of this one
            began = self._clock.monotonic()
            over = await self._one()
            is_short = self._clock.monotonic() - began < SHORT_SECONDS
            pause = min(pause * 2, PAUSE_SECONDS_MAX) if is_short else PAUSE_SECONDS
            if not self._is_broken.is_set():
                seconds = max(over.again_seconds, pause) * self._rng.uniform(0.75, 1.25)
                self.standing.again = self._desk.now().plus(seconds)
                await until_first(pause=self._clock.sleep(seconds), line=self._next_line())

    async def _next_line(self) -> None:
        await self._is_broken.wait()

    # -- one session ---------------------------------------------------------------------------

    async def _one(self) -> SessionOver:
        self.id = self._ids.uid()
        self._seen = 0
        self._over.clear()
        self._welcomed.clear()
        over = await self._until_over()
        self.id = ""
        if over.reason != self.standing.message:
            logger.info("Ended session", extra={"reason": over.reason})
        self.standing = Standing(message=over.reason, since=self._desk.now())
        await self._desk.parted()
        return over

    async def _until_over(self) -> SessionOver:
        try:
            welcome = await self._hello()
        except SessionOver as refusal:
            return refusal
        try:
            await until_first(
                session_end=self._end(), beats=self._beats(welcome), facts=self._facts()
            )
        except SessionOver as over:
            return over
        return SessionOver("it ended")

    async def _hello(self) -> Welcome:
        """Say hello, take the full list. Raises SessionOver."""
        self._info = self._desk.info()
        meta = self._writer.book.meta
        sent = self._desk.now()
        hello = Hello(
            node=self._node,
            session=self.id,
            incarnation=meta.incarnation,
            info=self._info,
            facts_acked=meta.facts_acked,
            held=_bounded(self._desk.held()),
        )
        first = await self._welcome(hello)
        executions = list(first.assignments.executions)
        publications = list(first.assignments.publications)
        steps = dict(first.steps)
        part = first.next_part
        while part is not None:
            if not 0 < part <= PARTS_MAX:
                raise SessionOver(f"the orchestrator offered part {part} of its list", 15.0)
            ask = WelcomePart(node=self._node, session=self.id, part=part)
            more = await self._welcome(ask)
            if more.list_id != first.list_id:
                raise SessionOver("the orchestrator's list was replaced while it was read")
            executions += more.assignments.executions
            publications += more.assignments.publications
            steps |= more.steps
            if more.next_part is not None and more.next_part <= part:
                raise SessionOver("the orchestrator's list does not end", 15.0)
            part = more.next_part
        assignments = Assignments(executions=tuple(executions), publications=tuple(publications))
        message = first.message
        try:
            await self._desk.take_list(assignments, steps, sent)
            self._welcomed.set()
        except LedgerFullError as error:
            # Alive, but not able to note anything: it goes on with what it has, and says so.
            message = f"cannot take assignments: {error.message}"
        self._desk.heard(sent)
        self.standing = Standing(
            is_linked=True,
            is_welcome=self._welcomed.is_set(),
            is_approved=first.is_approved,
            message=message,
            since=sent,
            beat_seconds=min(max(first.beat_seconds, 0.1), BEAT_SECONDS_MAX),
        )
        logger.info(
            "Began session",
            extra={"executions": len(executions), "is_approved": first.is_approved},
        )
        return first

    async def _welcome(self, ask: Hello | WelcomePart) -> Welcome:
        reply = await self._request("hello", ask)
        if not isinstance(reply, Welcome):
            raise SessionOver("the orchestrator answered a hello with something else", 15.0)
        return reply

    async def _end(self) -> None:
        await self._over.wait()
        raise SessionOver(self._over_reason)

    async def _beats(self, welcome: Welcome) -> None:
        """Say every few seconds that this node is alive."""
        period = min(max(welcome.beat_seconds, 0.1), BEAT_SECONDS_MAX)
        ask_again_at = self._clock.monotonic() + ASK_AGAIN_SECONDS
        for number in itertools.count(1):
            await self._clock.sleep(period)
            is_settled = welcome.is_approved and self._welcomed.is_set()
            if not is_settled and self._clock.monotonic() >= ask_again_at:
                raise SessionOver(self.standing.message)
            info = self._desk.info()
            is_known = info == self._info and number % INFO_BEATS
            beat = Beat(
                node=self._node,
                session=self.id,
                list_id=welcome.list_id,
                changes_seen=self._seen,
                info=None if is_known else info,
                facts_waiting=len(self._writer.book.facts),
            )
            sent = self._desk.now()
            try:
                reply = await self._request("beat", beat)
            except UnavailableError as error:
                logger.info("Missed a beat", extra={"error": error.message})
                if beat.info is not None:
                    self._info = None  # it may have been heard: whatever is true next is news
                continue
            if not isinstance(reply, BeatReply):
                continue
            self._info = info
            self._desk.heard(sent)
            if reply.hello_again:
                raise SessionOver("the orchestrator asked for a hello")

    async def _facts(self) -> None:
        """Send what is in the outbox, a batch at a time, each until it is acknowledged."""
        pause = PAUSE_SECONDS
        while True:
            facts = next_batch(self._writer.book.facts)
            if not facts:
                await self._writer.fact_stored.wait()
                self._writer.fact_stored.clear()
                continue
            batch = FactBatch(
                node=self._node,
                session=self.id,
                incarnation=self._writer.book.meta.incarnation,
                facts=facts,
            )
            sent = self._desk.now()
            try:
                reply = await self._request("facts", batch)
                if isinstance(reply, Ack):
                    self._desk.heard(sent)
                    # Never more than was sent, whatever the answer says.
                    acked = min(reply.seq, facts[-1].seq)
                    if acked >= facts[0].seq:
                        await self._writer.commit([AckFacts(acked)])
                        self._desk.told()
                        pause = PAUSE_SECONDS
                        continue
            except (UnavailableError, LedgerFullError) as error:
                logger.info("Postponed facts", extra={"error": error.message})
            await self._clock.sleep(pause * self._rng.uniform(0.75, 1.25))
            pause = min(pause * 2, PAUSE_SECONDS_MAX)

    async def _request(
        self,
        kind: Literal["hello", "facts", "beat"],
        message: Hello | WelcomePart | FactBatch | Beat,
    ) -> Welcome | Ack | BeatReply:
        """The reply. Raises SessionOver if the orchestrator refused, or nobody answered a hello;
        UnavailableError if nobody answered."""
        try:
            reply = await within(
                self._request_seconds, "the orchestrator", self._link.request(kind, message)
            )
            if reply.node != self._node or not self.is_current(reply.node, reply.session):
                raise UnavailableError("the answer is not for this session")
        except UnavailableError as error:
            if kind == "hello":
                raise SessionOver(f"no answer to hello: {error.message}") from error
            raise
        if isinstance(reply, Refused):
            again = min(max(reply.again_seconds, 0.0), 300.0)
            raise SessionOver(f"{reply.reason}: {reply.message}", again)
        return reply

    # -- what the link calls -------------------------------------------------------------------

    def _on_up(self) -> None:
        self._up.set()

    def _on_down(self) -> None:
        self._up.clear()
        self._is_broken.set()
        self.hello_again("the link is down")

    async def _on_changes(self, changes: Changes) -> Applied | None:
        """Apply in order; say nothing to what is not of this session, or leaves a gap."""
        if not self.is_current(changes.node, changes.session):
            return None
        async with self._in_turn:
            try:
                async with asyncio.timeout(WELCOME_SECONDS):
                    await self._welcomed.wait()
            except TimeoutError:
                return None
            if not self.is_current(changes.node, changes.session):
                return None
            if changes.number > self._seen + 1:
                self.hello_again("a message with changes was lost")
                return None
            if changes.number == self._seen + 1:
                try:
                    await self._desk.take_changes(changes.assignments, changes.gone)
                except LedgerFullError as error:
                    self.hello_again(f"cannot take assignments: {error.message}")
                    return None
                if not self.is_current(changes.node, changes.session):
                    return None  # the next one counts its own
                self._seen = changes.number
        return Applied(node=self._node, session=changes.session, number=changes.number)


def next_batch(facts: Mapping[str, Fact]) -> tuple[Fact, ...]:
    """The oldest facts that fit into one message; at least one if there is any."""
    batch: list[Fact] = []
    size = 0
    for fact in facts.values():
        size += len(fact.encode()) + 1
        if batch and (len(batch) >= FACTS_MAX or size > FACTS_BYTES_MAX):
            break
        batch.append(fact)
    return tuple(batch)


def _bounded(held: tuple[Known, ...]) -> tuple[Known, ...]:
    """As many as fit beside the rest of a hello."""
    size = 0
    for number, known in enumerate(held):
        size += len(known.encode()) + 1
        if size > HELD_BYTES_MAX:
            return held[:number]
    return held
