"""A proxy on a Docker Engine's socket that can be told to misbehave: hang, refuse, lie, cut off.

Each request gets a connection of its own to the engine, so that a fault can be chosen for it by
method and path. Runs on the event loop it was opened on.
"""

import asyncio
import contextlib
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Kind = Literal["hang", "error", "lie", "cut", "late"]
CLOSE_SECONDS = 30.0


@dataclass
class Fault:
    """What happens to requests whose `METHOD /path` matches. `late` passes the request on, and its
    answer never; `lie` answers with `body` in the engine's place, as `error` does if it is given."""

    pattern: str
    kind: Kind
    status: int = 500
    body: object = None
    count: int = 1 << 30
    hits: int = 0
    first_hit: float = 0.0
    """When it struck first, in seconds since the epoch."""
    at_once: int = 0
    peak: int = 0
    """How many requests hung at a time, at most."""


@dataclass
class FaultProxy:
    """Listens on `path`, and passes on to `upstream`."""

    path: Path
    upstream: Path
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    _server: asyncio.Server | None = None
    _tasks: "set[asyncio.Task[None]]" = field(default_factory=set)

    @property
    def host(self) -> str:
        """Its address as an engine."""
        return f"unix://{self.path}"

    def add(self, pattern: str, kind: Kind, **more: object) -> Fault:
        """Misbehave from now on."""
        fault = Fault(pattern, kind, **more)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def heal(self) -> None:
        """Behave again; requests that hang are cut off."""
        self.faults.clear()
        for task in self._tasks:
            task.cancel()

    def count(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(pattern, one)) for one in self.requests)

    async def open(self) -> None:
        """Listen."""
        self._server = await asyncio.start_unix_server(self._accept, str(self.path))

    async def close(self) -> None:
        """Cut everything off."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first = head.split("\r\n", 1)[0].rsplit(" ", 1)[0]
        self.requests.append(first)
        fault = next((f for f in self.faults if f.count and re.search(f.pattern, first)), None)
        if fault is not None:
            fault.first_hit = fault.first_hit or time.time()
            fault.hits += 1
            fault.count -= 1
            if fault.kind == "hang":
                await self._hang(reader, fault)
                return
            if fault.kind == "cut":
                return
            if fault.kind in ("error", "lie"):
                status = fault.status if fault.kind == "error" else 200
                body = fault.body
                if fault.kind == "error" and body is None:
                    body = {"message": "it went wrong"}
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                answer = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
                answer += f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
                writer.write(answer.encode() + data)
                await writer.drain()
                return
        up_reader, up_writer = await asyncio.open_unix_connection(str(self.upstream))
        try:
            # One request for each connection, so that the next one is seen too.
            lines = [x for x in head.split("\r\n") if not x.lower().startswith("connection:")]
            lines.insert(1, "Connection: close")
            up_writer.write("\r\n".join(lines).encode("latin-1"))
            await self._join(reader, writer, up_reader, up_writer, is_late=fault is not None)
        finally:
            up_writer.close()

    @staticmethod
    async def _hang(reader: asyncio.StreamReader, fault: Fault) -> None:
        """Until whoever asked has gone."""
        fault.at_once += 1
        fault.peak = max(fault.peak, fault.at_once)
        try:
            while await reader.read(65536):
                pass
        finally:
            fault.at_once -= 1

    async def _join(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
        *,
        is_late: bool,
    ) -> None:
        async def forward() -> None:
            while data := await reader.read(65536):
                up_writer.write(data)
                await up_writer.drain()

        sending = asyncio.create_task(forward())
        try:
            while data := await up_reader.read(65536):
                if not is_late:
                    writer.write(data)
                    await writer.drain()
            if is_late:
                await asyncio.Event().wait()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


@asynccontextmanager
async def fault_proxy(path: Path, upstream: Path) -> AsyncIterator[FaultProxy]:
    """A proxy, closed at the end."""
    proxy = FaultProxy(path, upstream)
    await proxy.open()
    try:
        yield proxy
    finally:
        with contextlib.suppress(RuntimeError):
            await proxy.close()


@contextmanager
def fault_proxy_beside(path: Path, upstream: Path) -> Iterator[FaultProxy]:
    """A proxy on a thread of its own, for tests that have no event loop. `add` works from any
    thread."""
    loop = asyncio.new_event_loop()
    proxy = FaultProxy(path, upstream)
    loop.run_until_complete(proxy.open())
    thread = threading.Thread(target=loop.run_forever, name="fault proxy", daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(proxy.close(), loop).result(CLOSE_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSE_SECONDS)
        loop.close()
