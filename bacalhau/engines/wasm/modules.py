"""The cache of compiled modules: each module is compiled once per node, whoever asks.

A file of the cache is trusted machine code. Only this engine's own compiler writes here, in a
directory of the agent's user alone; a job can never bring compiled code along.
"""

import asyncio
import contextlib
import hashlib
import os
import stat
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from bacalhau.engines.wasm import protocol
from bacalhau.engines.wasm.mounts import failed
from bacalhau_api.errors import TerminalError, TransientError
from bacalhau_controllers.contract import Clock

_REMEMBERED_MAX = 1000
_FAILURE_SECONDS = 600.0
# A file that changed so recently may change again without its times showing it.
_SETTLED_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class CompileLimits:
    """What one compilation may take, and how many run at a time."""

    seconds_max: float = 120.0
    memory_bytes_max: int = 4 * 1024**3
    module_bytes_max: int = 128 * 1024**2
    at_once_max: int = 2


_Identity = tuple[int, int, int, int, int]  # device, inode, size, mtime, ctime


class ModuleCache:
    """Finds or makes the compiled form of module files.

    `compile_one` has the zygote compile; it raises TerminalError (CompileFailed) if the module is
    to blame, TransientError otherwise.
    """

    def __init__(
        self,
        directory: Path,
        compile_one: Callable[[protocol.Compile], Awaitable[None]],
        clock: Clock,
        *,
        limits: CompileLimits,
        size_bytes_max: int,
    ) -> None:
        self._directory = directory
        self._compile_one = compile_one
        self._clock = clock
        self._limits = limits
        self._size_bytes_max = size_bytes_max
        self._slots = asyncio.Semaphore(limits.at_once_max)
        self._underway: dict[str, asyncio.Task[None]] = {}
        self._digests: OrderedDict[_Identity, str] = OrderedDict()
        self._failures: OrderedDict[str, tuple[float, TerminalError]] = OrderedDict()

    def open(self) -> None:
        """Make the directory, or refuse one that others may write to; sweep what a crash left."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(self._directory)
        is_private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
        if status.st_uid != os.geteuid() or not is_private:
            raise TerminalError(
                f"the cache of compiled modules must belong to this user alone: {self._directory}",
                hint=f"remove {self._directory}; it is made again",
            )
        for path in self._directory.glob(".*"):
            path.unlink(missing_ok=True)

    async def link(self, module: Path, into: Path) -> Path:
        """Put the compiled form of a module file at `into`, compiling it first if need be.

        It stays there even if the cache drops it. Returns the cache's own file. Raises
        TerminalError (CompileFailed, StartFailed) or TransientError.
        """
        digest = await self._digest(module)
        target = self._directory / f"{digest}-{protocol.cache_flavour()}.cwasm"
        for _ in range(3):
            try:
                os.utime(target)  # the least recently used go first
                os.link(target, into)
                return target
            except FileExistsError:
                return target
            except FileNotFoundError:
                await self._compiled(module, digest, target)
        raise TransientError(f"the compiled form of {module.name} was dropped from the cache")

    async def close(self) -> None:
        """Wait for nothing; what the zygote compiles is there next time."""
        tasks = list(self._underway.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _digest(self, module: Path) -> str:
        fd = os.open(module, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise failed(f"module {module.name} is not a file")
            if status.st_size > self._limits.module_bytes_max:
                raise TerminalError(
                    f"module {module.name} has {status.st_size} bytes, more than the "
                    f"{self._limits.module_bytes_max} allowed",
                    reason="CompileFailed",
                )
            identity = (
                status.st_dev, status.st_ino, status.st_size,
                status.st_mtime_ns, status.st_ctime_ns,
            )  # fmt: skip
            if (known := self._digests.get(identity)) is not None:
                self._digests.move_to_end(identity)
                return known
            hashed = await asyncio.to_thread(hashlib.file_digest, file, "sha256")
        digest = hashed.hexdigest()
        # The change time cannot be set by programs, unlike the modification time.
        if self._clock.now().timestamp() - status.st_ctime > _SETTLED_SECONDS:
            self._digests[identity] = digest
            while len(self._digests) > _REMEMBERED_MAX:
                self._digests.popitem(last=False)
        return digest

    async def _compiled(self, module: Path, digest: str, target: Path) -> None:
        """Return once `target` is there. Concurrent requests for one module share the work, and
        one that is cancelled does not cancel it for the others."""
        failure = self._failures.get(digest)
        if failure is not None:
            if self._clock.monotonic() - failure[0] < _FAILURE_SECONDS:
                raise failure[1]
            del self._failures[digest]
        task = self._underway.get(digest)
        if task is None:
            task = asyncio.create_task(self._compile(module, digest, target))
            self._underway[digest] = task
            task.add_done_callback(lambda done: self._finished(digest, done))
        await asyncio.shield(task)

    def _finished(self, digest: str, task: asyncio.Task[None]) -> None:
        self._underway.pop(digest, None)
        if task.cancelled():
            return
        error = task.exception()  # taken, so that it is not reported as never looked at
        if isinstance(error, TerminalError):
            self._failures[digest] = (self._clock.monotonic(), error)
            while len(self._failures) > _REMEMBERED_MAX:
                self._failures.popitem(last=False)

    async def _compile(self, module: Path, digest: str, target: Path) -> None:
        async with self._slots:
            await self._compile_one(
                {
                    "op": "compile",
                    "key": digest,
                    "source": str(module),
                    "digest": digest,
                    "target": str(target),
                    "timeout_seconds": self._limits.seconds_max,
                    "cpu_seconds_max": int(self._limits.seconds_max * (os.cpu_count() or 1)) + 1,
                    "memory_bytes_max": self._limits.memory_bytes_max,
                }
            )
        await asyncio.to_thread(self._evict, target)

    def _evict(self, newest: Path) -> None:
        """Drop the least recently used until the cache fits. Runs keep links of their own."""
        entries: list[tuple[float, int, Path]] = []
        for path in self._directory.glob("*.cwasm"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                entries.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._size_bytes_max:
                break
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size
