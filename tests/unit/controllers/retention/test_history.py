"""How long the history of a namespace is kept."""

from bacalhau_api.meta import ObjectMeta, Ref
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.namespace import Namespace, NamespaceSpec, Retention
from bacalhau_controllers.manager import Manager
from bacalhau_controllers.retention import HistoryReconciler, history_seconds
from tests.support.samples import Bench, job
from tests.support.simclock import SimLoop

HOUR = 3600


def space(**limits: int) -> Namespace:
    """The namespace of the jobs here."""
    meta = ObjectMeta(name="default", namespace="", uid="space", generation=1)
    return Namespace(metadata=meta, spec=NamespaceSpec(retention=Retention(**limits)))


def office(bench: Bench) -> Manager:
    manager = Manager(bench.state, bench.clock, bench.rng)
    manager.add(HistoryReconciler(bench.state, bench.clock, bench.store), "Namespace")
    bench.loop.create_task(manager.run(), name="manager")
    bench.loop.run_until(manager.is_leader.is_set)
    return manager


def entries(bench: Bench, of: Job) -> int:
    """How many of its changes are remembered."""
    return len(bench.loop.run_until_complete(bench.store.history(of.ref)))


def test_by_age_and_anew_when_the_limit_is_lowered() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        old, new = job("old"), job("new")
        bench.put(old, space(history_seconds=3 * HOUR))
        manager = office(bench)
        loop.advance(2 * HOUR)
        bench.put(new)
        loop.advance(HOUR - 900)
        assert (entries(bench, old), entries(bench, new)) == (1, 1)
        loop.advance(1600)
        assert (entries(bench, old), entries(bench, new)) == (0, 1)
        assert bench.stored(old) is not None, "the object is not touched"
        loop.advance(HOUR)
        assert entries(bench, new) == 1
        bench.put(space(history_seconds=HOUR))
        loop.advance(5)
        assert entries(bench, new) == 0
        loop.run_until_complete(manager.close())


def test_by_size_but_nothing_of_the_last_hour() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        jobs = [job(f"j{i}") for i in range(5)]
        bench.put(space())
        manager = office(bench)
        for each in jobs:
            bench.put(each)
            loop.advance(1000)
        bench.put(space(history_bytes=1))
        loop.advance(5)
        assert [entries(bench, each) for each in jobs] == [0, 0, 1, 1, 1]
        loop.advance(2 * HOUR)
        assert [entries(bench, each) for each in jobs] == [0] * 5
        loop.run_until_complete(manager.close())


class Slow:
    """A store that takes a while, and counts."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.begun = self.done = 0

    async def trim_history(self, namespace: str, **limits: object) -> int:
        self.begun += 1
        await self.bench.clock.sleep(100)
        self.done += 1
        return 0


def test_a_pass_over_a_long_history_may_take_its_time() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(space(history_bytes=1))
        store = Slow(bench)
        manager = Manager(bench.state, bench.clock, bench.rng)
        manager.add(HistoryReconciler(bench.state, bench.clock, store), "Namespace")
        bench.loop.create_task(manager.run(), name="manager")
        loop.advance(HOUR)
        assert store.done == 6
        assert store.begun <= 7, "one may be under way"
        loop.run_until_complete(manager.close())


def test_without_limits_nothing_is_asked_for() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        bench.put(space(), job("a"))
        manager = office(bench)
        loop.advance(2 * HOUR)
        assert entries(bench, job("a")) == 1
        assert history_seconds(bench.state.cache, "default") is None
        assert history_seconds(bench.state.cache, "nowhere") is None
        bench.put(space(history_seconds=7200))
        loop.advance(1)
        assert history_seconds(bench.state.cache, "default") == 7200
        assert bench.state.cache.get(Ref("Namespace", "", "default")) is not None
        loop.run_until_complete(manager.close())
