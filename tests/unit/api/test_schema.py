"""The schemas: deterministic, valid themselves, and in agreement with the reader."""

import json
import subprocess
import sys
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from jsonschema import Draft202012Validator

from bacalhau_api.errors import InvalidError
from bacalhau_api.flatjob import from_job
from bacalhau_api.jobfile import parse_manifests, to_document
from bacalhau_api.schema import job_file_schema, kind_schema
from bacalhau_api.v1 import KINDS
from bacalhau_api.v1.job import Job
from tests.support.jobs import jobs

FILES = Draft202012Validator(job_file_schema())

EXAMPLES = """
apiVersion: bacalhau.org/v1
kind: Job
metadata: {name: hello, labels: {version: 1.5}, annotations: }
spec:
  type: batch
  count: 3
  constraints: "region=eu"
  retry: {attempts: 2, backoffSeconds: 5s, exitRules: [{codes: [2], action: fail}]}
  tasks:
    - engine: {type: docker, params: {image: ubuntu, parameters: [sleep, 5]}}
      env: {COUNT: 5, DEBUG: true}
      resources: {cpu: 500m, memory: 512Mi, gpu: 1}
      network: {type: Bridge, ports: [{name: http, target: 80}]}
      timeouts: {totalTimeout: 1h, queueTimeout: 60}
      inputSources: [{source: {type: s3, params: {bucket: data, key: a/*}}, target: /in}]
      resultPaths: [{name: out, path: /out}]
      publisher: {type: s3, params: {bucket: results, key: "{jobID}/{executionID}"}}
---
apiVersion: bacalhau.org/v1
kind: Job
metadata: {name: plug}
spec: {type: ops, tasks: [{engine: {type: quantum, params: {qubits: 5}}, publisher: null}]}
---
apiVersion: bacalhau.org/v1
kind: Job
metadata: {name: trial}
spec: {type: ops, tasks: [{engine: {type: noop, params: {failOnAttempts: 2, durationSeconds: 1m}}}]}
---
apiVersion: bacalhau.org/v1
kind: Node
metadata: {name: edge-1, labels: {zone: a}}
spec: {membership: Approved, unschedulable: false, taints: [{key: gpu, value: "1"}]}
---
name: lower
type: service
count: 0
tasks:
- name: main
  engine: {type: wasm, params: {entrymodule: /m.wasm}}
  inputsources: [{source: {type: inline, params: {url: "data:,x"}}, target: /m.wasm}]
---
Name: upper
Type: batch
Count: null
State: {StateType: Undefined}
Version: 0
Tasks:
- Name: main
  Engine: {Type: docker, Params: {Image: ubuntu, Entrypoint: null, Parameters: [echo, hi]}}
  Publisher: null
  Resources: {CPU: "0.5", Memory: 512Mb}
  Timeouts: {TotalTimeout: 60}
"""

WRONG: list[dict[str, Any]] = [
    {"kind": "Job", "metadata": {"name": "a"}, "spec": {}},
    {"apiVersion": "bacalhau.org/v1", "kind": "Jbo", "metadata": {"name": "a"}},
    {"Name": "a", "Type": "batch"},
    {"Name": "a", "Type": "bach", "Tasks": [{"Engine": {"Type": "noop"}}]},
    {"Name": "a", "Type": "batch", "Tasks": [{"Engine": {"Type": "docker"}}]},
    {
        "name": "a",
        "type": "batch",
        "tasks": [{"engine": {"type": "docker", "params": {"imagee": "x"}}}],
    },
    {"Name": "a", "Type": "batch", "Tasks": [{"Engine": {"Type": "noop"}, "Envv": {}}]},
    {"Name": "a", "Type": "batch", "Tasks": [{"Engine": {"Type": "noop"}, "Env": {"A": [1]}}]},
    {"Name": "a", "Type": "batch", "Count": "many", "Tasks": [{"Engine": {"Type": "noop"}}]},
    {"Type": "batch", "Tasks": [{"Engine": {"Type": "noop"}}]},
]


@pytest.mark.parametrize("document", list(yaml.safe_load_all(EXAMPLES)), ids=lambda d: str(d)[:30])
def test_example_documents_are_valid_for_schema_and_reader(document: Any) -> None:
    FILES.validate(document)
    assert parse_manifests(json.dumps(document))


def test_the_examples_read_as_one_file() -> None:
    assert len(parse_manifests(EXAMPLES)) == 6


@pytest.mark.parametrize("document", WRONG, ids=lambda d: str(d)[:60])
def test_what_the_schema_refuses_the_reader_refuses_too(document: Any) -> None:
    assert not FILES.is_valid(document)
    with pytest.raises(InvalidError):
        parse_manifests(json.dumps(document))


@settings(deadline=None)
@given(jobs())
def test_every_job_is_valid_in_both_forms(job: Job) -> None:
    FILES.validate(json.loads(json.dumps(to_document(job))))
    FILES.validate(from_job(job))
    stored = Draft202012Validator(kind_schema("Job"))
    stored.validate(json.loads(job.encode()))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_a_valid_schema(kind: str) -> None:
    schema = kind_schema(kind)
    Draft202012Validator.check_schema(schema)
    assert schema["properties"]["kind"]["const"] == kind


def test_the_schema_is_the_same_in_every_process() -> None:
    code = (
        "import json; from bacalhau_api.schema import job_file_schema as s; print(json.dumps(s()))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
            env={"PYTHONPATH": "api", "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert json.loads(runs[0]) == job_file_schema()
    Draft202012Validator.check_schema(job_file_schema())


def test_server_owned_fields_are_not_offered_to_editors() -> None:
    defs = job_file_schema()["$defs"]
    assert "uid" not in defs["ObjectMeta"]["properties"]
    assert "stopGeneration" not in defs["JobSpec"]["properties"]
    assert "status" not in defs["Job"]["properties"]
