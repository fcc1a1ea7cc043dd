"""Manifests go with their job, and with generations long past."""

from bacalhau_api.meta import ObjectMeta, OwnerReference, Resource
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.manifest import (
    Manifest,
    ManifestPart,
    ManifestPartSpec,
    ManifestSpec,
    manifest_name,
    manifest_part_name,
)
from bacalhau_controllers.manager import Manager
from bacalhau_controllers.manifest import ManifestReconciler
from bacalhau_controllers.manifest.reconciler import KINDS
from bacalhau_controllers.store import Delete, Put, Why
from tests.support.samples import Bench, at, job
from tests.support.simclock import SimLoop


def _meta(of: Job, name: str) -> ObjectMeta:
    owner = OwnerReference(kind="Job", name=of.name, uid=of.metadata.uid)
    return ObjectMeta(
        name=name, uid=f"uid-of-{name}", owner_references=(owner,), creation_timestamp=at(0)
    )


def manifest(of: Job, generation: int = 1, digest: str = "sha256:one") -> Manifest:
    uid = of.metadata.uid
    return Manifest(
        metadata=_meta(of, manifest_name(of.name, uid, generation, 0)),
        spec=ManifestSpec(job=of.name, job_uid=uid, generation=generation, input=0, digest=digest),
    )


def part(of: Job, generation: int = 1, digest: str = "sha256:one") -> ManifestPart:
    uid = of.metadata.uid
    name = manifest_part_name(manifest_name(of.name, uid, generation, 0), digest, 0)
    return ManifestPart(
        metadata=_meta(of, name),
        spec=ManifestPartSpec(
            job=of.name, job_uid=uid, generation=generation, input=0, digest=digest, number=0,
            data="",
        ),
    )  # fmt: skip


def run(bench: Bench) -> Manager:
    manager = Manager(bench.state, bench.clock, bench.rng)
    for kind in KINDS:
        manager.add(ManifestReconciler(bench.state, kind), kind)
    bench.loop.create_task(manager.run(), name="manager")
    bench.loop.run_until(manager.is_leader.is_set)
    return manager


def left(bench: Bench, *things: Resource) -> list[str]:
    bench.loop.advance(5)
    return [thing.name for thing in things if bench.stored(thing) is not None]


def test_they_go_with_their_job() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        mine, other = job("a"), job("b")
        kept = [manifest(other), part(other)]
        gone = [manifest(mine), part(mine)]
        bench.put(mine, other, *kept, *gone)
        manager = run(bench)
        assert left(bench, *kept, *gone) == [thing.name for thing in (*kept, *gone)]
        found = bench.stored(mine)
        assert found
        delete = [Delete(found.ref, found.metadata.resource_version)]
        loop.run_until_complete(bench.store.commit(delete, Why("user", "Test")))
        assert left(bench, *kept, *gone) == [thing.name for thing in kept]
        loop.run_until_complete(manager.close())


def test_what_was_proposed_too_late_goes_and_what_is_on_its_way_stays() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        mine = job("a")
        late, taken = part(mine, digest="sha256:two"), part(mine)
        pinned = manifest(mine)
        coming = part(mine, generation=2)
        bench.put(mine, late, taken, pinned, coming)
        manager = run(bench)
        assert left(bench, late, taken, pinned, coming) == [taken.name, pinned.name, coming.name]
        loop.run_until_complete(manager.close())


def test_generations_long_past() -> None:
    with SimLoop() as loop:
        bench = Bench(loop)
        mine = job("a")
        old = [manifest(mine), part(mine)]
        newer = [manifest(mine, 2), part(mine, 2)]
        bench.put(mine, *old, *newer)
        manager = run(bench)
        assert len(left(bench, *old, *newer)) == 4
        found = bench.stored(mine)
        assert isinstance(found, Job)
        risen = found.but(metadata=found.metadata.but(generation=4))
        put = [Put(risen, found.metadata.resource_version)]
        loop.run_until_complete(bench.store.commit(put, Why("user", "Test")))
        assert left(bench, *old, *newer) == [thing.name for thing in newer]
        loop.run_until_complete(manager.close())
