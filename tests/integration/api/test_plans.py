"""Plans and sets over real HTTP: what they say, what their tokens bind, how they refuse."""

import asyncio

import httpx
import pytest

from bacalhau.client.aio import AsyncClient
from bacalhau.client.sync import Client
from bacalhau.replies import DocumentText, SetRequest
from bacalhau_api.errors import ConflictError, InvalidError, NotFoundError
from bacalhau_api.meta import Contact, Ref
from bacalhau_api.plans import PLAN_VERSION, InventoryEntry, ObjectPlan, PlannedExecution
from bacalhau_api.planwords import execution_line
from bacalhau_api.provenance import Provenance
from bacalhau_api.v1.execution import Phase
from bacalhau_api.v1.job import DisconnectPolicy, Job, JobPhase, JobSpec
from bacalhau_api.v1.node import Node
from tests.support.api_objects import make_execution, stored_job
from tests.support.api_server import RunningServer
from tests.support.job_world import make_node

PLAN = "/apis/bacalhau.org/v1/plan"
APPLY = "/apis/bacalhau.org/v1/apply"


def manifest(name: str = "a", *, mode: str = "x", cpu: str = "100m", more: str = "") -> str:
    """A batch job."""
    return f"""
apiVersion: bacalhau.org/v1
kind: Job
metadata: {{name: {name}}}
spec:
  type: batch
  tasks:
    - name: main
      engine: {{type: noop}}
      env: {{MODE: {mode}}}
      resources: {{cpu: {cpu}, memory: 1Mi}}
{more}
"""


def request(*texts: str, **more: object) -> SetRequest:
    """A request for some files."""
    documents = tuple(
        DocumentText(text=text, source=f"jobs/{i}.yaml") for i, text in enumerate(texts)
    )
    return SetRequest.model_validate({"documents": documents} | more)


def only(items: tuple[ObjectPlan, ...]) -> ObjectPlan:
    """The one object of a plan."""
    assert len(items) == 1
    return items[0]


def inventory(server: RunningServer, *names: str) -> tuple[InventoryEntry, ...]:
    """What an owner remembers of jobs."""
    found = [server.get(Ref("Job", "default", name)) for name in names]
    return tuple(
        InventoryEntry(kind="Job", namespace="default", name=j.name, uid=j.metadata.uid)
        for j in found
        if j is not None
    )


def test_a_new_job_is_planned_with_its_place_and_policy(
    client: Client, server: RunningServer
) -> None:
    server.put(make_node("n1"))
    plan = client.plan(request(manifest()))
    item = only(plan.objects)
    assert (plan.version, plan.changes, plan.complete) == (PLAN_VERSION, True, True)
    assert (item.action, item.run, item.generation, item.generation_after) == (
        "create", "first", 0, 1,
    )  # fmt: skip
    assert [(e.action, e.slot, e.node) for e in item.executions] == [("start", "0", "n1")]
    assert item.disconnect is not None
    assert (item.disconnect.action, item.disconnect.after_seconds) == ("replace", 1800)
    assert (item.source, item.line) == ("jobs/0.yaml", 2)
    assert server.all("Job") == ()
    assert server.all("Execution") == ()


def test_a_job_that_fits_nowhere_is_planned_to_wait_and_says_what_would_help(
    client: Client, server: RunningServer
) -> None:
    server.put(make_node("n1", cpu=50))
    item = only(client.plan(request(manifest())).objects)
    assert item.executions == ()
    assert item.queued is not None
    assert (item.queued.what, item.queued.slots) == ("Capacity", 1)
    assert "50m" in item.queued.message
    assert item.queued.verdict is not None
    assert item.queued.verdict.nearest == "n1"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(manifest(cpu="0.1"), id="another spelling"),
        pytest.param("# a comment\n" + manifest(), id="a comment"),
        pytest.param(manifest(more="  count: 1"), id="a default, written out"),
    ],
)
def test_what_means_the_same_is_no_change(client: Client, text: str) -> None:
    client.apply_set(request(manifest()))
    plan = client.plan(request(text))
    assert (plan.changes, only(plan.objects).action) == (False, "none")
    assert only(plan.objects).fields == ()


