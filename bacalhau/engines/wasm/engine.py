"""The Engine port for WebAssembly: what the agent calls.

The state of a run is read from its files (`records.py`) and from the kernel, never from memory, so
a new agent knows as much as the old one did. The zygote only makes it quick to hear of ends.
"""

import asyncio
import contextlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from weakref import WeakValueDictionary

from pydantic import Field

from bacalhau.engines.processes import ProcessId
from bacalhau.engines.wasm import mounts, protocol, records
from bacalhau.engines.wasm.link import ZygoteLink
from bacalhau.engines.wasm.modules import CompileLimits, ModuleCache
from bacalhau.engines.wasm.mounts import failed
from bacalhau.params import read_params
from bacalhau_api.base import Model
from bacalhau_api.errors import TerminalError, TransientError, UnavailableError
from bacalhau_api.v1.job import NetworkType
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.runner.ports import Health, Observation, RunPhase, Workload

logger = logging.getLogger(__name__)

_RUN_ID = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.]{0,239}")
_STOP_SECONDS_MAX = 30.0
_COMPILE_SECONDS_MAX = 40.0  # in one start, see `Limits.start_try_seconds`
_RECHECK_SECONDS = 0.05
_LEFTOVER_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class WasmOptions:
    """Limits of the engine on this node.

    `memory_bytes_default` holds for workloads that ask for none; `spare_workers` are processes
    kept ready; `idle_seconds` is how long the fork server stays without agent and runs.
    """

    memory_bytes_default: int = 512 * 1024**2
    cache_bytes_max: int = 4 * 1024**3
    compile: CompileLimits = field(default_factory=CompileLimits)
    spare_workers: int = 2
    idle_seconds: float = 60.0


class WasmParams(Model):
    """Parameters of the engine `wasm` in a job.

    `entry_module` and `import_modules` name input targets, or files below them. The entrypoint is
    an exported function without parameters and results. An import module is linked under the last
    part of its target, without `.wasm`.
    """

    entry_module: str = Field(min_length=1)
    entrypoint: str = Field(default="_start", min_length=1)
    parameters: tuple[str, ...] = ()
    import_modules: tuple[str, ...] = ()


