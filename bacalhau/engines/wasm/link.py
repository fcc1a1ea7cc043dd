"""The agent's end of the socket to the zygote: finds it, starts it, and hears of ends.

Everything durable is in files, so a lost connection loses nothing: whoever waits looks at the
files again, and the next request finds or starts a zygote.
"""

import asyncio
import contextlib
import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import bacalhau
from bacalhau.engines.wasm import protocol
from bacalhau_api.errors import TerminalError, TransientError, UnavailableError
from bacalhau_controllers.runner.guard import ENGINE_FAULT

logger = logging.getLogger(__name__)

_LAUNCH_SECONDS_MAX = 30.0
_CONNECT_SECONDS_MAX = 5.0
_START_SECONDS_MAX = 30.0
_SHUTDOWN_SECONDS_MAX = 30.0
_COMPILE_SLACK_SECONDS = 30.0
_LAUNCHES_MAX = 3


def _python_path() -> str:
    """Where the zygote finds this package and wasmtime, however the agent came to find them."""
    roots = [Path(bacalhau.__file__).resolve().parents[1]]
    spec = importlib.util.find_spec("wasmtime")
    if spec is not None and spec.origin is not None:
        roots.append(Path(spec.origin).resolve().parents[1])
    return os.pathsep.join(map(str, dict.fromkeys(roots)))


