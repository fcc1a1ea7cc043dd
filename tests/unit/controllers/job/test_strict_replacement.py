"""Under the policy `stop` an attempt that was replaced is told so before it can begin after all."""

from collections.abc import Iterator

import pytest

from bacalhau_api.meta import Contact
from bacalhau_api.v1.execution import Desired, Phase
from bacalhau_api.v1.job import DisconnectPolicy, JobType
from bacalhau_controllers.store import Put
from tests.support.job_world import World, make_spec, run_on, world


@pytest.fixture
def w() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.mark.parametrize("kind", [JobType.BATCH, JobType.SERVICE])
@pytest.mark.parametrize("reconcile", [None, "keepOriginal", "keepReplacement"])
def test_what_is_replaced_is_to_stop_from_that_commit_on(
    w: World, kind: JobType, reconcile: str | None
) -> None:
    for name in ("a", "b"):
        w.add_node(name)
    w.default = run_on
    disconnect = DisconnectPolicy(action="stop", after_seconds=15, reconcile=reconcile)  # type: ignore[arg-type]
    w.submit("j", make_spec(kind, disconnect=disconnect))
    w.bench.loop.run_until_idle()  # it was placed; its node is cut off before it hears of that
    (first,) = w.executions("j")
    assert first.phase is Phase.PENDING
    w.silence(first.spec.node)
    w.lose(first.spec.node)
    w.bench.loop.run_until_idle()
    first, second = w.executions("j")
    assert first.spec.desired is Desired.STOP
    assert first.spec.superseded
    assert second.spec.desired is Desired.RUN
    revisions = [first.metadata.resource_version, second.metadata.resource_version]
    assert abs(revisions[0] - revisions[1]) <= 2, "one commit: nobody can come between"
    w.hear(first.spec.node)
    w.settle()
    (alive,) = [e for e in w.executions("j") if not e.phase.is_final]
    assert alive.name == second.name


def test_also_where_more_is_replaced_than_fits_into_one_commit(w: World) -> None:
    w.add_node("a", cpu=100_000)
    w.default = run_on
    disconnect = DisconnectPolicy(action="stop", after_seconds=15)
    w.submit("j", make_spec(count=250, disconnect=disconnect))
    w.bench.loop.run_until_idle()
    w.add_node("b", cpu=100_000)
    w.silence("a")
    given_up = [e.but(status=e.status.but(contact=Contact.LOST)) for e in w.executions("j")]
    w.write(*(Put(e, e.metadata.resource_version) for e in given_up))
    assert len(w.executions("j", node="b")) == 250
    lost = w.executions("j", node="a")
    assert {(e.spec.desired, e.spec.superseded) for e in lost} == {(Desired.STOP, True)}