class WasmEngine:
    """Runs core modules with WASI preview 1. `state_dir` is for this engine alone."""

    def __init__(
        self, state_dir: Path, clock: Clock, *, options: WasmOptions | None = None
    ) -> None:
        self._clock = clock
        self._options = options or WasmOptions()
        self._state_dir = state_dir
        self._runs = state_dir / "runs"
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}
        self._link: ZygoteLink | None = None
        self._modules: ModuleCache | None = None

    async def open(self) -> None:
        """Prepare the directory and connect to the fork server, starting it if need be.

        A fork server that cannot be started now is no error: `health` says so, and every request
        tries again.
        """
        _check_platform()
        self._state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._state_dir = self._state_dir.resolve()
        self._runs = self._state_dir / "runs"
        self._runs.mkdir(exist_ok=True, mode=0o700)
        self._link = ZygoteLink(
            self._state_dir,
            on_ended=self._wake,
            on_lost=self._wake_all,
            spare_workers=self._options.spare_workers,
            idle_seconds=self._options.idle_seconds,
        )
        self._modules = ModuleCache(
            self._state_dir / "cache",
            self._link.compile,
            self._clock,
            limits=self._options.compile,
            size_bytes_max=self._options.cache_bytes_max,
        )
        self._modules.open()
        self._sweep()
        try:
            await self._link.ensure()
        except TransientError as error:
            logger.warning("Could not start the wasm fork server", extra={"error": error.message})
        await self._link.drain_others()

    async def health(self) -> Health:
        """Whether the fork server answers; it is started if it is not there."""
        version = f"wasmtime {metadata.version('wasmtime')}"
        if self._link is None:
            return Health(is_available=False, reason="the engine is not open", version=version)
        try:
            await self._link.ensure()
        except TransientError as error:
            return Health(is_available=False, reason=error.message, version=version)
        return Health(is_available=True, version=version)

    async def admit(self, params: Mapping[str, object]) -> str:
        """Nothing is refused."""
        return ""

    async def prepare(
        self,
        params: Mapping[str, object],
        pins: Mapping[str, str],
        tell: Callable[[str], None],
    ) -> Mapping[str, str]:
        """Nothing is needed beside the inputs."""
        return {}

    async def start(self, workload: Workload) -> None:
        """Compile the modules if they are new here, and start. See the port for the errors."""
        link, modules = self._opened()
        params = read_params(WasmParams, workload.params, what="engine wasm", reason="StartFailed")
        _check_environment(workload)
        directory = self._directory(workload.id)
        if self._exists(directory):
            return
        entry = mounts.find_module(workload.mounts, params.entry_module, "entryModule")
        imports = [
            mounts.find_module(workload.mounts, name, "importModules")
            for name in params.import_modules
        ]
        try:
            directory.mkdir(exist_ok=True, mode=0o700)
            codes = await self._compiled(modules, directory, (entry, *imports))
            async with self._lock(workload.id):
                if self._exists(directory):
                    return
                staging = directory / "mounts"
                shutil.rmtree(staging, ignore_errors=True)  # of a start that was cut off
                hidden = [m.target for m in (entry, *imports) if m.target]
                preopens = await asyncio.to_thread(mounts.grant, workload.mounts, hidden, staging)
                message = self._message(workload, params, directory, codes, preopens)
                await link.start(message)
        except OSError as error:
            raise TransientError(f"the run cannot be started now: {error}") from error
        except TerminalError:
            self._discard(directory)
            raise

    async def _compiled(
        self, modules: ModuleCache, directory: Path, sources: Sequence[mounts.FoundModule]
    ) -> list[protocol.Code]:
        """The compiled modules, which belong to the run from now on. Raises TransientError, also
        where a compilation takes long: it goes on, and whoever tries again finds it done."""
        codes: list[protocol.Code] = []
        try:
            async with asyncio.timeout(_COMPILE_SECONDS_MAX):
                for number, module in enumerate(sources):
                    path = directory / f"{number}.cwasm"
                    cached = await modules.link(module.path, path)
                    codes.append({"name": module.name, "path": str(path), "cached": str(cached)})
        except TimeoutError as error:
            # Not for as long as the whole start may take: the engine would be taken for one that
            # hangs, and others' work refused for it.
            raise UnavailableError("its modules are still being compiled") from error
        return codes

    async def observe(self, run: str) -> Observation:
        """What files and kernel say now."""
        return self._observe(run)

    async def wait(self, run: str) -> Observation:
        """Return once the run is not RUNNING."""
        while (seen := self._observe(run)).phase is RunPhase.RUNNING:
            event: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiters = self._waiters.setdefault(run, set())
            waiters.add(event)
            try:
                # It may have ended just before the event was there to be set.
                if self._observe(run).phase is RunPhase.RUNNING:
                    await self._ended(run, event)
            finally:
                waiters.discard(event)
                if not waiters and self._waiters.get(run) is waiters:
                    del self._waiters[run]
        return seen

    async def stop(self, run: str, grace_seconds: float) -> None:
        """Kill. Guests get no signals, so there is nothing to wait for with grace."""
        directory = self._directory(run)
        async with self._lock(run):
            seen = self._observe(run)
            if seen.phase is RunPhase.ABSENT and directory.is_dir():
                # Being started right now, held up by a compilation or on its way to a worker: it is
                # not to begin. The worker looks for this after it has written its own record, and
                # this looks for a worker after it has written: one of them finds the other.
                now = self._clock.now().timestamp()
                records.write_stop(directory, now)
                records.write_end(directory, records.stopped_end(now))
            if seen.phase is not RunPhase.RUNNING:
                await self._end_process(directory)
                return
            if not (directory / records.OVER).exists():
                with contextlib.suppress(OSError):  # on a full disk too it is to end
                    records.write_stop(directory, self._clock.now().timestamp())
                started = records.read_started(directory)
                if started is not None:
                    started.process.kill()
        try:
            await asyncio.wait_for(self.wait(run), _STOP_SECONDS_MAX)
        except TimeoutError as error:
            raise UnavailableError(f"run {run} does not end") from error
        await self._end_process(directory)

    async def remove(self, run: str) -> None:
        """Delete what is kept of a run that ended. Raises TransientError while it runs."""
        directory = self._directory(run)
        async with self._lock(run):
            if self._observe(run).phase is RunPhase.RUNNING:
                raise TransientError(f"run {run} still runs; stop it first")
            await self._end_process(directory)
            await asyncio.to_thread(shutil.rmtree, directory, True)

    async def list(self) -> Sequence[str]:
        """All runs that began here and were not removed."""
        return [entry.name for entry in os.scandir(self._runs) if self._exists(Path(entry.path))]

    async def close(self, *, keep_running: bool) -> None:
        """Let go of the fork server, or end it with all that runs."""
        if self._link is None:
            return
        link, modules = self._opened()
        await modules.close()
        if not keep_running:
            results = await asyncio.gather(
                *(self.stop(run, 0.0) for run in await self.list()), return_exceptions=True
            )
            await link.shutdown_all()
            errors = [r for r in results if isinstance(r, BaseException)]
            if errors:
                raise errors[0]
        await link.close()
        self._wake_all()
        self._link = self._modules = None

    # Inner parts

    def _opened(self) -> tuple[ZygoteLink, ModuleCache]:
        if self._link is None or self._modules is None:
            raise UnavailableError("the wasm engine is not open")
        return self._link, self._modules

    def _directory(self, run: str) -> Path:
        if not _RUN_ID.fullmatch(run):
            raise failed(f"run id {run!r} must be 1-240 letters, digits, '-', '_' and '.'")
        return self._runs / run

    def _lock(self, run: str) -> asyncio.Lock:
        return self._locks.setdefault(run, asyncio.Lock())

    @staticmethod
    def _exists(directory: Path) -> bool:
        return (directory / records.RUN).exists() or (directory / records.EXIT).exists()

    def _discard(self, directory: Path) -> None:
        """Delete what a start left that never reached the fork server. (After a TransientError a
        worker may have the run already, and its record must not be deleted under it.)"""
        if not self._exists(directory):
            shutil.rmtree(directory, ignore_errors=True)

    def _observe(self, run: str) -> Observation:
        if not _RUN_ID.fullmatch(run):
            return Observation(RunPhase.ABSENT)
        directory = self._runs / run
        started = records.read_started(directory)
        begun = None if started is None else _moment(started.time)
        end = records.read_end(directory)
        if end is None and started is not None:
            if _lives(started.process, started.zygote):
                return Observation(RunPhase.RUNNING, started_at=begun)
            end = records.read_end(directory)  # it may have ended between the two looks
        if end is None and started is None:
            return Observation(RunPhase.ABSENT)
        if end is None and records.was_stopped(directory):
            return Observation(RunPhase.EXITED, 137, "Killed", "stopped", started_at=begun)
        if end is None:
            return Observation(
                RunPhase.VANISHED,
                message="the worker is gone, and neither it nor the fork server left a record",
                is_system_fault=True,
                started_at=begun,
            )
        return Observation(
            RunPhase.EXITED,
            exit_code=end.exit_code,
            reason=end.reason,
            message=end.message,
            is_system_fault=end.is_system_fault,
            started_at=begun,
            finished_at=_moment(end.time),
        )

    async def _end_process(self, directory: Path) -> None:
        """Return once no process of a run that has an end is left: the one that wrote it is about to
        leave. Raises UnavailableError."""
        started = records.read_started(directory)
        if started is None or not _lives(started.process, started.zygote):
            return
        started.process.kill()
        try:
            async with asyncio.timeout(_STOP_SECONDS_MAX):
                while _lives(started.process, started.zygote):
                    await self._clock.sleep(_RECHECK_SECONDS)
        except TimeoutError as error:
            raise UnavailableError(
                f"process {started.process.pid} does not end, although it was killed"
            ) from error

    async def _ended(self, run: str, event: asyncio.Future[None]) -> None:
        """Wait for the zygote's word, or without it for the kernel's."""
        started = records.read_started(self._runs / run)
        if started is None or (self._link is not None and self._link.pid == started.zygote):
            await event
            return
        try:
            fd = started.process.open()
        except OSError:  # no descriptors left
            await self._clock.sleep(1.0)
            return
        if fd is None:
            return
        loop = asyncio.get_running_loop()
        loop.add_reader(fd, _set, event)
        try:
            await event
        finally:
            loop.remove_reader(fd)
            os.close(fd)
        if self._observe(run).phase is RunPhase.RUNNING:
            # A zygote of an earlier version has yet to write the end down.
            await self._clock.sleep(_RECHECK_SECONDS)

    def _wake(self, run: str) -> None:
        for event in self._waiters.get(run, ()):
            _set(event)

    def _wake_all(self) -> None:
        for run in self._waiters:
            self._wake(run)

    def _sweep(self) -> None:
        """Delete what starts left that never came to a worker."""
        now = self._clock.now().timestamp()
        for entry in os.scandir(self._runs):
            directory = Path(entry.path)
            with contextlib.suppress(FileNotFoundError):
                age = now - entry.stat(follow_symlinks=False).st_mtime
                if age > _LEFTOVER_SECONDS and not self._exists(directory):
                    shutil.rmtree(directory, ignore_errors=True)

    def _message(
        self,
        workload: Workload,
        params: WasmParams,
        directory: Path,
        codes: Sequence[protocol.Code],
        preopens: Sequence[protocol.Preopen],
    ) -> protocol.Start:
        resources = workload.resources
        file_bytes_max = 0
        if resources.disk_bytes:
            # The log's own files are under the same limit of the process.
            file_bytes_max = max(resources.disk_bytes, 2 * workload.output_bytes_max)
        return {
            "op": "start",
            "id": workload.id,
            "directory": str(directory),
            "module": codes[0],
            "imports": [*codes[1:]],
            "entrypoint": params.entrypoint,
            "argv": list(params.parameters),
            "env": dict(workload.env),
            "preopens": [*preopens],
            "stdout": str(workload.stdout),
            "stderr": str(workload.stderr),
            "log_index": str(workload.log_index),
            "timeout_seconds": workload.timeout_seconds,
            "memory_bytes_max": resources.memory_bytes or self._options.memory_bytes_default,
            "output_bytes_max": workload.output_bytes_max,
            "file_bytes_max": file_bytes_max,
            "leash": _leash(workload),
        }


