"""Long runs: `python -m tests.simulation --seeds 1000 --workers 2`, or one seed again by `--seed`.

Prints each failure as it comes, with what it takes to run it again, and seeds a minute at the end.
Exits with 1 if any seed failed.
"""

import argparse
import sys
import time
from collections import Counter

from tests.simulation.campaign import judge_all, shrink
from tests.support.arguments import at_least_one, fault_words

PROGRESS_SEEDS = 500


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=at_least_one, default=100, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--workers", type=at_least_one, default=1, help="processes")
    parser.add_argument(
        "--faults", type=fault_words, help="such as 'all,-clone-node' or 'net-loss=0.3'; else drawn"
    )
    parser.add_argument(
        "--shrink", action="store_true", help="with --seed: look for fewer faults that suffice"
    )
    parser.add_argument("--brief", action="store_true", help="one line for each failure")
    asked = parser.parse_args()
    if asked.shrink:
        return _shrink(asked.seed, asked.faults)
    seeds = (
        [asked.seed]
        if asked.seed is not None
        else list(range(asked.first, asked.first + asked.seeds))
    )
    began = time.monotonic()
    simulated, found = 0.0, Counter[str]()
    failed: list[int] = []
    for count, verdict in enumerate(judge_all(seeds, asked.faults, asked.workers), start=1):
        if count % PROGRESS_SEEDS == 0:
            print(f"{count} seeds so far, {len(failed)} failed", file=sys.stderr, flush=True)
        simulated += verdict.simulated_seconds
        if verdict.words:
            found[verdict.invariant] += 1
            failed.append(verdict.seed)
            words = verdict.words
            print(
                " ".join(words.splitlines()[:2])[:400] if asked.brief else words + "\n", flush=True
            )
        elif asked.seed is not None:
            print(f"seed {verdict.seed} passed, trace {verdict.digest}")
    took = max(time.monotonic() - began, 1e-9)
    print(
        f"{len(seeds)} seeds, {len(failed)} failed {dict(found)}, "
        f"{len(seeds) / took * 60:.0f} seeds a minute, {simulated / took:.0f} times real time"
    )
    return 1 if failed else 0


def _shrink(seed: int | None, faults: str | None) -> int:
    if seed is None:
        print("--shrink needs --seed", file=sys.stderr)
        return 2
    fewest = ""
    for verdict in shrink(seed, faults):
        fewest = verdict.words
        print(" ".join(fewest.splitlines()[1:3])[:400], flush=True)
    print(f"\n{fewest}" if fewest else "it passes, or needs every fault that it has")
    return 1 if fewest else 0


if __name__ == "__main__":
    sys.exit(main())
