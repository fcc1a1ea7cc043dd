"""Applying sets: all or none, once, whatever becomes of answers; and what tokens are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random

import pytest

from bacalhau_api.errors import ConflictError, InvalidError, OutcomeUnknownError
from bacalhau_api.meta import ObjectMeta, Ref, Resource
from bacalhau_api.plans import InventoryEntry
from bacalhau_api.v1.job import Job
from bacalhau_controllers.forecast import Applier, ChangeSet, Limits, Owned, Wanted, inventory_of
from bacalhau_controllers.forecast.changes import CHANGES_MAX
from bacalhau_controllers.forecast.token import read_token
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.placement.table import turn_hash
from bacalhau_controllers.store import Delete, Why, Write
from tests.support.job_world import make_node, make_spec
from tests.support.samples import Bench
from tests.support.simclock import SimLoop
from tests.unit.controllers.forecast.test_plan_comes_true import Ids


class Losing(MemoryStore):
    """Loses the answers of some commits, after or before they are done."""

    after = 0
    before = 0
    conflicts = 0
    is_removed = False
    """Whether somebody removes the object whose answer was lost."""

    async def commit(self, writes: Sequence[Write], why: Why) -> tuple[Resource | None, ...]:
        """See Store.commit."""
        if self.before:
            self.before -= 1
            raise OutcomeUnknownError("lost before")
        if self.conflicts:
            self.conflicts -= 1
            raise ConflictError("somebody was faster")
        done = await super().commit(writes, why)
        if self.after:
            self.after -= 1
            if self.is_removed and (made := done[0]) is not None:
                await super().commit([Delete(made.ref, made.metadata.resource_version)], why)
            raise OutcomeUnknownError("lost after")
        return done


@contextmanager
def applier() -> Iterator[tuple[Applier, Bench, Losing]]:
    """An applier on a store that may lose answers."""
    with SimLoop() as loop:
        bench = Bench(loop, Losing)
        assert isinstance(bench.store, Losing)
        bench.put(make_node("n1"))
        yield Applier(bench.state, bench.clock, Ids(Random(1))), bench, bench.store


def wanted(*names: str, **spec: object) -> tuple[Wanted, ...]:
    """Documents of jobs."""
    jobs = (Job(metadata=ObjectMeta(name=name), spec=make_spec(**spec)) for name in names)  # type: ignore[arg-type]
    return tuple(Wanted(job, f"{job.name}.yaml", 1) for job in jobs)


@pytest.mark.parametrize("fault", ["after", "before", "conflicts"])
@pytest.mark.parametrize("with_token", [True, False])
def test_a_lost_answer_applies_once_and_tells_what_happened(fault: str, with_token: bool) -> None:
    with applier() as (apply, bench, store):
        run = bench.loop.run_until_complete
        changes = ChangeSet(wanted("a", "b"))
        token = run(apply.plan(changes)).token if with_token else ""
        setattr(store, fault, 2)
        done = run(apply.apply(changes, "user:t", token=token))
        assert [o.outcome for o in done.objects] == ["created", "created"]
        for told in done.objects:
            stored = run(store.get(Ref("Job", "default", told.name)))
            assert stored.metadata.uid == told.uid
            assert stored.metadata.generation == told.generation == 1
            assert len(run(store.history(stored.ref))) == 1


def test_a_plan_that_is_applied_again_makes_others() -> None:
    """Nodes may still know the executions of the job that was deleted, by name."""
    with applier() as (apply, bench, _):
        run = bench.loop.run_until_complete
        changes = ChangeSet(wanted("a", "b"))
        token = run(apply.plan(changes)).token
        made = [run(apply.apply(changes, "u", token=token)).objects]
        gone = [Delete(o.ref, o.metadata.resource_version) for o in bench.state.cache.list("Job")]
        run(bench.state.commit(gone, Why("u", "Deleted")))
        made.append(run(apply.apply(changes, "u", token=token)).objects)
        for first, second in zip(*made, strict=True):
            assert first.outcome == second.outcome == "created"
            assert first.uid[:8] != second.uid[:8]
            assert turn_hash(first.uid) == turn_hash(second.uid)


@pytest.mark.parametrize("with_token", [True, False])
def test_what_was_removed_while_its_creation_was_in_doubt_is_made_as_another(
    with_token: bool,
) -> None:
    with applier() as (apply, bench, store):
        run = bench.loop.run_until_complete
        changes = ChangeSet(wanted("a"))
        token = run(apply.plan(changes)).token if with_token else ""
        store.after, store.is_removed = 1, True
        (told,) = run(apply.apply(changes, "u", token=token)).objects
        uids = [e.uid for e in run(store.history(Ref("Job", "default", "a"))) if e.resource]
        assert len(uids) == 2
        assert uids[0][:8] != uids[1][:8]
        assert told.uid == uids[1]


def test_a_prune_whose_answer_was_lost_is_told() -> None:
    with applier() as (apply, bench, store):
        run = bench.loop.run_until_complete
        first = run(apply.apply(ChangeSet(wanted("a", "b"), owner="source/x"), "u"))
        left = ChangeSet(
            wanted("a"), owner="source/x", inventory=inventory_of(first.inventory), prune=True
        )
        store.after = 1
        done = run(apply.apply(left, "u"))
        assert {o.name: o.outcome for o in done.objects} == {"a": "unchanged", "b": "deleted"}
        assert [entry.name for entry in done.inventory] == ["a"]


def test_without_prune_what_is_undeclared_stays_in_the_inventory() -> None:
    with applier() as (apply, bench, _):
        run = bench.loop.run_until_complete
        first = run(apply.apply(ChangeSet(wanted("a", "b"), owner="source/x"), "u"))
        kept = ChangeSet(wanted("a"), owner="source/x", inventory=inventory_of(first.inventory))
        done = run(apply.apply(kept, "u"))
        assert sorted(entry.name for entry in done.inventory) == ["a", "b"]
        assert done.inventory[0] == InventoryEntry(
            kind="Job", namespace="default", name="a", uid=first.objects[0].uid
        )


def test_a_set_goes_on_failing_no_longer_than_it_must() -> None:
    with applier() as (apply, bench, store):
        store.conflicts = 1000
        with pytest.raises(ConflictError):
            bench.loop.run_until_complete(apply.apply(ChangeSet(wanted("a")), "u"))


def test_a_set_has_a_bound() -> None:
    with applier() as (apply, bench, _):
        inventory = tuple(Owned(Ref("Job", "default", f"j{i}"), "u") for i in range(CHANGES_MAX))
        changes = ChangeSet(wanted("a"), owner="o", inventory=inventory, prune=True)
        with pytest.raises(InvalidError, match=str(CHANGES_MAX)):
            bench.loop.run_until_complete(apply.plan(changes))


def test_a_forecast_has_a_bound_and_says_that_there_is_more() -> None:
    with applier() as (apply, bench, _):
        bench.put(make_node("n1", cpu=1 << 30, executions_max=1 << 20))
        plan = bench.loop.run_until_complete(
            apply.plan(ChangeSet(wanted("a", count=Limits().executions_max + 500, cpu=1)))
        )
        (item,) = plan.objects
        assert not plan.complete
        assert len(item.executions) == 200
        assert len(item.executions) + item.executions_omitted >= Limits().executions_max


def test_a_plan_is_not_told_as_if_it_had_happened(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="bacalhau_controllers")
    with applier() as (apply, bench, _):
        plan = bench.loop.run_until_complete(apply.plan(ChangeSet(wanted("a"))))
    assert plan.summary.start == 1
    assert not caplog.messages


@pytest.mark.parametrize(
    "text", ["", "plan1-", "plan1-AAAA", "x", "plan1-" + "A" * 20_000, "plan1-Ä", "plan2-AAAA"]
)
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(InvalidError, match="is not the token"):
        read_token(text)


def test_tokens_survive_their_way() -> None:
    with applier() as (apply, bench, _):
        plan = bench.loop.run_until_complete(apply.plan(ChangeSet(wanted("a", "b"))))
        assert read_token(plan.token).text() == plan.token
        assert len(plan.token) < 100
