"""What the node's runner asks of the world: engine, storage, publisher, the directories of
executions (Workspace), the way to the orchestrator (Link). The ledger is in `ledger.py`.

Frozen dataclasses cross the border; foreign exceptions are translated inside. Every call may be
repeated, as after a crash. Each implementation passes the suite of its kind in `tests/contract/`.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal, Protocol

from bacalhau_api.v1.execution import Execution, Outputs, Publication
from bacalhau_api.v1.job import InputSource, Network, Resources, SpecConfig
from bacalhau_api.v1.node import HeldInput
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


@dataclass(frozen=True, slots=True)
class Mount:
    """A host file or directory visible to the workload at `target`."""

    source: Path
    target: str
    read_only: bool = True


DISCONNECTED: Final = "Disconnected"
"""Reason of an end that the disconnect policy `stop` asked for."""


@dataclass(frozen=True, slots=True)
class Leash:
    """For how long a workload may go on without contact with the orchestrator (policy `stop`).

    The agent sees to it by itself. An engine whose workloads outlive the agent has to see to it too,
    by something that lives as long as they do: it ends the workload, with reason `Disconnected`,
    once the last contact is `seconds` ago, told by the clock that goes on while the machine sleeps
    (CLOCK_BOOTTIME). `contact` is the last one by that clock, in the boot named `boot`; later ones
    are noted in the file `noted` (read it with `bacalhau.engines.leash`).
    """

    seconds: float
    contact: float
    boot: str
    noted: Path


@dataclass(frozen=True, slots=True)
class Workload:
    """One start of one execution. `id` is `<execution name>.<run>`, unique on the node for ever.

    `directory` belongs to this run: the engine may keep its own files there. stdout and stderr
    are files that the engine appends to while the workload runs, `log_index` says when and in
    which order (see `bacalhau.engines.logfile`). Each stream is cut, and the workload killed with
    reason OutputLimit, at `output_bytes_max`. `pins` is what `Engine.prepare` returned.
    """

    id: str
    params: Mapping[str, object]
    env: Mapping[str, str]
    mounts: tuple[Mount, ...]
    resources: Resources
    network: Network
    directory: Path
    stdout: Path
    stderr: Path
    log_index: Path
    timeout_seconds: float | None = None
    output_bytes_max: int = 64 * 1024 * 1024
    pins: Mapping[str, str] = field(default_factory=dict)
    leash: Leash | None = None


class RunPhase(StrEnum):
    """What an engine says about one run."""

    ABSENT = "Absent"  # never started here, or removed
    RUNNING = "Running"
    EXITED = "Exited"
    VANISHED = "Vanished"  # was started, is gone, and nobody saw how it ended


@dataclass(frozen=True, slots=True)
class Observation:
    """What an engine knows of one run.

    `reason` is empty for an end by the workload itself; else one of OutOfMemory, Timeout,
    OutputLimit, Trap, Killed, Disconnected, StartFailed, CompileFailed, EngineFault. `is_system_fault` is true
    where the workload is not to blame.
    """

    phase: RunPhase
    exit_code: int | None = None
    reason: str = ""
    message: str = ""
    is_system_fault: bool = False
    started_at: datetime | None = None
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a plug can be used now, and if not, why. `missing` is what of it cannot be used on
    this node, each with the reason."""

    is_available: bool
    reason: str = ""
    version: str = ""
    missing: tuple[str, ...] = ()