class ZygoteLink:
    """One connection to the zygote of this version, made when it is needed.

    `on_ended` is called with a run's id once its end is on disk; `on_lost` when the zygote is
    gone. Both are called on the event loop.
    """

    def __init__(
        self,
        directory: Path,
        *,
        on_ended: Callable[[str], None],
        on_lost: Callable[[], None],
        spare_workers: int,
        idle_seconds: float,
    ) -> None:
        self._directory = directory
        self._on_ended = on_ended
        self._on_lost = on_lost
        self._options = (
            f"--spare-workers={spare_workers}",
            f"--idle-seconds={idle_seconds}",
        )
        self._name = protocol.flavour()
        self._connecting = asyncio.Lock()
        self._sending = asyncio.Lock()
        self._sock: socket.socket | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._starts: dict[str, asyncio.Future[str]] = {}
        self._compiles: dict[str, asyncio.Future[protocol.Message]] = {}
        self.pid: int | None = None

    async def ensure(self) -> None:
        """Return once connected. Raises UnavailableError."""
        async with self._connecting:
            if self._sock is not None:
                return
            for _ in range(_LAUNCHES_MAX):
                try:
                    await self._connect()
                    return
                except (FileNotFoundError, ConnectionError):
                    await self._launch()
            raise UnavailableError("the wasm engine's fork server does not answer")

    async def start(self, message: protocol.Start) -> None:
        """Have a run started: `run.json` exists when this returns. Raises TransientError, and
        TerminalError if the message is too large."""
        data = protocol.encode(message)
        if len(data) > protocol.MESSAGE_BYTES_MAX:
            raise TerminalError(
                f"arguments, environment and mounts take {len(data)} bytes, at most "
                f"{protocol.MESSAGE_BYTES_MAX} are allowed; put large values into an input",
                reason="StartFailed",
            )
        await self.ensure()
        answer = self._starts.setdefault(message["id"], asyncio.get_running_loop().create_future())
        try:
            await self._send(data)
            refusal = await asyncio.wait_for(asyncio.shield(answer), _START_SECONDS_MAX)
        except TimeoutError as error:
            raise UnavailableError(
                "the wasm engine's fork server does not start runs", reason=ENGINE_FAULT
            ) from error
        finally:
            if self._starts.get(message["id"]) is answer:
                del self._starts[message["id"]]
            answer.cancel()
        if refusal:
            raise TransientError(f"the run was not started: {refusal}")

    async def compile(self, message: protocol.Compile) -> None:
        """Have a module compiled. Raises TerminalError (CompileFailed) or TransientError."""
        await self.ensure()
        answer: asyncio.Future[protocol.Message] = asyncio.get_running_loop().create_future()
        self._compiles[message["key"]] = answer
        try:
            await self._send(protocol.encode(message))
            result = await asyncio.wait_for(
                answer, message["timeout_seconds"] + _COMPILE_SLACK_SECONDS
            )
        except TimeoutError as error:
            raise UnavailableError(
                "the wasm engine's fork server does not answer", reason=ENGINE_FAULT
            ) from error
        finally:
            self._compiles.pop(message["key"], None)
        if result.get("fault"):
            raise TransientError(f"the module could not be compiled now: {result['fault']}")
        if result.get("error"):
            raise TerminalError(
                f"the module cannot be compiled: {result['error']}", reason="CompileFailed"
            )

    async def drain_others(self) -> None:
        """Tell zygotes of other versions to end once their children have."""
        for path in self._sockets():
            if path != self._path:
                with contextlib.suppress(OSError):
                    sock = await self._dial(path, protocol.encode({"op": "drain"}))
                    # Closing with something unread would discard what was sent.
                    sock.shutdown(socket.SHUT_WR)
                    await _read_to_end(sock, _CONNECT_SECONDS_MAX)

    async def shutdown_all(self) -> None:
        """End every zygote of this directory, with whatever still runs. Done when they are gone.

        Raises UnavailableError if one does not go."""
        await self.close()
        for path in self._sockets():
            try:
                sock = await self._dial(path, protocol.encode({"op": "shutdown"}))
            except OSError:
                path.unlink(missing_ok=True)  # nobody listens: left behind by a kill
                continue
            try:
                await _read_to_end(sock, _SHUTDOWN_SECONDS_MAX)
            except TimeoutError as error:
                raise UnavailableError("the wasm engine's fork server does not end") from error

    async def close(self) -> None:
        """Let go of the zygote, which goes on."""
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.gather(self._receiver, return_exceptions=True)
            self._receiver = None
        self._lose()

    @property
    def _path(self) -> Path:
        return self._directory / protocol.socket_name(self._name)

    def _sockets(self) -> list[Path]:
        return sorted(self._directory.glob(protocol.socket_name("*")))

    async def _dial(self, path: Path, first: bytes = b"") -> socket.socket:
        """Connect, through the directory's descriptor: a socket's path has at most 108 bytes."""
        loop = asyncio.get_running_loop()
        sock = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, protocol.SOCKET_BUFFER_BYTES)
            async with asyncio.timeout(_CONNECT_SECONDS_MAX):
                await loop.sock_connect(sock, f"/proc/self/fd/{directory}/{path.name}")
                if first:
                    await loop.sock_sendall(sock, first)
        except TimeoutError as error:
            sock.close()
            raise ConnectionError("no answer") from error
        except BaseException:
            sock.close()
            raise
        finally:
            os.close(directory)
        return sock

    async def _connect(self) -> None:
        sock = await self._dial(self._path)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS_MAX):
                data = await asyncio.get_running_loop().sock_recv(sock, 65536)
        except TimeoutError as error:
            sock.close()
            raise UnavailableError("the wasm engine's fork server does not answer") from error
        except BaseException:
            sock.close()
            raise
        if not data:
            sock.close()
            raise ConnectionResetError("it is about to end")
        self.pid = int(protocol.decode(data)["pid"])
        self._sock = sock
        self._receiver = asyncio.create_task(self._receive(sock))

    async def _launch(self) -> None:
        """Start a zygote. The command returns once it listens, or another one does."""
        # Only what it needs: the agent's environment may hold secrets.
        command = (sys.executable, "-m", "bacalhau.engines.wasm.zygote", str(self._directory))
        process = await asyncio.create_subprocess_exec(
            *command,
            self._name,
            *self._options,
            env={"PYTHONPATH": _python_path(), "PYTHONSAFEPATH": "1", "LANG": "C.UTF-8"},
            cwd="/",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(_LAUNCH_SECONDS_MAX):
                _, errors = await process.communicate()
        except TimeoutError as error:
            process.kill()
            await process.wait()
            raise UnavailableError("the wasm engine's fork server does not get ready") from error
        if process.returncode == 3:
            return  # another one is starting, or was faster
        if process.returncode != 0:
            lines = errors.decode(errors="replace").strip().splitlines() or ["no message"]
            raise UnavailableError(f"the wasm engine's fork server does not start: {lines[-1]}")

    async def _send(self, data: bytes) -> None:
        async with self._sending:
            if self._sock is None:
                raise UnavailableError("the wasm engine's fork server is gone")
            try:
                await asyncio.get_running_loop().sock_sendall(self._sock, data)
            except OSError as error:
                raise UnavailableError("the wasm engine's fork server is gone") from error

    async def _receive(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(sock, protocol.MESSAGE_BYTES_MAX):
                self._handle(protocol.decode(data))
        except OSError:
            pass
        except (ValueError, KeyError):
            logger.exception("Could not read what the wasm fork server said")
        logger.warning("Lost the wasm fork server", extra={"pid": self.pid})
        self._lose()
        self._on_lost()

    def _handle(self, message: protocol.Message) -> None:
        match message["op"]:
            case "started" | "refused":
                answer = self._starts.get(message["id"])
                if answer is not None and not answer.done():
                    answer.set_result(message.get("error", ""))
            case "ended":
                self._on_ended(message["id"])
            case "compiled":
                result = self._compiles.get(message["key"])
                if result is not None and not result.done():
                    result.set_result(message)

    def _lose(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self.pid = None
        waiting: list[asyncio.Future[str] | asyncio.Future[protocol.Message]] = []
        waiting += self._starts.values()
        waiting += self._compiles.values()
        for answer in waiting:
            if not answer.done():
                answer.set_exception(UnavailableError("the wasm engine's fork server is gone"))
                answer.exception()  # taken: the one who waits may have given up


async def _read_to_end(sock: socket.socket, seconds_max: float) -> None:
    """Wait until the other side closes, then close too. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(seconds_max):
            while await loop.sock_recv(sock, protocol.MESSAGE_BYTES_MAX):
                pass
    except ConnectionError:
        pass
    finally:
        sock.close()
