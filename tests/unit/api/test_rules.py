"""The rules between fields: each one broken once, and the canonical form of what passes."""

import json
from typing import Any

import pytest

from bacalhau_api.canonical import canonical_job
from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.jobfile import parse_manifests
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.rules import JOB_BYTES_MAX
from bacalhau_api.v1.job import Job, JobSpec, JobType, SpecConfig, Task


def manifest(spec: dict[str, Any], metadata: dict[str, Any], task: dict[str, Any]) -> str:
    whole = {"type": "batch", "tasks": [{"engine": {"type": "noop"}} | task]} | spec
    return json.dumps(
        {
            "apiVersion": "bacalhau.org/v1",
            "kind": "Job",
            "metadata": {"name": "a"} | metadata,
            "spec": whole,
        }
    )


def job(
    spec: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None, **task: Any
) -> Job:
    (document,) = parse_manifests(manifest(spec or {}, metadata or {}, task))
    assert isinstance(document.resource, Job)
    return document.resource


def refused(
    spec: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None, **task: Any
) -> list[Problem]:
    with pytest.raises(InvalidError) as caught:
        job(spec, metadata, **task)
    return list(caught.value.problems)


def source(target: str, alias: str = "") -> dict[str, Any]:
    inline = {"type": "inline", "params": {"url": "data:,x"}}
    return {"source": inline, "target": target, "alias": alias}


HTTP_PORT = {"name": "http"}
TASK = "spec.tasks[0]."


@pytest.mark.parametrize(
    ("task", "field", "says"),
    [
        ({"name": " "}, "name", "must not be blank"),
        ({"name": "a\nb"}, "name", "control"),
        ({"env": {"lower": "x"}}, "env.lower", "upper-case"),
        ({"env": {"BACALHAU_JOB_ID": "x"}}, "env.BACALHAU_JOB_ID", "set by the system"),
        ({"env": {"A": "env:"}}, "env.A", "must follow"),
        ({"env": {f"A{i}": "x" for i in range(1001)}}, "env", "at most 1000"),
        ({"meta": {"a b": "x"}}, "meta['a b']", "spaces"),
        ({"inputSources": [source("in")]}, "inputSources[0].target", "absolute"),
        ({"inputSources": [source("/")]}, "inputSources[0].target", "root"),
        ({"inputSources": [source("/a/../..")]}, "inputSources[0].target", "'..'"),
        ({"inputSources": [source("/a"), source("/a//")]}, "inputSources[1].target", "used twice"),
        ({"inputSources": [source("/a", "x"), source("/b", "x")]}, "inputSources[1].alias", "used twice"),
        ({"inputSources": [{"source": {"type": "noop"}}]}, "inputSources[0].target", "is missing"),
        ({"resultPaths": [{"name": "../x", "path": "/o"}]}, "resultPaths[0].name", "a name is made of"),
        ({"resultPaths": [{"name": "stdout", "path": "/o"}]}, "resultPaths[0].name", "kept anyway"),
        ({"resultPaths": [{"name": "x", "path": "o"}]}, "resultPaths[0].path", "absolute"),
        ({"resultPaths": [{"name": "x", "path": "/o"}, {"name": "X", "path": "/p"}]}, "resultPaths[1].name", "used twice"),
        ({"resultPaths": [{"name": "x", "path": "/o"}, {"name": "y", "path": "/o/."}]}, "resultPaths[1].path", "used twice"),
        ({"inputSources": [source("/o")], "resultPaths": [{"name": "x", "path": "/o"}]}, "resultPaths[0].path", "used twice"),
        ({"resultPaths": [{"name": "x"}]}, "resultPaths[0].path", "is missing"),
        ({"resources": {"gpu": 1.5}}, "resources.gpu", "whole number"),
        ({"resources": {"gpu": -1}}, "resources.gpu", "negative"),
        ({"resources": {"cpuMillis": -1}}, "resources.cpuMillis", "at least 0"),
        ({"resources": {"memory": "1 parsec"}}, "resources.memory", "unknown unit"),
        ({"resources": {"cpuMillis": 10**12}}, "resources.cpu", "more than any machine"),
        ({"network": {"type": "Default", "domains": ["a.org"]}}, "network.domains", "cannot be used"),
        ({"network": {"type": "HTTP", "domains": ["localhost"]}}, "network.domains[0]", "domain name"),
        ({"network": {"type": "wifi"}}, "network.type", "must be one of Default, None, Host"),
        ({"network": {"type": "HTTP", "ports": [HTTP_PORT]}}, "network.ports", "cannot be used"),
        ({"network": {"type": "Bridge", "ports": [{}]}}, "network.ports[0].name", "is missing"),
        ({"network": {"type": "Bridge", "ports": [{"name": "a-b"}]}}, "network.ports[0].name", "letters, digits"),
        ({"network": {"type": "Bridge", "ports": [HTTP_PORT, HTTP_PORT]}}, "network.ports[1].name", "used twice"),
        ({"network": {"type": "Host", "ports": [HTTP_PORT | {"static": 80}]}}, "network.ports[0].static", "1024-65535"),
        ({"network": {"type": "Host", "ports": [HTTP_PORT | {"static": 70000}]}}, "network.ports[0].static", "at most 65535"),
        ({"network": {"type": "Host", "ports": [HTTP_PORT | {"target": 80}]}}, "network.ports[0].target", "cannot be used"),
        ({"network": {"type": "Bridge", "ports": [{"name": "a", "static": 2000}, {"name": "b", "static": 2000}]}},
         "network.ports[1].static", "used twice"),
        ({"network": {"type": "Bridge", "ports": [{"name": "a", "target": 80}, {"name": "b", "target": 80}]}},
         "network.ports[1].target", "used twice"),
        ({"network": {"type": "Bridge", "ports": [HTTP_PORT | {"hostNetwork": "eth0"}]}},
         "network.ports[0].hostNetwork", "IP address"),
        ({"timeouts": {"totalTimeout": 10, "executionTimeout": 6, "queueTimeout": 5}}, "timeouts.totalTimeout", "11 seconds"),
        ({"timeouts": {"executionTimeout": -1}}, "timeouts.executionTimeout", "at least 0"),
        ({"timeouts": {"queueTimeout": 2**62}}, "timeouts.queueTimeout", "too long"),
        ({"timeouts": {"queueTimeout": 1.5}}, "timeouts.queueTimeout", "whole number"),
    ],
)  # fmt: skip
def test_rules_of_a_task(task: dict[str, Any], field: str, says: str) -> None:
    got = refused(**task)
    assert [p.field for p in got] == [TASK + field], got
    assert says in got[0].message


