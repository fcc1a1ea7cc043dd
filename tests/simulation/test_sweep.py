"""A sample of the sweep over every write; all of it is `python -m tests.simulation.sweep`."""

import pytest

from tests.simulation.sweep import Disturbance, disturb, points

SEED = 1


@pytest.mark.parametrize("disturbance", Disturbance)
def test_a_disturbance_at_any_write_is_overcome(disturbance: Disturbance) -> None:
    every = points(SEED)
    assert {"job-reconciler", "execution-reconciler", "node-reconciler", "reports"} <= {
        point.writer for point in every
    }
    for point in every[list(Disturbance).index(disturbance) :: len(every) // 5]:
        words = disturb(SEED, point, disturbance)
        assert not words, f"{point}: {words}"
