"""Long runs: `python -m tests.simulation --seeds 1000 --workers 2`, or one seed again by `--seed`.

Prints each failure as it comes, with what it takes to run it again, and seeds a minute at the end.
Exits with 1 if any seed failed.
"""

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from tests.simulation.world import Faults, World
from tests.simulation.world.world import Failure


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one seed. `words` is empty if it passed."""

    seed: int
    digest: str
    simulated_seconds: float
    invariant: str = ""
    words: str = ""


def judge(seed: int, faults: str | None) -> Verdict:
    """Run one seed."""
    world = World(seed, None if faults is None else Faults.parse(faults))
    try:
        outcome = world.run()
    except Failure as failure:
        return Verdict(seed, world.trace.digest, world.now, failure.invariant, str(failure))
    return Verdict(seed, outcome.digest, outcome.seconds)


def judge_all(seeds: list[int], faults: str | None, workers: int) -> Iterator[Verdict]:
    """Run many, in several processes."""
    if workers <= 1:
        yield from (judge(seed, faults) for seed in seeds)
        return
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=200) as pool:
        jobs = [(seed, faults) for seed in seeds]
        yield from pool.imap_unordered(_judge_packed, jobs, chunksize=4)


def _judge_packed(packed: tuple[int, str | None]) -> Verdict:
    return judge(*packed)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--faults", help="such as 'all,-clone-node' or 'net-loss=0.3'; else drawn")
    parser.add_argument("--brief", action="store_true", help="one line for each failure")
    asked = parser.parse_args()
    seeds = [asked.seed] if asked.seed is not None else list(
        range(asked.first, asked.first + asked.seeds)
    )
    began = time.monotonic()
    simulated, found = 0.0, Counter[str]()
    failed: list[int] = []
    for verdict in judge_all(seeds, asked.faults, asked.workers):
        simulated += verdict.simulated_seconds
        if verdict.words:
            found[verdict.invariant] += 1
            failed.append(verdict.seed)
            words = verdict.words
            print(" ".join(words.splitlines()[:2])[:400] if asked.brief else words + "\n", flush=True)
        elif asked.seed is not None:
            print(f"seed {verdict.seed} passed, trace {verdict.digest}")
    took = max(time.monotonic() - began, 1e-9)
    print(
        f"{len(seeds)} seeds, {len(failed)} failed {dict(found)}, "
        f"{len(seeds) / took * 60:.0f} seeds a minute, {simulated / took:.0f} times real time"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
