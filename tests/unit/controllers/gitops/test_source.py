"""The reconciler of sources over a store in memory: what a directory makes of objects."""

from datetime import timedelta

import pytest

from bacalhau_api.meta import Ref
from bacalhau_api.provenance import owner_of, provenance_of
from bacalhau_api.v1.source import SourcePhase, Suspension
from tests.support.gitops import Yard, manifest, with_image, with_label


async def test_files_become_objects_and_nothing_is_written_twice() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files = {
        "a.yaml": manifest("a"),
        "sub/b.yaml": manifest("b") + "---\n" + manifest("c"),
    }
    tree.commit = "c0ffee" * 6
    status = await yard.sync()
    assert yard.images() == {"a": "one", "b": "one", "c": "one"}
    assert (status.phase, status.counts.objects, status.counts.files) == ("Synced", 3, 2)
    assert status.revision_applied == status.revision_seen != ""
    assert {c.spec.file for c in yard.claims().values()} == {"a.yaml", "sub/b.yaml"}
    job = yard.job("b")
    assert owner_of(job) == "source/prod"
    assert provenance_of(job).source == "sub/b.yaml"
    history = await yard.store.history(job.ref)
    assert [(e.actor, e.reason) for e in history] == [("source/prod", "Created")]
    assert "sub/b.yaml" in history[0].message
    assert "c0ffeec0ffee" in history[0].message
    before = (await yard.store.list()).cursor
    await yard.restart()
    await yard.sync()
    assert (await yard.store.list()).cursor == before


async def test_what_an_edit_means_for_runs() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files["a.yaml"] = manifest("a")
    await yard.sync()
    uid = yard.job("a").metadata.uid
    tree.files["a.yaml"] = manifest("a", team="data")
    await yard.sync()
    assert yard.job("a").metadata.generation == 1
    assert yard.job("a").metadata.labels == {"team": "data"}
    tree.files["a.yaml"] = manifest("a", "two", team="data")
    await yard.sync()
    assert (yard.job("a").metadata.generation, yard.job("a").metadata.uid) == (2, uid)


async def test_a_renamed_file_leaves_its_object_alone() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files["a.yaml"] = manifest("a")
    await yard.sync()
    version = yard.job("a").metadata.resource_version
    tree.files = {"moved/z.yaml": tree.files["a.yaml"]}
    status = await yard.sync()
    assert status.phase is SourcePhase.SYNCED
    assert yard.job("a").metadata.resource_version == version
    assert yard.claims()["a"].spec.file == "moved/z.yaml"


async def test_what_a_user_changes_or_deletes_is_put_back() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files = {"a.yaml": manifest("a"), "b.yaml": manifest("b")}
    await yard.sync()
    uid = yard.job("b").metadata.uid
    await yard.put(with_image(yard.job("a"), "hacked"))
    await yard.drop(yard.job("b").ref)
    await yard.sync()
    assert yard.images() == {"a": "one", "b": "one"}
    assert yard.job("b").metadata.uid not in ("", uid)
    assert yard.claims()["b"].spec.uid == yard.job("b").metadata.uid


async def test_a_removed_file_deletes_its_object() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files = {f"{n}.yaml": manifest(n) for n in "abcde"}
    await yard.sync()
    del tree.files["b.yaml"]
    status = await yard.sync()
    assert sorted(yard.jobs()) == ["a", "c", "d", "e"]
    assert status.phase is SourcePhase.SYNCED
    last = (await yard.store.history(Ref("Job", "default", "b")))[-2]
    assert (last.actor, last.reason) == ("source/prod", "Pruned")


async def test_only_the_very_object_that_was_applied_is_deleted() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files = {"a.yaml": manifest("a"), "b.yaml": manifest("b")}
    await yard.sync()
    # The name now belongs to an object that somebody else made.
    await yard.drop(yard.job("b").ref)
    await yard.user_applies(manifest("b", "theirs"))
    del tree.files["b.yaml"]
    status = await yard.sync()
    assert yard.images() == {"a": "one", "b": "theirs"}
    assert status.phase is SourcePhase.SYNCED
    assert "b" not in yard.claims()


async def test_a_copied_mark_is_no_claim() -> None:
    """Another tool copies all annotations of an object to one of its own: that is not pruned."""
    yard = Yard()
    tree = await yard.add_source()
    tree.files = {"a.yaml": manifest("a"), "b.yaml": manifest("b")}
    await yard.sync()
    twin = yard.job("a").with_meta(name="twin", uid=yard.ids.uid())
    await yard.put(twin)
    await yard.sync()
    assert sorted(yard.jobs()) == ["a", "b", "twin"]


