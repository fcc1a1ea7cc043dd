"""The workers of one agent: who moves which execution or publication, and who has to wait until a
namesake's directory is gone."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from bacalhau_controllers.runner.ledger import LedgerBrokenError
from bacalhau_controllers.runner.publisher import PublicationWorker
from bacalhau_controllers.runner.publishing import PublicationEvent, Woken
from bacalhau_controllers.runner.site import Site
from bacalhau_controllers.runner.state import AgentStarted, Event, RunnerState, Stage
from bacalhau_controllers.runner.worker import Worker

K = TypeVar("K")

logger = logging.getLogger(__name__)

BUG_PAUSE_SECONDS = 60.0
"""Before an execution whose worker ended by a bug is taken up again."""


class Roster:
    """Employs workers when there is something to do. `open` it before use; `wanted_again` is
    called when an execution is gone that was asked for again while it was being removed."""

    def __init__(self, site: Site, wanted_again: Callable[[], None]) -> None:
        self._site = site
        self._wanted_again = wanted_again
        self._group: asyncio.TaskGroup | None = None
        self._workers: dict[str, Worker] = {}
        self._publication_workers: dict[str, PublicationWorker] = {}
        self._uids_by_name: dict[tuple[str, str], list[str]] = {}
        self._uids_of_run: dict[str, list[str]] = {}
        self._blocked: dict[str, list[Event]] = {}
        self._ask_again: set[str] = set()

    def open(self, group: asyncio.TaskGroup) -> None:
        """Workers are tasks of this group."""
        self._group = group

    def close(self) -> None:
        """Employ nobody any more."""
        self._group = None

    def ask_again_for(self, uids: Iterable[str]) -> None:
        """Executions that are wanted, and are being removed."""
        self._ask_again.update(uids)

    @property
    def workers(self) -> Mapping[str, Worker]:
        """The executions that are not at rest, by uid."""
        return self._workers

    def state_of(self, uid: str) -> RunnerState | None:
        """The present state, ahead of the ledger where a worker is."""
        worker = self._workers.get(uid)
        return worker.state if worker else self._site.book.states.get(uid)

    def uids_named(self, namespace: str, name: str) -> tuple[str, ...]:
        """The executions in the ledger with this name: one, or a second that waits until the
        first, its namesake, is removed."""
        return tuple(self._uids_by_name.get((namespace, name), ()))

    def uids_of_run(self, execution: str) -> tuple[str, ...]:
        """The executions with this name in any namespace: run ids carry none."""
        return tuple(self._uids_of_run.get(execution, ()))

    def post(self, uid: str, event: Event | None) -> None:
        """Tell an execution's worker what happened; None: to look at its spec."""
        worker = self._workers.get(uid) or self._employ(uid)
        if worker is None:
            if uid in self._blocked and event is not None and event not in self._blocked[uid]:
                self._blocked[uid].append(event)
        elif event is None:
            worker.nudge()
        else:
            worker.post(event)

    def post_publication(self, uid: str, event: PublicationEvent | None) -> None:
        """The same for a publication."""
        worker = self._publication_workers.get(uid)
        if worker is None:
            if self._group is None or uid not in self._site.book.publication_states:
                return
            worker = PublicationWorker(self._site, uid, self._publication_retired)
            self._publication_workers[uid] = worker
            self._group.create_task(self._run_publication(worker), name=f"publication {uid}")
        if event is None:
            worker.nudge()
        else:
            worker.post(event)

    def _employ(self, uid: str) -> Worker | None:
        if self._group is None or uid not in self._site.book.states:
            return None
        self.index(uid)
        execution = self._site.book.executions[uid]
        first = self._uids_by_name[(execution.metadata.namespace, execution.name)][0]
        if first != uid:
            self._blocked.setdefault(uid, [])
            return None  # its namesake's directory must be gone first; see `_retired`
        worker = Worker(self._site, uid, self._retired)
        self._workers[uid] = worker
        self._group.create_task(self._run_worker(worker), name=f"execution {execution.name}")
        return worker

    async def _run_worker(self, worker: Worker) -> None:
        try:
            await worker.run()
        except LedgerBrokenError:
            raise
        except Exception:
            logger.exception("Failed to move an execution", extra={"uid": worker.uid})
            await self._site.clock.sleep(BUG_PAUSE_SECONDS)
            self._workers.pop(worker.uid, None)
            self.post(worker.uid, AgentStarted())

    async def _run_publication(self, worker: PublicationWorker) -> None:
        try:
            await worker.run()
        except LedgerBrokenError:
            raise
        except Exception:
            logger.exception("Failed to move a publication", extra={"uid": worker.uid})
            await self._site.clock.sleep(BUG_PAUSE_SECONDS)
            self._publication_workers.pop(worker.uid, None)
            self.post_publication(worker.uid, Woken())

    def _retired(self, worker: Worker) -> None:
        del self._workers[worker.uid]
        if worker.state.stage is not Stage.GONE:
            return
        self._site.allocator.give_back(worker.uid)
        namesakes = _without(self._uids_by_name, worker.key, worker.uid)
        _without(self._uids_of_run, worker.key[1], worker.uid)
        if namesakes:
            for event in (AgentStarted(), *self._blocked.pop(namesakes[0], ())):
                self.post(namesakes[0], event)
        if worker.uid in self._ask_again:
            self._ask_again.discard(worker.uid)
            self._wanted_again()

    def _publication_retired(self, worker: PublicationWorker) -> None:
        del self._publication_workers[worker.uid]

    def index(self, uid: str) -> None:
        """Note the name of an execution in the ledger."""
        execution = self._site.book.executions[uid]
        by_name = self._uids_by_name.setdefault((execution.metadata.namespace, execution.name), [])
        for uids in (by_name, self._uids_of_run.setdefault(execution.name, [])):
            if uid not in uids:
                uids.append(uid)


def _without(index: dict[K, list[str]], key: K, uid: str) -> list[str]:
    """Take one out of an index; what is left under its key."""
    left = [other for other in index.pop(key, []) if other != uid]
    if left:
        index[key] = left
    return left
