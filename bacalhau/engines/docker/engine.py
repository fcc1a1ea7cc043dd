"""The Engine port for Docker: what the agent calls.

A run is a container whose name derives from the run's id, so that starting it twice cannot make two,
and whose labels say whose it is. What the engine says of it is the truth; what only this node knows
(where the log goes, why we ended it, how it ended) is in `records.py`.
"""

import asyncio
import contextlib
import hashlib
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from bacalhau.engines.docker import body, ends, gpus, guard
from bacalhau.engines.docker.body import check_run_id, container_name
from bacalhau.engines.docker.client import ENGINE_DOWN, EngineClient, RefusedError
from bacalhau.engines.docker.images import Images
from bacalhau.engines.docker.launch import NOT_STARTED, Launcher
from bacalhau.engines.docker.networks import Networks
from bacalhau.engines.docker.options import DockerOptions, engine_host, socket_path
from bacalhau.engines.docker.records import Shelf, Stop
from bacalhau.engines.docker.strays import end_strays
from bacalhau.engines.docker.watch import DRAIN_SECONDS, Watch
from bacalhau.node.machine import Detected
from bacalhau.params import read_params
from bacalhau_api.errors import (
    BacalhauError,
    TerminalError,
    TransientError,
    UnavailableError,
)
from bacalhau_api.params import DockerParams
from bacalhau_api.v1.node import NOT_INSTALLED
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.runner.ports import Health, Observation, RunPhase, Workload

logger = logging.getLogger(__name__)

CLEAN_SECONDS = 300.0
STRAY_SECONDS = 1.0
STOP_SECONDS_MAX = 30.0


