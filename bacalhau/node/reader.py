"""Serves reads of logs and outputs from the node's disk, in bounded pieces.

Paths are resolved beneath the execution's outputs and lead nowhere else. Who may ask is decided
before: the link passes on only what carries the present session's id.
"""

import asyncio
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from bacalhau.engines.logfile import LogReader
from bacalhau.node.files import OutputLimitError, UnreadableError, open_beneath, translated, walk
from bacalhau_api.errors import InvalidError, NotFoundError, UnavailableError
from bacalhau_api.v1.execution import OutputFile
from bacalhau_api.wire import LogChunk, LogRead, OutputRead, OutputsList, OutputsPage
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.runner.ports import Layout, Workspace

T = TypeVar("T")

PIECE_BYTES_MAX = 512 * 1024
"""Of a log or a file in one answer; a message on the line holds 1 MiB."""

PAGE_FILES_MAX = 1000
PAGE_BYTES_MAX = 384 * 1024
FILES_MAX = 100_000
WAIT_SECONDS_MAX = 30.0
LOOK_SECONDS = 0.05
"""Between looks at a log that is waited for: a look is three `stat`s, and needs no thread."""

READERS_MAX = 64
LISTS_MAX = 8
THREADS_MAX = 4


class Executions(Protocol):
    """What the reader asks of the agent."""

    def is_over(self, namespace: str, name: str) -> bool | None:
        """Whether an execution will write no more; None if the node does not know it."""
        ...

    def keeps_outputs(self, namespace: str, name: str) -> bool:
        """Whether what it writes, or wrote, is on this node."""
        ...


@dataclass(slots=True)
class _Log:
    """A log that was read lately: the reader remembers its index."""

    reader: LogReader
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class OutputReader:
    """Reads what executions of this node wrote. `bind` it to the agent before use."""

    def __init__(self, workspace: Workspace, clock: Clock) -> None:
        self._workspace = workspace
        self._clock = clock
        self._executions: Executions | None = None
        self._logs: OrderedDict[Path, _Log] = OrderedDict()
        self._lists: OrderedDict[Path, tuple[OutputFile, ...]] = OrderedDict()
        self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="reader")

    def bind(self, executions: Executions) -> None:
        """Say whom to ask about executions."""
        self._executions = executions

    # -- logs ------------------------------------------------------------------------------------

    async def read_log(self, ask: LogRead) -> LogChunk:
        """A piece of a log; what cannot be had is said in `error`. Waits for more for at most
        `wait_seconds`, as long as the execution goes on."""
        try:
            layout = self._layout(ask.namespace, ask.execution)
        except NotFoundError as error:
            return LogChunk(error=error.message)
        deadline = self._clock.monotonic() + min(max(ask.wait_seconds, 0.0), WAIT_SECONDS_MAX)
        while True:
            # The look comes before the read: what is written in between is seen by the next look.
            before = _sizes(layout)
            chunk = await self._read_log(layout, ask)
            if chunk.pieces or chunk.is_end or chunk.error:
                return chunk
            has_changed = False
            while not has_changed and self._is_going_on(ask):
                left = deadline - self._clock.monotonic()
                if left <= 0:
                    return chunk
                await self._clock.sleep(min(left, LOOK_SECONDS))
                has_changed = _sizes(layout) != before

    async def _read_log(self, layout: Layout, ask: LogRead) -> LogChunk:
        log = self._logs.get(layout.root)
        if log is None:
            log = _Log(LogReader(layout.stdout, layout.stderr, layout.log_index))
            self._logs[layout.root] = log
        self._logs.move_to_end(layout.root)
        while len(self._logs) > READERS_MAX:
            self._logs.popitem(last=False)
        size = min(max(ask.size_bytes_max, 1), PIECE_BYTES_MAX)
        # Asked before the read: nothing is written after the end was known.
        is_final = not self._is_going_on(ask)

        def read() -> LogChunk:
            with translated("the log cannot be read"):
                return log.reader.read(
                    ask.stream, ask.offset, ask.tail_lines, size, is_final=is_final
                )

        async with log.lock:
            return await self._in_thread(read)

    def _is_going_on(self, ask: LogRead) -> bool:
        return self._agent().is_over(ask.namespace, ask.execution) is False

    # -- outputs ---------------------------------------------------------------------------------

    async def list_outputs(self, ask: OutputsList) -> OutputsPage:
        """The files behind `after`, sorted by path; what cannot be had is said in `error`."""
        try:
            layout = self._layout(ask.namespace, ask.execution)
            files = await self._files(layout, ask)
        except (NotFoundError, OutputLimitError, UnreadableError) as error:
            return OutputsPage(error=error.message)
        begin = bisect_right(files, ask.after, key=lambda file: file.path) if ask.after else 0
        size = 0
        end = begin
        while end < len(files) and end - begin < PAGE_FILES_MAX and size < PAGE_BYTES_MAX:
            size += len(files[end].path.encode()) + 64
            end += 1
        return OutputsPage(files=files[begin:end], is_last=end >= len(files))

    async def _files(self, layout: Layout, ask: OutputsList) -> tuple[OutputFile, ...]:
        """All files, sorted. Those of a finished execution are remembered, for the next page."""
        known = self._lists.get(layout.root)
        if known is not None and ask.after:
            self._lists.move_to_end(layout.root)
            return known

        def read() -> tuple[OutputFile, ...]:
            if not layout.outputs.is_dir():
                return ()
            with translated("the outputs cannot be listed"):
                found = walk(layout.outputs, entries_max=FILES_MAX)
                files = (OutputFile(path=one.path, size_bytes=one.size_bytes) for one in found)
                return tuple(sorted(files, key=lambda file: file.path))

        files = await self._in_thread(read)
        if self._agent().is_over(ask.namespace, ask.execution):
            self._lists[layout.root] = files
            self._lists.move_to_end(layout.root)
            while len(self._lists) > LISTS_MAX:
                self._lists.popitem(last=False)
        return files

    async def read_output(self, ask: OutputRead) -> bytes:
        """A piece of one file; empty behind its end. Raises NotFoundError."""
        layout = self._layout(ask.namespace, ask.execution)
        size = min(max(ask.size_bytes_max, 0), PIECE_BYTES_MAX)

        def read() -> bytes:
            file = open_beneath(layout.outputs, ask.path)
            try:
                with translated(f"{ask.path} cannot be read"):
                    return os.pread(file, size, max(ask.offset, 0))
            finally:
                os.close(file)

        return await self._in_thread(read)

    # -- small parts -----------------------------------------------------------------------------

    def _agent(self) -> Executions:
        if self._executions is None:
            raise UnavailableError("the node is starting")
        return self._executions

    def _layout(self, namespace: str, execution: str) -> Layout:
        """Where an execution's things lie. Raises NotFoundError if there is nothing to read."""
        agent = self._agent()
        if agent.is_over(namespace, execution) is None:
            raise NotFoundError(f"this node does not know execution {execution}")
        if not agent.keeps_outputs(namespace, execution):
            raise NotFoundError(f"execution {execution} has no outputs on this node")
        try:
            return self._workspace.layout(namespace, execution)
        except InvalidError as error:
            raise NotFoundError(error.message) from error

    async def _in_thread(self, read: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, read)


def _sizes(layout: Layout) -> tuple[int, ...]:
    """Changes whenever something is written to the log."""
    sizes: list[int] = []
    for path in (layout.log_index, layout.stdout, layout.stderr):
        try:
            status = os.stat(path, follow_symlinks=False)
        except OSError:
            sizes += [-1, 0]
        else:
            sizes += [status.st_size, status.st_mtime_ns]
    return tuple(sizes)
