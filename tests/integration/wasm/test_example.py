"""The example job over measured data: fetched and run as a node does, in four partitions."""

import asyncio
import csv
import hashlib
import re
from collections import defaultdict
from pathlib import Path

import pytest

from bacalhau.engines.wasm import WasmEngine
from bacalhau.settings import AllowedPath
from bacalhau.storages.local import LocalStorage
from bacalhau.system import SystemClock
from bacalhau_api.jobfile import parse_manifests
from bacalhau_api.v1.job import Job
from bacalhau_controllers.runner.ports import Mount, Use
from tests.support.engines import Bench

EXAMPLE = Path(__file__).resolve().parents[3] / "manifests" / "examples" / "hurricanes"

# NOAA's published ACE of some seasons (rounded; its database is revised now and then).
PUBLISHED_ACE = {1983: 17, 1995: 227, 2004: 227, 2005: 245, 2010: 165, 2017: 225, 2020: 180}


def example_job() -> Job:
    text = (EXAMPLE / "job.yaml").read_text().replace("/srv/hurricanes", str(EXAMPLE))
    (document,) = parse_manifests(text, source="job.yaml")
    assert document.warnings == ()
    assert isinstance(document.resource, Job)
    return document.resource


async def run_job(bench: Bench, job: Job, count: int) -> tuple[str, str]:
    """All partitions at once. The parts of the table one after the other, and so stdout."""
    task = job.spec.task
    storage = LocalStorage([AllowedPath(str(EXAMPLE))])
    engine = WasmEngine(bench.state, SystemClock())
    await engine.open()
    outputs = bench.root / f"outputs-{count}"
    outputs.mkdir()
    try:
        mounts = []
        for item in task.input_sources:
            assert await storage.admit(item.source) == ""
            fetched = await storage.fetch(item, bench.root, Use())
            mounts.append(Mount(fetched.source, item.target, fetched.read_only))
        (result,) = task.result_paths
        mounts.append(Mount(outputs, result.path, read_only=False))
        workloads = [
            bench.workload(
                task.engine.params,
                mounts=mounts,
                resources=task.resources,
                timeout_seconds=task.timeouts.execution_timeout,
                env={
                    "BACALHAU_PARTITION_INDEX": str(index),
                    "BACALHAU_PARTITION_COUNT": str(count),
                },
            )
            for index in range(count)
        ]
        await asyncio.gather(*(engine.start(w) for w in workloads))
        for workload in workloads:
            seen = await asyncio.wait_for(engine.wait(workload.id), 60)
            assert (seen.exit_code, workload.stderr.read_text()) == (0, "")
    finally:
        await engine.close(keep_running=False)
    parts = sorted(outputs.iterdir())
    assert [p.name for p in parts] == [f"seasons-{n:03}.csv" for n in range(count)]
    return (
        "".join(p.read_text() for p in parts),
        "".join(w.stdout.read_text() for w in workloads),
    )


def expected() -> dict[int, tuple[int, int, int, str]]:
    """Storms, hurricanes, major ones and ACE by year, computed in another way."""
    winds: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    observed: dict[tuple[str, ...], int] = {}
    with (EXAMPLE / "data" / "storms.csv").open() as file:
        for row in csv.DictReader(file):
            year, wind = int(row["year"]), int(row["wind"])
            is_storm = row["status"].endswith("storm") or row["status"] == "hurricane"
            if not is_storm or wind < 34:
                continue
            winds[year][row["name"]] = max(wind, winds[year][row["name"]])
            key = tuple(row[c] for c in ("year", "month", "day", "hour", "name"))
            if int(row["hour"]) % 6 == 0:
                observed.setdefault(key, wind)
    energy: dict[int, int] = defaultdict(int)
    for key, wind in observed.items():
        energy[int(key[0])] += wind * wind
    return {
        year: (
            len(storms),
            sum(w >= 64 for w in storms.values()),
            sum(w >= 96 for w in storms.values()),
            f"{energy[year] / 1e4:.1f}",
        )
        for year, storms in winds.items()
    }


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path.resolve())


async def test_four_partitions_give_one_right_table(bench: Bench) -> None:
    job = example_job()
    assert job.spec.count == 4
    table, shown = await run_job(bench, job, 4)
    rows = list(csv.DictReader(table.splitlines()))
    assert [int(r["year"]) for r in rows] == list(range(1975, 2023))
    computed = {
        int(r["year"]): (int(r["storms"]), int(r["hurricanes"]), int(r["major"]), r["ace"])
        for r in rows
    }
    assert computed == expected()
    for year, ace in PUBLISHED_ACE.items():
        assert float(computed[year][3]) == pytest.approx(ace, rel=0.02, abs=1.0)
    assert shown.startswith("year  storms")
    assert len(shown.splitlines()) == 49
    strongest = {r["year"]: r["strongest"] for r in rows}
    assert (strongest["2005"], strongest["1988"]) == ("Wilma", "Gilbert")


@pytest.mark.parametrize("count", [1, 3, 60])
async def test_any_number_of_partitions_gives_the_same_table(bench: Bench, count: int) -> None:
    job = example_job()
    assert await run_job(bench, job, count) == await run_job(bench, job, 4)


def test_data_is_the_documented_one() -> None:
    digest = hashlib.sha256((EXAMPLE / "data" / "storms.csv").read_bytes()).hexdigest()
    assert re.findall(r"`([0-9a-f]{64})`", (EXAMPLE / "README.md").read_text()) == [digest]
