"""What tests of the docker engine share."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bacalhau.engines.docker import DockerEngine, DockerOptions
from bacalhau.engines.docker.body import container_name
from bacalhau.engines.logfile import LogReader
from bacalhau.system import SystemClock
from bacalhau_controllers.runner.ports import Mount, Observation, Workload
from tests.support.dockerd import Dockerd
from tests.support.engines import Bench

SECONDS_MAX = 60.0


@dataclass
class Lab:
    """One node's place on a real engine: what an agent would have, without the agent."""

    root: Path
    dockerd: Dockerd
    engines: list[DockerEngine] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        self.bench = Bench(self.root)

    def engine(self, host: str = "", **options: Any) -> DockerEngine:
        """An engine over the lab's state, as after a restart of the agent; not opened."""
        more = {name: options.pop(name) for name in ("allows_private", "probe") if name in options}
        made = DockerEngine(
            self.bench.state,
            SystemClock(),
            options=DockerOptions(host=host or self.dockerd.host, **options),
            **more,
        )
        self.engines.append(made)
        return made

    async def open(self, host: str = "", **options: Any) -> DockerEngine:
        """The same, opened."""
        made = self.engine(host, **options)
        await made.open()
        return made

    async def close(self) -> None:
        """Stop and remove everything."""
        for made in self.engines:
            await made.close(keep_running=True)
        last = await self.open()
        for run in await last.list():
            await last.stop(run, 0.0)
            await last.remove(run)
        await last.close(keep_running=False)

    def workload(
        self,
        script: str,
        *,
        params: Mapping[str, object] | None = None,
        results: tuple[str, ...] = (),
        mounts: tuple[Mount, ...] = (),
        pins: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Workload:
        """A shell script in busybox, with result directories made as the node's workspace makes
        them: beside the streams' files, for this user alone."""
        made = self.bench.docker(script, params=params, **options)
        found = []
        for name in results:
            path = made.stdout.parent / name
            path.mkdir(mode=0o700)
            found.append(Mount(path, f"/outputs/{name}", read_only=False))
        return replace(made, mounts=(*mounts, *found), pins=pins or {})

    def inspect(self, workload: Workload) -> dict[str, Any]:
        """What the engine says of a run's container, asked behind the product's back."""
        name = container_name(self.engines[0]._owner, workload.id)
        with self.dockerd.api() as api:
            details: dict[str, Any] = api.inspect_container(name)
            return details


def be_patient(engine: DockerEngine, seconds: float) -> None:
    """Let it wait so long for each answer from now on. Only while answers are to be missing may that
    be short: what a busy machine does well may take it some seconds."""
    client = engine._opened().client
    client._call_seconds = client._start_seconds = seconds


async def run(engine: DockerEngine, workload: Workload) -> Observation:
    """Start it and wait for its end."""
    await engine.start(workload)
    return await asyncio.wait_for(engine.wait(workload.id), SECONDS_MAX)


async def until(check: Callable[[], object], what: str = "it") -> None:
    """Return once `check` gives something true."""
    try:
        async with asyncio.timeout(SECONDS_MAX):
            while True:
                if check():
                    return
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{what} did not happen in {SECONDS_MAX:.0f} s") from None


def output(workload: Workload, stream: str = "stdout") -> str:
    """The whole of one stream."""
    reader = LogReader(workload.stdout, workload.stderr, workload.log_index)
    text, offset = "", 0
    while True:
        chunk = reader.read(stream, offset, is_final=True)  # type: ignore[arg-type]
        text += "".join(piece.text for piece in chunk.pieces)
        if chunk.is_end:
            return text
        offset = chunk.next_offset
