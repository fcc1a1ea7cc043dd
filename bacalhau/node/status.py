"""How a node is, by its own word: what `bacalhau node status` shows, with or without an
orchestrator.

Objects that the API has too (Execution, Publication, Node) keep its shape; an execution gets one
more field, `local`, for what only its node knows.
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field

from bacalhau.node.ledger import SqliteLedger
from bacalhau.node.refusal import Refusable, is_refused
from bacalhau.replies import Reply
from bacalhau_api.base import Timestamp
from bacalhau_api.meta import API_VERSION, Condition, Contact, ObjectMeta, Waiting
from bacalhau_api.v1.execution import Execution, ExecutionStatus, Publication, PublicationStatus
from bacalhau_api.v1.job import Resources
from bacalhau_api.v1.node import Membership, Node, NodeInfo, NodeSpec, NodeStatus
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.runner.agent import Agent
from bacalhau_controllers.runner.outbox import measure
from bacalhau_controllers.runner.session import Standing

SILENT_SECONDS = 20.0
SILENT_BEATS = 4
"""Without an answer for so long, and for so many beats, a node counts as cut off though its line
is up."""


class Line(Refusable, Protocol):
    """What the status asks of the line to the orchestrator."""

    @property
    def redial_seconds(self) -> float | None:
        """How long until the next try; None if none is waited for."""
        ...


class Connection(Reply):
    """How the node stands with the orchestrator. `since` is when the present state began: the
    session, or the silence (None if it was never heard). `refused`: it does not know this node."""

    connected: bool
    approved: bool = False
    refused: bool = False
    orchestrator: str = ""
    since: Timestamp | None = None
    last_contact: Timestamp | None = None
    last_error: str = ""
    next_try: Timestamp | None = None


class Waits(Reply):
    """What has yet to be handed over. `bytesMax` 0 is no bound; `uploadBytesPerSecond` 0 is no
    limit."""

    facts: int = 0
    facts_bytes: int = 0
    facts_oldest: Timestamp | None = None
    results: int = 0
    results_bytes: int = 0
    results_oldest: Timestamp | None = None
    bytes_max: int = 0
    full: bool = False
    upload_bytes_per_second: int = 0


class LedgerHealth(Reply):
    """The node's ledger. `setAside` names damaged ones that were replaced, oldest first."""

    path: str
    healthy: bool = True
    message: str = ""
    size_bytes: int = 0
    schema_version: int = 0
    created: Timestamp | None = None
    set_aside: tuple[str, ...] = ()


class Disk(Reply):
    """The file system of the data directory."""

    path: str
    total_bytes: int = 0
    free_bytes: int = 0


class AgentStatus(Reply):
    """Everything about one node's agent. `executions` counts by phase, `publications` too."""

    api_version: Literal["bacalhau.org/v1"] = API_VERSION
    kind: Literal["AgentStatus"] = "AgentStatus"
    node: str
    incarnation: str
    version: str
    time: Timestamp
    started: Timestamp
    recovering: bool = False
    connection: Connection
    executions: dict[str, int] = Field(default_factory=dict)
    publications: dict[str, int] = Field(default_factory=dict)
    stopping: tuple["Stopping", ...] = ()
    outbox: Waits
    ledger: LedgerHealth
    disk: Disk
    allocated: Resources
    capacity: Resources
    conditions: tuple[Condition, ...] = ()


class Stopping(Reply):
    """An execution that this node will stop at `at` unless the orchestrator is heard before, by its
    disconnect policy."""

    namespace: str
    name: str
    at: Timestamp


class Local(Reply):
    """What only the node knows of an execution. `stopAt` is set while the node is cut off and the
    disconnect policy will stop it then; `unsentFacts` is 0 or 1, because of each execution only the
    newest waits."""

    stage: str
    since: Timestamp
    run: int = 0
    detail: str = ""
    stop_at: Timestamp | None = None
    unsent_facts: int = 0
    unsent_bytes: int = 0


class LocalExecution(Execution):
    """An execution, as its node sees it."""

    local: Local


