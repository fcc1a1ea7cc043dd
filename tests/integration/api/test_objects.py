"""Lists, gets, writes: over real HTTP, against a real store."""

import json
from datetime import UTC, datetime

import httpx
import pytest

from bacalhau.client.sync import Client
from bacalhau.nats.keys import new_seed, public_key
from bacalhau_api.admission import retire
from bacalhau_api.errors import ConflictError, ForbiddenError, InvalidError, NotFoundError
from bacalhau_api.meta import ObjectMeta, Ref, Waiting
from bacalhau_api.v1.execution import Execution, Phase
from bacalhau_api.v1.job import Job, JobPhase
from bacalhau_api.v1.node import Membership, Node
from bacalhau_api.v1.source import Freeze, Source, SourceCounts, SourcePhase, SourceStatus
from tests.support.api_objects import T0, make_execution, make_job, make_node, stored_job
from tests.support.api_server import RunningServer

JOBS = "/apis/bacalhau.org/v1/namespaces/default/jobs"

YAML = """
apiVersion: bacalhau.org/v1
kind: Job
metadata: {name: y}
spec:
  type: batch
  tasks: [{name: main, engine: {type: noop}}]
"""
FLAT = """
Name: flat
type: batch
tasks:
  - name: main
    engine: {type: noop}
"""


def test_apply_creates_then_changes_nothing_then_configures(client: Client) -> None:
    assert client.apply(make_job()).outcome == "created"
    assert client.apply(make_job()).outcome == "unchanged"
    changed = client.apply(make_job(labels={"team": "x"}))
    assert changed.outcome == "configured"
    assert changed.job.metadata.generation == 1
    again = client.apply(make_job(count=2, labels={"team": "x"}))
    assert (again.outcome, again.job.metadata.generation) == ("configured", 2)


def test_dry_run_stores_nothing(client: Client, server: RunningServer) -> None:
    assert client.apply(make_job(), dry_run=True).outcome == "created"
    assert server.all("Job") == ()


def test_create_refuses_what_exists(client: Client) -> None:
    client.create(make_job())
    with pytest.raises(ConflictError) as error:
        client.create(make_job())
    assert error.value.reason == "AlreadyExists"


def test_create_names_a_job_that_has_no_name(client: Client, server: RunningServer) -> None:
    made = client.create(YAML.replace("metadata: {name: y}\n", ""))
    assert made.job.name.startswith("job-")
    assert [j.name for j in server.all("Job")] == [made.job.name]


@pytest.mark.parametrize(
    ("text", "content_type", "name"),
    [
        (YAML, "application/yaml", "y"),
        (YAML, "application/x-yaml; charset=utf-8", "y"),
        (FLAT, "text/yaml", "flat"),
        (make_job("j").encode(), "application/json", "j"),
    ],
)
def test_bodies_in_all_forms(http: httpx.Client, text: str, content_type: str, name: str) -> None:
    answer = http.put(f"{JOBS}/{name}", content=text, headers={"content-type": content_type})
    assert answer.status_code == 201, answer.text
    assert answer.json()["job"]["metadata"]["name"] == name
    assert answer.json()["job"]["status"]["phase"] == "Pending"


def test_what_the_api_shows_can_be_applied_again(client: Client, http: httpx.Client) -> None:
    client.apply(make_job(labels={"a": "b"}))
    shown = http.get(f"{JOBS}/a").text
    answer = http.put(f"{JOBS}/a", content=shown, headers={"content-type": "application/json"})
    assert answer.json()["outcome"] == "unchanged", answer.text


def test_name_in_body_must_fit_the_path(http: httpx.Client) -> None:
    answer = http.put(f"{JOBS}/b", content=YAML, headers={"content-type": "application/yaml"})
    assert answer.status_code == 400
    assert answer.json()["field"] == "metadata.name"


def test_errors_name_every_problem(client: Client, http: httpx.Client) -> None:
    body = {"apiVersion": "bacalhau.org/v1", "kind": "Job", "metadata": {"name": "x"},
            "spec": {"type": "bacth", "cuont": 1, "tasks": [{"engine": {"type": "noop"}}]}}  # fmt: skip
    answer = http.put(f"{JOBS}/x", json=body)
    assert answer.status_code == 400
    error = answer.json()
    assert error["reason"] == "Invalid"
    assert len(error["problems"]) == 2
    assert {p["field"] for p in error["problems"]} == {"spec.type", "spec.cuont"}
    with pytest.raises(InvalidError) as raised:
        client.create(json.dumps(body))
    assert len(raised.value.problems) == 2


def test_get_and_not_found(client: Client, server: RunningServer) -> None:
    server.put(make_node())
    assert client.get(Node, "n1").name == "n1"
    with pytest.raises(NotFoundError, match="no node n2"):
        client.get(Node, "n2")
    with pytest.raises(NotFoundError, match="in namespace other"):
        client.get(Job, "a", "other")


