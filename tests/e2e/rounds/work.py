"""What a fleet has to do while things go wrong: jobs of all types, with each disconnect policy.

A `Program` is how a job says "count so far, then end well" in one engine; another engine is another
program (containers are in `containers.py`), and everything else stays as it is.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, Protocol

from bacalhau.engines.wasm import records
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.v1.job import (
    DisconnectPolicy,
    InputSource,
    Job,
    JobSpec,
    JobType,
    Resources,
    SpecConfig,
    Task,
)
from tests.e2e.rounds.containers import DockerProgram

PROGRAMS = Path(__file__).parents[2] / "programs"
FOR_EVER = 1_000_000
AFTER_SECONDS = 5
TICK_SECONDS = 0.05

Action = Literal["hold", "replace", "stop"]
WINNERS: tuple[Literal["firstAccepted", "keepOriginal", "keepReplacement"], ...] = (
    "firstAccepted",
    "keepOriginal",
    "keepReplacement",
)


class Program(Protocol):
    """Work for one engine, and what that engine needs beside the agents."""

    name: str

    def task(self, ticks: int) -> Task:
        """Print `tick 0` to `tick N-1`, twenty a second, and end well."""
        ...

    def begin(self, nodes: Iterable[str]) -> None:
        """Start what the agents of these nodes need."""
        ...

    def options(self, node: str) -> list[str]:
        """What that node's `serve` is told of it."""
        ...

    def running(self, node: str, data_dir: Path) -> set[str]:
        """What there really is of it on a node: ids of runs."""
        ...

    def pids(self, node: str) -> list[int]:
        """Its processes on a node, beside those that the agent started."""
        ...

    def heal(self) -> None:
        """Let everything go on that was stopped or killed."""
        ...

    def testimony(self) -> dict[str, str]:
        """What it has to say when something went wrong: texts, by name of a file."""
        ...

    def leftovers(self) -> list[str]:
        """What should be gone once all agents have ended and stopped their work, and is not."""
        ...

    def end(self) -> None:
        """Stop it."""
        ...


class WasmProgram:
    """`tests/programs/hello.wasm`."""

    name = "wasm"

    def task(self, ticks: int) -> Task:
        """See Program."""
        source = SpecConfig(type="local", params={"sourcePath": str(PROGRAMS / "hello.wasm")})
        params = {"entryModule": "/app/hello.wasm", "parameters": ["--tick", str(ticks)]}
        return Task(
            engine=SpecConfig(type="wasm", params=params),
            input_sources=(InputSource(source=source, target="/app/hello.wasm"),),
            publisher=SpecConfig(type="local"),
            resources=Resources(cpu_millis=100, memory_bytes=32 << 20),
        )

    def begin(self, nodes: Iterable[str]) -> None:
        """See Program: the agents start all they need."""

    def options(self, node: str) -> list[str]:
        """See Program."""
        return []

    def pids(self, node: str) -> list[int]:
        """See Program."""
        return []

    def heal(self) -> None:
        """See Program."""

    def testimony(self) -> dict[str, str]:
        """See Program."""
        return {}

    def leftovers(self) -> list[str]:
        """See Program."""
        return []

    def end(self) -> None:
        """See Program."""

    def running(self, node: str, data_dir: Path) -> set[str]:
        """See Program: by the records of workers, and by whether those processes live."""
        found: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            for entry in (data_dir / "node" / "engines" / "wasm" / "runs").iterdir():
                started = records.read_started(entry)
                stat = started.process.stat() if started else None
                if stat is not None and stat.state not in "ZX":
                    found.add(entry.name)
        return found


PROGRAMS_BY_NAME: dict[str, Callable[[], Program]] = {
    "wasm": WasmProgram,
    "docker": DockerProgram,
}


@dataclass(frozen=True, slots=True)
class Order:
    """A job of one round: submitted `at` seconds after its begin. `ticks` are those it prints."""

    at: float
    job: Job
    ticks: int
    action: Action


def orders(round_name: str, program: Program, rng: Random, seconds: float) -> Iterator[Order]:
    """The jobs of one round that end by themselves, in order of time."""
    found = [
        _order(f"{round_name}-hold", JobType.BATCH, 3, program, rng, "hold", 0.0),
        _order(f"{round_name}-replace", JobType.BATCH, 3, program, rng, "replace", 0.0),
        _order(f"{round_name}-stop", JobType.BATCH, 2, program, rng, "stop", 0.0),
        _order(f"{round_name}-ops", JobType.OPS, 1, program, rng, "hold", rng.uniform(0, seconds)),
    ]
    actions: tuple[Action, ...] = ("hold", "replace", "stop")
    for number in range(int(seconds)):
        # The load: something small every second.
        name, at = f"{round_name}-small-{number}", number + rng.random()
        found.append(_order(name, JobType.BATCH, 1, program, rng, rng.choice(actions), at, ticks=4))
    yield from sorted(found, key=lambda one: one.at)


def standing(program: Program) -> tuple[Job, ...]:
    """The jobs that run all the time: a service and a daemon."""
    tasks = (program.task(FOR_EVER),)
    quick = DisconnectPolicy(action="replace", after_seconds=AFTER_SECONDS)
    return (
        Job(
            metadata=ObjectMeta(name="service"),
            spec=JobSpec(type=JobType.SERVICE, count=2, tasks=tasks, disconnect=quick),
        ),
        Job(metadata=ObjectMeta(name="daemon"), spec=JobSpec(type=JobType.DAEMON, tasks=tasks)),
    )


def _order(
    name: str,
    kind: JobType,
    count: int,
    program: Program,
    rng: Random,
    action: Action,
    at: float,
    *,
    ticks: int = 0,
) -> Order:
    ticks = ticks or rng.randint(40, 160)
    after = None if action == "hold" else AFTER_SECONDS
    policy = DisconnectPolicy(
        action=action, after_seconds=after, reconcile=rng.choice((None, *WINNERS))
    )
    spec = JobSpec(type=kind, count=count, tasks=(program.task(ticks),), disconnect=policy)
    return Order(at, Job(metadata=ObjectMeta(name=name), spec=spec), ticks, action)
