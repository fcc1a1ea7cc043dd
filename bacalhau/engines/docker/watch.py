"""Keeps watch over the runs that exist: one task for each, woken by the engine's events.

The events are only a hint; what counts is what the engine says of a container when it is asked
(`inspect`), which happens after every hint, and now and then without one. A task copies the log,
enforces the limits of time and output, and writes the end down once the log is complete.
"""

import asyncio
import contextlib
import functools
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bacalhau.engines.docker import ends
from bacalhau.engines.docker.body import LABEL_BOOT, LABEL_OWNER, LABEL_RUN, container_name
from bacalhau.engines.docker.client import EngineClient, Lane, RefusedError, lines
from bacalhau.engines.docker.logs import FrameError, LogCopy
from bacalhau.engines.docker.records import Record, Shelf, Stop
from bacalhau.engines.logfile import OutputLimitError
from bacalhau.flush import flush_tree, fsync_path
from bacalhau.node.machine import boot_id
from bacalhau_api.errors import BacalhauError, UnavailableError
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.runner.guard import ENGINE_FAULT
from bacalhau_controllers.runner.ports import Observation, RunPhase
from bacalhau_controllers.runner.state import Instant

logger = logging.getLogger(__name__)

LOOK_SECONDS = 60.0  # without any hint
SWEEP_SECONDS = 10.0
RETRY_SECONDS = 0.5
RETRY_SECONDS_MAX = 5.0
DRAIN_SECONDS = 20.0
MISSED_MAX = 3
"""How often in a row a container must be neither found nor listed to be gone."""
UNREAD_MAX = 3
"""How often the log of what has ended may hang before it is given up, so that a result does not hang
with it."""
UNKEPT_SECONDS = 20.0
"""For how long the disk may take no more of the log of what has ended, likewise."""
FLUSH_SECONDS = 120.0
_FLUSH_THREADS = 8
EVENT_SECONDS = 2.0
_TAIL_BYTES = 512
_SIGNALS = (137, 143)


@dataclass(slots=True, eq=False)
class Watched:
    """One run under watch."""

    record: Record
    container: str
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    died: asyncio.Event = field(default_factory=asyncio.Event)
    foreign: str = ""
    is_cut: bool = False
    unread: int = 0  # how often the engine hung when its log was read
    unkept_since: float | None = None  # the disk took no more of its log, by the monotonic clock
    log_lost: str = ""
    task: "asyncio.Task[None] | None" = None


