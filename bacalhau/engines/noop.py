"""An engine that runs nothing: for tests, for measuring everything else, and for trying things out.

A run is a small file with its start, its end and what becomes of it. So it outlives the agent like
any workload, and thousands at a time cost a file and a timer each.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from bacalhau.engines.logfile import LogWriter, OutputLimitError
from bacalhau.engines.processes import boot_id
from bacalhau.params import read_params
from bacalhau_api.base import Model
from bacalhau_api.errors import TerminalError, TransientError, UnavailableError
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.runner.ports import Health, Observation, RunPhase, Workload

_BLOCK = bytes(64 * 1024)
ATTEMPT_VARIABLE = "BACALHAU_ATTEMPT"


class NoopParams(Model):
    """Parameters of the engine `noop` in a job.

    duration_seconds   how long it runs
    exit_code          how it ends
    stdout, stderr     what it writes, at its start
    fail_on_attempts   attempts (the first is 0) that end with `exit_code`, or with 1 if that is
                       0; other attempts then end with 0
    output_bytes       size of a file `output.bin` in the first writable mount; without such a
                       mount, so many bytes more on stdout
    """

    duration_seconds: float = Field(default=0.0, ge=0.0, le=10 * 365 * 86400.0)
    exit_code: int = Field(default=0, ge=0, le=255)
    stdout: str = ""
    stderr: str = ""
    fail_on_attempts: tuple[int, ...] = ()
    output_bytes: int = Field(default=0, ge=0, le=1024**4)


@dataclass(frozen=True, slots=True)
class _Run:
    """The file of a run. Times in seconds since the epoch; `boot` as `processes.boot_id`."""

    boot: str
    started: float
    ends: float
    exit_code: int
    reason: str = ""
    message: str = ""


class NoopEngine:
    """Pretends to run workloads. `state_dir` is for this engine alone."""

    def __init__(self, state_dir: Path, clock: Clock) -> None:
        self._directory = state_dir / "runs"
        self._clock = clock
        self._runs: dict[str, _Run] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._timers: dict[str, asyncio.Task[None]] = {}
        self._is_open = False

    async def open(self) -> None:
        """Read the files of an earlier life."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._is_open = True
        for path in self._directory.glob("*.json"):
            self._track(path.stem, _read(path))

    async def health(self) -> Health:
        """Always well."""
        return Health(is_available=self._is_open, reason="" if self._is_open else "not open")

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
        """Write what there is to write, and note the end."""
        if not self._is_open:
            raise UnavailableError("the noop engine is not open")
        params = read_params(NoopParams, workload.params, what="engine noop", reason="StartFailed")
        if workload.id in self._runs:
            return
        path = self._path(workload.id)
        run = self._plan(workload, params)
        try:
            run = _produce(workload, params, run)
            _write(path, run)
        except OSError as error:
            raise TransientError(f"the run cannot be started now: {error}") from error
        self._track(workload.id, run)

    async def observe(self, run: str) -> Observation:
        """Compare the clock with the run's file."""
        known = self._runs.get(run)
        if known is None:
            return Observation(RunPhase.ABSENT)
        started = datetime.fromtimestamp(known.started, UTC)
        now = self._clock.now().timestamp()
        if known.ends > now:
            if known.boot != boot_id():
                return Observation(
                    RunPhase.VANISHED,
                    message="the machine was restarted while it ran",
                    is_system_fault=True,
                    started_at=started,
                )
            return Observation(RunPhase.RUNNING, started_at=started)
        return Observation(
            RunPhase.EXITED,
            exit_code=known.exit_code,
            reason=known.reason,
            message=known.message,
            started_at=started,
            finished_at=datetime.fromtimestamp(known.ends, UTC),
        )

    async def wait(self, run: str) -> Observation:
        """Return at the run's end."""
        while (seen := await self.observe(run)).phase is RunPhase.RUNNING:
            await self._ended[run].wait()
        return seen

    async def stop(self, run: str, grace_seconds: float) -> None:
        """The run ends now."""
        if (await self.observe(run)).phase is not RunPhase.RUNNING:
            return
        now = self._clock.now().timestamp()
        old = self._runs[run]
        ended = _Run(old.boot, old.started, now, 137, "Killed", "stopped")
        _write(self._path(run), ended)
        self._runs[run] = ended
        if (timer := self._timers.pop(run, None)) is not None:
            timer.cancel()
        self._ended[run].set()

    async def remove(self, run: str) -> None:
        """Forget. Raises TransientError while it runs."""
        if (await self.observe(run)).phase is RunPhase.RUNNING:
            raise TransientError(f"run {run} still runs; stop it first")
        if self._runs.pop(run, None) is not None:
            self._ended.pop(run, None)
            self._path(run).unlink(missing_ok=True)

    async def list(self) -> Sequence[str]:
        """All runs that were not removed."""
        return list(self._runs)

    async def close(self, *, keep_running: bool) -> None:
        """Let go; runs end by the clock if they are kept."""
        if not keep_running:
            for run in list(self._runs):
                await self.stop(run, 0.0)
        timers = list(self._timers.values())
        for timer in timers:
            timer.cancel()
        await asyncio.gather(*timers, return_exceptions=True)
        self._timers.clear()
        for event in self._ended.values():
            event.set()
        self._is_open = False

    def _path(self, run: str) -> Path:
        if not run or "/" in run or run.startswith(".") or len(run) > 240:
            raise TerminalError(
                f"run id {run!r} must be a file name of 1-240 characters", reason="StartFailed"
            )
        return self._directory / f"{run}.json"

    def _plan(self, workload: Workload, params: NoopParams) -> _Run:
        now = self._clock.now().timestamp()
        code, reason, message = params.exit_code, "", ""
        if params.fail_on_attempts:
            attempt = workload.env.get(ATTEMPT_VARIABLE, "0")
            is_failing = attempt in {str(number) for number in params.fail_on_attempts}
            code = (params.exit_code or 1) if is_failing else 0
        seconds = params.duration_seconds
        limit = workload.timeout_seconds
        if limit is not None and seconds > limit:
            seconds, code, reason = limit, 137, "Timeout"
            message = f"ran longer than the {limit:g} s allowed"
        return _Run(boot_id(), now, now + seconds, code, reason, message)

    def _track(self, run: str, known: _Run) -> None:
        self._runs[run] = known
        self._ended[run] = asyncio.Event()
        left = known.ends - self._clock.now().timestamp()
        if left > 0 and known.boot == boot_id():
            timer = asyncio.create_task(self._expire(run, known))
            self._timers[run] = timer

    async def _expire(self, run: str, known: _Run) -> None:
        # The wall clock may be set meanwhile; what counts is that it has passed the end.
        while (left := known.ends - self._clock.now().timestamp()) > 0:
            await self._clock.sleep(left)
        self._timers.pop(run, None)
        if run in self._ended:
            self._ended[run].set()


