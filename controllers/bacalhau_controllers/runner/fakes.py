"""Stand-ins for the node's world: an engine, a storage, a publisher, directories and a link that
exist in memory, on a clock that may be simulated. Simulations and tests run the real agent on them.

They outlive the agent that uses them, as the real ones do. Each takes a `boundary` that is awaited
around whatever changes the world: a simulation lets the agent die there. Faults are attributes.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from bacalhau_api.errors import BacalhauError, TransientError, UnavailableError
from bacalhau_api.v1.execution import Outputs, Publication
from bacalhau_api.v1.job import InputSource, SpecConfig
from bacalhau_api.wire import (
    Ack,
    Applied,
    Beat,
    BeatReply,
    Changes,
    FactBatch,
    Hello,
    Refused,
    Welcome,
    WelcomePart,
)
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.runner.ports import (
    Collected,
    Fetched,
    Health,
    Layout,
    Observation,
    Progress,
    RunPhase,
    Use,
    Workload,
)

Boundary = Callable[[str], Awaitable[None]]


async def no_boundary(what: str) -> None:
    """Nothing ever dies here."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a workload does: how long it runs (None: until stopped), and how it ends."""

    seconds: float | None = 1.0
    exit_code: int = 0
    reason: str = ""
    stop_exit_code: int = 143


@dataclass(slots=True)
class FakeRun:
    """One run, as the engine knows it."""

    workload: Workload
    behaviour: Behaviour
    started: float
    started_at: datetime
    ended: Observation | None = None


