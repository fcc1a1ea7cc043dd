"""A source with everything around it in memory: a store that can die before or after any write, a
directory that is a dict, and someone who finishes deletions as the job reconciler does."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

from bacalhau.gitops.parse import Parsed, digest_of, parse_file
from bacalhau_api.jobfile import parse_manifests
from bacalhau_api.meta import ObjectMeta, Ref, Resource
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.source import Approval, Claim, Source, SourceSpec, SourceStatus
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.contract import Result
from bacalhau_controllers.gitops import (
    ClaimReconciler,
    SourceReconciler,
    SourceSettings,
    StoreObjects,
    TreeView,
)
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Changed, Delete, Put, Synced, Why, Write
from tests.support.stores import ManualClock

TEST = Why("user:test", "Arranged")


class Ids:
    """Counted, so that runs are repeatable."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def uid(self) -> str:
        """See contract.Ids."""
        return f"{next(self._numbers):012x}" + "0" * 20


class KilledError(Exception):
    """The process was killed here."""


class MortalStore(MemoryStore):
    """Kills whoever writes when `lives` writes are used up: before the write, or after it."""

    lives: int | None = None
    kills_after = False

    async def commit(self, writes: Sequence[Write], why: Why) -> tuple[Resource | None, ...]:
        """See Store.commit."""
        if self.lives is None or why is TEST:
            return await super().commit(writes, why)
        if self.lives <= 0 and not self.kills_after:
            raise KilledError
        self.lives -= 1
        done = await super().commit(writes, why)
        if self.lives < 0:
            raise KilledError
        return done


class DictTree:
    """Files by path; None as content stands for a file that cannot be read."""

    path = "/fleet"

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.absent = ""
        self.is_restless = False
        self.mounts: tuple[str, ...] = ()
        self.commit = ""
        self.reads = 0
        self._parsed: dict[tuple[str, str], Parsed] = {}

    async def read(self, spec: SourceSpec) -> TreeView:
        """See Tree."""
        self.reads += 1
        await asyncio.sleep(0)
        if self.is_restless:
            return TreeView(absent="keeps changing", absent_reason="Unsettled")
        if self.absent:
            return TreeView(absent=self.absent, absent_reason="Missing")
        found = [self._parse(path, self.files[path]) for path in sorted(self.files)]
        return TreeView(
            revision=digest_of(self.files),
            commit=self.commit,
            files=len(self.files),
            declared=tuple(item for one in found for item in one.declared),
            problems=tuple(p for one in found for p in one.problems),
            mounts=self.mounts,
        )

    def _parse(self, path: str, text: str) -> Parsed:
        if (path, text) not in self._parsed:
            self._parsed[path, text] = parse_file(path, text.encode())
        return self._parsed[path, text]

    @asynccontextmanager
    async def watching(self, wake: Callable[[], None]) -> AsyncIterator[None]:
        """See Tree."""
        yield


def manifest(name: str, image: str = "one", *, namespace: str = "", **notes: str) -> str:
    """A batch job that does nothing. `image` is what a run depends on; `notes` become annotations
    under bacalhau.org/, `team` a label."""
    label = notes.pop("team", "")
    lines = ["apiVersion: bacalhau.org/v1", "kind: Job", "metadata:", f"  name: {name}"]
    lines += [f"  namespace: {namespace}"] if namespace else []
    lines += [f"  labels: {{team: {label}}}"] if label else []
    if notes:
        lines += ["  annotations:"]
        lines += [f'    bacalhau.org/{key}: "{value}"' for key, value in notes.items()]
    lines += ["spec:", "  type: batch", "  tasks:", "    - name: main"]
    lines += ["      engine: {type: docker, params: {image: " + image + "}}"]
    return "\n".join(lines) + "\n"


