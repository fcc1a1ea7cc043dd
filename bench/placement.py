"""How fast a place is found: the node table against a plain scan over node objects, in one run.

    python bench/placement.py [--rounds 5]

Prints decisions per second for both at 10 to 10,000 nodes, their ratio (median of the rounds, with
the least and the most), and how the time of one decision grows with the number of nodes. Each
decision is followed by setting the place aside, as the scheduler does. `many` asks for a new job
each time, `one` for all partitions of one job, `labels` for new jobs with constraints.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

if __package__ in (None, ""):
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root / "api"), str(root / "controllers")]

from bacalhau_api.meta import Contact, ObjectMeta
from bacalhau_api.selectors import parse_selector, unmet
from bacalhau_api.v1.job import Job, JobSpec, JobType, Resources, SpecConfig, Task
from bacalhau_api.v1.node import Capability, Membership, Node, NodeInfo, NodeSpec, NodeStatus
from bacalhau_controllers.placement import NodeTable, Request, Search, amounts_of, shape_of

NOW = datetime(2026, 1, 1, tzinfo=UTC).timestamp()


def make_nodes(count: int) -> list[Node]:
    """A fleet of 64-core nodes in 25 racks and 3 zones; one in ten is out of use."""
    rng = random.Random(7)
    plugs = tuple(Capability(name=name) for name in ("docker", "wasm"))
    return [
        Node(
            metadata=ObjectMeta(name=f"node-{i}"),
            spec=NodeSpec(membership=Membership.APPROVED, unschedulable=rng.random() < 0.1),
            status=NodeStatus(
                contact=Contact.REACHABLE,
                info=NodeInfo(
                    labels={"rack": f"r{i % 25}", "zone": f"z{i % 3}"},
                    capacity=Resources(cpu_millis=64_000, memory_bytes=256 << 30),
                    engines=plugs,
                    executions_max=100_000,
                ),
            ),
        )
        for i in range(count)
    ]


def make_job(number: int, selector: str) -> Job:
    """A job for one core."""
    task = Task(
        engine=SpecConfig(type="docker"), resources=Resources(cpu_millis=10, memory_bytes=1 << 20)
    )
    return Job(
        metadata=ObjectMeta(name=f"job-{number}", uid=f"{number:032x}"),
        spec=JobSpec(type=JobType.BATCH, tasks=(task,), constraints=parse_selector(selector)),
    )


class Scan:
    """The plain way: ask every node object, keep the best."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.used = {node.name: (0, 0) for node in nodes}

    def place(self, job: Job) -> str:
        task = job.spec.task
        cpu, memory = task.resources.cpu_millis, task.resources.memory_bytes
        engine, best, best_score = task.engine.type, "", -1.0
        for node in self.nodes:
            info = node.status.info
            if node.spec.membership is not Membership.APPROVED or node.spec.unschedulable:
                continue
            if node.status.contact is not Contact.REACHABLE:
                continue
            if not any(e.name == engine and e.available for e in info.engines):
                continue
            if job.spec.constraints and unmet(job.spec.constraints, node.labels):
                continue
            used_cpu, used_memory = self.used[node.name]
            free_cpu = info.capacity.cpu_millis - used_cpu
            free_memory = info.capacity.memory_bytes - used_memory
            if free_cpu < cpu or free_memory < memory:
                continue
            score = free_cpu / info.capacity.cpu_millis + free_memory / info.capacity.memory_bytes
            if score > best_score:
                best, best_score = node.name, score
        used_cpu, used_memory = self.used[best]
        self.used[best] = (used_cpu + cpu, used_memory + memory)
        return best


def filled(nodes: list[Node]) -> NodeTable:
    """A table with these nodes."""
    table = NodeTable()
    for node in nodes:
        table.apply(None, node, NOW)
    return table


def with_table(nodes: list[Node], selectors: list[str]) -> Callable[[int], None]:
    """One decision for a new job."""
    table = filled(nodes)

    def decide(number: int) -> None:
        job = make_job_cached(number, selectors[number % len(selectors)])
        request = Request(
            job.name, job.metadata.uid, shape_of(job), amounts_of(job.spec.task.resources)
        )
        search = Search(table, request, now=NOW)
        row = search.best()
        assert row is not None
        search.take(row, ("default", f"{job.name}-{number}"))

    return decide


def with_one_search(nodes: list[Node]) -> Callable[[int], None]:
    """One decision for the next partition of the same job."""
    table = filled(nodes)
    job = make_job(0, "")
    request = Request(
        job.name, job.metadata.uid, shape_of(job), amounts_of(job.spec.task.resources)
    )
    search = Search(table, request, now=NOW)

    def decide(number: int) -> None:
        row = search.best()
        assert row is not None
        search.take(row, ("default", f"{job.name}-{number}"))

    return decide


def with_scan(nodes: list[Node], selectors: list[str]) -> Callable[[int], None]:
    """The same by a scan."""
    scan = Scan(nodes)

    def decide(number: int) -> None:
        assert scan.place(make_job_cached(number, selectors[number % len(selectors)]))

    return decide


_JOBS: dict[tuple[int, str], Job] = {}


def make_job_cached(number: int, selector: str) -> Job:
    """Jobs are made before the clock runs."""
    key = (number, selector)
    if key not in _JOBS:
        _JOBS[key] = make_job(number, selector)
    return _JOBS[key]


def seconds_each(decide: Callable[[int], None], rounds: int, seconds_min: float) -> list[float]:
    """Seconds of one decision, once for each round."""
    times: list[float] = []
    number = 0
    for _ in range(3):
        decide(number)
        number += 1
    for _ in range(rounds):
        start, count = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds_min:
            decide(number % 2000)
            number, count = number + 1, count + 1
        times.append(spent / count)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="each round lasts so long")
    options = parser.parse_args()
    cases = {"many": [""], "labels": ["zone=z1,rack!=r3", "rack in (r1,r2,r4),zone", "zone=z2"]}
    for selectors in cases.values():
        for number in range(2003):
            make_job_cached(number, selectors[number % len(selectors)])
    medians: dict[str, dict[int, float]] = {}
    for count in (10, 100, 1_000, 10_000):
        nodes = make_nodes(count)
        for case in ("many", "labels", "one"):
            selectors = cases.get(case, [""])
            if case == "one":
                mine = with_one_search(nodes)
            else:
                mine = with_table(nodes, selectors)
            plain = with_scan(nodes, selectors)
            ratios, ours, theirs = [], [], []
            for _ in range(options.rounds):
                theirs += seconds_each(plain, 1, options.seconds)
                ours += seconds_each(mine, 1, options.seconds)
                ratios.append(theirs[-1] / ours[-1])
            median = statistics.median(ours)
            medians.setdefault(case, {})[count] = median
            print(
                json.dumps(
                    {
                        "nodes": count,
                        "case": case,
                        "decisions_per_second": round(1 / median),
                        "microseconds": round(median * 1e6, 1),
                        "scan_decisions_per_second": round(1 / statistics.median(theirs)),
                        "times_faster": [
                            round(f(ratios), 2) for f in (min, statistics.median, max)
                        ],
                        "load": os.getloadavg()[0],
                    }
                ),
                flush=True,
            )
    for case, by_count in medians.items():
        growth = math.log10(by_count[10_000] / by_count[1_000])
        print(f"{case}: time grows with nodes to the power {growth:.2f} from 1,000 to 10,000")


if __name__ == "__main__":
    main()
