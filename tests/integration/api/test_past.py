"""The past over real HTTP: history with its origin, an object as it was, differences, rollback; and
what is retired stays so."""

from datetime import UTC, datetime, timedelta

import httpx
import pytest

from bacalhau.client.sync import Client
from bacalhau_api.admission import retire
from bacalhau_api.errors import ConflictError, InvalidError, NotFoundError
from bacalhau_api.meta import Ref
from bacalhau_api.provenance import Provenance
from bacalhau_api.v1.job import Job, JobPhase, JobType
from bacalhau_api.v1.node import Node, NodeSpec
from bacalhau_api.v1.retired import RetiredJob
from tests.support.api_objects import make_job, make_node
from tests.support.api_server import RunningServer

JOB = "/apis/bacalhau.org/v1/namespaces/default/jobs/a"
REF = Ref("Job", "default", "a")


def with_env(mode: str, *, count: int = 1, **spec: object) -> Job:
    """A job whose run depends on `mode`."""
    job = make_job(count=count)
    task = job.spec.task.but(env={"MODE": mode})
    return job.but(spec=job.spec.but(tasks=(task,), **spec))


def stored(server: RunningServer) -> Job:
    """The job as it is stored."""
    found = server.get(REF)
    assert isinstance(found, Job)
    return found


def finish(server: RunningServer) -> Job:
    """The job's present generation ends well."""
    job = stored(server)
    status = job.status.but(
        observed_generation=job.metadata.generation,
        phase=JobPhase.COMPLETED,
        finished_at=datetime.now(UTC),
    )
    (put,) = server.put(job.but(status=status))
    assert isinstance(put, Job)
    return put


def retired(server: RunningServer) -> None:
    """The job ends, is retired and is gone, as the retention and job reconcilers do it."""
    job = finish(server)
    server.put(retire(job, datetime.now(UTC)))
    server.drop(REF)


def test_history_tells_who_what_why_and_from_where(client: Client, server: RunningServer) -> None:
    origin = Provenance(source="a.yaml", commit="c0ffee", by="alice@laptop", message="first")
    client.apply(with_env("x"), origin=origin)
    finish(server)
    client.apply(with_env("y"), origin=origin.but(commit="badcafe", message=""))
    told = client.history(Job, "a")
    assert [(i.reason, i.declared, i.generation) for i in told] == [
        ("Created", True, 1),
        ("Arranged", False, 1),
        ("Applied", True, 2),
    ]
    assert [(i.source, i.commit, i.by) for i in told] == [
        ("a.yaml", "c0ffee", "alice@laptop"),
        ("", "", ""),
        ("a.yaml", "badcafe", "alice@laptop"),
    ]
    assert told[0].actor == "user:local"
    assert "first" in told[0].message
    changes = client.changes(Job, "a")
    assert [i.revision for i in changes] == [told[0].revision, told[2].revision]


def test_a_limited_history_still_knows_what_changed(client: Client, server: RunningServer) -> None:
    client.apply(with_env("x"))
    finish(server)
    finish(server)
    (last,) = client.history(Job, "a", limit=1)
    assert not last.declared


def test_an_object_as_it_was_at_a_time(client: Client, server: RunningServer) -> None:
    client.apply(with_env("x"))
    first = client.history(Job, "a")[0].time
    client.apply(with_env("y"))
    server.drop(REF)
    assert client.get_at(Job, "a", first).spec.task.env == {"MODE": "x"}
    with pytest.raises(NotFoundError, match="does not reach back"):
        client.get_at(Job, "a", first - timedelta(days=1))
    with pytest.raises(NotFoundError, match="was removed"):
        client.get_at(Job, "a", datetime.now(UTC) + timedelta(days=1))
    with pytest.raises(NotFoundError):
        client.get_at(Job, "nobody", first)


