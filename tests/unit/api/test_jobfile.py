"""Manifests: what is understood, what is dropped with a warning, and how errors read."""

import json
import subprocess
import sys
from typing import Any

import pytest
import yaml
from hypothesis import given, settings

from bacalhau_api.canonical import canonical_job
from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.flatjob import from_job
from bacalhau_api.jobfile import Document, parse_manifests, to_document
from bacalhau_api.v1.job import Job, JobType, NetworkType
from bacalhau_api.v1.node import Membership, Node
from tests.support.jobs import jobs

MANIFEST = """\
apiVersion: bacalhau.org/v1
kind: Job
metadata:
  name: hello
  labels: {version: 1.10, enabled: on}
spec:
  type: batch
  tasks:
    - engine:
        type: docker
        params: {image: ubuntu, parameters: [sleep, 5, 010, null-ish]}
      env: {VERSION: 1.10, COUNTRY: no, TIME: 12:30, EMPTY: ""}
      resources: {cpu: 500m, memory: 512Mi, gpu: 1}
"""

NOOP = (
    "apiVersion: bacalhau.org/v1\nkind: Job\nmetadata: {name: a}\nspec:\n  type: batch\n  tasks:\n"
)
TASK = NOOP + "  - engine: {type: noop}\n    "


def one(text: str | bytes, **options: str) -> Document:
    (document,) = parse_manifests(text, **options)
    return document


def job(text: str | bytes, **options: str) -> Job:
    resource = one(text, **options).resource
    assert isinstance(resource, Job)
    return resource


def problems(text: str | bytes, **options: str) -> tuple[Problem, ...]:
    with pytest.raises(InvalidError) as caught:
        parse_manifests(text, source="job.yaml", **options)
    return caught.value.problems


def flat(**fields: Any) -> str:
    task = {"Name": "main", "Engine": {"Type": "noop"}} | fields.pop("task", {})
    return json.dumps({"Name": "a", "Type": "batch", "Tasks": [task]} | fields)


# --- What is understood ---------------------------------------------------------------------------


def test_a_manifest_takes_text_as_written_and_quantities() -> None:
    got = one(MANIFEST, source="job.yaml")
    assert (got.source, got.line, got.warnings) == ("job.yaml", 1, ())
    assert isinstance(got.resource, Job)
    task = got.resource.spec.task
    assert got.resource.metadata.labels == {"version": "1.10", "enabled": "on"}
    assert task.env == {"VERSION": "1.10", "COUNTRY": "no", "TIME": "12:30", "EMPTY": ""}
    assert task.engine.params == {
        "image": "ubuntu",
        "parameters": ["sleep", "5", "010", "null-ish"],
    }
    assert (task.resources.cpu_millis, task.resources.memory_bytes) == (500, 2**29)
    assert task.resources.gpu == 1


def test_stored_numbers_are_resources_too() -> None:
    text = TASK + "resources: {cpuMillis: 500, memoryBytes: 1000, diskBytes: 5, gpu: '2'}"
    assert job(text).spec.task.resources.wire() == {
        "cpuMillis": 500, "memoryBytes": 1000, "diskBytes": 5, "gpu": 2,
    }  # fmt: skip


@pytest.mark.parametrize("form", ["cpu: 2", "cpu: '2'", "cpu: 2.0", "cpu: 2000m"])
def test_cpu_as_number_or_text(form: str) -> None:
    assert job(TASK + f"resources: {{{form}}}").spec.task.resources.cpu_millis == 2000


def test_nulls_mean_the_default() -> None:
    text = (
        TASK
        + "env:\n    inputSources:\n    network: ~\n    publisher: null\n    timeouts: {totalTimeout: }"
    )
    assert job(text) == job(NOOP + "  - engine: {type: noop}")


def test_network_types_in_any_case_and_seconds_as_durations() -> None:
    text = TASK + "network: {type: none}\n    timeouts: {totalTimeout: 1h30m, queueTimeout: 90}"
    task = job(text).spec.task
    assert task.network.type is NetworkType.NONE
    assert (task.timeouts.total_timeout, task.timeouts.queue_timeout) == (5400, 90)


def test_constraints_as_a_selector() -> None:
    text = NOOP + "  - engine: {type: noop}\n  constraints: 'region in (eu,us), !spot'"
    listed = NOOP + (
        "  - engine: {type: noop}\n  constraints:\n  - {key: region, operator: In, values: [eu, us]}\n"
        "  - {key: spot, operator: DoesNotExist}"
    )
    assert job(text) == job(listed)
    assert [x.operator for x in job(text).spec.constraints] == ["in", "!"]