class FakeEngine:
    """Runs nothing, but knows when it would end.

    `behave` says what a workload does (params `seconds`, `exitCode` by default). `started` counts
    the real starts of each run id, for ever: more than one is the fault that must never happen.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        behave: Callable[[Workload], Behaviour] | None = None,
        boundary: Boundary = no_boundary,
        start_seconds: float = 0.0,
    ) -> None:
        self._clock = clock
        self._behave = behave or _by_params
        self._boundary = boundary
        self._start_seconds = start_seconds
        self._changed = asyncio.Event()
        self.runs: dict[str, FakeRun] = {}
        self.started: dict[str, int] = {}
        self.health_now = Health(is_available=True, version="1")
        self.starts_hang = False
        """Starts never return, while everything else answers."""
        self.is_silent = False
        """Nothing answers."""
        self.answer_error: Exception | None = None
        """What every answer fails with."""
        self.stops_fail = False
        self.start_error: BacalhauError | None = None
        self.prepare_error: BacalhauError | None = None
        self.refusal = ""
        self.pins: dict[str, str] = {}

    # -- the world's doing -----------------------------------------------------------------------

    def reboot(self) -> None:
        """Everything that runs is gone, and nobody saw how it ended."""
        self._end_all()
        for run in self.runs.values():
            if run.ended is None:
                run.ended = Observation(RunPhase.VANISHED)
        self._wake()

    def lose(self, run_id: str) -> None:
        """Somebody removed a run by hand."""
        del self.runs[run_id]
        self._wake()

    def vanish(self, run_id: str) -> None:
        """A run is gone, and nobody saw how it ended."""
        self.runs[run_id].ended = Observation(RunPhase.VANISHED)
        self._wake()

    def end(self, run_id: str, exit_code: int = 0, reason: str = "") -> None:
        """A run ends now."""
        run = self.runs[run_id]
        run.ended = self._exited(run, self._clock.now(), exit_code, reason)
        self._wake()

    def running(self) -> tuple[str, ...]:
        """The ids of what runs now."""
        self._end_all()
        return tuple(run_id for run_id, run in self.runs.items() if run.ended is None)

    # -- Engine ----------------------------------------------------------------------------------

    async def open(self) -> None:
        """See Engine."""
        await self._answer("engine.open")

    async def health(self) -> Health:
        """See Engine."""
        await self._answer()
        return self.health_now

    async def admit(self, params: Mapping[str, object]) -> str:
        """See Engine."""
        return self.refusal

    async def prepare(
        self,
        params: Mapping[str, object],
        pins: Mapping[str, str],
        tell: Callable[[str], None],
    ) -> Mapping[str, str]:
        """See Engine."""
        if self.prepare_error is not None:
            raise self.prepare_error
        return {**self.pins, **pins}

    async def start(self, workload: Workload) -> None:
        """See Engine."""
        await self._answer("engine.start")
        if self.start_error is not None:
            raise self.start_error
        if self.starts_hang:
            await asyncio.Event().wait()
        if self._start_seconds:
            await self._clock.sleep(self._start_seconds)
        if workload.id not in self.runs:
            behaviour = self._behave(workload)
            self.runs[workload.id] = FakeRun(
                workload, behaviour, self._clock.monotonic(), self._clock.now()
            )
            self.started[workload.id] = self.started.get(workload.id, 0) + 1
        await self._boundary("engine.started")

    async def observe(self, run: str) -> Observation:
        """See Engine."""
        await self._answer()
        return self._observe(run)

    async def wait(self, run: str) -> Observation:
        """See Engine."""
        while True:
            seen = await self.observe(run)
            if seen.phase is not RunPhase.RUNNING:
                await self._boundary("engine.ended")
                return seen
            known = self.runs[run]
            ends = (known.behaviour.seconds, known.workload.timeout_seconds)
            seconds = min((one for one in ends if one is not None), default=None)
            left = None
            if seconds is not None:
                left = max(0.0, known.started + seconds - self._clock.monotonic()) + 1e-6
            try:
                async with asyncio.timeout(left):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def stop(self, run: str, grace_seconds: float) -> None:
        """See Engine."""
        await self._answer("engine.stop")
        if self.stops_fail:
            raise UnavailableError("the engine cannot stop anything now")
        self._end_all()
        known = self.runs.get(run)
        if known is not None and known.ended is None:
            code = known.behaviour.stop_exit_code
            known.ended = self._exited(known, self._clock.now(), code, "")
            self._wake()
        await self._boundary("engine.stopped")

    async def remove(self, run: str) -> None:
        """See Engine."""
        await self._answer("engine.remove")
        known = self.runs.get(run)
        if known is not None and self._observe(run).phase is RunPhase.RUNNING:
            raise TransientError(f"run {run} is still running")
        self.runs.pop(run, None)
        await self._boundary("engine.removed")

    async def list(self) -> Sequence[str]:
        """See Engine."""
        await self._answer()
        return tuple(self.runs)

    async def close(self, *, keep_running: bool) -> None:
        """See Engine."""
        if not keep_running:
            for run_id in self.running():
                await self.stop(run_id, 0)

    # -- small parts -----------------------------------------------------------------------------

    async def _answer(self, boundary: str = "") -> None:
        if self.is_silent:
            await asyncio.Event().wait()
        if self.answer_error is not None:
            raise self.answer_error
        if boundary:
            await self._boundary(boundary)

    def _observe(self, run_id: str) -> Observation:
        self._end_all()
        run = self.runs.get(run_id)
        if run is None:
            return Observation(RunPhase.ABSENT)
        return run.ended or Observation(RunPhase.RUNNING, started_at=run.started_at)

    def _end_all(self) -> None:
        """Let those end whose time has come."""
        now = self._clock.monotonic()
        for run in self.runs.values():
            if run.ended is not None:
                continue
            behaviour, limit = run.behaviour, run.workload.timeout_seconds
            seconds, code, reason = behaviour.seconds, behaviour.exit_code, behaviour.reason
            if limit is not None and (seconds is None or limit < seconds):
                seconds, code, reason = limit, 137, "Timeout"
            if seconds is not None and run.started + seconds <= now:
                at = run.started_at + timedelta(seconds=seconds)
                run.ended = self._exited(run, at, code, reason)

    def _exited(self, run: FakeRun, at: datetime, exit_code: int, reason: str) -> Observation:
        return Observation(
            RunPhase.EXITED,
            exit_code=exit_code,
            reason=reason,
            started_at=run.started_at,
            finished_at=at,
        )

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _by_params(workload: Workload) -> Behaviour:
    seconds, code = workload.params.get("seconds", 1.0), workload.params.get("exitCode", 0)
    return Behaviour(
        seconds=float(seconds) if isinstance(seconds, int | float) else None,
        exit_code=code if isinstance(code, int) else 0,
    )


class FakeStorage:
    """Brings inputs at once, or fails as told. `refusals` is by the parameter `path`."""

    def __init__(self, *, boundary: Boundary = no_boundary) -> None:
        self._boundary = boundary
        self.errors: list[BacalhauError] = []
        """Raised by the next fetches, one each."""
        self.refusals: dict[str, str] = {}
        self.fetched: list[Path] = []

    async def health(self) -> Health:
        """See Storage."""
        return Health(is_available=True)

    async def admit(self, source: SpecConfig) -> str:
        """See Storage."""
        return self.refusals.get(str(source.params.get("path", "")), "")

    async def fetch(self, item: InputSource, into: Path, use: Use) -> Fetched:
        """See Storage."""
        await self._boundary("storage.fetch")
        if self.errors:
            raise self.errors.pop(0)
        self.fetched.append(into)
        return Fetched(into, read_only=True)

    def progress(self, into: Path) -> Progress | None:
        """See Storage."""
        return None


class FakePublisher:
    """Delivers at once, or fails as told. `delivered` counts deliveries by publication uid."""

    def __init__(self, *, boundary: Boundary = no_boundary) -> None:
        self._boundary = boundary
        self.errors: list[BacalhauError] = []
        self.delivered: dict[str, int] = {}
        self.under_way: dict[str, Progress] = {}

    async def health(self) -> Health:
        """See Publisher."""
        return Health(is_available=True)

    async def publish(self, publication: Publication, outputs: Path) -> SpecConfig:
        """See Publisher."""
        await self._boundary("publisher.publish")
        if self.errors:
            raise self.errors.pop(0)
        uid = publication.metadata.uid
        self.delivered[uid] = self.delivered.get(uid, 0) + 1
        await self._boundary("publisher.published")
        return SpecConfig(type="fake", params={"uid": uid})

    def progress(self, uid: str) -> Progress | None:
        """See Publisher."""
        return self.under_way.get(uid)


@dataclass(slots=True)
class FakeDirectory:
    """What exists of one execution."""

    inputs: int = 0
    runs: list[int] = field(default_factory=list)
    exit_code: int | None = None
    has_outputs: bool = True


class MemoryWorkspace:
    """Directories without a disk. Outputs are as many bytes as there were runs since a reset."""

    def __init__(self, *, boundary: Boundary = no_boundary) -> None:
        self._boundary = boundary
        self.directories: dict[tuple[str, str], FakeDirectory] = {}
        self.contact: tuple[str, float] | None = None
        self.stray_seconds: dict[tuple[str, str], float] = {}
        self.errors: list[BacalhauError] = []
        """Raised by the next collections, one each."""

    def layout(self, namespace: str, execution: str) -> Layout:
        """See Workspace."""
        return Layout(Path("/node") / namespace / execution)

    @property
    def contact_file(self) -> Path:
        """See Workspace."""
        return Path("/node/contact")

    async def note_contact(self, boot: str, at: float) -> None:
        """See Workspace."""
        self.contact = (boot, at)

    async def prepare(self, layout: Layout, inputs: int) -> None:
        """See Workspace."""
        self._at(layout).inputs = inputs

    async def begin_run(
        self, layout: Layout, run: int, results: Sequence[str], *, reset: bool
    ) -> None:
        """See Workspace."""
        there = self._at(layout)
        there.runs = [run] if reset else [*there.runs, run]
        there.has_outputs = True

    async def collect(self, layout: Layout, exit_code: int | None) -> Collected:
        """See Workspace."""
        await self._boundary("workspace.collect")
        if self.errors:
            raise self.errors.pop(0)
        there = self._at(layout)
        there.exit_code = exit_code
        text = f"{exit_code} {there.runs}"
        digest = hashlib.sha256(text.encode()).hexdigest()
        outputs = Outputs(files=1, size_bytes=len(text), digest=f"sha256:{digest}")
        return Collected(outputs, stdout_tail=text)

    async def drop_outputs(self, layout: Layout) -> None:
        """See Workspace."""
        self._at(layout).has_outputs = False

    async def remove(self, layout: Layout) -> None:
        """See Workspace."""
        await self._boundary("workspace.remove")
        self.directories.pop(_key(layout), None)

    async def strays(self) -> Sequence[tuple[str, str, float]]:
        """See Workspace."""
        return tuple(
            (namespace, name, self.stray_seconds.get((namespace, name), 0.0))
            for namespace, name in self.directories
        )

    def _at(self, layout: Layout) -> FakeDirectory:
        return self.directories.setdefault(_key(layout), FakeDirectory())


def _key(layout: Layout) -> tuple[str, str]:
    return layout.root.parent.name, layout.root.name


Request = Hello | WelcomePart | FactBatch | Beat
Reply = Welcome | Ack | BeatReply | Refused
_REPLIES: dict[type[Request], type[Welcome] | type[Ack] | type[BeatReply]] = {
    Hello: Welcome,
    WelcomePart: Welcome,
    FactBatch: Ack,
    Beat: BeatReply,
}


class MemoryLink:
    """A line that is a function call. Messages go through JSON both ways.

    `serve` answers the node's requests; raising UnavailableError or never answering are lost
    messages. The link belongs to one agent; make a new one for the next.
    """

    def __init__(self, serve: Callable[[Request], Awaitable[Reply]]) -> None:
        self._serve = serve
        self._is_up = False
        self._on_up: Callable[[], None] = _nothing
        self._on_down: Callable[[], None] = _nothing
        self._on_changes: Callable[[Changes], Awaitable[Applied | None]] | None = None

    @property
    def is_up(self) -> bool:
        """See Link."""
        return self._is_up

    def set_up(self, is_up: bool) -> None:
        """Connect or cut the line."""
        if is_up == self._is_up:
            return
        self._is_up = is_up
        (self._on_up if is_up else self._on_down)()

    def set_handlers(
        self,
        *,
        on_up: Callable[[], None],
        on_down: Callable[[], None],
        on_changes: Callable[[Changes], Awaitable[Applied | None]],
    ) -> None:
        """See Link."""
        self._on_up, self._on_down, self._on_changes = on_up, on_down, on_changes
        if self._is_up:
            on_up()

    async def request(self, kind: Literal["hello", "facts", "beat"], message: Request) -> Reply:
        """See Link."""
        if not self._is_up:
            raise UnavailableError("the line is cut")
        reply = await self._serve(type(message).decode(message.encode()))
        if not self._is_up:
            raise UnavailableError("the line was cut before the answer came")
        model = Refused if isinstance(reply, Refused) else _REPLIES[type(message)]
        return model.decode(reply.encode())

    async def push(self, changes: Changes) -> Applied | None:
        """Deliver changes to the node. None if it does not answer them."""
        if not self._is_up or self._on_changes is None:
            raise UnavailableError("the line is cut")
        applied = await self._on_changes(Changes.decode(changes.encode()))
        if not self._is_up:
            raise UnavailableError("the line was cut before the answer came")
        return Applied.decode(applied.encode()) if applied else None


def _nothing() -> None:
    """Nobody listens yet."""
