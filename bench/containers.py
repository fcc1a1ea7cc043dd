"""What a container costs here, beside `docker run`.

    python bench/containers.py [--rounds N] [--host unix:///path]

Without `--host` a Docker Engine of its own is started (as root; see tests/support/dockerd.py). Each
round runs `true` once in each way, in turn, so that a busy machine slows all alike; ratios are of
medians. Ways:

    engine    the docker engine: prepare, start, wait, remove (log copied, end on disk)
    command   `docker run --rm` with the same profile and limits
    plain     `docker run --rm --network none`, nothing else

Then the rate with many at a time, and how long after it was written a line is in the node's log.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("", "api", "controllers")]

from bacalhau.engines.docker import DockerEngine, DockerOptions
from bacalhau.engines.logfile import LogReader
from bacalhau.system import SystemClock
from bacalhau_api.v1.job import Resources
from tests.support.dockerd import BUSYBOX, running_dockerd
from tests.support.engines import Bench

MEMORY = 64 * 1024 * 1024
PROFILE = (
    "--network", "none", "--init", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
    "--memory", str(MEMORY), "--memory-swap", str(MEMORY), "--pids-limit", "1024", "--ipc",
    "private", "--log-driver", "local",
)  # fmt: skip
LINES = 50


async def run_engine(engine: DockerEngine, bench: Bench) -> None:
    """All that the agent asks for one run."""
    params = {"image": BUSYBOX, "parameters": ["true"]}
    workload = bench.workload(params, resources=Resources(memory_bytes=MEMORY))
    await engine.prepare(params, {}, lambda text: None)
    await engine.start(workload)
    seen = await engine.wait(workload.id)
    assert seen.exit_code == 0, seen
    await engine.remove(workload.id)


async def run_command(host: str, profile: tuple[str, ...]) -> None:
    """The command line."""
    process = await asyncio.create_subprocess_exec(
        "docker", "--host", host, "run", "--rm", *profile, BUSYBOX, "true",
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert await process.wait() == 0


async def log_delays(engine: DockerEngine, bench: Bench) -> list[float]:
    """Milliseconds from a line's own time stamp until it can be read from the node's log."""
    script = f"for i in $(seq {LINES}); do cut -d' ' -f1 /proc/uptime; sleep 0.05; done"
    workload = bench.docker(script, resources=Resources(memory_bytes=MEMORY))
    reader = LogReader(workload.stdout, workload.stderr, workload.log_index)
    await engine.start(workload)
    delays: list[float] = []
    offset = 0
    while len(delays) < LINES:
        chunk = reader.read("stdout", offset)
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        for line in "".join(piece.text for piece in chunk.pieces).split():
            delays.append((now - float(line)) * 1000)
        offset = chunk.next_offset
        await asyncio.sleep(0.0005)
    await engine.wait(workload.id)
    return delays


async def timed(way: Callable[[], Awaitable[None]]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    await way()
    return (time.perf_counter() - began) * 1000


async def rate(at_once: int, count: int, way: Callable[[], Awaitable[None]]) -> float:
    """Runs per second with so many at a time."""
    slots = asyncio.Semaphore(at_once)

    async def one() -> None:
        async with slots:
            await way()

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())
    return count / (time.perf_counter() - began)


async def measure(rounds: int, host: str, directory: Path) -> dict[str, object]:
    """All figures; times in milliseconds."""
    bench = Bench(directory)
    engine = DockerEngine(bench.state, SystemClock(), options=DockerOptions(host=host))
    await engine.open()
    ways: dict[str, Callable[[], Awaitable[None]]] = {
        "engine": lambda: run_engine(engine, bench),
        "command": lambda: run_command(host, PROFILE),
        "plain": lambda: run_command(host, ("--network", "none")),
    }
    try:
        for way in ways.values():
            await way()
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                times[name].append(await timed(way))
        rates = {
            name: {n: round(await rate(n, 4 * n, ways[name]), 2) for n in (1, 8, 16)}
            for name in ("engine", "command")
        }
        delays = await log_delays(engine, bench)
    finally:
        await engine.close(keep_running=False)
    medians = {name: statistics.median(some) for name, some in times.items()}
    return {
        "rounds": rounds,
        "median_ms": {name: round(value, 1) for name, value in medians.items()},
        "ratio": {
            name: round(medians["engine"] / medians[name], 2) for name in ("command", "plain")
        },
        "per_second": rates,
        "rate_ratio": {n: round(rates["engine"][n] / rates["command"][n], 2) for n in (1, 8, 16)},
        "log_delay_ms": {
            "median": round(statistics.median(delays), 1),
            "p95": round(statistics.quantiles(delays, n=20)[-1], 1),
            "clock_step_ms": 10,
        },
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--host", default="")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        host = options.host or stack.enter_context(running_dockerd()).host
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        result = asyncio.run(measure(options.rounds, host, Path(directory).resolve()))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