class DockerEngine:
    """Runs containers. `state_dir` is for this engine alone; it also says which containers are
    ours, so that several nodes can share one Docker Engine."""

    def __init__(
        self,
        state_dir: Path,
        clock: Clock,
        *,
        options: DockerOptions | None = None,
        allows_private: bool = False,
        probe: gpus.GpuProbe = gpus.probe_nvml,
    ) -> None:
        self._clock = clock
        self._options = options or DockerOptions()
        self._allows_private = allows_private
        self._probe = probe
        self._state_dir = state_dir.resolve()
        self._shelf = Shelf(self._state_dir / "runs")
        self._owner = _owner(self._state_dir)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._gpus = gpus.Probe(missing="not looked for yet")
        self._info: Mapping[str, Any] = {}
        self._parts: _Parts | None = None
        self._cleaner: asyncio.Task[None] | None = None

    # -- the node's side ---------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, and take up every run that has not ended. Raises TransientError if the engine
        does not answer: the agent tries again."""
        options = self._options
        await self._release()
        host = engine_host(options)
        if not await asyncio.to_thread(Path(socket_path(host)).exists):
            raise UnavailableError(_not_there(host), reason="NotInstalled")
        self._shelf.open()
        client = self._client(host)
        try:
            await self._look_around(client)
        except BaseException:
            await client.close()
            raise
        watch = Watch(client, self._shelf, self._clock, self._owner)
        images = Images(client, options, self._clock, self._state_dir)
        networks = Networks(client, self._owner, self._allows_private, options.http_jobs_max)
        launcher = Launcher(client, networks, self._shelf, options, self._owner)
        self._parts = _Parts(client, watch, images, networks, launcher)
        await watch.look_at_engine()
        watch.open()
        await self._take_up(self._parts)
        self._cleaner = asyncio.create_task(self._clean_forever(self._parts), name="docker cleaner")

    async def health(self) -> Health:
        """Whether the engine answers, and what of it cannot be used. That it can start something
        is told by starts."""
        if self._parts is None:
            return Health(is_available=False, reason="the docker engine is not open")
        try:
            await self._look_around(self._parts.client)
        except BacalhauError as error:
            return Health(is_available=False, reason=error.message, version=self._version)
        missing = tuple(f"{what}: {why}" for what, why in self.missing.items())
        return Health(is_available=True, version=self._version, missing=missing)

    async def detect(self) -> Detected:
        """What the engine's machine has, asked without opening it. If the engine does not answer, as
        when it is started after the node, that is only which GPUs the driver knows."""
        try:
            client = self._client(engine_host(self._options))
        except BacalhauError:
            return Detected()
        try:
            await self._look_around(client)
        except BacalhauError as error:
            logger.info("Could not ask the Docker engine", extra={"error": error.message})
            return Detected(gpus=await self._known_gpus(client))
        finally:
            await client.close()
        return Detected(
            cpu_millis=int(self._info.get("NCPU") or 0) * 1000,
            memory_bytes=int(self._info.get("MemTotal") or 0),
            gpus=len(self._gpus.gpus),
        )

    async def _known_gpus(self, client: EngineClient) -> int:
        try:
            return len((await client.in_thread(self._probe, "looking for GPUs")).gpus)
        except BacalhauError:
            return 0

    @property
    def missing(self) -> dict[str, str]:
        """What this engine cannot do here, and why."""
        found = {"disk limit": "the engine's storage driver has no quotas for containers"}
        if self._gpus.missing:
            found["gpu"] = self._gpus.missing
        if self._parts is not None and (why := self._parts.networks.http_missing()):
            found["network HTTP"] = why
        if not self._info.get("InitBinary"):
            found["init"] = "the engine has no init program; a process 1 may ignore signals"
        return found

    async def admit(self, params: Mapping[str, object]) -> str:
        """Why this node does not run such a workload, or ''."""
        try:
            read = self._params(params)
        except TerminalError as error:
            return error.message
        return Images(
            None,  # type: ignore[arg-type]  # the rules need no engine
            self._options, self._clock, self._state_dir,
        ).admit(read.image)  # fmt: skip

    async def prepare(
        self,
        params: Mapping[str, object],
        pins: Mapping[str, str],
        tell: Callable[[str], None],
    ) -> Mapping[str, str]:
        """Bring the image; returns what its reference stands for from now on."""
        parts = self._opened()
        read = self._params(params)
        image = await parts.images.ensure(read.image, pins.get("image", ""), tell)
        return {"image": image.pinned}

    # -- runs --------------------------------------------------------------------------------------

    async def start(self, workload: Workload) -> None:
        """Create the container if there is none of its name, and start it."""
        parts = self._opened()
        params = self._params(workload.params)
        run = check_run_id(workload.id)
        async with self._lock(run):
            if self._shelf.end_of(run) is not None or parts.watch.get(run) is not None:
                return
            record = self._shelf.read(run)
            if record is not None or run in await parts.watch.listed():
                state = await parts.watch.look(run)
                is_begun = state is not None and not ends.is_unborn(state)
                if is_begun or (state is None and self._shelf.was_started(run)):
                    if record is not None:
                        parts.watch.add(record)
                    return
                await self._discard(run)
            image = await parts.images.ensure(params.image, workload.pins.get("image", ""))
            try:
                record = await parts.launcher.begin(
                    workload,
                    params,
                    image,
                    devices=self._gpus,
                    has_init=bool(self._info.get("InitBinary")),
                )
            except TerminalError:
                await self._discard(run)
                raise
            except TransientError as error:
                # It may have been started all the same: what there is of it stays, to be found.
                if error.reason in NOT_STARTED:
                    parts.networks.forget_bridge()
                    await self._discard(run)
                raise
            self._shelf.mark_started(run, parts.watch.now())
            parts.watch.add(record)

    async def observe(self, run: str) -> Observation:
        """What is written down, else what the engine says."""
        parts = self._opened()
        end = self._shelf.end_of(run)
        if end is not None:
            return end
        if not body.is_run_id(run):
            return Observation(RunPhase.ABSENT)
        record = self._shelf.read(run)
        state = await parts.watch.look(run)
        if (end := self._shelf.end_of(run)) is not None:  # written down meanwhile
            return end
        if state is None:
            if record is None or not self._shelf.was_started(run):
                return Observation(RunPhase.ABSENT)
            watched = parts.watch.add(record)  # it finds out, and writes it down
            return await self._soon(parts, run, watched.ended, Observation(RunPhase.RUNNING))
        if ends.is_unborn(state):
            async with self._lock(run):  # nobody starts it now
                await self._end_strays(parts, run)
            return Observation(RunPhase.ABSENT)
        if record is None:
            # Nobody keeps its log or its limits, unless the record can be read another time.
            if not ends.is_over(state):
                return ends.running(state)
            life = await parts.watch.engine_life()
            return ends.ended(state, self._shelf.stop_of(run), life=life)
        watched = parts.watch.add(record)
        if ends.is_over(state):
            watched.wake.set()
            return await self._soon(parts, run, watched.ended, ends.running(state))
        return ends.running(state)

    async def wait(self, run: str) -> Observation:
        """Return once the run has ended and its log is complete."""
        while (seen := await self.observe(run)).phase is RunPhase.RUNNING:
            watched = self._opened().watch.get(run)
            if watched is None:
                await self._clock.sleep(STRAY_SECONDS)
            else:
                await watched.ended.wait()
        return seen

    async def stop(self, run: str, grace_seconds: float) -> None:
        """SIGTERM, and after the grace SIGKILL; without grace SIGKILL at once."""
        parts = self._opened()
        if not body.is_run_id(run):
            return
        async with self._lock(run):
            state = await parts.watch.look(run)
            if state is None:
                return
            if self._shelf.end_of(run) is not None:
                if not ends.is_over(state):  # somebody started its container again
                    await self._end(parts, run, 0.0)
                return
            if ends.is_unborn(state):
                # A start that hung may come to life yet; without its container it cannot.
                await self._discard(run)
                return
            if not ends.is_over(state):
                now = self._clock.now().timestamp()
                self._shelf.mark_stop(run, Stop("Killed", "stopped", now))
                await self._end(parts, run, grace_seconds)
        try:
            async with asyncio.timeout(STOP_SECONDS_MAX):
                await self.wait(run)
        except TimeoutError as error:
            raise UnavailableError(f"run {run} does not end, although it was killed") from error

    async def remove(self, run: str) -> None:
        """Remove the container and all that was made for it."""
        parts = self._opened()
        if not body.is_run_id(run):
            return
        async with self._lock(run):
            if self._shelf.end_of(run) is None:
                state = await parts.watch.look(run)
                if state is not None and not ends.is_over(state) and not ends.is_unborn(state):
                    raise TransientError(f"run {run} still runs; stop it first")
            await self._discard(run)

    async def list(self) -> Sequence[str]:
        """All runs that have a container, or a record of one that was started."""
        parts = self._opened()
        found = set(await parts.watch.listed())
        for name in self._shelf.names():
            if self._shelf.was_started(name) or self._shelf.end_of(name) is not None:
                found.add(name)
        return sorted(found)

    async def close(self, *, keep_running: bool) -> None:
        """Let go of the engine, or stop all that runs first."""
        if self._parts is None:
            return
        try:
            if not keep_running:
                runs = await self.list()
                results = await asyncio.gather(
                    *(self.stop(run, 0.0) for run in runs), return_exceptions=True
                )
                errors = [r for r in results if isinstance(r, BaseException)]
                if errors:
                    raise errors[0]
                await self._parts.networks.remove_bridge()
        finally:
            await self._release()

    # -- inner parts -------------------------------------------------------------------------------

    @property
    def _version(self) -> str:
        version = self._info.get("ServerVersion")
        return f"Docker {version}" if version else ""

    def _client(self, host: str) -> EngineClient:
        return EngineClient(
            host,
            starts_max=self._options.starts_max,
            call_seconds=self._options.call_seconds,
            start_seconds=self._options.start_seconds,
        )

    def _opened(self) -> "_Parts":
        if self._parts is None:
            raise UnavailableError("the docker engine is not open", reason=ENGINE_DOWN)
        return self._parts

    def _params(self, params: Mapping[str, object]) -> DockerParams:
        return read_params(DockerParams, params, what="engine docker", reason="StartFailed")

    def _lock(self, run: str) -> asyncio.Lock:
        return self._locks.setdefault(run, asyncio.Lock())

    async def _release(self) -> None:
        parts, self._parts = self._parts, None
        cleaner, self._cleaner = self._cleaner, None
        if cleaner is not None:
            cleaner.cancel()
            await asyncio.gather(cleaner, return_exceptions=True)
        if parts is not None:
            await parts.watch.close()
            await parts.images.close()
            await parts.networks.close()
            await parts.client.close()

    async def _look_around(self, client: EngineClient) -> None:
        try:
            info = await client.ask("info")
        except RefusedError as error:
            raise UnavailableError(f"the Docker engine does not say what it is: {error}") from error
        if info.get("OSType", "linux") != "linux":
            raise UnavailableError("the Docker engine does not run Linux containers")
        is_first = not self._info
        self._info = info
        if is_first:
            found = await client.in_thread(self._probe, "looking for GPUs")
            self._gpus = gpus.offered(found, info)

    async def _take_up(self, parts: "_Parts") -> None:
        """Watch what runs from an earlier life; forget what never came to be."""
        containers = await parts.watch.listed()
        for name in self._shelf.names():
            record = self._shelf.read(name)
            if self._shelf.end_of(name) is not None:
                continue
            if name not in containers and (record is None or not self._shelf.was_started(name)):
                self._shelf.remove(name)
            elif record is None:
                logger.warning("Could not read the record of a run", extra={"run": name})
            elif containers.get(name) != "created":
                if record.network:
                    await parts.networks.adopt(record)
                parts.watch.add(record)
        await parts.networks.sweep(set(containers))
        if guard.leashed(self._shelf):
            await parts.launcher.hold()

    async def _soon(
        self, parts: "_Parts", run: str, ended: asyncio.Event, otherwise: Observation
    ) -> Observation:
        """The end, if it is written down within a moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS / 2):
                await ended.wait()
        return self._shelf.end_of(run) or otherwise

    async def _end(self, parts: "_Parts", run: str, grace_seconds: float) -> None:
        name = container_name(self._owner, run)
        try:
            if grace_seconds >= 1:
                seconds = int(grace_seconds)
                await parts.client.ask("stop", name, timeout=seconds, extra_seconds=seconds)
            else:
                await parts.client.ask("kill", name)
        except RefusedError as error:
            if error.status not in (304, 404, 409):
                raise UnavailableError(f"the engine did not stop {run}: {error}") from error

    async def _discard(self, run: str) -> None:
        """Remove whatever there is of a run that does not run, as far as the engine knows; one that
        has ended in any case, as somebody may have started its container again."""
        parts = self._opened()
        record = self._shelf.read(run)
        has_ended = self._shelf.end_of(run) is not None
        name = container_name(self._owner, run)
        await self._end_strays(parts, run)
        try:
            await parts.client.ask("remove_container", name, v=True, force=has_ended)
        except RefusedError as error:
            if error.status == 409:  # it runs after all, or is being removed already
                raise TransientError(f"container {name} is not removed: {error}") from error
            if error.status != 404:
                raise UnavailableError(f"the engine did not remove {name}: {error}") from error
        if record is not None and record.network:
            await parts.networks.release(run)
        self._shelf.remove(run)

    async def _end_strays(self, parts: "_Parts", run: str) -> None:
        """Make sure that a container of which the engine says that it was never started does not
        run all the same."""
        found = await parts.watch.inspect(run)
        if found is not None and ends.is_unborn(found["State"]):
            ended = await asyncio.to_thread(end_strays, str(found["Id"]))
            if ended:
                logger.warning(
                    "Ended a container that the Docker engine had lost sight of",
                    extra={"run": run, "processes": ended},
                )

    async def _clean_forever(self, parts: "_Parts") -> None:
        while True:
            await self._clock.sleep(CLEAN_SECONDS)
            try:
                await parts.images.clean()
                await parts.networks.sweep(set(await parts.watch.listed()))
            except Exception as error:  # noqa: BLE001 it is tried again
                logger.warning("Could not clean up", extra={"error": repr(error)})


@dataclass(frozen=True, slots=True)
class _Parts:
    """What is there while the engine is open."""

    client: EngineClient
    watch: Watch
    images: Images
    networks: Networks
    launcher: Launcher


def _owner(state_dir: Path) -> str:
    """Whose containers these are: this directory's on this machine. A node that lost its data and
    starts again at the same place finds what it left running."""
    return hashlib.sha256(f"{socket.gethostname()}:{state_dir}".encode()).hexdigest()[:24]


def _not_there(host: str) -> str:
    return f"{NOT_INSTALLED}: no Docker engine at {host}; see the option --docker-host"
