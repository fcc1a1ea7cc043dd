"""Moves one publication: attempts, waits, and news to the orchestrator. What follows from what is
decided by `publishing.advance`."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from bacalhau_api.errors import BacalhauError, TransientError
from bacalhau_api.v1.execution import Desired, Publication
from bacalhau_api.wire import Fact
from bacalhau_controllers.runner.duties import seconds_until
from bacalhau_controllers.runner.guard import within
from bacalhau_controllers.runner.ledger import (
    Entry,
    Forget,
    LedgerFullError,
    PublicationState,
    PutFact,
    PutPublicationState,
)
from bacalhau_controllers.runner.ports import Publisher
from bacalhau_controllers.runner.publishing import (
    Begun,
    Called,
    Delivered,
    PublicationEvent,
    PublishFailed,
    PublishLimits,
    Sending,
    advance,
)
from bacalhau_controllers.runner.rates import Rate
from bacalhau_controllers.runner.site import Site

logger = logging.getLogger(__name__)

WAIT_SECONDS_MAX = 60.0


class PublicationWorker:
    """One publication that is not final or is to be forgotten. Ends by itself; `retire` is called
    then, in the same step."""

    def __init__(self, site: Site, uid: str, retire: Callable[["PublicationWorker"], None]) -> None:
        self.uid = uid
        self.state: PublicationState = site.book.publication_states[uid]
        self._site = site
        self._retire = retire
        self._events: deque[PublicationEvent] = deque()
        self._wake = asyncio.Event()
        self._attempt: asyncio.Task[None] | None = None
        settings = site.settings
        self._limits = PublishLimits(
            try_seconds=settings.publish_try_seconds,
            retry_seconds=settings.publish_retry_seconds,
            retry_seconds_max=settings.publish_retry_seconds_max,
            age_seconds_max=settings.publish_seconds_max,
        )

    @property
    def publication(self) -> Publication:
        """As assigned, the newest version."""
        return self._site.book.publications[self.uid]

    def post(self, event: PublicationEvent) -> None:
        """Tell what happened."""
        if event not in self._events:
            self._events.append(event)
        self._wake.set()

    def nudge(self) -> None:
        """The spec may have changed."""
        self._wake.set()

    async def run(self) -> None:
        """Work until it is final or forgotten."""
        try:
            while True:
                if self._events:
                    await self._handle(self._events.popleft())
                elif not self.state.is_assigned:
                    await self._end_attempt()
                    await self._commit([Forget(self.uid)])
                    self._retire(self)
                    return
                elif self.state.report.phase.is_final:
                    self._retire(self)
                    return
                elif self.publication.spec.desired is Desired.STOP:
                    await self._end_attempt()
                    await self._handle(Called())
                else:
                    await self._continue()
        finally:
            await self._end_attempt()

    async def _continue(self) -> None:
        """Begin an attempt if one is due, then wait for news."""
        due, now = self.state.due, self._site.now()
        seconds = WAIT_SECONDS_MAX
        if self._attempt is None or self._attempt.done():
            pause = seconds_until(due, now) if due else 0.0
            if pause <= 0:
                await self._handle(Begun())
                self._attempt = asyncio.create_task(self._publish(), name=f"publish {self.uid}")
                return
            seconds = min(seconds, pause)
        self._wake.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _handle(self, event: PublicationEvent) -> None:
        old = self.state
        state = advance(self.publication, old, event, self._site.now(), self._limits)
        if state == old:
            return
        entries: list[Entry] = [PutPublicationState(self.uid, state)]
        if state.report != old.report and state.is_assigned:
            meta = self.publication.metadata
            fact = Fact(
                seq=0,
                namespace=meta.namespace,
                name=meta.name,
                uid=self.uid,
                publication=state.report,
            )
            entries.append(PutFact(fact))
        await self._commit(entries)
        self.state = state

    async def _commit(self, entries: list[Entry]) -> None:
        pause = self._site.limits.retry_seconds
        while True:
            try:
                await self._site.writer.commit(entries)
                return
            except LedgerFullError:
                await self._site.clock.sleep(pause)
                pause = min(pause * 2, self._site.limits.retry_seconds_max)

    async def _publish(self) -> None:
        try:
            async with self._site.slots.publishes:
                self.post(await self._deliver())
        except BacalhauError as error:
            is_transient = isinstance(error, TransientError)
            reason = "PublisherUnavailable" if is_transient else error.reason
            self.post(PublishFailed(is_transient, reason, error.message))
        except Exception as error:
            logger.exception("Failed to publish", extra={"publication": self.uid})
            self.post(PublishFailed(True, "Internal", f"internal error: {error!r}"))

    async def _deliver(self) -> PublicationEvent:
        publication, book = self.publication, self._site.book
        target = publication.spec.publisher.type
        publisher = self._site.publishers.get(target)
        if publisher is None:
            return PublishFailed(False, "PublisherMissing", f"this node has no {target} publisher")
        uid = publication.spec.execution_uid
        execution, state = book.executions.get(uid), book.states.get(uid)
        if execution is None or state is None or not state.has_outputs:
            return PublishFailed(False, "OutputsGone", "the outputs are not on this node any more")
        layout = self._site.layout(execution)
        call = publisher.publish(publication, layout.outputs)
        seconds = self._site.settings.publish_try_seconds
        teller = asyncio.create_task(self._tell_progress(publisher), name=f"tell {self.uid}")
        try:
            location = await within(seconds, f"publisher {target}", call)
        finally:
            teller.cancel()
            await asyncio.gather(teller, return_exceptions=True)
        outputs = state.report.outputs
        return Delivered(location, outputs.size_bytes if outputs else 0)

    async def _tell_progress(self, publisher: Publisher) -> None:
        """Say now and then how far the upload is, and how fast it goes. Never ends by itself."""
        clock = self._site.clock
        rate = Rate(clock.monotonic())
        while True:
            await clock.sleep(self._site.settings.progress_seconds)
            progress = publisher.progress(self.uid)
            if progress is not None:
                self.post(Sending(rate.of([progress], clock.monotonic())))

    async def _end_attempt(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None and not attempt.done():
            attempt.cancel()
            await asyncio.gather(attempt, return_exceptions=True)