def test_list_by_labels_and_fields(client: Client, server: RunningServer) -> None:
    job = stored_job(phase=JobPhase.RUNNING)
    server.put(job, stored_job("b"), make_execution(job, 0), make_execution(job, 1, node="n2"))
    client.apply(make_job("c", labels={"team": "x"}))
    assert [j.name for j in client.list(Job)] == ["a", "b", "c"]
    assert [j.name for j in client.list(Job, sort="-name")] == ["c", "b", "a"]
    assert [j.name for j in client.list(Job, labels="team=x")] == ["c"]
    assert [j.name for j in client.list(Job, labels="!team")] == ["a", "b"]
    assert [j.name for j in client.list(Job, fields="phase=running")] == ["a"]
    assert [e.spec.node for e in client.list(Execution, fields="job=a,node!=n1")] == ["n2"]
    assert list(client.list(Job, namespace="other")) == []
    assert len(list(client.list(Job, namespace=None))) == 3


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("fieldSelector=color%3Dred", "fieldSelector"),
        ("fieldSelector=phase", "fieldSelector"),
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("continue=nonsense", "continue"),
        ("continue=WzFd", "continue"),
        ("sort=size", "sort"),
        ("watch=perhaps", "watch"),
        ("watch=true&resourceVersion=abc", "resourceVersion"),
        ("watch=true&timeoutSeconds=nan", "timeoutSeconds"),
        ("labelSelector=a%20in%20(", "selector"),
    ],
)
def test_bad_queries_are_named(http: httpx.Client, query: str, field: str) -> None:
    answer = http.get(f"{JOBS}?{query}")
    assert answer.status_code == 400, answer.text
    assert answer.json()["field"] == field


def test_pages_show_one_moment(client: Client, server: RunningServer) -> None:
    server.put(*(stored_job(f"j{i}") for i in range(5)))
    first = client.page(Job, limit=2)
    server.drop(Ref("Job", "default", "j3"))
    server.put(stored_job("j9"))
    second = client.page(Job, limit=2, token=first.token)
    third = client.page(Job, limit=2, token=second.token)
    names = [j.name for page in (first, second, third) for j in page.items]
    assert names == ["j0", "j1", "j2", "j3", "j4"]
    assert first.resource_version == second.resource_version == third.resource_version
    assert third.token == ""


def test_pages_go_on_when_the_snapshot_is_gone(client: Client, server: RunningServer) -> None:
    server.put(*(stored_job(f"j{i}") for i in range(5)))
    first = client.page(Job, limit=2, sort="-name")
    server.app.context.pager._snapshots.clear()
    server.drop(Ref("Job", "default", "j2"))
    second = client.page(Job, limit=2, sort="-name", token=first.token)
    assert [j.name for j in second.items] == ["j1", "j0"]
    assert second.resource_version != first.resource_version


def test_a_page_token_is_good_for_its_own_list_only(client: Client, server: RunningServer) -> None:
    server.put(*(stored_job(f"j{i}") for i in range(3)))
    token = client.page(Job, limit=1).token
    with pytest.raises(InvalidError, match="continue"):
        client.page(Execution, limit=1, token=token)


def test_stop_rerun_suspend_resume(client: Client) -> None:
    client.apply(make_job())
    assert client.stop("a", message="enough").is_stopped
    version = client.get(Job, "a").metadata.resource_version
    assert client.stop("a").metadata.resource_version == version
    again = client.rerun("a", nonce="x")
    assert (again.metadata.generation, again.is_stopped) == (2, False)
    assert client.rerun("a", nonce="x").metadata.generation == 2
    assert client.rerun("a").metadata.generation == 3
    assert client.suspend("a").spec.suspend
    assert not client.resume("a").spec.suspend
    reasons = [h.reason for h in client.history(Job, "a")]
    assert reasons == [
        "Created", "Stopped", "RerunRequested", "RerunRequested", "Suspended", "Resumed",
    ]  # fmt: skip
    assert client.history(Job, "a")[1].message == "enough"
    assert client.history(Job, "a")[0].actor == "user:local"


def test_rerun_of_what_failed(client: Client, server: RunningServer) -> None:
    failed = stored_job(count=2, phase=JobPhase.FAILED)
    server.put(failed)
    again = client.rerun("a", nonce="x", failed=True)
    assert (again.metadata.generation, again.spec.retry_nonce) == (1, "x")
    assert not again.is_over, "its status is of before"
    version = again.metadata.resource_version
    assert client.rerun("a", nonce="x", failed=True).metadata.resource_version == version
    with pytest.raises(ConflictError, match="is not over") as caught:
        client.rerun("a", nonce="y", failed=True)
    assert caught.value.hint == "wait for its end: bacalhau wait a"
    assert client.history(Job, "a")[-1].reason == "RetryRequested"
    with pytest.raises(NotFoundError):
        client.rerun("none", failed=True)
    server.put(retire(stored_job("old", phase=JobPhase.FAILED), T0))
    with pytest.raises(ConflictError, match="was retired, with its results"):
        client.rerun("old", failed=True)


