"""No input makes the server fail: whatever is sent, the answer is an error in the one shape."""

import json
import string
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bacalhau_api.v1.execution import Phase
from tests.support.api_objects import make_execution, make_node, stored_job
from tests.support.api_server import RunningServer, running_server

JOBS = "/apis/bacalhau.org/v1/namespaces/default/jobs"
SHAPE = {"reason", "message", "field", "value", "hint", "problems"}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
good: dict[str, Any] = {
    "apiVersion": "bacalhau.org/v1",
    "kind": "Job",
    "metadata": {"name": "fuzz", "labels": {"a": "b"}},
    "spec": {
        "type": "batch",
        "count": 1,
        "tasks": [{"name": "main", "engine": {"type": "noop", "params": {}}, "env": {"A": "b"}}],
        "constraints": [{"key": "a", "operator": "in", "values": ["b"]}],
        "retry": {"attempts": 3},
    },
}
fuzzed = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def fuzz_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for all of it."""
    with running_server(tmp_path_factory.mktemp("nodes")) as running:
        job = stored_job()
        execution = make_execution(job, phase=Phase.RUNNING)
        running.put(job, execution, make_node())
        running.nodes.write("n1", execution.name, "stdout", "hi\n")
        yield running


@pytest.fixture(scope="module")
def fuzz_http(fuzz_server: RunningServer) -> Iterator[httpx.Client]:
    """HTTP to it."""
    with httpx.Client(base_url=fuzz_server.url, trust_env=False, timeout=20) as made:
        yield made


def check(answer: httpx.Response) -> None:
    """Never a failure of the server, and errors always in their shape."""
    assert answer.status_code < 500 or answer.status_code == 503, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()) == SHAPE
        assert "Traceback" not in answer.text


def mutations(draw: st.DrawFn) -> Any:
    """The good job with one place replaced by anything."""
    data = json.loads(json.dumps(good))
    place: Any = data
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and draw(st.booleans()):
            place = place[key]
            continue
        place[key] = draw(json_values)
        break
    return data


@fuzzed
@given(data=st.composite(mutations)())
def test_mutated_jobs(fuzz_http: httpx.Client, data: Any) -> None:
    body = json.dumps(data).encode()
    for method, path in (("PUT", f"{JOBS}/fuzz?dryRun=true"), ("POST", f"{JOBS}?dryRun=true")):
        headers = {"content-type": "application/json"}
        check(fuzz_http.request(method, path, content=body, headers=headers))


@fuzzed
@given(
    body=st.binary(max_size=200) | st.text(alphabet=string.printable, max_size=200).map(str.encode),
    kind=st.sampled_from(["application/json", "application/yaml", "text/yaml", "text/html", ""]),
    path=st.sampled_from(
        [f"{JOBS}", f"{JOBS}/a", f"{JOBS}/a/stop", f"{JOBS}/a/rerun",
         "/apis/bacalhau.org/v1/nodes/join", "/apis/bacalhau.org/v1/tokens/join",
         "/apis/bacalhau.org/v1/nodes/n1"]
    ),
    method=st.sampled_from(["POST", "PUT", "PATCH"]),
)  # fmt: skip
def test_any_body(fuzz_http: httpx.Client, body: bytes, kind: str, path: str, method: str) -> None:
    check(fuzz_http.request(method, path, content=body, headers={"content-type": kind}))


@fuzzed
@given(
    name=st.text(min_size=1, max_size=80).map(lambda t: t.encode("utf-8", "replace").decode()),
    namespace=st.sampled_from(["default", "other", "*", ">", "a.b", " ", "%00"]),
    plural=st.sampled_from(["jobs", "executions", "publications", "acceptances"]),
    sub=st.sampled_from(["", "/history", "/explain", "/logs", "/results", "/outputs", "/nope"]),
)
def test_any_name(
    fuzz_http: httpx.Client, name: str, namespace: str, plural: str, sub: str
) -> None:
    path = f"/apis/bacalhau.org/v1/namespaces/{quote(namespace, safe='')}/{plural}"
    check(fuzz_http.get(f"{path}/{quote(name, safe='')}{sub}"))
    check(fuzz_http.get(f"/apis/bacalhau.org/v1/nodes/{quote(name, safe='')}{sub}"))


@settings(fuzzed, max_examples=40)
@given(
    params=st.dictionaries(
        st.sampled_from(
            ["labelSelector", "fieldSelector", "limit", "continue", "sort", "resourceVersion",
             "tail", "offset", "stream", "path", "after", "generation", "dryRun", "force", "uid"]
        ),
        st.text(max_size=30).map(lambda t: t.encode("utf-8", "replace").decode())
        | st.integers(-(2**70), 2**70).map(str)
        | st.sampled_from(["nan", "inf", "true", "a=b", "phase=x", "a in (", "1.x", "../..", "e" * 5000]),
        max_size=4,
    )
)  # fmt: skip
def test_any_query(
    fuzz_http: httpx.Client, fuzz_server: RunningServer, params: dict[str, str]
) -> None:
    execution = fuzz_server.all("Execution")[0].name
    base = "/apis/bacalhau.org/v1"
    for path in (
        f"{base}/nodes", JOBS, f"{JOBS}/a/logs", f"{JOBS}/a/results", f"{JOBS}/a/history",
        f"{base}/namespaces/default/executions/{execution}/logs",
        f"{base}/namespaces/default/executions/{execution}/outputs",
        f"{base}/namespaces/default/executions/{execution}/outputs/file",
    ):  # fmt: skip
        check(fuzz_http.get(path, params=params))
