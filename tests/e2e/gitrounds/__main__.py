"""`python -m tests.e2e.gitrounds --minutes 60 [--seed S]`: see the package.

Prints what was done and found; ends with 1 if anything was deleted or run wrongly or is left as no
directory says, and then keeps the data.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from bacalhau_api.errors import BacalhauError
from tests.e2e.cluster import ClusterError
from tests.e2e.gitrounds.campaign import Campaign, DriftLeftError, drop


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.gitrounds", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long")
    parser.add_argument("--operations", type=int, default=0, help="at most so many; 0: no bound")
    parser.add_argument("--between", type=int, default=25, help="operations between two looks")
    parser.add_argument(
        "--mishaps", type=float, default=1.0, help="how often, against the usual, things go wrong"
    )
    parser.add_argument("--seed", default="1", help="all that is random follows from it")
    parser.add_argument("--data", type=Path, help="where data are kept; else a temporary place")
    parser.add_argument("--verbose", action="store_true", help="print each operation")
    asked = parser.parse_args()
    if asked.data is not None:
        asked.data.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="bacalhau-gitrounds-", dir=asked.data))
    campaign = Campaign(root, asked.seed, asked.mishaps)
    began = time.monotonic()
    done = 0
    wrong: list[str] = []
    try:
        campaign.start()
        while time.monotonic() - began < asked.minutes * 60:
            name = campaign.step()
            done += 1
            if asked.verbose:
                print(f"{time.monotonic() - began:8.1f} {name}", flush=True)
            is_last = bool(asked.operations) and done >= asked.operations
            if done % asked.between == 0 or is_last:
                campaign.settle()
                if campaign.wrong or is_last:
                    break
        else:
            campaign.settle()
    except DriftLeftError as error:
        wrong.append(f"drift is left: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    except (
        OSError,
        AssertionError,
        subprocess.SubprocessError,
        BacalhauError,
        ClusterError,
    ) as error:
        traceback.print_exc()
        wrong.append(f"it broke off: {error!r}")
    finally:
        left = campaign.close()
    wrong += campaign.wrong + [f"still running: {line}" for line in left]
    _summary(campaign, done, time.monotonic() - began)
    for text in wrong:
        print(f"wrong: {text}")
    if wrong:
        print(f"{campaign.tail()}\nkept: {root}")
        return 1
    drop(root)
    return 0


def _summary(campaign: Campaign, done: int, seconds: float) -> None:
    ledgers = (campaign.pushed, campaign.desk)
    runs = sum(len(found) for one in ledgers for found in one.runs.values())
    kills = sum(n for name, n in campaign.counts.items() if name.startswith("kill"))
    print(
        f"{done} operations in {seconds:.0f} s, {kills} with kill -9; "
        f"{sum(len(one.said) for one in ledgers)} states of the directories, {runs} runs, "
        f"{sum(one.pruned for one in ledgers)} objects pruned; "
        f"{len(campaign.settled)} times settled, "
        f"{len(campaign.wrong)} wrong deletions, runs or writes"
    )
    if campaign.settled:
        print(
            f"seconds to rest: median {statistics.median(campaign.settled):.1f}, "
            f"longest {max(campaign.settled):.1f}"
        )
    print(", ".join(f"{name} {n}" for name, n in sorted(campaign.counts.items())))


if __name__ == "__main__":
    sys.exit(main())