def test_what_differs_between_revisions(client: Client) -> None:
    for mode in "xyz":
        client.apply(with_env(mode))
    first, second, _ = (i.revision for i in client.changes(Job, "a"))
    found = client.diff(Job, "a", first, second)
    assert [(f.field, f.old, f.new, f.runs) for f in found.fields] == [
        ("spec.tasks[main].env.MODE", "x", "y", True)
    ]
    assert client.diff(Job, "a", "g1").fields[0].new == "z"
    assert client.diff(Job, "a", "g3", "g3").fields == ()


@pytest.mark.parametrize("text", ["x", "-1", "g", "1.5", ""])
def test_what_is_no_revision_is_said(http: httpx.Client, client: Client, text: str) -> None:
    client.apply(with_env("x"))
    answer = http.get(f"{JOB}/diff", params={"from": text})
    assert answer.status_code == 400
    assert answer.json()["field"] == "from"
    assert "history" in answer.json()["hint"]


def test_revisions_that_are_not_known_are_not_found(client: Client) -> None:
    client.apply(with_env("x"))
    with pytest.raises(NotFoundError, match="no generation 7"):
        client.rollback(Job, "a", "g7")
    with pytest.raises(NotFoundError, match="does not reach back"):
        client.diff(Job, "a", 0)


def test_rollback_runs_the_old_spec_as_a_new_generation(
    client: Client, server: RunningServer
) -> None:
    first = client.apply(with_env("x"), origin=Provenance(source="a.yaml", commit="c0ffee"))
    client.apply(with_env("y"))
    done = client.rollback(Job, "a", first.job.metadata.resource_version, message="y is wrong")
    assert (done.outcome, done.generation) == ("configured", 3)
    job = stored(server)
    assert job.spec.task.env == {"MODE": "x"}
    assert job.metadata.uid == first.job.metadata.uid
    last = client.history(Job, "a")[-1]
    assert last.reason == "RolledBack"
    assert "y is wrong" in last.message
    assert (last.source, last.commit) == ("a.yaml", "c0ffee")
    assert client.rollback(Job, "a", "g3").outcome == "unchanged"


def test_rollback_keeps_labels_and_undoes_a_stop(client: Client, server: RunningServer) -> None:
    client.apply(with_env("x"))
    client.apply(with_env("y").with_meta(labels={"team": "data"}))
    client.stop("a")
    client.rollback(Job, "a", "g1")
    job = stored(server)
    assert job.metadata.labels == {"team": "data"}
    assert not job.is_stopped


def test_rollback_undoes_a_deletion(client: Client, server: RunningServer) -> None:
    client.apply(with_env("x"))
    revision = client.history(Job, "a")[0].revision
    server.drop(REF)
    done = client.rollback(Job, "a", revision)
    assert done.outcome == "created"
    assert stored(server).spec.task.env == {"MODE": "x"}


def test_rollback_of_a_job_that_is_going_is_refused(client: Client) -> None:
    client.apply(with_env("x"))
    client.delete(Job, "a")
    with pytest.raises(ConflictError, match="being deleted"):
        client.rollback(Job, "a", "g1")


def test_rollback_of_a_node_brings_back_what_operators_said(
    client: Client, server: RunningServer
) -> None:
    server.put(make_node("n1"))
    client.node_verb("drain", "n1")
    drained = client.history(Node, "n1")[-1].revision
    client.node_verb("uncordon", "n1")
    client.rollback(Node, "n1", drained)
    node = server.get(Ref("Node", "", "n1"))
    assert isinstance(node, Node)
    key = make_node("n1").spec.public_key
    assert node.spec == NodeSpec(
        membership=node.spec.membership, unschedulable=True, drain=True, public_key=key
    )


def test_a_retired_run_is_not_started_again_by_its_file(
    client: Client, server: RunningServer
) -> None:
    client.apply(with_env("x"))
    retired(server)
    again = client.apply(with_env("x"))
    assert again.outcome == "unchanged"
    assert again.job.status.phase is JobPhase.COMPLETED
    assert "retired" in again.warnings[0]
    assert server.get(REF) is None
    plan = client.plan(with_env("x").encode())
    assert (plan.changes, plan.objects[0].run) == (False, "retired")


