"""Logs of this node's executions for people on the node: one, or all of a job that are here.

Records are those of the API (`bacalhau.replies.LogRecord`); None stands for "still here".
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from bacalhau.logturns import in_turn
from bacalhau.node.reader import OutputReader
from bacalhau_api.errors import BacalhauError
from bacalhau_api.v1.execution import Execution, Phase
from bacalhau_api.wire import LogRead

WAIT_SECONDS = 5.0
PAUSE_SECONDS = 0.5
"""Between looks at an execution that has no log yet."""

FOLLOWED_MAX = 64
QUEUE_RECORDS_MAX = 256

Record = dict[str, Any]
Find = Callable[[], Sequence[Execution]]
"""The executions that are meant, as they are now."""


@dataclass(frozen=True, slots=True)
class LogQuery:
    """What is asked for; see `bacalhau_api.wire.LogRead`."""

    stream: Literal["stdout", "stderr", "all"] = "all"
    offset: int = 0
    tail: int | None = None
    follow: bool = False


async def read_one(
    reader: OutputReader, node: str, execution: Execution, query: LogQuery
) -> AsyncGenerator[Record | None, None]:
    """The log of one execution, to its end if followed."""
    offset: int | None = None if query.tail is not None else query.offset
    tail = query.tail
    while True:
        chunk = await reader.read_log(
            LogRead(
                node=node,
                session="",
                namespace=execution.metadata.namespace,
                execution=execution.name,
                stream=query.stream,
                offset=offset,
                tail_lines=tail,
                wait_seconds=WAIT_SECONDS if query.follow else 0.0,
            )
        )
        if chunk.error:
            yield {"execution": execution.name, "notice": chunk.error}
            return
        offset, tail = chunk.next_offset, None
        for piece in chunk.pieces:
            record: Record = {
                "execution": execution.name,
                "slot": str(execution.spec.slot),
                "attempt": execution.spec.attempt,
                "stream": piece.stream,
                "text": piece.text,
            }
            if piece.time is not None:
                record["time"] = piece.time.isoformat().replace("+00:00", "Z")
            if piece is chunk.pieces[-1]:
                record["offset"] = chunk.next_offset
            yield record
        if chunk.is_end or (not chunk.pieces and not query.follow):
            if not chunk.pieces and not offset and execution.phase in (
                Phase.PENDING, Phase.PREPARING,
            ):  # fmt: skip
                words = f"nothing was written yet: it is {execution.phase}"
                yield {"execution": execution.name, "notice": words}
            return
        if not chunk.pieces:
            yield None


async def read_all(
    reader: OutputReader, node: str, find: Find, query: LogQuery
) -> AsyncGenerator[Record | None, None]:
    """The logs of several executions as they come. While it is followed, executions that arrive
    are joined in; it ends when all there are have ended."""
    queue: asyncio.Queue[Record | None] = asyncio.Queue(QUEUE_RECORDS_MAX)
    tasks: dict[str, asyncio.Task[None]] = {}

    async def copy(execution: Execution) -> None:
        try:
            async with aclosing(read_one(reader, node, execution, query)) as records:
                async for record in records:
                    await queue.put(record)
        except BacalhauError as error:
            await queue.put({"execution": execution.name, "notice": error.message})

    try:
        while True:
            active = sum(not task.done() for task in tasks.values())
            for execution in in_turn(find(), lambda e: tasks[e.metadata.uid].done()):
                if execution.metadata.uid in tasks:
                    continue
                if active >= FOLLOWED_MAX:
                    break
                tasks[execution.metadata.uid] = asyncio.create_task(copy(execution))
                active += 1
            if not active and queue.empty():
                return
            try:
                async with asyncio.timeout(PAUSE_SECONDS):
                    yield await queue.get()
            except TimeoutError:
                yield None
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