async def test_an_object_of_somebody_else_is_taken_over_only_on_request() -> None:
    yard = Yard()
    tree = await yard.add_source()
    await yard.user_applies(manifest("a", "theirs"))
    tree.files["jobs/a.yaml"] = manifest("a", "ours")
    status = await yard.sync()
    assert yard.images() == {"a": "theirs"}
    (found,) = status.problems
    assert (found.file, found.reason, status.phase) == ("jobs/a.yaml", "NotAdopted", "Degraded")
    assert "bacalhau.org/adopt" in found.hint
    tree.files["jobs/a.yaml"] = manifest("a", "ours", adopt="true")
    status = await yard.sync()
    assert (yard.images(), status.phase) == ({"a": "ours"}, "Synced")
    assert yard.claims()["a"].status.outcome == "adopted"


async def test_two_sources_that_claim_one_object_are_both_named() -> None:
    yard = Yard()
    prod, test = await yard.add_source("prod"), await yard.add_source("test")
    prod.files["p.yaml"] = manifest("a", "prod")
    test.files["t.yaml"] = manifest("a", "test", adopt="true")
    await yard.sync("prod")
    status = await yard.sync("test")
    assert yard.images() == {"a": "prod"}
    (found,) = status.problems
    assert found.reason == "ClaimedTwice"
    assert "source prod (p.yaml)" in found.message
    assert "source test (t.yaml)" in found.message
    assert (await yard.sync("prod")).phase is SourcePhase.SYNCED


async def test_an_object_is_handed_over_by_retaining_it() -> None:
    yard = Yard()
    prod, test = await yard.add_source("prod"), await yard.add_source("test")
    prod.files = {"p.yaml": manifest("a", prune="retain"), "q.yaml": manifest("q")}
    await yard.sync("prod")
    uid = yard.job("a").metadata.uid
    del prod.files["p.yaml"]
    await yard.sync("prod")
    assert owner_of(yard.job("a")) == ""
    test.files["t.yaml"] = manifest("a", adopt="true")
    assert (await yard.sync("test")).phase is SourcePhase.SYNCED
    assert yard.job("a").metadata.uid == uid
    assert yard.claims()["a"].spec.source == "test"


async def test_one_object_in_two_files_is_an_error_that_names_both() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files = {"a.yaml": manifest("a"), "b.yaml": manifest("b")}
    await yard.sync()
    tree.files["copy.yaml"] = manifest("a", "two")
    status = await yard.sync()
    (found,) = status.problems
    assert (found.reason, found.file) == ("DeclaredTwice", "copy.yaml")
    assert "a.yaml:1" in found.message
    assert yard.images() == {"a": "one", "b": "one"}


async def test_a_wrong_file_does_not_hold_up_the_others() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files = {"a.yaml": manifest("a").replace("batch", "bitch"), "b.yaml": manifest("b")}
    status = await yard.sync()
    assert list(yard.jobs()) == ["b"]
    (found,) = status.problems
    assert (found.file, found.line) == ("a.yaml", 6)
    assert status.revision_applied == ""
    tree.files["a.yaml"] = manifest("a")
    status = await yard.sync()
    assert (status.phase, status.problems) == ("Synced", ())
    assert status.revision_applied == status.revision_seen


async def test_what_admission_refuses_is_told_by_file_and_line() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files["a.yaml"] = manifest("a")
    await yard.sync()
    tree.files["a.yaml"] = "# moved down\n" + manifest("a").replace("batch", "service")
    status = await yard.sync()
    (found,) = status.problems
    assert (found.file, found.line, found.object) == ("a.yaml", 2, "Job default/a")
    assert "cannot change" in found.message


async def test_kinds_that_cannot_come_from_a_directory_are_refused() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files["a.yaml"] = manifest("a").replace("kind: Job", "kind: Source")
    status = await yard.sync()
    assert status.problems_total == 1
    assert yard.jobs() == {}


async def test_bad_annotations_are_refused() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files["a.yaml"] = manifest("a", prune="never")
    (found,) = (await yard.sync()).problems
    assert (found.reason, "'never'" in found.message) == ("BadAnnotation", True)