def test_a_change_is_told_field_by_field_and_what_it_means(client: Client) -> None:
    client.apply_set(request(manifest()))
    changed = manifest(mode="y", more="  priority: 7")
    item = only(client.plan(request(changed)).objects)
    assert [(f.field, f.old, f.new, f.runs) for f in item.fields] == [
        ("spec.priority", 0, 7, False),
        ("spec.tasks[main].env.MODE", "x", "y", True),
    ]
    assert (item.run, item.generation, item.generation_after) == ("rerun", 1, 2)
    label = manifest().replace("{name: a}", "{name: a, labels: {team: x}}")
    item = only(client.plan(request(label)).objects)
    assert [(f.field, f.new, f.runs) for f in item.fields] == [("metadata.labels.team", "x", False)]
    assert (item.run, item.generation_after) == ("", 1)


def test_a_token_does_what_was_planned(client: Client, server: RunningServer) -> None:
    asked = request(manifest("a"), manifest("b"))
    plan = client.plan(asked)
    done = client.apply_set(asked.but(token=plan.token))
    assert [(o.name, o.outcome) for o in done.objects] == [("a", "created"), ("b", "created")]
    again = client.plan(asked)
    assert not again.changes
    same = client.apply_set(asked.but(token=again.token))
    assert [o.outcome for o in same.objects] == ["unchanged", "unchanged"]


def test_a_token_alone_is_enough_while_the_server_remembers(
    client: Client, server: RunningServer
) -> None:
    plan = client.plan(request(manifest()))
    client.apply_set(SetRequest(token=plan.token))
    assert server.get(Ref("Job", "default", "a")) is not None
    other = plan.token[:-6] + "AAAAAA"
    with pytest.raises(InvalidError, match="not the token"):
        client.apply_set(SetRequest(token=other))


def test_a_token_outlives_the_server_that_made_it(client: Client, server: RunningServer) -> None:
    asked = request(manifest())
    plan = client.plan(asked)
    server.app.context.applier._plans.clear()  # as after a restart
    with pytest.raises(ConflictError) as error:
        client.apply_set(SetRequest(token=plan.token))
    assert error.value.reason == "PlanUnknown"
    assert "-f" in error.value.hint
    assert client.apply_set(asked.but(token=plan.token)).objects[0].outcome == "created"


def test_a_plan_that_is_outdated_is_refused_and_says_what_changed(
    client: Client, server: RunningServer
) -> None:
    client.apply_set(request(manifest("a")))
    asked = request(manifest("a", mode="y"), manifest("b"))
    plan = client.plan(asked)
    client.apply_set(request(manifest("a", mode="z")))
    with pytest.raises(ConflictError) as error:
        client.apply_set(asked.but(token=plan.token))
    assert error.value.reason == "PlanOutdated"
    assert "job/a" in error.value.message
    assert "z -> y" in error.value.message
    assert "job/b" not in error.value.message
    assert server.get(Ref("Job", "default", "b")) is None, "a refused set is applied in part"


def test_other_places_are_refused_unless_any_will_do(client: Client, server: RunningServer) -> None:
    server.put(make_node("n1"))
    asked = request(manifest())
    plan = client.plan(asked)
    server.put(make_node("n2"), make_node("n1", unschedulable=True))
    with pytest.raises(ConflictError, match=r"now .*n2") as error:
        client.apply_set(asked.but(token=plan.token))
    assert "--any-place" in error.value.hint
    assert client.apply_set(asked.but(token=plan.token, any_place=True)).objects


def test_a_token_is_about_its_documents(client: Client) -> None:
    plan = client.plan(request(manifest("a")))
    with pytest.raises(InvalidError, match="other documents"):
        client.apply_set(request(manifest("b"), token=plan.token))


def test_one_wrong_document_refuses_the_set(client: Client, server: RunningServer) -> None:
    client.apply_set(request(manifest("a")))
    service = manifest("a").replace("type: batch", "type: service", 1)
    plan = client.plan(request(service, manifest("b")))
    assert (plan.token, plan.summary.refused, plan.summary.create) == ("", 1, 1)
    refused = plan.objects[0]
    assert refused.action == "refused"
    assert refused.problems[0].field == "spec.type"
    with pytest.raises(InvalidError, match="cannot change from batch to service"):
        client.apply_set(request(service, manifest("b")))
    assert server.get(Ref("Job", "default", "b")) is None


def test_an_owner_prunes_what_it_declares_no_more(client: Client, server: RunningServer) -> None:
    owner = "source/prod"
    done = client.apply_set(request(manifest("a"), manifest("b"), owner=owner, prune=True))
    assert sorted(entry.name for entry in done.inventory) == ["a", "b"]
    asked = request(manifest("a"), owner=owner, prune=True, inventory=done.inventory)
    plan = client.plan(asked)
    assert {o.name: o.action for o in plan.objects} == {"a": "none", "b": "delete"}
    after = client.apply_set(asked.but(token=plan.token))
    assert {o.name: o.outcome for o in after.objects} == {"a": "unchanged", "b": "deleted"}
    assert [entry.name for entry in after.inventory] == ["a"]
    gone = server.get(Ref("Job", "default", "b"))
    assert gone is not None
    assert gone.is_deleting


