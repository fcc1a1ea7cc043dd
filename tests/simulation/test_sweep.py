"""A sample of the sweep over every write; all of it is `python -m tests.simulation.sweep`."""

import pytest

from tests.simulation.sweep import Disturbance, crash_agent, disturb, points, steps

SEED = 1


@pytest.mark.parametrize("disturbance", Disturbance)
def test_a_disturbance_at_any_write_is_overcome(disturbance: Disturbance) -> None:
    every = points(SEED)
    assert {"job-reconciler", "execution-reconciler", "node-reconciler", "reports"} <= {
        point.writer for point in every
    }
    for point in every[list(Disturbance).index(disturbance) :: -(-len(every) // 5)]:
        words = disturb(SEED, point, disturbance)
        assert not words, f"{point}: {words}"


@pytest.mark.parametrize("what", ["ledger.commit", "ledger.committed", "engine.start"])
def test_a_crash_of_an_agent_at_any_step_is_overcome(what: str) -> None:
    every = [point for point in steps(SEED) if point.writer.endswith(f" {what}")]
    assert len(every) > 5
    for point in every[:: -(-len(every) // 4)]:
        words = crash_agent(SEED, point)
        assert not words, f"{point}: {words}"
