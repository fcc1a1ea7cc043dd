"""What no single execution sees: plugs that come and go, runs that nobody knows, the time since
the orchestrator was heard, and outputs that are kept long enough.

Each is a loop that looks again at everything, so that whatever went wrong once is put right.
"""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol

from bacalhau_api.errors import BacalhauError
from bacalhau_api.v1.execution import Desired, Phase, PublicationPhase
from bacalhau_controllers.runner import machine
from bacalhau_controllers.runner.guard import GuardedEngine, within
from bacalhau_controllers.runner.ledger import Entry, LedgerFullError, PutContact, PutState
from bacalhau_controllers.runner.perform import DISK_SECONDS
from bacalhau_controllers.runner.ports import Inventory
from bacalhau_controllers.runner.session import Standing
from bacalhau_controllers.runner.site import Site
from bacalhau_controllers.runner.state import (
    CutOff,
    Event,
    Instant,
    OutputsDropped,
    RunnerState,
    Stage,
    split_workload_id,
)
from bacalhau_controllers.runner.worker import Worker

logger = logging.getLogger(__name__)

CUT_OFF_SECONDS = 1.0
"""Between looks at the time since the orchestrator was heard."""

CLAIM_SECONDS = 60.0
"""How long an orchestrator that is heard has to ask for the delivery of a result."""


class Household(Protocol):
    """What upkeep sees of the agent."""

    site: Site
    contact: Instant | None

    @property
    def workers(self) -> Mapping[str, Worker]:
        """The executions that are not at rest, by uid."""
        ...

    @property
    def is_welcome(self) -> bool:
        """True while in a session whose full list was taken."""
        ...

    @property
    def standing(self) -> Standing:
        """How the node stands with the orchestrator."""
        ...

    def state_of(self, uid: str) -> RunnerState | None:
        """An execution's present state."""
        ...

    def uids_of_run(self, execution: str) -> tuple[str, ...]:
        """The executions of this name, in any namespace."""
        ...

    def uids_named(self, namespace: str, name: str) -> tuple[str, ...]:
        """The executions of this name."""
        ...

    def post(self, uid: str, event: Event | None) -> None:
        """Tell an execution what happened."""
        ...


