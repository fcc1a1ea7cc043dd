"""The policy `stop`: at no instant do two attempts of a slot run, although clocks go wrong.

The promise holds for clocks that are off by at most `CLOCK_RATE_ERROR_MAX`, and the last test shows
that it does not for worse ones, so that the others would notice if it were broken.
"""

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_api.v1.job import DisconnectPolicy, JobSpec, JobType, Resources, SpecConfig, Task
from bacalhau_controllers.execution.plan import (
    CLOCK_RATE_ERROR_MAX,
    LOCAL_STOP_MARGIN_SECONDS,
    strict_seconds,
)
from tests.simulation.scripted import Script
from tests.simulation.world.checker import Violation
from tests.simulation.world.machines import ENGINE

SLOW, FAST = 1 - CLOCK_RATE_ERROR_MAX, 1 + CLOCK_RATE_ERROR_MAX
JOB = "job"


@given(
    local=st.floats(1, 30 * 86400),
    node=st.floats(SLOW, FAST),
    orchestrator=st.floats(SLOW, FAST),
)
def test_margin_outlasts_every_pair_of_clocks(
    local: float, node: float, orchestrator: float
) -> None:
    ends = local / node
    replaced = strict_seconds(local) / orchestrator
    assert replaced >= ends + LOCAL_STOP_MARGIN_SECONDS - 1e-6 * local


def _spec(kind: JobType, after: int) -> JobSpec:
    task = Task(
        engine=SpecConfig(type=ENGINE, params={"seconds": "for ever"}),
        resources=Resources(cpu_millis=10, memory_bytes=1 << 20),
    )
    return JobSpec(
        type=kind,
        tasks=(task,),
        disconnect=DisconnectPolicy(action="stop", after_seconds=after),
    )


def _gap(kind: JobType, after: int, home: float, orchestrator: float, *, mended: bool) -> float:
    """Seconds between the end of the one attempt and the begin of the next. Raises Violation
    if they run together. `mended`: the node comes back some time after its limit."""
    # The world's own time is the orchestrator's; what counts is how the others go beside it.
    rates = {"home": home / orchestrator, "other": 1 / orchestrator}
    with Script({"home": {}, "other": {}}, rates=rates) as script:
        script.cordon("other")
        script.apply(JOB, _spec(kind, after))
        script.until(lambda: len(script.running(JOB)) == 1)
        script.cordon("other", unschedulable=False)
        script.advance(7)
        script.cut("home")
        if mended:
            script.advance(after * 1.03)
            script.mend("home")
        else:
            script.advance(after * 0.95)

        def running(name: str) -> bool:
            return any(line.startswith(f"{name} ") for line in script.running(JOB))

        ended = begun = None
        while ended is None or begun is None:
            if ended is None and not running("home"):
                ended = script.world.now
            if begun is None and running("other"):
                begun = script.world.now
            script.advance(0.5)
            assert script.world.now < 3 * after + 600, "it was never replaced"
        return begun - ended


def _cases() -> Iterator[tuple[JobType, int, float, float, bool]]:
    rng = Random(7)
    for number in range(12):
        kind = (JobType.BATCH, JobType.SERVICE)[number % 2]
        after = (20, 120, 1800)[number % 3]
        home, orchestrator = rng.choice([SLOW, 1.0, FAST]), rng.choice([SLOW, 1.0, FAST])
        yield kind, after, home, orchestrator, bool(number % 4 == 3)
    for after in (20, 600, 3600):
        yield JobType.BATCH, after, SLOW, FAST, False


@pytest.mark.parametrize(("kind", "after", "home", "orchestrator", "mended"), list(_cases()))
def test_never_two_at_one_instant(
    kind: JobType, after: int, home: float, orchestrator: float, *, mended: bool
) -> None:
    gap = _gap(kind, after, home, orchestrator, mended=mended)
    assert gap > 0 if mended else gap > LOCAL_STOP_MARGIN_SECONDS - 10


def test_two_would_run_with_clocks_that_are_worse() -> None:
    with pytest.raises(Violation, match="I12"):
        _gap(JobType.BATCH, 3600, 1 - 10 * CLOCK_RATE_ERROR_MAX, FAST, mended=False)