def test_what_is_another_object_by_now_is_not_pruned(client: Client, server: RunningServer) -> None:
    client.apply_set(request(manifest("a"), manifest("b")))
    stale = inventory(server, "a", "b")[1].but(uid="0" * 32)
    asked = request(manifest("a"), owner="source/x", prune=True, inventory=(stale,))
    assert client.plan(asked).summary.delete == 0


@pytest.mark.parametrize(
    "changes", [{"name": "x" * 5000}, {"namespace": "a b"}, {"kind": "Nonsense"}, {"name": ""}]
)
def test_an_inventory_names_possible_objects(
    client: Client, server: RunningServer, changes: dict[str, str]
) -> None:
    client.apply_set(request(manifest("a")))
    (entry,) = inventory(server, "a")
    odd = (entry, entry.but(**changes))
    with pytest.raises(InvalidError, match=r"inventory\[1\]: is not the name of an object"):
        client.apply_set(request(manifest("a"), owner="source/x", prune=True, inventory=odd))


def test_two_owners_of_one_object_are_refused(client: Client) -> None:
    client.apply_set(request(manifest("a"), owner="source/one"))
    plan = client.plan(request(manifest("a", mode="y"), owner="source/two"))
    problem = only(plan.objects).problems[0]
    assert "source/one" in problem.message
    with pytest.raises(InvalidError, match="source/one"):
        client.apply_set(request(manifest("a", mode="y"), owner="source/two"))
    # By hand, it can still be changed.
    assert client.apply_set(request(manifest("a", mode="y"))).objects[0].outcome == "configured"


def test_a_set_is_written_with_its_origin(client: Client, server: RunningServer) -> None:
    origin = Provenance(commit="c0ffee", by="alice@laptop", message="more speed")
    client.apply_set(request(manifest("a"), provenance=origin))
    (entry,) = client.changes(Job, "a")
    assert (entry.source, entry.commit, entry.by) == ("jobs/0.yaml", "c0ffee", "alice@laptop")
    assert entry.message.startswith("more speed from jobs/0.yaml at c0ffee")
    # The same from another commit is no change.
    newer = request(manifest("a"), provenance=origin.but(commit="badcafe"))
    assert client.apply_set(newer).objects[0].outcome == "unchanged"
    assert len(client.history(Job, "a")) == 1


def test_a_node_is_planned_like_a_job(client: Client, server: RunningServer) -> None:
    server.put(make_node("n1"), make_node("n2"))
    text = "apiVersion: bacalhau.org/v1\nkind: Node\nmetadata: {name: n1}\nspec: {drain: true}\n"
    item = only(client.plan(request(text)).objects)
    assert [(f.field, f.old, f.new) for f in item.fields] == [("spec.drain", False, True)]
    assert client.apply_set(request(text)).objects[0].outcome == "configured"
    missing = client.plan(request(text.replace("n1", "n9")))
    assert "no node n9" in only(missing.objects).problems[0].message
    stored = server.get(Ref("Node", "", "n1"))
    assert isinstance(stored, Node)
    assert stored.spec.drain


def test_without_a_node_nothing_happens_to_what_is_elsewhere(
    client: Client, server: RunningServer
) -> None:
    server.put(make_node("n1"), make_node("n2"))
    plan = client.simulate(["node/n1"])
    assert (plan.changes, plan.objects, plan.token) == (False, (), "")
    with pytest.raises(NotFoundError):
        client.simulate(["node/n9"])
    with pytest.raises(InvalidError, match="is not a node"):
        client.simulate(["job/a"])


def test_what_is_lost_with_a_node_moves_or_is_held_by_its_policy(
    client: Client, server: RunningServer
) -> None:
    server.put(make_node("n1"), make_node("n2"))
    for name, action in (("moves", "replace"), ("stays", "hold")):
        job = stored_job(name)
        policy = DisconnectPolicy(action=action, after_seconds=90)  # type: ignore[arg-type]
        job = job.but(spec=job.spec.but(disconnect=policy))
        server.put(job, make_execution(job, phase=Phase.RUNNING, node="n1"))
    plan = client.simulate(["node/n1"])
    told = {o.name: o for o in plan.objects}
    assert [(e.action, e.node, e.after_seconds) for e in told["moves"].executions] == [
        ("start", "n2", None),
        ("lose", "n1", 90.0),
    ]
    assert told["stays"].executions == ()
    assert told["stays"].disconnect is not None
    assert told["stays"].disconnect.action == "hold"
    assert (plan.summary.lose, plan.summary.affected) == (1, 2)
    assert client.simulate(["node/n2"]).objects == ()