class Engine(Protocol):
    """Runs workloads on this node. A workload outlives the agent: it goes on when the agent is
    killed, and is found again by `list` and `observe` afterwards."""

    async def open(self) -> None:
        """Get ready, finding what still runs from an earlier life of the agent."""
        ...

    async def health(self) -> Health:
        """Cheap; asked every few seconds."""
        ...

    async def admit(self, params: Mapping[str, object]) -> str:
        """Empty if this node may run such a workload; else the reason, for users. Cheap."""
        ...

    async def prepare(
        self,
        params: Mapping[str, object],
        pins: Mapping[str, str],
        tell: Callable[[str], None],
    ) -> Mapping[str, str]:
        """Bring what the workload needs beside its inputs, such as an image. May take long, and
        says by `tell` how far it is.

        References that may come to mean something else are resolved once: `pins` says what they
        were resolved to before, elsewhere perhaps. Returns what they stand for in every run.
        Raises TerminalError or TransientError.
        """
        ...

    async def start(self, workload: Workload) -> None:
        """Start, or leave alone if a run with that id exists in any phase.

        Bad params raise TerminalError (reason StartFailed or CompileFailed), an unreachable engine
        TransientError; a workload that ends non-zero is an Observation, not an error.
        """
        ...

    async def observe(self, run: str) -> Observation:
        """The present state of a run. Never raises for an unknown one (ABSENT)."""
        ...

    async def wait(self, run: str) -> Observation:
        """Return once the run is not RUNNING."""
        ...

    async def stop(self, run: str, grace_seconds: float) -> None:
        """End a run and everything it started. Done when it returns; no error if it ended."""
        ...

    async def remove(self, run: str) -> None:
        """Forget a run that ended, and free what the engine keeps for it."""
        ...

    async def list(self) -> Sequence[str]:
        """The ids of all runs that exist here in any phase, made by this node."""
        ...

    async def close(self, *, keep_running: bool) -> None:
        """Let go. With `keep_running` false everything is stopped first."""
        ...


@dataclass(frozen=True, slots=True)
class Fetched:
    """An input, ready to be mounted."""

    source: Path
    read_only: bool
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Use:
    """Whose input it is: input number `index` of an execution, which is partition `partition` of
    `partitions` (0 of 1 where the job's type has none) of one generation of a job."""

    namespace: str = ""
    job_uid: str = ""
    generation: int = 0
    execution: str = ""
    index: int = 0
    partition: int = 0
    partitions: int = 1


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an input is: bytes that are here, and bytes in all (None: not known)."""

    done_bytes: int
    total_bytes: int | None = None


class Storage(Protocol):
    """Brings one type of input to this node."""

    async def health(self) -> Health:
        """Cheap; asked every few seconds."""
        ...

    async def admit(self, source: SpecConfig) -> str:
        """Empty if this node may and can provide the source; else the reason, for users."""
        ...

    async def fetch(self, item: InputSource, into: Path, use: Use) -> Fetched:
        """Make the input available under `into` (an empty directory of its own) or where it lies.

        Raises TerminalError (not there, not allowed, corrupt) or TransientError.
        """
        ...

    def progress(self, into: Path) -> Progress | None:
        """How far the fetch into `into` is; None if there is none, or nothing to tell."""
        ...


class Inventory(Protocol):
    """Knows what of jobs' inputs is on this node already."""

    async def held_inputs(self) -> tuple[HeldInput, ...]:
        """The largest ones, in a fixed order. Cheap where nothing changed; asked every few
        seconds. Raises TransientError."""
        ...


class Probe(Protocol):
    """The operator's own say on what this node runs, asked once its rules have said yes."""

    @property
    def name(self) -> str:
        """What it is called in refusals."""
        ...

    async def ask(self, execution: Execution) -> str:
        """Empty if this node may run it; else the reason, for users. Raises TransientError if
        there is no clear answer, which is no yes. Answers within its own deadline."""
        ...


class Publisher(Protocol):
    """Brings outputs to one type of target."""

    async def health(self) -> Health:
        """Cheap; asked every few seconds."""
        ...

    async def publish(self, publication: Publication, outputs: Path) -> SpecConfig:
        """Deliver the directory `outputs`; return where it is now. Idempotent."""
        ...

    def progress(self, uid: str) -> Progress | None:
        """How far the publication with this uid is, in bytes of outputs; None if it is not under
        way, or there is nothing to tell."""
        ...


