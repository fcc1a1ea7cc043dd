"""What a wasm run costs here, beside what it costs to do without all of this.

    python bench/wasm.py [--rounds N]

Each round runs the same module once in each way, in turn, so that a busy machine slows all alike;
ratios are of medians. Ways:

    engine      the wasm engine: start, wait, remove (own process, limits, logs, end on disk)
    command     a fresh `python -c` that loads the compiled module by wasmtime and runs it
    in process  wasmtime in this process: a new store each time, no limits, no isolation
    fork        what no process can beat that is made per run: fork and wait of this process

Then the engine's rate with many runs at a time.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import wasmtime

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "api", "controllers")]

from bacalhau.engines.wasm import WasmEngine
from bacalhau.system import SystemClock
from tests.support.engines import Bench, program

COMMAND = """
import sys, wasmtime as w
engine = w.Engine(); linker = w.Linker(engine); linker.define_wasi(); store = w.Store(engine)
config = w.WasiConfig(); config.argv = ["hello"]; config.inherit_stdout(); config.inherit_stderr()
store.set_wasi(config)
module = w.Module.deserialize_file(engine, sys.argv[1])
try: linker.instantiate(store, module).exports(store)["_start"](store)
except w.ExitTrap as end: sys.exit(end.code)
"""


class InProcess:
    """The floor: one engine, and a new store for each run."""

    def __init__(self, directory: Path) -> None:
        self._engine = wasmtime.Engine()
        self._linker = wasmtime.Linker(self._engine)
        self._linker.define_wasi()
        module = wasmtime.Module.from_file(self._engine, str(program("hello")))
        self.compiled = directory / "hello.cwasm"
        self.compiled.write_bytes(module.serialize())
        self._out = str(directory / "out")

    async def run(self) -> None:
        """Load and run, with the output in files."""
        module = wasmtime.Module.deserialize_file(self._engine, str(self.compiled))
        store = wasmtime.Store(self._engine)
        config = wasmtime.WasiConfig()
        config.argv = ["hello"]
        config.stdout_file = self._out
        config.stderr_file = self._out
        store.set_wasi(config)
        start = self._linker.instantiate(store, module).exports(store)["_start"]
        assert isinstance(start, wasmtime.Func)
        with contextlib.suppress(wasmtime.ExitTrap):
            start(store)


async def run_command(compiled: Path) -> None:
    """A fresh interpreter."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", COMMAND, str(compiled), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert await process.wait() == 0


async def run_fork() -> None:
    """Nothing but a process."""
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)  # noqa: ASYNC222 it ends at once


async def run_engine(engine: WasmEngine, bench: Bench) -> None:
    """All that the agent asks for one run."""
    workload = bench.wasm("hello")
    await engine.start(workload)
    seen = await engine.wait(workload.id)
    assert seen.exit_code == 0, seen
    await engine.remove(workload.id)


async def timed(way: Callable[[], Awaitable[None]]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    await way()
    return (time.perf_counter() - began) * 1000


async def measure(rounds: int, directory: Path) -> dict[str, object]:
    """All figures; times in milliseconds."""
    bench = Bench(directory)
    engine = WasmEngine(bench.state, SystemClock())
    began = time.perf_counter()
    await engine.open()
    opened = (time.perf_counter() - began) * 1000
    floor = InProcess(directory)
    ways: dict[str, Callable[[], Awaitable[None]]] = {
        "engine": lambda: run_engine(engine, bench),
        "command": lambda: run_command(floor.compiled),
        "in process": floor.run,
        "fork": run_fork,
    }
    try:
        first = await timed(ways["engine"])
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                times[name].append(await timed(way))
                await asyncio.sleep(0.02)  # the pool of spare workers fills again, unmeasured
        rates = {n: round(await rate(n, 10 * n, ways["engine"]), 1) for n in (1, 8, 32)}
    finally:
        await engine.close(keep_running=False)
    medians = {name: statistics.median(some) for name, some in times.items()}
    return {
        "module_sha256": hashlib.sha256(program("hello").read_bytes()).hexdigest()[:16],
        "rounds": rounds,
        "open_ms": round(opened, 1),
        "first_ms": round(first, 1),
        "median_ms": {name: round(value, 2) for name, value in medians.items()},
        "p95_ms": {
            name: round(statistics.quantiles(some, n=20)[-1], 2) for name, some in times.items()
        },
        "engine_ratio": {
            name: round(medians["engine"] / value, 2) for name, value in medians.items()
        },
        "engine_runs_per_second": rates,
        "load": os.getloadavg()[0],
    }


async def rate(at_once: int, count: int, way: Callable[[], Awaitable[None]]) -> float:
    """Runs per second with so many at a time."""
    slots = asyncio.Semaphore(at_once)

    async def one() -> None:
        async with slots:
            await way()

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(max(count, 50)):
            group.create_task(one())
    return max(count, 50) / (time.perf_counter() - began)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = asyncio.run(measure(options.rounds, Path(directory).resolve()))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