def test_what_was_given_up_before_is_not_kept_for_a_node(
    client: Client, server: RunningServer
) -> None:
    server.put(make_node("n1"), make_node("n2"))
    job = stored_job("moved", phase=JobPhase.RUNNING)
    first = make_execution(job, phase=Phase.RUNNING, node="n1")
    lost = first.but(status=first.status.but(contact=Contact.LOST))
    server.put(job, lost, make_execution(job, attempt=1, phase=Phase.RUNNING, node="n2"))
    assert client.simulate(["node/n1"]).objects == ()


def test_the_time_of_a_loss_is_told_in_whole_seconds() -> None:
    told = PlannedExecution(
        action="lose", slot="0", execution="e", node="n1", after_seconds=81.00404
    )
    assert execution_line(told) == "give up e on n1 after 81 s"


def test_what_has_no_effect_is_warned_of_by_plan_and_apply(client: Client) -> None:
    text = manifest("a").replace("spec:", "spec:\n  disconnect: {action: hold, after: 5m}", 1)
    (warning,) = only(client.plan(request(text)).objects).warnings
    assert warning.startswith("spec.disconnect.after has no effect with hold")
    assert client.create(text).warnings == (warning,)


def test_plain_manifests_are_a_set_too(http: httpx.Client) -> None:
    for kind, body in (
        ("application/yaml", manifest("a") + "---" + manifest("b")),
        ("application/json", '{"Name": "c", "Type": "batch", "Tasks": [{"Engine": {"Type": "noop"}}]}'),
    ):  # fmt: skip
        answer = http.post(PLAN, content=body, headers={"Content-Type": kind})
        assert answer.status_code == 200, answer.text
        assert {o["action"] for o in answer.json()["objects"]} == {"create"}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (PLAN, {"documents": [{"text": "kind: Job"}]}, "apiVersion"),
        (PLAN, {"documents": [{"text": "a: ["}]}, ""),
        (PLAN, {"documents": "x"}, "documents"),
        (PLAN, {"documents": [], "unknown": 1}, "unknown"),
        (PLAN, {"documents": [], "prune": True}, "owner"),
        (PLAN, {"documents": [], "namespace": "a b"}, "namespace"),
        (PLAN, {"documents": [], "provenance": {"by": "\x1b[2J"}}, "provenance"),
        (APPLY, {"documents": []}, "documents"),
        (APPLY, {"token": "nonsense"}, "token"),
        ("/apis/bacalhau.org/v1/simulate", {"without": []}, "without"),
        ("/apis/bacalhau.org/v1/simulate", {}, "without"),
    ],
)
def test_bad_requests_name_their_field(
    http: httpx.Client, path: str, body: object, field: str
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["field"] == field or field in answer.json()["field"]
    assert answer.json()["reason"] == "Invalid"


def test_a_declared_twice_object_is_refused(client: Client) -> None:
    with pytest.raises(InvalidError, match="declared twice"):
        client.plan(request(manifest("a"), manifest("a", mode="y")))


def test_the_asynchronous_client_reviews_too(server: RunningServer) -> None:
    async def review() -> str:
        async with AsyncClient(server.url) as client:
            asked = request(manifest("a"))
            plan = await client.plan(asked)
            await client.apply_set(asked.but(token=plan.token))
            await client.apply_set(request(manifest("a", mode="y")))
            diff = await client.diff(Job, "a", "g1")
            assert [f.field for f in diff.fields] == ["spec.tasks[main].env.MODE"]
            back = await client.rollback(Job, "a", "g1")
            assert back.generation == 3
            assert len(await client.changes(Job, "a")) == 3
            assert (await client.simulate(["node/n1"])).summary.lose == 0
            told = await client.explain_pair("n1", "a")
            return told.headline

    server.put(make_node("n1"))
    assert "fits node n1" in asyncio.run(review())


def test_specs_in_plans_survive_their_way(client: Client, server: RunningServer) -> None:
    """What a plan stored is what an apply of each document would have stored."""
    client.apply_set(request(manifest("a")))
    stored = server.get(Ref("Job", "default", "a"))
    assert isinstance(stored, Job)
    assert client.apply(stored).outcome == "unchanged"
    assert isinstance(stored.spec, JobSpec)