def test_a_retired_job_that_changed_runs_and_leaves_no_record(
    client: Client, server: RunningServer
) -> None:
    client.apply(with_env("x"))
    retired(server)
    assert client.apply(with_env("y")).outcome == "created"
    assert server.all("RetiredJob") == ()
    server.drop(REF)
    assert client.apply(with_env("x")).outcome == "created", "a deleted job runs again"


def test_a_retired_job_runs_again_on_request(client: Client, server: RunningServer) -> None:
    client.apply(with_env("x").with_meta(labels={"team": "data"}))
    retired(server)
    job = client.rerun("a", nonce="n1")
    assert job.spec.task.env == {"MODE": "x"}
    assert job.metadata.labels == {"team": "data"}
    assert server.all("RetiredJob") == ()
    assert client.apply(with_env("x").with_meta(labels={"team": "data"})).outcome == "unchanged"


def test_a_retired_job_can_be_forgotten(client: Client, server: RunningServer) -> None:
    client.apply(with_env("x"))
    retired(server)
    assert client.get(RetiredJob, "a").spec.phase is JobPhase.COMPLETED
    assert "rerun a" in client.explain(RetiredJob, "a").remedies[0]
    client.delete(RetiredJob, "a")
    assert client.apply(with_env("x")).outcome == "created"


def test_a_change_that_is_held_runs_with_rerun(client: Client, server: RunningServer) -> None:
    client.apply(with_env("x", on_change="manual"))
    held = client.apply(with_env("y", on_change="manual"))
    assert (held.outcome, held.job.metadata.generation) == ("configured", 1)
    assert "rerun" in held.warnings[0]
    assert stored(server).spec.task.env == {"MODE": "x"}
    assert client.apply(with_env("y", on_change="manual")).outcome == "unchanged"
    plan = client.plan(with_env("z", on_change="manual").encode())
    assert (plan.objects[0].run, plan.objects[0].generation_after) == ("held", 1)
    assert [f.new for f in plan.objects[0].fields] == ["z"]
    job = client.rerun("a")
    assert (job.spec.task.env, job.metadata.generation) == ({"MODE": "y"}, 2)
    assert client.apply(with_env("y", on_change="manual")).outcome == "unchanged"


def test_a_held_change_that_is_taken_back_is_forgotten(
    client: Client, server: RunningServer
) -> None:
    client.apply(with_env("x", on_change="manual"))
    client.apply(with_env("y", on_change="manual"))
    client.apply(with_env("x", on_change="manual"))
    assert client.rerun("a").spec.task.env == {"MODE": "x"}


def test_a_change_that_is_ignored_is_not_kept(client: Client, server: RunningServer) -> None:
    client.apply(with_env("x", on_change="ignore"))
    ignored = client.apply(with_env("y", on_change="ignore"))
    assert ignored.outcome == "unchanged"
    assert "ignored" in ignored.warnings[0]
    labelled = client.apply(with_env("y", on_change="ignore").with_meta(labels={"team": "x"}))
    assert (labelled.outcome, labelled.job.metadata.generation) == ("configured", 1)
    assert stored(server).spec.task.env == {"MODE": "x"}
    asked = with_env("y", on_change="ignore", run_nonce="2")
    assert client.apply(asked).job.metadata.generation == 2
    assert stored(server).spec.task.env == {"MODE": "y"}


def test_on_change_is_for_jobs_that_end(client: Client) -> None:
    job = with_env("x", on_change="manual")
    service = job.but(spec=job.spec.but(type=JobType.SERVICE))
    with pytest.raises(InvalidError, match="batch and ops"):
        client.apply(service)


def test_bad_times_name_their_field(http: httpx.Client, client: Client) -> None:
    client.apply(with_env("x"))
    answer = http.get(JOB, params={"at": "yesterday"})
    assert answer.status_code == 400
    assert answer.json()["field"] == "at"
