"""What tests of engines share: workloads in directories of their own, for each engine in its
words."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bacalhau.engines.docker import DockerEngine, DockerOptions
from bacalhau.engines.noop import NoopEngine
from bacalhau.engines.wasm import WasmEngine
from bacalhau.engines.wasm.engine import WasmOptions
from bacalhau.system import SystemClock
from bacalhau_api.v1.job import Network, Resources
from bacalhau_controllers.runner.ports import Engine, Leash, Mount, Workload

PROGRAMS = Path(__file__).resolve().parents[1] / "programs"


def program(name: str) -> Path:
    """A module built from tests/programs."""
    return PROGRAMS / f"{name}.wasm"


@dataclass
class Bench:
    """A place to run workloads of one engine. `root` is a real path."""

    root: Path
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def state(self) -> Path:
        """The engine's directory."""
        return self.root / "state"

    def workload(
        self,
        params: Mapping[str, object],
        *,
        run: str = "",
        env: Mapping[str, str] | None = None,
        mounts: Sequence[Mount] = (),
        resources: Resources | None = None,
        network: Network | None = None,
        timeout_seconds: float | None = None,
        output_bytes_max: int = 64 * 1024 * 1024,
        leash: Leash | None = None,
    ) -> Workload:
        """A workload with a directory for its files."""
        run = run or f"job-0123abcd-1-0-{next(self.numbers)}.0"
        directory = self.root / "executions" / run
        directory.mkdir(parents=True, exist_ok=True)
        return Workload(
            id=run,
            params=params,
            env=env or {},
            mounts=tuple(mounts),
            resources=resources or Resources(memory_bytes=64 * 1024 * 1024),
            network=network or Network(),
            directory=directory,
            stdout=directory / "stdout",
            stderr=directory / "stderr",
            log_index=directory / "log.idx",
            timeout_seconds=timeout_seconds,
            output_bytes_max=output_bytes_max,
            leash=leash,
        )

    def wasm(
        self,
        module: str | Path,
        *args: str,
        mounts: Sequence[Mount] = (),
        params: Mapping[str, object] | None = None,
        **options: object,
    ) -> Workload:
        """A workload of the wasm engine; `module` is a path, or the name of a test program."""
        path = module if isinstance(module, Path) else program(module)
        entry = f"/wasm/{path.name}"
        given = {"entryModule": entry, "parameters": list(args)} | dict(params or {})
        return self.workload(given, mounts=(Mount(path, entry), *mounts), **options)  # type: ignore[arg-type]

    def docker(
        self,
        script: str,
        *,
        params: Mapping[str, object] | None = None,
        **options: object,
    ) -> Workload:
        """A workload of the docker engine: a shell script in the busybox image."""
        given = {"image": "test/busybox:1", "entrypoint": ["/bin/sh", "-c"], "parameters": [script]}
        return self.workload(given | dict(params or {}), **options)  # type: ignore[arg-type]


class NoopRig:
    """The noop engine in the contract's terms."""

    def engine(self, bench: Bench) -> Engine:
        """A new engine over the bench's state, as after a restart of the agent."""
        return NoopEngine(bench.state, SystemClock())

    def quick(self, bench: Bench, *, exit_code: int = 0, **options: object) -> Workload:
        """Prints `hello` to stdout and ends."""
        params = {"stdout": "hello\n", "exitCode": exit_code}
        return bench.workload(params, **options)  # type: ignore[arg-type]

    def endless(self, bench: Bench, **options: object) -> Workload:
        """Runs for longer than any test."""
        return bench.workload({"durationSeconds": 3600}, **options)  # type: ignore[arg-type]

    def flood(self, bench: Bench, **options: object) -> Workload:
        """Writes 1 MB."""
        return bench.workload({"outputBytes": 1_000_000}, **options)  # type: ignore[arg-type]

    def wrong(self, bench: Bench) -> Workload:
        """Has parameters that cannot be right."""
        return bench.workload({"exitCode": "nine"})


class WasmRig:
    """The wasm engine in the contract's terms."""

    def engine(self, bench: Bench) -> Engine:
        """A new engine over the bench's state, as after a restart of the agent."""
        return WasmEngine(bench.state, SystemClock(), options=WasmOptions(idle_seconds=5.0))

    def quick(self, bench: Bench, *, exit_code: int = 0, **options: object) -> Workload:
        """Prints `hello` to stdout and ends."""
        return bench.wasm("hello", "--exit", str(exit_code), **options)  # type: ignore[arg-type]

    def endless(self, bench: Bench, **options: object) -> Workload:
        """Runs for longer than any test."""
        return bench.wasm("loop", **options)  # type: ignore[arg-type]

    def flood(self, bench: Bench, **options: object) -> Workload:
        """Writes 1 MB."""
        return bench.wasm("flood", "1000000", **options)  # type: ignore[arg-type]

    def wrong(self, bench: Bench) -> Workload:
        """Has parameters that cannot be right."""
        return bench.workload({"entryModule": "/nowhere.wasm"})


class DockerRig:
    """The docker engine in the contract's terms. `host` is that of a Docker Engine for tests."""

    host = ""

    def engine(self, bench: Bench) -> Engine:
        """A new engine over the bench's state, as after a restart of the agent."""
        return DockerEngine(bench.state, SystemClock(), options=DockerOptions(host=self.host))

    def quick(self, bench: Bench, *, exit_code: int = 0, **options: object) -> Workload:
        """Prints `hello` to stdout and ends."""
        return bench.docker(f"echo hello; exit {exit_code}", **options)  # type: ignore[arg-type]

    def endless(self, bench: Bench, **options: object) -> Workload:
        """Runs for longer than any test."""
        return bench.docker("sleep 3600", **options)  # type: ignore[arg-type]

    def flood(self, bench: Bench, **options: object) -> Workload:
        """Writes 1 MB."""
        script = "head -c 1000000 /dev/zero | tr '\\0' x; sleep 3600"
        return bench.docker(script, **options)  # type: ignore[arg-type]

    def wrong(self, bench: Bench) -> Workload:
        """Has parameters that cannot be right."""
        return bench.workload({"image": "test/busybox:1", "workingDirectory": "not/absolute"})


Rig = NoopRig | WasmRig | DockerRig
RIGS: dict[str, Rig] = {"noop": NoopRig(), "wasm": WasmRig(), "docker": DockerRig()}
