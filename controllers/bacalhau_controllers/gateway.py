"""The orchestrator's side of `bacalhau_api.wire`: sessions of nodes, over any transport.

It answers hellos, beats and facts, and pushes changed assignments. It decides nothing about jobs:
what a node is to do is what the cache holds for it. A lost message, a full buffer, a restarted
orchestrator all end in the same remedy: the node says hello again and gets the full list.
"""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from bacalhau_api.errors import BacalhauError, TransientError, UnavailableError
from bacalhau_api.meta import Contact, Ref, Resource
from bacalhau_api.v1.execution import Desired, Execution, Publication
from bacalhau_api.v1.node import Membership, Node
from bacalhau_api.wire import (
    PROTOCOL_VERSION,
    Ack,
    Assignments,
    Beat,
    BeatReply,
    Changes,
    FactBatch,
    Gone,
    Hello,
    Refused,
    Welcome,
    WelcomePart,
)
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.inbox import FactInbox
from bacalhau_controllers.node.presence import Presence

logger = logging.getLogger(__name__)

PART_BYTES_MAX = 600 * 1024
"""Assignments in one message; NATS carries at most 1 MiB."""

PUSH_TIMEOUT_SECONDS = 10.0

RIVAL_TURNS, RIVAL_TURNS_BETWEEN = 3, 30
"""After so many sessions in a row that were heard although another had taken their place, two agents
are taken to share one ledger; and after how many more it is said again."""