@pytest.mark.parametrize(
    ("spec", "metadata", "field", "says"),
    [
        ({}, {"name": ""}, "metadata.name", "is missing"),
        ({}, {"name": "a b"}, "metadata.name", "letters, digits"),
        ({}, {"name": "x" * 64}, "metadata.name", "at most 63"),
        ({}, {"namespace": "../x"}, "metadata.namespace", "letters, digits"),
        ({}, {"labels": {"a": "x" * 257}}, "metadata.labels.a", "annotation"),
        ({}, {"labels": {"a=b": "x"}}, "metadata.labels['a=b']", "spaces"),
        ({}, {"labels": {f"k{i}": "" for i in range(257)}}, "metadata.labels", "at most 256"),
        ({}, {"annotations": {"a": "\x1b[0m"}}, "metadata.annotations.a", "control"),
        ({"meta": {"": "x"}}, {}, "spec.meta['']", "empty"),
        ({"type": "ops", "count": 2}, {}, "spec.count", "must be 0 or 1"),
        ({"count": -1}, {}, "spec.count", "at least 0"),
        ({"count": 100_001}, {}, "spec.count", "at most 100000"),
        ({"constraints": [{"key": "a", "operator": "=", "values": ["x", "y"]}]}, {}, "spec.constraints[0]", "exactly one"),
        ({"constraints": [{"key": "a", "operator": "=", "values": ["x"]}] * 257}, {}, "spec.constraints", "at most 256"),
        ({"retry": {"backoffSeconds": 10, "backoffSecondsMax": 5}}, {}, "spec.retry.backoffSecondsMax", "at least backoffSeconds"),
        ({"retry": {"exitRules": [{"codes": [0], "action": "fail"}]}}, {}, "spec.retry.exitRules[0].codes[0]", "1 to 255"),
        ({"retry": {"exitRules": [{"codes": [3], "action": "fail"}, {"codes": [3], "action": "retry"}]}}, {},
         "spec.retry.exitRules[1].codes[0]", "used twice"),
        ({"retry": {"exitRules": [{"codes": [3], "action": "skip"}]}}, {}, "spec.retry.exitRules[0].action", "must be one of retry, fail"),
        ({"runNonce": "x" * 300}, {}, "spec.runNonce", "at most 256"),
        ({"disconnect": {"action": "wait"}}, {}, "spec.disconnect.action", "must be one of hold, replace, stop"),
    ],
)  # fmt: skip
def test_rules_of_a_job(
    spec: dict[str, Any], metadata: dict[str, Any], field: str, says: str
) -> None:
    got = refused(spec, metadata)
    assert [p.field for p in got] == [field], got
    assert says in got[0].message


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("taints", [{"key": "a b"}], "spec.taints[0].key"),
        ("taints", [{"key": "a"}, {"key": "a"}], "used twice"),
        ("taints", [{"key": "a", "effect": "NoExecute"}], "must be NoSchedule"),
        ("publicKey", "SUAOUT", "public NKey"),
        ("membership", "approved", "must be one of Pending, Approved, Rejected"),
        ("drian", True, "did you mean drain?"),
    ],
)
def test_rules_of_a_node(field: str, value: object, says: str) -> None:
    text = {
        "apiVersion": "bacalhau.org/v1",
        "kind": "Node",
        "metadata": {"name": "a"},
        "spec": {field: value},
    }
    with pytest.raises(InvalidError) as caught:
        parse_manifests(json.dumps(text))
    assert says in str(caught.value)


