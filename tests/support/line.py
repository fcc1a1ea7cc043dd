"""A TCP line that a test can hold in the middle of a transfer: what was to come does not, and nobody
is told. Letting go breaks what was held, as a line that fails; later connections get through.

Either end may lie in another network namespace. Runs on a thread of its own.
"""

import asyncio
import contextlib
import ctypes
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE_SECONDS = 60.0
_CLONE_NEWNET = 0x40000000
_BLOCK_BYTES = 64 * 1024


@dataclass
class Line:
    """To the port `upstream` on loopback; opened by `open_line`. `beyond` is the network namespace
    of its far end, None for the test's own."""

    upstream: int
    port: int
    beyond: Path | None
    loop: asyncio.AbstractEventLoop
    _room: int | None = None
    _held: threading.Event = field(default_factory=threading.Event)
    _passes: "set[asyncio.Task[None]]" = field(default_factory=set)

    def hold(self, after_bytes: int) -> None:
        """Let so many bytes more through, in both directions together, and then nothing."""

        def begin() -> None:
            self._room = after_bytes

        self._do(begin)

    def wait_held(self) -> None:
        """Return once something waits for the line to be let go."""
        assert self._held.wait(PATIENCE_SECONDS), "nothing came so far"

    def let_go(self) -> None:
        """Break off what is on the line; what comes later gets through."""

        def free() -> None:
            self._room = None
            self._held.clear()
            for task in self._passes:
                task.cancel()

        self._do(free)

    def _do(self, call: Callable[[], None]) -> None:
        async def done() -> None:
            call()

        asyncio.run_coroutine_threadsafe(done(), self.loop).result(PATIENCE_SECONDS)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        task = asyncio.current_task()
        assert task is not None
        self._passes.add(task)
        ends = [writer]
        try:
            back, far = await self._connect()
            ends.append(far)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, far))
                group.create_task(self._pass(back, writer))
            for end in ends:
                end.close()
                await end.wait_closed()
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            for end in ends:
                end.transport.abort()
        finally:
            self._passes.discard(task)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        beyond = socket_in(self.beyond)
        try:
            beyond.setblocking(False)
            await self.loop.sock_connect(beyond, ("127.0.0.1", self.upstream))
            return await asyncio.open_connection(sock=beyond)
        except BaseException:
            beyond.close()
            raise

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_BLOCK_BYTES):
            if self._room is not None:
                self._room -= len(data)
                if self._room < 0:
                    self._held.set()
                    await asyncio.Event().wait()
            writer.write(data)
            await writer.drain()
        writer.write_eof()


@contextlib.contextmanager
def open_line(
    upstream: int, *, inside: Path | None = None, beyond: Path | None = None
) -> Iterator[Line]:
    """A line from a free port on loopback in the network namespace `inside` to the port `upstream`
    in the namespace `beyond`; None is the test's own."""
    listening = socket_in(inside)
    listening.bind(("127.0.0.1", 0))
    loop = asyncio.new_event_loop()
    line = Line(upstream, listening.getsockname()[1], beyond, loop)
    server = loop.run_until_complete(asyncio.start_server(line.accept, sock=listening))
    thread = threading.Thread(target=loop.run_forever, name="line", daemon=True)
    thread.start()
    try:
        yield line
    finally:
        line.let_go()
        asyncio.run_coroutine_threadsafe(_close(server), loop).result(PATIENCE_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_SECONDS)
        loop.close()


async def _close(server: asyncio.Server) -> None:
    server.close()
    rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


def socket_in(namespace: Path | None) -> socket.socket:
    """A TCP socket of a network namespace: a socket stays in the one it was made in."""
    if namespace is None:
        return socket.socket()
    with ThreadPoolExecutor(1) as thread:  # which changes over, and is not used again
        return thread.submit(_socket_there, namespace).result()


def _socket_there(namespace: Path) -> socket.socket:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(namespace, os.O_RDONLY)
    try:
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns", str(namespace))
        return socket.socket()
    finally:
        os.close(descriptor)