class Yard:
    """The store, the clock, one or more sources."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = MortalStore(self.clock, strict=True)
        self.ids = Ids()
        self.trees: dict[str, DictTree] = {}
        self.state = State(self.store, Cache())
        self.reconcilers: dict[str, SourceReconciler] = {}

    @property
    def now(self) -> datetime:
        """The time."""
        return self.clock.now()

    async def add_source(self, name: str = "prod", /, **spec: object) -> DictTree:
        """A source with an empty directory."""
        meta = ObjectMeta(name=name, namespace="", uid=self.ids.uid(), generation=1)
        await self.put(Source(metadata=meta, spec=SourceSpec.model_validate(spec)))
        self.trees[name] = DictTree()
        self.start(name)
        return self.trees[name]

    def start(self, name: str = "prod") -> None:
        """A reconciler that remembers nothing."""
        self.reconcilers[name] = SourceReconciler(
            self.state,
            self.clock,
            self.trees[name],
            StoreObjects(self.state, self.clock, self.ids),
            name,
            "test",
            SourceSettings(pass_seconds=0.0),
        )

    async def restart(self) -> None:
        """As after kill -9: nothing is left but what the store has."""
        cache = Cache()
        async with self.store.watch() as events:
            async for event in events:
                cache.apply(event)
                if isinstance(event, Synced):
                    break
        self.state = State(self.store, cache)
        for name in self.trees:
            self.start(name)

    # -- objects ---------------------------------------------------------------------------------

    async def put(self, *items: Resource) -> None:
        """Store objects, whatever is there."""
        for item in items:
            found = await self.store.get(item.ref)
            expect = found.metadata.resource_version if found else 0
            (stored,) = await self.store.commit([Put(item, expect)], TEST)
            assert stored is not None
            self.state.cache.learn(Changed(stored))

    async def drop(self, ref: Ref) -> None:
        """Remove an object."""
        found = await self.store.get(ref)
        assert found is not None
        await self.state.commit([Delete(ref, found.metadata.resource_version)], TEST)

    def jobs(self) -> dict[str, Job]:
        """All that are not being deleted."""
        return {
            item.name: item
            for item in self.state.cache.list("Job")
            if isinstance(item, Job) and not item.is_deleting
        }

    def job(self, name: str) -> Job:
        """One of them."""
        return self.jobs()[name]

    def images(self) -> dict[str, str]:
        """What each job runs."""
        return {
            name: str(job.spec.task.engine.params["image"]) for name, job in self.jobs().items()
        }

    def claims(self) -> dict[str, Claim]:
        """All claims by the name of their object."""
        found = self.state.cache.list("Claim")
        return {c.spec.name: c for c in found if isinstance(c, Claim)}

    def source(self, name: str = "prod") -> Source:
        """As stored."""
        found = self.state.cache.get(Ref("Source", "", name))
        assert isinstance(found, Source)
        return found

    def status(self, name: str = "prod") -> SourceStatus:
        """What it tells."""
        return self.source(name).status

    async def user_applies(self, text: str) -> None:
        """As `bacalhau apply` by hand, for an object that does not exist."""
        (document,) = parse_manifests(text)
        await self.put(document.resource.with_meta(uid=self.ids.uid(), generation=1))

    async def change_spec(self, name: str = "prod", **changes: object) -> None:
        """As an operator."""
        source = self.source(name)
        await self.put(source.but(spec=source.spec.but(**changes)))

    async def approve(self, name: str = "prod") -> None:
        """What is held back may go."""
        freeze = self.status(name).freeze
        assert freeze is not None
        assert freeze.digest
        await self.change_spec(name, approval=Approval(digest=freeze.digest, at=self.now))

    async def finish(self, name: str, phase: str = "Completed") -> None:
        """The job ends."""
        job = self.job(name)
        status = type(job.status).model_validate(
            {"phase": job.status.phase.__class__(phase),
             "observed_generation": job.metadata.generation, "finished_at": self.now}
        )  # fmt: skip
        await self.put(job.but(status=status))

    # -- what happens ----------------------------------------------------------------------------

    async def sync(self, name: str = "prod", *, passes_max: int = 12) -> SourceStatus:
        """Passes of one source, with deletions finished in between, until nothing is written any
        more."""
        for _ in range(passes_max):
            before = await self._revision()
            result = await self.once(name)
            await self.finish_deletions()
            is_done = result.requeue_after is None or self._is_far(name, result)
            if before == await self._revision() and is_done:
                return self.status(name)
        raise AssertionError(f"still writing after {passes_max} passes: {self.status(name)}")

    def _is_far(self, name: str, result: Result) -> bool:
        return (result.requeue_after or 0) > 1

    async def once(self, name: str = "prod") -> Result:
        """One pass."""
        return await self.reconcilers[name].reconcile(Ref("Source", "", name))

    async def finish_deletions(self) -> None:
        """What the job reconciler does in the end."""
        for item in self.state.cache.list("Job"):
            if item.is_deleting:
                await self.drop(item.ref)

    async def tidy_claims(self) -> None:
        """One look at every claim."""
        reconciler = ClaimReconciler(self.state, self.clock)
        for claim in self.state.cache.list("Claim"):
            await reconciler.reconcile(claim.ref)

    async def pass_time(self, delta: timedelta) -> None:
        """Let the clock run."""
        await self.clock.sleep(delta.total_seconds())

    async def _revision(self) -> int:
        return (await self.store.list()).cursor.revision


def with_label(job: Job, **labels: str) -> Job:
    """As a user would edit it."""
    return job.with_meta(labels={**job.metadata.labels, **labels})


def with_image(job: Job, image: str) -> Job:
    """The same with another command."""
    task = job.spec.task
    engine = task.engine.but(params={**task.engine.params, "image": image})
    spec = job.spec.but(tasks=(task.but(engine=engine),))
    return job.but(spec=spec).with_meta(generation=job.metadata.generation + 1)


__all__ = ["DictTree", "KilledError", "Yard", "manifest", "with_image", "with_label"]