class Watch:
    """All runs under watch, the stream of events, and the sweep that needs neither."""

    def __init__(self, client: EngineClient, shelf: Shelf, clock: Clock, owner: str) -> None:
        self._client = client
        self._shelf = shelf
        self._clock = clock
        self._owner = owner
        self._runs: dict[str, Watched] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._disk = Lane("flush", _FLUSH_THREADS)  # a disk that is busy holds up no calls
        self.life = ends.EngineLife()
        self._breaks = 0  # of the stream of events: how often the engine may have been away
        self._life_at = -1  # after which of them it was looked at last
        self.on_end: Callable[[Record], Awaitable[None]] | None = None

    def open(self) -> None:
        """Begin to listen."""
        self._tasks = [
            asyncio.create_task(self._forever(self._listen, 0.0), name="docker events"),
            asyncio.create_task(self._forever(self._sweep, SWEEP_SECONDS), name="docker sweep"),
        ]

    async def close(self) -> None:
        """Let go of everything; what runs goes on."""
        tasks = [*self._tasks, *(run.task for run in self._runs.values() if run.task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks, self._runs = [], {}
        self._disk.close()

    def add(self, record: Record) -> Watched:
        """Watch a run, if it is not watched yet."""
        run = self._runs.get(record.run)
        if run is None:
            run = Watched(record, container_name(self._owner, record.run))
            if self._shelf.end_of(record.run) is not None:
                run.ended.set()  # it ended while the caller was asking about it
                return run
            self._runs[record.run] = run
            run.task = asyncio.create_task(self._guard(run), name=f"docker run {record.run}")
        return run

    def get(self, run: str) -> Watched | None:
        """A run under watch."""
        return self._runs.get(run)

    async def look(self, run: str) -> dict[str, Any] | None:
        """The `State` of a run's container, and the boot that it was made in as `Boot`; None if
        there is none. Raises TransientError."""
        found = await self.inspect(run)
        if found is None:
            return None
        labels = (found.get("Config") or {}).get("Labels") or {}
        return {**found["State"], "Boot": labels.get(LABEL_BOOT, "")}

    async def inspect(self, run: str) -> dict[str, Any] | None:
        """All that the engine says of a run's container, None if there is none. Raises
        TransientError."""
        try:
            found: dict[str, Any] = await self._client.ask(
                "inspect_container", container_name(self._owner, run)
            )
        except RefusedError as error:
            if error.status == 404:
                return None
            raise _unclear("inspect", error) from error
        state = found.get("State")
        if not isinstance(state, dict) or "Status" not in state:
            raise _unclear("inspect", RefusedError(200, "the answer has no state"))
        return found

    async def look_at_engine(self) -> None:
        """Find out since when the engine runs. Raises TransientError."""
        breaks = self._breaks
        try:
            info = await self._client.ask("info")
        except RefusedError as error:
            raise _unclear("say what it is", error) from error
        process = await self._client.in_thread(self._client.engine_began, "looking at the engine")
        began = max(process, await self._network_made())
        self.life = ends.EngineLife(began, bool(info.get("LiveRestoreEnabled")), boot_id())
        self._life_at = breaks

    async def _network_made(self) -> float:
        """When the engine made its own bridge, which it does anew at each start where no container
        outlives it; 0 if it has none. Where systemd listens in the engine's place, nothing else
        tells when it was started."""
        try:
            found = await self._client.ask("inspect_network", "bridge")
        except RefusedError:
            return 0.0
        made = ends.moment(found.get("Created"))
        return made.timestamp() if made is not None else 0.0

    async def engine_life(self) -> ends.EngineLife:
        """The same, if it may be another engine by now: that changes what it means that a container
        has ended. Raises TransientError."""
        if self._life_at != self._breaks:
            await self.look_at_engine()
        return self.life

    def now(self) -> Instant:
        """The present moment."""
        return Instant(wall=self._clock.now(), mono=self._clock.monotonic(), boot=boot_id())

    async def listed(self) -> dict[str, str]:
        """The runs that have a container of ours, and its state in one word."""
        try:
            found = await self._client.ask(
                "containers", all=True, filters={"label": f"{LABEL_OWNER}={self._owner}"}
            )
        except RefusedError as error:
            raise _unclear("list", error) from error
        return {
            one["Labels"][LABEL_RUN]: str(one.get("State", ""))
            for one in found
            if LABEL_RUN in (one.get("Labels") or {})
        }

    # -- hints -----------------------------------------------------------------------------------

    async def _forever(self, work: Callable[[], Awaitable[None]], pause: float) -> None:
        """Do it again and again; the engine may be away for a while."""
        wait = RETRY_SECONDS
        while True:
            try:
                await work()
                wait = RETRY_SECONDS
            except (BacalhauError, RefusedError) as error:
                logger.debug("The Docker engine is silent", extra={"error": str(error)})
                wait = min(wait * 2, RETRY_SECONDS_MAX)
            await self._clock.sleep(max(pause, wait))

    async def _listen(self) -> None:
        filters = {"type": ["container"], "label": [f"{LABEL_OWNER}={self._owner}"]}
        try:
            async with self._client.stream("/events", {"filters": json.dumps(filters)}) as response:
                await self.look_at_engine()
                self._wake_all()  # whatever happened while nobody listened
                async for event in lines(response):
                    self._heard(event)
        finally:
            self._breaks += 1
            self._wake_all()

    def _heard(self, event: dict[str, Any]) -> None:
        actor = event.get("Actor") or {}
        attributes = actor.get("Attributes") or {}
        run = self._runs.get(str(attributes.get(LABEL_RUN)))
        if run is None:
            return
        action = str(event.get("Action", ""))
        if action == "kill" and self._shelf.stop_of(run.record.run) is None:
            signal = attributes.get("signal", "?")
            run.foreign = f"somebody else sent signal {signal} to its container"
        if action == "die":
            run.died.set()
        if action in ("die", "oom", "stop", "destroy", "kill"):
            run.wake.set()

    async def _sweep(self) -> None:
        found = await self.listed()
        for name, run in self._runs.items():
            if found.get(name) != "running":
                run.wake.set()

    def _wake_all(self) -> None:
        for run in self._runs.values():
            run.wake.set()

    # -- one run ---------------------------------------------------------------------------------

    async def _guard(self, run: Watched) -> None:
        try:
            await self._attend(run)
        except Exception:
            logger.exception("Lost watch of a run", extra={"run": run.record.run})
        finally:
            run.ended.set()
            if self._runs.get(run.record.run) is run:
                del self._runs[run.record.run]

    async def _attend(self, run: Watched) -> None:
        """Until it has ended and its log is complete."""
        copy = LogCopy(self._client, run.container, run.record)
        follower: asyncio.Task[None] | None = None
        breaks = missed = 0
        deadline: float | None = None
        try:
            while True:
                run.wake.clear()
                try:
                    state = await self.look(run.record.run)
                    if state is not None and ends.is_over(state):
                        await self.engine_life()
                except BacalhauError:
                    await self._pause(run, RETRY_SECONDS_MAX)
                    continue
                if state is None:
                    # Whatever it answers once, an engine may answer otherwise a moment later.
                    missed = 0 if await self._is_listed(run) else missed + 1
                    if missed < MISSED_MAX:
                        await self._pause(run, RETRY_SECONDS)
                        continue
                    await self._settle(follower)
                    await self._gone(run)
                    return
                missed = 0
                if ends.is_over(state):
                    if breaks != self._breaks:
                        # The log may have ended because the engine did.
                        await self._settle(follower)
                        follower = None
                    if not await self._complete(run, copy, follower):
                        await self._pause(run, RETRY_SECONDS)
                        follower = None
                        continue
                    await self._end(run, state)
                    return
                if deadline is None:
                    deadline = self._deadline(run, state)
                if follower is not None and follower.done():
                    self._judge(run, follower)
                    follower = None
                    if not run.is_cut:
                        await self._pause(run, RETRY_SECONDS)
                if follower is None and not run.is_cut:
                    breaks = self._breaks
                    follower = asyncio.create_task(copy.follow(live=True))
                if run.is_cut or (deadline is not None and self._clock.monotonic() >= deadline):
                    await self._cut(run)
                    continue
                await self._rest(run, follower, deadline)
        finally:
            await self._settle(follower)

    async def _is_listed(self, run: Watched) -> bool:
        """Whether the engine's list has the container, or cannot be had."""
        try:
            return run.record.run in await self.listed()
        except BacalhauError:
            return True

    def _deadline(self, run: Watched, state: dict[str, Any]) -> float | None:
        """When its time is over, by the monotonic clock."""
        limit = run.record.timeout_seconds
        if limit is None:
            return None
        now = self.now()
        began = self._shelf.started_at(run.record.run)
        lasted = began.elapsed(now) if began is not None else None
        if lasted is None:  # the answer to its start was lost
            started = ends.moment(state.get("StartedAt"))
            lasted = (now.wall - started).total_seconds() if started else 0.0
        return now.mono + max(0.0, limit - max(0.0, lasted))

    async def _rest(
        self, run: Watched, follower: "asyncio.Task[None] | None", deadline: float | None
    ) -> None:
        """Until something happens, or it is time to look again."""
        seconds = LOOK_SECONDS
        if deadline is not None:
            seconds = min(seconds, max(0.0, deadline - self._clock.monotonic()))
        waker = asyncio.create_task(run.wake.wait())
        try:
            tasks = {waker} if follower is None else {waker, follower}
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waker.cancel()

    async def _pause(self, run: Watched, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await run.wake.wait()

    def _judge(self, run: Watched, follower: "asyncio.Task[None]") -> bool:
        """What came of copying the log; True if it is complete as far as it goes."""
        error = None if follower.cancelled() else follower.exception()
        if isinstance(error, OutputLimitError):
            run.is_cut = True
            self._mark(run, "OutputLimit", str(error))
            return True
        if error is None:
            return not follower.cancelled()
        expected = isinstance(error, BacalhauError | RefusedError | FrameError | OSError)
        logger.log(
            logging.DEBUG if expected else logging.ERROR,
            "Copying a log broke off",
            extra={"run": run.record.run, "error": repr(error)},
        )
        return False

    async def _complete(
        self, run: Watched, copy: LogCopy, follower: "asyncio.Task[None] | None"
    ) -> bool:
        """Bring the log to its end: once the container has ended it is read once more as a whole.
        That the follower came to an end says nothing: where a container ends soon after it wrote,
        engines (20.10 at least) end what follows its log before the last lines of it."""
        if follower is not None and not run.is_cut:
            await asyncio.wait({follower}, timeout=DRAIN_SECONDS)
            if follower.done():
                self._judge(run, follower)
            await self._settle(follower)
        if run.is_cut:
            return True
        again = asyncio.create_task(copy.follow(live=False))
        try:
            await asyncio.wait({again})
            return self._judge(run, again) or self._is_lost(run, again)
        finally:
            await self._settle(again)

    def _is_lost(self, run: Watched, reading: "asyncio.Task[None]") -> bool:
        """Whether the log itself cannot be read, or kept, now or ever: it ends here."""
        error = reading.exception()
        if isinstance(error, OSError):
            now = self._clock.monotonic()
            if run.unkept_since is None:
                run.unkept_since = now
            if now - run.unkept_since < UNKEPT_SECONDS:
                return False
            run.log_lost = f"its log could not be kept to its end: {error}"
            return True
        if isinstance(error, UnavailableError) and error.reason == ENGINE_FAULT:
            run.unread += 1
        is_lost = (
            run.unread >= UNREAD_MAX
            or isinstance(error, FrameError)
            or (isinstance(error, RefusedError) and error.status in (404, 500, 501))
        )
        if is_lost:
            run.log_lost = f"its log could not be read to its end: {error}"
        return is_lost

    async def _settle(self, task: "asyncio.Task[None] | None") -> None:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _cut(self, run: Watched) -> None:
        """End it: its time or its output is used up."""
        limit = run.record.timeout_seconds
        if not run.is_cut and limit is not None:
            self._mark(run, "Timeout", f"it ran longer than {limit:g} s")
        try:
            await self._client.ask("kill", run.container)
        except RefusedError as error:
            if error.status not in (404, 409):
                logger.warning("Could not end a run", extra={"error": error.message})
        except BacalhauError as error:
            logger.warning("Could not end a run", extra={"error": error.message})
        await self._pause(run, RETRY_SECONDS)

    def _mark(self, run: Watched, reason: str, message: str) -> None:
        now = self._clock.now().timestamp()
        self._shelf.mark_stop(run.record.run, Stop(reason, message, now))

    async def _end(self, run: Watched, state: dict[str, Any]) -> None:
        stop = self._shelf.stop_of(run.record.run)
        if stop is None and state.get("ExitCode") in _SIGNALS:
            # The events may be a little behind, and one of them may say whose signal it was.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVENT_SECONDS):
                    await run.died.wait()
        tail = _tail(Path(run.record.stderr)) if state.get("ExitCode") in (126, 127) else ""
        end = ends.ended(state, stop, stderr_tail=tail, foreign=run.foreign, life=self.life)
        if run.log_lost:
            words = end.message or (f"exit code {end.exit_code}" if end.exit_code else "")
            end = replace(end, message=f"{words}; {run.log_lost}" if words else run.log_lost)
        await self._write_end(run, end)

    async def _gone(self, run: Watched) -> None:
        stop = self._shelf.stop_of(run.record.run)
        why = "its container was removed by somebody else"
        await self._write_end(run, ends.vanished(stop, why, self._clock.now()))

    async def _write_end(self, run: Watched, end: Observation) -> None:
        write = functools.partial(_keep, self._shelf, run.record, end)
        try:
            await self._disk.run(write, "writing down its end", FLUSH_SECONDS)
        except Exception as error:  # noqa: BLE001 whatever it is, the run has ended
            # It is known all the same; the next agent asks the engine once more, and after a reboot
            # doubts it (`EngineLife.outlasted`).
            self._shelf.remember_end(run.record.run, end)
            logger.warning(
                "Could not write down an end",
                extra={"run": run.record.run, "error": str(error)},
            )
        if self.on_end is not None:
            await self.on_end(run.record)


def _unclear(what: str, error: RefusedError) -> BacalhauError:
    return UnavailableError(f"the Docker engine could not {what}: {error}")


def _keep(shelf: Shelf, record: Record, end: Observation) -> None:
    """Write an end down, once its log and results are on the disk: it speaks for them, too."""
    if end.phase is RunPhase.EXITED:
        flush_tree(Path(record.stdout).parent)  # results lie beside the log
        if (index := Path(record.log_index)).exists():
            fsync_path(index)
    shelf.write_end(record.run, end)


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