class NodeView:
    """Reads one running agent. Everything is of the moment it is asked for."""

    def __init__(
        self, agent: Agent, ledger: SqliteLedger, line: Line, clock: Clock, data: Path
    ) -> None:
        self._agent = agent
        self._ledger = ledger
        self._line = line
        self._clock = clock
        self._data = data
        self._started = clock.now()
        self.upload_bytes_per_second = 0

    @property
    def node(self) -> str:
        """The node's name."""
        return self._agent.site.node

    @property
    def is_connected(self) -> bool:
        """Whether the orchestrator was heard in the present session, a moment ago."""
        standing = self._agent.standing
        patience = max(SILENT_SECONDS, SILENT_BEATS * standing.beat_seconds)
        return standing.is_linked and self._agent.silence_seconds() < patience

    # -- as a whole ------------------------------------------------------------------------------

    def status(self) -> AgentStatus:
        """The node as a whole."""
        agent, site = self._agent, self._agent.site
        book, info = site.book, agent.info()
        executions = list(self.executions())
        return AgentStatus(
            node=site.node,
            incarnation=book.meta.incarnation,
            version=info.version,
            time=self._clock.now(),
            started=self._started,
            recovering=not agent.is_recovered,
            connection=self._connection(agent.standing),
            executions=dict(Counter(str(one.phase) for one in executions)),
            publications=dict(
                Counter(str(one.report.phase) for one in book.publication_states.values())
            ),
            stopping=tuple(
                Stopping(namespace=one.ref.namespace, name=one.name, at=one.local.stop_at)
                for one in executions
                if one.local.stop_at is not None
            ),
            outbox=self._waits(),
            ledger=self._ledger_health(),
            disk=self._disk(),
            allocated=site.allocator.allocated,
            capacity=site.allocator.capacity,
            conditions=info.conditions,
        )

    def _connection(self, standing: Standing) -> Connection:
        contact = self._agent.contact
        is_connected = self.is_connected
        error = self._line.last_error
        if not error and not standing.is_linked:
            error = standing.message
        if not error and not is_connected:
            error = f"no answer for {self._agent.silence_seconds():.0f} s"
        again = self._line.redial_seconds
        next_try = None
        if again is not None:
            next_try = self._clock.now() + timedelta(seconds=again)
        elif not is_connected and standing.again is not None:
            next_try = standing.again.wall
        since = standing.since.wall if is_connected and standing.since else None
        if not is_connected and contact is not None:
            since = contact.wall
        return Connection(
            connected=is_connected,
            approved=standing.is_approved,
            refused=not is_connected and is_refused(self._line),
            orchestrator=self._line.address,
            since=since,
            last_contact=contact.wall if contact else None,
            last_error="" if is_connected else error,
            next_try=next_try,
        )

    def _waits(self) -> Waits:
        site = self._agent.site
        held = measure(site.book)
        return Waits(
            facts=held.facts,
            facts_bytes=held.facts_bytes,
            facts_oldest=held.facts_since,
            results=held.results,
            results_bytes=held.results_bytes,
            results_oldest=held.results_since,
            bytes_max=site.room.bytes_max,
            full=bool(site.room.overflow),
            upload_bytes_per_second=self.upload_bytes_per_second,
        )

    def _ledger_health(self) -> LedgerHealth:
        full = self._agent.site.room.ledger_trouble
        files = self._ledger.files()
        return LedgerHealth(
            path=str(files.path),
            healthy=full is None,
            message=full.message if full else "",
            size_bytes=files.size_bytes,
            schema_version=files.schema_version,
            created=self._agent.site.book.meta.created,
            set_aside=files.set_aside,
        )

    def _disk(self) -> Disk:
        try:
            usage = shutil.disk_usage(self._data)
        except OSError:
            return Disk(path=str(self._data))
        return Disk(path=str(self._data), total_bytes=usage.total, free_bytes=usage.free)

    # -- objects ---------------------------------------------------------------------------------

    def executions(self) -> Iterator[LocalExecution]:
        """The executions in the ledger, in order of arrival, each as it is now."""
        book, now = self._agent.site.book, self._clock.now()
        is_cut_off = not self.is_connected
        for uid, execution in book.executions.items():
            state = self._agent.state_of(uid)
            if state is None:
                continue
            fact = book.facts.get(uid)
            stop_at = self._stop_at(execution, now) if is_cut_off else None
            if state.stage.is_over:
                stop_at = None
            yield LocalExecution(
                metadata=execution.metadata,
                spec=execution.spec,
                status=ExecutionStatus(
                    report=state.report, waiting=self._until_stopped(stop_at, now)
                ),
                local=Local(
                    stage=str(state.stage),
                    since=state.since.wall,
                    run=state.run,
                    detail=state.detail,
                    stop_at=stop_at,
                    unsent_facts=0 if fact is None else 1,
                    unsent_bytes=0 if fact is None else len(fact.encode()),
                ),
            )

    def _stop_at(self, execution: Execution, now: datetime) -> datetime | None:
        allowed = execution.spec.local_deadline_seconds
        if allowed is None:
            return None
        return now + timedelta(seconds=max(0.0, allowed - self._agent.silence_seconds()))

    def _until_stopped(self, stop_at: datetime | None, now: datetime) -> Waiting | None:
        if stop_at is None:
            return None
        return Waiting(
            what="Contact",
            message="the node is cut off; its disconnect policy stops it then, unless the "
            "orchestrator is heard before",
            since=self._agent.contact.wall if self._agent.contact else self._started,
            until=stop_at,
            mover="orchestrator",
        )

    def publications(self) -> Iterator[Publication]:
        """The publications in the ledger, each as it is now."""
        book = self._agent.site.book
        for uid, publication in book.publications.items():
            state = book.publication_states.get(uid)
            if state is not None:
                yield publication.but(status=PublicationStatus(report=state.report))

    def nodes(self) -> Iterator[Node]:
        """This node. What only the orchestrator knows of it is at its default, but for contact and
        membership as far as the last session told."""
        connection = self._connection(self._agent.standing)
        info: NodeInfo = self._agent.info()
        is_approved = connection.approved or not connection.connected
        yield Node(
            metadata=ObjectMeta(name=self.node, namespace=""),
            spec=NodeSpec(membership=Membership.APPROVED if is_approved else Membership.PENDING),
            status=NodeStatus(
                info=info,
                incarnation=self._agent.site.book.meta.incarnation,
                contact=Contact.REACHABLE if connection.connected else Contact.UNKNOWN,
                contact_since=connection.since,
                connected_since=connection.since if connection.connected else None,
                conditions=info.conditions,
            ),
        )
