"""Scores: of the nodes that fit, which one? Each part is a small function; the sum decides.

The parts that depend on the node alone are kept by the node table as one array; those that depend
on the job touch few nodes.
"""

from typing import Final, Literal

from bacalhau_controllers.placement.resources import UNLIMITED, Amounts

Strategy = Literal["spread", "pack"]

AVOIDED: Final = -4.0
"""The node where the last attempt failed: used only when no other fits."""

_TROUBLE_WEIGHT: Final = 0.5
_SAME_JOB_WEIGHT: Final = 1.0


def capacity_score(free: Amounts, capacity: Amounts, strategy: Strategy) -> float:
    """From 0 to 1: the free part of CPU and memory (of executions, where neither was declared);
    the used part with `pack`."""
    parts = [max(free[i], 0) / capacity[i] for i in (0, 1) if 0 < capacity[i] < UNLIMITED]
    if not parts:
        parts = [max(free.executions, 0) / max(capacity.executions, 1)]
    mean = sum(parts) / len(parts)
    return mean if strategy == "spread" else 1.0 - mean


def trouble_score(level: float) -> float:
    """From 0 down to -0.5 as faults of the last minutes gather."""
    return -_TROUBLE_WEIGHT * min(level / 3.0, 1.0)


def same_job_score(count: int) -> float:
    """From 0 down to -1: other executions of the same job that are there already."""
    return -_SAME_JOB_WEIGHT * count / (count + 1)
