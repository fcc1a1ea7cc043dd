"""The node's agent: runs what the ledger says, with or without an orchestrator.

On start it reads the ledger, asks the engines what really runs, adopts it or records how it ended,
and only then connects. From then on workers move executions and publications, the session brings
orders and carries news, and `Upkeep` looks after what no single execution sees.
"""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Mapping

from pydantic import Field

from bacalhau_api.base import Model
from bacalhau_api.errors import BacalhauError, TransientError
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import Resources
from bacalhau_api.v1.node import Capability, NodeInfo
from bacalhau_api.wire import Assignments, Gone, Known
from bacalhau_controllers.contract import Clock, Ids
from bacalhau_controllers.runner import assign, machine
from bacalhau_controllers.runner.admission import resources_of
from bacalhau_controllers.runner.capacity import Allocator
from bacalhau_controllers.runner.commit import GroupCommit
from bacalhau_controllers.runner.guard import GuardedEngine, within
from bacalhau_controllers.runner.ledger import (
    Book,
    Entry,
    Forget,
    Ledger,
    LedgerBrokenError,
    LedgerFullError,
    PutContact,
    PutFact,
    PutState,
)
from bacalhau_controllers.runner.outbox import Room
from bacalhau_controllers.runner.ports import (
    Engine,
    Inventory,
    Link,
    Observation,
    Publisher,
    Storage,
    Workspace,
)
from bacalhau_controllers.runner.publishing import Woken
from bacalhau_controllers.runner.reporting import execution_fact
from bacalhau_controllers.runner.roster import Roster
from bacalhau_controllers.runner.session import Session, Standing
from bacalhau_controllers.runner.site import AgentSettings, Site, make_slots
from bacalhau_controllers.runner.state import (
    AgentStarted,
    Event,
    Halted,
    Instant,
    RunnerState,
    Stage,
    Unassigned,
    workload_id,
)
from bacalhau_controllers.runner.upkeep import Upkeep
from bacalhau_controllers.runner.worker import Worker

logger = logging.getLogger(__name__)

NOTE_SECONDS = 5.0

CONTACT_NOTE_SECONDS = 300.0
"""How old the noted contact with the orchestrator may get where nothing depends on it."""


class Snapshot(Model):
    """How an agent is, for people and metrics."""

    node: str
    incarnation: str = ""
    is_linked: bool = False
    is_welcome: bool = False
    is_approved: bool = False
    session_message: str = ""
    ledger_error: str = ""
    facts_waiting: int = 0
    stages: dict[str, int] = Field(default_factory=dict)
    publications: dict[str, int] = Field(default_factory=dict)
    allocated: Resources = Resources()
    capacity: Resources = Resources()
    waiting_for_capacity: int = 0
    engines: tuple[Capability, ...] = ()
    storages: tuple[Capability, ...] = ()
    publishers: tuple[Capability, ...] = ()