@dataclass(frozen=True, slots=True)
class Layout:
    """Where one execution keeps its things: `<data>/executions/<namespace>/<execution>/`."""

    root: Path

    @property
    def outputs(self) -> Path:
        """What is kept as the result: stdout, stderr, exitCode, a directory per result path."""
        return self.root / "outputs"

    @property
    def stdout(self) -> Path:
        """The workload's standard output, as written."""
        return self.outputs / "stdout"

    @property
    def stderr(self) -> Path:
        """The workload's standard error, as written."""
        return self.outputs / "stderr"

    @property
    def log_index(self) -> Path:
        """Says when and in which order stdout and stderr were written."""
        return self.root / "log.idx"

    def input(self, index: int) -> Path:
        """The directory of its own that input number `index` may be fetched into."""
        return self.root / "inputs" / str(index)

    def run(self, number: int) -> Path:
        """The engine's own directory for one run."""
        return self.root / "runs" / str(number)

    def result(self, name: str) -> Path:
        """The directory kept as result `name`."""
        return self.outputs / name


@dataclass(frozen=True, slots=True)
class Collected:
    """What a run left behind. The tails are the last 2 KiB of each stream, valid UTF-8."""

    outputs: Outputs
    stdout_tail: str = ""
    stderr_tail: str = ""


class Workspace(Protocol):
    """The directories of executions. Every call may be repeated; each is bounded by what one
    execution left on disk, never leaves the data directory, and follows no symlink.

    Raises TransientError for what may pass (a full disk), TerminalError for what will not.
    """

    def layout(self, namespace: str, execution: str) -> Layout:
        """Where an execution's things lie. Touches nothing. Raises InvalidError for names that
        are no names."""
        ...

    async def prepare(self, layout: Layout, inputs: int) -> None:
        """Make the execution's directories, with so many empty ones for inputs."""
        ...

    async def begin_run(
        self, layout: Layout, run: int, results: Sequence[str], *, reset: bool
    ) -> None:
        """Make the directories of a run and of the results. With `reset`, first remove what
        earlier runs wrote to results, streams and log index, so that it cannot be taken for this
        run's."""
        ...

    async def collect(self, layout: Layout, exit_code: int | None) -> Collected:
        """Write the exitCode file, then sum up the outputs.

        The digest is `sha256:` over one line per regular file, `<sha256 hex>  <path>`, sorted by
        path. Raises TerminalError with reason OutputLimit beyond the caps.
        """
        ...

    @property
    def contact_file(self) -> Path:
        """What `note_contact` writes to."""
        ...

    async def note_contact(self, boot: str, at: float) -> None:
        """Note for the node's workloads when the orchestrator was last heard: `at` by the monotonic
        clock of the boot named `boot` (see Leash). Takes no new room on a full disk."""
        ...

    async def drop_outputs(self, layout: Layout) -> None:
        """Remove everything but the execution's own directory."""
        ...

    async def remove(self, layout: Layout) -> None:
        """Remove all that the execution has on disk."""
        ...

    async def strays(self) -> Sequence[tuple[str, str, float]]:
        """Namespace, execution and age in seconds of every execution directory that exists."""
        ...


class Link(Protocol):
    """The way to the orchestrator. It carries messages and knows whether it is connected; it
    decides nothing.

    Handlers are called on the event loop, `on_up` also at once if the link is up when they are
    set. `on_changes` returns None for a message that must not be answered.
    """

    @property
    def is_up(self) -> bool:
        """True while connected."""
        ...

    def set_handlers(
        self,
        *,
        on_up: Callable[[], None],
        on_down: Callable[[], None],
        on_changes: Callable[[Changes], Awaitable[Applied | None]],
    ) -> None:
        """Say whom to call. Before this, nothing is delivered."""
        ...

    async def request(
        self,
        kind: Literal["hello", "facts", "beat"],
        message: Hello | WelcomePart | FactBatch | Beat,
    ) -> Welcome | Ack | BeatReply | Refused:
        """Send one request and return its reply, within the link's own time limit.

        Raises UnavailableError if there was no (readable) reply: it may have been received.
        """
        ...
