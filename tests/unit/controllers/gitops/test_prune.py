"""What is deleted, what is held back, and what can be brought back."""

from datetime import timedelta

import pytest

from bacalhau_api.errors import ConflictError, NotFoundError
from bacalhau_api.meta import ObjectMeta, Ref
from bacalhau_api.v1.job import SlotCounts
from bacalhau_api.v1.node import Membership, Node, NodeSpec
from bacalhau_api.v1.source import ClaimPhase, SourcePhase
from bacalhau_controllers.gitops import restore
from bacalhau_controllers.job import JobReconciler
from tests.support.gitops import DictTree, KilledError, Yard, manifest


async def filled(count: int, **spec: object) -> tuple[Yard, DictTree]:
    yard = Yard()
    tree = await yard.add_source("prod", **spec)
    tree.files = {f"{i}.yaml": manifest(f"j{i}") for i in range(count)}
    await yard.sync()
    assert len(yard.jobs()) == count
    return yard, tree


@pytest.mark.parametrize(
    ("count", "removed", "percent", "goes"),
    [
        pytest.param(10, 2, 20, True, id="a fifth"),
        pytest.param(10, 3, 20, False, id="more than a fifth"),
        pytest.param(3, 1, 20, True, id="one always"),
        pytest.param(3, 2, 20, False, id="two of three"),
        pytest.param(4, 1, 0, True, id="one even at 0 %"),
        pytest.param(4, 3, 100, True, id="everything but the last at 100 %"),
    ],
)
async def test_more_than_a_share_waits(count: int, removed: int, percent: int, goes: bool) -> None:
    yard, tree = await filled(count, max_prune_percent=percent)
    for i in range(removed):
        del tree.files[f"{i}.yaml"]
    status = await yard.sync()
    assert len(yard.jobs()) == (count - removed if goes else count)
    if not goes:
        assert status.freeze
        assert (status.phase, status.freeze.reason) == ("Frozen", "TooMany")
        assert status.freeze.count == removed
        assert status.waiting
        assert status.waiting.mover == "user"


async def test_an_approval_covers_what_was_shown_and_nothing_else() -> None:
    yard, tree = await filled(10)
    for i in range(4):
        del tree.files[f"{i}.yaml"]
    await yard.sync()
    await yard.approve()
    for i in range(4, 7):  # meanwhile, more files vanish
        del tree.files[f"{i}.yaml"]
    status = await yard.sync()
    assert len(yard.jobs()) == 10  # what was approved is not what would be deleted now
    assert status.freeze
    await yard.approve()
    status = await yard.sync()
    assert sorted(yard.jobs()) == ["j7", "j8", "j9"]
    assert (status.phase, status.freeze, status.approved) == ("Synced", None, ())


async def test_files_that_come_back_end_the_wait() -> None:
    yard, tree = await filled(10)
    files = dict(tree.files)
    tree.files = {"9.yaml": files["9.yaml"]}
    assert (await yard.sync()).phase is SourcePhase.FROZEN
    tree.files = files
    status = await yard.sync()
    assert (status.phase, status.freeze, len(yard.jobs())) == ("Synced", None, 10)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("lives", range(7))
async def test_an_approved_deletion_survives_kills(lives: int, after: bool) -> None:
    """Half done, the rest is no longer the set that was approved; it is remembered all the same."""
    yard, tree = await filled(6)
    tree.files = {"0.yaml": tree.files["0.yaml"]}
    await yard.sync()
    await yard.approve()
    yard.store.lives, yard.store.kills_after = lives, after
    try:
        await yard.sync()
    except (KilledError, BaseExceptionGroup):
        pass
    yard.store.lives = None
    await yard.restart()
    await yard.finish_deletions()
    status = await yard.sync()
    assert list(yard.jobs()) == ["j0"]
    assert (status.phase, status.approved) == ("Synced", ())


async def test_an_emptied_directory_deletes_nothing_until_told() -> None:
    yard, tree = await filled(2, max_prune_percent=100)
    tree.files = {}
    status = await yard.sync()
    assert len(yard.jobs()) == 2
    assert status.freeze
    assert (status.freeze.reason, status.freeze.count) == ("Emptied", 2)
    await yard.approve()
    assert (await yard.sync()).phase is SourcePhase.SYNCED
    assert yard.jobs() == {}


