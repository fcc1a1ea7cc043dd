"""Many seeds, in one process or several."""

import gc
import multiprocessing
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
    if not gc.get_freeze_count():
        gc.freeze()  # all that was imported stays
        gc.set_threshold(50_000, 20, 20)  # a world is garbage as a whole, when it is over
    world = World(seed, None if faults is None else Faults.parse(faults))
    try:
        outcome = world.run()
    except Failure as failure:
        return Verdict(seed, world.trace.digest, world.now, failure.invariant, str(failure))
    return Verdict(seed, outcome.digest, outcome.seconds)


def shrink(seed: int, faults: str | None) -> Iterator[Verdict]:
    """Leave out one fault after the other for as long as the seed still breaks the same invariant.

    Yields each verdict that kept it, the last of which has the fewest faults. Without a fault the
    others strike at other moments, so that this finds small sets, not the smallest.
    """
    first = judge(seed, faults)
    if not first.words:
        return
    left = Faults.of_seed(seed) if faults is None else Faults.parse(faults)
    for fault in list(left.rates):
        fewer = left.only(set(left.rates) - {fault})
        verdict = judge(seed, str(fewer))
        if verdict.invariant == first.invariant:
            left = fewer
            yield verdict


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
