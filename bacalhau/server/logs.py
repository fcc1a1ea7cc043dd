"""Logs of one execution, or of all executions of a job, read from nodes piece by piece.

Records are plain data: `{execution, slot, attempt, stream, text, time, offset}` (`offset` only
where reading can go on from), or `{execution, notice}`
where something is to be told beside the output; None stands for "still here, nothing new".
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from bacalhau.logturns import in_turn
from bacalhau.server.ports import LogStream, Services
from bacalhau.server.waiter import Waiter, rings
from bacalhau_api.errors import BacalhauError, NotFoundError, UnavailableError
from bacalhau_api.meta import Ref
from bacalhau_api.v1.execution import Execution, Phase
from bacalhau_api.v1.job import Job
from bacalhau_api.wire import LogChunk, LogPiece

WAIT_SECONDS = 10.0
AWAY_SECONDS = 2.0
GRACE_SECONDS = 30.0
"""So long a reader that follows waits for a node that is away though its execution has ended: after
a restart of the orchestrator nodes are back within seconds."""

FOLLOWED_MAX = 256
QUEUE_RECORDS_MAX = 256

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LogQuery:
    """What is asked for. `offset` continues an earlier read of one execution, `offsets` those of a
    job's executions, by name; `tail` starts so many lines before the end."""

    stream: LogStream = "all"
    offset: int = 0
    tail: int | None = None
    follow: bool = False
    offsets: Mapping[str, int] = field(default_factory=dict)

    def of(self, execution: str) -> "LogQuery":
        """What is asked for of one of several executions."""
        if execution not in self.offsets:
            return self
        return replace(self, offset=self.offsets[execution], tail=None)


class Logs:
    """Reads logs for all callers of one server."""

    def __init__(self, services: Services, waiter: Waiter) -> None:
        self._services = services
        self._waiter = waiter
        self._is_closed = False

    def close(self) -> None:
        """The server is about to end: followed logs break off at their next turn."""
        self._is_closed = True
        self._waiter.ring_all()

    def _check_open(self) -> None:
        if self._is_closed:
            raise UnavailableError("the server is about to end", reason="ServerClosing")

    async def of_execution(self, ref: Ref, query: LogQuery) -> AsyncGenerator[Record | None, None]:
        """Records of one execution, to its end if followed. Raises UnavailableError if its node
        is away, nothing is followed, and the orchestrator itself holds no part of the log."""
        async with aclosing(self._read(_Reader(self._services, ref, query))) as records:
            async for record in records:
                yield record

    async def _read(self, reader: "_Reader") -> AsyncGenerator[Record | None, None]:
        async with self._waiter.bell(reader.ref) as bell:
            while not reader.is_done:
                self._check_open()
                records = await reader.read()
                for record in records:
                    yield record
                if not records and not reader.is_done:
                    yield None
                if reader.must_wait and not reader.is_done:
                    await rings(bell, AWAY_SECONDS)

    async def of_job(
        self, ref: Ref, generation: int | None, query: LogQuery
    ) -> AsyncGenerator[Record | None, None]:
        """Records of all executions of one generation (the present one by default), as they come.
        New executions are joined in while it is followed; it ends when the job has."""
        queue: asyncio.Queue[Record] = asyncio.Queue(QUEUE_RECORDS_MAX)
        readings: dict[str, _Reading] = {}
        try:
            async with self._waiter.bell(ref) as bell:
                while True:
                    self._check_open()
                    is_over, executions = self._look(ref, generation)
                    skipped = self._join(executions, readings, queue, query, bell)
                    if queue.empty():
                        yield None
                    while not queue.empty():
                        yield queue.get_nowait()
                    is_read = all(one.task.done() for one in readings.values()) and queue.empty()
                    if is_read and not skipped and (is_over or not query.follow):
                        return
                    await rings(bell, WAIT_SECONDS)
        finally:
            for reading in readings.values():
                reading.task.cancel()
            await asyncio.gather(*(r.task for r in readings.values()), return_exceptions=True)

    def _look(self, ref: Ref, generation: int | None) -> tuple[bool, list[Execution]]:
        """Whether nothing more will come, and the executions there are."""
        cache = self._services.state.cache
        job = cache.get(ref)
        if not isinstance(job, Job):
            return True, []
        wanted = generation or job.metadata.generation
        owned = [e for e in cache.owned_by(job.metadata.uid, "Execution")]
        mine = [e for e in owned if isinstance(e, Execution) and e.spec.slot.generation == wanted]
        is_over = job.is_over or wanted < job.metadata.generation
        return is_over, mine

    def _join(
        self,
        executions: list[Execution],
        readings: dict[str, "_Reading"],
        queue: asyncio.Queue[Record],
        query: LogQuery,
        bell: asyncio.Event,
    ) -> bool:
        """Begin to read what is not read yet. True if some have to wait until others have ended."""
        active = sum(not one.task.done() for one in readings.values())
        for execution in in_turn(executions, lambda e: readings[e.name].holds_up_nobody):
            if execution.name in readings:
                continue
            if active >= FOLLOWED_MAX:
                return True
            active += 1
            reader = _Reader(self._services, execution.ref, query.of(execution.name))
            task = asyncio.create_task(self._copy(reader, queue, bell))
            task.add_done_callback(lambda _: bell.set())
            readings[execution.name] = _Reading(reader, task)
        return any(execution.name not in readings for execution in executions)

    async def _copy(
        self,
        reader: "_Reader",
        queue: asyncio.Queue[Record],
        bell: asyncio.Event,
    ) -> None:
        try:
            async with aclosing(self._read(reader)) as records:
                async for record in records:
                    if record is not None:
                        await queue.put(record)
                        bell.set()
        except BacalhauError as error:
            notice: Record = {"execution": reader.ref.name, "notice": error.message}
            await queue.put(notice | {"reason": error.reason})