def test_delete_waits_for_finalizers_and_force_does_not(
    client: Client, server: RunningServer
) -> None:
    client.apply(make_job())
    first = client.delete(Job, "a")
    assert not first.deleted
    assert first.pending
    assert client.get(Job, "a").is_deleting
    with pytest.raises(ConflictError, match="being deleted"):
        client.apply(make_job(count=3))
    assert client.delete(Job, "a", force=True).deleted
    assert server.all("Job") == ()
    with pytest.raises(NotFoundError):
        client.delete(Job, "a")
    assert client.history(Job, "a")[-1].removed


def test_a_node_that_still_works_is_deleted_by_force_only(
    client: Client, server: RunningServer
) -> None:
    job = stored_job()
    server.put(make_node(), make_node("n2"), make_node("n3"), job)
    server.put(
        make_execution(job, 0, phase=Phase.RUNNING),
        make_execution(job, 1, node="n2", phase=Phase.RUNNING),
        make_execution(job, 2, node="n3", phase=Phase.FAILED),
    )
    with pytest.raises(ConflictError, match="n1 has 1 open execution,") as refused:
        client.delete(Node, "n1")
    assert refused.value.reason == "NodeInUse"
    assert "bacalhau node reject n1" in refused.value.hint
    assert client.delete(Node, "n1", force=True).deleted
    client.node_verb("reject", "n2")
    assert client.delete(Node, "n2").deleted
    assert client.delete(Node, "n3").deleted


def test_executions_cannot_be_deleted(http: httpx.Client) -> None:
    answer = http.delete("/apis/bacalhau.org/v1/namespaces/default/executions/x")
    assert answer.status_code == 405
    assert answer.json()["reason"] == "MethodNotAllowed"


def test_node_verbs(client: Client, server: RunningServer) -> None:
    server.put(make_node())
    assert client.node_verb("reject", "n1").spec.membership is Membership.REJECTED
    assert client.node_verb("approve", "n1").spec.membership is Membership.APPROVED
    assert client.node_verb("cordon", "n1").spec.unschedulable
    drained = client.node_verb("drain", "n1").spec
    assert (drained.drain, drained.unschedulable) == (True, True)
    freed = client.node_verb("uncordon", "n1").spec
    assert (freed.drain, freed.unschedulable) == (False, False)


