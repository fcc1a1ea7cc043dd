"""The world with a directory: edited at random, looked after by two processes that may die
anywhere, beside all the users, nodes and faults that there are anyway.

    SourcedWorld(seed).run()

In the end what is stored is what the directory says; on the way nothing was deleted that it
declared, and nothing ran that it did not ask for. `python -m tests.simulation.sourced` runs many.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from random import Random
from typing import Final

from bacalhau_api.errors import TransientError
from bacalhau_api.meta import ObjectMeta, Ref, Resource
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.retired import RetiredJob
from bacalhau_api.v1.source import Approval, Source, SourcePhase, SourceSpec
from bacalhau_controllers.cache import Cache, Informer
from bacalhau_controllers.controller import ControllerSettings
from bacalhau_controllers.gitops import SourceReconciler, StoreObjects
from bacalhau_controllers.manager import Manager, ManagerSettings
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Put, Why, Write
from bacalhau_controllers.workqueue import Backoff
from tests.e2e.gitrounds.truth import State as Said
from tests.e2e.gitrounds.verdict import Ledger, value_of
from tests.simulation.world import Fault, Faults, World
from tests.simulation.world.checker import Violation
from tests.simulation.world.life import Life, current_life
from tests.simulation.world.machines import ENGINE
from tests.simulation.world.storage import StoreClient
from tests.simulation.world.world import Failure
from tests.support.arguments import at_least_one
from tests.support.gitops import DictTree

SOURCE: Final = Ref("Source", "", "prod")
NAMES: Final = tuple(f"f-{n}" for n in range(6))
KEPT: Final = ("f-keep",)
FILES: Final = ("a.yaml", "b.yaml", "sub/c.yaml", "d.yaml")
BROKEN: Final = ("", "kind: [", "kind: Job\n")
SETTLES_MAX: Final = 4


def manifest(name: str, value: str, team: str) -> str:
    """A job that takes a moment. A run depends on `value`, not on `team`."""
    return (
        "apiVersion: bacalhau.org/v1\nkind: Job\n"
        f"metadata: {{name: {name}, labels: {{team: {team}}}}}\n"
        f"spec:\n  type: batch\n  tasks:\n    - name: main\n"
        f"      engine: {{type: {ENGINE}, params: {{exitCode: 0, seconds: 1.5}}}}\n"
        f"      env: {{VALUE: {value}}}\n"
        "      resources: {cpu: 50m, memory: 1Mi}\n"
    )


class Directory:
    """What is declared, by file; some files cannot be read. It outlives whoever reads it."""

    def __init__(self, rng: Random) -> None:
        self.tree = DictTree()
        self.ledger = Ledger("prod", "f", frozenset(KEPT))
        self._rng = rng
        self._values = 0
        self._jobs: dict[str, dict[str, tuple[str, str]]] = {"keep.yaml": {"f-keep": ("k", "a")}}
        self._broken: dict[str, str] = {}
        for name in NAMES[:4]:
            self._jobs.setdefault(rng.choice(FILES), {})[name] = (self._value(), "a")
        self.show()

    def edit(self) -> None:
        """Somebody does something."""
        rng = self._rng
        path = rng.choice(FILES)
        jobs = self._jobs.setdefault(path, {})
        there = {name for each in self._jobs.values() for name in each}
        match rng.randrange(10):
            case 0 | 1 if jobs:
                name = rng.choice(sorted(jobs))
                jobs[name] = (self._value(), jobs[name][1])
            case 2:
                jobs = self._jobs[rng.choice(sorted(p for p, each in self._jobs.items() if each))]
                name = rng.choice(sorted(jobs))
                jobs[name] = (jobs[name][0], rng.choice("abc"))
            case 3 | 4 if free := sorted(set(NAMES) - there):
                jobs[rng.choice(free)] = (self._value(), "a")
            case 5 if jobs:
                del jobs[rng.choice(sorted(jobs))]
            case 6 if jobs:
                name = rng.choice(sorted(jobs))
                self._jobs.setdefault(rng.choice(FILES), {})[name] = jobs.pop(name)
            case 7:
                self._broken[path] = rng.choice(BROKEN)
            case 8:
                self._broken.clear()
                self.tree.absent = ""
            case 9 if rng.random() < 0.3:
                self.tree.absent = "is not there"
        self.show()

    def mend(self) -> None:
        """Everything can be read."""
        self._broken.clear()
        self.tree.absent, self.tree.is_restless = "", False
        self.show()

    def show(self) -> None:
        """From now on a reader finds this. A commit names each state, so that a deletion tells
        what it was decided on."""
        files = {
            path: "---\n".join(manifest(name, *about) for name, about in jobs.items())
            for path, jobs in self._jobs.items()
            if jobs
        }
        readable = {p: jobs for p, jobs in self._jobs.items() if p not in self._broken}
        state = Said(
            {name: value for jobs in readable.values() for name, (value, _) in jobs.items()},
            {name: team for jobs in readable.values() for name, (_, team) in jobs.items()},
            not self._broken and not self.tree.absent,
        )
        self.tree.files = files | self._broken
        self.tree.commit = f"c{len(self.ledger.said):011d}"
        self.ledger.note(state, self.tree.commit)

    def _value(self) -> str:
        self._values += 1
        return f"v{self._values}"


class Host:
    """A place where a process looks after the directory."""

    def __init__(self, world: "SourcedWorld", name: str, rng: Random) -> None:
        self.name = name
        self._world = world
        self._rng = rng
        self._clock = world.new_clock(rng)
        self._lives = 0
        self.life: Life | None = None
        self.store: StoreClient | None = None

    def start(self) -> None:
        """Start a process, unless one runs."""
        if self.life is not None:
            return
        world = self._world
        self._lives += 1
        life = self.life = Life(world.loop, f"{self.name}.{self._lives}")
        faults = world.faults if not world.is_healed else world.no_faults
        rng = Random(self._rng.getrandbits(64))
        store = self.store = StoreClient(
            world.store, world.loop, self._clock, rng, faults, self._boundary
        )
        world.note("source-start", self.name)
        life.context.run(self._compose, store, life)

    def _compose(self, store: StoreClient, life: Life) -> None:
        cache, clock = Cache(), self._clock
        state = State(store, cache)
        limits = ControllerSettings(workers=1, sweep_seconds=10.0, backoff=Backoff(0.2, 30.0))
        manager = Manager(
            state,
            clock,
            Random(self._rng.getrandbits(64)),
            holder=life.name,
            informer=Informer(store, cache, clock, Random(self._rng.getrandbits(64))),
            settings=ManagerSettings(lease_name="source-prod", controllers=limits),
        )
        hands = StoreObjects(state, clock, self._world.ids(life.name))
        tree = self._world.directory.tree
        manager.add(SourceReconciler(state, clock, tree, hands, "prod", life.name), "Source")
        life.spawn(manager.run(), f"source {life.name}")

    def kill(self) -> None:
        """The process dies, wherever it is."""
        if self.life is not None:
            self._world.note("source-kill", self.name)
            life, self.life, self.store = self.life, None, None
            life.kill()

    async def _boundary(self, what: str) -> None:
        life = current_life()
        if life is None or life is not self.life:
            raise asyncio.CancelledError("the process is dead")
        if self._world.happens(Fault.CRASH_AT_WRITE, self._rng):
            self._world.note("crash-at", self.name, what)
            self.kill()
            self._world.later(self._rng.uniform(0.1, 15), self.start)
        if not life.is_alive:
            raise asyncio.CancelledError("the process died here")


class SourcedWorld(World):
    """See the module."""

    def __init__(self, seed: int, faults: Faults | None = None) -> None:
        super().__init__(seed, faults)
        self._rng = Random(f"source/{seed}")
        self.directory = Directory(Random(f"directory/{seed}"))
        self.hosts = [Host(self, f"s{n}", Random(f"{seed}/{n}")) for n in range(2)]
        self._before_mine = self.store.on_commit
        self.store.on_commit = self._committed

    def _begin(self) -> None:
        super()._begin()
        self._do(self._declare())
        for host in self.hosts:
            self.later(self._rng.uniform(0, 5), host.start)
        self._people = self.loop.create_task(self._live(), name="people", context=self.context)

    async def _declare(self) -> None:
        meta = ObjectMeta(name="prod", namespace="", uid="source-uid", generation=1)
        item = Source(metadata=meta, spec=SourceSpec(max_prune_percent=40))
        await self.store.commit([Put(item, 0)], Why("user:serve", "Applied"))

    async def _live(self) -> None:
        """Files are edited, and processes die."""
        while True:
            await self.clock.sleep(self._rng.expovariate(1 / 5.0))
            for _ in range(self._rng.choice((1, 1, 2, 5))):
                self.directory.edit()
            self.note("edit", "prod", self.directory.tree.commit)
            if self._rng.random() < 0.1:
                host = self._rng.choice(self.hosts)
                host.kill()
                self.later(self._rng.uniform(0.1, 20), host.start)
            self.directory.tree.is_restless = self._rng.random() < 0.05

    def _heal(self) -> None:
        self._people.cancel()
        super()._heal()
        self.directory.mend()
        for host in self.hosts:
            host.start()
            if host.store is not None:
                host.store.heal()

    def _settle(self) -> float:
        took = super()._settle()
        for _ in range(SETTLES_MAX):
            source = self.store.peek(SOURCE)
            assert isinstance(source, Source)
            freeze = source.status.freeze
            if freeze is None:
                break
            self._do(self._approve(source, freeze.digest))
            took = super()._settle()
        for text in self._drift():
            raise self._failure(Violation("drift", text, "prod"))
        self.directory.ledger.judge()
        for text in self.directory.ledger.wrong:
            raise self._failure(Violation("source", text, "prod"))
        return took

    async def _approve(self, source: Source, digest: str) -> None:
        approval = Approval(digest=digest, by="user:ann", at=self.clock.now())
        changed = source.but(spec=source.spec.but(approval=approval))
        put = Put(changed, source.metadata.resource_version)
        try:
            await self.store.commit([put], Why("user:ann", "PruneApproved"))
        except TransientError:
            return  # the source wrote its status meanwhile: at the next look

    def _drift(self) -> list[str]:
        """What is not as the directory says."""
        said = self.directory.ledger.said[-1].state
        source = self.store.peek(SOURCE)
        assert isinstance(source, Source)
        found = []
        if source.status.phase is not SourcePhase.SYNCED:
            found.append(f"the source is {source.status.phase}: {source.status.message}")
        jobs = {j.name: j for j in self._jobs()}
        over = {
            r.name: r.as_job()
            for r in self.store.everything("RetiredJob")
            if isinstance(r, RetiredJob)
        }
        found += [f"{name} is there" for name in jobs.keys() - said.values.keys()]
        for name, value in said.values.items():
            job = jobs.get(name) or over.get(name)
            if job is None or value_of(job) != value:
                found.append(f"{name} is not as declared: {value}, {job and value_of(job)}")
            elif name in jobs and job.metadata.labels["team"] != said.labels[name]:
                found.append(f"{name} has another label")
        return found

    def _jobs(self) -> list[Job]:
        return [
            item
            for item in self.store.everything("Job")
            if isinstance(item, Job) and item.name.startswith("f-")
        ]

    def _committed(
        self, writes: Sequence[Write], why: Why, results: Sequence[Resource | None]
    ) -> None:
        ledger = self.directory.ledger
        for write, new in zip(writes, results, strict=True):
            ref = write.resource.ref if isinstance(write, Put) else write.ref
            if ref.kind != "Job" or not ref.name.startswith("f-"):
                continue
            if isinstance(new, Job):
                ledger.saw(ref.name, why.actor, new)
            if why.reason == "Pruned":
                uid = new.metadata.uid if new is not None else ""
                ledger.saw_pruning(ref.name, uid, why.actor, self.clock.now(), why.message)
        if self._before_mine is not None:
            self._before_mine(writes, why, results)
        for text in ledger.wrong:
            self.fail(Violation("source", text, "prod"))

    def _end(self) -> None:
        for host in self.hosts:
            host.kill()
        super()._end()


def main() -> int:
    """Run many seeds."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.sourced")
    parser.add_argument("--seeds", type=at_least_one, default=100)
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    began, failed, runs, pruned, states = time.monotonic(), 0, 0, 0, 0
    for seed in range(asked.first, asked.first + asked.seeds):
        world = SourcedWorld(seed)
        try:
            world.run()
        except Failure as failure:
            failed += 1
            print(f"{failure}\n", flush=True)
        ledger = world.directory.ledger
        runs += sum(len(found) for found in ledger.runs.values())
        pruned, states = pruned + ledger.pruned, states + len(ledger.said)
    took = time.monotonic() - began
    print(
        f"{asked.seeds} seeds in {took:.0f} s, {failed} failed; {states} states of directories, "
        f"{runs} runs, {pruned} objects pruned"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
