"""Namespaces in a directory: before what is in them, and deleted after it."""

from bacalhau_api.meta import Ref
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.namespace import Namespace
from bacalhau_controllers.gitops import StoreObjects, restore
from tests.support.gitops import Yard, manifest

PLACE = Ref("Namespace", "", "team")


def space(executions: int = 5, cpu: str = "2", **notes: str) -> str:
    marks = "".join(f'bacalhau.org/{key}: "{value}"' for key, value in notes.items())
    return (
        "apiVersion: bacalhau.org/v1\nkind: Namespace\n"
        f"metadata: {{name: team, annotations: {{{marks}}}}}\n"
        f"spec: {{quota: {{executions: {executions}}}, defaults: {{resources: {{cpu: '{cpu}'}}}}}}\n"
    )


def stored(yard: Yard) -> Namespace | None:
    found = yard.state.cache.get(PLACE)
    assert found is None or isinstance(found, Namespace)
    return found


def cpu_of(yard: Yard, name: str) -> int:
    return yard.job(name).spec.task.resources.cpu_millis


async def test_a_namespace_is_made_before_the_jobs_that_get_its_defaults() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files = {"a.yaml": manifest("a", namespace="team"), "z.yaml": space()}
    assert (await yard.sync()).phase == "Synced"
    assert cpu_of(yard, "a") == 2000
    tree.files["z.yaml"] = space(executions=7, cpu="4")
    tree.files["b.yaml"] = manifest("b", namespace="team")
    assert (await yard.sync()).phase == "Synced"
    found = stored(yard)
    assert found is not None
    assert (found.spec.quota.executions, found.metadata.generation) == (7, 2)
    assert (cpu_of(yard, "a"), cpu_of(yard, "b")) == (2000, 4000)
    version = found.metadata.resource_version
    await yard.restart()
    await yard.sync()
    assert stored(yard) == found
    assert found.metadata.resource_version == version


async def test_jobs_wait_for_a_namespace_that_cannot_be_made() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files = {
        "1.yaml": manifest("a", namespace="team"),
        "2.yaml": space(),
        "3.yaml": space(9),
        "4.yaml": manifest("free"),
    }
    status = await yard.sync()
    assert set(yard.jobs()) == {"free"}
    assert (status.phase, status.problems[0].reason) == ("Degraded", "DeclaredTwice")
    assert status.counts.waiting == 1
    del tree.files["3.yaml"]
    assert (await yard.sync()).phase == "Synced"
    assert cpu_of(yard, "a") == 2000


async def test_a_namespace_that_somebody_else_made_is_adopted_only_if_it_is_said() -> None:
    yard = Yard()
    tree = await yard.add_source()
    await yard.user_applies(space(executions=1))
    tree.files = {"a.yaml": manifest("a", namespace="team"), "z.yaml": space()}
    status = await yard.sync()
    assert status.problems[0].reason == "NotAdopted"
    assert "a" in yard.jobs(), "it is there, so nobody has to wait for it"
    before = stored(yard)
    assert before is not None
    assert before.spec.quota.executions == 1
    tree.files["z.yaml"] = space(executions=1, adopt="true")
    assert (await yard.sync()).phase == "Synced"
    after = stored(yard)
    assert after is not None
    assert after.metadata.uid == before.metadata.uid
    assert after.metadata.annotations["bacalhau.org/owner"] == "source/prod"


async def test_a_namespace_is_deleted_after_the_jobs_in_it() -> None:
    yard = Yard()
    tree = await yard.add_source(max_prune_percent=100)
    tree.files = {
        "a.yaml": manifest("a", namespace="team"),
        "z.yaml": space(),
        "k.yaml": manifest("k"),
    }
    await yard.sync()
    del tree.files["a.yaml"], tree.files["z.yaml"]
    await yard.once()
    assert stored(yard) is not None
    assert yard.jobs().keys() == {"k"}
    status = yard.status()
    assert "still has the jobs a" in status.message
    assert (status.phase, status.revision_applied == status.revision_seen) == ("Progressing", False)
    assert (await yard.sync()).phase == "Synced"
    assert stored(yard) is None


async def test_a_namespace_that_has_others_jobs_stays_and_says_so() -> None:
    yard = Yard()
    tree = await yard.add_source(max_prune_percent=100)
    tree.files = {"z.yaml": space(), "k.yaml": manifest("k")}
    await yard.sync()
    for name in "abcde":
        await yard.user_applies(manifest(name, namespace="team"))
    del tree.files["z.yaml"]
    status = await yard.sync()
    assert stored(yard) is not None
    assert status.message == (
        "Namespace team is deleted once nothing is in it: it still has the jobs a, b, c and 2 more"
    )
    assert status.waiting is not None
    assert (status.waiting.what, status.waiting.mover) == (
        "EmptyNamespace", "whoever has the jobs in it",
    )  # fmt: skip
    watch = yard.reconcilers["prod"].watches["Job"]
    last = yard.job("a")
    assert list(watch(last, None)), "the end of one of them asks for a look"
    assert not list(watch(last, last.with_meta(labels={"a": "b"})))
    for name in "abcde":
        await yard.drop(Ref("Job", "team", name))
    assert (await yard.sync()).phase == "Synced"
    assert stored(yard) is None
    back = await restore(yard.state, yard.clock, yard.ids, yard.source(), PLACE, "user:ann")
    assert isinstance(back, Namespace)
    assert back.spec.quota.executions == 5


async def test_a_job_that_comes_between_keeps_the_namespace() -> None:
    """Decided when it was empty, written when it is not any more."""
    yard = Yard()
    tree = await yard.add_source(max_prune_percent=100)
    tree.files = {"z.yaml": space(), "k.yaml": manifest("k")}
    await yard.sync()
    claim = yard.claims()["team"]
    await yard.user_applies(manifest("late", namespace="team"))
    hands = StoreObjects(yard.state, yard.clock, yard.ids)
    (done,) = await hands.prune(yard.source(), [claim], "")
    assert (done.outcome, done.error) == ("unchanged", None)
    assert stored(yard) is not None
    assert isinstance(yard.job("late"), Job)
