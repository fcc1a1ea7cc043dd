"""One run of the server program: started so that it ends with us, and a lock on its files."""

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from bacalhau_api.errors import UnavailableError

_PR_SET_PDEATHSIG: Final = 1
_LOCK_POLL_SECONDS = 0.02


class DataLock:
    """Holds a data directory, so that two servers never use it: nats-server itself would start a
    second time on the same files, and both would write them.

    The server inherits the lock, so it stays held while a server lives whose parent was killed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = -1

    @property
    def handle(self) -> int:
        """The open file that carries the lock."""
        return self._handle

    async def take(self, timeout: float) -> None:
        """Take the lock. Raises UnavailableError that names the holder."""
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        loop = asyncio.get_running_loop()
        give_up = loop.time() + timeout
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if loop.time() < give_up:
                    await asyncio.sleep(_LOCK_POLL_SECONDS)
                    continue
                holder = _holder(handle)
                os.close(handle)
                raise UnavailableError(
                    f"the data directory {self._path.parent} is in use by process {holder}",
                    reason="DataDirInUse",
                    hint="stop that process, or choose another data directory",
                ) from None
        self._handle = handle
        self.note(None)

    def note(self, server: int | None) -> None:
        """Write down who holds it: this process, and its server if one runs."""
        text = json.dumps({"pid": os.getpid(), "server": server})
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, text.encode(), 0)

    def release(self) -> None:
        """Give it back (a server that still runs keeps it)."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _holder(handle: int) -> str:
    try:
        noted = json.loads(os.pread(handle, 4096, 0))
        pid, server = noted["pid"], noted["server"]
    except (ValueError, KeyError, TypeError):
        return "unknown"
    if server and not _is_alive(pid):
        return f"{server} (a NATS server left behind by process {pid})"
    return str(pid)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class ServerProcess:
    """A child process that is ended by the kernel when this process ends, however it ends.

    The kernel ties that to the *thread* which made the child, not to the process. So each child
    has a thread of its own here, which makes it and then waits for it; it cannot end earlier.
    (Linux only; elsewhere a killed parent leaves the child behind, and the lock tells.)
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str],
        output: Path,
        inherited: Sequence[int],
    ) -> None:
        self._command = command
        self._environment = environment
        self._output = output
        self._inherited = inherited
        self._process: subprocess.Popen[bytes] | None = None
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[int] = self._loop.create_future()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._thread = threading.Thread(target=self._live, name="nats-server", daemon=True)

    async def start(self) -> int:
        """Start it; returns its process id. Raises UnavailableError."""
        self._thread.start()
        try:
            return await asyncio.shield(self._started)
        except OSError as error:
            raise UnavailableError(f"cannot start {self._command[0]}: {error}") from error

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._started.done() and not self._ended.done()

    async def wait(self) -> int:
        """Its exit status, once it has ended; negative for the signal that ended it."""
        return await asyncio.shield(self._ended)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self._process is not None and not self._ended.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self, grace_seconds: float) -> None:
        """End it, and wait until it has ended; by force after the grace period."""
        if self._thread.ident is None:
            return
        with contextlib.suppress(OSError):  # it may be on its way still
            await asyncio.shield(self._started)
        self.send(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_seconds):
                await self.wait()
        except TimeoutError:
            self.send(signal.SIGKILL)
            await self.wait()

    def _live(self) -> None:
        parent = os.getpid()
        try:
            with open(self._output, "wb") as output:
                self._process = subprocess.Popen(
                    self._command,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=self._inherited,
                    start_new_session=True,  # Ctrl-C goes to us, and we stop it in order
                    preexec_fn=_tied_to(parent),  # noqa: PLW1509  # see _tied_to
                )
        except (OSError, subprocess.SubprocessError) as error:
            self._tell(self._started, OSError(str(error)))
            self._tell(self._ended, -1)
            return
        self._tell(self._started, self._process.pid)
        self._tell(self._ended, self._process.wait())

    def _tell(self, future: "asyncio.Future[int]", outcome: int | OSError) -> None:
        def settle() -> None:
            if future.done():
                return
            if isinstance(outcome, OSError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(settle)


def _tied_to(parent: int) -> Callable[[], None] | None:
    """What the child does before it becomes the server: ask to be ended with its parent."""
    if not sys.platform.startswith("linux"):
        return None
    # Looked up here, because between fork and exec hardly anything is safe to do.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    end, by = int(signal.SIGTERM), os.getppid

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, end, 0, 0, 0)
        if by() != parent:  # it died before we asked
            os._exit(1)

    return tie