def _check_platform() -> None:
    if sys.platform != "linux":
        raise TerminalError("engine wasm needs Linux", hint="leave it out on this node")
    try:
        metadata.version("wasmtime")
    except metadata.PackageNotFoundError as error:
        raise TerminalError(
            "engine wasm needs the Python package wasmtime", hint="pip install wasmtime"
        ) from error


def _leash(workload: Workload) -> protocol.Leash | None:
    leash = workload.leash
    if leash is None:
        return None
    return {
        "seconds": leash.seconds,
        "contact": leash.contact,
        "boot": leash.boot,
        "noted": str(leash.noted),
    }


def _check_environment(workload: Workload) -> None:
    if workload.network.type not in (NetworkType.DEFAULT, NetworkType.NONE):
        raise failed(
            f"engine wasm gives no network access, but the job asks for {workload.network.type}; "
            "use network type None"
        )
    if workload.resources.gpu:
        raise failed("engine wasm gives no GPU access; leave resources.gpu at 0")
    for name, value in workload.env.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise failed(f"environment variable {name!r} must have a name without '=' and no NUL")


def _set(event: asyncio.Future[None]) -> None:
    if not event.done():
        event.set_result(None)


def _lives(process: ProcessId, zygote: int) -> bool:
    """A zombie counts as living while its zygote is there to record the end and reap it."""
    stat = process.stat()
    if stat is None:
        return False
    return stat.state not in "ZX" or stat.parent == zygote


def _moment(time: float) -> datetime:
    return datetime.fromtimestamp(time, UTC)