def test_applying_a_node_keeps_what_is_not_given(
    client: Client, http: httpx.Client, server: RunningServer
) -> None:
    server.put(make_node())
    path = "/apis/bacalhau.org/v1/nodes/n1"
    for text in (
        "{apiVersion: bacalhau.org/v1, kind: Node, metadata: {name: n1, labels: {disk: ssd}}}",
        "{apiVersion: bacalhau.org/v1, kind: Node, metadata: {name: n1}, spec: {unschedulable: true}}",
    ):
        answer = http.put(path, content=text, headers={"content-type": "application/yaml"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["outcome"] == "configured"
    node = client.get(Node, "n1")
    assert node.metadata.labels == {"disk": "ssd"}
    assert node.spec.unschedulable
    assert node.spec.membership is Membership.APPROVED
    assert node.spec.public_key.startswith("U")


def test_join_with_a_token_works_once(client: Client, server: RunningServer) -> None:
    token = client.create_join_token(node="edge-1").token
    key = public_key(new_seed())
    answer = client.join(token, "edge-1", key)
    assert answer.nats_url == "nats://127.0.0.1:4222"
    assert client.get(Node, "edge-1").spec.public_key == key
    with pytest.raises(ForbiddenError):
        client.join(token, "edge-2", key)


def test_a_key_that_is_bad_or_another_nodes_does_not_join(client: Client) -> None:
    """And the token is not used up for it."""
    token, key = client.create_join_token().token, public_key(new_seed())
    client.join(client.create_join_token().token, "edge-1", key)
    with pytest.raises(InvalidError, match=r"publicKey: .* checksum .*UAAA"):
        client.join(token, "edge-2", "U" + "A" * 55)
    with pytest.raises(InvalidError, match=f"publicKey: is the key of node edge-1 .*{key}") as got:
        client.join(token, "edge-2", key)
    assert "another --data-dir" in got.value.hint
    with pytest.raises(ForbiddenError):  # who has no token does not learn whose key it is
        client.join("bjt-none", "edge-2", key)
    assert [node.name for node in client.list(Node)] == ["edge-1"]
    client.join(token, "edge-2", public_key(new_seed()))


def test_history_with_objects(client: Client) -> None:
    client.apply(make_job())
    (entry,) = client.history(Job, "a", objects=True)
    assert entry.object is not None
    assert entry.object["spec"]["count"] == 1
    with pytest.raises(NotFoundError):
        client.history(Job, "never")


@pytest.mark.parametrize("uid", ["u" * 65, "u*", "a b", ">", "\u00e9"])
def test_history_of_an_impossible_uid_does_not_reach_the_store(
    client: Client, http: httpx.Client, uid: str
) -> None:
    client.apply(make_job())
    path = "/apis/bacalhau.org/v1/namespaces/default/jobs/a/history"
    answer = http.get(path, params={"uid": uid})
    assert (answer.status_code, answer.json()["field"]) == (400, "uid")
    mine = client.get(Job, "a").metadata.uid
    assert len(http.get(path, params={"uid": mine}).json()["items"]) == 1


def test_results_and_explain(client: Client, server: RunningServer) -> None:
    from bacalhau_api.v1.execution import Outputs, Phase
    from tests.support.api_objects import make_acceptance

    job = stored_job(count=2, phase=JobPhase.RUNNING)
    done = make_execution(
        job, 0, phase=Phase.SUCCEEDED, exit_code=0, outputs=Outputs(files=2, size_bytes=10)
    )
    open_ = make_execution(job, 1, phase=Phase.RUNNING)
    server.put(job, done, open_, make_acceptance(done, job), make_node())
    results = client.results("a")
    (item,) = results.items
    assert (item.slot, item.execution, item.exit_code, item.reachable) == ("0", done.name, 0, True)
    told = client.explain(Job, "a")
    assert [(s.slot, s.state) for s in told.slots] == [("1", "Running"), ("0", "Accepted")]
    assert "accepted" in " ".join(client.explain(Execution, done.name).because)
    assert "takes new work" in client.explain(Node, "n1").headline


def test_metrics_count_what_is_stored(http: httpx.Client, server: RunningServer) -> None:
    server.put(stored_job(phase=JobPhase.RUNNING), make_node())
    text = http.get("/metrics").text
    assert 'bacalhau_phase{kind="Job",phase="Running"} 1.0' in text
    assert 'bacalhau_nodes{contact="Reachable",membership="Approved"} 1.0' in text
    assert "bacalhau_work_queue_depth_job 7.0" in text


def test_metrics_tell_how_sources_stand(http: httpx.Client, server: RunningServer) -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    whole = SourceStatus(
        phase=SourcePhase.SYNCED,
        revision_seen="a",
        revision_applied="a",
        applied_at=at,
        counts=SourceCounts(objects=4, synced=4),
    )
    frozen = SourceStatus(
        phase=SourcePhase.FROZEN,
        revision_seen="b",
        revision_applied="a",
        problems_total=2,
        freeze=Freeze(reason="TooMany", message="m", since=at, count=7),
        waiting=Waiting(what="Approval", since=at, mover="user"),
    )
    for name, status in (("calm", whole), ("stuck", frozen)):
        meta = ObjectMeta(name=name, namespace="", uid=name, generation=1)
        server.put(Source(metadata=meta, status=status))
    text = http.get("/metrics").text
    when = at.timestamp()
    for line in (
        'bacalhau_source_phase{phase="Synced",source="calm"} 1.0',
        'bacalhau_source_phase{phase="Frozen",source="calm"} 0.0',
        'bacalhau_source_phase{phase="Frozen",source="stuck"} 1.0',
        'bacalhau_source_objects{source="calm",state="synced"} 4.0',
        'bacalhau_source_problems{source="stuck"} 2.0',
        'bacalhau_source_frozen_deletions{source="stuck"} 7.0',
        'bacalhau_source_frozen_deletions{source="calm"} 0.0',
        'bacalhau_source_is_behind{source="stuck"} 1.0',
        'bacalhau_source_is_behind{source="calm"} 0.0',
        f'bacalhau_source_applied_timestamp_seconds{{source="calm"}} {when!r}',
        f'bacalhau_source_waiting_since_timestamp_seconds{{source="stuck"}} {when!r}',
    ):
        key, _, value = line.rpartition(" ")
        (found,) = [each for each in text.splitlines() if each.startswith(f"{key} ")]
        assert float(found.rpartition(" ")[2]) == float(value)
    assert 'applied_timestamp_seconds{source="stuck"}' not in text


def test_health(http: httpx.Client) -> None:
    for path in ("/healthz", "/readyz"):
        assert http.get(path).json() == {"status": "ok"}
    assert http.get("/version").json()["version"] == "0.1.0"
