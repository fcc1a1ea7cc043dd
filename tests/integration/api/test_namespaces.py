"""Namespaces over real HTTP: defaults, quotas in plans, and what is said of them."""

import pytest

from bacalhau.client.sync import Client
from bacalhau.replies import DocumentText, SetRequest
from bacalhau_api.errors import InvalidError
from bacalhau_api.meta import Ref
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.namespace import Namespace
from tests.support.api_objects import make_job
from tests.support.api_server import RunningServer
from tests.support.job_world import make_node

NAMESPACE = """
apiVersion: bacalhau.org/v1
kind: Namespace
metadata: {name: default}
spec:
  defaults: {resources: {cpu: 250m}}
  quota: {executions: 2, resources: {cpu: 10, memory: 10Gi}, storedResults: 20Gi}
"""


def request(*texts: str) -> SetRequest:
    """A set of manifests."""
    return SetRequest(documents=tuple(DocumentText(text=text) for text in texts))


def test_a_namespace_is_made_changed_shown_and_deleted(
    client: Client, server: RunningServer
) -> None:
    assert client.apply_set(request(NAMESPACE)).objects[0].outcome == "created"
    stored = client.get(Namespace, "default")
    assert stored.spec.quota.stored_results == 20 << 30
    assert stored.spec.quota.resources.cpu_millis == 10_000
    assert client.apply_set(request(NAMESPACE)).objects[0].outcome == "unchanged"
    plan = client.plan(request(NAMESPACE.replace("executions: 2", "executions: 3")))
    assert [(f.field, f.old, f.new) for f in plan.objects[0].fields] == [
        ("spec.quota.executions", 2, 3)
    ]
    told = client.explain(Namespace, "default")
    assert "0 of 2 executions in use" in told.because
    client.delete(Namespace, "default")
    assert server.get(Ref("Namespace", "", "default")) is None


def test_its_defaults_are_given_to_new_jobs_only(client: Client) -> None:
    client.apply(make_job("old"))
    client.apply_set(request(NAMESPACE))
    client.apply(make_job("new"))
    cpus = {j.name: j.spec.task.resources.cpu_millis for j in client.list(Job)}
    assert cpus == {"old": 500, "new": 250}
    client.apply_set(request(NAMESPACE.replace("250m", "750m")))
    for name in cpus:
        assert client.apply(make_job(name)).outcome == "unchanged"


def test_a_plan_over_quota_says_so(client: Client, server: RunningServer) -> None:
    server.put(make_node("n1", cpu=10_000))
    client.apply_set(request(NAMESPACE))
    plan = client.plan(make_job("a", count=5).encode())
    (item,) = plan.objects
    assert len(item.executions) == 2
    assert item.queued is not None
    assert (item.queued.what, item.queued.slots) == ("Quota", 3)
    assert "its quota of 2 executions" in item.queued.message


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("executions: 2", "executions: -1", "spec.quota.executions"),
        ("executions: 2", "execution: 2", "spec.quota.execution"),
        ("20Gi", "much", "spec.quota.storedResults"),
        ("250m", "20", "spec.defaults.resources.cpu"),
        ("{name: default}", "{name: a b}", "metadata.name"),
    ],
)
def test_what_is_wrong_with_a_namespace_is_named(
    client: Client, old: str, new: str, field: str
) -> None:
    with pytest.raises(InvalidError) as error:
        client.plan(request(NAMESPACE.replace(old, new)))
    assert [problem.field for problem in error.value.problems] == [field]
