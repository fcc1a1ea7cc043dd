"""A sample of worlds with a watched directory; long runs are `python -m tests.simulation.sourced`."""

import pytest

from bacalhau_controllers.gitops import Declared, plan, prune
from tests.simulation.sourced import SourcedWorld
from tests.simulation.world.world import Failure


@pytest.mark.parametrize("seed", range(4))
def test_a_directory_is_followed_through_everything(seed: int) -> None:
    world = SourcedWorld(seed)
    world.run()
    assert world.directory.ledger.runs["f-keep"]


def first_failure(seeds: range) -> str:
    """What is found in the first world in which something is."""
    for seed in seeds:
        try:
            SourcedWorld(seed).run()
        except Failure as failure:
            return str(failure)
    return ""


def test_deleting_what_could_not_be_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "_unread", lambda view: None)
    assert "though it was declared" in first_failure(range(6))


def test_an_object_that_is_not_put_right_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan.rule

    def blind(item: Declared, given: plan.Given) -> plan.Ruling:
        found = whole(item, given)
        is_label = found.change is not None and found.change.action == "change"
        return plan.Ruling("synced") if is_label and item.file == "b.yaml" else found

    monkeypatch.setattr(plan, "rule", blind)
    assert "drift" in first_failure(range(12))
