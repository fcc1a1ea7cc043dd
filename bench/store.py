"""What the store costs over what it is made of, in one run: ratios, not absolute numbers.

    python -m bench.store [--rounds 5] [--objects 20000] [--json FILE]

Every figure is durable: the server syncs to disk before it answers. Peers are raw requests with
nats-py, and raw atomic batches, with the same payload on the same server; rounds are interleaved.
One store write is two messages (the object and its history entry).
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from nats.aio.client import Client

from bacalhau.nats.connection import Connection, connect
from bacalhau.nats.server import EmbeddedNats, NatsSettings
from bacalhau.store.jetstream import JetStreamStore
from bacalhau.system import SystemClock, SystemIds
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.v1.job import Job, JobSpec, JobType, SpecConfig, Task
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.store import Put, Synced, Why

WHY = Why("bench", "Measuring")
Measure = Callable[[], Awaitable[float]]


class Bench:
    """The measurements; each returns puts per second."""

    def __init__(self, store: JetStreamStore, raw: Client, puts: int) -> None:
        self._store = store
        self._raw = raw
        self._puts = puts
        self._numbers = itertools.count()
        self._ids = SystemIds()
        self._payload = self._job().encode()

    def _job(self) -> Job:
        task = Task(
            engine=SpecConfig(type="docker", params={"image": "ubuntu", "args": ["x" * 800]})
        )
        return Job(
            metadata=ObjectMeta(name=f"j{next(self._numbers)}", uid=self._ids.uid()),
            spec=JobSpec(type=JobType.BATCH, tasks=(task,)),
        )

    def measures(self) -> dict[str, Measure]:
        """By name. Those that begin with `raw` are what the others are compared with."""
        return {
            "raw put, 1 under way": lambda: self._rate(self._raw_put, 1),
            "raw put, 64 under way": lambda: self._rate(self._raw_put, 64),
            "raw batch of 100": lambda: self._rate(self._raw_batch, 1, 100),
            "store, 1 under way": lambda: self._rate(self._commit, 1),
            "store, 64 under way": lambda: self._rate(self._commit, 64),
            "store, 512 under way": lambda: self._rate(self._commit, 512),
            "store, commits of 100": lambda: self._rate(self._commit_many, 1, 100),
        }

    async def _rate(self, put: Callable[[], Awaitable[None]], workers: int, each: int = 1) -> float:
        left = itertools.count(self._puts * (4 if workers > 1 or each > 1 else 1) // each, -1)

        async def work() -> None:
            while next(left) > 0:
                await put()

        started = time.perf_counter()
        total = self._puts * (4 if workers > 1 or each > 1 else 1) // each * each
        await asyncio.gather(*(work() for _ in range(workers)))
        return total / (time.perf_counter() - started)

    async def _raw_put(self) -> None:
        await self._raw.request(f"l.raw-{next(self._numbers)}", self._payload, timeout=10)

    async def _raw_batch(self) -> None:
        batch = f"raw{next(self._numbers)}"
        for i in range(1, 101):
            headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(i)}
            subject = f"l.{batch}-{i}"
            if i < 100:
                await self._raw.publish(subject, self._payload, headers=headers)
            else:
                headers["Nats-Batch-Commit"] = "1"
                await self._raw.request(subject, self._payload, timeout=10, headers=headers)

    async def _commit(self) -> None:
        await self._store.commit([Put(self._job(), 0)], WHY)

    async def _commit_many(self) -> None:
        await self._store.commit([Put(self._job(), 0) for _ in range(100)], WHY)


async def measure_load(store: JetStreamStore, bench: Bench, objects: int) -> dict[str, float]:
    """Seconds to fill the store, and to fill a cache from it."""
    started = time.perf_counter()
    for _ in range(objects // 400):
        await store.commit([Put(bench._job(), 0) for _ in range(400)], WHY)
    filled = time.perf_counter() - started
    cache = Cache()
    started = time.perf_counter()
    async with store.watch() as events:
        async for event in events:
            cache.apply(event)
            if isinstance(event, Synced):
                break
    loaded = time.perf_counter() - started
    return {
        "objects": float(cache.count("Job")),
        "fill seconds": filled,
        "load seconds": loaded,
        "load us each": loaded / max(cache.count("Job"), 1) * 1e6,
    }


async def main(rounds: int, objects: int, puts: int, output: Path | None) -> None:
    """Run, print, and append one line of JSON to `output`."""
    with tempfile.TemporaryDirectory() as folder:
        async with EmbeddedNats(NatsSettings(Path(folder))) as server:
            line = Connection(server.url, server.credentials, name="bench")
            await line.open()
            raw = await connect(server.url, server.credentials, name="bench raw")
            store = JetStreamStore(line, SystemClock(), SystemIds())
            async with store:
                bench = Bench(store, raw, puts)
                rates: dict[str, list[float]] = {name: [] for name in bench.measures()}
                before = os.getloadavg()[0]
                for _ in range(rounds):
                    for name, measure in bench.measures().items():
                        rates[name].append(await measure())
                load = await measure_load(store, bench, objects)
            await raw.close()
            await line.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name:24} {medians[name]:8.0f}/s  ({min(values):.0f} to {max(values):.0f})")
    ratios = {
        "lone write over lone raw put": ("store, 1 under way", "raw put, 1 under way"),
        "64 writes over 64 raw puts": ("store, 64 under way", "raw put, 64 under way"),
        "512 writes over raw batch": ("store, 512 under way", "raw batch of 100"),
        "commits of 100 over raw batch": ("store, commits of 100", "raw batch of 100"),
    }
    found = {name: medians[ours] / medians[peer] for name, (ours, peer) in ratios.items()}
    for name, ratio in found.items():
        print(f"{name:32} {ratio:.2f}")
    print({key: round(value, 2) for key, value in load.items()})
    print(f"load average {before:.1f} before, {os.getloadavg()[0]:.1f} after")
    if output is not None:
        line_out = {"medians": medians, "ratios": found, "load": load, "load_average": before}
        with output.open("a") as file:
            file.write(json.dumps(line_out) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the store against raw NATS.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--objects", type=int, default=20_000, help="For the load of a cache.")
    parser.add_argument("--puts", type=int, default=300, help="Per measurement.")
    parser.add_argument("--json", type=Path, default=None, help="Append the figures here.")
    options = parser.parse_args()
    asyncio.run(main(options.rounds, options.objects, options.puts, options.json))
