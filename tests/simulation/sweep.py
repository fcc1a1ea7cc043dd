"""The sweep: one disturbance at every write of every reconciler and every ledger, one run each.

For the k-th write of each writer in a reference run: the orchestrator crashes before it, or after
it; or what its writer saw is old for a while from then on (all versions come later, or only the
newest of each). For the k-th time that an agent touches its world (each commit of its ledger, before
and after; each call of its engine, storage, publisher and disk): the agent crashes there.
`python -m tests.simulation.sweep` runs all of them.
"""

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from tests.simulation.world import Faults, World
from tests.simulation.world.machines import Machine
from tests.simulation.world.orchestrators import Orchestrator
from tests.simulation.world.world import Failure
from tests.support.arguments import at_least_one

STALE_SECONDS = 8.0
CRASH_AGENT = "crash-agent"
PROGRESS_EVERY = 100


class Disturbance(StrEnum):
    """What happens at a write of an orchestrator."""

    CRASH_BEFORE = "crash-before"
    CRASH_AFTER = "crash-after"
    STALE = "stale"
    HIDDEN = "hidden"


@dataclass(frozen=True, slots=True)
class Point:
    """The k-th write, from 0, of one writer."""

    writer: str
    number: int


def writer_of(actor: str) -> str:
    """Who writes in the name of an actor: what nodes report is written by a reconciler."""
    return "reports" if actor.startswith("node:") else actor


def points(seed: int) -> list[Point]:
    """All writes of controllers in the reference run."""
    counts: Counter[str] = Counter()
    world = _world(seed)

    def count(one: Orchestrator, what: str) -> None:
        when, _, actor = what.partition(" ")
        if when == "before" and not actor.startswith("user:"):
            counts[writer_of(actor)] += 1

    world.on_write = count
    world.run()
    return [Point(writer, n) for writer in sorted(counts) for n in range(counts[writer])]


def steps(seed: int) -> list[Point]:
    """All that agents do to their worlds in the reference run."""
    counts: Counter[str] = Counter()
    world = _world(seed)

    def count(machine: Machine, what: str) -> None:
        counts[f"{machine} {what}"] += 1

    world.on_boundary = count
    world.run()
    return [Point(writer, n) for writer in sorted(counts) for n in range(counts[writer])]


def crash_agent(seed: int, point: Point) -> str:
    """Run with one crash of an agent. Returns what went wrong, empty if nothing did."""
    world = _world(seed)
    count = 0

    def strike(machine: Machine, what: str) -> None:
        nonlocal count
        if f"{machine} {what}" == point.writer:
            count += 1
            if count == point.number + 1:
                machine.crash(what)

    world.on_boundary = strike
    return _words(world)


def disturb(seed: int, point: Point, disturbance: Disturbance) -> str:
    """Run with one disturbance. Returns what went wrong, empty if nothing did."""
    world = _world(seed)
    counts: Counter[str] = Counter()
    moment = "after" if disturbance is Disturbance.CRASH_AFTER else "before"

    def strike(one: Orchestrator, what: str) -> None:
        when, _, actor = what.partition(" ")
        if when != moment or writer_of(actor) != point.writer:
            return
        counts[point.writer] += 1
        if counts[point.writer] != point.number + 1:
            return
        if disturbance in (Disturbance.CRASH_BEFORE, Disturbance.CRASH_AFTER):
            one.crash(what)
        elif one.store is not None:
            until = world.now + STALE_SECONDS
            if disturbance is Disturbance.STALE:
                one.store.stale_until = until
            else:
                one.store.blind_until = until

    world.on_write = strike
    return _words(world)


def _words(world: World) -> str:
    try:
        world.run()
    except Failure as failure:
        return str(failure)
    return ""


def _world(seed: int) -> World:
    return World(seed, Faults.none(), fault_seconds=60.0)


def _strike(task: tuple[int, str, Point]) -> tuple[str, Point, str]:
    seed, kind, point = task
    if kind == CRASH_AGENT:
        return kind, point, crash_agent(seed, point)
    return kind, point, disturb(seed, point, Disturbance(kind))


def main() -> int:
    """See the module. Exits with 1 if anything went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.sweep", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the reference run")
    parser.add_argument("--stride", type=at_least_one, default=1, help="only every so many points")
    parser.add_argument("--workers", type=at_least_one, default=1, help="processes")
    asked = parser.parse_args()
    began, failed = time.monotonic(), 0
    counts: Counter[str] = Counter()
    seed, stride = asked.seed, asked.stride
    tasks = [(seed, str(kind), p) for p in points(seed)[::stride] for kind in Disturbance]
    tasks += [(seed, CRASH_AGENT, p) for p in steps(seed)[::stride]]
    with multiprocessing.get_context("spawn").Pool(asked.workers) as pool:
        for kind, point, words in pool.imap_unordered(_strike, tasks, chunksize=4):
            counts[kind] += 1
            if words:
                failed += 1
                print(f"{point.writer} {point.number}, {kind}:\n{words}\n", flush=True)
            if counts.total() % PROGRESS_EVERY == 0:
                done = f"{counts.total()} of {len(tasks)}"
                print(f"{done}, {failed} failed", file=sys.stderr, flush=True)
    took = time.monotonic() - began
    print(f"{dict(counts)}: {counts.total()} disturbances, {failed} failed, {took:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