def test_several_documents_and_lists() -> None:
    node = "apiVersion: bacalhau.org/v1\nkind: Node\nmetadata: {name: edge}\nspec: {unschedulable: true}"
    got = parse_manifests(f"{MANIFEST}---\n{node}\n---\n{flat(Name='b')}\n", source="all.yaml")
    assert [(str(d.resource.ref), d.line) for d in got] == [
        ("Job default/hello", 2 - 1), ("Node edge", 15), ("Job default/b", 20),
    ]  # fmt: skip
    listed = {"kind": "List", "items": [yaml.safe_load(node), json.loads(flat(Name="b"))]}
    assert [str(d.resource.ref) for d in parse_manifests(json.dumps(listed))] == [
        "Node edge", "Job default/b",
    ]  # fmt: skip


def test_a_node_manifest() -> None:
    got = one(
        "apiVersion: bacalhau.org/v1\nkind: Node\nmetadata: {name: edge-1, namespace: x, labels: {zone: 1}}\n"
        "spec: {membership: Approved, drain: true, taints: [{key: gpu, value: yes}]}\nstatus: {contact: Lost}\n"
    )
    assert isinstance(got.resource, Node)
    assert got.resource.spec.membership is Membership.APPROVED
    assert got.resource.labels == {"zone": "1", "name": "edge-1"}
    assert got.resource.spec.taints[0].value == "yes"
    assert got.warnings == ("status, metadata.namespace were ignored: only the server sets this",)


def test_what_the_server_owns_is_dropped_with_warnings() -> None:
    text = """
apiVersion: bacalhau.org/v1
kind: Job
metadata: {name: a, uid: x, generation: 3, resourceVersion: 9, finalizers: [], labels: {bacalhau.org/x: y, z: w}}
spec: {type: batch, stopGeneration: 2, rerunNonce: x, meta: {bacalhau.org/y: z}, tasks: [{engine: {type: noop}}]}
status: {phase: Running}
"""
    got = one(text)
    assert isinstance(got.resource, Job)
    assert got.resource.metadata.wire() == {"name": "a", "labels": {"z": "w"}}
    assert got.resource.spec.wire().keys() == {"type", "tasks"}
    assert got.warnings[0].startswith("metadata.labels: keys beginning with bacalhau.org/")
    assert got.warnings[1].startswith("spec.meta: keys beginning with bacalhau.org/")
    assert got.warnings[2] == (
        "status, metadata.uid, metadata.generation, metadata.resourceVersion, metadata.finalizers, "
        "spec.stopGeneration, spec.rerunNonce were ignored: only the server sets this"
    )


def test_a_default_name_fills_in_where_none_is_given() -> None:
    bare = NOOP.replace("metadata: {name: a}\n", "") + "  - engine: {type: noop}"
    assert job(bare, default_name="b").name == "b"
    assert job(TASK, default_name="b").name == "a"
    assert job(flat(Name=""), default_name="b").name == "b"
    assert job(flat(Name=None), default_name="b").name == "b"


# --- The flat form --------------------------------------------------------------------------------


def test_what_the_go_client_sends_is_accepted() -> None:
    body = (
        '{"Namespace":"","Credential":null,"IdempotencyToken":"","Force":false,"Job":{"ID":"","Name":"n",'
        '"Namespace":"default","Type":"batch","Priority":0,"Count":1,"Constraints":null,"Meta":null,"Labels":{},'
        '"Tasks":[{"Name":"main","Engine":{"Type":"docker","Params":{"Image":"ubuntu","Entrypoint":null,'
        '"Parameters":["echo","hi"],"EnvironmentVariables":null,"WorkingDirectory":""}},"Publisher":null,'
        '"Resources":{},"Timeouts":{}}],"State":{"StateType":"Undefined"},"Version":0,"Revision":0,'
        '"CreateTime":0,"ModifyTime":0}}'
    )
    got = one(body)
    assert got.warnings == ()
    assert isinstance(got.resource, Job)
    assert got.resource.spec.task.engine.params == {"image": "ubuntu", "parameters": ["echo", "hi"]}
    assert got.resource.spec.task.publisher is None