async def test_the_last_object_of_a_directory_is_not_special() -> None:
    yard, tree = await filled(1)
    tree.files = {"note.yaml": "# nothing here now\n"}
    status = await yard.sync()
    assert status.freeze
    assert status.freeze.reason == "Emptied"
    assert len(yard.jobs()) == 1


async def test_a_missing_directory_freezes_and_cannot_be_approved() -> None:
    yard, tree = await filled(3)
    tree.absent = "/fleet is not there"
    status = await yard.sync()
    assert len(yard.jobs()) == 3
    assert status.freeze
    assert (status.freeze.reason, status.freeze.digest) == ("Missing", "")
    assert status.message.endswith("/fleet is not there")
    tree.absent = ""
    assert (await yard.sync()).phase is SourcePhase.SYNCED


async def test_an_unmounted_disk_freezes() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files = {f"disk/{i}.yaml": manifest(f"d{i}") for i in range(1)}
    tree.files |= {f"{i}.yaml": manifest(f"j{i}") for i in range(9)}
    tree.mounts = ("disk",)
    await yard.sync()
    del tree.files["disk/0.yaml"]  # within what may be pruned
    tree.mounts = ()
    status = await yard.sync()
    assert len(yard.jobs()) == 10
    assert status.freeze
    assert status.freeze.reason == "Unmounted"
    tree.mounts, tree.files["disk/0.yaml"] = ("disk",), manifest("d0")
    assert (await yard.sync()).phase is SourcePhase.SYNCED
    tree.mounts, tree.files = (), {k: v for k, v in tree.files.items() if "disk" not in k}
    await yard.sync()
    await yard.approve()
    status = await yard.sync()
    assert (status.phase, status.mounts, len(yard.jobs())) == ("Synced", (), 9)


@pytest.mark.parametrize("text", ["", " \n", "kind: [", "kind: Job\n", "\x00", "{}"])
async def test_a_broken_file_freezes_deletions_but_nothing_else(text: str) -> None:
    yard, tree = await filled(6)
    tree.files["1.yaml"] = text
    del tree.files["2.yaml"]
    tree.files["new.yaml"] = manifest("new")
    tree.files["3.yaml"] = manifest("j3", "two")
    status = await yard.sync()
    assert sorted(yard.jobs()) == ["j0", "j1", "j2", "j3", "j4", "j5", "new"]
    assert yard.images()["j3"] == "two"
    assert status.freeze
    assert (status.freeze.reason, status.freeze.objects) == ("Broken", ("Job default/j2",))
    assert "1.yaml" in status.freeze.message
    assert {p.file for p in status.problems} == {"1.yaml"}
    tree.files["1.yaml"] = manifest("j1")
    assert (await yard.sync()).phase is SourcePhase.SYNCED
    assert "j2" not in yard.jobs()


async def test_a_broken_file_alone_is_no_reason_to_talk_of_deletions() -> None:
    yard, tree = await filled(3)
    tree.files["1.yaml"] = ": :"
    status = await yard.sync()
    assert (status.phase, status.freeze) == ("Degraded", None)
    assert len(yard.jobs()) == 3


@pytest.mark.parametrize("where", ["file", "object", "source"])
async def test_retained_objects_stay(where: str) -> None:
    yard = Yard()
    tree = await yard.add_source(prune="retain" if where == "source" else "delete")
    tree.files = {"a.yaml": manifest("a", **({"prune": "retain"} if where == "file" else {}))}
    tree.files["b.yaml"] = manifest("b")
    await yard.sync()
    del tree.files["a.yaml"]
    if where == "object":
        job = yard.job("a")
        await yard.put(
            job.with_meta(annotations=job.metadata.annotations | {"bacalhau.org/prune": "retain"})
        )
    status = await yard.sync()
    assert (status.phase, sorted(yard.jobs())) == ("Synced", ["a", "b"])
    assert "a" not in yard.claims()


