"""The whole thread, as ratios to the thing itself, in one run.

    python bench/thread.py [--rounds 5]

Starts an orchestrator and an agent as processes of their own, both durable (every write is on disk
before it is acknowledged), and measures:

- ready: start of the process to ready, and resident memory of each process
- submit acknowledgement ÷ one raw durable put to the same NATS server
- submit → result known, for noop and for WebAssembly; the latter ÷ a process that does nothing but
  run the module with wasmtime (compiled before; and compiling it)
- durable jobs a second, submitted with 1 and with 64 under way

Peer and own measurements alternate within each round; medians of the rounds are printed.
"""

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bacalhau.client import AsyncClient
from bacalhau.nats.server import EmbeddedNats, NatsSettings
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.v1.job import (
    InputSource,
    Job,
    JobPhase,
    JobSpec,
    JobType,
    Resources,
    SpecConfig,
    Task,
)
from tests.e2e.cluster import Cluster, Process

PROGRAM = ROOT / "tests" / "programs" / "hello.wasm"
JOBS = 300
ENDED = "phase!=Pending,phase!=Running"

RUN_COMPILED = """
import sys, wasmtime as w
c = w.Config(); e = w.Engine(c)
m = w.Module.deserialize_file(e, sys.argv[1]) if sys.argv[1].endswith('.cwasm') else \\
    w.Module.from_file(e, sys.argv[1])
s = w.Store(e); k = w.WasiConfig(); k.argv = ['hello']; s.set_wasi(k)
l = w.Linker(e); l.define_wasi(); l.instantiate(s, m).exports(s)['_start'](s)
"""


def job(name: str, engine: SpecConfig, inputs: tuple[InputSource, ...] = ()) -> Job:
    """A batch job of one execution that reserves little, so that capacity is not what counts."""
    task = Task(
        engine=engine,
        input_sources=inputs,
        resources=Resources(cpu_millis=1, memory_bytes=64 << 20),
    )
    return Job(metadata=ObjectMeta(name=name), spec=JobSpec(type=JobType.BATCH, tasks=(task,)))


def noop(name: str) -> Job:
    """Does nothing, at once."""
    return job(name, SpecConfig(type="noop", params={"durationSeconds": 0}))


def wasm(name: str) -> Job:
    """The hello program."""
    source = SpecConfig(type="local", params={"sourcePath": str(PROGRAM)})
    engine = SpecConfig(type="wasm", params={"entryModule": "/app/hello.wasm"})
    return job(name, engine, (InputSource(source=source, target="/app/hello.wasm"),))


async def timed(work: Awaitable[object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    await work
    return (time.perf_counter() - start) * 1e3


def process_ms(*arguments: str) -> float:
    """Milliseconds that a Python process with these arguments takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1e3


def resident_mib(process: Process) -> float:
    """Resident memory of one process."""
    assert process.popen is not None
    for line in Path(f"/proc/{process.popen.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise LookupError("no VmRSS")


async def result_ms(client: AsyncClient, one: Job) -> float:
    """Submit, and wait until the result is known."""

    async def through() -> None:
        await client.apply(one)
        waited = await client.wait(one.name, timeout_seconds=60)
        if waited.job.status.phase is not JobPhase.COMPLETED:
            raise AssertionError(f"{one.name}: {waited.job.status.message}")

    return await timed(through())


async def rate(client: AsyncClient, prefix: str, under_way: int, count: int) -> float:
    """Jobs a second, submit to result. At most `under_way` are submitted and not yet ended; one
    watch tells of all ends, so that the measuring client costs little."""
    gate = asyncio.Semaphore(under_way)
    names = {f"{prefix}-{number}" for number in range(count)}
    start = time.perf_counter()

    async def see_ends() -> None:
        waiting = set(names)
        async with contextlib.aclosing(client.watch(Job, fields=ENDED)) as updates:
            async for update in updates:
                one = update.item
                if one is not None and one.name in waiting and one.status.phase.is_final:
                    assert one.status.phase is JobPhase.COMPLETED, one.status.message
                    waiting.discard(one.name)
                    gate.release()
                    if not waiting:
                        return

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(see_ends())
        for name in sorted(names):
            await gate.acquire()
            tasks.create_task(client.apply(noop(name)))
    return count / (time.perf_counter() - start)


def row(name: str, value: float, unit: str, ratio: str = "") -> None:
    """Print one line."""
    print(f"{name:52} {value:9.1f} {unit:6} {ratio}")


async def main(rounds: int) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        cluster = Cluster(root / "fleet")
        stack.callback(cluster.close)
        start = time.perf_counter()
        cluster.start()
        row("orchestrator ready", (time.perf_counter() - start) * 1e3, "ms")
        start = time.perf_counter()
        agent = cluster.add_agent(
            "edge-1", args=["--allow-path", f"{PROGRAM.parent}/**", "--on-exit", "stop"]
        )
        row("agent joined and ready (token included)", (time.perf_counter() - start) * 1e3, "ms")

        raw = EmbeddedNats(NatsSettings(root / "raw"))
        await raw.start()
        import nats

        seed = raw.credentials.seed
        line = await nats.connect(raw.url, nkeys_seed_str=seed)
        stream = line.jetstream()
        await stream.add_stream(name="RAW", subjects=["raw.>"])
        payload = b"x" * 1000

        compiled = root / "hello.cwasm"
        import wasmtime

        compiled.write_bytes(
            bytes(wasmtime.Module.from_file(wasmtime.Engine(), str(PROGRAM)).serialize())
        )

        puts: list[float] = []
        acks: list[float] = []
        noops: list[float] = []
        wasms: list[float] = []
        runs: list[float] = []
        compiles: list[float] = []
        async with AsyncClient(cluster.server) as client:
            await result_ms(client, noop("warm-up"))
            await result_ms(client, wasm("warm-up-wasm"))
            for number in range(rounds):
                for n in range(10):
                    puts.append(await timed(stream.publish(f"raw.{number}.{n}", payload)))
                    one = noop(f"ack-{number}-{n}")
                    acks.append(await timed(client.apply(one)))
                    await client.wait(one.name, timeout_seconds=60)
                for n in range(5):
                    noops.append(await result_ms(client, noop(f"noop-{number}-{n}")))
                    wasms.append(await result_ms(client, wasm(f"wasm-{number}-{n}")))
                    runs.append(process_ms("-c", RUN_COMPILED, str(compiled)))
                    compiles.append(process_ms("-c", RUN_COMPILED, str(PROGRAM)))
            put, ack = statistics.median(puts), statistics.median(acks)
            row("raw durable put", put, "ms")
            row("submit acknowledged", ack, "ms", f"÷ raw put = {ack / put:.1f}")
            row("noop submit → result", statistics.median(noops), "ms")
            own, direct = statistics.median(wasms), statistics.median(runs)
            row("wasmtime in a process, compiled before", direct, "ms")
            row("wasmtime in a process, compiling", statistics.median(compiles), "ms")
            row("WebAssembly submit → result", own, "ms", f"÷ process = {own / direct:.2f}")
            row("durable jobs a second, 1 under way", await rate(client, "r1", 1, 50), "/s")
            row("durable jobs a second, 64 under way", await rate(client, "r64", 64, JOBS), "/s")
        row("orchestrator resident", resident_mib(cluster.orchestrator), "MiB")
        row("agent resident", resident_mib(agent), "MiB")
        await line.close()
        await raw.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(main(parser.parse_args().rounds))