class Upkeep:
    """The loops of one agent."""

    def __init__(self, home: Household) -> None:
        self._home = home
        self._site = home.site
        self._started = home.site.now()

    def loops(self) -> dict[str, Coroutine[Any, Any, None]]:
        """What is to run, by name, until cancelled."""
        loops = {
            "health": self._health_loop(),
            "sweep": self._sweep_loop(),
            "cut-off": self._cut_off_loop(),
            "tidy": self._tidy_loop(),
        }
        if self._site.inventory is not None:
            loops["inventory"] = self._inventory_loop(self._site.inventory)
        return loops

    # -- plugs -----------------------------------------------------------------------------------

    async def _health_loop(self) -> None:
        while True:
            await self._site.clock.sleep(self._site.settings.health_seconds)
            await self._site.check_plugs()
            self._site.room.look()
            await self._probe_ledger()

    async def _probe_ledger(self) -> None:
        """Find out whether a full disk has room again, if nobody else has something to write."""
        contact = self._home.contact
        if self._site.writer.full is not None and contact is not None:
            with contextlib.suppress(LedgerFullError):
                await self._site.writer.commit([PutContact(contact)])

    async def _inventory_loop(self, inventory: Inventory) -> None:
        """Find out which inputs are here, so that others that read them come here too."""
        while True:
            try:
                self._site.held_inputs = await within(
                    DISK_SECONDS, "the input cache", inventory.held_inputs()
                )
            except BacalhauError as error:
                logger.info("Postponed taking stock", extra={"error": error.message})
            await self._site.clock.sleep(self._site.settings.inventory_seconds)

    # -- runs that nobody knows ------------------------------------------------------------------

    async def _sweep_loop(self) -> None:
        while True:
            await self._site.clock.sleep(self._site.settings.sweep_seconds)
            await self.sweep()

    async def sweep(self) -> None:
        """Stop and remove every run of this node's engines that no execution accounts for."""
        for engine in self._site.engines.values():
            try:
                found = [r for r in await engine.list() if not self._is_accounted_for(r)]
                for outcome in await asyncio.gather(
                    *(self._sweep_run(engine, run_id) for run_id in found), return_exceptions=True
                ):
                    if isinstance(outcome, BaseException):
                        raise outcome
            except BacalhauError as error:
                logger.info(
                    "Postponed a sweep", extra={"engine": engine.name, "error": error.message}
                )

    async def _sweep_run(self, engine: GuardedEngine, run_id: str) -> None:
        async with self._site.slots.stops:
            if self._is_accounted_for(run_id):
                return
            await engine.stop(run_id, self._site.limits.stop_grace_seconds)
            if not self._is_accounted_for(run_id):
                await engine.remove(run_id)
        logger.warning(
            "Removed a run that nobody asked for", extra={"engine": engine.name, "run": run_id}
        )

    def _is_accounted_for(self, run_id: str) -> bool:
        parts = split_workload_id(run_id)
        if parts is None:
            return False
        name, run = parts
        states = [self._home.state_of(uid) for uid in self._home.uids_of_run(name)]
        # The present run, until it was reported for good. It is known before it begins, so a later
        # one is of a ledger that is no more: this one is an old copy.
        return any(
            state is not None and run == state.run and state.stage is not Stage.DONE
            for state in states
        )

    # -- being cut off ---------------------------------------------------------------------------

    def needs_contact(self) -> bool:
        """Whether some execution has to be stopped when the node is cut off for long."""
        return any(
            worker.execution_deadline_seconds is not None
            for worker in self._home.workers.values()
            if not worker.state.stage.is_over
        )

    async def _cut_off_loop(self) -> None:
        while True:
            due = self.check_cut_off()
            await self._site.clock.sleep(min(due, CUT_OFF_SECONDS))

    def silence_seconds(self) -> float:
        """How long the orchestrator has not been heard; since the agent's start, if that was in
        another boot or never."""
        now, contact = self._site.now(), self._home.contact
        seconds = contact.elapsed(now) if contact else None
        if seconds is None:  # another boot: nothing that needs contact runs (see the machine)
            seconds = self._started.elapsed(now) or 0.0
        return seconds

    def check_cut_off(self) -> float:
        """Tell each execution whose policy does not allow to be cut off for as long as it is.
        Returns the seconds until the next may be due.

        The time counts from when the last answered request was *sent*: the orchestrator, which
        counts from when it came, always waits longer than this node does.
        """
        seconds = self.silence_seconds()
        due = CUT_OFF_SECONDS
        for uid, worker in list(self._home.workers.items()):
            allowed = worker.execution_deadline_seconds
            if allowed is None or worker.state.stage.is_over:
                continue
            if seconds >= allowed:
                message = f"the node was cut off for {allowed} s, after which it is to be stopped"
                self._home.post(uid, CutOff(message))
            else:
                due = min(due, allowed - seconds)
        return max(due, 0.01)

    # -- outputs ---------------------------------------------------------------------------------

    async def _tidy_loop(self) -> None:
        while True:
            await self._site.clock.sleep(self._site.settings.tidy_seconds)
            try:
                await self.tidy()
            except BacalhauError as error:
                logger.warning("Failed to tidy up", extra={"error": error.message})

    async def tidy(self) -> None:
        """Remove outputs that were kept long enough, and directories that nobody knows."""
        for uid in self._outgrown():
            await self._drop(uid)
        age_max = self._site.settings.retention_seconds
        if not age_max or not self._home.is_welcome:
            return
        workspace = self._site.workspace
        strays = await within(DISK_SECONDS, "listing directories", workspace.strays())
        for namespace, name, age_seconds in strays:
            if age_seconds > age_max and not self._home.uids_named(namespace, name):
                layout = workspace.layout(namespace, name)
                logger.info("Removed a stray directory", extra={"path": str(layout.root)})
                await within(DISK_SECONDS, "removing a directory", workspace.remove(layout))

    def _outgrown(self) -> list[str]:
        """Finished executions whose outputs were handed over and exceed age or size, oldest
        first."""
        settings, book, now = self._site.settings, self._site.book, self._site.now()
        claims = self._claims()
        kept = [
            (uid, state)
            for uid, state in book.states.items()
            if uid not in self._home.workers and self._is_handed_over(uid, state, claims)
        ]
        kept.sort(key=lambda one: one[1].since.wall)
        sizes = [
            state.report.outputs.size_bytes if state.report.outputs else 0 for _, state in kept
        ]
        excess = sum(sizes) - settings.retention_bytes if settings.retention_bytes else 0
        outgrown: list[str] = []
        for (uid, state), size in zip(kept, sizes, strict=True):
            # Ages are told by the monotonic clock only: a wall clock that jumps a year ahead must
            # not cost anybody's results. After a boot they count from the agent's start.
            age = state.since.elapsed(now)
            age = self._started.elapsed(now) or 0.0 if age is None else age
            is_old = bool(settings.retention_seconds) and age > settings.retention_seconds
            if is_old or excess > 0:
                outgrown.append(uid)
                excess -= size
        return outgrown

    def _claims(self) -> dict[str, bool]:
        """The executions whose outputs a publication is about, and whether it is done with them.
        What one gave up stays, until its job goes or somebody says that it is not wanted."""
        book = self._site.book
        return {
            one.spec.execution_uid: one.spec.desired is Desired.STOP
            or book.publication_states[uid].report.phase is PublicationPhase.DELIVERED
            for uid, one in book.publications.items()
        }

    def _is_handed_over(self, uid: str, state: RunnerState, claims: Mapping[str, bool]) -> bool:
        """Whether the report is stored and nobody has yet to get the outputs that are here."""
        if state.stage is not Stage.DONE or not state.has_outputs or uid in self._site.book.facts:
            return False
        return claims[uid] if uid in claims else not self._may_be_claimed(uid, state)

    def _may_be_claimed(self, uid: str, state: RunnerState) -> bool:
        """Whether a publication may be on its way here. It is made after the report was stored, and
        the orchestrator may be cut off, or gone, in between."""
        spec = self._site.book.executions[uid].spec
        now, standing = self._site.now(), self._home.standing
        if state.report.phase is not Phase.SUCCEEDED or spec.superseded:
            return False
        if spec.task.publisher is None:
            return False
        if not standing.is_welcome or self.silence_seconds() > CLAIM_SECONDS:
            return True
        heard = standing.since.elapsed(now) if standing.since else None
        ended = state.since.elapsed(now)  # None: in another boot, so before this session
        return min(heard or 0.0, CLAIM_SECONDS if ended is None else ended) < CLAIM_SECONDS

    async def _drop(self, uid: str) -> None:
        site = self._site
        execution, state = site.book.executions.get(uid), site.book.states.get(uid)
        if execution is None or state is None:
            return
        if not self._is_handed_over(uid, state, self._claims()):
            return  # it is to be delivered, as was said meanwhile
        step = machine.step(execution, state, OutputsDropped(), site.now(), site.limits)
        entries: list[Entry] = [PutState(uid, step.state)]
        await site.writer.commit(entries)
        layout = site.layout(execution)
        logger.info("Dropped outputs", extra={"execution": execution.name})
        await within(DISK_SECONDS, "removing outputs", site.workspace.drop_outputs(layout))