def test_the_canonical_form() -> None:
    got = job(
        {"constraints": [{"key": "a", "operator": "DoesNotExist"}], "type": "daemon", "count": 0},
        {"namespace": ""},
        inputSources=[source("/in//x/")],
        resultPaths=[{"name": "out", "path": "/out/./"}],
        network={"type": "http", "domains": [" Example.ORG "]},
    )
    assert (got.metadata.namespace, got.spec.count) == ("default", 1)
    assert got.spec.constraints[0].operator == "!"
    assert got.spec.task.input_sources[0].target == "/in/x"
    assert got.spec.task.result_paths[0].path == "/out"
    assert got.spec.task.network.domains == ("example.org",)
    assert canonical_job(got) == got


def test_ports_and_domains_where_they_belong() -> None:
    ports = [{"name": "a", "static": 2000, "target": 80, "hostNetwork": "::1"}, {"name": "b"}]
    assert len(job(network={"type": "Bridge", "ports": ports}).spec.task.network.ports) == 2
    assert (
        job(network={"type": "Full", "ports": [HTTP_PORT]}).spec.task.network.ports[0].static == 0
    )


def test_a_large_job_is_refused_with_the_remedy() -> None:
    url = "data:," + "x" * JOB_BYTES_MAX
    inline = {"source": {"type": "inline", "params": {"url": url}}, "target": "/a"}
    (problem,) = refused(inputSources=[inline])
    assert "at most 524288 are allowed" in problem.message
    assert "input source" in problem.hint


def test_rules_do_not_blame_values_that_stand_in_for_wrong_ones() -> None:
    """The type is wrong, so nothing is said about what goes with it."""
    got = refused(
        {"type": "opps", "count": 2},
        network={"type": "wifi", "domains": ["a.org"], "ports": [{"name": "x", "target": 80}]},
        timeouts={"totalTimeout": 5, "queueTimeout": "soon"},
        resultPaths=[{"name": 5, "path": "/a"}, {"path": "b"}],
    )
    assert [p.field for p in got] == [
        "spec.tasks[0].timeouts.queueTimeout",
        "spec.type",
        "spec.tasks[0].resultPaths[1].name",
        "spec.tasks[0].network.type",
        "spec.tasks[0].resultPaths[1].path",
    ]


def test_typed_jobs_pass_the_same_door() -> None:
    task = Task(engine=SpecConfig(type="noop"), env={"A\ud800": "x", "B": "\0"})
    wrong = Job(metadata=ObjectMeta(name="a"), spec=JobSpec(type=JobType.BATCH, tasks=(task,)))
    with pytest.raises(InvalidError) as caught:
        canonical_job(wrong)
    assert str(caught.value).encode()
    assert "surrogate" in str(caught.value)
    assert "NUL" in str(caught.value)