def test_keys_in_any_letter_case_but_free_maps_keep_theirs() -> None:
    text = """
name: x
TYPE: service
cOUNT: 2
labels: {CamelCase: a}
tasks:
- ENGINE: {tYPE: DOCKER, params: {IMAGE: u, workingdirectory: /w//x/}}
  env: {FOO_bar: 1}
"""
    assert "FOO_bar" in str(problems(text)[0])
    got = job(text.replace("FOO_bar", "FOO"))
    assert (got.spec.type, got.spec.count) == (JobType.SERVICE, 2)
    assert got.metadata.labels == {"CamelCase": "a"}
    assert got.spec.task.engine.wire() == {
        "type": "docker", "params": {"image": "u", "workingDirectory": "/w/x"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("job_type", "given", "count"),
    [("batch", {}, 1), ("batch", {"Count": None}, 1), ("batch", {"Count": 0}, 0), ("service", {"Count": 0}, 0),
     ("ops", {}, 1), ("ops", {"Count": 0}, 1), ("daemon", {"Count": 1}, 1)],
)  # fmt: skip
def test_an_absent_count_is_one_and_an_explicit_zero_stays(
    job_type: str, given: dict[str, Any], count: int
) -> None:
    assert job(flat(Type=job_type, **given)).spec.count == count


def test_per_node_jobs_have_no_count() -> None:
    (problem,) = problems(flat(Type="daemon", Count=2))
    assert (problem.field, problem.message, problem.value) == ("Count", "must be 0 or 1", "2")
    assert "runs once on each matching node" in problem.hint


def test_server_owned_fields_warn_only_if_they_say_something() -> None:
    got = one(
        flat(
            ID="j-1",
            State={"StateType": "Running"},
            Version=2,
            Revision=0,
            CreateTime=5,
            ModifyTime=0,
        )
    )
    assert got.warnings == tuple(
        f"{name} is set by the server and was ignored"
        for name in ("ID", "State", "Version", "CreateTime")
    )


def test_more_than_one_task_is_cut_with_a_warning_here_and_refused_in_a_manifest() -> None:
    tasks = [{"Name": str(n), "Engine": {"Type": "noop"}} for n in range(3)]
    got = one(flat(Tasks=tasks))
    assert got.warnings == ("Tasks has 3 tasks; only the first is used",)
    assert isinstance(got.resource, Job)
    assert got.resource.spec.task.name == "0"
    (problem,) = problems(NOOP + "  - engine: {type: noop}\n" * 2)
    assert problem.message == "has 2 tasks, a job has exactly one"
    assert problem.hint == "write one job for each task"


@pytest.mark.parametrize(
    "publisher",
    [None, {}, {"Type": ""}, {"Type": "", "Params": {}}, {"Type": None, "Params": None}],
)
def test_no_publisher_in_many_words(publisher: object) -> None:
    assert job(flat(task={"Publisher": publisher})).spec.task.publisher is None


def test_reserved_meta_is_removed_with_a_warning() -> None:
    got = one(flat(Meta={"bacalhau.org/requester.id": "x", "mine": "y"}))
    assert isinstance(got.resource, Job)
    assert got.resource.spec.meta == {"mine": "y"}
    assert got.warnings == (
        "Meta: keys beginning with bacalhau.org/ belong to the system and were ignored",
    )


def test_the_older_wasm_form() -> None:
    module = {"Source": {"Type": "urlDownload", "Params": {"URL": "https://example.org/a.wasm"}}}
    params = {
        "EntryModule": module,
        "EntryPoint": "run",
        "Parameters": ["x"],
        "ImportModules": [
            module | {"Target": ""},
            module | {"Target": "/lib/two.wasm"},
            "/in/b.wasm",
        ],
    }
    task = {
        "Engine": {"Type": "WASM", "Params": params},
        "InputSources": [
            {"Source": {"Type": "local", "Params": {"SourcePath": "/b"}}, "Target": "/in"}
        ],
    }
    got = job(flat(task=task)).spec.task
    assert got.engine.params == {
        "entryModule": "/wasm/entry.wasm",
        "entrypoint": "run",
        "parameters": ["x"],
        "importModules": ["/wasm/imports/module_0.wasm", "/lib/two.wasm", "/in/b.wasm"],
    }
    assert [x.target for x in got.input_sources] == [
        "/in", "/wasm/entry.wasm", "/wasm/imports/module_0.wasm", "/lib/two.wasm",
    ]  # fmt: skip
    assert got.input_sources[1].source.params == {"url": "https://example.org/a.wasm"}


def test_all_source_types_of_the_flat_form() -> None:
    sources = [
        {"Type": "urlDownload", "Params": {"URL": "https://example.org/f.csv"}},
        {"Type": "S3", "Params": {"Bucket": "bkt", "Key": "k*", "VersionID": "v", "ChecksumSHA256": "c",
                                  "Partition": {"Type": "Date", "DateFormat": "2006"}}},
        {"Type": "ipfs", "Params": {"CID": "QmZ4tDuvesekSs4qM5ZBKpXiZGun7S2CYtEZRB3DYXkjGx"}},
        {"Type": "inline", "Params": {"URL": "data:text/plain,hi"}},
        {"Type": "localDirectory", "Params": {"SourcePath": "/d/", "ReadWrite": "TRUE", "CreateAs": "DIR"}},
        {"Type": "s3managed", "Params": {"JobID": "j", "Nested": {"A": [1]}}},
    ]  # fmt: skip
    inputs = [{"Source": s, "Target": f"/in/{i}", "Alias": ""} for i, s in enumerate(sources)]
    got = job(flat(task={"InputSources": inputs})).spec.task.input_sources
    assert [x.source.wire() for x in got] == [
        {"type": "urlDownload", "params": {"url": "https://example.org/f.csv"}},
        {"type": "s3", "params": {"bucket": "bkt", "key": "k*", "versionId": "v", "checksumSha256": "c",
                                  "partition": {"type": "date", "dateFormat": "2006"}}},
        {"type": "ipfs", "params": {"cid": "QmZ4tDuvesekSs4qM5ZBKpXiZGun7S2CYtEZRB3DYXkjGx"}},
        {"type": "inline", "params": {"url": "data:text/plain,hi"}},
        {"type": "local", "params": {"sourcePath": "/d", "readWrite": True, "createAs": "dir"}},
        {"type": "s3managed", "params": {"JobID": "j", "Nested": {"A": [1]}}},
    ]  # fmt: skip


def test_the_envelope_gives_a_namespace_to_a_job_without_one() -> None:
    inner = json.loads(flat())
    assert job(json.dumps({"Namespace": "team", "Job": inner})).metadata.namespace == "team"
    inner["namespace"] = ""
    assert job(json.dumps({"namespace": "team", "job": inner})).metadata.namespace == "team"
    inner["namespace"] = "own"
    assert job(json.dumps({"Namespace": "team", "Job": inner})).metadata.namespace == "own"
    (problem,) = problems(json.dumps({"Job": inner | {"Name": ""}}))
    assert problem.field == "Job.Name"


def test_a_key_given_in_two_letter_cases_is_refused() -> None:
    (problem,) = problems(
        '{"Name": "a", "name": "b", "Type": "batch", "Tasks": [{"Engine": {"Type": "noop"}}]}'
    )
    assert problem.field == "name"
    assert "given twice" in problem.message


# --- Both forms mean the same ---------------------------------------------------------------------


@settings(deadline=None)
@given(jobs())
def test_every_job_reads_back_from_every_form(given_job: Job) -> None:
    for text in (
        given_job.encode(),
        yaml.safe_dump(to_document(given_job), allow_unicode=True),
        yaml.safe_dump(from_job(given_job)),
        json.dumps(from_job(given_job), ensure_ascii=False),
        json.dumps(_recased(from_job(given_job), str.lower)),
        json.dumps(_recased(from_job(given_job), str.upper)),
    ):
        document = one(text)
        assert document.resource == given_job
        assert document.warnings == ()
    assert canonical_job(given_job) == given_job


_FREE_FORM = {"env", "meta", "labels", "annotations"}


def _recased(value: Any, change: Any, name: str = "", *, is_plug: bool = False) -> Any:
    if isinstance(value, list):
        return [_recased(item, change) for item in value]
    if not isinstance(value, dict) or name.lower() in _FREE_FORM or (name == "Params" and is_plug):
        return value
    is_plug = str(value.get("Type", "")).startswith("plug")
    return {change(k): _recased(v, change, k, is_plug=is_plug) for k, v in value.items()}


# --- How errors read ------------------------------------------------------------------------------


def test_all_problems_come_at_once_with_lines_and_remedies() -> None:
    text = """\
apiVersion: bacalhau.org/v1
kind: Job
metadata: {nam: hello}
spec:
  type: bach
  priority: 010
  tasks:
    - engine: {type: docker, params: {imagee: ubuntu, parameters: 5}}
      resources: {cpu: 500x, gpus: 1}
      env: [1]
      inputSources: [{source: {type: "b ad"}, target: x}]
      timeouts: {totalTimeout: soon, queueTimeout: -1}
---
Type: batch
Tasks: [{Engine: {Type: docker}, Env: {foo: 1}}]
"""
    assert [str(p) for p in problems(text)] == [
        "job.yaml:3: metadata.nam: is not a known field; did you mean name?",
        "job.yaml:5: spec.type: must be one of batch, ops, service, daemon (got 'bach'); did you mean batch?",
        "job.yaml:6: spec.priority: must be a whole number (got '010')",
        "job.yaml:8: spec.tasks[0].engine.params.imagee: is not a known field; did you mean image?",
        "job.yaml:8: spec.tasks[0].engine.params.parameters: must be a list (got 5)",
        ("job.yaml:9: spec.tasks[0].resources.cpu: is not an amount of CPU; "
        "write millicores like 500m or cores like 0.5 (got '500x')"),
        "job.yaml:9: spec.tasks[0].resources.gpus: is not a known field; did you mean gpu?",
        "job.yaml:10: spec.tasks[0].env: must be a mapping",
        ("job.yaml:11: spec.tasks[0].inputSources[0].source.type: must be a name: letters and digits, "
        "parts joined by '-', '_' or '.', at most 63 long (got 'b ad')"),
        "job.yaml:11: spec.tasks[0].inputSources[0].target: must be an absolute path, such as /data (got 'x')",
        ("job.yaml:12: spec.tasks[0].timeouts.totalTimeout: is not a duration; "
        "write seconds like 90, or a text like 90s or 1h30m (got 'soon')"),
        "job.yaml:12: spec.tasks[0].timeouts.queueTimeout: must be at least 0 (got -1)",
        ("job.yaml:14: Name: is missing; a name identifies the object when it is applied again; "
        "give one, such as my-job"),
        "job.yaml:15: Tasks[0].Engine.Params.Image: is missing",
        ("job.yaml:15: Tasks[0].Env.foo: a variable name is upper-case letters, digits and '_', "
        "and begins with a letter (got 'foo')"),
    ]  # fmt: skip


def test_problems_are_bounded() -> None:
    text = NOOP + "  - engine: {type: noop}\n" + "".join(f"  x{i}: 1\n" for i in range(500))
    got = problems(text)
    assert len(got) == 21
    assert got[-1].message == "480 more problems are not shown"


@pytest.mark.parametrize(
    ("text", "field", "says", "hint"),
    [
        ("kind: Job\nmetadata: {name: a}", "apiVersion", "is missing", "write apiVersion: bacalhau.org/v1"),
        ("apiVersion: bacalhau.org/v1\nmetadata: {name: a}", "kind", "is missing", "write kind: Job"),
        ("apiVersion: v1\nkind: Job\nmetadata: {name: a}\nspec: {type: ops, tasks: [{engine: {type: noop}}]}",
         "apiVersion", "must be bacalhau.org/v1", ""),
        ("apiVersion: bacalhau.org/v1\nkind: [Job]\nmetadata: {name: a}", "kind", "must be text", "write kind: Job"),
        ("apiVersion: bacalhau.org/v1\nkind: ''\nmetadata: {name: a}", "kind", "must be text", "write kind: Job"),
        ("apiVersion: [x]\nkind: Node\nmetadata: {name: a}", "apiVersion", "must be bacalhau.org/v1", ""),
        ("apiVersion: bacalhau.org/v1\nkind: Jbo", "kind", "is not a kind", "did you mean Job?"),
        ("apiVersion: bacalhau.org/v1\nkind: Execution", "kind", "written by controllers", "use one of Job, Namespace, Node"),
        ("apiVersion: bacalhau.org/v1\nkind: Job\nmetadata: {name: a}\nSpec: {}", "Spec", "not a known field", "did you mean spec?"),
        ("apiVersion: bacalhau.org/v1\nkind: Job\nmetadata: {name: a}\nspec: {type: ops}", "spec.tasks", "is missing", ""),
        ("apiVersion: bacalhau.org/v1\nkind: Job\nmetadata: a\nspec: 5", "metadata", "must be a mapping", ""),
        ("Name: a\nTyp: batch\nTasks: [{Engine: {Type: noop}}]", "Typ", "not a known field", "did you mean Type?"),
        ("- a", "", "a document must be a mapping", "write apiVersion"),
        ("kind: List\nitems: []", "items", "has no items", ""),
        (TASK + "executionTimeout: 5", "spec.tasks[0].executionTimeout", "not a known field", ""),
        (TASK + "input_sources: []", "spec.tasks[0].input_sources", "not a known field", "did you mean inputSources?"),
        (TASK + "resources: {cpu: 1, cpuMillis: 5}", "spec.tasks[0].resources.cpuMillis", "given twice", ""),
        (TASK + "env: {A: ~}", "spec.tasks[0].env.A", "has no value", 'write "" for an empty one'),
        (TASK + "env: {A: {b: c}}", "spec.tasks[0].env.A", "must be text", ""),
        (TASK + "name: [a]", "spec.tasks[0].name", "must be text", ""),
        (NOOP + "  - {}", "spec.tasks[0].engine", "is missing", ""),
        (NOOP + "  - engine: {params: {}}", "spec.tasks[0].engine.type", "is missing", "docker, wasm, noop"),
        (NOOP + "  - engine: docker", "spec.tasks[0].engine", "must be a mapping", ""),
        (NOOP + "  -", "spec.tasks[0]", "must be a mapping", ""),
        (NOOP + "  - engine: {type: noop}\n  suspend: yes", "spec.suspend", "must be true or false", ""),
        (NOOP + "  - engine: {type: noop}\n  count: 1.5", "spec.count", "must be a whole number", ""),
        (NOOP + "  - engine: {type: noop}\n  count: 99999999999999999999", "spec.count", "beyond the range", ""),
        (NOOP + "  - engine: {type: noop}\n  priority: .nan", "spec.priority", "is not finite", ""),
        (NOOP + "  - engine: {type: noop}\n  count: -1", "spec.count", "must be at least 0", ""),
        (NOOP + "  - engine: {type: noop}\n  retry: {attempts: 0}", "spec.retry.attempts", "must be at least 1", ""),
        (NOOP + "  - engine: {type: noop}\n  constraints: 'a in ('", "spec.constraints", r"expected ')'", ""),
        (NOOP + "  - engine: {type: noop}\n  constraints: [{key: a, operator: near}]", "spec.constraints[0]",
         "is not an operator", ""),
    ],
)  # fmt: skip
def test_each_mistake_is_named(text: str, field: str, says: str, hint: str) -> None:
    first = problems(text)[0]
    assert (first.field, says in first.message, hint in first.hint) == (field, True, True), first


def test_secrets_are_not_shown() -> None:
    text = TASK + "env: {PASSWORD: {hunter2: x}, TOKEN: 'env:hunter2 '}\n    inputSources:\n"
    text += "    - {target: /a, source: {type: urlDownload, params: {url: 'https://u:hunter2@example.org/'}}}\n"
    text += "    - {target: /b, source: {type: urlDownload, params: {url: 'https://example.org/?key=hunter2'}}}\n"
    docker = (
        NOOP
        + "  - engine: {type: docker, params: {image: a, environmentVariables: ['BACALHAU_X=hunter2']}}"
    )
    for shown in (problems(text), problems(docker)):
        assert shown
        assert "hunter2" not in "".join(map(str, shown))


def test_values_are_shown_printable_and_short() -> None:
    (problem,) = problems(json.dumps({"Name": "\x1b[2J\N{RIGHT-TO-LEFT OVERRIDE}" + "x" * 500}
                                     | {"Type": "batch", "Tasks": [{"Engine": {"Type": "noop"}}]}))  # fmt: skip
    assert str(problem).isprintable()
    assert len(str(problem)) < 200


def test_the_same_object_twice_is_refused() -> None:
    (problem,) = problems(f"{MANIFEST}---\n{MANIFEST}")
    assert problem.message == "Job default/hello is given twice, first on line 1"
    assert problem.where == "job.yaml:15"


def test_json_errors_name_the_source_without_a_line() -> None:
    (problem,) = problems('{"Name": "a", "Type": "x", "Tasks": [{"Engine": {"Type": "noop"}}]}')
    assert problem.where == "job.yaml"


def test_reading_job_files_imports_nothing_heavy() -> None:
    heavy = ("jsonschema", "difflib", "bacalhau_api.schema", "asyncio", "http", "numpy")
    code = f"import sys, bacalhau_api.jobfile; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
        env={"PYTHONPATH": "api"},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
