"""`python -m tests.e2e.rounds --rounds N [--seed S]`: see the package.

Prints a line for each round and a summary; exits with 1 if anything was lost, doubled, left over or
stuck, and then keeps the data of the fleet in question.
"""

import argparse
import asyncio
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.e2e.rounds.campaign import Campaign, Verdict
from tests.e2e.rounds.lab import Lab, LabError, enter
from tests.e2e.rounds.work import PROGRAMS_BY_NAME
from tests.support.arguments import at_least_one

CANNOT = 2


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.rounds", description=__doc__)
    parser.add_argument("--rounds", type=at_least_one, default=10, help="how many")
    parser.add_argument("--seed", default="1", help="all that is random follows from it")
    parser.add_argument("--first", type=int, default=0, help="the number of the first round")
    parser.add_argument("--agents", type=at_least_one, default=3, help="compute nodes")
    parser.add_argument("--program", choices=list(PROGRAMS_BY_NAME), default="wasm")
    parser.add_argument("--data", type=Path, help="where data are kept; else a temporary place")
    asked = parser.parse_args()
    try:
        enter("tests.e2e.rounds", sys.argv[1:])
        lab = Lab()
    except LabError as error:
        print(f"cannot make network namespaces: {error}", file=sys.stderr)
        return CANNOT
    if asked.data is not None:
        asked.data.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="bacalhau-rounds-", dir=asked.data))
    if not lab.has_netem:
        print("this kernel has no netem: links are lossy by nft and slow by tbf, not delayed")
    campaign = Campaign(lab, root, asked.seed, agents=asked.agents, program=asked.program)
    began = time.monotonic()
    try:
        verdicts = asyncio.run(_until_told(campaign, asked.rounds, asked.first))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        if not campaign.kept and root.exists():
            root.rmdir()
    _summary(verdicts, time.monotonic() - began)
    for path in campaign.kept:
        print(f"kept: {path}")
    return 1 if any(not one.findings.is_clean for one in verdicts) else 0


async def _until_told(campaign: Campaign, rounds: int, first: int) -> list[Verdict]:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await campaign.run(rounds, first)


def _summary(verdicts: list[Verdict], seconds: float) -> None:
    found = [one.findings for one in verdicts]
    times = sorted(one.seconds for one in verdicts)
    kinds = {fault.partition("@")[0] for one in verdicts for fault in one.faults}
    print(
        f"{len(verdicts)} rounds in {seconds:.0f} s: {sum(len(v.faults) for v in verdicts)} faults "
        f"of {len(kinds)} kinds, {sum(v.jobs for v in verdicts)} jobs, "
        f"{sum(v.again for v in verdicts)} attempts again; "
        f"{sum(len(f.lost) for f in found)} lost, {sum(len(f.doubled) for f in found)} doubled, "
        f"{sum(len(f.orphans) for f in found)} orphans, {sum(len(f.stuck) for f in found)} stuck"
    )
    if times:
        print(
            f"seconds from the last fault to rest: median {statistics.median(times):.1f}, "
            f"longest {times[-1]:.1f}"
        )


if __name__ == "__main__":
    sys.exit(main())