def _produce(workload: Workload, params: NoopParams, run: _Run) -> _Run:
    """Write the run's output; a run that writes too much ends by it."""
    data = {"stdout": params.stdout.encode(), "stderr": params.stderr.encode()}
    target = next(
        (m.source for m in workload.mounts if not m.read_only and m.source.is_dir()), None
    )
    with LogWriter(
        workload.stdout,
        workload.stderr,
        workload.log_index,
        bytes_max=workload.output_bytes_max,
    ) as writer:
        try:
            writer.write("stdout", data["stdout"])
            writer.write("stderr", data["stderr"])
            if params.output_bytes and target is not None:
                with (target / "output.bin").open("wb") as file:
                    file.truncate(params.output_bytes)
            left = params.output_bytes if target is None else 0
            while left > 0:
                writer.write("stdout", _BLOCK[:left])
                left -= len(_BLOCK)
        except OutputLimitError as error:
            return _Run(run.boot, run.started, run.started, 137, "OutputLimit", str(error))
    return run


def _write(path: Path, run: _Run) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(asdict(run)))
    os.replace(temporary, path)


def _read(path: Path) -> _Run:
    """A file that a power cut spoilt stands for a run that nobody saw end."""
    data: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        data = json.loads(path.read_text())
    try:
        return _Run(**data)
    except TypeError:
        return _Run("", 0.0, float("inf"), 0)