async def test_a_pruned_job_can_be_restored_for_a_day() -> None:
    yard, tree = await filled(6)
    text = tree.files.pop("1.yaml")
    await yard.sync()
    ref = Ref("Job", "default", "j1")
    back = await restore(yard.state, yard.clock, yard.ids, yard.source(), ref, "user:ann")
    assert yard.job("j1").spec == back.spec  # type: ignore[attr-defined]
    assert yard.claims()["j1"].status.phase is ClaimPhase.RESTORED
    status = await yard.sync()  # it stays though the directory does not declare it
    assert (status.phase, len(yard.jobs())) == ("Synced", 6)
    tree.files["1.yaml"] = text
    await yard.sync()
    assert yard.job("j1").metadata.uid == back.metadata.uid
    assert yard.claims()["j1"].is_held
    del tree.files["1.yaml"]
    await yard.sync()
    assert "j1" not in yard.jobs()
    await yard.pass_time(timedelta(days=1, seconds=1))
    await yard.tidy_claims()
    with pytest.raises(NotFoundError):
        await restore(yard.state, yard.clock, yard.ids, yard.source(), ref, "user:ann")


async def test_what_cannot_be_restored() -> None:
    yard, tree = await filled(6)
    ref = Ref("Job", "default", "j1")

    async def bring_back() -> None:
        await restore(yard.state, yard.clock, yard.ids, yard.source(), ref, "user:ann")

    with pytest.raises(NotFoundError, match="was not pruned"):
        await bring_back()
    await yard.finish("j1")
    del tree.files["1.yaml"]
    await yard.once()
    with pytest.raises(ConflictError) as going:
        await bring_back()
    assert "still being deleted" in going.value.hint
    await yard.finish_deletions()
    await yard.user_applies(manifest("j1", "theirs"))
    with pytest.raises(ConflictError, match="exists"):
        await bring_back()


async def test_a_finished_job_is_restored_as_it_ended_and_does_not_run() -> None:
    yard, tree = await filled(6)
    await yard.finish("j1")
    ended = yard.job("j1")
    ended = ended.but(status=ended.status.but(slots=SlotCounts(total=1, succeeded=1, delivered=1)))
    await yard.put(ended)
    text = tree.files.pop("1.yaml")
    await yard.sync()
    ref = Ref("Job", "default", "j1")
    record = Ref("RetiredJob", "default", "j1")
    assert await yard.store.get(record) is not None
    back = await restore(yard.state, yard.clock, yard.ids, yard.source(), ref, "user:ann")
    assert await yard.store.get(record) is None
    await yard.put(
        Node(
            metadata=ObjectMeta(name="edge", namespace=""),
            spec=NodeSpec(membership=Membership.APPROVED),
        )
    )
    reconciler = JobReconciler(yard.state, yard.clock)
    for _ in range(3):
        await reconciler.reconcile(ref)
    assert yard.state.cache.list("Execution") == ()
    job = yard.job("j1")
    assert (job.metadata.uid, job.spec) == (back.metadata.uid, ended.spec)
    assert job.metadata.generation == ended.metadata.generation
    assert job.metadata.creation_timestamp == ended.metadata.creation_timestamp
    assert (job.status.phase, job.status.finished_at) == ("Completed", ended.status.finished_at)
    assert job.status.slots == ended.status.slots
    tree.files["1.yaml"] = text  # the same file again: the source's, and still over
    await yard.sync()
    await reconciler.reconcile(ref)
    assert yard.claims()["j1"].is_held
    assert yard.state.cache.list("Execution") == ()
    tree.files["1.yaml"] = manifest("j1", "two")  # another run
    await yard.sync()
    assert yard.job("j1").metadata.generation == ended.metadata.generation + 1


async def test_a_file_that_goes_and_returns_does_not_run_a_finished_job_again() -> None:
    """As checking out another branch and coming back."""
    yard, tree = await filled(6)
    await yard.finish("j1")
    text = tree.files.pop("1.yaml")
    await yard.sync()
    assert "j1" not in yard.jobs()
    tree.files["1.yaml"] = text
    status = await yard.sync()
    assert (status.phase, "j1" in yard.jobs()) == ("Synced", False)
    tree.files["1.yaml"] = text.replace("one", "two")
    await yard.sync()
    assert yard.images()["j1"] == "two"


async def test_a_finished_job_is_not_started_again_by_a_restart_or_resync() -> None:
    yard, _ = await filled(2)
    await yard.finish("j1")
    version = yard.job("j1").metadata.resource_version
    await yard.restart()
    await yard.sync()
    assert yard.job("j1").metadata.resource_version == version