class _Reader:
    """Where one reader of one execution's log is."""

    def __init__(self, services: Services, ref: Ref, query: LogQuery) -> None:
        self._services = services
        self.ref = ref
        self._query = query
        self._offset: int | None = None if query.tail is not None else query.offset
        self._tail = query.tail
        self.is_away = False
        self._has_read = False
        self._since = services.clock.monotonic()
        self.is_done = False
        self.must_wait = False

    async def read(self) -> list[Record]:
        """The next records; sets `is_done`, and `must_wait` if reading again at once is no use."""
        self.must_wait = False
        execution = self._services.state.cache.get(self.ref)
        if not isinstance(execution, Execution):
            self.is_done = True
            return [self._notice("the execution was deleted")]
        started = self._services.clock.monotonic()
        # The first read takes what there is: who asks is to be answered, or refused, at once.
        is_waiting = self._query.follow and self._has_read and not execution.is_final
        wait_seconds = WAIT_SECONDS if is_waiting else 0.0
        self._has_read = True
        try:
            chunk = await self._services.nodes.read_log(
                execution.spec.node,
                self.ref.namespace,
                self.ref.name,
                self._query.stream,
                self._offset,
                self._tail,
                wait_seconds,
            )
        except UnavailableError as error:
            return self._away(execution, error)
        except NotFoundError as error:
            return self._absent(execution, error.message)
        notices = [self._notice(f"node {execution.spec.node} is back")] if self.is_away else []
        self.is_away = False
        if chunk.error:
            return notices + self._absent(execution, chunk.error)
        is_early = self._services.clock.monotonic() - started < wait_seconds / 2
        return notices + self._taken(execution, chunk, is_early=is_early)

    def _taken(self, execution: Execution, chunk: LogChunk, *, is_early: bool) -> list[Record]:
        self._offset, self._tail = chunk.next_offset, None
        records = [self._record(execution, piece) for piece in chunk.pieces]
        if records:  # only from behind the last piece can a reader go on
            records[-1]["offset"] = chunk.next_offset
        if chunk.is_end:
            self.is_done = True
        elif not chunk.pieces:
            # An execution that was final before the read has nothing more to say.
            self.is_done = not self._query.follow or execution.is_final
            self.must_wait = is_early
        return records

    def _absent(self, execution: Execution, message: str) -> list[Record]:
        if self._query.follow and not execution.is_final:
            self.must_wait = True
            return []
        self.is_done = True
        if execution.phase in (Phase.PENDING, Phase.PREPARING):
            return [self._notice(f"nothing was written yet: it is {execution.phase}")]
        if execution.phase is Phase.REJECTED:
            report = execution.status.report
            return [self._notice(f"it never ran: {report.message if report else ''}")]
        return [self._notice(message)]

    def _away(self, execution: Execution, error: UnavailableError) -> list[Record]:
        node = execution.spec.node
        waits = self._services.clock.monotonic() - self._since < GRACE_SECONDS
        if self._query.follow and (waits or not execution.is_final):
            self.must_wait = True
            if self.is_away:
                return []
            self.is_away = True
            return [self._notice(f"node {node} is away; its log goes on when it is back")]
        self.is_done = True
        tails = [
            (stream, text)
            for stream, text in _tails(execution)
            if self._query.stream in ("all", stream)
        ]
        if not tails or self._offset:
            raise UnavailableError(
                f"the log of {self.ref.name} is on node {node}, which is away: {error.message}",
                hint="it can be read when the node is back; bacalhau describe shows what is known",
                reason="NodeAway",
            )
        words = f"node {node} is away; these are the last bytes of its report"
        notice = self._notice(words) | {"reason": "NodeAway"}
        pieces = [
            # Of the log itself nothing was read: from 0 it goes on.
            self._record(execution, LogPiece(stream=stream, text=text)) | {"offset": 0}
            for stream, text in tails
        ]
        return [notice, *pieces]

    def _notice(self, text: str) -> Record:
        return {"execution": self.ref.name, "notice": text}

    def _record(self, execution: Execution, piece: LogPiece) -> Record:
        record: Record = {
            "execution": execution.name,
            "slot": str(execution.spec.slot),
            "attempt": execution.spec.attempt,
            "stream": piece.stream,
            "text": piece.text,
        }
        if piece.time is not None:
            record["time"] = piece.time.isoformat().replace("+00:00", "Z")
        return record


@dataclass(frozen=True, slots=True)
class _Reading:
    reader: _Reader
    task: asyncio.Task[None]

    @property
    def holds_up_nobody(self) -> bool:
        return self.task.done() or self.reader.is_away


def _tails(execution: Execution) -> list[tuple[Any, str]]:
    report = execution.status.report
    if report is None:
        return []
    both = (("stdout", report.stdout_tail), ("stderr", report.stderr_tail))
    return [(stream, text) for stream, text in both if text]