class Transport(Protocol):
    """Carries `Changes` to one node. Raises UnavailableError if it did not answer in time."""

    async def push(self, changes: Changes, timeout_seconds: float) -> None:
        """Deliver; return once the node has them in its ledger."""
        ...


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Intervals in seconds."""

    beat_seconds: float = 5.0
    duplicate_seconds: float = 15.0
    """A second incarnation is refused while the first was heard of within this time."""


@dataclass(slots=True)
class _Session:
    """One connection of one node, from its hello on."""

    node: str
    id: str
    incarnation: str
    heard_at: float
    epoch: str = ""
    """Of the store that its list was made from."""
    parts: list[Assignments] = field(default_factory=list)
    list_id: str = ""
    number: int = 0
    dirty: dict[Ref, str] = field(default_factory=dict)  # ref -> uid, in order of change
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    is_broken: bool = False
    sender: asyncio.Task[None] | None = None
    replaced: str = ""  # the session before it, until that one is heard once more
    rival_turns: int = 0


class Gateway:
    """All node sessions of one orchestrator. Start with `open`, stop with `close`."""

    def __init__(
        self,
        cache: Cache,
        inbox: FactInbox,
        presence: Presence,
        transport: Transport,
        clock: Clock,
        settings: GatewaySettings | None = None,
    ) -> None:
        self._cache = cache
        self._inbox = inbox
        self._presence = presence
        self._transport = transport
        self._clock = clock
        self._settings = settings or GatewaySettings()
        self._sessions: dict[str, _Session] = {}
        self._lists = 0
        self._is_open = False
        cache.observe(self._on_change)

    def open(self) -> None:
        """Begin to serve. The cache must be synced: a full list from a half-filled one would make
        nodes stop work."""
        if not self._cache.is_synced:
            raise UnavailableError("the cache is not synced yet; nodes cannot be served")
        self._is_open = True

    async def close(self) -> None:
        """Forget all sessions. Nodes go on with what they have, and say hello to the next leader."""
        self._is_open = False
        senders = [s.sender for s in self._sessions.values() if s.sender]
        self._sessions.clear()
        for sender in senders:
            sender.cancel()
        await asyncio.gather(*senders, return_exceptions=True)

    def session_of(self, node: str) -> str | None:
        """The session id that messages to this node must carry; None if it is not connected."""
        session = self._sessions.get(node)
        return session.id if session and not session.is_broken else None

    # -- requests of nodes ---------------------------------------------------------------------

    def hello(self, hello: Hello) -> Welcome | Refused:
        """Begin a session: answer with the full list (its first part)."""
        refusal = self._refusal(hello)
        if refusal:
            logger.warning("Refused node", extra={"node": hello.node, "reason": refusal.reason})
            return refusal
        known = self._live(hello.node, hello.session)
        if known is not None and known.parts:
            # A copy of the hello that began this session: nodes take a new id for each. To count
            # the changes from 1 again would make the node take new ones for old.
            return self._welcome(known, 0)
        old = self._sessions.pop(hello.node, None)
        if old and old.sender:
            old.sender.cancel()
        session = _Session(hello.node, hello.session, hello.incarnation, self._clock.monotonic())
        session.parts = list(_parts(self._assigned(hello.node)))
        session.list_id = self._next_list_id()
        session.epoch = self._epoch()
        if old is not None:
            session.replaced = old.id
            session.rival_turns = 0 if old.replaced else old.rival_turns
        self._sessions[hello.node] = session
        self._presence.hello(hello.node, hello.incarnation, hello.info, hello.session)
        logger.info("Node said hello", extra={"node": hello.node, "parts": len(session.parts)})
        return self._welcome(session, 0)

    def welcome_part(self, ask: WelcomePart) -> Welcome | Refused:
        """Answer with one more part of the full list."""
        session = self._live(ask.node, ask.session)
        if session is None or not 0 <= ask.part < len(session.parts):
            return _unknown_session(ask.node, ask.session)
        return self._welcome(session, ask.part)

    def beat(self, beat: Beat) -> BeatReply | Refused:
        """Note that a node is alive."""
        session = self._live(beat.node, beat.session)
        if session is None:
            self._note_rival(beat)
            return BeatReply(node=beat.node, session=beat.session, hello_again=True)
        session.heard_at = self._clock.monotonic()
        is_known = self._presence.heard(beat.node, session.heard_at)
        if is_known and beat.info is not None:
            self._presence.hello(beat.node, session.incarnation, beat.info, session.id)
        # A push under way is not a gap; a number ahead of ours or a broken session is. A node that
        # was removed meanwhile is forgotten, and has to introduce itself to the one that follows.
        # A late copy of a hello began this session if the node has another list than this one. A
        # store that is another one by now may lack what it was told and has acknowledged.
        is_gap = beat.list_id != session.list_id or beat.changes_seen > session.number
        is_stale = session.is_broken or not is_known or is_gap or session.epoch != self._epoch()
        return BeatReply(node=beat.node, session=beat.session, hello_again=is_stale)

    async def facts(self, batch: FactBatch) -> Ack | Refused:
        """Store a batch of facts; acknowledge the longest stored prefix."""
        session = self._live(batch.node, batch.session)
        if session is None or batch.incarnation != session.incarnation:
            return _unknown_session(batch.node, batch.session)
        session.heard_at = self._clock.monotonic()
        self._presence.heard(batch.node, session.heard_at)
        outcomes = await asyncio.gather(
            *(self._inbox.offer(batch.node, batch.incarnation, fact) for fact in batch.facts),
            return_exceptions=True,
        )
        self._tell_another(session, batch)
        acked = batch.facts[0].seq - 1 if batch.facts else 0
        for fact, outcome in zip(batch.facts, outcomes, strict=True):
            if isinstance(outcome, TransientError):
                break
            if isinstance(outcome, BaseException):
                raise outcome
            acked = fact.seq
        return Ack(node=batch.node, session=batch.session, seq=acked)

    def _tell_another(self, session: _Session, batch: FactBatch) -> None:
        """A session that began while these facts were stored has its list from before. It may be
        that of another agent with the same identity, which has to hear what became of its work."""
        present = self._sessions.get(batch.node)
        if present is None or present is session or present.is_broken:
            return
        for fact in batch.facts:
            kind = "Execution" if fact.execution is not None else "Publication"
            present.dirty[Ref(kind, fact.namespace, fact.name)] = fact.uid
        present.wake.set()

    def _note_rival(self, beat: Beat) -> None:
        """A session is heard although another has taken its place. Once it is a late message; if
        they take turns, two agents run on one ledger, each of which ends the other's session.
        Nothing is accepted twice for that, but nobody would know why the node has no peace."""
        present = self._sessions.get(beat.node)
        if present is None or present.replaced != beat.session:
            return
        present.replaced = ""
        present.rival_turns += 1
        if present.rival_turns % RIVAL_TURNS_BETWEEN == RIVAL_TURNS:
            logger.warning(
                "Heard two agents as one node, one on a copy of the other's data directory",
                extra={"node": beat.node, "hint": "stop one of them"},
            )

    # -- pushes to nodes -----------------------------------------------------------------------

    def _on_change(self, old: Resource | None, new: Resource | None) -> None:
        """Mark what a node must hear of: a new or changed spec, or a removal; never its own word
        in the status."""
        thing = new or old
        if isinstance(new, Node) and isinstance(old, Node):
            if new.spec.membership is not old.spec.membership:
                self._mark_all(new.name)
            return
        if not isinstance(thing, Execution | Publication):
            return
        if isinstance(old, Execution | Publication) and new is not None and old.spec == thing.spec:
            return
        session = self._sessions.get(thing.spec.node)
        if session is None or session.is_broken:
            return
        session.dirty[thing.ref] = thing.metadata.uid
        session.wake.set()

    def _mark_all(self, node: str) -> None:
        """Everything of a node reads differently now (`_as_told`)."""
        session = self._sessions.get(node)
        if session is not None and not session.is_broken:
            for thing in self._assigned(node):
                session.dirty[thing.ref] = thing.metadata.uid
            session.wake.set()

    async def _send(self, session: _Session) -> None:
        """Push what is marked, one message at a time, until the session ends or breaks.

        A node applies changes only after the full list that they follow."""
        while True:
            await session.wake.wait()
            session.wake.clear()
            while session.dirty:
                changes = self._take(session)
                try:
                    await self._transport.push(changes, PUSH_TIMEOUT_SECONDS)
                except BacalhauError as error:
                    # The node may or may not have got it. It will learn on its next beat that it
                    # has to say hello, and gets the full list.
                    session.is_broken = True
                    logger.warning(
                        "Lost session of node",
                        extra={"node": session.node, "error": error.message},
                    )
                    return

    def _take(self, session: _Session) -> Changes:
        """The next message: as many marked objects as fit."""
        executions: list[Execution] = []
        publications: list[Publication] = []
        gone: list[Gone] = []
        size = 0
        while session.dirty and size < PART_BYTES_MAX:
            ref, uid = next(iter(session.dirty.items()))
            now = self._cache.get(ref)
            if isinstance(now, Execution | Publication) and now.metadata.uid == uid:
                thing = self._as_told(now)
                size += len(thing.encode())
                if size > PART_BYTES_MAX and (executions or publications or gone):
                    break
                if isinstance(thing, Execution):
                    executions.append(thing)
                else:
                    publications.append(thing)
            else:
                gone.append(_gone(ref, uid))
                if now is not None:  # re-created under the same name: tell of it next
                    session.dirty.pop(ref)
                    session.dirty[ref] = now.metadata.uid
                    size += 256
                    continue
                size += 256
            session.dirty.pop(ref)
        session.number += 1
        return Changes(
            node=session.node,
            session=session.id,
            number=session.number,
            assignments=Assignments(executions=tuple(executions), publications=tuple(publications)),
            gone=tuple(gone),
        )

    # -- small parts ---------------------------------------------------------------------------

    def _refusal(self, hello: Hello) -> Refused | None:
        """Why this hello is not accepted, or None."""

        def refused(reason: str, message: str, again_seconds: float = 15.0) -> Refused:
            return Refused(
                node=hello.node,
                session=hello.session,
                reason=reason,
                message=message,
                again_seconds=again_seconds,
            )

        if not (self._is_open and self._cache.is_synced):
            return refused("NotLeading", "this orchestrator does not lead now", 1.0)
        if hello.protocol != PROTOCOL_VERSION:
            return refused(
                "ProtocolVersion",
                f"the node speaks protocol {hello.protocol}, the orchestrator "
                f"{PROTOCOL_VERSION}; upgrade the older one",
            )
        if not isinstance(self._cache.get(Ref("Node", "", hello.node)), Node):
            return refused("UnknownNode", f"node {hello.node} is not enrolled; join it first")
        old = self._sessions.get(hello.node)
        if (
            old is not None
            and old.incarnation != hello.incarnation
            and self._clock.monotonic() - old.heard_at < self._settings.duplicate_seconds
            and self._presence.is_connected(hello.node)
        ):
            return refused(
                "DuplicateNode",
                f"another agent with a different ledger is connected as {hello.node}; "
                "stop one of them, or give this one another name",
            )
        return None

    def _live(self, node: str, session_id: str) -> _Session | None:
        session = self._sessions.get(node)
        return session if self._is_open and session and session.id == session_id else None

    def _epoch(self) -> str:
        cursor = self._cache.cursor
        return cursor.epoch if cursor else ""

    def _next_list_id(self) -> str:
        """Another one for each list, also of each leader: they begin at different revisions."""
        self._lists += 1
        cursor = self._cache.cursor
        return f"{cursor.revision if cursor else 0}.{self._lists}"

    def _assigned(self, node: str) -> list[Execution | Publication]:
        """Everything that is kept for this node, what it has finished included."""
        things: list[Execution | Publication] = []
        for kind in ("Execution", "Publication"):
            for thing in self._cache.on_node(node, kind):
                if isinstance(thing, Execution | Publication):
                    things.append(self._as_told(thing))
        return things

    def _as_told(self, thing: Execution | Publication) -> Execution | Publication:
        """What a rejected node hears is to stop (I11), whatever else is still written; so does a
        node that comes back of what was given up under the policy `stop` (I12): its replacement may
        be stored, and run, before the cache knows that this one is to stop."""
        if thing.spec.desired is Desired.STOP:
            return thing
        node = self._cache.get(Ref("Node", "", thing.spec.node))
        is_rejected = isinstance(node, Node) and node.spec.membership is Membership.REJECTED
        if isinstance(thing, Publication):
            return thing.but(spec=thing.spec.but(desired=Desired.STOP)) if is_rejected else thing
        if not is_rejected and not self._is_given_up(thing):
            return thing
        reason = "NodeRejected" if is_rejected else "Disconnected"
        return thing.but(spec=thing.spec.but(desired=Desired.STOP, stop_reason=reason))

    def _is_given_up(self, execution: Execution) -> bool:
        """Whether one that its node ends by its own clock was not heard of for longer than that."""
        if execution.spec.local_deadline_seconds is None:
            return False
        is_lost = execution.status.contact is Contact.LOST
        return is_lost or self._presence.is_given_up(execution.ref)

    def _welcome(self, session: _Session, part: int) -> Welcome:
        is_last = part + 1 >= len(session.parts)
        if is_last and session.sender is None:
            # Only now may changes follow: they are numbered from the full list on.
            session.sender = asyncio.create_task(
                self._send(session), name=f"changes to {session.node}"
            )
        assignments = session.parts[part]
        node = self._cache.get(Ref("Node", "", session.node))
        is_approved = isinstance(node, Node) and node.spec.membership is Membership.APPROVED
        return Welcome(
            node=session.node,
            session=session.id,
            is_approved=is_approved,
            message="" if is_approved else "this node waits for an operator to approve it",
            time=self._clock.now(),
            beat_seconds=self._settings.beat_seconds,
            assignments=assignments,
            steps=_steps(assignments, session.incarnation),
            list_id=session.list_id,
            next_part=None if is_last else part + 1,
        )


def _parts(things: Iterable[Execution | Publication]) -> Iterable[Assignments]:
    """Cut a full list into messages. There is always at least one."""
    executions: list[Execution] = []
    publications: list[Publication] = []
    size = 0
    for thing in things:
        length = len(thing.encode())
        if size and size + length > PART_BYTES_MAX:
            yield Assignments(executions=tuple(executions), publications=tuple(publications))
            executions, publications, size = [], [], 0
        size += length
        if isinstance(thing, Execution):
            executions.append(thing)
        else:
            publications.append(thing)
    yield Assignments(executions=tuple(executions), publications=tuple(publications))


def _steps(assignments: Assignments, incarnation: str) -> dict[str, int]:
    """The step of each stored report of this incarnation, by uid."""
    things: tuple[Execution | Publication, ...] = (
        *assignments.executions,
        *assignments.publications,
    )
    reports = ((thing.metadata.uid, thing.status.report) for thing in things)
    return {uid: r.step for uid, r in reports if r is not None and r.incarnation == incarnation}


def _gone(ref: Ref, uid: str) -> Gone:
    kind: Literal["Execution", "Publication"]
    kind = "Execution" if ref.kind == "Execution" else "Publication"
    return Gone(kind=kind, namespace=ref.namespace, name=ref.name, uid=uid)


def _unknown_session(node: str, session: str) -> Refused:
    return Refused(
        node=node,
        session=session,
        reason="SessionUnknown",
        message="this session has ended; say hello again",
        again_seconds=0.1,
    )