class Agent:
    """One node's agent. `run` it once; `close` it afterwards.

    Engines, storages and publishers are by type; `inventory` knows which inputs are here. The
    clock's `monotonic` must be comparable between agents within one boot of the machine (see
    AgentSettings).
    """

    def __init__(
        self,
        node: str,
        ledger: Ledger,
        engines: Mapping[str, Engine],
        storages: Mapping[str, Storage],
        publishers: Mapping[str, Publisher],
        workspace: Workspace,
        link: Link,
        clock: Clock,
        rng: random.Random,
        ids: Ids,
        settings: AgentSettings,
        inventory: Inventory | None = None,
    ) -> None:
        self._ledger = ledger
        self._settings = settings
        self._last_words: list[str] = []
        self._intake = asyncio.Lock()
        self._contact_heard = asyncio.Event()
        self._recovered = asyncio.Event()
        self._has_noted = False
        writer = GroupCommit(ledger, Book.empty())
        self.site = Site(
            node=node,
            clock=clock,
            settings=settings,
            engines={
                name: GuardedEngine(name, engine, clock, settings.limits, settings.starts_max)
                for name, engine in engines.items()
            },
            storages=storages,
            publishers=publishers,
            workspace=workspace,
            writer=writer,
            allocator=Allocator(settings.policy.capacity, settings.policy.executions_max),
            slots=make_slots(settings),
            room=Room(writer, clock, settings.outbox_bytes_max, settings.calm_seconds),
            inventory=inventory,
        )
        self.contact: Instant | None = None
        self._session = Session(node, link, self, writer, clock, rng, ids, settings.request_seconds)
        self._roster = Roster(
            self.site,
            lambda: self._session.hello_again("an execution is wanted again that was removed"),
        )
        self._upkeep = Upkeep(self)

    # -- life ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until cancelled. Raises LedgerHeldError or LedgerBrokenError."""
        self.site.writer.book = await self._ledger.open()
        try:
            async with asyncio.TaskGroup() as group:
                self._roster.open(group)
                group.create_task(self.site.writer.run(), name="ledger")
                await self._recover()
                group.create_task(self._session.run(), name="session")
                group.create_task(self._keep_contact(), name="contact")
                for name, loop in self._upkeep.loops().items():
                    group.create_task(loop, name=name)
        except* LedgerBrokenError as broken:
            error: BaseException = broken
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None
        finally:
            self._roster.close()
            await self._ledger.close()

    async def close(self, *, keep_running: bool) -> None:
        """Let go of the engines, after `run` has ended. With `keep_running` workloads go on, and
        the next agent finds them; without, they are ended, and the next agent runs them again
        where their restart policy says so."""
        if not keep_running:
            await self._note_halt()
        for name, engine in self.site.engines.items():
            try:
                await engine.close(keep_running=keep_running)
            except BacalhauError as error:
                logger.warning(
                    "Failed to close engine", extra={"engine": name, "error": error.message}
                )

    async def _note_halt(self) -> None:
        """Write down that runs end by the shutdown, before they do: the next agent would take
        their exit codes for their own."""
        try:
            book = await self._ledger.open()
        except BacalhauError as error:
            logger.warning("Failed to note the shutdown", extra={"error": error.message})
            return
        entries: list[Entry] = []
        seq = book.meta.facts_seq
        for uid, state in book.states.items():
            execution = book.executions[uid]
            step = machine.step(execution, state, Halted(), self.site.now(), self.site.limits)
            if step.state != state:
                entries.append(PutState(uid, step.state))
            if step.has_news:
                seq += 1
                entries.append(PutFact(execution_fact(execution, step.state).but(seq=seq)))
        try:
            await self._ledger.commit(entries)
        except BacalhauError as error:
            logger.warning("Failed to note the shutdown", extra={"error": error.message})
        finally:
            await self._ledger.close()

    async def _recover(self) -> None:
        """Take up what an earlier life of this agent left, as it really is."""
        site, book = self.site, self.site.book
        halves = [uid for uid in book.executions if uid not in book.states]
        halves += [uid for uid in book.publications if uid not in book.publication_states]
        await site.writer.commit([Forget(uid) for uid in halves])
        self.contact = book.meta.contact
        for uid, state in book.states.items():
            execution = book.executions[uid]
            self._roster.index(uid)
            if state.stage.holds_capacity:
                asked = resources_of(execution.spec.task, site.policy)
                site.allocator.hold(uid, asked)
        await site.check_plugs()
        site.room.look()
        alive = [uid for uid, state in book.states.items() if state.stage is not Stage.DONE]
        found = await asyncio.gather(*(self._look(uid) for uid in alive))
        for uid, seen in zip(alive, found, strict=True):
            self.post(uid, AgentStarted(seen))
        # What was cut off for too long while no agent ran must not go on a moment longer.
        self._upkeep.check_cut_off()
        for uid, progress in book.publication_states.items():
            if not progress.report.phase.is_final or not progress.is_assigned:
                self._roster.post_publication(uid, Woken())
        await self._upkeep.sweep()
        self._recovered.set()
        logger.info(
            "Recovered", extra={"incarnation": book.meta.incarnation, "executions": len(alive)}
        )

    async def _look(self, uid: str) -> Observation | None:
        """What the engine says of an execution's present run; None if it does not say."""
        execution, state = self.site.book.executions[uid], self.site.book.states[uid]
        engine = self.site.engines.get(execution.spec.task.engine.type)
        if engine is None or not state.stage.may_run:
            return None
        try:
            return await engine.observe(workload_id(execution, state.run))
        except BacalhauError as error:
            logger.warning(
                "Failed to look at a run",
                extra={"execution": execution.name, "error": error.message},
            )
            return None

    # -- executions ------------------------------------------------------------------------------

    @property
    def workers(self) -> Mapping[str, Worker]:
        """The executions that are not at rest, by uid."""
        return self._roster.workers

    def state_of(self, uid: str) -> RunnerState | None:
        """The present state, ahead of the ledger where a worker is."""
        return self._roster.state_of(uid)

    def uids_named(self, namespace: str, name: str) -> tuple[str, ...]:
        """The executions in the ledger with this name."""
        return self._roster.uids_named(namespace, name)

    def uids_of_run(self, execution: str) -> tuple[str, ...]:
        """The executions with this name in any namespace."""
        return self._roster.uids_of_run(execution)

    def post(self, uid: str, event: Event | None) -> None:
        """Tell an execution's worker what happened; None: to look at its spec."""
        self._roster.post(uid, event)

    def is_over(self, namespace: str, name: str) -> bool | None:
        """Whether the execution will write no more; None if this node does not know it."""
        for uid in self.uids_named(namespace, name):
            state = self.state_of(uid)
            if state is not None:
                return state.stage.is_over
        return None

    def keeps_outputs(self, namespace: str, name: str) -> bool:
        """Whether what the execution writes, or wrote, is on this node."""
        for uid in self.uids_named(namespace, name):
            state = self.state_of(uid)
            if state is not None:
                return state.has_outputs and state.stage is not Stage.CLEANING
        return False

    # -- the session's desk ----------------------------------------------------------------------

    def now(self) -> Instant:
        """See Desk."""
        return self.site.now()

    def info(self) -> NodeInfo:
        """See Desk."""
        site, settings = self.site, self._settings
        engines = [engine.capability for engine in site.engines.values()]
        conditions = site.room.conditions()
        if conditions:
            reason = f"{conditions[0].type}: {conditions[0].message}"
            engines = [one.but(available=False, reason=reason) for one in engines]
        return NodeInfo(
            version=settings.version,
            labels=dict(settings.labels),
            capacity=settings.policy.capacity,
            engines=tuple(engines),
            storages=tuple(site.storage_capabilities.values()),
            publishers=tuple(site.publisher_capabilities.values()),
            local_paths=settings.local_paths,
            executions_max=settings.policy.executions_max,
            held_inputs=site.held_inputs,
            conditions=conditions,
        )

    def held(self) -> tuple[Known, ...]:
        """See Desk."""
        book = self.site.book
        known = [
            _known(book.executions[uid], is_final=state.report.phase.is_final)
            for uid, state in book.states.items()
            if uid in book.executions
        ]
        return tuple(sorted(known, key=lambda one: one.is_final))

    def heard(self, sent: Instant) -> None:
        """See Desk."""
        if self.contact is None or (self.contact.elapsed(sent) or 1.0) > 0:
            self.contact = sent
            self._contact_heard.set()

    async def take_list(
        self, assignments: Assignments, steps: Mapping[str, int], sent: Instant
    ) -> None:
        """See Desk."""
        async with self._intake:
            orders = assign.full_list(self.site.book, assignments, steps, self.now(), sent)
            await self._obey(orders)
            self._last_words = orders.last_words
        self.told()

    def told(self) -> None:
        """See Desk."""
        facts = self.site.book.facts
        said = [uid for uid in self._last_words if uid not in facts]
        self._last_words = [uid for uid in self._last_words if uid in facts]
        for uid in said:
            self.post(uid, Unassigned())

    async def take_changes(self, assignments: Assignments, gone: tuple[Gone, ...]) -> None:
        """See Desk."""
        async with self._intake:
            now = self.now()
            contact = self.contact or now
            await self._obey(assign.changes(self.site.book, assignments, gone, now, contact))

    def is_session(self, node: str, session: str) -> bool:
        """Whether a message from the orchestrator is for this node's present session."""
        return self._session.is_current(node, session)

    async def _obey(self, orders: assign.Orders) -> None:
        await self.site.writer.commit(orders.entries)
        self._roster.ask_again_for(orders.must_ask_again)
        for uid, event in orders.events:
            self.post(uid, event)
        for uid, what in orders.publications:
            self._roster.post_publication(uid, what)

    async def parted(self) -> None:
        """See Desk."""
        await self._note_contact()

    async def _keep_contact(self) -> None:
        """Write down when the orchestrator was last heard: each time, where the disconnect policy
        of some execution has to know it after a restart of the agent; else now and then, for
        people who look at a node that was cut off."""
        while True:
            await self._contact_heard.wait()
            self._contact_heard.clear()
            await self._lengthen_leashes()
            noted = self.site.book.meta.contact
            age = noted.elapsed(self.contact) if noted and self.contact else None
            if age is None or age >= CONTACT_NOTE_SECONDS or self._upkeep.needs_contact():
                await self._note_contact()

    async def _lengthen_leashes(self) -> None:
        """Let workloads know that the orchestrator was heard, that would end themselves without."""
        contact = self.contact
        # Once in any case: the file takes its room while there is some.
        if contact is None or (self._has_noted and not self._upkeep.needs_contact()):
            return
        try:
            note = self.site.workspace.note_contact(contact.boot, contact.mono)
            await within(NOTE_SECONDS, "noting the contact", note)
            self._has_noted = True
        except TransientError as error:
            logger.warning("Failed to note the contact", extra={"error": error.message})

    async def _note_contact(self) -> None:
        if self.contact is not None and self.contact != self.site.book.meta.contact:
            with contextlib.suppress(LedgerFullError):
                await self.site.writer.commit([PutContact(self.contact)])

    # -- for people ------------------------------------------------------------------------------

    async def recovered(self) -> None:
        """Return once everything that an earlier life of the agent left was taken up."""
        await self._recovered.wait()

    @property
    def is_welcome(self) -> bool:
        """True while in a session whose full list was taken."""
        return self._session.standing.is_welcome

    @property
    def standing(self) -> Standing:
        """How the node stands with the orchestrator."""
        return self._session.standing

    @property
    def is_recovered(self) -> bool:
        """True once everything that an earlier life left was taken up."""
        return self._recovered.is_set()

    def silence_seconds(self) -> float:
        """How long the orchestrator has not been heard; since the agent's start, if that was in
        another boot or never."""
        return self._upkeep.silence_seconds()

    def snapshot(self) -> Snapshot:
        """The present state of the agent as a whole. Holds no secrets."""
        site, book, standing = self.site, self.site.book, self._session.standing
        stages = Counter(
            str(state.stage) for uid in book.states if (state := self.state_of(uid)) is not None
        )
        phases = Counter(str(one.report.phase) for one in book.publication_states.values())
        return Snapshot(
            node=site.node,
            incarnation=book.meta.incarnation,
            is_linked=standing.is_linked,
            is_welcome=standing.is_welcome,
            is_approved=standing.is_approved,
            session_message=standing.message,
            ledger_error=site.writer.full.message if site.writer.full else "",
            facts_waiting=len(book.facts),
            stages=dict(stages),
            publications=dict(phases),
            allocated=site.allocator.allocated,
            capacity=site.allocator.capacity,
            waiting_for_capacity=site.allocator.waiting,
            engines=tuple(engine.capability for engine in site.engines.values()),
            storages=tuple(site.storage_capabilities.values()),
            publishers=tuple(site.publisher_capabilities.values()),
        )


def _known(execution: Execution, *, is_final: bool) -> Known:
    return Known(
        namespace=execution.metadata.namespace,
        name=execution.name,
        uid=execution.metadata.uid,
        is_final=is_final,
    )