async def test_a_node_file_waits_for_its_node_and_never_deletes_it() -> None:
    from tests.support.stores import node

    yard = Yard()
    tree = await yard.add_source()
    tree.files = {
        "n.yaml": "apiVersion: bacalhau.org/v1\nkind: Node\nmetadata: {name: edge, labels: {a: b}}",
        "j.yaml": manifest("j"),
    }
    status = await yard.sync()
    assert (status.phase, status.counts.waiting) == ("Progressing", 1)
    assert status.waiting
    await yard.put(node("edge"))
    status = await yard.sync()
    assert status.phase is SourcePhase.SYNCED
    found = await yard.store.get(Ref("Node", "", "edge"))
    assert found
    assert found.metadata.labels == {"a": "b"}
    del tree.files["n.yaml"]
    await yard.sync()
    assert await yard.store.get(Ref("Node", "", "edge"))
    assert "edge" not in yard.claims()


async def test_detect_reports_and_changes_nothing() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files = {f"{n}.yaml": manifest(n) for n in "abcdef"}
    await yard.sync()
    await yard.change_spec(mode="detect")
    await yard.put(with_label(yard.job("a"), team="x"))
    tree.files["b.yaml"] = manifest("b", "two")
    del tree.files["c.yaml"]
    tree.files["new.yaml"] = manifest("new")
    status = await yard.sync()
    assert yard.images() == dict.fromkeys("abcdef", "one")
    assert status.phase is SourcePhase.DRIFTED
    drift = {d.object.rpartition("/")[2]: (d.action, d.fields) for d in status.drift}
    assert drift["a"] == ("change", ("metadata.labels.team",))
    assert drift["b"][0] == "change"
    assert "spec.tasks[main].engine.params.image" in drift["b"][1]
    assert drift["c"][0] == "delete"
    assert drift["new"][0] == "create"
    assert status.counts.drifted == 4
    await yard.change_spec(mode="enforce")
    assert (await yard.sync()).phase is SourcePhase.SYNCED
    assert yard.images() == {
        "a": "one",
        "b": "two",
        "d": "one",
        "e": "one",
        "f": "one",
        "new": "one",
    }


async def test_off_and_suspended_do_not_even_look() -> None:
    yard = Yard()
    tree = await yard.add_source(mode="off")
    tree.files["a.yaml"] = manifest("a")
    assert (await yard.sync()).phase is SourcePhase.OFF
    until = yard.now + timedelta(hours=1)
    await yard.change_spec(mode="enforce", suspension=Suspension(until=until, reason="audit"))
    status = await yard.sync()
    assert status.phase is SourcePhase.SUSPENDED
    assert status.waiting
    assert status.waiting.until == until
    assert tree.reads == 0
    result = await yard.once()
    assert result.requeue_after == pytest.approx(3600)
    await yard.pass_time(timedelta(hours=1))  # nobody has to remember
    assert (await yard.sync()).phase is SourcePhase.SYNCED
    assert list(yard.jobs()) == ["a"]


async def test_a_directory_that_never_rests_changes_nothing() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files["a.yaml"] = manifest("a")
    await yard.sync()
    before = yard.source()
    tree.is_restless, tree.files = True, {}
    result = await yard.once()
    assert result.requeue_after
    assert yard.source() == before
    assert list(yard.jobs()) == ["a"]


async def test_a_deleted_source_lets_its_objects_go() -> None:
    yard = Yard()
    tree = await yard.add_source()
    tree.files["a.yaml"] = manifest("a")
    await yard.sync()
    await yard.drop(Ref("Source", "", "prod"))
    await yard.tidy_claims()
    assert yard.claims() == {}
    assert owner_of(yard.job("a")) == ""
    other = await yard.add_source("other")
    other.files["a.yaml"] = manifest("a", adopt="true")
    assert (await yard.sync("other")).phase is SourcePhase.SYNCED


async def test_a_rerun_of_a_retired_job_stays_the_sources() -> None:
    from bacalhau_api.admission import retire, revive

    yard = Yard()
    tree = await yard.add_source()
    tree.files = {"a.yaml": manifest("a"), "b.yaml": manifest("b")}
    await yard.sync()
    await yard.finish("a")
    record = retire(yard.job("a"), yard.now)
    await yard.drop(yard.job("a").ref)
    await yard.put(record)
    await yard.restart()
    status = await yard.sync()
    assert (status.phase, sorted(yard.jobs())) == ("Synced", ["b"])  # it has run: not again
    again = revive(record, "now", now=yard.now, uid=yard.ids.uid())
    await yard.drop(record.ref)
    await yard.put(again)
    assert (await yard.sync()).phase is SourcePhase.SYNCED
    assert yard.claims()["a"].spec.uid == again.metadata.uid
    tree.files["a.yaml"] = manifest("a", "two")
    await yard.sync()
    assert yard.images()["a"] == "two"
